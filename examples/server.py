"""A small HTTP server around `AsyncEngine`, on nothing but asyncio: what a real one has to do, in one file.

POST /v1/completions (a part of OpenAI's: prompt, max_tokens, temperature, top_p, seed, stop, stream; and priority and
deadline_s), GET /metrics (Prometheus), GET /health. One request per connection.

python examples/server.py [--model bundled] [--port 8000]
curl -N localhost:8000/v1/completions -d '{"prompt": "import os", "max_tokens": 32, "stream": true}'
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import signal
import time
from http import HTTPStatus
from typing import Any

from specdec import AsyncEngine, AsyncTokenStream, QueueFullError, SamplingParams
from specdec.metrics.prometheus import CONTENT_TYPE, render

MAX_BODY_BYTES = 4 * 2**20
SAMPLING_FIELDS = ("max_tokens", "temperature", "top_p", "seed", "stop")
KNOWN_FIELDS = {*SAMPLING_FIELDS, "prompt", "model", "stream", "priority", "deadline_s"}


class Refusal(Exception):
    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


class Server:
    def __init__(self, engine: AsyncEngine, model_name: str) -> None:
        self.engine, self.model_name = engine, model_name
        self.connections: set[asyncio.Task[None]] = set()

    def connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.ensure_future(self.handle(reader, writer))
        self.connections.add(task)
        task.add_done_callback(self.connections.discard)

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection. Its end, for whatever reason, drops the stream, which aborts the request."""
        try:
            method, path, body = await read_request(reader)
            await self.answer(method, path, body, reader, writer)
        except Refusal as refusal:
            await send_json(writer, refusal.status, {"error": {"message": str(refusal)}})
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the client is gone
        except Exception as error:
            await send_json(writer, HTTPStatus.INTERNAL_SERVER_ERROR, {"error": {"message": repr(error)}})
        finally:
            writer.close()

    async def answer(
        self, method: str, path: str, body: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        match method, path:
            case "GET", "/health":
                await send_json(writer, HTTPStatus.OK, {"status": "ok"})
            case "GET", "/metrics":
                text = render(self.engine.stats(), self.model_name)
                await send(writer, HTTPStatus.OK, text.encode(), CONTENT_TYPE)
            case "POST", "/v1/completions":
                fields = parse(body)
                stream = self.start(fields)
                work = asyncio.ensure_future(self.complete(stream, bool(fields.get("stream")), writer))
                await until_done_or_gone(work, reader)
            case _:
                raise Refusal(HTTPStatus.NOT_FOUND, f"{method} {path} is not there")

    def start(self, fields: dict[str, Any]) -> AsyncTokenStream:
        try:
            given = {name: fields[name] for name in SAMPLING_FIELDS if fields.get(name) is not None}
            return self.engine.generate(
                fields.get("prompt", ""),
                SamplingParams(**given),
                priority=fields.get("priority", 0),
                deadline_s=fields.get("deadline_s"),
            )
        except QueueFullError as error:
            raise Refusal(HTTPStatus.TOO_MANY_REQUESTS, str(error)) from error
        except ValueError as error:
            raise Refusal(HTTPStatus.BAD_REQUEST, str(error)) from error

    async def complete(self, stream: AsyncTokenStream, streaming: bool, writer: asyncio.StreamWriter) -> None:
        if streaming:
            writer.write(head(HTTPStatus.OK, "text/event-stream"))
            try:
                async for chunk in stream:
                    await send_event(writer, self.document(stream.request_id, chunk.text, chunk.finish_reason))
            except RuntimeError as error:  # the engine's, for this request; the status line is out already
                await send_event(writer, {"error": {"message": str(error)}})
            writer.write(b"data: [DONE]\n\n")
            await writer.drain()
            return
        async for _ in stream:
            pass
        output = stream.output
        usage = {"prompt_tokens": len(output.prompt_token_ids), "completion_tokens": len(output.token_ids)}
        document = self.document(stream.request_id, output.text, output.finish_reason) | {"usage": usage}
        await send_json(writer, HTTPStatus.OK, document)

    def document(self, request_id: str, text: str, reason: str | None) -> dict[str, Any]:
        choice = {"index": 0, "text": text, "finish_reason": reason}
        return {
            "id": request_id,
            "object": "text_completion",
            "created": int(time.time()),
            "model": self.model_name,
            "choices": [choice],
        }


async def until_done_or_gone(work: asyncio.Future[None], reader: asyncio.StreamReader) -> None:
    """Cancels the work when the client closes the connection, which is seen while nothing is written, too."""
    gone = asyncio.ensure_future(until_closed(reader))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        gone.cancel()
        work.cancel()  # nothing where it is done
    with contextlib.suppress(asyncio.CancelledError):
        await work


async def until_closed(reader: asyncio.StreamReader) -> None:
    """Whatever comes after the request is not looked at."""
    while await reader.read(1024):
        pass


async def read_request(reader: asyncio.StreamReader) -> tuple[str, str, bytes]:
    try:
        request_line, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        method, path, _ = request_line.split(" ")
    except (ValueError, asyncio.LimitOverrunError) as error:
        raise Refusal(HTTPStatus.BAD_REQUEST, f"no HTTP request: {error}") from error
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    length = headers.get("content-length", "0")
    if not (length.isascii() and length.isdigit()) or int(length) > MAX_BODY_BYTES:
        raise Refusal(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a body has at most {MAX_BODY_BYTES} bytes, not {length}")
    return method, path, await reader.readexactly(int(length))


def parse(body: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(body)
    except ValueError as error:
        raise Refusal(HTTPStatus.BAD_REQUEST, f"the body is no JSON: {error}") from error
    if not isinstance(fields, dict) or not fields.keys() <= KNOWN_FIELDS:
        raise Refusal(HTTPStatus.BAD_REQUEST, f"the body must be an object of {', '.join(sorted(KNOWN_FIELDS))}")
    return fields


def head(status: HTTPStatus, content_type: str, length: int | None = None) -> bytes:
    lines = [f"HTTP/1.1 {status.value} {status.phrase}", f"Content-Type: {content_type}", "Connection: close"]
    if length is not None:
        lines.append(f"Content-Length: {length}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


async def send(writer: asyncio.StreamWriter, status: HTTPStatus, body: bytes, content_type: str) -> None:
    with contextlib.suppress(ConnectionError):
        writer.write(head(status, content_type, len(body)) + body)
        await writer.drain()


async def send_event(writer: asyncio.StreamWriter, document: dict[str, Any]) -> None:
    """A slow client slows this task alone: the engine goes on, and the next chunk has more."""
    writer.write(f"data: {json.dumps(document)}\n\n".encode())
    await writer.drain()


async def send_json(writer: asyncio.StreamWriter, status: HTTPStatus, document: dict[str, Any]) -> None:
    await send(writer, status, json.dumps(document).encode() + b"\n", "application/json")


async def serve(model: str, host: str, port: int, max_queue: int) -> None:
    engine = AsyncEngine.from_pretrained(model, max_queue=max_queue)
    front = Server(engine, model)
    server = await asyncio.start_server(front.connect, host, port)
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    print(f"listening on {host}:{server.sockets[0].getsockname()[1]}", flush=True)
    try:
        await stop.wait()
        server.close()  # no new connections; those that are there finish
        await asyncio.gather(*front.connections)
    finally:
        await engine.shutdown(drain=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    parser.add_argument("--max-queue", type=int, default=1024)
    args = parser.parse_args()
    asyncio.run(serve(args.model, args.host, args.port, args.max_queue))


if __name__ == "__main__":
    main()

"""Every example runs, on the bundled checkpoint, and does what it says."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
PATIENCE_S = 120


def run(name: str, *arguments: str) -> str:
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_batch() -> None:
    output = run("batch.py", "import os", "class A:", "--max-tokens", "8")
    assert output.count("tokens per verification") == 2
    assert "import os" in output


@pytest.mark.slow
def test_chat() -> None:
    output = run("chat_stream.py", "--max-tokens", "8", "--message", "sort a list", "--message", "reverse it")
    assert len(output.strip()) > 4


@pytest.mark.slow
def test_per_request_speculation() -> None:
    lines = run("per_request_speculation.py", "--max-tokens", "24").splitlines()
    assert [line.endswith("the same tokens") for line in lines] == [True, True, True, False, False, True]
    forwards = [int(line[28:].split()[0]) for line in lines]
    assert forwards[0] == 24 > max(forwards[1:])


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    command = [sys.executable, str(EXAMPLES / "server.py"), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield int(process.stdout.readline().rsplit(":", 1)[1])
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) == 0, "it drains and ends"
    finally:
        process.kill()
        process.wait()


def ask(port: int, method: str, path: str, body: object = None) -> tuple[int, str]:
    connection = HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
    connection.request(method, path, None if body is None else json.dumps(body))
    response = connection.getresponse()
    return response.status, response.read().decode()


def test_the_server_completes_and_streams_the_same(port: int) -> None:
    request = {"prompt": "def main():\n", "max_tokens": 30, "temperature": 0.7, "seed": 3}
    status, text = ask(port, "POST", "/v1/completions", request)
    document = json.loads(text)
    assert status == 200
    assert document["choices"][0]["finish_reason"] == "length"
    assert document["usage"]["completion_tokens"] == 30
    status, text = ask(port, "POST", "/v1/completions", request | {"stream": True})
    events = text.strip().split("\n\n")
    assert status == 200
    assert len(events) > 4
    assert events[-1] == "data: [DONE]"
    choices = [json.loads(event.removeprefix("data: "))["choices"][0] for event in events[:-1]]
    assert "".join(choice["text"] for choice in choices) == document["choices"][0]["text"]
    assert [c["finish_reason"] for c in choices] == [None] * (len(choices) - 1) + ["length"]


def test_the_server_refuses_what_it_cannot_do(port: int) -> None:
    for method, path, body, status, message in (
        ("GET", "/nothing", None, 404, "GET /nothing is not there"),
        ("POST", "/v1/completions", {"prompt": "a", "top_k": 3}, 400, "the body must be an object of"),
        ("POST", "/v1/completions", {"prompt": "a", "temperature": -1}, 400, "temperature = -1 must be"),
        ("POST", "/v1/completions", {"prompt": ""}, 400, "the prompt is empty"),
        ("POST", "/v1/completions", {"prompt": "a", "deadline_s": -1}, 400, "deadline_s = -1 must be"),
    ):
        answer = ask(port, method, path, body)
        assert (answer[0], message in answer[1]) == (status, True), answer
    assert ask(port, "GET", "/health") == (200, '{"status": "ok"}\n')


def raw(port: int, request: bytes) -> bytes:
    async def work() -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request)
        answer = await reader.read()
        writer.close()
        return answer

    return asyncio.run(asyncio.wait_for(work(), PATIENCE_S))


def test_a_client_that_sends_more_than_its_request_is_answered(port: int) -> None:
    body = json.dumps({"prompt": "import os\n", "max_tokens": 60, "temperature": 0}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    assert b"completion_tokens" in raw(port, head + body + b"\r\n" * 3)
    assert b"HTTP/1.1 413" in raw(port, b"POST / HTTP/1.1\r\nContent-Length: \xb2\r\n\r\n")


def test_a_client_that_goes_away_aborts_its_request(port: int) -> None:
    def count(reason: str) -> int:
        lines = ask(port, "GET", "/metrics")[1].splitlines()
        (line,) = (x for x in lines if x.startswith("vllm:request_success_total{") and f'reason="{reason}"' in x)
        return int(line.rsplit(" ", 1)[1])

    async def work() -> None:
        before = count("abort")
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        body = json.dumps({"prompt": "import os\n", "max_tokens": 900, "stream": True, "temperature": 1, "seed": 1})
        writer.write(f"POST /v1/completions HTTP/1.1\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
        await reader.readuntil(b"data: ")
        writer.close()
        while count("abort") == before:
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(work(), PATIENCE_S))


@pytest.mark.slow
def test_own_drafter() -> None:
    lines = run("own_drafter.py").splitlines()
    assert lines[-1] == "--- the same tokens as without drafts: True"
    assert float(lines[-2].split()[1]) > 1

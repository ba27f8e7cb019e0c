"""`AsyncEngine`: the front door of servers. Many requests at once, streamed to an asyncio event loop."""

from __future__ import annotations

import asyncio
import itertools
import math
import time
import weakref
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from specdec.checks import is_number, require, require_bool, require_int
from specdec.config import SamplingParams
from specdec.engine.engine import Engine
from specdec.engine.outputs import GenerationOutput, StreamChunk
from specdec.engine.thread import Command, EngineThread, Mailroom, StreamedRequest, stop
from specdec.errors import EngineInUseError, QueueFullError
from specdec.metrics.engine import EngineStats
from specdec.request.prompts import Prompt, as_params, as_prompt


class AsyncTokenStream(AsyncIterator[StreamChunk]):
    """One request's chunks as they are generated; the last one has a finish_reason.

    A consumer that is slow gets fewer and longer chunks. Leaving the loop, closing or dropping the stream, and
    cancelling the task that waits for it abort the request.
    """

    def __init__(self, engine: AsyncEngine, thread: EngineThread, request: StreamedRequest) -> None:
        self._engine = engine  # which ends with the last reference to it
        self._thread, self._request = thread, request

    @property
    def request_id(self) -> str:
        """The request's id, as given or counted."""
        return self._request.request_id

    async def __anext__(self) -> StreamChunk:
        mailbox = self._request.mailbox
        while mailbox.chunk is None and not mailbox.closed:
            mailbox.news.clear()
            try:
                await mailbox.news.wait()
            except BaseException:  # cancelled
                self._abort()
                raise
        chunk, mailbox.chunk = mailbox.chunk, None
        self._request.wanted = True
        if chunk is not None:
            return chunk
        error, mailbox.error = mailbox.error, None
        if error is not None:
            raise error.with_traceback(mailbox.traceback)  # several requests may share it
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """Aborts the request unless it has ended; `contextlib.aclosing` calls it."""
        self._abort()

    def __del__(self) -> None:
        self._abort()

    @property
    def output(self) -> GenerationOutput:
        """The whole request, once the engine is done with it. Raises ValueError while it runs."""
        if not self._request.mailbox.closed:
            raise ValueError("the stream is still running: read it to its end first")
        return GenerationOutput.of(self._request.sequence)

    def _abort(self) -> None:
        if not self._request.mailbox.closed:
            self._thread.send(Command("abort", self._request))


class AsyncEngine:
    """An `Engine` in a thread of its own, for one asyncio event loop.

    Build it with `AsyncEngine.from_pretrained`; `await shutdown()` ends it. It belongs to the loop in which `generate`
    was called first, until that is closed.
    max_queue: so many requests may wait beside those that the engine runs at once (max_num_seqs).
    """

    def __init__(self, engine: Engine, max_queue: int = 1024, *, shorten_switch_interval: bool = True) -> None:
        """Starts the engine's thread.

        engine: its requests come from here alone from now on.
        max_queue: so many requests may wait beside those that the engine runs at once (max_num_seqs).
        shorten_switch_interval: the thread lowers `sys.setswitchinterval` to 20 us, for the whole process: an event
            loop that is never idle would keep it out otherwise. See "A busy event loop" in docs/serving.md.
        """
        require_int("max_queue", max_queue, 0)
        require_bool("shorten_switch_interval", shorten_switch_interval)
        self.max_queue, self.tokenizer, self.max_model_len = max_queue, engine.tokenizer, engine.max_model_len
        self._engine, self._core = engine, engine.core
        self._mailroom: Mailroom | None = None
        self._numbers = itertools.count()
        self._shut_down = False
        self._thread = EngineThread(engine.core, shorten_switch_interval=shorten_switch_interval)
        weakref.finalize(self, stop, self._thread.commands)  # the thread may hold errors that lead back here

    @classmethod
    def from_pretrained(
        cls, model: str | Path, *, max_queue: int = 1024, shorten_switch_interval: bool = True, **arguments: Any
    ) -> AsyncEngine:
        """Loads a model as `Engine.from_pretrained` does, and raises what that raises.

        model: "bundled", a checkpoint folder or a Hub id.
        max_queue, shorten_switch_interval: as for `AsyncEngine`.
        arguments: the others of `Engine.from_pretrained`.
        """
        engine = Engine.from_pretrained(model, **arguments)
        return cls(engine, max_queue, shorten_switch_interval=shorten_switch_interval)

    def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        deadline_s: float | None = None,
    ) -> AsyncTokenStream:
        """Queues a request at once; its chunks come with `async for`.

        prompt: text or token ids.
        params: None is `default_sampling_params()`.
        request_id: a name that no other request has while this one is under way; None counts requests.
        priority: lower ones run first, equal ones in order of arrival.
        deadline_s: seconds from now after which it ends with finish_reason "deadline" and what it has; None for none.

        Raises ValueError for what cannot be asked for, a request_id in use included; QueueFullError; EngineInUseError
        in a process that was forked after the engine was made; RuntimeError after a shutdown and in another event loop.
        While it runs the stream may raise CacheFullError, or what made the engine fail for this request.
        """
        if isinstance(params, SamplingParams) and params.n > 1:
            raise ValueError(f"n = {params.n}: this is one stream; `samples` gives one for each")
        return self._queue(prompt, params, request_id, priority, deadline_s)[0]

    def samples(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        request_id: str | None = None,
        priority: int = 0,
        deadline_s: float | None = None,
    ) -> list[AsyncTokenStream]:
        """Queues `params.n` samples of a prompt, which share its pages; returns one stream for each. Samples after the
        first are requests of their own, "ID.1", "ID.2", ... Parameters and errors are those of `generate`."""
        return self._queue(prompt, params, request_id, priority, deadline_s)

    def _queue(
        self, prompt: Prompt, params: SamplingParams | None, request_id: str | None, priority: int,
        deadline_s: float | None,
    ) -> list[AsyncTokenStream]:  # fmt: skip
        mailroom = self._open_mailroom()
        _check_request(request_id, priority, deadline_s)
        one = self.default_sampling_params() if params is None else as_params(params)
        if request_id is None:
            request_id = next(i for i in map("request-{}".format, self._numbers) if i not in mailroom.requests)
        sequences = self._core.admission.sequences(as_prompt(prompt), one, request_id=request_id, priority=priority)
        self._check_room(mailroom, [s.request_id for s in sequences])
        deadline = math.inf if deadline_s is None else time.monotonic() + float(deadline_s)
        requests = [StreamedRequest(sequence, mailroom, deadline) for sequence in sequences]
        for request in requests:
            mailroom.requests[request.request_id] = request
            self._thread.send(Command("add", request))
        self._check_alive()  # after the commands: a thread that ends now has seen them, or is seen here
        return [AsyncTokenStream(self, self._thread, request) for request in requests]

    def abort(self, request_id: str) -> bool:
        """Ends a request with finish_reason "abort" and what it has. Returns False where none of this id is there."""
        request = None if self._mailroom is None else self._mailroom.requests.get(request_id)
        if request is not None:
            self._thread.send(Command("abort", request))
        return request is not None

    def stats(self) -> EngineStats:
        """Returns what the engine did since it was made: a snapshot, between two steps."""
        return self._core.stats()

    async def shutdown(self, *, drain: bool = True) -> None:
        """Takes no more requests, lets those that are there end (or, without `drain`, aborts them), and ends the
        engine's thread. What consumers have not read yet they still can. It may be called again, also to cut a drain
        short."""
        self._shut_down = True
        if not drain:
            self._thread.send(Command("abort all"))
        self._thread.send(Command("stop"))
        await asyncio.to_thread(self._thread.join)

    def default_sampling_params(self) -> SamplingParams:
        """Returns what the checkpoint recommends, see `Engine.default_sampling_params`."""
        return self._engine.default_sampling_params()

    def _open_mailroom(self) -> Mailroom:
        self._check_alive()
        loop, mailroom = asyncio.get_running_loop(), self._mailroom
        if mailroom is None or mailroom.loop.is_closed():
            mailroom = self._mailroom = Mailroom(loop)
        elif mailroom.loop is not loop:
            raise RuntimeError("this AsyncEngine serves another event loop: make one for each loop")
        return mailroom

    def _check_alive(self) -> None:
        if self._thread.broken is not None:
            raise RuntimeError(f"the engine has failed: {self._thread.broken!r}") from self._thread.broken
        if self._thread.elsewhere:
            raise EngineInUseError(
                f"this AsyncEngine was made before a fork, in process {self._thread.process_id}, and its thread runs "
                "there alone: make one in each process, after the fork"
            )
        if self._shut_down:
            raise RuntimeError("the engine is shut down: make a new one")

    def _check_room(self, mailroom: Mailroom, request_ids: list[str]) -> None:
        for request_id in request_ids:
            if request_id in mailroom.requests:
                raise ValueError(f"request_id = {request_id!r} is in use: give another one, or None")
        limit = self.max_queue + self._engine.config.max_num_seqs
        if len(mailroom.requests) + len(request_ids) > limit:
            self._core.reject()
            raise QueueFullError(
                f"{len(mailroom.requests)} requests run and wait; max_queue = {self.max_queue} beside max_num_seqs = "
                f"{self._engine.config.max_num_seqs} leave no room for {len(request_ids)} more: try again later, or "
                "raise max_queue"
            )


def _check_request(request_id: str | None, priority: int, deadline_s: float | None) -> None:
    named = request_id is None or (isinstance(request_id, str) and request_id != "")
    require(named, f"request_id = {request_id!r} must be a non-empty string or None")
    require_int("priority", priority, remedy="; lower ones run first")
    require(
        deadline_s is None or (is_number(deadline_s) and deadline_s > 0),
        f"deadline_s = {deadline_s!r} must be a finite number of seconds, above 0, or None",
    )

"""`AsyncEngine` against `Engine`: the same tokens, and nothing lost, doubled or stuck whatever consumers do."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from specdec import (
    AsyncEngine,
    AsyncTokenStream,
    CacheFullError,
    Engine,
    QueueFullError,
    SamplingParams,
    SpeculationParams,
    StreamChunk,
)
from specdec.engine import thread as engine_thread
from specdec.request.sequence import Sequence
from support.fakes import PROMPTS
from support.gate import PATIENCE_S, Gate


@pytest.fixture(scope="module")
def engine(planted: Path) -> Engine:
    return Engine.from_pretrained(planted)


def run(work: Coroutine[Any, Any, None]) -> None:
    """A test's coroutine; what hangs fails."""
    asyncio.run(asyncio.wait_for(work, PATIENCE_S))


@contextlib.asynccontextmanager
async def serving(planted: Path, **arguments: Any) -> AsyncIterator[AsyncEngine]:
    """An engine that must be in order when the test is done with it."""
    engine = AsyncEngine.from_pretrained(planted, **arguments)
    yield engine
    await engine.shutdown(drain=False)
    scheduler, stats = engine._core.scheduler, engine.stats()
    assert scheduler.idle
    scheduler.pool.check_integrity([])
    assert (stats.num_running, stats.num_waiting, stats.num_used_pages) == (0, 0, 0)
    assert stats.num_requests == sum(stats.finished.values())
    await asyncio.sleep(0)  # what the thread posted last
    assert engine._mailroom is None or engine._mailroom.requests == {}


def greedy(max_tokens: int = 48, k: int = 3, **fields: Any) -> SamplingParams:
    return SamplingParams(
        max_tokens=max_tokens, temperature=0, ignore_eos=True, speculation=SpeculationParams(k), **fields
    )


async def read(stream: AsyncTokenStream) -> list[StreamChunk]:
    return [chunk async for chunk in stream]


def tokens_of(chunks: list[StreamChunk]) -> list[int]:
    return [token for chunk in chunks for token in chunk.token_ids]


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def test_many_streams_give_what_generate_gives(planted: Path, engine: Engine) -> None:
    kinds = [
        {"temperature": 0},
        {"temperature": 0.8, "logprobs": 2},
        {"temperature": 0.8, "speculation": SpeculationParams(3, "block")},
        {"temperature": 0.8, "speculation": SpeculationParams(4, "token"), "frequency_penalty": 0.5},
        {"temperature": 0.9, "speculation": SpeculationParams(0)},
    ]
    params = [SamplingParams(max_tokens=5 + 3 * i % 41, seed=i, ignore_eos=True, **kinds[i % 5]) for i in range(40)]
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(40)]
    text = engine.generate("hello world", greedy())[0].text
    params.append(greedy(stop=(text[10:13],), seed=0))
    prompts.append("hello world")
    expected = engine.generate(prompts, params)

    async def work() -> None:
        async with serving(planted, max_num_seqs=7) as served:
            gate = Gate(served, num_steps=3)
            streams = [served.generate(prompt, p) for prompt, p in zip(prompts, params)]
            readers = asyncio.gather(*map(read, streams))
            await until(gate.reached.is_set)
            await asyncio.sleep(0.01)  # what there is so far is read
            gate.open.set()
            received = await readers
            for stream, chunks, wanted in zip(streams, received, expected):
                assert tokens_of(chunks) == wanted.token_ids == stream.output.token_ids
                assert "".join(chunk.text for chunk in chunks) == wanted.text
                assert [c.finish_reason for c in chunks] == [None] * (len(chunks) - 1) + [wanted.finish_reason]
                assert stream.output.seed == wanted.seed
                if wanted.logprobs is not None:
                    assert [x for c in chunks for x in c.logprobs or []] == wanted.logprobs
                assert await read(stream) == [], "a stream that has ended stays so"
            held = 4  # without drafts, and running while the gate was closed
            assert any(len(expected[held].token_ids) > 4 > len(c.token_ids) for c in received[held]), "as they are made"

    run(work())


def test_requests_run_in_order_of_arrival(planted: Path) -> None:
    async def work() -> None:
        async with serving(planted, max_num_seqs=1) as served:
            ended: list[int] = []

            async def one(number: int, stream: AsyncTokenStream) -> None:
                await read(stream)
                ended.append(number)

            streams = [served.generate("abc", greedy(6)) for _ in range(12)]
            await asyncio.gather(*(one(i, s) for i, s in enumerate(streams)))
            assert ended == list(range(12))

    run(work())


@pytest.mark.parametrize("how", ["break", "drop", "close", "cancel while waiting", "cancel in the body", "never read"])
def test_a_consumer_that_leaves_aborts_its_request(planted: Path, engine: Engine, how: str) -> None:
    expected = engine.generate("hello world", greedy(200))[0].token_ids

    async def leave(stream: AsyncTokenStream) -> None:
        if how == "break":
            async for _ in stream:
                break
        elif how == "drop":
            await anext(stream)
        elif how == "close":
            async with contextlib.aclosing(stream):
                await anext(stream)
        elif how.startswith("cancel"):
            async for _ in stream:
                if "body" in how:
                    await asyncio.sleep(PATIENCE_S)

    async def work() -> None:
        async with serving(planted, max_num_seqs=4) as served:
            gate = Gate(served, num_steps=4)
            other = asyncio.ensure_future(read(served.generate("hello world", greedy(200))))
            leaving = asyncio.ensure_future(leave(served.generate("abc", greedy(200))))
            await until(gate.reached.is_set)
            await asyncio.sleep(0.05)
            leaving.cancel()  # nothing to those who have left
            with contextlib.suppress(asyncio.CancelledError):
                await leaving
            del leaving
            gate.open.set()
            await until(lambda: served.stats().finished["abort"] == 1)
            assert tokens_of(await other) == expected

    run(work())


def test_abort_ends_a_stream_with_what_it_has(planted: Path, engine: Engine) -> None:
    expected = engine.generate("hello world", greedy(200))[0].token_ids

    async def work() -> None:
        async with serving(planted, max_num_seqs=1) as served:
            gate = Gate(served, num_steps=3)
            running = served.generate("hello world", greedy(200), request_id="mine")
            waiting = served.generate("abc", greedy(200), request_id="other")
            first = await anext(running)
            await until(gate.reached.is_set)
            assert served.abort("mine")
            assert served.abort("other")
            assert not served.abort("nobody's")
            gate.open.set()
            chunks = [first, *await read(running)]
            assert chunks[-1].finish_reason == "abort"
            assert tokens_of(chunks) == expected[: len(tokens_of(chunks))]
            assert [(c.token_ids, c.finish_reason) for c in await read(waiting)] == [([], "abort")]
            assert not served.abort("mine"), "it has ended"
            assert running.output.finish_reason == "abort"
            assert tokens_of(await read(served.generate("hello world", greedy(8)))) == expected[:8]

    run(work())


def test_deadlines_end_running_and_waiting_requests(planted: Path, engine: Engine) -> None:
    expected = engine.generate("hello world", greedy(200))[0].token_ids

    async def work() -> None:
        async with serving(planted, max_num_seqs=2) as served:
            gate = Gate(served, num_steps=2)
            late = [served.generate("hello world", greedy(200), deadline_s=0.02) for _ in range(3)]
            patient = served.generate("hello world", greedy(200), deadline_s=1000)
            await until(gate.reached.is_set)
            await asyncio.sleep(0.05)
            gate.open.set()
            for stream in late:
                chunks = await read(stream)
                assert chunks[-1].finish_reason == "deadline"
                assert tokens_of(chunks) == expected[: len(tokens_of(chunks))]
            assert tokens_of(await read(patient)) == expected
            assert served.stats().finished["deadline"] == 3

    run(work())


def test_a_consumer_that_never_reads_blocks_nobody_and_keeps_little(
    planted: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = engine.generate("hello world", greedy(200))[0]
    posted: list[engine_thread.Mail] = []
    post = engine_thread._post

    def recording(mailroom: engine_thread.Mailroom, mails: list[engine_thread.Mail]) -> bool:
        posted.extend(mails)
        return post(mailroom, mails)

    monkeypatch.setattr(engine_thread, "_post", recording)

    async def work() -> None:
        async with serving(planted, max_num_seqs=4) as served:
            idle = served.generate("hello world", greedy(200))
            for _ in range(3):
                assert tokens_of(await read(served.generate("hello world", greedy(200)))) == expected.token_ids
            await until(lambda: served.stats().num_running == 0)
            assert len([mail for mail in posted if mail.request is idle._request]) == 2, (
                "the first tokens, and the rest"
            )
            (chunk,) = await read(idle)
            assert (chunk.token_ids, chunk.text, chunk.finish_reason) == (expected.token_ids, expected.text, "length")

            posted.clear()  # an event loop that does nothing for a while is no worse
            streams = [served.generate("hello world", greedy(200)) for _ in range(4)]
            while served.stats().finished["length"] < 8:
                time.sleep(0.001)
            assert len(posted) <= 2 * len(streams)
            for chunks in await asyncio.gather(*map(read, streams)):
                assert tokens_of(chunks) == expected.token_ids

    run(work())


def test_a_slow_consumer_gets_fewer_and_longer_chunks(planted: Path, engine: Engine) -> None:
    expected = engine.generate("hello world", greedy(200))[0]

    async def work() -> None:
        async with serving(planted) as served:
            chunks = []
            async for chunk in served.generate("hello world", greedy(200)):
                chunks.append(chunk)
                await asyncio.sleep(0.03)
            assert tokens_of(chunks) == expected.token_ids
            assert "".join(chunk.text for chunk in chunks) == expected.text
            assert max(len(chunk.token_ids) for chunk in chunks) > 4, "more than one step's"

    run(work())


def test_a_full_queue_refuses_and_says_why(planted: Path) -> None:
    async def work() -> None:
        async with serving(planted, max_num_seqs=2, max_queue=3) as served:
            streams = [served.generate("abc", greedy(30)) for _ in range(5)]
            with pytest.raises(
                QueueFullError, match=r"5 requests .* max_queue = 3 .* max_num_seqs = 2 .*raise max_queue"
            ):
                served.generate("abc", greedy(30))
            await asyncio.gather(*map(read, streams))
            assert len(tokens_of(await read(served.generate("abc", greedy(30))))) == 30
            stats = served.stats()
            assert (stats.num_rejected, stats.num_requests) == (1, 6)

    run(work())


def test_shutdown_drains(planted: Path, engine: Engine) -> None:
    expected = engine.generate("hello world", greedy(100))[0].token_ids

    async def work() -> None:
        async with serving(planted, max_num_seqs=2) as served:
            streams = [served.generate("hello world", greedy(100)) for _ in range(5)]
            await served.shutdown()  # nobody reads meanwhile
            assert not served._thread._thread.is_alive()
            with pytest.raises(RuntimeError, match="the engine is shut down: make a new one"):
                served.generate("abc")
            for stream in streams:
                chunks = await read(stream)
                assert tokens_of(chunks) == expected
                assert chunks[-1].finish_reason == "length"
            assert served.stats().finished["length"] == 5
            await served.shutdown()

    run(work())


def test_shutdown_aborts_where_it_shall_not_drain(planted: Path) -> None:
    async def work() -> None:
        async with serving(planted, max_num_seqs=2) as served:
            gate = Gate(served, num_steps=2)
            streams = [served.generate("hello world", greedy(200)) for _ in range(5)]
            readers = [asyncio.ensure_future(read(stream)) for stream in streams]
            await until(gate.reached.is_set)
            drain = asyncio.ensure_future(served.shutdown())
            await asyncio.sleep(0)
            ending = asyncio.ensure_future(served.shutdown(drain=False))  # cuts the drain short
            await asyncio.sleep(0.01)
            gate.open.set()
            await asyncio.gather(drain, ending)
            for chunks in await asyncio.gather(*readers):
                assert chunks[-1].finish_reason == "abort"
            assert served.stats().finished["abort"] == 5

    run(work())


@pytest.mark.parametrize("turn_s", [0, 25e-6, 2e-4, 3e-3])
def test_a_loop_that_is_never_idle_keeps_nobody_out(planted: Path, turn_s: float) -> None:
    """It lets go of the interpreter in each turn, which must be enough: without help the engine would take minutes."""

    async def work() -> None:
        async with serving(planted) as served:
            readers = [asyncio.ensure_future(read(served.generate("abc", greedy(40, k=1)))) for _ in range(4)]
            while not all(reader.done() for reader in readers):
                end = time.perf_counter() + turn_s
                while time.perf_counter() < end:
                    pass
                await asyncio.sleep(0)

    run(work())


def test_the_switch_interval_is_shortened_unless_it_shall_not(planted: Path) -> None:
    """For the whole process, so a program may have reasons of its own."""

    async def work() -> None:
        for shorten, interval_s in ((False, 0.005), (True, 20e-6)):
            async with serving(planted, shorten_switch_interval=shorten) as served:
                await read(served.generate("abc", greedy(2)))
                assert sys.getswitchinterval() == pytest.approx(interval_s)

    before = sys.getswitchinterval()
    sys.setswitchinterval(0.005)
    try:
        run(work())
    finally:
        sys.setswitchinterval(before)


def test_one_event_loop_at_a_time(planted: Path) -> None:
    served = AsyncEngine.from_pretrained(planted)
    problems: list[BaseException] = []

    def elsewhere() -> None:
        async def work() -> None:
            served.generate("abc", greedy(5))

        try:
            run(work())
        except RuntimeError as error:
            problems.append(error)

    async def one() -> None:
        stream = served.generate("abc", greedy(5))
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        assert "serves another event loop" in str(problems.pop())
        assert len(tokens_of(await read(stream))) == 5

    async def leave_behind() -> None:
        left.append(served.generate("abc", greedy(200)))
        await anext(left[0])

    left: list[AsyncTokenStream] = []
    run(one())
    run(leave_behind())  # its loop closes while it runs
    run(one())  # another one, after the first is closed
    while served.stats().num_running:
        time.sleep(0.001)
    run(served.shutdown())
    assert served.stats().num_requests == sum(served.stats().finished.values()) == 3


@pytest.mark.slow
def test_an_engine_that_is_dropped_ends_its_thread(planted: Path) -> None:
    async def work() -> None:
        async for _ in AsyncEngine.from_pretrained(planted).generate("abc", greedy(5)):
            pass  # the stream keeps its engine

    before = threading.active_count()
    run(work())
    gc.collect()
    deadline = time.monotonic() + PATIENCE_S
    while threading.active_count() > before:
        assert time.monotonic() < deadline, "the engine's thread is left"
        time.sleep(0.001)


@pytest.mark.slow
def test_a_process_ends_in_order_though_nobody_shut_the_engine_down(planted: Path) -> None:
    """What is registered before specdec comes after it; a thread in a kernel would then end the process by a signal."""
    script = f"""
import asyncio, atexit, threading
atexit.register(lambda: print([t.name for t in threading.enumerate()]))
from specdec import AsyncEngine, SamplingParams

async def main():
    global stream
    engine = AsyncEngine.from_pretrained({str(planted)!r})
    stream = engine.generate("abc", SamplingParams(max_tokens=200, ignore_eos=True))
    await anext(stream)

asyncio.run(main())
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=PATIENCE_S, check=True
    )
    assert done.stdout == "['MainThread']\n"


@pytest.mark.slow
def test_an_engine_whose_thread_broke_is_let_go(planted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        served = AsyncEngine.from_pretrained(planted)
        released = threading.Event()

        def broken_step() -> None:
            assert released.wait(PATIENCE_S)
            raise SystemExit("gone")

        monkeypatch.setattr(served._core, "step", broken_step)
        stream = served.generate("abc", greedy(5))  # would refuse once the thread is broken
        released.set()
        with pytest.raises(SystemExit):
            await anext(stream)
        kept.append((weakref.ref(served), served._thread._thread))
        monkeypatch.undo()

    kept: list[tuple[weakref.ref[AsyncEngine], threading.Thread]] = []
    run(work())
    ((engine, thread),) = kept
    thread.join(PATIENCE_S)
    gc.collect()
    assert engine() is None


def test_what_cannot_be_asked_for_is_refused_at_once(planted: Path) -> None:
    async def work() -> None:
        async with serving(planted, num_pages=4, page_size=8) as served:
            mine = served.generate("abc", greedy(10), request_id="mine")
            for arguments, message in (
                ({"request_id": "mine"}, "request_id = 'mine' is in use: give another one"),
                ({"request_id": ""}, "request_id = '' must be a non-empty string"),
                ({"priority": 1.5}, "priority = 1.5 must be an integer"),
                ({"deadline_s": 0}, "deadline_s = 0 must be a finite number of seconds, above 0"),
                ({"deadline_s": "1"}, "deadline_s = '1' must be"),
                ({"deadline_s": True}, "deadline_s = True must be"),
                ({"deadline_s": float("nan")}, "deadline_s = nan must be"),
                ({"deadline_s": 10**400}, "deadline_s = 10+ must be"),
                ({"params": {"temperature": 0}}, r"params = {'temperature': 0} must be a SamplingParams"),
                ({"params": [greedy(10)]}, r"params = \[SamplingParams.* must be a SamplingParams"),
                ({"prompt": {5, 6}}, "{5, 6} is no prompt"),
            ):
                with pytest.raises(ValueError, match=message):
                    served.generate(**{"prompt": "abc", "params": greedy(10)} | arguments)
            with pytest.raises(ValueError, match="the prompt is empty"):
                served.generate("", greedy(10))
            with pytest.raises(CacheFullError, match="needs 5 pages of 8"):
                await read(served.generate([5] * 3, greedy(30)))
            assert len(tokens_of(await read(mine))) == 10
            numpys = served.generate("abc", greedy(10), priority=np.int64(1), deadline_s=np.float32(1000))
            assert len(tokens_of(await read(numpys))) == 10
            assert len(await read(served.generate("abc", greedy(1), request_id="mine"))) == 1
        with pytest.raises(ValueError, match="max_queue = -1 must be an integer, at least 0"):
            AsyncEngine.from_pretrained(planted, max_queue=-1)
        with pytest.raises(ValueError, match="shorten_switch_interval = 'no' must be True or False"):
            AsyncEngine.from_pretrained(planted, shorten_switch_interval="no")

    run(work())


def sequences_alive() -> list[Sequence]:
    gc.collect()
    return [thing for thing in gc.get_objects() if type(thing) is Sequence]


@pytest.mark.slow
def test_ended_requests_leave_nothing_behind(planted: Path) -> None:
    async def work() -> None:
        async with serving(planted, max_num_seqs=4) as served:
            rng = random.Random(0)
            for _ in range(30):
                streams = [served.generate("abc", greedy(12)) for _ in range(6)]
                for stream in streams:
                    if rng.random() < 0.3:
                        await anext(stream)
                del stream
                await asyncio.gather(*map(read, streams[:3]))
            del streams
            await until(lambda: served.stats().num_running + served.stats().num_waiting == 0)
            await until(lambda: not sequences_alive())
            assert (served._thread._requests, served._thread._unsent) == ({}, set())

    gc.collect()
    run(work())


def test_samples_are_streams_of_their_own_and_share_the_prompt(planted: Path, engine: Engine) -> None:
    params = SamplingParams(n=3, max_tokens=20, temperature=0.9, seed=7, ignore_eos=True)
    prompt = list(range(3, 60))
    alone = engine.generate([prompt], params)[0]
    expected = [o.token_ids for o in alone.outputs]

    async def work() -> None:
        async with serving(planted, max_num_seqs=2, max_queue=2) as served:
            streams = served.samples(prompt, params, request_id="r")
            assert [s.request_id for s in streams] == ["r", "r.1", "r.2"]
            assert [tokens_of(chunks) for chunks in await asyncio.gather(*map(read, streams))] == expected
            assert [s.output.stats.num_cached_tokens for s in streams] == [0, 48, 48]
            gate = Gate(served)
            first, second, third = served.samples(prompt, params, request_id="r")
            with pytest.raises(QueueFullError, match=r"3 requests run and wait; .* no room for 2 more"):
                served.samples(prompt, SamplingParams(n=2))
            assert served.abort("r")  # the others need not wait for it
            taken = served.generate("abc", greedy(1), request_id="s.1")
            with pytest.raises(ValueError, match=r"request_id = 's.1' is in use"):
                served.samples(prompt, SamplingParams(n=2), request_id="s")
            gate.open.set()
            await read(taken)
            assert (await read(first))[-1].finish_reason == "abort"
            assert [tokens_of(await read(s)) for s in (second, third)] == expected[1:]
            with pytest.raises(ValueError, match="n = 3: this is one stream; `samples` gives one for each"):
                served.generate(prompt, params)

    run(work())

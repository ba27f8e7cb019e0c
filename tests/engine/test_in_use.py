"""An engine serves one call at a time, in the process it was made in; a process ends in order whatever became of it."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from specdec import AsyncEngine, Engine, EngineInUseError, SamplingParams, SpeculationParams
from support.gate import PATIENCE_S, Gate

LONG = SamplingParams(max_tokens=30, temperature=0, ignore_eos=True, speculation=SpeculationParams(3))

MADE = "engine = AsyncEngine.from_pretrained(model)\n"
SERVED = MADE + "asyncio.run(serve(engine))\n"
WAIT_FOR_CHILD = "sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
ENDINGS = {
    "dropped": "asyncio.run(serve(AsyncEngine.from_pretrained(model)))",
    "kept": SERVED,
    "shut down": MADE + "asyncio.run(serve(engine, shutdown=True))",
    "never used": MADE,
    "exits": SERVED + "sys.exit(3)",
    "raises": SERVED + "raise ValueError",
    "unread": MADE + "asyncio.run(serve(engine, read=False))",
    "interrupted": MADE + "asyncio.run(serve(engine, interrupt=True))",
    "forked": SERVED + "child = os.fork()\nif child:\n    " + WAIT_FOR_CHILD,
}
CODES = {"exits": 3, "raises": 1, "interrupted": -signal.SIGINT}
PROGRAM = """
import asyncio, os, signal, sys
from specdec import AsyncEngine, SamplingParams

model = sys.argv[1]
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore

async def serve(engine, read=True, shutdown=False, interrupt=False):
    streams = [engine.generate("abc", SamplingParams(max_tokens=9, seed=i)) for i in range(4)]
    if interrupt:
        os.kill(os.getpid(), signal.SIGINT)
    if read:
        for stream in streams:
            async for _ in stream:
                pass
    if shutdown:
        await engine.shutdown()

"""


@pytest.mark.slow
@pytest.mark.parametrize("ending", ENDINGS)
def test_a_process_ends_as_it_should(planted: Path, ending: str) -> None:
    codes: Counter[int] = Counter()
    for _ in range(2):
        command = [sys.executable, "-c", PROGRAM + ENDINGS[ending], str(planted)]
        codes[subprocess.run(command, capture_output=True, timeout=PATIENCE_S).returncode] += 1
    assert codes == {CODES.get(ending, 0): 2}


def test_a_call_in_another_thread_is_refused_while_one_is_under_way(planted: Path) -> None:
    engine = Engine.from_pretrained(planted)
    expected = engine.generate("abc", LONG)[0].token_ids
    stream = engine.stream("abc", LONG)
    next(stream)
    gate, found = Gate(SimpleNamespace(_core=engine.core), num_steps=2), []
    thread = threading.Thread(target=lambda: found.extend(engine.generate("abc", LONG)))
    thread.start()
    assert gate.reached.wait(PATIENCE_S)
    for call in (
        lambda: engine.generate("abc", LONG),
        lambda: engine.stream("abc", LONG),
        lambda: next(stream),
        engine.measure_costs,
    ):
        with pytest.raises(EngineInUseError, match="another call of this engine is under way"):
            call()
    stream.close()  # which waits for nobody
    gate.open.set()
    thread.join()
    assert [o.token_ids for o in found] == [expected]
    assert stream.output.finish_reason == "abort"
    assert engine.generate("abc", LONG)[0].token_ids == expected
    assert engine.core.scheduler.idle


def test_an_engine_in_an_async_engine_is_in_use(planted: Path) -> None:
    engine = Engine.from_pretrained(planted)
    served = AsyncEngine(engine)
    wait_until(engine.core._used.locked)
    with pytest.raises(EngineInUseError, match="or in an AsyncEngine"):
        engine.generate("abc", LONG)
    del served  # which ends its thread
    wait_until(lambda: not engine.core._used.locked())
    assert engine.generate("abc", SamplingParams(max_tokens=3))


def test_an_async_engine_is_refused_after_a_fork(planted: Path) -> None:
    script = PROGRAM + MADE + "child = os.fork()\nasyncio.run(serve(engine))\nif child:\n    " + WAIT_FOR_CHILD
    done = subprocess.run(
        [sys.executable, "-c", script, str(planted)], capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert done.returncode == 1
    assert "EngineInUseError: this AsyncEngine was made before a fork" in done.stderr


def wait_until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)

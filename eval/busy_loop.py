"""What an event loop that is never idle leaves of an `AsyncEngine`'s speed, and what it gets done itself.

    python -m specdec.eval.busy_loop [--turns-us 0,25,100,500,2500,10000] [--tokens 200] [--switch-interval-us N]

Four requests on the bundled checkpoint, while the event loop's turns keep it busy for so many microseconds each, in
Python. --switch-interval-us sets the interpreter's own after the engine has lowered it; 5000 is CPython's. A run that
takes 40 times as long as beside an idle loop is given up. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from dataclasses import asdict, dataclass

from specdec import AsyncEngine, SamplingParams

NUM_REQUESTS, PATIENCE = 4, 40


@dataclass(frozen=True)
class Shared:
    """turn_us: of work per turn of the loop, measured alone. speed, work: tokens and turns' work per second, as shares
    of what engine and loop do alone. complete: False where it was given up."""

    turn_us: float
    speed: float
    work: float
    complete: bool


def work(amount: int) -> int:
    total = 0
    for i in range(amount):
        total += i & 3
    return total


def microseconds(amount: int) -> float:
    repeats = max(1, 2_000_000 // max(amount, 100))
    start = time.perf_counter()
    for _ in range(repeats):
        work(amount)
    return (time.perf_counter() - start) / repeats * 1e6


def generate(engine: AsyncEngine, num_tokens: int) -> asyncio.Future[list[None]]:
    """The requests, under way."""

    async def one() -> None:
        async for _ in engine.generate("import os\n", SamplingParams(max_tokens=num_tokens, ignore_eos=True)):
            pass

    return asyncio.gather(*(one() for _ in range(NUM_REQUESTS)))


async def measure(engine: AsyncEngine, num_tokens: int, amount: int) -> Shared:
    """amount: of work in each turn of the loop."""
    start = time.perf_counter()
    await generate(engine, num_tokens)
    alone_s = time.perf_counter() - start
    turn_us, num_turns = microseconds(amount), 0
    start = time.perf_counter()
    done = generate(engine, num_tokens)
    while not done.done() and time.perf_counter() - start < PATIENCE * alone_s:
        work(amount)
        num_turns += 1
        await asyncio.sleep(0)
    busy_s, complete = time.perf_counter() - start, done.done()
    await done
    return Shared(turn_us, alone_s / busy_s if complete else 0.0, num_turns * turn_us * 1e-6 / busy_s, complete)


async def compare(turns_us: list[float], num_tokens: int, switch_interval_us: float | None) -> list[Shared]:
    engine = AsyncEngine.from_pretrained("bundled")
    await generate(engine, num_tokens)
    if switch_interval_us is not None:
        sys.setswitchinterval(switch_interval_us * 1e-6)
    per_us = 100_000 / microseconds(100_000)
    shared = [await measure(engine, num_tokens, int(turn_us * per_us)) for turn_us in turns_us]
    await engine.shutdown()
    return shared


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns-us", default="0,25,100,500,2500,10000")
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--switch-interval-us", type=float)
    options = parser.parse_args()
    turns_us = [float(turn) for turn in options.turns_us.split(",")]
    shared = asyncio.run(compare(turns_us, options.tokens, options.switch_interval_us))
    print("turn us  engine's speed  loop's work")
    for s in shared:
        speed = f"{s.speed:14.0%}" if s.complete else "      given up"
        print(f"{s.turn_us:7.0f}  {speed}  {s.work:11.0%}")
    print(json.dumps([asdict(s) for s in shared]))


if __name__ == "__main__":
    main()

"""Runs many requests from many clients on one `AsyncEngine`, some of them aborted and some with a fault in a step, and
checks that nothing hangs, nothing leaks, and every other request gets the tokens that it gets alone.

python -m specdec.eval.dev.soak [--requests 10000] [--clients 64] [--model FOLDER] [--seed 0]

Without a model a tiny one is made. Exit code 1 where something is not as it should be.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import mmap
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from specdec import AsyncEngine, Engine, GenerationOutput, SamplingParams, SpeculationParams
from specdec.config import AUTO
from specdec.eval.dev.faults import Fault, FaultPlan, InjectedError
from specdec.eval.dev.small import write_small_checkpoint
from specdec.request.sequence import Sequence

NUM_CASES, VOCAB_SIZE, MAX_PROMPT, MAX_TOKENS = 400, 64, 160, 128
NUM_PAGES = 72  # of 8 tokens: two requests of full length, so that others are preempted
LONG = 24  # tokens of requests that are aborted or fail, so that most of them live to see it
PATIENCE_S = 120.0  # a request without news for so long hangs
MAX_GROWTH_MIB = 32  # growth of the process that is allowed, after the first tenth of the requests
ABORTS = ("leave", "abort", "cancel", "deadline")


@dataclass(frozen=True)
class SoakOptions:
    """What to run."""

    num_requests: int = 10_000
    """Requests in all."""
    num_clients: int = 64
    """Clients, each with one request at a time."""
    abort_share: float = 0.05
    """Share of the requests that are aborted in some way."""
    fault_share: float = 0.01
    """Share of the requests that a fault is planned for."""
    seed: int = 0
    """Seed of everything that is drawn."""


@dataclass
class SoakReport:
    """What happened."""

    outcomes: Counter[str] = field(default_factory=Counter)
    """Number of requests, by what became of them."""
    num_tokens: int = 0
    """Tokens that clients received."""
    num_failed_steps: int = 0
    """Steps that failed."""
    mean_acceptance_length: float | None = None
    """Tokens per verification."""
    num_preemptions: int = 0
    """How often requests lost their pages."""
    resident_mib: list[float] = field(default_factory=list)
    """Memory of the process in MiB, at the start of each tenth of the requests."""
    seconds: float = 0.0
    """Seconds of the run."""
    num_problems: int = 0
    """Number of things that should not be."""
    problems: list[str] = field(default_factory=list)
    """The first 20 of them."""

    def blame(self, problem: str) -> None:
        """Counts something that should not be."""
        self.num_problems += 1
        if len(self.problems) < 20:
            self.problems.append(problem)


@dataclass(frozen=True)
class Case:
    """A request, and what it gives alone."""

    prompt: list[int]
    """Its prompt."""
    params: SamplingParams
    """Its parameters."""
    expected: GenerationOutput
    """Its output without speculation and without others."""


class Soak:
    """The clients, and what they saw."""

    def __init__(self, engine: AsyncEngine, cases: list[Case], faults: FaultPlan, options: SoakOptions) -> None:
        self.engine, self.cases, self.faults, self.options = engine, cases, faults, options
        self.long_cases = [c for c in cases if len(c.expected.token_ids) >= LONG]
        self.report = SoakReport()
        self.rng = random.Random(options.seed)
        self.numbers: Iterator[int] = iter(range(options.num_requests))

    async def run(self) -> SoakReport:
        """Runs all clients to their end."""
        start = time.perf_counter()
        await asyncio.gather(*(self._client() for _ in range(self.options.num_clients)))
        self.report.seconds = time.perf_counter() - start
        return self.report

    async def _client(self) -> None:
        for number in self.numbers:
            if number % max(1, self.options.num_requests // 10) == 0:
                self.report.resident_mib.append(round(resident_bytes() / 2**20, 1))
            request_id, fate = f"soak-{number}", self.rng.random()
            ordinary = fate >= self.options.abort_share + self.options.fault_share
            case = self.rng.choice(self.cases if ordinary else self.long_cases)
            abort = self.rng.choice(ABORTS) if fate < self.options.abort_share else ""
            if not ordinary and not abort:
                self.faults.plan(request_id, self.rng.choice(list(Fault)), self.rng.randint(1, 8))
            speculation = SpeculationParams(self.rng.choice([0, 1, 2, 3, 5, AUTO]), "coupled")
            params = replace(case.params, speculation=speculation)
            try:
                await asyncio.wait_for(self._request(request_id, case, params, abort), PATIENCE_S)
            except TimeoutError:
                self.report.blame(f"{request_id} hangs")

    async def _request(self, request_id: str, case: Case, params: SamplingParams, abort: str) -> None:
        """Reads one request to its end, or to where the client loses interest."""
        tokens: list[int] = []
        moment = self.rng.randint(0, 12)
        reader = asyncio.ensure_future(self._read(request_id, case, params, abort, moment, tokens))
        if abort == "cancel":
            timer = asyncio.get_running_loop().call_later(self.rng.random() * 0.05, reader.cancel)
            reader.add_done_callback(lambda _: timer.cancel())  # which would keep it
        try:
            reason = await reader
        except InjectedError:
            self._check_failed(request_id)
            return
        except asyncio.CancelledError:
            reason = "cancelled"
        self._check(request_id, case.expected, tokens, reason)

    async def _read(
        self, request_id: str, case: Case, params: SamplingParams, abort: str, moment: int, tokens: list[int]
    ) -> str | None:
        deadline_s = self.rng.random() * 0.05 + 1e-3 if abort == "deadline" else None
        priority = self.rng.choice([0, 0, 0, 1])
        slow = self.rng.random() < 0.05
        stream = self.engine.generate(
            case.prompt, params, request_id=request_id, priority=priority, deadline_s=deadline_s
        )
        text, reason, num_chunks = "", None, 0
        async for chunk in stream:
            tokens += chunk.token_ids
            text, reason, num_chunks = text + chunk.text, chunk.finish_reason, num_chunks + 1
            if abort == "leave" and num_chunks >= moment:
                return reason or "left"
            if abort == "abort" and num_chunks == moment:
                self.engine.abort(request_id)
            if slow:
                await asyncio.sleep(0.005)
        if reason in ("stop", "length") and text != case.expected.text:
            self.report.blame(f"{request_id}: another text than alone")
        if stream.output.token_ids != tokens:
            self.report.blame(f"{request_id}: chunks and output differ")
        return reason

    def _check(self, request_id: str, expected: GenerationOutput, tokens: list[int], reason: str | None) -> None:
        self.report.outcomes[str(reason)] += 1
        self.report.num_tokens += len(tokens)
        if reason in ("stop", "length"):
            if (tokens, reason) != (expected.token_ids, expected.finish_reason):
                self.report.blame(f"{request_id}: other tokens than alone")
        elif reason not in ("abort", "deadline", "left", "cancelled"):
            self.report.blame(f"{request_id}: ended with {reason}")
        elif tokens != expected.token_ids[: len(tokens)]:
            self.report.blame(f"{request_id}: what came before its {reason} is not what comes alone")
        if request_id in self.faults.failed and reason not in ("left", "cancelled"):
            self.report.blame(f"{request_id}: its step failed, and it ended with {reason}")

    def _check_failed(self, request_id: str) -> None:
        self.report.outcomes["failed"] += 1
        if request_id not in self.faults.failed:
            self.report.blame(f"{request_id}: failed by a fault that was not its own")


def make_cases(model: str | Path, seed: int) -> list[Case]:
    """Returns requests of mixed lengths, greedy and sampled, and what each gives alone without speculation."""
    rng = random.Random(seed)
    engine = Engine.from_pretrained(model, speculation=SpeculationParams(0))
    vocab_size = engine.checkpoint.config.vocab_size
    cases = []
    for number in range(NUM_CASES):
        prompt = [rng.randrange(1, vocab_size) for _ in range(rng.choice([1, 4, 20, rng.randint(1, MAX_PROMPT)]))]
        params = SamplingParams(
            max_tokens=rng.choice([1, 8, rng.randint(1, MAX_TOKENS)]),
            temperature=rng.choice([0.0, 0.8]),
            seed=number,
            stop_token_ids=(rng.randrange(1, vocab_size),) if rng.random() < 0.3 else (),
        )
        cases.append(Case(prompt, params, engine.generate([prompt], params)[0]))
    return cases


async def soak(model: str | Path, options: SoakOptions, cases: list[Case]) -> SoakReport:
    """Runs the cases on an engine of its own, and checks what is left of it at the end."""
    num_threads = threading.active_count()
    engine = AsyncEngine.from_pretrained(
        model, max_num_seqs=16, max_num_batched_tokens=256, page_size=8, num_pages=NUM_PAGES
    )
    core = engine._core
    faults = FaultPlan(core)
    report = await Soak(engine, cases, faults, options).run()
    await engine.shutdown()
    stats = engine.stats()
    report.num_failed_steps = stats.num_failed_steps
    report.mean_acceptance_length = stats.drafts.mean_acceptance_length
    report.num_preemptions = stats.num_preemptions
    if stats.num_running or stats.num_waiting or stats.num_used_pages:
        report.blame(f"left over: {stats.num_running} run, {stats.num_waiting} wait, {stats.num_used_pages} pages")
    if not stats.num_requests == sum(stats.finished.values()) == options.num_requests:
        report.blame(f"{options.num_requests} requests, counted {stats.num_requests}, ended {stats.finished}")
    if report.resident_mib[-1] > report.resident_mib[:2][-1] + MAX_GROWTH_MIB:
        report.blame(f"memory grows: {report.resident_mib} MiB at the start of each tenth of the requests")
    core.scheduler.pool.check_integrity([])
    await asyncio.get_running_loop().shutdown_default_executor()
    if threading.active_count() > num_threads:
        report.blame(f"{threading.active_count()} threads are left of {num_threads}")
    gc.collect()
    num_alive = sum(type(x) is Sequence and x.request_id.startswith("soak-") for x in gc.get_objects())
    if num_alive:
        report.blame(f"{num_alive} sequences are still in memory")
    return report


def resident_bytes() -> int:
    """Returns the bytes of memory of this process; 0 where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE
    except OSError:
        return 0


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=SoakOptions.num_requests)
    parser.add_argument("--clients", type=int, default=SoakOptions.num_clients)
    parser.add_argument("--model")
    parser.add_argument("--seed", type=int, default=SoakOptions.seed)
    args = parser.parse_args(argv)
    options = SoakOptions(num_requests=args.requests, num_clients=args.clients, seed=args.seed)
    with tempfile.TemporaryDirectory() as folder:
        model = args.model
        if model is None:
            model = Path(folder) / "model"
            write_small_checkpoint(model, vocab_size=VOCAB_SIZE)
        report = asyncio.run(soak(model, options, make_cases(model, options.seed)))
    print(json.dumps({"options": asdict(options), **vars(report)}, indent=2))
    sys.exit(report.num_problems > 0)


if __name__ == "__main__":
    main()

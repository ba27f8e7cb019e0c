"""A failed step ends the requests it failed for, with its error, and nobody else; statistics stay consistent."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import gc
import json
import random
import threading
import traceback
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from specdec import AsyncEngine, CacheFullError, Engine, ModelError, SamplingParams, SpeculationParams
from specdec.auto_length.controller import AutoDraftLength
from specdec.cache.pages import PagePool
from specdec.cache.prefix import PrefixCache
from specdec.config import VerificationRule
from specdec.engine.core import EngineCore
from specdec.engine.thread import EngineThread
from specdec.eval.dev.faults import Fault, FaultPlan, InjectedError
from specdec.eval.dev.soak import SoakOptions, make_cases, soak
from specdec.kernels.decisions import NOT_FINITE, Drafts
from specdec.metrics.engine import EngineStats
from specdec.request.sequence import Sequence
from specdec.request.stats import SequenceStats
from specdec.request.text import OutputText
from specdec.step.scheduler import ScheduledSequence, Scheduler
from specdec.step.verify import TargetResult, TargetVerifier
from support.draft_simulation import GPU
from support.fakes import PROMPTS
from support.gate import Gate, Turnstile

PATIENCE_S = 120.0


def params(number: int) -> SamplingParams:
    speculation = SpeculationParams(number % 5, "coupled")
    return SamplingParams(
        max_tokens=10 + number, temperature=0.8 * (number % 2), seed=number, ignore_eos=True, speculation=speculation
    )


@pytest.fixture(scope="module")
def expected(planted: Path) -> list[list[int]]:
    engine = Engine.from_pretrained(planted)
    return [engine.generate(PROMPTS[i % len(PROMPTS)], params(i))[0].token_ids for i in range(20)]


async def outcome(engine: AsyncEngine, number: int) -> list[int] | BaseException:
    """A request's tokens, or its error."""
    tokens: list[int] = []
    try:
        async for chunk in engine.generate(PROMPTS[number % len(PROMPTS)], params(number), request_id=f"r{number}"):
            tokens += chunk.token_ids
    except Exception as error:
        return error
    return tokens


@pytest.mark.slow
@pytest.mark.parametrize("fault", list(Fault))
def test_a_fault_ends_the_request_at_fault_alone(planted: Path, expected: list[list[int]], fault: Fault) -> None:
    async def work() -> None:
        rng = random.Random(fault.value)
        for _ in range(4):
            engine = AsyncEngine.from_pretrained(planted, max_num_seqs=6, max_num_batched_tokens=60)
            faults = FaultPlan(engine._core)
            for number in rng.sample(range(20), 3):
                faults.plan(f"r{number}", fault, rng.randint(1, 6))
            outcomes = await asyncio.gather(*(outcome(engine, i) for i in range(20)))
            await engine.shutdown()
            failed = {f"r{i}" for i, result in enumerate(outcomes) if isinstance(result, InjectedError)}
            assert failed == faults.failed
            assert 0 < len(failed) <= 3
            assert all(result == expected[i] for i, result in enumerate(outcomes) if f"r{i}" not in failed)
            stats = engine.stats()
            assert (stats.finished["error"], stats.finished["length"]) == (len(failed), 20 - len(failed))
            assert 1 <= stats.num_failed_steps <= 3
            assert stats.num_used_pages == 0
            engine._core.scheduler.pool.check_integrity([])

    asyncio.run(asyncio.wait_for(work(), PATIENCE_S))


@pytest.mark.parametrize(("rule", "k"), [("coupled", "auto"), *product(("coupled", "block", "token"), (0, 1, 3, 8))])
def test_a_step_that_is_tried_again_changes_no_token(planted: Path, rule: VerificationRule, k: int | str) -> None:
    """Half of the steps of several requests fail, before their drafts or after their forwards; the prompts are longer
    than a chunk."""
    prompts = [[7 * i + j for j in range(5 + 20 * i)] for i in range(4)]
    asked = [
        SamplingParams(max_tokens=12, seed=i, ignore_eos=True, logprobs=1, speculation=SpeculationParams(k, rule))
        for i in range(4)
    ]

    def outputs(fails: bool) -> list[tuple[list[int], object]]:
        engine = Engine.from_pretrained(planted, max_num_seqs=4, max_num_batched_tokens=40, cost_table=GPU)
        core, rng = engine.core, random.Random(k)
        verify, draft = core.verifier.verify, core.drafter.draft

        def failing_verify(scheduled: Seq[ScheduledSequence], drafts: Drafts) -> TargetResult:
            result = verify(scheduled, drafts)
            if fails and len(scheduled) > 1 and rng.random() < 0.3:
                raise InjectedError("verify")
            return result

        def failing_draft(scheduled: Seq[ScheduledSequence]) -> Drafts:
            if fails and len(scheduled) > 1 and rng.random() < 0.3:
                raise InjectedError("draft")
            return draft(scheduled)

        core.verifier, core.drafter = SimpleNamespace(verify=failing_verify), SimpleNamespace(draft=failing_draft)
        found = engine.generate(prompts, asked)
        stats = core.stats()
        assert (stats.num_failed_steps > 2) == fails
        assert stats.finished["error"] == 0
        check(stats)
        return [(o.token_ids, o.logprobs) for o in found]

    assert outputs(fails=True) == outputs(fails=False)


def test_the_error_says_where_it_came_from(planted: Path) -> None:
    async def work() -> None:
        engine = AsyncEngine.from_pretrained(planted)
        FaultPlan(engine._core).plan("r1", Fault.BEFORE_DRAFT, 2)
        gate = Gate(engine)
        outcomes = [asyncio.ensure_future(outcome(engine, i)) for i in range(3)]
        await asyncio.sleep(0)  # they queue their requests
        gate.open.set()
        errors = await asyncio.gather(*outcomes)
        assert [isinstance(error, InjectedError) for error in errors] == [False, True, False]
        assert isinstance(errors[1], InjectedError)
        names = [frame.f_code.co_name for frame, _ in traceback.walk_tb(errors[1].__traceback__)]
        assert names[-1] == "_strike"
        await engine.shutdown()

    asyncio.run(asyncio.wait_for(work(), PATIENCE_S))


def test_an_error_keeps_nothing_of_its_step(planted: Path) -> None:
    """Requests keep their errors, and an error its frames, in whose variables the step's tensors would stay."""
    core = Engine.from_pretrained(planted).core
    sequence = core.admission.sequence("abc", params(3))
    core.add(sequence)
    FaultPlan(core).plan(sequence.request_id, Fault.AFTER_FORWARD, 2)
    while not core.scheduler.idle:
        core.step()
    assert isinstance(sequence.error, InjectedError)
    frames = [frame for frame, _ in traceback.walk_tb(sequence.error.__traceback__)]
    assert {"advance", "verify"} < {frame.f_code.co_name for frame in frames}
    assert {frame.f_code.co_name for frame in frames if frame.f_locals} <= {"_step"}, "which was running yet"
    assert sequence.pending_hidden == []


def test_a_request_ends_once(planted: Path) -> None:
    core = Engine.from_pretrained(planted).core
    sequence = core.admission.sequence("abc", params(3))
    core.add(sequence)
    core.step()
    assert (core.stats().num_running, core.stats().num_used_pages) == (1, 1)
    assert core.end(sequence, "deadline")
    assert not core.end(sequence, "error", InjectedError("late"))
    assert (sequence.finish_reason, sequence.error, sequence.pending_hidden) == ("deadline", None, [])
    stats = core.stats()
    assert (stats.num_running, stats.num_used_pages, sum(stats.finished.values())) == (0, 0, 1)
    assert core.scheduler.idle
    check(stats)


def test_sync_requests_of_others_go_on_too(planted: Path, expected: list[list[int]]) -> None:
    engine = Engine.from_pretrained(planted)
    faults = FaultPlan(engine.core)
    streams = [engine.stream(PROMPTS[i], params(i)) for i in range(4)]
    sequence = streams[2]._sequence
    faults.plan(sequence.request_id, Fault.ROW, 2)
    assert [t for chunk in streams[0] for t in chunk.token_ids] == expected[0]
    with pytest.raises(InjectedError):
        list(streams[2])
    assert streams[2].output.finish_reason == "error"
    assert [t for chunk in streams[3] for t in chunk.token_ids] == expected[3]
    faults.plan("request-5", Fault.COMMIT, 1)
    with pytest.raises(InjectedError):
        engine.generate(PROMPTS[:3], [params(i) for i in range(3)])
    assert [t for chunk in streams[1] for t in chunk.token_ids] == expected[1]
    assert engine.core.scheduler.idle
    engine.core.scheduler.pool.check_integrity([])


@pytest.mark.parametrize("stage", ["draft", "verify"])
def test_logits_that_are_not_finite_end_their_own_request(
    planted: Path, expected: list[list[int]], stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows of every third request come out broken, once."""
    engine = Engine.from_pretrained(planted)
    core, model = engine.core, engine.runtime.model
    assert model.mtp is not None
    broken: set[str] = set()
    scheduled: list[Any] = []
    schedule, verify, chain = core.scheduler.schedule, model.target.verify, model.mtp.decoder.draft_chain

    def recording() -> list[Any]:
        scheduled[:] = schedule()
        return list(scheduled)

    def breaks(s: Any, rows: list[int]) -> list[int]:
        if int(s.sequence.request_id.split("-")[1]) % 3 or not rows or s.sequence.num_output_tokens < 3:
            return rows
        broken.add(s.sequence.request_id)
        return [NOT_FINITE]

    def broken_verify(*args: Any) -> Any:
        verified = verify(*args)
        deciding = [s for s in scheduled if s.samples]
        return verified._replace(token_ids=[breaks(s, rows) for s, rows in zip(deciding, verified.token_ids)])

    def broken_chain(*args: Any) -> Any:
        extended = [s for s in scheduled if s.sequence.pending_hidden]
        return Drafts.of([breaks(s, rows) for s, rows in zip(extended, chain(*args).token_ids)])

    monkeypatch.setattr(core.scheduler, "schedule", recording)
    if stage == "verify":
        monkeypatch.setattr(model.target, "verify", broken_verify)
    else:
        monkeypatch.setattr(model.mtp.decoder, "draft_chain", broken_chain)
    sequences = [core.admission.sequence(PROMPTS[i % len(PROMPTS)], params(i)) for i in range(12)]
    for sequence in sequences:
        core.add(sequence)
    while not all(s.finished for s in sequences):
        core.step()
    assert len(broken) >= 3
    for i, sequence in enumerate(sequences):
        if sequence.request_id in broken:
            assert isinstance(sequence.error, ModelError)
            assert "logits are not finite" in str(sequence.error)
        else:
            assert (sequence.output_token_ids, sequence.error) == (expected[i], None)


def test_a_scheduler_that_fails_hangs_nobody(planted: Path, expected: list[list[int]]) -> None:
    async def work() -> None:
        for num_before in (0, 3):  # with none running, those that wait cannot be told apart either
            engine = AsyncEngine.from_pretrained(planted)
            schedule, count = engine._core.scheduler.schedule, 0

            def failing(schedule: Any = schedule, num_before: int = num_before) -> Any:
                nonlocal count
                count += 1
                if count == num_before + 1:
                    raise InjectedError("schedule")
                return schedule()

            engine._core.scheduler.schedule = failing  # type: ignore[method-assign]
            outcomes = await asyncio.gather(*(outcome(engine, i) for i in range(5)))
            assert any(isinstance(result, InjectedError) for result in outcomes)
            assert await outcome(engine, 6) == expected[6]
            await engine.shutdown()
            assert engine.stats().num_used_pages == 0

    asyncio.run(asyncio.wait_for(work(), PATIENCE_S))


def test_text_that_cannot_be_decoded_fails_its_own_request(
    planted: Path, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work() -> None:
        engine = AsyncEngine.from_pretrained(planted)
        admit = engine._core.admission.sequences

        def admitting(*args: Any, **kwargs: Any) -> Any:
            (sequence,) = admit(*args, **kwargs)
            if kwargs["request_id"] == "r2":
                monkeypatch.setattr(sequence.output, "take", lambda **_: (_ for _ in ()).throw(InjectedError("text")))
            return [sequence]

        monkeypatch.setattr(engine._core.admission, "sequences", admitting)
        outcomes = await asyncio.gather(*(outcome(engine, i) for i in range(5)))
        assert isinstance(outcomes[2], InjectedError)
        assert [outcomes[i] for i in (0, 1, 3, 4)] == [expected[i] for i in (0, 1, 3, 4)]
        await engine.shutdown()

    asyncio.run(asyncio.wait_for(work(), PATIENCE_S))


def test_text_that_cannot_be_decoded_at_an_abort_fails_its_own_request(planted: Path) -> None:
    engine = Engine.from_pretrained(planted)
    core = engine.core
    streams = [engine.stream("abc", params(9)) for _ in range(3)]
    for stream in streams:
        next(stream)
    broken = streams[1]._sequence
    broken.output.flush = lambda: (_ for _ in ()).throw(InjectedError("text"))  # type: ignore[method-assign]
    del streams[1], stream  # dropped: aborted by whoever steps next
    assert sum(len(chunk.token_ids) for chunk in streams[0]) > 0
    assert isinstance(broken.error, InjectedError)
    assert core.stats().finished["error"] == 1
    streams[1].close()
    assert core.scheduler.idle


@pytest.mark.parametrize(("stage", "all_end"), [("choose", False), ("record", True)])
def test_a_controller_that_fails_once_ends_at_most_its_step(
    planted: Path, expected: list[list[int]], stage: str, all_end: bool
) -> None:
    """Before the commit the step is tried again, one request at a time; after it that would come too late."""
    engine = Engine.from_pretrained(planted, max_num_seqs=4, max_num_batched_tokens=36, cost_table=GPU)
    core = engine.core
    method, num_calls = getattr(core.draft_length, stage), 0

    def failing(*args: Any) -> Any:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 2:
            raise InjectedError(stage)
        return method(*args)

    setattr(core.draft_length, stage, failing)
    auto = [replace(params(i), speculation=SpeculationParams("auto")) for i in range(12)]
    sequences = [core.admission.sequence(PROMPTS[i % len(PROMPTS)], auto[i]) for i in (2, 9, 3, 4, 5, 6)]
    for sequence in sequences:
        core.add(sequence)
    core.step()
    bystanders = [s for s in core.scheduler.running if not s.num_computed_tokens] + core.scheduler.waiting
    stepped = core.step()
    failed = set(stepped) if all_end else set()
    assert core.stats().num_failed_steps == 1
    assert {s for s in sequences if s.error} == failed
    while not core.scheduler.idle:
        core.step()
    spared = [i for i, s in zip((2, 9, 3, 4, 5, 6), sequences) if s not in failed]
    assert spared
    assert bystanders
    assert [s.output_token_ids for s in sequences if s not in failed] == [expected[i] for i in spared]
    check(core.stats())


@pytest.mark.slow
def test_a_thread_that_ends_leaves_nobody_waiting(planted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        engine = AsyncEngine.from_pretrained(planted)
        released = threading.Event()

        def broken_step(_: EngineCore) -> None:
            assert released.wait(PATIENCE_S)
            raise SystemExit("gone")

        monkeypatch.setattr(EngineCore, "step", broken_step)
        streams = [engine.generate("abc", params(3)) for _ in range(3)]  # would refuse once the thread is broken
        released.set()
        for stream in streams:
            with pytest.raises(SystemExit, match="gone"):
                await anext(stream)
        with pytest.raises(RuntimeError, match=r"the engine has failed: SystemExit\('gone'\)"):
            engine.generate("abc", params(3))
        await engine.shutdown()

    asyncio.run(asyncio.wait_for(work(), PATIENCE_S))
    gc.collect()
    assert not [thing for thing in gc.get_objects() if type(thing) is EngineThread], "model and cache would stay, too"


def check(stats: EngineStats) -> None:
    """What holds of every snapshot."""
    drafts = stats.drafts
    assert stats.num_requests == stats.num_running + stats.num_waiting + sum(stats.finished.values())
    assert 0 <= stats.num_used_pages <= stats.num_pages
    assert sum(drafts.drafted_per_position) == drafts.num_draft_tokens
    assert sum(drafts.accepted_per_position) == drafts.num_accepted_tokens
    completed = stats.finished["stop"] + stats.finished["length"]
    for histogram in (stats.queue, stats.prefill, stats.decode, stats.latency):
        assert histogram.count == completed
    assert completed <= stats.first_token.count <= stats.num_requests
    assert drafts.num_target_forwards == stats.first_token.count + stats.inter_token.count
    assert stats.step_tokens.count == stats.num_steps
    assert drafts.num_target_forwards <= stats.num_output_tokens
    assert stats.num_output_tokens <= drafts.num_target_forwards + drafts.num_accepted_tokens
    json.dumps(stats.as_dict())


def test_snapshots_are_consistent_at_any_time(planted: Path) -> None:
    async def work() -> None:
        engine = AsyncEngine.from_pretrained(planted, max_num_seqs=4)
        faults = FaultPlan(engine._core)
        for number, fault in enumerate(Fault):
            faults.plan(f"r{3 * number}", fault, 3)
        turnstile = Turnstile(engine)
        tasks = [asyncio.ensure_future(outcome(engine, i)) for i in range(20)]
        tasks[7].cancel()
        num_snapshots = 0
        while not all(task.done() for task in tasks):
            check(engine.stats())
            num_snapshots += 1
            turnstile.let_through()
            await asyncio.sleep(1e-4)
        assert num_snapshots > 10
        await engine.shutdown()
        stats = engine.stats()
        check(stats)
        received = [task.result() for task in tasks if not task.cancelled()]
        complete = [tokens for tokens in received if isinstance(tokens, list)]
        assert stats.finished["length"] == len(complete)
        assert stats.num_output_tokens >= sum(map(len, complete))

    asyncio.run(asyncio.wait_for(work(), PATIENCE_S))


@pytest.mark.parametrize("fault", list(Fault))
def test_rows_of_a_failed_step_that_decode_are_no_prompts(planted: Path, fault: Fault) -> None:
    engine = Engine.from_pretrained(planted)
    faults = FaultPlan(engine.core)
    sequences = [engine.core.admission.sequence([5, 6, 7, 8, number], params(number)) for number in range(4)]
    for sequence in sequences:
        engine.core.add(sequence)
    faults.plan(sequences[1].request_id, fault, 3)
    while not engine.core.scheduler.idle:
        engine.core.step()
    stats = engine.stats()
    assert stats.num_failed_steps == 1
    assert stats.step_tokens.sum == 4 * 5 + stats.num_output_tokens
    assert stats.num_output_tokens == sum(s.stats.num_output_tokens for s in sequences), "what had committed counts"


class CheckedLock:
    """In place of the statistics' lock: whoever gets it next sees counts that agree."""

    def __init__(self, stats: EngineStats) -> None:
        self.stats, self.lock = stats, threading.Lock()

    def __enter__(self) -> None:
        self.lock.acquire()

    def __exit__(self, *_: object) -> None:
        check(copy.deepcopy(self.stats))
        self.lock.release()


def test_no_state_between_two_counts_is_seen(planted: Path) -> None:
    """Requests that end in a step that fails for others, and requests that end as they come, included."""
    engine = Engine.from_pretrained(planted, max_num_seqs=4, num_pages=7, cost_table=GPU)
    core = engine.core
    faults = FaultPlan(core)
    core._stats_lock = CheckedLock(core._stats)  # type: ignore[assignment]
    prepare = core.draft_length.prepare
    core.draft_length.prepare = lambda: (check(core.stats()), prepare())  # type: ignore[method-assign, func-returns-value]
    auto = [replace(params(i), speculation=SpeculationParams("auto")) for i in range(8)]
    sequences = [core.admission.sequence(PROMPTS[i % len(PROMPTS)], auto[i]) for i in range(8)]
    sequences.append(core.admission.sequence([5], SamplingParams(max_tokens=255)))
    for sequence in sequences[:8]:
        core.add(sequence)
    with pytest.raises(CacheFullError):
        core.add(sequences[8])
    for number, fault in enumerate(Fault):
        faults.plan(sequences[number].request_id, fault, 2 + number)
    core.end(sequences[7], "abort")
    while not core.scheduler.idle:
        core.step()
    assert core.stats().num_requests == 9


def test_a_snapshot_of_draft_lengths_is_of_between_two_steps(planted: Path) -> None:
    engine = Engine.from_pretrained(planted, cost_table=GPU)
    core, controller = engine.core, engine.core.draft_length
    choose, record, seen = controller.choose, controller.record, []

    def shown() -> dict[str, object]:
        draft_length = core.stats().draft_length
        assert draft_length is not None
        return draft_length.as_dict()

    def choosing(scheduled: Any) -> Any:
        seen.append(shown())
        return choose(scheduled)

    def recording(*step: Any) -> None:
        record(*step)
        assert shown() == seen[-1], "a step under way shows"

    controller.choose, controller.record = choosing, recording  # type: ignore[method-assign]
    auto = SamplingParams(max_tokens=60, temperature=0, ignore_eos=True, speculation=SpeculationParams("auto"))
    engine.generate(PROMPTS, auto)
    assert seen[-1] != seen[0] != shown() == engine.core.draft_length.snapshot().as_dict()  # type: ignore[union-attr]


Place = tuple[type, str]
PLACES: list[Place] = [
    (Scheduler, "schedule"), (PagePool, "hold"), (PagePool, "allocate"), (Sequence, "admit"), (Sequence, "preempt"),
    (PagePool, "publish"), (PagePool, "release"), (PrefixCache, "set_idle"), (AutoDraftLength, "choose"),
    (TargetVerifier, "verify"), (OutputText, "push"), (SequenceStats, "record_commit"), (AutoDraftLength, "record"),
    (Scheduler, "remove_finished"), (EngineStats, "record_step"), (EngineStats, "record_state"),
]  # fmt: skip


class Strike:
    """Raises at the nth call of a method while it is armed, before or after the call."""

    def __init__(self, method: Callable[..., Any], error: type[BaseException], nth: int, *, afterwards: bool) -> None:
        self.num_calls, self._armed = 0, False

        def strikes(*args: Any, **kwargs: Any) -> Any:
            self.num_calls += self._armed
            due = self._armed and self.num_calls == nth
            if due:
                self._armed = False  # cleaning up may call it too
            if due and not afterwards:
                raise error
            result = method(*args, **kwargs)
            if due:
                raise error
            return result

        self.method, self._nth = strikes, nth

    @contextlib.contextmanager
    def armed(self) -> Iterator[None]:
        self._armed = self.num_calls < self._nth
        yield
        self._armed = False


@pytest.mark.slow
@pytest.mark.parametrize("error", [KeyboardInterrupt, InjectedError])
@pytest.mark.parametrize("place", PLACES, ids=lambda place: f"{place[0].__name__}.{place[1]}")
@pytest.mark.parametrize("afterwards", [False, True])
def test_whatever_a_step_is_interrupted_in_the_engine_is_usable(
    planted: Path, expected: list[list[int]], place: Place, error: type[BaseException], afterwards: bool
) -> None:
    """Before or after a call of any of these, in a cache so small that requests are preempted."""
    engine = Engine.from_pretrained(planted, max_num_seqs=4, num_pages=26, page_size=4, cost_table=GPU)
    given = [replace(params(i), speculation=SpeculationParams("auto" if i % 3 else 2)) for i in range(8)]
    core, rng = engine.core, random.Random(f"{place} {afterwards}")
    for nth in (1, 2, rng.randint(3, 12), rng.randint(3, 40)):
        strike = Strike(getattr(*place), error, nth, afterwards=afterwards)
        sequences = [core.admission.sequence(PROMPTS[i % len(PROMPTS)], given[i]) for i in range(8)]
        for sequence in sequences:
            core.add(sequence)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(*place, strike.method)
            while not core.scheduler.idle:
                with contextlib.suppress(error), strike.armed():
                    core.step()
                core.scheduler.check_integrity()
        assert strike.num_calls >= min(nth, 2)
        for i, sequence in enumerate(sequences):
            assert sequence.finished, "nobody would ever hear of it"
            output = sequence.output_token_ids
            assert output == expected[i][: len(output)]
            assert len(output) == len(expected[i]) or sequence.finish_reason in ("abort", "error")
        stats = core.stats()
        assert (stats.num_running, stats.num_waiting, stats.num_used_pages) == (0, 0, 0)
        assert stats.num_requests == sum(stats.finished.values())


def test_engine_counts_are_the_sums_of_its_requests(planted: Path) -> None:
    engine = Engine.from_pretrained(planted)
    outputs = engine.generate([PROMPTS[i % len(PROMPTS)] for i in range(20)], [params(i) for i in range(20)])
    stats, requests = engine.stats(), [output.stats for output in outputs]
    check(stats)
    for name in ("num_target_forwards", "num_drafts", "num_draft_tokens", "num_accepted_tokens"):
        assert getattr(stats.drafts, name) == sum(getattr(request, name) for request in requests)
    assert stats.num_output_tokens == sum(len(output.token_ids) for output in outputs)
    assert stats.num_prompt_tokens == sum(len(output.prompt_token_ids) for output in outputs)
    assert stats.latency.sum >= stats.decode.sum > 0
    sums = stats.queue.sum + stats.prefill.sum + stats.decode.sum
    assert sums == pytest.approx(stats.latency.sum), "queue, prefill and decode are all of a request's time"
    assert stats.first_token.sum == pytest.approx(stats.queue.sum + stats.prefill.sum)


@pytest.mark.slow
def test_a_small_soak(planted: Path) -> None:
    options = SoakOptions(num_requests=300, num_clients=24, abort_share=0.1, fault_share=0.03, seed=1)
    report = asyncio.run(asyncio.wait_for(soak(planted, options, make_cases(planted, 1)), PATIENCE_S))
    assert report.problems == []
    assert report.outcomes["failed"] > 5
    assert sum(report.outcomes[reason] for reason in ("abort", "left", "cancelled", "deadline")) > 5
    assert report.outcomes["length"] + report.outcomes["stop"] > 150
    assert report.num_failed_steps > 3

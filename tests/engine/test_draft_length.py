"""Draft lengths by cost and acceptance: on a simulated clock, in exact laws, and in whole engines."""

from __future__ import annotations

import itertools
import random
from collections import defaultdict
from collections.abc import Sequence as Seq
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest

from specdec import Engine, ModelError, SamplingParams, SpeculationParams
from specdec.auto_length import measure
from specdec.auto_length.controller import AutoDraftLength
from specdec.auto_length.lengths import Candidate, StepBase, best_lengths
from specdec.auto_length.measure import cost_table, measure_costs, trials
from specdec.config import MAX_SPECULATIVE_TOKENS
from specdec.cost import CostTable, StepTimes
from specdec.kernels.decisions import Drafts
from specdec.request.sequence import Sequence
from specdec.step import batch
from specdec.step.draft_length import FixedDraftLength
from specdec.step.scheduler import MAX_PENDING_PAIRS, ScheduledSequence
from support.draft_simulation import BUNDLED, GPU, MEDIUM, Simulation, expected_rate
from support.enumeration import Enumerator, Law, RandomModel, RandomPath, distance, target_law
from support.fakes import KERNELS, NEEDS_COMPILER, write_planted_checkpoint

TABLES = {"bundled": BUNDLED, "medium": MEDIUM, "gpu": GPU}
NUM_TOKENS = {1: 5000, 4: 12000, 16: 20000}
LENGTHS = range(MAX_SPECULATIVE_TOKENS + 1)


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("batch_size", [1, 4, 16])
@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_it_is_as_fast_as_the_best_fixed_length(table: CostTable, batch_size: int, alpha: float) -> None:
    """From a cold start, with all that it tries out; the mean of three runs."""
    rates = [expected_rate(table, batch_size, k, [alpha] * k) for k in LENGTHS]
    simulations = [Simulation(table, lambda *_: alpha, batch_size, length=600, seed=seed) for seed in range(3)]
    rate = fmean(simulation.run(simulation.auto(), NUM_TOKENS[batch_size]) for simulation in simulations)
    assert rate >= 0.97 * max(rates)
    assert rate >= 0.98 * rates[0]


@pytest.mark.slow
@pytest.mark.parametrize("alphas", [(0.0, 0.9, 0.0), (0.8, 0.3, 0.8), (0.0, 1.0, 0.7)])
@pytest.mark.parametrize("batch_size", [1, 4, 16])
@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_it_follows_acceptance_that_drifts(table: CostTable, batch_size: int, alphas: tuple[float, ...]) -> None:
    """In the middle of requests; against the fixed length that is best over the whole run."""
    now = [0.0]
    simulation = Simulation(table, lambda *_: now[0], batch_size, length=600)
    controller, num_tokens = simulation.auto(), NUM_TOKENS[batch_size] // 2
    for now[0] in alphas:
        simulation.run(controller, num_tokens)
    seconds = [sum(num_tokens / expected_rate(table, batch_size, k, [a] * k) for a in alphas) for k in LENGTHS]
    assert simulation.now_s <= min(seconds) / 0.97
    assert simulation.now_s <= seconds[0] / 0.98


@pytest.mark.slow
@pytest.mark.parametrize("table", [MEDIUM, GPU], ids=["medium", "gpu"])
def test_requests_of_different_acceptance_get_lengths_of_their_own(table: CostTable) -> None:
    def rate(k: int | str) -> float:
        simulation = Simulation(table, lambda number, *_: (0.05, 0.95)[number % 2], 16, length=600)
        return simulation.run(simulation.auto() if k == "auto" else FixedDraftLength(), 16000, k)

    assert rate("auto") > 1.05 * max(map(rate, LENGTHS))


def test_acceptance_that_falls_with_the_position_is_learnt() -> None:
    alphas = [0.9, 0.6, 0.2, 0.1, 0.1, 0.1, 0.1, 0.1]
    simulation = Simulation(GPU, lambda number, tokens, position: alphas[position], 1)
    rates = [expected_rate(GPU, 1, k, alphas) for k in LENGTHS]
    assert simulation.run(simulation.auto(), 8000) >= 0.97 * max(rates)
    assert simulation.lengths.index(max(simulation.lengths)) in (2, 3)


def test_the_best_prefix_is_found_beyond_a_step_that_does_not_pay() -> None:
    """The extend alone costs more than one draft gains; three drafts pay for it and for a fourth."""
    table = CostTable({1: 1.0, 9: 1.0}, {1: 1.0, 9: 1.0}, {1: 0.01})
    base = StepBase(num_sequences=1, num_rows=1)
    assert best_lengths(table, base, [Candidate([0.95, 0.9, 0.85, 0.1])]) == [4]
    assert best_lengths(table, base, [Candidate([0.95])]) == [0]
    assert best_lengths(table, base, [Candidate([])]) == [0]


def test_hardly_any_other_lengths_are_faster() -> None:
    """Against all combinations, of which prefixes of the order are a few."""
    rng = random.Random(0)
    for _ in range(60):
        base, row, extend, step = rng.uniform(0.5, 2), rng.uniform(0.01, 0.3), rng.uniform(0, 0.3), 0.05
        table = CostTable(
            {n: base + row * n for n in range(1, 20)},
            dict.fromkeys((1, 20), extend + 1e-09),
            {n: step * n for n in (1, 9)},
        )
        laws = [list(itertools.accumulate((rng.uniform(0.1, 1) for _ in range(3)), lambda a, b: a * b)) for _ in "abc"]

        def rate(lengths: Seq[int], table: CostTable = table, laws: list[list[float]] = laws) -> float:
            tokens = sum(1 + sum(law[:k]) for law, k in zip(laws, lengths))
            drafting = [sum(k > depth for k in lengths) for depth in range(3)]
            return tokens / table.seconds(3, 3 + sum(lengths), 5 * any(lengths), drafting)

        best = max(map(rate, itertools.product(range(4), repeat=3)))
        assert rate(best_lengths(table, StepBase(3, 3), [Candidate(law) for law in laws])) >= 0.98 * best


def test_choices_do_not_depend_on_the_clock_where_the_table_is_given() -> None:
    chosen = []
    for factor in (1.0, 0.01, 7.0):
        simulation = Simulation(MEDIUM, lambda *_: 0.6, 4)
        rng = random.Random(factor)
        clock = lambda s=simulation, f=factor, r=rng: f * s.now_s + 1e-3 * r.random()  # noqa: E731
        simulation.run(AutoDraftLength(lambda _: MEDIUM, clock, follow_clock=False), 2000)
        chosen.append(simulation.lengths)
    assert chosen[0] == chosen[1] == chosen[2]


def test_a_table_that_is_wrong_about_drafting_is_corrected_by_the_clock() -> None:
    wrong = CostTable(GPU.target, {1: 0.03, 256: 0.03}, {1: 0.01})  # the MTP layer slower than the whole model
    simulation = Simulation(GPU, lambda *_: 0.9, 1)
    rate = simulation.run(AutoDraftLength(lambda _: wrong, simulation.clock), 10000)
    assert rate > 1.5 * expected_rate(GPU, 1, 0, [])


def test_step_times_are_predicted_within_a_slow_factor() -> None:
    times, rng = StepTimes(), random.Random(0)
    for step in range(2000):
        table_s = rng.uniform(1, 3)
        interrupted = 50.0 if rng.random() < 0.02 else 1.0
        times.record(
            table_s, table_s * (1.3 + step / 10000) * rng.uniform(0.95, 1.05) * interrupted, drafts=step % 3 > 0
        )
    assert times.median_relative_error is not None
    assert times.median_relative_error < 0.05
    assert times.plain.factor == pytest.approx(1.5, rel=0.05)
    assert times.num_steps == 2000


class HistoryLength(FixedDraftLength):
    """Lengths that hang on the committed tokens and on past acceptances, in a way that no controller would choose."""

    def choose(self, scheduled: list[ScheduledSequence]) -> list[ScheduledSequence]:
        def length(s: ScheduledSequence) -> int:
            sequence = s.sequence
            return (sum(sequence.token_ids[-2:]) + 2 * sequence.stats.num_accepted_tokens + len(sequence.token_ids)) % 4

        return [replace(s, num_draft_tokens=min(length(s), s.num_draft_tokens)) for s in scheduled]


class Peeking:
    """A drafter that drops a draft for what it is, and all after it: anticipating."""

    def __init__(self, drafter: object) -> None:
        self.drafter = drafter

    def draft(self, scheduled: Seq[ScheduledSequence]) -> Drafts:
        result = self.drafter.draft(scheduled)
        for token_ids in result.token_ids:
            if 0 in token_ids:
                del token_ids[token_ids.index(0) :]
        return result


def enumerator(folder: Path, vocab_size: int) -> Enumerator:
    return Enumerator(folder, RandomModel(vocab_size, 3, zeros=0.1), RandomModel(vocab_size, 4, zeros=0.1))


def exact(tables: Enumerator, num_tokens: int) -> Law:
    return target_law(lambda context: tables.kernels.tables[0].logits(context).softmax(-1), [1, 0], num_tokens)


def params(rule: str, num_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=num_tokens, ignore_eos=True, speculation=SpeculationParams("auto", rule))


@pytest.mark.parametrize("rule", ["token", "block"])
def test_the_law_is_exact_whatever_lengths_make_of_the_past(tmp_path: Path, rule: str) -> None:
    tables = enumerator(tmp_path, 3)
    tables.engine.core.draft_length = HistoryLength()
    assert distance(tables.law([1, 0], params(rule, 4)), exact(tables, 4)) < 1e-12


@pytest.mark.parametrize("rule", ["token", "block"])
def test_a_mutant_that_looks_at_drafts_is_seen(tmp_path: Path, rule: str) -> None:
    tables = enumerator(tmp_path, 3)
    tables.engine.core.drafter = Peeking(tables.engine.core.drafter)
    tables.engine.core.draft_length = HistoryLength()
    assert distance(tables.law([1, 0], params(rule, 4)), exact(tables, 4)) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["token", "block"])
def test_the_law_is_exact_with_the_controller_itself(
    tmp_path: Path, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every path alone, with a controller that knows nothing at first and decides anew in every step."""
    monkeypatch.setattr("specdec.auto_length.controller.KEPT_STEPS", 1)
    monkeypatch.setattr("specdec.auto_length.controller.KEPT_PLAIN_STEPS", 1)
    monkeypatch.setattr("specdec.auto_length.probing.PROBE_INTERVAL", 1)
    tables = enumerator(tmp_path, 2)
    table = CostTable({1: 1.0, 2: 1.35, 3: 1.8, 4: 2.2}, {1: 0.1}, {1: 0.05})
    law: Law = defaultdict(float)
    pending, chosen = [RandomPath([])], [0] * 9
    while pending:
        path = pending.pop()
        controller = AutoDraftLength(lambda _: table, follow_clock=False)
        tables.engine.core.draft_length, tables.kernels.paths = controller, [path]
        tables.kernels.contexts.clear()
        (output,) = tables.engine.generate([[1, 0]], replace(params(rule, 5), seed=0))
        law[tuple(output.token_ids)] += path.probability
        pending += path.alternatives()
        chosen = [a + b for a, b in zip(chosen, controller.stats.chosen)]
    assert sum(count > 0 for count in chosen) >= 3, "lengths differ from path to path"
    assert distance(law, exact(tables, 5)) < 1e-12


class Pauses(FixedDraftLength):
    """Drafts only in some stretches of a request; in between pairs wait, or are run in every step."""

    def __init__(self, *, waiting: bool) -> None:
        self.waiting = waiting

    def choose(self, scheduled: list[ScheduledSequence]) -> list[ScheduledSequence]:
        def chosen(s: ScheduledSequence) -> ScheduledSequence:
            paused = s.sequence.num_output_tokens % 120 < 100
            return replace(s, num_draft_tokens=0, flushes=not self.waiting) if paused else s

        return [chosen(s) for s in scheduled]


@NEEDS_COMPILER
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_drafts_after_a_pause_are_those_without_one(tmp_path: Path, temperature: float) -> None:
    engine = Engine.from_pretrained(write_planted_checkpoint(tmp_path, noise=0.7), kernels="cpu", max_num_seqs=3)
    given = [
        SamplingParams(
            max_tokens=count, temperature=temperature, seed=seed, ignore_eos=True, speculation=SpeculationParams(3)
        )
        for seed, count in enumerate((240, 150, 230))
    ]
    prompts = [[5, 6, 7], [9] * 13, [40]]
    decisions = []
    for waiting in (True, False):
        engine.core.draft_length = Pauses(waiting=waiting)
        with engine.core.traced() as trace:
            outputs = engine.generate(prompts, given)
        assert sum(o.stats.num_accepted_tokens for o in outputs) > 10
        decisions.append([decision[1:] for decision in trace])
    assert decisions[0] == decisions[1]
    assert any(drafts for _, drafts, _ in decisions[0])


def test_waiting_pairs_are_bounded() -> None:
    simulation = Simulation(BUNDLED, lambda *_: 0.0, 16, length=5000)
    most = 0

    class Watching(AutoDraftLength):
        def choose(self, scheduled: list[ScheduledSequence]) -> list[ScheduledSequence]:
            nonlocal most
            most = max(most, *(s.sequence.num_pending_pairs for s in scheduled))
            return super().choose(scheduled)

    simulation.run(Watching(lambda _: BUNDLED, simulation.clock), 16 * 1500)
    assert most == MAX_PENDING_PAIRS


@NEEDS_COMPILER
def test_tokens_do_not_depend_on_lengths(tmp_path: Path) -> None:
    """Coupled and greedy: auto, fixed and no speculation, in one batch, chunked prompts, tiny costs of any shape."""
    rng = random.Random(1)
    folder = write_planted_checkpoint(tmp_path, noise=0.7)
    prompts = [[rng.randrange(3, 259) for _ in range(rng.choice([1, 5, 90]))] for _ in range(24)]
    plain = [
        SamplingParams(
            max_tokens=60, temperature=rng.choice([0.0, 0.8]), seed=seed, ignore_eos=True,
            speculation=SpeculationParams(0),
        )
        for seed in range(24)
    ]  # fmt: skip
    expected = [o.token_ids for o in Engine.from_pretrained(folder, kernels="cpu").generate(prompts, plain)]
    for table in (GPU, MEDIUM, BUNDLED):
        engine = Engine.from_pretrained(
            folder, kernels="cpu", max_num_seqs=5, max_num_batched_tokens=64, cost_table=table
        )
        given = [replace(p, speculation=SpeculationParams(rng.choice(["auto", "auto", 2, 0]))) for p in plain]
        assert [o.token_ids for o in engine.generate(prompts, given)] == expected
        stats = engine.core.draft_length.stats
        assert stats is not None
        assert sum(count > 0 for count in stats.chosen) >= 3


@NEEDS_COMPILER
def test_costs_are_measured_once_and_steps_are_predicted(tmp_path: Path) -> None:
    folder = write_planted_checkpoint(tmp_path, noise=0.3)
    engine = Engine.from_pretrained(folder, kernels="cpu", speculation=SpeculationParams("auto"))
    engine.generate([[5, 6]] * 3, SamplingParams(max_tokens=100, temperature=0, ignore_eos=True))
    stats = engine.stats().draft_length
    assert stats is not None
    assert sum(stats.chosen) > 0
    assert stats.times.num_steps > 0
    assert stats.times.median_relative_error is not None
    assert engine.stats().plain_s > 0
    again = Engine.from_pretrained(folder, kernels="cpu")
    assert cost_table(again.runtime, again.tokenizer, again.config) is engine.core.draft_length.table
    assert not again.runtime.kv_cache.any(), "measuring has a cache of its own"


@NEEDS_COMPILER
def test_measuring_ends_when_its_time_is_spent(tmp_path: Path) -> None:
    engine = Engine.from_pretrained(write_planted_checkpoint(tmp_path), kernels="cpu")
    table = measure_costs(engine.runtime, engine.tokenizer, trials([1, 16]), budget_s=0.0)
    assert (list(table.target), list(table.mtp_extend), list(table.mtp_step)) == ([1, 4], [1], [1])


@pytest.mark.slow
@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("max_model_len", [2, 3, 17, 64, 100])
def test_measuring_stays_inside_the_context(
    tmp_path: Path, kernels: str, max_model_len: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rotations of positions beyond it do not exist."""
    monkeypatch.setattr(measure, "_tables", {})
    ends: list[int] = []

    def building(extends: Seq[batch.Extend], page_size: int) -> batch.ForwardBatch:
        ends.extend(extend.start + len(extend.token_ids) for extend in extends)
        return batch.build_batch(extends, page_size)

    for module in ("verify", "draft"):
        monkeypatch.setattr(f"specdec.step.{module}.build_batch", building)
    engine = Engine.from_pretrained(
        write_planted_checkpoint(tmp_path), kernels=kernels, max_model_len=max_model_len, max_num_seqs=4
    )
    engine.measure_costs()
    assert 0 < max(ends) <= max_model_len
    given = SamplingParams(max_tokens=99, temperature=0, ignore_eos=True, speculation=SpeculationParams("auto"))
    assert len(engine.generate([[5]], given)[0].token_ids) == min(99, max_model_len - 1)


def test_without_auto_nothing_is_measured(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine.from_pretrained(tiny_checkpoint, kernels="reference")
    monkeypatch.setattr(engine.core.draft_length._table, "_measure", None)
    engine.generate([[5]], SamplingParams(max_tokens=4, temperature=0))
    assert engine.stats().draft_length is not None
    assert sum(engine.stats().draft_length.chosen) == 0


@pytest.mark.parametrize("wrong", ["automatic", "", None, 1.5])
def test_other_words_are_refused(wrong: object) -> None:
    with pytest.raises(ValueError, match=r"num_speculative_tokens = .*'auto' chooses for every step"):
        SpeculationParams(wrong)


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_a_plain_step_costs_what_one_without_drafts_does(table: CostTable) -> None:
    for rows in (1, 3, 16, 700):
        assert table.plain_s(rows) == table.seconds(rows, rows, 0, [0] * 8)


def test_tables_that_cannot_be_are_refused() -> None:
    nan, inf = float("nan"), float("inf")
    for fields in (
        {"target": {}}, {"mtp_step": {0: 1.0}}, {"mtp_extend": {1: 0.0}}, {"sequence_s": -1.0}, {"target": {1: nan}},
        {"target": {1: inf}}, {"target": {1.5: 1.0}}, {"target": {True: 1.0}}, {"target": {"1": 1.0}},
        {"target": {1: "1"}}, {"target": [1.0]}, {"mtp_step": None}, {"sequence_s": nan}, {"sampled_s": None},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(fields))):
            CostTable(**({"target": {1: 1.0}, "mtp_extend": {1: 1.0}, "mtp_step": {1: 1.0}} | fields))
    with pytest.raises(ValueError, match="cost_table"):
        Engine.from_pretrained("bundled", cost_table={1: 2.0})


@NEEDS_COMPILER
def test_a_prompt_is_shared_though_nothing_is_drafted(tmp_path: Path) -> None:
    """Pages need their MTP rows for that: a prompt's pairs do not wait."""
    never = CostTable({1: 1.0}, {1: 100.0}, {1: 100.0})
    engine = Engine.from_pretrained(write_planted_checkpoint(tmp_path), kernels="cpu", cost_table=never)
    given = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True, speculation=SpeculationParams("auto"))
    outputs = [engine.generate([list(range(3, 53))], given)[0] for _ in range(2)]
    assert [o.stats.num_draft_tokens for o in outputs] == [0, 0]
    assert [o.stats.num_cached_tokens for o in outputs] == [0, 48]


@NEEDS_COMPILER
def test_pairs_that_run_anyway_are_no_flush(tmp_path: Path) -> None:
    """Those of a prompt; an output's are flushed as soon as there are 64 of them, at these costs."""
    table = CostTable({1: 1.0, 2: 10.0}, {1: 1e-9}, {1: 1e-9})
    engine = Engine.from_pretrained(write_planted_checkpoint(tmp_path), kernels="cpu", cost_table=table)
    given = SamplingParams(max_tokens=70, temperature=0, ignore_eos=True, speculation=SpeculationParams("auto"))
    for max_tokens, num_flushes in ((40, 0), (90, 1)):
        engine.generate([list(range(3, 103))], replace(given, max_tokens=max_tokens))
        assert engine.core.draft_length.snapshot().num_flushes == num_flushes


def test_deciding_takes_a_small_share_of_the_time_though_requests_come_and_go() -> None:
    """Requests of 8 tokens; a decision takes as long as a step."""

    class Slow(AutoDraftLength):
        num_decisions = 0

        def _decide(self, scheduled: list[ScheduledSequence]) -> list[ScheduledSequence]:
            self.num_decisions += 1
            simulation.now_s += decision_s
            return super()._decide(scheduled)

    decision_s, simulation = MEDIUM.target[16], Simulation(MEDIUM, lambda *_: 0.9, 16, length=8)
    controller = Slow(lambda _: MEDIUM, simulation.clock)
    simulation.run(controller, 10000)
    assert 3 <= controller.num_decisions <= 0.011 * simulation.now_s / decision_s + 2
    plain = Simulation(MEDIUM, lambda *_: 0.9, 16, length=8)
    assert simulation.now_s < 0.85 * 10000 / plain.run(FixedDraftLength(), 10000, 0), "and it pays all the same"


def test_snapshots_are_of_their_time() -> None:
    simulation = Simulation(MEDIUM, lambda *_: 0.7, 4)
    controller = simulation.auto()
    snapshots = []
    for number in range(60):
        simulation.run(controller, 25)
        if number == 40:
            controller.stats.times.forget()  # as another table does
        snapshots.append((controller.snapshot(), controller.stats.as_dict(), controller.stats.times.plain.factor))
    assert len({kept["measured_s"] for _, kept, _ in snapshots}) > 5
    for snapshot, kept, factor in snapshots:
        assert (snapshot.as_dict(), snapshot.times.plain.factor) == (kept, factor)


class Resting:
    """Whoever decides takes ever so long by this clock, so that a first decision stands for all time."""

    def __init__(self) -> None:
        self.now_s, self.controller = 0.0, AutoDraftLength(lambda _: MEDIUM, self.clock)
        self.sequences: list[Sequence] = []
        self.simulation = Simulation(MEDIUM, lambda *_: 0.9, 1)
        self.controller.prepare()

    def clock(self) -> float:
        self.now_s += 1.0
        return self.now_s

    def arrive(self) -> Sequence:
        self.sequences.append(self.simulation._sequence("auto"))
        self.simulation.num_requests += 1
        return self.sequences[-1]

    def step(self, *rows: tuple[int, int, int]) -> list[int]:
        """Sequence, rows and drafts at most of each; -> how many it drafts."""
        while len(self.sequences) <= max(i for i, _, _ in rows):
            self.arrive()
        scheduled = self.controller.choose([ScheduledSequence(self.sequences[i], n, k) for i, n, k in rows])
        self.controller.record(scheduled, [[1] * s.num_draft_tokens for s in scheduled], [[1]] * len(rows))
        return [s.num_draft_tokens for s in scheduled]


def test_a_request_drafts_from_its_second_token_on_though_the_last_decision_stands() -> None:
    """It was made with its prompt's last row, and a first token has no drafts."""
    resting = Resting()
    first, none = resting.step((0, 1, 8), (1, 1, 0))
    assert (first > 0, none) == (True, 0)
    first, second = resting.step((0, 1, 8), (1, 1, 8))
    assert 0 < first == second < 8


def test_nobody_drafts_all_there_are_because_it_was_not_asked() -> None:
    """Its chunk did not sample when the others' lengths were decided."""
    resting = Resting()
    resting.step((0, 1, 8))
    late = resting.arrive()
    late.num_computed_tokens -= 1
    usual = resting.step((0, 1, 8), (1, 1, 0))[0]
    late.num_computed_tokens += 1
    chosen = sum(resting.controller.stats.chosen)
    assert resting.step((0, 1, 8), (1, 1, 8)) == [usual, usual]
    assert sum(resting.controller.stats.chosen) == chosen + 2


@pytest.mark.parametrize(("num_prompt_tokens", "drafts"), [(1000, True), (16, False)])
def test_pairs_that_do_not_wait_cost_nothing_to_catch_up_with(num_prompt_tokens: int, drafts: bool) -> None:
    """A prompt's run whether anything is drafted or not; with an output's of as many tokens drafts do not pay."""
    table = CostTable({1: 1e-3, 9: 1.1e-3}, {1: 0.1e-3, 1001: 300.1e-3}, {1: 0.1e-3})
    simulation = Simulation(table, lambda *_: 0.9, 1, prompt=num_prompt_tokens)
    controller, sequence = simulation.auto(), simulation._sequence("auto")
    controller.prepare()
    sequence.num_computed_tokens = 1000
    sequence.token_ids = [1] * 1001
    sequence.num_mtp_tokens = 0 if num_prompt_tokens == 1000 else num_prompt_tokens - 1
    controller.choose([ScheduledSequence(sequence, 1, 8)])
    assert controller._plan is not None
    assert (controller._plan.lengths[0] > 0) == drafts


def test_broken_weights_are_the_same_error_when_costs_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "_tables", {})
    engine = Engine.from_pretrained(write_planted_checkpoint(tmp_path), kernels="reference")
    engine.runtime.model.target.model.norm.weight.fill_(float("nan"))
    for k in (3, "auto"):
        with pytest.raises(ModelError, match="logits are not finite"):
            engine.generate([[5]], SamplingParams(max_tokens=4, speculation=SpeculationParams(k)))

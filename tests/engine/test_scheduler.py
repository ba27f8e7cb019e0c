"""Scheduler, page pool and prefix cache against a brute-force simulation and what no schedule may change; mutants."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

import pytest

from specdec import CacheFullError
from specdec.cache import prefix as prefix_cache_module
from specdec.cache.pages import PagePool
from specdec.cache.prefix import PageKey, PrefixCache
from specdec.request.sequence import Sequence
from specdec.step.scheduler import ScheduledSequence, Scheduler
from support.scheduling import (
    Memory,
    Request,
    Setting,
    make_scheduler,
    make_sequence,
    random_requests,
    random_setting,
    simple_request,
)
from support.simulation import Simulation, State

NUM_SCHEDULES = 500


class Run:
    """One schedule in scheduler and simulation side by side, compared after every step."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.setting = random_setting(self.rng)
        self.requests = {r.name: r for r in random_requests(self.rng)}
        self.scheduler = make_scheduler(self.setting)
        self.simulation = Simulation(self.setting)
        self.memory = Memory(self.setting.page_size)
        self.sequences: dict[str, Sequence] = {}
        self.states: dict[str, State] = {}
        self.aborted: set[str] = set()
        self.decisions: dict[str, list[tuple[int, int]]] = {name: [] for name in self.requests}

    def finish(self) -> Counter[str]:
        """Runs everything to its end; -> how often what happened."""
        for step in range(3000):
            self.arrive(step)
            self.abort(step)
            self.check()
            if self.scheduler.idle and step > 40:
                break
            self.step()
        assert self.scheduler.idle, "requests are left"
        self.check_outcomes()
        stats = [s.stats for s in self.sequences.values()]
        return Counter(
            preemptions=sum(s.num_preemptions for s in stats),
            cached_tokens=sum(s.num_cached_tokens for s in stats),
            aborted=len(self.aborted),
            samples=sum("." in name for name in self.sequences),
            lower_k=self.setting.k_varies,
            refused=len(self.requests) - len(self.sequences),
        )

    def arrive(self, step: int) -> None:
        for request in self.requests.values():
            if request.arrives != step:
                continue
            leader = request.leader
            state = self.simulation.add(request, None if leader is None else self.states.get(leader))
            sequence = make_sequence(request, None if leader is None else self.sequences.get(leader))
            if state is None:
                with pytest.raises(CacheFullError, match="lower max_tokens or raise num_pages"):
                    self.scheduler.add(sequence)
            else:
                self.scheduler.add(sequence)
                self.sequences[request.name], self.states[request.name] = sequence, state

    def abort(self, step: int) -> None:
        for name, sequence in self.sequences.items():
            if self.requests[name].aborted == step and not sequence.finished:
                sequence.end("abort")
                self.scheduler.remove(sequence)
                self.states[name].finish = "abort"
                self.simulation.leave(self.states[name])
                self.aborted.add(name)

    def step(self) -> None:
        busy = not self.scheduler.idle
        scheduled = self.scheduler.schedule()
        shares = [(s.sequence.request_id, s.num_new_tokens, s.num_draft_tokens) for s in scheduled]
        assert shares == self.simulation.schedule()
        assert bool(scheduled) == busy, "requests wait, and nothing is scheduled"
        self.check()
        self.check_shares(scheduled)
        if self.setting.k_varies:  # as a controller of the draft length may
            scheduled = [replace(s, num_draft_tokens=self.rng.randint(0, s.num_draft_tokens)) for s in scheduled]
            shares = [(s.sequence.request_id, s.num_new_tokens, s.num_draft_tokens) for s in scheduled]
        for s in scheduled:
            if s.samples:
                self.decisions[s.sequence.request_id].append((s.sequence.num_output_tokens, s.num_draft_tokens))
        self.memory.run(scheduled, self.requests)
        self.scheduler.remove_finished()
        self.simulation.commit(shares)

    def check(self) -> None:
        """The same queues, pages and sharing on both sides, and nothing lost."""
        self.scheduler.check_integrity()
        for queue, expected in (
            (self.scheduler.waiting, self.simulation.waiting),
            (self.scheduler.running, self.simulation.running),
        ):
            assert [s.request_id for s in queue] == [s.request.name for s in expected]
        pairs = {
            (page, id(other))
            for sequence in self.scheduler.running
            for page, other in zip(sequence.page_table, self.states[sequence.request_id].pages, strict=True)
        }
        assert len(pairs) == len({page for page, _ in pairs}) == len({page for _, page in pairs})
        assert self.scheduler.pool.num_free == self.simulation.available()
        for name, sequence in self.sequences.items():
            state = self.states[name]
            assert (sequence.token_ids, sequence.num_computed_tokens) == (state.tokens, state.computed) or state.finish
            assert sequence.finish_reason == state.finish

    def check_shares(self, scheduled: list[ScheduledSequence]) -> None:
        assert len(self.scheduler.running) <= self.setting.max_num_seqs
        assert sum(s.num_new_tokens + s.num_draft_tokens for s in scheduled) <= self.setting.budget
        shares = {s.sequence.request_id for s in scheduled}
        for sequence in self.scheduler.running:
            assert sequence.num_uncomputed_tokens > 1 or sequence.request_id in shares, "a decoding request was stalled"
        for s in scheduled:
            end = s.sequence.num_computed_tokens + s.num_new_tokens + s.num_draft_tokens
            assert s.num_new_tokens >= 1
            assert end <= len(s.sequence.page_table) * self.setting.page_size
            assert not s.num_draft_tokens or s.samples
            if s.samples:
                assert len(s.sequence.token_ids) + s.num_draft_tokens + 1 <= s.sequence.max_total_tokens

    def check_outcomes(self) -> None:
        """What each request would have alone; where nothing varies K, iterations start where they would alone."""
        for name, sequence in self.sequences.items():
            request, state = self.requests[name], self.states[name]
            output = sequence.output_token_ids
            if name in self.aborted:
                assert sequence.finish_reason == "abort"
                assert output == request.output[: len(output)]
            else:
                assert sequence.finish_reason == request.finish_reason
                assert output == request.output
            assert sequence.stats.num_preemptions == state.num_preemptions
            assert sequence.stats.num_cached_tokens == (state.cached_at_first or 0)
            if not self.setting.k_varies:
                expected = list(alone(request))
                assert self.decisions[name] == expected[: len(self.decisions[name])]
                assert name in self.aborted or len(self.decisions[name]) == len(expected)


def alone(request: Request) -> Iterable[tuple[int, int]]:
    """Where the iterations of a request start, and with how many drafts, by the rule's definition."""
    start = 0
    while start < len(request.output):
        drafts = min(request.k, request.max_tokens - start - 1) if start else 0
        yield start, drafts
        start += len(request.emitted(start, drafts))


@pytest.mark.slow
def test_500_random_schedules_are_the_simulations_and_end_as_they_must() -> None:
    seen: Counter[str] = Counter()
    for seed in range(NUM_SCHEDULES):
        try:
            happened = Run(seed).finish()
        except AssertionError as error:
            raise AssertionError(f"schedule {seed}: {error}") from error
        seen += happened
        seen["with preemption"] += happened["preemptions"] > 0
    assert seen["with preemption"] > 50
    assert min(seen[what] for what in ("cached_tokens", "aborted", "samples", "refused", "lower_k")) > 100


def some_schedule_fails() -> bool:
    """Whether the test above would see a fault, in its first schedules already."""
    for seed in range(100):
        try:
            Run(seed).finish()
        except AssertionError:
            return True
    return False


@pytest.mark.slow
def test_no_schedule_fails_without_a_fault() -> None:
    assert not some_schedule_fails()


def test_mutant_key_without_the_next_token(monkeypatch: pytest.MonkeyPatch) -> None:
    class Key(PageKey):
        def __new__(cls, predecessor: int, token_ids: tuple[int, ...], next_token_id: int | None) -> Key:
            return super().__new__(cls, predecessor, token_ids, None if next_token_id is None else 0)

    monkeypatch.setattr(prefix_cache_module, "PageKey", Key)
    monkeypatch.setattr("specdec.cache.pages.PageKey", Key)
    assert some_schedule_fails()


def test_mutant_pages_without_mtp_rows_serve_requests_that_speculate(monkeypatch: pytest.MonkeyPatch) -> None:
    longest = PrefixCache.longest_prefix
    monkeypatch.setattr(
        PrefixCache, "longest_prefix", lambda self, *given, with_mtp: longest(self, *given, with_mtp=False)
    )
    assert some_schedule_fails()


def test_mutant_that_forgets_a_holder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PagePool, "hold", lambda self, pages: [self._cache.set_held(page) for page in pages])
    assert some_schedule_fails()


def test_mutant_that_counts_a_holder_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    hold = PagePool.hold
    monkeypatch.setattr(PagePool, "hold", lambda self, pages: (hold(self, pages), hold(self, pages[:1])))
    assert some_schedule_fails()


def test_mutant_that_evicts_a_page_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PrefixCache, "set_held", lambda self, page: None)
    assert some_schedule_fails()


def test_mutant_that_evicts_the_page_given_back_last(monkeypatch: pytest.MonkeyPatch) -> None:
    evict = PrefixCache.evict

    def latest(self: PrefixCache) -> int:
        self._idle = dict.fromkeys(reversed(self._idle))
        page = evict(self)
        self._idle = dict.fromkeys(reversed(self._idle))
        return page

    monkeypatch.setattr(PrefixCache, "evict", latest)
    assert some_schedule_fails()


def test_mutant_hit_that_leaves_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    prefix = PagePool.cached_prefix

    def whole(self: PagePool, token_ids: list[int], max_tokens: int, *, with_mtp: bool) -> list[int]:
        return prefix(self, [*token_ids, 0], len(token_ids), with_mtp=with_mtp)

    monkeypatch.setattr(PagePool, "cached_prefix", whole)
    assert some_schedule_fails()


def test_mutant_hit_that_leaves_a_preempted_request_no_hidden_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sequence, "num_prefill_tokens", property(lambda self: len(self.token_ids)))
    assert some_schedule_fails()


@pytest.mark.parametrize("kept", ["num_mtp_tokens", "pending_hidden"])
def test_mutant_preemption_that_keeps_the_mtp_layers_state(monkeypatch: pytest.MonkeyPatch, kept: str) -> None:
    admit, preempt = Sequence.admit, Sequence.preempt
    kept_values: dict[int, object] = {}

    def preempting(self: Sequence) -> list[int]:
        kept_values[id(self)] = getattr(self, kept)
        return preempt(self)

    def admitting(self: Sequence, *given: object) -> None:
        admit(self, *given)
        if self.stats.num_preemptions and self.speculates:
            setattr(self, kept, kept_values[id(self)])

    monkeypatch.setattr(Sequence, "preempt", preempting)
    monkeypatch.setattr(Sequence, "admit", admitting)
    assert some_schedule_fails()


def test_mutant_preempted_request_whose_mtp_rows_are_never_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """It drafts from a cache with holes: fewer drafts are accepted, and no output shows it."""
    admit = Sequence.admit

    def skipping(self: Sequence, *given: object) -> None:
        admit(self, *given)
        if self.stats.num_preemptions and self.speculates:
            self.num_mtp_tokens = self.num_computed_tokens + 1

    monkeypatch.setattr(Sequence, "admit", skipping)
    assert some_schedule_fails()


def test_mutant_that_drafts_less_for_lack_of_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    num_draft_tokens = Scheduler._num_draft_tokens

    def fitting(self: Scheduler, sequence: Sequence, num_tokens: int) -> int:
        room = (len(sequence.page_table) + self.pool.num_free) * self.pool.page_size - len(sequence.token_ids)
        return min(num_draft_tokens(sequence, num_tokens), room)

    monkeypatch.setattr(Scheduler, "_num_draft_tokens", fitting)
    assert some_schedule_fails()


def test_mutant_that_preempts_the_first_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    preempt = Scheduler._preempt_last

    def first(self: Scheduler) -> Sequence:
        self.running.append(self.running.pop(0))
        return preempt(self)

    monkeypatch.setattr(Scheduler, "_preempt_last", first)
    assert some_schedule_fails()


def run_to_end(setting: Setting, requests: list[Request]) -> tuple[list[str], dict[str, Sequence]]:
    """-> names in the order of their ends, and the sequences."""
    scheduler, memory = make_scheduler(setting), Memory(setting.page_size)
    sequences = {r.name: make_sequence(r) for r in requests}
    for sequence in sequences.values():
        scheduler.add(sequence)
    ends: list[str] = []
    while not scheduler.idle:
        memory.run(scheduler.schedule(), {r.name: r for r in requests})
        scheduler.remove_finished()
        scheduler.check_integrity()
        ends += [name for name, s in sequences.items() if s.finished and name not in ends]
    return ends, sequences


ONE_AT_A_TIME = Setting(4, 8, 1, 64, True, False)


def test_lower_priority_numbers_come_first_and_equal_ones_in_order_of_arrival() -> None:
    requests = [simple_request(str(i), 5, priority=p) for i, p in enumerate([1, 0, 2, 0, -5, 1])]
    assert run_to_end(ONE_AT_A_TIME, requests)[0] == ["4", "1", "3", "0", "5", "2"]


def test_the_last_arrived_of_the_lowest_priority_is_preempted_first() -> None:
    """Three requests that fit at first and outgrow the pool together."""
    setting = Setting(4, 14, 3, 64, False, False)
    for priorities, expected in (((0, 0, 0), "2"), ((0, 1, 0), "1"), ((3, 0, 1), "0")):
        requests = [simple_request(str(i), 12, max_tokens=16, priority=p) for i, p in enumerate(priorities)]
        ends, sequences = run_to_end(setting, requests)
        preempted = [name for name, s in sequences.items() if s.stats.num_preemptions]
        assert preempted == [expected]
        assert ends[-1] == expected
        assert all(len(s.output_token_ids) == 16 for s in sequences.values())


def test_admission_asks_for_the_prompts_pages_not_for_the_longest_output() -> None:
    scheduler = make_scheduler(Setting(4, 10, 4, 64, True, False))
    for i in range(3):
        scheduler.add(make_sequence(simple_request(str(i), 7, max_tokens=30)))
    assert len(scheduler.schedule()) == 3
    assert [len(s.page_table) for s in scheduler.running] == [2, 2, 2]


def test_a_long_prompt_stalls_nobody() -> None:
    setting = Setting(16, 64, 4, 40, True, False)
    scheduler, memory = make_scheduler(setting), Memory(16)
    requests = {
        r.name: r for r in [simple_request("1", 3, 30, k=3), simple_request("2", 4, 30), simple_request("3", 400, 2)]
    }
    short, long = [make_sequence(requests[name]) for name in "12"], make_sequence(requests["3"])
    for sequence in short:
        scheduler.add(sequence)
    memory.run(scheduler.schedule(), requests)
    scheduler.add(long)
    while long.num_output_tokens == 0:
        before = [s.num_output_tokens for s in short]
        memory.run(scheduler.schedule(), requests)
        assert all(s.finished or s.num_output_tokens > b for s, b in zip(short, before)), "a request was stalled"
        scheduler.remove_finished()
    assert long.num_computed_tokens == 400

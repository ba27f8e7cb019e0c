"""Random schedules, what must become of them, and a brute-force simulation of scheduler and page pool.

The simulation follows the rules of docs/architecture.md with nothing but lists: pages are objects, who holds one is
found by looking through all requests, and a cached page is found by all tokens before it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from specdec import SamplingParams, SpeculationParams
from specdec.commit import commit
from specdec.kernels.interface import HiddenRows
from specdec.kv_cache import PagePool
from specdec.scheduler import ScheduledSequence, Scheduler
from specdec.sequence import Sequence
from specdec.verify import TargetResult

END = 9  # a token that ends a request
HIDDEN = torch.zeros(1, 1)


@dataclass(frozen=True)
class Request:
    """outcome: the output and what would follow it. agrees: whether the draft of that token is right."""

    name: str
    prompt: list[int]
    max_tokens: int
    k: int
    priority: int
    arrives: int
    aborted: int | None
    outcome: list[int]
    agrees: list[bool]
    leader: str | None = None

    @property
    def output(self) -> list[int]:
        tokens = self.outcome[: self.max_tokens]
        return tokens[: tokens.index(END) + 1] if END in tokens else tokens

    @property
    def finish_reason(self) -> str:
        return "stop" if self.output[-1] == END else "length"

    def emitted(self, start: int, num_drafts: int) -> list[int]:
        """The tokens of one verification, which knows nothing of the request's end."""
        accepted = 0
        while accepted < num_drafts and self.agrees[start + accepted]:
            accepted += 1
        return self.outcome[start : start + accepted + 1]


@dataclass(frozen=True)
class Setting:
    page_size: int
    num_pages: int
    max_num_seqs: int
    budget: int
    prefix_caching: bool
    k_varies: bool


def random_setting(rng: random.Random) -> Setting:
    page_size, max_num_seqs = rng.choice([1, 2, 4, 16]), rng.randint(1, 6)
    return Setting(
        page_size,
        num_pages=-(-rng.randint(24, 100) // page_size),
        max_num_seqs=max_num_seqs,
        budget=max_num_seqs * 9 + rng.choice([0, 1, 40]),
        prefix_caching=rng.random() < 0.8,
        k_varies=rng.random() < 0.4,
    )


def random_requests(rng: random.Random) -> list[Request]:
    """Arrivals over a few steps, prompts that begin alike, some of them in several samples."""
    stem = [rng.randrange(3) for _ in range(40)]
    requests: list[Request] = []
    for i in range(rng.randint(2, 8)):
        shared = rng.choice([0, 4, 16, 17, 32, 33])
        prompt = stem[:shared] + [rng.randrange(3) for _ in range(rng.randint(shared == 0, 12))]
        first = Request(
            name=str(i),
            prompt=prompt,
            max_tokens=rng.choice([1, 2, 8, 20]),
            k=rng.choice([0, 0, 1, 3, 8]),
            priority=rng.choice([0, 0, 0, -1, 2]),
            arrives=rng.choice([0, 0, 1, 3, 10, 30]),
            aborted=None,
            outcome=[],
            agrees=[],
        )
        for sample in range(rng.choice([1, 1, 1, 2, 4])):
            aborted = first.arrives + rng.randint(0, 12) if rng.random() < 0.15 else None
            outcome = [END if rng.random() < 0.04 else rng.randrange(3) for _ in range(40)]
            agrees = [rng.random() < 0.6 for _ in range(40)]
            name, leader = (f"{i}.{sample}", str(i)) if sample else (str(i), None)
            requests.append(replace(first, name=name, leader=leader, aborted=aborted, outcome=outcome, agrees=agrees))
    return requests


class NoText:
    def push(self, token_id: int) -> bool:
        return False

    def flush(self) -> bool:
        return False


def make_sequence(request: Request, leader: Sequence | None = None) -> Sequence:
    output: Any = NoText()
    return Sequence(
        request_id=request.name,
        prompt_token_ids=request.prompt,
        params=SamplingParams(max_tokens=request.max_tokens),
        speculation=SpeculationParams(request.k),
        seed=0,
        max_total_tokens=len(request.prompt) + request.max_tokens,
        end_token_ids=frozenset({END}),
        output=output,
        priority=request.priority,
        leader=leader,
    )


class Memory:
    """What every row of both caches holds: the tokens that it is a function of."""

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.target: dict[int, tuple[int, ...]] = {}
        self.mtp: dict[int, tuple[int, ...]] = {}

    def slot(self, sequence: Sequence, position: int) -> int:
        return sequence.page_table[position // self.page_size] * self.page_size + position % self.page_size

    def check(self, sequence: Sequence) -> None:
        """Raises AssertionError where a row that the sequence counts on holds something else."""
        tokens = tuple(sequence.token_ids)
        for at in range(sequence.num_computed_tokens):
            assert self.target.get(self.slot(sequence, at)) == tokens[: at + 1], f"row {at} is another's"
        for at in range(sequence.num_mtp_tokens):
            assert self.mtp.get(self.slot(sequence, at)) == tokens[: at + 2], f"MTP row {at} is another's"

    def run(self, scheduled: list[ScheduledSequence], requests: dict[str, Request]) -> None:
        """What draft and verify write, then the real commit."""
        for s in scheduled:
            self.check(s.sequence)
        output = []
        for s in scheduled:
            sequence, request = s.sequence, requests[s.sequence.request_id]
            emitted = request.emitted(sequence.num_output_tokens, s.num_draft_tokens) if s.samples else []
            drafts = emitted[:-1] + [-1] * (s.num_draft_tokens - len(emitted) + 1) if emitted else []
            self._write(s, sequence.token_ids + drafts)
            output.append(emitted)
        rows = [HiddenRows(HIDDEN, 0, s.num_new_tokens + s.num_draft_tokens) for s in scheduled]
        commit(scheduled, TargetResult(output, [[] for _ in scheduled], rows))

    def _write(self, s: ScheduledSequence, tokens: list[int]) -> None:
        sequence, computed = s.sequence, s.sequence.num_computed_tokens
        if sequence.pending_hidden is not None:
            pending = range(sequence.num_mtp_tokens, computed)
            for at in pending:
                self.mtp[self.slot(sequence, at)] = tuple(tokens[: at + 2])
            assert not s.num_draft_tokens or len(pending), "a draft without a hidden state"
            for at in range(computed, computed + s.num_draft_tokens - 1):
                self.mtp[self.slot(sequence, at)] = (-1,)
        for at in range(computed, computed + s.num_new_tokens + s.num_draft_tokens):
            self.target[self.slot(sequence, at)] = tuple(tokens[: at + 1])


# --- the simulation ---


@dataclass(eq=False)
class Page:
    path: tuple[Any, ...] | None = None  # once cached: tokens of all pages up to this one, each with what follows it
    idle_since: int = 0


@dataclass(eq=False)
class State:
    request: Request
    arrival: int
    leader: State | None
    tokens: list[int]
    computed: int = 0
    mtp: int = 0
    pages: list[Page] = field(default_factory=list)
    published: int = 0
    finish: str | None = None
    cached_at_first: int | None = None
    num_preemptions: int = 0
    num_decisions: int = 0

    @property
    def order(self) -> tuple[int, int]:
        return self.request.priority, self.arrival

    @property
    def limit(self) -> int:
        return len(self.request.prompt) + self.request.max_tokens

    @property
    def speculates(self) -> bool:
        return self.request.k > 0 and self.request.max_tokens > 1

    @property
    def num_output(self) -> int:
        return len(self.tokens) - len(self.request.prompt)


class Simulation:
    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.waiting: list[State] = []
        self.running: list[State] = []
        self.cached: list[Page] = []
        self.refused: tuple[State, int] | None = None
        self.clock = 0
        self.num_arrivals = 0

    def pages_for(self, rows: int) -> int:
        return (rows + self.setting.page_size - 1) // self.setting.page_size

    def add(self, request: Request, leader: State | None) -> State | None:
        if self.pages_for(len(request.prompt) + request.max_tokens) > self.setting.num_pages:
            return None
        state = State(request, self.num_arrivals, leader, list(request.prompt))
        self.num_arrivals += 1
        self.waiting = sorted([*self.waiting, state], key=lambda s: s.order)
        return state

    def held(self) -> list[Page]:
        return list({id(p): p for s in self.running for p in s.pages}.values())

    def idle(self) -> list[Page]:
        held = self.held()
        return sorted((p for p in self.cached if p not in held), key=lambda p: p.idle_since)

    def available(self) -> int:
        return self.setting.num_pages - len(self.held())

    def give(self, state: State, count: int) -> None:
        for _ in range(count):
            if len(self.held()) + len(self.idle()) == self.setting.num_pages:
                self.cached.remove(self.idle()[0])
            state.pages.append(Page())

    def let_go(self, state: State) -> None:
        for page in reversed(state.pages):
            self.clock += 1
            if not any(page in other.pages for other in self.running if other is not state):
                page.idle_since = self.clock
        state.pages, state.published = [], 0

    def lookup(self, path: tuple[Any, ...], state: State, end: int) -> Page | None:
        part, after = tuple(state.tokens[end - self.setting.page_size : end]), state.tokens[end]
        for key in [(part, after)] if state.speculates else [(part, None), (part, after)]:
            for page in self.cached:
                if page.path == (*path, key):
                    return page
        return None

    def publish(self, state: State) -> None:
        size = self.setting.page_size
        rows = state.mtp if state.speculates else min(state.computed, len(state.tokens) - 1)
        while state.published < rows // size:
            at = state.published
            path = state.pages[at - 1].path if at else ()
            if self.setting.prefix_caching:
                assert path is not None
                page = self.lookup(path, state, (at + 1) * size)
                if page is None:
                    tokens = tuple(state.tokens[at * size : (at + 1) * size])
                    state.pages[at].path = (
                        *path,
                        (tokens, state.tokens[(at + 1) * size] if state.speculates else None),
                    )
                    self.cached.append(state.pages[at])
                else:
                    state.pages[at] = page
            state.published += 1

    def schedule(self) -> list[tuple[str, int, int]]:
        for state in self.running:
            self.publish(state)
        shares: list[tuple[str, int, int]] = []
        for state in list(self.running):
            if state not in self.running or len(state.tokens) - state.computed != 1:
                continue
            drafts = min(state.request.k, state.limit - len(state.tokens) - 1) if state.num_output else 0
            wanted = self.pages_for(state.computed + 1 + drafts)
            while state in self.running and wanted - len(state.pages) > self.available():
                self.preempt(self.running[-1])
            if state in self.running:
                self.give(state, max(0, wanted - len(state.pages)))
                shares.append((state.request.name, 1, drafts))
        budget = self.setting.budget - sum(new + drafts for _, new, drafts in shares)
        for state in self.prefilling():
            if budget <= 0:
                break
            wait = state.speculates and state.num_output > 0
            share = min(budget, len(state.tokens) - state.computed - wait)
            shares.append((state.request.name, share, 0))
            budget -= share
            if budget <= 0:
                break
        return shares

    def prefilling(self) -> Iterator[State]:
        yield from [s for s in self.running if len(s.tokens) - s.computed > 1]
        while (state := self.admit()) is not None:
            yield state

    def preempt(self, state: State) -> None:
        self.let_go(state)
        self.running.remove(state)
        state.computed = state.mtp = 0
        state.num_preemptions += 1
        self.waiting = sorted([*self.waiting, state], key=lambda s: s.order)

    def shares_soon(self, state: State) -> bool:
        leader = state.leader
        if leader is None or leader.finish or not self.setting.prefix_caching or leader.num_decisions > 1:
            return False
        return leader.published < len(leader.request.prompt) // self.setting.page_size

    def admit(self) -> State | None:
        ready = [s for s in self.waiting if not self.shares_soon(s)]
        if len(self.running) == self.setting.max_num_seqs or not ready:
            return None
        state, size = ready[0], self.setting.page_size
        if self.refused is not None and self.refused[0] is state and self.available() <= self.refused[1]:
            return None
        most = len(state.tokens) - (2 if state.speculates and state.num_output else 1)
        found: list[Page] = []
        while (len(found) + 1) * size <= most:
            path = found[-1].path if found else ()
            assert path is not None
            page = self.lookup(path, state, (len(found) + 1) * size)
            if page is None:
                break
            found.append(page)
        missing = self.pages_for(min(len(state.tokens) + 1 + state.request.k, state.limit)) - len(found)
        held = self.held()
        if missing > self.available() - sum(page not in held for page in found):
            for page in reversed(found):
                self.clock += 1
                if page not in held:
                    page.idle_since = self.clock
            self.refused = state, self.available()
            return None
        self.refused = None
        self.waiting.remove(state)
        self.running = sorted([*self.running, state], key=lambda s: s.order)
        state.pages = list(found)
        self.give(state, missing)
        state.published, state.computed = len(found), len(found) * size
        state.mtp = state.computed if state.speculates else 0
        if state.cached_at_first is None:
            state.cached_at_first = state.computed
        return state

    def commit(self, shares: list[tuple[str, int, int]]) -> None:
        states = {s.request.name: s for s in self.running}
        for name, new, drafts in shares:
            state = states[name]
            samples = new == len(state.tokens) - state.computed
            emitted = state.request.emitted(state.num_output, drafts) if samples else []
            state.num_decisions += samples
            if state.speculates:
                state.mtp = state.computed
            state.computed += new + max(0, len(emitted) - 1)
            for token in emitted:
                state.tokens.append(token)
                if token == END or len(state.tokens) == state.limit:
                    state.finish = "stop" if token == END else "length"
                    break
        for state in [s for s in self.running if s.finish]:
            self.publish(state)
            self.leave(state)

    def leave(self, state: State) -> None:
        if state in self.running:
            self.let_go(state)
            self.running.remove(state)
        elif state in self.waiting:
            self.waiting.remove(state)


def make_scheduler(setting: Setting) -> Scheduler:
    pool = PagePool(setting.num_pages, setting.page_size, prefix_caching=setting.prefix_caching)
    return Scheduler(pool, setting.max_num_seqs, setting.budget)

"""A brute-force simulation of scheduler and page pool.

It follows the rules of docs/architecture.md with nothing but lists: pages are objects, who holds one is found by
looking through all requests, and a cached page is found by all tokens before it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from support.scheduling import END, Request, Setting


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

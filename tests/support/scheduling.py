"""Random schedules, what must become of them, and a memory that knows what every row was computed from."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

import torch

from specdec import SamplingParams, SpeculationParams
from specdec.cache.pages import PagePool
from specdec.kernels.data import HiddenRows
from specdec.request.sequence import Sequence
from specdec.step.commit import commit
from specdec.step.scheduler import ScheduledSequence, Scheduler
from specdec.step.verify import TargetResult

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
        pending = sum(rows.num_rows for rows in sequence.pending_hidden)
        assert pending == sequence.num_pending_pairs, "hidden states of other tokens wait for the MTP layer"
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
        nothing: list[list[Any]] = [[] for _ in scheduled]
        commit(scheduled, TargetResult(output, nothing, rows, nothing))

    def _write(self, s: ScheduledSequence, tokens: list[int]) -> None:
        sequence, computed = s.sequence, s.sequence.num_computed_tokens
        if s.extends_mtp:
            pending = range(sequence.num_mtp_tokens, computed)
            for at in pending:
                self.mtp[self.slot(sequence, at)] = tuple(tokens[: at + 2])
            assert not s.num_draft_tokens or len(pending), "a draft without a hidden state"
            for at in range(computed, computed + s.num_draft_tokens - 1):
                self.mtp[self.slot(sequence, at)] = (-1,)
        for at in range(computed, computed + s.num_new_tokens + s.num_draft_tokens):
            self.target[self.slot(sequence, at)] = tuple(tokens[: at + 1])


def make_scheduler(setting: Setting) -> Scheduler:
    pool = PagePool(setting.num_pages, setting.page_size, prefix_caching=setting.prefix_caching)
    return Scheduler(pool, setting.max_num_seqs, setting.budget)


def simple_request(name: str, num_prompt: int, max_tokens: int = 8, priority: int = 0, k: int = 0) -> Request:
    """Its drafts are all wrong, its prompt is its name's number again and again."""
    outcome, agrees = [1] * 60, [False] * 60
    return Request(name, [int(name)] * num_prompt, max_tokens, k, priority, 0, None, outcome, agrees)

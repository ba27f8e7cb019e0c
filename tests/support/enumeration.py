"""Exact output laws of the engine, by running it down every path that its random numbers could take.

`TableKernels` are the reference kernels in fp64 with two things replaced: the network, by tables of logits that depend
on the whole context, and the sources of randomness, by `Paths`. Scheduler, drafter, verifier, rules and commit are the
engine's own. A uniform is a `Ticket`, and comparing it with a threshold is a decision that a path records; so is every
draw from a law. Each run follows one path to its end; the alternatives at each decision become further paths.

That decisions multiply assumes that no two of them share a random number: `Paths` checks that as well.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specdec import Drafter, Engine, SamplingParams
from specdec.kernels.data import DecoderOutput, HiddenRows
from specdec.kernels.decisions import Residuals, RowSampling
from specdec.kernels.reference import ReferenceKernels, residual_law
from specdec.kernels.rules import Proposal, verify_by_rejection
from specdec.request.seeds import Stream
from support.fakes import tiny_config, write_checkpoint

Context = tuple[int, ...]
Law = dict[Context, float]
Key = tuple[int, int, int]  # stream, position, start


class RandomModel:
    """Next-token logits that depend on the whole context, some of them -inf."""

    def __init__(self, vocab_size: int, seed: int, sharpness: float = 1.5, zeros: float = 0.2) -> None:
        self.vocab_size, self.seed, self.sharpness, self.zeros = vocab_size, seed, sharpness, zeros
        self._logits: dict[Context, Tensor] = {}

    def logits(self, context: Context) -> Tensor:
        if context not in self._logits:
            generator = torch.Generator().manual_seed(hash((self.seed, context)) % 2**31)
            logits = torch.randn(self.vocab_size, generator=generator, dtype=torch.float64) * self.sharpness
            dropped = torch.rand(self.vocab_size, generator=generator) < self.zeros
            dropped[torch.randint(self.vocab_size, (1,), generator=generator)] = False
            self._logits[context] = logits.masked_fill(dropped, float("-inf"))
        return self._logits[context]


class NoiseUsedTwice(AssertionError):
    """Two decisions of one request hang on the same random number."""


@dataclass
class RandomPath:
    """The outcomes of a request's decisions: `forced` at first, then any possible one."""

    forced: list[int]
    keys: set[Key] = field(default_factory=set)
    outcomes: list[int] = field(default_factory=list)
    laws: list[list[float]] = field(default_factory=list)

    def decide(self, key: Key, law: list[float]) -> int:
        if key in self.keys:
            raise NoiseUsedTwice(f"{Stream(key[0]).name} noise of position {key[1]}, iteration {key[2]}")
        self.keys.add(key)
        at = len(self.outcomes)
        outcome = self.forced[at] if at < len(self.forced) else next(i for i, p in enumerate(law) if p > 0)
        self.outcomes.append(outcome)
        self.laws.append(law)
        return outcome

    @property
    def probability(self) -> float:
        probability = 1.0
        for outcome, law in zip(self.outcomes, self.laws):
            probability *= law[outcome]
        return probability

    def alternatives(self) -> Iterable[RandomPath]:
        for at in range(len(self.forced), len(self.outcomes)):
            for other, p in enumerate(self.laws[at]):
                if p > 0 and other != self.outcomes[at]:
                    yield RandomPath([*self.outcomes[:at], other])


class Ticket(float):
    """A uniform whose value is decided when it is compared."""

    path: RandomPath
    key: Key

    @classmethod
    def of(cls, path: RandomPath, key: Key) -> Ticket:
        ticket = cls(float("nan"))
        ticket.path, ticket.key = path, key
        return ticket

    def __lt__(self, threshold: float) -> bool:
        return self.path.decide(self.key, [1 - threshold, threshold]) == 1


class TableKernels(ReferenceKernels):
    """Hidden states are numbers of contexts; a request's seed is the number of its path."""

    def __init__(self, target: RandomModel, draft: RandomModel, hidden_size: int = 2) -> None:
        super().__init__(torch.device("cpu"), torch.float64)
        self.tables, self.hidden_size = (target, draft), hidden_size
        self.contexts: list[Context] = []
        self.paths: list[RandomPath] = []

    def decode(
        self,
        decoder: Any,
        input_ids: list[int],
        previous: list[HiddenRows] | None,
        metadata: Any,
        kv_cache: Tensor,
        expert_ids: Tensor | None = None,
    ) -> DecoderOutput:
        """The target reads a row's context from the cache, the MTP layer has it from the state before."""
        if previous is None:
            slots = kv_cache[0, :, 0, :, 0, 0]  # [pages, page_size], a view
            page_size = slots.shape[1]
            for slot, token in zip(metadata.slots, input_ids):
                slots[slot // page_size, slot % page_size] = token
            contexts = []
            for count, kv_len, table in zip(metadata.query_lens, metadata.kv_lens, metadata.page_tables):
                tokens = tuple(int(t) for page in table for t in slots[page].tolist())
                contexts += [tokens[: kv_len - count + i + 1] for i in range(count)]
            table = 0
        else:
            numbers = torch.cat([rows.tensor() for rows in previous])[:, 0].long().tolist()
            before = [self.contexts[i] for i in numbers]
            contexts = [(*context, token) for context, token in zip(before, input_ids)]
            table = 1
        hidden = torch.zeros(len(contexts), self.hidden_size, dtype=torch.float64)
        for row, context in zip(hidden, contexts):
            row[0], row[1] = len(self.contexts), table
            self.contexts.append(context)
        return DecoderOutput(hidden, hidden)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        rows = x[:, :2].long().tolist()
        return torch.stack([self.tables[table].logits(self.contexts[number]) for number, table in rows])

    def head_argmax(self, x: Tensor, head: Tensor) -> Tensor:
        return self.linear(x, head).argmax(-1)

    def choose(self, logits: Tensor, sampling: RowSampling) -> Tensor:
        ids = super().choose(logits, sampling)
        for r, stream in enumerate(sampling.streams):
            if stream == Stream.DRAFT:
                key = (stream, sampling.positions[r], sampling.starts[r])
                law = (logits[r] * sampling.scales[r]).softmax(-1).tolist()
                ids[r] = self.paths[sampling.seeds[r]].decide(key, law)
        return ids

    def uniforms(self, seeds: list[int], stream: int, positions: list[int], starts: list[int]) -> list[float]:
        return [Ticket.of(self.paths[s], (stream, p, i)) for s, p, i in zip(seeds, positions, starts)]

    def sample_residual(self, laws: Residuals, uniforms: list[float]) -> list[int]:
        tokens = []
        for i, ticket in enumerate(uniforms):
            assert isinstance(ticket, Ticket)
            law = residual_law(laws, i)
            tokens.append(ticket.path.decide(ticket.key, (law / law.sum()).tolist()))
        return tokens


class Enumerator:
    """An engine whose requests' laws can be enumerated; `folder` is for its checkpoint. drafter: of one's own, in place
    of the MTP layer, whose place `draft` takes otherwise."""

    def __init__(self, folder: Path, target: RandomModel, draft: RandomModel, drafter: Drafter | None = None) -> None:
        config = tiny_config(vocab_size=target.vocab_size, num_hidden_layers=1)
        self.engine = Engine.from_pretrained(
            write_checkpoint(folder, config), kernels="reference", dtype="float64", max_num_seqs=256, max_model_len=32,
            page_size=4, drafter=drafter,
        )  # fmt: skip
        self.kernels = TableKernels(target, draft, config["hidden_size"])
        model = self.engine.runtime.model
        assert (model.mtp is None) == (drafter is not None)
        for part in (model.target, model.target.decoder, *([] if model.mtp is None else [model.mtp.decoder])):
            part.kernels = self.kernels

    def law(self, prompt: list[int], params: SamplingParams) -> Law:
        """The exact law of a request's output."""
        law: Law = defaultdict(float)
        pending = [RandomPath([])]
        while pending:
            paths, pending = pending[:2048], pending[2048:]
            self.kernels.paths = paths
            self.kernels.contexts.clear()
            seeds = range(len(paths))
            outputs = self.engine.generate([prompt] * len(paths), [replace(params, seed=seed) for seed in seeds])
            for path, output in zip(paths, outputs):
                law[tuple(output.token_ids)] += path.probability
                pending += path.alternatives()
        return law


def rejection_law(
    target: RandomModel, draft: RandomModel, context: Context, k: int, *, block: bool, greedy_drafts: bool
) -> tuple[Law, float]:
    """One iteration of a rejection rule after `context`, over all drafts and outcomes -> the law of what it emits, and
    the expected number of accepted drafts."""
    law: Law = defaultdict(float)
    expected = 0.0
    kernels = TableKernels(target, draft)
    starts = [(drafts, q) for drafts, q in _all_drafts(draft, context, k, greedy_drafts) if q > 0]
    pending = [(drafts, q, RandomPath([])) for drafts, q in starts]
    while pending:
        kernels.paths = [path for _, _, path in pending]
        contexts = [(*context, *drafts[:i]) for drafts, _, _ in pending for i in range(k + 1)]
        p = torch.stack([target.logits(c).softmax(-1) for c in contexts])
        q = torch.stack([draft.logits(c).softmax(-1) for c in contexts]).view(len(pending), k + 1, -1)[:, :k]
        proposals = [
            Proposal(list(drafts), n * (k + 1), -1 if greedy_drafts else n, block, seed=n, start=len(context))
            for n, (drafts, _, _) in enumerate(pending)
        ]
        emitted = verify_by_rejection(kernels, p, None if greedy_drafts else q.contiguous(), proposals)
        following = []
        for (drafts, q_drafts, path), tokens in zip(pending, emitted):
            law[tuple(tokens)] += q_drafts * path.probability
            expected += q_drafts * path.probability * (len(tokens) - 1)
            following += [(drafts, q_drafts, other) for other in path.alternatives()]
        pending = following
    return law, expected


def _all_drafts(draft: RandomModel, context: Context, k: int, greedy: bool) -> Iterable[tuple[Context, float]]:
    if not greedy:
        return target_law(lambda c: draft.logits(c).softmax(-1), context, k).items()
    drafts: Context = ()
    for _ in range(k):
        drafts = (*drafts, int(draft.logits((*context, *drafts)).argmax()))
    return [(drafts, 1.0)]


def completed(law: Law, target: Callable[[Context], Tensor], context: Context, length: int) -> Law:
    """Every outcome extended to `length` tokens by the target's own law."""
    total: Law = defaultdict(float)
    for tokens, probability in law.items():
        for rest, p in target_law(target, (*context, *tokens), length - len(tokens)).items():
            total[tokens + rest] += probability * p
    return total


def target_law(law: Callable[[Context], Tensor], prompt: Iterable[int], length: int) -> Law:
    """The law of `length` tokens that follow one another by law(context) [V]."""
    total: Law = {(): 1.0}
    context = tuple(prompt)
    for _ in range(length):
        longer: Law = {}
        for tokens, probability in total.items():
            for token, p in enumerate(law(context + tokens).tolist()):
                if p > 0:
                    longer[(*tokens, token)] = probability * p
        total = longer
    return total


def distance(a: Law, b: Law) -> float:
    """The largest difference of two laws at any outcome."""
    return max(abs(a.get(tokens, 0.0) - b.get(tokens, 0.0)) for tokens in {*a, *b})

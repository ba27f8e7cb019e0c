"""A step's decisions on the device: those of the composed path, token for token, without a wait."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from specdec.kernels import speculation
from specdec.kernels.data import AttentionMetadata, DecoderOutput
from specdec.kernels.decisions import BLOCK_VERIFICATION, EXACT_MATCH, GREEDY, TOKEN_REJECTION, Drafts, VerifyBatch
from specdec.kernels.reference import ReferenceKernels
from specdec.kernels.triton import Batch, Decider, edit_words
from support.fakes import randn
from support.sampled_rows import random_edits, sampling

pytestmark = [
    pytest.mark.usefixtures("poisoned_empty"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # of numpy, for what no lane goes on to use
]

INF, NAN = float("inf"), float("nan")
SIZE, NUM_DRAFTS = 5, 3


class GivenLogits(ReferenceKernels):
    """The target's logits are given: hidden states are logits."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__(torch.device("cpu"), torch.float32)
        self.logits = logits

    def decode(self, *args: Any, **kwargs: Any) -> DecoderOutput:
        return DecoderOutput(self.logits, self.logits)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return x


def composed_tokens(logits: Tensor, v: VerifyBatch) -> list[list[int]]:
    nothing: Any = None
    return speculation.verify(
        GivenLogits(logits), nothing, nothing, [], AttentionMetadata([], [], [], 16), nothing, v
    ).token_ids


def random_step(vocab_size: int, num: int, seed: int) -> tuple[Tensor, VerifyBatch]:
    """Drafts of all lengths that are likely to be right, every rule, laws and point masses, edits, cuts, and here and
    there a row that is not sound. The rows lie with gaps between the sequences."""
    rng = random.Random(seed)
    drafts = [[rng.randrange(vocab_size) for _ in range(rng.randint(0, NUM_DRAFTS))] for _ in range(num)]
    rules = [[EXACT_MATCH, TOKEN_REJECTION, BLOCK_VERIFICATION][(b + seed) % 3] for b in range(num)]
    law = sampling(
        num,
        scales=[rng.choice([1.0, 0.7, 2.5]) for _ in range(num)],
        top_k=[rng.choice([0, 0, 3, 20]) for _ in range(num)],
        top_p=[rng.choice([1.0, 0.9001, 0.80013]) for _ in range(num)],
        min_p=[rng.choice([0.0, 0.0, 0.05]) for _ in range(num)],
        seeds=[rng.randrange(2**64) for _ in range(num)],
        streams=[rng.choice([GREEDY, 0]) if rule == EXACT_MATCH else 0 for rule in rules],
        positions=[rng.randrange(2**31) for _ in range(num)],
    )
    firsts = [b * (NUM_DRAFTS + 2) for b in range(num)]
    logits = 2 * randn(num * (NUM_DRAFTS + 2), vocab_size, seed=seed)
    q = 2 * randn(num, NUM_DRAFTS, vocab_size, seed=seed + 1)
    for b, row in enumerate(drafts):
        for i, draft in enumerate(row):
            logits[firsts[b] + i, draft] += rng.choice([0, 5, 7, 9])
            q[b, i, draft] += 6
    q = q.softmax(-1)
    if seed % 2:
        bad = firsts[rng.randrange(num)]
        logits[bad, rng.randrange(vocab_size)] = rng.choice([NAN, INF])
    verification = VerifyBatch(
        first_rows=firsts,
        drafts=Drafts(drafts, [rng.choice([-1, b]) if rule != EXACT_MATCH else -1 for b, rule in enumerate(rules)], q),
        rules=rules,
        rows=law,
        edits=[random_edits(vocab_size, rng.randrange(1000)) if rng.random() < 0.5 else None for _ in range(num)],
    )
    return logits, verification


def packed_rows(logits: Tensor, v: VerifyBatch) -> tuple[Tensor, list[int]]:
    """The rows that decide, in another order than the sequences'; and where each sequence's begin."""
    order = list(reversed(range(len(v.rules))))
    rows, firsts = [], [0] * len(order)
    for b in order:
        firsts[b] = len(rows)
        rows += [v.first_rows[b] + i for i in range(v.drafts.counts[b] + 1)]
    return logits[rows], firsts


def decided(decider: Decider, logits: Tensor, v: VerifyBatch) -> list[list[int]]:
    rows, firsts = packed_rows(logits, v)
    device = decider.batch.device
    decider.batch.pack_verification(v, firsts)
    probs = v.drafts.probs
    result = decider.decide(rows.to(device), decider.batch.drafts, None if probs is None else probs.to(device))
    num = len(v.rules)
    assert (result.token_ids[num:] == -1).all()
    assert (result.num_accepted[num:] == 0).all()
    for n, row in zip(result.num_accepted.tolist(), result.token_ids.tolist()):
        assert row[n + 1 :] == [-1] * (NUM_DRAFTS - n)
    return result.tolist()[:num]


@pytest.mark.slow
def test_decisions_are_the_composed_ones(device: torch.device) -> None:
    """One set of buffers for all steps, so that nothing may stay behind in them."""
    decider = Decider(Batch(SIZE, NUM_DRAFTS, device, edit_words=2000), 40)
    lengths, unsound = set(), 0
    for seed in range(7):
        logits, v = random_step(40, SIZE - seed % 3, seed)
        expected = composed_tokens(logits, v)
        assert decided(decider, logits, v) == expected, seed
        lengths |= {(rule, len(tokens)) for rule, tokens in zip(v.rules, expected)}
        unsound += sum(tokens[-1] < 0 for tokens in expected)
    assert {rule for rule, n in lengths if n > 1} == {EXACT_MATCH, TOKEN_REJECTION, BLOCK_VERIFICATION}
    assert unsound > 0


@pytest.mark.slow
@pytest.mark.parametrize(("vocab_size", "num", "seed"), [(1100, 2, 3), (2, 3, 0), (1, 1, 2)])
def test_decisions_across_tiles_and_of_tiny_vocabularies(
    device: torch.device, vocab_size: int, num: int, seed: int
) -> None:
    logits, v = random_step(vocab_size, num, seed)
    v.edits = [None] * num
    decider = Decider(Batch(num, NUM_DRAFTS, device), vocab_size)
    assert decided(decider, logits, v) == composed_tokens(logits, v)
    for b in range(num):  # alone
        one = VerifyBatch([v.first_rows[b]], v.drafts.select([b]), [v.rules[b]], v.rows.select([b]), [None])
        alone = Decider(Batch(1, NUM_DRAFTS, device), vocab_size)
        assert decided(alone, logits, one) == [composed_tokens(logits, v)[b]]


@pytest.mark.slow
def test_without_drafts(device: torch.device) -> None:
    logits, v = random_step(40, 3, 0)
    v.drafts = Drafts.of([[], [], []])
    decider = Decider(Batch(4, 0, device, edit_words=2000), 40)
    decider.batch.pack_verification(v, v.first_rows)
    expected = composed_tokens(logits, v)
    assert decider.decide(logits.to(device), decider.batch.drafts, None).tolist()[:3] == expected


@pytest.mark.slow
def test_each_position_has_a_uniform_of_its_own(device: torch.device) -> None:
    """Drafts that are accepted half of the time, in many sequences."""
    num, rng = 24, random.Random(0)
    logits = torch.zeros(num * (NUM_DRAFTS + 1), 3)
    drafts = [[rng.randrange(3) for _ in range(NUM_DRAFTS)] for _ in range(num)]
    for b, row in enumerate(drafts):
        for i, draft in enumerate(row):
            logits[b * (NUM_DRAFTS + 1) + i, draft] = 1.0
    rules = [TOKEN_REJECTION, BLOCK_VERIFICATION] * (num // 2)
    firsts = [b * (NUM_DRAFTS + 1) for b in range(num)]
    v = VerifyBatch(firsts, Drafts.of(drafts), rules, sampling(num), [None] * num)
    expected = composed_tokens(logits, v)
    decider = Decider(Batch(num, NUM_DRAFTS, device), 3)
    decider.batch.pack_verification(v, firsts)
    assert decider.decide(logits.to(device), decider.batch.drafts, None).tolist() == expected
    assert {len(tokens) for tokens in expected} == {1, 2, 3, 4}


@pytest.mark.slow
@pytest.mark.parametrize("by", ["drafts", "counts"])
def test_drafts_on_the_device_end_where_they_or_their_counts_do(device: torch.device, by: str) -> None:
    logits, v = random_step(40, SIZE, 4)
    expected = composed_tokens(logits, v)
    counts = [NUM_DRAFTS] * SIZE if by == "drafts" else v.drafts.counts
    drafts = torch.full((SIZE, NUM_DRAFTS), -1)
    for row, given, tokens in zip(drafts, v.drafts.token_ids, expected):
        row[: len(given)] = torch.tensor(given, dtype=torch.int64)
        if by == "counts":
            row[len(given) :] = tokens[-1]  # a draft that would be accepted
    decider = Decider(Batch(SIZE, NUM_DRAFTS, device, edit_words=2000), 40)
    assert v.drafts.probs is not None
    probs = v.drafts.probs.to(device)
    zeros = [[0] * count for count in counts]
    v.drafts = Drafts(zeros, v.drafts.prob_rows, probs, drafts.to(device), list(range(SIZE)))
    decider.batch.pack_verification(v, v.first_rows)
    result = decider.decide(logits.to(device), drafts.to(device), probs)
    assert result.tolist() == expected


def test_edits_beyond_the_room_for_them_are_refused(device: torch.device) -> None:
    edits = [random_edits(40, seed) for seed in (1, 2)]
    _, v = random_step(40, 2, 0)
    v.edits = list(edits)
    needed = edit_words(v.edits)
    Batch(2, NUM_DRAFTS, device, needed).pack_verification(v, v.first_rows)
    with pytest.raises(ValueError, match=f"take {needed} words, the batch has {needed - 1}"):
        Batch(2, NUM_DRAFTS, device, needed - 1).pack_verification(v, v.first_rows)


class NothingButViews(TorchDispatchMode):
    """Whatever would wait for the device, allocate, or run outside of the kernels."""

    ALLOWED = (torch.ops.aten.unsqueeze.default, torch.ops.aten.view.default, torch.ops.aten.detach.default)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in self.ALLOWED:
            raise AssertionError(f"{func} in the device's half of a step")
        return func(*args, **(kwargs or {}))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, ...]]:
    """Kernels are not run: what each was launched with, tensors by their addresses."""
    recorded: list[tuple[object, ...]] = []

    def identity(value: Any) -> object:
        if isinstance(value, tuple):
            return tuple(map(identity, value))
        return (value.data_ptr(), value.shape, value.stride()) if isinstance(value, Tensor) else value

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        recorded.append((self.__name__, grid, *map(identity, args), *sorted(kwargs.items())))

    kind = triton.runtime.interpreter.InterpretedFunction if triton.knobs.runtime.interpret else triton.JITFunction
    monkeypatch.setattr(kind, "run", run)
    return recorded


def test_the_device_half_only_launches_kernels_on_buffers_that_stay(
    device: torch.device, launches: list[tuple[object, ...]]
) -> None:
    """So it cannot wait for the device, and a captured graph of it serves any step of the batch's size."""
    decider = Decider(Batch(SIZE, NUM_DRAFTS, device, edit_words=2000), 40)
    logits = torch.zeros(SIZE * (NUM_DRAFTS + 2), 40, device=device)
    probs = torch.zeros(SIZE, NUM_DRAFTS, 40, device=device)
    steps = []
    for seed in range(2):
        _, v = random_step(40, SIZE - seed, seed)
        decider.batch.pack_verification(v, v.first_rows)
        with NothingButViews():
            result = decider.decide(logits, decider.batch.drafts, probs)
        steps.append([*launches, result.token_ids.data_ptr(), result.num_accepted.data_ptr()])
        launches.clear()
    assert len(steps[0]) > 20
    assert steps[0] == steps[1]


def test_a_wait_for_the_device_would_show() -> None:
    values = torch.ones(1)
    for wait in (lambda x: x.item(), lambda x: x[x > 0], lambda x: x.nonzero(), lambda x: bool(x.any())):
        with pytest.raises(AssertionError, match="in the device's half"), NothingButViews():
            wait(values)

"""The C++ decoder and draft chain: the same bits as their composition from single operations."""

from __future__ import annotations

import random
import subprocess
import sys
from array import array
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from specdec.kernels import AttentionMetadata, speculation
from specdec.kernels.cpu import CpuKernels
from specdec.kernels.data import HiddenRows
from specdec.kernels.decisions import (
    BLOCK_VERIFICATION,
    EXACT_MATCH,
    GREEDY,
    NOT_FINITE,
    TOKEN_REJECTION,
    ChainSampling,
    DraftChain,
    Drafts,
    LogitEdits,
    VerifyBatch,
)
from specdec.kernels.decoder import run_decoder
from specdec.model.weights import CheckpointIndex, LoadedModel, load_model
from specdec.step.batch import Extend, ForwardBatch, build_batch
from support.fakes import NEEDS_COMPILER, tiny_config, write_checkpoint
from support.sampled_rows import mixed_rows, random_edits

pytestmark = NEEDS_COMPILER
CPU = torch.device("cpu")
PAGE_SIZE, LENGTH = 5, 60
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "odd sizes": {
        "hidden_size": 96, "head_dim": 32, "vocab_size": 173, "moe_intermediate_size": 40, "intermediate_size": 50,
        "n_routed_experts": 6, "attention_bias": False, "use_qk_norm": False,
    },
    "groups, two shared experts": {"n_group": 4, "topk_group": 2, "n_shared_experts": 2, "routed_scaling_factor": 2.5},
    "a router too large to repeat": {"hidden_size": 200, "n_routed_experts": 256, "num_experts_per_tok": 5},
    "no experts at all": {"first_k_dense_replace": 2},
}  # fmt: skip


@pytest.fixture(scope="module", params=CONFIGS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"), tiny_config(**CONFIGS[request.param]))


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16, torch.int8], ids=["fp32", "bf16", "int8"])
def model(request: pytest.FixtureRequest, folder: Path) -> LoadedModel:
    return load_model(CheckpointIndex.open(folder), CpuKernels(request.param, torch.float32))


@pytest.fixture(params=[1, 2, 3], autouse=True)
def _threads(request: pytest.FixtureRequest) -> object:
    """Three are more than some machines have: slow there, but not wrong."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def caches(model: LoadedModel, dtype: torch.dtype) -> list[Tensor]:
    """Two equal ones, unwritten slots NaN."""
    c, pages = model.config, 8 * -(-LENGTH // PAGE_SIZE)
    shape = (c.num_hidden_layers + 1, pages, 2, PAGE_SIZE, c.num_key_value_heads, c.head_dim)
    return [torch.full(shape, float("nan"), dtype=dtype) for _ in range(2)]


def table(sequence: int) -> list[int]:
    pages = -(-LENGTH // PAGE_SIZE)
    return list(range(sequence * pages, (sequence + 1) * pages))


@pytest.mark.slow
@torch.inference_mode()
@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.bfloat16], ids=["kv-fp32", "kv-bf16"])
def test_a_decoder_is_its_operations_to_the_bit(model: LoadedModel, kv_dtype: torch.dtype) -> None:
    kernels, vocab = model.target.kernels, model.config.vocab_size
    fused, single = caches(model, kv_dtype)
    rng = random.Random(0)
    lengths = [0] * 8
    for rows in [1, 2, 3, 5, 8, 17, 30, 60]:  # from rows that every thread repeats to rows that they share
        sequences = rng.sample(range(8), min(rows, rng.randint(1, 8)))
        extends = []
        for i, s in enumerate(sequences):
            count = min(rows // len(sequences) + (i < rows % len(sequences)), LENGTH - lengths[s])
            extends.append(Extend([rng.randrange(vocab) for _ in range(count)], lengths[s], table(s)))
            lengths[s] += count
        batch = build_batch([e for e in extends if e.token_ids], PAGE_SIZE)
        num = len(batch.input_ids)
        previous = hidden_rows(model, batch.metadata.query_lens, seed=rows)
        assert model.mtp is not None
        for decoder, hidden, layers in (
            (model.target.decoder, None, slice(-1)),
            (model.mtp.decoder, previous, slice(-1, None)),
        ):
            ids = [
                torch.full((len(decoder.weights.layers), num, model.config.num_experts_per_tok), -1) for _ in range(2)
            ]
            ours = kernels.decode(decoder.prepared, batch.input_ids, hidden, batch.metadata, fused[layers], ids[0])
            theirs = run_decoder(
                kernels, decoder.weights, batch.input_ids, hidden, batch.metadata, single[layers], ids[1]
            )
            assert torch.equal(ours.normed, theirs.normed)
            assert torch.equal(ours.unnormed, theirs.unnormed)
            assert torch.equal(*ids)
        assert torch.equal(fused.view(torch.uint8), single.view(torch.uint8)), "the caches, NaN included"


def hidden_rows(model: LoadedModel, counts: list[int], seed: int) -> list[HiddenRows]:
    """Every other sequence's lie in a tensor of their own, the rest in one together, with rows between them."""
    generator = torch.Generator().manual_seed(seed)
    together = torch.randn(sum(counts) + 3 * len(counts), model.config.hidden_size, generator=generator)
    own = [torch.randn(count, model.config.hidden_size, generator=generator) for count in counts]
    firsts = [sum(counts[:b]) + 2 * b + 1 for b in range(len(counts))]
    return [
        HiddenRows(own[b], 0, count) if b % 2 else HiddenRows(together, firsts[b], count)
        for b, count in enumerate(counts)
    ]


Shape = tuple[list[int], list[int], list[int]]  # of each sequence: most drafts, position of the last pair, pairs
SHAPES: list[Shape] = [
    ([4], [7], [3]),
    ([5, 3, 3, 1], [0, 11, 4, 30], [1, 1, 5, 2]),
    ([1, 1], [2, 9], [2, 10]),
    ([0, 0], [2, 9], [2, 1]),
    ([1, 4, 0, 6, 1, 3], [8, 0, 25, 7, 3, 12], [1, 1, 26, 3, 2, 1]),
]


def both_chains(model: LoadedModel, shape: Shape, **values: Any) -> list[DraftChain]:
    """Two equal ones, each with memory of its own."""
    counts, last, num_pairs = shape
    rng = random.Random(len(counts))
    input_ids = [rng.randrange(model.config.vocab_size) for _ in range(sum(num_pairs))]
    metadata = AttentionMetadata(num_pairs, [at + 1 for at in last], [table(s) for s in range(len(counts))], PAGE_SIZE)
    previous = hidden_rows(model, num_pairs, seed=len(counts))
    return [
        DraftChain(input_ids, previous, metadata, c[-1:].nan_to_num(0.5), counts, values["recycle_unnormed"], sampling)
        for c, sampling in zip(caches(model, torch.float32), values.get("sampling", (None, None)))
    ]


def assert_its_steps(model: LoadedModel, chains: list[DraftChain]) -> Drafts:
    """The chain as one call and as single operations: the same drafts, experts, caches and probabilities."""
    kernels, mtp = model.target.kernels, model.mtp
    assert mtp is not None
    prepared, head, counts = mtp.decoder.prepared, model.target.head, chains[0].counts
    num_rows = len(chains[0].input_ids) + max(0, max(counts) - 1) * len(counts)
    ids = [torch.full((1, num_rows, model.config.num_experts_per_tok), -1) for _ in range(2)]
    ours = kernels.draft_chain(prepared, head, chains[0], ids[0])
    theirs = speculation.draft_chain(kernels, prepared, head, chains[1], ids[1])
    assert ours.token_ids == theirs.token_ids
    assert torch.equal(*ids)
    assert torch.equal(chains[0].kv_cache, chains[1].kv_cache)
    assert ours.prob_rows == theirs.prob_rows
    assert (ours.probs is None) == (theirs.probs is None)
    if ours.probs is not None:
        torch.testing.assert_close(ours.probs, theirs.probs, rtol=0, atol=0, equal_nan=True)
    return ours


@pytest.mark.slow
@torch.inference_mode()
@pytest.mark.parametrize("recycle_unnormed", [False, True])
def test_a_draft_chain_is_its_steps_to_the_bit(model: LoadedModel, recycle_unnormed: bool) -> None:
    for shape in SHAPES:
        drafts = assert_its_steps(model, both_chains(model, shape, recycle_unnormed=recycle_unnormed)).token_ids
        assert [len(row) for row in drafts] == shape[0]
        assert all(token >= 0 for row in drafts for token in row)


def draft_sampling(
    model: LoadedModel, num: int, min_confidence: list[float], keep_probs: list[bool], edited: bool = False
) -> ChainSampling:
    """Greedy and noisy rows in turns, with every combination of cuts."""
    edits = [random_edits(model.config.vocab_size, seed=b) if edited and b % 3 else None for b in range(num)]
    return ChainSampling(mixed_rows(num, [1, GREEDY, 0]), edits, min_confidence, keep_probs)


@pytest.mark.slow
@torch.inference_mode()
@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("edited", [False, True], ids=["plain", "edited"])
@pytest.mark.parametrize("confident", [False, True], ids=["to the end", "while confident"])
@pytest.mark.parametrize("with_probs", [False, True], ids=["ids only", "with laws"])
def test_a_sampled_draft_chain_is_its_steps_to_the_bit(
    model: LoadedModel, confident: bool, with_probs: bool, edited: bool
) -> None:
    ended = 0
    for shape in SHAPES:
        counts, num = shape[0], len(shape[0])
        min_confidence = [[0.04, 0.0, 0.4, 0.08][b % 4] if confident else 0.0 for b in range(num)]
        keep_probs = [with_probs and b % 2 == 0 for b in reversed(range(num))]
        both = [draft_sampling(model, num, min_confidence, keep_probs, edited) for _ in range(2)]
        chains = both_chains(model, shape, recycle_unnormed=confident, sampling=both)
        drafts = assert_its_steps(model, chains)
        for row, count, least in zip(drafts.token_ids, counts, min_confidence):
            assert len(row) == count if least == 0 else len(row) <= count
        ended += sum(counts) - sum(drafts.counts)
        if with_probs and max(counts) > 0:
            assert_distributions(chains[0], drafts)
        else:
            assert drafts.probs is None
    assert (ended > 0) == confident


def assert_distributions(chain: DraftChain, drafts: Drafts) -> None:
    """One for each draft and for the one at which the confidence ended a chain; each draft is a token of its own."""
    assert chain.sampling is not None
    assert drafts.probs is not None
    assert [row >= 0 for row in drafts.prob_rows] == chain.sampling.keep_probs
    kept = zip(drafts.prob_rows, chain.sampling.min_confidence, chain.counts, drafts.token_ids)
    for row, least, count, ids in kept:
        if row < 0:
            continue
        for step, law in enumerate(drafts.probs[row]):
            if step < count and step <= len(ids):
                assert abs(float(law.double().sum()) - 1) < 1e-6
                assert (step < len(ids)) == (float(law.max()) >= least)
                assert step == len(ids) or law[ids[step]] > 0
            else:
                assert law.isnan().all(), "fresh memory"


@torch.inference_mode()
@pytest.mark.parametrize("sampled", [False, True])
def test_a_chain_ends_where_logits_are_not_finite(model: LoadedModel, sampled: bool) -> None:
    both = [draft_sampling(model, 2, [0.0, 0.5], [True, True]) if sampled else None for _ in range(2)]
    chains = both_chains(model, ([3, 2], [3, 4], [1, 2]), recycle_unnormed=False, sampling=both)
    chains[0].previous[1].tensor()[1, 0] = float("nan")  # both chains' start
    kernels, mtp = model.target.kernels, model.mtp
    assert mtp is not None
    drafts = kernels.draft_chain(mtp.decoder.prepared, model.target.head, chains[0]).token_ids
    assert drafts[1] == [NOT_FINITE]
    assert len(drafts[0]) == 1
    assert drafts[0][0] >= 0
    assert drafts == speculation.draft_chain(kernels, mtp.decoder.prepared, model.target.head, chains[1]).token_ids


RULES = [EXACT_MATCH, TOKEN_REJECTION, BLOCK_VERIFICATION]


def verifications(model: LoadedModel, batch: ForwardBatch, seed: int, rules: list[int], edited: bool) -> VerifyBatch:
    """Drafts that are often right: half of them the target's own choices, which decoding once has found out."""
    rng, vocab = random.Random(seed), model.config.vocab_size
    counts = [rng.randint(0, n - 1) for n in batch.metadata.query_lens]
    num, most = len(counts), max(max(counts), 1)
    q = torch.randn(num, most + 1, vocab, generator=torch.Generator().manual_seed(seed)).mul(3).softmax(-1)
    rule_of = [rules[b % len(rules)] for b in range(num)]
    drawn = [rule != EXACT_MATCH and b % 4 != 1 for b, rule in enumerate(rule_of)]
    starts = zip(batch.row_starts, batch.metadata.query_lens, counts)
    rows = mixed_rows(num, [GREEDY, 0])
    return VerifyBatch(
        first_rows=[start + n - 1 - k for start, n, k in starts],
        drafts=Drafts(
            [[int(q[b, i].argmax()) for i in range(k)] for b, k in enumerate(counts)],
            prob_rows=[b if d else -1 for b, d in enumerate(drawn)],
            probs=q if any(drawn) else None,
        ),
        rules=rule_of,
        rows=rows if edited else replace(rows, top_k=[0] * num, top_p=[1.0] * num, min_p=[0.0] * num),
        edits=[random_edits(vocab, seed=b) if edited and b % 3 else None for b in range(num)],
        keep_logits=edited and seed % 2 == 0,
    )


@pytest.mark.slow
@torch.inference_mode()
@pytest.mark.parametrize("edited", [False, True], ids=["plain", "edited"])
@pytest.mark.parametrize("rules", [RULES[:1], RULES], ids=["exact", "mixed"])
def test_verification_is_its_operations_to_the_bit(model: LoadedModel, rules: list[int], edited: bool) -> None:
    kernels, decoder, head = model.target.kernels, model.target.decoder, model.target.head
    emitted = set()
    for seed in range(12):
        rng = random.Random(seed)
        lens = [rng.randint(1, 8) for _ in range(rng.choice([1, 2, 7, 8]))]
        extends = [
            Extend([rng.randrange(model.config.vocab_size) for _ in range(n)], 0, table(s)) for s, n in enumerate(lens)
        ]
        batch = build_batch(extends, PAGE_SIZE)
        verification = verifications(model, batch, seed, rules, edited)
        if rules == RULES[:1] and not edited and seed % 3 == 0:  # nothing but argmaxes
            verification.rows.streams = [GREEDY] * len(lens)
        fused, single = caches(model, torch.float32)
        ours = kernels.verify(decoder.prepared, head, batch.input_ids, batch.metadata, fused, verification)
        if seed % 4 != 3:  # drafts that it accepts
            for drafts, tokens in zip(verification.drafts.token_ids, ours.token_ids):
                drafts[: len(tokens)] = tokens[: len(drafts)]
            ours = kernels.verify(decoder.prepared, head, batch.input_ids, batch.metadata, fused, verification)
        theirs = speculation.verify(
            kernels, decoder.prepared, head, batch.input_ids, batch.metadata, single, verification
        )
        assert ours.token_ids == theirs.token_ids
        assert torch.equal(ours.hidden, theirs.hidden)
        assert (ours.raw is not None) == (ours.processed is not None) == verification.keep_logits
        assert theirs.raw is None or torch.equal(ours.raw, theirs.raw)
        emitted |= {(len(tokens), len(drafts)) for tokens, drafts in zip(ours.token_ids, verification.drafts.token_ids)}
        if ours.processed is not None:
            first = 0
            for tokens, drafts in zip(ours.token_ids, verification.drafts.token_ids):
                rows = slice(first, first + len(tokens))
                assert torch.equal(ours.processed[rows], theirs.processed[rows])
                first += len(drafts) + 1
    assert len(emitted) > 6


@pytest.mark.slow
@torch.inference_mode()
def test_verification_sees_logits_that_are_not_finite(model: LoadedModel) -> None:
    kernels, decoder, head = model.target.kernels, model.target.decoder, model.target.head
    for rule, stream in ((EXACT_MATCH, GREEDY), (EXACT_MATCH, 0), (TOKEN_REJECTION, 0), (BLOCK_VERIFICATION, 0)):
        cache = caches(model, torch.float32)[0]
        decoder(list(range(1, 4)), None, AttentionMetadata([3], [3], [table(0)], PAGE_SIZE), cache)
        for layer in cache[:-1]:
            layer[table(0)[0], 1, 0] = float("nan")  # a value that every later row sees
        rows = replace(mixed_rows(1, [stream]), top_k=[0], top_p=[1.0])
        verification = VerifyBatch([0], Drafts.of([[5]]), [rule], rows, [None])
        metadata = AttentionMetadata([2], [5], [table(0)], PAGE_SIZE)
        verified = kernels.verify(decoder.prepared, head, [4, 5], metadata, cache, verification)
        assert verified.token_ids[0][-1] == -1


@pytest.mark.slow
@torch.inference_mode()
@pytest.mark.parametrize("rule", RULES)
def test_no_draft_is_accepted_under_a_law_that_is_not_finite(model: LoadedModel, rule: int) -> None:
    """Though the rows after it are: everything is banned before the first draft only."""
    kernels, decoder, head = model.target.kernels, model.target.decoder, model.target.head
    everything = LogitEdits(end_ids=array("q", range(model.config.vocab_size)), ends_banned=1)
    verification = VerifyBatch([0], Drafts.of([[5, 6]]), [rule], mixed_rows(1, [0]), [everything])
    metadata = AttentionMetadata([3], [3], [table(0)], PAGE_SIZE)
    for verify in (kernels.verify, partial(speculation.verify, kernels)):
        cache = caches(model, torch.float32)[0]
        verified = verify(decoder.prepared, head, [4, 5, 6], metadata, cache, verification)
        assert verified.token_ids == [[-1]]


@pytest.mark.slow
@pytest.mark.parametrize("first", ["torch", "kernels"])
def test_one_thread_pool_for_torch_and_the_kernels(first: str) -> None:
    """As many threads as asked for, whoever starts them: neither adds any to the other's."""
    script = f"""
import os, torch
torch.set_num_threads(1)
from specdec.kernels.cpu import CpuKernels
from specdec.kernels.decisions import (DraftChain)
kernels, weight, x = CpuKernels(torch.float32), torch.ones(512, 512), torch.ones(64, 512)
packed = kernels.pack(weight)
def count(): return len(os.listdir("/proc/self/task"))
def run(name): kernels.linear(x, packed) if name == "kernels" else x @ weight
before = count()
run("kernels"), run("torch")
assert count() == before, "one thread asked for, more started"
torch.set_num_threads(3)
run({first!r})
assert count() == before + 2, (before, count())
for _ in range(3):
    run("kernels"), run("torch")
    assert count() == before + 2, (before, count())
"""
    if not Path("/proc/self/task").exists():
        pytest.skip("threads are counted through /proc")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

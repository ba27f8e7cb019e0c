"""The C++ decoder and draft chain: the same bits as their composition from single operations."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fakes import NEEDS_COMPILER, tiny_config, write_checkpoint
from specdec.batch import Extend, build_batch
from specdec.kernels import DecoderOutput, composed
from specdec.kernels.cpu import CpuKernels
from specdec.kernels.interface import GREEDY, NOT_DRAFTED, NOT_FINITE, DraftChain, DraftSampling, RowSampling
from specdec.model.weights import CheckpointIndex, LoadedModel, load_model

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
        batch = build_batch([e for e in extends if e.token_ids], PAGE_SIZE, CPU)
        num = len(batch.input_ids)
        previous = torch.randn(num, model.config.hidden_size, generator=torch.Generator().manual_seed(rows))
        assert model.mtp is not None
        for decoder, hidden, layers in (
            (model.target.decoder, None, slice(-1)),
            (model.mtp.decoder, previous, slice(-1, None)),
        ):
            ids = [
                torch.full((len(decoder.weights.layers), num, model.config.num_experts_per_tok), -1) for _ in range(2)
            ]
            ours = kernels.decode(
                decoder.prepared, batch.input_ids, hidden, batch.positions, batch.metadata, fused[layers], ids[0]
            )
            theirs = composed.decode(
                kernels,
                decoder.weights,
                batch.input_ids,
                hidden,
                batch.positions,
                batch.metadata,
                single[layers],
                ids[1],
            )
            assert torch.equal(ours.normed, theirs.normed)
            assert torch.equal(ours.unnormed, theirs.unnormed)
            assert torch.equal(*ids)
        assert torch.equal(fused.view(torch.uint8), single.view(torch.uint8)), "the caches, NaN included"


def start(model: LoadedModel, num: int) -> DecoderOutput:
    generator = torch.Generator().manual_seed(num)
    return DecoderOutput(*(torch.randn(num, model.config.hidden_size, generator=generator) for _ in range(2)))


def both_chains(model: LoadedModel, counts: list[int], positions: list[int], **values: Any) -> list[DraftChain]:
    """Two equal ones, each with memory of its own."""
    last, tables = start(model, len(counts)), [table(s) for s in range(len(counts))]
    return [
        DraftChain(last, positions, tables, c[-1:].nan_to_num(0.5), counts, values["recycle_unnormed"], sampling)
        for c, sampling in zip(caches(model, torch.float32), values.get("sampling", (None, None)))
    ]


def assert_its_steps(model: LoadedModel, chains: list[DraftChain]) -> Tensor:
    """The chain as one call and as single operations: the same drafts, experts, caches and probabilities."""
    kernels, mtp = model.target.kernels, model.mtp
    assert mtp is not None
    prepared, head = mtp.decoder.prepared, model.target.head
    shape = (max(chains[0].counts) - 1, 1, len(chains[0].counts), model.config.num_experts_per_tok)
    ids = [torch.full(shape, -1) for _ in range(2)]
    ours = kernels.draft_chain(prepared, head, chains[0], ids[0])
    theirs = composed.draft_chain(kernels, prepared, head, chains[1], None, ids[1])
    assert torch.equal(ours, theirs)
    assert torch.equal(*ids)
    assert torch.equal(chains[0].kv_cache, chains[1].kv_cache)
    probs = [c.sampling.probs for c in chains if c.sampling is not None and c.sampling.probs is not None]
    assert not probs or torch.equal(*probs)
    return ours


SHAPES = [([4], [7]), ([5, 3, 3, 1], [0, 11, 4, 30]), ([1, 1], [2, 9]), ([1, 4, 2, 6, 1, 3], [8, 0, 25, 7, 3, 12])]


@torch.inference_mode()
@pytest.mark.parametrize("recycle_unnormed", [False, True])
def test_a_draft_chain_is_its_steps_to_the_bit(model: LoadedModel, recycle_unnormed: bool) -> None:
    for counts, positions in SHAPES:
        drafts = assert_its_steps(model, both_chains(model, counts, positions, recycle_unnormed=recycle_unnormed))
        assert [(row >= 0).sum() for row in drafts] == counts


def draft_sampling(
    model: LoadedModel, num: int, steps: int, min_confidence: list[float], prob_rows: list[int]
) -> DraftSampling:
    """Greedy and noisy rows in turns, with every combination of cuts."""
    rows = RowSampling(
        scales=[[1.0, 2.5, 0.7][b % 3] for b in range(num)],
        top_k=[[0, 20, 3][b % 3] for b in range(num)],
        top_p=[[0.9, 1.0, 0.8, 0.97][b % 4] for b in range(num)],
        min_p=[[0.0, 0.05][b % 2] for b in range(num)],
        seeds=[2**64 - 1 - 977 * b for b in range(num)],
        streams=[[1, GREEDY, 0][b % 3] for b in range(num)],
        positions=[31 * b + 8 for b in range(num)],
        starts=[31 * b + 6 for b in range(num)],
    )
    held = max(prob_rows, default=-1) + 1
    probs = torch.full((held, steps, model.config.vocab_size), -7.0) if held else None
    return DraftSampling(rows, min_confidence, probs, prob_rows)


@torch.inference_mode()
@pytest.mark.parametrize("confident", [False, True], ids=["to the end", "while confident"])
@pytest.mark.parametrize("with_probs", [False, True], ids=["ids only", "with laws"])
def test_a_sampled_draft_chain_is_its_steps_to_the_bit(model: LoadedModel, confident: bool, with_probs: bool) -> None:
    ended = 0
    for counts, positions in SHAPES:
        num, steps = len(counts), max(counts) + 1
        min_confidence = [[0.04, 0.0, 0.4, 0.08][b % 4] if confident else 0.0 for b in range(num)]
        prob_rows = [b // 2 if b % 2 == 0 else -1 for b in reversed(range(num))] if with_probs else [-1] * num
        both = [draft_sampling(model, num, steps, min_confidence, prob_rows) for _ in range(2)]
        chains = both_chains(model, counts, positions, recycle_unnormed=confident, sampling=both)
        drafts = assert_its_steps(model, chains)
        drafted = [int((row >= 0).sum()) for row in drafts]
        assert all(n == count if c == 0 else n <= count for n, count, c in zip(drafted, counts, min_confidence))
        ended += sum(counts) - sum(drafted)
        if with_probs:
            assert_laws(chains[0], drafts)
    assert (ended > 0) == confident


def assert_laws(chain: DraftChain, drafts: Tensor) -> None:
    """One for each draft and for the one at which the confidence ended a chain; each draft is a token of its law."""
    assert chain.sampling is not None
    assert chain.sampling.probs is not None
    for row, least, count, ids in zip(
        chain.sampling.prob_rows, chain.sampling.min_confidence, chain.counts, drafts.tolist()
    ):
        if row < 0:
            continue
        for step, law in enumerate(chain.sampling.probs[row]):
            if step < count and (step == 0 or ids[step - 1] >= 0):
                assert abs(float(law.double().sum()) - 1) < 1e-6
                assert (ids[step] >= 0) == (float(law.max()) >= least)
                assert ids[step] < 0 or law[ids[step]] > 0
            else:
                assert (law == -7).all()


@torch.inference_mode()
@pytest.mark.parametrize("sampled", [False, True])
def test_a_chain_ends_where_logits_are_not_finite(model: LoadedModel, sampled: bool) -> None:
    both = [draft_sampling(model, 2, 3, [0.0, 0.5], [0, 1]) if sampled else None for _ in range(2)]
    chains = both_chains(model, [3, 2], [3, 4], recycle_unnormed=False, sampling=both)
    chains[0].last.normed[1, 0] = float("nan")  # both chains' start
    kernels, mtp = model.target.kernels, model.mtp
    assert mtp is not None
    drafts = kernels.draft_chain(mtp.decoder.prepared, model.target.head, chains[0])
    assert (drafts >= 0).tolist() == [[True, False, False], [False, False, False]]
    assert drafts[1, 0] == NOT_FINITE
    assert drafts[0, 1] == drafts[1, 1] == NOT_DRAFTED
    assert torch.equal(drafts, composed.draft_chain(kernels, mtp.decoder.prepared, model.target.head, chains[1]))


@pytest.mark.parametrize("first", ["torch", "kernels"])
def test_one_thread_pool_for_torch_and_the_kernels(first: str) -> None:
    """As many threads as asked for, whoever starts them: neither adds any to the other's."""
    script = f"""
import os, torch
torch.set_num_threads(1)
from specdec.kernels.cpu import CpuKernels
from specdec.kernels.interface import DraftChain
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

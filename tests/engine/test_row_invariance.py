"""With the C++ kernels a row's logits are the same bits however its sequence is cut and batched."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from specdec.cache.pages import PagePool, allocate_kv_cache
from specdec.kernels import select
from specdec.model.weights import CheckpointIndex, LoadedModel, load_model
from specdec.step.batch import Extend, build_batch
from support.fakes import NEEDS_COMPILER, tiny_config, write_checkpoint

pytestmark = NEEDS_COMPILER
CPU = torch.device("cpu")
NUM_SEQUENCES, LENGTH = 16, 70


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    config = tiny_config(hidden_size=96, head_dim=32, vocab_size=173, moe_intermediate_size=40, n_routed_experts=6)
    folder = write_checkpoint(tmp_path_factory.mktemp("odd"), config)
    return load_model(CheckpointIndex.open(Path(folder)), select(CPU, request.param, "cpu"))


def sequences() -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(173) for _ in range(LENGTH - rng.randint(0, 20))] for _ in range(NUM_SEQUENCES)]


class Decoder:
    """Computes pieces of sequences in ragged batches, against one paged cache."""

    def __init__(self, model: LoadedModel, page_size: int, kv_dtype: torch.dtype) -> None:
        self.model, self.page_size = model, page_size
        pool = PagePool(NUM_SEQUENCES * -(-LENGTH // page_size), page_size)
        self.cache = allocate_kv_cache(model.config, 3, pool.num_pages, page_size, kv_dtype, CPU).fill_(float("nan"))
        self.tables = [pool.allocate(pool.num_pages // NUM_SEQUENCES) for _ in range(NUM_SEQUENCES)]

    @torch.inference_mode()
    def logits(self, pieces: list[tuple[int, int, list[int]]]) -> list[Tensor]:
        """(sequence, start, tokens) each -> logits of its rows."""
        batch = build_batch([Extend(tokens, start, self.tables[s]) for s, start, tokens in pieces], self.page_size)
        hidden = self.model.target(batch.input_ids, batch.metadata, self.cache)
        return list(self.model.target.compute_logits(hidden).split([len(tokens) for _, _, tokens in pieces]))


@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.bfloat16], ids=["kv-fp32", "kv-bf16"])
def test_logits_are_the_same_bits_however_they_are_computed(model: LoadedModel, kv_dtype: torch.dtype) -> None:
    tokens = sequences()
    alone = Decoder(model, 16, kv_dtype)
    expected = [alone.logits([(s, 0, t)])[0] for s, t in enumerate(tokens)]  # one prefill each

    one_by_one = Decoder(model, 5, kv_dtype)
    for position, token in enumerate(tokens[0]):
        (row,) = one_by_one.logits([(0, position, [token])])
        assert torch.equal(row[0], expected[0][position])

    rng = random.Random(1)
    batched = Decoder(model, 3, kv_dtype)
    done = [0] * NUM_SEQUENCES
    while any(d < len(t) for d, t in zip(done, tokens)):
        open_sequences = [s for s in range(NUM_SEQUENCES) if done[s] < len(tokens[s])]
        chosen = rng.sample(open_sequences, rng.randint(1, len(open_sequences)))
        pieces = []
        for s in chosen:
            end = min(len(tokens[s]), done[s] + rng.choice([1, 2, 3, 4, 5, 9, 30]))
            # up to 8 drafts that will be rejected: their rows are overwritten by the next piece
            rejected = [rng.randrange(173) for _ in range(min(rng.choice([0, 0, 1, 4, 8]), LENGTH - end))]
            pieces.append((s, done[s], tokens[s][done[s] : end] + rejected))
            done[s] = end
        for (s, start, _), rows in zip(pieces, batched.logits(pieces)):
            assert torch.equal(rows[: done[s] - start], expected[s][start : done[s]]), f"sequence {s} from {start}"

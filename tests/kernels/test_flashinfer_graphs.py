"""CUDA graphs on the fake device: replays compute what eager forwards do, from nothing but their buffers."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("flashinfer", reason="FlashInfer is not installed: make test-flashinfer")

from specdec import Engine, SpeculationParams
from specdec.kernels import AttentionMetadata
from specdec.kernels.flashinfer import graphs, planner
from specdec.kernels.flashinfer.graphs import CapturedForward, batch_sizes
from specdec.kernels.flashinfer.transfer import upload
from specdec.model.layers import Decoder
from support import flashinfer_fakes
from support.fakes import tiny_config, write_checkpoint
from support.flashinfer_fakes import FakeDevice
from support.flashinfer_fakes.graphs import storage

K, MAX_SEQS, PAGE_SIZE, NUM_PAGES = 3, 3, 4, 40
SCRATCH_SLOTS = set(range(NUM_PAGES * PAGE_SIZE, (NUM_PAGES + 1) * PAGE_SIZE))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("head_dim_64"), tiny_config(head_dim=64))


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeDevice:
    return flashinfer_fakes.install(monkeypatch)


@pytest.fixture
def engine(fake: FakeDevice, monkeypatch: pytest.MonkeyPatch, checkpoint: Path) -> Engine:
    return flashinfer_fakes.engine(
        monkeypatch, checkpoint, speculation=SpeculationParams(K), max_num_seqs=MAX_SEQS, page_size=PAGE_SIZE,
        num_pages=NUM_PAGES, max_model_len=100,
    )  # fmt: skip


def all_graphs(decoder: Decoder) -> Iterator[CapturedForward]:
    for in_turn in decoder.prepared.graphs._by_shape.values():
        yield from in_turn


def decoders(engine: Engine) -> list[Decoder]:
    model = engine.runtime.model
    assert model.mtp is not None
    return [model.target.decoder, model.mtp.decoder]


def random_batch(rng: random.Random, num_seqs: int, most: int) -> AttentionMetadata:
    query_lens = [rng.randint(1, most) for _ in range(num_seqs)]
    kv_lens = [n + rng.randint(0, 20) for n in query_lens]
    pages = iter(rng.sample(range(NUM_PAGES), NUM_PAGES))
    tables = [[next(pages) for _ in range(-(-end // PAGE_SIZE))] for end in kv_lens]
    return AttentionMetadata(query_lens, kv_lens, tables, PAGE_SIZE)


def run(decoder: Decoder, meta: AttentionMetadata, cache: Tensor, seed: int, hidden: int = 32) -> Tensor:
    num_rows, kernels = sum(meta.query_lens), decoder.kernels
    tokens = upload(random.Random(seed).choices(range(200), k=num_rows), kernels.device)
    previous = None
    if decoder.weights.fusion is not None:
        previous = torch.randn(num_rows, hidden, generator=torch.Generator().manual_seed(seed)).bfloat16()
    return kernels.run(decoder.prepared, tokens, previous, meta, cache).normed


def caches(engine: Engine) -> list[Tensor]:
    """Of the two decoders."""
    return [engine.runtime.kv_cache, engine.runtime.kv_cache[-1:]]


@torch.inference_mode()
def test_replays_equal_eager_forwards_and_write_their_own_slots_alone(engine: Engine) -> None:
    for seed in range(20):
        rng = random.Random(seed)
        engine.runtime.kv_cache.copy_(torch.randn(engine.runtime.kv_cache.shape))
        meta = random_batch(rng, rng.randint(1, MAX_SEQS), K + 1)
        for decoder, cache in zip(decoders(engine), caches(engine)):
            before, elsewhere, num_replays = cache.clone(), cache.clone(), count_replays(decoder)
            replayed = run(decoder, meta, cache, seed)
            assert count_replays(decoder) == num_replays + 1
            eager = run(decoder, meta, elsewhere, seed)  # no graph is for that memory
            assert count_replays(decoder) == num_replays + 1
            assert torch.equal(replayed, eager)  # the fakes round a row alike, whatever rows pad the batch
            assert written_slots(cache, before) - SCRATCH_SLOTS == written_slots(elsewhere, before) == set(meta.slots)


def count_replays(decoder: Decoder) -> int:
    return sum(graph._graph.num_replays for graph in all_graphs(decoder))


def written_slots(cache: Tensor, before: Tensor) -> set[int]:
    changed = (cache != before).transpose(2, 3).flatten(3).any(-1).any(0)  # [pages, page_size]
    return set(changed.flatten().nonzero().flatten().tolist())


@torch.inference_mode()
def test_a_graph_reads_nothing_but_weights_cache_and_its_own_buffers(engine: Engine) -> None:
    kernels: Any = engine.runtime.model.target.kernels
    model = engine.runtime.model
    assert model.mtp is not None
    lasting = [p for part in (model.target, model.mtp) for p in part.parameters()]
    lasting += [x for part in (model.target, model.mtp) for m in part.modules() for x in _tensors(m)]
    lasting += [engine.runtime.kv_cache, model.target.decoder.weights.cos_sin, kernels.planner.workspace]
    lasting += [x for table in kernels._whole_caches.values() for x in table]
    known = {storage(x) for x in lasting}
    num_graphs = 0
    for decoder in decoders(engine):
        for graph in all_graphs(decoder):
            wrapper = graph._wrapper.wrapper
            own = [graph._numbers, graph._inputs.tokens, wrapper._int_workspace_buffer]
            own += [wrapper._qo_indptr_buf, wrapper._paged_kv_indptr_buf]
            if graph._inputs.previous is not None:
                own.append(graph._inputs.previous)
            unknown = graph._graph.external - known - {storage(x) for x in own}
            assert not unknown
            num_graphs += 1
    assert num_graphs == 3 * 2 + 3 * 4  # three sizes: the target's two shapes, the MTP layer's pairs, one, and two more


def _tensors(module: Any) -> list[Tensor]:
    return [x for x in getattr(module, "packed", {}).values() if isinstance(x, Tensor)]


@torch.inference_mode()
def test_attention_is_planned_when_a_number_of_pages_changes(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    planned: list[list[int]] = []
    plan = planner.Wrapper.plan

    def counting(self: Any, shape: Any, *tables: Tensor, **how: Any) -> None:
        planned.append(tables[0].tolist())
        plan(self, shape, *tables, **how)

    monkeypatch.setattr(planner.Wrapper, "plan", counting)
    target = decoders(engine)[0]
    for kv_len in (5, 6, 7, 8, 9, 10, 12, 13, 8):
        meta = AttentionMetadata([K + 1], [kv_len], [list(range(10))], PAGE_SIZE)
        run(target, meta, engine.runtime.kv_cache, 0)
    assert planned == [[0, 2], [0, 3], [0, 4], [0, 2]]


@torch.inference_mode()
def test_outputs_outlive_the_next_replay(engine: Engine) -> None:
    target = decoders(engine)[0]
    meta = random_batch(random.Random(1), 2, K + 1)
    first = run(target, meta, engine.runtime.kv_cache, 1)
    kept = first.clone()
    run(target, meta, engine.runtime.kv_cache, 2)
    assert torch.equal(first, kept)


def test_the_smallest_graph_that_holds_the_batch_is_taken_and_they_take_turns(engine: Engine) -> None:
    target, mtp = (d.prepared.graphs for d in decoders(engine))
    table, cache = list(range(9)), engine.runtime.kv_cache

    def shape(query_lens: list[int]) -> tuple[int, int] | None:
        meta = AttentionMetadata(query_lens, [20] * len(query_lens), [table] * len(query_lens), PAGE_SIZE)
        graph = target.find(meta, cache)
        return None if graph is None else (graph.num_seqs, graph.query_len)

    assert shape([1]) == (1, 1)
    assert shape([1, 1, 1]) == (3, 1)
    assert shape([1, 2]) == (2, K + 1)
    assert shape([K + 1] * 3) == (3, K + 1)
    assert shape([K + 2]) is None  # more drafts than were captured, or a chunk of a prompt
    assert shape([1] * 4) is None
    one = AttentionMetadata([1], [9], [table], PAGE_SIZE)
    assert target.find(one, cache.clone()) is None
    turns = [mtp.find(one, cache[-1:]) for _ in range(2 * K)]
    assert turns[:K] == turns[K:]
    assert len({id(graph) for graph in turns}) == K


def test_batch_sizes_are_powers_of_two_and_the_largest() -> None:
    assert batch_sizes(1) == [1]
    assert batch_sizes(3) == [1, 2, 3]
    assert batch_sizes(16) == [1, 2, 4, 8, 16]
    assert batch_sizes(20) == [1, 2, 4, 8, 16, 20]


def test_no_graphs_where_they_are_not_wanted(
    fake: FakeDevice, monkeypatch: pytest.MonkeyPatch, checkpoint: Path
) -> None:
    monkeypatch.setattr(graphs, "CapturedForward", lambda *_, **__: pytest.fail("captured"))
    engine = flashinfer_fakes.engine(monkeypatch, checkpoint, cuda_graphs=False)
    assert all(d.prepared.graphs is None for d in decoders(engine))


def test_without_drafts_the_target_alone_is_captured(
    fake: FakeDevice, monkeypatch: pytest.MonkeyPatch, checkpoint: Path
) -> None:
    engine = flashinfer_fakes.engine(monkeypatch, checkpoint, speculation=SpeculationParams(0), max_num_seqs=2)
    target, mtp = decoders(engine)
    assert [(g.num_seqs, g.query_len) for g in all_graphs(target)] == [(2, 1), (1, 1)]
    assert mtp.prepared.graphs is None


def test_every_graph_is_heard_of(
    fake: FakeDevice, monkeypatch: pytest.MonkeyPatch, checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "specdec")
    heard: list[tuple[int, int]] = []

    def progress(what: str, done: int, total: int) -> None:
        if what == "capturing CUDA graphs":
            heard.append((done, total))

    engine = flashinfer_fakes.engine(
        monkeypatch, checkpoint, progress=progress, speculation=SpeculationParams(1), max_num_seqs=2
    )
    num = sum(len(list(all_graphs(decoder))) for decoder in decoders(engine))
    assert heard == [(done, num) for done in range(num + 1)]
    assert caplog.messages[-1].startswith(f"captured {num} CUDA graphs in ")

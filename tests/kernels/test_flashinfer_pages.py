"""Page tables in FlashInfer's terms, and batches filled up to a graph's shape, against plain loops over tokens."""

from __future__ import annotations

import random

import pytest

from specdec.kernels import AttentionMetadata
from specdec.kernels.flashinfer.pages import FixedBatch, PageTable

SCRATCH = 999


def random_batch(rng: random.Random, most: int, query_len: int, page_size: int) -> AttentionMetadata:
    """Some sequences have pages in reserve."""
    query_lens = [rng.randint(1, query_len) for _ in range(rng.randint(0, most))]
    kv_lens = [n + rng.choice([0, 1, page_size, 37]) for n in query_lens]
    pages = iter(rng.sample(range(SCRATCH), 500))
    tables = [[next(pages) for _ in range(-(-end // page_size) + rng.randint(0, 2))] for end in kv_lens]
    return AttentionMetadata(query_lens, kv_lens, tables, page_size)


def keys_of(pages: PageTable, b: int, page_size: int) -> list[tuple[int, int]]:
    """(page, offset) of every key that FlashInfer takes sequence b to have."""
    table = pages.indices[pages.indptr[b] : pages.indptr[b + 1]]
    assert 1 <= pages.last_page_len[b] <= page_size
    num_keys = (len(table) - 1) * page_size + pages.last_page_len[b]
    return [(table[at // page_size], at % page_size) for at in range(num_keys)]


@pytest.mark.parametrize("page_size", [1, 3, 16])
def test_page_tables_list_each_key_once(page_size: int) -> None:
    for seed in range(50):
        meta = random_batch(random.Random(seed), 5, 6, page_size)
        pages = PageTable.of(meta.kv_lens, meta.page_tables, page_size)
        assert len(pages.indptr) == len(meta.kv_lens) + 1
        for b, (end, table) in enumerate(zip(meta.kv_lens, meta.page_tables)):
            expected = [(table[at // page_size], at % page_size) for at in range(end)]
            assert keys_of(pages, b, page_size) == expected


@pytest.mark.parametrize("page_size", [1, 3, 16])
@pytest.mark.parametrize("query_len", [1, 4, 9])
def test_padding_writes_the_scratch_page_alone_and_real_rows_see_their_own_keys(query_len: int, page_size: int) -> None:
    for seed in range(50):
        rng = random.Random(seed)
        meta = random_batch(rng, 5, query_len, page_size)
        num_seqs = len(meta.query_lens) + rng.randint(0, 3) + (not meta.query_lens)
        batch = FixedBatch.fill(meta, num_seqs, query_len, SCRATCH)
        assert len(batch.positions) == len(batch.slots) == num_seqs * query_len
        assert [batch.slots[row] for row in batch.rows] == meta.slots
        assert [batch.positions[row] for row in batch.rows] == meta.positions
        padding = set(range(num_seqs * query_len)) - set(batch.rows)
        assert {batch.slots[row] // page_size for row in padding} <= {SCRATCH}
        assert all(batch.positions[row] == 0 for row in padding)
        assert len(batch.pages.indptr) == num_seqs + 1
        for b in range(num_seqs):
            keys = keys_of(batch.pages, b, page_size)
            assert len(keys) >= query_len  # FlashInfer's condition: the rows themselves are among the keys
            if b >= len(meta.query_lens):
                assert {page for page, _ in keys} == {SCRATCH}
                continue
            first, table = meta.kv_lens[b] - meta.query_lens[b], meta.page_tables[b]
            for i in range(meta.query_lens[b]):  # row i sees what is not after it: bottom-right causal
                seen = keys[: len(keys) - query_len + i + 1]
                assert seen == [(table[at // page_size], at % page_size) for at in range(first + i + 1)]
            live = set(table[: -(-meta.kv_lens[b] // page_size)])
            assert {page for page, _ in keys} <= live | {SCRATCH}

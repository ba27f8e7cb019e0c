"""Ragged extends -> `ForwardBatch`: what one forward of the target or the MTP layer reads."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import NamedTuple

from specdec.kernels import AttentionMetadata


class Extend(NamedTuple):
    """One sequence's part of a forward: tokens at positions `start`, `start` + 1, ..."""

    token_ids: list[int]
    start: int
    page_table: list[int]


class ForwardBatch(NamedTuple):
    """T packed tokens of all extends, in order. `row_starts` [B]: each extend's first row."""

    input_ids: list[int]  # [T]
    metadata: AttentionMetadata
    row_starts: list[int]


def build_batch(extends: Seq[Extend], page_size: int) -> ForwardBatch:
    input_ids: list[int] = []
    row_starts: list[int] = []
    for extend in extends:
        row_starts.append(len(input_ids))
        input_ids += extend.token_ids
    query_lens = [len(extend.token_ids) for extend in extends]
    kv_lens = [extend.start + count for extend, count in zip(extends, query_lens)]
    metadata = AttentionMetadata(query_lens, kv_lens, [extend.page_table for extend in extends], page_size)
    return ForwardBatch(input_ids, metadata, row_starts)

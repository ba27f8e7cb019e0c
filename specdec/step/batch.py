"""Packs ragged extends into a `ForwardBatch`, which one forward of the target or the MTP layer reads."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import NamedTuple

from specdec.kernels import AttentionMetadata


class Extend(NamedTuple):
    """One sequence's part of a forward."""

    token_ids: list[int]
    """Its tokens, at positions `start`, `start` + 1, ..."""
    start: int
    """Position of the first one: how many tokens of the sequence are cached before it."""
    page_table: list[int]
    """The sequence's pages, in order."""


class ForwardBatch(NamedTuple):
    """What a forward reads: the tokens of B extends, packed in their order."""

    input_ids: list[int]
    """[T]: the tokens."""
    metadata: AttentionMetadata
    """Where they live in the cache."""
    row_starts: list[int]
    """[B]: each extend's first row."""


def build_batch(extends: Seq[Extend], page_size: int) -> ForwardBatch:
    """Packs extends for one forward. page_size: tokens of a page."""
    input_ids: list[int] = []
    row_starts: list[int] = []
    for extend in extends:
        row_starts.append(len(input_ids))
        input_ids += extend.token_ids
    query_lens = [len(extend.token_ids) for extend in extends]
    kv_lens = [extend.start + count for extend, count in zip(extends, query_lens)]
    metadata = AttentionMetadata(query_lens, kv_lens, [extend.page_table for extend in extends], page_size)
    return ForwardBatch(input_ids, metadata, row_starts)

"""Ragged extends -> `ForwardBatch`: what one forward of the target or the MTP layer reads."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.kernels import AttentionMetadata


@dataclass(frozen=True)
class Extend:
    """One sequence's part of a forward: tokens at positions `start`, `start` + 1, ..."""

    token_ids: list[int]
    start: int
    page_table: list[int]

    @property
    def end(self) -> int:
        return self.start + len(self.token_ids)


@dataclass(frozen=True)
class ForwardBatch:
    """T packed tokens of all extends, in order. `row_starts` [B]: each extend's first row."""

    input_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64
    metadata: AttentionMetadata
    row_starts: list[int]


def build_batch(extends: Seq[Extend], page_size: int, device: torch.device) -> ForwardBatch:
    slots: list[int] = []
    positions: list[int] = []
    input_ids: list[int] = []
    row_starts: list[int] = []
    for extend in extends:
        row_starts.append(len(input_ids))
        input_ids += extend.token_ids
        positions += range(extend.start, extend.end)
        slots += [
            extend.page_table[position // page_size] * page_size + position % page_size
            for position in range(extend.start, extend.end)
        ]
    packed = torch.tensor([input_ids, positions, slots], dtype=torch.int64, device=device)
    return ForwardBatch(
        input_ids=packed[0],
        positions=packed[1],
        metadata=AttentionMetadata(
            query_lens=[len(extend.token_ids) for extend in extends],
            kv_lens=[extend.end for extend in extends],
            page_tables=[extend.page_table for extend in extends],
            slot_mapping=packed[2],
        ),
        row_starts=row_starts,
    )

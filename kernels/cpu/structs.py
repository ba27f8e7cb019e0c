"""Makes the structures of native.py, which a call hands to the C++ library, from what `specdec.kernels.data` and
`specdec.kernels.decisions` define.

Structures hold addresses. Arrays that were made for them live in their attribute `alive`; tensors and edits are the
caller's to keep.
"""

from __future__ import annotations

from array import array
from ctypes import addressof
from functools import reduce
from itertools import accumulate, chain
from operator import iadd
from typing import Any

import torch
from torch import Tensor

from specdec.kernels.cpu import native
from specdec.kernels.cpu.weights import PreparedDecoder, address
from specdec.kernels.data import AttentionMetadata, HiddenRows
from specdec.kernels.decisions import ChainSampling, LogitEdits, Residuals, RowSampling, VerifyBatch


def at(values: array[Any]) -> int:
    """Returns the address of an array's first value."""
    return values.buffer_info()[0]


def one_array(*lists: list[int]) -> tuple[array[int], list[int]]:
    """Returns one array of all lists, as int64 one after the other, and the address of each, valid as long as the array
    lives."""
    values = array("q", reduce(iadd, lists, []))  # faster than an array that grows
    start = at(values)
    return values, [start + 8 * before for before in accumulate(map(len, lists[:-1]), initial=0)]


def zeros(size: int) -> array[int]:
    """Returns room for `size` int64 results."""
    return array("q", bytes(8 * size))


def batch_struct(metadata: AttentionMetadata) -> native.Batch:
    tables = metadata.page_tables
    query_starts, page_starts = [0, *accumulate(metadata.query_lens)], [0, *accumulate(map(len, tables))]
    ints, addresses = one_array(query_starts, metadata.kv_lens, page_starts, [*chain(*tables)])
    struct = native.Batch(len(tables), *addresses)
    struct.alive = ints
    return struct


def forward_struct(
    decoder: PreparedDecoder,
    input_ids: list[int],
    previous: list[HiddenRows] | None,
    metadata: AttentionMetadata,
    kv_cache: Tensor,
    expert_ids: Tensor | None,
) -> native.Forward:
    """Returns what a forward reads; where its output goes is left for the caller to fill in. Parameters: see
    `Backend.decode`."""
    assert (previous is None) == (decoder.weights.fusion is None), "previous states and a fusion belong together"
    tokens, batch = array("q", input_ids), batch_struct(metadata)
    rows = None if previous is None else _row_addresses(previous)
    struct = native.Forward(
        len(tokens), at(tokens), None if rows is None else at(rows), batch, *decoder.bind(kv_cache), None, None,
        address(expert_ids),
    )  # fmt: skip
    struct.alive = tokens, batch, rows
    return struct


def _row_addresses(previous: list[HiddenRows]) -> array[int]:
    addresses = array("q")
    for hidden, first, count in previous:
        assert hidden.is_contiguous()
        size = 4 * hidden.shape[1]
        start = hidden.data_ptr() + first * size
        addresses.extend(range(start, start + count * size, size))
    return addresses


def sampling_struct(sampling: RowSampling) -> native.Sampling:
    arrays = reals, ints, seeds = sampling.packed()
    struct = native.Sampling(len(seeds), at(reals), at(ints), at(seeds))
    struct.alive = arrays
    return struct


def edit_structs(edits: list[LogitEdits | None]) -> Any:
    """Returns an array of structures, one per entry, which the edits must outlive; None where nothing is edited."""
    if not any(edits):
        return None
    return (native.Edits * len(edits))(*(_EDIT_NOTHING if e is None else _edit_struct(e) for e in edits))


def edits_address(structs: Any) -> int | None:
    """Returns the address of what `edit_structs` made; None where it made nothing."""
    return None if structs is None else addressof(structs)


_EDIT_NOTHING = native.Edits()


def _edit_struct(e: LogitEdits) -> native.Edits:
    return native.Edits(
        len(e.bias_ids), at(e.bias_ids), at(e.biases), len(e.end_ids), e.ends_banned, at(e.end_ids),
        len(e.word_starts) - 1, at(e.word_starts), at(e.word_tokens), len(e.recent), at(e.recent),
        len(e.counted_ids), at(e.counted_ids), at(e.counts), e.repetition, e.presence, e.frequency,
    )  # fmt: skip


def draft_sampling_struct(sampling: ChainSampling, probs: Tensor | None, prob_rows: list[int]) -> native.DraftSampling:
    """Returns how a chain's drafts are drawn. probs, prob_rows: where their distributions go, see `room_for_probs`."""
    rows, edits = sampling_struct(sampling.rows), edit_structs(sampling.edits)
    confidence, row_of = array("d", sampling.min_confidence), array("q", prob_rows)
    struct = native.DraftSampling(
        rows, at(confidence), at(row_of), address(probs), 0 if probs is None else probs.shape[1], edits_address(edits),
    )  # fmt: skip
    struct.alive = rows, confidence, row_of, edits
    return struct


class VerificationCall:
    """A verification as the library reads it, and room for what it writes.

    struct: what the library is given.
    raw, processed: logits [R, V] of all rows, or None, as in `Verified`.
    """

    __slots__ = ("_num_tokens", "_starts", "_tokens", "processed", "raw", "struct")

    def __init__(self, batch: VerifyBatch, vocab_size: int) -> None:
        drafts, num = batch.drafts, len(batch.rules)
        self._starts = starts = [0, *accumulate(map(len, drafts.token_ids))]
        num_rows = starts[-1] + num
        self._tokens, self._num_tokens = zeros(num_rows), zeros(num)
        self.raw = torch.empty(num_rows, vocab_size) if batch.keep_logits else None
        self.processed = None if self.raw is None else torch.empty_like(self.raw)
        rows, edits, probs = sampling_struct(batch.rows), edit_structs(batch.edits), drafts.probs
        ints, addresses = one_array(
            batch.rules, batch.first_rows, starts, drafts.prob_rows, [*chain(*drafts.token_ids)]
        )
        self.struct = native.Verification(
            rows, *addresses, address(probs), 0 if probs is None else probs.shape[1], edits_address(edits),
            address(self.raw), address(self.processed), at(self._tokens), at(self._num_tokens),
        )  # fmt: skip
        self.struct.alive = rows, edits, ints

    def token_ids(self) -> list[list[int]]:
        """Returns what each sequence emits, [B], once the library has written it."""
        # Each sequence has room for one token per row, of which the first `_num_tokens` are written.
        firsts = [start + b for b, start in enumerate(self._starts)]
        return [self._tokens[first : first + count].tolist() for first, count in zip(firsts, self._num_tokens)]


def residuals_struct(laws: Residuals) -> native.Residuals:
    assert laws.p.is_contiguous()
    assert laws.q is None or laws.q.is_contiguous()
    scales, ints = array("d", laws.scales), array("q", laws.p_rows + laws.q_rows + laws.excluded)
    struct = native.Residuals(len(scales), laws.p.shape[-1], laws.p.data_ptr(), address(laws.q), at(scales), at(ints))
    struct.alive = scales, ints
    return struct

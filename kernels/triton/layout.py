"""Packs what a step hands over to the device: B sequences in one buffer of 8-byte words, copied at once.

First a table [fields, B], then drafts [B, K], then the edits of the sequences that have some. Sequences beyond those of
a step are padding: no row of theirs is active. Doubles are there by their bits.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from collections.abc import Sequence as Seq

import numpy as np
import torch
import triton.language as tl
from torch import Tensor

from specdec.kernels.decisions import (
    EXACT_MATCH,
    NOT_DRAFTED,
    TOKEN_REJECTION,
    ChainSampling,
    LogitEdits,
    RowSampling,
    VerifyBatch,
)

# Fields of a sequence. ROW: its row of logits at step 0. FIRST, LAST: the first and the last step that is active, where
# a step is the number of drafts before a row. LAW: whether its rows become probabilities (a distribution). EDITS: where
# its edits begin, 0 if it has none.
ROW, FIRST, LAST, RULE, LAW, PROB_ROW, EDITS = (tl.constexpr(i) for i in range(7))
TOP_K, STREAM, POSITION, START, SEED = (tl.constexpr(i) for i in range(7, 12))
SCALE, TOP_P, MIN_P, CONFIDENCE = (tl.constexpr(i) for i in range(12, 16))
NUM_FIELDS = 16

# A sequence's edits begin with where each list starts, which is where the one before ends; then come single values.
BIAS_IDS, BIASES, END_IDS, WORD_STARTS, WORD_TOKENS, RECENT, COUNTED_IDS, COUNTS = (tl.constexpr(i) for i in range(8))
ENDS_BANNED, REPETITION, PRESENCE, FREQUENCY = (tl.constexpr(i) for i in range(8, 12))
NUM_EDIT_FIELDS = 12


class Batch:
    """Room for `size` sequences of up to `num_drafts` drafts, and for `edit_words` (see `edit_words`) of their edits.

    Packing is the host's half: it fills a pinned buffer and queues one copy, so the step packed before must have been
    read back. The device's half, the kernels, finds `words` and `drafts` at addresses that never change.
    """

    def __init__(self, size: int, num_drafts: int, device: torch.device, edit_words: int = 0) -> None:
        self.size, self.num_drafts, self.device, self.edit_words = size, num_drafts, device, edit_words
        self.cuts = True  # whether a row of the step that is packed does, see `RowSampling.cuts`
        self._edits_at = (NUM_FIELDS + num_drafts) * size
        self._host = torch.zeros(self._edits_at + edit_words, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._words = self._host.numpy()
        table = self._words[: NUM_FIELDS * size].reshape(NUM_FIELDS, size)
        self._ints, self._reals = table, table.view(np.float64)
        self._drafts = self._words[table.size : self._edits_at].reshape(size, num_drafts)
        self.words = torch.zeros_like(self._host, device=device, pin_memory=False)
        self.drafts = self.words[table.size : self._edits_at].view(size, num_drafts)  # [B, K], -1 padded

    def pack_verification(self, v: VerifyBatch, first_rows: list[int]) -> None:
        """Packs a verification. Drafts are packed where the host knows them.

        v: what is to be decided.
        first_rows: [B], each sequence's first row of the logits that will be decided on.
        """
        self._fill(v.rows, v.edits)
        self._put(ROW, first_rows)
        self._put(LAST, v.drafts.counts)
        self._put(RULE, v.rules)
        self._put(LAW, [rule != EXACT_MATCH for rule in v.rules])
        self._put(PROB_ROW, v.drafts.prob_rows)
        if v.drafts.on_device is None:
            self._put_drafts(v.drafts.token_ids)
        self._copy()

    def pack_drafting(self, sampling: ChainSampling, counts: list[int], prob_rows: list[int]) -> None:
        """Packs a chain's draws. Row b of a step's logits will be sequence b's.

        sampling: how drafts are drawn.
        counts: [B], the most drafts of each sequence.
        prob_rows: [B], where its drafts' distributions are kept, see `Drafts.prob_rows`.
        """
        needed = zip(prob_rows, sampling.min_confidence)
        self._fill(sampling.rows, sampling.edits)
        self._put(ROW, range(len(counts)))
        self._put(LAST, [count - 1 for count in counts])
        self._put(RULE, [EXACT_MATCH] * len(counts))
        self._put(LAW, [row >= 0 or confidence > 0 for row, confidence in needed])
        self._put(PROB_ROW, prob_rows)
        self._reals[CONFIDENCE.value, : len(counts)] = sampling.min_confidence
        self._put_drafts([])
        self._copy()

    def pack_rows(self, sampling: RowSampling, *, laws: bool = False) -> None:
        """Packs independent rows, one sequence each without drafts: to sample from, or (laws=True) to normalise."""
        num = len(sampling)
        self._fill(sampling, [None] * num)
        self._put(ROW, range(num))
        self._put(LAST, [0] * num)
        self._put(RULE, [TOKEN_REJECTION if laws else EXACT_MATCH] * num)
        self._put(LAW, [laws] * num)
        self._copy()

    def pack_edits(self, edits: Seq[LogitEdits | None], drafts: list[list[int]]) -> None:
        """Packs independent rows to be edited, each after its own drafts."""
        counts = [len(before) for before in drafts]
        self._clear()
        self._put_edits(edits)
        self._put(ROW, [row - count for row, count in enumerate(counts)])
        self._put(FIRST, counts)
        self._put(LAST, counts)
        self._put_drafts(drafts)
        self._copy()

    def _fill(self, rows: RowSampling, edits: Seq[LogitEdits | None]) -> None:
        num, self.cuts = len(rows), rows.cuts
        assert num <= self.size, f"{num} sequences in a batch of {self.size}"
        self._clear()
        for field, ints in (
            (TOP_K, rows.top_k), (STREAM, rows.streams), (POSITION, rows.positions), (START, rows.starts),
        ):  # fmt: skip
            self._put(field, ints)
        self._ints[SEED.value].view(np.uint64)[:num] = rows.seeds
        for field, reals in ((SCALE, rows.scales), (TOP_P, rows.top_p), (MIN_P, rows.min_p)):
            self._reals[field.value, :num] = reals
        self._put_edits(edits)

    def _clear(self) -> None:
        self._ints[:] = 0
        self._ints[LAST.value] = -1

    def _put(self, field: tl.constexpr, values: Iterable[int]) -> None:
        given = list(values)
        self._ints[field.value, : len(given)] = given

    def _put_drafts(self, drafts: list[list[int]]) -> None:
        self._drafts[:] = NOT_DRAFTED
        for row, given in zip(self._drafts, drafts):
            row[: len(given)] = given

    def _put_edits(self, edits: Seq[LogitEdits | None]) -> None:
        needed = edit_words(edits)
        if needed > self.edit_words:
            raise ValueError(
                f"these edits take {needed} words, the batch has {self.edit_words}: make it with more edit_words"
            )
        at = self._edits_at
        for b, e in enumerate(edits):
            if e is not None:
                self._ints[EDITS.value, b] = at
                packed = np.frombuffer(_packed_edits(e, at), np.int64)
                self._words[at : at + len(packed)] = packed
                at += len(packed)

    def _copy(self) -> None:
        self.words.copy_(self._host, non_blocking=True)


def edit_words(edits: Seq[LogitEdits | None]) -> int:
    """Returns the room that edits take in a batch, in 8-byte words."""
    return sum(NUM_EDIT_FIELDS + sum(map(len, _lists(e))) for e in edits if e is not None)


def _lists(e: LogitEdits) -> tuple[array[int] | array[float], ...]:
    return e.bias_ids, e.biases, e.end_ids, e.word_starts, e.word_tokens, e.recent, e.counted_ids, e.counts


def _packed_edits(e: LogitEdits, at: int) -> bytes:
    starts, end = array("q"), at + NUM_EDIT_FIELDS
    for values in _lists(e):
        starts.append(end)
        end += len(values)
    reals = array("d", [e.repetition, e.presence, e.frequency])
    return b"".join(part.tobytes() for part in (starts, array("q", [e.ends_banned]), reals, *_lists(e)))


def device_words(values: Seq[int], reals: Seq[float], device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns integers (int64) and doubles on the device, copied at once."""
    host = torch.frombuffer(bytearray(array("q", values) + array("q", array("d", reals).tobytes())), dtype=torch.int64)
    words = host.to(device)
    return words[: len(values)], words[len(values) :].view(torch.float64)

"""Edits single logits as requests ask: one program per row and kind of edit, whose writes do not meet.

The kinds are launches of their own because they follow one another on the same logits.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from specdec.kernels.triton.layout import (
    BIAS_IDS,
    BIASES,
    COUNTED_IDS,
    COUNTS,
    EDITS,
    END_IDS,
    ENDS_BANNED,
    FREQUENCY,
    PRESENCE,
    RECENT,
    REPETITION,
    WORD_STARTS,
    WORD_TOKENS,
)
from specdec.kernels.triton.slots import UNFUSED, Slots, draft_at, field, locate

LANES = 256


def edit_(logits: Tensor, slots: Slots) -> None:
    """Edits every active row in place, see `Operations.edit_`. logits: [R, V] fp32, contiguous."""
    assert logits.is_contiguous()
    grid, vocab_size = (slots.size * slots.steps,), logits.shape[-1]
    _add_biases[grid](logits, slots, vocab_size, LANES=LANES, **UNFUSED)
    _ban[grid](logits, slots, vocab_size, LANES=LANES, **UNFUSED)
    drafts = triton.next_power_of_2(max(1, slots.num_drafts))
    _penalise[grid](logits, slots, vocab_size, LANES=LANES, DRAFTS=drafts, **UNFUSED)


@triton.jit
def _open(slots, slot, vocab_size):
    """Returns sequence, step, offset of the row, and where its edits begin, 0 if it has none."""
    b, i, row = locate(slots, slot)
    return b, i, row * vocab_size, tl.where(row < 0, 0, field(slots, EDITS, b))


@triton.jit
def _span(slots, edits, name: tl.constexpr):
    """Returns where one of the lists begins, and its length."""
    start = tl.load(slots.words + edits + name)
    return start, tl.load(slots.words + edits + name + 1) - start


@triton.jit
def _single(slots, edits, name: tl.constexpr):
    return tl.load(slots.words + edits + name).to(tl.float64, bitcast=True).to(tl.float32)


@triton.jit
def _add_biases(logits, slots, vocab_size, LANES: tl.constexpr):
    _, _, row, edits = _open(slots, tl.program_id(0), vocab_size)
    if edits == 0:
        return
    at, num = _span(slots, edits, BIAS_IDS)
    biases = tl.load(slots.words + edits + BIASES)
    for first in range(0, num, LANES):
        lanes = first + tl.arange(0, LANES)
        mask = lanes < num
        ids = tl.load(slots.words + at + lanes, mask=mask, other=0)
        bias = tl.load(slots.words + biases + lanes, mask=mask, other=0).to(tl.float64, bitcast=True).to(tl.float32)
        x = tl.load(logits + row + ids, mask=mask)
        tl.store(logits + row + ids, x + bias, mask=mask)


@triton.jit
def _ban(logits, slots, vocab_size, LANES: tl.constexpr):
    b, i, row, edits = _open(slots, tl.program_id(0), vocab_size)
    if edits == 0:
        return
    at, num = _span(slots, edits, END_IDS)
    num = tl.where(i < tl.load(slots.words + edits + ENDS_BANNED), num, 0)
    for first in range(0, num, LANES):
        lanes = first + tl.arange(0, LANES)
        ids = tl.load(slots.words + at + lanes, mask=lanes < num, other=0)
        tl.store(logits + row + ids, -float("inf"), mask=lanes < num)
    starts, num_words = _span(slots, edits, WORD_STARTS)
    tokens = tl.load(slots.words + edits + WORD_TOKENS)
    recent, num_recent = _span(slots, edits, RECENT)
    before = num_recent + i  # the tokens that are known before the row
    for first in range(0, num_words - 1, LANES):
        words = first + tl.arange(0, LANES)
        mask = words < num_words - 1
        start = tl.load(slots.words + starts + words, mask=mask, other=0)
        others = tl.load(slots.words + starts + words + 1, mask=mask, other=1) - start - 1
        banned = mask & (others <= before)
        for back in range(1, tl.max(others, 0) + 1):  # against the last token, the last but one, ...
            compared = banned & (back <= others)
            expected = tl.load(slots.words + tokens + start + others - back, mask=compared, other=0)
            place = before - back
            committed = tl.load(slots.words + recent + place, mask=(place >= 0) & (place < num_recent), other=-1)
            found = tl.where(place < num_recent, committed, draft_at(slots, b, place - num_recent))
            banned = banned & (~compared | (expected == found))
        last = tl.load(slots.words + tokens + start + others, mask=banned, other=0)
        tl.store(logits + row + last, -float("inf"), mask=banned)


@triton.jit
def _penalised(x, number, slots, edits):
    """Returns the penalised logits of tokens that occur `number` times in the output; 0: in the prompt only."""
    repetition = _single(slots, edits, REPETITION)
    x = tl.where(x > 0, tl.div_rn(x, x * 0 + repetition), x * repetition)
    x = x - _single(slots, edits, PRESENCE) * tl.minimum(number, 1).to(tl.float32)
    return x - _single(slots, edits, FREQUENCY) * number.to(tl.float32)


@triton.jit
def _penalise(logits, slots, vocab_size, LANES: tl.constexpr, DRAFTS: tl.constexpr):
    b, i, row, edits = _open(slots, tl.program_id(0), vocab_size)
    if edits == 0:
        return
    at, num = _span(slots, edits, COUNTED_IDS)
    if num == 0:
        return
    counts = tl.load(slots.words + edits + COUNTS)
    steps = tl.arange(0, DRAFTS)
    drafts = tl.load(slots.drafts + b * slots.num_drafts + steps, mask=steps < i, other=-1)
    counted = tl.full((DRAFTS,), 0, tl.int32)  # whether a draft is one of counted_ids
    for first in range(0, num, LANES):
        lanes = first + tl.arange(0, LANES)
        mask = lanes < num
        ids = tl.load(slots.words + at + lanes, mask=mask, other=-2)
        same = (ids[:, None] == drafts[None, :]).to(tl.int32)
        counted = tl.maximum(counted, tl.max(same, 0))
        number = tl.load(slots.words + counts + lanes, mask=mask, other=0) + tl.sum(same, 1)
        x = tl.load(logits + row + ids, mask=mask, other=0.0)
        tl.store(logits + row + ids, _penalised(x, number, slots, edits), mask=mask)
    same = (drafts[:, None] == drafts[None, :]).to(tl.int32)
    repeats = tl.max(tl.where(steps[None, :] < steps[:, None], same, 0), 1)
    mask = (drafts >= 0) & (counted == 0) & (repeats == 0)
    x = tl.load(logits + row + drafts, mask=mask, other=0.0)
    tl.store(logits + row + drafts, _penalised(x, tl.sum(same, 1), slots, edits), mask=mask)

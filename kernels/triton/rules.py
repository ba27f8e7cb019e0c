"""The verification rules of `specdec.kernels.rules` on the device: one program per sequence, which loops over its
drafts."""

from __future__ import annotations

import triton
import triton.language as tl

from specdec.kernels import decisions
from specdec.kernels.philox import Stream
from specdec.kernels.triton.layout import LAST, POSITION, PROB_ROW, ROW, RULE, SEED
from specdec.kernels.triton.noise import uniform
from specdec.kernels.triton.residual import EXCLUDED, P_ROW, PLACE, Q_ROW
from specdec.kernels.triton.slots import draft_at, field, load_tiles

EXACT_MATCH = tl.constexpr(decisions.EXACT_MATCH)
BLOCK = tl.constexpr(decisions.BLOCK_VERIFICATION)
ACCEPT = tl.constexpr(int(Stream.ACCEPT))
RESIDUAL = tl.constexpr(int(Stream.RESIDUAL))


@triton.jit
def _at_most_one(x):
    """Returns min(x, 1), and NaN for NaN, which passes no test."""
    return tl.where(x > 1, 1.0, x)


@triton.jit
def _num_drafts(slots, b):
    """Returns how many drafts a sequence has before the first place without one."""
    last = field(slots, LAST, b)
    num = last * 0
    for i in range(slots.num_drafts):
        num += ((num == i) & (i < last) & (draft_at(slots, b, i) >= 0)).to(tl.int64)
    return num


@triton.jit
def _describe(laws, num_laws, n, needed, p_row, q_row, excluded, place):
    tl.store(laws + P_ROW * num_laws + n, tl.where(needed, p_row, -1))
    tl.store(laws + Q_ROW * num_laws + n, q_row)
    tl.store(laws + EXCLUDED * num_laws + n, excluded)
    tl.store(laws + PLACE * num_laws + n, place)


@triton.jit
def _law_after(slots, b, i, num_drafts, num_steps):
    """Returns the row of q and the excluded token of the residual distribution after i accepted drafts."""
    prob_row = field(slots, PROB_ROW, b)
    more = i < num_drafts
    q_row = tl.where(more & (prob_row >= 0), prob_row * num_steps + i, -1)
    excluded = tl.where(more & (prob_row < 0), draft_at(slots, b, i), -1)
    return q_row, excluded


@triton.jit
def reach(probs, draft_probs, slots, vocab_size, num_steps, ratios, reached, laws, scales):
    """Computes what the thresholds of the rejection rules are made of.

    ratios: [B, K], filled with p / q of the drafts.
    reached: [B, K + 1], filled with r_0..r_k of block verification (see `specdec.kernels.rules`), else with 1.
    laws, scales: [4, B K] and [B K], filled with the residual distributions whose mass block verification needs: those
        after the first, second, ..., last but one draft.
    """
    b = tl.program_id(0)
    rule, row, prob_row = field(slots, RULE, b), field(slots, ROW, b), field(slots, PROB_ROW, b)
    num_drafts = tl.where(rule == EXACT_MATCH, 0, _num_drafts(slots, b))
    r = tl.full((), 1.0, tl.float64)
    tl.store(reached + b * (slots.num_drafts + 1), r)
    for i in range(slots.num_drafts):
        inside = i < num_drafts
        n = b * slots.num_drafts + i
        q_row, excluded = _law_after(slots, b, i, num_drafts, num_steps)
        needed = inside & (rule == BLOCK) & (i > 0) & (r != 1)
        _describe(laws, slots.size * slots.num_drafts, n, needed, row + i, q_row, excluded, 0)
        tl.store(scales + n, r)
        draft = draft_at(slots, b, i)
        p = tl.load(probs + (row + i) * vocab_size + draft, mask=inside, other=1.0).to(tl.float64)
        q_at = draft_probs + (prob_row * num_steps + i) * vocab_size + draft
        q = tl.load(q_at, mask=inside & (prob_row >= 0), other=1.0).to(tl.float64)
        ratio = p / q
        r = tl.where(rule == BLOCK, _at_most_one(r * ratio), 1.0)
        tl.store(ratios + n, ratio)
        tl.store(reached + b * (slots.num_drafts + 1) + i + 1, r)


@triton.jit
def accept(
    slots, choices, ratios, reached, masses, num_tiles, num_steps, num_accepted, token_ids, laws, scales, uniforms,
    TILES: tl.constexpr,
):  # fmt: skip
    """Decides how many drafts stay.

    choices: [B (K + 1)], the target's own, for exact match.
    ratios, reached: from `reach`. masses: [B K, num_tiles], sums of the residual distributions that `reach` described.
    num_accepted: [B], filled.
    token_ids: [B, K + 1], filled with what is emitted, but for the last token of the rejection rules.
    laws, scales, uniforms: [4, B], [B], [B], filled with how to draw that token.
    """
    b = tl.program_id(0)
    rule, seed, start = field(slots, RULE, b), field(slots, SEED, b), field(slots, POSITION, b)
    num_drafts = _num_drafts(slots, b)
    accepted = num_drafts * 0
    for i in range(slots.num_drafts):
        n = b * slots.num_drafts + i
        inside = i < num_drafts
        r = tl.load(reached + b * (slots.num_drafts + 1) + i + 1)
        inner = (rule == BLOCK) & (i + 1 < num_drafts) & (r != 1)
        mass = tl.sum(load_tiles(masses, tl.where(inner, n + 1, 0), num_tiles, 0.0, TILES), 0)
        ratio = tl.where(rule == BLOCK, r, _at_most_one(tl.load(ratios + n)))
        threshold = tl.where(inner, mass / (mass + 1 - r), ratio)
        passed = uniform(seed, start * 0 + ACCEPT, start + i, start) < threshold
        chosen = tl.load(choices + b * (slots.num_drafts + 1) + i) == draft_at(slots, b, i)
        passed = inside & tl.where(rule == EXACT_MATCH, chosen, passed)
        # Block verification accepts up to the last draft that passes, the others up to the first that does not.
        accepted = tl.where(passed & ((rule == BLOCK) | (accepted == i)), i + 1, accepted)
    active = field(slots, LAST, b) >= 0
    drawn = active & (rule != EXACT_MATCH)
    tl.store(num_accepted + b, accepted)
    place = b * (slots.num_drafts + 1)
    choice = tl.where(active & ~drawn, tl.load(choices + place + accepted), -1)
    for i in range(slots.num_drafts + 1):
        last = tl.where(i == accepted, choice, -1)
        tl.store(token_ids + place + i, tl.where(i < accepted, draft_at(slots, b, tl.minimum(i, accepted - 1)), last))
    q_row, excluded = _law_after(slots, b, accepted, num_drafts, num_steps)
    _describe(laws, slots.size, b, drawn, field(slots, ROW, b) + accepted, q_row, excluded, place + accepted)
    tl.store(scales + b, tl.load(reached + place + accepted))
    tl.store(uniforms + b, uniform(seed, start * 0 + RESIDUAL, start + accepted, start))

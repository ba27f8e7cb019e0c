"""The target's exact distribution, computed once more: plain forwards, and the transforms of SamplingParams in fp64,
written from their definitions and not with the engine's."""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq
from typing import cast

import torch
from torch import Tensor

from specdec import Engine, SamplingParams
from specdec.cache.pages import allocate_kv_cache
from specdec.step.batch import Extend, build_batch

ROUNDING = 64 * torch.finfo(torch.float32).eps  # relative: two correct computations of a probability may differ so much


def edited_logits(logits: Tensor, prompt: Seq[int], output: Tensor, params: SamplingParams) -> Tensor:
    """Returns logits [R, V] with bias, bans and penalties, divided by the temperature.

    logits: [R, V] fp64, of the tokens after prompt and output.
    prompt: [n], the same for all rows.
    output: [R, d], the tokens after it.
    params: bad_words are token ids here; only stop_token_ids end a request.
    """
    rows, vocab_size = logits.shape
    z = logits.clone()
    for token, bias in params.biases:
        z[:, token] += bias
    context = torch.cat([torch.tensor(prompt).expand(rows, -1), output], 1)
    for *start, last in cast(tuple[tuple[int, ...], ...], params.banned_words):
        if len(start) <= context.shape[1]:
            before = context[:, context.shape[1] - len(start) :]
            z[(before == torch.tensor(start, dtype=torch.int64)).all(1), last] = -math.inf
    if output.shape[1] < params.min_tokens:
        z[:, list(params.stop_token_ids)] = -math.inf
    if params.repetition_penalty != 1:
        seen = torch.zeros(rows, vocab_size, dtype=torch.bool).scatter_(1, context, True)
        r = params.repetition_penalty
        z = torch.where(seen, torch.where(z > 0, z / r, z * r), z)
    if params.presence_penalty != 0 or params.frequency_penalty != 0:
        ones = torch.ones_like(output, dtype=z.dtype)
        counts = torch.zeros(rows, vocab_size, dtype=z.dtype).scatter_add_(1, output, ones)
        z = z - params.presence_penalty * (counts > 0) - params.frequency_penalty * counts
    return z / params.temperature if params.temperature > 0 else z


def truncated_probs(z: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """Returns probabilities [R, V] after top_k, top_p and min_p, and whether rounding could have cut at another token,
    [R] bool. z: [R, V], logits from `edited_logits`."""
    rounded = torch.zeros(len(z), dtype=torch.bool)
    if 0 < params.top_k < z.shape[1]:
        largest = z.topk(params.top_k + 1).values
        kth, next_ = largest[:, -2:].unbind(1)
        rounded |= (kth - next_ <= ROUNDING * largest[:, 0].abs().clamp(min=1)) & next_.isfinite()
        z = z.masked_fill(z < kth[:, None], -math.inf)
    p = z.softmax(1)
    if params.top_p < 1:
        ordered, ids = p.sort(dim=1, descending=True, stable=True)
        before = ordered.cumsum(1) - ordered
        kept = before < params.top_p
        rounded |= (((before - params.top_p).abs() <= ROUNDING) & (ordered > 0)).any(1)
        last = kept.sum(1, keepdim=True)
        at_cut = ordered.gather(1, torch.cat([last - 1, last.clamp(max=z.shape[1] - 1)], 1))
        rounded |= (at_cut[:, 0] - at_cut[:, 1] <= ROUNDING * at_cut[:, 0]) & (last[:, 0] < z.shape[1])
        z = z.masked_fill(~torch.zeros_like(kept).scatter(1, ids, kept), -math.inf)
        p = z.softmax(1)
    if params.min_p > 0:
        limit = params.min_p * p.amax(1, keepdim=True)
        rounded |= ((p - limit).abs() <= ROUNDING * limit).any(1) & (params.min_p < 1)
        p = z.masked_fill(p < limit, -math.inf).softmax(1)
    return p, rounded


class PlainTarget:
    """The target alone: plain forwards into a cache of its own, with pages of one token, so that contexts share the
    pages of what they have in common."""

    def __init__(self, engine: Engine, num_pages: int) -> None:
        self.model, cache = engine.runtime.model.target, engine.runtime.kv_cache
        config = self.model.config
        self.cache = allocate_kv_cache(config, config.num_hidden_layers, num_pages, 1, cache.dtype, cache.device)

    @torch.inference_mode()
    def logits(self, extends: Seq[Extend]) -> Tensor:
        """Returns the logits after the last token of each extend, [B, V] fp64."""
        batch = build_batch(extends, 1)
        hidden = self.model(batch.input_ids, batch.metadata, self.cache)
        last = [start + n - 1 for start, n in zip(batch.row_starts, batch.metadata.query_lens)]
        return self.model.compute_logits(hidden[last]).double().cpu()

    def logits_after(self, token_ids: list[int]) -> Tensor:
        """Returns the logits after a text, [1, V] fp64; overwrites the first pages."""
        return self.logits([Extend(token_ids, 0, list(range(len(token_ids))))])

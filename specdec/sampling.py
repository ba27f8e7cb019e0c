"""Logits + SamplingParams -> probabilities, and probabilities + uniforms -> tokens.

One transform serves target rows and draft rows. Order, as in transformers: temperature, top-k,
top-p, min-p. Everything here works in the dtype it is given.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from specdec.config import SamplingParams
from specdec.kernels.reference import lowest_argmax

greedy_tokens = lowest_argmax


def transform_logits(logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """logits [R, V], one SamplingParams per row, none greedy -> probs [R, V]."""
    probs = torch.empty_like(logits)
    for row, (values, p) in enumerate(zip(logits, params, strict=True)):
        probs[row] = _transform_row(values, p)
    return probs


def _transform_row(logits: Tensor, params: SamplingParams) -> Tensor:  # [V] -> [V]
    logits = logits / params.temperature
    if 0 < params.top_k < logits.shape[0]:
        kth = logits.topk(params.top_k).values[-1]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    if params.top_p < 1:
        logits = _keep_top_p(logits, params.top_p)
    if params.min_p > 0:
        probs = logits.softmax(-1)
        logits = logits.masked_fill(probs < params.min_p * probs.max(), float("-inf"))
    return logits.softmax(-1)


def _keep_top_p(logits: Tensor, top_p: float) -> Tensor:
    """Keeps the smallest set of most probable tokens whose probability reaches top_p, at least one."""
    ordered, ids = logits.sort(descending=True, stable=True)
    before = ordered.softmax(-1).cumsum(-1).roll(1)
    before[0] = 0
    dropped = torch.empty_like(ids, dtype=torch.bool).scatter(0, ids, before >= top_p)
    return logits.masked_fill(dropped, float("-inf"))


def sample(probs: Tensor, uniforms: Tensor) -> Tensor:
    """probs [R, V] (rows need not sum to 1), uniforms [R] in [0, 1) -> token ids [R] by inverse CDF in fp64.

    A token of probability 0 is never returned: u <= 1 - 2**-53 keeps u * total below the total, so some step
    of the CDF lies above it.
    """
    cdf = probs.double().cumsum(-1)
    targets = uniforms.to(cdf).unsqueeze(-1) * cdf[:, -1:]
    return torch.searchsorted(cdf, targets, right=True).squeeze(-1)

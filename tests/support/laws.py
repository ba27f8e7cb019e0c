"""The law of the next token by the definitions in SamplingParams, one token at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from specdec import SamplingParams
from support.enumeration import Context, RandomModel

PLAIN = SamplingParams(ignore_eos=True)
# Fields that change the law, with values that matter on a vocabulary of 4; prompts are [1].
LAW_FIELDS = {
    "temperature": {"temperature": 0.6},
    "top_k": {"top_k": 2},
    "top_p": {"top_p": 0.7},
    "min_p": {"min_p": 0.3},
    "repetition_penalty": {"repetition_penalty": 1.7},
    "presence_penalty": {"presence_penalty": 1.1},
    "frequency_penalty": {"frequency_penalty": -0.8},
    "logit_bias": {"logit_bias": {0: -0.7, 2: 1.5, 3: float("-inf")}},
    "bad_words": {"bad_words": ((2,), (1, 3), (0, 1, 0))},
    "min_tokens": {"min_tokens": 3, "ignore_eos": False, "stop_token_ids": (2,)},
}  # fmt: skip
EVERYTHING = {
    "temperature": 1.3, "top_k": 3, "top_p": 0.93, "min_p": 0.05, "repetition_penalty": 1.2, "presence_penalty": 0.4,
    "frequency_penalty": 0.3, "logit_bias": {1: 0.5}, "bad_words": ((0, 0),), "min_tokens": 2, "ignore_eos": False,
}  # fmt: skip


def defined_law(model: RandomModel, params: SamplingParams, prompt: list[int]) -> Callable[[Context], Tensor]:
    """The next token's law by the definitions, one token at a time."""

    def law(context: Context) -> Tensor:
        logits, output = model.logits(context).tolist(), context[len(prompt) :]
        size, ends = len(logits), {0} - ({0} if params.ignore_eos else set()) | set(params.stop_token_ids)
        if output and output[-1] in ends:
            return torch.zeros(size, dtype=torch.float64)  # the request has ended
        for token, bias in dict(params.logit_bias).items():
            logits[token] += bias
        for *start, last in params.bad_words:
            if list(context[len(context) - len(start) :]) == start:
                logits[last] = float("-inf")
        if len(output) < params.min_tokens:
            for token in ends:
                logits[token] = float("-inf")
        for token in set(context):
            logits[token] *= params.repetition_penalty if logits[token] < 0 else 1 / params.repetition_penalty
        for token in set(output):
            logits[token] -= params.presence_penalty + params.frequency_penalty * output.count(token)
        logits = [x / params.temperature for x in logits]
        if 0 < params.top_k < size:
            kth = sorted(logits)[-params.top_k]
            logits = [x if x >= kth else float("-inf") for x in logits]
        probs = torch.tensor(logits, dtype=torch.float64).softmax(-1)
        kept, total = torch.zeros(size, dtype=torch.float64), 0.0
        for token in sorted(range(size), key=lambda t: -probs[t].item()):
            if total < params.top_p:
                kept[token] = probs[token]
            total += probs[token].item()
        kept[kept < params.min_p * kept.max()] = 0
        return kept / kept.sum()

    return law


def law_by_transformers(
    p: SamplingParams, ends: frozenset[int], prompt_len: int, tokens: list[int], logits: Tensor
) -> Tensor:
    """The same by transformers' processors, which have no presence and frequency penalty."""
    import transformers as t

    steps: list[Callable[[Tensor, Tensor], Tensor]] = []
    if p.biases:
        steps.append(t.SequenceBiasLogitsProcessor({(token,): bias for token, bias in p.biases}))
    if p.bad_words:
        steps.append(t.NoBadWordsLogitsProcessor([list(word) for word in p.bad_words], eos_token_id=None))
    if p.min_tokens and ends:
        steps.append(t.MinNewTokensLengthLogitsProcessor(prompt_len, p.min_tokens, sorted(ends), device="cpu"))
    if p.repetition_penalty != 1:
        steps.append(t.RepetitionPenaltyLogitsProcessor(p.repetition_penalty))
    steps.append(t.TemperatureLogitsWarper(p.temperature))
    if p.top_k:
        steps.append(t.TopKLogitsWarper(p.top_k))
    if p.top_p < 1:
        steps.append(t.TopPLogitsWarper(p.top_p))
    if p.min_p:
        steps.append(t.MinPLogitsWarper(p.min_p))
    scores = logits[None]
    for step in steps:
        scores = step(torch.tensor([tokens]), scores)
    return scores[0].softmax(-1)

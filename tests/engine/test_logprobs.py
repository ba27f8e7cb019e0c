"""Log-probabilities of tokens against their definition, ties, impossible tokens and tiny vocabularies included."""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.request.logprobs import DecidedRows, token_logprobs
from support.fakes import randn

NUM = 4


def top(logits: Tensor, num: int) -> list[tuple[int, float]]:
    law = logits.double().log_softmax(-1).tolist()
    return sorted(((v, p) for v, p in enumerate(law) if p > -torch.inf), key=lambda pair: (-pair[1], pair[0]))[:num]


def test_tokens_and_the_most_probable_ones() -> None:
    requests = []
    for seed, num_top in enumerate((0, 1, 3, 5, 20)):
        for vocab_size in (2, 7, 12):
            raw = (2 * randn(NUM + 1, vocab_size, seed=seed)).round()  # many ties
            processed = raw.masked_fill(randn(NUM + 1, vocab_size, seed=seed + 9) > 0.2, -torch.inf)
            processed[:, 1] = 1.0
            requests.append(DecidedRows([1] * NUM, raw, processed, num_top))
    found = token_logprobs([*requests, DecidedRows([], raw, processed, 3)])
    assert found.pop() == []
    for request, values in zip(requests, found, strict=True):
        assert len(values) == NUM
        for i, value in enumerate(values):
            assert value.top == top(request.raw_logits[i], request.num_top)
            assert value.processed_top == top(request.processed_logits[i], request.num_top)
            assert value.logprob == float(request.raw_logits[i].double().log_softmax(-1)[1])
            assert value.processed_logprob == float(request.processed_logits[i].double().log_softmax(-1)[1])


def test_nothing_is_asked() -> None:
    assert token_logprobs([]) == []

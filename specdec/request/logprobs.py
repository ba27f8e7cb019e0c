"""Log-probabilities of output tokens, raw and processed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from specdec.model.tokenizer import Tokenizer


@dataclass(frozen=True)
class TokenLogprobs:
    """One output token's log-probabilities (natural logarithms), and those of the most probable tokens in its place.

    Texts are those of single tokens: U+FFFD where a token's bytes are no whole character.
    """

    token_id: int
    """The token."""
    logprob: float
    """Log-probability of the token by the model's own softmax, before anything that the request's parameters do."""
    processed_logprob: float
    """Log-probability of the token by the distribution it was drawn from, after bias, bans, penalties, temperature and
    truncation; at temperature 0 by the softmax of the logits whose argmax it is."""
    top: list[tuple[int, float]]
    """Token ids and log-probabilities of the most probable tokens by the model's own softmax, in descending order, as
    many as SamplingParams.logprobs."""
    processed_top: list[tuple[int, float]]
    """Token ids and log-probabilities of the most probable tokens by the distribution that the token was drawn from;
    impossible tokens are left out."""
    token: str = ""
    """The token's text."""
    bytes: list[int] | None = None
    """The token's bytes in UTF-8; None where they are part of a character and the tokenizer does not tell which."""
    top_tokens: list[str] = field(default_factory=list)
    """The texts of the tokens in `top`."""
    processed_top_tokens: list[str] = field(default_factory=list)
    """The texts of the tokens in `processed_top`."""

    def with_texts(self, tokenizer: Tokenizer) -> TokenLogprobs:
        """Returns a copy that has the texts of its tokens."""
        token, token_bytes = tokenizer.token_text(self.token_id)
        return replace(
            self,
            token=token,
            bytes=token_bytes,
            top_tokens=[tokenizer.token_text(token_id).text for token_id, _ in self.top],
            processed_top_tokens=[tokenizer.token_text(token_id).text for token_id, _ in self.processed_top],
        )

    def as_dict(self) -> dict[str, object]:
        """Returns a document for JSON, see docs/json.md."""
        return {
            "token_id": self.token_id,
            "token": self.token,
            "bytes": self.bytes,
            "logprob": self.logprob,
            "processed_logprob": self.processed_logprob,
            "top": [list(pair) for pair in self.top],
            "top_tokens": self.top_tokens,
            "processed_top": [list(pair) for pair in self.processed_top],
            "processed_top_tokens": self.processed_top_tokens,
        }


class DecidedRows(NamedTuple):
    """A request's tokens and the rows of logits that decided them."""

    token_ids: list[int]
    """[n]: the tokens."""
    raw_logits: Tensor
    """[n or more, V]: logits as the model gives them."""
    processed_logits: Tensor
    """[n or more, V]: logits after the request's own transform, the temperature included."""
    num_top: int
    """How many of the most probable tokens are wanted."""


def token_logprobs(requests: Seq[DecidedRows]) -> list[list[TokenLogprobs]]:
    """Returns the log-probabilities of each request's tokens. What is computed on a device is read once, for all."""
    computed = [
        _numbers(law, token_id, request.num_top)
        for request in requests
        for token_id, *laws in zip(request.token_ids, request.raw_logits, request.processed_logits)
        for law in laws
    ]
    numbers = iter(torch.cat(computed).tolist()) if computed else iter([])
    return [[_read(numbers, token_id, r.num_top, r.raw_logits.shape[-1]) for token_id in r.token_ids] for r in requests]


def _numbers(logits: Tensor, token_id: int, num_top: int) -> Tensor:
    """Returns the numbers of one row that `_read_law` takes: the token's log-probability, the largest ones in any
    order, their ids, and the lowest ids of those that equal the least of them, negative. logits: [V]."""
    law = logits.double().log_softmax(-1)  # a row at a time: sums over several may differ in the last bit
    parts = [law[token_id : token_id + 1]]
    if num_top > 0:
        num = min(num_top, len(law))
        largest, ids = law.topk(num)
        lowest = -torch.arange(len(law), dtype=law.dtype, device=law.device)
        tied = torch.where(law == largest[-1], lowest, -len(law)).topk(num).values
        parts += [largest, ids.double(), tied]
    return torch.cat(parts)


def _read(numbers: Iterator[float], token_id: int, num_top: int, vocab_size: int) -> TokenLogprobs:
    num = min(num_top, vocab_size)
    (logprob, top), (processed_logprob, processed_top) = (_read_law(numbers, num, vocab_size) for _ in range(2))
    return TokenLogprobs(token_id, logprob, processed_logprob, top, processed_top)


def _read_law(numbers: Iterator[float], num: int, vocab_size: int) -> tuple[float, list[tuple[int, float]]]:
    """Returns a token's log-probability, and ids and log-probabilities of the most probable tokens in descending order,
    the lowest ids first among equals; impossible tokens are left out."""
    logprob = next(numbers)
    largest, ids, tied = (list(islice(numbers, num)) for _ in range(3))
    least = min(largest, default=0.0)
    above = sorted((-value, int(token)) for value, token in zip(largest, ids) if value > least)
    equal = [int(-token) for token in tied if -token < vocab_size] if least > -math.inf else []
    return logprob, ([(token, -value) for value, token in above] + [(token, least) for token in equal])[:num]

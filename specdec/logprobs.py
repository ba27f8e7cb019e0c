"""Log-probabilities of output tokens, raw and processed."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class TokenLogprobs:
    """One output token's natural log-probabilities.

    logprob: of the model's own softmax, before anything of the request's. processed_logprob: of the law the token
    was drawn from, after bias, bans, penalties, temperature and truncation; at temperature 0 of the softmax of the
    logits whose argmax it is. top, processed_top: (token id, log-probability) of the most probable tokens of either,
    as many as SamplingParams.logprobs, in descending order.
    """

    token_id: int
    logprob: float
    processed_logprob: float
    top: list[tuple[int, float]]
    processed_top: list[tuple[int, float]]

    def as_dict(self) -> dict[str, object]:
        return {
            "token_id": self.token_id,
            "logprob": self.logprob,
            "processed_logprob": self.processed_logprob,
            "top": self.top,
            "processed_top": self.processed_top,
        }


def token_logprobs(
    token_ids: Seq[int], raw_logits: Tensor, processed_logits: Tensor, num_top: int
) -> list[TokenLogprobs]:
    """token_ids [n] and the rows [n or more, V] that decided them, processed ones with the temperature in them."""
    result = []
    for token_id, raw, processed in zip(token_ids, raw_logits, processed_logits):
        # A row at a time: torch's sums over several rows may differ from those over one in the last bit.
        law, processed_law = raw.double().log_softmax(-1), processed.double().log_softmax(-1)
        result.append(
            TokenLogprobs(
                token_id=token_id,
                logprob=float(law[token_id]),
                processed_logprob=float(processed_law[token_id]),
                top=_top(law, num_top),
                processed_top=_top(processed_law, num_top),
            )
        )
    return result


def _top(law: Tensor, num: int) -> list[tuple[int, float]]:
    """The lowest ids first among equals; impossible tokens are left out."""
    if num == 0:
        return []
    kth = law.topk(min(num, len(law))).values[-1]
    ids = ((law >= kth) & (law > float("-inf"))).nonzero().squeeze(-1)
    ids = ids[law[ids].sort(descending=True, stable=True).indices[:num]]
    return list(zip(ids.tolist(), law[ids].tolist()))

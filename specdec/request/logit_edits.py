"""Keeps up, with a request's tokens, what its parameters do to single logits.

`specdec.kernels.decisions.LogitEdits` says what is done to a row, drafts before it included: the transform is the same
function of the context whether drafts led there or not.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence as Seq
from itertools import accumulate

from specdec.config import MAX_COUNT, SamplingParams
from specdec.kernels.decisions import LogitEdits


class RequestEdits:
    """A request's `LogitEdits`, kept up with its committed tokens."""

    @classmethod
    def of(
        cls,
        params: SamplingParams,
        bad_words: Seq[tuple[int, ...]],
        end_token_ids: frozenset[int],
        prompt_token_ids: Seq[int],
    ) -> RequestEdits | None:
        """Returns a request's edits; None where its parameters ask for none.

        params: the request's.
        bad_words: its bad words as token ids.
        end_token_ids: the tokens that end it.
        prompt_token_ids: its prompt.
        """
        if not (params.biases or bad_words or params.min_tokens or params.penalises):
            return None
        return cls(params, bad_words, end_token_ids, prompt_token_ids)

    def __init__(
        self,
        params: SamplingParams,
        bad_words: Seq[tuple[int, ...]],
        end_token_ids: frozenset[int],
        prompt_token_ids: Seq[int],
    ) -> None:
        self._num_recent = max(map(len, bad_words), default=1) - 1
        self._places: dict[int, int] = {}
        self._penalises = params.penalises
        self._edits = LogitEdits(
            bias_ids=array("q", [token for token, _ in params.biases]),
            biases=array("d", [bias for _, bias in params.biases]),
            end_ids=array("q", sorted(end_token_ids)),
            ends_banned=min(params.min_tokens, MAX_COUNT),
            word_starts=array("q", accumulate(map(len, bad_words), initial=0)),
            word_tokens=array("q", [token for word in bad_words for token in word]),
            repetition=params.repetition_penalty,
            presence=params.presence_penalty,
            frequency=params.frequency_penalty,
        )
        for token_id in prompt_token_ids:
            self._count(token_id, 0)
        self._remember(prompt_token_ids)

    @property
    def current(self) -> LogitEdits | None:
        """Edits of the row that decides the next token; None where there is nothing to do."""
        e = self._edits
        return e if e.ends_banned or e.bias_ids or e.word_tokens or e.counted_ids else None

    def advance(self, token_id: int) -> None:
        """Takes a token into account that was committed."""
        self._count(token_id, 1)
        self._remember([token_id])
        self._edits.ends_banned = max(0, self._edits.ends_banned - 1)

    def _count(self, token_id: int, occurrences: int) -> None:
        if not self._penalises:
            return
        e = self._edits
        place = self._places.setdefault(token_id, len(e.counted_ids))
        if place == len(e.counted_ids):
            e.counted_ids.append(token_id)
            e.counts.append(0)
        e.counts[place] += occurrences

    def _remember(self, token_ids: Seq[int]) -> None:
        if self._num_recent:
            self._edits.recent = array("q", [*self._edits.recent, *token_ids][-self._num_recent :])

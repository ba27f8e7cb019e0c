"""Drafters of one's own: what an engine asks of one (`Drafter`), and the stage that runs it.

    engine = Engine.from_pretrained("bundled", drafter=NgramDrafter())

`examples/own_drafter.py` is a whole one. Every draft is verified, so the output stays the target's, whatever is
drafted; only how many tokens a step yields depends on it.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from operator import index
from typing import Any, Protocol, TypeGuard

from specdec.errors import DrafterError, RowsError
from specdec.kernels.decisions import Drafts
from specdec.step.scheduler import ScheduledSequence


@dataclass(frozen=True, slots=True)
class DraftRequest:
    """One request that may draft in this step."""

    request_id: str
    """The same in every step of the request."""
    token_ids: Seq[int]
    """Prompt and output so far. It is the engine's own list: read it, copy what you keep, never change it."""
    num_prompt_tokens: int
    """How many of `token_ids`, its first ones, are the prompt."""
    num_draft_tokens: int
    """The most tokens that may be drafted, at least 1."""


class Drafter(Protocol):
    """Proposes the tokens that may come next. Pass one to `Engine.from_pretrained(..., drafter=...)`."""

    def draft(self, requests: Seq[DraftRequest]) -> Seq[Seq[int]]:
        """Drafts tokens for every request that may draft in this step.

        requests: those that decode in this step; one that waits or computes its prompt is left out, and may come back.
        Called once per step, by the engine's thread, and not at all where nobody drafts.

        Returns one list of token ids per request, in their order: what follows `token_ids`, nearest first, at most
        `num_draft_tokens` of them; an empty one where there is nothing to guess.

        Each draft is verified as a point mass, and accepted with the probability that the target gives it. A list that
        is too long or holds what is no token id ends its request with a DrafterError; an exception from here ends all
        of `requests`, with that exception. Others go on.
        """
        ...


def is_drafter(value: object) -> TypeGuard[Drafter]:
    """Whether it is an object with a method `draft`; a class of such objects is none itself."""
    return not isinstance(value, type) and callable(getattr(value, "draft", None))


class OwnDrafts:
    """The draft stage of an engine with a drafter of its user's: asks it, and believes nothing of the answer."""

    def __init__(self, drafter: Drafter, vocab_size: int) -> None:
        self.drafter, self.vocab_size = drafter, vocab_size

    def draft(self, scheduled: Seq[ScheduledSequence]) -> Drafts:
        """Raises RowsError of the sequences whose drafts cannot be used."""
        asked = [b for b, s in enumerate(scheduled) if s.num_draft_tokens > 0]
        drafts: list[list[int]] = [[] for _ in scheduled]
        if not asked:
            return Drafts.of(drafts)
        requests = [_request(scheduled[b]) for b in asked]
        try:
            answer = list(self.drafter.draft(requests))
            if len(answer) != len(requests):
                raise DrafterError(f"{self._name} returned {len(answer)} lists of drafts for {len(requests)} requests")
        except Exception as error:
            raise RowsError(asked, error) from error
        faults: dict[int, DrafterError] = {}
        for b, request, row in zip(asked, requests, answer):
            try:
                drafts[b] = self._checked(request, row)
            except DrafterError as error:
                faults[b] = error
        if faults:
            raise RowsError(list(faults), next(iter(faults.values())))
        return Drafts.of(drafts)

    def _checked(self, request: DraftRequest, row: Any) -> list[int]:
        """The row as Python integers. Raises DrafterError."""
        try:
            token_ids = [index(token) for token in row]
        except TypeError:
            raise DrafterError(f"{self._name} drafted {row!r} for {request.request_id}: give token ids") from None
        if len(token_ids) > request.num_draft_tokens:
            raise DrafterError(
                f"{self._name} drafted {len(token_ids)} tokens for {request.request_id}: "
                f"draft at most its num_draft_tokens, {request.num_draft_tokens}"
            )
        for token in token_ids:
            if not 0 <= token < self.vocab_size:
                raise DrafterError(
                    f"{self._name} drafted token {token} for {request.request_id}: "
                    f"this model's ids are 0 <= id < {self.vocab_size}"
                )
        return token_ids

    @property
    def _name(self) -> str:
        return f"{type(self.drafter).__name__}.draft()"


def _request(scheduled: ScheduledSequence) -> DraftRequest:
    sequence = scheduled.sequence
    return DraftRequest(sequence.request_id, sequence.token_ids, sequence.num_prompt_tokens, scheduled.num_draft_tokens)

"""Prompts: conversations of one or several user turns, and sets of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest

TURN_SEPARATOR = "\n\n"  # plain text: between an answer and the turn after it


@dataclass(frozen=True)
class Prompt:
    """What a user says in one conversation. Raises ValueError where there is no turn."""

    turns: tuple[str, ...]
    """The user's turns, first to last; a plain prompt is one turn."""
    category: str
    """The category that results are grouped by."""
    source: str
    """Where the text comes from."""

    def __post_init__(self) -> None:
        if isinstance(self.turns, str) or not self.turns:
            raise ValueError(f"turns = {self.turns!r} must be a tuple of at least one text")

    @property
    def prompt(self) -> str:
        """The first turn."""
        return self.turns[0]

    def messages(self, answers: Sequence[str] = ()) -> list[dict[str, str]]:
        """Returns the prompt of turn len(answers) for a chat template: every turn before it with its answer, then the
        turn. Each message is {"role": "user" | "assistant", "content": text}.

        answers: what the model said to the turns before, first to last.

        Raises ValueError where there is no such turn.
        """
        *before, last = self._asked(answers)
        messages = []
        for turn, answer in zip(before, answers):
            messages += [{"role": "user", "content": turn}, {"role": "assistant", "content": answer}]
        return [*messages, {"role": "user", "content": last}]

    def text(self, answers: Sequence[str] = ()) -> str:
        """Returns the prompt of turn len(answers) as plain text: turn, answer, `TURN_SEPARATOR`, turn, ..., turn.

        An answer follows its turn directly, as the model wrote it: the text of one turn and its answer starts the text
        of the next. For the parameter and the errors see `messages`.
        """
        *before, last = self._asked(answers)
        return "".join(f"{turn}{answer}{TURN_SEPARATOR}" for turn, answer in zip(before, answers)) + last

    def _asked(self, answers: Sequence[str]) -> tuple[str, ...]:
        if isinstance(answers, str):
            raise ValueError(f"answers = {answers!r} must be a list of texts, one for each turn before")
        if len(answers) >= len(self.turns):
            raise ValueError(
                f"{len(answers)} answers, but {self.source} has {len(self.turns)} turns: the last needs none"
            )
        return self.turns[: len(answers) + 1]


@dataclass(frozen=True)
class PromptSet:
    """A set of prompts."""

    name: str
    """The set's name, for reports."""
    prompts: tuple[Prompt, ...]
    """The prompts, in the order of their sources."""
    num_skipped: int = 0
    """Bad lines that were left out."""

    @property
    def categories(self) -> dict[str, int]:
        """Number of prompts by category; categories in the order in which they first occur."""
        return dict(Counter(prompt.category for prompt in self.prompts))

    def take(self, num_prompts: int) -> PromptSet:
        """Returns the set's first `num_prompts`, one of each category in turn, so that they are balanced.

        Within a category the order stays. Categories differ by at most one prompt until one has no more.
        Raises ValueError unless 1 <= num_prompts <= the set's size.
        """
        if not 1 <= num_prompts <= len(self.prompts):
            raise ValueError(
                f"num_prompts = {num_prompts} must be between 1 and {len(self.prompts)}, the prompts of {self.name}"
            )
        groups: dict[str, list[Prompt]] = {category: [] for category in self.categories}
        for prompt in self.prompts:
            groups[prompt.category].append(prompt)
        interleaved = [prompt for one_of_each in zip_longest(*groups.values()) for prompt in one_of_each if prompt]
        return replace(self, prompts=tuple(interleaved[:num_prompts]))

    def up_to(self, num_prompts: int | None) -> PromptSet:
        """Returns `take` of so many prompts, or of all where the set has fewer, or for None."""
        size = len(self.prompts)
        return self.take(size if num_prompts is None else min(num_prompts, size))

    def as_dict(self) -> dict[str, object]:
        """Returns a document for JSON, without the prompts themselves."""
        return {
            "name": self.name,
            "num_prompts": len(self.prompts),
            "num_skipped": self.num_skipped,
            "categories": self.categories,
        }

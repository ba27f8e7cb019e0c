"""How often a request's tokens occur: what its penalties need."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


@dataclass
class TokenCounts:
    """The distinct tokens of prompt and output, with how often each occurs in the output."""

    ids: array[int] = field(default_factory=lambda: array("q"))
    counts: array[int] = field(default_factory=lambda: array("q"))
    _places: dict[int, int] = field(default_factory=dict)

    @classmethod
    def of_prompt(cls, token_ids: Iterable[int]) -> TokenCounts:
        counts = cls()
        for token_id in token_ids:
            counts._place(token_id)
        return counts

    def add(self, token_id: int) -> None:
        self.counts[self._place(token_id)] += 1

    def after(self, drafts: list[int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """ids [n] and counts [n], once `drafts` have followed."""
        new = [d for d in dict.fromkeys(drafts) if d not in self._places]
        ids, counts = np.array([*self.ids, *new] if new else self.ids), np.array(self.counts)
        counts = np.append(counts, np.zeros(len(new), np.int64))
        for d in drafts:
            counts[self._places[d] if d in self._places else len(self.ids) + new.index(d)] += 1
        return ids, counts

    def _place(self, token_id: int) -> int:
        place = self._places.setdefault(token_id, len(self.ids))
        if place == len(self.ids):
            self.ids.append(token_id)
            self.counts.append(0)
        return place

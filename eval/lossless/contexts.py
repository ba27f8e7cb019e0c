"""All contexts that the samples visited, as levels of a tree, and a walk over them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from specdec.eval.lossless.certificate import (
    Ints,
)
from specdec.eval.lossless.law import PlainTarget
from specdec.step.batch import Extend


@dataclass(frozen=True)
class Level:
    """The contexts (nodes) with the same number of output tokens after one prompt, in lexicographic order, and their m
    visits, sorted by node, group and next token."""

    parent: Ints
    """[nodes]: number of the context without its last token, in the level before."""
    token: Ints
    """[nodes]: the context's last token."""
    node: Ints
    """[m]: the context that is visited."""
    group: Ints
    """[m]: the group whose samples visit it."""
    next_token: Ints
    """[m]: the token that they go on with."""
    count: Ints
    """[m]: how many samples do so."""
    pooled: Ints
    """[m]: how many of them the pooled e-processes read."""

    def visits(self) -> tuple[Ints, Ints, Ints]:
        """Returns node, group and number of samples of every visited (context, group)."""
        new = (np.diff(self.node, prepend=-1) != 0) | (np.diff(self.group, prepend=-1) != 0)
        first = np.flatnonzero(new)
        return self.node[first], self.group[first], np.add.reduceat(self.count, first) if len(first) else self.count

    def only(self, kept: NDArray[np.bool_]) -> Level:
        """Returns a level of some of the contexts, renumbered. kept: [nodes]."""
        visited, number = kept[self.node], np.cumsum(kept) - 1
        visits = [v[visited] for v in (self.group, self.next_token, self.count, self.pooled)]
        return Level(self.parent[kept], self.token[kept], number[self.node[visited]], *visits)


def build_levels(
    tokens: Ints, groups: Ints, pooled: NDArray[np.bool_], num_groups: int, vocab_size: int
) -> tuple[list[Level], Ints]:
    """Returns the contexts of a prompt's outputs, level by level, and how many there are by group, [groups].

    Contexts that no group visits twice and no pooled sample visits are left out: they decide nothing.

    tokens: [n, L], the outputs, -1 after their ends.
    groups: [n], the group of each.
    pooled: [n], whether the pooled e-processes read it.
    num_groups, vocab_size: how many groups and tokens there are.
    """
    alive = np.arange(len(tokens))
    node = np.zeros(len(tokens), np.int64)  # of each sample that is alive
    parent, token, levels = np.zeros(1, np.int64), np.full(1, -1, np.int64), []
    num_contexts = np.zeros(num_groups, np.int64)
    for depth in range(tokens.shape[1]):
        going = tokens[alive, depth] >= 0
        alive, node = alive[going], node[going]
        if len(alive) == 0:
            break
        next_token = tokens[alive, depth].astype(np.int64)
        key = (node * num_groups + groups[alive]) * vocab_size + next_token
        triples, inverse, count = np.unique(key, return_inverse=True, return_counts=True)
        from_pool = np.bincount(inverse, pooled[alive], minlength=len(triples)).astype(np.int64)
        pairs = triples // vocab_size
        level = Level(parent, token, pairs // num_groups, pairs % num_groups, triples % vocab_size, count, from_pool)
        at, group, visits = level.visits()
        num_contexts += np.bincount(group, minlength=num_groups)
        kept = np.zeros(len(parent), np.bool_)
        kept[at[visits > 1]] = True
        kept[level.node[from_pool > 0]] = True
        levels.append(level.only(kept))
        going = kept[node]
        alive, node = alive[going], (np.cumsum(kept) - 1)[node[going]]
        children, node = np.unique(node * vocab_size + next_token[going], return_inverse=True)
        parent, token = children // vocab_size, children % vocab_size
    return levels, num_contexts


def visit_contexts(
    target: PlainTarget, prompt: list[int], levels: list[Level], width: int
) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """Visits every context once, up to `width` of a level at a time; yields depth d, number of the first node, logits
    [R, V] and outputs [R, d].

    It goes depth first, so that `width` pages per level are enough, whatever the number of contexts.
    """

    def walk(depth: int, low: int, high: int, first: int, tables: list[list[int]], outputs: Ints) -> Any:
        """Visits nodes low to high of a level; tables and outputs are those of their parents, from `first` on."""
        level = levels[depth]
        base = len(prompt) + (depth - 1) * width
        for start in range(low, high, width):
            stop = min(start + width, high)
            parents, tokens = level.parent[start:stop] - first, level.token[start:stop]
            ours = [[*tables[p], base + i] for i, p in enumerate(parents.tolist())]
            extends = [Extend([t], len(prompt) + depth - 1, table) for t, table in zip(tokens.tolist(), ours)]
            context = np.concatenate([outputs[parents], tokens[:, None]], 1)
            yield depth, start, target.logits(extends), torch.from_numpy(context)
            yield from descend(depth, start, stop, ours, context)

    def descend(depth: int, start: int, stop: int, tables: list[list[int]], outputs: Ints) -> Any:
        if depth + 1 < len(levels):
            low, high = np.searchsorted(levels[depth + 1].parent, [start, stop]).tolist()
            yield from walk(depth + 1, low, high, start, tables, outputs)

    pages, nothing = list(range(len(prompt))), np.zeros((1, 0), np.int64)
    yield 0, 0, target.logits([Extend(prompt, 0, pages)]), torch.from_numpy(nothing)
    yield from descend(0, 0, 1, [pages], nothing)

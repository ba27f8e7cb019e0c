"""What a request's parameters do to single logits: bias, bans and penalties, as of the tokens before each row.

A row of logits belongs to a sequence and to the drafts before it, so a penalty counts the drafts that a row presumes
accepted: the transform is the same function of the context whether drafts led there or not.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Seq
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from specdec.sequence import Sequence


class LogitRow(NamedTuple):
    """A row of logits: of the token that follows the sequence's tokens and `drafts`."""

    sequence: Sequence
    drafts: list[int]


def edit_logits_(logits: Tensor, rows: Seq[LogitRow]) -> None:
    """logits [R, V], one `LogitRow` each; in place: bias, bans, repetition, presence and frequency penalty."""
    edited = [(r, row) for r, row in enumerate(rows) if row.sequence.edits_logits]
    _add_biases(logits, edited)
    _ban(logits, edited)
    _penalise(logits, edited)


def _add_biases(logits: Tensor, rows: list[tuple[int, LogitRow]]) -> None:
    biases = [(r, token, bias) for r, row in rows for token, bias in row.sequence.params.biases]
    if biases:
        r, tokens, values = zip(*biases)
        at = _index(logits, r, tokens)
        logits[at] += torch.tensor(values, dtype=logits.dtype, device=logits.device)


def _ban(logits: Tensor, rows: list[tuple[int, LogitRow]]) -> None:
    bans = [(r, token) for r, row in rows for token in banned_tokens(row)]
    if bans:
        logits[_index(logits, *zip(*bans))] = float("-inf")


def banned_tokens(row: LogitRow) -> list[int]:
    """Ends that min_tokens forbids, and the last tokens of bad words whose others stand before the row."""
    sequence, drafts = row
    banned: list[int] = []
    if sequence.num_output_tokens + len(drafts) < sequence.params.min_tokens:
        banned += sequence.end_token_ids
    if sequence.bad_words:
        longest = max(map(len, sequence.bad_words)) - 1
        before = [*sequence.token_ids[-longest:], *drafts] if longest else []
        for *start, last in sequence.bad_words:
            if len(before) >= len(start) and before[len(before) - len(start) :] == start:
                banned.append(last)
    return banned


def _penalise(logits: Tensor, rows: list[tuple[int, LogitRow]]) -> None:
    penalised = [(r, row.sequence, row.drafts) for r, row in rows if row.sequence.counts is not None]
    if not penalised:
        return
    parts = [sequence.counts.after(drafts) for _, sequence, drafts in penalised if sequence.counts is not None]
    sizes = [len(ids) for ids, _ in parts]
    at = _index(logits, np.repeat([r for r, *_ in penalised], sizes), np.concatenate([ids for ids, _ in parts]))
    counts = torch.from_numpy(np.concatenate([counts for _, counts in parts])).to(logits)

    def spread(name: str) -> Tensor:
        values = [getattr(sequence.params, name) for _, sequence, _ in penalised]
        return torch.from_numpy(np.repeat(np.array(values, np.float64), sizes)).to(logits)

    values, repetition = logits[at], spread("repetition_penalty")
    values = torch.where(values > 0, values / repetition, values * repetition)
    values = values - spread("presence_penalty") * (counts > 0)
    logits[at] = values - spread("frequency_penalty") * counts


def _index(logits: Tensor, rows: Iterable[int], tokens: Iterable[int]) -> tuple[Tensor, Tensor]:
    r, t = (torch.from_numpy(np.asarray(x, np.int64)).to(logits.device) for x in (rows, tokens))
    return r, t

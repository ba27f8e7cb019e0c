"""Finds loops: how much of an output is one block of tokens, repeated to its end."""

from __future__ import annotations

from collections.abc import Sequence as Seq

MIN_REPEATS = 3


def final_loop(token_ids: Seq[int]) -> int:
    """Returns the number of tokens in the loop that `token_ids` ends in, 0 without one.

    A loop of period p is a run of tokens each of which equals the token p places before it in the run; it must hold its
    block of p tokens `MIN_REPEATS` times in full and may end in the middle of a block. The final loop is the longest
    such run, of any period, that reaches the last token: all of its tokens count, the first block included. Repetition
    that stops before the last token, if only for an end token, is no final loop.

    Takes O(n) time. Read backwards, the run is a prefix, whose shortest period is its length less that of its longest
    proper prefix that is a suffix of it too: the failure function of Knuth, Morris and Pratt.
    """
    backwards = list(reversed(token_ids))
    borders = [0] * len(backwards)
    longest = border = 0
    for i in range(1, len(backwards)):
        while border > 0 and backwards[i] != backwards[border]:
            border = borders[border - 1]
        if backwards[i] == backwards[border]:
            border += 1
        borders[i] = border
        period = i + 1 - border
        if i + 1 >= MIN_REPEATS * period:
            longest = i + 1
    return longest

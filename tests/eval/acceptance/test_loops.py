"""Final loops: against the definition by brute force, and by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from specdec.eval.acceptance.loops import MIN_REPEATS, final_loop


def by_definition(token_ids: list[int]) -> int:
    """The longest suffix with any period that fits into it three times: O(n^3)."""
    for length in range(len(token_ids), 0, -1):
        run = token_ids[len(token_ids) - length :]
        for period in range(1, length // MIN_REPEATS + 1):
            if run[period:] == run[:-period]:
                return length
    return 0


@given(st.lists(st.integers(0, 2), max_size=40))
def test_of_any_tokens(token_ids: list[int]) -> None:
    assert final_loop(token_ids) == by_definition(token_ids)


@given(
    start=st.lists(st.integers(0, 3), max_size=12),
    block=st.lists(st.integers(0, 3), min_size=1, max_size=8),
    num_tokens=st.integers(0, 40),
    end=st.lists(st.integers(0, 3), max_size=2),
)
def test_of_tokens_that_run_into_a_loop(start: list[int], block: list[int], num_tokens: int, end: list[int]) -> None:
    repeated = (block * num_tokens)[:num_tokens]
    found = final_loop(start + repeated + end)
    assert found == by_definition(start + repeated + end)
    if not end and num_tokens >= 3 * len(block):
        assert found >= num_tokens


@pytest.mark.parametrize(
    ("token_ids", "expected"),
    [
        ([], 0),
        ([7], 0),
        ([7, 7], 0),
        ([7, 7, 7], 3),
        ([1, 2, 1, 2, 1], 0),  # two blocks and a half
        ([1, 2, 1, 2, 1, 2], 6),
        ([9, 2, 1, 2, 1, 2, 1, 2], 7),  # a broken block counts on either side
        ([1, 2, 3, 1, 2, 3, 1, 2, 3, 1, 2], 11),
        ([1, 2, 1, 2, 1, 2, 0], 0),  # it ended
        ([1, 1, 1, 2, 1, 1, 1, 2, 1, 1, 1, 2, 1, 1, 1], 15),  # rather than the last three
        ([5, 5, 5, 5, 1, 2, 3, 3, 3], 3),
    ],
)
def test_by_hand(token_ids: list[int], expected: int) -> None:
    assert final_loop(token_ids) == expected


def test_varied_tokens_have_next_to_none_and_a_loop_is_found_in_a_long_output() -> None:
    varied = np.random.default_rng(0).integers(1000, size=100_000).tolist()
    assert final_loop(varied) == 0
    assert final_loop(varied[:50_000] + varied[50_000:60_000] * 4) == 40_000

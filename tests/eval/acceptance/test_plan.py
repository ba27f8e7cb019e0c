"""Options and the grid of cells."""

from __future__ import annotations

from typing import Any

import pytest

from specdec import SpeculationParams
from specdec.eval.acceptance.plan import AcceptanceOptions, Cell, rounds
from specdec.eval.acceptance.teacher import TeacherOptions

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"num_speculative_tokens": (0, 1)}, "num_speculative_tokens = 0 must be from 1 to 8; plain decoding is measured"),
    ({"num_speculative_tokens": (9,)}, "num_speculative_tokens = 9"),
    ({"num_speculative_tokens": ()}, "at least one value"),
    ({"num_speculative_tokens": (2, 2)}, "'2,2' must hold at least one value, and none twice"),
    ({"temperatures": (-0.1,)}, "temperatures = -0.1 must be from 1e-05 to 100, or 0"),
    ({"temperatures": (float("nan"),)}, "temperatures = nan"),
    ({"verification": ("rejection",)}, "verification: 'rejection' is unknown: choose among coupled, block, token"),
    ({"draft_sampling": ("topk",)}, "draft_sampling: 'topk' is unknown"),
    ({"prompts": ()}, "prompts must name"),
    ({"num_prompts": 0}, "num_prompts = 0"),
    ({"seed": -1}, "seed = -1"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "message"), WRONG)
@pytest.mark.parametrize("options", [AcceptanceOptions, TeacherOptions])
def test_wrong_settings_are_refused(options: Any, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        options(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch_sizes": (0,)}, "batch_sizes = 0 must be from 1 to 256$"),
        ({"batch_sizes": (8, 8)}, "none twice"),
        ({"max_tokens": 1}, "max_tokens = 1"),
        ({"repeats": 0}, "repeats = 0"),
        ({"check_contexts": -1}, "check_contexts = -1"),
    ],
)
def test_wrong_sizes_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AcceptanceOptions(**fields)


def test_every_setting_is_one_cell_beside_its_plain_one() -> None:
    options = AcceptanceOptions(draft_sampling=("sampled", "greedy"))
    cells = options.cells
    assert len(set(cells)) == len(cells) == len({c.name for c in cells}) == 2 * (5 + 2 * (1 + 4 * 3 * 2))
    for t in options.temperatures:
        for b in options.batch_sizes:
            here = [c for c in cells if (c.temperature, c.batch_size) == (t, b)]
            assert [c.num_speculative_tokens == 0 for c in here] == [True] + [False] * (len(here) - 1)
            assert all(c.plain == here[0] for c in here)
    assert [c.num_speculative_tokens for c in cells if c.temperature == 0 and c.batch_size == 1] == [0, 1, 2, 3, 5]


def test_a_cells_speculation_is_what_it_says() -> None:
    assert Cell(0.6, 1, "block", "greedy", 2).speculation == SpeculationParams(2, "block", "greedy")
    assert Cell(0.0, 1, "greedy", "greedy", 2).speculation.num_speculative_tokens == 2
    assert Cell(1.0, 1, "coupled", "sampled", 0).speculation == SpeculationParams(0, "coupled")


def test_close_temperatures_have_different_names() -> None:
    assert Cell(0.1234567, 1, "block", "sampled", 2).name != Cell(0.12345671, 1, "block", "sampled", 2).name


def test_seeds_are_the_same_in_all_cells_and_differ_otherwise() -> None:
    options = AcceptanceOptions()
    seeds = {options.request_seed(p, t, r) for p in range(5) for t in range(3) for r in range(3)}
    assert len(seeds) == 45
    assert all(0 <= seed < 2**64 for seed in seeds)
    assert AcceptanceOptions(seed=1).request_seed(0, 0, 0) not in seeds


@pytest.mark.parametrize("num_prompts", [1, 3, 16, 48, 100])
@pytest.mark.parametrize("batch_size", [1, 8, 64])
def test_rounds_are_all_prompts_once(num_prompts: int, batch_size: int) -> None:
    found = rounds(num_prompts, batch_size)
    assert [i for part in found for i in part] == list(range(num_prompts))
    assert max(map(len, found)) - min(map(len, found)) <= 1
    assert len(found) == 1 or min(map(len, found)) >= batch_size

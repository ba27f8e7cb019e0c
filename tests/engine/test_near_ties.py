"""The comparison up to near-ties: what it lets pass, and what not. In float64, so that no CPU sees another margin."""

from __future__ import annotations

from dataclasses import replace

import pytest

from specdec import Engine, GenerationOutput, SamplingParams, SpeculationParams
from support.near_ties import assert_near_tie, num_differing, teacher_forced

PLAIN = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True, speculation=SpeculationParams(0))


@pytest.fixture(scope="module")
def exact() -> Engine:
    return Engine.from_pretrained("bundled", kernels="reference", dtype="float64")


@pytest.fixture(scope="module")
def text(exact: Engine) -> GenerationOutput:
    """It may go on in many ways."""
    return exact.generate(["x = "], PLAIN)[0]


@pytest.fixture(scope="module")
def runners_up(exact: Engine, text: GenerationOutput) -> list[int]:
    """The second best token at every place of the text."""
    logits = teacher_forced(exact, text.prompt_token_ids + text.token_ids).logits[len(text.prompt_token_ids) - 1 : -1]
    best, second = logits.topk(2).indices.T.tolist()
    assert best == text.token_ids
    return second


def passes(exact: Engine, text: GenerationOutput, at: int, other: int) -> bool:
    try:
        assert_near_tie(exact, text.prompt_token_ids + text.token_ids[:at], text.token_ids[at], other)
    except AssertionError:
        return False
    return True


@pytest.mark.slow
def test_near_ties_alone_pass(exact: Engine, text: GenerationOutput, runners_up: list[int]) -> None:
    found = [at for at, other in enumerate(runners_up) if passes(exact, text, at, other)]
    assert found == [2, 8], "their margins are 0.06 and 0.74 of the bound, the next larger one 1.5 of it"


@pytest.mark.slow
def test_the_first_difference_of_each_pair_is_looked_at(
    exact: Engine, text: GenerationOutput, runners_up: list[int]
) -> None:
    def changed(*places: int) -> GenerationOutput:
        ids = [runners_up[at] if at in places else token for at, token in enumerate(text.token_ids)]
        return replace(text, token_ids=ids)

    assert num_differing(exact, [text, changed(2, 17), changed(8)], [text] * 3) == 2  # 17 comes after another text
    for clear in (1, 17, 23):
        with pytest.raises(AssertionError):
            num_differing(exact, [changed(2), changed(clear)], [text] * 2)

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from specdec import SamplingParams, SpeculationParams
from specdec.kernels.data import HiddenRows
from specdec.model.tokenizer import Tokenizer
from specdec.request.sequence import FinishReason, Sequence
from specdec.request.text import OutputText
from specdec.step.commit import commit
from specdec.step.scheduler import ScheduledSequence
from specdec.step.verify import TargetResult
from support.fakes import byte_tokenizer

TOKENIZER = Tokenizer(byte_tokenizer(), None)


def run(text: str, params: SamplingParams) -> tuple[OutputText, list[str], int]:
    """Pushes byte by byte, taking after each; -> the output, what was taken, tokens pushed."""
    output, taken, pushed = OutputText(TOKENIZER, params), [], 0
    for token in TOKENIZER.encode(text):
        pushed += 1
        stopped = output.push(token)
        taken.append(output.take(finished=stopped))
        if stopped:
            return output, taken, pushed
    output.flush()
    taken.append(output.take(finished=True))
    return output, taken, pushed


@given(st.text("abé", max_size=30), st.lists(st.text("abé", min_size=1, max_size=4), max_size=3), st.booleans())
def test_text_ends_at_the_first_stop_string_and_streams_without_regrets(
    text: str, stop: list[str], include: bool
) -> None:
    output, taken, pushed = run(text, SamplingParams(stop=tuple(stop), include_stop_str_in_output=include))
    # the first stop string to be complete, the leftmost of those that end there
    ends = [(text.find(s, 0, end) + len(s), text.find(s, 0, end), s) for s in stop for end in range(len(text) + 1)
            if text.find(s, 0, end) >= 0]  # fmt: skip
    if not ends:
        assert output.text == text
        assert not output.stopped
    else:
        end = min(e for e, _, _ in ends)
        start = min(at for e, at, _ in ends if e == end)
        assert output.text == text[: end if include else start]
        assert output.stopped
        assert pushed == len(text[:end].encode())
    assert "".join(taken) == output.text


def test_a_possible_stop_is_held_back_and_released() -> None:
    _, taken, _ = run("say </x> ok", SamplingParams(stop="</s>"))
    assert taken == ["s", "a", "y", " ", "", "", "</x", ">", " ", "o", "k", ""]


def test_special_tokens_are_skipped_or_kept() -> None:
    for skip, expected in ((True, "a"), (False, "<|user|>a")):
        output = OutputText(TOKENIZER, SamplingParams(skip_special_tokens=skip))
        output.push(1)
        output.push(TOKENIZER.encode("a")[0])
        assert output.text == expected


def test_an_unfinished_character_comes_out_at_the_end() -> None:
    output = OutputText(TOKENIZER, SamplingParams(stop="\ufffd"))
    for token in TOKENIZER.encode("ok€")[:-1]:
        assert not output.push(token)
    assert output.text == "ok"
    assert output.flush()
    assert output.text == "ok"


def unfinished(stop: str, max_tokens: int = 9) -> tuple[Sequence, list[int]]:
    """A request, and tokens whose last character is not complete."""
    params = SamplingParams(stop=stop)
    sequence = Sequence(
        "r", [5], params, SpeculationParams(0), 0, 1 + max_tokens, frozenset(), OutputText(TOKENIZER, params)
    )
    return sequence, TOKENIZER.encode("ok€")[:-1]


@pytest.mark.parametrize(
    ("reason", "stop", "ends", "text"),
    [("length", "x", "length", "ok\ufffd"), ("length", "\ufffd", "stop", "ok"),
     ("abort", "x", "abort", "ok\ufffd"), ("deadline", "\ufffd", "deadline", "ok")],
)  # fmt: skip
def test_what_was_held_back_comes_out_however_a_request_ends(
    reason: FinishReason, stop: str, ends: str, text: str
) -> None:
    sequence, token_ids = unfinished(stop)
    for token_id in token_ids:
        sequence.output.push(token_id)
    sequence.end(reason)
    assert (sequence.finish_reason, sequence.output.text) == (ends, text)


@pytest.mark.parametrize(("stop", "ends", "text"), [("x", "length", "ok\ufffd"), ("\ufffd", "stop", "ok")])
def test_what_was_held_back_comes_out_with_the_last_token(stop: str, ends: str, text: str) -> None:
    sequence, token_ids = unfinished(stop, max_tokens=4)
    hidden = HiddenRows(torch.zeros(4, 1), 0, 4)
    commit([ScheduledSequence(sequence, 1, 3)], TargetResult([token_ids], [[]], [hidden], [[]]))
    assert (sequence.finish_reason, sequence.output.text) == (ends, text)


def test_stop_strings_that_end_before_min_tokens_are_not_sought() -> None:
    text = "ab ab ab"
    for least, expected in ((0, ""), (1, ""), (2, ""), (3, "ab "), (5, "ab "), (6, "ab ab ")):
        output = OutputText(TOKENIZER, SamplingParams(stop="ab", min_tokens=least))
        for token_id in TOKENIZER.encode(text):
            if output.push(token_id):
                break
        assert output.text == expected, least

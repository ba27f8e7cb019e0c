"""Turns what users pass as prompts and parameters into lists of text or token ids, and one SamplingParams each."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Set
from collections.abc import Sequence as Seq
from typing import Any

from specdec.checks import require
from specdec.config import SamplingParams

Prompt = str | Seq[int]


def as_batch(prompts: Prompt | Iterable[Prompt]) -> list[str | list[int]]:
    """Returns prompts as a list. prompts: one, or several, each text or token ids (lists, tuples, NumPy or torch
    integers); a sequence of integers is one prompt.

    Raises ValueError for anything else.
    """
    if isinstance(prompts, str):
        return [prompts]
    items = _as_list(prompts)
    if items and _is_integer(items[0]):
        return [_as_token_ids(items)]
    return [item if isinstance(item, str) else _as_token_ids(_as_list(item)) for item in items]


def as_prompt(prompt: Prompt) -> str | list[int]:
    """Returns one prompt as text or token ids. Raises ValueError for anything else."""
    return prompt if isinstance(prompt, str) else _as_token_ids(_as_list(prompt))


def as_params(params: SamplingParams) -> SamplingParams:
    """Returns the parameters. Raises ValueError where they are none."""
    require(isinstance(params, SamplingParams), f"params = {params!r} must be a SamplingParams")
    return params


def params_per_prompt(params: SamplingParams | Iterable[SamplingParams], num_prompts: int) -> list[SamplingParams]:
    """Returns one SamplingParams for each prompt. params: one for all, or one for each. Raises ValueError for anything
    else."""
    if isinstance(params, SamplingParams):
        return [params] * num_prompts
    given: list[Any] = (
        list(params) if isinstance(params, Iterable) and not isinstance(params, str | Mapping) else [params]
    )
    for p in given:
        if not isinstance(p, SamplingParams):
            raise ValueError(f"params = {p!r} must be a SamplingParams, or one for each prompt")
    if len(given) != num_prompts:
        raise ValueError(f"{len(given)} SamplingParams for {num_prompts} prompts: give one, or one per prompt")
    return given


def _as_list(value: Any) -> list[Any]:
    if hasattr(value, "tolist"):  # NumPy arrays and torch tensors
        value = value.tolist()
    if isinstance(value, bytes | Mapping | Set) or not isinstance(value, Iterable):
        raise ValueError(f"{_shown(value)} is no prompt: give text, token ids, or a list of either")
    return list(value)


def _is_integer(value: Any) -> bool:
    """Returns whether it is an integer, Python's or a scalar of NumPy's or torch's; an array of one is none."""
    return hasattr(value, "__index__") and not isinstance(value, bool) and getattr(value, "ndim", 0) == 0


def _as_token_ids(items: list[Any]) -> list[int]:
    for item in items:
        if not _is_integer(item):
            raise ValueError(f"prompt token {_shown(item)} is no token id: token ids are integers")
    return [operator.index(item) for item in items]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."

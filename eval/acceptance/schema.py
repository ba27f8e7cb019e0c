"""Describes the shape of results.json, version 1, and compares a document with it. See docs/results.md."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

SCHEMA, VERSION = "specdec.acceptance", 1


@dataclass(frozen=True)
class OrNull:
    """A value of a shape, or null."""

    shape: Any
    """The shape."""


@dataclass(frozen=True)
class ByName:
    """An object with names of the user's choice, all of one shape."""

    shape: Any
    """The shape of each value."""


@dataclass(frozen=True)
class Added:
    """A field that documents of earlier releases lack."""

    shape: Any
    """The shape of its value."""


# A dict: an object with at least these fields. A list of one: a list of such. A type, or several: a value of them.
NUMBER = (int, float)
ESTIMATE = {"value": OrNull(NUMBER), "low": OrNull(NUMBER), "high": OrNull(NUMBER)}
BIN = {
    "low": NUMBER, "high": OrNull(NUMBER), "num_drafts": int, "mean": OrNull(NUMBER), "acceptance": ESTIMATE,
}  # fmt: skip
SCALARS = (
    "mean_acceptance_length", "draft_efficiency", "block_efficiency", "speedup", "tokens_per_s_per_request", "ttft_s",
)  # fmt: skip
GROUP = {
    "num_requests": int, "num_verifications": int, "conditional": [ESTIMATE], "unconditional": [ESTIMATE],
    **dict.fromkeys(SCALARS, ESTIMATE), "tokens_per_s": OrNull(ESTIMATE), "final_loop_share": Added(ESTIMATE),
}  # fmt: skip
CHECK_POSITION = {
    "position": int, "num_reached": int, "observed": OrNull(NUMBER), "expected": OrNull(NUMBER), "z": OrNull(NUMBER),
}  # fmt: skip
CHECK = {
    "num_contexts": int, "num_other_drafts": int, "positions": [CHECK_POSITION], "passed": bool, "message": str,
}  # fmt: skip
CALIBRATION = {"ece": ESTIMATE, "bins": [BIN]}
BY_PROMPT = {
    "prompts": [int], "reached": [[int]], "accepted": [[int]], "plain_decode_s": [NUMBER], "plain_decode_tokens": [int],
    "decode_s": [NUMBER], "decode_tokens": [int],
}  # fmt: skip
CELL = {
    "temperature": NUMBER, "verification": str, "draft_sampling": str, "num_speculative_tokens": int,
    "batch_size": int, "num_requests": int, "num_output_tokens": int, "num_target_forwards": int,
    "num_verifications": int, "all": GROUP, "categories": ByName(GROUP), "by_output_position": [BIN],
    "by_entropy": [BIN], "calibration": CALIBRATION, "by_expected_acceptance": Added(CALIBRATION),
    "check": OrNull(CHECK), "alpha": [ESTIMATE], "by_prompt": Added(BY_PROMPT), "warnings": Added([str]),
}  # fmt: skip
POINT = {"num_tokens": int, "measured": ESTIMATE, "expected": NUMBER}
EXPERTS = {
    "num_experts": int, "experts_per_token": int, "layers": [{"layer": str, "points": [POINT]}], "mean": [POINT],
}  # fmt: skip
PROVENANCE = {
    "specdec": str, "git_revision": OrNull(str), "checkpoint": {"folder": str, "sha256": str}, "python": str,
    "torch": str, "numpy": str, "processor": str, "threads": str, "kernels": str, "weights": str, "command": str,
    "started": str, "finished": str,
}  # fmt: skip
DOCUMENT = {
    "schema": str, "version": int, "provenance": PROVENANCE, "options": {},
    "prompts": {
        "name": str, "num_prompts": int, "num_skipped": int, "categories": ByName(int), "sha256": Added(str),
    },
    "cells": [CELL], "experts": OrNull(EXPERTS),
}  # fmt: skip
NAMES = {int: "an integer", NUMBER: "a number", str: "a string", bool: "true or false"}


def faults(document: Any) -> Iterator[str]:
    """Yields what is wrong with `document`, a field at a time; nothing where it is as it should be."""
    yield from _faults(document, DOCUMENT, "")


def _faults(value: Any, shape: Any, path: str) -> Iterator[str]:
    name = path or "the document"
    if isinstance(shape, OrNull):
        if value is not None:
            yield from _faults(value, shape.shape, path)
    elif isinstance(shape, dict | ByName):
        if isinstance(value, dict):
            yield from _faults_of_fields(value, shape, path)
        else:
            yield f"{name} must be an object"
    elif isinstance(shape, list):
        if isinstance(value, list):
            for i, item in enumerate(value):
                yield from _faults(item, shape[0], f"{path}[{i}]")
        else:
            yield f"{name} must be a list"
    elif not isinstance(value, shape) or (isinstance(value, bool) and shape is not bool):
        yield f"{name} must be {NAMES[shape]}, it is {value!r:.40}"


def _faults_of_fields(value: dict[str, Any], shape: dict[str, Any] | ByName, path: str) -> Iterator[str]:
    fields = shape if isinstance(shape, dict) else dict.fromkeys(value, shape.shape)
    for key, inner in fields.items():
        inner_path = f"{path}.{key}" if path else key
        if key in value:
            yield from _faults(value[key], inner.shape if isinstance(inner, Added) else inner, inner_path)
        elif not isinstance(inner, Added):
            yield f"{inner_path} is missing"

"""Documents as `specdec eval acceptance` writes them, from made-up figures."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

OUTPUT_POSITIONS = (1, 8, 16, 32, 64, 128, 256)
ENTROPIES = (0, 0.1, 0.25, 0.5, 1, 2, 3, 4, None)
CATEGORIES = ("module", "package module", "test")
ALPHAS = {"greedy": 0.92, "coupled": 0.66, "block": 0.74, "token": 0.71}


def estimate(value: float | None, width: float = 0.02) -> dict[str, float | None]:
    if value is None:
        return {"value": None, "low": None, "high": None}
    return {"value": value, "low": value - width, "high": value + 1.5 * width}


def bins(limits: tuple[Any, ...], slope: float, first: float) -> list[dict[str, Any]]:
    made = []
    for i, (low, high) in enumerate(pairwise(limits)):
        mean = low + 0.5 if high is None else (low + high) / 2
        made.append(
            {"low": low, "high": high, "num_drafts": 400 - 30 * i, "mean": mean,
             "acceptance": estimate(min(0.95, max(0.05, first + slope * i)), 0.03)}
        )  # fmt: skip
    return made


def group(k: int, alpha: float, speedup: float | None, *, total: bool) -> dict[str, Any]:
    conditional = [alpha + 0.01 * i for i in range(k)]
    unconditional = [alpha ** (i + 1) for i in range(k)]
    rate = 2224.3 * (speedup or 1.0)
    return {
        "num_requests": 96,
        "num_verifications": 4000 if k else 0,
        "conditional": [estimate(a) for a in conditional],
        "unconditional": [estimate(a) for a in unconditional],
        "mean_acceptance_length": estimate(1 + sum(unconditional) if k else None, 0.05),
        "draft_efficiency": estimate(sum(unconditional) / k if k else None),
        "block_efficiency": estimate(1 + sum(unconditional) if k else 1.0, 0.05),
        "tokens_per_s_per_request": estimate(rate, 40),
        "speedup": estimate(speedup, 0.03),
        "ttft_s": estimate(0.0123, 0.001),
        "final_loop_share": estimate(0.07, 0.03),
        "tokens_per_s": estimate(rate * 1.1, 50) if total else None,
    }


def check(k: int, passed: bool) -> dict[str, Any]:
    z = 1.25 if passed else -17.5
    positions = [
        {"position": i, "num_reached": 1000 // i, "observed": 0.71, "expected": 0.7, "z": z} for i in range(1, k + 1)
    ]
    message = "agrees" if passed else "position 1: accepted 0.510, the laws say 0.700: the MTP path is broken"
    return {
        "num_contexts": 1000, "num_other_drafts": 0, "positions": positions, "passed": passed, "message": message,
    }  # fmt: skip


def calibration(k: int, ece: float) -> dict[str, Any]:
    return {
        "ece": estimate(ece if k else None, 0.004),
        "bins": bins(tuple(i / 10 for i in range(11)), 0.1, 0.03) if k else [],
    }


def by_prompt(k: int, alpha: float, num_prompts: int = 12) -> dict[str, Any]:
    reached = [[round(40 * alpha**i) + prompt for i in range(k)] for prompt in range(num_prompts)]
    return {
        "prompts": list(range(num_prompts)),
        "reached": reached,
        "accepted": [[round(alpha * n) for n in row] for row in reached],
        "plain_decode_s": [0.5 + 0.01 * prompt for prompt in range(num_prompts)],
        "plain_decode_tokens": [128] * num_prompts,
        "decode_s": [0.3 + 0.01 * prompt for prompt in range(num_prompts)],
        "decode_tokens": [128] * num_prompts,
    }


def cell(
    temperature: float, rule: str, drafts: str, k: int, batch_size: int, categories: tuple[str, ...] = CATEGORIES,
    passed: bool = True,
) -> dict[str, Any]:  # fmt: skip
    alpha = ALPHAS.get(rule, 0.5) - 0.05 * (drafts == "greedy" != rule)
    speedup = 1.0 if k == 0 else (1 + alpha * k**0.5 / 2) / batch_size**0.3
    everything = group(k, alpha, speedup, total=True)
    return {
        "temperature": temperature,
        "verification": rule,
        "draft_sampling": drafts,
        "num_speculative_tokens": k,
        "batch_size": batch_size,
        "num_requests": 96,
        "num_output_tokens": 12288,
        "num_target_forwards": 4100,
        "num_verifications": 4000 if k else 0,
        "all": everything,
        "categories": {
            name: group(k, alpha - 0.03 * (i % 5), speedup, total=False) for i, name in enumerate(categories)
        },
        "by_output_position": bins(OUTPUT_POSITIONS, 0.01, alpha - 0.05) if k else [],
        "by_entropy": bins(ENTROPIES, -0.11, 0.98) if k else [],
        "calibration": calibration(k, 0.0312),
        "by_expected_acceptance": calibration(k, 0.0123),
        "check": check(k, passed) if k else None,
        "alpha": [estimate(alpha + 0.02) for _ in range(k)],
        "by_prompt": by_prompt(k, alpha),
        "warnings": [],
    }


def settings(temperatures: tuple[float, ...], rules: tuple[str, ...]) -> Iterator[tuple[float, str, str]]:
    for temperature in temperatures:
        if temperature == 0:
            yield 0.0, "greedy", "greedy"
        else:
            yield from ((temperature, rule, "sampled") for rule in rules)


def experts() -> dict[str, Any]:
    def points(share: float) -> list[dict[str, Any]]:
        return [
            {"num_tokens": t, "measured": estimate(share * 16 * (1 - (1 - 2 / 16) ** t), 0.1),
             "expected": 16 * (1 - (1 - 2 / 16) ** t)}
            for t in range(1, 10)
        ]  # fmt: skip

    layers = [{"layer": f"model.layers.{i}", "points": points(0.8 + 0.03 * i)} for i in range(1, 6)]
    return {"num_experts": 16, "experts_per_token": 2, "layers": layers, "mean": points(0.9)}


def document(
    temperatures: tuple[float, ...] = (0.0, 0.6, 1.0),
    rules: tuple[str, ...] = ("coupled", "block", "token"),
    lengths: tuple[int, ...] = (1, 2, 3, 5),
    batch_sizes: tuple[int, ...] = (1, 8),
    categories: tuple[str, ...] = CATEGORIES,
) -> dict[str, Any]:
    cells = []
    for batch_size in batch_sizes:
        for temperature in temperatures:
            plain = "greedy" if temperature == 0 else "sampled"
            rule = "greedy" if temperature == 0 else rules[0]
            cells.append(cell(temperature, rule, plain, 0, batch_size, categories))
        for temperature, rule, drafts in settings(temperatures, rules):
            cells += [cell(temperature, rule, drafts, k, batch_size, categories) for k in lengths]
    return {
        "schema": "specdec.acceptance",
        "version": 1,
        "provenance": {
            "specdec": "0.1.0", "git_revision": "b5d5f2e0" * 5,
            "checkpoint": {"folder": "/models/bundled/checkpoint", "sha256": "0123456789abcdef" * 4},
            "python": "3.11.7", "torch": "2.13.0+cpu", "numpy": "2.4.6", "processor": "A Processor @ 2.0GHz",
            "threads": "2", "kernels": "cpu", "weights": "bfloat16",
            "command": "specdec eval acceptance --output build/acceptance",
            "started": "2026-11-24T15:00:00+00:00", "finished": "2026-11-24T15:09:30+00:00",
        },
        "options": {"model": "bundled", "max_tokens": 256, "temperatures": list(temperatures), "seed": 0},
        "prompts": {
            "name": "stdlib", "num_prompts": 96, "num_skipped": 0, "categories": dict.fromkeys(categories, 32),
            "sha256": "fedcba9876543210" * 4,
        },
        "cells": cells,
        "experts": experts(),
    }  # fmt: skip


def without_values(value: Any) -> Any:
    """The same with every estimate unknown and no bins."""
    if isinstance(value, list):
        return [without_values(item) for item in value]
    if not isinstance(value, dict):
        return value
    if set(value) == {"value", "low", "high"}:
        return estimate(None)
    emptied = {key: without_values(item) for key, item in value.items()}
    if "cells" in value:
        emptied["experts"] = None
        for one in emptied["cells"]:
            one |= {"by_output_position": [], "by_entropy": [], "check": None}
            one["calibration"]["bins"] = one["by_expected_acceptance"]["bins"] = []
    return emptied

"""Every field of SamplingParams and EngineConfig with values that no kernel holds: each is refused with a ValueError or
honoured, and two requests beside it get the tokens that they get alone."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from decimal import Decimal
from fractions import Fraction
from itertools import product

import numpy as np
import pytest

from specdec import Engine, NotEnoughMemoryError, SamplingParams, SpeculationParams
from specdec.config import EngineConfig

INTEGERS = [
    value + step
    for size in (0, 2**31, 2**32, 2**53, 2**63, 2**64, 10**400)
    for value, step in product((size, -size), (0, -1))
]
NUMBERS = [
    math.nan, math.inf, -math.inf, -0.0, 5e-324, 1e-320, 1e-45, 1e-40, 1e-38, 1e-20, 0.5, 1.5, 1e20, 1e38, 3.5e38,
    1e300, sys.float_info.max, np.float32("nan"), np.float32(0.5), np.int64(2**62), np.uint64(2**64 - 1),
    Fraction(1, 3), Decimal("0.5"), 1j,
]  # fmt: skip
OTHERS = [
    True, None, "", "x", "auto", "\0", "\ud800", b"x", (), [], {}, [[]], [None], [1, 2], {0: 1.0}, {"a": 1}, object(),
    np.array(1), np.array([1.0]),
]  # fmt: skip
VALUES = INTEGERS + NUMBERS + OTHERS
SHAPES: dict[str, list[Callable[[object], object]]] = {
    "logit_bias": [lambda v: v, lambda v: {5: v}, lambda v: [(v, 1.0)]],
    "bad_words": [lambda v: v, lambda v: [v], lambda v: [[v]]],
    "stop": [lambda v: v, lambda v: [v]],
    "stop_token_ids": [lambda v: v, lambda v: [v]],
}
PROMPT = "import os\n"
NEIGHBOURS = [
    SamplingParams(max_tokens=8, temperature=0.7, seed=1),
    SamplingParams(max_tokens=8, temperature=0.7, seed=2, speculation=SpeculationParams(2, "token")),
]


def hostile(**base: object) -> Iterator[dict[str, object]]:
    """Yields the fields of every request that is tried."""
    for name in SamplingParams.__dataclass_fields__:
        for shape, value in product(SHAPES.get(name, [lambda v: v]), VALUES):
            yield {**base, name: shape(value)}


@pytest.fixture(scope="module", params=["cpu", "reference"])
def engine(request: pytest.FixtureRequest) -> Engine:
    return Engine.from_pretrained("bundled", num_threads=1, max_num_seqs=3, max_model_len=64, kernels=request.param)


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_request_is_refused_or_runs_and_harms_nobody(engine: Engine, temperature: float) -> None:
    alone = [o.token_ids for o in engine.generate([PROMPT] * 2, NEIGHBOURS)]
    num_run = num_refused = 0
    for fields in hostile(max_tokens=4, seed=7, temperature=temperature):
        try:
            outputs = engine.generate([PROMPT] * 3, [*NEIGHBOURS, SamplingParams(**fields)])
        except ValueError:
            num_refused += 1
            continue
        assert [o.token_ids for o in outputs[:2]] == alone, fields
        num_run += 1
    assert num_run > 100
    assert num_refused > 1000
    assert engine.core.stats().num_failed_steps == 0


@pytest.mark.slow
def test_extremes_go_together(engine: Engine) -> None:
    """What is allowed by itself does not overflow with others."""
    for temperature, repetition, biases, top_p, min_p, k in product(
        (0.0, 1e-5, 1e30), (1e-5, 1.0, 1e5), ({}, {5: -math.inf, 6: 100.0}), (1.0, 5e-324), (0.0, 1.0), (0, 3)
    ):
        params = SamplingParams(
            max_tokens=3,
            seed=1,
            temperature=temperature,
            repetition_penalty=repetition,
            frequency_penalty=2.0,
            logit_bias=biases,
            top_p=top_p,
            min_p=min_p,
            speculation=SpeculationParams(k),
        )
        engine.generate(PROMPT, params)
    assert engine.core.stats().num_failed_steps == 0


@pytest.mark.parametrize("top_k", [2**63 - 1, 2**63, 2**64, 10**400])
def test_top_k_beyond_the_vocabulary_keeps_all_tokens(engine: Engine, top_k: int) -> None:
    def tokens(top_k: int) -> list[int]:
        return engine.generate(PROMPT, SamplingParams(max_tokens=8, seed=3, top_k=top_k))[0].token_ids

    assert tokens(top_k) == tokens(0)


@pytest.mark.parametrize("least", [2**63 - 1, 2**63, 2**64, 10**400])
def test_min_tokens_beyond_the_context_hold_to_its_end(engine: Engine, least: int) -> None:
    params = SamplingParams(max_tokens=least, min_tokens=least, temperature=0, logit_bias={0: 100.0})  # 0 ends a text
    (output,) = engine.generate(PROMPT, params)
    assert output.finish_reason == "length"
    assert len(output.prompt_token_ids) + len(output.token_ids) == engine.max_model_len


def test_a_tiny_top_p_keeps_the_most_probable_token(engine: Engine) -> None:
    greedy = engine.generate(PROMPT, SamplingParams(max_tokens=8, temperature=0))[0].token_ids
    assert engine.generate(PROMPT, SamplingParams(max_tokens=8, seed=1, top_p=5e-324))[0].token_ids == greedy


@pytest.mark.parametrize("name", sorted(set(EngineConfig.__dataclass_fields__) - {"speculation", "cost_table"}))
def test_sizes_of_an_engine_are_refused_or_serve(name: str) -> None:
    small = {"max_model_len": 64, "num_pages": 8, "max_num_seqs": 2}
    if name == "kv_cache_bytes":
        del small["num_pages"]
    for value in VALUES:
        if name == "kv_cache_bytes" and value in (2**31, 2**31 - 1, 2**32, 2**32 - 1):
            continue  # which are honoured, and take seconds to allocate
        try:
            engine = Engine.from_pretrained("bundled", num_threads=1, kernels="reference", **{**small, name: value})
        except (ValueError, NotEnoughMemoryError):
            continue
        if engine.runtime.num_pages * engine.config.page_size >= 8:
            engine.generate("a\n", SamplingParams(max_tokens=2, seed=1))

"""Tokens are what they were: `golden` has the recorded ones."""

from __future__ import annotations

import json

import pytest

from support import golden
from support.fakes import KERNELS


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return golden.write_checkpoints(tmp_path_factory.mktemp("golden"))


@pytest.mark.slow
@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("name", ["bundled", "random", "planted"])
def test_tokens_are_the_recorded_ones(checkpoints: dict[str, str], name: str, backend: str) -> None:
    recorded = json.loads(golden.PATH.read_text())[f"{name}, {backend}"]
    found = dict(golden.outputs(checkpoints, name, backend))
    assert list(found) == list(recorded)
    for case, token_ids in found.items():
        assert token_ids == recorded[case], case


@pytest.mark.parametrize("name", ["bundled", "random", "planted"])
def test_recorded_tokens_do_not_depend_on_drafts_where_they_must_not(name: str) -> None:
    """Greedy and coupled outputs are those of plain decoding: a recording of a broken engine is no gold."""
    recorded = json.loads(golden.PATH.read_text())
    plain = recorded[f"{name}, cpu"]
    for backend in golden.BACKENDS:
        for rule, length in golden.cases(name, backend):
            if rule in ("greedy", "coupled", "coupled, greedy drafts"):
                alone, *together = recorded[f"{name}, {backend}"][f"{rule}, K = {length}"]
                assert [alone, *together] == plain[f"{rule}, K = 0"], (backend, rule, length)
                assert alone == together[0], (backend, rule, length)

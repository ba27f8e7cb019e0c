"""Teacher-forced acceptance against sums over all drafts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from specdec import Engine
from specdec.errors import CheckpointError
from specdec.eval.acceptance import replay, teacher
from specdec.eval.acceptance.laws import unconditional_acceptance
from specdec.eval.acceptance.tally import Row, Setting, proposals
from specdec.eval.acceptance.teacher import Teacher, TeacherOptions, teacher_forced
from support.enumeration import RandomModel, RandomPath, TableKernels
from support.fakes import tiny_config, write_checkpoint, write_planted_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")
TEXTS = ["def f(x):\n    return x", "import os, sys", "class A:\n    pass\n" * 3, "ab", "q"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    write_planted_checkpoint(folder / "checkpoint")
    lines = [{"prompt": text, "category": "code"} for text in TEXTS]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def options_of(folder: Path, **fields: Any) -> TeacherOptions:
    small: dict[str, Any] = {
        "num_speculative_tokens": (1, 3), "temperatures": (0.0, 0.8), "stride": 3, "kernels": "reference",
        "dtype": "float64",
    }  # fmt: skip
    return TeacherOptions(
        model=str(folder / "checkpoint"), prompts=(str(folder / "prompts.jsonl"),), **(small | fields)
    )


def values(rows: list[Row]) -> dict[Setting, np.ndarray]:
    return {row.setting: np.array([e.value for e in row.unconditional]) for row in rows}


def test_contexts_are_every_nth_of_every_text_that_has_room(folder: Path) -> None:
    found = Teacher(options_of(folder)).places
    lengths = [len(text) for text in TEXTS]
    assert [(p.text, p.start) for p in found] == [
        (i, start) for i, n in enumerate(lengths) for start in range(2, n + 1, 3)
    ]
    assert {p.text for p in found} == {0, 1, 2, 3}, "a text of one token has no context"
    few = Teacher(options_of(folder, max_contexts=5)).places
    assert len(few) == 5
    assert set(few) < set(found)
    assert [found.index(p) for p in few] == [i * len(found) // 5 for i in range(5)]


def test_rows_are_those_asked_for(folder: Path) -> None:
    both = teacher_forced(options_of(folder))
    rules = ("coupled", "block", "token")
    asked = {Setting(0.0, "greedy", "greedy")}
    asked |= {Setting(0.8, rule, drafts) for rule in rules for drafts in ("sampled", "greedy")}
    assert {row.setting for row in both.rows} == asked
    assert [sorted(row.mean_acceptance_length) for row in both.rows] == [[1, 3]] * 7
    sampled = teacher_forced(options_of(folder, draft_sampling=("sampled",), verification=("block",)))
    assert {row.setting for row in sampled.rows} == {Setting(0.0, "greedy", "greedy"), Setting(0.8, "block", "sampled")}
    for setting, found in values(sampled.rows).items():
        assert found.tolist() == values(both.rows)[setting].tolist(), "each proposal draws its own noise"
    document = json.loads(json.dumps(both.as_dict(), allow_nan=False))
    assert document["num_contexts"] == len(Teacher(options_of(folder)).places)
    assert document["rows"][0]["mean_acceptance_length"][1]["num_speculative_tokens"] == 3


def test_lengths_are_sums_and_conditionals_quotients(folder: Path) -> None:
    for row in teacher_forced(options_of(folder)).rows:
        a = [e.value for e in row.unconditional]
        assert row.mean_acceptance_length[1].value == pytest.approx(1 + a[0])
        assert row.mean_acceptance_length[3].value == pytest.approx(1 + sum(a))
        assert [e.value for e in row.conditional] == pytest.approx([a[0], a[1] / a[0], a[2] / a[1]])


@pytest.mark.slow
def test_groups_and_chunks_change_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    together = values(teacher_forced(options_of(folder)).rows)
    monkeypatch.setattr(replay, "LOGITS_ELEMENTS", 2 * 3 * 259 * 2)  # two contexts
    init = replay.Reader.__init__

    def small(self: replay.Reader, *args: Any) -> None:
        init(self, *args)
        self.capacity = 60

    monkeypatch.setattr(replay.Reader, "__init__", small)
    apart = values(teacher_forced(options_of(folder)).rows)
    for setting, found in together.items():
        assert apart[setting] == pytest.approx(found, abs=1e-12)


@pytest.mark.slow
def test_acceptance_is_that_of_all_drafts(tmp_path: Path) -> None:
    """On tables of logits: every context of a text, averages over noise against sums over all chains of drafts."""
    v, k, prompt = 4, 2, [1, 3, 2, 3, 1, 1]
    pair = RandomModel(v, 5, zeros=0.0), RandomModel(v, 1005, zeros=0.0)
    config = tiny_config(vocab_size=v, num_hidden_layers=1)
    write_checkpoint(tmp_path / "tables", config)
    rules = TeacherOptions().verification
    engine = Engine.from_pretrained(tmp_path / "tables", kernels="reference", dtype="float64", max_num_seqs=1)
    kernels = TableKernels(*pair, config["hidden_size"])
    model = engine.runtime.model
    assert model.mtp is not None
    for part in (model.target, model.target.decoder, model.mtp.decoder):
        part.kernels = kernels
    reader = replay.Reader(engine, k)
    starts = range(2, len(prompt) + 1)
    exact = {rule: np.zeros(k) for rule in rules}
    for start in starts:
        drafts = torch.tensor([[d, e] for d in range(v) for e in range(v)])
        p, q = (
            torch.stack([m.logits((*prompt[:start], *d[:i])) for d in drafts.tolist() for i in range(k)])
            .softmax(-1)
            .view(-1, k, v)
            for m in pair
        )
        weights = q[:, 0].gather(1, drafts[:, :1])[:, 0] * q[:, 1].gather(1, drafts[:, 1:])[:, 0]
        for rule in exact:
            exact[rule] += (weights @ unconditional_acceptance(rule, p, q, drafts)).numpy() / len(starts)
    (proposal,) = proposals((1.0,), ("sampled",))
    n = 300
    tally = teacher.Tally(n, k)
    for number in range(n):
        kernels.paths = [RandomPath([])]
        choose = ChooseAtRandom(number)
        kernels.choose = choose  # type: ignore[method-assign]
        (text,) = reader.read([prompt])
        contexts = [replay.Context(text, s) for s in starts]
        rows = proposal.drawing(1.0).rows([0] * len(contexts), list(starts))
        tally.add(proposal, reader.chains(contexts, rows, k), np.full(len(contexts), number), rules, kernels)
    for row in tally.rows([k]):
        for estimate, value in zip(row.unconditional, exact[row.setting.verification]):
            assert estimate.value == pytest.approx(value, abs=0.02)
            assert estimate.low is not None
            assert estimate.high is not None
            assert estimate.low - 0.005 <= value <= estimate.high + 0.005
        assert row.unconditional[0].value == pytest.approx(exact[row.setting.verification][0], abs=1e-12)
    assert len({round(x[1], 3) for x in exact.values()}) == 3, "the rules differ here"


class ChooseAtRandom:
    """Drafts from the laws, with noise of its own."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, logits: torch.Tensor, sampling: object) -> torch.Tensor:
        return torch.multinomial(logits.softmax(-1), 1, generator=self.generator)[:, 0]


def test_texts_without_a_context_are_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "short.jsonl").write_text('{"prompt": "q"}\n')
    with pytest.raises(ValueError, match=r"no text of short.jsonl has a context"):
        Teacher(replace(options_of(folder), prompts=(str(tmp_path / "short.jsonl"),)))
    (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "q" * 300}) + "\n")
    found = Teacher(replace(options_of(folder, stride=1), prompts=(str(tmp_path / "long.jsonl"),)))
    assert max(p.start for p in found.places) == 256 - 3
    assert teacher_forced(replace(options_of(folder, stride=50), prompts=(str(tmp_path / "long.jsonl"),))).rows


def test_a_checkpoint_without_an_mtp_layer_has_no_drafts(folder: Path, tmp_path: Path) -> None:
    plain = write_checkpoint(tmp_path / "plain", with_mtp=False)
    with (
        pytest.warns(match="no MTP layer"),
        pytest.raises(CheckpointError, match="has no MTP layer: there are no drafts whose acceptance"),
    ):
        teacher_forced(replace(options_of(folder), model=str(plain)))

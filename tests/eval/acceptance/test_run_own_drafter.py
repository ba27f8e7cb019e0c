"""Runs with a user's own drafter: measured, checked against the target, and broken to see the check fail."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from specdec import SpeculationParams
from specdec.cli import app
from specdec.config import VerificationRule
from specdec.errors import CheckpointError
from specdec.eval.acceptance.analyse import Completion, analyse
from specdec.eval.acceptance.html import render_html
from specdec.eval.acceptance.own_drafter import load_drafter
from specdec.eval.acceptance.plan import AcceptanceOptions
from specdec.eval.acceptance.replay import Reader
from specdec.eval.acceptance.results import read_results, write_results
from specdec.eval.acceptance.run import run_acceptance
from specdec.step.step import Decision, StepResult
from specdec.step.verify import TargetResult, TargetVerifier
from support.enumeration import Enumerator, RandomModel
from support.fakes import write_checkpoint, write_planted_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
EXAMPLE = Path(__file__).parents[3] / "examples" / "own_drafter.py"
K = 3


def test_settings_of_the_mtp_layers_drafts_are_refused() -> None:
    options = AcceptanceOptions(drafter="a.py:B", draft_sampling=("greedy",))
    assert {c.draft_sampling for c in options.cells if c.num_speculative_tokens} == {"greedy"}
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"draft_sampling": ("sampled",)}, "draft_sampling = 'sampled' needs .* 'a.py:B', has none: give 'greedy'"),
        ({"draft_sampling": ("greedy", "sampled")}, "draft_sampling = 'sampled' needs"),
        ({"mtp_recycling": "pre_norm"}, "mtp_recycling = 'pre_norm' is about the MTP layer's drafts, .*leave one of"),
    ]
    for fields, message in wrong:
        with pytest.raises(ValueError, match=message):
            replace(options, **fields)


def test_expected_acceptance_is_the_targets_probability_of_each_draft(tmp_path: Path) -> None:
    """At arbitrary contexts and drafts, with the logits from which the model itself is made."""
    tables = Enumerator(
        tmp_path, RandomModel(5, 7, zeros=0.1), RandomModel(5, 8), load_drafter(f"{EXAMPLE}:NgramDrafter").make()
    )
    rng = np.random.default_rng(0)
    tokens, starts = rng.integers(5, size=12).tolist(), [2, 5, 9, 12]
    given = [rng.integers(5, size=k).tolist() for k in (K, 1, K, 2)]
    reader = Reader(tables.engine, K)
    for rule in get_args(VerificationRule):
        for temperature in (0.0, 0.7):
            speculation = SpeculationParams(K, rule, "greedy")
            (a,) = analyse(reader, [Completion(tokens, 3, starts, given)], temperature, speculation)
            for row, (start, ids) in enumerate(zip(starts, given)):
                for i, token in enumerate(ids):
                    logits = tables.kernels.tables[0].logits((*tokens[:start], *ids[:i]))
                    p = (logits / (temperature or 1)).softmax(-1).numpy()
                    expected = p[token] if temperature > 0 else float(p.argmax() == token)
                    assert a.expected[row, i] == pytest.approx(expected, abs=1e-12)
                    assert a.entropy[row, i] == pytest.approx(-(p[p > 0] * np.log(p[p > 0])).sum(), abs=1e-12)
            assert np.array_equal(a.expected, a.alpha, equal_nan=True)
            assert np.isnan(a.confidence).all()
            assert a.num_other_drafts == 0


DRAFTS = '''
FOLLOWING = {table}


class Successors:
    """Follows the planted chain, wrongly now and then, and drafts less than it may now and then."""

    def draft(self, requests):
        return [self.row(list(r.token_ids))[: max(0, r.num_draft_tokens - len(r.token_ids) % 4 // 2)] for r in requests]

    def row(self, tokens):
        for _ in range(8):
            tokens.append((FOLLOWING[tokens[-1]] + (len(tokens) % 7 == 0)) % len(FOLLOWING))
        return tokens[-8:]


class Remembers:
    """Knows by heart what it has seen of any request, and drafts it where the same comes again."""

    def __init__(self):
        self.seen = {{}}

    def draft(self, requests):
        rows = []
        for r in requests:
            tokens = tuple(r.token_ids)
            for end in range(1, len(tokens)):
                self.seen[tokens[:end]] = tokens[end:]
            rows.append(list(self.seen.get(tokens, ()))[: r.num_draft_tokens] or [FOLLOWING[tokens[-1]]])
        return rows


remembers = Remembers()


class Nothing:
    def draft(self, requests):
        return [[] for _ in requests]
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a planted chain, drafters that know it, and prompts."""
    folder = tmp_path_factory.mktemp("own")
    tensors = load_file(write_planted_checkpoint(folder / "checkpoint", sharpness=0.2) / "model.safetensors")
    following = (tensors["model.embed_tokens.weight"] @ tensors["lm_head.weight"].T).argmax(-1)
    (folder / "drafts.py").write_text(DRAFTS.format(table=following.tolist()))
    lines = [{"prompt": f"text {i}", "category": "ab"[i % 2]} for i in range(24)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def options_of(folder: Path, name: str = "Successors", **fields: Any) -> AcceptanceOptions:
    small: dict[str, Any] = {
        "num_speculative_tokens": (K,), "temperatures": (0.8,), "verification": ("coupled", "block", "token"),
        "draft_sampling": ("greedy",), "batch_sizes": (12,), "max_tokens": 48, "check_contexts": 10**6,
        "kernels": "reference", "dtype": "float64", "drafter": f"{folder}/drafts.py:{name}",
    }  # fmt: skip
    return AcceptanceOptions(
        model=str(folder / "checkpoint"), prompts=(str(folder / "prompts.jsonl"),), **(small | fields)
    )


def speculative(document: dict[str, Any]) -> list[dict[str, Any]]:
    return [c for c in document["cells"] if c["num_speculative_tokens"] > 0]


@pytest.fixture(scope="module")
def measured(folder: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        document = run_acceptance(options_of(folder, temperatures=(0.0, 0.8)), folder / "measured")
        write_results(document, folder / "measured")
    return document


def test_a_sound_engine_passes_with_a_drafter_of_ones_own(measured: dict[str, Any], folder: Path) -> None:
    json.dumps(measured, allow_nan=False)
    assert read_results(folder / "measured")["options"]["drafter"] == f"{folder}/drafts.py:Successors"
    cells = speculative(measured)
    assert [(c["temperature"], c["verification"], c["draft_sampling"]) for c in cells] == [
        (0.0, "greedy", "greedy"), *((0.8, rule, "greedy") for rule in ("coupled", "block", "token")),
    ]  # fmt: skip
    for cell in cells:
        check = cell["check"]
        assert check["passed"], check["message"]
        assert check["num_other_drafts"] == 0
        assert check["num_contexts"] == cell["num_verifications"] > 300
        assert [p["position"] for p in check["positions"]] == [1, 2, 3]
        assert cell["calibration"] == {"ece": {"value": None, "low": None, "high": None}, "bins": []}
        assert sum(b["num_drafts"] for b in cell["by_expected_acceptance"]["bins"]) > 50
        if cell["temperature"] > 0:
            assert all(0.2 < p["expected"] < 0.95 for p in check["positions"]), "some are accepted, some are not"
    assert measured["experts"]["num_experts"] == 8


def test_the_report_says_whose_drafts_they_are(measured: dict[str, Any], folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        page = render_html(measured)
    assert f"Drafts of {folder}/drafts.py:Successors, in place of the MTP layer's" in page
    assert "Left out" not in page
    assert "in place of the MTP layer" not in render_html(measured | {"options": {}})


def accepts_rejected_drafts(patch: pytest.MonkeyPatch) -> None:
    """One in three, whatever the target says of it."""
    verify, count = TargetVerifier.verify, iter(range(10**9))

    def wrong(self: TargetVerifier, scheduled: Any, drafts: Any) -> TargetResult:
        result = verify(self, scheduled, drafts)
        for row, (drafted, emitted) in enumerate(zip(result.draft_token_ids, result.output_token_ids)):
            rejected = emitted and len(emitted) <= len(drafted)
            if rejected and next(count) % 3 == 0:
                result.output_token_ids[row] = [*drafted[: len(emitted)], emitted[-1]]
        return result

    patch.setattr(TargetVerifier, "verify", wrong)


def records_other_drafts(patch: pytest.MonkeyPatch) -> None:
    """The drafts are verified as they should be; others are said to have been."""
    decisions = StepResult.decisions

    def wrong(self: StepResult) -> list[Decision]:
        return [d._replace(draft_token_ids=[(token + 1) % 259 for token in d.draft_token_ids]) for d in decisions(self)]

    patch.setattr(StepResult, "decisions", wrong)


@pytest.mark.parametrize("mutant", [accepts_rejected_drafts, records_other_drafts])
def test_a_broken_engine_fails(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mutant: Callable[[pytest.MonkeyPatch], None]
) -> None:
    mutant(monkeypatch)
    document = run_acceptance(options_of(folder), tmp_path / "out")
    for cell in speculative(document):
        assert not cell["check"]["passed"], cell["check"]["message"]
        assert max(p["z"] for p in cell["check"]["positions"] if p["z"] is not None) > 5


def test_a_drafter_that_learns_is_made_anew_for_each_cell(folder: Path, tmp_path: Path) -> None:
    """Plain decoding and all coupled cells have the same tokens: one that had seen another cell would know its own."""
    options = options_of(folder, "Remembers", verification=("coupled",), num_speculative_tokens=(1, 2))
    document = run_acceptance(options, tmp_path / "class")
    assert all(cell["check"]["passed"] for cell in speculative(document))
    shared = run_acceptance(replace(options, drafter=f"{folder}/drafts.py:remembers"), tmp_path / "object")
    assert [cell["check"]["passed"] for cell in speculative(shared)][1] is False


def test_a_drafter_without_drafts_is_no_fault(folder: Path, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        document = run_acceptance(options_of(folder, "Nothing", verification=("coupled",)), tmp_path / "out")
        write_results(document, tmp_path / "out")
        page = render_html(document)
    assert document["experts"] is None
    for cell in speculative(document):
        assert (cell["check"], cell["num_verifications"]) == (None, 0)
        assert cell["all"]["mean_acceptance_length"]["value"] is None
        assert cell["all"]["block_efficiency"]["value"] == 1
    assert "Acceptance was not checked" in page


def test_a_checkpoint_without_an_mtp_layer_is_measured(folder: Path, tmp_path: Path) -> None:
    plain = write_checkpoint(tmp_path / "plain", with_mtp=False)
    options = replace(options_of(folder, verification=("block",)), model=str(plain))
    document = run_acceptance(options, tmp_path / "out")
    assert all(cell["check"]["passed"] for cell in speculative(document))
    without = replace(options, drafter=None)
    with (
        pytest.warns(match="no MTP layer"),
        pytest.raises(CheckpointError, match="there is no acceptance to measure; give a drafter of your own with --dr"),
    ):
        run_acceptance(without, tmp_path / "none")


def test_another_drafter_is_not_resumed(measured: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    options, output = options_of(folder, temperatures=(0.0, 0.8)), folder / "measured"
    again = run_acceptance(options, output, resume=True)
    assert again["cells"] == measured["cells"]
    with pytest.raises(ValueError, match=r"another run, with drafter = .*Successors\" instead of \".*Nothing\":"):
        run_acceptance(options_of(folder, "Nothing", temperatures=(0.0, 0.8)), output, resume=True)
    source = folder / "drafts.py"
    before = source.read_text()
    try:
        source.write_text(before + "\n")
        with pytest.raises(ValueError, match="another run, with drafter_sha256 ="):
            run_acceptance(options, output, resume=True)
    finally:
        source.write_text(before)


def run(*words: str) -> Result:
    return CliRunner().invoke(app, ["eval", *words])


def words_of(folder: Path, *more: str) -> list[str]:
    return [
        "acceptance", "--model", str(folder / "checkpoint"), "--prompts", str(folder / "prompts.jsonl"), "-k", "2",
        "--max-tokens", "8", "--num-prompts", "6", "--batch-size", "6", "--kernels", "reference",
        "--verification", "coupled", *more,
    ]  # fmt: skip


def test_the_command_measures_and_compares(folder: Path, tmp_path: Path) -> None:
    own, mtp = str(tmp_path / "own"), str(tmp_path / "mtp")
    drafter = ["--drafter", f"{folder}/drafts.py:Successors"]
    shown = run(*words_of(folder, "--temperature", "0,1", *drafter, "--output", own))
    assert shown.exit_code == 0, shown.stderr
    assert f"Drafts of {folder}/drafts.py:Successors" in " ".join(shown.stdout.split())
    assert "All 2 checks" in shown.stdout
    printed = run(*words_of(folder, "--temperature", "0,1", *drafter, "--output", own, "--resume", "--json"))
    json.loads(printed.stdout, parse_constant=pytest.fail)
    assert run(*words_of(folder, "--temperature", "0,1", "--output", mtp)).exit_code == 0
    compared = run("compare", mtp, own)
    assert f"warning: other drafters: the MTP layer and {folder}/drafts.py:Successors" in compared.stdout
    assert "coupled verification, K = 2 (sampled drafts in A, greedy in B)" in compared.stdout
    assert "only in" not in compared.stdout


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (["--drafter", "none.py:X"], 1, "drafter = 'none.py:X': there is no file none.py"),
        (["--drafter", "x.py:Y", "--draft-sampling", "sampled"], 2, "draft_sampling = 'sampled' needs the MTP layer"),
        (
            ["--drafter", "x.py:Y", "--mtp-recycling", "pre_norm"],
            2,
            "mtp_recycling = 'pre_norm' is about the MTP layer",
        ),
    ],
)
def test_mistakes_are_one_line(folder: Path, tmp_path: Path, more: list[str], code: int, message: str) -> None:
    result = run(*words_of(folder, *more, "--output", str(tmp_path / "out")))
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (code, "", 1), result.stderr
    assert message in result.stderr
    assert not (tmp_path / "out").exists()

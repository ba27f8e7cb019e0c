"""The commands around acceptance: what they write and print, and how they refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from specdec.cli import app
from support.fakes import write_planted_checkpoint

SMALL = [
    "--max-tokens",
    "12",
    "-k",
    "1,2",
    "--temperature",
    "0,1",
    "--verification",
    "coupled,token",
    "--batch-size",
    "2",
]


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Of a planted checkpoint and a file of prompts."""
    folder = tmp_path_factory.mktemp("commands")
    prompts = folder / "some.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"text {i}", "category": "ab"[i % 2]}) + "\n" for i in range(6)))
    checkpoint = write_planted_checkpoint(folder / "checkpoint", noise=0.7)
    return ["--model", str(checkpoint), "--prompts", str(prompts)]


@pytest.fixture(scope="module")
def results(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("acceptance") / "out"
    result = run("acceptance", *arguments, *SMALL, "--output", str(folder))
    assert result.exit_code == 0, result.stderr
    assert "checks of acceptance against the model's own laws passed" in result.stdout
    return folder


def run(*words: str) -> Result:
    return CliRunner().invoke(app, ["eval", *words])


def test_acceptance_writes_everything(results: Path) -> None:
    document = json.loads((results / "results.json").read_text())
    settings = [
        (c["temperature"], c["verification"], c["num_speculative_tokens"])
        for c in document["cells"]
        if c["num_speculative_tokens"]
    ]
    rules = [(0.0, "greedy"), (1.0, "coupled"), (1.0, "token")]
    assert settings == [(*rule, k) for rule in rules for k in (1, 2)]
    assert document["prompts"]["categories"] == {"a": 3, "b": 3}
    assert document["provenance"]["command"].startswith("specdec")
    assert (results / "report.html").stat().st_size > 1000
    assert list(results.glob("*.png"))


def test_a_folder_with_results_is_kept_unless_resumed(results: Path, arguments: list[str]) -> None:
    before = (results / "results.json").read_bytes()
    again = [*arguments, *SMALL, "--output", str(results)]
    refused = run("acceptance", *again)
    assert (refused.exit_code, refused.stdout) == (1, "")
    assert "--resume" in refused.stderr
    assert (results / "results.json").read_bytes() == before
    resumed = run("acceptance", *again, "--resume", "--json")
    assert resumed.exit_code == 0, resumed.stderr
    assert json.loads(resumed.stdout)["cells"] == json.loads(before)["cells"]


def test_compare_is_for_ci(results: Path, tmp_path: Path) -> None:
    same = run("compare", str(results), str(results / "results.json"))
    assert same.exit_code == 0, same.stderr
    document = json.loads((results / "results.json").read_text())
    for cell in document["cells"]:
        for name, estimate in cell["all"].items():
            if name == "mean_acceptance_length" and estimate["value"] is not None:
                cell["all"][name] = {"value": 1.01, "low": 1.0, "high": 1.02}
    (tmp_path / "worse.json").write_text(json.dumps(document))
    worse = run("compare", str(results), str(tmp_path / "worse.json"), "--json")
    assert worse.exit_code == 1
    assert json.loads(worse.stdout)["passed"] is False
    assert run("compare", str(tmp_path / "worse.json"), str(results)).exit_code == 0
    assert run("compare", str(results), str(tmp_path / "none")).exit_code == 1


def test_teacher_forced_writes_what_it_found(arguments: list[str], tmp_path: Path) -> None:
    output = tmp_path / "t.json"
    words = [*arguments, "-k", "1,2", "--temperature", "0,1", "--output", str(output)]
    shown = run("teacher-forced", *words)
    assert shown.exit_code == 0, shown.stderr
    assert "contexts" in shown.stdout
    printed = run("teacher-forced", *words, "--json")
    written, again = json.loads(output.read_text()), json.loads(printed.stdout)
    assert written["rows"] == again["rows"]
    assert {(row["temperature"], row["verification"]) for row in written["rows"]} >= {(0, "greedy"), (1, "token")}
    assert all(1 < entry["value"] <= 3 for row in written["rows"] for entry in row["mean_acceptance_length"])


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["acceptance", "-k", "0"], 2, "num_speculative_tokens = 0 must be from 1 to 8"),
        (["acceptance", "-k", "x"], 2, "-k x: give integers"),
        (["acceptance", "--temperature", "hot"], 2, "--temperature hot: give numbers"),
        (["acceptance", "--verification", "magic"], 2, "verification: 'magic' is unknown"),
        (
            ["acceptance", "--mtp-recycling", "raw"],
            2,
            "mtp_recycling: 'raw' is unknown: choose among post_norm, pre_norm",
        ),
        (["acceptance", "--prompts", "none.jsonl"], 1, "none.jsonl"),
        (["acceptance", "--output", "/none/at/all"], 2, "there is no folder /none/at"),
        (["teacher-forced", "--stride", "0"], 2, "stride = 0"),
        (["compare", "/a", "/b", "--tolerance", "-1"], 2, "tolerance"),
    ],
)
def test_mistakes_are_one_line(words: list[str], code: int, message: str, tmp_path: Path) -> None:
    output = ["--output", str(tmp_path / "out")] if words[0] == "acceptance" and "--output" not in words else []
    result = run(*words, *output)
    assert result.exit_code == code, result.stderr
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""

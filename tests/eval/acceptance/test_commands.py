"""The commands around acceptance: what they write and print, and how they refuse."""

from __future__ import annotations

import json
import subprocess
import sys
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
    assert "checks of acceptance against the model's own distributions passed" in result.stdout
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
    report = (results / "report.html").read_text()
    assert report.count("data:image/svg+xml;base64,") >= 7
    assert {path.name for path in results.iterdir()} == {"cells", "report.html", "results.json", "run.json"}


@pytest.mark.slow
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
    assert "intervals are of differences prompt by prompt" in same.stdout
    document = json.loads((results / "results.json").read_text())
    for cell in document["cells"]:
        cell["by_prompt"]["accepted"] = [[0] * len(row) for row in cell["by_prompt"]["accepted"]]
        for name, estimate in cell["all"].items():
            if name == "mean_acceptance_length" and estimate["value"] is not None:
                cell["all"][name] = {"value": 1.01, "low": 1.0, "high": 1.02}
    (tmp_path / "worse.json").write_text(json.dumps(document))
    worse = run("compare", str(results), str(tmp_path / "worse.json"), "--json")
    assert worse.exit_code == 1
    assert json.loads(worse.stdout)["passed"] is False
    assert set(json.loads(worse.stdout)["detectable_losses"]) == {"mean acceptance length", "speed-up"}
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


WITHOUT_MATPLOTLIB = """
import importlib, pkgutil, sys
sys.modules["matplotlib"] = None
from specdec.cli import main
if sys.argv[1:] == ["import", "everything"]:
    import specdec.eval.acceptance as package
    names = [m.name for m in pkgutil.iter_modules(package.__path__) if m.name not in ("plots", "html")]
    for name in names:
        importlib.import_module(f"{package.__name__}.{name}")
    import specdec.eval.acceptance.compare, specdec.inspection.checkpoint, specdec.engine.async_engine
    print(len(names))
else:
    main()
"""


def run_without_matplotlib(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", WITHOUT_MATPLOTLIB, *words], capture_output=True, text=True)


def test_without_matplotlib_acceptance_is_refused_before_any_work(arguments: list[str], tmp_path: Path) -> None:
    result = run_without_matplotlib("eval", "acceptance", *arguments, "--output", str(tmp_path / "out"))
    assert (result.returncode, result.stdout) == (1, "")
    remedy = "charts are drawn with matplotlib, which is not installed: pip install matplotlib"
    assert result.stderr == f"specdec: the report's {remedy}\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_without_matplotlib_everything_else_works(results: Path) -> None:
    imported = run_without_matplotlib("import", "everything")
    assert imported.returncode == 0, imported.stderr
    assert int(imported.stdout) > 15
    for words in (["generate", "--help"], ["eval", "acceptance", "--help"], ["eval", "compare", *[str(results)] * 2]):
        done = run_without_matplotlib(*words)
        assert done.returncode == 0, done.stderr
        assert done.stdout


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

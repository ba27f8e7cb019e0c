"""What is logged, and how far long tasks say they are: to whom it goes, and to whom not."""

from __future__ import annotations

import io
import logging
import os
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from specdec import AsyncEngine, Engine, ModelError, SamplingParams, SpecdecWarning
from specdec.cli import app, common
from specdec.eval.acceptance.plan import AcceptanceOptions
from specdec.eval.acceptance.run import run_acceptance
from specdec.eval.acceptance.teacher import TeacherOptions, teacher_forced
from specdec.eval.lossless import LosslessOptions
from specdec.eval.lossless.plan import make_plan
from specdec.eval.speed.measure import SpeedOptions, measure_speed
from specdec.inspection.checkpoint import inspect_checkpoint
from specdec.kernels import select
from specdec.kernels.cpu.build import library_path
from specdec.kernels.progress import Progress, as_text
from specdec.model.weights import read_tensors
from specdec.step.scheduler import Scheduler
from support.fakes import KERNELS, NEEDS_COMPILER, write_planted_checkpoint

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_planted_checkpoint(tmp_path_factory.mktemp("planted"))


@pytest.fixture
def heard(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.DEBUG, "specdec")
    return caplog


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One that has its version and makes empty files, an empty cache, and none of the real ones."""
    path = tmp_path / "fast++"
    path.write_text("#!/bin/sh\nexit 0\n")
    path.chmod(0o755)
    monkeypatch.setenv("CXX", str(path))
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path / "cache"))
    return path


def assert_lines(found: list[str], *starts: str) -> None:
    assert len(found) == len(starts), found
    for line, start in zip(found, starts):
        assert line.startswith(start)


class Heard:
    """A `Progress` that keeps what it is told: the tasks in order, and how far each of them was."""

    def __init__(self) -> None:
        self.tasks: dict[str, list[int]] = {}
        self.totals: dict[str, int] = {}

    def __call__(self, what: str, done: int, total: int) -> None:
        assert what not in list(self.tasks)[:-1], "a task begins once the one before has ended"
        assert self.totals.setdefault(what, total) == total
        self.tasks.setdefault(what, []).append(done)

    def check(self, *tasks: str) -> None:
        assert tuple(self.tasks) == tasks
        for task, done in self.tasks.items():
            assert done == sorted(done)
            assert (done[0], done[-1]) == (0, self.totals[task])


@pytest.mark.parametrize("kernels", KERNELS)
def test_an_engine_says_what_it_is_made_of(planted: Path, heard: pytest.LogCaptureFixture, kernels: str) -> None:
    engine = Engine.from_pretrained(planted, kernels=kernels, num_pages=9, page_size=8)
    chosen = "reference (plain torch)" if kernels == "reference" else "cpu (C++)"
    messages = [r.getMessage() for r in heard.records if r.levelno == logging.INFO]
    assert_lines(messages, f"kernels: {chosen}, float32", "loading ", "loaded the weights in ", "KV cache: ")
    assert messages[1].endswith(f"KiB of weights from {planted}")
    size = engine.runtime.kv_cache.nbytes / 1024
    assert messages[3] == f"KV cache: 9 pages of 8 tokens, 72 tokens, {size:.4g} KiB in float32"
    assert f"reading {planted / 'model.safetensors'}" in heard.messages


def test_auto_says_why_another_backend_was_not_chosen(
    heard: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert select(CPU, torch.float64).name == "reference"
    assert heard.messages == ["auto: not cpu because it does not store torch.float64"]
    heard.clear()
    assert select(CPU, torch.float64, "reference").name == "reference"
    assert heard.messages == [], "it was asked for"
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.warns(SpecdecWarning):
        select(CPU, None)
    assert_lines(heard.messages, "auto: not cpu because no C++ compiler was found")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.filterwarnings("ignore:using the slow reference kernels")
def test_without_a_gpu_auto_says_so(planted: Path, heard: pytest.LogCaptureFixture) -> None:
    Engine.from_pretrained(planted)
    assert heard.messages[0] == "auto: not flashinfer because torch sees no CUDA device"
    heard.clear()
    Engine.from_pretrained(planted, device="cpu")
    assert not any("flashinfer" in message for message in heard.messages)


def test_compiling_is_announced_once(compiler: Path, heard: pytest.LogCaptureFixture) -> None:
    report = Heard()
    path = library_path(progress=report)
    messages = [r.getMessage() for r in heard.records if r.levelno == logging.INFO]
    assert_lines(messages, f"compiling the C++ kernels, once, into {path}", "compiled the C++ kernels in ")
    report.check("compiling the C++ kernels")
    heard.clear()
    library_path(progress=lambda *_: pytest.fail("nothing is compiled"))
    assert heard.messages == [f"the C++ kernels are {path}"]


def test_what_cannot_be_compiled_has_not_been_compiled(compiler: Path, heard: pytest.LogCaptureFixture) -> None:
    compiler.write_text("#!/bin/sh\nexit 1\n")
    report = Heard()
    with pytest.warns(SpecdecWarning, match="using the slow reference kernels"):
        select(CPU, None, progress=report)
    assert report.tasks == {"compiling the C++ kernels": [0]}
    assert any(message.startswith("auto: not cpu because ") for message in heard.messages)
    assert not any(message.startswith("compiled") for message in heard.messages)


@NEEDS_COMPILER
def test_compilation_is_heard_through_the_backend(compiler: Path) -> None:
    """Whose library does not load: the compiler made an empty file."""
    report = Heard()
    with pytest.raises(OSError, match="file too short"):
        select(CPU, None, "cpu", progress=report)
    report.check("compiling the C++ kernels")


@pytest.mark.parametrize("kernels", KERNELS)
def test_loading_is_heard_from_beginning_to_end(planted: Path, kernels: str) -> None:
    reports: list[Heard] = [Heard(), Heard()]
    engine = Engine.from_pretrained(planted, kernels=kernels, dtype="float32", progress=reports[0])
    AsyncEngine.from_pretrained(planted, kernels=kernels, dtype="float32", progress=reports[1])
    for report in reports:
        report.check("loading weights", "packing weights")
        assert len(report.tasks["loading weights"]) == 1 + len(engine.checkpoint.index.tensors)
        stored = read_tensors(engine.checkpoint.index.tensors)
        assert report.totals["loading weights"] == sum(tensor.nbytes for _, tensor in stored)


def test_measurements_are_heard_while_they_load(planted: Path, tmp_path: Path) -> None:
    """And those that would go on for long cannot, once they have loaded."""
    prompts, model = (str(tmp_path / "none.jsonl"),), {"model": str(planted), "kernels": "reference"}
    reports = [Heard() for _ in range(4)]
    make_plan(LosslessOptions(**model), reports[0])
    with pytest.raises(ValueError, match="exceed the model's context"):
        measure_speed(SpeedOptions(**model, prompt_tokens=9, max_tokens=260), loading=reports[1])
    with pytest.raises(ValueError, match=r"none\.jsonl"):
        run_acceptance(AcceptanceOptions(**model, prompts=prompts), tmp_path, loading=reports[2])
    with pytest.raises(ValueError, match=r"none\.jsonl"):
        teacher_forced(TeacherOptions(**model, prompts=prompts), progress=reports[3])
    for report in reports:
        report.check("loading weights", "packing weights")


@pytest.mark.filterwarnings("ignore:using the slow reference kernels")
def test_an_inspection_is_heard(planted: Path) -> None:
    report = Heard()
    assert inspect_checkpoint(planted, progress=report).mtp_check is not None
    report.check("loading weights", "packing weights", "checking the MTP layer")


def test_costs_are_logged_when_they_are_measured(
    planted: Path, heard: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("specdec.auto_length.measure._tables", {})
    engine = Engine.from_pretrained(planted, kernels="reference", max_num_seqs=2)
    heard.clear()
    engine.measure_costs()
    info, debug = heard.records
    assert (info.levelname, debug.levelname) == ("INFO", "DEBUG")
    assert "target={1: " in debug.getMessage()
    assert info.getMessage().startswith("measured costs in ")
    Engine.from_pretrained(planted, kernels="reference", max_num_seqs=2).measure_costs()
    assert [m for m in heard.messages if m.startswith("measured costs")] == [info.getMessage()], "once in a process"


def test_steps_log_nothing_unless_they_fail(planted: Path, heard: pytest.LogCaptureFixture) -> None:
    engine = Engine.from_pretrained(planted, kernels="reference")
    heard.clear()
    engine.generate(["hello", "world"], SamplingParams(max_tokens=9))
    assert heard.messages == []
    engine.runtime.model.target.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(ModelError):
        engine.generate(["hello again"], SamplingParams(max_tokens=9))
    (record,) = heard.records
    assert record.levelname == "ERROR"
    assert record.getMessage().startswith("a step failed for requests ['")
    assert record.exc_info is None, "it would keep the step's frames"
    assert "ModelError" in record.getMessage()


def test_a_failure_between_the_stages_names_the_requests(
    planted: Path, heard: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine.from_pretrained(planted, kernels="reference")
    heard.clear()
    stream = engine.stream("hello", SamplingParams(max_tokens=9))

    def broken(scheduler: Scheduler) -> None:
        raise ArithmeticError("of the scheduler")

    with monkeypatch.context() as patch:
        patch.setattr(Scheduler, "schedule", broken)
        with pytest.raises(ArithmeticError):
            next(stream)
    (record,) = heard.records
    start = f"a step failed between its stages for requests ['{stream._sequence.request_id}']\n"
    assert record.getMessage().startswith(start)
    assert record.levelname == "ERROR"
    assert "of the scheduler" in heard.text


@pytest.mark.slow
def test_the_library_configures_nothing(planted: Path) -> None:
    """No handler that writes, no level, no line on stderr though a step fails."""
    script = f"""
import logging
from specdec import Engine, ModelError, SamplingParams
engine = Engine.from_pretrained({str(planted)!r}, kernels="reference")
engine.runtime.model.target.model.norm.weight.data.fill_(float("nan"))
try:
    engine.generate("hello", SamplingParams(max_tokens=9))
except ModelError:
    print([type(h).__name__ for h in logging.getLogger("specdec").handlers], logging.getLogger("specdec").level)
    print(logging.getLogger().handlers)
"""
    environment = os.environ | {"SPECDEC_LOG_LEVEL": "DEBUG"}  # which is the command line's
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    assert (done.stdout, done.stderr) == ("['NullHandler'] 0\n[]\n", "")


def generate(planted: Path, *options: str, level: str | None = None) -> tuple[int, list[str]]:
    """The exit code and stderr's lines of `specdec [options] generate`."""
    arguments = [*options, "generate", "hello", "--model", str(planted), "--max-tokens", "3", "--kernels", "reference"]
    result = CliRunner().invoke(app, arguments, env={"SPECDEC_LOG_LEVEL": level})
    return result.exit_code, result.stderr.splitlines()


def test_verbose_shows_what_is_logged(planted: Path) -> None:
    (summary,) = generate(planted)[1]
    assert summary.startswith("3 tokens (length)")
    for wanted in (("-v",), ("--verbose",)):
        code, lines = generate(planted, *wanted)
        assert code == 0
        assert lines[0] == "INFO specdec.loading: kernels: reference (plain torch), float32"
        assert lines[-1].startswith("3 tokens (length)")
        assert not any(line.startswith("DEBUG") for line in lines)
    assert any(line.startswith("DEBUG specdec.model.weights: reading ") for line in generate(planted, "-vv")[1])
    assert len(generate(planted)[1]) == 1, "the handler has gone with its command"
    assert [type(h) for h in logging.getLogger("specdec").handlers] == [logging.NullHandler]


def test_the_environment_sets_a_level_and_the_option_wins(planted: Path) -> None:
    assert any(line.startswith("DEBUG ") for line in generate(planted, level="debug")[1])
    assert len(generate(planted, level="WARNING")[1]) == len(generate(planted, level="")[1]) == 1
    lines = generate(planted, "-v", level="WARNING")[1]
    assert any(line.startswith("INFO ") for line in lines)
    assert generate(planted, level="loud") == (
        2,
        ["specdec: SPECDEC_LOG_LEVEL = 'loud' is unknown: choose one of DEBUG, INFO, WARNING, ERROR, CRITICAL"],
    )


def drawn(monkeypatch: pytest.MonkeyPatch, *, terminal: bool) -> io.StringIO:
    """Where the command line writes its messages from now on."""
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=100, color_system=None)
    monkeypatch.setattr(common, "err", console)
    return file


def work(progress: Progress) -> None:
    progress("compiling", 0, 1)
    progress("compiling", 1, 1)
    for done in range(6):
        progress("loading [weights]", done, 5)
        common.say(f"line {done}", "none")


def test_a_bar_is_drawn_on_a_terminal_and_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    file = drawn(monkeypatch, terminal=True)
    with common.progress_bar() as progress:
        work(progress)
    output = file.getvalue()
    assert "compiling ━" in output
    assert "loading [weights] " in output
    assert "  0% 0:00:00" in output
    assert "line 5\n" in output
    left = output.rpartition("\x1b[2K")[2]  # after the line was cleared for the last time
    assert re.sub(r"\x1b\[[?0-9]*[a-zA-Z]", "", left).strip() == ""


def test_without_a_terminal_nothing_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    file = drawn(monkeypatch, terminal=False)
    with common.progress_bar() as progress:
        work(progress)
    assert file.getvalue() == "".join(f"line {done}\n" for done in range(6))


@pytest.mark.slow
def test_generate_measures_before_auto_requests(planted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task of its own: the stream has no bar."""
    report = Heard()
    monkeypatch.setattr(sys.modules["specdec.cli.generate"], "progress_bar", lambda: nullcontext(report))
    arguments = ["generate", "hello", "--model", str(planted), "--max-tokens", "3", "--kernels", "reference"]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    report.check("loading weights", "packing weights")
    report.tasks.clear()
    assert CliRunner().invoke(app, [*arguments, "-k", "auto"]).exit_code == 0
    report.check("loading weights", "packing weights", "measuring what forwards cost")


def test_a_task_in_one_line() -> None:
    assert as_text("loading weights", 1, 3) == "loading weights: 33 %"
    assert as_text("compiling", 0, 1) == "compiling"

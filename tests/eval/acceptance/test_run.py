"""Whole runs: what is generated, what is kept, and that a killed run goes on as if nothing had happened."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from specdec import Engine
from specdec.errors import CheckpointError
from specdec.eval.acceptance import generate
from specdec.eval.acceptance import run as run_module
from specdec.eval.acceptance.generate import Request, Round, analysed, run_round, run_turn, ttfts
from specdec.eval.acceptance.metrics import cell_metrics
from specdec.eval.acceptance.plan import AcceptanceOptions, Cell
from specdec.eval.acceptance.replay import Reader
from specdec.eval.acceptance.results import read_results, write_results
from specdec.eval.acceptance.run import Progress, run_acceptance
from specdec.eval.acceptance.store import Store, as_document, as_record
from specdec.eval.prompts import Prompt
from specdec.eval.speed import planted
from support.fakes import NEEDS_COMPILER, write_checkpoint, write_planted_checkpoint
from support.planted_text import greedy_text, load_recipe

pytestmark = pytest.mark.usefixtures("one_thread")
TEXTS = ["def f(x):", "import os", "class A:\n    pass", "x = [1, 2]", "while True:\n", "return self._name"]
TIMES = {
    "ttft_s", "tokens_per_s", "tokens_per_s_per_request", "speedup", "decode_s", "plain_decode_s", "started",
    "finished", "command",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose drafts are accepted now and then, and prompts of two turns and of one."""
    folder = tmp_path_factory.mktemp("run")
    write_planted_checkpoint(folder / "checkpoint")
    lines = [{"question_id": 0, "category": "talk", "turns": TEXTS[:2]}]
    lines += [{"prompt": text, "category": "code"} for text in TEXTS[2:]]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def options_of(folder: Path, **fields: Any) -> AcceptanceOptions:
    small: dict[str, Any] = {
        "num_speculative_tokens": (1, 3), "temperatures": (0.0, 0.8), "verification": ("coupled", "block"),
        "batch_sizes": (1, 2), "max_tokens": 12, "check_contexts": 12, "repeats": 2,
    }  # fmt: skip
    return AcceptanceOptions(
        model=str(folder / "checkpoint"), prompts=(str(folder / "prompts.jsonl"),), **(small | fields)
    )


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    seen: list[Progress] = []
    document = run_acceptance(options_of(folder), folder / "undisturbed", command="here", progress=seen.append)
    write_results(document, folder / "undisturbed")
    finished = [p.finished.cell for p in seen if p.finished is not None]
    assert finished == options_of(folder).cells
    assert [p.done for p in seen] == list(range(seen[0].total))
    return document


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if k not in TIMES}
    return [without_times(v) for v in value] if isinstance(value, list) else value


def test_the_document_is_one_of_the_schema_and_whole(undisturbed: dict[str, Any], folder: Path) -> None:
    assert without_times(read_results(folder / "undisturbed")) == without_times(undisturbed)
    options = options_of(folder)
    assert undisturbed["options"] == json.loads(json.dumps(asdict(options)))
    assert undisturbed["prompts"]["categories"] == {"talk": 1, "code": 4}
    assert [Cell(**{k: c[k] for k in asdict(options.cells[0])}) for c in undisturbed["cells"]] == options.cells
    for cell in undisturbed["cells"]:
        assert cell["num_requests"] == 2 * 6, "two repeats of five conversations, one of two turns"
        assert set(cell["categories"]) == {"talk", "code"}
        speculative = cell["num_speculative_tokens"] > 0
        assert (cell["check"] is not None) == speculative
        if speculative:
            assert 8 <= cell["check"]["num_contexts"] <= options.check_contexts
            assert cell["check"]["passed"], cell["check"]["message"]
            assert cell["all"]["speedup"]["value"] > 0
        else:
            assert cell["all"]["speedup"]["value"] == pytest.approx(1)
            assert cell["all"]["block_efficiency"]["value"] == 1
    assert undisturbed["experts"]["num_experts"] == 8


def test_coupled_and_greedy_cells_have_plain_decodings_tokens(undisturbed: dict[str, Any]) -> None:
    for cell in undisturbed["cells"]:
        if cell["verification"] != "block":
            plain = next(c for c in undisturbed["cells"] if c["temperature"] == cell["temperature"])
            assert cell["num_output_tokens"] == plain["num_output_tokens"]


def test_batch_size_changes_nothing_but_times(undisturbed: dict[str, Any]) -> None:
    if undisturbed["provenance"]["kernels"] == "reference":
        pytest.skip("rounding depends on the batch")
    by_size = {b: [c for c in undisturbed["cells"] if c["batch_size"] == b] for b in (1, 2)}
    for one, two in zip(by_size[1], by_size[2]):
        analysed_ones = {"check", "calibration", "by_expected_acceptance", "by_entropy", "alpha"}  # contexts differ
        kept = {"batch_size", *analysed_ones}
        ours, theirs = ({k: v for k, v in without_times(c).items() if k not in kept} for c in (one, two))
        assert ours == theirs


RUNNER = """
import json, sys, torch
from pathlib import Path
from specdec.eval.acceptance.plan import AcceptanceOptions
from specdec.eval.acceptance.run import run_acceptance
torch.set_num_threads(1)
fields = {k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(sys.argv[1]).items()}
run_acceptance(AcceptanceOptions(**fields), Path(sys.argv[2]), resume=True)
"""


def run_and_kill(options: AcceptanceOptions, output: Path, after: int) -> None:
    """Starts the run in a process of its own and kills it when `after` parts are finished."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", RUNNER, json.dumps(asdict(options)), str(output)], env=environment
    )
    try:
        deadline = time.monotonic() + 120
        while process.poll() is None and len(list((output / "cells").glob("*.json"))) < after:
            assert time.monotonic() < deadline
            time.sleep(0.002)
    finally:
        process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it was to be killed in the middle"


@pytest.mark.slow
def test_a_killed_run_goes_on_without_losing_or_repeating_anything(
    folder: Path, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    options, output = options_of(folder), tmp_path / "killed"
    run_and_kill(options, output, 5)
    run_and_kill(options, output, 23)
    (output / "cells" / ".t0-b1-k0-plain.repeat0.round0.json.1.partial").write_text("{")  # as a kill may leave one
    before = {path: path.stat().st_mtime_ns for path in (output / "cells").glob("*.json")}
    assert 23 <= len(before) < 41
    document = run_acceptance(options, output, resume=True)
    assert without_times(document) == without_times(undisturbed)
    assert document["provenance"]["started"] == json.loads((output / "run.json").read_text())["started"]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    parts = list((output / "cells").glob("[!.]*.json"))
    again = run_acceptance(options, output, resume=True)
    assert without_times(again) == without_times(document)
    assert again["cells"][3]["all"] == document["cells"][3]["all"], "times of finished parts are kept, too"
    assert set((output / "cells").glob("[!.]*.json")) == set(parts)


def test_results_of_something_else_are_not_continued(folder: Path, undisturbed: dict[str, Any], tmp_path: Path) -> None:
    output = folder / "undisturbed"
    with pytest.raises(ValueError, match=r"holds results already \(run.json\): go on with --resume, or choose another"):
        run_acceptance(options_of(folder), output)
    for fields, difference in (
        ({"max_tokens": 13}, "max_tokens = 12 instead of 13"),
        ({"temperatures": (0.0,)}, r"temperatures = \[0.0, 0.8\] instead of \[0.0\]"),
        ({"seed": 1, "repeats": 1}, r"seed = 0 instead of 1 \(and 1 differences more\)"),
        ({"num_prompts": 2}, "differences more"),
    ):
        with pytest.raises(ValueError, match=f"another run, with .*{difference}"):
            run_acceptance(options_of(folder, **fields), output, resume=True)
    other = write_planted_checkpoint(tmp_path / "checkpoint", seed=1)
    options = replace(options_of(folder), model=str(other))
    with pytest.raises(ValueError, match=r"model = .* \(and 1 differences more\)"):
        run_acceptance(options, output, resume=True)


def test_a_checkpoint_that_has_changed_in_place_is_seen(folder: Path, tmp_path: Path) -> None:
    store = Store.open(tmp_path / "new", {"checkpoint": "a", "max_tokens": 3}, resume=True)
    store.save("x", {"wall_s": 1.0})
    with pytest.raises(ValueError, match=r'checkpoint = "a" instead of "b"'):
        Store.open(tmp_path / "new", {"checkpoint": "b", "max_tokens": 3}, resume=True)
    assert Store.open(tmp_path / "new", {"checkpoint": "a", "max_tokens": 3}, resume=True).load("x") == {"wall_s": 1.0}


def test_a_run_killed_at_its_very_beginning_goes_on(tmp_path: Path) -> None:
    Store.open(tmp_path / "new", {"a": 1}, resume=False)
    (tmp_path / "new" / "cells").rmdir()
    store = Store.open(tmp_path / "new", {"a": 1}, resume=True)
    store.save("x", {})
    assert store.has("x")


def test_results_without_their_parts_are_not_continued(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text("{}")
    for resume in (False, True):
        with pytest.raises(ValueError, match=r"holds results already \(results.json\)"):
            Store.open(tmp_path, {}, resume=resume)


def test_records_are_kept_to_the_bit(folder: Path) -> None:
    engine = Engine.from_pretrained(folder / "checkpoint", kernels="reference")
    options, cell, done = options_of(folder), Cell(0.8, 2, "block", "sampled", 3), Round([], [])
    run_turn(engine, options, cell, [Request(i, "x", 0, [5 + i]) for i in range(3)], 0, done)
    for record in analysed(done, Reader(engine, 3), cell, 5):
        again = as_record(json.loads(json.dumps(as_document(record))))
        for name, value in vars(record).items():
            if name != "analysis":
                assert np.array_equal(getattr(again, name), value), name
        assert (again.analysis is None) == (record.analysis is None)
        if record.analysis is not None and again.analysis is not None:
            for name, value in vars(record.analysis).items():
                assert np.array_equal(getattr(again.analysis, name), value, equal_nan=not np.isscalar(value)), name


def test_the_final_loop_is_that_of_the_output_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "final_loop", sum)
    engine = Engine.from_pretrained(folder / "checkpoint", kernels="reference")
    done = Round([], [])
    requests = [Request(i, "x", 0, [5 + i, 6]) for i in range(3)]
    run_turn(engine, options_of(folder), Cell(0.0, 2, "greedy", "greedy", 3), requests, 0, done)
    assert [r.num_loop_tokens for r in done.records] == [sum(c.token_ids[2:]) for c in done.completions]


def test_contexts_are_analysed_up_to_the_number_and_from_the_first_on(folder: Path) -> None:
    engine = Engine.from_pretrained(folder / "checkpoint", kernels="reference")
    options, cell, done = options_of(folder), Cell(0.8, 2, "block", "sampled", 3), Round([], [])
    run_turn(engine, options, cell, [Request(i, "x", 0, [5 + i]) for i in range(4)], 0, done)
    sizes = [len(r.starts) for r in done.records]
    done.completions[1] = replace(done.completions[1], starts=[], drafts=[])
    wanted = sizes[0] + 2
    records = analysed(done, Reader(engine, 3), cell, wanted)
    counts = [None if r.analysis is None else len(r.analysis.indices) for r in records]
    assert counts == [sizes[0], None, 2, None], "the second never drafted"
    nothing = np.zeros(0, np.int64)
    records[1] = replace(records[1], starts=nothing, num_drafted=nothing, num_accepted=nothing)
    kept = [as_record(json.loads(json.dumps(as_document(record)))) for record in records]
    assert cell_metrics(cell, kept, [], [1.0]).as_dict() == cell_metrics(cell, records, [], [1.0]).as_dict()


def test_turns_follow_one_another_and_end_where_the_context_does(folder: Path) -> None:
    engine = Engine.from_pretrained(folder / "checkpoint", kernels="reference")
    options, cell = options_of(folder), Cell(0.0, 2, "greedy", "greedy", 3)
    talk = Prompt((TEXTS[0], TEXTS[1], "z" * 250, "never"), "talk", "here")
    done = run_round(engine, options, cell, [(4, talk), (7, Prompt((TEXTS[2],), "code", "there"))], 1)
    assert [(r.prompt, r.turn, r.category, r.repeat) for r in done.records] == [
        (4, 0, "talk", 1), (7, 0, "code", 1), (4, 1, "talk", 1),
    ]  # fmt: skip
    first, _, second = done.completions
    start = len(engine.checkpoint.encode(TEXTS[0]))
    answer = engine.tokenizer.decode(first.token_ids[start:])
    asked = engine.checkpoint.encode(talk.text([answer]))
    assert second.token_ids[: len(asked)] == asked
    assert [c.seed for c in done.completions] == [options.request_seed(p, t, 1) for p, t in ((4, 0), (7, 0), (4, 1))]
    chat = run_round(engine, replace(options, chat=True), cell, [(4, talk)], 1)
    expected = engine.checkpoint.encode("<|user|>" + TEXTS[0] + "<|assistant|>")
    assert chat.completions[0].token_ids[: len(expected)] == expected


def test_waiting_for_a_slot_is_no_part_of_the_first_tokens_time() -> None:
    """Two slots; the third request gets the one that is free first, at 5."""
    times = [(0.0, 1.0, 9.0), (0.0, 1.5, 5.0), (0.0, 5.5, 7.0), (0.0, 7.25, 8.0)]
    outputs: Any = [
        SimpleNamespace(stats=SimpleNamespace(arrival_s=a, first_token_s=f, last_token_s=e)) for a, f, e in times
    ]
    assert ttfts(outputs, 2) == [1.0, 1.5, 0.5, 0.25]
    assert ttfts(outputs, 4) == [1.0, 1.5, 5.5, 7.25]


def test_prompts_that_do_not_fit_are_refused_or_counted(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps({"prompt": "x" * n, "source": f"text {n}"}) + "\n" for n in (5, 245, 244)))
    options = replace(options_of(folder), prompts=(str(path),))
    engine = Engine.from_pretrained(folder / "checkpoint", kernels="reference")
    with pytest.raises(ValueError, match=r"text 245 of long.jsonl has 245 tokens, .*max_tokens = 12 .* 256: lower"):
        run_module._load_prompts(options, engine)
    kept = run_module._load_prompts(replace(options, skip_bad=True), engine)
    assert ([p.source for p in kept.prompts], kept.num_skipped) == (["text 5", "text 244"], 1)
    with pytest.raises(ValueError, match=r"no prompt of long.jsonl fits"):
        run_module._load_prompts(replace(options, skip_bad=True, max_tokens=255), engine)


def test_a_checkpoint_without_an_mtp_layer_is_refused(folder: Path, tmp_path: Path) -> None:
    plain = write_checkpoint(tmp_path / "plain", with_mtp=False)
    with (
        pytest.warns(match="no MTP layer"),
        pytest.raises(CheckpointError, match="does not speculate, there is no acceptance"),
    ):
        run_acceptance(replace(options_of(folder), model=str(plain)), tmp_path / "output")
    assert not (tmp_path / "output").exists()


@pytest.mark.slow
def test_laws_that_depend_on_the_batch_are_no_yardstick(folder: Path, tmp_path: Path) -> None:
    options = options_of(
        folder, kernels="reference", dtype="bfloat16", batch_sizes=(1,), repeats=1, temperatures=(0.8,), num_prompts=1
    )
    with pytest.raises(ValueError, match=r"choose dtype = 'float32' or check_contexts = 0"):
        run_acceptance(options, tmp_path / "output")
    document = run_acceptance(replace(options, check_contexts=0), tmp_path / "output")
    assert all(cell["check"] is None for cell in document["cells"])


SHAPE = planted.PlantedShape(
    hidden_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
    intermediate_size=96, moe_intermediate_size=32, n_routed_experts=8, num_experts_per_tok=2, vocab_size=1024,
    max_position_embeddings=512,
)  # fmt: skip


def right_drafts(folder: Path, acceptance: float) -> tuple[Tensor, Tensor]:
    """pi [V], and whether the draft after each token is right [V], without the MTP layer: what its projection reads is
    the last token alone."""
    config = planted.parse_config(planted._config(SHAPE, "float32"))
    tensors, recipe = planted._plant(config, acceptance, torch.float32, 0)
    assert recipe == load_recipe(folder)
    projection = next(t for name, t in tensors.items() if name.endswith("eh_proj.weight"))[:, : SHAPE.hidden_size]
    drafts = (planted._rms_normed(tensors["model.embed_tokens.weight"]) @ projection.T) @ tensors["lm_head.weight"].T
    following = planted.successors(SHAPE.vocab_size, 0)
    return following, drafts.argmax(-1) == following


@pytest.mark.slow
@pytest.mark.parametrize("acceptance", [1.0, 0.6])
def test_planted_acceptance_is_found(tmp_path: Path, acceptance: float) -> None:
    """Greedy text runs along a known cycle and a draft is right or wrong by the token before it alone."""
    k, max_tokens = 3, 40
    planted.write_planted_checkpoint(tmp_path / "c", SHAPE, acceptance=acceptance, dtype="float32")
    following, right = right_drafts(tmp_path / "c", acceptance)
    engine = Engine.from_pretrained(tmp_path / "c", max_num_seqs=32)
    cell, done = Cell(0.0, 32, "greedy", "greedy", k), Round([], [])
    prompts = planted.planted_prompts(SHAPE.vocab_size, 32, 3)
    requests = [Request(i, "text", 0, tokens) for i, tokens in enumerate(prompts)]
    run_turn(engine, AcceptanceOptions(max_tokens=max_tokens), cell, requests, 0, done)
    metrics = cell_metrics(cell, analysed(done, Reader(engine, k), cell, 400), [], [done.wall_s])
    assert metrics.check is not None
    assert metrics.check.passed
    drafted = accepted = verifications = 0
    for prompt in prompts:
        token, left = int(following[prompt[-1]]), max_tokens - 1
        while left > 1 and token != planted.END_TOKEN_ID:
            allowed, run, at = min(k, left - 1), 0, token
            while run < allowed and right[at]:
                at, run = int(following[at]), run + 1
            emitted = greedy_text(tmp_path / "c", [token], run + 1)
            drafted, accepted, verifications = drafted + allowed, accepted + run, verifications + 1
            ended = planted.END_TOKEN_ID in emitted
            token, left = planted.END_TOKEN_ID if ended else emitted[-1], left - len(emitted)
    exact = {"mean_acceptance_length": 1 + accepted / verifications, "draft_efficiency": accepted / drafted}
    for name, value in exact.items():
        estimate = getattr(metrics.all, name)
        assert estimate.low is not None
        assert estimate.high is not None
        assert estimate.value == pytest.approx(value, abs=0.02 if acceptance < 1 else 1e-12)  # what the layer shifts
        assert estimate.low <= value <= estimate.high
    if acceptance == 1:
        assert [e.value for e in metrics.all.conditional] == [1, 1, 1]
        assert all(b.mean is None or b.acceptance.value == 1 for b in metrics.by_entropy)


@pytest.mark.slow
@NEEDS_COMPILER
def test_mutant_that_repeats_a_request_or_takes_another_seed_is_seen(
    folder: Path, undisturbed: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison of documents is no empty one."""
    monkeypatch.setattr(AcceptanceOptions, "request_seed", lambda self, prompt, turn, repeat: prompt)
    document = run_acceptance(options_of(folder), tmp_path / "other")
    assert without_times(document) != without_times(undisturbed)

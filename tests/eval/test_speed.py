"""Speed measurement: what is counted is right; how long it takes is not a test's business."""

from __future__ import annotations

import gc
import io
import json
import statistics
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from specdec import Engine, SamplingParams, SpeculationParams
from specdec.cli import app
from specdec.cost import CostTable, Curve
from specdec.eval.speed.costs import measure_speed_costs
from specdec.eval.speed.measure import SpeedOptions, SpeedReport, measure_speed
from specdec.eval.speed.peers import PeerSpec
from specdec.eval.speed.planted import PlantedShape, write_planted_checkpoint
from specdec.eval.speed.report import as_json, print_report
from specdec.eval.speed.roofline import read_bandwidth, traced
from specdec.kernels import select
from support.fakes import NEEDS_COMPILER, tiny_config, write_checkpoint

SHAPE = PlantedShape(128, 3, 4, 2, 32, 64, 32, 8, 2, vocab_size=512, max_position_embeddings=256)
OPTIONS = SpeedOptions(
    batch_sizes=(1, 3), draft_lengths=(0, 2), prefill_lengths=(40, 10_000), num_prompts=2, prompt_tokens=9,
    max_tokens=40, repeats=2,
)  # fmt: skip
# Takes 10 ms a token, whatever the batch.
PEER = """
    sys.path.append(sys.argv[3])
    from peer_drivers.protocol import Answer, serve

    def load(settings):
        def generate(prompts, max_tokens):
            k = settings.num_speculative_tokens
            return Answer(0.01 * max_tokens, [[7] * max_tokens] * len(prompts), 6 * k or None, 3 * k or None)
        return f"fake {settings.dtype}", generate

    del sys.argv[1]
    serve(load)
"""


@pytest.fixture(scope="module", autouse=True)
def _no_garbage_collection() -> object:
    """A pass over all that the test suite holds takes longer than what is timed here."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("planted") / "certain"
    write_planted_checkpoint(folder, SHAPE)
    return folder


@pytest.fixture(scope="module")
def report(planted: Path, tmp_path_factory: pytest.TempPathFactory) -> SpeedReport:
    program = tmp_path_factory.mktemp("peer") / "python"
    program.write_text(f"#!{sys.executable}\nimport sys\ndel sys.argv[1]\n{textwrap.dedent(PEER)}")
    program.chmod(0o755)
    peers = (PeerSpec("llamacpp", program), PeerSpec("transformers", program))
    return measure_speed(replace(OPTIONS, model=str(planted), peers=peers, peer_draft_lengths=(0, 2)))


def weight_bytes(
    shape: PlantedShape, num_experts: float, *, dense_layers: int, moe_layers: int, itemsize: int
) -> float:
    """Attention, MLPs, router (fp32), norms, head and one row of embeddings, written out once more."""
    h, d = shape.hidden_size, shape.head_dim
    heads, kv, width = shape.num_attention_heads, shape.num_key_value_heads, shape.moe_intermediate_size
    attention = (heads + 2 * kv) * d * h + h * heads * d
    dense = attention + 3 * h * shape.intermediate_size
    moe = attention + 3 * h * width * (1 + num_experts)
    layers = dense_layers + moe_layers
    router = 4 * (shape.n_routed_experts * h + shape.n_routed_experts) * moe_layers
    matrices = dense_layers * dense + moe_layers * moe + shape.vocab_size * h + h
    return itemsize * matrices + router + 4 * h * (2 * layers + 1) + 4 * 2 * d * layers


def test_bytes_are_those_of_every_weight_once(planted: Path) -> None:
    engine = Engine.from_pretrained(planted, kernels="reference", dtype="float32")
    with traced(engine) as counts:
        engine.generate([[5, 6, 7]], SamplingParams(max_tokens=4, temperature=0, speculation=SpeculationParams(0)))
    assert (counts.num_target_forwards, counts.num_mtp_forwards, counts.num_layer_runs) == (4, 0, 8)
    kv_row = 2 * SHAPE.num_key_value_heads * SHAPE.head_dim * 4
    assert counts.kv_cache == SHAPE.num_hidden_layers * kv_row * (3 + 4 + 5 + 6)
    mean = counts.num_expert_reads / counts.num_layer_runs
    assert 2 <= mean <= 3.0, "three rows choose 2 to 6 of 8 experts, one row 2"
    expected = 4 * weight_bytes(SHAPE, mean, dense_layers=1, moe_layers=2, itemsize=4)
    expected += 2 * SHAPE.hidden_size * 4  # the prompt's forward has three rows
    assert counts.weights == round(expected)


def test_a_draft_reads_the_mtp_layer_and_the_head_once(planted: Path) -> None:
    engine = Engine.from_pretrained(planted, dtype="float32")
    k = 3
    with traced(engine) as counts:
        engine.generate([5, 6, 7], SamplingParams(max_tokens=5, temperature=0, speculation=SpeculationParams(k)))
    assert (counts.num_target_forwards, counts.num_mtp_forwards) == (2, k)
    for temperature in (0.0, 1.0):
        with traced(engine) as counts:
            engine.generate([5, 6], SamplingParams(max_tokens=9, temperature=temperature, seed=0, ignore_eos=True))
        assert counts.num_mtp_forwards == 3 * (counts.num_target_forwards - 1)
    assert engine.runtime.model.target.decoder._trace is None


def test_a_traced_run_generates_the_same(planted: Path) -> None:
    engine = Engine.from_pretrained(planted)
    params = SamplingParams(max_tokens=20, temperature=0, speculation=SpeculationParams(4))
    plain = engine.generate([[5], [9, 3]], params)
    with traced(engine):
        watched = engine.generate([[5], [9, 3]], params)
    assert [o.token_ids for o in plain] == [o.token_ids for o in watched]


def test_costs_are_interpolated_and_predict_speed() -> None:
    table = {1: 1.0, 2: 1.5, 4: 2.5}
    curve = Curve(table)
    assert [curve(n) for n in (0, 1, 2, 3, 4, 8, 1000)] == [0.0, 1.0, 1.5, 2.0, 2.5, 5.0, 625.0]
    assert curve.interpolate(0.5) == 1.0
    costs = CostTable(table, mtp_extend={1: 0.25, 2: 0.5, 4: 1.0}, mtp_step={1: 0.25, 2: 0.5})
    assert costs.predict(1, 0, 1.0) == 1.0
    assert costs.predict(1, 3, 2.5) == pytest.approx(2.5 / (2.5 + 0.625 + 2 * 0.25))
    assert costs.predict(2, 1, 2.0) == pytest.approx(4 / (2.5 + 1.0))


def test_costs_are_measured_for_every_number_of_rows(planted: Path) -> None:
    engine = Engine.from_pretrained(planted, max_num_seqs=3)
    costs = measure_speed_costs(engine, (1, 3), (0, 1, 4))
    assert list(costs.target) == list(costs.mtp_extend) == [1, 2, 3, 5, 6, 15]
    assert list(costs.mtp_step) == [1, 3]
    assert all(seconds > 0 for seconds in costs.target.values())


@pytest.mark.parametrize("kernels", ["reference", pytest.param("cpu", marks=NEEDS_COMPILER)])
def test_read_bandwidth_is_of_this_world(kernels: str) -> None:
    backend = select(torch.device("cpu"), torch.float32, kernels)
    assert 1e8 < read_bandwidth(backend, num_bytes=2**24, repeats=3) < 1e13


def test_a_report_has_every_setting_and_its_figures(report: SpeedReport) -> None:
    ours = [(c.batch_size, c.num_draft_tokens) for c in report.decoding if c.engine == "specdec"]
    assert ours == [(1, 0), (1, 2), (3, 0), (3, 2)]
    for cell in report.decoding:
        assert len(cell.rates) == OPTIONS.repeats
        if cell.engine != "specdec":
            continue
        assert cell.step_bytes is not None
        assert cell.distinct_experts is not None
        assert cell.predicted is not None
        assert 2 <= cell.distinct_experts <= 8
        assert (cell.mean_acceptance_length is None) == (cell.num_draft_tokens == 0)
        if cell.num_draft_tokens:
            assert 2.8 < (cell.mean_acceptance_length or 0) <= 3, "all is accepted but where the output ends"
        if report.machine["kernels"] == "cpu":
            assert 0 < (cell.dispatch_share or 0) < (cell.python_share or 0) < 1
    assert [p.num_tokens for p in report.prefill] == [40] * 3, "10,000 tokens are beyond the context"


def test_peers_are_timed_like_us(report: SpeedReport) -> None:
    fake = [c for c in report.decoding if c.engine != "specdec"]
    # llama.cpp at both K and batch sizes; transformers drafts one token for one prompt
    assert [(c.batch_size, c.num_draft_tokens) for c in fake] == [
        (1, 0), (1, 2), (1, 0), (1, 1), (3, 0), (3, 2), (3, 0),
    ]  # fmt: skip
    for cell in fake:
        assert statistics.median(cell.rates) == pytest.approx(100 * cell.batch_size), (
            "10 ms a token, prefill subtracted"
        )
        assert cell.mean_acceptance_length == (None if cell.num_draft_tokens == 0 else 1 + cell.num_draft_tokens / 2)


def test_a_report_prints_and_is_json(report: SpeedReport) -> None:
    console = Console(width=250, record=True, file=io.StringIO())
    print_report(report, console)
    text = console.export_text()
    for part in ("read bandwidth:", "GB/s", "of bandwidth", "of predicted", "Prefill", "MTP, ms", "fake "):
        assert part in text
    document = json.loads(json.dumps(as_json(report)))
    first = document["decoding"][0]
    assert first["tokens_per_s"] == statistics.median(first["rates"])
    least_s = first["step_bytes"] / document["read_bandwidth_bytes_per_s"]
    assert first["fraction_of_bandwidth"] == pytest.approx(least_s / statistics.median(first["step_s"]))


def test_options_are_checked_before_anything_runs(planted: Path) -> None:
    for change, message in (
        ({"batch_sizes": ()}, "batch_sizes must not be empty"),
        ({"draft_lengths": (1, 2)}, "draft_lengths must hold 0"),
        ({"draft_lengths": (0, 9)}, "draft_lengths: 9 must be from 0 to 8"),
        ({"batch_sizes": (0,)}, "batch_sizes: 0 must be from 1 to 256"),
        ({"max_tokens": 1}, "max_tokens = 1 must be at least 2"),
        ({"repeats": 0}, "repeats = 0 must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            SpeedOptions(**change)
    with pytest.raises(ValueError, match=r"prompt_tokens \+ max_tokens = 269 exceed the model's context, 256"):
        measure_speed(replace(OPTIONS, model=str(planted), prompt_tokens=9, max_tokens=260))


@pytest.mark.slow
def test_the_command_prints_tables_or_json_and_refuses_nonsense(planted: Path, tmp_path: Path) -> None:
    runner = CliRunner()
    small = ["eval", "speed", "--model", str(planted), "--batch-sizes", "1", "--draft-lengths", "0,1"]
    small += ["--repeats", "1", "--num-prompts", "6", "--max-tokens", "40", "--prefill-lengths", "20"]
    result = runner.invoke(app, small)
    assert result.exit_code == 0, result.stderr
    assert "Decoding, 32-token prompts, 40 tokens each" in result.stdout
    result = runner.invoke(app, [*small, "--json"])
    assert json.loads(result.stdout)["options"]["batch_sizes"] == [1]
    for arguments, code, message in (
        (["--batch-sizes", "x"], 2, "--batch-sizes x: give integers with commas between them"),
        (["--draft-lengths", "3"], 2, "draft_lengths must hold 0"),
        (["--peer", "llama.cpp=/x"], 2, "peer 'llama.cpp' is unknown"),
        (["--peer", f"llamacpp={tmp_path}/none"], 2, "is no program"),
        (["--model", str(tmp_path / "none")], 1, "none"),
        (["--dtype", "int4"], 1, "dtype = 'int4' is unknown"),
    ):
        result = runner.invoke(app, [*small, *arguments])
        assert result.exit_code == code, (arguments, result.stderr)
        assert message in result.stderr
        assert result.stderr.count("\n") == 1
        assert result.stdout == ""


def test_int8_weights_are_an_explicit_choice(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, tiny_config(torch_dtype="bfloat16"), dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="int8 needs kernels = 'cpu'"):
        Engine.from_pretrained(folder, dtype="int8", kernels="reference")
    with pytest.raises(ValueError, match="kv_dtype = 'int8' is unknown"):
        Engine.from_pretrained(folder, kv_dtype="int8")


@NEEDS_COMPILER
def test_int8_reads_half_the_bytes_and_keeps_speculation_exact(planted: Path) -> None:
    full, quantised = (Engine.from_pretrained(planted, dtype=dtype) for dtype in ("bfloat16", "int8"))
    assert Engine.from_pretrained(planted).runtime.model.target.kernels.dtype == torch.bfloat16
    params = [SamplingParams(max_tokens=20, temperature=0, speculation=SpeculationParams(k)) for k in (0, 3)]
    counts = []
    for engine in (full, quantised):
        with traced(engine) as read:
            outputs = engine.generate([[5, 6], [5, 6]], params)
        counts.append(read.weights)
        assert outputs[0].token_ids == outputs[1].token_ids
    assert 0.5 < counts[1] / counts[0] < 0.65

"""The command line as a user runs it: exit codes, one clear line for a mistake, no traceback."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from specdec.cli import app
from specdec.step.step import step
from support import fp8_checkpoints
from support.fakes import (
    WHY_NO_COMPILER,
    planted_tensors,
    random_tensors,
    tensor_shapes,
    tiny_config,
    write_checkpoint,
    write_files,
    write_planted_checkpoint,
)
from support.published_configs import GLM_4_5_AIR

RUNNER = CliRunner()


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_planted_checkpoint(tmp_path_factory.mktemp("planted")))


def run(*arguments: str, stdin: str | None = None) -> tuple[int, str, str]:
    result = RUNNER.invoke(app, list(arguments), input=stdin)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    lines = result.stderr.splitlines(keepends=True)
    if WHY_NO_COMPILER:
        lines = [line for line in lines if "using the slow reference kernels" not in line]
    return result.exit_code, result.stdout, "".join(lines)


def assert_one_line(code: int, wanted_code: int, stdout: str, stderr: str, *messages: str) -> None:
    assert code == wanted_code
    assert stdout == ""
    assert stderr.startswith("specdec: ")
    assert stderr.count("\n") == 1
    assert "Traceback" not in stderr
    for message in messages:
        assert message in stderr


def test_text_goes_to_stdout_and_the_summary_to_stderr(planted: str) -> None:
    code, stdout, stderr = run("generate", "hello", "--model", planted, "--max-tokens", "30")
    assert code == 0
    assert stdout.endswith("\n")
    assert stderr.count("\n") == 1
    for part in ("30 tokens (length)", "tokens/s", "mean acceptance length", "accepted/drafted by position"):
        assert part in stderr


def test_json_is_one_document_and_nothing_else(planted: str) -> None:
    code, stdout, stderr = run("generate", "hello", "--model", planted, "--max-tokens", "30", "--json", "-k", "2")
    assert (code, stderr) == (0, "")
    document = json.loads(stdout)
    assert document["finish_reason"] == "length"
    assert len(document["token_ids"]) == 30
    assert len(document["stats"]["accepted_per_position"]) == 2
    plain = json.loads(
        run("generate", "hello", "--model", planted, "--max-tokens", "30", "--json", "--no-speculation")[1]
    )
    assert plain["token_ids"] == document["token_ids"]
    assert plain["stats"]["num_drafts"] == 0


def test_prompts_come_from_arguments_files_and_stdin(planted: str, tmp_path: Path) -> None:
    path = tmp_path / "prompt.txt"
    path.write_text("hello")
    arguments = ("--model", planted, "--max-tokens", "8", "--json")
    documents = [
        json.loads(run("generate", *more, *arguments, stdin=stdin)[1])
        for more, stdin in ((("hello",), None), (("--prompt-file", str(path)), None), (("--prompt-file", "-"), "hello"))
    ]
    assert documents[0]["prompt"] == "hello"
    assert len({tuple(d["token_ids"]) for d in documents}) == 1


@pytest.mark.slow
def test_sampling_options_reach_the_engine(planted: str) -> None:
    def tokens(*options: str) -> list[int]:
        code, stdout, stderr = run("generate", "hello", "--model", planted, "--max-tokens", "20", "--json", *options)
        assert code == 0, stderr
        return json.loads(stdout)["token_ids"]

    sampled = tokens("--temperature", "1.5", "--seed", "1")
    assert tokens("--temperature", "1.5", "--seed", "1") == sampled
    assert tokens("--temperature", "1.5", "--seed", "2") != sampled
    assert tokens("--temperature", "1.5", "--seed", "1", "--top-k", "1") == tokens()
    assert tokens("--temperature", "1.5", "--seed", "1", "--top-p", "0.000001") == tokens()
    assert tokens("--temperature", "1.5", "--seed", "1", "--min-p", "1") == tokens()
    assert tokens("--temperature", "1.5", "--seed", "1", "--draft-sampling", "greedy") == sampled, "it is coupled"
    token = tokens("--temperature", "1.5", "--seed", "1", "--verification", "token")
    assert token != tokens("--temperature", "1.5", "--seed", "1", "--verification", "block") != sampled
    assert (
        tokens("--temperature", "1.5", "--seed", "1", "--verification", "token", "--draft-sampling", "greedy") != token
    )
    plain = tokens()
    for options in (
        ("--repetition-penalty", "1.9", "--frequency-penalty", "1"),
        ("--presence-penalty", "-2"),
        ("--logit-bias", f"{plain[3]}=-inf"),
        ("--bad-word", "hello", "--logit-bias", f"{plain[0]}=-100", "--logit-bias", f"{plain[1]}=-7.5"),
    ):
        assert tokens(*options) == tokens(*options, "-k", "0")
        assert "logit" not in options[0] or tokens(*options) != plain
    assert tokens("--temperature", "1", "--seed", "3", "--min-draft-confidence", "0.5") == tokens(
        "--temperature", "1", "--seed", "3"
    )


def test_logprobs_are_in_the_document(planted: str) -> None:
    code, stdout, _ = run("generate", "hello", "--model", planted, "--max-tokens", "5", "--json", "--logprobs", "2")
    document = json.loads(stdout)
    assert code == 0
    assert [entry["token_id"] for entry in document["logprobs"]] == document["token_ids"]
    assert all(len(entry["top"]) == len(entry["processed_top"]) == 2 for entry in document["logprobs"])
    assert all(len(entry["top_tokens"]) == 2 for entry in document["logprobs"])
    assert "".join(entry["token"] for entry in document["logprobs"]) == document["text"]
    code, _, stderr = run("generate", "hello", "--model", planted, "--logprobs", "2")
    assert code == 2
    assert "add --json" in stderr
    text = json.loads(run("generate", "hello", "--model", planted, "--max-tokens", "20", "--json")[1])["text"]
    stopped = run(
        "generate", "hello", "--model", planted, "--max-tokens", "20", "--json", "--stop", text[4], "--stop", "~~"
    )[1]
    assert json.loads(stopped)["text"] == text[: text.index(text[4])]


def test_chat_wraps_the_prompt(planted: str, tmp_path: Path) -> None:
    code, stdout, _ = run("generate", "hi", "--chat", "--model", planted, "--max-tokens", "2", "--json")
    assert (code, json.loads(stdout)["prompt"]) == (0, "<|user|>hi<|assistant|>")
    write_files(tmp_path, tiny_config(), chat_template=None)
    save_file(random_tensors(tiny_config(), 0), str(tmp_path / "model.safetensors"))
    result = run("generate", "hi", "--chat", "--model", str(tmp_path))
    assert_one_line(result[0], 1, *result[1:], "no chat template")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--temperature", "-1"], "temperature = -1.0"),
        (["--temperature", "nan"], "temperature = nan"),
        (["--top-p", "0"], "top_p = 0.0 must be in (0, 1]"),
        (["--top-p", "1.5"], "top_p = 1.5"),
        (["--top-k", "-3"], "top_k = -3"),
        (["--min-p", "2"], "min_p = 2.0"),
        (["--max-tokens", "0"], "max_tokens = 0"),
        (["-k", "2", "--no-speculation"], "--no-speculation and -k 2 contradict each other"),
        (["-k", "-1"], "num_speculative_tokens = -1"),
        (["-k", "many"], "-k many: give a number from 0 to 8, or auto"),
        (["-k", "auto", "--no-speculation"], "--no-speculation and -k auto contradict each other"),
        (["-k", "9"], "num_speculative_tokens = 9 must be an integer, from 0 to 8"),
        (["--verification", "hope"], "verification = 'hope' is unknown"),
        (["--logit-bias", "a=1"], "--logit-bias a=1: give a token id and a number, as in 42=-3.5"),
        (["--logit-bias", "3=500"], "logit_bias of token 3 = 500.0 must be in [-100, 100]"),
        (["--min-tokens", "99"], "min_tokens = 99 must be an integer, from 0 to 64: it is at most max_tokens"),
        (["--repetition-penalty", "0"], "repetition_penalty = 0.0 must be in [1e-05, 100000]"),
        (["--min-draft-confidence", "2"], "min_draft_confidence = 2.0 must be in [0, 1]"),
        (["--draft-sampling", "beam"], "draft_sampling = 'beam' is unknown"),
        (["--stop", ""], "stop = '' must be a non-empty string"),
        (["--seed", "-5"], "seed = -5"),
        (["--temperature", "1e-9"], "temperature = 1e-09 must be 0 (greedy) or from 1e-05 to 1e+30"),
        (["--device", "mps"], "device = 'mps' is not supported: give 'auto', 'cpu' or 'cuda'"),
        (["--kernels", "magic"], "kernels = 'magic' is unknown"),
        (["--dtype", "int3"], "dtype = 'int3' is unknown"),
        (["--threads", "0"], "num_threads = 0"),
        (["--threads", "1000000"], "num_threads = 1000000 must be an integer from 1 to"),
    ],
)
def test_invalid_options_exit_2(planted: str, options: list[str], message: str) -> None:
    result = run("generate", "hello", "--model", planted, *options)
    assert_one_line(result[0], 2, *result[1:], message)


def test_no_prompt_or_two_exit_2(planted: str, tmp_path: Path) -> None:
    for arguments in ((), ("hello", "--prompt-file", "-")):
        result = run("generate", *arguments, "--model", planted)
        assert_one_line(result[0], 2, *result[1:], "give one prompt")
    assert run("generate", "hello", "--max-tokens", "many")[0] == 2
    assert run("generate", "hello", "--no-such-option")[0] == 2


def test_unusable_models_and_prompts_exit_1(planted: str, tmp_path: Path) -> None:
    empty, broken = tmp_path / "empty", tmp_path / "broken"
    empty.mkdir()
    write_checkpoint(broken)
    (broken / "config.json").write_text("{")
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\xfd")
    for arguments, message in (
        (["hello", "--model", "no-such-model"], "model 'no-such-model' does not exist"),
        (["hello", "--model", str(empty)], "config.json does not exist"),
        (["hello", "--model", str(broken)], "config.json is not valid JSON"),
        (["", "--model", planted], "the prompt is empty"),
        (["x" * 300, "--model", planted], "the prompt has 300 tokens, the context 256"),
        (["--prompt-file", str(tmp_path / "missing"), "--model", planted], "missing"),
        (["--prompt-file", str(binary), "--model", planted], "is not UTF-8 text"),
        (["a\udcff", "--model", planted], "not valid Unicode at character 1"),
    ):
        result = run("generate", *arguments)
        assert_one_line(result[0], 1, *result[1:], message)


def test_a_foreign_tokenizer_is_named(tmp_path: Path) -> None:
    folder = str(write_planted_checkpoint(tmp_path, tiny_config(vocab_size=40)))
    for command in (["generate", "hello", "--model", folder], ["inspect", folder]):
        result = run(*command)
        assert_one_line(result[0], 1, *result[1:], "tokenizer.json gives token", "vocabulary ends at 39")


def test_without_an_mtp_layer_generate_warns_and_decodes(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, with_mtp=False)
    code, stdout, stderr = run("generate", "hello", "--model", str(folder), "--max-tokens", "5", "--json")
    assert code == 0
    assert len(json.loads(stdout)["token_ids"]) == 5
    assert stderr.startswith("warning: ")
    assert "no MTP layer" in stderr
    for quiet in (["-k", "0"], ["--no-speculation"]):
        code, _, stderr = run(
            "generate", "a", "--model", str(folder), "--max-tokens", "3", "--temperature", "1", *quiet
        )
        assert (code, "warning" in stderr) == (0, False)
    result = run("generate", "hello", "--model", str(folder), "-k", "2")
    assert_one_line(result[0], 1, *result[1:], "num_speculative_tokens = 2", "no MTP layer")


def test_inspect_shows_config_memory_and_the_mtp_check(planted: str) -> None:
    code, stdout, stderr = run("inspect", planted)
    assert (code, stderr) == (0, "")
    for part in ("num_hidden_layers", "Memory", "bfloat16", "MTP self-check"):
        assert part in stdout
    document = json.loads(run("inspect", planted, "--json")[1])
    mtp = sum(name.startswith("model.layers.2.") for name in tensor_shapes(tiny_config()))
    assert document["tensors"] == {"target": len(tensor_shapes(tiny_config())) - mtp, "mtp": mtp, "ignored": 0}
    assert document["mtp_check"]["acceptance"] > 0.2
    bf16, fp32, fp8 = document["memory"]
    assert fp32["kv_bytes_per_token"] == 2 * bf16["kv_bytes_per_token"] == 3 * 2 * 2 * 16 * 4
    router_bytes = 2 * (8 * 32 + 8) * 4  # fp32 in both
    assert fp32["weight_bytes"] - router_bytes == 2 * (bf16["weight_bytes"] - router_bytes)
    assert fp8["kv_bytes_per_token"] == bf16["kv_bytes_per_token"]
    assert bf16["weight_bytes"] / 2 < fp8["weight_bytes"] < bf16["weight_bytes"]
    assert document["cuda"] is None


def test_inspect_warns_loudly_about_an_mtp_layer_near_chance(tiny_checkpoint: Path) -> None:
    code, stdout, stderr = run("inspect", str(tiny_checkpoint))
    assert code == 1
    assert "MTP self-check" in stdout
    assert "WARNING: the MTP layer's drafts agree with the target at" in stderr


def test_inspect_needs_only_a_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny_config()))
    code, stdout, _ = run("inspect", str(tmp_path))
    assert code == 0
    assert "from config.json alone" in stdout
    assert "skipped, there are no weights in this folder" in stdout
    result = run("inspect", str(tmp_path / "nowhere"))
    assert_one_line(result[0], 1, *result[1:], "does not exist")


@pytest.mark.slow
def test_inspect_says_what_cuda_needs_and_what_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a config alone, which may be that of an FP8 checkpoint; nothing that is missing is an error."""
    raw = GLM_4_5_AIR
    quantization = fp8_checkpoints.quantization_config(raw)
    quantization["ignore"].append("re:.*self_attn")
    raw = raw | {"quantization_config": quantization}
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    code, stdout, stderr = run("inspect", str(tmp_path), "--device", "cuda")
    assert (code, stderr) == (0, "")
    # 103.1 GiB in FP8, and 4.8 more with attention in bf16
    for part in ("FP8 but for", "flashinfer-python", "torch._scaled_grouped_mm", "not shard", "203.5 GiB", "107.9 GiB"):
        assert part in stdout
    document = json.loads(run("inspect", str(tmp_path), "--device", "cuda", "--json")[1])["cuda"]
    assert list(document) == ["requirements", "missing", "paths", "reserve_bytes", "fits", "floors"]
    assert document["missing"].startswith("torch with CUDA: torch")
    assert document["paths"]["A100 80GB"]["experts"] == "grouped matrix product"
    assert len(document["fits"]) == 5 * 2 * 4
    assert len(document["floors"]) == 5 * 2
    on_h200 = document["floors"][7]
    assert (on_h200["gpu"], on_h200["checkpoint"], on_h200["num_gpus"]) == ("H200", "fp8", 1)
    assert len(on_h200["step_s"]) == 6
    for part in ("GB: A100 80GB", "RTX 4090: does not fit", "H200 x 1", f"{1000 * on_h200['step_s'][3]:.2f}"):
        assert part in stdout
    device = next(r for r in document["requirements"] if r["name"] == "CUDA device")
    assert {k: v for k, v in device.items() if k != "remedy"} == {
        "name": "CUDA device",
        "found": "none is visible",
        "ok": False,
    }
    result = run("inspect", str(tmp_path), "--device", "tpu")
    assert_one_line(result[0], 2, *result[1:], "--device tpu is unknown: choose one of auto, cpu, cuda")


def test_an_fp8_checkpoint_is_inspected_and_generates(tmp_path: Path) -> None:
    tensors = fp8_checkpoints.fp8_tensors(
        fp8_checkpoints.CONFIG,
        tensors=planted_tensors(fp8_checkpoints.CONFIG, 0, noise=0.3),
        scale_dtype=torch.bfloat16,
    )
    folder = str(fp8_checkpoints.write(tmp_path, fp8_checkpoints.CONFIG, tensors))
    code, stdout, stderr = run("inspect", folder)
    assert (code, stderr) == (0, "")
    assert f"Tensors: {sum(not n.startswith('model.layers.2.') for n in tensors)} target" in stdout
    code, stdout, stderr = run("generate", "hello", "--model", folder, "--max-tokens", "8", "--json")
    assert code == 0
    assert len(json.loads(stdout)["token_ids"]) == 8


def test_inspect_does_without_the_self_check_where_it_cannot_run(
    planted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = write_checkpoint(tmp_path / "[/b]small:smile:", tiny_config(max_position_embeddings=8))
    code, stdout, _ = run("inspect", str(small))
    assert code == 0
    assert "skipped, a context of 8 tokens is too short" in stdout
    plain = write_checkpoint(tmp_path / "plain", with_mtp=False)
    assert "skipped, the checkpoint has no MTP layer" in run("inspect", str(plain))[1]
    monkeypatch.setattr("specdec.loading.available_memory_bytes", lambda: 1000)
    code, stdout, _ = run("inspect", planted)
    assert code == 0
    assert "skipped, the model does not fit" in stdout
    assert "num_hidden_layers" in stdout


@pytest.mark.slow
def test_a_reader_that_leaves_early_is_no_error(planted: str, tmp_path: Path) -> None:
    command = f"{sys.executable} -m specdec generate hello --model {planted} --max-tokens 200; echo $? >&2"
    done = subprocess.run(["bash", "-c", f"({command}) | head -c 1"], capture_output=True, cwd=tmp_path)
    assert len(done.stdout) == 1
    assert b"Traceback" not in done.stderr
    assert b"roken pipe" not in done.stderr


def test_the_command_line_starts_without_torch() -> None:
    script = "import sys, specdec.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


def test_version_and_help() -> None:
    code, stdout, _ = run("--version")
    assert code == 0
    assert stdout.startswith("specdec ")
    code, stdout, _ = run("generate", "--help")
    assert code == 0
    assert "--num-speculative-tokens" in stdout


@pytest.mark.slow
def test_ctrl_c_exits_130_and_keeps_what_was_generated(tmp_path: Path) -> None:
    folder = write_planted_checkpoint(tmp_path, tiny_config(max_position_embeddings=100_000, eos_token_id=None))
    command = [sys.executable, "-m", "specdec", "generate", "hello", "--model", str(folder), "--max-tokens", "90000"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )  # fmt: skip
    assert process.stdout is not None
    first = process.stdout.read(1)  # it generates now
    process.send_signal(signal.SIGINT)
    rest, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in stderr
    assert b"(abort)" in stderr
    assert (first + rest).endswith(b"\n")


def test_ctrl_c_leaves_a_whole_json_document(planted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []

    def interrupted(*arguments: object) -> object:
        steps.append(1)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return step(*arguments)

    monkeypatch.setattr("specdec.engine.core.step", interrupted)
    code, stdout, _ = run("generate", "hello", "--model", planted, "--max-tokens", "60", "--json")
    document = json.loads(stdout)
    assert (code, document["finish_reason"]) == (130, "abort")
    assert 3 <= len(document["token_ids"]) < 60

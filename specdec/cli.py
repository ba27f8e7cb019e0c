"""The command line. Text goes to stdout, everything else to stderr.

Exit codes: 0; 1 for a model or prompt that cannot be used; 2 for an invalid option; 130 on Ctrl-C.
"""

from __future__ import annotations

import io
import json
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from specdec.config import MAX_SPECULATIVE_TOKENS, SamplingParams, SpeculationParams

app = typer.Typer(
    name="specdec",
    help="Speculative decoding around the MTP head of GLM-4.5-family MoE models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
eval_app = typer.Typer(help="Measure an engine.", no_args_is_help=True)
app.add_typer(eval_app, name="eval")
err = Console(stderr=True, highlight=False)


DTYPE_HELP = "auto, bfloat16, float16, float32, float64, or int8 (quantised as it is loaded)."


class InvalidOption(Exception):
    """An option value that can never work: exit code 2."""


@contextmanager
def user_errors() -> Iterator[None]:
    """Turns a user's mistake into one line on stderr and an exit code."""
    try:
        from specdec.errors import CacheFullError, KernelsUnavailableError, ModelError, SpecdecWarning
        from specdec.model.errors import CheckpointError
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", SpecdecWarning)
            warnings.showwarning = lambda message, *_, **__: _say(f"warning: {message}", "yellow")
            yield
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    except InvalidOption as error:
        _fail(error, 2)
    except BrokenPipeError:  # the reader, `head` for one, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(141) from None
    except (CheckpointError, CacheFullError, KernelsUnavailableError, ModelError, ValueError, OSError) as error:
        _fail(error, 1)


def _fail(error: Exception, code: int) -> NoReturn:
    _say(f"specdec: {error}", "red")
    raise typer.Exit(code)


def _say(message: str, style: str) -> None:
    """One line on stderr, never wrapped."""
    err.print(message, style=style, soft_wrap=True, markup=False, emoji=False)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"specdec {version('specdec')}")
        raise typer.Exit


@app.callback()
def root(
    _: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def generate(
    prompt: Annotated[str | None, typer.Argument(help="The prompt's text.", show_default=False)] = None,
    prompt_file: Annotated[
        str | None, typer.Option(help="Read the prompt from this file; - is standard input.", show_default=False)
    ] = None,
    model: Annotated[str, typer.Option(help="'bundled', a checkpoint folder, or a Hub id.")] = "bundled",
    revision: Annotated[str | None, typer.Option(help="Revision of a Hub id.", show_default=False)] = None,
    max_tokens: Annotated[int, typer.Option(help="Generate at most so many tokens.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Sample among the k most probable tokens; 0 is off.")] = 0,
    top_p: Annotated[float, typer.Option(help="Sample among the most probable tokens that reach this sum.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Drop tokens below this fraction of the most probable one.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Of tokens in prompt and output; 1 is off.")] = 1.0,
    presence_penalty: Annotated[float, typer.Option(help="Of tokens in the output; 0 is off.")] = 0.0,
    frequency_penalty: Annotated[float, typer.Option(help="The same for each occurrence; 0 is off.")] = 0.0,
    logit_bias: Annotated[
        list[str] | None,
        typer.Option(
            help="ID=BIAS, added to the logit of a token id, -100 to 100 or -inf; may be repeated.", show_default=False
        ),
    ] = None,
    bad_word: Annotated[
        list[str] | None, typer.Option(help="Never generate this text; may be repeated.", show_default=False)
    ] = None,
    min_tokens: Annotated[int, typer.Option(help="Do not end before so many tokens.")] = 0,
    stop: Annotated[
        list[str] | None, typer.Option(help="End before this string; may be repeated.", show_default=False)
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Reproduces a run; drawn if absent.", show_default=False)] = None,
    num_speculative_tokens: Annotated[
        int | None,
        typer.Option(
            "--num-speculative-tokens",
            "-k",
            help=f"Draft tokens per step, 0 to {MAX_SPECULATIVE_TOKENS}.",
            show_default=f"{SpeculationParams.num_speculative_tokens}; 0 without an MTP layer",
        ),
    ] = None,
    verification: Annotated[
        str, typer.Option(help="Rule at temperature > 0: coupled, block or token.")
    ] = SpeculationParams.verification,
    draft_sampling: Annotated[
        str, typer.Option(help="Drafts at temperature > 0: sampled or greedy.")
    ] = SpeculationParams.draft_sampling,
    min_draft_confidence: Annotated[
        float, typer.Option(help="Draft no further once no token has this probability.")
    ] = SpeculationParams.min_draft_confidence,
    no_speculation: Annotated[bool, typer.Option("--no-speculation", help="Decode plainly; the same as -k 0.")] = False,
    chat: Annotated[bool, typer.Option("--chat", help="Wrap the prompt in the checkpoint's chat template.")] = False,
    device: Annotated[str, typer.Option(help="auto or cpu.")] = "auto",
    dtype: Annotated[str, typer.Option(help=DTYPE_HELP)] = "auto",
    kernels: Annotated[str, typer.Option(help="auto, reference or cpu (C++).")] = "auto",
    threads: Annotated[int | None, typer.Option(help="CPU threads.", show_default="all")] = None,
    logprobs: Annotated[
        int | None,
        typer.Option(
            help="With --json: log-probabilities of the tokens, and so many alternatives.", show_default=False
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")] = False,
) -> None:
    """Generate text from a prompt, drafting with the MTP head."""
    with user_errors():
        speculation_is_given = no_speculation or num_speculative_tokens is not None
        if logprobs is not None and not as_json:
            raise InvalidOption(f"--logprobs {logprobs} is shown in the JSON document only: add --json")
        params = _sampling_params(
            num_tokens=_num_tokens(num_speculative_tokens, no_speculation),
            verification=verification,
            draft_sampling=draft_sampling,
            min_draft_confidence=min_draft_confidence,
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
            logit_bias=_biases(logit_bias or []),
            bad_words=tuple(bad_word or ()),
            stop=tuple(stop or ()),
            seed=seed,
            logprobs=logprobs,
        )
        text = _prompt_text(prompt, prompt_file)
        _check_backend(device, dtype, kernels, threads)
        from specdec.engine import Engine

        engine = Engine.from_pretrained(
            model,
            revision=revision,
            device=device,
            dtype=dtype,
            kernels=kernels,
            num_threads=threads,
            speculation=params.speculation if speculation_is_given else None,
        )
        if chat:
            text = engine.tokenizer.apply_chat_template([{"role": "user", "content": text}])
        if not speculation_is_given and engine.runtime.model.mtp is None:
            params = replace(params, speculation=None)  # the engine has warned; no drafts were asked for
        _run(engine, text, params, as_json)


def _num_tokens(asked: int | None, no_speculation: bool) -> int:
    if no_speculation and asked:
        raise InvalidOption(f"--no-speculation and -k {asked} contradict each other: give one")
    return 0 if no_speculation else SpeculationParams.num_speculative_tokens if asked is None else asked


def _biases(texts: list[str]) -> tuple[tuple[int, float], ...]:
    pairs = []
    for text in texts:
        token, _, bias = text.partition("=")
        try:
            pairs.append((int(token), float(bias)))
        except ValueError:
            raise InvalidOption(f"--logit-bias {text}: give a token id and a number, as in 42=-3.5") from None
    return tuple(pairs)


def _sampling_params(
    *, num_tokens: int, verification: Any, draft_sampling: Any, min_draft_confidence: float, **fields: Any
) -> SamplingParams:
    try:
        speculation = SpeculationParams(num_tokens, verification, draft_sampling, min_draft_confidence)
        return SamplingParams(**fields, speculation=speculation)
    except ValueError as error:
        raise InvalidOption(str(error)) from error


def _check_backend(device: str, dtype: str, kernels: str, threads: int | None) -> None:
    """Impossible values are seen before anything is loaded."""
    from specdec.kernels import check_name
    from specdec.loading import check_num_threads, resolve_device, resolve_dtype

    try:
        check_name(kernels)
        resolve_device(device)
        if dtype != "auto":
            resolve_dtype(dtype)
        if threads is not None:
            check_num_threads(threads)
    except ValueError as error:
        raise InvalidOption(str(error)) from error


def _prompt_text(prompt: str | None, prompt_file: str | None) -> str:
    if (prompt is None) == (prompt_file is None):
        raise InvalidOption("give one prompt: as an argument, or with --prompt-file (- for standard input)")
    if prompt is not None:
        return prompt
    assert prompt_file is not None
    try:
        if prompt_file != "-":
            return Path(prompt_file).read_text(encoding="utf-8")
        if sys.stdin is None:
            raise InvalidOption("--prompt-file -: standard input is closed")
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{prompt_file} is not UTF-8 text: {error}") from error


def _run(engine: Any, text: str, params: SamplingParams, as_json: bool) -> None:
    """Streams one completion; on Ctrl-C what was generated so far stays, in the JSON document too."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character shows a mark instead
    stream = engine.stream(text, params)
    try:
        for chunk in stream:
            if not as_json:
                sys.stdout.write(chunk.text)
                sys.stdout.flush()
    finally:
        stream.close()
        output = stream.output
        if as_json:
            print(json.dumps(_document(engine, text, output), indent=2))
        else:
            sys.stdout.write("\n")
            _say(summary_line(output), "dim")


def summary_line(output: Any) -> str:
    """Speed and acceptance of one output, in one line."""
    stats = output.stats
    parts = [f"{len(output.token_ids)} tokens ({output.finish_reason})"]
    if stats.tokens_per_s is not None:
        parts.append(f"{stats.tokens_per_s:.1f} tokens/s")
    if stats.num_drafts:
        per_position = " ".join(f"{a}/{d}" for a, d in zip(stats.accepted_per_position, stats.drafted_per_position))
        parts.append(f"mean acceptance length {stats.mean_acceptance_length:.2f} (bonus included)")
        parts.append(f"accepted/drafted by position {per_position}")
    else:
        parts.append("no drafts")
    return " | ".join(parts)


def _document(engine: Any, prompt: str, output: Any) -> dict[str, Any]:
    return {
        "model": str(engine.checkpoint.folder),
        "kernels": engine.runtime.model.target.kernels.name,
        "prompt": prompt,
        "text": output.text,
        "prompt_token_ids": output.prompt_token_ids,
        "token_ids": output.token_ids,
        "finish_reason": output.finish_reason,
        "seed": output.seed,
        "logprobs": None if output.logprobs is None else [token.as_dict() for token in output.logprobs],
        "stats": output.stats.as_dict(),
    }


@app.command()
def inspect(
    model: Annotated[
        str, typer.Argument(help="'bundled', a checkpoint folder, a folder with only a config.json, or a Hub id.")
    ],
    revision: Annotated[str | None, typer.Option(help="Revision of a Hub id.", show_default=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")] = False,
) -> None:
    """Show a checkpoint's configuration and memory, and check that its MTP layer works (exit code 1 if not)."""
    with user_errors():
        from specdec.inspection import inspect_checkpoint
        from specdec.model.hub import resolve_model

        result = inspect_checkpoint(resolve_model(model, revision))
        if as_json:
            print(json.dumps(result.as_dict(), indent=2))
        else:
            _print_inspection(result)
        check = result.mtp_check
        if check is not None and check.near_chance:
            _say(
                f"WARNING: the MTP layer's drafts agree with the target at {check.acceptance:.1%} of positions, "
                f"chance is {check.chance:.1%}: this MTP layer does not work with this target",
                "bold red",
            )
            raise typer.Exit(1)


def _print_inspection(result: Any) -> None:
    out = Console(highlight=False)
    table = Table(title=escape(str(result.folder)), show_header=False, title_justify="left")
    for key, value in result.as_dict()["config"].items():
        table.add_row(key, escape(str(value)))
    out.print(table)
    memory = Table("dtype", "weights", "of which MTP", "KV cache per token", title="Memory", title_justify="left")
    for line in result.memory:
        memory.add_row(
            line.dtype, _size(line.weight_bytes), _size(line.mtp_weight_bytes), _size(line.kv_bytes_per_token)
        )
    out.print(memory)
    if result.tensors is None:
        out.print("Weights: none in this folder, the table is from config.json alone")
    else:
        t = result.tensors
        out.print(f"Tensors: {t.target} target, {t.mtp} MTP, {t.ignored} ignored (copies of the target's)")
    if result.mtp_check is None:
        out.print(f"MTP self-check: skipped, {result.mtp_check_skipped}", soft_wrap=True, markup=False)
    else:
        c = result.mtp_check
        out.print(
            f"MTP self-check: first drafts equal the target's greedy choice at {c.acceptance:.1%} of "
            f"{c.num_positions} positions of a sample text (chance {c.chance:.1%})",
            soft_wrap=True,
        )


def _size(num_bytes: int) -> str:
    size = float(num_bytes)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


@eval_app.command()
def speed(
    model: Annotated[str, typer.Option(help="'bundled', a checkpoint folder, or a Hub id.")] = "bundled",
    kernels: Annotated[str, typer.Option(help="auto, reference or cpu (C++).")] = "auto",
    dtype: Annotated[str, typer.Option(help=DTYPE_HELP)] = "auto",
    threads: Annotated[int | None, typer.Option(help="CPU threads.", show_default="all")] = None,
    batch_sizes: Annotated[str, typer.Option(help="Requests at once.")] = "1,2,4,8,16",
    draft_lengths: Annotated[str, typer.Option(help="K, with 0 for plain decoding.")] = "0,1,2,3,4,5",
    prefill_lengths: Annotated[
        str, typer.Option(help="Prompt lengths; those beyond the context are left out.")
    ] = "512,2048",
    temperature: Annotated[float, typer.Option(help="0 is greedy. Peers are always greedy.")] = 0.0,
    num_prompts: Annotated[int, typer.Option(help="Prompts per setting, in groups of the batch size.")] = 4,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of every prompt.")] = 32,
    max_tokens: Annotated[int, typer.Option(help="Tokens generated from every prompt.")] = 64,
    repeats: Annotated[int, typer.Option(help="Passes through all settings.")] = 5,
    peer: Annotated[
        list[str] | None,
        typer.Option(help="NAME=PYTHON: transformers, llamacpp or vllm in that interpreter.", show_default=False),
    ] = None,
    peer_draft_lengths: Annotated[str, typer.Option(help="K of the peers, clipped to what they can.")] = "0,1,3",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")] = False,
) -> None:
    """Measure decoding with and without speculation, what it reads, and other engines beside it."""
    with user_errors():
        from specdec.eval.peers import parse_peer
        from specdec.eval.speed import SpeedOptions, as_lengths, measure_speed
        from specdec.eval.speed_report import as_json as report_as_json
        from specdec.eval.speed_report import print_report

        try:
            options = SpeedOptions(
                model=model,
                kernels=kernels,
                dtype=dtype,
                num_threads=threads,
                batch_sizes=as_lengths(batch_sizes, "--batch-sizes"),
                draft_lengths=as_lengths(draft_lengths, "--draft-lengths"),
                prefill_lengths=as_lengths(prefill_lengths, "--prefill-lengths"),
                temperature=temperature,
                num_prompts=num_prompts,
                prompt_tokens=prompt_tokens,
                max_tokens=max_tokens,
                repeats=repeats,
                peers=tuple(parse_peer(text) for text in peer or ()),
                peer_draft_lengths=as_lengths(peer_draft_lengths, "--peer-draft-lengths"),
            )
        except ValueError as error:
            raise InvalidOption(str(error)) from error
        with err.status("measuring") as status:
            report = measure_speed(options, progress=lambda text: status.update(escape(text)))
        if as_json:
            print(json.dumps(report_as_json(report), indent=2))
        else:
            print_report(report, Console(highlight=False))


@eval_app.command()
def lossless(
    model: Annotated[str, typer.Option(help="'bundled', a checkpoint folder, or a Hub id.")] = "bundled",
    kernels: Annotated[str, typer.Option(help="auto, reference or cpu (C++).")] = "auto",
    dtype: Annotated[str, typer.Option(help=DTYPE_HELP)] = "auto",
    threads: Annotated[int | None, typer.Option(help="CPU threads.", show_default="all")] = None,
    samples: Annotated[int, typer.Option(help="Sampled outputs per rule, over all parameter combinations.")] = 5000,
    alpha: Annotated[float, typer.Option(help="The probability that a lossless engine fails.")] = 1e-6,
    rules: Annotated[str, typer.Option(help="Verification rules to sample with.")] = "coupled,block,token",
    num_speculative_tokens: Annotated[
        int, typer.Option("--num-speculative-tokens", "-k", help="Draft tokens per step of the samples.")
    ] = 3,
    temperature: Annotated[float, typer.Option(help="Of the plain samples; other combinations follow it.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Another one draws other samples from other prompts.")] = 0,
    comparison_seeds: Annotated[
        int, typer.Option(help="Seeds per parameter combination that are compared with plain decoding.")
    ] = 8,
    comparison_tokens: Annotated[int, typer.Option(help="Length of the outputs that are.")] = 32,
    output: Annotated[Path | None, typer.Option(help="Also write the JSON here.", show_default=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a summary.")] = False,
) -> None:
    """Certify that speculation changes nothing: exact laws, and equality with plain decoding (exit code 1 if not)."""
    with user_errors():
        from specdec.eval.lossless import LosslessOptions, certify
        from specdec.eval.lossless.report import as_json as certificate_as_json
        from specdec.eval.lossless.report import print_certificate, progress_bar, write_json

        _check_backend("auto", dtype, kernels, threads)
        if output is not None and not output.absolute().parent.is_dir():
            raise InvalidOption(f"--output {output}: there is no folder {output.absolute().parent}")
        try:
            options = LosslessOptions(
                model=model,
                kernels=kernels,
                dtype=dtype,
                num_threads=threads,
                samples=samples,
                alpha=alpha,
                rules=tuple(rule.strip() for rule in rules.split(",") if rule.strip()),
                num_speculative_tokens=num_speculative_tokens,
                temperature=temperature,
                seed=seed,
                comparison_seeds=comparison_seeds,
                comparison_tokens=comparison_tokens,
            )
        except ValueError as error:
            raise InvalidOption(str(error)) from error
        with progress_bar(err) as progress:
            certificate = certify(options, progress)
        if output is not None:
            write_json(certificate, output)
        if as_json:
            print(json.dumps(certificate_as_json(certificate), indent=2))
        else:
            print_certificate(certificate, Console(highlight=False))
        if not certificate.passed:
            raise typer.Exit(1)


def main() -> None:
    app()

"""`specdec eval`: measurements of an engine."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.markup import escape

from specdec.cli.acceptance import acceptance, compare, teacher_forced
from specdec.cli.common import (
    AsJson,
    Dtype,
    Kernels,
    Model,
    OutputFile,
    Threads,
    as_numbers,
    as_words,
    check_backend,
    check_folder_of,
    err,
    option_errors,
    progress_bar,
    tables,
    user_errors,
)

app = typer.Typer(help="Measure an engine.", no_args_is_help=True)
for command in (acceptance, teacher_forced, compare):
    app.command()(command)


@app.command()
def speed(
    model: Model = "bundled",
    kernels: Kernels = "auto",
    dtype: Dtype = "auto",
    threads: Threads = None,
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
    as_json: AsJson = False,
) -> None:
    """Measure decoding with and without speculation, what it reads, and other engines beside it."""
    with user_errors():
        from specdec.eval.speed.measure import SpeedOptions, measure_speed
        from specdec.eval.speed.peers import parse_peer
        from specdec.eval.speed.report import as_json as report_as_json
        from specdec.eval.speed.report import print_report
        from specdec.kernels.progress import as_text

        with option_errors():
            options = SpeedOptions(
                model=model,
                kernels=kernels,
                dtype=dtype,
                num_threads=threads,
                batch_sizes=as_numbers("--batch-sizes", batch_sizes, int),
                draft_lengths=as_numbers("--draft-lengths", draft_lengths, int),
                prefill_lengths=as_numbers("--prefill-lengths", prefill_lengths, int),
                temperature=temperature,
                num_prompts=num_prompts,
                prompt_tokens=prompt_tokens,
                max_tokens=max_tokens,
                repeats=repeats,
                peers=tuple(parse_peer(text) for text in peer or ()),
                peer_draft_lengths=as_numbers("--peer-draft-lengths", peer_draft_lengths, int),
            )
        with err.status("measuring") as status:
            report = measure_speed(
                options,
                progress=lambda text: status.update(escape(text)),
                loading=lambda what, done, total: status.update(escape(as_text(what, done, total))),
            )
        if as_json:
            print(json.dumps(report_as_json(report), indent=2))
        else:
            print_report(report, tables())


@app.command()
def lossless(
    model: Model = "bundled",
    kernels: Kernels = "auto",
    dtype: Dtype = "auto",
    threads: Threads = None,
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
    output: OutputFile = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a summary.")] = False,
) -> None:
    """Certify that speculation changes nothing: exact distributions, and equality with plain decoding.

    Exit code 1 where it changes something.
    """
    with user_errors():
        from specdec.eval.lossless import LosslessOptions, certify
        from specdec.eval.lossless.report import as_json as certificate_as_json
        from specdec.eval.lossless.report import print_certificate, write_json

        check_backend("auto", dtype, kernels, threads)
        if output is not None:
            check_folder_of("--output", output)
        with option_errors():
            options = LosslessOptions(
                model=model,
                kernels=kernels,
                dtype=dtype,
                num_threads=threads,
                samples=samples,
                alpha=alpha,
                rules=as_words(rules),
                num_speculative_tokens=num_speculative_tokens,
                temperature=temperature,
                seed=seed,
                comparison_seeds=comparison_seeds,
                comparison_tokens=comparison_tokens,
            )
        with progress_bar() as progress:
            certificate = certify(options, progress)
        if output is not None:
            write_json(certificate, output)
        if as_json:
            print(json.dumps(certificate_as_json(certificate), indent=2))
        else:
            print_certificate(certificate, tables())
        if not certificate.passed:
            raise typer.Exit(1)

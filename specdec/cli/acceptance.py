"""`specdec eval acceptance`, and what belongs to it: `teacher-forced`, `compare`."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

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
    check_matplotlib,
    err,
    option_errors,
    progress_bar,
    tables,
    user_errors,
)

Prompts = Annotated[
    list[str] | None,
    typer.Option(help="A set (stdlib, humaneval) or a JSONL file; may be repeated.", show_default="stdlib"),
]
Lengths = Annotated[str, typer.Option("--num-speculative-tokens", "-k", help="Draft tokens per step.")]
Temperatures = Annotated[str, typer.Option("--temperature", help="0 is greedy.")]
Rules = Annotated[str, typer.Option("--verification", help="Rules at temperature > 0.")]
Drafts = Annotated[str, typer.Option(help="Drafts at temperature > 0: sampled, greedy.")]
Recycling = Annotated[str, typer.Option(help="post_norm; pre_norm is an ablation.")]
SkipBad = Annotated[
    bool, typer.Option("--skip-bad", help="Leave out bad lines and prompts that are too long, and count them.")
]
Chat = Annotated[bool, typer.Option("--chat", help="Ask through the checkpoint's chat template.")]


def acceptance(
    model: Model = "bundled",
    prompts: Prompts = None,
    num_prompts: Annotated[int, typer.Option(help="At most so many prompts, one of each category in turn.")] = 36,
    num_speculative_tokens: Lengths = "1,2,3,5",
    temperature: Temperatures = "0,0.6,1",
    verification: Rules = "coupled,block,token",
    draft_sampling: Annotated[
        str | None,
        typer.Option(
            help="Drafts at temperature > 0: sampled, greedy.", show_default="sampled, or greedy with --drafter"
        ),
    ] = None,
    drafter: Annotated[
        str | None,
        typer.Option(
            metavar="WHERE:NAME",
            help="Draft with a class, function or object of your own, from a Python file or module, in place of the "
            "MTP layer.",
            show_default=False,
        ),
    ] = None,
    batch_size: Annotated[str, typer.Option(help="Requests at once.")] = "1,8",
    max_tokens: Annotated[int, typer.Option(help="Tokens generated per turn, at most.")] = 256,
    repeats: Annotated[int, typer.Option(help="Passes through everything, with other seeds.")] = 1,
    seed: Annotated[int, typer.Option(help="Another one draws other samples.")] = 0,
    check_contexts: Annotated[
        int,
        typer.Option(help="Verifications per cell that are compared with the model's exact distributions; 0: none."),
    ] = 800,
    mtp_recycling: Recycling = "post_norm",
    chat: Chat = False,
    skip_bad: SkipBad = False,
    kernels: Kernels = "auto",
    dtype: Dtype = "auto",
    threads: Threads = None,
    output: Annotated[Path, typer.Option(help="Folder for results.json and report.html.")] = Path("acceptance"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what the output folder holds.")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure acceptance and speed-up by rule, draft length, temperature and batch size, with intervals.

    Exit code 1 where the engine's acceptance is not what the model's distributions say. The report's charts need
    matplotlib: pip install matplotlib.
    """
    with user_errors():
        check_matplotlib()
        from specdec.eval.acceptance.html import write_html
        from specdec.eval.acceptance.live import LiveTable, print_results
        from specdec.eval.acceptance.plan import AcceptanceOptions
        from specdec.eval.acceptance.results import write_results
        from specdec.eval.acceptance.run import run_acceptance
        from specdec.eval.acceptance.summary import failed_checks

        check_backend("auto", dtype, kernels, threads)
        check_folder_of("--output", output)
        if draft_sampling is None:
            draft_sampling = "sampled" if drafter is None else "greedy"
        with option_errors():
            options = AcceptanceOptions(
                model=model,
                prompts=tuple(prompts or ("stdlib",)),
                num_prompts=num_prompts,
                **_grid(num_speculative_tokens, temperature, verification, draft_sampling, mtp_recycling),
                drafter=drafter,
                batch_sizes=as_numbers("--batch-size", batch_size, int),
                max_tokens=max_tokens,
                repeats=repeats,
                seed=seed,
                kernels=kernels,
                dtype=dtype,
                num_threads=threads,
                chat=chat,
                skip_bad=skip_bad,
                check_contexts=check_contexts,
            )
        with LiveTable(err) as table:
            document = run_acceptance(
                options, output, resume=resume, command=_command(), progress=table, loading=table.loading
            )
        write_results(document, output)
        write_html(document, output)
        if as_json:
            print(json.dumps(document, indent=2))
        else:
            print_results(document, tables())
            err.print(f"{output / 'report.html'} has the whole report", soft_wrap=True, markup=False)
        if failed_checks(document):
            raise typer.Exit(1)


def teacher_forced(
    model: Model = "bundled",
    prompts: Prompts = None,
    num_prompts: Annotated[int | None, typer.Option(help="At most so many prompts.", show_default="all")] = None,
    num_speculative_tokens: Lengths = "1,2,3,5",
    temperature: Temperatures = "0,0.6,1",
    verification: Rules = "coupled,block,token",
    draft_sampling: Drafts = "sampled,greedy",
    stride: Annotated[int, typer.Option(help="Look at every so many positions of the texts.")] = 4,
    max_contexts: Annotated[
        int | None, typer.Option(help="Look at so many positions at most, evenly spaced.", show_default="all")
    ] = None,
    seed: Annotated[int, typer.Option(help="Another one draws other drafts.")] = 0,
    mtp_recycling: Recycling = "post_norm",
    chat: Chat = False,
    skip_bad: SkipBad = False,
    kernels: Kernels = "auto",
    dtype: Dtype = "auto",
    threads: Threads = None,
    output: OutputFile = None,
    as_json: AsJson = False,
) -> None:
    """Compute acceptance on given text, without generating: exactly, for every rule and every draft length."""
    with user_errors():
        from specdec.eval.acceptance.tally import print_rows
        from specdec.eval.acceptance.teacher import TeacherOptions
        from specdec.eval.acceptance.teacher import teacher_forced as compute
        from specdec.eval.files import write_whole

        check_backend("auto", dtype, kernels, threads)
        if output is not None:
            check_folder_of("--output", output)
        with option_errors():
            options = TeacherOptions(
                model=model,
                prompts=tuple(prompts or ("stdlib",)),
                num_prompts=num_prompts,
                **_grid(num_speculative_tokens, temperature, verification, draft_sampling, mtp_recycling),
                stride=stride,
                max_contexts=max_contexts,
                seed=seed,
                kernels=kernels,
                dtype=dtype,
                num_threads=threads,
                chat=chat,
                skip_bad=skip_bad,
            )
        with progress_bar() as progress:
            found = compute(options, command=_command(), progress=progress)
        document = found.as_dict()
        if output is not None:
            write_whole(output, json.dumps(document, indent=2) + "\n")
        if as_json:
            print(json.dumps(document, indent=2))
        else:
            print_rows(f"{found.num_contexts:,} contexts", found.rows, tables())


def compare(
    a: Annotated[
        Path, typer.Argument(metavar="A.json", help="The results to compare with, or their folder.", show_default=False)
    ],
    b: Annotated[
        Path, typer.Argument(metavar="B.json", help="The results that must not be worse.", show_default=False)
    ],
    tolerance: Annotated[float, typer.Option(help="How much worse B may be, as a share of A's value.")] = 0.02,
    as_json: AsJson = False,
) -> None:
    """Compare two results of `specdec eval acceptance`: exit code 1 where B is worse beyond the tolerance."""
    with user_errors():
        from specdec.eval.acceptance.compare import check_tolerance, print_comparison
        from specdec.eval.acceptance.compare import compare as compare_results
        from specdec.eval.acceptance.results import read_results

        with option_errors():
            check_tolerance(tolerance)
        comparison = compare_results(read_results(a), read_results(b), tolerance)
        if as_json:
            print(json.dumps(comparison.as_dict(), indent=2))
        else:
            print_comparison(comparison, tables())
        if not comparison.passed:
            raise typer.Exit(1)


def _grid(
    num_speculative_tokens: str, temperature: str, verification: str, draft_sampling: str, mtp_recycling: str
) -> dict[str, Any]:
    """Returns the settings that both modes combine, as the fields of their options."""
    return {
        "num_speculative_tokens": as_numbers("-k", num_speculative_tokens, int),
        "temperatures": as_numbers("--temperature", temperature, float),
        "verification": as_words(verification),
        "draft_sampling": as_words(draft_sampling),
        "mtp_recycling": mtp_recycling,
    }


def _command() -> str:
    return shlex.join(["specdec", *sys.argv[1:]])

"""`specdec inspect`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from specdec.cli.common import AsJson, InvalidOption, Revision, progress_bar, say, tables, user_errors
from specdec.units import size_text as _size

if TYPE_CHECKING:
    from specdec.inspection.checkpoint import CudaReport, Inspection
    from specdec.inspection.floors import Floor
    from specdec.inspection.memory import Fit

DEVICES = ("auto", "cpu", "cuda")


def inspect(
    model: Annotated[
        str, typer.Argument(help="'bundled', a checkpoint folder, a folder with only a config.json, or a Hub id.")
    ],
    revision: Revision = None,
    device: Annotated[
        str,
        typer.Option(help="'cuda': also what the CUDA backend needs, what of it is here, what fits on which GPUs."),
    ] = "cpu",
    as_json: AsJson = False,
) -> None:
    """Show a checkpoint's configuration and memory, and check that its MTP layer works (exit code 1 if not)."""
    with user_errors():
        if device not in DEVICES:
            raise InvalidOption(f"--device {device} is unknown: choose one of {', '.join(DEVICES)}")
        from specdec.inspection.checkpoint import inspect_checkpoint
        from specdec.model.hub import resolve_model

        folder = resolve_model(model, revision)
        with progress_bar() as progress:
            result = inspect_checkpoint(folder, with_cuda=device == "cuda", progress=progress)
        if as_json:
            print(json.dumps(result.as_dict(), indent=2))
        else:
            _print_inspection(result)
            if result.cuda is not None:
                _print_cuda(result.cuda)
        check = result.mtp_check
        if check is not None and check.near_chance:
            say(
                f"WARNING: the MTP layer's drafts agree with the target at {check.acceptance:.1%} of positions, "
                f"chance is {check.chance:.1%}: this MTP layer does not work with this target",
                "bold red",
            )
            raise typer.Exit(1)


def _print_inspection(result: Inspection) -> None:
    out = tables()
    table = Table(title=escape(str(result.folder)), show_header=False, title_justify="left")
    config = result.as_dict()["config"]
    assert isinstance(config, dict)
    for key, value in config.items():
        shown = f"FP8 but for {len(value['ignore'])} modules" if key == "quantization" and value else value
        table.add_row(key, escape(str(shown)))
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


def _print_cuda(report: CudaReport) -> None:
    out = tables()
    needs = Table("CUDA backend", "here", "", title="Requirements", title_justify="left")
    for r in report.requirements:
        needs.add_row(r.name, escape(r.found), "ok" if r.ok else f"missing: {escape(r.remedy)}")
    out.print(needs)
    kernels = Table("", *report.paths, title="Kernels", title_justify="left")
    for operation in asdict(next(iter(report.paths.values()))):
        kernels.add_row(operation, *(getattr(chosen, operation) for chosen in report.paths.values()))
    out.print(kernels)
    out.print(_fit_table(report.fits))
    out.print(
        f"Tokens of KV cache in bf16 that fit beside the weights as that GPU's kernels hold them, with "
        f"{_size(report.reserve_bytes)} of each GPU set aside for activations, workspaces and CUDA graphs; -: the "
        "weights do not fit. specdec runs on one device and does not shard yet: for more of them the figures are an "
        "expectation, weights and cache split evenly.",
        soft_wrap=True,
    )
    out.print(_floor_table(report.floors))
    out.print(
        "Top: the weights that a step for one sequence reads, in GB (10^9 bytes). Below: how long it takes to read "
        "them once at the bandwidth on the data sheet; real steps take longer. K drafts come from K passes of the MTP "
        "layer, the first over K + 1 pairs, and are verified by one pass of the target over K + 1 rows; every pass "
        "reads the head. Keys and values are left out. Assumed: rows choose their experts evenly and independently; "
        "those of consecutive tokens overlap more, which reads less. x N: the fewest GPUs that hold the weights, each "
        "reading an equal share (an expectation, as above).",
        soft_wrap=True,
    )


def _fit_table(fits: list[Fit]) -> Table:
    counts = sorted({fit.num_gpus for fit in fits})
    columns = ("GPU", "memory", "checkpoint", "weights", *(f"x {n}" for n in counts))
    table = Table(*columns, title="What fits", title_justify="left")
    for first in range(0, len(fits), len(counts)):
        row = fits[first : first + len(counts)]
        tokens = ("-" if fit.kv_tokens is None else f"{fit.kv_tokens:,}" for fit in row)
        gpu = row[0].gpu, _size(row[0].gpu_memory_bytes)
        table.add_row(*gpu, row[0].checkpoint, _size(row[0].weight_bytes), *tokens)
    return table


def _floor_table(floors: list[Floor]) -> Table:
    lengths = range(len(floors[0].step_bytes))
    columns = ("", "checkpoint", *(f"K = {k}" for k in lengths))
    table = Table(*columns, title="Least time of a decode step at batch 1, ms", title_justify="left")
    readers: dict[tuple[str, tuple[float, ...]], list[str]] = {}
    for floor in floors:
        readers.setdefault((floor.checkpoint, tuple(floor.step_bytes)), []).append(floor.gpu)
    for (checkpoint, step_bytes), gpus in readers.items():
        table.add_row(f"GB: {', '.join(gpus)}", checkpoint, *(f"{size / 1e9:.2f}" for size in step_bytes))
    table.add_section()
    for floor in floors:
        name = f"{floor.gpu} x {floor.num_gpus}" if floor.num_gpus else f"{floor.gpu}: does not fit"
        times = ["-" for _ in lengths] if floor.step_s is None else [f"{1000 * s:.2f}" for s in floor.step_s]
        table.add_row(name, floor.checkpoint, *times)
    return table

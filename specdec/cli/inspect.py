"""`specdec inspect`."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from specdec.cli.common import JSON_HELP, say, tables, user_errors


def inspect(
    model: Annotated[
        str, typer.Argument(help="'bundled', a checkpoint folder, a folder with only a config.json, or a Hub id.")
    ],
    revision: Annotated[str | None, typer.Option(help="Revision of a Hub id.", show_default=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help=JSON_HELP)] = False,
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
            say(
                f"WARNING: the MTP layer's drafts agree with the target at {check.acceptance:.1%} of positions, "
                f"chance is {check.chance:.1%}: this MTP layer does not work with this target",
                "bold red",
            )
            raise typer.Exit(1)


def _print_inspection(result: Any) -> None:
    out = tables()
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

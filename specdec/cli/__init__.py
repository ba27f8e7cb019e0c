"""The command line: the top layer. One module per command, `specdec.cli.common` for what they share."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from specdec import __version__
from specdec.cli import evaluate
from specdec.cli.common import InvalidOption, fail, log_level, log_to_stderr
from specdec.cli.generate import generate
from specdec.cli.inspect import inspect

app = typer.Typer(
    name="specdec",
    help="Speculative decoding around the MTP head of GLM-4.5-family MoE models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(generate)
app.command()(inspect)
app.add_typer(evaluate.app, name="eval")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"specdec {__version__}")
        raise typer.Exit


@app.callback()
def root(
    context: typer.Context,
    _: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    verbose: Annotated[
        int,
        typer.Option(
            "--verbose",
            "-v",
            count=True,
            help="Say on stderr what is chosen, loaded and measured; twice: in detail. SPECDEC_LOG_LEVEL sets a level.",
            show_default=False,
        ),
    ] = 0,
) -> None:
    try:
        level = log_level(verbose, os.environ.get("SPECDEC_LOG_LEVEL", ""))
    except InvalidOption as error:
        fail(error, 2)
    if level is not None:
        context.with_resource(log_to_stderr(level))


def main() -> None:
    """Runs the command line."""
    app()

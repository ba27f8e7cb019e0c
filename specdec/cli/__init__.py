"""The command line: the top layer. One module per command, `specdec.cli.common` for what they share."""

from __future__ import annotations

from typing import Annotated

import typer

from specdec import __version__
from specdec.cli import evaluate
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
    _: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def main() -> None:
    app()

"""Prints results on a terminal: as they come, with the time that is left, and all of them at the end."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from specdec.eval.acceptance.run import Progress
from specdec.eval.acceptance.summary import (
    Cell,
    Estimate,
    cell_name,
    check_verdict,
    failed_checks,
    format_number,
    rule_label,
    sections,
    speculative,
)
from specdec.kernels.progress import as_text

RULE = "rule, drafts"
COLUMNS = (RULE, "K", "length", "x plain", "tok/s", "loop", "check")
LINES_AROUND_TABLE = 8  # of the live display
SHORT = 0.1  # a part that took less than this share of the longest one was there from an earlier run


class LiveTable:
    """The progress of a run: `with LiveTable(console) as progress: run_acceptance(..., progress=progress)`.

    On a terminal a table of the cells finished last and a progress bar; elsewhere a line for every finished cell.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self.console, self.clock = console, clock
        self.cells: list[Cell] = []
        self.progress: Progress | None = None
        self._loading = "starting"
        self._at = 0.0  # the time of the last call
        self._durations: list[float] = []  # of the parts done, seconds
        self._live = Live(console=console, get_renderable=self.render, transient=True, refresh_per_second=4)

    def __enter__(self) -> LiveTable:
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._live.stop()

    def __call__(self, progress: Progress) -> None:
        """Shows how far the run is: the `progress` of `run_acceptance`."""
        now = self.clock()
        if self.progress is not None:
            self._durations.append(now - self._at)
        self.progress, self._at = progress, now
        if progress.finished is not None:
            self.cells.append(progress.finished.as_dict())
            if not self.console.is_terminal:
                self.message(f"{progress.done}/{progress.total} {_line(self.cells[-1])}{self._left_text()}")

    def loading(self, what: str, done: int, total: int) -> None:
        """Shows how far the model is loaded, in a line until the first part begins: the `loading` of
        `run_acceptance`."""
        self._loading = as_text(what, done, total)

    def message(self, text: str) -> None:
        """Prints one line above the table."""
        self.console.print(text, soft_wrap=True, markup=False, highlight=False)

    @property
    def seconds_left(self) -> float | None:
        """Seconds until the end at the mean pace of the parts that ran, those of an earlier run not counted; None
        before the first one."""
        longest = max(self._durations, default=0.0)
        ran = [d for d in self._durations if d > SHORT * longest]
        if self.progress is None or not ran:
            return None
        parts = self.progress.total - self.progress.done
        return max(0.0, parts * sum(ran) / len(ran) - (self.clock() - self._at))

    def _left_text(self) -> str:
        left = self.seconds_left
        return "" if left is None else f", about {_duration(left)} left"

    def render(self) -> RenderableType:
        """Returns the end of the table, as much as fits, and the bar."""
        if self.progress is None:
            return Text(self._loading)
        rows = max(1, self.console.height - LINES_AROUND_TABLE)
        parts: list[RenderableType] = []
        if self.cells:
            table = _table("T", "B", *COLUMNS)
            for cell in self.cells[-rows:]:
                table.add_row(f"{cell['temperature']:g}", str(cell["batch_size"]), *_row(cell))
            parts.append(table)
        bar = Table.grid(padding=(0, 1))
        progress = self.progress
        bar.add_row(
            ProgressBar(total=progress.total, completed=progress.done, width=30),
            f"{progress.done}/{progress.total}{self._left_text()}",
        )
        return Group(*parts, bar, Text(f"now {progress.what}", style="dim", overflow="ellipsis", no_wrap=True))


def print_results(document: dict[str, Any], console: Console) -> None:
    """Prints a table per temperature and batch size with its verdict, then the checks."""
    for section in sections(document):
        table = _table(*COLUMNS, "draft 1")
        table.title = escape(section.name)
        for cell in section.cells:
            table.add_row(*_row(cell), _first_draft(cell), style="bold" if cell is section.best else "")
        console.print(table)
        _say(console, section.verdict)
        if section.warning:
            _say(console, f"WARNING: {section.warning}", "yellow")
        console.print()
    _say(
        console,
        "length: tokens per verification, bonus token included; draft 1: its acceptance; x plain: speed-up over plain "
        "decoding; tok/s: tokens per second, per request; loop: output tokens in final loops; 95 % bootstrap intervals "
        "over prompts.",
        "dim",
    )
    if document["options"].get("drafter") is not None:
        _say(console, f"Drafts of {document['options']['drafter']}, in place of the MTP layer's.")
    failed = failed_checks(document)
    _say(console, check_verdict(document), "bold red" if failed else "")
    for cell in failed:
        _say(console, f"FAILED, {cell_name(cell)}: {cell['check']['message']}", "red")


def _say(console: Console, text: str, style: str = "") -> None:
    console.print(text, style=style, markup=False, highlight=False)


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=0, title_justify="left", title_style="bold")
    for name in columns:
        table.add_column(name, justify="left" if name == RULE else "right", no_wrap=True)
    return table


def _row(cell: Cell) -> list[str]:
    """Returns a cell's values of `COLUMNS` as text."""
    group, check = cell["all"], cell["check"]
    return [
        escape(rule_label(cell).removesuffix(" drafts")),
        str(cell["num_speculative_tokens"]) if speculative(cell) else "",
        _estimate(group["mean_acceptance_length"]),
        _estimate(group["speedup"]) if speculative(cell) else "",
        format_number(group["tokens_per_s_per_request"]["value"], ",.0f"),
        _share(cell),
        "" if check is None else "ok" if check["passed"] else "[red]FAILED[/]",
    ]


def _share(cell: Cell) -> str:
    """Returns the final loops' share of the output tokens as text."""
    text = format_number(cell["all"]["final_loop_share"]["value"], ".0%")
    return f"[yellow]{text}[/]" if cell["warnings"] else text


def _first_draft(cell: Cell) -> str:
    """Returns the acceptance of draft 1 as text; empty for a plain cell."""
    return format_number(cell["all"]["conditional"][0]["value"], ".3f") if cell["all"]["conditional"] else ""


def _line(cell: Cell) -> str:
    """Returns a finished cell in one line."""
    group = cell["all"]
    parts = [cell_name(cell)]
    if speculative(cell):
        parts.append(f"length {_estimate(group['mean_acceptance_length']) or 'unknown'}")
        parts.append(f"{_estimate(group['speedup']) or 'unknown'} x plain")
    parts += [f"WARNING: {warning}" for warning in cell["warnings"]]
    if cell["check"] is not None and not cell["check"]["passed"]:
        parts.append(f"CHECK FAILED: {cell['check']['message']}")
    return parts[0] + ": " + ", ".join(parts[1:]) if len(parts) > 1 else parts[0]


def _estimate(estimate: Estimate) -> str:
    """Returns an estimate as text, narrower than in prose: "1.93 (1.88-1.98)"."""
    value, low, high = (format_number(estimate[name], ".2f") for name in ("value", "low", "high"))
    return f"{value} ({low}-{high})" if low and high else value


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"

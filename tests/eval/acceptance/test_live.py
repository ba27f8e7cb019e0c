"""What a terminal shows, during a run and after it."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any, cast

import pytest
from rich.console import Console

from specdec.eval.acceptance.live import LiveTable, print_results
from specdec.eval.acceptance.run import Progress
from specdec.eval.acceptance.summary import sections
from support.acceptance_document import cell, check, document, estimate, without_values


@dataclass
class Finished:
    cell: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        return self.cell


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def console(*, terminal: bool = False, width: int = 80, height: int = 24) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=width, height=height, color_system=None)


def printed(out: Console) -> str:
    assert isinstance(out.file, io.StringIO)
    return out.file.getvalue()


def step(done: int, total: int = 10, finished: dict[str, Any] | None = None) -> Progress:
    return Progress(done, total, f"part {done}", cast(Any, None if finished is None else Finished(finished)))


def rendered(table: LiveTable) -> str:
    out = console(terminal=True, width=table.console.width)
    out.print(table.render())
    return printed(out)


def test_time_left_follows_the_pace_and_counts_down() -> None:
    clock = Clock()
    table = LiveTable(console(), clock)
    assert table.seconds_left is None
    table(step(0))
    assert table.seconds_left is None
    clock.now += 10
    table(step(1))
    assert table.seconds_left == pytest.approx(9 * 10)
    clock.now += 4
    assert table.seconds_left == pytest.approx(9 * 10 - 4)
    clock.now += 16
    table(step(2))
    assert table.seconds_left == pytest.approx(8 * 15)
    clock.now += 1000
    assert table.seconds_left == 0


def test_parts_of_an_earlier_run_do_not_quicken_the_pace() -> None:
    clock = Clock()
    table = LiveTable(console(), clock)
    for done in range(6):
        table(step(done))
        clock.now += 0.02
    clock.now += 30
    table(step(6))
    assert table.seconds_left == pytest.approx(4 * 30, rel=0.01)


def test_without_a_terminal_every_finished_cell_is_a_line() -> None:
    clock, out = Clock(), console(width=40)
    fine, failed = cell(0.6, "block", "sampled", 3, 8), cell(0.6, "block", "greedy", 5, 8)
    failed["check"] = check(5, passed=False)
    with LiveTable(out, clock) as table:
        table(step(0))
        clock.now += 120
        table(step(1, finished=cell(0.6, "coupled", "sampled", 0, 8)))
        table(step(2, finished=fine))
        table(step(3, finished=failed))
        table(step(4))
        table.message("a [note]")
    lines = printed(out).splitlines()
    assert len(lines) == 4
    assert lines[0] == "1/10 temperature 0.6, batch size 8, plain decoding, about 18 min left"
    length, speedup = (fine["all"][name] for name in ("mean_acceptance_length", "speedup"))
    assert lines[1].startswith("2/10 temperature 0.6, batch size 8, block verification, K = 3: length ")
    assert f"length {length['value']:.2f} ({length['low']:.2f}-{length['high']:.2f})" in lines[1]
    assert f"{speedup['value']:.2f} ({speedup['low']:.2f}-{speedup['high']:.2f}) x plain" in lines[1]
    assert f"CHECK FAILED: {failed['check']['message']}" in lines[2]
    assert lines[3] == "a [note]"


def test_on_a_terminal_there_are_a_table_and_a_bar() -> None:
    clock, out = Clock(), console(terminal=True)
    table = LiveTable(out, clock)
    assert "starting" in rendered(table)
    table.loading("loading weights", 1, 4)
    assert "loading weights: 25 %" in rendered(table)
    table(step(0))
    clock.now += 5
    table(step(3, finished=cell(0.6, "block", "sampled", 3, 8)))
    text = rendered(table)
    assert "3/10, about 35 s left" in text
    assert "now part 3" in text
    (row,) = [line for line in text.splitlines() if "block" in line]
    assert row.split()[:4] == ["0.6", "8", "block", "3"]
    assert printed(out) == "", "the live display is the only one that writes"


def test_the_live_display_starts_and_ends_whatever_happens() -> None:
    out = console(terminal=True)
    table = LiveTable(out)

    def interrupted() -> None:
        with table:
            assert table._live.is_started
            table(step(3, finished=cell(0.6, "block", "sampled", 3, 8)))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not table._live.is_started
    quiet = LiveTable(console())
    with quiet:
        assert not quiet._live.is_started


def test_the_live_table_keeps_to_the_screen() -> None:
    table = LiveTable(console(terminal=True, height=16))
    for i in range(30):
        table(step(i, 40, cell(0.6, "coupled", "greedy", 1 + i % 8, 100 + i)))
    lines = rendered(table).splitlines()
    assert len(lines) <= 16
    assert max(map(len, lines)) <= 80
    assert "\N{HORIZONTAL ELLIPSIS}" not in rendered(table)
    assert " 129 " in rendered(table)
    assert " 120 " not in rendered(table)


@pytest.mark.parametrize(
    "made",
    [
        document(), document((0.6,), ("block",), (8,), (1,)), without_values(document()),
        document((0.6,), ("coupled",), (), (1,)), document() | {"cells": []},
        document(tuple(i / 10 for i in range(1, 11)), ("coupled", "block", "token"), (3,), (1,)),
    ],
    ids=["default", "one cell", "no values", "only plain", "no cells", "many cells"],
)  # fmt: skip
def test_results_fit_80_columns(made: dict[str, Any]) -> None:
    for one in made["cells"][::3]:
        if one["num_speculative_tokens"] and one["verification"] != "greedy":
            one["draft_sampling"] = "greedy"
    out = console()
    print_results(made, out)
    lines = printed(out).splitlines()
    assert max(map(len, lines)) <= 80
    text = " ".join(" ".join(lines).split())
    assert "\N{HORIZONTAL ELLIPSIS}" not in text
    for section in sections(made):
        assert section.name in text
        assert section.verdict in text
        for one in section.cells:
            for name in ("mean_acceptance_length", "speedup") if one["num_speculative_tokens"] else ():
                e = one["all"][name]
                if e["value"] is not None:
                    assert f" {e['value']:.2f} ({e['low']:.2f}-{e['high']:.2f}) " in text


def test_rows_have_the_cell_s_values() -> None:
    made = document((0.6,), ("coupled",), (2,), (1,))
    plain, one = made["cells"]
    one["all"]["conditional"][0] = estimate(0.4567)
    one["all"]["tokens_per_s_per_request"] = estimate(12345.6, 1)
    plain["all"]["tokens_per_s_per_request"] = estimate(23456.7, 1)
    out = console()
    print_results(made, out)
    rows = [line.split() for line in printed(out).splitlines()]
    (row,) = [r for r in rows if r[:2] == ["coupled", "2"]]
    assert row[6:] == ["12,346", "7%", "ok", "0.457"]
    assert ["plain", "23,457", "7%"] in rows


def looping() -> dict[str, Any]:
    """Two cells of four warn, and one of four at another temperature."""
    made = document((0.0, 0.6), ("block",), (1, 2, 3), (1,))
    for number, share in ((2, 0.84), (3, 0.87), (5, 0.21)):
        made["cells"][number]["all"]["final_loop_share"] = estimate(share)
        made["cells"][number]["warnings"] = [f"{share:.0%} of the output tokens lie in final loops"]
    return made


def test_loops_are_warned_of_below_the_table_they_are_in() -> None:
    out = console()
    print_results(looping(), out)
    first, second = " ".join(printed(out).split()).split("temperature 0.6, batch size 1")
    wanted = "output tokens lie in final loops: acceptance and speed-up there are those of repeating text."
    assert f"WARNING: in 2 of 4 cells 84% to 87% of the {wanted}" in first
    assert f"WARNING: in 1 of 4 cells 21% of the {wanted}" in second
    out = console()
    print_results(document(), out)
    assert "WARNING" not in printed(out)


def test_the_live_lines_warn_of_loops() -> None:
    out = console()
    with LiveTable(out) as table:
        table(step(1, finished=looping()["cells"][2]))
        table(step(2, finished=looping()["cells"][4]))
    warned, quiet = printed(out).splitlines()
    assert "WARNING: 84% of the output tokens lie in final loops" in warned
    assert "WARNING" not in quiet


def test_failed_checks_are_told_with_their_message() -> None:
    made = document((0.6,), ("coupled",), (1, 2), (1,))
    made["cells"][2]["check"] = check(2, passed=False) | {"message": "broken [/] at [red]1[/red]"}
    out = console()
    print_results(made, out)
    text = printed(out)
    assert "1 of 2 checks against the model's own distributions FAILED." in text
    joined = " ".join(text.split())
    assert "FAILED, temperature 0.6, batch size 1, coupled verification, K = 2: broken [/] at [red]1[/red]" in joined
    (row,) = [line for line in text.splitlines() if line.split()[:2] == ["coupled", "2"]]
    assert row.split()[-2] == "FAILED"

"""What a busy event loop leaves of an engine's speed."""

from __future__ import annotations

import asyncio

import pytest

from specdec.eval.busy_loop import compare, main


def test_shares_are_of_what_both_do_alone() -> None:
    (shared,) = asyncio.run(compare([500.0], 40, None))
    assert shared.complete
    assert 0 < shared.speed
    assert 250 < shared.turn_us < 2000
    assert 0 < shared.work <= 1.5


def test_the_report(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["busy_loop", "--turns-us", "0,200", "--tokens", "20"])
    main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "turn us  engine's speed  loop's work"
    assert [line.count("%") for line in lines[1:3]] == [2, 2]

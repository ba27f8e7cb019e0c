"""What a busy event loop leaves of an engine's speed."""

from __future__ import annotations

import json

import pytest

from specdec.eval import busy_loop


def report(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], patience: float) -> list[str]:
    monkeypatch.setattr(busy_loop, "PATIENCE", patience)
    monkeypatch.setattr("sys.argv", ["busy_loop", "--turns-us", "0,200", "--tokens", "20"])
    busy_loop.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "turn us  engine's speed  loop's work"
    assert len(lines) == 4
    return lines


def test_shares_are_of_what_both_do_alone(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    _, *rows, last = report(monkeypatch, capsys, patience=10_000)
    assert [row.count("%") for row in rows] == [2, 2]
    idle, busy = json.loads(last)
    assert all((idle["complete"], busy["complete"]))
    assert idle["turn_us"] < busy["turn_us"]
    assert min(idle["speed"], idle["work"], busy["speed"], busy["work"]) > 0


def test_what_takes_too_long_is_given_up(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    _, *rows, last = report(monkeypatch, capsys, patience=0)
    assert all("given up" in row for row in rows)
    assert [(s["complete"], s["speed"], s["work"]) for s in json.loads(last)] == [(False, 0, 0)] * 2

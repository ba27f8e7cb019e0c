"""The benchmark of scheduling and bookkeeping."""

from __future__ import annotations

import json
import sys

import pytest

from specdec.eval.dev import scheduling


def test_it_prints_a_table_and_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["scheduling", "--batch-sizes", "1,3", "--steps", "20", "--warm"])
    scheduling.main()
    *table, last = capsys.readouterr().out.splitlines()
    assert len(table) == 4
    costs = json.loads(last)["costs"]
    assert [c["batch_size"] for c in costs] == [1, 3]
    assert all(
        min(c["schedule_us"], c["commit_us"], c["statistics_us"]) > 0 and c["p99_us"] >= c["median_us"] for c in costs
    )


@pytest.mark.parametrize("k", [0, 3])
def test_requests_come_and_go_while_it_measures(k: int) -> None:
    load = scheduling._Load(4, k)
    hits, preempted = set(), 0
    for _ in range(400):
        load.refill()
        scheduled = load.scheduler.schedule()
        assert scheduled
        hits |= {s.sequence.stats.num_cached_tokens for s in scheduled}
        preempted += sum(s.sequence.stats.num_preemptions for s in scheduled)
        scheduling.commit(scheduled, load.result(scheduled))
        load.scheduler.remove_finished()
    assert max(hits) == scheduling.SHARED_TOKENS // 16 * 16
    assert preempted == 0

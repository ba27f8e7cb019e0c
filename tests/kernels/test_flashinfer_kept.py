"""Deciders and drawers are made once for steps of their size, and packed when the copy before is done."""

from __future__ import annotations

from array import array

import pytest

pytest.importorskip("flashinfer", reason="FlashInfer is not installed: make test-flashinfer")

from specdec.kernels.decisions import LogitEdits
from specdec.kernels.flashinfer.kept import Kept
from specdec.kernels.triton import Drawer, edit_words
from support import flashinfer_fakes
from support.flashinfer_fakes import FakeDevice
from support.flashinfer_fakes.device import CPU


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeDevice:
    return flashinfer_fakes.install(monkeypatch)


def packed(kept: Kept[Drawer], num: int, num_drafts: int = 2, edits: list[LogitEdits | None] | None = None) -> Drawer:
    with kept.packing(num_drafts, edits or [None] * num, 40) as worker:
        pass
    return worker


def test_one_serves_all_steps_of_its_size(fake: FakeDevice) -> None:
    kept = Kept(Drawer, CPU)
    first = packed(kept, 3)
    assert (first.batch.size, first.batch.num_drafts, first.vocab_size) == (4, 2, 40)
    assert packed(kept, 4) is first
    assert packed(kept, 5).batch.size == 8
    assert packed(kept, 3, num_drafts=1).batch.num_drafts == 1
    assert packed(kept, 1).batch.size == 1
    assert packed(kept, 3) is first


def test_edits_that_have_no_room_get_a_larger_one(fake: FakeDevice) -> None:
    kept, counted = Kept(Drawer, CPU), 0
    plain, made = packed(kept, 2), []
    for counted in range(1, 200, 3):
        edits = [None, LogitEdits(counted_ids=array("q", range(counted)), counts=array("q", range(counted)))]
        worker = packed(kept, 2, edits=edits)
        assert worker.batch.edit_words >= edit_words(edits)
        made.append(worker)
    assert len(set(made)) < 8  # twice the room each time
    assert plain not in made
    assert packed(kept, 2) is made[-1]


def test_packing_waits_for_the_copy_of_the_step_before(fake: FakeDevice) -> None:
    kept = Kept(Drawer, CPU)
    with fake.waiting() as waits:
        drawer = packed(kept, 2)
        packed(kept, 3)
        assert waits == []
        packed(kept, 2)
        assert waits == ["an event in packing"]
        drawer.batch.drafts.tolist()
        packed(kept, 2)
        assert len(waits) == 2  # the reading; the copy was done by then

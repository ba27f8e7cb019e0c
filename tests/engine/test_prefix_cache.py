"""What the prefix cache shares and evicts, and what the pool's check of integrity sees."""

from __future__ import annotations

from dataclasses import replace

import pytest

from specdec.cache.pages import PagePool
from specdec.request.sequence import Sequence
from specdec.step.scheduler import Scheduler
from support.scheduling import Memory, Request, Setting, make_scheduler, make_sequence, simple_request


def run_alone(scheduler: Scheduler, memory: Memory, requests: dict[str, Request], name: str) -> Sequence:
    """To its end."""
    sequence = make_sequence(requests[name])
    scheduler.add(sequence)
    while not scheduler.idle:
        memory.run(scheduler.schedule(), requests)
        scheduler.remove_finished()
    return sequence


def test_a_finished_requests_pages_serve_its_continuation() -> None:
    """The next turn of a conversation computes what is new; pages past the last full one are nobody's."""
    for k in (0, 2):
        scheduler, memory = make_scheduler(Setting(4, 30, 4, 64, True, False)), Memory(4)
        first = Request("1", list(range(10)), 11, k, 0, 0, None, [7] * 40, [True] * 40)
        second = replace(first, name="2", prompt=[*range(10), *[7] * 11, 5])
        requests = {r.name: r for r in (first, second)}
        for name in "12":
            sequence = run_alone(scheduler, memory, requests, name)
            scheduler.check_integrity()
        assert sequence.stats.num_cached_tokens == (20 if k == 0 else 16)


def test_pages_without_mtp_rows_serve_the_target_alone() -> None:
    hits = {}
    for first_k, second_k in ((0, 0), (0, 3), (3, 0), (3, 3)):
        scheduler, memory = make_scheduler(Setting(4, 30, 4, 64, True, False)), Memory(4)
        requests = {n: replace(simple_request("1", 18, k=k), name=n) for n, k in (("1", first_k), ("2", second_k))}
        for name in "12":
            sequence = run_alone(scheduler, memory, requests, name)
        hits[first_k, second_k] = sequence.stats.num_cached_tokens
    assert hits == {(0, 0): 16, (0, 3): 0, (3, 0): 16, (3, 3): 16}


def test_samples_share_their_prompts_pages() -> None:
    for k in (0, 3):
        scheduler, memory = make_scheduler(Setting(4, 40, 4, 64, True, False)), Memory(4)
        first = simple_request("1", 18, k=k)
        requests = {first.name: first} | {f"1.{i}": replace(first, name=f"1.{i}") for i in (1, 2, 3)}
        leader = make_sequence(first)
        samples = [leader] + [make_sequence(r, leader) for r in list(requests.values())[1:]]
        for sequence in samples:
            scheduler.add(sequence)
        while len(scheduler.running) < 4:
            memory.run(scheduler.schedule(), requests)
        assert len({tuple(s.page_table[:4]) for s in samples}) == 1
        assert len({page for s in samples for page in s.page_table[4:]}) == sum(len(s.page_table) - 4 for s in samples)
        assert [s.stats.num_cached_tokens for s in samples] == [0, 16, 16, 16]
        while not scheduler.idle:
            memory.run(scheduler.schedule(), requests)
            scheduler.remove_finished()
            scheduler.check_integrity()


def test_the_longest_idle_pages_are_evicted_first() -> None:
    pool = PagePool(4, 1)
    tables = {}
    for first in (1, 2):
        tables[first] = pool.allocate(2)
        for at in range(2):
            pool.publish(tables[first], at, [first, 5, 6], with_mtp=True)
    pool.release(tables[2])
    pool.release(tables[1])
    assert pool.num_free == 4
    assert pool.allocate(1) == [tables[2][1]], "of the pages given back first, the last"
    assert pool.cached_prefix([1, 5, 6], 2, with_mtp=True) == tables[1]
    assert pool.cached_prefix([2, 5, 6], 2, with_mtp=True) == tables[2][:1]
    assert pool.cached_prefix([1, 5, 7], 2, with_mtp=True) == tables[1][:1], "the token after a page is in its key"
    assert pool.cached_prefix([1, 6, 6], 2, with_mtp=True) == []


def test_integrity_check_sees_lost_shared_and_double_pages() -> None:
    pool = PagePool(4, 16)
    pages = pool.allocate(2)
    pool.check_integrity([pages])
    for tables in ([], [pages, pages], [[pages[0]]], [[*pages, 3]]):
        with pytest.raises(AssertionError):
            pool.check_integrity(tables)
    pool.release(pages)
    with pytest.raises(AssertionError, match="nobody holds it"):
        pool.release(pages[:1])
    pool._free.append(3)
    with pytest.raises(AssertionError):
        pool.check_integrity([])


def test_integrity_check_sees_pages_shared_unpublished_and_keys_of_forgotten_pages() -> None:
    pool = PagePool(4, 1)
    pages = pool.allocate(2)
    pool.hold(pages)
    with pytest.raises(AssertionError, match="shared that nobody published"):
        pool.check_integrity([pages, pages])
    for at in range(2):
        pool.publish(pages, at, [1, 2, 3], with_mtp=False)
    pool.check_integrity([pages, pages])
    pool.release(pages)
    pool.release(pages)
    pool._cache._idle = dict.fromkeys(pages)
    with pytest.raises(AssertionError, match="outlive"):
        pool.check_integrity([])
    pool.allocate(3)
    with pytest.raises(AssertionError):
        pool.check_integrity([])

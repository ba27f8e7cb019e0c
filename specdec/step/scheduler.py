"""Chooses which sequences take part in a step, and with how many tokens. No torch here.

The order is priority, then arrival. Requests that decode come first, so a long prompt never stalls them; prompts get
what is left of the token budget, in chunks. A request is admitted when a slot is free and the pool has pages for its
tokens and first drafts, and gets more as it grows. When pages run out, the running request that is last in order gives
up its pages and waits again, before all who came after it; its tokens stay, and it computes their rows anew.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass
from operator import attrgetter

from specdec.cache.pages import PagePool
from specdec.errors import CacheFullError
from specdec.request.sequence import Sequence

MAX_PENDING_PAIRS = 1024  # of one sequence: bounds their memory, and the step that resumes drafting

_order = attrgetter("order")


@dataclass(slots=True)
class ScheduledSequence:
    """A sequence's share of one step: committed tokens to compute, then drafts. The sequence samples when none of its
    tokens stays uncomputed; only then it may draft."""

    sequence: Sequence
    """The sequence."""
    num_new_tokens: int
    """Committed tokens to compute: a prefill chunk, or 1 in decoding."""
    num_draft_tokens: int
    """The most drafts; the scheduler sets it, `DraftLength.choose` may lower it."""
    flushes: bool = False
    """Whether the MTP layer runs over the pending pairs though nothing is drafted."""

    @property
    def samples(self) -> bool:
        """Whether the step decides tokens of the sequence."""
        return self.num_new_tokens == self.sequence.num_uncomputed_tokens

    @property
    def extends_mtp(self) -> bool:
        """Whether the MTP layer runs over the pending pairs in this step. Where the draft length is automatic, pairs of
        the output wait until drafts need them; pairs of a prompt never do, so that others may take over its pages."""
        return self.extends_mtp_with(self.num_draft_tokens)

    def extends_mtp_with(self, num_draft_tokens: int) -> bool:
        """Returns whether the MTP layer would run over the pending pairs with so many drafts."""
        sequence = self.sequence
        return bool(sequence.pending_hidden) and (
            num_draft_tokens > 0
            or not sequence.speculation.automatic
            or self.flushes
            or sequence.num_mtp_tokens < sequence.num_prompt_tokens - 1
            or sequence.num_pending_pairs >= MAX_PENDING_PAIRS
        )


class Scheduler:
    """Queues requests, gives them pages, and chooses each step's.

    waiting, running: requests in order, lower priority numbers first, then those that arrived first.
    """

    def __init__(self, pool: PagePool, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        self.pool = pool
        self.max_num_seqs, self.max_num_batched_tokens = max_num_seqs, max_num_batched_tokens
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self._num_arrivals = 0
        self._refused: tuple[tuple[int, int] | None, int] = None, 0  # whose turn it was, and how many pages were free

    @property
    def idle(self) -> bool:
        """Whether no request waits or runs."""
        return not self.waiting and not self.running

    def add(self, sequence: Sequence) -> None:
        """Queues a request. Raises CacheFullError when the whole pool could not hold it."""
        needed = self.pool.pages_for(sequence.max_total_tokens)
        if needed > self.pool.num_pages:
            raise CacheFullError(
                f"a request of up to {sequence.max_total_tokens} tokens needs {needed} pages of "
                f"{self.pool.page_size}, the KV cache has {self.pool.num_pages}: lower max_tokens or "
                "raise num_pages or kv_cache_bytes"
            )
        sequence.arrival = self._num_arrivals
        self._num_arrivals += 1
        insort(self.waiting, sequence, key=_order)

    def schedule(self) -> list[ScheduledSequence]:
        """Returns the next step: all sequences that decode, then chunks of those that do not yet."""
        page_size = self.pool.page_size
        for sequence in self.running:
            if sequence.num_final_rows >= (sequence.num_published_pages + 1) * page_size:
                self._publish(sequence)
        scheduled = self._decoding()
        budget = self.max_num_batched_tokens - sum(s.num_new_tokens + s.num_draft_tokens for s in scheduled)
        if budget > 0:
            for sequence in self._prefilling():
                num_new = min(sequence.num_prefill_tokens - sequence.num_computed_tokens, budget)
                scheduled.append(ScheduledSequence(sequence, num_new, 0))
                budget -= num_new
                if budget == 0:
                    break
        return scheduled

    def remove_finished(self) -> None:
        """Takes finished requests out of those that run and gives their pages back."""
        finished = [s for s in self.running if s.finish_reason is not None]
        if finished:
            self.running = [s for s in self.running if not s.finished]
            for sequence in finished:
                self._publish(sequence)
                self.pool.release(sequence.give_up_pages())

    def remove(self, sequence: Sequence) -> None:
        """Takes out an aborted request, wherever it is; rows of a step that failed are not published."""
        for queue in (self.running, self.waiting):
            at = bisect_left(queue, sequence.order, key=_order)
            if at < len(queue) and queue[at] is sequence:
                del queue[at]
                self.pool.release(sequence.give_up_pages())

    def start_over(self) -> None:
        """Makes nobody run and every page free, whatever an interrupted step has left behind."""
        running, self.running = self.running, []
        self._refused = None, 0
        self.pool.reset()
        for sequence in running:
            sequence.give_up_pages()

    def check_integrity(self) -> None:
        """Raises AssertionError unless queues, page tables, pool and prefix cache agree."""
        assert sorted(self.waiting, key=_order) == self.waiting, "waiting is out of order"
        assert sorted(self.running, key=_order) == self.running, "running is out of order"
        assert not any(s.finished for s in (*self.waiting, *self.running)), "a finished request is still here"
        assert not any(s.page_table for s in self.waiting), "a waiting request holds pages"
        for s in self.running:
            assert s.num_published_pages * self.pool.page_size <= s.num_computed_tokens, (
                "a page was published too early"
            )
        self.pool.check_integrity([s.page_table for s in self.running])

    def _decoding(self) -> list[ScheduledSequence]:
        """Schedules every sequence that has one token left to compute, with drafts and pages for all of them. When
        pages run out the last sequence in order is preempted (possibly this one); K is never reduced, because the
        rejection rules' tokens depend on K."""
        scheduled, page_size = [], self.pool.page_size
        for sequence in self.running:  # which preemption shortens from its end
            num_tokens = len(sequence.token_ids)
            if sequence.num_computed_tokens == num_tokens - 1:
                num_draft = self._num_draft_tokens(sequence, num_tokens)
                num_rows = num_tokens + num_draft
                if num_rows <= len(sequence.page_table) * page_size or self._grow(sequence, num_rows):
                    scheduled.append(ScheduledSequence(sequence, 1, num_draft))
        return scheduled

    def _grow(self, sequence: Sequence, num_rows: int) -> bool:
        """Gives a running sequence pages for so many rows; returns False where it lost its place instead."""
        missing = self.pool.pages_for(num_rows) - len(sequence.page_table)
        while missing > self.pool.num_free:
            if self._preempt_last() is sequence:
                return False
        if missing > 0:
            sequence.page_table += self.pool.allocate(missing)
        return True

    def _preempt_last(self) -> Sequence:
        sequence = self.running.pop()
        self.pool.release(sequence.preempt())
        insort(self.waiting, sequence, key=_order)
        return sequence

    def _prefilling(self) -> Iterator[Sequence]:
        """Yields running sequences that still prefill, then admits waiting ones, one for each further item the caller
        takes."""
        yield from [s for s in self.running if s.num_computed_tokens < len(s.token_ids) - 1]
        while (sequence := self._admit()) is not None:
            yield sequence

    def _admit(self) -> Sequence | None:
        """Makes the next waiting sequence run and returns it; None without a slot, or without pages for its tokens and
        first drafts."""
        if len(self.running) == self.max_num_seqs:
            return None
        sequence = next((s for s in self.waiting if not self._shares_soon(s)), None)
        if sequence is None or (self._refused[0] == sequence.order and self.pool.num_free <= self._refused[1]):
            return None
        most = sequence.num_prefill_tokens - 1
        cached = self.pool.cached_prefix(sequence.token_ids, most, with_mtp=sequence.uses_mtp)
        self.pool.hold(cached)
        num_rows = min(len(sequence.token_ids) + 1 + sequence.speculation.max_draft_tokens, sequence.max_total_tokens)
        missing = self.pool.pages_for(num_rows) - len(cached)
        if missing > self.pool.num_free:
            self.pool.release(cached)
            self._refused = sequence.order, self.pool.num_free
            return None
        self._refused = None, 0
        self.waiting.remove(sequence)
        sequence.admit(cached + self.pool.allocate(missing), len(cached), self.pool.page_size)
        insort(self.running, sequence, key=_order)
        return sequence

    def _shares_soon(self, sequence: Sequence) -> bool:
        """Returns whether the leader (sample 0 of the same prompt) still computes prompt pages that this sample will
        reuse. That ends at the latest when the leader has drafted once, since the MTP layer has run over its prompt
        then."""
        leader = sequence.leader
        if leader is None or leader.finished or not self.pool.prefix_caching or leader.stats.num_target_forwards > 1:
            return False
        return leader.num_published_pages < len(leader.prompt_token_ids) // self.pool.page_size

    def _publish(self, sequence: Sequence) -> None:
        """Offers the pages that have become full and final to other requests."""
        num_full = sequence.num_final_rows // self.pool.page_size
        for at in range(sequence.num_published_pages, num_full):
            self.pool.publish(sequence.page_table, at, sequence.token_ids, with_mtp=sequence.uses_mtp)
            sequence.num_published_pages += 1

    @staticmethod
    def _num_draft_tokens(sequence: Sequence, num_tokens: int) -> int:
        """Returns K, clipped so that drafts and the token after them still fit. The first token is decided without
        drafts, so that where iterations start depends neither on chunks nor on what was cached."""
        if num_tokens == sequence.num_prompt_tokens:
            return 0
        return min(sequence.speculation.max_draft_tokens, sequence.max_total_tokens - num_tokens - 1)

"""`AttentionMetadata` in FlashInfer's terms, and filled up to the fixed shape of a CUDA graph. Host only.

Shapes: T packed tokens, B sequences, P pages of all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

from specdec.kernels.data import AttentionMetadata


@dataclass(frozen=True, slots=True)
class PageTable:
    """The pages of B sequences: sequence b's are indices[indptr[b] : indptr[b + 1]]."""

    indptr: list[int]
    """[B + 1]: where each sequence's pages begin in `indices`."""
    indices: list[int]
    """[P]: page ids."""
    last_page_len: list[int]
    """[B]: tokens in each sequence's last page."""

    @classmethod
    def of(cls, kv_lens: list[int], page_tables: list[list[int]], page_size: int) -> PageTable:
        """Returns the table of `AttentionMetadata`'s kv_lens [B] and page_tables [B]."""
        counts = [-(-length // page_size) for length in kv_lens]
        return cls(
            indptr=list(accumulate(counts, initial=0)),
            indices=[page for table, count in zip(page_tables, counts) for page in table[:count]],
            last_page_len=[length - (count - 1) * page_size for length, count in zip(kv_lens, counts)],
        )


@dataclass(frozen=True, slots=True)
class FixedBatch:
    """A batch filled up to num_seqs sequences of query_len rows each.

    The rows that are added are padding: they stand after a sequence's own, or make up sequences without any. They read
    what their sequence sees and the scratch page, which alone they write.
    """

    positions: list[int]
    """[num_seqs * query_len]: each row's position in its sequence."""
    slots: list[int]
    """[num_seqs * query_len]: each row's place in the cache."""
    pages: PageTable
    """The pages of the num_seqs sequences."""
    rows: list[int]
    """[T]: where the tokens of the batch lie among the rows."""

    @classmethod
    def fill(cls, metadata: AttentionMetadata, num_seqs: int, query_len: int, scratch_page: int) -> FixedBatch:
        """Fills a batch up.

        metadata: at most num_seqs sequences with at most query_len tokens each.
        num_seqs, query_len: the shape to fill.
        scratch_page: the page that padding writes.
        """
        size, num_padding = metadata.page_size, num_seqs - len(metadata.query_lens)
        scratch_slots = [scratch_page * size + i % size for i in range(query_len)]
        scratch_table = [scratch_page] * -(-query_len // size)
        positions: list[int] = []
        slots: list[int] = []
        kv_lens: list[int] = []
        tables: list[list[int]] = []
        for count, end, table in zip(metadata.query_lens, metadata.kv_lens, metadata.page_tables):
            first, more = end - count, query_len - count
            positions += [*range(first, end), *[0] * more]
            slots += [table[at // size] * size + at % size for at in range(first, end)] + scratch_slots[:more]
            kv_lens.append(end + more)
            tables.append(table[: -(-end // size)] + scratch_table if more else table)
        positions += [0] * (num_padding * query_len)
        slots += scratch_slots * num_padding
        kv_lens += [query_len] * num_padding
        tables += [scratch_table] * num_padding
        rows = [b * query_len + i for b, count in enumerate(metadata.query_lens) for i in range(count)]
        return cls(positions, slots, PageTable.of(kv_lens, tables, size), rows)

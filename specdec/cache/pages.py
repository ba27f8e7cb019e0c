"""The paged KV cache: one tensor for all layers, and the pool that hands out its pages.

Target and MTP layer share page tables: the MTP layer's cache is one more layer of the same pool.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from specdec.cache.prefix import NO_PAGE, PageKey, PrefixCache
from specdec.model.config import Glm4MoeConfig


def page_bytes(config: Glm4MoeConfig, num_layers: int, page_size: int, dtype: torch.dtype) -> int:
    """Returns the bytes of one page over all layers.

    config: says how many heads there are and how large.
    num_layers: layers of the cache, the MTP layer's included.
    page_size: tokens of a page.
    dtype: of keys and values.
    """
    return num_layers * 2 * page_size * config.num_key_value_heads * config.head_dim * dtype.itemsize


def allocate_kv_cache(
    config: Glm4MoeConfig, num_layers: int, num_pages: int, page_size: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Returns a cache of zeros, [num_layers, num_pages, 2, page_size, Hkv, D], keys first."""
    shape = (num_layers, num_pages, 2, page_size, config.num_key_value_heads, config.head_dim)
    return torch.zeros(shape, dtype=dtype, device=device)


class PagePool:
    """Hands out page ids 0 .. num_pages - 1, lowest free id first after a fresh start, and counts who holds them.

    A page that is given back by its last holder is free, or, while the prefix cache knows it, idle: still there for
    the next request of the same beginning, and evicted, the longest idle first, once no page is free.
    """

    def __init__(self, num_pages: int, page_size: int, *, prefix_caching: bool = True) -> None:
        self.num_pages, self.page_size, self.prefix_caching = num_pages, page_size, prefix_caching
        self.reset()

    def reset(self) -> None:
        """Makes every page free, and forgets what was cached."""
        self._free = list(range(self.num_pages - 1, -1, -1))
        self._num_holders = [0] * self.num_pages
        self._cache = PrefixCache()

    @property
    def num_free(self) -> int:
        """Pages that can be allocated, idle ones included."""
        return len(self._free) + self._cache.num_idle

    def pages_for(self, num_tokens: int) -> int:
        """Returns how many pages hold so many tokens."""
        return -(-num_tokens // self.page_size)

    def allocate(self, num_pages: int) -> list[int]:
        """Takes pages from the pool and returns their ids; the caller has checked `num_free`."""
        assert num_pages <= self.num_free, f"{num_pages} pages wanted, {self.num_free} free"
        pages = [self._free.pop() if self._free else self._cache.evict() for _ in range(num_pages)]
        for page in pages:
            self._num_holders[page] = 1
        return pages

    def cached_prefix(self, token_ids: list[int], max_tokens: int, *, with_mtp: bool) -> list[int]:
        """Returns the cached pages of the first tokens of a sequence; call `hold` to keep them.

        token_ids: the sequence's tokens.
        max_tokens: the most tokens that the pages may hold, fewer than there are.
        with_mtp: whether the pages must have MTP rows.
        """
        return self._cache.longest_prefix(token_ids, self.page_size, max_tokens, with_mtp=with_mtp)

    def hold(self, pages: list[int]) -> None:
        """Counts one holder more of cached pages, which are the first of a sequence."""
        for page in pages:
            self._num_holders[page] += 1
            self._cache.set_held(page)

    def publish(self, pages: list[int], at: int, token_ids: list[int], *, with_mtp: bool) -> None:
        """Offers a full and final page to other sequences.

        Where the cache knows such a page already, that one takes its place in `pages`, and this one is released.

        pages: a sequence's; those before `at` are published.
        at: which of the pages it is.
        token_ids: the sequence's tokens, one more than the page holds at least.
        with_mtp: whether the page has MTP rows.
        """
        if not self.prefix_caching:
            return
        start, end = at * self.page_size, (at + 1) * self.page_size
        predecessor = pages[at - 1] if at else NO_PAGE
        tokens, next_token_id = tuple(token_ids[start:end]), token_ids[end]
        page = self._cache.find(predecessor, tokens, next_token_id, with_mtp=with_mtp)
        if page is None:
            self._cache.insert(PageKey(predecessor, tokens, next_token_id if with_mtp else None), pages[at])
        else:
            self.hold([page])
            self.release([pages[at]])
            pages[at] = page

    def release(self, pages: list[int]) -> None:
        """Counts one holder less of each page, last page first."""
        for page in reversed(pages):
            assert self._num_holders[page] > 0, f"page {page} is released, and nobody holds it"
            self._num_holders[page] -= 1
            if self._num_holders[page] > 0:
                continue
            if page in self._cache:
                self._cache.set_idle(page)
            else:
                self._free.append(page)

    def check_integrity(self, page_tables: list[list[int]]) -> None:
        """Raises AssertionError unless every page is held by as many of the tables as it counts, and otherwise free or
        idle; unless pages in several tables are cached ones; and unless the prefix cache agrees with itself."""
        holders = Counter(page for table in page_tables for page in table)
        assert [holders[page] for page in range(self.num_pages)] == self._num_holders, "a page is lost or counted twice"
        unheld = [page for page in range(self.num_pages) if not holders[page]]
        assert sorted(self._free) == [page for page in unheld if page not in self._cache], "a page is free and used"
        shared = {page for page, count in holders.items() if count > 1}
        assert all(page in self._cache for page in shared), "a page is shared that nobody published"
        self._cache.check_integrity(self._num_holders)

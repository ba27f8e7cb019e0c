"""Knows which page holds which tokens, so that a request takes over what others computed of its beginning. No torch
here.

A page's key is its tokens, the page before it and the token *after* it: the page's last MTP row belongs to the pair
(hidden state of its last token, next token), so prompts that part exactly at a page's end differ in that row. Keys are
compared, not hashed alone: equal keys mean equal rows.

A holder of a page holds every page before it (`PagePool.publish` sees to that) and gives them back last to first. So
pages grow idle, and are evicted, before those that their keys name.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import NamedTuple

NO_PAGE = -1  # stands in place of the page before a sequence's first


class PageKey(NamedTuple):
    """What a full page holds."""

    predecessor: int
    """Id of the page before it; NO_PAGE for a sequence's first."""
    token_ids: tuple[int, ...]
    """The page's tokens."""
    next_token_id: int | None
    """The token after them; None where the page was written with speculation off: it has no MTP rows and serves the
    target alone."""


class PrefixCache:
    """Keys of pages, and which of the pages nobody holds, the one given back longest ago first."""

    def __init__(self) -> None:
        self._pages: dict[PageKey, int] = {}
        self._keys: dict[int, PageKey] = {}
        self._idle: dict[int, None] = {}

    def __contains__(self, page: int) -> bool:
        return page in self._keys

    @property
    def num_idle(self) -> int:
        """Known pages that nobody holds."""
        return len(self._idle)

    def find(self, predecessor: int, token_ids: tuple[int, ...], next_token_id: int, *, with_mtp: bool) -> int | None:
        """Returns the page of these tokens; None where there is none.

        predecessor, token_ids, next_token_id: see `PageKey`.
        with_mtp: whether the page must have MTP rows.
        """
        with_rows = PageKey(predecessor, token_ids, next_token_id)
        if with_mtp:
            return self._pages.get(with_rows)
        page = self._pages.get(PageKey(predecessor, token_ids, None))
        return self._pages.get(with_rows) if page is None else page

    def longest_prefix(self, token_ids: Seq[int], page_size: int, max_tokens: int, *, with_mtp: bool) -> list[int]:
        """Returns the pages of the first tokens of a sequence, as many as are known, see `PagePool.cached_prefix`."""
        pages: list[int] = []
        for end in range(page_size, max_tokens + 1, page_size):
            tokens = tuple(token_ids[end - page_size : end])
            page = self.find(pages[-1] if pages else NO_PAGE, tokens, token_ids[end], with_mtp=with_mtp)
            if page is None:
                break
            pages.append(page)
        return pages

    def insert(self, key: PageKey, page: int) -> None:
        """Makes a page known, which somebody holds."""
        assert key not in self._pages, f"{key} is cached already"
        assert page not in self._keys, f"page {page} is cached already"
        self._pages[key], self._keys[page] = page, key

    def set_idle(self, page: int) -> None:
        """Notes that nobody holds a known page any more."""
        self._idle[page] = None

    def set_held(self, page: int) -> None:
        """Notes that somebody holds a known page."""
        self._idle.pop(page, None)

    def evict(self) -> int:
        """Forgets the page that has been idle longest, and returns it."""
        page = next(iter(self._idle))
        del self._idle[page], self._pages[self._keys.pop(page)]
        return page

    def check_integrity(self, num_holders: Seq[int]) -> None:
        """Raises AssertionError unless keys, pages and holders agree. num_holders: of every page of the pool."""
        assert self._pages == {key: page for page, key in self._keys.items()}, "keys and pages differ"
        idle = {page for page in self._keys if num_holders[page] == 0}
        assert idle == set(self._idle), "a held page could be evicted, or an idle one could not"
        age = {page: i for i, page in enumerate(self._idle)}
        for page, (predecessor, _, _) in self._keys.items():
            if predecessor != NO_PAGE:
                assert predecessor in self._keys, f"the page before {page} is forgotten"
                assert num_holders[page] <= num_holders[predecessor], f"{page} is held without the page before it"
                assert page not in age or age.get(predecessor, len(age)) > age[page], f"{page} would outlive its key"

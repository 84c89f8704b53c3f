"""Ownership of the KV cache's pages: free list, reference counts, and the prefix cache.

The host alone decides which page belongs to whom; the device is told through page tables. Page 0 is never handed out:
it stays zero, so that masked reads find finite values there.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

PageKey = bytes
"""Names a full page by its content and all that precedes it: a link of a hash chain."""


def root_key(salt: str) -> PageKey:
    """The start of a chain; sequences with different salts never share pages, whatever a client chose as one."""
    return hashlib.blake2b(salt.encode(), digest_size=16, person=b"salt").digest()


def next_key(parent: PageKey, token_ids: Sequence[int]) -> PageKey:
    """The key of the page that holds `token_ids` (one page of them) after the page named `parent`."""
    return hashlib.blake2b(parent + array("I", token_ids).tobytes(), digest_size=16).digest()


class PageAllocator:
    """Hands out pages 1..num_pages-1.

    A page is in exactly one of three states: free, held (reference count of one or more), or cached (count zero,
    content kept for a later hit, evicted least recently used first). A double release raises.
    """

    def __init__(self, num_pages: int):
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, 0, -1))
        self._references = [0] * num_pages
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._page_of: dict[PageKey, int] = {}
        self._key_of: dict[int, PageKey] = {}

    @property
    def available(self) -> int:
        """Pages that `allocate` can hand out: free and cached."""
        return len(self._free) + len(self._cached)

    @property
    def cached(self) -> int:
        """Pages held by no one whose content may still be hit."""
        return len(self._cached)

    @property
    def held(self) -> set[int]:
        """Pages that someone holds."""
        return {page for page in range(1, self.num_pages) if self._references[page] > 0}

    def allocate(self, count: int) -> list[int] | None:
        """Takes `count` pages with a reference each, evicting cached ones as needed; None, and no change, if there are
        too few."""
        if count > self.available:
            return None
        pages = []
        for _ in range(count):
            if self._free:
                page = self._free.pop()
            else:
                page, _ = self._cached.popitem(last=False)
                del self._page_of[self._key_of.pop(page)]
            self._references[page] = 1
            pages.append(page)
        return pages

    def release(self, pages: Iterable[int]) -> None:
        """Gives back one reference of each page. A page that no one holds is cached if it has a key, free otherwise.

        Deeper pages of a chain are cached as the older ones, so that they are evicted before what they hang on.
        """
        for page in reversed(list(pages)):
            count = self._references[page]
            assert count > 0, f"page {page} released more often than taken"
            self._references[page] = count - 1
            if count == 1:
                if page in self._key_of:
                    self._cached[page] = None
                else:
                    self._free.append(page)

    def take_prefix(self, keys: Iterable[PageKey]) -> list[int]:
        """Takes a reference of each page of the longest cached run of `keys`, in order."""
        pages = []
        for key in keys:
            page = self._page_of.get(key)
            if page is None:
                break
            if self._references[page] == 0:
                del self._cached[page]
            self._references[page] += 1
            pages.append(page)
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """Takes one more reference of pages that someone holds."""
        for page in pages:
            assert self._references[page] > 0, f"page {page} shared while no one holds it"
            self._references[page] += 1

    def register(self, page: int, key: PageKey) -> None:
        """Makes a held, completely written page findable. The first page of a key stays the one that is found."""
        assert self._references[page] > 0, f"page {page} registered while no one holds it"
        if key not in self._page_of:
            self._page_of[key] = page
            self._key_of[page] = key

    def forget_prefixes(self) -> None:
        """Drops every key; cached pages become free. For a cache whose content was lost."""
        self._free.extend(self._cached)
        self._cached.clear()
        self._page_of.clear()
        self._key_of.clear()

    def check(self) -> None:
        """Asserts that every page is in exactly one state and that the keys agree with each other."""
        free, cached, held = set(self._free), set(self._cached), self.held
        assert len(free) == len(self._free), "a page is free twice"
        assert not (free & cached or free & held or cached & held), "a page is in two states"
        assert len(free) + len(cached) + len(held) == self.num_pages - 1, "a page is lost"
        assert all(page in self._key_of for page in cached), "a cached page has no key"
        assert {key: page for page, key in self._key_of.items()} == self._page_of, "keys disagree"

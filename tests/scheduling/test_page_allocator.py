"""Pages are owned once, counted exactly, and found again by content."""

from array import array

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from jaxserve.scheduling.page_allocator import PageAllocator, next_key, root_key


def chain(salt: str, *pages: list[int]) -> list[bytes]:
    keys = [root_key(salt)]
    for page in pages:
        keys.append(next_key(keys[-1], page))
    return keys[1:]


def test_page_zero_is_never_handed_out():
    allocator = PageAllocator(5)
    assert sorted(allocator.allocate(4) or []) == [1, 2, 3, 4]


def test_allocating_too_many_changes_nothing():
    allocator = PageAllocator(5)
    assert allocator.allocate(5) is None
    assert allocator.available == 4


def test_released_registered_page_is_hit_and_held_again():
    allocator = PageAllocator(4)
    (page,) = allocator.allocate(1) or []
    (key,) = chain("", [1, 2])
    allocator.register(page, key)
    allocator.release([page])
    assert allocator.cached == 1
    assert allocator.take_prefix([key]) == [page]
    assert allocator.cached == 0
    allocator.release([page])
    assert allocator.available == 3


def test_least_recently_used_chain_is_evicted_from_its_end():
    allocator = PageAllocator(4)
    pages = allocator.allocate(3) or []
    keys = chain("", [1], [2], [3])
    for page, key in zip(pages, keys, strict=True):
        allocator.register(page, key)
    allocator.release(pages)
    assert allocator.allocate(1) == [pages[2]]
    assert allocator.take_prefix(keys) == pages[:2]


def test_salts_and_parents_separate_equal_pages():
    assert chain("a", [1]) != chain("b", [1])
    assert chain("", [1], [2])[1] != chain("", [3], [2])[1]


def test_no_salt_is_made_to_pass_for_a_page():
    """Who began a chain of another's with a page of their own would have the other read what that page holds."""
    parent, page = b"sixteen letters.", [65, 66]
    salt = (parent + array("I", page).tobytes()).decode()
    assert root_key(salt) != next_key(parent, page)


def test_double_release_is_an_error():
    allocator = PageAllocator(3)
    pages = allocator.allocate(1) or []
    allocator.release(pages)
    with pytest.raises(AssertionError, match="released more often"):
        allocator.release(pages)


class AllocatorMachine(RuleBasedStateMachine):
    """Random use by several owners; the count of available and held pages always adds up."""

    owned = Bundle("owned")

    @initialize(num_pages=st.integers(2, 24))
    def start(self, num_pages: int) -> None:
        self.allocator = PageAllocator(num_pages)
        self.references: dict[int, int] = {}

    @rule(target=owned, count=st.integers(0, 8), content=st.integers(0, 3), registers=st.booleans())
    def take(self, count: int, content: int, registers: bool) -> list[int]:
        keys = chain("", *([content, index] for index in range(count)))
        pages = self.allocator.take_prefix(keys)
        fresh = self.allocator.allocate(count - len(pages))
        if fresh is None:
            self.allocator.release(pages)
            return []
        assert not set(fresh) & set(self.references), "a page in use was handed out"
        pages += fresh
        for page, key in zip(pages, keys, strict=True):
            self.references[page] = self.references.get(page, 0) + 1
            if registers:
                self.allocator.register(page, key)
        return pages

    @rule(pages=consumes(owned))
    def give_back(self, pages: list[int]) -> None:
        self.allocator.release(pages)
        for page in pages:
            self.references[page] -= 1
            if not self.references[page]:
                del self.references[page]

    @invariant()
    def adds_up(self) -> None:
        if hasattr(self, "allocator"):
            self.allocator.check()
            assert self.allocator.held == set(self.references)
            assert self.allocator.available + len(self.references) == self.allocator.num_pages - 1


TestAllocatorMachine = AllocatorMachine.TestCase
TestAllocatorMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)

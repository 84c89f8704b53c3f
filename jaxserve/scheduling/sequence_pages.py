"""The pages of sequences: who holds which, what is copied to host memory and back, and what others may find.

A page that a step in flight may still write to is fenced: it goes back to the allocator when that step has retired.
"""

from collections import deque
from collections.abc import Iterable

from jaxserve.scheduling.page_allocator import PageAllocator, PageKey, next_key, root_key
from jaxserve.scheduling.sequence import SavedPages, Sequence, StepPlan


class SequencePages:
    """Gives sequences their pages and takes them back; collects what the device must be told of it.

    Args:
        allocator: owner of the pages.
        page_size: tokens in a page.
        prefix_cache: whether equal prefixes share pages.
        host_pages: pages of preempted sequences that host memory has room for.
    """

    def __init__(self, allocator: PageAllocator, page_size: int, prefix_cache: bool, host_pages: int):
        self.saved = 0
        """Pages in host memory."""
        self.restored = 0
        """Pages copied back from there so far."""
        self._allocator = allocator
        self._page_size = page_size
        self._prefix_cache = prefix_cache
        self._host_pages = host_pages
        self._fences: deque[tuple[int, list[int]]] = deque()
        """Pages to release once the step of this number has retired."""
        self._retired = 0
        """The latest step that has."""
        self._ending = 0
        """The latest step with the last token of a sequence, whose pages come back when it retires."""
        self._grown: list[tuple[int, Sequence]] = []
        self._saves: list[tuple[SavedPages, list[int]]] = []
        self._restores: list[tuple[SavedPages, int, list[int]]] = []

    @property
    def do_any_return(self) -> bool:
        """Whether pages come back when a step in flight retires."""
        return bool(self._fences) or self._ending > self._retired

    def expect_ends(self, step: int) -> None:
        """Sequences end with this step, and give their pages back when it retires."""
        self._ending = step

    def count(self, length: int) -> int:
        """Pages that hold this many tokens."""
        return -(-length // self._page_size)

    def take(self, sequence: Sequence, spare: int) -> bool:
        """Pages for all known tokens and the next one; False, and no change, unless `spare` are left after it. What the
        prefix cache has is shared, and the rest restored from host memory where it was saved."""
        allocator = self._allocator
        # The last token is always computed: its logits are wanted.
        reusable = (len(sequence.token_ids) - 1) // self._page_size
        written = self._share_written(sequence, reusable)
        needed = self.count(len(sequence.token_ids) + 1) - len(written)
        fresh = allocator.allocate(needed) if needed + spare <= allocator.available else None
        if fresh is None:
            allocator.release(written)
            return False
        sequence.pages = written + fresh
        sequence.capacity = len(sequence.pages) * self._page_size
        sequence.registered = len(written)
        sequence.computed = len(written) * self._page_size
        saved = sequence.saved
        if saved is not None and saved.tokens > sequence.computed:
            self._restores.append((saved, len(written), sequence.pages[len(written) : saved.pages]))
            self.restored += saved.pages - len(written)
            sequence.computed = saved.tokens
        self.forget_saved(sequence)
        return True

    def _share_written(self, sequence: Sequence, most: int) -> list[int]:
        """References of pages that hold the sequence's first tokens already: of the prefix cache, or of its prompt.
        None while log-probabilities of its prompt are wanted: a token that is not computed has none."""
        if sequence.wants_prompt_logprobs:
            return []
        allocator = self._allocator
        cached = allocator.take_prefix(self._extend_keys(sequence, most)[:most]) if self._prefix_cache else []
        shared = sequence.shared_prompt.pages[:most] if sequence.shared_prompt is not None else []
        if len(shared) <= len(cached):
            return cached
        allocator.release(cached)
        allocator.share(shared)
        return shared

    def grow(self, sequence: Sequence) -> bool:
        """Gives it one more page; False, and no change, if there is none."""
        page = self._allocator.allocate(1)
        if page is None:
            return False
        sequence.pages += page
        sequence.capacity += self._page_size
        self._grown.append((sequence.slot, sequence))
        return True

    def release(self, sequence: Sequence) -> None:
        """Frees its pages now, or when the last step that may write to them has retired."""
        if sequence.in_flight:
            self._fences.append((sequence.last_step, sequence.pages))
        else:
            self._allocator.release(sequence.pages)
        sequence.pages = []
        sequence.capacity = 0
        sequence.quiet_until = 0

    def let_go_of_prompts(self, sequences: Iterable[Sequence]) -> bool:
        """Gives up the pages kept for further sequences of a prompt, which wait; whether there were any."""
        prompts = [sequence.shared_prompt for sequence in sequences if sequence.shared_prompt is not None]
        kept = any(prompt.pages for prompt in prompts)
        for prompt in prompts:
            prompt.let_go(self._allocator)
        return kept

    def lift_fences(self, step: int) -> None:
        """Frees what only steps up to this one could write to, now that it has retired."""
        self._retired = step
        while self._fences and self._fences[0][0] <= step:
            self._allocator.release(self._fences.popleft()[1])

    def save(self, sequence: Sequence) -> None:
        """Has its pages copied to host memory, if there is room for them. The steps in flight still write to them; the
        copy comes behind those steps, and before the next one, which may belong to another owner."""
        count = self.count(sequence.computed)
        if count and self.saved + count <= self._host_pages:
            sequence.saved = SavedPages(sequence.computed, count)
            self.saved += count
            self._saves.append((sequence.saved, sequence.pages[:count]))

    def forget_saved(self, sequence: Sequence) -> None:
        """Drops its pages in host memory, if it has any."""
        if sequence.saved is not None:
            self.saved -= sequence.saved.pages
            sequence.saved = None

    def register(self, sequence: Sequence, end: int) -> None:
        """Lets others find its pages filled by tokens before `end`, now that finite logits came from them."""
        if self._prefix_cache and sequence.pages:
            for index in range(sequence.registered, end // self._page_size):
                self._allocator.register(sequence.pages[index], self._extend_keys(sequence, index + 1)[index])
            sequence.registered = end // self._page_size

    def quiet_until(self, sequence: Sequence) -> int:
        """Tokens up to which no page of it fills up that others may find, and its length is not reached."""
        length = sequence.max_length - 1
        return min(length, (sequence.registered + 1) * self._page_size) if self._prefix_cache else length

    def _extend_keys(self, sequence: Sequence, count: int) -> list[PageKey]:
        """The sequence's chain, made at least `count` pages long from its known tokens."""
        keys, page_size = sequence.keys, self._page_size
        while len(keys) < count:
            start = len(keys) * page_size
            parent = keys[-1] if keys else root_key(sequence.submit.cache_salt)
            keys.append(next_key(parent, sequence.token_ids[start : start + page_size]))
        return keys

    def hand_over(self, plan: StepPlan) -> None:
        """Puts into a step's plan what the device must do before it: pages given, saved and restored since the last."""
        plan.grown, self._grown = self._grown, []
        plan.saves, self._saves = self._saves, []
        plan.restores, self._restores = self._restores, []

    def lose_content(self) -> None:
        """The device lost its cache, and the steps in flight with it. Every sequence has released its pages."""
        while self._fences:
            self._allocator.release(self._fences.popleft()[1])
        self._grown, self._saves, self._restores = [], [], []
        self._ending = 0
        self._allocator.forget_prefixes()

    def check(self, sequences: Iterable[Sequence]) -> None:
        """Asserts that the pages of all active sequences are exactly those that are held."""
        self._allocator.check()
        sequences = list(sequences)
        owned = {page for sequence in sequences for page in sequence.pages}
        owned.update(page for _, pages in self._fences for page in pages)
        owned.update(page for s in sequences if s.shared_prompt is not None for page in s.shared_prompt.pages)
        assert owned == self._allocator.held, "a page is held by no one, or used without being held"
        saved = sum(sequence.saved.pages for sequence in sequences if sequence.saved is not None)
        assert self.saved == saved <= self._host_pages, "pages in host memory are miscounted"

"""The prompt that several sequences of one request share: computed by the first, its full pages read by all."""

from jaxserve.scheduling.page_allocator import PageAllocator
from jaxserve.scheduling.sequence import Sequence


class SharedPrompt:
    """The sequences after the first of a request, and the pages that they are to take.

    They are held back from the queue until the prompt is computed. From then on a reference of each full page is kept
    for them, until the last has taken its own or the scheduler needs the room. The tokens after the last full page,
    a page of them at most, are computed by each.
    """

    def __init__(self, first: Sequence, forks: list[Sequence]):
        self.first = first
        self.pages: list[int] = []
        """Full pages of the prompt, held."""
        self.is_computed = False
        self._untaken = set(forks)
        """Sequences without a slot so far."""

    def compute(self, pages: list[int], allocator: PageAllocator) -> list[Sequence]:
        """The first has written these full pages of the prompt, or has ended; returns those to queue now."""
        self.is_computed = True
        if self._untaken:
            allocator.share(pages)
            self.pages = pages
        return list(self._untaken)

    def take(self, sequence: Sequence, allocator: PageAllocator) -> None:
        """The sequence has its own references, or has ended; the last one's going lets go of the pages."""
        self._untaken.discard(sequence)
        if not self._untaken:
            self.let_go(allocator)

    def let_go(self, allocator: PageAllocator) -> None:
        """Gives the pages up. Who has not taken them computes the prompt anew, or finds it in the prefix cache."""
        allocator.release(self.pages)
        self.pages = []


def share_prompt(sequences: list[Sequence], page_size: int) -> list[Sequence]:
    """Makes the sequences of one request share its prompt, if that fills a page. Gives those to queue now."""
    if len(sequences) < 2 or sequences[0].prompt_length <= page_size:
        return sequences
    first, *forks = sequences
    prompt = SharedPrompt(first, forks)
    for sequence in sequences:
        sequence.shared_prompt = prompt
    return [first]

"""What the scheduler knows of a request, and what it tells the device and hears from it: one plan and one set of
results a step."""

from dataclasses import InitVar, dataclass, field
from typing import TYPE_CHECKING, Any

from jaxserve.core.messages import SequenceOutput, Submit, TokenLogprobs
from jaxserve.scheduling.page_allocator import PageKey

if TYPE_CHECKING:
    from jaxserve.scheduling.shared_prompt import SharedPrompt

EMITTED, STOPPED, FAILED, COMPLETED = 1, 2, 4, 8
"""Flags of a row that sampled: it gave a token; that token is one of its stop ids; its logits were not finite; nothing
may follow the token (which the host finds out, not the device)."""

PRIORITY_LEAD = 4096
"""Arrivals by which one level of priority brings a sequence forward. More than most engines hold at once, so that a
higher priority goes first; and bounded, so that a flood of it does not keep a lower one waiting for ever."""


@dataclass(slots=True)
class SavedPages:
    """Pages of a sequence that gave way, in host memory."""

    tokens: int
    """Tokens whose keys and values they hold, from the first on."""
    pages: int
    data: Any = None
    """The runner's own, from the dispatch of the step that saves them."""


@dataclass(slots=True, eq=False)
class Sequence:
    """The scheduler's record of one sequence; a request has one or several."""

    submit: Submit
    arrival: InitVar[int]
    handle: int = field(init=False)
    max_length: int = field(init=False)
    order: tuple[int, int] = field(init=False)
    """Smaller goes first, and gives way last."""
    token_ids: list[int] = field(init=False)
    """Prompt and verified output."""
    prompt_length: int = field(init=False)
    prefill_end: int = field(init=False)
    """Tokens to compute before it decodes: its prompt, or all that it had when it was preempted."""
    prefill_start: int = 0
    """Tokens that the prefix cache had when it took its slot."""
    computed: int = 0
    """Tokens whose keys and values are written by the steps dispatched so far."""
    slot: int = -1
    pages: list[int] = field(default_factory=list)
    capacity: int = 0
    """Tokens that its pages hold."""
    keys: list[PageKey] = field(default_factory=list)
    """Chain of keys of its full pages, as far as it is known."""
    registered: int = 0
    """Pages of it that others may find."""
    cached: int | None = None
    """Tokens found in the prefix cache when it first took a slot."""
    saved: SavedPages | None = None
    """Its pages in host memory, after it gave way."""
    in_flight: int = 0
    """Steps dispatched with it and not yet retired."""
    last_step: int = 0
    """The last step dispatched with it."""
    quiet_until: int = 0
    """Tokens up to which one more is only appended: until then no page fills up, nothing ends, nothing begins."""
    scored: int = 0
    """Prompt tokens after the first whose log-probabilities were given, where they are asked for."""
    shared_prompt: "SharedPrompt | None" = None
    """Where several sequences have this prompt."""
    first_scheduled: float = 0.0
    first_token: float = 0.0
    held: bool = False
    """Its grammar is being compiled; it waits, and not in the queue."""
    done: bool = False

    def __post_init__(self, arrival: int) -> None:
        submit = self.submit
        self.handle = submit.handle
        self.max_length = submit.max_length
        self.order = (arrival - PRIORITY_LEAD * submit.priority, arrival)
        self.token_ids = list(submit.token_ids)
        self.prompt_length = self.prefill_end = len(submit.token_ids)

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether log-probabilities of its prompt are still to be given."""
        return self.submit.prompt_logprobs >= 0 and self.scored < self.prompt_length - 1


@dataclass(slots=True)
class Piece:
    """Consecutive prompt tokens of one sequence that ride in a step."""

    row: int
    start: int
    """Position of the first of them."""
    token_ids: list[int]
    targets: list[int]
    """The prompt tokens that follow each of them, where the request asks for their log-probabilities."""


@dataclass(slots=True)
class StepPlan:
    """One step: a row for each sequence that takes part, and prompt tokens beside them."""

    step: int
    sequences: list[Sequence] = field(default_factory=list)
    """Owner of each row."""
    slots: list[int] = field(default_factory=list)
    """Slot of each row."""
    decodes: list[bool] = field(default_factory=list)
    """Whether the row decodes its sequence's last token."""
    sample_index: list[int] = field(default_factory=list)
    """Where the row's prompt ends in this step: index of its last token in the chunk; -1 elsewhere."""
    ends: list[int] = field(default_factory=list)
    """Tokens of the row's sequence that are computed once this step is done."""
    pieces: list[Piece] = field(default_factory=list)
    chunk_tokens: int = 0
    taken_slots: list[int] = field(default_factory=list)
    """Slots whose owner takes part for the first time."""
    new_owners: list[tuple[int, Sequence]] = field(default_factory=list)
    """Slots that changed hands since the last step: what belongs to their new owners must reach the device."""

    saves: list[tuple[SavedPages, list[int]]] = field(default_factory=list)
    """Pages to copy to host memory before the step, and before any are restored."""
    grown: list[tuple[int, Sequence]] = field(default_factory=list)
    """Slots whose owners were given pages since the last step. The owner may have changed since: then it is among
    `new_owners`."""
    restores: list[tuple[SavedPages, int, list[int]]] = field(default_factory=list)
    """Saved pages, from the given index on, to copy to these pages before the step."""

    def fill_columns(self) -> None:
        """Fills what follows from the rows' sequences and the pieces. A pass for each column is the cheapest way."""
        rows = len(self.sequences)
        self.slots = [sequence.slot for sequence in self.sequences]
        self.ends = [sequence.computed for sequence in self.sequences]
        self.decodes = [True] * rows
        self.sample_index = [-1] * rows
        for piece in self.pieces:
            self.chunk_tokens += len(piece.token_ids)
            self.decodes[piece.row] = False
            if self.ends[piece.row] == self.sequences[piece.row].prefill_end:
                self.sample_index[piece.row] = self.chunk_tokens - 1

    def take_prompt_scores(self, results: "StepResults") -> list[SequenceOutput]:
        """The scores of prompt tokens that are new: a sequence that gave way may compute some of them again."""
        outputs = []
        for piece in self.pieces if results.prompt_logprobs else ():
            sequence = self.sequences[piece.row]
            scores = results.prompt_logprobs.get(piece.row, [])[sequence.scored - piece.start :]
            if scores and not sequence.done:
                sequence.scored += len(scores)
                outputs.append(SequenceOutput(sequence.handle, [], None, prompt_logprobs=scores))
        return outputs


@dataclass(frozen=True, slots=True)
class StepResults:
    """What a step gave, by row."""

    tokens: list[int]
    """The token of each row that sampled; anything elsewhere."""
    flags: list[int]
    """EMITTED, STOPPED, FAILED; 0 for a row that did not sample or had ended on the device."""
    logprobs: list[TokenLogprobs] | None
    """Where any row asked."""
    prompt_logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)
    """Of the targets of the row's piece, where it has any."""


@dataclass(frozen=True, slots=True)
class Retired:
    """What a retired step means for its sequences; the fields are those of `StepOutput`."""

    handles: list[int]
    tokens: list[int]
    outputs: list[SequenceOutput]

"""A device for the scheduler's tests: tokens are scripted, and what the real step does with ended rows is done too."""

import hashlib
from collections import deque

from jaxserve.core.messages import SequenceOutput, Submit
from jaxserve.device.batch import Packer
from jaxserve.scheduling.scheduler import Scheduler
from jaxserve.scheduling.sequence import EMITTED, FAILED, STOPPED, StepPlan, StepResults


def submit(handle: int, prompt: int = 5, output: int = 8, **fields) -> Submit:
    """A greedy request of `prompt` distinct tokens that ends after `output`."""
    values = dict(
        handle=handle,
        token_ids=[handle % 7 * 1000 + index for index in range(prompt)],
        max_length=prompt + output,
        min_length=0,
        stop_ids=[],
        temperature=0.0,
        top_p=1.0,
        top_k=0,
        min_p=0.0,
        presence_penalty=0.0,
        frequency_penalty=0.0,
        repetition_penalty=1.0,
        seed=0,
        logit_bias={},
        logprobs=-1,
        priority=0,
        cache_salt="",
        arrival=0.0,
        deadline=None,
    )
    return Submit(**{**values, **fields})


def scripted_token(handle: int, position: int) -> int:
    """The token that the device gives at a position of a request."""
    return int.from_bytes(hashlib.blake2b(f"{handle}/{position}".encode(), digest_size=2).digest(), "little")


class ScriptedDevice:
    """Runs plans `depth` steps behind, checking that each row's tokens are in pages of its own.

    Attributes:
        stops: positions at which a request's token is a stop id, by handle.
        failures: positions at which a request's logits are not finite, by handle.
    """

    def __init__(self, scheduler: Scheduler, depth: int = 1):
        self.scheduler = scheduler
        self.depth = depth
        self.stops: dict[int, int] = {}
        self.failures: dict[int, int] = {}
        self.written: dict[tuple[int, int], int] = {}
        """Token in each (page, offset), as the device last wrote it."""
        self.packer = Packer(scheduler.slots.count, scheduler.allocator.num_pages)
        self.pending: deque[tuple[StepPlan, list[int], list[int]]] = deque()
        self.writing: deque[dict[int, object]] = deque()
        """Of each of those steps, the pages that it writes to, and for which sequence."""
        self.ended: dict[int, bool] = {}
        self.outputs: dict[int, list[SequenceOutput]] = {}
        self.now = 0.0

    def step(self) -> StepPlan | None:
        """One turn of the loop: plan, dispatch, and retire what is `depth` behind."""
        self.now += 1.0
        self.scheduler.expire(self.now)
        plan = self.scheduler.plan(self.now)
        if plan is not None:
            self.pending.append(self._run(plan))
        if self.pending and (plan is None or len(self.pending) > self.depth):
            done, tokens, flags = self.pending.popleft()
            self.writing.popleft()
            retired = self.scheduler.retire(done, StepResults(tokens, flags, None), self.now)
            plain = zip(retired.handles, retired.tokens, strict=True)
            self._deliver([SequenceOutput(handle, [token], None) for handle, token in plain])
            self._deliver(retired.outputs)
        self._deliver(self.scheduler.take_ended())
        self.scheduler.check()
        return plan

    def fail(self) -> None:
        """Loses the device's state and the steps in flight, as a failed step does."""
        self.pending.clear()
        self.writing.clear()
        self.written.clear()
        self.scheduler.restart()
        self.scheduler.check()

    def run(self, steps: int = 10_000) -> int:
        """Steps until nothing is active; returns how many it took."""
        for count in range(steps):
            if self.scheduler.is_idle and not self.pending:
                self._deliver(self.scheduler.take_ended())
                return count
            self.step()
        raise AssertionError(f"still active after {steps} steps")

    def _deliver(self, outputs: list[SequenceOutput]) -> None:
        for output in outputs:
            self.outputs.setdefault(output.handle, []).append(output)

    def tokens(self, handle: int) -> list[int]:
        """All tokens that a request was given."""
        return [token for output in self.outputs.get(handle, []) for token in output.token_ids]

    def reason(self, handle: int) -> str | None:
        """How a request ended; None if it did not. Asserts that it ended at most once, and last."""
        reasons = [output.finish_reason for output in self.outputs.get(handle, [])]
        assert all(reason is None for reason in reasons[:-1]), "an output after the terminal one"
        return reasons[-1] if reasons else None

    def _run(self, plan: StepPlan) -> tuple[StepPlan, list[int], list[int]]:
        page_size = self.scheduler.page_size
        self._copy_pages(plan)
        self._check_upload(plan)
        self._check_fences(plan)
        writing: dict[int, object] = {}
        self.writing.append(writing)
        for piece in plan.pieces:
            sequence = plan.sequences[piece.row]
            for offset, token in enumerate(piece.token_ids):
                position = piece.start + offset
                page = sequence.pages[position // page_size]
                self.written[page, position % page_size] = token
                writing[page] = sequence
        tokens, flags = [], []
        for row, sequence in enumerate(plan.sequences):
            handle, length = sequence.submit.handle, plan.ends[row]
            samples = plan.sample_index[row] >= 0 or (plan.decodes[row] and not self.ended[id(sequence)])
            if plan.decodes[row] and samples:
                position = length - 1
                page = sequence.pages[position // page_size]
                self.written[page, position % page_size] = scripted_token(handle, position)
                writing[page] = sequence
            if samples:
                self._check_context(sequence, length)
            stopped, failed = self.stops.get(handle) == length, self.failures.get(handle) == length
            tokens.append(scripted_token(handle, length))
            flags.append((EMITTED | STOPPED * stopped | FAILED * failed) if samples else 0)
            if samples:
                self.ended[id(sequence)] = stopped or failed or length + 1 >= sequence.submit.max_length
        return plan, tokens, flags

    def _check_upload(self, plan: StepPlan) -> None:
        """What the real device would be told of each row: its pages, and nothing after them."""
        chunk = self.scheduler.prefill_chunks[-1]
        max_pages = self.scheduler.allocator.num_pages
        packed = self.packer.pack(plan, self.scheduler.slots.count, chunk)
        table = packed[: -3 * chunk].reshape(self.scheduler.slots.count, -1)
        for row, sequence in enumerate(plan.sequences):
            told = table[row, -max_pages:].tolist()
            assert told == sequence.pages + [0] * (max_pages - len(sequence.pages)), "the device has another page table"
        assert not table[len(plan.sequences) :, -max_pages:].any()

    def _check_fences(self, plan: StepPlan) -> None:
        """What a step in flight writes to belongs to nobody else before it has retired."""
        for writing in self.writing:
            for sequence in plan.sequences:
                others = [page for page in writing.keys() & set(sequence.pages) if writing[page] is not sequence]
                assert not others, f"a step in flight writes to pages {others} for another sequence"

    def _copy_pages(self, plan: StepPlan) -> None:
        offsets = range(self.scheduler.page_size)
        for saved, pages in plan.saves:
            saved.data = [[self.written.get((page, offset)) for offset in offsets] for page in pages]
            assert len(pages) == saved.pages
        for saved, first, pages in plan.restores:
            for page, tokens in zip(pages, saved.data[first:], strict=True):
                self.written.update({(page, offset): tokens[offset] for offset in offsets})

    def _check_context(self, sequence, length: int) -> None:
        """What attention would read is what this sequence's tokens are."""
        prompt = sequence.submit.token_ids
        page_size = self.scheduler.page_size
        for position in range(length):
            want = prompt[position] if position < len(prompt) else scripted_token(sequence.submit.handle, position)
            got = self.written.get((sequence.pages[position // page_size], position % page_size))
            assert got == want, f"position {position} of {sequence.submit.handle} holds another token"

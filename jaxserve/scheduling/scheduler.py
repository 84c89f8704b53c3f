"""Policy: which sequences take part in the next step, and what a retired step means for them.

`plan()` is called for step N+1 before step N is read, so a sequence's end by a stop id is seen one step late; the row
is masked on the device meanwhile. Everything else (lengths, pages, prompts) is known ahead. No device is known here.
"""

import heapq
from dataclasses import replace
from operator import attrgetter

from jaxserve.core.messages import Gauges, SequenceOutput, Submit, TokenLogprobs
from jaxserve.events import FinishReason
from jaxserve.scheduling.page_allocator import PageAllocator
from jaxserve.scheduling.sequence import (
    COMPLETED,
    EMITTED,
    FAILED,
    STOPPED,
    Piece,
    Retired,
    Sequence,
    StepPlan,
    StepResults,
)
from jaxserve.scheduling.sequence_pages import SequencePages
from jaxserve.scheduling.shared_prompt import SharedPrompt
from jaxserve.scheduling.waiting_queue import WaitingQueue

_order = attrgetter("order")


class Scheduler:
    """Waiting and running sequences.

    Order is by priority, then arrival. The head of the queue is never overtaken, so a giant request starts as soon as
    the sequences before it have left room. Under page pressure the last in order gives way: its pages move to host
    memory and come back when there is room. Where host memory is full it is recomputed from its tokens, which is as
    exact and dearer on every platform: a token's keys and values are some KiB, computing them two FLOPs a weight. A
    sequence whose last token is on its way gives its slot back at once, its pages when the step retires.

    Args:
        slots: sequences that run together.
        num_pages: pages of the cache, the reserved page 0 included.
        page_size: tokens in a page.
        prefill_chunks: prompt tokens in a mixed step, ascending. A larger chunk is used while as many sequences wait
            for their prompt as decode.
        prefix_cache: whether equal prefixes share pages.
        host_pages: pages of preempted sequences that host memory has room for.
    """

    def __init__(
        self,
        *,
        slots: int,
        num_pages: int,
        page_size: int,
        prefill_chunks: tuple[int, ...],
        prefix_cache: bool = True,
        host_pages: int = 0,
    ):
        self.slots = slots
        self.page_size = page_size
        self.prefill_chunks = prefill_chunks
        self.allocator = PageAllocator(num_pages)
        self.running: list[Sequence] = []
        """Holders of a slot, in order of admission."""
        self.preemptions = 0
        self.prefix_queries = 0
        self.prefix_hits = 0
        self.overrun_tokens = 0
        self._pages = SequencePages(self.allocator, page_size, prefix_cache, host_pages)
        self._waiting = WaitingQueue()
        self._active: dict[int, Sequence] = {}
        self._free_slots = list(range(slots))
        self._new_owners: list[tuple[int, Sequence]] = []
        self._ended: list[SequenceOutput] = []
        self._deadlines: list[tuple[float, int]] = []
        self._arrivals = 0
        self._held: dict[int, list[Sequence]] = {}
        self._step = 0

    def submit(self, submit: Submit, *, held: bool = False) -> None:
        """Queues a request, each sequence of which must fit into all pages; `held`: not before `release`. Its handles
        must not be active."""
        assert submit.handle not in self._active, f"handle {submit.handle} is active"
        assert self._pages.count(submit.max_length) < self.allocator.num_pages, "request exceeds all pages"
        sequences = [self._add(submit)] + [
            self._add(replace(submit, handle=handle, seed=seed, fork_seeds=[], prompt_logprobs=-1))
            for handle, seed in enumerate(submit.fork_seeds, submit.handle + 1)
        ]
        if held:
            self._held[submit.handle] = sequences
            for sequence in sequences:
                sequence.held = True
        else:
            self._start(sequences)

    def release(self, handle: int) -> list[Submit]:
        """Queues a request that was held. Gives its sequences, one command for each, without those that have ended."""
        sequences = [sequence for sequence in self._held.pop(handle) if not sequence.done]
        for sequence in sequences:
            sequence.held = False
        if sequences:
            self._start(sequences)
        return [sequence.submit for sequence in sequences]

    def _start(self, sequences: list[Sequence]) -> None:
        first, *forks = sequences
        self._waiting.add(first)
        if forks and first.prompt_length > self.page_size:
            first.shared_prompt = SharedPrompt(first, forks)
            for fork in forks:
                fork.shared_prompt = first.shared_prompt
        else:
            self._waiting.add(*forks)

    def _add(self, submit: Submit) -> Sequence:
        sequence = Sequence(submit, self._arrivals)
        self._arrivals += 1
        self._active[submit.handle] = sequence
        if submit.deadline is not None:
            heapq.heappush(self._deadlines, (submit.deadline, submit.handle))
        return sequence

    def abort(
        self, handle: int, now: float, reason: FinishReason = FinishReason.ABORT, error: str | None = None
    ) -> None:
        """Ends an active request wherever it is; its terminal output is in the next `take_ended`."""
        sequence = self._active.get(handle)
        if sequence is not None:
            self._ended.append(self._finish(sequence, reason, now, error=error))

    def abort_all(self, now: float) -> None:
        """Ends every active request."""
        for handle in list(self._active):
            self.abort(handle, now)

    def expire(self, now: float) -> None:
        """Ends the requests whose deadline has passed."""
        while self._deadlines and self._deadlines[0][0] <= now:
            self.abort(heapq.heappop(self._deadlines)[1], now, FinishReason.DEADLINE)

    def next_deadline(self) -> float | None:
        """Monotonic seconds of the earliest deadline of an active request."""
        while self._deadlines and self._deadlines[0][1] not in self._active:
            heapq.heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else None

    def take_ended(self) -> list[SequenceOutput]:
        """Terminal outputs of the sequences that ended outside a step."""
        ended, self._ended = self._ended, []
        return ended

    def plan(self, now: float) -> StepPlan | None:
        """Decides the next step and counts it as dispatched; None if no sequence can take part in one now."""
        plan = StepPlan(self._step + 1)
        self._make_room()
        self._admit(now)
        budget = self._chunk_budget()
        rows: list[Sequence] = plan.sequences
        last_steps: list[Sequence] = []
        for sequence in self.running:
            computed = sequence.computed
            if computed >= sequence.prefill_end:
                if computed >= sequence.capacity:
                    continue  # its next page is still fenced
                end = computed + 1
            elif budget > 0:
                end = min(sequence.prefill_end, computed + budget)
                budget -= end - computed
                prompt_end = min(end + 1, sequence.prompt_length)
                targets = sequence.token_ids[computed + 1 : prompt_end] if sequence.wants_prompt_logprobs else []
                plan.pieces.append(Piece(len(rows), computed, sequence.token_ids[computed:end], targets))
                if computed == sequence.prefill_start:
                    plan.taken_slots.append(sequence.slot)
            else:
                continue
            sequence.computed = end
            sequence.in_flight += 1
            sequence.last_step = plan.step
            rows.append(sequence)
            if end >= sequence.max_length - 1:  # never before the end of its prompt
                last_steps.append(sequence)
        if not rows:
            return None
        plan.fill_columns()
        self._release_slots(last_steps)
        plan.new_owners, self._new_owners = self._new_owners, []
        self._pages.hand_over(plan)
        self._step = plan.step
        return plan

    def _chunk_budget(self) -> int:
        """Prompt tokens that the next step may carry."""
        pending = [s.prefill_end - s.computed for s in self.running if s.computed < s.prefill_end]
        if len(pending) < len(self.running) - len(pending):
            return self.prefill_chunks[0]
        tokens = sum(pending)
        return next((chunk for chunk in self.prefill_chunks if chunk >= tokens), self.prefill_chunks[-1])

    def _make_room(self) -> None:
        """Gives each decoding sequence the page of its next token. Where none is left the last in order gives way;
        pages that come back when a step in flight retires are waited for instead."""
        pages = self._pages
        tight = self.allocator.available < len(self.running)
        for sequence in sorted(self.running, key=_order) if tight else self.running:
            if sequence.computed < sequence.capacity or sequence.slot < 0:
                continue
            while not pages.grow(sequence) and not pages.is_any_fenced:
                if self._let_go_of_prompts():
                    continue
                victim = max(self.running, key=_order)
                self._preempt(victim)
                if victim is sequence:
                    break

    def _preempt(self, sequence: Sequence) -> None:
        self.preemptions += 1
        self._pages.save(sequence)
        self._release_slot(sequence)
        self._pages.release(sequence)
        sequence.computed = 0
        self._waiting.add(sequence)

    def _admit(self, now: float) -> None:
        """Gives slots and the pages of their tokens to the heads of the queue, as long as both last."""
        while self._waiting and self._free_slots:
            sequence = self._waiting.head
            # A preempted sequence may have its last token still on its way.
            if sequence.in_flight:
                return
            if not self._pages.take(sequence, spare=len(self.running)):
                if self.running or self._pages.is_any_fenced or not self._let_go_of_prompts():
                    return
                continue
            self._waiting.pop()
            sequence.slot = heapq.heappop(self._free_slots)
            sequence.prefill_start = sequence.computed
            sequence.prefill_end = len(sequence.token_ids)
            if sequence.cached is None:
                sequence.cached = sequence.computed
                sequence.first_scheduled = now
                self._note_first_admission(sequence)
            self.running.append(sequence)
            self._new_owners.append((sequence.slot, sequence))

    def _note_first_admission(self, sequence: Sequence) -> None:
        prompt = sequence.shared_prompt
        if prompt is not None:
            prompt.take(sequence, self.allocator)
        if (prompt is None or sequence is prompt.first) and not sequence.wants_prompt_logprobs:
            self.prefix_queries += sequence.prompt_length
            self.prefix_hits += sequence.computed

    def _let_go_of_prompts(self) -> bool:
        """Gives up the pages kept for sequences that wait; whether there were any."""
        prompts = [s.shared_prompt for s in self._active.values() if s.shared_prompt is not None]
        kept = any(prompt.pages for prompt in prompts)
        for prompt in prompts:
            prompt.let_go(self.allocator)
        return kept

    def retire(self, plan: StepPlan, results: StepResults, now: float) -> Retired:
        """Takes in what a step gave, in the order of dispatch; `now` is in monotonic seconds."""
        logprobs = results.logprobs
        self._pages.lift_fences(plan.step)
        handles, tokens = [], []
        outputs = _take_scores(plan, results)
        for row, (sequence, end, token, flag) in enumerate(
            zip(plan.sequences, plan.ends, results.tokens, results.flags, strict=False)  # the device's rows are padded
        ):
            sequence.in_flight -= 1
            if flag == EMITTED and end < sequence.quiet_until and logprobs is None:
                # Most rows, and so the fewest look-ups.
                sequence.token_ids.append(token)
                handles.append(sequence.handle)
                tokens.append(token)
            elif sequence.done:
                self.overrun_tokens += 1
            elif flag:
                if not flag & FAILED:
                    self._pages.register(sequence, end)
                reported = None if logprobs is None else logprobs[row]
                outputs.append(self._accept(sequence, token, flag, reported, now))
                sequence.quiet_until = 0 if sequence.done else self._pages.quiet_until(sequence)
            else:
                assert not plan.decodes[row] and plan.sample_index[row] < 0, "a row ended unseen"
        return Retired(handles, tokens, outputs)

    def restart(self) -> None:
        """Sends every running sequence back to the queue with the tokens it has: the device lost its cache and state,
        and the steps in flight with them."""
        for sequence in self._active.values():
            sequence.in_flight = 0
            self._pages.forget_saved(sequence)
            if sequence.slot >= 0:
                self._release_slot(sequence)
            if sequence.pages:
                self._pages.release(sequence)
                sequence.computed = 0
                self._waiting.add(sequence)
        self._let_go_of_prompts()
        self._pages.lose_content()
        self._new_owners = []

    def _accept(
        self, sequence: Sequence, token: int, flags: int, logprobs: TokenLogprobs | None, now: float
    ) -> SequenceOutput:
        if flags & FAILED:
            return self._finish(sequence, FinishReason.ERROR, now, error="the model's logits are not finite")
        started, times = None, None
        if sequence.first_token == 0.0:
            sequence.first_token = now
            started, times = sequence.cached, (sequence.first_scheduled, now, now)
            self._share_prompt(sequence, sequence.pages[: (sequence.prompt_length - 1) // self.page_size])
        sequence.token_ids.append(token)
        if flags & STOPPED:
            return self._finish(sequence, FinishReason.STOP, now, matched_stop=token, started=started)
        wanted = [logprobs] if logprobs is not None and sequence.submit.logprobs >= 0 else None
        if flags & COMPLETED:
            return self._finish(sequence, FinishReason.STOP, now, token_ids=[token], logprobs=wanted, started=started)
        if len(sequence.token_ids) >= sequence.submit.max_length:
            return self._finish(sequence, FinishReason.LENGTH, now, token_ids=[token], logprobs=wanted, started=started)
        return SequenceOutput(sequence.submit.handle, [token], wanted, started, times=times)

    def _share_prompt(self, sequence: Sequence, pages: list[int]) -> None:
        """Queues the further sequences of a prompt when its first has computed these pages of it, or has ended."""
        prompt = sequence.shared_prompt
        if prompt is not None and prompt.first is sequence and not prompt.is_computed:
            self._waiting.add(*prompt.compute(pages, self.allocator))

    def _finish(
        self,
        sequence: Sequence,
        reason: FinishReason,
        now: float,
        *,
        token_ids: list[int] | None = None,
        logprobs: list[TokenLogprobs] | None = None,
        started: int | None = None,
        matched_stop: int | None = None,
        error: str | None = None,
    ) -> SequenceOutput:
        sequence.done = True
        del self._active[sequence.submit.handle]
        prompt = sequence.shared_prompt
        if sequence.slot >= 0:
            self._release_slot(sequence)
        elif not sequence.pages:
            self._waiting.discard(sequence)
        self._pages.release(sequence)
        self._pages.forget_saved(sequence)
        if prompt is not None:
            prompt.take(sequence, self.allocator)
            self._share_prompt(sequence, [])
        return SequenceOutput(
            sequence.submit.handle,
            token_ids or [],
            logprobs,
            started,
            reason.value,
            matched_stop,
            len(sequence.token_ids) - sequence.prompt_length,
            (sequence.first_scheduled, sequence.first_token, now),
            error,
        )

    def _release_slot(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        heapq.heappush(self._free_slots, sequence.slot)
        sequence.slot = -1

    def _release_slots(self, sequences: list[Sequence]) -> None:
        """`_release_slot` of several, in one pass over those that run."""
        for sequence in sequences:
            heapq.heappush(self._free_slots, sequence.slot)
            sequence.slot = -1
        if sequences:
            self.running = [sequence for sequence in self.running if sequence.slot >= 0]

    @property
    def active(self) -> int:
        """Requests that have not ended."""
        return len(self._active)

    @property
    def is_idle(self) -> bool:
        """Whether every active request is held."""
        return not self._active or bool(self._held and all(sequence.held for sequence in self._active.values()))

    def gauges(self, compiles_after_warmup: int) -> Gauges:
        """The state after the last call."""
        return Gauges(
            step=self._step,
            running=len(self.running),
            waiting=len(self._waiting),
            available_pages=self.allocator.available,
            cached_pages=self.allocator.cached,
            fenced_pages=self._pages.fenced,
            saved_pages=self._pages.saved,
            restored_pages=self._pages.restored,
            preemptions=self.preemptions,
            prefix_queries=self.prefix_queries,
            prefix_hits=self.prefix_hits,
            overrun_tokens=self.overrun_tokens,
            compiles_after_warmup=compiles_after_warmup,
        )

    def check(self) -> None:
        """Asserts that slots and pages are each owned exactly once."""
        self._pages.check(self._active.values())
        slots = [sequence.slot for sequence in self.running] + self._free_slots
        assert sorted(slots) == list(range(self.slots)), "a slot is lost or owned twice"


def _take_scores(plan: StepPlan, results: StepResults) -> list[SequenceOutput]:
    """The scores of prompt tokens that are new: a sequence that gave way may compute some of them again."""
    outputs = []
    for piece in plan.pieces if results.prompt_logprobs else ():
        sequence = plan.sequences[piece.row]
        scores = results.prompt_logprobs.get(piece.row, [])[sequence.scored - piece.start :]
        if scores and not sequence.done:
            sequence.scored += len(scores)
            outputs.append(SequenceOutput(sequence.handle, [], None, prompt_logprobs=scores))
    return outputs

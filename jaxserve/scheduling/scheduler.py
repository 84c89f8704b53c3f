"""Policy: which sequences take part in the next step, and what a retired step means for them.

`plan()` is called for step N+1 before step N is read, so a sequence's end by a stop id is seen one step late; the row
is masked on the device meanwhile. Everything else (lengths, pages, prompts) is known ahead. No device is known here.
"""

from operator import attrgetter

from jaxserve.core.messages import Gauges, SequenceOutput, Submit, TokenLogprobs
from jaxserve.events import FinishReason
from jaxserve.scheduling.live_sequences import LiveSequences
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
from jaxserve.scheduling.shared_prompt import share_prompt
from jaxserve.scheduling.slots import Slots
from jaxserve.scheduling.waiting_queue import WaitingQueue

_order = attrgetter("order")


class Scheduler:
    """Waiting and running sequences.

    Order is by arrival, where each level of priority counts as PRIORITY_LEAD arrivals earlier. The head of the queue is
    never overtaken: a request, however large, starts at the latest when the sequences before it in order, and those
    that held a slot when it came, have ended, whatever else comes. Under page pressure the last in order gives way: its
    pages move to host memory and come back when there is room. Where host memory is full it is recomputed from its
    tokens, which is as exact and dearer on every platform: a token's keys and values are some KiB, computing them two
    FLOPs a weight. A sequence whose last token is on its way gives its slot back at once, its pages when the step
    retires.

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
        self.slots = Slots(slots)
        self.page_size = page_size
        self.prefill_chunks = prefill_chunks
        self.allocator = PageAllocator(num_pages)
        self.preemptions = 0
        self.prefix_queries = 0
        self.prefix_hits = 0
        self.overrun_tokens = 0
        self._pages = SequencePages(self.allocator, page_size, prefix_cache, host_pages)
        self._waiting = WaitingQueue()
        self._live = LiveSequences()
        self._ended: list[SequenceOutput] = []
        self._step = 0

    def submit(self, submit: Submit, *, held: bool = False) -> None:
        """Queues a request, each sequence of which must fit into all pages; `held`: not before `release`. Its handles
        must not be active."""
        assert self._pages.count(submit.max_length) < self.allocator.num_pages, "request exceeds all pages"
        sequences = self._live.add(submit)
        if held:
            self._live.hold(sequences)
        else:
            self._waiting.add(*share_prompt(sequences, self.page_size))

    def release(self, handle: int) -> list[Submit]:
        """Queues a request that was held. Gives its sequences, one command for each, without those that have ended."""
        sequences = self._live.release(handle)
        self._waiting.add(*share_prompt(sequences, self.page_size))
        return [sequence.submit for sequence in sequences]

    def abort(
        self, handle: int, now: float, reason: FinishReason = FinishReason.ABORT, error: str | None = None
    ) -> None:
        """Ends an active request wherever it is; its terminal output is in the next `take_ended`."""
        sequence = self._live.get(handle)
        if sequence is not None:
            output = SequenceOutput(handle, [], None, error=error)
            self._ended.append(self._finish(sequence, output, reason, now))

    def abort_all(self, now: float) -> None:
        """Ends every active request."""
        for sequence in list(self._live):
            self.abort(sequence.handle, now)

    def expire(self, now: float) -> None:
        """Ends the requests whose deadline has passed."""
        for handle in self._live.take_expired(now):
            self.abort(handle, now, FinishReason.DEADLINE)

    def next_deadline(self) -> float | None:
        """Monotonic seconds of the earliest deadline of an active request."""
        return self._live.next_deadline()

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
        for sequence in self.slots.running:
            computed = sequence.computed
            if computed >= sequence.prefill_end:
                if computed >= sequence.capacity:
                    continue  # its next page has yet to come back
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
        if last_steps:
            self.slots.take_back(*last_steps)
            self._pages.expect_ends(plan.step)
        self.slots.hand_over(plan)
        self._pages.hand_over(plan)
        self._step = plan.step
        return plan

    def _chunk_budget(self) -> int:
        """Prompt tokens that the next step may carry."""
        running = self.slots.running
        pending = sum(sequence.computed < sequence.prefill_end for sequence in running)
        return self.prefill_chunks[0 if pending < len(running) - pending else -1]

    def _make_room(self) -> None:
        """Gives each decoding sequence the page of its next token. Where none is left the last in order gives way;
        pages that come back when a step in flight retires are waited for instead."""
        pages, running = self._pages, self.slots.running
        tight = self.allocator.available < len(running)
        for sequence in sorted(running, key=_order) if tight else running:
            if sequence.computed < sequence.capacity or sequence.slot < 0:
                continue
            while not pages.grow(sequence) and not pages.do_any_return:
                if self._pages.let_go_of_prompts(self._live):
                    continue
                victim = max(self.slots.running, key=_order)
                self._preempt(victim)
                if victim is sequence:
                    break

    def _preempt(self, sequence: Sequence) -> None:
        self.preemptions += 1
        self._pages.save(sequence)
        self.slots.take_back(sequence)
        self._pages.release(sequence)
        sequence.computed = 0
        self._waiting.add(sequence)

    def _admit(self, now: float) -> None:
        """Gives slots and the pages of their tokens to the heads of the queue, as long as both last."""
        while self._waiting and self.slots.is_any_free:
            sequence = self._waiting.head
            # A preempted sequence may have its last token still on its way.
            if sequence.in_flight:
                return
            if not self._pages.take(sequence, spare=len(self.slots.running)):
                if self.slots.running or self._pages.do_any_return or not self._pages.let_go_of_prompts(self._live):
                    return
                continue
            self._waiting.pop()
            sequence.prefill_start = sequence.computed
            sequence.prefill_end = len(sequence.token_ids)
            if sequence.cached is None:
                self._note_first_admission(sequence, now)
            self.slots.give(sequence)

    def _note_first_admission(self, sequence: Sequence, now: float) -> None:
        sequence.cached = sequence.computed
        sequence.first_scheduled = now
        prompt = sequence.shared_prompt
        if prompt is not None:
            prompt.take(sequence, self.allocator)
        if (prompt is None or sequence is prompt.first) and not sequence.wants_prompt_logprobs:
            self.prefix_queries += sequence.prompt_length
            self.prefix_hits += sequence.computed

    def retire(self, plan: StepPlan, results: StepResults, now: float) -> Retired:
        """Takes in what a step gave, in the order of dispatch; `now` is in monotonic seconds."""
        logprobs = results.logprobs
        self._pages.lift_fences(plan.step)
        handles, tokens = [], []
        outputs = plan.take_prompt_scores(results)
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
        self.slots.take_back(*self.slots.running)
        for sequence in self._live:
            sequence.in_flight = 0
            self._pages.forget_saved(sequence)
            if sequence.pages:
                self._pages.release(sequence)
                sequence.computed = 0
                self._waiting.add(sequence)
        self._pages.let_go_of_prompts(self._live)
        self._pages.lose_content()
        self.slots.lose_content()

    def _accept(
        self, sequence: Sequence, token: int, flags: int, logprobs: TokenLogprobs | None, now: float
    ) -> SequenceOutput:
        output = SequenceOutput(sequence.handle, [], None)
        if flags & FAILED:
            output.error = "the model's logits are not finite"
            return self._finish(sequence, output, FinishReason.ERROR, now)
        if sequence.first_token == 0.0:
            sequence.first_token = now
            output.started, output.times = sequence.cached, (sequence.first_scheduled, now, now)
            self._share_prompt(sequence, sequence.pages[: (sequence.prompt_length - 1) // self.page_size])
        sequence.token_ids.append(token)
        if flags & STOPPED:
            output.matched_stop = token
            return self._finish(sequence, output, FinishReason.STOP, now)
        output.token_ids.append(token)
        if logprobs is not None and sequence.submit.logprobs >= 0:
            output.logprobs = [logprobs]
        if flags & COMPLETED:
            return self._finish(sequence, output, FinishReason.STOP, now)
        if len(sequence.token_ids) >= sequence.max_length:
            return self._finish(sequence, output, FinishReason.LENGTH, now)
        return output

    def _share_prompt(self, sequence: Sequence, pages: list[int]) -> None:
        """Queues the further sequences of a prompt when its first has computed these pages of it, or has ended."""
        prompt = sequence.shared_prompt
        if prompt is not None and prompt.first is sequence and not prompt.is_computed:
            self._waiting.add(*prompt.compute(pages, self.allocator))

    def _finish(self, sequence: Sequence, output: SequenceOutput, reason: FinishReason, now: float) -> SequenceOutput:
        """Ends a sequence wherever it is, and makes its last output terminal."""
        sequence.done = True
        self._live.remove(sequence)
        self.slots.take_back(sequence)
        if not sequence.pages:
            self._waiting.discard(sequence)
        self._pages.release(sequence)
        self._pages.forget_saved(sequence)
        if sequence.shared_prompt is not None:
            sequence.shared_prompt.take(sequence, self.allocator)
            self._share_prompt(sequence, [])
            sequence.shared_prompt = None  # each names the other: the collector, which comes seldom, would have to look
        output.finish_reason = reason.value
        output.completion_tokens = len(sequence.token_ids) - sequence.prompt_length
        output.times = (sequence.first_scheduled, sequence.first_token, now)
        return output

    @property
    def is_idle(self) -> bool:
        """Whether every active request is held."""
        return self._live.are_all_held

    def gauges(self, compiles_after_warmup: int) -> Gauges:
        """The state after the last call."""
        return Gauges(
            steps=self._step,
            running=len(self.slots.running),
            waiting=len(self._waiting),
            available_pages=self.allocator.available,
            cached_pages=self.allocator.cached,
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
        self.slots.check()
        self._pages.check(self._live)

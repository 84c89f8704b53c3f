"""An engine without a model: real threads, streams, queueing, deadlines and aborts, with scripted tokens.

A prompt's bytes are its token ids. The k-th token of a request is the letter k mod 26, so a client can check that
nothing was lost, doubled or given to another: see `expected_ids`.
"""

import json
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from jaxserve.config import EngineConfig
from jaxserve.core.messages import StepRecord
from jaxserve.events import Finished, FinishReason, Started, Timings, TokenLogprob, Usage
from jaxserve.front.event_reader import wake_readers
from jaxserve.front.loads import EngineLoads
from jaxserve.front.request_stream import RequestStream
from jaxserve.front.statistics import Statistics
from jaxserve.request import Request
from jaxserve.request_errors import (
    DuplicateRequestId,
    EngineUnavailable,
    InvalidRequest,
    ModelNotFound,
    QueueFull,
    StreamNotFound,
)

VOCAB_SIZE = 256
PAGE_SIZE = 16
LETTERS = b"abcdefghijklmnopqrstuvwxyz"


def expected_ids(count: int) -> list[int]:
    """The first tokens of any request."""
    return [LETTERS[number % 26] for number in range(count)]


class ByteTokenizer:
    """Token ids are UTF-8 bytes; 0, which ends a sequence, is a special token."""

    text_bytes = (b"", *(bytes([byte]) for byte in range(1, 256)))

    def start(self) -> None:
        pass

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    chat_template: str | None = None

    def encode_chat(self, messages: Sequence[Mapping[str, object]]) -> list[int]:
        if messages[0]["role"] == "nobody":
            raise ValueError("the template knows no role 'nobody'")
        return self.encode("".join(f"<{message['role']}>{message['content']}" for message in messages))

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode(errors="replace")

    def to_files(self) -> dict[str, str]:
        # The byte-level alphabet of GPT-2: what can be printed stands for itself, the others follow from U+0100 on.
        printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        others = [byte for byte in range(256) if byte not in printable]
        characters = {byte: chr(byte) for byte in printable} | {b: chr(256 + n) for n, b in enumerate(others)}
        tokenizer = tokenizers.Tokenizer(models.BPE({characters[byte]: byte for byte in range(256)}, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
        template = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template}
        return {"tokenizer.json": tokenizer.to_str(), "tokenizer_config.json": json.dumps(config)}

    def token_bytes(self, id: int) -> bytes:
        return bytes([id])


@dataclass(frozen=True)
class Shape:
    family: str = "scripted"
    vocab_size: int = VOCAB_SIZE
    hidden_size: int = 8
    num_layers: int = 1
    num_q_heads: int = 1
    num_kv_heads: int = 1
    head_dim: int = 8
    eos_ids: tuple[int, ...] = (0,)
    bos_id: int | None = None


@dataclass(frozen=True)
class ScriptedDevice:
    platform: str = "cpu"
    device_kind: str = "script"
    attention: str = "none"


@dataclass
class _Active:
    request: Request
    prompt: list[int]
    stream: RequestStream
    arrival: float
    limit: int
    made: int = 0
    delivered: float = 0.0
    """Monotonic seconds of the latest token."""
    running: bool = False
    cancelled: bool = False

    @property
    def pages(self) -> int:
        return -(-(len(self.prompt) + self.made) // PAGE_SIZE) if self.running else 0


class ScriptedEngine:
    """Steps every `step_time` seconds; every running request gets one token a step.

    Prompts with an effect: "raise" makes submit raise what nobody expects, "break" fails at its third token.

    `text_size`: how often the text of a token has its letter.
    """

    def __init__(
        self,
        slots: int = 8,
        max_waiting: int = 8,
        max_context: int = 4096,
        step_time: float = 0.002,
        stream_buffer_tokens: int = 8192,
        text_size: int = 1,
    ):
        self.config = EngineConfig(slots=slots, max_waiting=max_waiting, stream_buffer_tokens=stream_buffer_tokens)
        self.model_name = "scripted"
        self.model_config = Shape()
        self.device = ScriptedDevice()
        self.tokenizer = ByteTokenizer()
        self.max_context = max_context
        self.step_time = step_time
        self.text_size = text_size
        self.is_healthy = True
        self.total_pages = 4096
        self.may_submit = threading.Event()
        """While cleared, submit does not return, as while a long prompt is tokenized."""
        self.may_submit.set()
        self.submitted = 0
        self.paused = threading.Event()
        """While set, no step runs."""
        self.statistics = Statistics()
        self.step_records: list[StepRecord] = []
        self._steps = 0
        self._active: dict[str, _Active] = {}
        self._accepting = True
        self._stopped = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="scripted-engine", daemon=True)
        self._thread.start()

    def submit_all(self, requests: Sequence[Request]) -> list[RequestStream]:
        prompts = [self._validated(request) for request in requests]
        self.may_submit.wait()
        with self._changed:
            if not self._accepting:
                raise EngineUnavailable("the engine is draining and takes no requests")
            for request in requests:
                if request.request_id in self._active:
                    raise DuplicateRequestId(f"request_id: {request.request_id!r} is active")
            capacity = self.config.slots + self.config.max_waiting
            if len(self._active) + len(requests) > capacity:
                raise QueueFull(capacity, 0.25)
            streams = [self._accept(request, prompt) for request, prompt in zip(requests, prompts, strict=True)]
            self._changed.notify_all()
        return streams

    def _accept(self, request: Request, prompt: list[int]) -> RequestStream:
        stream = RequestStream(request.request_id, lambda: self._cancel(request.request_id, stream))
        room = self.max_context - len(prompt)
        limit = min(request.stopping.max_tokens or room, room)
        self._active[request.request_id] = _Active(request, prompt, stream, time.monotonic(), limit)
        self.submitted += 1
        return stream

    def _validated(self, request: Request) -> list[int]:
        request.validate()
        request.sampling.validate(VOCAB_SIZE, max_n=1)
        request.stopping.validate(VOCAB_SIZE, self.model_config.eos_ids)
        request.output.validate()
        if request.model not in (None, self.model_name):
            raise ModelNotFound(f"model: {request.model!r} is not served here")
        if request.token_ids is not None:
            prompt = list(request.token_ids)
            if any(not 0 <= token < VOCAB_SIZE for token in prompt):
                raise InvalidRequest("token_ids", f"must be in [0, {VOCAB_SIZE - 1}]")
        elif request.messages is not None:
            try:
                prompt = self.tokenizer.encode_chat([dict(message) for message in request.messages])
            except ValueError as error:
                raise InvalidRequest("messages", str(error)) from error
        else:
            prompt = self.tokenizer.encode(request.prompt or "")
        if not 0 < len(prompt) < self.max_context:
            raise InvalidRequest("prompt", f"has {len(prompt)} tokens; must be in [1, {self.max_context - 1}]")
        if request.prompt == "raise":
            raise RuntimeError("a defect")
        return prompt

    def attach(self, request_id: str, from_token: int, tenant: str = "") -> RequestStream:
        raise StreamNotFound(f"request_id: no stream of {request_id!r} is kept")

    def abort(self, request_id: str, tenant: str | None = None) -> bool:
        active = self._active.get(request_id)
        if active is None or tenant not in (None, active.request.tenant):
            return False
        active.cancelled = True
        return True

    def _cancel(self, request_id: str, stream: RequestStream) -> None:
        active = self._active.get(request_id)
        if active is not None and active.stream is stream:
            active.cancelled = True

    def loads(self) -> EngineLoads:
        with self._changed:
            entries = list(self._active.values())
        running = sum(active.running for active in entries)
        return EngineLoads(
            running=running,
            waiting=len(entries) - running,
            slots=self.config.slots,
            available_pages=self.total_pages - sum(active.pages for active in entries),
            total_pages=self.total_pages,
            steps=self._steps,
        )

    def profile(self, seconds: float) -> str:
        raise EngineUnavailable("no trace was taken: there is no device")

    def drain(self) -> None:
        self._accepting = False

    def shutdown(self, grace: float = 0.0) -> bool:
        self.drain()
        with self._changed:
            finished = self._changed.wait_for(lambda: not self._active, timeout=grace)
            self._stopped = True
            self._changed.notify_all()
        self._thread.join()
        return finished

    # The loop

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._active and not self._stopped:
                    self._changed.wait()
                if self._stopped:
                    for active in self._active.values():
                        active.cancelled = True
                self._step()
                self._changed.notify_all()
                if self._stopped:
                    return
            time.sleep(self.step_time)

    def _step(self) -> None:
        self._steps += 1
        free = self.config.slots - sum(active.running for active in self._active.values())
        touched: list[RequestStream] = []
        for active in list(self._active.values()):
            reason = self._ending(active)
            if reason is not None:
                self._finish(active, reason)
            elif self.paused.is_set():
                continue
            elif not active.running:
                if free == 0:
                    continue
                free -= 1
                active.running = True
                seed = active.request.sampling.seed
                self.statistics.on_start(len(active.prompt))
                active.stream.start(
                    Started(active.request.request_id, len(active.prompt), 0, 7 if seed is None else seed)
                )
            else:
                self._make_token(active)
            touched.append(active.stream)
        wake_readers(stream.take_waiter() for stream in touched)

    def _ending(self, active: _Active) -> FinishReason | None:
        if active.cancelled:
            return FinishReason.ABORT
        if active.request.deadline is not None and time.monotonic() > active.request.deadline:
            return FinishReason.DEADLINE
        if active.request.prompt == "break" and active.made == 2:
            return FinishReason.ERROR
        return FinishReason.LENGTH if active.made >= active.limit else None

    def _make_token(self, active: _Active) -> None:
        token = LETTERS[active.made % 26]
        active.made += 1
        now = time.monotonic()
        if active.made == 1:
            self.statistics.on_first_tokens(1, now - active.arrival)
        else:
            self.statistics.on_more_tokens(1, now - active.delivered)
        active.delivered = now
        wanted = active.request.output
        logprobs = None
        if wanted.logprobs is not None:
            logprobs = [TokenLogprob(token, -0.5, tuple((rank, -0.5 - rank) for rank in range(wanted.logprobs)))]
        ids = [token] if wanted.return_token_ids else []
        text = chr(token) * self.text_size if wanted.return_text else ""
        unread = active.stream.push(0, ids, text, logprobs)
        if unread > self.config.stream_buffer_tokens:
            active.cancelled = True

    def _finish(self, active: _Active, reason: FinishReason) -> None:
        del self._active[active.request.request_id]
        finished = Finished(
            active.request.request_id,
            0,
            reason,
            Usage(len(active.prompt), 0, active.made),
            Timings(0.001, 0.002, 0.003, time.monotonic() - active.arrival, 0.003),
            error="a scripted failure" if reason is FinishReason.ERROR else None,
        )
        self.statistics.on_finish(finished, active.made)
        active.stream.finish(finished)

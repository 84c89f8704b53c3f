"""Events of the engine as the OpenAI API shows them: chunks of a stream, and whole answers.

A chunk is written once for each token, so that all of it but the text is encoded before.
"""

import codecs
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from jaxserve.events import Delta, Finished, FinishReason, TokenLogprob
from rpc.http.schema import Asked
from rpc.http.tools import ToolCall, ToolCallReader
from rpc.served_engine import TextTokenizer

LEAST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON lacks."""

DONE = b"data: [DONE]\n\n"


@dataclass
class Choice:
    """What a sequence has given so far, as far as it is shown later."""

    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finished: Finished | None = None
    opened: bool = False
    """A chunk of it was sent."""
    characters: int = 0
    """Of the text of tokens whose log-probabilities were shown."""
    reader: ToolCallReader | None = None
    """Tells text from calls of tools, where the model is offered any."""
    calls: tuple[ToolCall, ...] = ()
    decoder: codecs.IncrementalDecoder = field(default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace"))


class Answer:
    """The answer to one HTTP request; a subclass has the shape of its endpoint.

    Args:
        asked: what was asked for.
        request_id: of the HTTP request.
        model: the name that is served.
        tokenizer: of the model.
    """

    id_prefix: str
    object_name: str
    chunk_name: str

    def __init__(self, asked: Asked, request_id: str, model: str, tokenizer: TextTokenizer):
        self.asked = asked
        self.begun = False
        """A token has come."""
        self._tokenizer = tokenizer
        syntax = asked.tool_syntax
        self.choices = [
            Choice(reader=None if syntax is None else ToolCallReader(syntax, asked.one_call))
            for _ in range(len(asked.requests) * asked.n)
        ]
        identity = {"id": f"{self.id_prefix}-{request_id}", "created": int(time.time()), "model": model}
        self._identity = identity
        head = json.dumps({**identity, "object": self.chunk_name}, separators=(",", ":"))
        self._head = f'data: {head[:-1]},"choices":['.encode()
        self._tail = b'],"usage":null}\n\n' if asked.include_usage else b"]}\n\n"

    # Of a stream

    def delta_chunk(self, index: int, delta: Delta) -> bytes:
        """What new tokens add to the stream; nothing where they have nothing to show."""
        self.begun = True
        choice = self.choices[index]
        text = delta.text if choice.reader is None else choice.reader.push(delta.text)
        if not (text or delta.logprobs or (self.asked.return_token_ids and delta.token_ids)):
            return b""
        extra = ""
        if delta.logprobs is not None:
            extra = f',"logprobs":{json.dumps(self._logprobs(choice, delta.logprobs))}'
        if self.asked.return_token_ids:
            extra += f',"token_ids":{list(delta.token_ids)}'
        return self._opening(choice, index) + self._chunk(index, self._text_part(text), extra)

    def finished_chunk(self, index: int, finished: Finished) -> bytes:
        """The end of a sequence."""
        choice = self.choices[index]
        choice.finished = finished
        rest = b""
        if choice.reader is not None:
            text, choice.calls = choice.reader.finish()
            rest = self._chunk(index, self._text_part(text), "") if text else b""
            rest += self._chunk(index, self._calls_part(choice.calls), "") if choice.calls else b""
        reason = f'"{self._finish_reason(choice)}","stop_reason":{json.dumps(finished.matched_stop)}'
        return self._opening(choice, index) + rest + self._chunk(index, self._text_part(None), "", reason)

    def last_chunks(self) -> bytes:
        """What follows the last sequence: the usage, if asked for, and the end."""
        if not self.asked.include_usage:
            return DONE
        return self._head + f'],"usage":{json.dumps(self._usage())}}}\n\n'.encode() + DONE

    def _opening(self, choice: Choice, index: int) -> bytes:
        """What precedes the first chunk of a sequence."""
        return b""

    def _chunk(self, index: int, part: str, extra: str, reason: str = "null") -> bytes:
        body = f'{{"index":{index},{part}{extra},"finish_reason":{reason}}}'
        return self._head + body.encode() + self._tail

    def _text_part(self, text: str | None) -> str:
        """The text of a chunk with its name; None where a sequence ends."""
        raise NotImplementedError

    def _calls_part(self, calls: Sequence[ToolCall]) -> str:
        """Calls of tools with their name."""
        raise NotImplementedError

    # Of a whole answer

    def add_delta(self, index: int, delta: Delta) -> None:
        """Keeps new tokens."""
        self.begun = True
        choice = self.choices[index]
        choice.texts.append(delta.text if choice.reader is None else choice.reader.push(delta.text))
        choice.token_ids += delta.token_ids
        choice.logprobs += delta.logprobs or ()

    def add_finished(self, index: int, finished: Finished) -> None:
        """Keeps the end of a sequence."""
        choice = self.choices[index]
        choice.finished = finished
        if choice.reader is not None:
            text, choice.calls = choice.reader.finish()
            choice.texts.append(text)

    def whole(self) -> bytes:
        """The answer, once every sequence has ended."""
        choices = [self._whole_choice(index, choice) for index, choice in enumerate(self.choices)]
        whole = {**self._identity, "object": self.object_name, "choices": choices, "usage": self._usage()}
        return json.dumps(whole).encode()

    def _whole_choice(self, index: int, choice: Choice) -> dict[str, object]:
        shown: dict[str, object] = {"index": index, **self._content(choice)}
        shown["logprobs"] = self._logprobs(choice, choice.logprobs) if self.asked.logprobs else None
        shown["finish_reason"] = self._finish_reason(choice)
        shown["stop_reason"] = choice.finished.matched_stop if choice.finished is not None else None
        if self.asked.return_token_ids:
            shown["token_ids"] = choice.token_ids
        return shown

    def _content(self, choice: Choice) -> dict[str, object]:
        """The text of a sequence with its name."""
        raise NotImplementedError

    # Of both

    def _finish_reason(self, choice: Choice) -> str:
        assert choice.finished is not None
        if choice.calls and choice.finished.finish_reason is FinishReason.STOP:
            return "tool_calls"
        return choice.finished.finish_reason

    def _logprobs(self, choice: Choice, logprobs: Sequence[TokenLogprob]) -> dict[str, object]:
        raise NotImplementedError

    def _usage(self) -> dict[str, object]:
        n = self.asked.n
        usages = [choice.finished.usage for choice in self.choices if choice.finished is not None]
        prompts = usages[::n]  # the sequences of one prompt share it
        prompt, completion = sum(u.prompt_tokens for u in prompts), sum(u.completion_tokens for u in usages)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": sum(usage.cached_tokens for usage in prompts)},
        }


class CompletionAnswer(Answer):
    """Of `/v1/completions`."""

    id_prefix = "cmpl"
    object_name = chunk_name = "text_completion"

    def _text_part(self, text: str | None) -> str:
        logprobs = "" if self.asked.logprobs and text is not None else ',"logprobs":null'
        return f'"text":{json.dumps(text or "")}{logprobs}'

    def _content(self, choice: Choice) -> dict[str, object]:
        return {"text": "".join(choice.texts)}

    def _logprobs(self, choice: Choice, logprobs: Sequence[TokenLogprob]) -> dict[str, object]:
        """Lists over the tokens. `text_offset` is in characters from the beginning of the text, of which special tokens
        are no part."""
        offsets = []
        for entry in logprobs:
            offsets.append(choice.characters)
            choice.characters += len(choice.decoder.decode(self._tokenizer.text_bytes[entry.token_id]))
        return {
            "tokens": [self._token_name(entry.token_id) for entry in logprobs],
            "token_logprobs": [max(entry.logprob, LEAST_LOGPROB) for entry in logprobs],
            "top_logprobs": [self._top(entry) for entry in logprobs],
            "text_offset": offsets,
        }

    def _top(self, entry: TokenLogprob) -> dict[str, float]:
        """By name; of tokens that share one, the likeliest."""
        top: dict[str, float] = {}
        for token, logprob in entry.top:
            name = self._token_name(token)
            top[name] = max(logprob, top.get(name, LEAST_LOGPROB))
        return top

    def _token_name(self, token_id: int) -> str:
        r"""The text of a token; of one that is a part of a character, which has none, its bytes: `bytes:\xf0\x9f`."""
        data = self._tokenizer.token_bytes(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

"""From a request to a command for the core: all of a request is checked here, before anything is allocated."""

import secrets
from dataclasses import dataclass

from jaxserve.constraints.check import ConstraintChecker
from jaxserve.core.messages import Submit
from jaxserve.models.config import ModelConfig
from jaxserve.request import Constraint, Request, output_seed
from jaxserve.request_errors import InvalidRequest, ModelNotFound
from jaxserve.tokenizing.chat_template import has_tools
from jaxserve.tokenizing.text_stream import TextStream
from jaxserve.tokenizing.tokenizer import ChatTemplateError, Tokenizer

LONGEST_WAIT = 1e9
"""Seconds, thirty years, after which any deadline has come: a thread cannot wait ten times as long."""


@dataclass(frozen=True)
class Admission:
    """What an engine admits.

    Attributes:
        model_name: the name that requests may give.
        model_config: the model.
        tokenizer: of the model.
        max_context: tokens of prompt and output together.
        max_n: sequences of one request.
        constraints: checks them; None where none can be held to.
    """

    model_name: str
    model_config: ModelConfig
    tokenizer: Tokenizer
    max_context: int
    max_n: int
    constraints: ConstraintChecker | None

    def check(self, request: Request) -> None:
        """Checks all of a request but the length of its prompt. Raises InvalidRequest or ModelNotFound."""
        vocab_size = self.model_config.vocab_size
        request.validate()
        request.sampling.validate(vocab_size, self.max_n)
        request.stopping.validate(vocab_size, self.model_config.eos_ids)
        request.output.validate()
        if request.tools and not has_tools(self.tokenizer.chat_template):
            raise InvalidRequest("tools", "the chat template of this model has no tools")
        if request.model not in (None, "", self.model_name):
            raise ModelNotFound(f"model: {request.model!r} is not served here; {self.model_name!r} is")

    def prepare(self, request: Request, handle: int, arrival: float) -> Submit:
        """Tokenizes a request that `check` passed, and checks its length. Raises InvalidRequest."""
        eos_ids = self.model_config.eos_ids
        field, token_ids = self._tokenize(request)
        room = self.max_context - len(token_ids)
        if not token_ids:
            raise InvalidRequest(field, "has no tokens; at least 1 is needed")
        if room < 1:
            raise InvalidRequest(field, f"has {len(token_ids)} tokens; the limit is {self.max_context - 1}")
        sampling, stopping = request.sampling, request.stopping
        max_tokens = room if stopping.max_tokens is None else stopping.max_tokens
        if max_tokens > room:
            raise InvalidRequest(
                "max_tokens",
                f"must be in [1, {room}] beside a prompt of {len(token_ids)} tokens in a context of "
                f"{self.max_context}, got {max_tokens}",
            )
        if stopping.min_tokens > max_tokens:
            raise InvalidRequest(
                "min_tokens", f"must be in [0, {max_tokens}], for no more fit in the context, got {stopping.min_tokens}"
            )
        seed = secrets.randbits(32) if sampling.seed is None else sampling.seed
        # Last, as what takes longest.
        grammar = None if request.constraint is None else self._grammar(request.constraint)
        stop_ids = [*stopping.stop_token_ids, *(() if stopping.ignore_eos else eos_ids)]
        return Submit(
            handle=handle,
            token_ids=token_ids,
            max_length=len(token_ids) + max_tokens,
            min_length=len(token_ids) + stopping.min_tokens,
            stop_ids=list(dict.fromkeys(stop_ids)),
            temperature=float(sampling.temperature),
            top_p=float(sampling.top_p),
            top_k=sampling.top_k,
            min_p=float(sampling.min_p),
            presence_penalty=float(sampling.presence_penalty),
            frequency_penalty=float(sampling.frequency_penalty),
            repetition_penalty=float(sampling.repetition_penalty),
            seed=seed,
            logit_bias={token: float(bias) for token, bias in sampling.logit_bias.items()},
            logprobs=-1 if request.output.logprobs is None else request.output.logprobs,
            priority=request.priority,
            cache_salt=request.prefix_salt,
            arrival=arrival,
            deadline=None if request.deadline is None else float(min(request.deadline, arrival + LONGEST_WAIT)),
            prompt_logprobs=-1 if request.output.prompt_logprobs is None else request.output.prompt_logprobs,
            fork_seeds=[output_seed(seed, index) for index in range(1, sampling.n)],
            grammar=grammar,
        )

    def texts(self, request: Request) -> list[TextStream | None]:
        """For each sequence of a request what makes text of its tokens; None where nobody needs it."""
        stopping = request.stopping
        if not (request.output.return_text or stopping.stop):
            return [None] * request.sampling.n
        return [
            TextStream(
                self.tokenizer,
                stop=stopping.stop,
                include_stop=stopping.include_stop,
                min_tokens=stopping.min_tokens,
                keeps_first_space=request.constraint is not None or (request.messages is None and request.prompt != ""),
            )
            for _ in range(request.sampling.n)
        ]

    def _grammar(self, constraint: Constraint) -> str:
        if self.constraints is None:
            raise InvalidRequest(
                constraint.kind, "is not supported by a simulated device, or a model without an end-of-sequence id"
            )
        return self.constraints.grammar(constraint)

    def _tokenize(self, request: Request) -> tuple[str, list[int]]:
        """The prompt's field and its token ids."""
        vocab_size = self.model_config.vocab_size
        if request.token_ids is not None:
            for token in request.token_ids:
                if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab_size:
                    raise InvalidRequest("token_ids", f"must be integers in [0, {vocab_size - 1}], got {token!r}")
            return "token_ids", list(request.token_ids)
        field = "prompt" if request.prompt is not None else "messages"
        try:
            text = request.prompt if request.prompt is not None else self._render(request)
            # Text that cannot fit whatever its tokens are is not worth the time of tokenizing it.
            least = self.tokenizer.least_tokens(text)
            if least < self.max_context:
                # A chat template writes its special tokens itself.
                return field, self.tokenizer.encode(text, add_special_tokens=request.prompt is not None)
        except (ValueError, ChatTemplateError) as error:
            raise InvalidRequest(field, str(error)) from error
        raise InvalidRequest(field, f"has at least {least} tokens; the limit is {self.max_context - 1}")

    def _render(self, request: Request) -> str:
        messages = [dict(message) for message in request.messages or ()]
        return self.tokenizer.render_chat(messages, tools=[dict(tool) for tool in request.tools])

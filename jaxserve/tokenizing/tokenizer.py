"""Text to token ids and back, for tokenizers of Hugging Face folders and of GGUF files."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import AddedToken, models, processors

from jaxserve.tokenizing.chat_template import ChatTemplate, ChatTemplateError
from jaxserve.tokenizing.gguf_tokenizer import build_gguf_tokenizer
from jaxserve.tokenizing.token_bytes import TokenizerError, read_token_bytes
from jaxserve.tokenizing.token_floor import TokenFloor
from jaxserve.tokenizing.tokenizer_source import GGUFTokenizer, HuggingFaceTokenizer, TokenizerSource

_COMPOSITION = 4
"""Most characters that become one when text is composed (NFC, NFKC)."""

_FLAGS = frozenset({"single_word", "lstrip", "rstrip", "normalized", "special"})
"""Of an added token."""


class Tokenizer:
    """A model's tokenizer. Thread-safe: nothing changes after construction.

    Attributes:
        vocab_size: ids that the model knows; `encode` gives no others.
        bos_id: begins a sequence: the tokenizer's own where it names one, else that of the model's configuration.
        eos_ids: end a sequence; the tokenizer's own comes first, where it is one of them.
        special_ids: of tokens that are no part of a text.
        text_bytes: by id, what a token adds to a text: its bytes, none if it is special. At least `vocab_size` entries.
        strips_leading_space: a text loses one space at its start when decoded.
        longest_token: upper bound of the characters of text in one token.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, source: TokenizerSource):
        """Use `from_source`."""
        self._tokenizer = tokenizer
        self._source = source
        self._chat_template = None
        if source.chat_template is not None:
            self._chat_template = ChatTemplate(
                source.chat_template, source.special_tokens, tool_source=source.tool_template
            )
        self.vocab_size = source.vocab_size
        self.bos_id = _bos_id(tokenizer, source)
        self.eos_ids = tuple(sorted(source.eos_ids, key=lambda id: id != _eos_id(tokenizer, source)))
        token_bytes = read_token_bytes(tokenizer, source.vocab_size)
        self._bytes = token_bytes.table
        self.special_ids = token_bytes.special_ids
        self.text_bytes = tuple(b"" if id in self.special_ids else data for id, data in enumerate(self._bytes))
        self.strips_leading_space = token_bytes.strips_leading_space
        self._floor = TokenFloor(self._bytes)
        self._composes = tokenizer.normalizer is not None
        self.longest_token = max(map(len, self._bytes)) * (_COMPOSITION if self._composes else 1)

    @staticmethod
    def from_source(source: TokenizerSource) -> "Tokenizer":
        """Builds a checkpoint's tokenizer. Raises TokenizerError."""
        match source.tokenizer:
            case HuggingFaceTokenizer(tokenizer_json, tokenizer_config):
                tokenizer = _parse(tokenizer_json)
                tokenizer.add_tokens(_declared_tokens(tokenizer_config))
                tokenizer.add_special_tokens(_named_tokens(tokenizer, source.special_tokens))
                add_bos, add_eos = source.add_bos, source.add_eos
            case GGUFTokenizer() as gguf:
                built = build_gguf_tokenizer(gguf)
                tokenizer = built.tokenizer
                add_bos = built.adds_bos if source.add_bos is None else source.add_bos
                add_eos = source.add_eos or False
        if add_bos is not None or add_eos is not None:
            tokenizer.post_processor = _post_processor(tokenizer, source, add_bos, add_eos)
        return Tokenizer(tokenizer, source)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; with `add_special_tokens` it begins and ends as the model wants raw prompts.

        The texts of special tokens become those tokens. Raises ValueError for text that is not valid Unicode, and where
        a token is not in the model's vocabulary.
        """
        _check_unicode(text)
        # Unlike `encode`, this releases the GIL and leaves out the offsets, which take longer than the ids.
        ids = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        # A tokenizer may have tokens that the model has no embedding for.
        if len(self._bytes) > self.vocab_size and max(ids, default=0) >= self.vocab_size:
            beyond = max(ids)
            raise ValueError(
                f"{self._tokenizer.id_to_token(beyond)!r} is token {beyond}; "
                f"the model has no more than {self.vocab_size}"
            )
        return ids

    def least_tokens(self, text: str) -> int:
        """A lower bound of the tokens of a text, a hundred times faster than `encode`."""
        if self._composes and not text.isascii():
            return len(text) // self.longest_token
        return self._floor.least_tokens(text.encode("utf-8", "surrogatepass"))

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of token ids; bytes that are not valid UTF-8 become U+FFFD.

        Raises ValueError for an id outside the vocabulary.
        """
        table = self.text_bytes if skip_special else self._bytes
        if ids and not 0 <= min(ids) <= max(ids) < len(table):
            raise ValueError(f"token ids must be in [0, {len(table) - 1}], got {min(ids)} to {max(ids)}")
        text = b"".join([table[id] for id in ids]).decode("utf-8", "replace")
        return text.removeprefix(" ") if self.strips_leading_space else text

    def token_bytes(self, id: int) -> bytes:
        """The bytes that a token stands for, of special tokens too; empty for an id that no token has."""
        if not 0 <= id < len(self._bytes):
            raise ValueError(f"token id must be in [0, {len(self._bytes) - 1}], got {id}")
        return self._bytes[id]

    @property
    def chat_template(self) -> str | None:
        """The source of the model's chat template, in Jinja, that of chats with tools where it has another for them;
        None where it has none."""
        return None if self._chat_template is None else self._source.tool_template or self._source.chat_template

    def start(self) -> None:
        """Starts the process that renders chats, if the model has a template, and waits until it runs; the first chat
        does so else."""
        if self._chat_template is not None:
            self._chat_template.start()

    def stop(self) -> None:
        """Ends the process that renders chats; the next chat starts it again."""
        if self._chat_template is not None:
            self._chat_template.stop()

    def render_chat(self, messages: Sequence[Mapping[str, object]], tools: Sequence[Mapping[str, object]] = ()) -> str:
        """The prompt that the model's chat template makes of messages and tools. Raises ChatTemplateError."""
        if self._chat_template is None:
            raise ChatTemplateError("the model has no chat template")
        return self._chat_template.render(messages, tools)

    def encode_chat(
        self, messages: Sequence[Mapping[str, object]], tools: Sequence[Mapping[str, object]] = ()
    ) -> list[int]:
        """Token ids of `render_chat`. A template writes its special tokens itself, so none are added.

        Raises ChatTemplateError, and ValueError as `encode`.
        """
        return self.encode(self.render_chat(messages, tools), add_special_tokens=False)

    def to_files(self) -> dict[str, str]:
        """Files of a Hugging Face folder, content by name, that make the same tokenizer, here and in transformers."""
        config: dict[str, object] = {"tokenizer_class": "PreTrainedTokenizerFast", **self._source.special_tokens}
        files = {"tokenizer.json": self._tokenizer.to_str()}
        if self._source.chat_template is not None and self._source.tool_template is not None:
            # To transformers chat_template.jinja would be the only one.
            named = {"default": self._source.chat_template, "tool_use": self._source.tool_template}
            config["chat_template"] = [{"name": name, "template": template} for name, template in named.items()]
        elif self._source.chat_template is not None:
            files["chat_template.jinja"] = self._source.chat_template
        return files | {"tokenizer_config.json": json.dumps(config, ensure_ascii=False, indent=2)}


def _parse(tokenizer_json: str) -> tokenizers.Tokenizer:
    try:
        tokenizer = tokenizers.Tokenizer.from_str(tokenizer_json)
    except Exception as error:  # the library raises nothing narrower
        raise TokenizerError(f"tokenizer.json cannot be read: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _declared_tokens(tokenizer_config: Mapping[str, Any]) -> list[AddedToken]:
    """Those of tokenizer_config.json, which tokenizer.json may lack or, as in transformers, have with other flags."""
    declared = tokenizer_config.get("added_tokens_decoder") or {}
    try:
        tokens = [declared[id] for id in sorted(declared, key=int)]
        return [
            AddedToken(token["content"], **{flag: token[flag] for flag in _FLAGS & token.keys()}) for token in tokens
        ]
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise TokenizerError(f"tokenizer_config.json: added_tokens_decoder cannot be read: {error}") from None


def _named_tokens(tokenizer: tokenizers.Tokenizer, named: Mapping[str, str]) -> list[AddedToken]:
    """Those of the vocabulary that the settings name, as `eos_token`, and tokenizer.json does not call special: they
    are all the same, as in transformers."""
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    texts = [text for text in named.values() if text not in special and tokenizer.token_to_id(text) is not None]
    return [AddedToken(text, normalized=False) for text in texts]


def _bos_id(tokenizer: tokenizers.Tokenizer, source: TokenizerSource) -> int | None:
    return _named_id(tokenizer, source, "bos_token", source.bos_id)


def _eos_id(tokenizer: tokenizers.Tokenizer, source: TokenizerSource) -> int | None:
    return _named_id(tokenizer, source, "eos_token", source.eos_ids[0] if source.eos_ids else None)


def _named_id(tokenizer: tokenizers.Tokenizer, source: TokenizerSource, name: str, default: int | None) -> int | None:
    """The id of a token that the tokenizer's files name by its text. The model's configuration, which `default` is
    from, may say another: DeepSeek-R1-Distill-Qwen kept the `bos_token_id` of the model that it was trained from."""
    text = source.special_tokens.get(name)
    id = None if text is None else tokenizer.token_to_id(text)
    return default if id is None else id


def _post_processor(
    tokenizer: tokenizers.Tokenizer, source: TokenizerSource, add_bos: bool | None, add_eos: bool | None
) -> processors.TemplateProcessing:
    before, after = _added_ids(tokenizer)
    if add_bos is not None:
        before = [_needed("bos", _bos_id(tokenizer, source))] if add_bos else []
    if add_eos is not None:
        after = [_needed("eos", _eos_id(tokenizer, source))] if add_eos else []
    special = [
        {"id": str(id), "ids": [id], "tokens": [tokenizer.id_to_token(id) or str(id)]}
        for id in dict.fromkeys([*before, *after])
    ]
    single = [*map(str, before), "$A", *map(str, after)]
    return processors.TemplateProcessing(single=single, pair=None, special_tokens=special)


def _needed(name: str, id: int | None) -> int:
    if id is None:
        raise TokenizerError(f"add_{name}_token is set, but there is no {name}_token_id")
    return id


def _added_ids(tokenizer: tokenizers.Tokenizer) -> tuple[list[int], list[int]]:
    """What a tokenizer puts before and after a text, whatever the kind of its post-processor."""
    probe = tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    if tokenizer.post_processor is not None:
        probe.post_processor = tokenizer.post_processor
    encoded = probe.encode("a")
    text = encoded.special_tokens_mask.index(0)
    return encoded.ids[:text], encoded.ids[text + 1 :]


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        # Python decodes bytes that are no UTF-8 to these, where asked to (`surrogateescape`).
        what = f"the byte 0x{code - 0xDC00:02X}" if 0xDC80 <= code <= 0xDCFF else f"the lone surrogate U+{code:04X}"
        raise ValueError(f"is not valid Unicode text: {what} at character {error.start}") from None

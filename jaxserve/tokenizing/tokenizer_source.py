"""What a checkpoint says about its tokenizer: plain data, from which `jaxserve.tokenizing.tokenizer` builds one."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class HuggingFaceTokenizer:
    """The files of a Hugging Face folder, parsed but not interpreted."""

    tokenizer_json: str
    """Content of tokenizer.json."""
    tokenizer_config: dict[str, Any]
    """Content of tokenizer_config.json; empty where there is none."""


@dataclass(frozen=True)
class GGUFTokenizer:
    """The `tokenizer.ggml.*` metadata of a GGUF file, under the same names."""

    model: str
    """Kind of tokenizer: `gpt2` is byte-level BPE, `llama` is SentencePiece."""
    pre: str | None
    """Name of the pre-tokenizer, as `smollm`, `llama-bpe`, `qwen2`."""
    tokens: tuple[str, ...]
    """By id."""
    token_types: tuple[int, ...]
    """By id: 1 normal, 2 unknown, 3 control, 4 user defined, 5 unused, 6 byte. Empty where the file has none."""
    scores: tuple[float, ...]
    """By id, of a SentencePiece tokenizer. Empty where the file has none."""
    merges: tuple[str, ...]
    """`left right` pairs, best first."""
    unknown_id: int | None
    padding_id: int | None
    add_space_prefix: bool | None
    """None where the file does not say."""


@dataclass(frozen=True)
class TokenizerSource:
    """Everything a tokenizer is built from."""

    tokenizer: HuggingFaceTokenizer | GGUFTokenizer
    vocab_size: int
    """Of the model; a tokenizer may have fewer tokens."""
    bos_id: int | None
    """Of the model's configuration; the token that `special_tokens` names comes before it."""
    eos_ids: tuple[int, ...]
    """Every id that ends a sequence."""
    add_bos: bool | None
    """Whether a raw prompt starts with the beginning-of-sequence id; None where the checkpoint leaves it to
    tokenizer.json."""
    add_eos: bool | None
    """Whether a raw prompt ends with the tokenizer's own end-of-sequence id; None as for `add_bos`."""
    chat_template: str | None
    """Jinja source."""
    special_tokens: dict[str, str]
    """Texts by the name the chat template uses: `bos_token`, `eos_token`, `unk_token`, `pad_token` and the like."""
    tool_template: str | None = None
    """Taken for chats with tools in place of `chat_template`; None where that one is for both."""

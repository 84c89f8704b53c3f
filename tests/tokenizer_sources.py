"""Tokenizers to test with: SmolLM2's, a small SentencePiece one, and byte-level ones of a few merges."""

import json
from functools import cache
from pathlib import Path
from typing import Any

from jaxserve.checkpoints import registry
from jaxserve.checkpoints.gguf import open_gguf
from jaxserve.tokenizing.token_bytes import byte_alphabet
from jaxserve.tokenizing.tokenizer import Tokenizer
from jaxserve.tokenizing.tokenizer_source import GGUFTokenizer, TokenizerSource

FIXTURES = Path(__file__).parent / "fixtures"


@cache
def smollm2_source() -> TokenizerSource:
    """Of the embedded model's GGUF file."""
    return open_gguf(registry.find("smollm2-135m")).tokenizer_source


@cache
def smollm2() -> Tokenizer:
    """The embedded model's tokenizer."""
    return Tokenizer.from_source(smollm2_source())


def smollm2_fixture() -> dict[str, Any]:
    """Ids and texts by transformers."""
    return json.loads((FIXTURES / "smollm2_tokenizer.json").read_text())


@cache
def sentence_piece_fixture(add_space_prefix: bool) -> dict[str, Any]:
    """A vocabulary, ids and texts by SentencePiece."""
    models = json.loads((FIXTURES / "sentencepiece_bpe.json").read_text())["models"]
    return next(model for model in models if model["add_space_prefix"] == add_space_prefix)


def sentence_piece_source(add_space_prefix: bool = True, add_bos: bool | None = None) -> TokenizerSource:
    """The same vocabulary as a GGUF file would hold it."""
    model = sentence_piece_fixture(add_space_prefix)
    gguf = GGUFTokenizer(
        model="llama",
        pre="default",
        tokens=tuple(model["tokens"]),
        token_types=tuple(model["token_types"]),
        scores=tuple(model["scores"]),
        merges=(),
        unknown_id=model["unknown_id"],
        padding_id=None,
        add_space_prefix=None if add_space_prefix else False,
    )
    return _source(gguf, bos_id=model["bos_id"], eos_id=model["eos_id"], add_bos=add_bos)


@cache
def sentence_piece(add_space_prefix: bool = True) -> Tokenizer:
    """A tokenizer of the GGUF kind `llama`."""
    return Tokenizer.from_source(sentence_piece_source(add_space_prefix))


def byte_level_source(
    *,
    pre: str | None = "gpt-2",
    words: tuple[str, ...] = (),
    control: tuple[str, ...] = ("<s>", "</s>"),
    user_defined: tuple[str, ...] = (),
    merges: tuple[str, ...] = (),
    add_bos: bool | None = None,
    add_eos: bool | None = None,
    vocab_size: int | None = None,
    chat_template: str | None = None,
) -> TokenizerSource:
    """A token a byte, then `words`; `control` tokens come first: the beginning and the end of a sequence."""
    tokens = (*control, *user_defined, *byte_alphabet(), *words)
    kinds = (*(3 for _ in control), *(4 for _ in user_defined), *(1 for _ in byte_alphabet()), *(1 for _ in words))
    gguf = GGUFTokenizer("gpt2", pre, tokens, kinds, (), merges, None, None, None)
    bos_id, eos_id = (0, 1) if control else (None, None)
    return _source(gguf, bos_id, eos_id, add_bos, add_eos, vocab_size, chat_template)


def _source(
    gguf: GGUFTokenizer,
    bos_id: int | None,
    eos_id: int | None,
    add_bos: bool | None = None,
    add_eos: bool | None = None,
    vocab_size: int | None = None,
    chat_template: str | None = None,
) -> TokenizerSource:
    return TokenizerSource(
        tokenizer=gguf,
        vocab_size=vocab_size or len(gguf.tokens),
        bos_id=bos_id,
        eos_ids=() if eos_id is None else (eos_id,),
        add_bos=add_bos,
        add_eos=add_eos,
        chat_template=chat_template,
        special_tokens={} if bos_id is None else {"bos_token": gguf.tokens[bos_id]},
    )

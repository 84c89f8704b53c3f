"""The bytes each token stands for, so that decoding is joining bytes: of a whole text and of a stream alike."""

import json
from dataclasses import dataclass
from typing import Any

import tokenizers

SPACE_MARK = "\u2581"
"""Stands for a space in SentencePiece vocabularies."""


class TokenizerError(ValueError):
    """A checkpoint's tokenizer that cannot be built; the message names what is at fault."""


@dataclass(frozen=True)
class TokenBytes:
    """What token ids decode to."""

    table: tuple[bytes, ...]
    """By id; empty for ids that no token has."""
    special_ids: frozenset[int]
    """Ids of tokens that are no part of the text: control tokens."""
    strips_leading_space: bool
    """One space at the start of a text belongs to the tokenizer and is not part of the text."""


def byte_alphabet() -> dict[str, int]:
    """The character that byte-level vocabularies write for each byte, as GPT-2 defined them."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


def read_token_bytes(tokenizer: tokenizers.Tokenizer, size: int) -> TokenBytes:
    """The bytes of every token, with at least `size` entries.

    Raises TokenizerError for a decoder that is neither byte level nor SentencePiece: its text is not a chain of bytes.
    """
    added = tokenizer.get_added_tokens_decoder()
    vocabulary = tokenizer.get_vocab(with_added_tokens=False)
    steps = _decoder_steps(tokenizer)
    kinds = {step["type"] for step in steps}
    table = [b""] * max(size, 1 + max([*vocabulary.values(), *added], default=0))
    if "ByteLevel" in kinds:
        strips = False
        _fill_byte_level(table, vocabulary)
        added_bytes = {id: token.content.encode() for id, token in added.items()}
    else:
        strips = any(_strips_leading_space(step) for step in steps)
        byte_fallback = "ByteFallback" in kinds
        for token, id in vocabulary.items():
            table[id] = _sentence_piece_bytes(token, byte_fallback)
        added_bytes = {id: _sentence_piece_bytes(token.content, False) for id, token in added.items()}
    for id, data in added_bytes.items():
        table[id] = data
    special = frozenset(id for id, token in added.items() if token.special)
    return TokenBytes(tuple(table), special, strips)


def _decoder_steps(tokenizer: tokenizers.Tokenizer) -> list[dict[str, Any]]:
    decoder = tokenizer.decoder
    if decoder is None:
        raise TokenizerError("the tokenizer has no decoder: neither byte level nor SentencePiece")
    state = json.loads(decoder.__getstate__())
    steps = state["decoders"] if state["type"] == "Sequence" else [state]
    for step in steps:
        if not _is_supported(step):
            raise TokenizerError(f"the decoder {json.dumps(step)} is neither of byte level nor of SentencePiece")
    return steps


def _is_supported(step: dict[str, Any]) -> bool:
    match step["type"]:
        case "ByteLevel" | "ByteFallback" | "Fuse":
            return True
        case "Replace":
            return step["pattern"] == {"String": SPACE_MARK} and step["content"] == " "
        case "Strip":
            return step["content"] == " " and step["start"] in (0, 1) and step["stop"] == 0
        case "Metaspace":
            return step["replacement"] == SPACE_MARK
        case _:
            return False


def _strips_leading_space(step: dict[str, Any]) -> bool:
    if step["type"] == "Metaspace":
        return step.get("prepend_scheme", "always") != "never"
    return step["type"] == "Strip" and step["start"] == 1


def _fill_byte_level(table: list[bytes], vocabulary: dict[str, int]) -> None:
    # Through latin-1, a whole token at a time. What is not of the alphabet must not pass for a byte: it becomes a
    # character that latin-1 lacks.
    to_latin = {char: "\uffff" for char in range(0x100)} | {ord(c): chr(byte) for c, byte in byte_alphabet().items()}
    for token, id in vocabulary.items():
        try:
            table[id] = token.translate(to_latin).encode("latin-1")
        except UnicodeEncodeError:
            table[id] = token.encode()


def _sentence_piece_bytes(token: str, byte_fallback: bool) -> bytes:
    if byte_fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes.fromhex(token[3:5])
    return token.replace(SPACE_MARK, " ").encode()

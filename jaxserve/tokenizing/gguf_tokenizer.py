"""The tokenizer in a GGUF file's metadata, built for the `tokenizers` library.

The names and meanings of models, pre-tokenizers and token types are those of llama.cpp (`src/llama-vocab.cpp`), which
defines the format. Where it differs from the tokenizer.json that a model was published with, the latter is followed.
"""

from dataclasses import dataclass
from enum import IntEnum

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from jaxserve.tokenizing.token_bytes import SPACE_MARK, TokenizerError
from jaxserve.tokenizing.tokenizer_source import GGUFTokenizer


class _TokenType(IntEnum):
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class _PreTokenizer:
    """How a byte-level BPE vocabulary wants its text."""

    patterns: tuple[str, ...]
    """Each splits what the ones before left; what is between matches is kept as well."""
    composes: bool = False
    """The text is brought to Unicode's composed form (NFC) first."""
    ignores_merges: bool = False
    """A word that is a token needs no merges."""
    adds_bos: bool = False
    """Where the file does not say."""


_DEFAULT = _PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"))
_LLAMA_BPE = _PreTokenizer((_LLAMA3,), ignores_merges=True, adds_bos=True)
_PRE_TOKENIZERS = {
    "default": _DEFAULT,
    "gpt-2": _PreTokenizer((_GPT2,)),
    "smollm": _PreTokenizer((r"\p{N}", _GPT2)),
    "llama-bpe": _LLAMA_BPE,
    "llama3": _LLAMA_BPE,
    "llama-v3": _LLAMA_BPE,
    "tekken": _PreTokenizer((_TEKKEN,), ignores_merges=True, adds_bos=True),
    "qwen2": _PreTokenizer((_QWEN2,), composes=True),
    "deepseek-r1-qwen": _PreTokenizer((_QWEN2,), composes=True),
}


@dataclass(frozen=True)
class BuiltTokenizer:
    """A tokenizer without a post-processor, and what the format's defaults say about one."""

    tokenizer: tokenizers.Tokenizer
    adds_bos: bool
    """Where the file does not say, whether a raw prompt starts with the beginning-of-sequence id."""


def build_gguf_tokenizer(source: GGUFTokenizer) -> BuiltTokenizer:
    """Builds a tokenizer from GGUF metadata. Raises TokenizerError naming what is missing, malformed or unknown."""
    vocabulary = _vocabulary(source)
    if source.model == "gpt2":
        built = _byte_level(source, vocabulary)
    elif source.model == "llama":
        built = _sentence_piece(source, vocabulary)
    else:
        raise TokenizerError(f"tokenizer.ggml.model {source.model!r} is not one of gpt2, llama")
    tokens = built.tokenizer
    tokens.add_special_tokens([_added(token) for token in _of_type(source, _TokenType.CONTROL, _TokenType.UNKNOWN)])
    tokens.add_tokens([_added(token) for token in _of_type(source, _TokenType.USER_DEFINED)])
    return built


def _vocabulary(source: GGUFTokenizer) -> dict[str, int]:
    for name, values in (("token_type", source.token_types), ("scores", source.scores)):
        if values and len(values) != len(source.tokens):
            raise TokenizerError(f"tokenizer.ggml.{name} has {len(values)} entries for {len(source.tokens)} tokens")
    vocabulary = {token: id for id, token in enumerate(source.tokens)}
    if len(vocabulary) != len(source.tokens):
        twice = next(token for id, token in enumerate(source.tokens) if vocabulary[token] != id)
        raise TokenizerError(f"tokenizer.ggml.tokens has {twice!r} more than once")
    return vocabulary


def _of_type(source: GGUFTokenizer, *types: _TokenType) -> list[str]:
    return [token for token, kind in zip(source.tokens, source.token_types, strict=False) if kind in types]


def _added(token: str) -> AddedToken:
    return AddedToken(token, normalized=False)


def _byte_level(source: GGUFTokenizer, vocabulary: dict[str, int]) -> BuiltTokenizer:
    pre = _PRE_TOKENIZERS.get(source.pre or "default")
    if pre is None:
        raise TokenizerError(f"tokenizer.ggml.pre {source.pre!r} is not one of {', '.join(_PRE_TOKENIZERS)}")
    merges = [_merge(merge) for merge in source.merges]
    tokenizer = tokenizers.Tokenizer(_bpe(vocabulary, merges, ignore_merges=pre.ignores_merges))
    if pre.composes:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre.patterns),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return BuiltTokenizer(tokenizer, pre.adds_bos)


def _merge(merge: str) -> tuple[str, str]:
    left, space, right = merge.partition(" ")
    if not (left and space and right):
        raise TokenizerError(f"tokenizer.ggml.merges has {merge!r}, which is not a pair")
    return left, right


def _sentence_piece(source: GGUFTokenizer, vocabulary: dict[str, int]) -> BuiltTokenizer:
    """SentencePiece BPE: the neighbours whose union scores best are merged first, and unknown characters are bytes."""
    if not source.scores:
        raise TokenizerError("tokenizer.ggml.scores is missing, which model 'llama' needs")
    if source.unknown_id is not None and not 0 <= source.unknown_id < len(source.tokens):
        raise TokenizerError(f"tokenizer.ggml.unknown_token_id {source.unknown_id} has no token")
    unknown = None if source.unknown_id is None else source.tokens[source.unknown_id]
    merges = _merges_by_score(source, vocabulary)
    tokenizer = tokenizers.Tokenizer(_bpe(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    adds_space = source.add_space_prefix is not False
    # Each stretch of text between special tokens gets the space, as in llama.cpp.
    prefix = [normalizers.Prepend(SPACE_MARK)] if adds_space else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", SPACE_MARK)])
    strip = [decoders.Strip(" ", 1, 0)] if adds_space else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE_MARK, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return BuiltTokenizer(tokenizer, adds_bos=True)


def _merges_by_score(source: GGUFTokenizer, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Every way to make a token of two others, best score first.

    Ways to the same token are ordered as in transformers (`convert_slow_tokenizer.generate_merges`); SentencePiece
    itself takes the leftmost.
    """
    scores = {
        token: score
        for id, (token, score) in enumerate(zip(source.tokens, source.scores, strict=True))
        if not source.token_types or source.token_types[id] == _TokenType.NORMAL
    }
    ranked = []
    for token, score in scores.items():
        pairs = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        pairs = [(left, right) for left, right in pairs if left in scores and right in scores]
        pairs.sort(key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
        ranked += [(score, len(left), len(right), left, right) for left, right in pairs]
    ranked.sort(key=lambda merge: merge[:3], reverse=True)
    return [(left, right) for _, _, _, left, right in ranked]


def _bpe(vocabulary: dict[str, int], merges: list[tuple[str, str]], **options: str | bool | None) -> models.BPE:
    try:
        return models.BPE(vocabulary, merges, **options)
    except Exception as error:  # the library raises nothing narrower
        raise TokenizerError(f"tokenizer.ggml.merges do not fit tokenizer.ggml.tokens: {error}") from error

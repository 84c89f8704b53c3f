"""Tokenizers of GGUF files and Hugging Face folders, against transformers and SentencePiece."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_sources import (
    byte_level_source,
    sentence_piece,
    sentence_piece_fixture,
    sentence_piece_source,
    smollm2,
    smollm2_fixture,
    smollm2_source,
)
from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers import decoders, models, pre_tokenizers

from jaxserve.tokenizing.gguf_tokenizer import build_gguf_tokenizer
from jaxserve.tokenizing.token_bytes import TokenizerError
from jaxserve.tokenizing.tokenizer import ChatTemplateError, Tokenizer
from jaxserve.tokenizing.tokenizer_source import GGUFTokenizer, HuggingFaceTokenizer, TokenizerSource

STRINGS = smollm2_fixture()["strings"]
CHATS = smollm2_fixture()["chats"]
UNSEEN_BYTES = {0x04, 0x06, 0x13, 0x14, 0x16, 0x1D}
"""Of ASCII, those that SmolLM2's vocabulary has no token for: it drops them."""


@pytest.mark.parametrize("entry", STRINGS, ids=lambda entry: repr(entry["text"][:20]))
def test_smollm2_ids_are_those_of_the_published_tokenizer(entry):
    assert smollm2().encode(entry["text"]) == entry["published_ids"]


@pytest.mark.parametrize("entry", STRINGS, ids=lambda entry: repr(entry["text"][:20]))
def test_smollm2_text_is_that_of_transformers(entry):
    assert smollm2().decode(entry["transformers_ids"], skip_special=False) == entry["decoded"]
    assert smollm2().decode(entry["published_ids"], skip_special=False) == entry["text"]


@pytest.mark.parametrize("chat", CHATS, ids=lambda chat: chat["text"][-30:])
def test_smollm2_chats_are_those_of_transformers(chat):
    tokenizer = smollm2()
    assert tokenizer.render_chat(chat["messages"]) == chat["text"]
    assert tokenizer.decode(tokenizer.encode_chat(chat["messages"]), skip_special=False) == chat["text"]


@settings(deadline=None)
@given(st.text())
def test_any_text_survives_encoding(text):
    seen = "".join(char for char in text if ord(char) not in UNSEEN_BYTES and ord(char) < 0x40000)
    assert smollm2().decode(smollm2().encode(seen), skip_special=False) == seen


@settings(deadline=None)
@given(st.lists(st.integers(0, 49151)))
def test_any_ids_decode_as_the_library_decodes_them(ids):
    built = _library_smollm2()
    assert smollm2().decode(ids) == built.decode(ids, skip_special_tokens=True)
    assert smollm2().decode(ids, skip_special=False) == built.decode(ids, skip_special_tokens=False)


@cache
def _library_smollm2() -> LibraryTokenizer:
    source = smollm2_source().tokenizer
    assert isinstance(source, GGUFTokenizer)
    return build_gguf_tokenizer(source).tokenizer


@pytest.mark.parametrize("add_space_prefix", [True, False])
def test_sentence_piece_ids_and_texts_are_those_of_the_library(add_space_prefix):
    tokenizer = sentence_piece(add_space_prefix)
    for entry in sentence_piece_fixture(add_space_prefix)["strings"]:
        assert tokenizer.encode(entry["text"], add_special_tokens=False) == entry["ids"], entry["text"]
        assert tokenizer.decode(entry["ids"]) == entry["decoded"]


def test_sentence_piece_text_after_a_special_token_begins_with_a_space_again():
    tokenizer = sentence_piece()
    space_t = tokenizer.encode("t", add_special_tokens=False)
    assert tokenizer.encode("</s>t", add_special_tokens=False) == [2, *space_t]


def test_a_raw_prompt_begins_with_bos_where_the_file_or_the_format_says_so():
    assert sentence_piece().encode("a")[0] == 1
    assert Tokenizer.from_source(sentence_piece_source(add_bos=False)).encode("a")[0] != 1
    assert Tokenizer.from_source(byte_level_source()).encode("") == []
    assert Tokenizer.from_source(byte_level_source(add_bos=True)).encode("") == [0]
    assert Tokenizer.from_source(byte_level_source(pre="llama-bpe")).encode("") == [0]
    assert Tokenizer.from_source(byte_level_source(add_bos=True, add_eos=True)).encode("<s>") == [0, 0, 1]
    assert Tokenizer.from_source(byte_level_source(add_bos=True)).encode("", add_special_tokens=False) == []


def test_special_tokens_in_a_text_are_parsed_and_user_defined_ones_shown():
    tokenizer = Tokenizer.from_source(byte_level_source(user_defined=("<tool>",)))
    assert tokenizer.encode("<s>") == [0]
    assert tokenizer.encode("<tool>") == [2]
    assert tokenizer.decode([0, 2, 1]) == "<tool>"


@pytest.mark.parametrize(
    ("pre", "words"),
    [
        ("smollm", ["it", "'s", " ", "1", "2", "3", "4", " ", " don", "'", "T", "!!", "\n\n ", " a"]),
        ("gpt-2", ["it", "'s", " 1234", " ", " don", "'", "T", "!!", "\n\n ", " a"]),
        ("llama-bpe", ["it", "'s", " ", "123", "4", " ", " don", "'T", "!!\n\n", " ", " a"]),
        ("tekken", ["it", "'s", " ", "1", "2", "3", "4", " ", " don", "'T", "!!\n\n", " ", " a"]),
        ("qwen2", ["it", "'s", " ", "1", "2", "3", "4", " ", " don", "'T", "!!\n\n", " ", " a"]),
        ("default", ["it", "'", "s", " ", "123", "4", " ", " don", "'", "T", "!!", "\n\n ", " a"]),
        (None, ["it", "'", "s", " ", "123", "4", " ", " don", "'", "T", "!!", "\n\n ", " a"]),
    ],
)
def test_each_pre_tokenizer_splits_words_its_own_way(pre, words):
    source = byte_level_source(pre=pre).tokenizer
    assert isinstance(source, GGUFTokenizer)
    pre_tokenizer = build_gguf_tokenizer(source).tokenizer.pre_tokenizer
    text = "it's 1234  don'T!!\n\n  a"
    split = [text[begin:end] for _, (begin, end) in pre_tokenizer.pre_tokenize_str(text)]
    assert split == words


def test_qwen2_composes_its_text():
    tokenizer = qwen2_like()
    assert tokenizer.encode("e\u0301") == tokenizer.encode("\u00e9")


def test_llama_bpe_needs_no_merges_for_a_word_that_is_a_token():
    for pre, count in (("llama-bpe", 1), ("gpt-2", 5)):
        tokenizer = Tokenizer.from_source(byte_level_source(pre=pre, words=("hello",), add_bos=False))
        assert len(tokenizer.encode("hello")) == count


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (byte_level_source(pre="klingon"), r"tokenizer\.ggml\.pre 'klingon' is not one of default, gpt-2, smollm"),
        (byte_level_source(words=("a",)), r"tokenizer\.ggml\.tokens has 'a' more than once"),
        (byte_level_source(merges=("ab",)), r"tokenizer\.ggml\.merges has 'ab', which is not a pair"),
        (byte_level_source(merges=("a b",)), r"tokenizer\.ggml\.merges do not fit .*`ab`"),
        (byte_level_source(control=(), add_bos=True), "add_bos_token is set, but there is no bos_token_id"),
    ],
)
def test_a_malformed_gguf_tokenizer_is_refused_by_name(source, message):
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.from_source(source)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": "bert"}, "tokenizer.ggml.model 'bert' is not one of gpt2, llama"),
        ({"model": "llama"}, "tokenizer.ggml.scores is missing"),
        ({"token_types": (1, 2)}, "tokenizer.ggml.token_type has 2 entries for 258 tokens"),
        ({"model": "llama", "scores": (0.0,) * 258, "unknown_id": 300}, "unknown_token_id 300 has no token"),
    ],
)
def test_inconsistent_gguf_fields_are_refused_by_name(fields, message):
    source = byte_level_source()
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.from_source(replace(source, tokenizer=replace(source.tokenizer, **fields)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ab\ud800c", r"the lone surrogate U\+D800 at character 2"),
        (b"ab\xff".decode("utf-8", "surrogateescape"), "the byte 0xFF at character 2"),
    ],
)
def test_text_that_is_not_unicode_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        smollm2().encode(text)
    with pytest.raises(ValueError, match=r"not valid Unicode text"):
        smollm2().encode_chat([{"role": "user", "content": text}])


def test_ids_outside_the_vocabulary_are_refused():
    for ids in ([0, -1], [49152]):
        with pytest.raises(ValueError, match="got"):
            smollm2().decode(ids)
        with pytest.raises(ValueError, match="got"):
            smollm2().token_bytes(ids[-1])


def test_a_token_that_the_model_does_not_know_is_refused():
    tokenizer = Tokenizer.from_source(byte_level_source(words=("hello",), pre="llama-bpe", vocab_size=258))
    assert tokenizer.encode("hell")
    with pytest.raises(ValueError, match="'hello' is token 258; the model has no more than 258"):
        tokenizer.encode("hello")


def test_ids_that_the_model_knows_and_the_tokenizer_does_not_add_no_text():
    tokenizer = Tokenizer.from_source(byte_level_source(vocab_size=300))
    assert tokenizer.token_bytes(299) == b"" and tokenizer.decode([299]) == ""


def test_token_bytes_are_what_each_token_stands_for():
    assert smollm2().token_bytes(1) == b"<|im_start|>"
    assert b"".join(map(smollm2().token_bytes, smollm2().encode("naïve 🙂"))) == "naïve 🙂".encode()
    piece = sentence_piece()
    assert piece.token_bytes(piece.encode("🙂", add_special_tokens=False)[-1]) == "🙂".encode()[-1:]
    assert piece.token_bytes(piece.encode("the", add_special_tokens=False)[0]) == b" the"


def test_no_token_holds_more_text_than_the_longest():
    for tokenizer in (smollm2(), sentence_piece(), qwen2_like()):
        longest = max(len(tokenizer.token_bytes(id).decode("utf-8", "replace")) for id in range(tokenizer.vocab_size))
        assert tokenizer.longest_token >= longest
    text = "\u03b1\u0313\u0300\u0345" * 10
    assert len(text) <= qwen2_like().longest_token * len(qwen2_like().encode(text))


@settings(deadline=None)
@given(st.lists(st.tuples(st.text("a1 \n=é🙂\u0301", min_size=1, max_size=3), st.integers(1, 100))))
def test_no_text_has_fewer_tokens_than_the_least(parts):
    text = "".join(part * times for part, times in parts)
    for tokenizer in (smollm2(), sentence_piece(), qwen2_like()):
        assert tokenizer.least_tokens(text) <= len(tokenizer.encode(text))


def test_the_least_tokens_of_digits_are_as_many_as_the_digits():
    assert smollm2().least_tokens("1234567890" * 1000) == 10_000


@cache
def qwen2_like() -> Tokenizer:
    return Tokenizer.from_source(byte_level_source(pre="qwen2"))


def test_a_tokenizer_is_used_by_many_threads_at_once():
    with ThreadPoolExecutor(8) as pool:
        encoded = list(pool.map(lambda entry: smollm2().encode(entry["text"]), STRINGS * 10))
    assert encoded == [entry["published_ids"] for entry in STRINGS] * 10


def test_a_model_without_a_template_has_no_chats():
    with pytest.raises(ChatTemplateError, match="no chat template"):
        Tokenizer.from_source(byte_level_source()).encode_chat([{"role": "user", "content": "a"}])


def test_a_template_adds_special_tokens_itself():
    source = byte_level_source(add_bos=True, chat_template="{{ bos_token }}{{ messages[0].content }}")
    assert Tokenizer.from_source(source).encode_chat([{"role": "user", "content": "</s>"}]) == [0, 1]


def test_a_template_for_tools_is_taken_where_there_are_some_shown_and_kept():
    source = replace(byte_level_source(chat_template="plain"), tool_template="{{ tools[0].name }}")
    tokenizer = Tokenizer.from_source(source)
    assert tokenizer.render_chat([]) == "plain"
    assert tokenizer.render_chat([], tools=[{"name": "f"}]) == "f"
    assert tokenizer.chat_template == "{{ tools[0].name }}"
    files = tokenizer.to_files()
    assert "chat_template.jinja" not in files
    assert json.loads(files["tokenizer_config.json"])["chat_template"] == [
        {"name": "default", "template": "plain"},
        {"name": "tool_use", "template": "{{ tools[0].name }}"},
    ]


def _hugging_face(source: TokenizerSource, files: dict[str, str], **changes) -> TokenizerSource:
    config = json.loads(files["tokenizer_config.json"])
    return replace(
        source, tokenizer=HuggingFaceTokenizer(files["tokenizer.json"], config), add_bos=None, add_eos=None, **changes
    )


@pytest.mark.parametrize("make", [smollm2_source, sentence_piece_source, lambda: byte_level_source(add_bos=True)])
def test_the_files_of_a_tokenizer_make_the_same_one(make):
    tokenizer = Tokenizer.from_source(make())
    files = tokenizer.to_files()
    again = Tokenizer.from_source(_hugging_face(make(), files))
    for entry in STRINGS:
        ids = tokenizer.encode(entry["text"])
        assert again.encode(entry["text"]) == ids
        assert again.decode(ids) == tokenizer.decode(ids)
    assert files.get("chat_template.jinja") == make().chat_template
    assert {**make().special_tokens}.items() <= json.loads(files["tokenizer_config.json"]).items()
    assert again.text_bytes == tokenizer.text_bytes


def test_a_checkpoint_may_override_what_tokenizer_json_adds():
    source = byte_level_source(add_bos=True)
    files = Tokenizer.from_source(source).to_files()
    without = replace(_hugging_face(source, files), add_bos=False)
    assert Tokenizer.from_source(without).encode("<s>") == [0]


def test_what_a_checkpoint_does_not_say_of_is_left_to_tokenizer_json():
    files = Tokenizer.from_source(byte_level_source(add_bos=True, add_eos=True)).to_files()
    source = _hugging_face(byte_level_source(), files)
    for add_bos, add_eos, ids in (
        (None, None, [0, 1]),
        (None, False, [0]),
        (None, True, [0, 1]),
        (False, None, [1]),
        (True, None, [0, 1]),
    ):
        assert Tokenizer.from_source(replace(source, add_bos=add_bos, add_eos=add_eos)).encode("") == ids


def test_a_raw_prompt_begins_and_ends_with_the_tokenizers_own_tokens_where_the_models_configuration_names_others():
    files = Tokenizer.from_source(byte_level_source(add_bos=False)).to_files()
    named = {"bos_token": "<s>", "eos_token": "</s>"}
    source = _hugging_face(byte_level_source(), files, bos_id=5, eos_ids=(6, 1, 7), special_tokens=named)
    tokenizer = Tokenizer.from_source(replace(source, add_bos=True, add_eos=True))
    assert tokenizer.encode("") == [0, 1]
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (0, (1, 6, 7))
    unnamed = Tokenizer.from_source(replace(source, add_bos=True, add_eos=True, special_tokens={"bos_token": "<none>"}))
    assert unnamed.encode("") == [5, 6]
    assert (unnamed.bos_id, unnamed.eos_ids) == (5, (6, 1, 7))


@pytest.mark.parametrize(("kind", "id"), [("words", 257), ("user_defined", 1)])
def test_tokens_that_a_checkpoint_names_are_special_whatever_tokenizer_json_says(kind, id):
    made = byte_level_source(control=("<s>",), **{kind: ("</s>",)})
    source = _hugging_face(made, Tokenizer.from_source(made).to_files(), special_tokens={"eos_token": "</s>"})
    tokenizer = Tokenizer.from_source(source)
    assert tokenizer.encode("a</s>")[1:] == [id]
    assert tokenizer.special_ids == {0, id}
    assert tokenizer.decode([id]) == ""


def test_special_tokens_that_only_tokenizer_config_declares_are_tokens():
    files = Tokenizer.from_source(byte_level_source(control=(), words=("<s>", "<t>"))).to_files()
    flags = {"special": True, "normalized": False, "lstrip": False, "rstrip": False, "single_word": False}
    config = {"added_tokens_decoder": {"257": {"content": "<t>", **flags}, "256": {"content": "<s>", **flags}}}
    source = _hugging_face(byte_level_source(), {**files, "tokenizer_config.json": json.dumps(config)}, vocab_size=258)
    tokenizer = Tokenizer.from_source(source)
    assert tokenizer.encode("<s><t>") == [256, 257]
    assert tokenizer.special_ids == {256, 257}
    again = Tokenizer.from_source(_hugging_face(byte_level_source(), tokenizer.to_files()))
    assert again.encode("<s><t>") == [256, 257]


@pytest.mark.parametrize(
    "declared", [["<s>"], [1], {"a": {"content": "<s>"}}, {"1": "<s>"}, {"1": {"content": 5}}, {"1": {"x": 1}}]
)
def test_a_malformed_declaration_of_tokens_is_refused(declared):
    files = Tokenizer.from_source(byte_level_source()).to_files()
    config = json.dumps({"added_tokens_decoder": declared})
    with pytest.raises(TokenizerError, match="added_tokens_decoder cannot be read"):
        Tokenizer.from_source(_hugging_face(byte_level_source(), {**files, "tokenizer_config.json": config}))


def test_truncation_and_padding_of_a_tokenizer_json_are_ignored():
    library = LibraryTokenizer.from_str(Tokenizer.from_source(byte_level_source()).to_files()["tokenizer.json"])
    library.enable_truncation(2)
    library.enable_padding(length=5)
    source = _hugging_face(byte_level_source(), {"tokenizer.json": library.to_str(), "tokenizer_config.json": "{}"})
    assert len(Tokenizer.from_source(source).encode("abc")) == 3


def test_a_tokenizer_json_that_is_none_is_refused():
    source = replace(byte_level_source(), tokenizer=HuggingFaceTokenizer("{}", {}))
    with pytest.raises(TokenizerError, match=r"tokenizer\.json cannot be read"):
        Tokenizer.from_source(source)


@pytest.mark.parametrize(
    ("decoder", "message"),
    [(decoders.WordPiece(), "WordPiece"), (decoders.Replace("_", " "), "Replace"), (None, "has no decoder")],
)
def test_a_decoder_that_joins_no_bytes_is_refused_by_name(decoder, message):
    library = LibraryTokenizer(models.BPE({"a": 0}, []))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    if decoder is not None:
        library.decoder = decoder
    source = replace(byte_level_source(), tokenizer=HuggingFaceTokenizer(library.to_str(), {}))
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.from_source(source)


def test_metaspace_vocabularies_lose_their_leading_space():
    library = LibraryTokenizer(models.BPE({"\u2581a": 0, "\u2581": 1, "a": 2}, [("\u2581", "a")]))
    library.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    library.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer = Tokenizer.from_source(
        replace(byte_level_source(), tokenizer=HuggingFaceTokenizer(library.to_str(), {}))
    )
    ids = tokenizer.encode("a a")
    assert tokenizer.decode(ids) == library.decode(ids) == "a a"

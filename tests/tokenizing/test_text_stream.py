"""Text as it comes: whole characters, nothing of a stop string, and the same as decoding at once."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_sources import byte_level_source, sentence_piece, smollm2

from jaxserve.front.admission import Admission
from jaxserve.models.config import ModelConfig, RopeConfig
from jaxserve.request import Request
from jaxserve.tokenizing.stop_strings import StopStrings
from jaxserve.tokenizing.text_stream import TextDelta, TextStream
from jaxserve.tokenizing.tokenizer import Tokenizer

BYTES = Tokenizer.from_source(byte_level_source(words=("Ġthe", "ab", "abc")))
"""A token a byte, and some words."""


def ids_of(text: str) -> list[int]:
    return BYTES.encode(text)


def stream_of(*stop: str, **options) -> TextStream:
    return TextStream(BYTES, stop=stop, **options)


def pushed_one_by_one(stream: TextStream, ids: list[int]) -> list[str]:
    return [stream.push([id]).text for id in ids]


def cut(ids: list[int], lengths: list[int]) -> list[list[int]]:
    """Pieces of the given lengths, and what is left."""
    pieces = []
    for length in lengths:
        pieces.append(ids[:length])
        ids = ids[length:]
    return [*pieces, ids]


LENGTHS = st.lists(st.integers(0, 5), max_size=20)
# SmolLM2 has no tokens for the bytes of higher code points, none of which are assigned.
TEXTS = st.text(
    st.one_of(
        st.characters(exclude_categories=["Cs"], max_codepoint=0x3FFFF), st.sampled_from("ab👩🏽‍🌈é\u0301世界 \n")
    ),
    max_size=60,
)


@settings(deadline=None)
@given(st.lists(st.integers(0, 49151), max_size=60), LENGTHS)
def test_deltas_add_up_to_the_decoded_text_for_any_tokens(ids, lengths):
    stream = TextStream(smollm2())
    deltas = [stream.push(piece) for piece in cut(ids, lengths)]
    assert "".join(delta.text for delta in deltas) + stream.flush() == smollm2().decode(ids)
    assert sum(delta.tokens_used for delta in deltas) == len(ids)


@settings(deadline=None)
@given(TEXTS, LENGTHS)
def test_deltas_add_up_to_any_text(text, lengths):
    for tokenizer in (smollm2(), BYTES, sentence_piece(), sentence_piece(False)):
        ids = tokenizer.encode(text)
        stream = TextStream(tokenizer, stop=["\0never"])
        deltas = [stream.push(piece).text for piece in cut(ids, lengths)]
        assert "".join(deltas) + stream.flush() == tokenizer.decode(ids)
        assert not any("\ufffd" in delta for delta in deltas) or "\ufffd" in text


@settings(deadline=None)
@given(st.lists(st.integers(0, 419), max_size=60), LENGTHS)
def test_deltas_add_up_to_the_decoded_text_for_any_sentence_piece_tokens(ids, lengths):
    stream = TextStream(sentence_piece())
    deltas = [stream.push(piece).text for piece in cut(ids, lengths)]
    assert "".join(deltas) + stream.flush() == sentence_piece().decode(ids)


def test_a_character_comes_when_its_last_byte_has():
    stream = stream_of()
    assert pushed_one_by_one(stream, ids_of("é🙂")) == ["", "é", "", "", "", "🙂"]
    assert stream.flush() == ""


def test_an_incomplete_character_becomes_one_replacement_when_flushed():
    stream = stream_of()
    assert stream.push(ids_of("a🙂")[:-1]).text == "a"
    assert stream.flush() == "\ufffd"
    assert stream.flush() == ""


def test_bytes_that_no_character_goes_on_with_become_a_replacement_at_once():
    stream = stream_of()
    assert stream.push([*ids_of("🙂")[:2], *ids_of("a")]).text == "\ufffda"


def test_special_tokens_add_no_text():
    assert stream_of().push([0, *ids_of("a"), 1]) == TextDelta("a", None, 3)


def test_the_leading_space_of_a_sentence_piece_text_is_dropped_once():
    ids = sentence_piece().encode("the  the", add_special_tokens=False)
    stream = TextStream(sentence_piece())
    assert "".join(pushed_one_by_one(stream, [1, *ids])) == "the  the"


def test_a_raw_prompt_and_its_text_are_one_text_and_a_chats_answer_begins_without_a_space():
    tokenizer = sentence_piece()
    ids = tokenizer.encode("the end of the world", add_special_tokens=False)
    at = len(tokenizer.encode("the end", add_special_tokens=False))
    config = ModelConfig("llama", tokenizer.vocab_size, 8, 8, 1, 1, 1, 8, 1e-6, RopeConfig(), 64, tie_embeddings=True)
    admission = Admission("model", config, tokenizer, max_context=64, max_n=1, constraints=None)

    def text(**prompt) -> str:
        (stream,) = admission.texts(Request(**prompt))
        assert stream is not None
        return stream.push(ids[at:]).text + stream.flush()

    assert text(prompt="the end") == text(token_ids=tuple(ids[:at])) == " of the world"
    assert text(prompt="") == text(messages=({"role": "user", "content": "a"},)) == "of the world"


def test_a_stop_string_over_several_tokens_ends_the_text_before_it():
    stream = stream_of("STOP")
    deltas = [stream.push([id]) for id in ids_of("go STOP")]
    assert "".join(delta.text for delta in deltas) == "go "
    assert [delta.matched_stop for delta in deltas] == [None] * 6 + ["STOP"]
    assert stream.flush() == ""


def test_text_that_may_begin_a_stop_string_is_held_until_it_does_not():
    stream = stream_of("STOP")
    assert pushed_one_by_one(stream, ids_of("aSTORE")) == ["a", "", "", "", "STOR", "E"]
    assert pushed_one_by_one(stream, ids_of("SSTOSTS")) == ["", "S", "", "", "STO", "", "ST"]
    assert stream.flush() == "S"


def test_an_included_stop_string_is_part_of_the_text_and_holds_nothing_back():
    stream = stream_of("STOP", include_stop=True)
    assert pushed_one_by_one(stream, ids_of("aSTOPb")) == ["a", "S", "T", "O", "P", ""]
    assert stream_of("STOP", include_stop=True).push(ids_of("aSTOPb")) == TextDelta("aSTOP", "STOP", 5)


def test_tokens_after_the_match_are_not_used():
    stream = stream_of("b")
    assert stream.push([*ids_of("a"), 0]) == TextDelta("a", None, 2)
    assert stream.push(ids_of("xbyz")) == TextDelta("x", "b", 2)
    assert stream.push(ids_of("yz")) == TextDelta("", "b", 0)


def test_a_token_that_goes_on_after_the_match_is_used_and_its_rest_dropped():
    ids = BYTES.vocab_size - 1, *ids_of("d")
    assert BYTES.token_bytes(ids[0]) == b"abc"
    assert stream_of("b").push(ids) == TextDelta("a", "b", 1)
    assert stream_of("b", include_stop=True).push(ids) == TextDelta("ab", "b", 1)


def test_the_match_that_is_complete_first_wins_and_then_the_longest():
    for ids in (ids_of("xabcd"), [*ids_of("x"), BYTES.vocab_size - 1, *ids_of("d")]):
        assert stream_of("abcd", "bc").push(ids).matched_stop == "bc"
        assert stream_of("c", "abc", "bc").push(ids) == TextDelta("x", "abc", len(ids) - 1)
        assert stream_of("abcd", "x").push(ids) == TextDelta("", "x", 1)


@pytest.mark.parametrize(("min_tokens", "used"), [(0, 2), (2, 2), (3, 4), (4, 4), (5, None)])
def test_no_match_is_complete_before_min_tokens(min_tokens, used):
    stream = stream_of("b", min_tokens=min_tokens)
    delta = stream.push(ids_of("abcbd"))
    assert delta.tokens_used == (used or 5) and delta.matched_stop == ("b" if used else None)
    assert delta.text + stream.flush() == ("abcbd" if used is None else "abcbd"[: used - 1])


def test_tokens_without_text_count_for_min_tokens():
    assert stream_of("b", min_tokens=3).push([0, 0, *ids_of("b")]).matched_stop == "b"


def test_a_match_may_begin_before_min_tokens():
    assert stream_of("abc", min_tokens=3).push(ids_of("a")[:1] + ids_of("b") + ids_of("c")).matched_stop == "abc"


STOPS = st.lists(st.text("ab€", min_size=1, max_size=5), min_size=1, max_size=4)


@settings(deadline=None)
@given(STOPS, st.text("ab€", max_size=30), LENGTHS, st.booleans(), st.integers(0, 10))
def test_any_cut_of_the_tokens_gives_the_match_that_a_plain_search_finds(stops, text, lengths, include, min_tokens):
    ids = [id for char in text for id in ids_of(char)]
    stream = stream_of(*stops, include_stop=include, min_tokens=min_tokens)
    shown, used, matched = "", 0, None
    for piece in cut(ids, lengths):
        delta = stream.push(piece)
        shown, used, matched = shown + delta.text, used + delta.tokens_used, delta.matched_stop
        if matched is not None:
            break
    ends = (
        (end, stop)
        for end in range(1, len(text) + 1)
        for stop in sorted(stops, key=len, reverse=True)
        if text[:end].endswith(stop) and len(text[:end].encode()) >= min_tokens
    )
    end, stop = next(ends, (len(text), None))
    assert matched == stop
    assert used == len(text[:end].encode())
    assert shown + stream.flush() == (text[:end] if include or stop is None else text[:end].removesuffix(stop))


@settings(deadline=None)
@given(STOPS, st.text("ab€", max_size=30))
def test_no_more_is_held_than_what_may_begin_a_match(stops, text):
    search = StopStrings(stops)
    for end, char in enumerate(text, 1):
        if search.search(char) is not None:
            return
        begins = [length for stop in stops for length in range(len(stop)) if text[:end].endswith(stop[:length])]
        assert search.held == max(begins)

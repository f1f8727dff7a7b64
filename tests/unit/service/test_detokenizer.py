from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from gyrfalcon.presets import bundled_folder
from gyrfalcon.service.detokenizer import (
    ByteDecoder,
    Decoder,
    Detokenizer,
    StopFinder,
    WindowDecoder,
    incremental_decoder,
)
from gyrfalcon.service.tokenizer import TextTokenizer, load_tokenizer
from gyrfalcon.testing.text import EOS_ID, EOS_TOKEN

MakeDecoder = Callable[[TextTokenizer, Sequence[int]], Decoder]
each_kind = pytest.mark.parametrize("make_decoder", [ByteDecoder, WindowDecoder])
TEXTS = st.text(alphabet=st.sampled_from("ab ,.é北🦅\n"), max_size=40)


def bytewise(tokenizer: TextTokenizer, text: str) -> list[int]:
    """The text's ids, one a byte: characters beyond ASCII are split over several tokens."""
    alphabet = byte_ids(tokenizer)
    return [alphabet[byte] for byte in text.encode()]


def byte_ids(tokenizer: TextTokenizer) -> dict[int, int]:
    """The id of each byte's own token."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    spelled = {symbol: tokenizer._backend.token_to_id(symbol) for symbol in symbols}
    pre = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    ids = {}
    for char in [*map(chr, range(128)), *"é北🦅"]:
        ((word, _),) = pre.pre_tokenize_str(char)
        ids |= {byte: spelled[symbol] for byte, symbol in zip(char.encode(), word, strict=True)}
    return ids


@pytest.fixture(scope="module")
def llama_like() -> TextTokenizer:
    """Words with a leading space mark, bytes as a fallback: the other common kind of decoder."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁hello", "▁world", "lo", "!"]
    backend = Tokenizer(models.BPE({word: id_ for id_, word in enumerate(words)}, [], byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return TextTokenizer(backend, bos_token="<s>", eos_token="</s>")


@each_kind
@given(text=TEXTS, prompt=TEXTS)
def test_token_texts_join_to_the_decoded_text(
    make_decoder: MakeDecoder, tokenizer: TextTokenizer, text: str, prompt: str
) -> None:
    decoder = make_decoder(tokenizer, tokenizer.encode(prompt + "x"))
    assert "".join(map(decoder.push, bytewise(tokenizer, text))) == text


@each_kind
@given(ids=st.lists(st.integers(3, 399), max_size=120), prompt=st.lists(st.integers(3, 399), min_size=1, max_size=8))
def test_any_ids_give_the_text_that_decoding_them_at_once_gives(
    make_decoder: MakeDecoder, tokenizer: TextTokenizer, ids: list[int], prompt: list[int]
) -> None:
    # A prompt that ends inside a character would join with what follows, so it is closed by a letter.
    prompt += tokenizer.encode("x")
    decoder = make_decoder(tokenizer, prompt)
    together = "".join(map(decoder.push, ids))
    assert together == tokenizer.decode(ids).rstrip("\ufffd")


@given(ids=st.lists(st.one_of(st.integers(3, 263), st.integers(259, 263)), max_size=60))
@settings(max_examples=300)
def test_a_decoder_with_byte_fallback_keeps_its_spaces_and_characters(
    llama_like: TextTokenizer, ids: list[int]
) -> None:
    prompt = [1, 260]  # "<s> hello"
    before = llama_like.decode(prompt)
    decoder = incremental_decoder(llama_like, prompt)
    together = "".join(map(decoder.push, ids))
    whole = llama_like.decode(prompt + ids)
    if "\ufffd" not in whole:  # bytes that never become a character are replaced run by run, and runs differ
        assert before + together == whole


@each_kind
def test_a_character_comes_with_the_token_that_completes_it(
    make_decoder: MakeDecoder, tokenizer: TextTokenizer
) -> None:
    decoder = make_decoder(tokenizer, tokenizer.encode("x"))
    assert list(map(decoder.push, bytewise(tokenizer, "a🦅b"))) == ["a", "", "", "", "🦅", "b"]


def test_text_before_an_incomplete_character_is_not_lost(tokenizer: TextTokenizer) -> None:
    text = Detokenizer(tokenizer, tokenizer.encode("x"), ())
    for id_ in bytewise(tokenizer, "ab北")[:-1]:
        text.push(id_)
    assert text.text == "ab"


@each_kind
def test_an_invalid_byte_is_shown_once_a_character_follows(make_decoder: MakeDecoder, tokenizer: TextTokenizer) -> None:
    continuation, letter = bytewise(tokenizer, "é")[1], bytewise(tokenizer, "a")[0]
    decoder = make_decoder(tokenizer, tokenizer.encode("x"))
    assert [decoder.push(continuation), decoder.push(letter)] == ["", "\ufffda"]


def test_a_long_run_of_incomplete_characters_is_decoded_in_pieces(tokenizer: TextTokenizer) -> None:
    # Each token ends with the first byte of the next character: nothing is ever complete at a token's end.
    first, *rest = bytewise(tokenizer, "é")
    ids = [first] + [id_ for _ in range(300) for id_ in (*rest, first)]
    decoder = WindowDecoder(tokenizer, tokenizer.encode("x"))
    pieces = [decoder.push(ids[0])] + [decoder.push(id_) for id_ in ids[1:]]
    assert "".join(pieces) == "é" * 300
    assert len(decoder._window) < 100


def test_special_tokens_show_their_literal_text_but_are_no_part_of_the_text(tokenizer: TextTokenizer) -> None:
    text = Detokenizer(tokenizer, tokenizer.encode("x"), ())
    pieces = [text.push(id_) for id_ in [*tokenizer.encode("hi"), EOS_ID, *tokenizer.encode("there")]]
    assert "".join(piece.text for piece in pieces) == f"hi{EOS_TOKEN}there"
    assert [piece.text for piece in pieces if piece.is_special] == [EOS_TOKEN]
    assert text.text == "hithere"


@each_kind
def test_an_unknown_id_has_no_text(make_decoder: MakeDecoder, tokenizer: TextTokenizer) -> None:
    decoder = make_decoder(tokenizer, tokenizer.encode("x"))
    ids = [*tokenizer.encode("a"), 5000, *tokenizer.encode("b")]
    assert list(map(decoder.push, ids)) == ["a", "", "b"]


@given(
    ids=st.lists(st.one_of(st.integers(0, 399), st.integers(100, 255), st.sampled_from([EOS_ID, 5000])), max_size=60),
    prompt=st.lists(st.integers(0, 399), min_size=1, max_size=8),
)
@settings(max_examples=300)
def test_both_kinds_of_decoder_give_the_same(tokenizer: TextTokenizer, ids: list[int], prompt: list[int]) -> None:
    by_bytes, by_window = ByteDecoder(tokenizer, prompt), WindowDecoder(tokenizer, prompt)
    assert list(map(by_bytes.push, ids)) == list(map(by_window.push, ids))


def test_each_tokenizer_has_the_decoder_that_fits(tokenizer: TextTokenizer, llama_like: TextTokenizer) -> None:
    assert isinstance(incremental_decoder(tokenizer, [3]), ByteDecoder)
    assert isinstance(incremental_decoder(llama_like, [1]), WindowDecoder)


def test_the_bundled_models_tokens_are_bytes() -> None:
    bundled = load_tokenizer(bundled_folder())
    assert bundled.is_byte_level
    for id_ in range(bundled.vocab_size):
        assert bundled.token_piece(id_).raw.decode("utf-8", "replace") == bundled.decode([id_])


PIECES = st.lists(st.text(alphabet="ab", max_size=4), max_size=20)
STOPS = st.lists(st.text(alphabet="ab", min_size=1, max_size=5), min_size=1, max_size=4)


@given(pieces=PIECES, stops=STOPS)
@settings(max_examples=500)
def test_a_stop_string_is_found_exactly_where_brute_force_finds_it(pieces: list[str], stops: list[str]) -> None:
    text = "".join(pieces)
    ends = [at + len(stop) for stop in stops for at in range(len(text)) if text.startswith(stop, at)]
    finder = StopFinder(stops)
    length = 0
    for piece in pieces:
        kept = finder.push(piece)
        if kept is not None:
            assert length + kept == min(ends)
            return
        length += len(piece)
    assert not ends


@given(text=st.text(alphabet="ab é", max_size=30), stops=STOPS)
def test_a_choice_ends_at_the_token_that_completes_a_stop_string(
    tokenizer: TextTokenizer, text: str, stops: list[str]
) -> None:
    detokenizer = Detokenizer(tokenizer, tokenizer.encode("x"), stops)
    pieces = []
    for id_ in bytewise(tokenizer, text):
        pieces.append(detokenizer.push(id_))
        if pieces[-1].is_stop:
            break
    seen = "".join(piece.text for piece in pieces)
    assert detokenizer.text == seen
    assert any(seen.endswith(stop) for stop in stops) == bool(pieces and pieces[-1].is_stop)
    assert all(stop not in seen[:-1] for stop in stops)


def test_the_text_is_cut_after_a_stop_string_that_ends_inside_a_token(tokenizer: TextTokenizer) -> None:
    (the,) = tokenizer.encode(" the")
    text = Detokenizer(tokenizer, tokenizer.encode("x"), ("th",))
    piece = text.push(the)
    assert (piece.text, piece.is_stop, text.text) == (" th", True, " th")


def test_a_stop_string_may_lie_across_many_tokens(tokenizer: TextTokenizer) -> None:
    text = Detokenizer(tokenizer, tokenizer.encode("x"), ("photographer",))
    stops = [text.push(id_).is_stop for id_ in bytewise(tokenizer, "a photographer")]
    assert stops == [False] * 13 + [True]
    assert text.text == "a photographer"


def test_the_prompt_is_never_part_of_a_match(tokenizer: TextTokenizer) -> None:
    text = Detokenizer(tokenizer, tokenizer.encode("photo"), ("photographer",))
    assert not any(text.push(id_).is_stop for id_ in tokenizer.encode("grapher"))


def test_a_stop_string_may_be_a_special_token(tokenizer: TextTokenizer) -> None:
    text = Detokenizer(tokenizer, tokenizer.encode("x"), ("<|user|>",))
    assert [text.push(id_).is_stop for id_ in [*tokenizer.encode("hi"), 1]][-1]
    assert text.text == "hi"


def test_an_empty_stop_string_ends_after_the_first_token(tokenizer: TextTokenizer) -> None:
    text = Detokenizer(tokenizer, tokenizer.encode("x"), ("",))
    piece = text.push(tokenizer.encode(" the")[0])
    assert (piece.text, piece.is_stop) == (" the", True)

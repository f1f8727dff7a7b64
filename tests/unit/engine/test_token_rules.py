"""The rules about ids, against their definitions written out and in the cases at their edges."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gyrfalcon.engine import token_rules
from gyrfalcon.engine.interface import EngineRequest, SamplingParams

EOS = 9
TEXTS = st.lists(st.integers(0, 3), min_size=1, max_size=12)


def request(prompt: list[int], max_new_tokens: int = 20, min_new_tokens: int = 0, **sampling: object) -> EngineRequest:
    return EngineRequest(
        request_id="r",
        prompt_ids=tuple(prompt),
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens,
        stop_token_ids=(EOS,),
        sampling=SamplingParams(**sampling),  # type: ignore[arg-type]
    )


def ids(values: list[int]) -> np.ndarray:
    return np.array(values, dtype=np.int32)


def banned(asked: EngineRequest, generated: list[int] | None = None) -> set[int]:
    return set(token_rules.banned_ids(asked, ids([*asked.prompt_ids, *(generated or [])])).tolist())


def ngrams(text: list[int], size: int) -> set[tuple[int, ...]]:
    return {tuple(text[start : start + size]) for start in range(len(text) - size + 1)}


@given(prompt=TEXTS, generated=st.lists(st.integers(0, 3), max_size=12), size=st.integers(1, 15))
def test_no_id_that_completes_an_ngram_of_the_text_is_left(prompt: list[int], generated: list[int], size: int) -> None:
    text = prompt + generated
    wanted = {
        next_id for next_id in range(4) if len(text) + 1 >= size and (*text, next_id)[-size:] in ngrams(text, size)
    }
    assert banned(request(prompt, no_repeat_ngram_size=size), generated) == wanted


@given(prompt=TEXTS, generated=st.lists(st.integers(0, 3), max_size=12), size=st.integers(1, 15))
def test_ngrams_of_the_prompt_alone_are_banned_for_the_encoder_rule(
    prompt: list[int], generated: list[int], size: int
) -> None:
    known, text = ngrams(prompt, size), prompt + generated
    wanted = {next_id for next_id in range(4) if len(text) + 1 >= size and (*text, next_id)[-size:] in known}
    assert banned(request(prompt, encoder_no_repeat_ngram_size=size), generated) == wanted


def test_unigrams_ban_every_token_seen_the_stop_id_too() -> None:
    assert banned(request([4, 7, EOS], no_repeat_ngram_size=1), [7, 2]) == {4, 7, EOS, 2}
    assert banned(request([4, 7, EOS], encoder_no_repeat_ngram_size=1), [7, 2]) == {4, 7, EOS}


@given(
    words=st.lists(st.lists(st.integers(0, 3), max_size=4).map(tuple), max_size=8), prompt=TEXTS, generated=st.just([2])
)
def test_the_last_id_of_a_bad_word_is_banned_where_the_text_ends_with_the_rest(
    words: list[tuple[int, ...]], prompt: list[int], generated: list[int]
) -> None:
    text = prompt + generated
    wanted = {word[-1] for word in words if word and (len(word) == 1 or tuple(text[-len(word) + 1 :]) == word[:-1])}
    assert banned(request(prompt, bad_words_ids=tuple(words)), generated) == wanted


def test_a_bad_word_may_begin_another_and_reach_into_the_prompt() -> None:
    asked = request([5, 1], bad_words_ids=((1, 2), (1, 2, 3), (5, 1, 6), (7, 5, 1, 8)))
    assert banned(asked) == {2, 6}
    assert banned(asked, [2]) == {3}
    assert banned(request([1], bad_words_ids=((2, 1, 3), (0, 0, 0, 0)))) == set()


def test_a_bad_word_that_is_the_stop_id_alone_is_void_but_one_that_ends_in_it_is_not() -> None:
    asked = request([1, 2], bad_words_ids=((EOS,), (2, EOS)))
    assert banned(asked) == {EOS}
    assert banned(asked, [3]) == set()
    assert banned(request([1], bad_words_ids=((EOS,),))) == set()


def test_stop_ids_are_banned_until_there_are_enough_tokens() -> None:
    asked = request([1, 2], min_new_tokens=2)
    assert [banned(asked, [3] * count) for count in range(4)] == [{EOS}, {EOS}, set(), set()]


def test_biases_of_one_id_add_up_and_the_last_of_equal_phrases_counts() -> None:
    asked = request(
        [4, 5], sequence_bias=(((6,), 1.0), ((5, 6), 2.5), ((6,), 10.0), ((3, 6), 100.0), ((4, 5, 7), -1.0))
    )
    found, weights = token_rules.biased_ids(asked, ids([4, 5]))
    assert dict(zip(found.tolist(), weights.tolist(), strict=True)) == {6: 12.5, 7: -1.0}
    found, weights = token_rules.biased_ids(asked, ids([4, 5, 3]))
    assert dict(zip(found.tolist(), weights.tolist(), strict=True)) == {6: 110.0}


def test_the_first_token_is_forced_after_a_prompt_of_one_token_only() -> None:
    for prompt, wanted in (([1], (7,)), ([1, 2], ())):
        assert token_rules.forced_ids(request(prompt, forced_bos_token_id=7), len(prompt)) == wanted
    assert token_rules.forced_ids(request([1], forced_bos_token_id=7), 2) == ()


def test_the_last_token_within_the_limit_is_forced_and_wins_over_the_first() -> None:
    asked = request([1, 2], max_new_tokens=3, forced_eos_token_ids=(8, 9))
    assert [token_rules.forced_ids(asked, length) for length in (2, 3, 4)] == [(), (), (8, 9)]
    both = request([1], max_new_tokens=1, forced_bos_token_id=7, forced_eos_token_ids=(8,))
    assert token_rules.forced_ids(both, 1) == (8,)


def test_tokens_are_suppressed_always_or_at_the_beginning_which_a_forced_token_moves() -> None:
    asked = request([1, 2], suppress_tokens=(3,), begin_suppress_tokens=(4, 5))
    assert [token_rules.suppressed_ids(asked, length).tolist() for length in (2, 3)] == [[3, 4, 5], [3]]
    forced = request([1], begin_suppress_tokens=(4,), forced_bos_token_id=7)
    assert [token_rules.suppressed_ids(forced, length).tolist() for length in (1, 2, 3)] == [[], [4], []]


def test_the_end_is_hastened_by_a_power_that_stays_finite() -> None:
    asked = request([1, 2], exponential_decay_length_penalty=(2, 1.5))
    assert [token_rules.decay(asked, length) for length in (2, 4, 5, 6)] == [0.0, 0.0, 0.5, 1.25]
    for factor in (1e30, 1e300):
        steep = request([1, 2], exponential_decay_length_penalty=(0, factor))
        assert np.isfinite(np.float32(token_rules.decay(steep, 9)))
    assert token_rules.decay(request([1], exponential_decay_length_penalty=(0, 0.0)), 2) == -1.0


def test_neutral_parameters_make_no_lists() -> None:
    asked = request([1, 2, 1])
    assert token_rules.banned_ids(asked, ids([1, 2, 1])).size == 0
    assert token_rules.biased_ids(asked, ids([1, 2, 1]))[0].size == 0
    assert token_rules.suppressed_ids(asked, 3).size == 0
    assert token_rules.forced_ids(asked, 3) == ()


@pytest.mark.parametrize("rule", ["bad_words_ids", "sequence_bias"])
def test_what_is_prepared_for_a_request_goes_with_it(rule: str) -> None:
    value = {"bad_words_ids": ((1, 2),), "sequence_bias": (((1, 2), 1.0),)}[rule]
    asked = request([1], **{rule: value})
    for _ in range(3):
        token_rules.banned_ids(asked, ids([1]))
        token_rules.biased_ids(asked, ids([1]))
    gc.collect()  # of other tests, whose traces may still hold theirs
    params, before = weakref.ref(asked.sampling), len(token_rules._tables)
    del asked
    gc.collect()
    assert params() is None
    assert len(token_rules._tables) == before - 1

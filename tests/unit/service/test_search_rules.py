from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from gyrfalcon.engine.interface import BeamParams, EarlyStopping, EngineFacts, SamplingParams, WatermarkParams
from gyrfalcon.errors import InvalidRequest, NotSupported
from gyrfalcon.service.interface import GenerateCall
from gyrfalcon.service.search_rules import check_ids
from gyrfalcon.service.validation import Limits, ValidCall, check, count_choices, count_sequences, fit, resolve_limits

LIMITS = Limits(max_total_tokens=100, max_input_tokens=80)
GROUPS = {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0}


def call(**parameters: Any) -> GenerateCall:
    return GenerateCall(**{"prompt": "hello", **parameters})


def valid(limits: Limits = LIMITS, **parameters: Any) -> ValidCall:
    return check(call(**parameters), limits, WatermarkParams())


@pytest.mark.parametrize(
    ("parameter", "given"),
    [
        ("num_beams", {"num_beams": 0}),
        ("num_beams", {"num_beams": -1}),
        ("num_beams", {"num_beams": 17}),
        ("num_return_sequences", {"num_beams": 2, "num_return_sequences": 3}),
        ("num_return_sequences", {"num_beams": 2, "num_return_sequences": 3, "do_sample": True}),
        ("num_return_sequences", {"num_beams": 2, "num_return_sequences": 0}),
        ("num_return_sequences", {"num_beams": 1, "num_return_sequences": 2}),
        ("best_of", {"num_beams": 2, "best_of": 2, "do_sample": True}),
        ("num_beam_groups", {**GROUPS, "num_beam_groups": 3}),
        ("num_beam_groups", {**GROUPS, "num_beam_groups": 8}),
        ("num_beam_groups", {**GROUPS, "num_beam_groups": 0}),
        ("num_beam_groups", {**GROUPS, "do_sample": True}),
        ("num_beam_groups", {**GROUPS, "temperature": 0.5}),
        ("diversity_penalty", {**GROUPS, "diversity_penalty": 0.0}),
        ("diversity_penalty", {**GROUPS, "diversity_penalty": None}),
        ("diversity_penalty", {**GROUPS, "diversity_penalty": -1.0}),
        ("diversity_penalty", {**GROUPS, "diversity_penalty": float("nan")}),
        ("diversity_penalty", {**GROUPS, "diversity_penalty": 1e300}),
        ("diversity_penalty", {"num_beams": 4, "diversity_penalty": 1.0}),
        ("length_penalty", {"length_penalty": 10.5}),
        ("length_penalty", {"length_penalty": float("-inf")}),
        ("length_penalty", {"length_penalty": float("nan")}),
        ("early_stopping", {"early_stopping": "always"}),
        ("stop", {"num_beams": 2, "stop": ("x",)}),
        ("top_n", {"num_beams": 2, "top_n": 1}),
        ("encoder_repetition_penalty", {"encoder_repetition_penalty": 0.0}),
        ("encoder_repetition_penalty", {"encoder_repetition_penalty": -2.0}),
        ("encoder_repetition_penalty", {"encoder_repetition_penalty": 1e-44}),
        ("encoder_repetition_penalty", {"encoder_repetition_penalty": float("nan")}),
        ("bad_words_ids", {"bad_words_ids": ()}),
        ("bad_words_ids", {"bad_words_ids": ((1,),) * 1001}),
        ("bad_words_ids", {"bad_words_ids": ((1,) * 65,)}),
        ("sequence_bias", {"sequence_bias": ()}),
        ("sequence_bias", {"sequence_bias": (((), 1.0),)}),
        ("sequence_bias", {"sequence_bias": (((1,), float("nan")),)}),
        ("sequence_bias", {"sequence_bias": (((1,), 1e31),)}),
        ("sequence_bias", {"sequence_bias": (((1,), 1.0),) * 301}),
        ("sequence_bias", {"sequence_bias": (((1,) * 65, 1.0),)}),
        ("suppress_tokens", {"suppress_tokens": (1,) * 1001}),
        ("begin_suppress_tokens", {"begin_suppress_tokens": (1,) * 1001}),
        ("forced_eos_token_id", {"forced_eos_token_id": ()}),
        ("exponential_decay_length_penalty", {"exponential_decay_length_penalty": (-1, 1.5)}),
        ("exponential_decay_length_penalty", {"exponential_decay_length_penalty": (2**31, 1.5)}),
        ("exponential_decay_length_penalty", {"exponential_decay_length_penalty": (1, 0.0)}),
        ("exponential_decay_length_penalty", {"exponential_decay_length_penalty": (1, float("inf"))}),
        ("min_p", {"min_p": -0.1}),
        ("min_p", {"min_p": 1.1}),
        ("epsilon_cutoff", {"epsilon_cutoff": 1.0}),
        ("epsilon_cutoff", {"epsilon_cutoff": 1 - 1e-12}),
        ("eta_cutoff", {"eta_cutoff": float("nan")}),
    ],
)
def test_a_broken_rule_names_its_parameter(parameter: str, given: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as raised:
        valid(**given)
    assert raised.value.parameter == parameter
    assert f"`{parameter}`" in str(raised.value)


@pytest.mark.parametrize(
    ("parameter", "given"),
    [
        ("stop_token_ids", {"stop_token_ids": (10,)}),
        ("bad_words_ids", {"bad_words_ids": ((1, 2), (3, -1))}),
        ("sequence_bias", {"sequence_bias": (((1,), 1.0), ((2, 10), 1.0))}),
        ("suppress_tokens", {"suppress_tokens": (10,)}),
        ("begin_suppress_tokens", {"begin_suppress_tokens": (-1,)}),
        ("forced_bos_token_id", {"forced_bos_token_id": 10}),
        ("forced_eos_token_id", {"forced_eos_token_id": (1, 10**30)}),
        ("pad_token_id", {"pad_token_id": -1}),
        ("forced_bos_token_id", {"forced_bos_token_id": 4, "suppress_tokens": (4, 5)}),
        ("forced_eos_token_id", {"forced_eos_token_id": (4, 5), "suppress_tokens": (5, 4)}),
    ],
)
def test_ids_must_be_the_models_and_possible(parameter: str, given: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as raised:
        check_ids(call(**given), 10)
    assert raised.value.parameter == parameter


def test_ids_within_the_model_pass() -> None:
    check_ids(
        call(
            stop_token_ids=(9,),
            bad_words_ids=((0, 9), ()),
            sequence_bias=(((9,), 1.0),),
            suppress_tokens=(4,),
            forced_eos_token_id=(4, 5),
            pad_token_id=0,
        ),
        10,
    )


def test_a_call_that_says_nothing_asks_for_nothing() -> None:
    made = valid(seed=1)
    assert made.beams is None
    assert made.sampling == SamplingParams(seed=1)


def test_beams_are_no_more_than_the_engine_computes_together() -> None:
    facts = EngineFacts(
        vocab_size=10,
        max_context=100,
        max_total_tokens=100,
        cache_tokens=400,
        cache_bytes=0,
        weight_bytes=0,
        num_parameters=0,
        dtype="float32",
        device="cpu",
    )
    assert resolve_limits(facts, max_batch_size=4).max_beams == 4
    assert resolve_limits(facts, max_concurrent_requests=3).max_beams == 3


def test_words_without_ids_are_void() -> None:
    assert valid(bad_words_ids=((), (1, 2))).sampling.bad_words_ids == ((1, 2),)


@pytest.mark.parametrize("size", [-3, 0, 101, 10**30])
def test_n_grams_that_cannot_come_again_are_off(size: int) -> None:
    sampling = valid(no_repeat_ngram_size=size, encoder_no_repeat_ngram_size=size).sampling
    assert (sampling.no_repeat_ngram_size, sampling.encoder_no_repeat_ngram_size) == (0, 0)


class TestBeams:
    def test_all_of_a_searchs_parameters(self) -> None:
        made = valid(**GROUPS, length_penalty=-2.0, early_stopping=True, pad_token_id=3, num_return_sequences=3)
        assert made.num_choices == 3
        assert not made.sampling.do_sample
        assert made.beams == BeamParams(
            num_beams=4,
            num_beam_groups=2,
            diversity_penalty=1.0,
            length_penalty=-2.0,
            early_stopping=EarlyStopping.TRUE,
            padding_id=3,
        )

    @pytest.mark.parametrize(
        ("asked", "mode"),
        [
            (None, EarlyStopping.FALSE),
            (False, EarlyStopping.FALSE),
            (True, EarlyStopping.TRUE),
            ("never", EarlyStopping.NEVER),
        ],
    )
    def test_early_stopping(self, asked: bool | str | None, mode: EarlyStopping) -> None:
        beams = valid(num_beams=2, early_stopping=asked).beams
        assert beams is not None
        assert beams.early_stopping is mode

    def test_several_sequences_of_beams_need_no_sampling(self) -> None:
        assert valid(num_beams=4, num_return_sequences=4).num_choices == 4

    def test_more_than_independent_samples_may_be_returned(self) -> None:
        assert valid(num_beams=16, num_return_sequences=16).num_choices == 16

    def test_with_one_beam_a_groups_members_are_without_effect(self) -> None:
        made = valid(num_beams=1, num_beam_groups=3, diversity_penalty=1.0, early_stopping="never", length_penalty=2.0)
        assert made.beams is None

    def test_every_beam_takes_a_permit(self) -> None:
        asked = call(num_beams=6, num_return_sequences=2)
        assert (count_choices(asked, LIMITS), count_sequences(asked, LIMITS)) == (2, 6)
        assert count_sequences(call(best_of=3), LIMITS) == 3

    def test_all_beams_must_fit_the_cache_together(self) -> None:
        limits = replace(LIMITS, cache_tokens=120)
        with pytest.raises(InvalidRequest, match="120 tokens") as raised:
            fit(valid(limits, num_beams=8, max_new_tokens=50), range(20), 0, limits)
        assert raised.value.parameter == "num_beams"
        assert fit(valid(limits, num_beams=2, max_new_tokens=50), range(20), 0, limits).max_new_tokens == 50


class TestCutOffs:
    @pytest.mark.parametrize("name", ["min_p", "epsilon_cutoff", "eta_cutoff"])
    def test_one_above_zero_implies_sampling(self, name: str) -> None:
        sampling = valid(**{name: 0.25}).sampling
        assert sampling.do_sample
        assert getattr(sampling, name) == 0.25
        assert not valid(**{name: 0.0}).sampling.do_sample
        assert valid(**{name: 0.25}, num_return_sequences=2).num_choices == 2

    @pytest.mark.parametrize("name", ["min_p", "epsilon_cutoff", "eta_cutoff"])
    def test_greedy_leaves_it_without_effect(self, name: str) -> None:
        sampling = valid(**{name: 7.0}, do_sample=False).sampling
        assert not sampling.do_sample
        assert getattr(sampling, name) == 0.0


def test_what_a_search_cannot_know_is_not_supported() -> None:
    with pytest.raises(NotSupported):
        valid(num_beams=2, stop=("x",))

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from gyrfalcon.engine.core import CoreLimits, EngineCore, StepOutcome
from gyrfalcon.engine.interface import EngineFacts, EngineRequest, WatermarkParams
from gyrfalcon.errors import InvalidRequest, PromptTooLong, SettingsError
from gyrfalcon.service.interface import ChatMessage, ChatPrompt, GenerateCall, TokenPrompt
from gyrfalcon.service.validation import (
    FittedPrompt,
    Limits,
    ValidCall,
    check,
    check_encodable,
    count_choices,
    fit,
    resolve_limits,
)
from gyrfalcon.testing.executor import FakeExecutor

LIMITS = Limits(max_total_tokens=100, max_input_tokens=80)
FACTS = EngineFacts(
    vocab_size=10,
    max_context=2048,
    max_total_tokens=1000,
    cache_tokens=4000,
    cache_bytes=0,
    weight_bytes=0,
    num_parameters=0,
    dtype="float32",
    device="cpu",
)


def valid(limits: Limits = LIMITS, **parameters: Any) -> ValidCall:
    return check(GenerateCall(**{"prompt": "hello", **parameters}), limits, WatermarkParams())


def fitted(num_tokens: int, *, prefix: int = 0, limits: Limits = LIMITS, **parameters: Any) -> FittedPrompt:
    return fit(valid(limits, **parameters), range(num_tokens), prefix, limits)


@pytest.mark.parametrize(
    ("parameter", "value", "also"),
    [
        ("temperature", 0.0, {}),
        ("temperature", -1.0, {}),
        ("temperature", 1e-60, {}),
        ("temperature", 1e39, {}),
        ("repetition_penalty", 0.0, {}),
        ("repetition_penalty", -0.5, {}),
        ("repetition_penalty", 1e300, {}),
        ("frequency_penalty", 2.01, {}),
        ("frequency_penalty", -2.01, {}),
        ("top_p", 0.0, {}),
        ("top_p", 1.01, {}),
        ("top_p", -0.1, {}),
        ("top_p", 1e-50, {}),
        ("typical_p", 0.0, {}),
        ("typical_p", 1.5, {}),
        ("top_k", 0, {}),
        ("top_k", -3, {}),
        ("top_k", 2**31, {}),
        ("seed", -1, {}),
        ("seed", 2**64, {}),
        ("seed", 3, {"best_of": 2, "do_sample": True}),
        ("max_new_tokens", 0, {}),
        ("max_new_tokens", -1, {}),
        ("max_length", 0, {}),
        ("stop", tuple("abcdefghi"), {}),
        ("stop", ("x" * 257,), {}),
        ("stop", ("\ud800",), {}),
        ("best_of", 5, {"do_sample": True}),
        ("best_of", -1, {"do_sample": True}),
        ("best_of", 2, {}),
        ("best_of", 2, {"do_sample": False, "temperature": 0.5}),
        ("num_return_sequences", 0, {}),
        ("num_return_sequences", 9, {"do_sample": True}),
        ("num_return_sequences", 2, {"do_sample": False}),
        ("num_return_sequences", 2, {"do_sample": True, "best_of": 2}),
        ("top_n", 21, {}),
        ("top_n", -1, {}),
        ("truncate", 0, {}),
        ("truncate", 81, {}),
        ("prompt", "", {}),
        ("prompt", "a\ud800b", {}),
        ("prompt", "x" * 1601, {}),
        ("prompt", TokenPrompt(()), {}),
        ("prefix", "a", {"prompt": TokenPrompt((1,))}),
        ("prefix", "\udc00", {}),
    ],
)
def test_a_value_outside_its_rule_is_refused_by_name(parameter: str, value: object, also: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest) as refused:
        valid(**{parameter: value, **also})
    assert refused.value.parameter == parameter
    assert f"`{parameter}`" in str(refused.value)


@pytest.mark.parametrize(
    "parameters",
    [
        {"temperature": 1e-6},
        {"temperature": 100.0},
        {"top_p": 1.0},
        {"typical_p": 1},
        {"top_p": 0.01},
        {"top_k": 1},
        {"top_k": 2**31 - 1},
        {"seed": 0},
        {"seed": 2**64 - 1},
        {"frequency_penalty": -2.0},
        {"frequency_penalty": 2},
        {"stop": tuple("abcdefgh")},
        {"stop": ("x" * 256,)},
        {"stop": ("",)},
        {"best_of": 0},
        {"best_of": 4, "temperature": 0.5},
        {"best_of": 2, "temperature": 1.0},
        {"top_n": 20},
        {"top_n": 0},
        {"truncate": 80},
        {"max_new_tokens": 100000},
        {"prompt": "x" * 1600},
    ],
)
def test_a_value_at_its_limit_is_accepted(parameters: dict[str, Any]) -> None:
    valid(**parameters)


@pytest.mark.parametrize(
    ("parameters", "does_sample"),
    [
        ({}, False),
        ({"do_sample": True}, True),
        ({"temperature": 1.0}, False),
        ({"temperature": 0.7}, True),
        ({"temperature": 1.5}, True),
        ({"top_k": 5}, True),
        ({"top_p": 0.9}, True),
        ({"top_p": 1.0}, False),
        ({"typical_p": 0.9}, True),
        ({"typical_p": 1.0}, False),
        ({"repetition_penalty": 1.3}, False),
        ({"do_sample": False, "temperature": 0.7, "top_k": 5}, False),
    ],
)
def test_sampling_is_asked_for_or_implied(parameters: dict[str, Any], does_sample: bool) -> None:
    assert valid(**parameters).sampling.do_sample is does_sample


def test_an_explicit_greedy_call_leaves_sampling_parameters_without_effect_and_unjudged() -> None:
    sampling = valid(do_sample=False, temperature=0.0, top_k=-1, top_p=7.0, typical_p=-2.0).sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.typical_p) == (1.0, 0, 1.0, 1.0)


def test_parameters_reach_the_engine_unchanged() -> None:
    watermark = WatermarkParams(gamma=0.25)
    call = GenerateCall(
        prompt="hello",
        temperature=0.5,
        top_k=10,
        top_p=0.95,
        typical_p=0.9,
        repetition_penalty=1.03,
        frequency_penalty=0.5,
        seed=7,
        watermark=True,
    )
    sampling = check(call, LIMITS, watermark).sampling
    assert sampling.watermark is watermark
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.typical_p) == (0.5, 10, 0.95, 0.9)
    assert (sampling.repetition_penalty, sampling.frequency_penalty, sampling.seed) == (1.03, 0.5, 7)


def test_without_a_watermark_asked_for_there_is_none() -> None:
    assert valid().sampling.watermark is None


def test_an_absent_seed_is_drawn_anew_and_survives_doubles() -> None:
    seeds = {valid(do_sample=True).sampling.seed for _ in range(20)}
    assert len(seeds) == 20
    assert all(int(float(seed)) == seed for seed in seeds)


def test_best_of_above_one_on_a_server_without_it_says_that_it_is_disabled() -> None:
    limits = Limits(max_total_tokens=100, max_input_tokens=80, max_best_of=1)
    with pytest.raises(InvalidRequest, match="disabled"):
        count_choices(GenerateCall(prompt="x", best_of=2, do_sample=True), limits)


def test_checks_come_in_order() -> None:
    order = ["temperature", "repetition_penalty", "frequency_penalty", "top_p", "top_k", "max_new_tokens", "stop"]
    wrong: dict[str, Any] = {
        "temperature": 0.0,
        "repetition_penalty": 0.0,
        "frequency_penalty": 9.0,
        "top_p": 2.0,
        "top_k": 0,
        "max_new_tokens": 0,
        "stop": ("a",) * 9,
    }
    for name in order:
        with pytest.raises(InvalidRequest) as refused:
            valid(**wrong)
        assert refused.value.parameter == name
        del wrong[name]
    valid(**wrong)


def test_a_conversation_needs_messages_of_encodable_text() -> None:
    with pytest.raises(InvalidRequest) as refused:
        valid(prompt=ChatPrompt(()))
    assert refused.value.parameter == "messages"
    with pytest.raises(InvalidRequest, match="U\\+DC00"):
        valid(prompt=ChatPrompt((ChatMessage("user", "\udc00"),)))
    with pytest.raises(InvalidRequest, match="1024"):
        valid(prompt=ChatPrompt((ChatMessage("user", ""),) * 1025))


def test_the_place_of_a_lone_surrogate_is_named() -> None:
    with pytest.raises(InvalidRequest, match=r"U\+D83D at character 2"):
        check_encodable("prompt", "ab\ud83dc")


class TestLengths:
    def test_the_default_applies_when_nothing_is_said(self) -> None:
        assert fitted(10).max_new_tokens == 20

    def test_the_default_never_makes_a_request_too_long(self) -> None:
        limits = Limits(max_total_tokens=100, max_input_tokens=99)
        assert fitted(95, limits=limits).max_new_tokens == 5

    def test_without_a_default_the_context_is_filled(self) -> None:
        limits = Limits(max_total_tokens=100, max_input_tokens=80, default_max_new_tokens=None)
        assert fitted(10, limits=limits).max_new_tokens == 90

    def test_exactly_what_fits_is_admitted_and_one_more_is_not(self) -> None:
        assert fitted(60, max_new_tokens=40).max_new_tokens == 40
        with pytest.raises(PromptTooLong) as refused:
            fitted(60, max_new_tokens=41)
        assert (refused.value.length, refused.value.max_new_tokens, refused.value.limit) == ("60 tokens", 41, 100)

    def test_far_more_than_fits_is_admitted_where_1024_fit_and_ends_with_the_context(self) -> None:
        limits = Limits(max_total_tokens=2000, max_input_tokens=1999)
        assert fitted(976, limits=limits, max_new_tokens=100_000).max_new_tokens == 1024
        with pytest.raises(PromptTooLong) as refused:
            fitted(977, limits=limits, max_new_tokens=100_000)
        assert refused.value.max_new_tokens == 1024

    def test_a_prompt_beyond_the_input_limit_is_refused_even_with_room_for_new_tokens(self) -> None:
        assert fitted(80, max_new_tokens=1).max_new_tokens == 1
        with pytest.raises(PromptTooLong) as refused:
            fitted(81, max_new_tokens=1)
        assert (refused.value.limit, refused.value.max_new_tokens) == (80, None)

    def test_a_prompt_that_fills_the_context_is_told_the_total_also_without_max_new_tokens(self) -> None:
        with pytest.raises(PromptTooLong) as refused:
            fitted(100)
        assert (refused.value.limit, refused.value.max_new_tokens) == (100, 1)

    def test_max_length_counts_the_prompt_but_not_its_prefix(self) -> None:
        assert fitted(10, max_length=30).max_new_tokens == 20
        assert fitted(10, prefix=4, max_length=30).max_new_tokens == 24

    def test_max_new_tokens_wins_over_max_length(self) -> None:
        assert fitted(10, max_length=11, max_new_tokens=5).max_new_tokens == 5

    def test_a_prompt_that_fills_max_length_is_refused_by_that_name(self) -> None:
        with pytest.raises(InvalidRequest) as refused:
            fitted(30, max_length=30)
        assert refused.value.parameter == "max_length"

    def test_minimums_count_new_tokens_and_stay_below_the_maximum(self) -> None:
        assert fitted(10, min_new_tokens=3).min_new_tokens == 3
        assert fitted(10, min_length=15).min_new_tokens == 5
        assert fitted(10, min_length=15, min_new_tokens=1).min_new_tokens == 1
        assert fitted(10, min_length=-5).min_new_tokens == 0
        assert fitted(10, min_length=9999).min_new_tokens == 20

    @pytest.mark.parametrize("also", [{}, {"max_new_tokens": 20}, {"max_length": 30}])
    def test_a_minimum_of_new_tokens_above_the_maximum_is_refused(self, also: dict[str, int]) -> None:
        assert fitted(10, min_new_tokens=20, **also).min_new_tokens == 20
        with pytest.raises(InvalidRequest, match="20. Given: 21") as refused:
            fitted(10, min_new_tokens=21, **also)
        assert refused.value.parameter == "min_new_tokens"

    def test_dropping_the_start_keeps_the_prompts_end(self) -> None:
        kept = fitted(95, drop_start_to_fit=True, max_new_tokens=30)
        assert kept.ids == tuple(range(25, 95))
        assert kept.max_new_tokens == 30

    def test_dropping_the_start_changes_nothing_where_all_fits(self) -> None:
        assert fitted(50, drop_start_to_fit=True, max_new_tokens=30).ids == tuple(range(50))

    def test_dropping_the_start_is_refused_where_no_prompt_would_be_left(self) -> None:
        with pytest.raises(InvalidRequest) as refused:
            fitted(50, drop_start_to_fit=True, max_new_tokens=100)
        assert refused.value.parameter == "max_new_tokens"

    def test_a_prompt_without_tokens_is_refused(self) -> None:
        with pytest.raises(InvalidRequest):
            fitted(0)


class TestResolveLimits:
    def test_the_engine_decides_what_the_settings_leave_open(self) -> None:
        limits = resolve_limits(FACTS)
        assert (limits.max_total_tokens, limits.max_input_tokens) == (1000, 999)

    def test_settings_are_taken(self) -> None:
        limits = resolve_limits(
            FACTS,
            max_total_tokens=500,
            max_input_tokens=300,
            max_concurrent_requests=7,
            max_best_of=3,
            max_stop_sequences=2,
            max_top_n_tokens=1,
            default_max_new_tokens=None,
        )
        assert (limits.max_total_tokens, limits.max_input_tokens) == (500, 300)
        assert (limits.max_concurrent_requests, limits.max_best_of) == (7, 3)
        assert (limits.max_stop_sequences, limits.max_top_n_tokens) == (2, 1)
        assert limits.default_max_new_tokens is None

    def test_best_of_never_exceeds_the_sequences_that_may_run(self) -> None:
        assert resolve_limits(FACTS, max_concurrent_requests=2).max_best_of == 2

    @pytest.mark.parametrize(
        ("settings", "flag"),
        [
            ({"max_total_tokens": 1001}, "--max-total-tokens"),
            ({"max_total_tokens": 1}, "--max-total-tokens"),
            ({"max_total_tokens": 0}, "--max-total-tokens"),
            ({"max_input_tokens": 1000}, "--max-input-tokens"),
            ({"max_input_tokens": 0}, "--max-input-tokens"),
            ({"max_input_tokens": 50, "max_total_tokens": 50}, "--max-input-tokens"),
            ({"max_concurrent_requests": 0}, "--max-concurrent-requests"),
            ({"max_best_of": 0}, "--max-best-of"),
            ({"max_stop_sequences": -1}, "--max-stop-sequences"),
            ({"max_top_n_tokens": -1}, "--max-top-n-tokens"),
            ({"default_max_new_tokens": 0}, "--default-max-new-tokens"),
        ],
    )
    def test_contradictions_name_the_flag(self, settings: dict[str, Any], flag: str) -> None:
        with pytest.raises(SettingsError) as refused:
            resolve_limits(FACTS, **settings)
        assert refused.value.setting == flag


class TestSequencesThatShareTheCache:
    """Nine blocks of four tokens; a prompt of ten has two whole blocks, which its sequences share."""

    LIMITS = Limits(max_total_tokens=36, max_input_tokens=35, cache_tokens=36, block_size=4)

    @pytest.mark.parametrize(("num_choices", "most"), [(1, 26), (2, 10), (3, 6), (4, 2)])
    def test_as_many_new_tokens_as_their_own_blocks_hold(self, num_choices: int, most: int) -> None:
        wanted: dict[str, Any] = {"best_of": num_choices, "do_sample": True, "limits": self.LIMITS}
        assert fitted(10, max_new_tokens=most, **wanted).max_new_tokens == most
        with pytest.raises(InvalidRequest) as refused:
            fitted(10, max_new_tokens=most + 1, **wanted)
        if num_choices > 1:
            assert refused.value.parameter == "best_of"
            assert f"each may have {most} new ones" in str(refused.value)

    def test_the_bound_is_that_of_the_engine(self) -> None:
        core = EngineCore(FakeExecutor(num_blocks=10, block_size=4), CoreLimits())
        for num_choices in range(1, 5):
            for num_prompt in range(1, 30):
                for max_new in range(1, 37 - num_prompt):
                    outcome = StepOutcome()
                    request = EngineRequest(
                        request_id="r",
                        prompt_ids=tuple(range(num_prompt)),
                        max_new_tokens=max_new,
                        num_choices=num_choices,
                    )
                    core.submit(request, outcome)
                    core.abort("r")
                    try:
                        fitted(
                            num_prompt, limits=self.LIMITS, best_of=num_choices, do_sample=True, max_new_tokens=max_new
                        )
                        is_refused = False
                    except InvalidRequest:
                        is_refused = True
                    assert is_refused == bool(outcome.failures), (num_choices, num_prompt, max_new)

    def test_filling_the_context_takes_what_there_is(self) -> None:
        limits = replace(self.LIMITS, default_max_new_tokens=None)
        assert fitted(10, limits=limits, num_return_sequences=2, do_sample=True).max_new_tokens == 10
        with pytest.raises(InvalidRequest) as refused:
            fitted(33, limits=limits, num_return_sequences=2, do_sample=True)
        assert refused.value.parameter == "num_return_sequences"

    def test_no_more_of_them_than_the_batch_has_places(self) -> None:
        limits = resolve_limits(FACTS, max_batch_size=2)
        with pytest.raises(InvalidRequest, match="<= 2. Given: 3"):
            count_choices(GenerateCall(prompt="x", best_of=3, do_sample=True), limits)
        with pytest.raises(InvalidRequest, match="<= 2. Given: 3"):
            count_choices(GenerateCall(prompt="x", num_return_sequences=3, do_sample=True), limits)

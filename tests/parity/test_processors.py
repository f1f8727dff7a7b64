"""All processors and warpers together against transformers' own list of them, in the order in which it makes it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, reject, settings
from hypothesis import strategies as st
from transformers import GenerationConfig, GenerationMixin, LogitsProcessor, LogitsProcessorList, PretrainedConfig
from transformers import logging as transformers_logging
from transformers.generation import (
    EncoderRepetitionPenaltyLogitsProcessor,
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    LogitNormalization,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from gyrfalcon.engine.interface import EngineRequest, SamplingParams
from gyrfalcon.engine.plan import Draw, gather_samples
from gyrfalcon.engine.sequence import SequenceGroup
from gyrfalcon.runner.interface import SamplingColumns
from gyrfalcon.runner.logits import process_logits
from gyrfalcon.runner.sampler import warped_groups

transformers_logging.set_verbosity_error()

STOP_IDS = (2, 7)
WARPERS = (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    MinPLogitsWarper,
    TypicalLogitsWarper,
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    LogitNormalization,
)
BEFORE_FREQUENCY = (
    SequenceBiasLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)


class Generator(GenerationMixin):
    """What transformers needs of a model to make its list of processors."""

    config = PretrainedConfig()


class FrequencyPenalty(LogitsProcessor):
    """TGI's, which transformers does not have."""

    def __init__(self, penalty: float) -> None:
        self.penalty = penalty

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        counts = torch.bincount(input_ids[0], minlength=scores.shape[1])
        return scores - self.penalty * counts / input_ids.shape[1]


def reference(request: EngineRequest, num_beams: int) -> LogitsProcessorList:
    """transformers' list for the request."""
    params = request.sampling
    given: dict[str, Any] = {
        name: getattr(params, name)
        for name in (
            *("encoder_repetition_penalty", "repetition_penalty", "no_repeat_ngram_size", "remove_invalid_values"),
            *("encoder_no_repeat_ngram_size", "forced_bos_token_id", "temperature", "top_k", "top_p", "min_p"),
            *("typical_p", "epsilon_cutoff", "eta_cutoff", "renormalize_logits", "do_sample"),
        )
    }
    for name, value in (
        ("sequence_bias", [[list(ids), bias] for ids, bias in params.sequence_bias]),
        ("bad_words_ids", [list(word) for word in params.bad_words_ids]),
        ("forced_eos_token_id", list(params.forced_eos_token_ids)),
        ("suppress_tokens", list(params.suppress_tokens)),
        ("begin_suppress_tokens", list(params.begin_suppress_tokens)),
        ("exponential_decay_length_penalty", params.exponential_decay_length_penalty),
    ):
        given[name] = value or None
    num_prompt_tokens = len(request.prompt_ids)
    config = GenerationConfig(
        **given,
        num_beams=num_beams,
        min_new_tokens=request.min_new_tokens,
        max_length=num_prompt_tokens + request.max_new_tokens,
    )
    config._eos_token_tensor = torch.tensor(request.stop_token_ids)
    made = Generator()._get_logits_processor(config, num_prompt_tokens, torch.tensor([request.prompt_ids]))
    if params.frequency_penalty:
        place = sum(type(processor) in BEFORE_FREQUENCY for processor in made)
        made.insert(place, FrequencyPenalty(params.frequency_penalty))
    return made


def columns_of(cases: list[tuple[EngineRequest, list[int]]], keep: int = 1) -> SamplingColumns:
    draws = []
    for row, (request, generated) in enumerate(cases):
        group = SequenceGroup(request, arrival_s=0.0, salt="")
        for token_id in generated:
            group.sequences[0].append(token_id)
        draws.append(Draw(row, group, group.sequences[0].token_ids, 0))
    columns = gather_samples(draws)
    columns.keep_S[:] = keep
    return columns


def processed(scores_SV: torch.Tensor, columns: SamplingColumns) -> tuple[torch.Tensor, torch.Tensor]:
    """Our scores before and after the warpers."""
    before = process_logits(scores_SV.clone(), columns, np.zeros(len(scores_SV), dtype=np.int32))
    after = torch.full_like(before, -torch.inf)
    for group in warped_groups(before, columns):
        where = torch.from_numpy(group.samples_G)[:, None]
        after[where, group.ids_GM] = group.scores_GM
    return before, after


def drawable(scores_1V: torch.Tensor) -> torch.Tensor:
    """The scores in order. What was -inf before invalid values were removed is it again: it cannot be drawn either."""
    return scores_1V.masked_fill(scores_1V < -1e38, -torch.inf).sort().values


def assert_equal(request: EngineRequest, generated: list[int], scores_V: torch.Tensor, num_beams: int = 1) -> None:
    """Scores after all processors, and after the warpers: equal values, and nothing survives but what should."""
    ids, wanted = torch.tensor([[*request.prompt_ids, *generated]]), scores_V[None].clone()
    processors = reference(request, num_beams)
    for processor in processors:
        if not isinstance(processor, WARPERS) or isinstance(processor, TemperatureLogitsWarper):
            wanted = processor(ids, wanted)
    if not torch.isfinite(wanted.amax()):
        reject()  # transformers cannot draw from it
    keep = 1 if num_beams == 1 else len(STOP_IDS) + 1
    if request.sampling.min_p and wanted.amax() - wanted.topk(keep).values[0, -1] > 80:
        reject()  # probabilities of 0 in single precision, by which transformers tells which tokens to keep
    before, after = processed(scores_V[None], columns_of([(request, generated)], keep))
    torch.testing.assert_close(before, wanted, rtol=2e-6, atol=1e-5)
    for processor in processors:
        if isinstance(processor, WARPERS) and not isinstance(processor, TemperatureLogitsWarper):
            wanted = processor(ids, wanted)
    # Which of equal scores survive a cut between them is nobody's promise: values are compared in order, then each
    # survivor with what it was.
    torch.testing.assert_close(drawable(after), drawable(wanted), rtol=2e-6, atol=1e-5)
    if not request.sampling.renormalize_logits:
        survivors = after > -torch.inf
        assert torch.equal(after[survivors], before[survivors])


def token_ids(width: int) -> st.SearchStrategy[int]:
    return st.integers(0, width - 1)


def singles(low: float, high: float) -> st.SearchStrategy[float]:
    """Numbers that single precision holds: what the columns are."""
    return st.floats(float(np.float32(low)), float(np.float32(high)), width=32)


@st.composite
def requests(draw: st.DrawFn, width: int = 12) -> tuple[EngineRequest, list[int]]:
    """A request with some of all rules and settings, and what it has generated so far."""
    few_ids = st.lists(token_ids(width), max_size=3).map(tuple)
    phrases = st.lists(token_ids(width), min_size=1, max_size=3).map(tuple)
    options: dict[str, st.SearchStrategy[Any]] = {
        "sequence_bias": st.dictionaries(phrases, singles(-20, 20), max_size=5).map(lambda made: tuple(made.items())),
        "encoder_repetition_penalty": singles(0.1, 10),
        "repetition_penalty": singles(0.1, 10),
        "frequency_penalty": singles(-2, 2),
        "no_repeat_ngram_size": st.integers(0, 5),
        "encoder_no_repeat_ngram_size": st.integers(0, 5),
        "bad_words_ids": st.lists(phrases, max_size=5).map(tuple),
        "forced_bos_token_id": token_ids(width),
        "forced_eos_token_ids": few_ids.filter(bool),
        "remove_invalid_values": st.booleans(),
        "exponential_decay_length_penalty": st.tuples(st.integers(0, 3), singles(0, 2)),
        "suppress_tokens": few_ids,
        "begin_suppress_tokens": few_ids,
        "temperature": singles(0.1, 10),
        "top_k": st.integers(0, 2 * width),
        "top_p": singles(0, 1),
        "min_p": singles(0, 1),
        "typical_p": singles(0.01, 1),
        "epsilon_cutoff": singles(0, 0.5),
        "eta_cutoff": singles(0, 0.5),
        "renormalize_logits": st.booleans(),
        "do_sample": st.booleans(),
    }
    names = draw(st.sets(st.sampled_from(sorted(options))))
    values = {name: draw(options[name]) for name in sorted(names)}
    # transformers refuses to force what it suppresses.
    suppressed = {*values.get("suppress_tokens", ()), *values.get("begin_suppress_tokens", ())}
    assume(values.get("forced_bos_token_id") not in suppressed)
    assume(not suppressed.intersection(values.get("forced_eos_token_ids", ())))
    max_new_tokens = draw(st.integers(1, 8))
    request = EngineRequest(
        request_id="r",
        prompt_ids=tuple(draw(st.lists(token_ids(5), min_size=1, max_size=8))),
        max_new_tokens=max_new_tokens,
        min_new_tokens=draw(st.integers(0, 4)),
        stop_token_ids=STOP_IDS,
        sampling=SamplingParams(**values),
    )
    return request, draw(st.lists(token_ids(5), max_size=max_new_tokens - 1))


def random_scores(seed: int, width: int, scale: float = 3.0) -> torch.Tensor:
    return scale * torch.randn(width, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=400)
@given(case=requests(), seed=st.integers(0, 2**32), is_beam=st.booleans())
def test_any_combination_is_that_of_transformers(
    case: tuple[EngineRequest, list[int]], seed: int, is_beam: bool
) -> None:
    request, generated = case
    scores = random_scores(seed, 12)
    assert_equal(request, generated, scores.log_softmax(-1) if is_beam else scores, num_beams=2 if is_beam else 1)


@settings(max_examples=60)
@given(case=requests(width=1000), seed=st.integers(0, 2**32), scale=st.sampled_from([0.5, 3.0, 10.0]))
def test_any_combination_is_that_of_transformers_over_a_wide_vocabulary(
    case: tuple[EngineRequest, list[int]], seed: int, scale: float
) -> None:
    assert_equal(*case, random_scores(seed, 1000, scale))


@settings(max_examples=60)
@given(
    case=requests(), poisoned=st.dictionaries(token_ids(12), st.sampled_from([np.nan, np.inf, -np.inf]), max_size=12)
)
def test_invalid_values_are_removed_as_transformers_removes_them(
    case: tuple[EngineRequest, list[int]], poisoned: dict[int, float]
) -> None:
    request, generated = case
    # Its bad words and biases add to what is invalid, where ours name what becomes of it: left out here.
    changes = {"remove_invalid_values": True, "bad_words_ids": (), "sequence_bias": (), "temperature": 1.0}
    fields = {name: getattr(request.sampling, name) for name in SamplingParams.__struct_fields__}
    sampling = SamplingParams(**{**fields, **changes})
    request = EngineRequest(
        **{**{name: getattr(request, name) for name in EngineRequest.__struct_fields__}, "sampling": sampling}
    )
    scores = random_scores(0, 12)
    for token_id, value in poisoned.items():
        scores[token_id] = value
    assert_equal(request, generated, scores)


@settings(max_examples=60)
@given(cases=st.lists(requests(width=1000), min_size=2, max_size=6), seed=st.integers(0, 2**32))
def test_every_case_has_the_same_bits_alone_and_among_others(
    cases: list[tuple[EngineRequest, list[int]]], seed: int
) -> None:
    scores = torch.stack([random_scores(seed + index, 1000) for index in range(len(cases))])
    together = processed(scores, columns_of(cases))
    for index, case in enumerate(cases):
        alone = processed(scores[index : index + 1], columns_of([case]))
        for ours, mixed in zip(alone, together, strict=True):
            assert torch.equal(ours[0], mixed[index])


@pytest.mark.parametrize("num_generated", [0, 1, 2, 3])
def test_forced_tokens_stand_where_transformers_puts_them(num_generated: int) -> None:
    for prompt in ((1,), (1, 3)):
        request = EngineRequest(
            request_id="r",
            prompt_ids=prompt,
            max_new_tokens=4,
            stop_token_ids=STOP_IDS,
            sampling=SamplingParams(forced_bos_token_id=5, forced_eos_token_ids=(3, 7), begin_suppress_tokens=(1, 4)),
        )
        assert_equal(request, [4] * num_generated, random_scores(1, 12))

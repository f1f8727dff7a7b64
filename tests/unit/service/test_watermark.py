"""Finding a watermark: the statistics against exact arithmetic, and what they promise against drawn keys."""

from __future__ import annotations

import math
import random
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, processors

from gyrfalcon.engine.interface import WatermarkParams
from gyrfalcon.errors import InvalidRequest, UnknownModel
from gyrfalcon.metrics import Metrics
from gyrfalcon.service.generation import GenerationService
from gyrfalcon.service.interface import DetectCall, Detection, GenerateCall, TokenPrompt
from gyrfalcon.service.models import ModelTable, load_served_model
from gyrfalcon.service.tokenizer import TextTokenizer, load_tokenizer
from gyrfalcon.service.validation import check, resolve_limits
from gyrfalcon.service.watermark import MAX_CHARS, MAX_IDS, MAX_KEYS, corrected, detect, p_value, z_score
from gyrfalcon.splitmix import are_green
from gyrfalcon.testing.engine import FakeEngine
from gyrfalcon.testing.text import EOS_ID, EOS_TOKEN, text_service, write_tokenizer

NUM_IDS = 4000
KEY = 424242


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return load_tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture
def find(tokenizer: TextTokenizer) -> Any:
    def run(text: str | list[int], settings: WatermarkParams | None = None, **call: Any) -> Detection:
        content = text if isinstance(text, str) else TokenPrompt(tuple(text))
        return detect(
            DetectCall(text=content, **call),
            model="tiny",
            tokenizer=tokenizer,
            num_ids=NUM_IDS,
            settings=settings or WatermarkParams(key=KEY),
        )

    return run


def random_ids(length: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(NUM_IDS), k=length)


def green_ids(length: int, seed: int, key: int = KEY, gamma: float = 0.5, share: float = 1.0) -> list[int]:
    """Random ids of which this share is drawn from the green list of the one before."""
    rng = random.Random(seed)
    ids = [rng.randrange(NUM_IDS)]
    while len(ids) < length:
        id_ = rng.randrange(NUM_IDS)
        if rng.random() >= share or are_green(key, gamma, np.array([ids[-1]]), np.array([id_]))[0]:
            ids.append(id_)
    return ids


@given(st.integers(1, 80).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.sampled_from([0.1, 0.5, 0.7]))
def test_the_p_value_is_the_binomial_tail(counts: tuple[int, int], gamma: float) -> None:
    num_green, n = counts
    chance = Fraction(gamma)
    exact = sum(
        (math.comb(n, k) * chance**k * (1 - chance) ** (n - k) for k in range(num_green, n + 1)), start=Fraction(0)
    )
    assert p_value(num_green, n, gamma) == pytest.approx(float(exact), rel=1e-10)


@pytest.mark.parametrize("num_green", [4999, 5000, 5200, 5800, 10_000])
def test_the_p_value_is_exact_for_long_texts_too(num_green: int) -> None:
    n, total, term = 10_000, 0, 1
    for k in range(n, num_green - 1, -1):  # C(n, k) from the top down
        total += term
        term = term * k // (n - k + 1)
    exact = float(Fraction(total, 2**n))
    assert p_value(num_green, n, 0.5) == pytest.approx(exact, rel=1e-9)


def test_the_z_score_counts_standard_deviations() -> None:
    assert z_score(50, 100, 0.5) == 0.0
    assert z_score(60, 100, 0.5) == pytest.approx(2.0)
    assert z_score(40, 100, 0.25) == pytest.approx(15 / math.sqrt(18.75))


@pytest.mark.parametrize(("p", "tests", "wanted"), [(0.01, 1, 0.01), (0.5, 2, 0.75), (1.0, 16, 1.0), (1e-30, 4, 4e-30)])
def test_the_correction_is_the_chance_of_the_smallest_of_several(p: float, tests: int, wanted: float) -> None:
    assert corrected(p, tests) == pytest.approx(wanted)


def test_green_tokens_are_counted_and_flagged(find: Any) -> None:
    ids = green_ids(60, seed=1)
    found = find(ids)
    (score,) = found.keys
    assert (found.is_found, found.reason, found.num_scored) == (True, None, 59)
    assert (score.num_green, score.green_fraction) == (59, 1.0)
    assert score.green == (None, *[True] * 59)
    assert score.p_value == score.corrected_p_value == pytest.approx(0.5**59)
    assert [token.id for token in found.tokens] == ids
    assert [token.is_scored for token in found.tokens] == [False, *[True] * 59]


def test_a_text_without_the_mark_is_not_found(find: Any) -> None:
    found = find(random_ids(200, seed=2))
    assert found.is_found is False
    assert abs(found.keys[0].z_score) < 3
    assert found.keys[0].green_fraction == pytest.approx(0.5, abs=0.1)


def test_the_right_one_of_several_keys_is_named_and_the_threshold_is_shared(find: Any) -> None:
    found = find(green_ids(100, seed=3), keys=(1, KEY, 3))
    assert [score.is_found for score in found.keys] == [False, True, False]
    assert found.is_found
    assert found.keys[1].corrected_p_value == pytest.approx(3 * found.keys[1].p_value)


def test_the_servers_key_and_gamma_hold_where_the_call_names_none(find: Any) -> None:
    settings = WatermarkParams(key=77, gamma=0.25)
    ids = green_ids(50, seed=4, key=77, gamma=0.25)
    assert find(ids, settings).keys == find(ids, keys=(77,), gamma=0.25).keys
    assert find(ids, settings).gamma == 0.25
    assert find(ids).keys != find(ids, settings).keys


def test_a_prompt_gives_the_first_token_a_context(find: Any, tokenizer: TextTokenizer) -> None:
    ids = green_ids(30, seed=5)
    without, given = find(ids[1:]), find(ids[1:], prompt=TokenPrompt((5, ids[0])))
    assert (without.num_scored, given.num_scored) == (28, 29)
    assert (without.keys[0].green[0], given.keys[0].green[0]) == (None, True)
    assert find("the people", prompt="My name").num_scored == len(tokenizer.encode("the people"))


def test_the_context_is_the_prompt_s_last_token(find: Any) -> None:
    before, text = 5, random_ids(20, seed=10)
    after = {
        flag: next(id_ for id_ in range(NUM_IDS) if are_green(KEY, 0.5, np.array([id_]), np.array(text[:1]))[0] == flag)
        for flag in (True, False)
    }
    for flag, last in after.items():
        assert find(text, prompt=TokenPrompt((after[not flag], before, last))).keys[0].green[0] is flag


def test_a_prompt_has_the_special_tokens_of_generation_and_a_text_has_none(
    tmp_path: Path, tokenizer: TextTokenizer
) -> None:
    folder = write_tokenizer(tmp_path)
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    marks = [(EOS_TOKEN, EOS_ID)]
    backend.post_processor = processors.TemplateProcessing(single=f"$A {EOS_TOKEN}", special_tokens=marks)
    backend.save(str(folder / "tokenizer.json"))
    ids, last = tokenizer.encode("the people"), tokenizer.encode("My name")[-1]
    # A key under which it matters which of the two tokens comes before the text.
    key = next(key for key in range(99) if np.diff(are_green(key, 0.5, np.array([EOS_ID, last]), np.array(ids[:1])))[0])
    found = detect(
        DetectCall(text="the people", prompt="My name"),
        model="tiny",
        tokenizer=load_tokenizer(folder),
        num_ids=NUM_IDS,
        settings=WatermarkParams(key=key),
    )
    assert [token.id for token in found.tokens] == ids
    colours = are_green(key, 0.5, np.array([EOS_ID, *ids[:-1]]), np.array(ids))
    assert found.keys[0].green == tuple(colours.tolist())


def test_text_is_scored_as_the_tokenizer_s_ids_without_special_tokens(find: Any, tokenizer: TextTokenizer) -> None:
    text = "The falcon flies over the hills, déjà vu."
    found = find(text)
    assert [token.id for token in found.tokens] == tokenizer.encode(text, add_special_tokens=False)
    assert found.keys == find([token.id for token in found.tokens]).keys


def test_a_pair_of_tokens_is_evidence_once(find: Any) -> None:
    ids = [1, 2, 3, 1, 2, 3, 1, 2, 4]
    found = find(ids)
    assert [token.is_scored for token in found.tokens] == [False, True, True, True, False, False, False, False, True]
    assert find(ids, ignore_repeated=False).num_scored == 8


def test_counting_repeated_pairs_would_find_what_is_not_there(find: Any) -> None:
    ids = [7, 8, 9] * 60
    keys = np.random.default_rng(0).integers(0, 2**64, 64, dtype=np.uint64).tolist()
    honest = [find(ids, keys=(key,)).is_found for key in keys]
    fooled = [find(ids, keys=(key,), ignore_repeated=False).is_found for key in keys]
    assert set(honest) == {None}  # three pairs say nothing
    assert sum(fooled) >= 4  # all three are green by chance for one key in eight


@pytest.mark.parametrize("gamma", [0.25, 0.5])
def test_false_positives_come_at_the_rate_that_was_asked_for(find: Any, gamma: float) -> None:
    rng = np.random.default_rng(1)
    trials, alpha = 3200, 0.02
    ids = random_ids(120, seed=6)
    found = 0
    for _ in range(trials // MAX_KEYS):
        keys = tuple(rng.integers(0, 2**64, MAX_KEYS, dtype=np.uint64).tolist())
        found += sum(score.p_value <= alpha for score in find(ids, keys=keys, gamma=gamma).keys)
    spread = math.sqrt(trials * alpha)
    # A count is whole, so the rate lies below alpha, by less than a step of the count.
    assert trials * alpha / 2.5 - 4 * spread < found < trials * alpha + 4 * spread


def test_many_keys_together_keep_the_rate(find: Any) -> None:
    rng = np.random.default_rng(2)
    calls = [tuple(rng.integers(0, 2**64, 10, dtype=np.uint64).tolist()) for _ in range(400)]
    ids = random_ids(150, seed=7)
    found = [find(ids, keys=keys, alpha=0.05) for keys in calls]
    assert 2 <= sum(each.is_found for each in found) <= 36  # 20 expected at most; without the correction about 100
    assert sum(any(score.p_value <= 0.05 for score in each.keys) for each in found) > 60


@pytest.mark.parametrize(("num_keys", "needed"), [(1, 14), (16, 18)])
def test_a_text_too_short_to_be_found_is_left_undecided(find: Any, num_keys: int, needed: int) -> None:
    keys = (KEY, *range(num_keys - 1))
    short, enough = find(green_ids(needed, seed=8), keys=keys), find(green_ids(needed + 1, seed=8), keys=keys)
    assert (short.num_scored, short.is_found, {score.is_found for score in short.keys}) == (needed - 1, None, {None})
    assert short.reason is not None
    assert f"{needed - 1} tokens can be scored" in short.reason
    assert short.reason.endswith(f"it takes {needed}")
    assert enough.is_found is True


def test_one_token_has_no_score_at_all(find: Any) -> None:
    (score,) = find([3]).keys
    assert (score.green_fraction, score.z_score, score.p_value, score.num_green) == (None, None, 1.0, 0)


@pytest.mark.parametrize(
    ("call", "parameter", "message"),
    [
        ({"alpha": 0.0}, "alpha", "Given: 0.0"),
        ({"alpha": 1.0}, "alpha", "Given: 1.0"),
        ({"alpha": math.nan}, "alpha", "Given: nan"),
        ({"alpha": 5e-324}, "alpha", ">= 1e-100"),
        ({"gamma": 0.0}, "gamma", "Given: 0.0"),
        ({"gamma": 1.0}, "gamma", "Given: 1.0"),
        ({"gamma": math.nan}, "gamma", "Given: nan"),
        ({"gamma": 1e-60}, "gamma", "single precision"),
        ({"gamma": 1 - 1e-12}, "gamma", "single precision"),
        ({"keys": ()}, "keys", "1 to 16 entries. Given: 0"),
        ({"keys": tuple(range(17))}, "keys", "1 to 16 entries. Given: 17"),
        ({"keys": (987654321987654321, -1)}, "keys", "entry 1 is not"),
        ({"keys": (2**64,)}, "keys", "entry 0 is not"),
        ({"keys": (5, 6, 5)}, "keys", "entry 2 is the same as entry 0"),
        ({"prompt": ""}, "prompt", "must not be empty"),
        ({"prompt": TokenPrompt(())}, "prompt_token_ids", "must not be empty"),
        ({"prompt": TokenPrompt((NUM_IDS,))}, "prompt_token_ids", "holds 4000 at position 0; the model's ids are 0 to"),
    ],
)
def test_bad_parameters_are_named(find: Any, call: dict[str, Any], parameter: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as refused:
        find([1, 2, 3], **call)
    assert refused.value.parameter == parameter
    assert f"`{parameter}`" in str(refused.value)
    assert "987654321987654321" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "parameter", "message"),
    [
        ("", "text", "must not be empty"),
        ("x\ud800", "text", "lone surrogate"),
        ([], "token_ids", "must not be empty"),
        ([1, -1], "token_ids", "holds -1 at position 1"),
        ([1, 2, 2**80], "token_ids", "at position 2; the model's ids are 0 to 3999"),
    ],
)
def test_bad_texts_are_named(find: Any, text: Any, parameter: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as refused:
        find(text)
    assert refused.value.parameter == parameter


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (WatermarkParams(delta=0.0), "with this server's delta of 0.0 green tokens gain nothing"),
        (WatermarkParams(delta=1e-60), "delta of 1e-60"),
        (WatermarkParams(gamma=1e-60), "with this server's gamma of 1e-60 all tokens have one colour"),
        (WatermarkParams(gamma=1 - 1e-12), "all tokens have one colour"),
    ],
)
def test_a_watermark_that_would_mark_nothing_is_refused_instead_of_dropped(
    settings: WatermarkParams, message: str
) -> None:
    limits = resolve_limits(FakeEngine().facts)
    with pytest.raises(InvalidRequest, match=message) as refused:
        check(GenerateCall(prompt="x", watermark=True), limits, settings)
    assert refused.value.parameter == "watermark"
    assert check(GenerateCall(prompt="x"), limits, settings).sampling.watermark is None


class TestService:
    @pytest.fixture
    def service(self, tmp_path: Path) -> Any:
        return text_service(FakeEngine(), write_tokenizer(tmp_path))[0]

    async def test_it_scores_by_the_served_model_s_ids_and_settings(self, service: Any) -> None:
        ids = random_ids(40, seed=9)
        found = await service.detect(DetectCall(text=TokenPrompt(tuple(id_ % 512 for id_ in ids))))
        assert (found.model, found.gamma, found.alpha, len(found.keys)) == ("tiny", 0.5, 1e-4, 1)
        with pytest.raises(InvalidRequest, match="ids are 0 to 511"):
            await service.detect(DetectCall(text=TokenPrompt((512,))))

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (DetectCall(text="x" * (MAX_CHARS + 1)), "`text` may have 200000 characters. Given: 200001"),
            (DetectCall(text="x", prompt="x" * (MAX_CHARS + 1)), "`prompt` may have 200000 characters"),
            (DetectCall(text=TokenPrompt((1,) * (MAX_IDS + 1))), "`token_ids` may have 50000 token ids. Given: 50001"),
        ],
        ids=["text", "prompt", "ids"],
    )
    async def test_what_is_too_long_is_refused_before_it_is_read(
        self, service: Any, call: DetectCall, message: str
    ) -> None:
        with pytest.raises(InvalidRequest, match=message):
            await service.detect(call)

    async def test_an_unknown_model_is_refused(self, tmp_path: Path) -> None:
        engine = FakeEngine()
        served = load_served_model("tiny", write_tokenizer(tmp_path), engine, resolve_limits(engine.facts))
        service = GenerationService(ModelTable([served], strict_names=True), Metrics(), max_concurrent_requests=1)
        with pytest.raises(UnknownModel, match="`other`"):
            await service.detect(DetectCall(text="x", model="other"))

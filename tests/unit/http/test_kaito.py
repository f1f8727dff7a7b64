from __future__ import annotations

import ast
from typing import Any

import pytest
from starlette.testclient import TestClient

from gyrfalcon.engine.interface import BeamParams, EarlyStopping, EngineState
from gyrfalcon.http.kaito_render import clean_up_spaces
from gyrfalcon.service.tokenizer import load_tokenizer
from gyrfalcon.testing.engine import FakeEngine
from gyrfalcon.testing.text import EOS_ID

from .conftest import MakeClient

PROMPT = "the people"
DOCUMENTED_DEFAULTS = {
    "max_length": 200,
    "min_length": 0,
    "do_sample": True,
    "early_stopping": False,
    "num_beams": 1,
    "num_beam_groups": 1,
    "diversity_penalty": 0.0,
    "temperature": 1.0,
    "top_k": 10,
    "top_p": 1,
    "typical_p": 1,
    "repetition_penalty": 1,
    "length_penalty": 1,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "bad_words_ids": None,
    "num_return_sequences": 1,
    "output_scores": False,
    "return_dict_in_generate": False,
    "pad_token_id": None,
    "eos_token_id": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "remove_invalid_values": None,
}
RULES: dict[str, Any] = {
    "repetition_penalty": 1.5,
    "frequency_penalty": 0.5,
    "encoder_repetition_penalty": 2,
    "no_repeat_ngram_size": 3,
    "encoder_no_repeat_ngram_size": 2,
    "bad_words_ids": [[5], [6, 7], []],
    "sequence_bias": [[[5, 6], -2.5], [[7], 3]],
    "suppress_tokens": [8, 9],
    "begin_suppress_tokens": [10],
    "forced_bos_token_id": 11,
    "forced_eos_token_id": 12,
    "exponential_decay_length_penalty": [3, 1.25],
    "remove_invalid_values": True,
    "renormalize_logits": True,
    "min_p": 0.25,
    "epsilon_cutoff": 0.125,
    "eta_cutoff": 0.0625,
}
RULES_AS_TOLD = RULES | {
    "bad_words_ids": ((5,), (6, 7)),
    "sequence_bias": (((5, 6), -2.5), ((7,), 3.0)),
    "suppress_tokens": (8, 9),
    "begin_suppress_tokens": (10,),
    "forced_eos_token_ids": (12,),
    "exponential_decay_length_penalty": (3, 1.25),
}
del RULES_AS_TOLD["forced_eos_token_id"]


class Bench:
    def __init__(self, make_client: MakeClient, folder: Any, text: str | None = None) -> None:
        self.tokenizer = load_tokenizer(folder)
        self.engine = FakeEngine(script=None if text is None else self.tokenizer.encode(text))
        self.client: TestClient = make_client(self.engine)

    def chat(self, **body: Any) -> Any:
        return self.client.post("/chat", json={"prompt": PROMPT, **body})

    def result(self, **body: Any) -> str:
        answer = self.chat(**body)
        assert answer.status_code == 200, answer.text
        assert list(answer.json()) == ["Result"]
        return str(answer.json()["Result"])

    def refusal(self, status: int = 422, **body: Any) -> Any:
        answer = self.chat(**body)
        assert answer.status_code == status, answer.text
        assert list(answer.json()) == ["detail"]
        return answer.json()["detail"]


@pytest.fixture
def bench(make_client: MakeClient, tokenizer_folder: Any) -> Bench:
    return Bench(make_client, tokenizer_folder)


@pytest.fixture
def playing(make_client: MakeClient, tokenizer_folder: Any) -> Bench:
    return Bench(make_client, tokenizer_folder, " of the town")


class TestResult:
    @pytest.mark.parametrize(("asked", "shown"), [({}, PROMPT), ({"return_full_text": None}, PROMPT)])
    def test_the_prompt_is_returned_by_default(self, playing: Bench, asked: dict[str, Any], shown: str) -> None:
        assert playing.result(**asked) == shown + " of the town"

    def test_the_prompt_is_left_out_when_declined(self, playing: Bench) -> None:
        assert playing.result(return_full_text=False) == " of the town"

    def test_the_prefix_is_used_but_never_returned(self, playing: Bench) -> None:
        assert playing.result(prefix="Look: ") == PROMPT + " of the town"
        assert list(playing.engine.requests[0].prompt_ids) == playing.tokenizer.encode("Look: " + PROMPT)

    def test_sequences_are_joined_each_with_its_prompt(self, playing: Bench) -> None:
        text = playing.result(generate_kwargs={"num_return_sequences": 3})
        assert text == (PROMPT + " of the town") * 3

    def test_spaces_are_cleaned_up_when_asked_for(self, make_client: MakeClient, tokenizer_folder: Any) -> None:
        bench = Bench(make_client, tokenizer_folder, " is n't it ? yes .")
        assert bench.result(clean_up_tokenization_spaces=True, return_full_text=False) == " isn't it? yes."
        assert bench.result(clean_up_tokenization_spaces=False, return_full_text=False) == " is n't it ? yes ."

    def test_special_tokens_are_no_part_of_it(self, make_client: MakeClient, tokenizer_folder: Any) -> None:
        bench = Bench(make_client, tokenizer_folder, "a<|user|>b")
        assert bench.result(return_full_text=False) == "ab"

    @pytest.mark.parametrize(
        ("spaced", "clean"),
        [
            ("a . b ? c ! d , e", "a. b? c! d, e"),
            ("it ' s", "it's"),
            ("do n't", "don't"),
            ("I 'm he 's we 've you 're", "I'm he's we've you're"),
            ("a : b ; c ) d", "a : b ; c ) d"),
            (" n ' t", "n't"),
        ],
    )
    def test_what_cleaning_up_means(self, spaced: str, clean: str) -> None:
        assert clean_up_spaces(spaced) == clean


class TestParameters:
    def test_the_defaults(self, bench: Bench) -> None:
        for kwargs in ({}, {"generate_kwargs": None}, {"generate_kwargs": {}}):
            bench.result(**kwargs)
        num_prompt = len(bench.tokenizer.encode(PROMPT))
        for request in bench.engine.requests:
            assert request.max_new_tokens == 200 - num_prompt
            assert request.sampling.do_sample
            assert (request.sampling.top_k, request.sampling.temperature) == (10, 1.0)
            assert (request.sampling.top_p, request.sampling.typical_p) == (1.0, 1.0)
            assert request.stop_token_ids == (EOS_ID,)

    def test_lengths_count_the_prompt(self, bench: Bench) -> None:
        num_prompt = len(bench.tokenizer.encode(PROMPT))
        bench.result(generate_kwargs={"max_length": 30, "min_length": 20})
        bench.result(generate_kwargs={"max_length": 30, "max_new_tokens": 50, "min_new_tokens": 5})
        first, second = bench.engine.requests
        assert (first.max_new_tokens, first.min_new_tokens) == (30 - num_prompt, 20 - num_prompt)
        assert (second.max_new_tokens, second.min_new_tokens) == (50, 5)

    def test_a_prefix_adds_its_own_length(self, bench: Bench) -> None:
        bench.result(prefix="Look: ", generate_kwargs={"max_length": 30})
        (request,) = bench.engine.requests
        num_prefix = len(bench.tokenizer.encode("Look: "))
        assert len(request.prompt_ids) + request.max_new_tokens == 30 + num_prefix

    def test_sampling_parameters_reach_the_engine(self, bench: Bench) -> None:
        bench.result(
            generate_kwargs={
                "temperature": 0.5,
                "top_k": 7,
                "top_p": 0.75,
                "typical_p": 0.5,
                "repetition_penalty": 2,
                "eos_token_id": 9,
                "pad_token_id": 0,
            }
        )
        (request,) = bench.engine.requests
        sampling = request.sampling
        assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.typical_p) == (0.5, 7, 0.75, 0.5)
        assert sampling.repetition_penalty == 2
        assert request.stop_token_ids == (9,)

    def test_values_that_mean_off(self, bench: Bench) -> None:
        bench.result(generate_kwargs={"top_k": 0, "top_p": 1.5, "typical_p": 2})
        sampling = bench.engine.requests[0].sampling
        assert (sampling.top_k, sampling.top_p, sampling.typical_p) == (0, 1.0, 1.0)

    def test_a_share_of_nothing_keeps_one_token(self, bench: Bench) -> None:
        bench.result(generate_kwargs={"top_p": 0, "top_k": 50})
        sampling = bench.engine.requests[0].sampling
        assert (sampling.top_k, sampling.top_p) == (1, 1.0)

    def test_greedy_leaves_sampling_parameters_without_effect(self, bench: Bench) -> None:
        bench.result(generate_kwargs={"do_sample": False, "temperature": 0, "top_k": -1, "top_p": -1, "typical_p": 0})
        assert not bench.engine.requests[0].sampling.do_sample

    def test_an_ordinary_token_that_ends_the_text_stays_in_it(self, playing: Bench) -> None:
        (the,) = playing.tokenizer.encode(" the")
        assert playing.result(generate_kwargs={"eos_token_id": the}, return_full_text=False) == " of the"

    def test_hole_drops_the_prompts_start_and_still_returns_it(self, bench: Bench) -> None:
        prompt = " the" * 200
        kwargs = {"max_new_tokens": 100}
        result = bench.result(prompt=prompt, handle_long_generation="hole", generate_kwargs=kwargs)
        assert len(bench.engine.requests[0].prompt_ids) == 156
        assert result.startswith(prompt)
        bench.refusal(prompt=prompt, generate_kwargs=kwargs)

    def test_numbers_may_come_as_text(self, bench: Bench) -> None:
        bench.result(generate_kwargs={"max_length": "30", "top_k": 3.0, "temperature": "0.5", "do_sample": "yes"})
        assert bench.engine.requests[0].sampling.top_k == 3

    def test_the_content_type_is_of_no_matter(self, bench: Bench) -> None:
        assert bench.client.post("/chat", content=b'{"prompt": "x"}').status_code == 200

    def test_unknown_members_of_the_request_are_ignored(self, bench: Bench) -> None:
        bench.result(unknown=1)

    def test_all_the_documented_defaults_ask_for_nothing_but_sampling(self, bench: Bench) -> None:
        bench.result(generate_kwargs=DOCUMENTED_DEFAULTS)
        bench.result()
        first, second = bench.engine.requests
        assert first.beams is None
        for name in first.sampling.__struct_fields__:
            if name != "seed":
                assert getattr(first.sampling, name) == getattr(second.sampling, name)

    def test_every_other_parameter_reaches_the_engine(self, bench: Bench) -> None:
        bench.result(generate_kwargs={"do_sample": True, **RULES})
        sampling = bench.engine.requests[0].sampling
        for name, value in RULES_AS_TOLD.items():
            assert getattr(sampling, name) == value

    def test_beams_reach_the_engine(self, bench: Bench) -> None:
        bench.result(
            generate_kwargs={
                "do_sample": False,
                "num_beams": 6,
                "num_beam_groups": 3,
                "diversity_penalty": 0.5,
                "length_penalty": -1,
                "early_stopping": "never",
                "num_return_sequences": 2,
                "pad_token_id": 9,
            }
        )
        (request,) = bench.engine.requests
        assert request.num_choices == 2
        assert request.beams == BeamParams(
            num_beams=6,
            num_beam_groups=3,
            diversity_penalty=0.5,
            length_penalty=-1.0,
            early_stopping=EarlyStopping.NEVER,
            padding_id=9,
        )

    def test_a_beam_search_may_sample(self, bench: Bench) -> None:
        bench.result(generate_kwargs={"num_beams": 2, "seed": 5, "temperature": 0.5})
        (request,) = bench.engine.requests
        assert request.beams == BeamParams(num_beams=2)
        assert (request.sampling.do_sample, request.sampling.seed, request.sampling.temperature) == (True, 5, 0.5)

    def test_members_of_beams_are_without_effect_with_one(self, bench: Bench) -> None:
        bench.result(generate_kwargs={"num_beam_groups": 3, "diversity_penalty": 1, "early_stopping": True})
        assert bench.engine.requests[0].beams is None

    def test_unknown_members_of_generate_kwargs_are_refused_by_name_unless_null(self, bench: Bench) -> None:
        assert "no_such_member" in bench.refusal(generate_kwargs={"no_such_member": [1]})
        assert "`temperature`" in bench.refusal(generate_kwargs={"temprature": 0.5})
        bench.result(generate_kwargs={"no_such_member": None})

    def test_a_flat_body_is_read_where_generate_kwargs_is_absent(self, bench: Bench) -> None:
        bench.result(num_beams=2, do_sample=False, max_length=30, generate_kwargs=None)
        bench.result(num_beams=2, do_sample=False, max_length=30)
        bench.result(num_beams=2, do_sample=False, generate_kwargs={"max_length": 30})
        first, second, third = bench.engine.requests
        for request in (first, second):
            assert request.beams == BeamParams(num_beams=2)
            assert len(request.prompt_ids) + request.max_new_tokens == 30
        assert third.beams is None
        assert "max_length" in str(bench.refusal(max_length=-1))


class TestConversation:
    MESSAGES = ({"role": "user", "content": "Hi"},)

    def test_the_template_is_applied_and_the_answer_is_a_message(self, playing: Bench) -> None:
        result = playing.result(prompt=None, messages=self.MESSAGES)
        assert ast.literal_eval(result) == {"role": "assistant", "content": " of the town"}
        assert list(playing.engine.requests[0].prompt_ids) == playing.tokenizer.encode("User: Hi\nAssistant:")

    def test_a_prompt_comes_first(self, playing: Bench) -> None:
        assert playing.result(messages=self.MESSAGES) == PROMPT + " of the town"

    @pytest.mark.parametrize("body", [{"prompt": None}, {"prompt": ""}, {}])
    def test_without_either_the_prompt_is_missed(self, bench: Bench, body: dict[str, Any]) -> None:
        answer = bench.client.post("/chat", json=body)
        assert (answer.status_code, answer.json()) == (400, {"detail": "Text generation parameter prompt required"})

    def test_an_empty_conversation(self, bench: Bench) -> None:
        assert bench.refusal(400, prompt=None, messages=[]) == "Conversational parameter messages required"


class TestErrors:
    @pytest.mark.parametrize(
        ("kwargs", "named"),
        [
            ({"max_length": 2}, "max_length"),
            ({"max_length": 0}, "max_length"),
            ({"max_length": None}, "max_length"),
            ({"max_length": True}, "max_length"),
            ({"max_length": 2.7}, "max_length"),
            ({"max_new_tokens": 0}, "max_new_tokens"),
            ({"temperature": 0}, "temperature"),
            ({"temperature": "nan"}, "temperature"),
            ({"temperature": "inf"}, "temperature"),
            ({"top_k": -1}, "top_k"),
            ({"top_p": -0.5}, "top_p"),
            ({"typical_p": 0}, "typical_p"),
            ({"repetition_penalty": 0}, "repetition_penalty"),
            ({"num_return_sequences": 0}, "num_return_sequences"),
            ({"num_return_sequences": 2, "do_sample": False}, "num_return_sequences"),
            ({"num_return_sequences": None}, "num_return_sequences"),
            ({"early_stopping": "later"}, "early_stopping"),
            ({"early_stopping": 2}, "early_stopping"),
            ({"num_beams": 0}, "num_beams"),
            ({"num_beams": 10**30}, "num_beams"),
            ({"num_beams": None}, "num_beams"),
            ({"num_beams": 2, "num_return_sequences": 3}, "num_return_sequences"),
            ({"num_beams": 4, "num_beam_groups": 3, "do_sample": False, "diversity_penalty": 1}, "num_beam_groups"),
            ({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1}, "num_beam_groups"),
            ({"num_beams": 4, "num_beam_groups": 2, "do_sample": False}, "diversity_penalty"),
            ({"num_beams": 4, "diversity_penalty": 1, "do_sample": False}, "diversity_penalty"),
            ({"length_penalty": "inf"}, "length_penalty"),
            ({"bad_words_ids": []}, "bad_words_ids"),
            ({"bad_words_ids": [5]}, "bad_words_ids"),
            ({"bad_words_ids": [[-1]]}, "bad_words_ids"),
            ({"bad_words_ids": [[512]]}, "bad_words_ids"),
            ({"bad_words_ids": [[True]]}, "bad_words_ids"),
            ({"suppress_tokens": [1.5]}, "suppress_tokens"),
            ({"sequence_bias": [[1, 2]]}, "sequence_bias"),
            ({"sequence_bias": [[[1], "nan"]]}, "sequence_bias"),
            ({"suppress_tokens": [512]}, "suppress_tokens"),
            ({"forced_eos_token_id": 512}, "forced_eos_token_id"),
            ({"forced_bos_token_id": -1}, "forced_bos_token_id"),
            ({"exponential_decay_length_penalty": [1]}, "exponential_decay_length_penalty"),
            ({"exponential_decay_length_penalty": 1}, "exponential_decay_length_penalty"),
            ({"min_p": 1.5}, "min_p"),
            ({"pad_token_id": 512}, "pad_token_id"),
            ({"eos_token_id": [1, 2]}, "eos_token_id"),
            ({"eos_token_id": 100_000}, "`eos_token_id` holds token id 100000"),
        ],
    )
    def test_a_broken_rule_is_a_detail_that_names_it(self, bench: Bench, kwargs: dict[str, Any], named: str) -> None:
        assert named in str(bench.refusal(generate_kwargs=kwargs))

    def test_handle_long_generation_is_null_or_hole(self, bench: Bench) -> None:
        assert "handle_long_generation" in bench.refusal(handle_long_generation="cut")

    @pytest.mark.parametrize("body", [b"", b"{", b"[]", b"3", b'"x"', b"null", b'{"prompt": 3}', b'{"messages": [1]}'])
    def test_a_body_of_the_wrong_shape_says_where(self, bench: Bench, body: bytes) -> None:
        answer = bench.client.post("/chat", content=body)
        assert answer.status_code == 422
        (detail,) = answer.json()["detail"]
        assert detail["loc"][0] == "body"
        assert set(detail) == {"loc", "msg", "type"}

    def test_too_large_a_body(self, make_client: MakeClient) -> None:
        client = make_client(payload_limit=50)
        answer = client.post("/chat", json={"prompt": "x" * 50})
        assert (answer.status_code, list(answer.json())) == (413, ["detail"])

    def test_a_failed_generation(self, make_client: MakeClient) -> None:
        answer = make_client(FakeEngine(fail_after=0)).post("/chat", json={"prompt": "x"})
        assert (answer.status_code, list(answer.json())) == (500, ["detail"])

    @pytest.mark.parametrize(("method", "path"), [("GET", "/chat"), ("DELETE", "/chat"), ("POST", "/healthz")])
    def test_a_wrong_method(self, bench: Bench, method: str, path: str) -> None:
        answer = bench.client.request(method, path)
        assert (answer.status_code, answer.json()) == (405, {"detail": "Method Not Allowed"})


def test_health(bench: Bench) -> None:
    assert bench.client.get("/healthz").json() == {"status": "Healthy"}
    bench.engine.state = EngineState.DEAD
    answer = bench.client.get("/healthz")
    assert (answer.status_code, answer.json()) == (500, {"detail": "the engine is dead"})

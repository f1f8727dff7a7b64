from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from gyrfalcon.engine.interface import EngineState
from gyrfalcon.errors import (
    EngineDead,
    GenerationFailed,
    InvalidRequest,
    Overloaded,
    PromptTooLong,
    TemplateError,
    UnknownModel,
)
from gyrfalcon.metrics import Metrics
from gyrfalcon.service.generation import GenerationService
from gyrfalcon.service.interface import (
    Caller,
    ChatMessage,
    ChatPrompt,
    Completion,
    Delta,
    FinishReason,
    GenerateCall,
    TokenPrompt,
)
from gyrfalcon.service.models import ModelTable, load_served_model
from gyrfalcon.service.tokenizer import TextTokenizer, load_tokenizer
from gyrfalcon.service.validation import resolve_limits
from gyrfalcon.testing.engine import FakeEngine
from gyrfalcon.testing.text import EOS_ID, EOS_TOKEN, text_service, write_tokenizer


class Bench:
    """A service over a fake engine, and what its metrics say."""

    def __init__(self, engine: FakeEngine, folder: Path, **options: Any) -> None:
        self.engine = engine
        self.tokenizer: TextTokenizer = load_tokenizer(folder)
        self.service, self.metrics = text_service(engine, folder, **options)

    async def complete(self, **call: Any) -> Completion:
        return await self.service.complete(GenerateCall(**{"prompt": "hello", **call}))

    async def stream(self, **call: Any) -> list[Delta]:
        async with aclosing(self.service.stream(GenerateCall(**{"prompt": "hello", **call}))) as batches:
            return [delta async for deltas in batches for delta in deltas]

    def metric(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(name, labels) or 0.0


@pytest.fixture
def bench(tokenizer_folder: Path) -> Bench:
    return Bench(FakeEngine(), tokenizer_folder)


def playing(folder: Path, text: str, **options: Any) -> Bench:
    """A bench whose engine generates this text and then ends."""
    script = load_tokenizer(folder).encode(text)
    return Bench(FakeEngine(script=script, **options), folder)


def texts(deltas: Sequence[Delta]) -> str:
    return "".join(delta.token.text for delta in deltas if not delta.token.special)


class TestOneChoice:
    async def test_ends_by_length(self, bench: Bench) -> None:
        completion = await bench.complete(max_new_tokens=7)
        (choice,) = completion.choices
        assert choice.finish_reason is FinishReason.LENGTH
        assert len(choice.tokens) == completion.num_generated_tokens == 7
        assert choice.text == bench.tokenizer.decode([token.id for token in choice.tokens]).rstrip("\ufffd")

    async def test_ends_by_end_of_sequence_which_is_a_token_but_no_text(self, tokenizer_folder: Path) -> None:
        bench = playing(tokenizer_folder, " the town")
        (choice,) = (await bench.complete(max_new_tokens=50)).choices
        assert choice.finish_reason is FinishReason.EOS
        assert choice.text == " the town"
        assert (choice.tokens[-1].id, choice.tokens[-1].text, choice.tokens[-1].special) == (EOS_ID, EOS_TOKEN, True)

    async def test_ends_by_a_stop_string_which_is_kept(self, tokenizer_folder: Path) -> None:
        bench = playing(tokenizer_folder, " the people of the town look up")
        (choice,) = (await bench.complete(max_new_tokens=50, stop=("town",))).choices
        assert choice.finish_reason is FinishReason.STOP
        assert choice.text == " the people of the town"
        assert bench.engine.aborted == [bench.engine.requests[0].request_id]

    async def test_length_comes_before_a_stop_string(self, tokenizer_folder: Path) -> None:
        bench = playing(tokenizer_folder, " the the the")
        (choice,) = (await bench.complete(max_new_tokens=2, stop=("the the",))).choices
        assert (choice.finish_reason, choice.text) == (FinishReason.LENGTH, " the the")

    async def test_end_of_sequence_comes_before_a_stop_string(self, tokenizer_folder: Path) -> None:
        bench = playing(tokenizer_folder, " the")
        (choice,) = (await bench.complete(max_new_tokens=9, stop=(EOS_TOKEN,))).choices
        assert (choice.finish_reason, choice.text) == (FinishReason.EOS, " the")

    async def test_streamed_texts_join_to_the_final_text(self, tokenizer_folder: Path) -> None:
        bench = playing(tokenizer_folder, " naïve 北京 🦅", tokens_per_batch=3)
        deltas = await bench.stream(max_new_tokens=50)
        assert [delta.index for delta in deltas] == list(range(1, len(deltas) + 1))
        assert all(delta.end is None for delta in deltas[:-1])
        end = deltas[-1].end
        assert end is not None
        assert end.text == texts(deltas) == " naïve 北京 🦅"
        assert (end.num_tokens, end.num_prompt_tokens) == (len(deltas), len(bench.tokenizer.encode("hello")))

    async def test_streaming_and_completing_give_the_same(self, bench: Bench) -> None:
        call = {"do_sample": True, "seed": 11, "max_new_tokens": 12}
        (choice,) = (await bench.complete(**call)).choices
        deltas = await bench.stream(**call)
        assert [delta.token for delta in deltas] == list(choice.tokens)
        assert deltas[-1].end is not None
        assert deltas[-1].end.text == choice.text

    async def test_the_seed_is_told_only_when_it_was_used(self, bench: Bench) -> None:
        (greedy,) = (await bench.complete(seed=5)).choices
        (sampled,) = (await bench.complete(seed=5, do_sample=True)).choices
        (drawn,) = (await bench.complete(do_sample=True)).choices
        assert (greedy.seed, sampled.seed) == (None, 5)
        assert drawn.seed == bench.engine.requests[-1].sampling.seed

    async def test_the_likeliest_tokens_have_texts(self, bench: Bench) -> None:
        (choice,) = (await bench.complete(top_n=3, max_new_tokens=2)).choices
        for token in choice.tokens:
            assert token.top is not None
            assert [entry.text for entry in token.top] == [bench.tokenizer.decode([entry.id]) for entry in token.top]
            assert len(token.top) == 3

    async def test_the_prompt_is_scored_when_asked_for(self, bench: Bench) -> None:
        scored = (await bench.complete(prompt_logprobs=True, prompt="the people")).prompt
        assert scored is not None
        assert [token.id for token in scored] == bench.tokenizer.encode("the people")
        assert scored[0].logprob is None
        assert all(token.logprob is not None for token in scored[1:])
        assert (await bench.complete()).prompt is None

    async def test_timings_add_up(self, tokenizer_folder: Path) -> None:
        bench = Bench(FakeEngine(start_s=0.02, step_s=0.002), tokenizer_folder)
        timings = (await bench.complete(max_new_tokens=3)).timings
        assert timings.queue_s == pytest.approx(0.02)
        assert timings.validation_s + timings.queue_s + timings.inference_s == pytest.approx(timings.total_s)
        assert timings.total_s >= 0.026


class TestSeveralChoices:
    async def test_the_best_by_mean_logprob_comes_first_and_the_others_in_order(self, bench: Bench) -> None:
        completion = await bench.complete(best_of=4, do_sample=True, max_new_tokens=6)
        means = {c.index: sum(t.logprob for t in c.tokens) / len(c.tokens) for c in completion.choices}
        best, *others = completion.choices
        assert best.index == min(index for index, mean in means.items() if mean == max(means.values()))
        assert [choice.index for choice in others] == sorted(choice.index for choice in others)
        assert len(means) == 4

    async def test_equals_keep_their_order(self, tokenizer_folder: Path) -> None:
        bench = playing(tokenizer_folder, " the town")
        completion = await bench.complete(best_of=3, do_sample=True)
        assert [choice.index for choice in completion.choices] == [0, 1, 2]

    async def test_sequences_that_are_not_ranked_keep_their_order(self, bench: Bench) -> None:
        completion = await bench.complete(num_return_sequences=4, do_sample=True, max_new_tokens=6)
        assert [choice.index for choice in completion.choices] == [0, 1, 2, 3]

    async def test_each_choice_has_its_own_seed(self, bench: Bench) -> None:
        completion = await bench.complete(num_return_sequences=3, do_sample=True, seed=2**64 - 2)
        assert [choice.seed for choice in completion.choices] == [2**64 - 2, 2**64 - 1, 0]

    async def test_a_stop_string_ends_one_choice_and_leaves_the_others(self, bench: Bench) -> None:
        call = {"num_return_sequences": 3, "do_sample": True, "seed": 1, "max_new_tokens": 8}
        free = await bench.complete(**call)
        stop = free.choices[1].text[2:4]
        stopped = await bench.complete(**call, stop=(stop,))
        for before, after in zip(free.choices, stopped.choices, strict=True):
            at = before.text.find(stop)
            assert after.text == (before.text if at < 0 else before.text[: at + len(stop)])
        assert (bench.engine.requests[-1].request_id, 1) in bench.engine.ended_choices

    async def test_choices_stream_side_by_side(self, bench: Bench) -> None:
        deltas = await bench.stream(num_return_sequences=2, do_sample=True, max_new_tokens=3)
        assert [(delta.choice, delta.index) for delta in deltas] == [(0, 1), (1, 1), (0, 2), (1, 2), (0, 3), (1, 3)]
        assert [delta.choice for delta in deltas if delta.end] == [0, 1]


class TestPrompts:
    async def test_the_prefix_is_part_of_the_prompt(self, bench: Bench) -> None:
        await bench.complete(prefix="the ", prompt="town", max_length=30)
        (request,) = bench.engine.requests
        assert list(request.prompt_ids) == bench.tokenizer.encode("the town")
        prefix = len(bench.tokenizer.encode("the "))
        assert request.max_new_tokens == 30 + prefix - len(request.prompt_ids)

    async def test_truncation_keeps_the_last_tokens(self, bench: Bench) -> None:
        completion = await bench.complete(prompt="the people of the town", truncate=2)
        assert list(bench.engine.requests[0].prompt_ids) == bench.tokenizer.encode("the people of the town")[-2:]
        assert completion.num_prompt_tokens == 2

    async def test_token_ids_are_taken_as_they_are(self, bench: Bench) -> None:
        await bench.complete(prompt=TokenPrompt((5, 6, 7)), truncate=2)
        assert bench.engine.requests[0].prompt_ids == (6, 7)

    @pytest.mark.parametrize("id_", [-1, 512])
    async def test_ids_outside_the_model_are_refused(self, bench: Bench, id_: int) -> None:
        with pytest.raises(InvalidRequest, match=str(id_)):
            await bench.complete(prompt=TokenPrompt((5, id_)))
        with pytest.raises(InvalidRequest, match=str(id_)):
            await bench.complete(stop_token_ids=(id_,))

    async def test_a_conversation_goes_through_the_chat_template(self, bench: Bench) -> None:
        await bench.complete(prompt=ChatPrompt((ChatMessage("user", "Hi"),)))
        assert list(bench.engine.requests[0].prompt_ids) == bench.tokenizer.encode("User: Hi\nAssistant:")

    async def test_a_model_without_a_template_refuses_conversations(self, tmp_path: Path) -> None:
        bench = Bench(FakeEngine(), write_tokenizer(tmp_path, chat_template=None))
        with pytest.raises(TemplateError, match="no chat template"):
            await bench.complete(prompt=ChatPrompt((ChatMessage("user", "Hi"),)))
        assert bench.metric("tgi_request_failure_total", err="template") == 1

    async def test_a_long_prompt_is_tokenised_while_the_loop_runs(self, tokenizer_folder: Path) -> None:
        bench = Bench(FakeEngine(max_context=4096), tokenizer_folder)
        text = "the people of the town " * 200
        await bench.complete(prompt=text)
        assert list(bench.engine.requests[0].prompt_ids) == bench.tokenizer.encode(text)

    async def test_the_models_own_ids_end_the_text_unless_others_are_given(self, bench: Bench) -> None:
        await bench.complete()
        await bench.complete(stop_token_ids=(7,))
        assert [request.stop_token_ids for request in bench.engine.requests] == [(EOS_ID,), (7,)]

    async def test_the_least_number_of_tokens_reaches_the_engine(self, bench: Bench) -> None:
        await bench.complete(min_new_tokens=4)
        assert bench.engine.requests[0].min_new_tokens == 4


class TestFailures:
    @pytest.mark.parametrize(
        "parameters", [{"best_of": 2, "do_sample": True}, {"best_of": 0}, {"prompt_logprobs": True}]
    )
    async def test_a_stream_refuses_what_needs_the_end(self, bench: Bench, parameters: dict[str, Any]) -> None:
        with pytest.raises(InvalidRequest) as refused:
            await bench.stream(**parameters)
        assert refused.value.parameter == next(iter(parameters))

    async def test_too_long_a_prompt(self, bench: Bench) -> None:
        with pytest.raises(PromptTooLong):
            await bench.complete(prompt="a b " * 200)
        assert bench.engine.requests == []

    async def test_an_engine_that_fails_one_request(self, tokenizer_folder: Path) -> None:
        bench = Bench(FakeEngine(fail_after=3), tokenizer_folder)
        with pytest.raises(GenerationFailed):
            await bench.complete()
        stream = bench.service.stream(GenerateCall(prompt="hello"))
        for _ in range(3):
            await anext(stream)
        with pytest.raises(GenerationFailed):
            await anext(stream)
        assert bench.metric("tgi_request_failure_total", err="generation") == 2

    async def test_an_engine_that_dies(self, tokenizer_folder: Path) -> None:
        bench = Bench(FakeEngine(step_s=0.01), tokenizer_folder)
        work = asyncio.create_task(bench.complete(max_new_tokens=50))
        await asyncio.sleep(0.03)
        bench.engine.die()
        with pytest.raises(EngineDead):
            await work
        assert (await bench.service.health()).state is EngineState.DEAD

    async def test_cancelling_aborts_the_engines_work(self, tokenizer_folder: Path) -> None:
        bench = Bench(FakeEngine(step_s=0.005), tokenizer_folder, max_concurrent_requests=1)
        work = asyncio.create_task(bench.complete(max_new_tokens=200))
        await asyncio.sleep(0.03)
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work
        assert bench.engine.aborted == [bench.engine.requests[0].request_id]
        assert bench.metric("tgi_request_failure_total", err="dropped") == 1
        await bench.complete(max_new_tokens=1)  # its permit is free again

    async def test_closing_a_stream_aborts_the_engines_work(self, bench: Bench) -> None:
        stream = bench.service.stream(GenerateCall(prompt="hello"))
        await anext(stream)
        await stream.aclose()
        assert bench.engine.aborted == [bench.engine.requests[0].request_id]
        assert bench.metric("tgi_request_failure_total", err="dropped") == 1

    async def test_an_unknown_model(self, tokenizer_folder: Path) -> None:
        engine = FakeEngine()
        limits = resolve_limits(engine.facts)
        models = [load_served_model(name, tokenizer_folder, engine, limits) for name in ("one", "two")]
        metrics = Metrics()
        metrics.limits_known(max_input_tokens=10, max_total_tokens=10, cache_tokens=10)
        service = GenerationService(ModelTable(models), metrics, max_concurrent_requests=2)
        with pytest.raises(UnknownModel):
            await service.complete(GenerateCall(prompt="x", model="three"))
        assert (await service.complete(GenerateCall(prompt="x", model="two"))).model == "two"
        assert service.resolve("two").name == "two"
        assert list(service.stats()) == ["one", "two"]


class TestAdmission:
    async def test_one_more_than_may_run_is_turned_away_at_once(self, tokenizer_folder: Path) -> None:
        bench = Bench(FakeEngine(step_s=0.005), tokenizer_folder, max_concurrent_requests=2)
        running = [asyncio.create_task(bench.complete(max_new_tokens=10)) for _ in range(2)]
        await asyncio.sleep(0.01)
        with pytest.raises(Overloaded):
            await bench.complete()
        with pytest.raises(Overloaded):
            await bench.stream()
        await asyncio.gather(*running)
        assert bench.metric("tgi_request_failure_total", err="overloaded") == 2
        await bench.complete()

    async def test_who_comes_to_a_full_house_is_turned_away_beforehand(self, tokenizer_folder: Path) -> None:
        bench = Bench(FakeEngine(step_s=0.005), tokenizer_folder, max_concurrent_requests=1)
        assert bench.service.turn_away(Caller()) is None
        running = asyncio.create_task(bench.complete(max_new_tokens=10))
        await asyncio.sleep(0.01)
        refusal = bench.service.turn_away(Caller())
        assert "at most 1 sequences" in str(refusal)
        await running
        assert bench.service.turn_away(Caller()) is None
        assert bench.metric("tgi_request_failure_total", err="overloaded") == 1
        assert bench.metric("tgi_request_count_total") == 2

    async def test_a_queue_with_room_for_no_token_turns_away_beforehand(self, tokenizer_folder: Path) -> None:
        engine = FakeEngine(step_s=0.005, max_context=128)
        bench = Bench(engine, tokenizer_folder, max_queued_tokens=1)
        calls = [asyncio.create_task(bench.complete(prompt="x", max_new_tokens=120)) for _ in range(17)]
        await asyncio.sleep(0.05)
        assert "prompt tokens wait" in str(bench.service.turn_away(Caller()))
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        assert bench.service.turn_away(Caller()) is None

    async def test_each_sequence_of_a_request_counts(self, tokenizer_folder: Path) -> None:
        bench = Bench(FakeEngine(step_s=0.005), tokenizer_folder, max_concurrent_requests=3)
        running = asyncio.create_task(bench.complete(best_of=2, do_sample=True, max_new_tokens=10))
        await asyncio.sleep(0.01)
        with pytest.raises(Overloaded):
            await bench.complete(best_of=2, do_sample=True)
        await bench.complete(max_new_tokens=1)
        await running

    async def test_a_request_that_breaks_a_rule_gives_its_permit_back(self, tokenizer_folder: Path) -> None:
        bench = Bench(FakeEngine(), tokenizer_folder, max_concurrent_requests=1)
        for _ in range(3):
            with pytest.raises(InvalidRequest):
                await bench.complete(temperature=-1.0)
        await bench.complete()
        assert bench.metric("tgi_request_failure_total", err="validation") == 3


async def test_requests_are_counted_and_measured(bench: Bench) -> None:
    await bench.complete(max_new_tokens=5)
    await bench.stream(max_new_tokens=3)
    assert bench.metric("tgi_request_count_total") == 2
    assert bench.metric("tgi_request_success_total") == 2
    assert bench.metric("tgi_request_generated_tokens_sum") == 8
    assert bench.metric("tgi_request_max_new_tokens_sum") == 8
    assert bench.metric("tgi_request_input_length_sum") == 2 * len(bench.tokenizer.encode("hello"))
    assert bench.metric("tgi_request_duration_count") == 2
    assert bench.metric("tgi_batch_current_size") == 0


async def test_request_ids_differ(bench: Bench) -> None:
    await asyncio.gather(*(bench.complete(max_new_tokens=1) for _ in range(20)))
    assert len({request.request_id for request in bench.engine.requests}) == 20


async def test_a_text_can_be_tokenised_without_generating(bench: Bench) -> None:
    for text in ("hello", "the people of the town " * 200):
        spans = await bench.service.tokenize(text)
        assert [span.id for span in spans] == bench.tokenizer.encode(text)


async def test_closing_closes_the_engine(bench: Bench) -> None:
    await bench.service.close()
    assert bench.engine.is_closed

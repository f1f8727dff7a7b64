"""The text side's story: permit, model, checks, tokens, engine, text."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager

import msgspec

from gyrfalcon import errors
from gyrfalcon.engine.interface import EngineEvent, EngineRequest, EngineStats, PromptEvent, ScoreEvent, TokenEvent
from gyrfalcon.metrics import Metrics
from gyrfalcon.service.admission import (
    CACHE_OVERCOMMIT,
    LOOKAHEAD_PART,
    QUEUED_CACHEFULS,
    Admission,
    QueueLimits,
    RefusalLog,
    TurnQueue,
)
from gyrfalcon.service.detokenizer import Detokenizer
from gyrfalcon.service.interface import (
    Caller,
    ChatPrompt,
    Choice,
    ChoiceEnd,
    Completion,
    Delta,
    DetectCall,
    Detection,
    EngineHealth,
    EngineState,
    FinishReason,
    GenerateCall,
    GeneratedToken,
    ModelInfo,
    PromptToken,
    TextSpan,
    Timings,
    TokenPrompt,
)
from gyrfalcon.service.models import ModelTable, ServedModel
from gyrfalcon.service.search_rules import check_ids, check_ids_within
from gyrfalcon.service.template_worker import TemplateRenderer, TemplateThread
from gyrfalcon.service.tokenizer import TextTokenizer
from gyrfalcon.service.validation import (
    SEED_RANGE,
    FittedPrompt,
    ValidCall,
    check,
    check_encodable,
    check_messages,
    count_sequences,
    fit,
)
from gyrfalcon.service.watermark import check_size, detect
from gyrfalcon.telemetry import RequestRecord, log_request, new_request_id
from gyrfalcon.tracing import Tracer, trace_id_of

# Tokenising fewer characters takes well under a millisecond, less than a thread's round trip is worth.
SHORT_TEXT_CHARS = 2000
LONGEST_LABEL = 200  # characters of a caller's own text in records
LONGEST_LOGGED_PROMPT = 20_000  # characters
DEFAULT_QUEUE_TIMEOUT_S = 30.0


class GenerationService:
    """The `TextService` over one engine a model."""

    def __init__(
        self,
        models: ModelTable,
        metrics: Metrics,
        *,
        max_concurrent_requests: int,
        queue_timeout_s: float = DEFAULT_QUEUE_TIMEOUT_S,
        max_queued_tokens: int | None = None,
        renderer: TemplateRenderer | None = None,
        tracer: Tracer | None = None,
        logs_prompts: bool = False,
    ) -> None:
        """max_queued_tokens: prompt tokens that may wait, of each model; None for a few times what its cache holds.
        renderer: renders chat templates, in a thread if absent. tracer: makes spans of every request; None makes none.
        logs_prompts: whether a request's line in the log has its prompt.
        """
        self._models = models
        self._metrics = metrics
        self._tracer = tracer
        self._logs_prompts = logs_prompts
        self._renderer = renderer or TemplateThread()
        self._admission = Admission(max_concurrent_requests)
        self._queue_timeout_s = queue_timeout_s
        self._queues = {
            model.name: TurnQueue(
                _queue_limits(model, queue_timeout_s, max_queued_tokens),
                on_depth=metrics.queue_watcher(model.name),
            )
            for model in models.all
        }
        self._refusal_log = RefusalLog()
        self._cache_generation = 0

    @property
    def models(self) -> tuple[ModelInfo, ...]:
        return tuple(model.info for model in self._models.all)

    def resolve(self, model: str | None) -> ModelInfo:
        return self._models.resolve(model).info

    def turn_away(self, caller: Caller, trace_headers: tuple[tuple[str, str], ...] = ()) -> errors.Overloaded | None:
        # Which model is meant is not known yet: it could be one that has room.
        refusal = self._admission.refusal(would_wait=all(queue.is_busy for queue in self._queues.values()))
        if refusal is None:
            of_models = [queue.refusal() for queue in self._queues.values()]
            refusal = of_models[0] if all(of_models) else None
        if refusal is not None:
            self._metrics.request_begins()
            self._metrics.request_failed("overloaded")
            self._refusal_log.add(caller, lambda: self._log(_record_of_refusal(caller, trace_headers)))
        return refusal

    async def stream(self, call: GenerateCall) -> AsyncGenerator[list[Delta], None]:
        async with self._run(call, is_stream=True) as run, aclosing(run.deltas()) as batches:
            async for deltas in batches:
                yield deltas

    async def complete(self, call: GenerateCall) -> Completion:
        async with self._run(call, is_stream=False) as run:
            tokens: list[list[GeneratedToken]] = [[] for _ in range(run.num_choices)]
            ends: list[ChoiceEnd | None] = [None] * run.num_choices
            async with aclosing(run.deltas()) as batches:
                async for deltas in batches:
                    for delta in deltas:
                        tokens[delta.choice].append(delta.token)
                        ends[delta.choice] = delta.end
            return run.completion(tokens, ends)

    async def tokenize(
        self, text: str, *, model: str | None = None, add_special_tokens: bool = True
    ) -> tuple[TextSpan, ...]:
        tokenizer = self._models.resolve(model).tokenizer
        check_encodable("prompt", text)
        if len(text) < SHORT_TEXT_CHARS:
            return tokenizer.spans(text, add_special_tokens=add_special_tokens)
        return await asyncio.to_thread(tokenizer.spans, text, add_special_tokens=add_special_tokens)

    async def detect(self, call: DetectCall) -> Detection:
        model = self._models.resolve(call.model)
        check_size(call)
        # In a thread: the work grows with the text and the number of keys.
        return await asyncio.to_thread(
            detect,
            call,
            model=model.name,
            tokenizer=model.tokenizer,
            num_ids=model.engine.facts.vocab_size,
            settings=model.watermark,
        )

    async def render_chat(self, prompt: ChatPrompt, *, model: str | None = None) -> str:
        self._metrics.request_begins()
        try:
            served = self._models.resolve(model)
            check_messages(prompt.messages, served.limits)
            return await self._render(prompt, served)
        except errors.RequestError as error:
            self._metrics.request_failed("template" if isinstance(error, errors.TemplateError) else "validation")
            raise

    async def health(self) -> EngineHealth:
        for model in self._models.all:
            health = await model.engine.health()
            if not health.is_healthy:
                return health
        return EngineHealth(state=EngineState.READY)

    def stats(self) -> dict[str, EngineStats]:
        stats = {}
        for model in self._models.all:
            reading = model.engine.stats()
            stats[model.name] = msgspec.structs.replace(
                reading, num_waiting=reading.num_waiting + len(self._queues[model.name])
            )
        return stats

    def flush_prefix_cache(self) -> None:
        # The cache is keyed by salt: what is stored under the old one is not found again, and goes when room is needed.
        self._cache_generation += 1

    async def close(self) -> None:
        self._refusal_log.flush()
        await asyncio.gather(*(model.engine.close() for model in self._models.all), self._renderer.close())

    @asynccontextmanager
    async def _run(self, call: GenerateCall, *, is_stream: bool) -> AsyncIterator[Run]:
        """Admit the call and prepare it; on leaving, give the permit back and record how it went."""
        record = _Record(call, self._metrics, logs_prompt=self._logs_prompts)
        self._metrics.request_begins()
        try:
            if is_stream:
                _check_streamable(call)
            model = self._models.resolve(call.model)
            record.model = model.name
            with self._admission.permit(count_sequences(call, model.limits)):
                valid = check(call, model.limits, model.watermark)
                prompt = await self._tokenize(valid, model)
                self._metrics.prompt_admitted(len(prompt.ids), prompt.max_new_tokens)
                record.validated(valid, prompt)
                turn = self._queues[model.name].turn(
                    call.caller,
                    num_sequences=valid.num_sequences,
                    num_prompt_tokens=len(prompt.ids),
                    max_new_tokens=prompt.max_new_tokens,
                )
                async with turn as waited_s:
                    record.turn_s = waited_s
                    # The engine may be short of cache all the same: what is left of the time, the request waits there.
                    begin_within_s = max(self._queue_timeout_s - waited_s, 0.0)
                    yield Run(valid, prompt, model, record, self._cache_salt(call), begin_within_s)
                    record.outcome = "success"
        except errors.TemplateError:
            record.outcome = "template"
            raise
        except errors.RequestError:
            record.outcome = "validation"
            raise
        except errors.QueueTimeout:
            record.outcome = "queue_timeout"
            raise
        except errors.Overloaded:
            record.outcome = "overloaded"
            raise
        except (asyncio.CancelledError, GeneratorExit):
            record.outcome = "dropped"
            raise
        except BaseException:
            record.outcome = "generation"
            raise
        finally:
            ended = record.freeze()
            self._metrics.request_ends(ended)
            if ended.outcome == "overloaded":
                self._refusal_log.add(call.caller, lambda: self._log(ended))
            else:
                self._log(ended)

    def _log(self, ended: RequestRecord) -> None:
        """Write the request's line, and its spans where there are any."""
        log_request(ended, self._tracer.trace(ended) if self._tracer else trace_id_of(ended.trace_headers))

    async def _tokenize(self, valid: ValidCall, model: ServedModel) -> FittedPrompt:
        """The call's prompt as ids that fit. Text ends here: below are token ids."""
        call, prompt = valid.call, valid.call.prompt
        if isinstance(prompt, TokenPrompt):
            ids = list(prompt.ids if call.truncate is None else prompt.ids[-call.truncate :])
        elif isinstance(prompt, ChatPrompt):
            text = await self._render(prompt, model)
            check_encodable("messages", text)
            # A template brings the special tokens it wants.
            ids = await _encode(model.tokenizer, text, call.truncate, add_special_tokens=False)
        else:
            ids = await _encode(model.tokenizer, (call.prefix or "") + prompt, call.truncate)
        width = model.engine.facts.vocab_size
        check_ids_within("prompt", ids, width)
        check_ids(call, width)
        num_prefix_tokens = len(model.tokenizer.encode(call.prefix, add_special_tokens=False)) if call.prefix else 0
        return fit(valid, ids, num_prefix_tokens, model.limits)

    async def _render(self, prompt: ChatPrompt, model: ServedModel) -> str:
        """The conversation as text."""
        if model.chat_template is None:
            raise errors.TemplateError(f"model `{model.name}` has no chat template; send a text prompt")
        return await self._renderer.render(model.chat_template, prompt.messages)

    def _cache_salt(self, call: GenerateCall) -> str:
        return f"{self._cache_generation}\0{call.caller.cache_salt}"


class Run:
    """One admitted call: what goes to the engine, and what comes back made into text."""

    def __init__(
        self,
        valid: ValidCall,
        prompt: FittedPrompt,
        model: ServedModel,
        record: _Record,
        cache_salt: str,
        begin_within_s: float,
    ) -> None:
        self.num_choices = valid.num_choices
        self._valid = valid
        self._prompt = prompt
        self._model = model
        self._record = record
        self._cache_salt = cache_salt
        self._begin_within_s = begin_within_s
        self._prompt_logprobs: tuple[float | None, ...] | None = None
        self._texts = [Detokenizer(model.tokenizer, prompt.ids, valid.call.stop) for _ in range(valid.num_choices)]
        self._num_tokens = [0] * valid.num_choices
        self._is_ended = [False] * valid.num_choices
        self._scores: dict[int, ScoreEvent] = {}  # of a search's choices

    async def deltas(self) -> AsyncGenerator[list[Delta], None]:
        """Run the engine and yield its tokens as text, until every choice has ended."""
        async with aclosing(self._engine_events()) as batches:
            async for events in batches:
                deltas: list[Delta] = []
                for event in events:
                    if isinstance(event, PromptEvent):
                        self._record.queue_s = self._record.turn_s + event.queue_s
                        self._prompt_logprobs = event.logprobs
                    elif isinstance(event, ScoreEvent):
                        self._scores[event.choice] = event
                    elif isinstance(event, TokenEvent) and not self._is_ended[event.choice]:
                        deltas.append(self._delta(event))
                if deltas:
                    self._record.tokens_came()
                    yield deltas
                if all(self._is_ended):  # some by a stop string: leaving the block aborts what the engine still runs
                    return
        raise errors.GenerationFailed("the engine ended the request before its last token")

    def completion(self, tokens: Sequence[Sequence[GeneratedToken]], ends: Sequence[ChoiceEnd | None]) -> Completion:
        """The finished request, its best choice first where it is ranked."""
        choices = [
            Choice(index, end.text, end.finish_reason, tuple(tokens[index]), end.seed, end.score, end.beam_indices)
            for index, end in enumerate(ends)
            if end is not None
        ]
        if self._valid.is_ranked:
            # The first of equals wins; the others stay in the order they were generated in.
            best = max(choices, key=_mean_logprob)
            choices.remove(best)
            choices.insert(0, best)
        return Completion(
            request_id=self._record.request_id,
            model=self._model.name,
            choices=tuple(choices),
            num_prompt_tokens=len(self._prompt.ids),
            prompt=self._prompt_tokens(),
            timings=self._record.timings(),
        )

    def _engine_events(self) -> AsyncGenerator[list[EngineEvent], None]:
        call = self._valid.call
        stop_ids = call.stop_token_ids
        if stop_ids is None:
            width = self._model.engine.facts.vocab_size  # a tokenizer may know of ids that its model has no logit for
            stop_ids = tuple(id_ for id_ in self._model.tokenizer.eos_ids if id_ < width)
        return self._model.engine.generate(
            EngineRequest(
                request_id=self._record.request_id,
                prompt_ids=self._prompt.ids,
                max_new_tokens=self._prompt.max_new_tokens,
                min_new_tokens=self._prompt.min_new_tokens,
                sampling=self._valid.sampling,
                beams=self._valid.beams,
                num_choices=self.num_choices,
                stop_token_ids=stop_ids,
                prompt_logprobs=call.prompt_logprobs,
                top_n=self._valid.top_n,
                cache_salt=self._cache_salt,
                begin_within_s=self._begin_within_s,
            )
        )

    def _delta(self, event: TokenEvent) -> Delta:
        choice = event.choice
        piece = self._texts[choice].push(event.token_id)
        self._num_tokens[choice] += 1
        self._record.num_generated_tokens += 1
        # The engine's reason comes first: a stop string completed by the last allowed token ends by length.
        reason = event.finish_reason or (FinishReason.STOP if piece.is_stop else None)
        end = None
        if reason is not None:
            end = self._end(choice, reason)
            if event.finish_reason is None and self.num_choices > 1:
                self._model.engine.end_choice(self._record.request_id, choice)
        top = None if event.top is None else self._top(event.top)
        token = GeneratedToken(event.token_id, piece.text, event.logprob, piece.is_special, top)
        return Delta(choice, self._num_tokens[choice], token, end)

    def _end(self, choice: int, reason: FinishReason) -> ChoiceEnd:
        self._is_ended[choice] = True
        self._record.finish_reason = reason.value
        sampling = self._valid.sampling
        # A search is repeated as a whole: what it returns has no seeds of its own.
        seed = sampling.seed if self._valid.beams else (sampling.seed + choice) % SEED_RANGE
        score = self._scores.get(choice)
        return ChoiceEnd(
            text=self._texts[choice].text,
            finish_reason=reason,
            num_tokens=self._num_tokens[choice],
            seed=seed if sampling.do_sample else None,
            num_prompt_tokens=len(self._prompt.ids),
            score=None if score is None else score.score,
            beam_indices=None if score is None else score.beam_indices,
        )

    def _top(self, pairs: Sequence[tuple[int, float]]) -> tuple[GeneratedToken, ...]:
        tokenizer = self._model.tokenizer
        return tuple(
            GeneratedToken(id_, tokenizer.token_text(id_), logprob, tokenizer.is_special(id_)) for id_, logprob in pairs
        )

    def _prompt_tokens(self) -> tuple[PromptToken, ...] | None:
        if not self._valid.call.prompt_logprobs:
            return None
        if self._prompt_logprobs is None:
            raise errors.GenerationFailed("the engine did not score the prompt")
        text = self._model.tokenizer.token_text
        pairs = zip(self._prompt.ids, self._prompt_logprobs, strict=True)
        return tuple(PromptToken(id_, text(id_), logprob) for id_, logprob in pairs)


class _Record:
    """What is known so far of how a request goes; its owner is the block that `GenerationService._run` opens."""

    def __init__(self, call: GenerateCall, metrics: Metrics, *, logs_prompt: bool) -> None:
        self.request_id = call.request_id or new_request_id()
        self.turn_s = 0.0  # waited before the engine had room
        self.outcome = "generation"
        self.model: str | None = None
        self.queue_s: float | None = None
        self.num_generated_tokens = 0
        self.finish_reason: str | None = None
        self._call = call
        self._metrics = metrics
        self._logs_prompt = logs_prompt
        self._num_choices: int | None = None
        self._prompt: FittedPrompt | None = None
        self._validation_s: float | None = None
        self._first_token_s: float | None = None
        self._arrived = self._newest = time.perf_counter()

    def validated(self, valid: ValidCall, prompt: FittedPrompt) -> None:
        self._num_choices = valid.num_choices
        self._prompt = prompt
        self._validation_s = time.perf_counter() - self._arrived

    def tokens_came(self) -> None:
        """Tokens that were ready together are about to be handed out."""
        now = time.perf_counter()
        if self._first_token_s is None:
            self._first_token_s = now - self._arrived
            self._metrics.first_token(self._first_token_s)
        else:
            self._metrics.token_gap(now - self._newest)
        self._newest = now

    def timings(self) -> Timings:
        record = self.freeze()
        return Timings(record.validation_s or 0.0, record.queue_s or 0.0, record.inference_s or 0.0, record.total_s)

    def freeze(self) -> RequestRecord:
        prompt, asked = self._prompt, self._call.model
        return RequestRecord(
            request_id=self.request_id,
            outcome=self.outcome,
            requested_model=None if asked is None else asked[:LONGEST_LABEL],
            model=self.model,
            is_chat=isinstance(self._call.prompt, ChatPrompt),
            num_choices=self._num_choices,
            num_prompt_tokens=None if prompt is None else len(prompt.ids),
            max_new_tokens=None if prompt is None else prompt.max_new_tokens,
            num_generated_tokens=self.num_generated_tokens,
            finish_reason=self.finish_reason,
            validation_s=self._validation_s,
            queue_s=self.queue_s,
            first_token_s=self._first_token_s,
            total_s=time.perf_counter() - self._arrived,
            trace_headers=self._call.trace_headers,
            caller=self._call.caller.name or None,
            prompt=_shown(self._call.prompt) if self._logs_prompt else None,
        )


def _record_of_refusal(caller: Caller, trace_headers: tuple[tuple[str, str], ...]) -> RequestRecord:
    """Of a request that was turned away before it was read."""
    return RequestRecord(
        request_id=new_request_id(),
        outcome="overloaded",
        requested_model=None,
        model=None,
        is_chat=False,
        num_choices=None,
        num_prompt_tokens=None,
        max_new_tokens=None,
        num_generated_tokens=0,
        finish_reason=None,
        validation_s=None,
        queue_s=None,
        first_token_s=None,
        total_s=0.0,
        trace_headers=trace_headers,
        caller=caller.name or None,
    )


def _queue_limits(model: ServedModel, timeout_s: float, max_queued_tokens: int | None) -> QueueLimits:
    limits, cache_tokens = model.limits, model.engine.facts.cache_tokens
    return QueueLimits(
        max_sequences=limits.max_batch_size + max(1, limits.max_batch_size // LOOKAHEAD_PART),
        max_tokens=CACHE_OVERCOMMIT * cache_tokens,
        batch_size=limits.max_batch_size,
        max_queued_tokens=max_queued_tokens or QUEUED_CACHEFULS * cache_tokens,
        timeout_s=timeout_s,
    )


def _shown(prompt: str | ChatPrompt | TokenPrompt) -> str:
    """A prompt for the log."""
    match prompt:
        case ChatPrompt(messages):
            text = "\n".join(f"{message.role}: {message.content}" for message in messages)
        case TokenPrompt(ids):
            text = str(list(ids))
        case _:
            text = prompt
    return text[:LONGEST_LOGGED_PROMPT]


def _check_streamable(call: GenerateCall) -> None:
    if call.best_of is not None and call.best_of != 1:
        raise errors.InvalidRequest(
            "best_of", f"`best_of` != 1 is not allowed when streaming: ranking needs the end. Given: {call.best_of}"
        )
    if call.prompt_logprobs:
        raise errors.InvalidRequest("prompt_logprobs", "`prompt_logprobs` is not allowed when streaming")
    if call.num_beams is not None and call.num_beams > 1:
        raise errors.InvalidRequest(
            "num_beams",
            "`num_beams` > 1 is not allowed when streaming: a search has no text before its end. "
            f"Given: {call.num_beams}",
        )


async def _encode(
    tokenizer: TextTokenizer, text: str, keep_last: int | None, *, add_special_tokens: bool = True
) -> list[int]:
    """Encode; a long text in a thread, as the library lets the event loop run meanwhile."""
    if len(text) < SHORT_TEXT_CHARS:
        return tokenizer.encode(text, add_special_tokens=add_special_tokens, keep_last=keep_last)
    return await asyncio.to_thread(tokenizer.encode, text, add_special_tokens=add_special_tokens, keep_last=keep_last)


def _mean_logprob(choice: Choice) -> float:
    """What best_of ranks by: the mean log-probability of the choice's tokens, end-of-sequence included."""
    return sum(token.logprob for token in choice.tokens) / len(choice.tokens)

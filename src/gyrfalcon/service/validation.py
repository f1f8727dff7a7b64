"""Every limit and every default. Dialects decide how a parameter is spelled; what it may be is decided here.

Two steps, because the prompt's tokens are known only in between: `check` judges the parameters, `fit` the lengths. The
rules of beams and of single ids are in `search_rules`.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gyrfalcon.engine.interface import BeamParams, EngineFacts, SamplingParams, WatermarkParams
from gyrfalcon.errors import InvalidRequest, PromptTooLong, SettingsError
from gyrfalcon.service.interface import ChatMessage, ChatPrompt, GenerateCall, TokenPrompt
from gyrfalcon.service.search_rules import (
    MAX_BAD_WORDS,
    MAX_BIASED_PHRASES,
    beams_of,
    check_positive,
    check_returned_beams,
    count_beams,
    implies_sampling,
    with_rules,
)
from gyrfalcon.splitmix import MANTISSA_BITS, green_threshold

SEED_RANGE = 2**64
# Reported seeds survive clients whose JSON numbers are doubles.
DRAWN_SEED_BITS = 53
# A larger `max_new_tokens` is admitted when this many fit, and generation then ends with the context.
MAX_RESERVED_NEW_TOKENS = 1024
# No tokenizer packs more characters than this into the average token of a text worth sending.
MAX_CHARS_PER_TOKEN = 16
DEFAULT_MAX_BEAMS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one served model's requests may ask for. Made by `resolve_limits`."""

    max_total_tokens: int  # prompt and new tokens of one sequence
    max_input_tokens: int
    max_concurrent_requests: int = 128  # sequences: a request of k choices counts k times
    max_best_of: int = 4
    max_return_sequences: int = 8
    max_beams: int = DEFAULT_MAX_BEAMS
    max_stop_sequences: int = 8
    max_stop_length: int = 256  # characters
    max_top_n_tokens: int = 20
    max_messages: int = 1024
    max_biased_phrases: int = MAX_BIASED_PHRASES
    max_bad_words: int = MAX_BAD_WORDS
    max_characters_per_token: int = MAX_CHARS_PER_TOKEN
    default_max_new_tokens: int | None = 20  # None: fill the context
    max_batch_size: int = 64  # sequences computed together: all of a request's must be
    cache_tokens: int | None = None  # tokens the KV cache holds; None: as many as could be asked for
    block_size: int = 1  # tokens by which it is handed out

    @property
    def max_prompt_chars(self) -> int:
        """More characters than this cannot fit, so they are not tokenised."""
        return self.max_characters_per_token * self.max_total_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidCall:
    """A call whose parameters are within the limits, defaults filled in. Only `check` makes one."""

    call: GenerateCall
    sampling: SamplingParams
    beams: BeamParams | None
    num_choices: int  # sequences returned
    is_ranked: bool  # best first, by mean token log-probability
    top_n: int

    @property
    def num_sequences(self) -> int:
        """Sequences that are computed and held together."""
        return self.num_choices if self.beams is None else self.beams.num_beams


@dataclass(frozen=True, slots=True)
class FittedPrompt:
    """A prompt that fits, and the range of new tokens that fits with it."""

    ids: tuple[int, ...]
    max_new_tokens: int
    min_new_tokens: int


def resolve_limits(
    facts: EngineFacts,
    *,
    max_total_tokens: int | None = None,
    max_input_tokens: int | None = None,
    max_concurrent_requests: int = 128,
    max_best_of: int = 4,
    max_return_sequences: int = 8,
    max_stop_sequences: int = 8,
    max_stop_length: int = 256,
    max_top_n_tokens: int = 20,
    max_messages: int = 1024,
    max_biased_phrases: int = MAX_BIASED_PHRASES,
    max_bad_words: int = MAX_BAD_WORDS,
    max_characters_per_token: int = MAX_CHARS_PER_TOKEN,
    default_max_new_tokens: int | None = 20,
    max_batch_size: int = 64,
    block_size: int = 1,
) -> Limits:
    """The limits that hold for an engine, from settings (None: as much as the engine can do).

    max_batch_size, block_size: what the engine was given.

    Raises SettingsError naming the flag where settings contradict each other or promise more than the engine can.
    """
    positive = {
        "--max-concurrent-requests": max_concurrent_requests,
        "--max-best-of": max_best_of,
        "--max-total-tokens": max_total_tokens,
        "--max-input-tokens": max_input_tokens,
        "--default-max-new-tokens": default_max_new_tokens,
    }
    for setting, value in positive.items():
        if value is not None and value < 1:
            raise SettingsError(setting, f"is {value}; must be at least 1")
    for setting, value in {"--max-stop-sequences": max_stop_sequences, "--max-top-n-tokens": max_top_n_tokens}.items():
        if value < 0:
            raise SettingsError(setting, f"is {value}; must not be negative")

    if max_total_tokens is None:
        max_total_tokens = facts.max_total_tokens
    if max_total_tokens > facts.max_total_tokens:
        raise SettingsError(
            "--max-total-tokens", f"is {max_total_tokens}, but the model and its cache allow {facts.max_total_tokens}"
        )
    if max_total_tokens < 2:
        raise SettingsError("--max-total-tokens", f"is {max_total_tokens}; one prompt token and one new one need 2")
    if max_input_tokens is None:
        max_input_tokens = max_total_tokens - 1
    if max_input_tokens >= max_total_tokens:
        raise SettingsError(
            "--max-input-tokens", f"is {max_input_tokens}; must be below --max-total-tokens ({max_total_tokens})"
        )
    return Limits(
        max_total_tokens=max_total_tokens,
        max_input_tokens=max_input_tokens,
        max_concurrent_requests=max_concurrent_requests,
        # Each of its sequences needs a permit and a place in the batch.
        max_best_of=min(max_best_of, max_concurrent_requests, max_batch_size),
        max_beams=min(DEFAULT_MAX_BEAMS, max_concurrent_requests, max_batch_size),
        max_return_sequences=max_return_sequences,
        max_stop_sequences=max_stop_sequences,
        max_stop_length=max_stop_length,
        max_top_n_tokens=max_top_n_tokens,
        max_messages=max_messages,
        max_biased_phrases=max_biased_phrases,
        max_bad_words=max_bad_words,
        max_characters_per_token=max_characters_per_token,
        default_max_new_tokens=default_max_new_tokens,
        max_batch_size=max_batch_size,
        cache_tokens=facts.cache_tokens,
        block_size=block_size,
    )


def count_sequences(call: GenerateCall, limits: Limits) -> int:
    """How many sequences are computed for the call. Checked before a permit is taken, since each takes one."""
    return max(count_choices(call, limits), count_beams(call, limits.max_beams))


def count_choices(call: GenerateCall, limits: Limits) -> int:
    """How many sequences the call returns."""
    best_of = 1 if call.best_of is None or call.best_of == 0 else call.best_of
    if best_of > 1 and limits.max_best_of == 1:
        raise InvalidRequest("best_of", f"`best_of` > 1 is disabled on this server. Given: {best_of}")
    if not 0 < best_of <= limits.max_best_of:
        raise InvalidRequest("best_of", f"`best_of` must be > 0 and <= {limits.max_best_of}. Given: {best_of}")
    beams = count_beams(call, limits.max_beams)
    if beams > 1:
        return check_returned_beams(call, beams)
    sequences = 1 if call.num_return_sequences is None else call.num_return_sequences
    most = min(limits.max_return_sequences, limits.max_concurrent_requests, limits.max_batch_size)
    if not 0 < sequences <= most:
        raise InvalidRequest(
            "num_return_sequences", f"`num_return_sequences` must be > 0 and <= {most}. Given: {sequences}"
        )
    if best_of > 1 and sequences > 1:
        raise InvalidRequest("num_return_sequences", "`num_return_sequences` > 1 cannot go with `best_of` > 1")
    return max(best_of, sequences)


def check(call: GenerateCall, limits: Limits, watermark: WatermarkParams) -> ValidCall:
    """Judge all parameters that do not depend on the prompt's tokens; the first that breaks a rule is reported."""
    num_choices = count_choices(call, limits)
    is_ranked = call.best_of is not None and call.best_of > 1
    num_beams = count_beams(call, limits.max_beams)
    sampling = _sampling(call, num_choices if num_beams == 1 else 1, watermark)
    sampling = with_rules(
        sampling,
        call,
        max_total_tokens=limits.max_total_tokens,
        max_biased_phrases=limits.max_biased_phrases,
        max_bad_words=limits.max_bad_words,
    )
    beams = beams_of(call, num_beams=num_beams, does_sample=sampling.do_sample)
    _check_lengths(call)
    _check_stop(call.stop, limits)
    if is_ranked and call.seed is not None:
        raise InvalidRequest("seed", f"`seed` must not be set when `best_of` > 1. Given: {call.seed}")
    top_n = 0 if call.top_n is None else call.top_n
    if not 0 <= top_n <= limits.max_top_n_tokens:
        raise InvalidRequest("top_n", f"`top_n` must be >= 0 and <= {limits.max_top_n_tokens}. Given: {top_n}")
    _check_prompt(call, limits)
    if call.truncate is not None and not 0 < call.truncate <= limits.max_input_tokens:
        raise InvalidRequest(
            "truncate",
            f"`truncate` must be strictly positive and less than or equal to {limits.max_input_tokens}. "
            f"Given: {call.truncate}",
        )
    return ValidCall(
        call=call, sampling=sampling, beams=beams, num_choices=num_choices, is_ranked=is_ranked, top_n=top_n
    )


def check_encodable(parameter: str, text: str) -> None:
    """Refuse text that has no UTF-8 form: half of a surrogate pair, which JSON can spell."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code_point = f"U+{ord(text[error.start]):04X}"
        raise InvalidRequest(
            parameter, f"`{parameter}` holds the lone surrogate {code_point} at character {error.start}"
        ) from None


def check_messages(messages: Sequence[ChatMessage], limits: Limits) -> None:
    """Judge a conversation before its template sees it."""
    if not messages:
        raise InvalidRequest("messages", "`messages` must not be empty")
    if len(messages) > limits.max_messages:
        raise InvalidRequest("messages", f"`messages` may have {limits.max_messages} entries. Given: {len(messages)}")
    for message in messages:
        check_encodable("messages", message.role + message.content)


def fit(valid: ValidCall, prompt_ids: Sequence[int], num_prefix_tokens: int, limits: Limits) -> FittedPrompt:
    """Decide how many tokens are generated, and of the prompt kept where its start may be dropped.

    prompt_ids: truncated already when the call asks for it. num_prefix_tokens: the prefix's own, which
    `max_length` and `min_length` do not count.
    """
    call, n = valid.call, len(prompt_ids)
    if n == 0:
        raise InvalidRequest("prompt", "`prompt` has no tokens: the model's vocabulary knows none of its characters")
    asked = call.max_new_tokens
    if asked is None and call.max_length is not None:
        allowed = call.max_length + num_prefix_tokens
        asked = allowed - n
        if asked < 1:
            raise InvalidRequest(
                "max_length",
                f"`max_length` counts prompt and new tokens and is {call.max_length}, but the prompt has "
                f"{n - num_prefix_tokens} tokens; raise it or set `max_new_tokens`",
            )
    if call.drop_start_to_fit and asked is not None and n + asked > limits.max_total_tokens:
        kept = limits.max_total_tokens - asked
        if kept < 1:
            raise InvalidRequest(
                "max_new_tokens",
                f"{asked} new tokens leave no room for a prompt in a context of {limits.max_total_tokens} tokens",
            )
        prompt_ids = prompt_ids[n - kept :]
        n = kept

    room = limits.max_total_tokens - n
    if asked is not None:
        reserved = min(asked, MAX_RESERVED_NEW_TOKENS)
        if reserved > room:
            raise PromptTooLong(f"{n} tokens", limits.max_total_tokens, max_new_tokens=reserved)
    elif room < 1:
        raise PromptTooLong(f"{n} tokens", limits.max_total_tokens, max_new_tokens=1)
    if n > limits.max_input_tokens:
        raise PromptTooLong(f"{n} tokens", limits.max_input_tokens)
    if asked is None:
        asked = limits.default_max_new_tokens
    # Filling the context takes what there is; of a number asked for, one slice must be there.
    needed = 1 if asked is None else min(asked, room, MAX_RESERVED_NEW_TOKENS)
    room = min(room, _room_in_cache(valid, n, needed, limits))
    max_new_tokens = room if asked is None else min(asked, room)

    min_new_tokens = call.min_new_tokens or 0
    if min_new_tokens > max_new_tokens:
        raise InvalidRequest(
            "min_new_tokens",
            f"`min_new_tokens` must not exceed the number of new tokens, {max_new_tokens}. Given: {min_new_tokens}",
        )
    if call.min_length is not None and call.min_new_tokens is None:
        min_new_tokens = call.min_length + num_prefix_tokens - n
    return FittedPrompt(tuple(prompt_ids), max_new_tokens, min(max(min_new_tokens, 0), max_new_tokens))


def _room_in_cache(valid: ValidCall, num_prompt_tokens: int, needed: int, limits: Limits) -> int:
    """How many new tokens each of the call's sequences can have while all of them are in the cache.

    They share the prompt's whole blocks; every other block is a sequence's own. Raises InvalidRequest when there is
    room for less than `needed` each.
    """
    if limits.cache_tokens is None or valid.num_sequences == 1:
        return limits.max_total_tokens  # one sequence of the promised length always fits
    num_shared = num_prompt_tokens // limits.block_size
    num_own = (limits.cache_tokens // limits.block_size - num_shared) // valid.num_sequences
    room = (num_shared + num_own) * limits.block_size - num_prompt_tokens
    if room < needed:
        name = "best_of" if valid.is_ranked else "num_return_sequences" if valid.beams is None else "num_beams"
        raise InvalidRequest(
            name,
            f"`{name}` sequences must fit the cache of {limits.cache_tokens} tokens together: after "
            f"{num_prompt_tokens} prompt tokens each may have {max(room, 0)} new ones. "
            f"Given: {valid.num_sequences} sequences of {needed}",
        )
    return room


def _sampling(call: GenerateCall, num_choices: int, watermark: WatermarkParams) -> SamplingParams:
    """Whether and how the call samples."""
    # An explicit greedy choice leaves the sampling parameters without effect, so they are not judged either.
    is_greedy = call.do_sample is False
    temperature = None if is_greedy else call.temperature
    top_k = None if is_greedy else call.top_k
    top_p = None if is_greedy or call.top_p == 1 else call.top_p
    typical_p = None if is_greedy or call.typical_p == 1 else call.typical_p

    is_cut_off = implies_sampling(call)
    implied = is_cut_off or any(value is not None for value in (temperature, top_k, top_p, typical_p))
    if num_choices > 1 and not (call.do_sample or implied):
        name = "best_of" if call.best_of is not None and call.best_of > 1 else "num_return_sequences"
        raise InvalidRequest(
            name,
            f"`{name}` > 1 needs sampling: set `do_sample` or a `temperature`, `top_k`, `top_p` or `typical_p`. "
            f"Given: {num_choices}",
        )
    if temperature is not None:
        temperature = check_positive("temperature", temperature)
    repetition_penalty = 1.0
    if call.repetition_penalty is not None:
        repetition_penalty = check_positive("repetition_penalty", call.repetition_penalty)
    frequency_penalty = 0.0 if call.frequency_penalty is None else call.frequency_penalty
    if not -2.0 <= frequency_penalty <= 2.0:
        raise InvalidRequest(
            "frequency_penalty", f"`frequency_penalty` must be >= -2.0 and <= 2.0. Given: {frequency_penalty}"
        )
    for name, mass in (("top_p", top_p), ("typical_p", typical_p)):
        if mass is not None and not (0.0 < mass < 1.0 and float(np.float32(mass)) > 0.0):
            raise InvalidRequest(name, f"`{name}` must be > 0.0 and <= 1.0. Given: {mass}")
    if top_k is not None and not 0 < top_k < 2**31:
        raise InvalidRequest("top_k", f"`top_k` must be strictly positive and below 2^31. Given: {top_k}")
    if call.seed is not None and not 0 <= call.seed < SEED_RANGE:
        raise InvalidRequest("seed", f"`seed` must be >= 0 and below 2^64. Given: {call.seed}")

    does_sample = bool(call.do_sample) or any(
        (is_cut_off, temperature not in {None, 1.0}, top_k is not None, top_p is not None, typical_p is not None)
    )
    return SamplingParams(
        watermark=_check_applicable(watermark) if call.watermark else None,
        repetition_penalty=repetition_penalty,
        frequency_penalty=frequency_penalty,
        temperature=temperature if does_sample and temperature is not None else 1.0,
        top_k=top_k or 0,
        top_p=1.0 if top_p is None else top_p,
        typical_p=1.0 if typical_p is None else typical_p,
        do_sample=does_sample,
        seed=secrets.randbits(DRAWN_SEED_BITS) if call.seed is None else call.seed,
    )


def _check_applicable(watermark: WatermarkParams) -> WatermarkParams:
    """The server's watermark, which must mark text also in the single precision that it is computed with."""
    if not 0 < green_threshold(watermark.gamma) < 2**MANTISSA_BITS:
        raise InvalidRequest(
            "watermark",
            f"`watermark` cannot be applied: with this server's gamma of {watermark.gamma} all tokens have one colour",
        )
    if not np.float32(watermark.delta) > 0.0:
        raise InvalidRequest(
            "watermark",
            f"`watermark` cannot be applied: with this server's delta of {watermark.delta} green tokens gain nothing",
        )
    return watermark


def _check_lengths(call: GenerateCall) -> None:
    for name, value in (("max_new_tokens", call.max_new_tokens), ("max_length", call.max_length)):
        if value is not None and value < 1:
            raise InvalidRequest(name, f"`{name}` must be strictly positive. Given: {value}")


def _check_stop(stop: tuple[str, ...], limits: Limits) -> None:
    if len(stop) > limits.max_stop_sequences:
        raise InvalidRequest(
            "stop", f"`stop` supports up to {limits.max_stop_sequences} stop sequences. Given: {len(stop)}"
        )
    for text in stop:
        if len(text) > limits.max_stop_length:
            raise InvalidRequest(
                "stop", f"`stop` sequences may have {limits.max_stop_length} characters. Given: one of {len(text)}"
            )
        check_encodable("stop", text)


def _check_prompt(call: GenerateCall, limits: Limits) -> None:
    match call.prompt:
        case TokenPrompt(ids):
            if not ids:
                raise InvalidRequest("prompt", "`prompt` must not be empty")
            num_chars = 0
        case ChatPrompt(messages):
            check_messages(messages, limits)
            num_chars = sum(len(message.content) for message in messages)
        case str(text):
            if not text:
                raise InvalidRequest("prompt", "`prompt` must not be empty")
            check_encodable("prompt", text)
            num_chars = len(text)
    if call.prefix is not None:
        if not isinstance(call.prompt, str):
            raise InvalidRequest("prefix", "`prefix` goes with a text prompt only")
        check_encodable("prefix", call.prefix)
        num_chars += len(call.prefix)
    if num_chars > limits.max_prompt_chars:
        new_tokens = min(call.max_new_tokens or 1, MAX_RESERVED_NEW_TOKENS)
        raise PromptTooLong(f"{num_chars} characters", limits.max_total_tokens, max_new_tokens=new_tokens)

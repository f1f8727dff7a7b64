"""The text side's door: calls in our own parameter names in, text deltas out.

Dialects translate their bodies to a `GenerateCall` and what comes back to bytes; limits, defaults, templates,
tokens and stop strings live behind this door. Free of torch.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Protocol

import msgspec

from gyrfalcon.engine.interface import EngineHealth, EngineState, EngineStats, FinishReason
from gyrfalcon.errors import Overloaded

__all__ = [
    "Caller",
    "ChatMessage",
    "ChatPrompt",
    "Choice",
    "ChoiceEnd",
    "Completion",
    "Delta",
    "DetectCall",
    "Detection",
    "EngineHealth",
    "EngineState",
    "EngineStats",
    "FinishReason",
    "GenerateCall",
    "GeneratedToken",
    "KeyScore",
    "ModelInfo",
    "PromptToken",
    "ScoredToken",
    "TextService",
    "TextSpan",
    "Timings",
    "TokenPrompt",
]


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A conversation, made into text by the model's own chat template.

    When the last message is the assistant's it is continued instead of answered.
    """

    messages: tuple[ChatMessage, ...]


@dataclass(frozen=True, slots=True)
class TokenPrompt:
    """A prompt that is already token ids; nothing is added to it."""

    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """On whose behalf a call is made.

    name: for logs; empty where nobody had to say. cache_salt: calls share cached prefixes only under an equal salt.
    max_queued_tokens: most prompt tokens of the caller's that may wait; None leaves it to the queue's own bound.
    """

    name: str = ""
    cache_salt: str = ""
    max_queued_tokens: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateCall:
    """What a caller asks for; None where absence has a meaning of its own. Nothing in it is checked yet."""

    prompt: str | ChatPrompt | TokenPrompt
    prefix: str | None = None  # put in front of a text prompt before tokenising; never part of any answer
    model: str | None = None
    request_id: str | None = None  # made by the service when None; never taken from a client
    caller: Caller = Caller()
    trace_headers: tuple[tuple[str, str], ...] = ()  # the caller's W3C trace context: names and values

    max_new_tokens: int | None = None  # wins over max_length; both None: the server's default
    max_length: int | None = None  # prompt and new tokens together; a prefix's own tokens are not counted
    min_new_tokens: int | None = None  # end-of-sequence is banned before this many new tokens
    min_length: int | None = None  # the same, prompt and new tokens together
    truncate: int | None = None  # keep only this many tokens, the prompt's last
    drop_start_to_fit: bool = False  # where prompt and new tokens exceed the context, drop the prompt's start

    do_sample: bool | None = None  # None: sample only if temperature, top_k, top_p or typical_p imply it
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    min_p: float | None = None  # above 0, this and the two cut-offs imply sampling as well
    epsilon_cutoff: float | None = None
    eta_cutoff: float | None = None
    seed: int | None = None  # None: drawn at random
    watermark: bool = False

    # None is off; what each does is said where `SamplingParams` has it
    encoder_repetition_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    encoder_no_repeat_ngram_size: int | None = None
    bad_words_ids: tuple[tuple[int, ...], ...] | None = None
    sequence_bias: tuple[tuple[tuple[int, ...], float], ...] | None = None
    suppress_tokens: tuple[int, ...] | None = None
    begin_suppress_tokens: tuple[int, ...] | None = None
    forced_bos_token_id: int | None = None
    forced_eos_token_id: tuple[int, ...] | None = None
    exponential_decay_length_penalty: tuple[int, float] | None = None  # start and factor
    remove_invalid_values: bool = False
    renormalize_logits: bool = False

    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] | None = None  # None: the model's own end-of-sequence ids
    best_of: int | None = None  # generate this many, return them ranked
    num_return_sequences: int | None = None  # generate and return this many, unranked; of beams the best

    num_beams: int | None = None  # above 1: beam search; with one beam the rest of these has no effect
    num_beam_groups: int | None = None  # above 1: diverse beam search
    diversity_penalty: float | None = None
    length_penalty: float | None = None
    early_stopping: bool | str | None = None  # or "never"
    pad_token_id: int | None = None  # what finished groups of a diverse search go on with; in no answer

    prompt_logprobs: bool = False
    top_n: int | None = None  # likeliest tokens to report at every position


# Made for every token: structs take a quarter of the time that frozen dataclasses take.
class GeneratedToken(msgspec.Struct, frozen=True):
    """One generated token. The texts of a choice's tokens that are not special join to the choice's text.

    text: "" while a character is incomplete; a special token's literal text. logprob: natural log, after the
    request's processors. top: the likeliest tokens at this position, when asked for.
    """

    id: int
    text: str
    logprob: float
    special: bool
    top: tuple[GeneratedToken, ...] | None = None


@dataclass(frozen=True, slots=True)
class PromptToken:
    """One token of the prompt; the first has no log-probability. Its text is decoded without its neighbours."""

    id: int
    text: str
    logprob: float | None


@dataclass(frozen=True, slots=True)
class ChoiceEnd:
    """How a choice ended; comes with its last token.

    text: all of it, special tokens left out, the stop string kept. num_tokens: generated ones, end-of-sequence
    included. seed: that of this choice when it was sampled, else None. score: what a beam search ranked it by.
    beam_indices: for each of its tokens the beam it was appended to, in a beam search.
    """

    text: str
    finish_reason: FinishReason
    num_tokens: int
    seed: int | None
    num_prompt_tokens: int
    score: float | None = None
    beam_indices: tuple[int, ...] | None = None


class Delta(msgspec.Struct, frozen=True):
    """One token of one choice as it is produced; `end` is set on the last one."""

    choice: int  # 0..n-1
    index: int  # position among the choice's generated tokens, from 1
    token: GeneratedToken
    end: ChoiceEnd | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    """One finished continuation; `index` is its place in generation order, of beams its rank.

    score, beam_indices: as in `ChoiceEnd`.
    """

    index: int
    text: str
    finish_reason: FinishReason
    tokens: tuple[GeneratedToken, ...]
    seed: int | None
    score: float | None = None
    beam_indices: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds of one request: arrival to engine, waiting there, first step to end, and all of it."""

    validation_s: float
    queue_s: float
    inference_s: float
    total_s: float


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished request. With best_of the first choice is the best, the others keep generation order."""

    request_id: str
    model: str  # name of the model that ran
    choices: tuple[Choice, ...]
    num_prompt_tokens: int  # after truncation
    prompt: tuple[PromptToken, ...] | None  # when log-probabilities of the prompt were asked for
    timings: Timings

    @property
    def num_generated_tokens(self) -> int:
        return sum(len(choice.tokens) for choice in self.choices)


@dataclass(frozen=True, slots=True)
class TextSpan:
    """A token and the part of the text it came from; offsets in UTF-8 bytes, `stop` not included."""

    id: int
    text: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DetectCall:
    """A text to look for a watermark in; None where the server's own setting holds. Nothing in it is checked yet."""

    text: str | TokenPrompt
    prompt: str | TokenPrompt | None = None  # what the text went on from: gives its first token a context
    model: str | None = None  # whose tokenizer, and whose server's settings
    keys: tuple[int, ...] | None = None
    gamma: float | None = None
    alpha: float | None = None  # false-positive rate of the decision, over all keys together
    ignore_repeated: bool = True  # score a token after the same token once only


@dataclass(frozen=True, slots=True)
class ScoredToken:
    """One token of a text that was looked at. is_scored: it has a context, and did not occur after it before."""

    id: int
    text: str
    is_scored: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyScore:
    """What one key says of a text. Without a scored token there is nothing but `p_value` 1."""

    num_green: int  # of the scored tokens
    green_fraction: float | None
    z_score: float | None
    p_value: float  # chance of as many green tokens or more in a text that does not know the key
    corrected_p_value: float  # the same for the smallest of as many p-values as there are keys
    is_found: bool | None  # None: too few tokens to say
    green: tuple[bool | None, ...]  # for each token of the text; None where it has no context


@dataclass(frozen=True, slots=True, kw_only=True)
class Detection:
    """What all keys say of a text, in their order; the keys themselves are not in it."""

    model: str
    gamma: float
    alpha: float
    num_scored: int
    is_found: bool | None  # by any key; None: too few tokens to say, and `reason` says how many it takes
    reason: str | None
    keys: tuple[KeyScore, ...]
    tokens: tuple[ScoredToken, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """A served model and the limits in force for it."""

    name: str
    revision: str | None
    dtype: str
    device: str
    num_parameters: int
    num_text_tokens: int  # ids below this are the tokenizer's; the model's logits may be wider
    max_context: int  # tokens the model's positions allow
    max_input_tokens: int
    max_total_tokens: int
    cache_tokens: int
    max_concurrent_requests: int
    max_best_of: int
    max_stop_sequences: int
    max_top_n_tokens: int
    default_max_new_tokens: int | None  # None: fill the context
    has_chat_template: bool


class TextService(Protocol):
    """Runs calls against the served models. Raises the errors of `gyrfalcon.errors`, never status codes."""

    @property
    def models(self) -> tuple[ModelInfo, ...]:
        """The served models, the default one first."""
        ...

    def resolve(self, model: str | None) -> ModelInfo:
        """The model that a request naming `model` runs on. Raises UnknownModel."""
        ...

    def turn_away(self, caller: Caller, trace_headers: tuple[tuple[str, str], ...] = ()) -> Overloaded | None:
        """Why a call that comes now is to be turned away, whatever it asks for; None where there may be room for it.

        What is not None is recorded as a request that has failed with it.
        """
        ...

    def stream(self, call: GenerateCall) -> AsyncGenerator[list[Delta], None]:
        """Yield the call's deltas as they are produced, those ready together in one list; the first one raises
        what is wrong with the call. Closing the generator (`contextlib.aclosing`) ends the work.
        """
        ...

    async def complete(self, call: GenerateCall) -> Completion:
        """Run the call to its end. Cancelling ends the work."""
        ...

    async def tokenize(
        self, text: str, *, model: str | None = None, add_special_tokens: bool = True
    ) -> tuple[TextSpan, ...]:
        """The text's tokens; no limit on their number applies."""
        ...

    async def detect(self, call: DetectCall) -> Detection:
        """Whether the text carries a watermark of one of the keys."""
        ...

    async def render_chat(self, prompt: ChatPrompt, *, model: str | None = None) -> str:
        """The conversation as the text that the model's template makes of it. Raises TemplateError."""
        ...

    async def health(self) -> EngineHealth:
        """Whether every served model would run a request now; the first that would not, if any."""
        ...

    def stats(self) -> dict[str, EngineStats]:
        """The newest reading of each model's engine, by model name."""
        ...

    def flush_prefix_cache(self) -> None:
        """Let no later call find prefixes that earlier ones have left in the cache."""
        ...

    async def close(self) -> None:
        """Close the engines; idempotent."""
        ...

"""Door 1: token ids in, token events out. What crosses here may cross a process boundary.

Nothing above this door knows of blocks, batches or devices; nothing below it knows of text, HTTP or chat.
"""

from __future__ import annotations

import enum
from collections.abc import AsyncGenerator
from typing import Protocol

import msgspec


class FinishReason(enum.StrEnum):
    """Why a choice ended. The engine ends a choice by length or end-of-sequence; stop strings are the service's."""

    LENGTH = "length"
    EOS = "eos"
    STOP = "stop"


class WatermarkParams(msgspec.Struct, frozen=True, kw_only=True):
    """A green-list watermark (Kirchenbauer et al. 2023, arXiv 2301.10226), algorithm 2.

    gamma: expected fraction of the vocabulary that is green, 0 < gamma < 1.
    delta: added to every green token's logit.
    key: secret from which the green lists are drawn, 0 <= key < 2**64.
    context_width: tokens before a token that its green list depends on, >= 1; a text's first tokens have fewer.
    """

    gamma: float = 0.5
    delta: float = 2.0
    key: int = 15485863
    context_width: int = 1


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, weakref=True):
    """How one token is chosen from its logits; neutral values are off. Order of effect: as listed, then the draw.

    Every id is below the logits width, every number is finite in single precision. "The text" is the prompt and what
    was generated, all as ids; "stop ids" are the request's `stop_token_ids`.

    sequence_bias: (ids, bias) pairs; the bias is added to the last id where the others end the text. Of pairs with
    equal ids the last counts. The diversity penalty of beam groups comes next in the order.
    bad_words_ids: bans the last id of each where the others end the text; an entry that is one stop id is void. The
    request's `min_new_tokens` comes next in the order.
    exponential_decay_length_penalty: (start, factor); after `start` new tokens the stop ids' logits gain their
    absolute value times factor ** (new tokens - start) - 1.
    """

    watermark: WatermarkParams | None = None
    sequence_bias: tuple[tuple[tuple[int, ...], float], ...] = ()
    encoder_repetition_penalty: float = 1.0  # > 0; multiplies positive and divides negative logits of the prompt's ids
    repetition_penalty: float = 1.0  # > 0; divides positive and multiplies negative logits of ids seen so far
    frequency_penalty: float = 0.0  # subtracts this times an id's share of the tokens so far
    no_repeat_ngram_size: int = 0  # bans what would complete an n-gram of the text again; 0 is off
    encoder_no_repeat_ngram_size: int = 0  # the same for n-grams of the prompt
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    forced_bos_token_id: int | None = None  # the only choice after a prompt of one token
    forced_eos_token_ids: tuple[int, ...] = ()  # the only choices for the last of `max_new_tokens`
    remove_invalid_values: bool = False  # NaN becomes 0, an infinity the largest finite number of its sign
    exponential_decay_length_penalty: tuple[int, float] | None = None
    suppress_tokens: tuple[int, ...] = ()  # never chosen, not even where forced
    begin_suppress_tokens: tuple[int, ...] = ()  # not chosen as the first token; one forced by its position is not it
    temperature: float = 1.0  # > 0; divides the logits; from here to `eta_cutoff` only where `do_sample`
    top_k: int = 0  # keeps the k largest and their ties; 0 keeps all
    top_p: float = 1.0  # keeps the smallest set of likeliest tokens whose mass reaches this
    min_p: float = 0.0  # keeps what is at least this times as likely as the likeliest token
    typical_p: float = 1.0  # keeps the tokens of most typical information content up to this mass
    epsilon_cutoff: float = 0.0  # keeps what is at least this likely; below 1
    eta_cutoff: float = 0.0  # the same, by a threshold that falls as the entropy grows; below 1
    renormalize_logits: bool = False  # scores become log-probabilities again, which beams see in their sums
    do_sample: bool = False  # False takes the largest logit, the lowest id on a tie
    seed: int = 0  # 0 <= seed < 2**64; choice c draws with the stream of (seed + c) mod 2**64


class EarlyStopping(enum.StrEnum):
    """When a beam search whose finished slots are all filled stops."""

    TRUE = "true"  # at once
    FALSE = "false"  # when no running beam would be better if it ended now
    NEVER = "never"  # when none could be better at any length


class BeamParams(msgspec.Struct, frozen=True, kw_only=True):
    """Beam search; the request's `num_choices` best sequences are returned.

    num_beams: >= 2 and >= num_choices. num_beam_groups: divides num_beams; above 1 the search is diverse and
    deterministic. diversity_penalty: subtracted from a token's score for every beam of an earlier group that chose it
    in the same step. length_penalty: finished sequences are ranked by score / length**this. padding_id: what finished
    groups of a diverse search go on with; the first stop id if None.
    """

    num_beams: int
    num_beam_groups: int = 1
    diversity_penalty: float = 0.0
    length_penalty: float = 1.0
    early_stopping: EarlyStopping = EarlyStopping.FALSE
    padding_id: int | None = None


class EngineRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One prompt and what to generate from it.

    request_id: made by the server, unique among live requests. prompt_ids: at least one id, each below the
    logits width. num_choices: independent continuations forked from one prefill, or with beams the best sequences.
    max_new_tokens: >= 1, and len(prompt_ids) + max_new_tokens <= EngineFacts.max_total_tokens. min_new_tokens: the
    stop ids are banned before this many tokens. stop_token_ids: end a choice; the id itself is its last token.
    prompt_logprobs: also score the prompt (raw logits), which forgoes prefix reuse. top_n: also report this many
    likeliest tokens a step. cache_salt: requests share cached prefixes only under an equal salt. begin_within_s: what
    no step has run any of after so many seconds ends with QueueTimeout; None waits for as long as it takes.
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    max_new_tokens: int
    sampling: SamplingParams = SamplingParams()
    beams: BeamParams | None = None
    num_choices: int = 1
    min_new_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    prompt_logprobs: bool = False
    top_n: int = 0
    cache_salt: str = ""
    begin_within_s: float | None = None


class PromptEvent(msgspec.Struct, frozen=True, tag="prompt"):
    """The prompt has been computed; exactly one a request, before its first token.

    queue_s: seconds between arrival in the engine and the first step that ran it. num_cached_tokens: prompt tokens
    taken from the prefix cache. logprobs: when asked for, one entry a prompt token, natural log, the first None.
    """

    queue_s: float
    num_cached_tokens: int
    logprobs: tuple[float | None, ...] | None = None


class TokenEvent(msgspec.Struct, frozen=True, tag="token"):
    """One token of one choice; the last one of a choice carries its finish reason.

    logprob: natural log, after the request's own processors and warpers. top: (id, logprob) pairs, descending,
    ties with the last included, when asked for.
    """

    choice: int  # 0..num_choices-1
    token_id: int
    logprob: float
    finish_reason: FinishReason | None = None
    top: tuple[tuple[int, float], ...] | None = None


class ScoreEvent(msgspec.Struct, frozen=True, tag="score"):
    """How a beam search ranked a choice; comes before that choice's tokens, all of which come at the end.

    score: what it was ranked by. beam_indices: for each of its tokens the beam it was appended to.
    """

    choice: int
    score: float
    beam_indices: tuple[int, ...]


EngineEvent = PromptEvent | ScoreEvent | TokenEvent


class EngineFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What start-up found out; constant while the engine lives."""

    vocab_size: int  # width of the logits
    max_context: int  # tokens the model's positions allow
    max_total_tokens: int  # most tokens one sequence may reach: min(max_context, cache, settings)
    cache_tokens: int  # tokens the KV cache holds
    cache_bytes: int
    weight_bytes: int
    num_parameters: int
    dtype: str  # "float32", "bfloat16", "float16"
    device: str  # "cpu", "cuda"


class StepReading(msgspec.Struct, frozen=True, kw_only=True):
    """What one step did and how long its parts took, in seconds; parts that did not happen are 0."""

    num_prefill_tokens: int  # prompt tokens, and tokens computed again after preemption
    num_decode_rows: int  # rows that only added their newest token, and perhaps a draft
    num_admitted: int  # requests that ran for the first time
    has_succeeded: bool
    num_ahead: int = 0  # further tokens of each of those rows that ran at once; the times below are of all of them
    num_draft_tokens: int  # run by speculation, ahead of being drawn
    num_accepted_tokens: tuple[int, ...]  # for each row with a draft, how many of its tokens were then drawn
    schedule_s: float  # choosing rows and blocks, gathering the plan
    forward_s: float  # the model
    sample_s: float  # logits, processors and choice
    commit_s: float  # appending, forking, freeing, reporting


class EngineStats(msgspec.Struct, frozen=True, kw_only=True):
    """A reading of the engine's gauges and running totals."""

    num_waiting: int = 0  # requests that hold no cache
    num_running: int = 0  # sequences in the batch
    num_promised_tokens: int = 0  # tokens the running sequences may come to hold
    cache_usage: float = 0.0  # 0..1, of the blocks
    num_steps: int = 0
    num_preemptions: int = 0
    prefix_hit_tokens: int = 0  # prompt tokens not computed thanks to the cache, since start
    prefix_query_tokens: int = 0  # prompt tokens looked up, since start
    prefill_tokens: int = 0  # prompt tokens computed, since start
    decode_tokens: int = 0  # tokens generated, since start
    draft_tokens: int = 0  # tokens run by speculation, since start
    accepted_tokens: int = 0  # those of them that were generated, since start
    last_step_s: float = 0.0
    peak_memory_bytes: int = 0  # largest resident size of the engine's own process; 0 where it shares the caller's


class EngineState(enum.StrEnum):
    """Where an engine is in its life."""

    STARTING = "starting"
    READY = "ready"
    STUCK = "stuck"  # work is pending and no step has ended for a long time
    DEAD = "dead"  # between a death and the restart, or given up


class EngineHealth(msgspec.Struct, frozen=True, kw_only=True):
    """Whether the engine can serve; `detail` says why not, in a sentence."""

    state: EngineState
    detail: str = ""

    @property
    def is_healthy(self) -> bool:
        return self.state is EngineState.READY


class Engine(Protocol):
    """Turns token ids into token events. Knows nothing of text, HTTP or chat."""

    @property
    def facts(self) -> EngineFacts:
        """Facts found at start; valid once the engine has started."""
        ...

    def generate(self, request: EngineRequest) -> AsyncGenerator[list[EngineEvent], None]:
        """Yield the request's events, those that are ready together in one list.

        Ends after every choice has finished. Closing the generator early (`contextlib.aclosing`) aborts the request
        and frees what it held. Raises GenerationFailed when this request fails, InvalidRequest when its parameters
        leave no token to choose, QueueTimeout when it has not begun in time, EngineDead when the engine ends under it.
        """
        ...

    def end_choice(self, request_id: str, choice: int) -> None:
        """Stop generating one choice (its stop string was found); its later events may be missing. Never fails."""
        ...

    def stats(self) -> EngineStats:
        """The newest reading; cheap, does not wait for a step."""
        ...

    async def health(self) -> EngineHealth:
        """Whether requests would be served now; does not wait for running work."""
        ...

    async def close(self) -> None:
        """Stop, failing whatever still runs; idempotent."""
        ...

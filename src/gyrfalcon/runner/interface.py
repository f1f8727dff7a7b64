"""Door 2: a step's plan in, its candidates out. Plain values of numpy columns, free of torch.

A plan holds everything a step depends on: it can be logged, replayed, or sent to other ranks.
Letters: R rows (sequences in the step), T tokens (all rows, packed), S samples (draws; a row may have several),
W blocks in the widest table, C block copies.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Protocol

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int32]
Longs = npt.NDArray[np.int64]
Seeds = npt.NDArray[np.uint64]
Floats = npt.NDArray[np.float32]
Flags = npt.NDArray[np.bool_]


NO_IDS: Ints = np.empty(0, dtype=np.int32)


@dataclass(frozen=True, slots=True)
class IdLists:
    """A list of token ids for every sample, end to end."""

    ids: Ints
    starts: Longs  # [S + 1]; an empty range where a sample has none

    def take(self, samples: npt.NDArray[np.intp]) -> IdLists:
        """The lists of some samples, in their order."""
        positions, starts = _ranges(self.starts, samples)
        return IdLists(self.ids[positions], starts)


@dataclass(frozen=True, slots=True)
class WeightedIdLists:
    """A list of token ids for every sample, end to end, and a number for each id; no id is twice in a list."""

    ids: Ints
    weights: Floats
    starts: Longs  # [S + 1]

    def take(self, samples: npt.NDArray[np.intp]) -> WeightedIdLists:
        """The lists of some samples, in their order."""
        positions, starts = _ranges(self.starts, samples)
        return WeightedIdLists(self.ids[positions], self.weights[positions], starts)


def _ranges(starts: Longs, samples: npt.NDArray[np.intp]) -> tuple[npt.NDArray[np.intp], Longs]:
    """Where the entries of some samples stand, and where each sample's begin among them."""
    lengths = np.diff(starts)[samples]
    taken = np.zeros(len(samples) + 1, dtype=np.int64)
    np.cumsum(lengths, out=taken[1:])
    positions = np.arange(taken[-1]) + np.repeat(starts[:-1][samples] - taken[:-1], lengths)
    return positions.astype(np.intp), taken


@dataclass(frozen=True, slots=True)
class SamplingColumns:
    """One entry a sample, in the order of effect; where not said otherwise as `engine.interface.SamplingParams` says.

    What depends on ids alone (does this text end with the head of a bad word?) is settled before: a list here holds
    the ids it comes down to for this one token.
    """

    rows_S: Ints  # index into the plan's rows; repeated when a row's token is drawn for several choices or positions
    tokens_back_S: Ints  # query tokens of the row after the one whose successor is drawn; above 0 in a draft
    positions_S: Ints  # position the drawn token will take
    seeds_S: Seeds
    do_sample_S: Flags
    watermark_gamma_S: Floats  # 0 where there is no watermark
    watermark_delta_S: Floats
    watermark_key_S: Seeds
    watermark_context: IdLists  # ids before the last one that its green list depends on too, the nearest first
    bias: WeightedIdLists  # added
    diversity: WeightedIdLists  # how often earlier beam groups chose an id for this position
    diversity_penalty_S: Floats  # times that count is subtracted
    history: IdLists  # all token ids so far, of the samples whose penalties need them
    prompt_lens_S: Ints
    encoder_repetition_factor_S: Floats  # 1 / encoder_repetition_penalty
    repetition_penalty_S: Floats
    frequency_penalty_S: Floats
    banned: IdLists  # to -inf: repeated n-grams, bad words, stop ids that come too early
    forced: IdLists  # where not empty, every other id becomes -inf and these 0
    remove_invalid_S: Flags
    decaying: IdLists  # ids that gain their absolute value times `decay_S`
    decay_S: Floats
    suppressed: IdLists  # to -inf
    temperature_S: Floats
    top_k_S: Ints
    top_p_S: Floats
    min_p_S: Floats
    typical_p_S: Floats
    epsilon_cutoff_S: Floats
    eta_cutoff_S: Floats
    keep_S: Ints  # tokens that survive every warper; 1, more where beams need others than stop ids
    renormalize_S: Flags
    top_n_S: Ints  # likeliest tokens to report; 0 for none
    is_plain_S: Flags  # the likeliest token by the logits as they are: nothing above has an effect, nothing is reported
    num_candidates_S: Ints  # of a beam: propose this many tokens instead of choosing one; 0 for a choice

    def take(self, samples: npt.NDArray[np.intp]) -> SamplingColumns:
        """The columns of some samples, in their order."""
        columns = ((field.name, getattr(self, field.name)) for field in fields(self))
        return SamplingColumns(
            **{name: column[samples] if name.endswith("_S") else column.take(samples) for name, column in columns}
        )


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What one step computes. Rows with a query length above one are prefilling, catching up or running a draft."""

    query_lens_R: Ints  # tokens run this step, >= 1
    context_lens_R: Ints  # tokens already in the cache
    token_ids_T: Ints  # row by row
    block_tables_RW: Ints  # padded with 0
    block_copies_C2: Ints  # (source, destination), done before the forward pass
    samples: SamplingColumns
    kept_rows: Ints  # rows whose logits `choose` will be asked about after this step
    scored_rows: Ints  # rows whose query tokens' successors are scored (prompt log-probabilities)
    scored_ids: Ints  # for each scored row, the id after each of its query tokens, packed; -1 where unknown
    num_ahead: int = 0
    """Further steps to run at once, in which every row runs the token chosen for it in the one before.

    Above 0 only where the executor can run ahead, every row has one token and one sample, in their order, all samples
    are plain and nothing else is asked for. The block tables have room for those tokens.
    """


@dataclass(frozen=True, slots=True)
class ProposedTokens:
    """What beams propose, sample by sample and best first; empty for samples that chose a token."""

    ids: Ints
    scores: Floats  # natural log, after processors and warpers
    keys: npt.NDArray[np.float64]  # what ranks them: the scores, or with sampling the perturbed scores
    starts: Longs  # [S + 1]

    @staticmethod
    def none(num_samples: int) -> ProposedTokens:
        no_floats = np.empty(0, dtype=np.float32)
        starts = np.zeros(num_samples + 1, dtype=np.int64)
        return ProposedTokens(np.empty(0, dtype=np.int32), no_floats, no_floats.astype(np.float64), starts)


NOT_FINITE = -1
"""In place of a token id: the model's logits hold NaN or infinities, so the request fails."""

NOTHING_LEFT = -2
"""In place of a token id: the logits were sound, and the request's own parameters left nothing to choose from."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What the step found, in the order of the plan's samples and scored rows."""

    token_ids_S: Ints  # or NOT_FINITE, or NOTHING_LEFT; 0 for beams
    logprobs_S: Floats
    top_ids: Ints  # packed; see `top_starts`
    top_logprobs: Floats
    top_starts: Longs  # [S + 1]
    scored_logprobs: Floats  # parallel to the plan's `scored_ids`; NaN where the id was -1
    proposed: ProposedTokens
    forward_s: float = 0.0  # seconds in the model, with the choice where the model makes it on its way
    sample_s: float = 0.0  # seconds from hidden states to chosen tokens and scores
    ahead: tuple[StepResult, ...] = ()  # of the steps run ahead, in order; their times are in this one's


@dataclass(frozen=True, slots=True)
class ExecutorFacts:
    """What loading the model found; the engine sizes its pool from it."""

    vocab_size: int
    max_context: int
    num_blocks: int  # block 0 is never allocated: padded table entries point at it
    block_size: int  # tokens
    cache_bytes: int
    weight_bytes: int
    num_parameters: int
    dtype: str
    device: str
    can_run_ahead: bool = False  # whether a plan may have `num_ahead` above 0


class Executor(Protocol):
    """Runs plans, one at a time, on one device or on several ranks."""

    @property
    def facts(self) -> ExecutorFacts: ...

    def execute(self, plan: StepPlan) -> StepResult:
        """Run one step; the caller passes the next plan only after this returns."""
        ...

    def choose(self, samples: SamplingColumns) -> StepResult:
        """Choose once more from the logits of the last plan's kept rows; `rows_S` are that plan's rows."""
        ...

    def close(self) -> None:
        """Free the device's memory; idempotent."""
        ...

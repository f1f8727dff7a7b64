"""From rows' logits to a step's result: processors, then one token a choice and the candidates of every beam."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from gyrfalcon.runner.interface import (
    NOT_FINITE,
    NOTHING_LEFT,
    Floats,
    Ints,
    Longs,
    ProposedTokens,
    SamplingColumns,
    StepResult,
)
from gyrfalcon.runner.logits import process_logits
from gyrfalcon.runner.proposals import Proposed, propose
from gyrfalcon.runner.sampler import choose

# N rows, S samples, V vocabulary


@dataclass(frozen=True, slots=True)
class RowLogits:
    """Raw logits of some of a plan's tokens, packed as there, in ascending order of their index."""

    last_tokens_R: Ints  # where each of the plan's rows ends
    tokens_N: Ints
    logits_NV: Tensor  # float32
    ids_N: Ints  # the token whose successor they are about


# Of logits [N, V] each row's likeliest token and its log-probability; NOT_FINITE where there is none.
ChooseGreedy = Callable[[Tensor], tuple[Ints, Floats]]


def choose_or_propose(rows: RowLogits, columns: SamplingColumns, choose_greedy: ChooseGreedy) -> StepResult:
    """The samples' tokens or candidates. Prompt scores are not part of it.

    A sample that is plain is chosen by `choose_greedy`, whatever its neighbours are, so that its bits do not depend on
    them.
    """
    num_samples = len(columns.rows_S)
    of_sample = np.searchsorted(rows.tokens_N, rows.last_tokens_R[columns.rows_S] - columns.tokens_back_S)
    token_ids_S = np.zeros(num_samples, dtype=np.int32)
    logprobs_S = np.zeros(num_samples, dtype=np.float32)
    if columns.is_plain_S.any():
        plain_S = columns.is_plain_S
        ids_N, logprobs_N = choose_greedy(rows.logits_NV)
        token_ids_S[plain_S] = ids_N[of_sample[plain_S]]
        logprobs_S[plain_S] = logprobs_N[of_sample[plain_S]]
        if plain_S.all():
            return tokens_alone(token_ids_S, logprobs_S)

    scores_SV = rows.logits_NV[torch.from_numpy(of_sample).to(rows.logits_NV.device)]
    beams = np.flatnonzero(columns.num_candidates_S > 0)
    choices = np.flatnonzero((columns.num_candidates_S == 0) & ~columns.is_plain_S)
    if beams.size:
        # Beams add their scores up, so processors see log-probabilities there and logits elsewhere.
        where = torch.from_numpy(beams).to(scores_SV.device)
        scores_SV[where] = torch.log_softmax(scores_SV[where], dim=-1)
    scores_SV = process_logits(scores_SV, columns, rows.ids_N[of_sample])

    top: list[tuple[Tensor, Tensor] | None] = [None] * num_samples
    if choices.size:
        chosen = choose(*_some(scores_SV, columns, choices))
        token_ids_S[choices] = chosen.token_ids_S.cpu().numpy()
        logprobs_S[choices] = chosen.logprobs_S.cpu().numpy()
        for sample, likeliest in zip(choices.tolist(), chosen.top, strict=True):
            top[sample] = likeliest
    proposed: list[Proposed | None] = [None] * num_samples
    if beams.size:
        for sample, own in zip(beams.tolist(), propose(*_some(scores_SV, columns, beams)), strict=True):
            proposed[sample] = own
            token_ids_S[sample] = NOT_FINITE if own is None else 0
    if (failed := np.flatnonzero((token_ids_S == NOT_FINITE) & ~columns.is_plain_S)).size:
        raw = rows.logits_NV[torch.from_numpy(of_sample[failed]).to(rows.logits_NV.device)]
        token_ids_S[failed[torch.isfinite(raw).all(dim=-1).cpu().numpy()]] = NOTHING_LEFT
    return _result(token_ids_S, logprobs_S, top, proposed)


def tokens_alone(token_ids_S: Ints, logprobs_S: Floats) -> StepResult:
    """A result with nothing but a token for every sample."""
    none = _no_proposals(len(token_ids_S))
    return StepResult(
        token_ids_S=token_ids_S,
        logprobs_S=logprobs_S,
        top_ids=none.ids,
        top_logprobs=none.scores,
        top_starts=none.starts,
        scored_logprobs=none.scores,
        proposed=none,
    )


@lru_cache(maxsize=64)
def _no_proposals(num_samples: int) -> ProposedTokens:
    """Only read, so all steps of this many samples share them."""
    return ProposedTokens.none(num_samples)


def _result(
    token_ids_S: Ints,
    logprobs_S: Floats,
    top: list[tuple[Tensor, Tensor] | None],
    proposed: list[Proposed | None],
) -> StepResult:
    listed = [pair for pair in top if pair is not None]
    return StepResult(
        token_ids_S=token_ids_S,
        logprobs_S=logprobs_S,
        top_ids=_joined([ids for ids, _ in listed], np.int32),
        top_logprobs=_joined([logprobs for _, logprobs in listed], np.float32),
        top_starts=_starts([0 if pair is None else len(pair[0]) for pair in top]),
        scored_logprobs=np.empty(0, dtype=np.float32),
        proposed=_pack(proposed),
    )


def _some(scores_SV: Tensor, columns: SamplingColumns, samples: np.ndarray) -> tuple[Tensor, SamplingColumns]:
    if len(samples) == len(scores_SV):
        return scores_SV, columns
    return scores_SV[torch.from_numpy(samples).to(scores_SV.device)], columns.take(samples)


def _pack(proposed: list[Proposed | None]) -> ProposedTokens:
    own = [one for one in proposed if one is not None]
    return ProposedTokens(
        ids=_joined([one.ids_C for one in own], np.int32),
        scores=_joined([one.scores_C for one in own], np.float32),
        keys=_joined([one.keys_C for one in own], np.float64),
        starts=_starts([0 if one is None else len(one.ids_C) for one in proposed]),
    )


def _joined(parts: list[Tensor], dtype: type[np.generic]) -> np.ndarray:
    return torch.cat(parts).cpu().numpy().astype(dtype) if parts else np.empty(0, dtype=dtype)


def _starts(lengths: list[int]) -> Longs:
    starts = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=starts[1:])
    return starts

"""What the rows of beam searches propose: their best next tokens, or with sampling a draw without replacement."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gyrfalcon.runner.interface import SamplingColumns
from gyrfalcon.runner.sampler import perturbed_scores, warped_groups

# S samples, C candidates of a sample


@dataclass(frozen=True, slots=True)
class Proposed:
    """One sample's candidates, best first; all on the device."""

    ids_C: Tensor
    scores_C: Tensor  # float32, natural log
    keys_C: Tensor  # float64, descending: what ranks them


def propose(scores_SV: Tensor, columns: SamplingColumns) -> list[Proposed | None]:
    """The candidates of each sample from processed log-probabilities; None where these hold NaN or nothing finite.

    A draw without replacement takes the largest perturbed scores (Kool et al. 2019, arXiv 1903.06059).
    """
    proposed: list[Proposed | None] = [None] * len(scores_SV)
    for group in warped_groups(scores_SV, columns):
        keys_GM = perturbed_scores(group, columns).double()
        for index, sample in enumerate(group.samples_G):
            wanted = min(int(columns.num_candidates_S[sample]), keys_GM.shape[1])
            keys_C, places_C = keys_GM[index].topk(wanted)
            if torch.isfinite(keys_C[0]):
                proposed[sample] = Proposed(group.ids_GM[index][places_C], group.scores_GM[index][places_C], keys_C)
    return proposed

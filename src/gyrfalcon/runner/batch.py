"""A step's plan as the forward pass reads it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from gyrfalcon.kernels.interface import AttentionInputs
from gyrfalcon.runner.interface import Ints, StepPlan


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """Everything the forward pass reads, on the host. Letters: T tokens, R rows."""

    ids_T: Ints
    attention: AttentionInputs
    last_tokens_R: Ints  # where each row's tokens end


def make_batch(plan: StepPlan, block_size: int, device: torch.device) -> ForwardBatch:
    """Lay the plan's rows end to end."""
    query_starts = np.zeros(len(plan.query_lens_R) + 1, dtype=np.int32)
    np.cumsum(plan.query_lens_R, out=query_starts[1:])
    attention = AttentionInputs(query_starts, plan.context_lens_R, plan.block_tables_RW, block_size, device)
    return ForwardBatch(plan.token_ids_T, attention, query_starts[1:] - 1)

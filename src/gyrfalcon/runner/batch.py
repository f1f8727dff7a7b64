"""A step's plan as tensors on the device."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gyrfalcon.kernels.interface import AttentionInputs
from gyrfalcon.runner.interface import Ints, StepPlan


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """Everything the forward pass reads. Letters: T tokens, R rows, C block copies."""

    ids_T: Tensor
    positions_T: Tensor
    attention: AttentionInputs
    copy_sources_C: Tensor
    copy_targets_C: Tensor


def make_batch(plan: StepPlan, block_size: int, device: str) -> ForwardBatch:
    """Lay the plan's rows end to end and find each token's position and cache slot."""
    query_starts = np.zeros(len(plan.query_lens_R) + 1, dtype=np.int32)
    np.cumsum(plan.query_lens_R, out=query_starts[1:])
    rows_T = np.repeat(np.arange(len(plan.query_lens_R)), plan.query_lens_R)
    positions_T = np.arange(len(rows_T)) - query_starts[rows_T] + plan.context_lens_R[rows_T]
    blocks_T = plan.block_tables_RW[rows_T, positions_T // block_size].astype(np.int64)
    slots_T = blocks_T * block_size + positions_T % block_size
    return ForwardBatch(
        ids_T=_on(plan.token_ids_T, device),
        positions_T=_on(positions_T, device),
        attention=AttentionInputs(
            query_starts=query_starts,
            context_lens=plan.context_lens_R,
            block_tables_RW=_on(plan.block_tables_RW, device),
            slot_mapping_T=_on(slots_T, device),
        ),
        copy_sources_C=_on(plan.block_copies_C2[:, 0], device),
        copy_targets_C=_on(plan.block_copies_C2[:, 1], device),
    )


def _on(values: Ints | np.ndarray, device: str) -> Tensor:
    return torch.from_numpy(values.astype(np.int64)).to(device)

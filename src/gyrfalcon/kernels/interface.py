"""Door 3: the operations a model is written in, one table a device.

Letters: T tokens in the step (all rows, packed), R rows, D hidden, I and O a matrix's input and output width,
V vocabulary, H query heads, K kv heads, E head size, B cache blocks, S slots in a block, W blocks in a table.
Every operation returns its result in its input's dtype unless it says otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor


@dataclass(frozen=True, slots=True)
class LayerCache:
    """One layer's paged keys and values; keys are stored after rotation."""

    k_BSKE: Tensor
    v_BSKE: Tensor


@dataclass(frozen=True, slots=True)
class AttentionInputs:
    """Which tokens belong to which row, where their keys go, and what they may see.

    Row r's query tokens are the packed tokens query_starts[r] : query_starts[r + 1]; they take the positions
    context_lens[r], context_lens[r] + 1, ... and see every position up to their own. Host arrays serve loops over
    rows, device tensors serve kernels.
    """

    query_starts: npt.NDArray[np.int32]  # [R + 1], host
    context_lens: npt.NDArray[np.int32]  # [R], host; tokens in the cache before this step
    block_tables_RW: Tensor  # int64, device; block of positions w*S .. w*S + S-1
    slot_mapping_T: Tensor  # int64, device; flat slot (block * S + offset) of each token of the step
    derived: dict[str, Any] = field(default_factory=dict, compare=False)
    """What a table of operations works out from the rest in a step's first layer and keeps for the others."""


class Ops(Protocol):
    """What a device can do. Implementations keep no state besides scratch memory."""

    def embed(self, ids_T: Tensor, table_VD: Tensor) -> Tensor:
        """Rows of the table: [T, D]."""
        ...

    def linear(self, x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
        """x W^T + b: [T, O]."""
        ...

    def layer_norm(self, x_TD: Tensor, weight_D: Tensor, bias_D: Tensor, epsilon: float) -> Tensor:
        """(x - mean) / sqrt(biased variance + epsilon) * weight + bias, statistics in float32."""
        ...

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
        """weight * (x / sqrt(mean(x^2) + epsilon) in float32, cast back to x's dtype)."""
        ...

    def gelu(self, x: Tensor) -> Tensor:
        """x/2 (1 + erf(x / sqrt 2)), the exact form."""
        ...

    def silu_mul(self, gate: Tensor, up: Tensor) -> Tensor:
        """silu(gate) * up."""
        ...

    def rotate(self, x_TNE: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
        """Rotary embedding in the half-split convention: x cos + (-x2, x1) sin; cos and sin in x's dtype."""
        ...

    def write_kv(self, k_TKE: Tensor, v_TKE: Tensor, cache: LayerCache, slot_mapping_T: Tensor) -> None:
        """Store each token's key and value in its slot."""
        ...

    def copy_blocks(self, cache: LayerCache, sources_C: Tensor, destinations_C: Tensor) -> None:
        """Copy whole blocks of one layer; no block is both a source and a destination."""
        ...

    def attend(
        self, q_THE: Tensor, cache: LayerCache, inputs: AttentionInputs, scale: float, alibi_slopes_H: Tensor | None
    ) -> Tensor:
        """Causal softmax(scale * (q k + bias)) v over each row's own positions: [T, H, E].

        Query head h reads kv head h // (H / K). Scores, softmax and sums are in float32. With slopes, the bias of
        key position j is bf16(bf16(slope) * bf16(j)), as the RW checkpoints were trained.
        """
        ...

"""Self-attention over the paged cache."""

# T tokens in the step, D hidden, H query heads, K kv heads, E head size

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gyrfalcon.kernels.interface import AttentionInputs, LayerCache, Ops
from gyrfalcon.layers.linear import Linear
from gyrfalcon.layers.rotary import Rotation


@dataclass(frozen=True, slots=True)
class Attention:
    """Query, key and value from one product, whose rows are ordered [Q | K | V], heads in their natural order.

    alibi_slopes_H: float32; None for models with rotary positions.
    """

    qkv: Linear
    output: Linear
    num_heads: int
    num_kv_heads: int
    head_size: int
    alibi_slopes_H: Tensor | None

    def forward(
        self, x_TD: Tensor, rotation: Rotation | None, inputs: AttentionInputs, cache: LayerCache, ops: Ops
    ) -> Tensor:
        """Store the step's keys and values in `cache`, then attend: [T, D]. `rotation`: None for ALiBi models."""
        heads_TNE = self.qkv.forward(x_TD, ops).view(x_TD.shape[0], -1, self.head_size)
        queries_and_keys_TNE, v_TKE = torch.split(heads_TNE, [self.num_heads + self.num_kv_heads, self.num_kv_heads], 1)
        if rotation is not None:
            queries_and_keys_TNE = ops.rotate(queries_and_keys_TNE, rotation.cos_TE, rotation.sin_TE)
        q_THE, k_TKE = torch.split(queries_and_keys_TNE, [self.num_heads, self.num_kv_heads], 1)
        ops.write_kv(k_TKE, v_TKE, cache, inputs.slot_mapping)
        scale = self.head_size**-0.5
        attended_THE = ops.attend(q_THE, cache, inputs, scale, self.alibi_slopes_H)
        return self.output.forward(attended_THE.flatten(1), ops)

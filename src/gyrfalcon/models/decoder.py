"""The decoder all families share: embed, blocks, final norm, head."""

# T tokens in the step, D hidden, V vocabulary, S positions whose logits are wanted, E2 half a head

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from gyrfalcon.kernels.interface import AttentionInputs, LayerCache, Ops
from gyrfalcon.layers.attention import Attention
from gyrfalcon.layers.mlp import MLP
from gyrfalcon.layers.norm import Norm
from gyrfalcon.layers.rotary import Rotation, rotation
from gyrfalcon.models.spec import ModelSpec


class Block(Protocol):
    """One layer: the residual stream in, the residual stream out, keys and values stored on the way."""

    def forward(
        self, x_TD: Tensor, turn: Rotation | None, inputs: AttentionInputs, cache: LayerCache, ops: Ops
    ) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class SequentialBlock:
    """Attention on the stream, then the MLP on the sum."""

    attention_norm: Norm
    attention: Attention
    mlp_norm: Norm
    mlp: MLP

    def forward(
        self, x_TD: Tensor, turn: Rotation | None, inputs: AttentionInputs, cache: LayerCache, ops: Ops
    ) -> Tensor:
        x_TD = x_TD + self.attention.forward(self.attention_norm.forward(x_TD, ops), turn, inputs, cache, ops)
        return x_TD + self.mlp.forward(self.mlp_norm.forward(x_TD, ops), ops)


@dataclass(frozen=True, slots=True)
class Decoder:
    """The parameters of a model, in the order in which they are used.

    frequencies_E2: rotary frequencies, float32; None for ALiBi. head_VD: the embedding itself when tied.
    """

    embedding_VD: Tensor
    frequencies_E2: Tensor | None
    blocks: tuple[Block, ...]
    final_norm: Norm
    head_VD: Tensor


class CausalLM:
    """A loaded model. Holds parameters and nothing of any request."""

    def __init__(self, spec: ModelSpec, decoder: Decoder, ops: Ops, weight_bytes: int) -> None:
        self.spec = spec
        self.num_parameters = spec.num_parameters
        self.weight_bytes = weight_bytes
        self._decoder = decoder
        self._ops = ops

    @property
    def dtype(self) -> torch.dtype:
        return self._decoder.embedding_VD.dtype

    @property
    def device(self) -> torch.device:
        return self._decoder.embedding_VD.device

    @torch.inference_mode()
    def forward(
        self, ids_T: Tensor, positions_T: Tensor, inputs: AttentionInputs, caches: Sequence[LayerCache]
    ) -> Tensor:
        """Hidden states after the final norm, [T, D], for a step's packed tokens; `caches` has one entry a layer.

        ids_T and positions_T: int64, on the model's device. Keys and values of the step are written to `caches`.
        """
        decoder, ops = self._decoder, self._ops
        x_TD = ops.embed(ids_T, decoder.embedding_VD)
        turn = None
        if decoder.frequencies_E2 is not None:
            turn = rotation(positions_T, decoder.frequencies_E2, x_TD.dtype)
        for block, cache in zip(decoder.blocks, caches, strict=True):
            x_TD = block.forward(x_TD, turn, inputs, cache, ops)
        return decoder.final_norm.forward(x_TD, ops)

    @torch.inference_mode()
    def logits(self, hidden_SD: Tensor) -> Tensor:
        """Scores of every vocabulary entry: [S, V], float32."""
        return self._ops.linear(hidden_SD, self._decoder.head_VD).float()

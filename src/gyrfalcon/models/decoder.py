"""The decoder all families share: embed, blocks, final norm, head."""

# T tokens in the step, D hidden, V vocabulary, S positions whose logits are wanted, E2 half a head

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gyrfalcon.kernels.interface import AttentionInputs, BlockParts, FusedDecoder, LayerCache, Ops
from gyrfalcon.layers.attention import Attention
from gyrfalcon.layers.linear import Linear
from gyrfalcon.layers.mlp import MLP
from gyrfalcon.layers.norm import Norm
from gyrfalcon.layers.rotary import Rotation, rotation
from gyrfalcon.models.spec import ModelSpec


class Block(Protocol):
    """One layer: the residual stream in, the residual stream out, keys and values stored on the way."""

    def forward(
        self, x_TD: Tensor, turn: Rotation | None, inputs: AttentionInputs, cache: LayerCache, ops: Ops
    ) -> Tensor: ...

    def parts(self) -> BlockParts:
        """The same layer as values, for a device that runs it whole."""
        ...


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

    def parts(self) -> BlockParts:
        return block_parts("sequential", self.attention_norm, self.mlp_norm, self.attention, self.mlp)


def block_parts(
    form: Literal["sequential", "parallel"], attention_norm: Norm, mlp_norm: Norm | None, attention: Attention, mlp: MLP
) -> BlockParts:
    """A block's layers as values."""
    return BlockParts(
        form=form,
        attention_norm=attention_norm.parts(),
        mlp_norm=None if mlp_norm is None else mlp_norm.parts(),
        qkv=attention.qkv.parts(),
        output=attention.output.parts(),
        up=mlp.expanding.parts(),
        down=mlp.down.parts(),
        is_gated=mlp.is_gated,
    )


@dataclass(frozen=True, slots=True)
class Decoder:
    """The parameters of a model, in the order in which they are used, and the operations that run it.

    frequencies_E2: rotary frequencies, float32; None for ALiBi. head: the embedding itself when tied, or codes made
    from it. weight_bytes: of all of them.
    """

    embedding_VD: Tensor
    frequencies_E2: Tensor | None
    blocks: tuple[Block, ...]
    final_norm: Norm
    head: Linear
    ops: Ops
    weight_bytes: int

    @property
    def cache_dtype(self) -> torch.dtype:
        return self.embedding_VD.dtype

    def forward(self, ids_T: Tensor, inputs: AttentionInputs, caches: Sequence[LayerCache]) -> Tensor:
        ops = self.ops
        x_TD = ops.embed(ids_T, self.embedding_VD)
        turn = None
        if self.frequencies_E2 is not None:
            positions_T = torch.from_numpy(inputs.positions).to(inputs.device)
            turn = rotation(positions_T, self.frequencies_E2, x_TD.dtype)
        for block, cache in zip(self.blocks, caches, strict=True):
            x_TD = block.forward(x_TD, turn, inputs, cache, ops)
        return self.final_norm.forward(x_TD, ops)

    def choose_next(
        self,
        ids: npt.NDArray[np.int32],
        inputs: AttentionInputs,
        caches: Sequence[LayerCache],
        tokens: npt.NDArray[np.int32],
        num_ahead: int = 0,
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        chosen = []
        for _ in range(1 + num_ahead):
            ids_T, tokens_S = (torch.from_numpy(values).to(inputs.device, torch.int64) for values in (ids, tokens))
            hidden_TD = self.forward(ids_T, inputs, caches)
            chosen.append(self.choose_greedy(self.logits(hidden_TD[tokens_S])))
            if len(chosen) <= num_ahead:
                ids, inputs = np.maximum(chosen[-1][0], 0), inputs.one_further()
        return np.stack([ids for ids, _ in chosen]), np.stack([logprobs for _, logprobs in chosen])

    def logits(self, hidden_SD: Tensor) -> Tensor:
        return self.head.forward(hidden_SD, self.ops).float()

    def choose_greedy(self, logits_SV: Tensor) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        ids_S = logits_SV.argmax(dim=-1)
        logprobs_S = torch.log_softmax(logits_SV, dim=-1).gather(1, ids_S[:, None]).squeeze(1)
        ids_S[~torch.isfinite(logprobs_S)] = -1
        return ids_S.to(torch.int32).cpu().numpy(), logprobs_S.cpu().numpy()


class CausalLM:
    """A loaded model. Holds parameters and nothing of any request. Callers switch gradients off."""

    def __init__(self, spec: ModelSpec, decoder: FusedDecoder, dtype: torch.dtype, device: torch.device) -> None:
        """decoder: `Decoder`, or what the device made of its parts. dtype: of weights that are not quantised."""
        self.spec = spec
        self.num_parameters = spec.num_parameters
        self.dtype = dtype
        self.device = device
        self._decoder = decoder

    @property
    def cache_dtype(self) -> torch.dtype:
        """Of the keys and values that `forward` reads and writes."""
        return self._decoder.cache_dtype

    @property
    def weight_bytes(self) -> int:
        return self._decoder.weight_bytes

    def forward(self, ids_T: Tensor, inputs: AttentionInputs, caches: Sequence[LayerCache]) -> Tensor:
        """Hidden states after the final norm, [T, D], for a step's packed tokens; `caches` has one entry a layer.

        ids_T: int64, on the model's device. Keys and values of the step are written to `caches`.
        """
        return self._decoder.forward(ids_T, inputs, caches)

    def choose_next(
        self,
        ids: npt.NDArray[np.int32],
        inputs: AttentionInputs,
        caches: Sequence[LayerCache],
        tokens: npt.NDArray[np.int32],
        num_ahead: int = 0,
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        """The likeliest successor of each of the step's `tokens` and its log-probability; -1 where there is none.

        `forward`, `logits` and `choose_greedy` in one, with the same bits, and again for what was chosen:
        [1 + num_ahead, S], as `FusedDecoder` says.
        """
        return self._decoder.choose_next(ids, inputs, caches, tokens, num_ahead)

    def logits(self, hidden_SD: Tensor) -> Tensor:
        """Scores of every vocabulary entry: [S, V], float32."""
        return self._decoder.logits(hidden_SD)

    def choose_greedy(self, logits_SV: Tensor) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        """Each row's likeliest token and its log-probability; -1 where there is none."""
        return self._decoder.choose_greedy(logits_SV)

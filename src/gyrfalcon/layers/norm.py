"""Normalisations over the hidden dimension."""

# T tokens in the step, D hidden

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from gyrfalcon.kernels.interface import NormParts, Ops


class Norm(Protocol):
    """What a block asks of its norms."""

    def forward(self, x_TD: Tensor, ops: Ops) -> Tensor: ...

    def parts(self) -> NormParts: ...


@dataclass(frozen=True, slots=True)
class LayerNorm:
    """Mean and variance removed, then scaled and shifted."""

    weight_D: Tensor
    bias_D: Tensor
    epsilon: float

    def forward(self, x_TD: Tensor, ops: Ops) -> Tensor:
        return ops.layer_norm(x_TD, self.weight_D, self.bias_D, self.epsilon)

    def parts(self) -> NormParts:
        return NormParts(self.weight_D, self.bias_D, self.epsilon)


@dataclass(frozen=True, slots=True)
class RMSNorm:
    """Root mean square removed, then scaled."""

    weight_D: Tensor
    epsilon: float

    def forward(self, x_TD: Tensor, ops: Ops) -> Tensor:
        return ops.rms_norm(x_TD, self.weight_D, self.epsilon)

    def parts(self) -> NormParts:
        return NormParts(self.weight_D, None, self.epsilon)

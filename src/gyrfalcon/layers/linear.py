"""A matrix with an optional bias."""

# T tokens in the step, I and O input and output width

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gyrfalcon.kernels.interface import MatrixParts, Ops
from gyrfalcon.kernels.quantised import QuantisedMatrix


@dataclass(frozen=True, slots=True)
class Linear:
    """x W^T + b.

    rounds_before_bias: the product is rounded to the activation's dtype before the bias is added, and the sum is
    rounded again. Falcon's checkpoints were trained so; others add the bias inside the product.
    """

    weight_OI: Tensor | QuantisedMatrix
    bias_O: Tensor | None = None
    rounds_before_bias: bool = False

    def parts(self) -> MatrixParts:
        """The same as a value."""
        return MatrixParts(self.weight_OI, self.bias_O)

    def forward(self, x_TI: Tensor, ops: Ops) -> Tensor:
        if self.bias_O is not None and self.rounds_before_bias:
            return ops.linear(x_TI, self.weight_OI) + self.bias_O
        return ops.linear(x_TI, self.weight_OI, self.bias_O)

"""Feed-forward parts of a block."""

# T tokens in the step, D hidden, F feed-forward width

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from gyrfalcon.kernels.interface import Ops
from gyrfalcon.layers.linear import Linear


class MLP(Protocol):
    """What a block asks of its feed-forward part."""

    @property
    def is_gated(self) -> bool: ...

    @property
    def expanding(self) -> Linear:
        """The matrix, or the stacked matrices, that read the block's input."""
        ...

    @property
    def down(self) -> Linear: ...

    def forward(self, x_TD: Tensor, ops: Ops) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class GeluMLP:
    """down(gelu(up(x)))."""

    up: Linear
    down: Linear

    @property
    def is_gated(self) -> bool:
        return False

    @property
    def expanding(self) -> Linear:
        return self.up

    def forward(self, x_TD: Tensor, ops: Ops) -> Tensor:
        return self.down.forward(ops.gelu(self.up.forward(x_TD, ops)), ops)


@dataclass(frozen=True, slots=True)
class GatedMLP:
    """down(silu(gate(x)) * up(x)); `gate_up` holds the rows of the gate, then those of up: one product for both."""

    gate_up: Linear
    down: Linear

    @property
    def is_gated(self) -> bool:
        return True

    @property
    def expanding(self) -> Linear:
        return self.gate_up

    def forward(self, x_TD: Tensor, ops: Ops) -> Tensor:
        gate_TF, up_TF = self.gate_up.forward(x_TD, ops).chunk(2, dim=-1)
        return self.down.forward(ops.silu_mul(gate_TF, up_TF), ops)

"""Matrices with a bias, in two roundings or one."""

from __future__ import annotations

import torch

from gyrfalcon.kernels.reference import ReferenceOps
from gyrfalcon.layers.linear import Linear

ops = ReferenceOps()


def test_without_a_bias_it_is_the_product() -> None:
    x_TI, weight_OI = torch.randn(2, 8), torch.randn(3, 8)

    torch.testing.assert_close(Linear(weight_OI).forward(x_TI, ops), x_TI @ weight_OI.t())


def test_in_16_bits_falcons_bias_is_added_to_the_rounded_product() -> None:
    # The product, 256 + 1, has no room for the 1 in 8 bits; 1 + 1 added at once would have: 258.
    x_TI = torch.tensor([[256.0, 1.0]], dtype=torch.bfloat16)
    weight_OI, bias_O = torch.ones(1, 2, dtype=torch.bfloat16), torch.ones(1, dtype=torch.bfloat16)

    assert Linear(weight_OI, bias_O, rounds_before_bias=True).forward(x_TI, ops).item() == 256
    assert Linear(weight_OI, bias_O).forward(x_TI, ops).item() == 258

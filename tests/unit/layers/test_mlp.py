"""Feed-forward parts."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from gyrfalcon.kernels.reference import ReferenceOps
from gyrfalcon.layers.linear import Linear
from gyrfalcon.layers.mlp import GatedMLP, GeluMLP

ops = ReferenceOps()


def test_the_gated_part_activates_the_first_half_of_its_joint_product() -> None:
    gate_FD, up_FD, down_DF, x_TD = torch.randn(6, 4), torch.randn(6, 4), torch.randn(4, 6), torch.randn(3, 4)

    found = GatedMLP(Linear(torch.cat((gate_FD, up_FD))), Linear(down_DF)).forward(x_TD, ops)

    torch.testing.assert_close(found, (F.silu(x_TD @ gate_FD.t()) * (x_TD @ up_FD.t())) @ down_DF.t())


def test_the_plain_part_activates_between_two_products() -> None:
    up_FD, down_DF, x_TD = torch.randn(6, 4), torch.randn(4, 6), torch.randn(3, 4)

    found = GeluMLP(Linear(up_FD), Linear(down_DF)).forward(x_TD, ops)

    torch.testing.assert_close(found, F.gelu(x_TD @ up_FD.t()) @ down_DF.t())

"""Randomness without state: noise is a function of (seed, position, token id).

A draw therefore does not depend on the batch, on preemption, on the rank or on the device. The keys of a step are
made by `gyrfalcon.splitmix`; here the same generator runs over a whole vocabulary, on the device.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from gyrfalcon.runner.interface import Seeds
from gyrfalcon.splitmix import GOLDEN, MANTISSA_BITS, MIX_1, MIX_2, draw_keys, watermark_keys

__all__ = ["as_tensor", "draw_keys", "gumbel", "uniform_bits", "watermark_keys"]


def uniform_bits(keys: Tensor, ids: Tensor) -> Tensor:
    """53 uniform bits for each token id, as int64.

    keys, ids: int64 of one shape after broadcasting; keys hold the 64 bits of a stream key.
    """
    z = (ids + 1) * _signed(GOLDEN) + keys
    z = (z ^ _shift_right(z, 30)) * _signed(MIX_1)
    z = (z ^ _shift_right(z, 27)) * _signed(MIX_2)
    z = z ^ _shift_right(z, 31)
    return _shift_right(z, 64 - MANTISSA_BITS)


def gumbel(keys: Tensor, ids: Tensor) -> Tensor:
    """Standard Gumbel noise for each token id, float64; the argmax of logits plus it is a draw from their softmax."""
    # Half a step is added so that neither 0 nor 1 can come out, where the logarithms are infinite.
    uniform = (uniform_bits(keys, ids).double() + 0.5) * 2.0**-MANTISSA_BITS
    return -torch.log(-torch.log(uniform))


def as_tensor(keys: Seeds, device: torch.device) -> Tensor:
    """The keys' bits as int64, which is what torch computes with (it wraps around, as the generator needs)."""
    return torch.from_numpy(keys.view(np.int64)).to(device)


def _shift_right(z: Tensor, bits: int) -> Tensor:
    # torch shifts int64 arithmetically; the mask makes it the logical shift of unsigned numbers.
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _signed(constant: int) -> int:
    return constant - 2**64 if constant >= 2**63 else constant

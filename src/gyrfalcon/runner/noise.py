"""Randomness without state: noise is a function of (seed, position, token id).

A draw therefore does not depend on the batch, on preemption, on the rank or on the device. The generator is
SplitMix64 (Steele, Lea, Flood 2014, doi 10.1145/2660193.2660195): the value of token id t is output t + 1 of the
stream whose state is a key mixed from seed and position.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from gyrfalcon.runner.interface import Ints, Seeds

_GAMMA = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB

_MANTISSA_BITS = 53


def draw_keys(seeds_S: Seeds, positions_S: Ints) -> Seeds:
    """Stream keys of draws, one a sample."""
    return _mix(_mix(seeds_S) + positions_S.astype(np.uint64) * np.uint64(_GAMMA))


def watermark_keys(keys_S: Seeds, last_ids_S: Ints) -> Seeds:
    """Stream keys of green lists, one a sample: of the operator's key and the token before the drawn one."""
    # Another constant than a draw's, so that a watermark with the key of someone's seed is not that seed's noise.
    return _mix(_mix(keys_S ^ np.uint64(_MIX_2)) + last_ids_S.astype(np.uint64) * np.uint64(_GAMMA))


def _mix(state: Seeds) -> Seeds:
    """SplitMix64's output function."""
    z = (state ^ (state >> np.uint64(30))) * np.uint64(_MIX_1)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(_MIX_2)
    return np.asarray(z ^ (z >> np.uint64(31)), dtype=np.uint64)


def uniform_bits(keys: Tensor, ids: Tensor) -> Tensor:
    """53 uniform bits for each token id, as int64.

    keys, ids: int64 of one shape after broadcasting; keys hold the 64 bits of a stream key.
    """
    z = (ids + 1) * _signed(_GAMMA) + keys
    z = (z ^ _shift_right(z, 30)) * _signed(_MIX_1)
    z = (z ^ _shift_right(z, 27)) * _signed(_MIX_2)
    z = z ^ _shift_right(z, 31)
    return _shift_right(z, 64 - _MANTISSA_BITS)


def gumbel(keys: Tensor, ids: Tensor) -> Tensor:
    """Standard Gumbel noise for each token id, float64; the argmax of logits plus it is a draw from their softmax."""
    # Half a step is added so that neither 0 nor 1 can come out, where the logarithms are infinite.
    uniform = (uniform_bits(keys, ids).double() + 0.5) * 2.0**-_MANTISSA_BITS
    return -torch.log(-torch.log(uniform))


def as_tensor(keys: Seeds, device: torch.device) -> Tensor:
    """The keys' bits as int64, which is what torch computes with (it wraps around, as the generator needs)."""
    return torch.from_numpy(keys.view(np.int64)).to(device)


def _shift_right(z: Tensor, bits: int) -> Tensor:
    # torch shifts int64 arithmetically; the mask makes it the logical shift of unsigned numbers.
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _signed(constant: int) -> int:
    return constant - 2**64 if constant >= 2**63 else constant

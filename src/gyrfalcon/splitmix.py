"""SplitMix64 as a function: the bits of (key, position, token id), and the green lists of a watermark drawn from it.

The generator is that of Steele, Lea, Flood 2014 (doi 10.1145/2660193.2660195): the value of token id t is output t + 1
of the stream whose state is the key. Everything here is exact integer arithmetic modulo 2**64; whoever computes it
elsewhere (`runner/noise.py` does, on the device) must come to the same bits.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]
Integers = npt.NDArray[np.integer]

GOLDEN = 0x9E3779B97F4A7C15  # what the state grows by from one output to the next
MIX_1 = 0xBF58476D1CE4E5B9
MIX_2 = 0x94D049BB133111EB
MANTISSA_BITS = 53  # of a double: a uniform number is this many bits over 2**53


def mix(state: Words) -> Words:
    """The generator's output function."""
    z = (state ^ (state >> np.uint64(30))) * np.uint64(MIX_1)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(MIX_2)
    return np.asarray(z ^ (z >> np.uint64(31)), dtype=np.uint64)


def draw_keys(seeds: Words, positions: Integers) -> Words:
    """Stream keys of draws, one a sample."""
    return mix(mix(seeds) + positions.astype(np.uint64) * np.uint64(GOLDEN))


def watermark_keys(keys: Words, context_ids: Integers) -> Words:
    """Stream keys of green lists: of the operator's key and the tokens before the drawn one.

    context_ids: [N], the token before each; or [N, W], the nearest first, -1 where the text has begun later.
    """
    nearest_first = context_ids.reshape(len(context_ids), -1).T
    # Another constant than a draw's, so that a watermark with the key of someone's seed is not that seed's noise.
    state = mix(mix(keys ^ np.uint64(MIX_2)) + nearest_first[0].astype(np.uint64) * np.uint64(GOLDEN))
    for earlier in nearest_first[1:]:
        deeper = mix(state + (earlier.astype(np.int64) + 1).astype(np.uint64) * np.uint64(GOLDEN))
        state = np.where(earlier >= 0, deeper, state)
    return state


def uniform_bits(keys: Words, ids: Integers) -> Words:
    """53 uniform bits for each token id; keys and ids of one shape after broadcasting."""
    bits = mix(keys + (ids.astype(np.uint64) + np.uint64(1)) * np.uint64(GOLDEN))
    return bits >> np.uint64(64 - MANTISSA_BITS)


def green_threshold(gamma: float) -> int:
    """A token is green when its uniform bits are below this; gamma counts in single precision, as plans carry it."""
    return int(float(np.float32(gamma)) * 2**MANTISSA_BITS)


def are_green(key: int, gamma: float, context_ids: Integers, ids: Integers) -> npt.NDArray[np.bool_]:
    """Whether each token is green after those before it; context_ids as in `watermark_keys`."""
    keys = watermark_keys(np.array([key], dtype=np.uint64), context_ids)
    return uniform_bits(keys, ids) < np.uint64(green_threshold(gamma))

"""Inputs for a target without a fuzzer that follows the code: its seeds, changed at random, and any bytes."""

from __future__ import annotations

import random

from hypothesis import strategies as st

from tests.fuzz.targets import Target


def inputs(target: Target) -> st.SearchStrategy[bytes]:
    seeds = list(target.seeds())
    changed = st.builds(
        lambda seed, changes, chance: _changed(seed, changes, target.tokens, chance),
        st.sampled_from(seeds),
        st.integers(1, 6),
        st.randoms(use_true_random=False),
    )
    return st.one_of(st.sampled_from(seeds), changed, changed, st.binary(max_size=80))


def _changed(data: bytes, num_changes: int, tokens: tuple[bytes, ...], chance: random.Random) -> bytes:
    """The bytes with a few of them replaced, left out or repeated, or a token put in."""
    changed = bytearray(data)
    for _ in range(num_changes):
        at = chance.randrange(len(changed) + 1)
        match chance.randrange(4 if tokens else 3):
            case 0:
                changed[at : at + 1] = bytes([chance.randrange(256)])
            case 1:
                del changed[at : at + chance.randrange(1, 20)]
            case 2:
                changed[at:at] = changed[at : at + chance.randrange(1, 20)] * chance.randrange(1, 5)
            case _:
                changed[at:at] = chance.choice(tokens)
    return bytes(changed)

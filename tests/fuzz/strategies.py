"""Inputs for a target without a fuzzer that follows the code: its seeds, changed at random, and any bytes."""

from __future__ import annotations

from hypothesis import strategies as st

from tests.fuzz.mutation import mutated
from tests.fuzz.targets import Target


def inputs(target: Target) -> st.SearchStrategy[bytes]:
    seeds = list(target.seeds())
    changed = st.builds(
        lambda seed, changes, chance: mutated(seed, changes, target.tokens, chance),
        st.sampled_from(seeds),
        st.integers(1, 6),
        st.randoms(use_true_random=False),
    )
    return st.one_of(st.sampled_from(seeds), changed, changed, st.binary(max_size=80))

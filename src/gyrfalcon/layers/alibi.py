"""ALiBi slopes (Press et al. 2021, arXiv 2108.12409)."""

from __future__ import annotations


def alibi_slopes(num_heads: int) -> list[float]:
    """One slope a query head.

    For c = the largest power of two within `num_heads`, the first c heads have the geometric sequence that ends at
    2^-8; the others take every second slope of the sequence for 2c heads.
    """
    closest = 1 << (num_heads.bit_length() - 1)
    base = 2.0 ** (-8.0 / closest)
    finer_base = 2.0 ** (-4.0 / closest)
    first = [base**power for power in range(1, closest + 1)]
    others = [finer_base**power for power in range(1, 2 * (num_heads - closest), 2)]
    return first + others

"""Sequences that grow in a paged cache, without an engine: for tests of kernels and models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gyrfalcon.kernels.interface import AttentionInputs, LayerCache


@dataclass(frozen=True, slots=True)
class PagedStep:
    """What a forward pass needs besides the tokens, which are packed in the order of `rows`."""

    rows: tuple[int, ...]
    attention: AttentionInputs


class PagedRows:
    """Rows whose blocks lie scattered over a cache in an order drawn from `seed`. Block 0 belongs to none."""

    def __init__(self, num_rows: int, max_tokens: int, *, block_size: int, seed: int = 0) -> None:
        blocks_per_row = -(-max_tokens // block_size)
        self.num_blocks = 1 + num_rows * blocks_per_row
        self.lengths = [0] * num_rows  # tokens of each row so far
        self._block_size = block_size
        order = np.random.default_rng(seed).permutation(self.num_blocks - 1) + 1
        self._tables = order.reshape(num_rows, blocks_per_row)

    def empty_caches(self, num_layers: int, num_kv_heads: int, head_size: int, dtype: torch.dtype) -> list[LayerCache]:
        """Caches on CPU that hold NaN wherever nothing was written: whoever reads too far is found out."""
        shape = (self.num_blocks, self._block_size, num_kv_heads, head_size)

        def blocks() -> Tensor:
            return torch.full(shape, float("nan"), dtype=dtype)

        return [LayerCache(blocks(), blocks()) for _ in range(num_layers)]

    def grow(self, counts: Mapping[int, int]) -> PagedStep:
        """The step that runs the next `counts[row]` tokens of each of these rows, which are then part of the row."""
        rows = list(counts)
        contexts = np.array([self.lengths[row] for row in rows], dtype=np.int32)
        for row, count in counts.items():
            self.lengths[row] += count
        # As wide as the longest row needs, like a step's tables; shorter rows are padded with block 0.
        used = [-(-self.lengths[row] // self._block_size) for row in rows]
        tables = np.zeros((len(rows), max(used)), dtype=np.int32)
        for index, (row, width) in enumerate(zip(rows, used, strict=True)):
            tables[index, :width] = self._tables[row, :width]
        return PagedStep(
            rows=tuple(rows),
            attention=AttentionInputs(
                query_starts=np.cumsum([0, *counts.values()], dtype=np.int32),
                context_lens=contexts,
                block_tables=tables,
                block_size=self._block_size,
                device=torch.device("cpu"),
            ),
        )

"""The paged cache's memory: how many blocks there are, and the tensors that hold them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from gyrfalcon.kernels.interface import LayerCache


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheShape:
    """What one cached token costs."""

    num_layers: int
    num_kv_heads: int
    head_size: int
    block_size: int
    dtype: torch.dtype

    @property
    def block_bytes(self) -> int:
        """Bytes of one block in all layers, keys and values."""
        per_token = 2 * self.num_layers * self.num_kv_heads * self.head_size * self.dtype.itemsize
        return per_token * self.block_size


def allocate_cache(shape: CacheShape, num_blocks: int, device: str) -> list[LayerCache]:
    """One zeroed cache a layer. Zeroed because masked positions are read, and zero weight times NaN is NaN."""
    size = (num_blocks, shape.block_size, shape.num_kv_heads, shape.head_size)
    make = _lazy_zeros if device == "cpu" else lambda size, dtype: torch.zeros(size, dtype=dtype, device=device)
    return [LayerCache(make(size, shape.dtype), make(size, shape.dtype)) for _ in range(shape.num_layers)]


def _lazy_zeros(size: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Zeros whose pages the kernel provides when they are first written, so that an idle cache costs nothing."""
    nbytes = int(np.prod(size)) * dtype.itemsize
    return torch.from_numpy(np.zeros(nbytes, dtype=np.uint8)).view(dtype).view(size)

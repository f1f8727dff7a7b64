"""The KV cache's blocks: who owns them, which are free, and which hold a prefix that another request can reuse."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

PADDING_BLOCK = 0
"""Never allocated; padded entries of block tables point at it, so that reading them is harmless."""


class BlockPool:
    """Reference-counted blocks with an index of computed prefixes.

    A block is owned (reference count above zero) or free. A free block may still hold a published prefix: it is
    found by its key until it is allocated for something else, least recently freed first.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        """num_blocks: all blocks, the padding block included. block_size: tokens a block holds."""
        self.block_size = block_size
        self.num_usable = num_blocks - 1
        self._references = [0] * num_blocks
        self._key_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(
            block for block in range(num_blocks) if block != PADDING_BLOCK
        )

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def usage(self) -> float:
        """Share of the usable blocks that is owned, 0..1."""
        return 1.0 - len(self._free) / self.num_usable

    def references(self, block: int) -> int:
        return self._references[block]

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def allocate(self) -> int:
        """Take a free block, forgetting the prefix it held. The caller checks `num_free` first."""
        block, _ = self._free.popitem(last=False)
        self._forget(block)
        self._references[block] = 1
        return block

    def share(self, block: int) -> None:
        """Own a block once more; a free one that still holds its prefix comes back to life."""
        if self._references[block] == 0:
            del self._free[block]
        self._references[block] += 1

    def release(self, block: int) -> None:
        """Give one ownership back; the last one frees the block."""
        self._references[block] -= 1
        if self._references[block] == 0:
            self._free[block] = None
            if self._key_of[block] is None:
                self._free.move_to_end(block, last=False)  # nothing to reuse in it: the first to be taken

    def publish(self, block: int, key: bytes) -> None:
        """Make a full, computed block findable. If an equal prefix is already published, that one stays."""
        if self._key_of[block] is None and key not in self._block_of:
            self._key_of[block] = key
            self._block_of[key] = block

    def withdraw(self, block: int) -> None:
        """Make a block's prefix unfindable; who owns the block keeps it."""
        self._forget(block)

    def find_prefix(self, keys: Iterable[bytes]) -> list[int]:
        """Blocks holding the longest published run of `keys` from the first on; not yet owned by the caller."""
        found: list[int] = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def _forget(self, block: int) -> None:
        key = self._key_of[block]
        if key is not None:
            del self._block_of[key]
            self._key_of[block] = None


def first_parent(salt: str) -> bytes:
    """The parent key of a sequence's first block; sequences under different salts never share a key."""
    return hashlib.sha256(b"gyrfalcon prefix\0" + salt.encode()).digest()


def block_key(parent: bytes, token_ids: npt.NDArray[np.int32]) -> bytes:
    """Identity of a full block: SHA-256 over its parent's key and its token ids, so equal keys mean equal prefixes."""
    return hashlib.sha256(parent + token_ids.tobytes()).digest()

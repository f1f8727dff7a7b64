"""The kernels' attention: against the formula in double precision, and a token's bits in any company."""

# L tokens of a row, H query heads, K kv heads, E head size, B blocks, S positions in a block

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pytest

from gyrfalcon.kernels.cpu.structures import CBatch, CCache
from gyrfalcon.layers.alibi import alibi_slopes
from tests.kernels.native import (
    Array,
    CAttentionShape,
    CTask,
    Guarded,
    every_kind,
    from_bf16,
    guarded,
    is_poison,
    needs_kernels,
    random,
    rounded_to_bf16,
    splits,
    table,
    to_bf16,
)

pytestmark = needs_kernels
__all__ = ["random"]


@dataclass(frozen=True)
class Shape:
    heads: tuple[int, int]  # query heads, kv heads
    head_size: int
    block_size: int
    is_bf16: bool
    has_alibi: bool = False

    @property
    def group(self) -> int:
        return self.heads[0] // self.heads[1]

    @property
    def scale(self) -> float:
        return float(self.head_size) ** -0.5

    @cached_property
    def slopes(self) -> Array | None:
        return np.array(alibi_slopes(self.heads[0]), dtype=np.float32) if self.has_alibi else None


@dataclass
class Row:
    """One sequence whole: queries, keys and values of all its tokens."""

    q_LHE: Array
    k_LKE: Array
    v_LKE: Array

    @classmethod
    def random(cls, random: np.random.Generator, shape: Shape, length: int) -> Row:
        (num_heads, num_kv_heads), size = shape.heads, shape.head_size
        q, k, v = (
            random.standard_normal((length, count, size)).astype(np.float32)
            for count in (num_heads, num_kv_heads, num_kv_heads)
        )
        return cls(2 * q, k, v)

    def exact(self, shape: Shape, tokens: range, *, is_tiled: bool) -> tuple[Array, Array]:
        """The formula in float64 from keys and values as the cache holds them, then with |v| for v: [tokens, H, E]."""
        q, k, v = self.q_LHE[tokens.start : tokens.stop], self.k_LKE, self.v_LKE
        if shape.is_bf16:
            k, v = rounded_to_bf16(k), rounded_to_bf16(v)
        if is_tiled:
            q = rounded_to_bf16(q)
        k, v = (np.repeat(x, shape.group, axis=1).astype(np.float64) for x in (k, v))
        scores_HQL = q.astype(np.float64).transpose(1, 0, 2) @ k.transpose(1, 2, 0) * shape.scale
        if shape.slopes is not None:
            positions_L = rounded_to_bf16(np.arange(len(k), dtype=np.float32))
            bias_HL = rounded_to_bf16(rounded_to_bf16(shape.slopes)[:, None] * positions_L)
            scores_HQL += (bias_HL * np.float32(shape.scale))[:, None]
        hidden_QL = np.arange(len(k))[None] > np.array(tokens)[:, None]
        scores_HQL[:, hidden_QL] = -np.inf
        weights_HQL = np.exp(scores_HQL - scores_HQL.max(axis=2, keepdims=True))
        weights_HQL /= weights_HQL.sum(axis=2, keepdims=True)
        v_HLE = v.transpose(1, 0, 2)
        return (weights_HQL @ v_HLE).transpose(1, 0, 2), (weights_HQL @ np.abs(v_HLE)).transpose(1, 0, 2)


class Step:
    """Some tokens of some rows, with a cache that holds everything up to them and is poison elsewhere."""

    def __init__(self, random: np.random.Generator, shape: Shape, rows: Sequence[Row], tokens: Sequence[range]) -> None:
        self.shape, self.tokens = shape, tokens
        num_heads, num_kv_heads = shape.heads
        size, block_size = shape.head_size, shape.block_size
        blocks_of = [-(-part.stop // block_size) for part in tokens]
        num_blocks = sum(blocks_of) + 2
        element: Any = np.uint16 if shape.is_bf16 else np.float32
        not_a_number = 0x7FC0 if shape.is_bf16 else np.nan
        keys, values = (Guarded((num_blocks, num_kv_heads, block_size * size), element) for _ in range(2))
        keys.array[:] = values.array[:] = not_a_number
        tables = Guarded((len(rows), max(blocks_of) + 1), np.int32)
        tables.array[:] = 0
        unused = iter(random.permutation(np.arange(1, num_blocks)))
        for index, (row, part) in enumerate(zip(rows, tokens, strict=True)):
            for place in range(blocks_of[index]):
                block = tables.array[index, place] = next(unused)
                positions = slice(place * block_size, min((place + 1) * block_size, part.stop))
                self._store(keys.array[block], values.array[block], row.k_LKE[positions], row.v_LKE[positions])
        self.cache = (keys, values)
        query_starts = np.cumsum([0, *(len(part) for part in tokens)]).astype(np.int32)
        self.num_tokens = int(query_starts[-1])
        self.columns = {
            "query_starts": guarded(query_starts),
            "context_lens": guarded(np.array([part.start for part in tokens], dtype=np.int32)),
            "block_tables": tables,
            "positions": guarded(np.concatenate([np.array(part) for part in tokens]).astype(np.int32)),
            "token_rows": guarded(np.repeat(np.arange(len(rows)), [len(part) for part in tokens]).astype(np.int32)),
        }
        # Queries lie in rows of [Q | K | V]; what comes after them is never read.
        self.q = Guarded((self.num_tokens, (num_heads + 2 * num_kv_heads) * size), np.float32)
        queries = np.concatenate([row.q_LHE[part.start : part.stop] for row, part in zip(rows, tokens, strict=True)])
        self.q.array[:, num_heads * size :] = np.nan
        self.q.array[:, : num_heads * size] = queries.reshape(self.num_tokens, -1)
        self.slopes = None if shape.slopes is None else guarded(shape.slopes)

    def _store(self, keys: Array, values: Array, k_NKE: Array, v_NKE: Array) -> None:
        count, num_kv_heads, size = k_NKE.shape
        block_size = self.shape.block_size
        if self.shape.is_bf16:
            k_KNE2 = to_bf16(k_NKE).transpose(1, 0, 2).reshape(num_kv_heads, count, size // 2, 2)
            keys.reshape(num_kv_heads, size // 2, block_size, 2)[:, :, :count] = k_KNE2.transpose(0, 2, 1, 3)
            pairs = values.reshape(num_kv_heads, block_size // 2, size, 2)
            for slot in range(count):
                pairs[:, slot // 2, :, slot % 2] = to_bf16(v_NKE[slot])
        else:
            keys.reshape(num_kv_heads, size, block_size)[:, :, :count] = k_NKE.transpose(1, 2, 0)
            values.reshape(num_kv_heads, block_size, size)[:, :count] = v_NKE.transpose(1, 0, 2)

    def described_shape(self) -> CAttentionShape:
        shape = self.shape
        slopes = None if self.slopes is None else self.slopes.address
        return CAttentionShape(*shape.heads, shape.head_size, shape.block_size, shape.is_bf16, shape.scale, slopes)

    def tasks(self, products: int | None, random: np.random.Generator | None = None) -> list[CTask]:
        """The step's whole attention, in tasks of so many products, or cut at random."""
        made = []
        for row, part in enumerate(self.tokens):
            total = len(part) * self.shape.group
            for kv_head in range(self.shape.heads[1]):
                if products is None:
                    assert random is not None
                    cuts = list(splits(random, total, 5))
                else:
                    cuts = [range(a, min(a + products, total)) for a in range(0, total, products)]
                made += [CTask(row, kv_head, cut.start, len(cut)) for cut in cuts]
        return made

    def attend(
        self, kind: str, tasks: Sequence[CTask] | None = None, *, is_bf16: bool = False, into: Guarded | None = None
    ) -> Guarded:
        """[T, H * E + 3], of which the last columns stay untouched."""
        kernels, shape = table(kind), self.described_shape()
        width = self.shape.heads[0] * self.shape.head_size
        out = into or Guarded((self.num_tokens, width + 3), np.uint16 if is_bf16 else np.float32)
        scratch = Guarded((kernels.attend_scratch_bytes(ctypes.byref(shape)),), np.uint8)
        table_width = self.columns["block_tables"].array.shape[1]
        addresses = {name: column.address for name, column in self.columns.items()}
        batch = CBatch(len(self.tokens), self.num_tokens, table_width, **addresses)
        keys, values = self.cache
        if tasks is None:
            tasks = self.tasks(kernels.attend_products(ctypes.byref(shape)))
        for task in tasks:
            kernels.attend(
                ctypes.byref(task),
                self.q.address,
                self.q.array.shape[1],
                ctypes.byref(shape),
                ctypes.byref(CCache(keys.address, values.address)),
                ctypes.byref(batch),
                out.address,
                out.array.shape[1],
                is_bf16,
                scratch.address,
            )
        for buffer in (out, scratch, self.q, keys, values, *self.columns.values()):
            buffer.check()
        assert is_poison(out.array[:, width:]), "written beyond the last head"
        return out


def check(out: Array, kind: str, shape: Shape, rows: Sequence[Row], tokens: Sequence[range], more: float = 0.0) -> None:
    """The result is that of the formula.

    Tiles round a weight to bfloat16, so by 2^-8 of itself; everything else is float32.
    """
    exact = [row.exact(shape, part, is_tiled=is_tiled(kind, shape)) for row, part in zip(rows, tokens, strict=True)]
    expected, sizes = (np.concatenate(parts).reshape(len(out), -1) for parts in zip(*exact, strict=True))
    allowed = 1e-5 + more + (2**-8 * sizes if is_tiled(kind, shape) else 0.0)
    off = np.abs(out[:, : expected.shape[1]] - expected)
    assert (off <= allowed).all(), (off - allowed).max()


def is_tiled(kind: str, shape: Shape) -> bool:
    return kind == "amx" and shape.is_bf16 and shape.head_size % 32 == 0 and shape.block_size % 32 == 0


SHAPES = [
    Shape((71, 1), 64, 32, True),
    Shape((71, 1), 64, 32, False),
    Shape((71, 1), 64, 16, True, has_alibi=True),
    Shape((8, 2), 128, 64, True),
    Shape((8, 2), 128, 16, False, has_alibi=True),
    Shape((4, 4), 64, 256, True, has_alibi=True),
    Shape((3, 3), 80, 32, False),
    Shape((6, 2), 10, 16, True),
    Shape((6, 2), 10, 16, False),
    Shape((5, 1), 32, 32, True),
    Shape((4, 2), 96, 128, True),
    Shape((2, 1), 256, 64, True),
    Shape((2, 2), 2, 16, False),
]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


@every_kind
@every_shape
def test_it_follows_the_formula(kind: str, shape: Shape, random: np.random.Generator) -> None:
    lengths = [1, 16, 33, shape.block_size, shape.block_size + 1, 255, 256, 257, 300]
    rows = [Row.random(random, shape, length) for length in lengths]
    # Decoding, chunks in the middle of a row, whole prompts, and the first token alone.
    starts = [0, 15, 30, 0, shape.block_size, 240, 255, 220, 290]
    tokens = [range(start, length) for start, length in zip(starts, lengths, strict=True)]

    out = Step(random, shape, rows, tokens).attend(kind)

    check(out.array, kind, shape, rows, tokens)


@every_kind
@every_shape
def test_a_token_has_the_same_bits_in_any_chunk_and_task(kind: str, shape: Shape, random: np.random.Generator) -> None:
    length = 530
    row, other = (Row.random(random, shape, length) for _ in range(2))
    width = shape.heads[0] * shape.head_size
    whole = Step(random, shape, [row], [range(length)]).attend(kind).array[:, :width].view(np.uint32)

    for part in splits(random, length, 4):
        step = Step(random, shape, [other, row, other], [range(3, 90), part, range(500, 501)])
        found = step.attend(kind, step.tasks(None, random)).array[:, :width].view(np.uint32)
        assert np.array_equal(found[87 : 87 + len(part)], whole[part.start : part.stop])
    for token in (0, 1, 255, 256, 511, 512, 529, int(random.integers(length))):
        step = Step(random, shape, [row], [range(token, token + 1)])
        for products in (1, 7, 16, 33, None):
            tasks = None if products is None else step.tasks(products)
            found = step.attend(kind, tasks).array[:, :width].view(np.uint32)
            assert np.array_equal(found[0], whole[token]), (token, products)


@every_kind
@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
def test_threads_share_the_tasks_without_a_trace(kind: str, shape: Shape, random: np.random.Generator) -> None:
    rows = [Row.random(random, shape, length) for length in (70, 300)]
    step = Step(random, shape, rows, [range(69, 70), range(250, 300)])
    expected, shared = step.attend(kind), Guarded((51, shape.heads[0] * shape.head_size + 3), np.float32)
    tasks = step.tasks(20)
    random.shuffle(tasks)  # type: ignore[arg-type]

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda first: step.attend(kind, tasks[first::3], into=shared), range(3)))

    assert np.array_equal(shared.array.view(np.uint32), expected.array.view(np.uint32))


@every_kind
@every_shape
def test_a_result_in_bfloat16_is_the_rounded_one(kind: str, shape: Shape, random: np.random.Generator) -> None:
    row, width = Row.random(random, shape, 90), shape.heads[0] * shape.head_size
    step = Step(random, shape, [row], [range(80, 90)])

    wide, rounded = step.attend(kind), step.attend(kind, is_bf16=True)

    assert np.array_equal(rounded.array[:, :width], to_bf16(wide.array[:, :width]))


@every_kind
@every_shape
def test_scores_of_any_size_give_finite_weights(kind: str, shape: Shape, random: np.random.Generator) -> None:
    row = Row.random(random, shape, 300)
    row.q_LHE[::2] *= 300.0  # one key takes all
    row.q_LHE[1::2] *= 1e-6  # all alike
    tokens = [range(270, 300)]

    out = Step(random, shape, [row], tokens).attend(kind).array[:, : shape.heads[0] * shape.head_size]

    assert np.isfinite(out).all()
    # A score of 1000 is known to 1000 * 2^-24 times a few; where two keys are near, that shows.
    check(out, kind, shape, [row], tokens, more=5e-3)


@every_kind
@every_shape
@pytest.mark.parametrize("bad", [np.nan, np.inf], ids=str)
def test_a_token_sees_nothing_of_later_ones(kind: str, shape: Shape, bad: float, random: np.random.Generator) -> None:
    """Not even where they hold what is not finite; and what it does see shows."""
    row, width = Row.random(random, shape, 300), shape.heads[0] * shape.head_size
    sound = Step(random, shape, [row], [range(250, 300)]).attend(kind).array[:, :width].copy()
    row.v_LKE[280] = bad
    row.k_LKE[281] = bad

    out = Step(random, shape, [row], [range(250, 300)]).attend(kind).array[:, :width]

    assert np.array_equal(out[:30].view(np.uint32), sound[:30].view(np.uint32))
    assert not np.isfinite(out[31:]).any()
    assert not np.isfinite(out[30]).any()


def test_the_helpers_layouts_are_inverse(random: np.random.Generator) -> None:
    shape = Shape((4, 2), 10, 16, True)
    row = Row.random(random, shape, 20)
    keys, values = (part.array for part in Step(random, shape, [row], [range(19, 20)]).cache)
    finite = [np.isfinite(from_bf16(part)).sum() for part in (keys, values)]
    assert finite == [20 * 2 * 10] * 2

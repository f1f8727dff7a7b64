"""The kernels' tables as Python calls them, and memory for them that shows what was written out of place.

The tables are those that the product uses; packing is written out here once more, as csrc/matrix.h describes it.
"""

from __future__ import annotations

import ctypes
import math
import os
import weakref
from collections.abc import Iterator
from ctypes import CFUNCTYPE, POINTER, c_bool, c_char_p, c_float, c_int, c_int32, c_int64, c_size_t, c_void_p
from dataclasses import dataclass
from enum import IntEnum
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from gyrfalcon.kernels.cpu.library import available_kinds, load
from gyrfalcon.kernels.cpu.structures import CBatch, CCache, CMatrix, Storage
from gyrfalcon.kernels.quantised import QuantisedMatrix

Array = npt.NDArray[Any]

# Read once, before tests get an environment of their own: `make sanitize` sets what library is loaded.
LIBRARY = load()
KINDS = available_kinds() if LIBRARY is not None else ()
SEED = int(os.environ.get("NATIVE_TEST_SEED", "0")) or int.from_bytes(os.urandom(4), "little")
IS_SANITIZED = "libasan" in os.environ.get("LD_PRELOAD", "")

needs_kernels = pytest.mark.skipif(not KINDS, reason="the CPU kernels are not built, or this processor has none")
every_kind = pytest.mark.parametrize("kind", [pytest.param(kind, id=kind) for kind in KINDS or ("none",)])


class Form(IntEnum):
    FLOAT32 = 0
    BFLOAT16 = 1
    OFFSET_INT8 = 2
    GROUPED_INT8 = 3


class Finish(IntEnum):
    STORE = 0
    ADD = 1
    GELU = 2
    GATED_SILU = 3


class CActivations(ctypes.Structure):
    _fields_ = [
        ("form", c_int32),
        ("width", c_int32),
        ("group", c_int32),
        ("data", c_void_p),
        ("stride", c_int64),
        ("scales", c_void_p),
        ("sums", c_void_p),
    ]


class COutput(ctypes.Structure):
    _fields_ = [("data", c_void_p), ("stride", c_int64), ("is_bf16", c_bool), ("finish", c_int32)]


class CAttentionShape(ctypes.Structure):
    _fields_ = [
        ("num_heads", c_int32),
        ("num_kv_heads", c_int32),
        ("head_size", c_int32),
        ("block_size", c_int32),
        ("is_bf16", c_bool),
        ("scale", c_float),
        ("slopes", c_void_p),
    ]


class CTask(ctypes.Structure):
    _fields_ = [("row", c_int32), ("kv_head", c_int32), ("first_product", c_int32), ("num_products", c_int32)]


class CKernels(ctypes.Structure):
    _fields_ = [
        ("name", c_char_p),
        ("form", CFUNCTYPE(c_int32, c_int32)),
        ("prepare", CFUNCTYPE(None, c_void_p, c_void_p, POINTER(CActivations), c_int)),
        (
            "matmul",
            CFUNCTYPE(None, POINTER(CMatrix), POINTER(CActivations), c_int, c_int, c_int, POINTER(COutput), c_void_p),
        ),
        ("matmul_scratch_bytes", CFUNCTYPE(c_size_t, POINTER(CMatrix), c_int)),
        ("layer_norm", CFUNCTYPE(None, c_void_p, c_void_p, c_void_p, c_float, c_int, c_void_p)),
        ("rms_norm", CFUNCTYPE(None, c_void_p, c_void_p, c_float, c_int, c_void_p)),
        (
            "rotate_and_store",
            CFUNCTYPE(
                None,
                c_void_p,
                c_void_p,
                c_void_p,
                POINTER(CAttentionShape),
                POINTER(CCache),
                c_void_p,
                c_int,
                c_int,
                c_int,
            ),
        ),
        (
            "attend",
            CFUNCTYPE(
                None,
                POINTER(CTask),
                c_void_p,
                c_int64,
                POINTER(CAttentionShape),
                POINTER(CCache),
                POINTER(CBatch),
                c_void_p,
                c_int64,
                c_bool,
                c_void_p,
            ),
        ),
        ("attend_scratch_bytes", CFUNCTYPE(c_size_t, POINTER(CAttentionShape))),
        ("attend_products", CFUNCTYPE(c_int, POINTER(CAttentionShape))),
        ("choose_greedy", CFUNCTYPE(c_bool, c_void_p, c_int, c_void_p, c_void_p)),
        ("enter_thread", CFUNCTYPE(c_bool)),
    ]


def table(kind: str) -> Any:
    """The kernels of a kind, ready for the calling thread."""
    assert LIBRARY is not None
    LIBRARY.gyrfalcon_kernels.argtypes, LIBRARY.gyrfalcon_kernels.restype = [c_char_p], POINTER(CKernels)
    kernels = LIBRARY.gyrfalcon_kernels(kind.encode()).contents
    assert kernels.enter_thread()
    return kernels


# ---- memory ----

_POISON = 0xFF  # NaN in every floating-point form, -1 as an integer
# Sanitizers watch the bytes after what was asked for; otherwise a filled area does, for what is written.
_GUARD = 0 if IS_SANITIZED else 256

_libc = ctypes.CDLL(None)
_libc.posix_memalign.argtypes = [POINTER(c_void_p), c_size_t, c_size_t]
_libc.free.argtypes = [c_void_p]


class Guarded:
    """An array at a multiple of 64 bytes, poisoned, with guards on both sides."""

    def __init__(self, shape: tuple[int, ...], dtype: Any) -> None:
        num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
        pointer = c_void_p()
        assert _libc.posix_memalign(ctypes.byref(pointer), 64, max(1, num_bytes + 2 * _GUARD)) == 0
        assert pointer.value is not None
        whole = (ctypes.c_uint8 * (num_bytes + 2 * _GUARD)).from_address(pointer.value)
        weakref.finalize(whole, _libc.free, pointer)  # what every view of the array refers to
        self._bytes = np.frombuffer(whole, dtype=np.uint8)
        self._bytes.flags.writeable = True
        self._bytes[:] = _POISON
        self._num_bytes = num_bytes
        self.array: Array = self._bytes[_GUARD : _GUARD + num_bytes].view(dtype).reshape(shape)

    @property
    def address(self) -> int:
        return int(self.array.ctypes.data)

    def check(self) -> None:
        """The guards are as they were."""
        assert (self._bytes[:_GUARD] == _POISON).all(), "written before the array"
        assert (self._bytes[_GUARD + self._num_bytes :] == _POISON).all(), "written behind the array"


def guarded(values: Array) -> Guarded:
    """A copy of the values."""
    made = Guarded(values.shape, values.dtype)
    made.array[...] = values
    return made


def is_poison(array: Array) -> bool:
    """Whether nothing was written there."""
    return bool((np.ascontiguousarray(array).view(np.uint8) == _POISON).all())


# ---- numbers ----


def to_bf16(x: Array) -> Array:
    """Bits of the nearest bfloat16, ties to even; finite values."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(bits: Array) -> Array:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def rounded_to_bf16(x: Array) -> Array:
    return from_bf16(to_bf16(x))


# ---- matrices ----


def padded_width(storage: Storage, width: int, group: int) -> int:
    unit = {Storage.BFLOAT16: 32, Storage.INT8: 64, Storage.INT4: group}.get(storage, 1)
    return -(-width // unit) * unit


def pack_panels(codes_OI: Array, storage: Storage, group: int = 0) -> Array:
    """The panels' bytes: one element's bytes at a time, slowly, as csrc/matrix.h lays them out."""
    num_outputs, width = codes_OI.shape
    num_panels, padded = -(-num_outputs // 16), padded_width(storage, width, group)
    whole = np.zeros((num_panels * 16, padded), dtype=codes_OI.dtype)
    whole[:num_outputs, :width] = codes_OI
    panels = whole.reshape(num_panels, 16, padded)
    if storage in (Storage.FLOAT32, Storage.FLOAT16):
        packed = panels.transpose(0, 2, 1)
    elif storage is Storage.BFLOAT16:
        packed = panels.reshape(num_panels, 16, padded // 2, 2).transpose(0, 2, 1, 3)
    elif storage is Storage.INT8:
        packed = panels.reshape(num_panels, 16, padded // 4, 4).transpose(0, 2, 1, 3)
    else:
        eights = panels.reshape(num_panels, 16, padded // 8, 2, 4)
        packed = (eights[:, :, :, 0] | eights[:, :, :, 1] << 4).transpose(0, 2, 1, 3)
    return np.ascontiguousarray(packed).reshape(-1).view(np.uint8)


@dataclass(frozen=True)
class Weights:
    """A packed matrix, and what its product has to be."""

    storage: Storage
    num_outputs: int
    width: int
    group: int
    parts: dict[str, Guarded]

    @property
    def num_panels(self) -> int:
        return -(-self.num_outputs // 16)

    def described(self) -> CMatrix:
        addresses = {name: part.address for name, part in self.parts.items()}
        return CMatrix(int(self.storage), self.num_outputs, self.width, self.group, **addresses)


def plain_weights(values_OI: Array, storage: Storage, bias_O: Array | None) -> Weights:
    """Of float32, float16, or the bits of bfloat16."""
    parts = {"panels": guarded(pack_panels(values_OI, storage))}
    if bias_O is not None:
        parts["bias"] = guarded(bias_O)
    return Weights(storage, *values_OI.shape, 0, parts)


def code_weights(matrix: QuantisedMatrix, bias_O: Array | None) -> Weights:
    num_outputs, width = matrix.shape
    num_slots = -(-num_outputs // 16) * 16
    codes_OI = matrix.codes_OI.numpy()
    storage = Storage.INT8 if matrix.bits == 8 else Storage.INT4
    parts: dict[str, Array] = {"panels": pack_panels(codes_OI, storage, matrix.group)}

    def by_panel(values_OG: Array, missing: float) -> Array:
        slots = np.full((num_slots, values_OG.shape[1]), missing, dtype=values_OG.dtype)
        slots[:num_outputs] = values_OG
        return np.ascontiguousarray(slots.reshape(-1, 16, values_OG.shape[1]).transpose(0, 2, 1))

    if matrix.bits == 8:
        for name, values in (
            ("scales_f32", matrix.scales.numpy()),
            ("sums", codes_OI.sum(axis=1, dtype=np.int32)),
        ):
            parts[name] = np.zeros(num_slots, dtype=values.dtype)
            parts[name][:num_outputs] = values
    else:
        parts["scales_f16"] = by_panel(matrix.scales.numpy(), 0).view(np.uint16)
        if matrix.zeros_OG is not None:
            parts["zeros"] = by_panel(matrix.zeros_OG.numpy(), 8)
    if matrix.order_I is not None:
        parts["order"] = matrix.order_I.numpy()
    if bias_O is not None:
        parts["bias"] = bias_O
    return Weights(storage, num_outputs, width, matrix.group, {name: guarded(values) for name, values in parts.items()})


@dataclass(frozen=True)
class Prepared:
    """Activations in the form that a product reads."""

    form: Form
    described: CActivations
    buffers: tuple[Guarded, ...]

    def rows(self, first: int) -> CActivations:
        """The same, from row `first` on."""
        told = self.described
        groups = -(-told.width // told.group) if self.form is Form.GROUPED_INT8 else 1
        return CActivations(
            told.form,
            told.width,
            told.group,
            told.data + first * told.stride,
            told.stride,
            told.scales + 4 * first * groups if told.scales else None,
            told.sums + 4 * first * groups if told.sums else None,
        )


def prepare(kernels: Any, weights: Weights, x_TI: Array) -> Prepared:
    """Rows of activations, each prepared from an array that ends where the row does."""
    num_rows, width = x_TI.shape
    form = Form(kernels.form(int(weights.storage)))
    padded = padded_width(weights.storage, width, weights.group)
    row_bytes = padded * {Form.FLOAT32: 4, Form.BFLOAT16: 2}.get(form, 1)
    stride = -(-row_bytes // 64) * 64
    stride += 64 if stride // 64 % 2 == 0 else 0
    num_groups = padded // weights.group if form is Form.GROUPED_INT8 else 1
    data = Guarded((num_rows, stride), np.uint8)
    scales, sums = Guarded((num_rows, num_groups), np.float32), Guarded((num_rows, num_groups), np.int32)
    has_scales, has_sums = form in (Form.OFFSET_INT8, Form.GROUPED_INT8), form is Form.GROUPED_INT8
    described = CActivations(
        int(form),
        width,
        weights.group,
        data.address,
        stride,
        scales.address if has_scales else None,
        sums.address if has_sums else None,
    )
    order = weights.parts["order"].address if "order" in weights.parts else None
    for row in range(num_rows):
        values = guarded(x_TI[row])
        kernels.prepare(values.address, order, ctypes.byref(described), row)
        values.check()
    for buffer in (data, scales, sums):
        buffer.check()
    return Prepared(form, described, (data, scales, sums))


def multiply(
    kernels: Any,
    weights: Weights,
    x: Prepared,
    rows: range,
    *,
    panels: range | None = None,
    finish: Finish = Finish.STORE,
    is_bf16: bool = False,
    into: Guarded | None = None,
) -> Guarded:
    """The product's rows in an array [rows, N + 3] (N / 2 + 3 where gated), whose last columns stay as they are."""
    panels = range(weights.num_panels) if panels is None else panels
    num_columns = weights.num_outputs // 2 if finish is Finish.GATED_SILU else weights.num_outputs
    out = into or Guarded((len(rows), num_columns + 3), np.uint16 if is_bf16 else np.float32)
    described = weights.described()
    scratch = Guarded((kernels.matmul_scratch_bytes(ctypes.byref(described), len(rows)),), np.uint8)
    kernels.matmul(
        ctypes.byref(described),
        ctypes.byref(x.rows(rows.start)),
        len(rows),
        panels.start,
        panels.stop,
        ctypes.byref(COutput(out.address, out.array.shape[1], is_bf16, int(finish))),
        scratch.address,
    )
    for buffer in (out, scratch, *x.buffers, *weights.parts.values()):
        buffer.check()
    assert is_poison(out.array[:, num_columns:]), "written beyond the last output"
    return out


@pytest.fixture
def random(request: pytest.FixtureRequest) -> np.random.Generator:
    """Fresh numbers in every run; the report of a failure has the variable that brings them back."""
    request.node.add_report_section("setup", "seed", f"NATIVE_TEST_SEED={SEED}")
    return np.random.default_rng(SEED)


def splits(random: np.random.Generator, total: int, parts: int, unit: int = 1) -> Iterator[range]:
    """0 .. total cut at random places, multiples of `unit`."""
    cuts = sorted({0, total, *(int(cut) * unit for cut in random.integers(0, total // unit + 1, parts - 1))})
    return (range(a, b) for a, b in pairwise(cuts))

"""The C++ structures of csrc/matrix.h, kernels.h and decoder.h, field by field."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_float, c_int32, c_void_p
from enum import IntEnum
from typing import Any, ClassVar

import numpy.typing as npt


class Storage(IntEnum):
    """How a matrix is stored; the numbers stand in packed files too."""

    FLOAT32 = 0
    FLOAT16 = 1
    BFLOAT16 = 2
    INT8 = 3
    INT4 = 4


class Form(IntEnum):
    """How a block combines attention and MLP."""

    SEQUENTIAL = 0
    PARALLEL = 1


class CMatrix(ctypes.Structure):
    _fields_: ClassVar[list[tuple[str, Any]]] = [
        ("storage", c_int32),
        ("num_outputs", c_int32),
        ("width", c_int32),
        ("group", c_int32),
        ("panels", c_void_p),
        ("scales_f32", c_void_p),
        ("scales_f16", c_void_p),
        ("zeros", c_void_p),
        ("sums", c_void_p),
        ("bias", c_void_p),
        ("order", c_void_p),
    ]


class CNorm(ctypes.Structure):
    _fields_: ClassVar[list[tuple[str, Any]]] = [("weight", c_void_p), ("bias", c_void_p), ("epsilon", c_float)]


class CLayer(ctypes.Structure):
    _fields_: ClassVar[list[tuple[str, Any]]] = [
        ("form", c_int32),
        ("is_gated", c_int32),
        ("attention_norm", CNorm),
        ("mlp_norm", CNorm),
        ("qkv", CMatrix),
        ("output", CMatrix),
        ("up", CMatrix),
        ("down", CMatrix),
    ]


class CDecoderSpec(ctypes.Structure):
    _fields_: ClassVar[list[tuple[str, Any]]] = [
        ("num_layers", c_int32),
        ("hidden_size", c_int32),
        ("ffn_size", c_int32),
        ("vocab_size", c_int32),
        ("num_heads", c_int32),
        ("num_kv_heads", c_int32),
        ("head_size", c_int32),
        ("cache_is_bf16", c_int32),
        ("layers", POINTER(CLayer)),
        ("final_norm", CNorm),
        ("head", CMatrix),
        ("embedding", c_void_p),
        ("embedding_storage", c_int32),
        ("frequencies", c_void_p),
        ("slopes", c_void_p),
    ]


class CCache(ctypes.Structure):
    _fields_: ClassVar[list[tuple[str, Any]]] = [("keys", c_void_p), ("values", c_void_p)]


class CBatch(ctypes.Structure):
    _fields_: ClassVar[list[tuple[str, Any]]] = [
        ("num_rows", c_int32),
        ("num_tokens", c_int32),
        ("table_width", c_int32),
        ("query_starts", c_void_p),
        ("context_lens", c_void_p),
        ("block_tables", c_void_p),
        ("positions", c_void_p),
        ("token_rows", c_void_p),
    ]


class CStep(ctypes.Structure):
    _fields_: ClassVar[list[tuple[str, Any]]] = [
        ("batch", CBatch),
        ("ids", c_void_p),
        ("block_size", c_int32),
        ("caches", POINTER(CCache)),
    ]


def address(array: npt.NDArray[Any] | None) -> int | None:
    """Where an array's data lies, for a pointer field; the caller keeps the array alive."""
    return None if array is None else array.ctypes.data

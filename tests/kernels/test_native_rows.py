"""The kernels' work on single rows: norms, prepared activations, rotation, and the choice of the likeliest id."""

# T rows, D width, I inputs, E head size

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest
import torch

from gyrfalcon.kernels.cpu.structures import CCache, Storage
from gyrfalcon.kernels.reference import ReferenceOps
from tests.kernels.native import (
    Array,
    CAttentionShape,
    Form,
    Guarded,
    Weights,
    every_kind,
    guarded,
    is_poison,
    needs_kernels,
    padded_width,
    prepare,
    random,
    rounded_to_bf16,
    table,
    to_bf16,
)

pytestmark = needs_kernels
__all__ = ["random"]

ops = ReferenceOps()
WIDTHS = [1, 5, 15, 16, 17, 31, 64, 333, 4544, 8192]


def normed(kernels: Any, name: str, x_D: Array, weight: Guarded, bias: Guarded | None) -> Array:
    x, out = guarded(x_D), Guarded(x_D.shape, np.float32)
    if bias is None:
        kernels.rms_norm(x.address, weight.address, 1e-5, len(x_D), out.address)
    else:
        kernels.layer_norm(x.address, weight.address, bias.address, 1e-5, len(x_D), out.address)
    out.check()
    return out.array


@every_kind
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
def test_norms_are_those_of_the_formula(kind: str, width: int, name: str, random: np.random.Generator) -> None:
    kernels = table(kind)
    weight_D, bias_D = random.standard_normal((2, width)).astype(np.float32)
    for size, mean in ((1.0, 0.0), (1e-3, 0.0), (300.0, 0.0), (1.0, 50.0)):
        x_D = (mean + size * random.standard_normal(width)).astype(np.float32)
        bias = guarded(bias_D) if name == "layer_norm" else None

        out_D = normed(kernels, name, x_D, guarded(weight_D), bias)

        x, weight = torch.from_numpy(x_D).double()[None], torch.from_numpy(weight_D).double()
        if bias is not None:
            exact = ops.layer_norm(x, weight, torch.from_numpy(bias_D).double(), 1e-5)
        else:
            exact = weight * x / (x.square().mean() + 1e-5).sqrt()
        # Around a mean of 50 the input itself is known to 50 * 2^-24 only.
        np.testing.assert_allclose(out_D, exact[0].numpy(), rtol=3e-6, atol=3e-6 + 2e-5 * (mean > 0))


@every_kind
@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
def test_norms_do_not_depend_on_where_a_row_lies(kind: str, name: str, random: np.random.Generator) -> None:
    kernels = table(kind)
    for width in (7, 71, 4544):
        x_D, weight_D, bias_D = random.standard_normal((3, width)).astype(np.float32)
        weight, bias = guarded(weight_D), guarded(bias_D) if name == "layer_norm" else None
        expected_D = normed(kernels, name, x_D, weight, bias)
        for shift in (1, 3, 13):
            x = Guarded((shift + width,), np.float32)
            x.array[shift:] = x_D
            place = x.address + 4 * shift
            if bias is None:
                kernels.rms_norm(place, weight.address, 1e-5, width, place)  # in place
            else:
                kernels.layer_norm(place, weight.address, bias.address, 1e-5, width, place)
            x.check()
            assert np.array_equal(x.array[shift:].view(np.uint32), expected_D.view(np.uint32))
            assert is_poison(x.array[:shift])


@every_kind
@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("bad", [np.nan, np.inf], ids=str)
def test_a_norm_does_not_hide_what_is_not_finite(kind: str, name: str, bad: float, random: np.random.Generator) -> None:
    x_D = random.standard_normal(70).astype(np.float32)
    x_D[66] = bad
    ones = guarded(np.ones(70, dtype=np.float32))

    out_D = normed(table(kind), name, x_D, ones, guarded(np.zeros(70, np.float32)) if name == "layer_norm" else None)

    assert np.isnan(out_D[66])


def weights_of(storage: Storage, width: int, group: int = 0, order: Array | None = None) -> Weights:
    """As much of a matrix as preparing activations for it looks at."""
    return Weights(storage, 1, width, group, {} if order is None else {"order": guarded(order)})


@every_kind
@pytest.mark.parametrize("width", [1, 31, 33, 64, 150, 4544])
@pytest.mark.parametrize("has_order", [False, True], ids=["in order", "reordered"])
def test_activations_are_rounded_or_copied(kind: str, width: int, has_order: bool, random: np.random.Generator) -> None:
    kernels = table(kind)
    order = random.permutation(width).astype(np.int32) if has_order else None
    x_TI = (random.standard_normal((4, width)) * [[1e-30], [1.0], [50.0], [1e30]]).astype(np.float32)
    ordered_TI = x_TI if order is None else x_TI[:, order]
    for storage in (Storage.FLOAT32, Storage.BFLOAT16):
        weights = weights_of(storage, width, order=order)
        x = prepare(kernels, weights, x_TI)
        rows = x.buffers[0].array
        expected = to_bf16(ordered_TI) if x.form is Form.BFLOAT16 else ordered_TI
        found = rows.view(expected.dtype)
        np.testing.assert_array_equal(found[:, :width], expected)
        if x.form is Form.BFLOAT16:  # floats end at their width, as products know
            assert not found[:, width : padded_width(storage, width, 0)].any(), "zeros up to the packed width"


@every_kind
@pytest.mark.parametrize("width", [1, 31, 33, 64, 150, 4544])
@pytest.mark.parametrize("has_order", [False, True], ids=["in order", "reordered"])
def test_activations_become_codes_of_their_row(
    kind: str, width: int, has_order: bool, random: np.random.Generator
) -> None:
    kernels = table(kind)
    order = random.permutation(width).astype(np.int32) if has_order else None
    x_TI = (random.standard_normal((5, width)) * [[1e-30], [1.0], [50.0], [1e30], [0.0]]).astype(np.float32)
    ordered_TI = x_TI if order is None else x_TI[:, order]

    x = prepare(kernels, weights_of(Storage.INT8, width, order=order), x_TI)

    scales_T1 = np.abs(x_TI).max(axis=1, keepdims=True) / np.float32(127)
    expected_TI = np.rint(ordered_TI / np.where(scales_T1 == 0, np.float32(1), scales_T1))
    codes_TI = x.buffers[0].array[:, :width].astype(np.int32) - 128
    np.testing.assert_array_equal(codes_TI, expected_TI)
    np.testing.assert_array_equal(x.buffers[1].array, scales_T1)


@every_kind
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("width", [1, 33, 128, 200, 4544])
@pytest.mark.parametrize("has_order", [False, True], ids=["in order", "reordered"])
def test_activations_become_codes_of_their_group(
    kind: str, group: int, width: int, has_order: bool, random: np.random.Generator
) -> None:
    kernels = table(kind)
    order = random.permutation(width).astype(np.int32) if has_order else None
    x_TI = (random.standard_normal((3, width)) * [[1.0], [50.0], [0.0]]).astype(np.float32)
    ordered_TI = x_TI if order is None else x_TI[:, order]

    x = prepare(kernels, weights_of(Storage.INT4, width, group, order), x_TI)

    padded = padded_width(Storage.INT4, width, group)
    whole = np.zeros((3, padded), dtype=np.float32)
    whole[:, :width] = ordered_TI
    groups = whole.reshape(3, -1, group)
    scales = np.abs(groups).max(axis=2, keepdims=True) / np.float32(127)
    expected = np.rint(groups / np.where(scales == 0, np.float32(1), scales))
    codes = x.buffers[0].array.view(np.int8)[:, :padded].reshape(3, -1, group)
    np.testing.assert_array_equal(codes, expected)
    np.testing.assert_array_equal(x.buffers[1].array, scales[:, :, 0])
    np.testing.assert_array_equal(x.buffers[2].array, expected.sum(axis=2).astype(np.int32))


@every_kind
@pytest.mark.parametrize("is_bf16", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("heads", [(71, 1), (4, 2), (3, 3)], ids=str)
@pytest.mark.parametrize("head_size", [2, 10, 64, 80, 128])
def test_keys_are_rotated_and_stored_in_their_place(
    kind: str, is_bf16: bool, heads: tuple[int, int], head_size: int, random: np.random.Generator
) -> None:
    kernels, (num_heads, num_kv_heads), block_size = table(kind), heads, 16
    shape = CAttentionShape(num_heads, num_kv_heads, head_size, block_size, is_bf16, 1.0, None)
    element: Any = np.uint16 if is_bf16 else np.float32
    block_table = guarded(random.permutation(4).astype(np.int32))
    for rotates in (True, False):
        for position in (0, 15, 16, int(random.integers(48))):
            qkv_NE = random.standard_normal((num_heads + 2 * num_kv_heads, head_size)).astype(np.float32)
            angles = random.uniform(0, 6, head_size // 2)
            cosines, sines = guarded(np.cos(angles).astype(np.float32)), guarded(np.sin(angles).astype(np.float32))
            qkv = guarded(qkv_NE)
            keys, values = (Guarded((4, num_kv_heads, head_size * block_size), element) for _ in range(2))

            kernels.rotate_and_store(
                qkv.address,
                cosines.address if rotates else None,
                sines.address if rotates else None,
                ctypes.byref(shape),
                ctypes.byref(CCache(keys.address, values.address)),
                block_table.address,
                position,
                0,
                num_kv_heads,
            )

            expected_NE = qkv_NE.copy()
            num_turned = num_heads + num_kv_heads
            if rotates:
                cos_TE = torch.from_numpy(np.tile(cosines.array, 2))[None]
                sin_TE = torch.from_numpy(np.tile(sines.array, 2))[None]
                turned = ops.rotate(torch.from_numpy(qkv_NE[None, :num_turned]), cos_TE, sin_TE)
                expected_NE[:num_turned] = turned[0].numpy()
            # In place, save for the values; products may be fused into the sums.
            np.testing.assert_allclose(qkv.array[:num_turned], expected_NE[:num_turned], rtol=0, atol=1e-6)
            np.testing.assert_array_equal(qkv.array[num_turned:], qkv_NE[num_turned:])
            for buffer in (qkv, keys, values, cosines, sines):
                buffer.check()
            block, slot = block_table.array[position // block_size], position % block_size
            stored_k, stored_v = keys.array[block], values.array[block]
            k_KE, v_KE = qkv.array[num_heads:num_turned], qkv.array[num_turned:]
            if is_bf16:
                places = stored_k.reshape(num_kv_heads, head_size // 2, block_size, 2)[:, :, slot]
                np.testing.assert_array_equal(places.reshape(num_kv_heads, head_size), to_bf16(k_KE))
                places = stored_v.reshape(num_kv_heads, block_size // 2, head_size, 2)[:, slot // 2, :, slot % 2]
                np.testing.assert_array_equal(places, to_bf16(v_KE))
            else:
                np.testing.assert_array_equal(stored_k.reshape(num_kv_heads, head_size, block_size)[:, :, slot], k_KE)
                np.testing.assert_array_equal(stored_v.reshape(num_kv_heads, block_size, head_size)[:, slot], v_KE)
            for cache in (keys, values):
                others = [b for b in range(4) if b != block]
                assert is_poison(cache.array[others]), "another block was written"
                written = cache.array[block].view(np.uint8) != 0xFF
                assert written.sum() <= num_kv_heads * head_size * cache.array.itemsize


@every_kind
def test_a_kv_head_by_itself_is_rotated_and_stored_as_beside_others(kind: str, random: np.random.Generator) -> None:
    kernels, (num_heads, num_kv_heads), head_size, block_size = table(kind), (6, 3), 20, 16
    shape = CAttentionShape(num_heads, num_kv_heads, head_size, block_size, True, 1.0, None)
    block_table = guarded(np.array([1], dtype=np.int32))
    qkv_NE = random.standard_normal((num_heads + 2 * num_kv_heads, head_size)).astype(np.float32)
    angles = random.uniform(0, 6, head_size // 2)
    cosines, sines = guarded(np.cos(angles).astype(np.float32)), guarded(np.sin(angles).astype(np.float32))

    def run(ranges: list[tuple[int, int]]) -> list[np.ndarray]:
        qkv = guarded(qkv_NE)
        keys, values = (Guarded((2, num_kv_heads, head_size * block_size), np.uint16) for _ in range(2))
        cache = CCache(keys.address, values.address)
        for first, last in ranges:
            kernels.rotate_and_store(
                qkv.address,
                cosines.address,
                sines.address,
                ctypes.byref(shape),
                ctypes.byref(cache),
                block_table.address,
                5,
                first,
                last,
            )
        for buffer in (qkv, keys, values):
            buffer.check()
        return [qkv.array.copy(), keys.array.copy(), values.array.copy()]

    at_once = run([(0, 3)])
    for one, other in zip(at_once, run([(2, 3), (0, 1), (1, 2)]), strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(run([(1, 2)])[0][:2], qkv_NE[:2])


@every_kind
def test_the_likeliest_id_is_the_first_of_the_largest(kind: str, random: np.random.Generator) -> None:
    kernels = table(kind)
    for width in (1, 2, 15, 16, 17, 255, 1000, 65024):
        for size in (0.01, 3.0, 40.0):
            logits_V = (size * random.standard_normal(width)).astype(np.float32)
            twin = int(random.integers(width))
            logits_V[twin] = logits_V.max()
            logits_V[random.integers(0, width, width // 8)] = -np.inf
            if np.isneginf(logits_V).all():
                logits_V[0] = 1.0

            is_sound, found, logprob = choose(kernels, logits_V)

            exact = torch.from_numpy(logits_V).double().log_softmax(0)
            assert is_sound
            assert found == int(np.argmax(logits_V))
            assert abs(logprob - float(exact[found])) <= 2e-6 * max(1.0, abs(float(exact[found])))


@every_kind
def test_logits_without_a_likeliest_id_are_told(kind: str, random: np.random.Generator) -> None:
    kernels = table(kind)
    for width in (1, 16, 33, 1000):
        for bad in (np.nan, np.inf, -np.nan):
            logits_V = random.standard_normal(width).astype(np.float32)
            logits_V[random.integers(width)] = bad
            assert not choose(kernels, logits_V)[0]
        assert not choose(kernels, np.full(width, -np.inf, dtype=np.float32))[0]


@every_kind
def test_of_equal_logits_the_first_is_taken(kind: str) -> None:
    kernels = table(kind)
    for width in (3, 17, 40, 100):
        for first in range(width):
            logits_V = np.full(width, -1.0, dtype=np.float32)
            logits_V[first:] = -0.0 if first % 2 else 0.0
            assert choose(kernels, logits_V)[:2] == (True, first)


def choose(kernels: Any, logits_V: Array) -> tuple[bool, int, float]:
    logits, found, logprob = guarded(logits_V), Guarded((1,), np.int32), Guarded((1,), np.float32)
    is_sound = kernels.choose_greedy(logits.address, len(logits_V), found.address, logprob.address)
    for buffer in (found, logprob):
        buffer.check()
    return bool(is_sound), int(found.array[0]), float(logprob.array[0])


def test_the_helper_rounds_as_torch_does(random: np.random.Generator) -> None:
    x = (random.standard_normal(10_000) * np.exp(random.uniform(-80, 80, 10_000))).astype(np.float32)

    expected = torch.from_numpy(x).bfloat16().float().numpy()

    assert np.array_equal(rounded_to_bf16(x), expected)

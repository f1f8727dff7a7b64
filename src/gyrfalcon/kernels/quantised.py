"""Matrices of 8-bit and 4-bit codes: the value, how one is made, and the exact arithmetic of a product with it.

Letters as in the interface; besides: G groups of inner positions that share a scale.

    8 bits   weight = code * scale of the output                  codes -128 .. 127; ours do not use -128
    4 bits   weight = (code - zero) * scale of output and group   codes 0 .. 15

In a product the activations become 8-bit codes too, in every row of its own. Products and sums of codes are integers,
so their order does not matter; what is done in float32 is done element by element in one order. A row's result
therefore depends on that row alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

GROUP_SIZES = (32, 64, 128)
SYMMETRIC_ZERO = 8  # the zero of every 4-bit group whose matrix has no zeros of its own

# Sums of products of two 8-bit codes are made in float32, which has every integer up to 2^24: 127 * 128 * 1024 of
# them fit, whatever their order.
_EXACT_WIDTH = 1024

# Rows are quantised and dequantised so many elements at a time: a float32 copy of them stays in the cache.
_CHUNK_ELEMENTS = 1 << 18

# Steps tried for a 4-bit group, as the code that its largest element would have. Beyond -8 that element is clipped a
# little in exchange for finer steps. On normally distributed weights in groups of 64 these four leave 3.6 % less error
# than -8 alone, and sixteen steps would leave another 1 % less.
_STEPS = (-7.0, -7.7, -8.4, -9.1)


@dataclass(frozen=True, slots=True)
class CodeFormat:
    """What weights become: codes of `bits` bits; with 4, in groups of `group` inner positions."""

    bits: int
    group: int = 0

    def __str__(self) -> str:
        return f"int{self.bits}" + (f"-{self.group}" if self.group else "")

    def quantise(self, weight_OI: Tensor) -> QuantisedMatrix:
        return quantise_int8(weight_OI) if self.bits == 8 else quantise_int4(weight_OI, self.group)


@dataclass(frozen=True, slots=True)
class QuantisedMatrix:
    """A matrix [O, I] as codes and scales, on CPU. A value that exists has parts whose shapes fit each other."""

    bits: int  # 8 or 4
    codes_OI: Tensor  # int8; 4 bits: uint8, one code a byte
    scales: Tensor  # float32 [O]; 4 bits: float16 [O, G], of either sign
    zeros_OG: Tensor | None = None  # 4 bits: uint8; None: SYMMETRIC_ZERO everywhere
    group: int = 0  # 4 bits: inner positions that share a scale, one of GROUP_SIZES; the last group may be shorter
    order_I: Tensor | None = None  # int32; codes_OI[:, i] belongs to input order_I[i]; None: to input i

    def __post_init__(self) -> None:
        num_outputs, width = self.codes_OI.shape
        if self.bits == 8:
            parts = (self.codes_OI.dtype, self.scales.dtype, tuple(self.scales.shape))
            expected: tuple[object, ...] = (torch.int8, torch.float32, (num_outputs,))
            if self.group or self.zeros_OG is not None:
                raise ValueError(f"8-bit codes have no groups and no zeros; group is {self.group}")
        elif self.bits == 4 and self.group in GROUP_SIZES:
            shape = (num_outputs, num_groups(width, self.group))
            parts = (self.codes_OI.dtype, self.scales.dtype, tuple(self.scales.shape))
            expected = (torch.uint8, torch.float16, shape)
            if self.zeros_OG is not None and (self.zeros_OG.dtype, self.zeros_OG.shape) != (torch.uint8, shape):
                raise ValueError(f"zeros are {self.zeros_OG.dtype} {list(self.zeros_OG.shape)}, not uint8 {shape}")
        else:
            raise ValueError(f"no codes of {self.bits} bits in groups of {self.group}")
        if parts != expected:
            raise ValueError(f"codes and scales of {self.bits} bits are {parts}, not {expected}")
        if self.order_I is not None and (self.order_I.dtype, self.order_I.shape) != (torch.int32, (width,)):
            raise ValueError(f"the order is {self.order_I.dtype} {list(self.order_I.shape)}, not int32 [{width}]")

    @classmethod
    def empty(cls, num_outputs: int, width: int, form: CodeFormat) -> QuantisedMatrix:
        """One whose codes and scales are yet to be filled in."""
        codes_OI = torch.empty((num_outputs, width), dtype=torch.int8 if form.bits == 8 else torch.uint8)
        if form.bits == 8:
            return cls(8, codes_OI, torch.empty(num_outputs, dtype=torch.float32))
        scales_OG = torch.empty((num_outputs, num_groups(width, form.group)), dtype=torch.float16)
        return cls(4, codes_OI, scales_OG, group=form.group)

    @property
    def shape(self) -> torch.Size:
        """[O, I], as of the matrix it stands for."""
        return self.codes_OI.shape

    @property
    def num_bytes(self) -> int:
        """Memory of the codes and what belongs to them."""
        parts = (self.codes_OI, self.scales, self.zeros_OG, self.order_I)
        return sum(part.numel() * part.element_size() for part in parts if part is not None)

    def dequantise(self, dtype: torch.dtype) -> Tensor:
        """The matrix the codes stand for, inputs in their own order."""
        out_OI = torch.empty(self.shape, dtype=dtype)
        rows_at_once = max(1, _CHUNK_ELEMENTS // max(1, self.shape[1]))
        for start in range(0, self.shape[0], rows_at_once):
            rows = slice(start, start + rows_at_once)
            values = self._values(rows)
            if self.order_I is None:
                out_OI[rows] = values
            else:
                out_OI[rows].index_copy_(1, self.order_I.long(), values.to(dtype))
        return out_OI

    def _values(self, rows: slice) -> Tensor:
        """Some rows in float32, inner positions as packed."""
        if self.bits == 8:
            return self.codes_OI[rows].float() * self.scales[rows, None]
        scales_OI = _spread(self.scales[rows].float(), self.group, self.shape[1])
        if self.zeros_OG is None:
            return (self.codes_OI[rows].float() - SYMMETRIC_ZERO) * scales_OI
        zeros_OI = _spread(self.zeros_OG[rows].float(), self.group, self.shape[1])
        return (self.codes_OI[rows].float() - zeros_OI) * scales_OI


def num_groups(width: int, group: int) -> int:
    """Groups that `width` inner positions fall into, a shorter last one included."""
    return -(-width // group)


def _spread(values_OG: Tensor, group: int, width: int) -> Tensor:
    """A group's value at each of its inner positions: [O, I]."""
    return values_OG.repeat_interleave(group, dim=1)[:, :width]


def quantise_int8(weight_OI: Tensor) -> QuantisedMatrix:
    """Codes of 8 bits, symmetric, one scale an output: its largest magnitude becomes 127.

    What is not finite makes its output's scale so.
    """
    num_outputs, width = weight_OI.shape
    made = QuantisedMatrix.empty(num_outputs, width, CodeFormat(8))
    rows_at_once = max(1, _CHUNK_ELEMENTS // max(1, width))
    for start in range(0, num_outputs, rows_at_once):
        rows = slice(start, start + rows_at_once)
        chunk = weight_OI[rows].float()
        scales_N1 = chunk.abs().amax(dim=1, keepdim=True) / 127.0
        made.scales[rows] = scales_N1[:, 0]
        made.codes_OI[rows] = _round_codes(chunk, scales_N1)
    return made


def quantise_int4(weight_OI: Tensor, group: int) -> QuantisedMatrix:
    """Codes of 4 bits, symmetric around 8, in groups of `group` inner positions.

    Each group takes the one of a few steps, each with the scale that fits its codes best, that leaves the smallest
    sum of squared errors. What is not finite, or too large for a float16 scale, makes its group's scale so.
    """
    num_outputs, width = weight_OI.shape
    made = QuantisedMatrix.empty(num_outputs, width, CodeFormat(4, group))
    groups = num_groups(width, group)
    rows_at_once = max(1, _CHUNK_ELEMENTS // max(1, groups * group))
    for start in range(0, num_outputs, rows_at_once):
        rows = slice(start, start + rows_at_once)
        chunk = weight_OI[rows].float()
        if groups * group != width:
            chunk = F.pad(chunk, (0, groups * group - width))
        codes, scales = _fit_groups(chunk.reshape(-1, group))
        made.scales[rows] = scales.view(-1, groups)
        made.codes_OI[rows] = codes.view(-1, groups * group)[:, :width]
    return made


def _fit_groups(x_NG: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [N, group] and scales [N] of N groups."""
    # Two passes, each several times as fast as the library's one for both.
    low, high = x_NG.amin(dim=1, keepdim=True), x_NG.amax(dim=1, keepdim=True)
    extreme_N1 = torch.where(high > -low, high, low)
    inverse_N1, scale_N1 = torch.zeros_like(extreme_N1), torch.zeros_like(extreme_N1)
    gained_N1 = torch.zeros_like(extreme_N1)
    buffer = torch.empty_like(x_NG)
    for step in _STEPS:
        tried_N1 = step / extreme_N1
        torch.mul(x_NG, tried_N1, out=buffer).round_().clamp_(-8, 7)
        # With the best scale s = sum(x c) / sum(c^2) the squared error is sum(x^2) - sum(x c)^2 / sum(c^2).
        product_N1 = torch.linalg.vecdot(buffer, x_NG)[:, None]
        fitted_N1 = product_N1 / torch.linalg.vector_norm(buffer, dim=1, keepdim=True).square_()
        gain_N1 = product_N1 * fitted_N1
        is_better = gain_N1 > gained_N1  # never for a group of zeros, whose gain is not a number
        gained_N1 = torch.where(is_better, gain_N1, gained_N1)
        inverse_N1 = torch.where(is_better, tried_N1, inverse_N1)
        scale_N1 = torch.where(is_better, fitted_N1, scale_N1)
    torch.mul(x_NG, inverse_N1, out=buffer).round_().clamp_(-8, 7)
    # The difference is 0, but not a number in a group that holds what is not finite.
    scale_N1 += extreme_N1 - extreme_N1
    return buffer.add_(SYMMETRIC_ZERO).to(torch.uint8), scale_N1[:, 0].to(torch.float16)


def _round_codes(x: Tensor, scale: Tensor) -> Tensor:
    """round(x / scale), ties to even; 0 where the scale is 0."""
    return (x / scale.masked_fill(scale == 0, 1.0)).round_()


def product(x_TI: Tensor, weight: QuantisedMatrix) -> Tensor:
    """x W^T, [T, O] in float32: the arithmetic that every faster form of it is measured against."""
    x_TI = x_TI.float()
    if weight.order_I is not None:
        x_TI = x_TI[:, weight.order_I.long()]
    return _product_int8(x_TI, weight) if weight.bits == 8 else _product_int4(x_TI, weight)


def _product_int8(x_TI: Tensor, weight: QuantisedMatrix) -> Tensor:
    scales_T1 = x_TI.abs().amax(dim=1, keepdim=True) / 127.0
    codes_TI = _round_codes(x_TI, scales_T1)
    sums_TO = torch.zeros((x_TI.shape[0], weight.shape[0]), dtype=torch.int32)
    for start in range(0, weight.shape[1], _EXACT_WIDTH):
        part = slice(start, start + _EXACT_WIDTH)
        sums_TO += (codes_TI[:, part] @ weight.codes_OI[:, part].float().t()).to(torch.int32)
    return sums_TO.float() * (scales_T1 * weight.scales)


def _product_int4(x_TI: Tensor, weight: QuantisedMatrix) -> Tensor:
    """Group by group in ascending order, each with a scale of its own for the row's activations."""
    out_TO = torch.zeros((x_TI.shape[0], weight.shape[0]), dtype=torch.float32)
    for index, start in enumerate(range(0, weight.shape[1], weight.group)):
        part = slice(start, start + weight.group)
        scales_T1 = x_TI[:, part].abs().amax(dim=1, keepdim=True) / 127.0
        codes_TI = _round_codes(x_TI[:, part], scales_T1)
        codes_OI = weight.codes_OI[:, part].float()
        zeros_O1 = SYMMETRIC_ZERO if weight.zeros_OG is None else weight.zeros_OG[:, index, None].float()
        sums_TO = codes_TI @ (codes_OI - zeros_O1).t()
        # Not fused into one operation: that would round once in some elements and twice in others.
        out_TO += sums_TO * (scales_T1 * weight.scales[:, index].float())
    return out_TO

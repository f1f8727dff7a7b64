"""The tensors of a matrix that a checkpoint stores as codes, unpacked into one form."""

# O outputs, I inputs, G groups of inputs

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gyrfalcon.kernels.quantised import GROUP_SIZES, SYMMETRIC_ZERO, QuantisedMatrix, num_groups
from gyrfalcon.models.quantisation import StoredFormat

# The places in a word, lowest bits first, of AWQ's eight outputs: nibble j holds output _AWQ_ORDER[j].
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)

_ROWS_AT_ONCE = 64  # dequantised together: float32 copies of them stay in the cache


@dataclass(frozen=True, slots=True)
class StoredCodes:
    """weight[o, i] = (codes[o, i] - zeros[o, g]) * scales[o, g] with g = groups[i], inputs in their own order."""

    bits: int
    codes_OI: Tensor  # uint8; of 8 bits too: signed codes are stored here with 128 added
    scales_OG: Tensor  # float32
    zeros_OG: Tensor  # uint8
    groups_I: Tensor | None  # int64; None: G runs of `group_size` inputs
    group_size: int  # of the runs

    @property
    def shape(self) -> tuple[int, int]:
        return (self.codes_OI.shape[0], self.codes_OI.shape[1])

    def with_rows(self, sources_O: Tensor) -> StoredCodes:
        """Its rows in another order."""
        return StoredCodes(
            self.bits,
            self.codes_OI[sources_O],
            self.scales_OG[sources_O],
            self.zeros_OG[sources_O],
            self.groups_I,
            self.group_size,
        )

    def dequantise_into(self, destination_OI: Tensor) -> None:
        """Write the numbers that the codes stand for."""
        for start in range(0, self.shape[0], _ROWS_AT_ONCE):
            rows = slice(start, start + _ROWS_AT_ONCE)
            differences = self.codes_OI[rows].float() - self._of_inputs(self.zeros_OG[rows].float())
            destination_OI[rows].copy_(differences * self._of_inputs(self.scales_OG[rows]))

    def _of_inputs(self, values_OG: Tensor) -> Tensor:
        """Each input's value of its group: [O, I]."""
        if self.groups_I is not None:
            return values_OG[:, self.groups_I]
        return values_OG.repeat_interleave(self.group_size, dim=1)[:, : self.shape[1]]


def unpack(form: StoredFormat, shape: tuple[int, int], parts: Mapping[str, Tensor]) -> StoredCodes:
    """A matrix from its parts, which have the shapes and dtypes that `form.parts` names.

    Raises ValueError that says what is wrong with the numbers in them.
    """
    outputs, inputs = shape
    middle = 1 << (form.bits - 1)
    order: Tensor | None = None
    zeros_OG: Tensor | None = None
    if form.layout in ("gptq", "awq"):
        if form.layout == "gptq":
            codes_IO = _unpack_words(parts["qweight"], form.bits, 0, inputs)
            zeros_GO = _unpack_words(parts["qzeros"], form.bits, 1, outputs)
            order = parts.get("g_idx")
        else:
            codes_IO = _unpack_words(parts["qweight"], 4, 1, outputs, _AWQ_ORDER)
            zeros_GO = _unpack_words(parts["qzeros"], 4, 1, outputs, _AWQ_ORDER)
        codes_OI, scales_OG = codes_IO.t().contiguous(), parts["scales"].t()
        # The first GPTQ format stores a zero less one in as many bits, so that 0 is stored as the largest code.
        zeros_OG = (zeros_GO.t() + form.zero_offset) & (2 * middle - 1)
    else:
        scales_OG = parts["weight_scale"]
        if form.layout == "packed":
            described = parts["weight_shape"].tolist()
            if described != [outputs, inputs]:
                raise ValueError(f"`weight_shape` is {described}, expected [{outputs}, {inputs}] from config.json")
            codes_OI = _unpack_words(parts["weight_packed"], form.bits, 1, inputs)
            order = parts.get("weight_g_idx")
            if form.has_zeros:
                zeros_OG = _unpack_words(parts["weight_zero_point"], form.bits, 0, outputs)
        else:
            codes_OI = parts["weight"].view(torch.uint8) ^ middle
            if form.has_zeros:
                zeros_OG = parts["weight_zero_point"].view(torch.uint8) ^ middle
        if form.is_per_tensor:
            scales_OG = scales_OG.expand(outputs)[:, None]
            zeros_OG = None if zeros_OG is None else zeros_OG.expand(outputs)[:, None]
    if not scales_OG.isfinite().all():
        raise ValueError("a scale is not finite")
    groups = form.num_groups(inputs)
    if zeros_OG is None:
        zeros_OG = torch.full((outputs, groups), middle, dtype=torch.uint8)
    return StoredCodes(
        bits=form.bits,
        codes_OI=codes_OI,
        scales_OG=scales_OG.float().contiguous(),
        zeros_OG=zeros_OG.contiguous(),
        groups_I=_irregular_groups(order, groups, form.group or inputs),
        group_size=form.group or inputs,
    )


def _irregular_groups(stored: Tensor | None, groups: int, group_size: int) -> Tensor | None:
    """The group of each input where they are not runs in order."""
    if stored is None:
        return None
    groups_I = stored.long()
    outside = groups_I[(groups_I < 0) | (groups_I >= groups)]
    if len(outside):
        raise ValueError(f"an input is of group {int(outside[0])}, and there are {groups}")
    in_order = torch.arange(len(groups_I)) // group_size
    return None if torch.equal(groups_I, in_order) else groups_I


def _unpack_words(words: Tensor, bits: int, dim: int, size: int, order: Sequence[int] = ()) -> Tensor:
    """The codes in int32 words, lowest bits first, along `dim`, of which there are `size`: uint8.

    order: the place, among the codes of a word, of the one in its lowest bits, and so on; as they come if empty.
    """
    per_word = 32 // bits
    shape = list(words.shape)
    shape[dim] *= per_word
    codes = torch.empty(shape, dtype=torch.uint8)
    for index, place in enumerate(order or range(per_word)):
        # The shift copies the sign bit; the mask takes those copies away.
        code = (words >> (bits * index)).bitwise_and_((1 << bits) - 1)
        if dim == 0:
            codes[place::per_word] = code
        else:
            codes[:, place::per_word] = code
    return codes.narrow(dim, 0, size)


def stacked(parts: Sequence[StoredCodes]) -> QuantisedMatrix | None:
    """The rows of all parts as one matrix to multiply with; None where there is no form for them."""
    first = parts[0]
    for part in parts[1:]:
        if (part.bits, part.group_size) != (first.bits, first.group_size) or not _same(part.groups_I, first.groups_I):
            return None
    codes_OI, scales_OG, zeros_OG = (
        tensors[0] if len(parts) == 1 else torch.cat(tensors)
        for tensors in (
            [part.codes_OI for part in parts],
            [part.scales_OG for part in parts],
            [part.zeros_OG for part in parts],
        )
    )
    if first.bits == 8:
        return _native_int8(codes_OI, scales_OG, zeros_OG)
    return _native_int4(codes_OI, scales_OG, zeros_OG, first)


def _native_int8(codes_OI: Tensor, scales_OG: Tensor, zeros_OG: Tensor) -> QuantisedMatrix | None:
    if scales_OG.shape[1] != 1 or not bool((zeros_OG == 128).all()):
        return None
    return QuantisedMatrix(8, (codes_OI ^ 128).view(torch.int8), scales_OG[:, 0].contiguous())


def _native_int4(
    codes_OI: Tensor, scales_OG: Tensor, zeros_OG: Tensor, described: StoredCodes
) -> QuantisedMatrix | None:
    """With groups as long as the kernels have them; longer ones are several with the same scale."""
    width = codes_OI.shape[1]
    is_one_group = scales_OG.shape[1] == 1
    order_I: Tensor | None = None
    if described.groups_I is not None and not is_one_group:
        counts = torch.bincount(described.groups_I, minlength=scales_OG.shape[1])
        if not bool((counts[:-1] == described.group_size).all()) or int(counts[-1]) > described.group_size:
            return None
        order_I = described.groups_I.argsort(stable=True)
        codes_OI = codes_OI[:, order_I]
    size = GROUP_SIZES[-1] if is_one_group else described.group_size
    group = next((group for group in reversed(GROUP_SIZES) if size % group == 0), None)
    scales = scales_OG.to(torch.float16)
    if group is None or not scales.isfinite().all():
        return None
    groups = num_groups(width, group)
    repeats = groups if is_one_group else size // group
    zeros: Tensor | None = None
    if not bool((zeros_OG == SYMMETRIC_ZERO).all()):
        zeros = zeros_OG.repeat_interleave(repeats, dim=1)[:, :groups].contiguous()
    return QuantisedMatrix(
        bits=4,
        codes_OI=codes_OI,
        scales=scales.repeat_interleave(repeats, dim=1)[:, :groups].contiguous(),
        zeros_OG=zeros,
        group=group,
        order_I=None if order_I is None else order_I.to(torch.int32),
    )


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(one, other)

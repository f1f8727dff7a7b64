"""Matrices in the layout that the kernels read: csrc/matrix.h says which."""

# O outputs, I inputs, P panels of 16 outputs, G groups of inner positions, S slots (outputs as packed)

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gyrfalcon.kernels.cpu.structures import CMatrix, Storage, address
from gyrfalcon.kernels.interface import MatrixParts
from gyrfalcon.kernels.quantised import SYMMETRIC_ZERO

PANEL_WIDTH = 16

LAYOUT_VERSION = 1
"""Of packed arrays: what an older version wrote is not read."""

Array = npt.NDArray[Any]

_STORAGES = {
    torch.float32: Storage.FLOAT32,
    torch.float16: Storage.FLOAT16,
    torch.bfloat16: Storage.BFLOAT16,
}


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """What a `CMatrix` points at. The arrays it does not need are absent."""

    storage: Storage
    num_outputs: int
    width: int
    group: int
    arrays: Mapping[str, Array]

    def described(self) -> CMatrix:
        """The structure; valid while this value lives."""
        return CMatrix(
            storage=self.storage,
            num_outputs=self.num_outputs,
            width=self.width,
            group=self.group,
            **{name: address(array) for name, array in self.arrays.items()},
        )

    def facts(self) -> Array:
        """What the arrays do not say, as an array."""
        return np.array([self.storage, self.num_outputs, self.width, self.group], dtype=np.int32)

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Array]) -> PackedMatrix:
        """The value that `named_arrays` took apart."""
        storage, num_outputs, width, group = arrays["facts"].tolist()
        parts = {name: array for name, array in arrays.items() if name != "facts"}
        return cls(Storage(storage), num_outputs, width, group, parts)

    def named_arrays(self) -> Iterator[tuple[str, Array]]:
        yield "facts", self.facts()
        yield from self.arrays.items()


def pack(library: ctypes.CDLL, parts: MatrixParts, *, alternates: bool = False) -> PackedMatrix:
    """A matrix packed. alternates: of its rows the second half are put between those of the first, panel by panel."""
    weight_OI = parts.weight_OI
    num_outputs, width = weight_OI.shape
    rows_S = _alternating_slots(num_outputs) if alternates else _slots(num_outputs)
    arrays: dict[str, Array] = {}
    if parts.bias_O is not None:
        arrays["bias"] = np.ascontiguousarray(parts.bias_O.float().numpy()[rows_S[rows_S >= 0]])
    if isinstance(weight_OI, Tensor):
        storage, group = _STORAGES[weight_OI.dtype], 0
        source = weight_OI.contiguous()
        arrays["panels"] = _pack_panels(library, storage, source.data_ptr(), width, group, rows_S)
        return PackedMatrix(storage, num_outputs, width, group, arrays)
    storage, group = (Storage.INT8 if weight_OI.bits == 8 else Storage.INT4), weight_OI.group
    codes = weight_OI.codes_OI.contiguous()
    if weight_OI.order_I is not None:
        arrays["order"] = weight_OI.order_I.contiguous().numpy()
    sums = np.empty(len(rows_S), dtype=np.int32) if storage is Storage.INT8 else None
    if sums is not None:
        arrays["sums"] = sums
    arrays["panels"] = _pack_panels(library, storage, codes.data_ptr(), width, group, rows_S, sums)
    if storage is Storage.INT8:
        arrays["scales_f32"] = _by_slot(weight_OI.scales.numpy(), rows_S)
    else:
        arrays["scales_f16"] = _by_panel(weight_OI.scales.view(torch.int16).numpy().view(np.uint16), rows_S, 0)
        if weight_OI.zeros_OG is not None:
            arrays["zeros"] = _by_panel(weight_OI.zeros_OG.numpy(), rows_S, SYMMETRIC_ZERO)
    return PackedMatrix(storage, num_outputs, width, group, arrays)


def _pack_panels(
    library: ctypes.CDLL,
    storage: Storage,
    source: int,
    width: int,
    group: int,
    rows_S: npt.NDArray[np.int32],
    sums: npt.NDArray[np.int32] | None = None,
) -> Array:
    num_panels = len(rows_S) // PANEL_WIDTH
    panels = np.empty(num_panels * library.gyrfalcon_panel_bytes(storage, width, group), dtype=np.uint8)
    library.gyrfalcon_pack(storage, source, width, group, address(rows_S), num_panels, address(panels), address(sums))
    return panels


def _slots(num_outputs: int) -> npt.NDArray[np.int32]:
    """The output of every slot, -1 for those beyond the last one."""
    num_slots = -(-num_outputs // PANEL_WIDTH) * PANEL_WIDTH
    rows_S = np.full(num_slots, -1, dtype=np.int32)
    rows_S[:num_outputs] = np.arange(num_outputs)
    return rows_S


def _alternating_slots(num_outputs: int) -> npt.NDArray[np.int32]:
    """Panels of the first half and of the second in turn; each half has whole panels."""
    halves = np.arange(num_outputs, dtype=np.int32).reshape(2, -1, PANEL_WIDTH)
    return np.ascontiguousarray(halves.transpose(1, 0, 2)).reshape(-1)


def _by_slot(values_O: Array, rows_S: npt.NDArray[np.int32]) -> Array:
    return np.where(rows_S >= 0, values_O[rows_S], np.array(0, dtype=values_O.dtype))


def _by_panel(values_OG: Array, rows_S: npt.NDArray[np.int32], missing: int) -> Array:
    """[P, G, 16], end to end."""
    chosen_SG = values_OG[rows_S]
    chosen_SG[rows_S < 0] = missing
    return np.ascontiguousarray(chosen_SG.reshape(-1, PANEL_WIDTH, values_OG.shape[1]).transpose(0, 2, 1)).reshape(-1)

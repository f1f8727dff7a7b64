"""Which table of operations runs on a device."""

from __future__ import annotations

import torch

from gyrfalcon.errors import SettingsError
from gyrfalcon.kernels.cpu import library as cpu_library
from gyrfalcon.kernels.cpu.ops import CpuOps
from gyrfalcon.kernels.interface import Ops
from gyrfalcon.kernels.reference import ReferenceOps


def select_ops(device: str, *, block_size: int | None = None, num_threads: int | None = None) -> Ops:
    """The operations for `device`: "cpu", "cuda" or "cuda:INDEX".

    block_size: tokens in a block of the caches that whole decoders will read; None: no decoder runs as a whole.
    num_threads: of the CPU's kernels; None: what fits the weights.

    Raises SettingsError for a device this version cannot use or this machine does not have.
    """
    try:
        parsed = torch.device(device)
    except RuntimeError:
        parsed = None
    if parsed is None or parsed.type not in ("cpu", "cuda"):
        raise SettingsError("--device", f"`{device}` is not a device Gyrfalcon runs on; use `cpu` or `cuda`")
    if parsed.type == "cuda" and (not torch.cuda.is_available() or (parsed.index or 0) >= torch.cuda.device_count()):
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        raise SettingsError("--device", f"`{device}` is not there: PyTorch sees {found} CUDA devices")
    if parsed.type == "cpu" and block_size is not None:
        library, kind = cpu_library.load(), cpu_library.chosen_kind()
        if library is not None and kind is not None:
            return CpuOps(library, kind, block_size=block_size, num_threads=num_threads)
    return ReferenceOps()

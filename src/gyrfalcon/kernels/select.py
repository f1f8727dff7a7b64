"""Which table of operations runs on a device."""

from __future__ import annotations

import torch

from gyrfalcon.errors import SettingsError
from gyrfalcon.kernels.interface import Ops
from gyrfalcon.kernels.reference import ReferenceOps


def select_ops(device: str) -> Ops:
    """The operations for `device`: "cpu", "cuda" or "cuda:INDEX".

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
    return ReferenceOps()

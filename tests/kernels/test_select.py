"""Choosing the operations of a device."""

from __future__ import annotations

import pytest
import torch

from gyrfalcon.errors import SettingsError
from gyrfalcon.kernels.reference import ReferenceOps
from gyrfalcon.kernels.select import select_ops


def test_the_cpu_runs_the_reference() -> None:
    assert isinstance(select_ops("cpu"), ReferenceOps)


@pytest.mark.parametrize("device", ["tpu", "mps", "", "cpu:first"])
def test_a_device_that_cannot_be_used_is_refused_by_name(device: str) -> None:
    with pytest.raises(SettingsError, match=f"--device: `{device}`"):
        select_ops(device)


def test_a_cuda_device_that_is_not_there_is_refused() -> None:
    index = torch.cuda.device_count() if torch.cuda.is_available() else 0

    with pytest.raises(SettingsError, match=f"`cuda:{index}` is not there: PyTorch sees {index} CUDA devices"):
        select_ops(f"cuda:{index}")

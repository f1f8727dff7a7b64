"""From a folder to a model: what it reports, what it refuses, and how much memory loading takes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gyrfalcon.errors import ModelLoadError
from gyrfalcon.kernels.reference import ReferenceOps
from gyrfalcon.models.registry import load_model

Folders = Callable[[str], Path]
ops = ReferenceOps()


@pytest.mark.parametrize(("dtype", "expected"), [("auto", "float32"), ("float16", "float16"), ("bfloat16", "bfloat16")])
def test_the_model_has_the_dtype_asked_for_and_reports_its_size(dtype: str, expected: str, checkpoint: Folders) -> None:
    model = load_model(checkpoint("falcon-11b"), dtype=dtype, device="cpu", ops=ops)

    assert model.dtype == getattr(torch, expected)
    assert model.device == torch.device("cpu")
    assert model.num_parameters == model.spec.num_parameters
    assert model.weight_bytes == model.num_parameters * getattr(torch, expected).itemsize


def test_a_tied_model_holds_its_embedding_once(checkpoint: Folders) -> None:
    model = load_model(checkpoint("falcon-7b"), dtype="float32", device="cpu", ops=ops)

    assert model.weight_bytes == 4 * model.spec.num_parameters


def test_progress_ends_at_the_total(checkpoint: Folders) -> None:
    seen: list[tuple[int, int]] = []

    load_model(checkpoint("llama"), dtype="float32", device="cpu", ops=ops, on_progress=lambda *now: seen.append(now))

    assert seen[-1][0] == seen[-1][1] > 0


def test_an_unknown_dtype_is_refused(checkpoint: Folders) -> None:
    with pytest.raises(ModelLoadError, match="dtype is 'int4'; expected auto, float32, bfloat16, float16"):
        load_model(checkpoint("falcon-7b"), dtype="int4", device="cpu", ops=ops)


def test_a_wrong_last_tensor_is_found_before_any_weight_is_read(
    zero_checkpoint: Callable[[dict[str, object]], Path],
) -> None:
    folder = zero_checkpoint(SEVERAL_HUNDRED_MEGABYTES)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 9}))
    progress: list[tuple[int, int]] = []
    start = time.monotonic()

    with pytest.raises(ModelLoadError, match=r"holds `transformer\.h\.9"):
        load_model(folder, dtype="auto", device="cpu", ops=ops, on_progress=lambda *now: progress.append(now))

    assert not progress
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("free_bytes", [None, 1 << 60], ids=["known-before", "found-out-by-the-allocator"])
def test_more_weights_than_memory_are_refused_with_the_bytes_needed(
    free_bytes: int | None,
    zero_checkpoint: Callable[[dict[str, object]], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if free_bytes is not None:
        monkeypatch.setattr("gyrfalcon.models.registry._free_bytes", lambda device: free_bytes)
    # Terabytes in a sparse file: no machine gives out the first matrix.
    folder = zero_checkpoint(SEVERAL_HUNDRED_MEGABYTES | {"vocab_size": 2**31 - 1, "num_hidden_layers": 1})

    with pytest.raises(ModelLoadError, match=rf"{folder}: \d+ parameters in float32 take \d+ bytes, more than cpu has"):
        load_model(folder, dtype="float32", device="cpu", ops=ops)


SEVERAL_HUNDRED_MEGABYTES: dict[str, object] = {
    "model_type": "falcon",
    "hidden_size": 1024,
    "num_hidden_layers": 10,
    "num_attention_heads": 16,
    "num_kv_heads": 4,
    "vocab_size": 32000,
    "new_decoder_architecture": True,
    "torch_dtype": "bfloat16",
}

MEASURE = """
import sys
from pathlib import Path

from gyrfalcon.kernels.select import select_ops
from gyrfalcon.models.registry import load_model

def kibibytes(field):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024

before = kibibytes("VmRSS")
model = load_model(Path(sys.argv[1]), dtype=sys.argv[2], device="cpu", ops=select_ops("cpu"))
print(kibibytes("VmHWM") - before, model.weight_bytes)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
@pytest.mark.parametrize(
    ("dtype", "weight_bytes"), [("bfloat16", 285_822_976), ("float16", 285_822_976), ("float32", 571_645_952)]
)
def test_loading_peaks_within_a_tenth_above_the_weights(
    dtype: str, weight_bytes: int, zero_checkpoint: Callable[[dict[str, object]], Path]
) -> None:
    folder = zero_checkpoint(SEVERAL_HUNDRED_MEGABYTES)
    arguments = [sys.executable, "-c", MEASURE, str(folder), dtype]

    output = subprocess.run(
        arguments, check=True, capture_output=True, text=True, env={"PYTHONPATH": ":".join(sys.path)}
    )

    peak, loaded = map(int, output.stdout.split())
    assert loaded == weight_bytes
    # Measured against the memory of the interpreter with its imports, so that no constant has to be granted.
    assert weight_bytes < peak < 1.1 * weight_bytes

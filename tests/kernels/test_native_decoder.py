"""What a whole decoder in C++ does at the edges of a step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gyrfalcon.config import CPU_KERNELS_VARIABLE
from gyrfalcon.kernels.cpu.decoder import NativeDecoder
from gyrfalcon.kernels.cpu.library import available_kinds
from gyrfalcon.kernels.cpu.ops import CpuOps
from gyrfalcon.kernels.reference import ReferenceOps
from gyrfalcon.kernels.select import select_ops
from gyrfalcon.models.decoder import CausalLM
from gyrfalcon.models.registry import load_model
from gyrfalcon.testing.checkpoints import cached_checkpoint
from gyrfalcon.testing.paged import PagedRows
from tests.kernels.native import needs_kernels

pytestmark = needs_kernels

Load = Callable[..., CausalLM]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cached_checkpoint(tmp_path_factory.mktemp("checkpoints"), "falcon-7b")


@pytest.fixture
def load(folder: Path) -> Load:
    def make(dtype: str, *, quantize: str | None = None, num_threads: int = 2) -> CausalLM:
        ops = select_ops("cpu", block_size=32, num_threads=num_threads)
        return load_model(folder, dtype=dtype, device="cpu", ops=ops, quantize=quantize)

    return make


def hidden_states(model: CausalLM, ids_T: torch.Tensor) -> torch.Tensor:
    spec = model.spec
    paged = PagedRows(1, len(ids_T), block_size=32)
    caches = paged.empty_caches(spec.num_layers, spec.num_kv_heads, spec.head_size, model.cache_dtype)
    step = paged.grow({0: len(ids_T)})
    return model.forward(ids_T, step.positions_T, step.attention, caches)


@pytest.mark.parametrize("kind", available_kinds())
@pytest.mark.parametrize(
    ("dtype", "quantize"), [("bfloat16", None), ("float32", None), ("bfloat16", "int8"), ("bfloat16", "int4")]
)
def test_a_step_that_draws_nothing_has_no_logits(
    kind: str, dtype: str, quantize: str | None, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CPU_KERNELS_VARIABLE, kind)
    model = load(dtype, quantize=quantize)
    hidden_TD = hidden_states(model, torch.arange(40))
    assert model.logits(hidden_TD[:0]).shape == (0, model.spec.vocab_size)
    ids, logprobs = model.choose_greedy(model.logits(hidden_TD[:0]))
    assert len(ids) == len(logprobs) == 0


@pytest.mark.parametrize(
    ("dtype", "quantize"), [("bfloat16", None), ("float32", None), ("bfloat16", "int8"), ("bfloat16", "int4")]
)
def test_the_number_of_threads_changes_no_bit(dtype: str, quantize: str | None, load: Load) -> None:
    ids_T = torch.randint(384, (150,), generator=torch.Generator().manual_seed(3))
    models = [load(dtype, quantize=quantize, num_threads=number) for number in (1, 2, 3, 7)]
    first, *others = [model.logits(hidden_states(model, ids_T)) for model in models]
    for other in others:
        assert torch.equal(first, other)


def test_a_block_size_without_a_kernel_is_served_by_the_plain_operations(folder: Path) -> None:
    ops = select_ops("cpu", block_size=8)
    assert isinstance(ops, CpuOps)
    model = load_model(folder, dtype="float32", device="cpu", ops=ops)
    assert not isinstance(model._decoder, NativeDecoder)
    assert model.cache_dtype == torch.float32


def test_the_kernels_serve_where_nothing_else_is_said_and_not_where_they_are_off(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(load("float32")._decoder, NativeDecoder)
    monkeypatch.setenv(CPU_KERNELS_VARIABLE, "off")
    assert isinstance(select_ops("cpu", block_size=32), ReferenceOps)
    assert not isinstance(load("float32")._decoder, NativeDecoder)

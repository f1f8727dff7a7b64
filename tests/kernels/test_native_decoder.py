"""What a whole decoder in C++ does at the edges of a step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from gyrfalcon.config import CPU_KERNELS_VARIABLE
from gyrfalcon.kernels.cpu.decoder import NativeDecoder
from gyrfalcon.kernels.cpu.library import available_kinds
from gyrfalcon.kernels.cpu.ops import CpuOps
from gyrfalcon.kernels.interface import AttentionInputs
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
    return model.forward(ids_T, step.attention, caches)


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


def chosen_step_by_step(model: CausalLM, prompts: list[list[int]], num_steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and log-probabilities [steps, rows], each step by `forward`, `logits` and `choose_greedy`."""
    spec, num_rows = model.spec, len(prompts)
    paged = PagedRows(num_rows, 64, block_size=32)
    caches = paged.empty_caches(spec.num_layers, spec.num_kv_heads, spec.head_size, model.cache_dtype)
    ids, counts, found = np.concatenate(prompts), {row: len(prompts[row]) for row in range(num_rows)}, []
    with torch.inference_mode():
        for _ in range(num_steps):
            step = paged.grow(counts)
            hidden_TD = model.forward(torch.from_numpy(ids).long(), step.attention, caches)
            last_tokens = torch.from_numpy(step.attention.query_starts[1:] - 1).long()
            found.append(model.choose_greedy(model.logits(hidden_TD[last_tokens])))
            ids, counts = found[-1][0], dict.fromkeys(range(num_rows), 1)
    return np.stack([ids for ids, _ in found]), np.stack([logprobs for _, logprobs in found])


def chosen_at_once(model: CausalLM, prompts: list[list[int]], num_ahead: int) -> tuple[np.ndarray, np.ndarray]:
    """The same by two calls of `choose_next`: the prompts, then one token a row and `num_ahead` further steps."""
    spec, num_rows = model.spec, len(prompts)
    paged = PagedRows(num_rows, 64, block_size=32)
    caches = paged.empty_caches(spec.num_layers, spec.num_kv_heads, spec.head_size, model.cache_dtype)
    with torch.inference_mode():
        first = paged.grow({row: len(prompts[row]) for row in range(num_rows)}).attention
        ids, logprobs = model.choose_next(
            np.concatenate(prompts).astype(np.int32), first, caches, first.query_starts[1:] - 1
        )
        second = paged.grow(dict.fromkeys(range(num_rows), 1 + num_ahead)).attention
        rows = np.arange(num_rows, dtype=np.int32)
        inputs = AttentionInputs(
            np.arange(num_rows + 1, dtype=np.int32), second.context_lens, second.block_tables, 32, second.device
        )
        more = model.choose_next(ids[0], inputs, caches, rows, num_ahead)
    return np.concatenate([ids, more[0]]), np.concatenate([logprobs, more[1]])


@pytest.mark.parametrize("kind", [*available_kinds(), "off"])
@pytest.mark.parametrize(("dtype", "quantize"), [("bfloat16", None), ("float32", None), ("bfloat16", "int8")])
@pytest.mark.parametrize("num_rows", [1, 2, 5])
def test_choosing_and_running_ahead_at_once_change_no_bit(
    kind: str, dtype: str, quantize: str | None, num_rows: int, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CPU_KERNELS_VARIABLE, kind)
    random = np.random.default_rng(num_rows)
    prompts = [random.integers(0, 384, 28 + row).tolist() for row in range(num_rows)]  # the rows come to a new block
    model = load(dtype, quantize=quantize)
    ids, logprobs = chosen_step_by_step(model, prompts, 7)
    ids_at_once, logprobs_at_once = chosen_at_once(model, prompts, 5)
    np.testing.assert_array_equal(ids_at_once, ids)
    np.testing.assert_array_equal(logprobs_at_once, logprobs)


@pytest.mark.parametrize("kind", [*available_kinds(), "off"])
def test_a_row_without_a_likeliest_token_harms_no_other_in_the_steps_run_ahead(
    kind: str, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CPU_KERNELS_VARIABLE, kind)
    model = load("float32")
    spec, paged = model.spec, PagedRows(2, 32, block_size=32)
    caches = paged.empty_caches(spec.num_layers, spec.num_kv_heads, spec.head_size, model.cache_dtype)
    rows = np.arange(2, dtype=np.int32)
    with torch.inference_mode():
        # Row 0 looks back at positions that were never written, and hold NaN.
        inputs = AttentionInputs(
            np.arange(3, dtype=np.int32),
            np.array([3, 0], dtype=np.int32),
            paged.grow({0: 32, 1: 32}).attention.block_tables,
            32,
            torch.device("cpu"),
        )
        ids, _ = model.choose_next(np.array([5, 6], dtype=np.int32), inputs, caches, rows, 3)
    assert (ids[:, 0] == -1).all()
    assert ids[:, 1].tolist() == chosen_at_once(model, [[6]], 2)[0][:, 0].tolist()


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

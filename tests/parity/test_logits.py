"""Logits against transformers for every form of checkpoint and every way of cutting up a prompt."""

# L tokens of a sequence, V vocabulary

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

import gyrfalcon
from gyrfalcon.config import CPU_KERNELS_VARIABLE
from gyrfalcon.kernels.cpu.library import available_kinds
from gyrfalcon.kernels.select import select_ops
from gyrfalcon.models.decoder import CausalLM
from gyrfalcon.models.registry import load_model
from gyrfalcon.testing.checkpoints import FORMS, VOCAB_SIZE
from gyrfalcon.testing.paged import PagedRows

# Beyond two partitions of attention, and beyond position 512, where ALiBi's positions are rounded to multiples of 4.
NUM_TOKENS = 560
TOLERANCE = 1e-4
EYAS = Path(gyrfalcon.__file__).parent / "eyas"

BLOCK_SIZE = 32
THREADS = 2  # of the kernels: with one, nothing could go wrong between them

Checkpoints = Callable[..., Path]


@pytest.fixture(params=["off", *available_kinds()])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Plain PyTorch, or one of the kinds of kernels that this processor runs."""
    monkeypatch.setenv(CPU_KERNELS_VARIABLE, request.param)
    return str(request.param)


def random_ids(num_sequences: int, vocab_size: int = VOCAB_SIZE) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(vocab_size, (NUM_TOKENS,), generator=generator) for _ in range(num_sequences)]


def reference_logits(folder: Path, ids_L: Tensor, dtype: str = "float32") -> Tensor:
    # Not eager attention: it adds the bias of ALiBi models twice.
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="sdpa", dtype=getattr(torch, dtype)
    )
    with torch.inference_mode():
        return model(input_ids=ids_L[None], attention_mask=torch.ones_like(ids_L)[None]).logits[0].float()


def load(folder: Path, dtype: str = "float32") -> CausalLM:
    ops = select_ops("cpu", block_size=BLOCK_SIZE, num_threads=THREADS)
    return load_model(folder, dtype=dtype, device="cpu", ops=ops)


def run(model: CausalLM, sequences: list[Tensor], steps: Iterable[Mapping[int, int]]) -> list[Tensor]:
    """Logits of every token of each sequence, when each step runs the next so many tokens of some of them."""
    spec = model.spec
    paged = PagedRows(len(sequences), NUM_TOKENS, block_size=BLOCK_SIZE)
    caches = paged.empty_caches(spec.num_layers, spec.num_kv_heads, spec.head_size, model.cache_dtype)
    found: list[list[Tensor]] = [[] for _ in sequences]
    for counts in steps:
        starts = {row: paged.lengths[row] for row in counts}
        step = paged.grow(counts)
        ids_T = torch.cat([sequences[row][starts[row] : paged.lengths[row]] for row in counts])
        logits_TV = model.logits(model.forward(ids_T, step.attention, caches))
        for row, logits_LV in zip(step.rows, logits_TV.split(list(counts.values())), strict=True):
            found[row].append(logits_LV)
    return [torch.cat(parts) for parts in found]


def whole(num_sequences: int) -> list[dict[int, int]]:
    return [{row: NUM_TOKENS} for row in range(num_sequences)]


def random_chunks(num_sequences: int, seed: int) -> list[dict[int, int]]:
    """Steps that mix rows of one, of few and of many tokens until every sequence is complete."""
    random = np.random.default_rng(seed)
    left = dict.fromkeys(range(num_sequences), NUM_TOKENS)
    steps = []
    while left:
        chosen = [row for row in left if random.random() < 0.8] or [min(left)]
        counts = {row: min(left[row], int(random.choice([1, 2, 7, 60, 250]))) for row in chosen}
        steps.append(counts)
        left = {row: count - counts.get(row, 0) for row, count in left.items() if count > counts.get(row, 0)}
    return steps


def test_the_chunks_used_here_cover_every_token() -> None:
    for row in range(3):
        assert sum(counts.get(row, 0) for counts in random_chunks(3, seed=5)) == NUM_TOKENS


@pytest.mark.parametrize("form", FORMS)
def test_logits_are_those_of_transformers_in_one_chunk_in_many_and_token_by_token(
    form: str, checkpoint: Checkpoints, kernels: str
) -> None:
    # transformers reads the old spellings only by running code from the repository: it gets the native one.
    expected_LV = reference_logits(checkpoint(form.removesuffix("-legacy")), random_ids(1)[0])
    model = load(checkpoint(form))
    sequences = random_ids(3)

    at_once = run(model, sequences, whole(3))
    in_chunks = run(model, sequences, random_chunks(3, seed=7))
    token_by_token = run(model, sequences[:1], [{0: NUM_TOKENS - 40}, *([{0: 1}] * 40)])

    assert expected_LV.std() > 0.1  # a reference that says nothing would agree with anything
    torch.testing.assert_close(at_once[0], expected_LV, rtol=0, atol=TOLERANCE)
    for one, other in zip(at_once, in_chunks, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(at_once[0], token_by_token[0])


@pytest.mark.parametrize("form", ["falcon-7b", "falcon-40b", "falcon-rw", "llama-biased"])
def test_in_bfloat16_the_error_is_no_larger_than_that_of_transformers(
    form: str, checkpoint: Checkpoints, kernels: str
) -> None:
    folder, ids_L = checkpoint(form), random_ids(1)[0]
    exact_LV = reference_logits(folder, ids_L)
    their_error = (reference_logits(folder, ids_L, "bfloat16") - exact_LV).square().mean().sqrt()

    logits_LV = run(load(folder, "bfloat16"), [ids_L], whole(1))[0]

    our_error = (logits_LV - exact_LV).square().mean().sqrt()
    assert 0 < our_error < 1.1 * their_error


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("form", ["falcon-7b", "falcon-11b", "falcon-rw", "llama"])
def test_the_kernels_give_the_same_bits_in_any_batch_and_any_chunks_also_in_16_bits(
    form: str, dtype: str, checkpoint: Checkpoints, kernels: str
) -> None:
    if kernels == "off":
        pytest.skip("plain PyTorch promises this in float32 only")
    model = load(checkpoint(form), dtype)
    sequences = random_ids(3)

    at_once = run(model, sequences, whole(3))
    in_chunks = run(model, sequences, random_chunks(3, seed=11))
    token_by_token = run(model, sequences[:1], [{0: NUM_TOKENS - 40}, *([{0: 1}] * 40)])

    for one, other in zip(at_once, in_chunks, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(at_once[0], token_by_token[0])


def test_the_bundled_model_has_the_logits_of_transformers(kernels: str) -> None:
    model = load(EYAS)
    sequences = random_ids(2, model.spec.vocab_size)

    at_once = run(model, sequences, whole(2))

    torch.testing.assert_close(at_once[1], reference_logits(EYAS, sequences[1]), rtol=0, atol=TOLERANCE)
    for one, other in zip(at_once, run(model, sequences, random_chunks(2, seed=3)), strict=True):
        assert torch.equal(one, other)

"""Falcon's own block and the order of its fused rows."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from gyrfalcon.kernels.reference import ReferenceOps
from gyrfalcon.layers.attention import Attention
from gyrfalcon.layers.linear import Linear
from gyrfalcon.layers.mlp import GeluMLP
from gyrfalcon.layers.norm import LayerNorm
from gyrfalcon.models import falcon
from gyrfalcon.models.falcon import ParallelBlock
from gyrfalcon.models.spec import ModelSpec, read_spec
from gyrfalcon.models.weights import WeightReader, open_checkpoint
from gyrfalcon.testing.paged import PagedRows


@pytest.fixture(scope="module")
def grouped_spec(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    folder = tmp_path_factory.mktemp("spec")
    config = {"model_type": "falcon", "new_decoder_architecture": True, "hidden_size": 64, "num_attention_heads": 8}
    (folder / "config.json").write_text(json.dumps(config))
    return read_spec(folder)


@given(num_kv_heads=st.integers(1, 8), group=st.integers(1, 8), head_size=st.integers(1, 16))
def test_every_fused_row_goes_to_its_own_place(
    grouped_spec: ModelSpec, num_kv_heads: int, group: int, head_size: int
) -> None:
    num_heads = num_kv_heads * group
    spec = dataclasses.replace(
        grouped_spec,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_size=head_size,
        hidden_size=num_heads * head_size,
    )
    # Each stored row is labelled (part, head): the order must become all queries, all keys, all values.
    stored = [
        label
        for kv_head in range(num_kv_heads)
        for label in [*(("q", kv_head * group + i) for i in range(group)), ("k", kv_head), ("v", kv_head)]
        for _ in range(head_size)
    ]
    ordered: list[tuple[str, int] | None] = [None] * len(stored)

    for run in falcon._qkv_rows(spec):
        ordered[run.destination : run.destination + run.count] = stored[run.source : run.source + run.count]

    labels = [("q", head) for head in range(num_heads)]
    labels += [(part, head) for part in ("k", "v") for head in range(num_kv_heads)]
    assert ordered == [label for label in labels for _ in range(head_size)]


def test_the_rows_of_a_fused_bias_are_reordered_like_its_matrix(checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint("falcon-rw")
    spec = read_spec(folder)
    name = "transformer.h.0.self_attention.query_key_value.bias"
    stored = load_file(folder / "model.safetensors")[name].view(spec.num_heads, 3, spec.head_size)
    weights = WeightReader(open_checkpoint(folder, spec), torch.float32, torch.device("cpu"), None)

    block = falcon.load_block(spec, 0, weights)

    assert torch.equal(block.attention.qkv.bias_O, stored.transpose(0, 1).flatten())


def test_the_parallel_branches_are_added_before_the_stream() -> None:
    def constant(value: float) -> Linear:
        """A matrix whose product is `value` for any input."""
        bias = torch.full((8,), value, dtype=torch.bfloat16)
        return Linear(torch.zeros(8, 8, dtype=torch.bfloat16), bias, rounds_before_bias=True)

    ones = torch.ones(8, dtype=torch.bfloat16)
    attention = Attention(Linear(torch.zeros(24, 8, dtype=torch.bfloat16)), constant(1.0), 1, 1, 8, torch.ones(1))
    block = ParallelBlock(LayerNorm(ones, ones, 1e-5), None, attention, GeluMLP(constant(0.0), constant(1.0)))
    paged = PagedRows(1, 1, block_size=4)
    (cache,) = paged.empty_caches(1, 1, 8, torch.bfloat16)
    step = paged.grow({0: 1})

    out_TD = block.forward(torch.full((1, 8), 256.0).bfloat16(), None, step.attention, cache, ReferenceOps())

    # bfloat16 has no 257: adding 1 twice to 256 would leave it where it is.
    assert out_TD.tolist() == [[258.0] * 8]

"""Falcon in all its forms: 7B, 40B, 180B, 11B, RW."""

# T tokens in the step, D hidden, H query heads

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gyrfalcon.kernels.interface import AttentionInputs, BlockParts, LayerCache, Ops
from gyrfalcon.layers.alibi import alibi_slopes
from gyrfalcon.layers.attention import Attention
from gyrfalcon.layers.linear import Linear
from gyrfalcon.layers.mlp import GeluMLP
from gyrfalcon.layers.norm import LayerNorm
from gyrfalcon.layers.rotary import Rotation
from gyrfalcon.models.decoder import Block, SequentialBlock, block_parts
from gyrfalcon.models.spec import ModelSpec
from gyrfalcon.models.weights import RowRun, WeightReader


@dataclass(frozen=True, slots=True)
class ParallelBlock:
    """Attention and MLP side by side on the same stream. mlp_norm: None where both read the attention's norm."""

    attention_norm: LayerNorm
    mlp_norm: LayerNorm | None
    attention: Attention
    mlp: GeluMLP

    def forward(
        self, x_TD: Tensor, turn: Rotation | None, inputs: AttentionInputs, cache: LayerCache, ops: Ops
    ) -> Tensor:
        normed_TD = self.attention_norm.forward(x_TD, ops)
        attended_TD = self.attention.forward(normed_TD, turn, inputs, cache, ops)
        if self.mlp_norm is not None:
            normed_TD = self.mlp_norm.forward(x_TD, ops)
        # The two branches first, then the stream: in 16 bits the order decides the rounding.
        return x_TD + (self.mlp.forward(normed_TD, ops) + attended_TD)

    def parts(self) -> BlockParts:
        return block_parts("parallel", self.attention_norm, self.mlp_norm, self.attention, self.mlp)


def load_block(spec: ModelSpec, layer: int, weights: WeightReader) -> Block:
    """Layer `layer` of a Falcon checkpoint."""
    prefix = f"transformer.h.{layer}"
    slopes_H = None
    if spec.rope is None:
        slopes_H = torch.tensor(alibi_slopes(spec.num_heads), dtype=torch.float32, device=weights.device)
    attention = Attention(
        qkv=_load_linear(weights, f"{prefix}.self_attention.query_key_value", list(_qkv_rows(spec))),
        output=_load_linear(weights, f"{prefix}.self_attention.dense"),
        num_heads=spec.num_heads,
        num_kv_heads=spec.num_kv_heads,
        head_size=spec.head_size,
        alibi_slopes_H=slopes_H,
    )
    mlp = GeluMLP(
        up=_load_linear(weights, f"{prefix}.mlp.dense_h_to_4h"),
        down=_load_linear(weights, f"{prefix}.mlp.dense_4h_to_h"),
    )
    if spec.block_form == "sequential":
        return SequentialBlock(
            attention_norm=load_norm(spec, f"{prefix}.input_layernorm", weights),
            attention=attention,
            mlp_norm=load_norm(spec, f"{prefix}.post_attention_layernorm", weights),
            mlp=mlp,
        )
    if spec.block_form == "parallel":
        return ParallelBlock(load_norm(spec, f"{prefix}.input_layernorm", weights), None, attention, mlp)
    return ParallelBlock(
        attention_norm=load_norm(spec, f"{prefix}.ln_attn", weights),
        mlp_norm=load_norm(spec, f"{prefix}.ln_mlp", weights),
        attention=attention,
        mlp=mlp,
    )


def load_norm(spec: ModelSpec, name: str, weights: WeightReader) -> LayerNorm:
    """A layer norm; it has a bias in every checkpoint, also where the matrices have none."""
    return LayerNorm(weights.load(f"{name}.weight"), weights.load(f"{name}.bias"), spec.norm_epsilon)


def _load_linear(weights: WeightReader, name: str, rows: list[RowRun] | None = None) -> Linear:
    bias_O = weights.load(f"{name}.bias", rows) if weights.holds(f"{name}.bias") else None
    return Linear(weights.load_matrix([name], rows), bias_O, rounds_before_bias=True)


def _qkv_rows(spec: ModelSpec) -> Iterator[RowRun]:
    """Where the stored rows of query_key_value go, so that they end up ordered [Q | K | V]."""
    size, query_size, kv_size = spec.head_size, spec.query_size, spec.kv_size
    if spec.qkv_layout == "multi_query":
        yield RowRun(source=0, destination=0, count=query_size + 2 * kv_size)
        return
    # grouped: per kv head its query heads, its key, its value; per_head is the case of one query head a group.
    group_rows = spec.num_heads // spec.num_kv_heads * size
    for group in range(spec.num_kv_heads):
        start = group * (group_rows + 2 * size)
        key = query_size + group * size
        yield RowRun(source=start, destination=group * group_rows, count=group_rows)
        yield RowRun(source=start + group_rows, destination=key, count=size)
        yield RowRun(source=start + group_rows + size, destination=key + kv_size, count=size)

"""The Llama family: Llama, Mistral without sliding windows, Falcon3, TinyLlama, SmolLM."""

from __future__ import annotations

from gyrfalcon.errors import ModelLoadError
from gyrfalcon.layers.attention import Attention
from gyrfalcon.layers.linear import Linear
from gyrfalcon.layers.mlp import GatedMLP
from gyrfalcon.layers.norm import RMSNorm
from gyrfalcon.models.decoder import Block, SequentialBlock
from gyrfalcon.models.spec import ModelSpec
from gyrfalcon.models.weights import WeightReader


def load_block(spec: ModelSpec, layer: int, weights: WeightReader) -> Block:
    """Layer `layer` of a Llama checkpoint; matrices that read the same input become one."""
    prefix = f"model.layers.{layer}"
    attention = Attention(
        qkv=_load_stacked(weights, [f"{prefix}.self_attn.{part}_proj" for part in ("q", "k", "v")]),
        output=_load_stacked(weights, [f"{prefix}.self_attn.o_proj"]),
        num_heads=spec.num_heads,
        num_kv_heads=spec.num_kv_heads,
        head_size=spec.head_size,
        alibi_slopes_H=None,
    )
    return SequentialBlock(
        attention_norm=load_norm(spec, f"{prefix}.input_layernorm", weights),
        attention=attention,
        mlp_norm=load_norm(spec, f"{prefix}.post_attention_layernorm", weights),
        mlp=GatedMLP(
            gate_up=_load_stacked(weights, [f"{prefix}.mlp.gate_proj", f"{prefix}.mlp.up_proj"]),
            down=_load_stacked(weights, [f"{prefix}.mlp.down_proj"]),
        ),
    )


def load_norm(spec: ModelSpec, name: str, weights: WeightReader) -> RMSNorm:
    return RMSNorm(weights.load(f"{name}.weight"), spec.norm_epsilon)


def _load_stacked(weights: WeightReader, names: list[str]) -> Linear:
    """The rows of several matrices, and of their biases where there are any, one after another."""
    biases = [f"{name}.bias" for name in names]
    held = [weights.holds(bias) for bias in biases]
    if any(held) and not all(held):
        # Only beside codes: everywhere else the tensors are those that config.json asks for.
        raise ModelLoadError(f"`{biases[held.index(True)]}` is there, and `{biases[held.index(False)]}` is missing")
    bias_O = weights.load_stacked(biases) if all(held) else None
    return Linear(weights.load_matrix(names), bias_O)

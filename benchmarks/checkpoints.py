"""Checkpoints with random weights in the shapes of real models; speed does not depend on what the weights say."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

FALCON_1B = {
    "architectures": ["FalconForCausalLM"],
    "model_type": "falcon",
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "vocab_size": 65024,
    "multi_query": True,
    "parallel_attn": True,
    "new_decoder_architecture": False,
    "alibi": False,
    "bias": False,
    "max_position_embeddings": 2048,
    "bos_token_id": 11,
    "eos_token_id": 11,
    "torch_dtype": "bfloat16",
}
"""Falcon-7B's architecture (one key/value head, parallel attention) scaled to 1.15 G parameters."""

LLAMA_1B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2048,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "intermediate_size": 5632,
    "vocab_size": 32000,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}
"""TinyLlama's shape: 1.03 G parameters are read for a token, the embedding's rows aside."""

SHAPES: dict[str, dict[str, Any]] = {
    "llama-1.1b": LLAMA_1B,
    # Room for 2,048 tokens of context and new ones after them.
    "falcon-1.2b": FALCON_1B | {"max_position_embeddings": 4096},
    # Falcon-7B's layer as it is, and its head: four layers are enough to see how they run.
    "falcon-7b-4-layers": FALCON_1B
    | {"hidden_size": 4544, "num_hidden_layers": 4, "num_attention_heads": 71, "max_position_embeddings": 4096},
    # So small that a token costs what the engine costs around the arithmetic.
    "tiny": LLAMA_1B
    | {
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "intermediate_size": 768,
        "vocab_size": 4096,
    },
}
"""What the comparison with other engines runs, by name."""

Matrix = Callable[[int, int], torch.Tensor]


def write_falcon(folder: Path, config: dict[str, Any], seed: int = 0) -> Path:
    """Write a multi-query Falcon checkpoint in bfloat16 with eyas' tokenizer; kept if the folder already has it."""
    return _write(folder, config, seed, _falcon_tensors)


def write_shape(folder: Path, name: str, seed: int = 0) -> Path:
    """Write the checkpoint of SHAPES[name] in bfloat16; kept if the folder already has it.

    The tokenizer is eyas' one with entries that no text reaches, up to the vocabulary's size: every id that the
    weights choose has a text.
    """
    config = SHAPES[name]
    tensors = _falcon_tensors if config["model_type"] == "falcon" else _llama_tensors
    return _write(folder, config, seed, tensors, fill_vocabulary=True)


def num_weights_read(config: dict[str, Any]) -> int:
    """Weights that one token's step reads: all matrices; of the embedding one row, unless it is the head as well."""
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    keys = 2 * hidden // config["num_attention_heads"] * config.get("num_key_value_heads", 1)
    if config["model_type"] == "falcon":
        layer = hidden * (hidden + keys) + hidden * hidden + 8 * hidden * hidden
    else:
        layer = hidden * (hidden + keys) + hidden * hidden + 3 * hidden * config["intermediate_size"]
    return int(layers * layer + hidden * config["vocab_size"])


def cache_values_per_token(config: dict[str, Any]) -> int:
    """Numbers that the cache holds of one token."""
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    return int(2 * config["num_hidden_layers"] * config.get("num_key_value_heads", 1) * head_dim)


def _write(
    folder: Path,
    config: dict[str, Any],
    seed: int,
    tensors: Callable[[dict[str, Any], Matrix], Iterator[tuple[str, torch.Tensor]]],
    *,
    fill_vocabulary: bool = False,
) -> Path:
    if (folder / "config.json").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return (0.02 * torch.randn(rows, columns, generator=generator)).bfloat16()

    save_file(dict(tensors(config, matrix)), folder / "model.safetensors", metadata={"format": "pt"})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(str(files("gyrfalcon") / "eyas" / name), folder / name)
    if fill_vocabulary:
        _fill_vocabulary(folder / "tokenizer.json", config["vocab_size"])
    # Written last: a folder that has it is complete.
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder


def _falcon_tensors(config: dict[str, Any], matrix: Matrix) -> Iterator[tuple[str, torch.Tensor]]:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = hidden // heads
    yield "transformer.word_embeddings.weight", matrix(config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        name = f"transformer.h.{layer}"
        yield f"{name}.self_attention.query_key_value.weight", matrix(hidden + 2 * head_dim, hidden)
        yield f"{name}.self_attention.dense.weight", matrix(hidden, hidden)
        yield f"{name}.mlp.dense_h_to_4h.weight", matrix(4 * hidden, hidden)
        yield f"{name}.mlp.dense_4h_to_h.weight", matrix(hidden, 4 * hidden)
        yield f"{name}.input_layernorm.weight", torch.ones(hidden, dtype=torch.bfloat16)
        yield f"{name}.input_layernorm.bias", torch.zeros(hidden, dtype=torch.bfloat16)
    yield "transformer.ln_f.weight", torch.ones(hidden, dtype=torch.bfloat16)
    yield "transformer.ln_f.bias", torch.zeros(hidden, dtype=torch.bfloat16)


def _llama_tensors(config: dict[str, Any], matrix: Matrix) -> Iterator[tuple[str, torch.Tensor]]:
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    keys = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    yield "model.embed_tokens.weight", matrix(config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        yield f"{name}.self_attn.q_proj.weight", matrix(hidden, hidden)
        yield f"{name}.self_attn.k_proj.weight", matrix(keys, hidden)
        yield f"{name}.self_attn.v_proj.weight", matrix(keys, hidden)
        yield f"{name}.self_attn.o_proj.weight", matrix(hidden, hidden)
        yield f"{name}.mlp.gate_proj.weight", matrix(ffn, hidden)
        yield f"{name}.mlp.up_proj.weight", matrix(ffn, hidden)
        yield f"{name}.mlp.down_proj.weight", matrix(hidden, ffn)
        yield f"{name}.input_layernorm.weight", torch.ones(hidden, dtype=torch.bfloat16)
        yield f"{name}.post_attention_layernorm.weight", torch.ones(hidden, dtype=torch.bfloat16)
    yield "model.norm.weight", torch.ones(hidden, dtype=torch.bfloat16)
    yield "lm_head.weight", matrix(config["vocab_size"], hidden)


def _fill_vocabulary(path: Path, vocab_size: int) -> None:
    """Give every id up to the vocabulary's size an entry; without merges no text is ever cut into the new ones."""
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    known = set(vocabulary.values()) | {token["id"] for token in tokenizer["added_tokens"]}
    for token_id in range(vocab_size):
        if token_id not in known:
            vocabulary[f"Ġfiller{token_id}"] = token_id
    path.write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")

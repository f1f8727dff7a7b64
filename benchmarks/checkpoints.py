"""Checkpoints with random weights in the shapes of real models; speed does not depend on what the weights say."""

from __future__ import annotations

import json
import shutil
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


def write_falcon(folder: Path, config: dict[str, Any], seed: int = 0) -> Path:
    """Write a multi-query Falcon checkpoint in bfloat16 with eyas' tokenizer; kept if the folder already has it."""
    if (folder / "config.json").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = hidden // heads

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return (0.02 * torch.randn(rows, columns, generator=generator)).bfloat16()

    tensors = {"transformer.word_embeddings.weight": matrix(config["vocab_size"], hidden)}
    for layer in range(config["num_hidden_layers"]):
        name = f"transformer.h.{layer}"
        tensors[f"{name}.self_attention.query_key_value.weight"] = matrix(hidden + 2 * head_dim, hidden)
        tensors[f"{name}.self_attention.dense.weight"] = matrix(hidden, hidden)
        tensors[f"{name}.mlp.dense_h_to_4h.weight"] = matrix(4 * hidden, hidden)
        tensors[f"{name}.mlp.dense_4h_to_h.weight"] = matrix(hidden, 4 * hidden)
        tensors[f"{name}.input_layernorm.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
        tensors[f"{name}.input_layernorm.bias"] = torch.zeros(hidden, dtype=torch.bfloat16)
    tensors["transformer.ln_f.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
    tensors["transformer.ln_f.bias"] = torch.zeros(hidden, dtype=torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(str(files("gyrfalcon") / "eyas" / name), folder / name)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder

"""Checkpoints whose matrices are stored as codes, written from the formats' descriptions, code by code.

Slow and obvious on purpose: the reader unpacks whole tensors with shifts, this writes one code after another.
"""

# O outputs, I inputs, G groups

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gyrfalcon.models.spec import embedding_name, read_spec

Ints = npt.NDArray[np.int64]
AWQ_PLACES = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class Codes:
    """Random codes of one matrix, and the numbers they stand for."""

    codes_OI: Ints
    zeros_OG: Ints
    scales_OG: Tensor  # float16
    groups_I: Ints

    @property
    def dense(self) -> Tensor:
        differences = self.codes_OI - self.zeros_OG[:, self.groups_I]
        return torch.from_numpy(differences).float() * self.scales_OG.float()[:, self.groups_I]


@dataclass(frozen=True)
class Recipe:
    """What is stored, and what config.json says about it."""

    write: Callable[[Codes, Recipe], dict[str, Tensor]]
    config: dict[str, Any]
    bits: int = 4
    group: int = 32  # 0: one for all inputs
    is_symmetric: bool = False
    is_ordered: bool = False  # act-order: the groups' inputs lie scattered
    skipped: tuple[str, ...] = ("lm_head",)


def draw(name: str, outputs: int, inputs: int, recipe: Recipe) -> Codes:
    random = np.random.default_rng(zlib.crc32(name.encode()))
    group = recipe.group or inputs
    groups = -(-inputs // group)
    groups_I = np.arange(inputs) // group
    if recipe.is_ordered:  # the same for all matrices of a width, as those that read one input have it
        groups_I = groups_I[np.random.default_rng(inputs).permutation(inputs)]
    middle = 1 << (recipe.bits - 1)
    zeros_OG = random.integers(0, 2 * middle, (outputs, groups))
    if recipe.is_symmetric:
        zeros_OG = np.full((outputs, groups), middle)
    scales = random.uniform(0.002, 0.02, (outputs, groups)) * 16 / (1 << recipe.bits)
    codes_OI = random.integers(0, 2 * middle, (outputs, inputs))
    return Codes(codes_OI, zeros_OG, torch.from_numpy(scales).half(), groups_I)


def pack(values: Ints, bits: int, places: tuple[int, ...] = ()) -> Tensor:
    """[A, B] codes as [A, ceil(B / codes in a word)] words; `places[j]` is the code in a word's bits j."""
    per_word = 32 // bits
    words = np.zeros((values.shape[0], -(-values.shape[1] // per_word)), dtype=np.uint64)
    for row in range(values.shape[0]):
        for word in range(words.shape[1]):
            for slot in range(per_word):
                column = word * per_word + (places[slot] if places else slot)
                if column < values.shape[1]:
                    words[row, word] |= np.uint64(int(values[row, column]) << (bits * slot))
    return torch.from_numpy(words.astype(np.uint32).view(np.int32).copy())


def write_gptq(codes: Codes, recipe: Recipe) -> dict[str, Tensor]:
    less = 0 if recipe.config.get("checkpoint_format") == "gptq_v2" else 1
    stored_zeros = (codes.zeros_OG - less) % (1 << recipe.bits)
    return {
        "qweight": pack(codes.codes_OI, recipe.bits).t().contiguous(),
        "qzeros": pack(stored_zeros.T, recipe.bits),
        "scales": codes.scales_OG.t().contiguous(),
        "g_idx": torch.from_numpy(codes.groups_I).int(),
    }


def write_awq(codes: Codes, recipe: Recipe) -> dict[str, Tensor]:
    return {
        "qweight": pack(codes.codes_OI.T, 4, AWQ_PLACES),
        "qzeros": pack(codes.zeros_OG.T, 4, AWQ_PLACES),
        "scales": codes.scales_OG.t().contiguous(),
    }


def write_packed(codes: Codes, recipe: Recipe) -> dict[str, Tensor]:
    parts = {
        "weight_packed": pack(codes.codes_OI, recipe.bits),
        "weight_scale": codes.scales_OG,
        "weight_shape": torch.tensor(codes.codes_OI.shape),
    }
    if recipe.is_ordered:
        parts["weight_g_idx"] = torch.from_numpy(codes.groups_I).int()
    if not recipe.is_symmetric:
        parts["weight_zero_point"] = pack(codes.zeros_OG.T, recipe.bits).t().contiguous()
    return parts


def write_plain(codes: Codes, recipe: Recipe) -> dict[str, Tensor]:
    parts = {"weight": torch.from_numpy(codes.codes_OI - 128).to(torch.int8), "weight_scale": codes.scales_OG}
    if not recipe.is_symmetric:
        parts["weight_zero_point"] = torch.from_numpy(codes.zeros_OG - 128).to(torch.int8)
    return parts


def gptq(**changes: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True} | changes


def awq(**changes: Any) -> dict[str, Any]:
    return {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"} | changes


def compressed(format: str = "pack-quantized", *, activations: Any = None, **weights: Any) -> dict[str, Any]:
    described = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32} | weights
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": described, "input_activations": activations}},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    }


def store_codes(folder: Path, recipe: Recipe) -> dict[str, Tensor]:
    """Put codes in place of a checkpoint's matrices; returns what they stand for, by name without `.weight`."""
    spec = read_spec(folder)
    path = folder / "model.safetensors"
    tensors, stored, dense = load_file(path), {}, {}
    for name, tensor in tensors.items():
        matrix = name.removesuffix(".weight")
        if tensor.ndim != 2 or name == embedding_name(spec) or matrix in recipe.skipped:
            stored[name] = tensor
            continue
        codes = draw(matrix, *tensor.shape, recipe)
        dense[matrix] = codes.dense
        stored |= {f"{matrix}.{part}": value for part, value in recipe.write(codes, recipe).items()}
    save_file(stored, path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": recipe.config}))
    return dense

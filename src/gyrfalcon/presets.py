"""The model catalogue: checkpoints that are served under a short name, with the figures needed to plan for them."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from gyrfalcon.errors import ModelLoadError

BUNDLED = "eyas"

# Bits a weight takes in each precision; scales of quantised weights are not counted.
PRECISION_BITS = {"float32": 32, "bfloat16": 16, "float16": 16, "int8": 8, "int4": 4}


@dataclass(frozen=True, slots=True)
class Preset:
    """A checkpoint known by name.

    source: id on the Hugging Face Hub, None for the checkpoint that comes with the package. num_parameters: distinct
    ones, a tied output matrix counted once. max_context: tokens its positions allow. kv_bytes_per_token: cache of one
    token at 16 bit. workload: the Kubernetes kind it runs as. is_distributed: needs more than one machine.
    """

    name: str
    source: str | None
    summary: str
    num_parameters: int
    max_context: int
    kv_bytes_per_token: int
    licence: str = "Apache-2.0"
    workload: str = "Deployment"
    is_distributed: bool = False

    @property
    def command(self) -> str:
        """The command that serves it."""
        return f"gyrfalcon serve {self.name}"

    def weight_bytes(self, precision: str) -> int:
        """Memory of the weights alone, in one of PRECISION_BITS; the KV cache and activations come on top."""
        return self.num_parameters * PRECISION_BITS[precision] // 8


def bundled_folder() -> Path:
    """The folder of `eyas`, the checkpoint that comes with the package."""
    return Path(str(resources.files("gyrfalcon").joinpath(BUNDLED)))


def catalogue() -> tuple[Preset, ...]:
    """All presets, the bundled one first. Raises ModelLoadError when the package's own checkpoint is damaged."""
    return (_describe_bundled(), *PUBLISHED)


PUBLISHED = tuple(
    Preset(
        name=name,
        source=f"tiiuae/{name}",
        summary=summary,
        num_parameters=num_parameters,
        max_context=2048,
        kv_bytes_per_token=kv_bytes_per_token,
    )
    for name, summary, num_parameters, kv_bytes_per_token in (
        ("falcon-7b", "base model, multi-query attention", 6_921_720_704, 8_192),
        ("falcon-7b-instruct", "falcon-7b tuned on chats and instructions", 6_921_720_704, 8_192),
        ("falcon-40b", "base model, 8 key/value heads", 41_303_293_952, 122_880),
        ("falcon-40b-instruct", "falcon-40b tuned on chats and instructions", 41_303_293_952, 122_880),
    )
)

NAMES = (BUNDLED, *(preset.name for preset in PUBLISHED))


def _describe_bundled() -> Preset:
    # Its figures are read from its own files, so that they stay true when it is trained anew.
    folder = bundled_folder()
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        num_parameters = _count_parameters(folder / "model.safetensors")
    except (OSError, ValueError, struct.error) as error:
        raise ModelLoadError(
            f"`{folder}`, part of this package, is damaged: {error}; install gyrfalcon anew"
        ) from error
    num_heads = config["num_attention_heads"]
    num_kv_heads = 1 if config.get("multi_query", True) else num_heads
    if config.get("new_decoder_architecture"):
        num_kv_heads = config.get("num_kv_heads") or num_heads
    head_size = config["hidden_size"] // num_heads
    return Preset(
        name=BUNDLED,
        source=None,
        summary="small demonstration model that comes with the package",
        num_parameters=num_parameters,
        max_context=config.get("max_position_embeddings", 2048),
        kv_bytes_per_token=2 * 2 * config["num_hidden_layers"] * num_kv_heads * head_size,
    )


def _count_parameters(path: Path) -> int:
    with path.open("rb") as file:
        (header_size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(header_size))
    return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")

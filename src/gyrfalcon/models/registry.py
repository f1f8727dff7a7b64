"""From a checkpoint folder to a model that runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import psutil
import torch

from gyrfalcon.errors import ModelLoadError
from gyrfalcon.kernels.interface import Ops
from gyrfalcon.layers.norm import Norm
from gyrfalcon.layers.rotary import frequencies, stretch_slow_frequencies
from gyrfalcon.models import falcon, llama
from gyrfalcon.models.decoder import Block, CausalLM, Decoder
from gyrfalcon.models.spec import (
    DTYPE_BYTES,
    LinearScaling,
    Llama3Scaling,
    ModelSpec,
    Rope,
    embedding_name,
    read_spec,
)
from gyrfalcon.models.weights import WeightReader, open_checkpoint

_DTYPES = {name: getattr(torch, name) for name in DTYPE_BYTES}


def load_model(
    folder: Path,
    *,
    dtype: str,
    device: str,
    ops: Ops,
    on_progress: Callable[[int, int], None] | None = None,
) -> CausalLM:
    """Load the checkpoint in `folder` onto `device`.

    dtype: "auto" for the one config.json names, or one of "float32", "bfloat16", "float16".
    on_progress: called with the bytes read so far and those to read in all, at least once.

    Raises ModelLoadError, before any weight is read wherever headers and config.json can tell.
    """
    spec = read_spec(folder)
    chosen = spec.dtype if dtype == "auto" else dtype
    if chosen not in _DTYPES:
        raise ModelLoadError(f"dtype is {dtype!r}; expected auto, {', '.join(_DTYPES)}")
    checkpoint = open_checkpoint(folder, spec)
    place = torch.device(device)
    no_room = _no_room(folder, spec, chosen, device)
    if spec.num_parameters * DTYPE_BYTES[chosen] > _free_bytes(place):
        raise no_room
    weights = WeightReader(checkpoint, _DTYPES[chosen], place, on_progress)
    try:
        decoder = _load_decoder(spec, weights)
    except (torch.OutOfMemoryError, MemoryError):
        raise no_room from None
    except RuntimeError as error:
        # The CPU allocator has no exception of its own.
        if "can't allocate memory" in str(error):
            raise no_room from None
        raise
    return CausalLM(spec, decoder, ops, weight_bytes=weights.bytes_loaded)


def _free_bytes(device: torch.device) -> int:
    """Memory to be had now. Without this check the system would end the process instead of refusing the memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available)


def _load_decoder(spec: ModelSpec, weights: WeightReader) -> Decoder:
    load_block: Callable[[ModelSpec, int, WeightReader], Block]
    load_norm: Callable[[ModelSpec, str, WeightReader], Norm]
    if spec.family == "falcon":
        load_block, load_norm, final_norm = falcon.load_block, falcon.load_norm, "transformer.ln_f"
    else:
        load_block, load_norm, final_norm = llama.load_block, llama.load_norm, "model.norm"
    embedding_VD = weights.load(embedding_name(spec))
    if spec.tied_head:
        weights.check_spare_head(embedding_VD)
    return Decoder(
        embedding_VD=embedding_VD,
        frequencies_E2=None if spec.rope is None else _rotary_frequencies(spec.rope, spec.head_size, weights.device),
        blocks=tuple(load_block(spec, layer, weights) for layer in range(spec.num_layers)),
        final_norm=load_norm(spec, final_norm, weights),
        head_VD=embedding_VD if spec.tied_head else weights.load("lm_head.weight"),
    )


def _rotary_frequencies(rope: Rope, head_size: int, device: torch.device) -> torch.Tensor:
    plain_E2 = frequencies(rope.theta, head_size, device)
    match rope.scaling:
        case LinearScaling(factor):
            return plain_E2 / factor
        case Llama3Scaling(factor, low, high, original_max_context):
            return stretch_slow_frequencies(plain_E2, factor, low, high, original_max_context)
        case None:
            return plain_E2


def _no_room(folder: Path, spec: ModelSpec, dtype: str, device: str) -> ModelLoadError:
    needed = spec.num_parameters * DTYPE_BYTES[dtype]
    return ModelLoadError(
        f"{folder}: {spec.num_parameters} parameters in {dtype} take {needed} bytes, more than {device} has free"
    )

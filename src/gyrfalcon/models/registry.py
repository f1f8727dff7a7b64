"""From a checkpoint folder to a model that runs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from gyrfalcon.errors import ModelLoadError, SettingsError
from gyrfalcon.kernels.interface import DecoderParts, DecoderShape, FusedDecoder, Ops, PackedPlace
from gyrfalcon.kernels.quantised import CodeFormat, QuantisedMatrix
from gyrfalcon.layers.alibi import alibi_slopes
from gyrfalcon.layers.linear import Linear
from gyrfalcon.layers.norm import Norm
from gyrfalcon.layers.rotary import frequencies, stretch_slow_frequencies
from gyrfalcon.memory import free_bytes
from gyrfalcon.models import falcon, llama
from gyrfalcon.models.decoder import Block, CausalLM, Decoder
from gyrfalcon.models.quantisation import check_request, read_format
from gyrfalcon.models.spec import (
    DTYPE_BYTES,
    LinearScaling,
    Llama3Scaling,
    ModelSpec,
    Rope,
    embedding_name,
    read_spec,
)
from gyrfalcon.models.weights import Checkpoint, WeightReader, open_checkpoint

logger = logging.getLogger(__name__)

# docs/quantisation.md has what other sizes give. Falcon-7B's narrowest width is 71 times 64.
INT4_GROUP = 64

_DTYPES = {name: getattr(torch, name) for name in DTYPE_BYTES}


def load_model(
    folder: Path,
    *,
    dtype: str,
    device: str,
    ops: Ops,
    quantize: str | None = None,
    group: int = INT4_GROUP,
    keeps_packed: bool = False,
    packed_directory: Path | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> CausalLM:
    """Load the checkpoint in `folder` onto `device`.

    dtype: "auto" for the one config.json names, or one of "float32", "bfloat16", "float16".
    quantize: "int8" or "int4" makes codes of the matrices; one of `quantisation.METHODS` says how the checkpoint
    stores its own, which are read as what they are without it too. group: inputs that share a scale in int4.
    keeps_packed: whether the device may keep the weights in a form of its own for the next start. packed_directory:
    where; None for beside the checkpoint, or the user's cache.
    on_progress: called with the bytes read so far and those to read in all, at least once.

    Raises ModelLoadError, before any weight is read wherever headers and config.json can tell; SettingsError where
    `quantize` does not fit the checkpoint or the device.
    """
    spec = read_spec(folder)
    stored = read_format(folder)
    check_request(folder, quantize, stored)
    place = torch.device(device)
    form = {"int8": CodeFormat(8), "int4": CodeFormat(4, group)}.get(quantize or "")
    if form is not None and place.type != "cpu":
        raise SettingsError(
            "--quantize", f"`{quantize}` runs on the CPU only in this version; leave it out, or say `--device cpu`"
        )
    chosen = spec.dtype if dtype == "auto" else dtype
    if chosen not in _DTYPES:
        raise ModelLoadError(f"dtype is {dtype!r}; expected auto, {', '.join(_DTYPES)}")
    checkpoint = open_checkpoint(folder, spec, stored)
    code_bits = form.bits if form is not None else stored.bits if stored is not None and place.type == "cpu" else None
    needed = _needed_bytes(spec, chosen, code_bits)
    no_room = _no_room(folder, spec, chosen if code_bits is None else f"{code_bits} bits", needed, device)
    if needed > _free_bytes(place):
        raise no_room
    weights = WeightReader(checkpoint, _DTYPES[chosen], place, on_progress, form)
    try:
        facts = {"dtype": chosen, "codes": str(form or stored or "plain")}
        packed = PackedPlace(folder, facts, packed_directory) if keeps_packed else None
        decoder = _load_decoder(spec, weights, ops, packed)
    except (torch.OutOfMemoryError, MemoryError):
        raise no_room from None
    except RuntimeError as error:
        # The CPU allocator has no exception of its own.
        if "can't allocate memory" in str(error):
            raise no_room from None
        raise
    _tell_dequantised(checkpoint, weights, chosen)
    return CausalLM(spec, decoder, _DTYPES[chosen], place)


def _tell_dequantised(checkpoint: Checkpoint, weights: WeightReader, dtype: str) -> None:
    """A line where less memory was saved than the checkpoint's form promises."""
    if weights.dequantised:
        logger.warning(
            "%d of %d matrices stored as codes are served in %s, as there is no faster form of them here: `%s`, ...",
            len(weights.dequantised),
            len(checkpoint.quantised),
            dtype,
            weights.dequantised[0],
        )


def _free_bytes(device: torch.device) -> int:
    """Memory to be had now. Without this check the system would end the process instead of refusing the memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return free_bytes()


def _load_decoder(spec: ModelSpec, weights: WeightReader, ops: Ops, packed: PackedPlace | None) -> FusedDecoder:
    """The device's own form of the decoder, else its parameters for the plain operations."""
    load_block: Callable[[ModelSpec, int, WeightReader], Block]
    load_norm: Callable[[ModelSpec, str, WeightReader], Norm]
    if spec.family == "falcon":
        load_block, load_norm, final_norm = falcon.load_block, falcon.load_norm, "transformer.ln_f"
    else:
        load_block, load_norm, final_norm = llama.load_block, llama.load_norm, "model.norm"

    def load_embedding() -> Tensor:
        embedding_VD = weights.load(embedding_name(spec))
        if spec.tied_head:
            weights.check_spare_head(embedding_VD)
        return embedding_VD

    # Codes of a tied head are made beside the embedding, which stays as it is.
    shares_head = spec.tied_head and not weights.makes_codes

    def load_head() -> Tensor | QuantisedMatrix:
        return weights.load_head(embedding_name(spec) if spec.tied_head else "lm_head.weight")

    frequencies_E2 = None if spec.rope is None else _rotary_frequencies(spec.rope, spec.head_size, weights.device)
    parts = DecoderParts(
        shape=_decoder_shape(spec, weights.dtype, frequencies_E2),
        embedding_VD=load_embedding,
        blocks=lambda: (load_block(spec, layer, weights).parts() for layer in range(spec.num_layers)),
        final_norm=lambda: load_norm(spec, final_norm, weights).parts(),
        head_VD=None if shares_head else load_head,
    )
    fused = ops.fuse(parts, packed)
    if fused is not None:
        weights.finish()
        return fused
    embedding_VD = load_embedding()
    return Decoder(
        embedding_VD=embedding_VD,
        frequencies_E2=frequencies_E2,
        blocks=tuple(load_block(spec, layer, weights) for layer in range(spec.num_layers)),
        final_norm=load_norm(spec, final_norm, weights),
        head=Linear(embedding_VD if shares_head else load_head()),
        ops=ops,
        weight_bytes=weights.bytes_loaded,
    )


def _decoder_shape(spec: ModelSpec, dtype: torch.dtype, frequencies_E2: Tensor | None) -> DecoderShape:
    slopes_H = None if spec.rope else torch.tensor(alibi_slopes(spec.num_heads), dtype=torch.float32)
    return DecoderShape(
        num_layers=spec.num_layers,
        hidden_size=spec.hidden_size,
        ffn_size=spec.ffn_size,
        vocab_size=spec.vocab_size,
        num_heads=spec.num_heads,
        num_kv_heads=spec.num_kv_heads,
        head_size=spec.head_size,
        dtype=dtype,
        frequencies_E2=frequencies_E2,
        slopes_H=slopes_H,
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


def _needed_bytes(spec: ModelSpec, dtype: str, code_bits: int | None) -> int:
    """The weights' memory; scales, and the codes of a tied head, are not worth counting."""
    if code_bits is None:
        return spec.num_parameters * DTYPE_BYTES[dtype]
    embedding = spec.vocab_size * spec.hidden_size
    return embedding * DTYPE_BYTES[dtype] + (spec.num_parameters - embedding) * code_bits // 8


def _no_room(folder: Path, spec: ModelSpec, precision: str, needed: int, device: str) -> ModelLoadError:
    return ModelLoadError(
        f"{folder}: {spec.num_parameters} parameters in {precision} take {needed} bytes, more than {device} has free"
    )

"""How much memory a model takes, worked out from its config.json. Free of torch.

One arithmetic for everyone: `gyrfalcon fit` prints it, the manifests request it, the runner sizes its cache with it.
tests/unit/test_footprint.py and benchmarks/footprint.py hold it to what a process really takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Required, TypedDict, Unpack

from gyrfalcon.errors import OutOfCache, SettingsError
from gyrfalcon.models.quantisation import read_format
from gyrfalcon.models.spec import DTYPE_BYTES, ModelSpec, checkpoint_tensors, embedding_name, read_spec

__all__ = [
    "DEVICE_DEFAULTS",
    "Footprint",
    "Load",
    "ModelSpec",
    "Planned",
    "activation_bytes",
    "block_bytes",
    "cache_bytes",
    "footprint",
    "largest_batch",
    "largest_context",
    "num_cache_blocks",
    "num_devices",
    "plan_load",
    "read_spec",
    "stored_codes",
    "weight_bytes",
    "world_sizes",
]

Device = Literal["cpu", "cuda"]
Dtype = Literal["float32", "bfloat16", "float16"]
Quantize = Literal["int8", "int4"]

# Quantised weights: matrices as codes with scales, the head as int8 in both forms, the embedding as it is.
INT8_SCALE_BYTES = 4  # float32, one an output
INT4_GROUP = 64  # inner positions that share a scale
INT4_SCALE_BYTES = 2  # float16
QUANTISED_NORM_BYTES = 4  # norms and biases are float32 beside codes

FLOAT32_BYTES = 4
INDEX_BYTES = 8  # ids and positions are int64

MIB = 1024**2

DEFAULT_CONTEXT = 8192
DEFAULT_CONCURRENCY = 16


@dataclass(frozen=True, slots=True)
class DeviceDefaults:
    """What settings left open are on a device, and what the device's own libraries take."""

    token_budget: int  # tokens of a step: long enough to fill the device, short enough for running streams to go on
    cache_fraction: float  # of the memory that is free once the weights are loaded
    runtime_bytes: int  # of the device's memory, taken by the engine's libraries before the first weight
    host_bytes: int  # of the machine's memory, besides what stands on the device: the HTTP process, CUDA's own part


# On CPU measured (docs/fit.md): the engine's process 232 to 250 MiB without weights, the HTTP process 88 MiB. On CUDA
# estimated.
DEVICE_DEFAULTS: dict[Device, DeviceDefaults] = {
    "cpu": DeviceDefaults(token_budget=512, cache_fraction=0.5, runtime_bytes=240 * MIB, host_bytes=96 * MIB),
    "cuda": DeviceDefaults(token_budget=4096, cache_fraction=0.9, runtime_bytes=640 * MIB, host_bytes=3072 * MIB),
}


@dataclass(frozen=True, slots=True)
class Load:
    """What shall fit at once. context: tokens of each sequence, prompt and answer together."""

    context: int
    concurrency: int
    token_budget: int
    block_size: int = 32


def plan_load(
    spec: ModelSpec, *, device: Device, context: int | None = None, concurrency: int | None = None, block_size: int = 32
) -> Load:
    """The load to plan for; what is not given is DEFAULT_CONCURRENCY and the model's context up to DEFAULT_CONTEXT.

    Raises SettingsError for more context than the model has.
    """
    if context is not None and context > spec.max_context:
        raise SettingsError("--context", f"{context} exceeds the {spec.max_context} tokens that the model was made for")
    return Load(
        context=context or min(spec.max_context, DEFAULT_CONTEXT),
        concurrency=concurrency or DEFAULT_CONCURRENCY,
        token_budget=DEVICE_DEFAULTS[device].token_budget,
        block_size=block_size,
    )


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes on one device."""

    weights: int
    cache: int
    activations: int
    runtime: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.activations + self.runtime


class How(TypedDict, total=False):
    """How a model is loaded, as arguments."""

    dtype: Required[str]
    quantize: Quantize | None
    device: Device


def footprint(
    spec: ModelSpec,
    load: Load,
    *,
    dtype: str,
    quantize: Quantize | None = None,
    device: Device = "cuda",
    world: int = 1,
) -> Footprint:
    """What each of `world` devices holds, which share the weights and the cache between them."""
    return Footprint(
        weights=_share(weight_bytes(spec, dtype, quantize), world),
        cache=_share(cache_bytes(spec, dtype, load), world),
        activations=activation_bytes(spec, dtype, load, device),
        runtime=DEVICE_DEFAULTS[device].runtime_bytes,
    )


@dataclass(frozen=True, slots=True)
class Planned:
    """A model and how it shall be served. model: as it is named to `gyrfalcon serve`."""

    model: str
    spec: ModelSpec
    dtype: Dtype
    quantize: Quantize | None
    device: Device
    load: Load

    def footprint(self, world: int = 1) -> Footprint:
        """What it takes on each of `world` devices."""
        return footprint(
            self.spec, self.load, dtype=self.dtype, quantize=self.quantize, device=self.device, world=world
        )


def _share(total: int, world: int) -> int:
    return -(-total // world)


def stored_codes(folder: Path) -> Quantize | None:
    """The kind of codes that come nearest to those that a checkpoint's files hold; None where they hold none.

    Their own groups and heads may take a few percent more or less. Raises ModelLoadError.
    """
    stored = read_format(folder)
    if stored is None:
        return None
    return "int4" if stored.bits == 4 else "int8"


def weight_bytes(spec: ModelSpec, dtype: str, quantize: Quantize | None = None) -> int:
    """Memory of the loaded weights. dtype: of what is not quantised, one of DTYPE_BYTES."""
    return sum(num_bytes for _, num_bytes in _tensor_bytes(spec, dtype, quantize))


def _tensor_bytes(spec: ModelSpec, dtype: str, quantize: Quantize | None) -> Iterator[tuple[str, int]]:
    size = DTYPE_BYTES[dtype]
    embedding = embedding_name(spec)
    for name, shape in checkpoint_tensors(spec).items():
        if quantize is None or name == embedding:
            yield name, math.prod(shape) * size
        elif len(shape) == 1:
            yield name, shape[0] * QUANTISED_NORM_BYTES
        elif quantize == "int8" or name == "lm_head.weight":
            yield name, _int8_bytes(*shape)
        else:
            rows, columns = shape
            yield name, rows * (-(-columns // 2) + -(-columns // INT4_GROUP) * INT4_SCALE_BYTES)
    if quantize is not None and spec.tied_head:
        yield "lm_head.weight", _int8_bytes(spec.vocab_size, spec.hidden_size)


def _int8_bytes(rows: int, columns: int) -> int:
    return rows * (columns + INT8_SCALE_BYTES)


def block_bytes(spec: ModelSpec, dtype: str, block_size: int) -> int:
    """One block of the cache in all layers, keys and values."""
    return spec.kv_bytes_per_token(dtype) * block_size


def cache_bytes(spec: ModelSpec, dtype: str, load: Load) -> int:
    """The cache that holds the whole load; one block more than its tokens need, which padding points at."""
    blocks = load.concurrency * -(-load.context // load.block_size)
    return (blocks + 1) * block_bytes(spec, dtype, load.block_size)


def activation_bytes(spec: ModelSpec, dtype: str, load: Load, device: Device) -> int:
    """Peak of what a step holds besides weights and cache.

    Two peaks are not reached together: inside a layer, over the tokens of the step, and behind the last layer, over
    the rows that something is drawn from.
    """
    size = DTYPE_BYTES[dtype]
    stream = spec.hidden_size * size  # one token's place in the residual stream
    projected = (spec.query_size + 2 * spec.kv_size) * size
    # In attention: stream and norm, the projection and its rotated copy, queries and result in float32.
    attending = 2 * stream + 2 * projected + 3 * spec.query_size * FLOAT32_BYTES
    # In the MLP: stream, norm and the attention's result, the inner width before and after its activation.
    gates = 2 if spec.family == "llama" else 1
    feeding = 4 * stream + (gates + 2) * spec.ffn_size * size
    rotation = 4 * spec.head_size * FLOAT32_BYTES if spec.rope is not None else 0
    in_layers = load.token_budget * (max(attending, feeding) + rotation + 2 * INDEX_BYTES)
    # Logits in the model's dtype and in float32, and the copies that processors and log-probabilities make.
    rows = min(load.concurrency, load.token_budget)
    behind = load.token_budget * stream + rows * spec.vocab_size * (size + 3 * FLOAT32_BYTES)
    scores = _SCORES_BYTES[device]
    return max(in_layers + scores, behind)


# Scores and gathered keys of the tiles of attention: the compiled kernels on CPU keep a few hundred KiB for each
# thread, the plain operations up to 24 MiB.
_SCORES_BYTES: dict[Device, int] = {"cpu": 8 * MIB, "cuda": 64 * MIB}


def num_cache_blocks(
    spec: ModelSpec,
    *,
    dtype: str,
    block_size: int,
    free_bytes: int,
    where: str,
    max_rows: int,
    max_total_tokens: int | None = None,
    cache_tokens: int | None = None,
    cache_bytes: int | None = None,
    cache_fraction: float,
) -> int:
    """Blocks of the cache that tokens may use; one more is allocated for padding.

    The size is, in this order: `cache_tokens`; `cache_bytes`; as much as `max_rows` sequences of the longest length
    could ever use, but at most `cache_fraction` of `free_bytes`, which is what `where` ("cpu", "cuda") has left once
    the weights are loaded. Raises OutOfCache, naming the settings that change it.
    """
    one = block_bytes(spec, dtype, block_size)
    if cache_tokens is not None:
        num_blocks = -(-cache_tokens // block_size)
    elif cache_bytes is not None:
        num_blocks = cache_bytes // one
    else:
        longest = min(max_total_tokens or spec.max_context, spec.max_context)
        num_blocks = min(max_rows * -(-longest // block_size), int(free_bytes * cache_fraction) // one - 1)
    if num_blocks < 1 or (num_blocks + 1) * one > free_bytes:
        raise OutOfCache(
            f"a KV cache of {max(num_blocks, 1)} blocks of {one} bytes does not fit: {free_bytes} bytes are free on "
            f"{where}; set --kv-cache-memory or --max-batch-total-tokens to what the machine has, or serve in a "
            "smaller --dtype"
        )
    return num_blocks


def world_sizes(spec: ModelSpec) -> list[int]:
    """Numbers of devices that a model's heads can be split over evenly, ascending."""
    # A kv head goes whole to one device. With fewer kv heads than devices it would be stored several times.
    return [world for world in range(1, spec.num_kv_heads + 1) if spec.num_kv_heads % world == 0]


def num_devices(device_bytes: int, spec: ModelSpec, load: Load, **how: Unpack[How]) -> int | None:
    """Fewest devices of this size that hold the load; None where no number does. how: as of `footprint`."""
    for world in world_sizes(spec):
        if footprint(spec, load, world=world, **how).total <= device_bytes:
            return world
    return None


def largest_batch(device_bytes: int, spec: ModelSpec, load: Load, **how: Unpack[How]) -> int:
    """Most sequences of `load.context` tokens that one device holds at once; 0 where not one fits."""
    return _largest(lambda count: _with(load, concurrency=count), device_bytes, spec, limit=1 << 20, **how)


def largest_context(device_bytes: int, spec: ModelSpec, load: Load, **how: Unpack[How]) -> int:
    """Most tokens that each of `load.concurrency` sequences may have on one device, at most the model's own context."""
    return _largest(lambda tokens: _with(load, context=tokens), device_bytes, spec, limit=spec.max_context, **how)


def _largest(
    load_of: Callable[[int], Load], device_bytes: int, spec: ModelSpec, *, limit: int, **how: Unpack[How]
) -> int:
    """The largest number up to `limit` whose load fits, by bisection: memory grows with it."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        if footprint(spec, load_of(middle), **how).total <= device_bytes:
            low = middle
        else:
            high = middle - 1
    return low


def _with(load: Load, *, context: int | None = None, concurrency: int | None = None) -> Load:
    return Load(context or load.context, concurrency or load.concurrency, load.token_budget, load.block_size)

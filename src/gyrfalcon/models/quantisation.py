"""How weights are quantised: what `--quantize` asks for, and what config.json says a checkpoint's own codes are.

Three kinds of checkpoints are read, each strictly: what a file says that we would have to ignore is an error.

    gptq                 qweight, qzeros, scales, g_idx          AutoGPTQ, GPTQModel
    awq                  qweight, qzeros, scales                 AutoAWQ, version gemm
    compressed-tensors   weight_packed, weight_scale, ... or     llm-compressor: pack-quantized,
                         weight in int8, weight_scale            int-quantized, naive-quantized

Free of torch; `stored_codes` unpacks the tensors themselves.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from gyrfalcon.errors import ModelLoadError, SettingsError
from gyrfalcon.models.config_file import ConfigFile

Method = Literal["gptq", "awq", "compressed-tensors"]
METHODS: tuple[Method, ...] = ("gptq", "awq", "compressed-tensors")
AT_LOAD = ("int8", "int4")  # codes that we make ourselves

# gptq: words hold codes of consecutive inputs, tensors are [I, O]. awq: words hold codes of eight outputs in an order
# of their own, tensors are [I, O]. packed: words hold codes of consecutive inputs, tensors are [O, I]. plain: int8.
Layout = Literal["gptq", "awq", "packed", "plain"]

_FLOATS = ("F16", "BF16", "F32")


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor of a matrix that is stored as codes."""

    shape: tuple[int, ...]
    dtypes: tuple[str, ...]  # as safetensors spells them
    is_optional: bool = False


@dataclass(frozen=True, slots=True)
class StoredFormat:
    """How a checkpoint stores its quantised matrices: weight = (code - zero) * scale, of an output and a group."""

    method: Method
    layout: Layout
    bits: int  # 4 or 8
    group: int  # inputs that share a scale; 0: all of an output
    has_zeros: bool  # otherwise the zero is the middle code
    zero_offset: int = 0  # what stored zeros lack: 1 in the first GPTQ format
    is_per_tensor: bool = False  # one scale for the whole matrix

    def __str__(self) -> str:
        return f"{self.method}-{self.bits}-{self.group}"

    @property
    def marker(self) -> str:
        """The part that shows a matrix to be quantised."""
        return {"gptq": "qweight", "awq": "qweight", "packed": "weight_packed", "plain": "weight_scale"}[self.layout]

    def num_groups(self, width: int) -> int:
        return -(-width // self.group) if self.group else 1

    def parts(self, shape: tuple[int, int]) -> dict[str, Part]:
        """Name and kind of every tensor of a matrix [O, I]."""
        outputs, inputs = shape
        groups = self.num_groups(inputs)
        per_word = 32 // self.bits
        packed_outputs, packed_inputs = -(-outputs // per_word), -(-inputs // per_word)
        if self.layout == "gptq":
            return {
                "qweight": Part((packed_inputs, outputs), ("I32",)),
                "qzeros": Part((groups, packed_outputs), ("I32",)),
                "scales": Part((groups, outputs), _FLOATS),
                "g_idx": Part((inputs,), ("I32",), is_optional=True),
            }
        if self.layout == "awq":
            return {
                "qweight": Part((inputs, packed_outputs), ("I32",)),
                "qzeros": Part((groups, packed_outputs), ("I32",)),
                "scales": Part((groups, outputs), _FLOATS),
            }
        scale_shape: tuple[int, ...] = (1,) if self.is_per_tensor else (outputs, groups)
        if self.layout == "packed":
            parts = {
                "weight_packed": Part((outputs, packed_inputs), ("I32",)),
                "weight_scale": Part(scale_shape, _FLOATS),
                "weight_shape": Part((2,), ("I64", "I32")),
                "weight_g_idx": Part((inputs,), ("I32",), is_optional=True),
            }
            zeros = Part((packed_outputs, groups), ("I32",))
        else:
            parts = {"weight": Part((outputs, inputs), ("I8",)), "weight_scale": Part(scale_shape, _FLOATS)}
            zeros = Part(scale_shape, ("I8",))
        return parts | ({"weight_zero_point": zeros} if self.has_zeros else {})


def read_format(folder: Path) -> StoredFormat | None:
    """What `quantization_config` in the folder's config.json says; None for weights as they were trained.

    Raises ModelLoadError naming the key, its value and what is expected.
    """
    config = ConfigFile.read(folder / "config.json")
    section = config.section("quantization_config", "compression_config")
    if section is None:
        return None
    method = section.text("quant_method", default="")
    if method == "gptq":
        return _read_gptq(section)
    if method == "awq":
        return _read_awq(section)
    if method == "compressed-tensors":
        return _read_compressed_tensors(section)
    expected = f"expected {', '.join(METHODS)}: other quantised checkpoints cannot be served; use the unquantised one"
    raise section.error("quant_method", method or None, expected)


def check_request(folder: Path, asked: str | None, stored: StoredFormat | None) -> None:
    """Raise SettingsError where `--quantize` asks for what the checkpoint is not, or for codes of codes."""
    if asked is None:
        return
    if asked in AT_LOAD:
        if stored is not None:
            raise SettingsError(
                "--quantize",
                f"`{asked}` is for unquantised checkpoints, and {folder} is quantised already ({stored.method}); leave "
                f"it out or say `{stored.method}`",
            )
    elif asked not in METHODS:
        raise SettingsError("--quantize", f"`{asked}` is not one of {', '.join((*AT_LOAD, *METHODS))}")
    elif stored is None or stored.method != asked:
        kind = "not quantised" if stored is None else f"quantised as {stored.method}"
        remedy = "say `int8` or `int4` to quantise it while it is loaded" if stored is None else "leave it out"
        raise SettingsError("--quantize", f"`{asked}` is for checkpoints stored so, and {folder} is {kind}; {remedy}")


def _read_gptq(section: ConfigFile) -> StoredFormat:
    bits = _bits(section, "bits")
    for key in ("dynamic", "quant_layers"):
        _refuse_filled(section, key, "settings that differ from layer to layer are not supported")
    if section.flag("is_marlin_format", default=False):
        raise section.error("is_marlin_format", True, "expected false: weights in the order of one GPU kernel")
    form = section.text("checkpoint_format", "format", default="gptq")
    if form not in ("gptq", "gptq_v2"):
        raise section.error(section.find("checkpoint_format", "format")[0], form, "expected gptq or gptq_v2")
    if section.text("pack_dtype", default="int32") != "int32":
        raise section.error("pack_dtype", section.find("pack_dtype")[1], "expected int32")
    # `desc_act` and `sym` add nothing: which group an input belongs to, and every zero, are stored.
    return StoredFormat(
        method="gptq",
        layout="gptq",
        bits=bits,
        group=_group(section),
        has_zeros=True,
        zero_offset=1 if form == "gptq" else 0,
    )


def _read_awq(section: ConfigFile) -> StoredFormat:
    bits = section.integer("bits", "w_bit")
    if bits != 4:
        raise section.error(section.find("bits", "w_bit")[0], bits, "expected 4")
    version = section.text("version", default="gemm").lower()
    if version != "gemm":
        raise section.error("version", version, "expected gemm: the orders of other kernels are not supported")
    if not section.flag("zero_point", default=True):
        raise section.error("zero_point", False, "expected true: the gemm version has zeros")
    return StoredFormat(method="awq", layout="awq", bits=4, group=_group(section), has_zeros=True)


def _read_compressed_tensors(section: ConfigFile) -> StoredFormat:
    status = section.text("quantization_status", default="compressed")
    if status != "compressed":
        raise section.error("quantization_status", status, "expected compressed")
    _refuse_filled(section, "kv_cache_scheme", "a quantised cache is not supported")
    _refuse_filled(section, "transform_config", "transforms of activations are not supported")
    sparsity = section.section("sparsity_config")
    if sparsity is not None and sparsity.text("format", default="dense") != "dense":
        raise sparsity.error("format", sparsity.find("format")[1], "expected dense: sparse weights are not supported")
    groups = section.section("config_groups")
    names = () if groups is None else groups.keys()
    if groups is None or len(names) != 1:
        raise section.error("config_groups", list(names), "expected one group: one way in which all are quantised")
    scheme = cast(ConfigFile, groups.section(names[0]))
    form = scheme.text("format", default=section.text("format", default="pack-quantized"))
    if form not in ("pack-quantized", "int-quantized", "naive-quantized"):
        raise section.error("format", form, "expected pack-quantized, int-quantized or naive-quantized")
    weights = scheme.section("weights")
    if weights is None:
        raise scheme.error("weights", None, "expected how weights are quantised")
    _check_activations(scheme)
    if weights.text("type", default="int") != "int":
        raise weights.error("type", weights.find("type")[1], "expected int: other codes are not supported")
    bits = _bits(weights, "num_bits")
    if form != "pack-quantized" and bits != 8:
        raise weights.error("num_bits", bits, f"expected 8 in the format {form}")
    strategy = weights.text("strategy", default="tensor")
    if strategy not in ("group", "channel", "tensor"):
        raise weights.error("strategy", strategy, "expected group, channel or tensor")
    has_zeros = not weights.flag("symmetric", default=True)
    if has_zeros and strategy == "tensor" and form == "pack-quantized":
        raise weights.error("symmetric", False, "expected true with one scale for a whole matrix")
    return StoredFormat(
        method="compressed-tensors",
        layout="packed" if form == "pack-quantized" else "plain",
        bits=bits,
        group=_group(weights) if strategy == "group" else 0,
        has_zeros=has_zeros,
        is_per_tensor=strategy == "tensor",
    )


def _check_activations(scheme: ConfigFile) -> None:
    """Activations get codes of 8 bits in any case, row by row as they come; nothing else can be asked for."""
    _refuse_filled(scheme, "output_activations", "quantised outputs are not supported")
    inputs = scheme.section("input_activations")
    if inputs is None:
        return
    if inputs.text("type", default="int") != "int" or inputs.integer("num_bits", default=8) != 8:
        raise inputs.error("num_bits", inputs.find("num_bits")[1], "expected activations in int8, or as they are")
    if inputs.find("dynamic")[1] is not True:
        raise inputs.error("dynamic", inputs.find("dynamic")[1], "expected true: stored scales are not supported")


def _bits(section: ConfigFile, key: str) -> int:
    bits = section.integer(key)
    if bits not in (4, 8):
        raise section.error(key, bits, "expected 4 or 8")
    return bits


def _group(section: ConfigFile) -> int:
    """Inputs that share a scale; -1 stands for all of them, and becomes 0."""
    keys = ("group_size", "q_group_size")
    key, value = section.find(*keys)
    if value == -1 and not isinstance(value, bool):
        return 0
    if value is None:
        raise ModelLoadError(f"{section.path}: `{key}` is missing; expected a whole number, or -1 for one group")
    return section.integer(*keys)


def _refuse_filled(section: ConfigFile, key: str, reason: str) -> None:
    """Raise when `key` is there and not empty."""
    value = section.find(key)[1]
    if value:
        raise section.error(key, value, reason)

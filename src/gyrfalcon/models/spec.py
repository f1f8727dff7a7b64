"""What a checkpoint's config.json says, in one vocabulary for all families. Free of torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gyrfalcon.errors import ModelLoadError
from gyrfalcon.models.config_file import ConfigFile

Family = Literal["falcon", "llama"]
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
MAX_LAYERS = 10_000  # far beyond any model; more is a damaged file, and would make lists of tensor names endless

# How a block combines attention and MLP. parallel: both from one norm. parallel_two_norms: both at once, each
# from its own norm. sequential: attention first, then the MLP on the sum.
BlockForm = Literal["parallel", "parallel_two_norms", "sequential"]

# How the rows of the stored query, key and value weights are ordered. multi_query: all query heads, the key head,
# the value head. grouped: per kv head its query heads, its key, its value. per_head: per head query, key, value.
# separate: three tensors.
QkvLayout = Literal["multi_query", "grouped", "per_head", "separate"]


@dataclass(frozen=True, slots=True)
class LinearScaling:
    """All rotary frequencies divided by `factor`."""

    factor: float


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Slow rotary frequencies divided by `factor`, fast ones kept, those between blended (Llama 3.1)."""

    factor: float
    low_frequency_factor: float
    high_frequency_factor: float
    original_max_context: int


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary positions: the base of the frequencies and how they are stretched for longer contexts."""

    theta: float
    scaling: LinearScaling | Llama3Scaling | None = None


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Everything that decides a model's shapes and arithmetic. A spec that exists is consistent."""

    family: Family
    block_form: BlockForm
    qkv_layout: QkvLayout
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    ffn_size: int
    vocab_size: int  # rows of the embedding; a tokenizer may know fewer
    max_context: int  # tokens the positions were trained for
    rope: Rope | None  # None: ALiBi
    norm_epsilon: float
    attention_bias: bool
    mlp_bias: bool
    tied_head: bool
    dtype: str  # of the published weights: "float32", "bfloat16" or "float16"
    eos_ids: tuple[int, ...]  # as config.json has them; some published files are wrong, the tokenizer knows better

    @property
    def query_size(self) -> int:
        return self.num_heads * self.head_size

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_size

    @property
    def num_parameters(self) -> int:
        """Distinct parameters: a tied head counts once."""
        return sum(math.prod(shape) for shape in checkpoint_tensors(self).values())

    def kv_bytes_per_token(self, dtype: str) -> int:
        """Bytes one token takes in the cache, over all layers, its keys and values together."""
        return 2 * self.num_layers * self.kv_size * DTYPE_BYTES[dtype]


def checkpoint_tensors(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor a checkpoint of this spec must hold. Matrices are stored [out, in]."""
    tensors = _falcon_tensors(spec) if spec.family == "falcon" else _llama_tensors(spec)
    named = dict(tensors)
    if not spec.tied_head:
        named["lm_head.weight"] = (spec.vocab_size, spec.hidden_size)
    return named


def embedding_name(spec: ModelSpec) -> str:
    """Name of the embedding, which is also the head of a tied model."""
    return "transformer.word_embeddings.weight" if spec.family == "falcon" else "model.embed_tokens.weight"


def _falcon_tensors(spec: ModelSpec) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, ffn = spec.hidden_size, spec.ffn_size
    norms = {
        "parallel": ("input_layernorm",),
        "parallel_two_norms": ("ln_attn", "ln_mlp"),
        "sequential": ("input_layernorm", "post_attention_layernorm"),
    }[spec.block_form]
    matrices = {
        "self_attention.query_key_value": (spec.query_size + 2 * spec.kv_size, hidden, spec.attention_bias),
        "self_attention.dense": (hidden, spec.query_size, spec.attention_bias),
        "mlp.dense_h_to_4h": (ffn, hidden, spec.mlp_bias),
        "mlp.dense_4h_to_h": (hidden, ffn, spec.mlp_bias),
    }
    yield embedding_name(spec), (spec.vocab_size, hidden)
    for layer in range(spec.num_layers):
        for name, (rows, columns, has_bias) in matrices.items():
            yield f"transformer.h.{layer}.{name}.weight", (rows, columns)
            if has_bias:
                yield f"transformer.h.{layer}.{name}.bias", (rows,)
        for norm in norms:
            yield f"transformer.h.{layer}.{norm}.weight", (hidden,)
            yield f"transformer.h.{layer}.{norm}.bias", (hidden,)
    yield "transformer.ln_f.weight", (hidden,)
    yield "transformer.ln_f.bias", (hidden,)


def _llama_tensors(spec: ModelSpec) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, ffn = spec.hidden_size, spec.ffn_size
    matrices = {
        "self_attn.q_proj": (spec.query_size, hidden, spec.attention_bias),
        "self_attn.k_proj": (spec.kv_size, hidden, spec.attention_bias),
        "self_attn.v_proj": (spec.kv_size, hidden, spec.attention_bias),
        "self_attn.o_proj": (hidden, spec.query_size, spec.attention_bias),
        "mlp.gate_proj": (ffn, hidden, spec.mlp_bias),
        "mlp.up_proj": (ffn, hidden, spec.mlp_bias),
        "mlp.down_proj": (hidden, ffn, spec.mlp_bias),
    }
    yield embedding_name(spec), (spec.vocab_size, hidden)
    for layer in range(spec.num_layers):
        for name, (rows, columns, has_bias) in matrices.items():
            yield f"model.layers.{layer}.{name}.weight", (rows, columns)
            if has_bias:
                yield f"model.layers.{layer}.{name}.bias", (rows,)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"model.layers.{layer}.{norm}.weight", (hidden,)
    yield "model.norm.weight", (hidden,)


def read_spec(folder: Path) -> ModelSpec:
    """The spec of the checkpoint in `folder`. Reads config.json only and never runs code that came with it.

    Raises ModelLoadError naming the file, the key, its value and what is expected.
    """
    config = ConfigFile.read(folder / "config.json")
    model_type = config.text("model_type", default="")
    if model_type in ("falcon", "RefinedWeb", "RefinedWebModel"):
        return _read_falcon(config, model_type)
    if model_type in ("llama", "mistral"):
        return _read_llama(config, model_type)
    served = "falcon, RefinedWeb, RefinedWebModel, llama, mistral"
    raise config.error("model_type", model_type or None, f"this architecture is not supported; supported: {served}")


def _read_falcon(config: ConfigFile, model_type: str) -> ModelSpec:
    _check_class(config, ("FalconForCausalLM", "RWForCausalLM"))
    is_native = model_type == "falcon"
    hidden_size = config.integer("hidden_size", "n_embed", default=4544)
    num_heads = config.integer("num_attention_heads", "n_head", default=71)
    if hidden_size % num_heads:
        raise config.error("hidden_size", hidden_size, f"expected a multiple of the {num_heads} attention heads")
    is_new_layout = config.flag("new_decoder_architecture", default=model_type == "RefinedWeb")
    if is_new_layout:
        # `multi_query` and `parallel_attn` have no meaning here, whatever they say.
        num_kv_heads = config.integer("num_kv_heads", "n_head_kv", default=num_heads)
        if num_heads % num_kv_heads:
            key, value = config.find("num_kv_heads", "n_head_kv")
            raise config.error(key, value, f"expected a divisor of the {num_heads} attention heads")
        num_norms = config.integer("num_ln_in_parallel_attn", default=2)
        if num_norms > 2:
            raise config.error("num_ln_in_parallel_attn", num_norms, "expected 1 or 2")
        layout: QkvLayout = "grouped"
        form: BlockForm = "parallel_two_norms" if num_norms == 2 else "parallel"
    else:
        # `num_kv_heads` is not read: re-saved 7B configs say 71 there, and have one kv head.
        is_multi_query = config.flag("multi_query", default=is_native)
        num_kv_heads = 1 if is_multi_query else num_heads
        layout = "multi_query" if is_multi_query else "per_head"
        form = "parallel" if config.flag("parallel_attn", default=is_native) else "sequential"
    activation = config.text("activation", default="gelu")
    if activation != "gelu":
        raise config.error("activation", activation, "expected gelu, the exact form, as every published Falcon has")
    ffn_size = config.integer("ffn_hidden_size", default=hidden_size * config.integer("ff_factor", default=4))
    has_bias = config.flag("bias", default=False)
    head_size = hidden_size // num_heads
    return ModelSpec(
        family="falcon",
        block_form=form,
        qkv_layout=layout,
        num_layers=config.integer("num_hidden_layers", "n_layer", default=32, limit=MAX_LAYERS),
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_size=head_size,
        ffn_size=ffn_size,
        vocab_size=config.integer("vocab_size", default=65024),
        max_context=config.integer("max_position_embeddings", "seq_length", default=2048),
        rope=None if config.flag("alibi", default=False) else _read_rope(config, head_size),
        norm_epsilon=config.number("layer_norm_epsilon", default=1e-5),
        attention_bias=has_bias,
        mlp_bias=has_bias,
        tied_head=config.flag("tie_word_embeddings", default=True),
        dtype=_read_dtype(config),
        eos_ids=config.ids("eos_token_id") or (11,),
    )


def _read_llama(config: ConfigFile, model_type: str) -> ModelSpec:
    _check_class(config, ("LlamaForCausalLM", "MistralForCausalLM"))
    is_mistral = model_type == "mistral"
    hidden_size = config.integer("hidden_size")
    num_heads = config.integer("num_attention_heads")
    num_kv_heads = config.integer("num_key_value_heads", default=8 if is_mistral else num_heads)
    if num_heads % num_kv_heads:
        raise config.error("num_key_value_heads", num_kv_heads, f"expected a divisor of the {num_heads} heads")
    if config.find("head_dim")[1] is None and hidden_size % num_heads:
        raise config.error("hidden_size", hidden_size, f"expected a multiple of the {num_heads} attention heads")
    head_size = config.integer("head_dim", default=hidden_size // num_heads)
    activation = config.text("hidden_act", default="silu")
    if activation not in ("silu", "swish"):
        raise config.error("hidden_act", activation, "expected silu")
    max_context = config.integer("max_position_embeddings", default=131072 if is_mistral else 2048)
    if is_mistral and config.find("sliding_window")[1] is not None:
        window = config.integer("sliding_window")
        if window < max_context:
            expected = f"expected null or at least the context of {max_context} tokens: no sliding windows yet"
            raise config.error("sliding_window", window, expected)
    return ModelSpec(
        family="llama",
        block_form="sequential",
        qkv_layout="separate",
        num_layers=config.integer("num_hidden_layers", limit=MAX_LAYERS),
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_size=head_size,
        ffn_size=config.integer("intermediate_size"),
        vocab_size=config.integer("vocab_size"),
        max_context=max_context,
        rope=_read_rope(config, head_size),
        norm_epsilon=config.number("rms_norm_eps", default=1e-6),
        # Mistral's own code has no biases and does not look at these keys.
        attention_bias=not is_mistral and config.flag("attention_bias", default=False),
        mlp_bias=not is_mistral and config.flag("mlp_bias", default=False),
        tied_head=config.flag("tie_word_embeddings", default=False),
        dtype=_read_dtype(config),
        eos_ids=config.ids("eos_token_id") or (2,),
    )


def _check_class(config: ConfigFile, supported: tuple[str, ...]) -> None:
    """Refuse heads other than the language model's; a file without `architectures` is taken at its model type."""
    _, names = config.find("architectures")
    if names is None:
        return
    if not isinstance(names, list) or not any(name in supported for name in names):
        raise config.error("architectures", names, f"expected {' or '.join(supported)}")


def _read_dtype(config: ConfigFile) -> str:
    key, _ = config.find("torch_dtype", "dtype")
    dtype = config.text("torch_dtype", "dtype", default="bfloat16").removeprefix("torch.")
    if dtype not in DTYPE_BYTES:
        raise config.error(key, dtype, f"expected {', '.join(DTYPE_BYTES)}")
    return dtype


def _read_rope(config: ConfigFile, head_size: int) -> Rope:
    """From `rope_theta` beside a `rope_scaling` object, or from one `rope_parameters` object that holds both."""
    if head_size % 2:
        raise ModelLoadError(f"{config.path}: heads of size {head_size} cannot be rotated; expected an even size")
    section = config.section("rope_parameters", "rope_scaling")
    if section is None:
        return Rope(theta=config.number("rope_theta", default=10000.0))
    theta = section.number("rope_theta", default=config.number("rope_theta", default=10000.0))
    rotated = section.number("partial_rotary_factor", default=config.number("partial_rotary_factor", default=1.0))
    if rotated != 1.0:
        raise config.error("partial_rotary_factor", rotated, "expected 1: rotation of part of a head is not supported")
    kind = section.text("rope_type", "type", default="default")
    if kind == "default":
        return Rope(theta)
    if kind == "linear":
        return Rope(theta, LinearScaling(section.number("factor")))
    if kind == "llama3":
        scaling = Llama3Scaling(
            factor=section.number("factor"),
            low_frequency_factor=section.number("low_freq_factor"),
            high_frequency_factor=section.number("high_freq_factor"),
            original_max_context=section.integer("original_max_position_embeddings"),
        )
        if scaling.high_frequency_factor <= scaling.low_frequency_factor:
            raise config.error("high_freq_factor", scaling.high_frequency_factor, "expected more than low_freq_factor")
        return Rope(theta, scaling)
    raise config.error("rope_type", kind, "expected default, linear or llama3: other scalings are not supported")

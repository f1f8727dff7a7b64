"""config.json to ModelSpec: the published models, both spellings, and every value that is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gyrfalcon.errors import ModelLoadError
from gyrfalcon.models.spec import LinearScaling, Llama3Scaling, ModelSpec, Rope, read_spec

FALCON_7B = {
    "model_type": "falcon",
    "architectures": ["FalconForCausalLM"],
    "hidden_size": 4544,
    "num_hidden_layers": 32,
    "num_attention_heads": 71,
    "vocab_size": 65024,
    "multi_query": True,
    "parallel_attn": True,
    "new_decoder_architecture": False,
    "alibi": False,
    "bias": False,
    "layer_norm_epsilon": 1e-5,
    "bos_token_id": 11,
    "eos_token_id": 11,
    "torch_dtype": "bfloat16",
}
FALCON_40B = {
    "model_type": "falcon",
    "architectures": ["FalconForCausalLM"],
    "hidden_size": 8192,
    "num_hidden_layers": 60,
    "num_attention_heads": 128,
    "num_kv_heads": 8,
    "vocab_size": 65024,
    "new_decoder_architecture": True,
    "parallel_attn": True,
    "alibi": False,
    "bias": False,
    "eos_token_id": 11,
    "torch_dtype": "bfloat16",
}
FALCON_180B = FALCON_40B | {"hidden_size": 14848, "num_hidden_layers": 80, "num_attention_heads": 232}
FALCON_11B = FALCON_40B | {
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "ffn_hidden_size": 16384,
    "ff_factor": 4,
    "num_ln_in_parallel_attn": 1,
    "max_position_embeddings": 8192,
    "multi_query": True,
    "rope_theta": 500042.0,
    "tie_word_embeddings": False,
}
FALCON_RW_1B = {
    "model_type": "falcon",
    "architectures": ["FalconForCausalLM"],
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "vocab_size": 50304,
    "multi_query": False,
    "parallel_attn": False,
    "alibi": True,
    "bias": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}
FALCON_RW_7B = FALCON_RW_1B | {
    "hidden_size": 4096,
    "num_hidden_layers": 36,
    "num_attention_heads": 64,
    "vocab_size": 65024,
}
LEGACY_7B = {
    "model_type": "RefinedWebModel",
    "architectures": ["RWForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_RW.RWConfig", "AutoModelForCausalLM": "modelling_RW.RWForCausalLM"},
    "apply_residual_connection_post_layernorm": False,
    "hidden_size": 4544,
    "n_head": 71,
    "n_layer": 32,
    "vocab_size": 65024,
    "multi_query": True,
    "parallel_attn": True,
    "alibi": False,
    "bias": False,
    "bos_token_id": 11,
    "eos_token_id": 11,
    "torch_dtype": "bfloat16",
}
LEGACY_40B = {
    "model_type": "RefinedWeb",
    "architectures": ["RWForCausalLM"],
    "hidden_size": 8192,
    "n_head": 128,
    "n_head_kv": 8,
    "n_layer": 60,
    "vocab_size": 65024,
    "parallel_attn": True,
    "alibi": False,
    "bias": False,
    "eos_token_id": 11,
    "torch_dtype": "bfloat16",
}
LEGACY_RW_1B = {
    "model_type": "RefinedWebModel",
    "architectures": ["RWForCausalLM"],
    "hidden_size": 2048,
    "n_head": 32,
    "n_layer": 24,
    "vocab_size": 50304,
    "alibi": True,
    "bias": True,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}
FALCON3_7B = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 3072,
    "intermediate_size": 23040,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "vocab_size": 131072,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000042,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "eos_token_id": 11,
    "torch_dtype": "bfloat16",
}


def write_config(folder: Path, config: object) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def spec_of(folder: Path, config: dict[str, Any]) -> ModelSpec:
    return read_spec(write_config(folder, config))


@pytest.mark.parametrize(
    ("config", "num_parameters", "kv_bytes"),
    [
        pytest.param(FALCON_7B, 6_921_720_704, 8_192, id="falcon-7b"),
        pytest.param(FALCON_40B, 41_303_293_952, 122_880, id="falcon-40b"),
        pytest.param(FALCON_180B, 178_557_088_768, 163_840, id="falcon-180B"),
        pytest.param(FALCON_RW_1B, 1_311_625_216, 196_608, id="falcon-rw-1b"),
        pytest.param(FALCON_RW_7B, 7_516_020_736, 589_824, id="falcon-rw-7b"),
        pytest.param(FALCON_11B, 11_102_822_400, 245_760, id="falcon-11B"),
        pytest.param(LEGACY_7B, 6_921_720_704, 8_192, id="falcon-7b-legacy"),
        pytest.param(LEGACY_40B, 41_303_293_952, 122_880, id="falcon-40b-legacy"),
        pytest.param(LEGACY_RW_1B, 1_311_625_216, 196_608, id="falcon-rw-1b-legacy"),
    ],
)
def test_published_models_have_their_published_sizes(
    config: dict[str, Any], num_parameters: int, kv_bytes: int, tmp_path: Path
) -> None:
    spec = spec_of(tmp_path, config)

    assert spec.num_parameters == num_parameters
    assert spec.kv_bytes_per_token("bfloat16") == kv_bytes
    assert spec.kv_bytes_per_token("float32") == 2 * kv_bytes


def test_falcon_7b_is_parallel_multi_query_with_rotary_positions(tmp_path: Path) -> None:
    assert spec_of(tmp_path, FALCON_7B) == ModelSpec(
        family="falcon",
        block_form="parallel",
        qkv_layout="multi_query",
        num_layers=32,
        hidden_size=4544,
        num_heads=71,
        num_kv_heads=1,
        head_size=64,
        ffn_size=18176,
        vocab_size=65024,
        max_context=2048,
        rope=Rope(10000.0),
        norm_epsilon=1e-5,
        attention_bias=False,
        mlp_bias=False,
        tied_head=True,
        dtype="bfloat16",
        eos_ids=(11,),
    )


@pytest.mark.parametrize(
    ("legacy", "native"),
    [
        pytest.param(LEGACY_7B, FALCON_7B, id="7b"),
        pytest.param(LEGACY_40B, FALCON_40B, id="40b"),
        pytest.param(LEGACY_RW_1B, FALCON_RW_1B, id="rw"),
    ],
)
def test_the_old_spelling_means_the_same(legacy: dict[str, Any], native: dict[str, Any], tmp_path: Path) -> None:
    assert spec_of(tmp_path, legacy) == spec_of(tmp_path, native)


def test_new_and_old_spellings_may_be_mixed(tmp_path: Path) -> None:
    renamed = {"hidden_size": "n_embed", "num_attention_heads": "n_head", "num_hidden_layers": "n_layer"}
    mixed = {renamed.get(key, key): value for key, value in FALCON_7B.items()}

    assert spec_of(tmp_path, mixed | {"seq_length": 2048}) == spec_of(tmp_path, FALCON_7B)


def test_the_new_spelling_wins_where_both_are_there(tmp_path: Path) -> None:
    assert spec_of(tmp_path, FALCON_7B | {"n_layer": 3, "n_head": 1}) == spec_of(tmp_path, FALCON_7B)


def test_a_native_config_may_leave_out_everything_that_is_falcon_7bs(tmp_path: Path) -> None:
    assert spec_of(tmp_path, {"model_type": "falcon"}) == spec_of(tmp_path, FALCON_7B)


def test_the_71_kv_heads_of_a_resaved_7b_config_are_not_believed(tmp_path: Path) -> None:
    assert spec_of(tmp_path, FALCON_7B | {"num_kv_heads": 71}).num_kv_heads == 1


def test_grouped_models_have_two_norms_unless_they_say_one(tmp_path: Path) -> None:
    assert spec_of(tmp_path, FALCON_40B).block_form == "parallel_two_norms"
    assert spec_of(tmp_path, FALCON_40B | {"num_ln_in_parallel_attn": None}).block_form == "parallel_two_norms"
    assert spec_of(tmp_path, FALCON_11B).block_form == "parallel"


def test_grouped_models_ignore_multi_query_and_parallel_attn(tmp_path: Path) -> None:
    ignored = {"multi_query": True, "parallel_attn": False}

    assert spec_of(tmp_path, FALCON_40B | ignored) == spec_of(tmp_path, FALCON_40B)


def test_grouped_models_without_a_number_of_kv_heads_have_one_a_query_head(tmp_path: Path) -> None:
    config = {key: value for key, value in FALCON_40B.items() if key != "num_kv_heads"}

    assert spec_of(tmp_path, config).num_kv_heads == 128


def test_rw_models_are_sequential_per_head_with_alibi_and_biases(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, FALCON_RW_1B)

    assert (spec.block_form, spec.qkv_layout, spec.rope) == ("sequential", "per_head", None)
    assert spec.attention_bias
    assert spec.mlp_bias


def test_falcon3_keeps_its_own_head_size(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, FALCON3_7B)

    assert (spec.family, spec.head_size, spec.num_kv_heads, spec.query_size) == ("llama", 256, 4, 3072)
    assert spec.rope == Rope(1000042.0)
    assert not spec.tied_head
    assert spec.num_parameters == 7_455_550_464


@pytest.mark.parametrize(
    ("keys", "rope"),
    [
        ({"rope_theta": 500042.0}, Rope(500042.0)),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 500042.0}}, Rope(500042.0)),
        ({"rope_parameters": {"rope_type": "default"}, "rope_theta": 7.0}, Rope(7.0)),
        ({"rope_scaling": {"type": "linear", "factor": 2}, "rope_theta": 7.0}, Rope(7.0, LinearScaling(2.0))),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2}}, Rope(10000.0, LinearScaling(2.0))),
        (
            {
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 8192,
                }
            },
            Rope(10000.0, Llama3Scaling(8.0, 1.0, 4.0, 8192)),
        ),
        ({"rope_scaling": None, "rope_parameters": None}, Rope(10000.0)),
    ],
)
@pytest.mark.parametrize("base", [FALCON_7B, FALCON3_7B], ids=["falcon", "llama"])
def test_rotary_settings_are_read_in_all_their_places(
    base: dict[str, Any], keys: dict[str, Any], rope: Rope, tmp_path: Path
) -> None:
    config = {key: value for key, value in base.items() if not key.startswith("rope")}

    assert spec_of(tmp_path, config | keys).rope == rope


@pytest.mark.parametrize(("value", "eos_ids"), [(11, (11,)), ([11, 228], (11, 228)), (None, (11,))])
def test_eos_is_an_id_or_a_list(value: object, eos_ids: tuple[int, ...], tmp_path: Path) -> None:
    assert spec_of(tmp_path, FALCON_7B | {"eos_token_id": value}).eos_ids == eos_ids


@pytest.mark.parametrize(
    ("keys", "dtype"),
    [
        ({"torch_dtype": "float16"}, "float16"),
        ({"torch_dtype": None, "dtype": "float32"}, "float32"),
        ({"torch_dtype": None}, "bfloat16"),
        ({"torch_dtype": "torch.bfloat16"}, "bfloat16"),
    ],
)
def test_the_dtype_is_read_under_both_names(keys: dict[str, Any], dtype: str, tmp_path: Path) -> None:
    assert spec_of(tmp_path, FALCON_7B | keys).dtype == dtype


def test_a_mistral_without_a_sliding_window_is_a_llama(tmp_path: Path) -> None:
    mistral = FALCON3_7B | {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}

    for window in (None, 32768, 100_000):
        assert spec_of(tmp_path, mistral | {"sliding_window": window}) == spec_of(tmp_path, FALCON3_7B)
    assert spec_of(tmp_path, mistral) == spec_of(tmp_path, FALCON3_7B)


MISTRAL = FALCON3_7B | {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}


@pytest.mark.parametrize(
    ("base", "keys", "message"),
    [
        (FALCON_7B, {"model_type": "gpt2"}, '`model_type` is "gpt2"; this architecture is not supported; .* falcon,'),
        (FALCON_7B, {"model_type": None}, "`model_type` is null"),
        (FALCON_7B, {"model_type": 7}, "`model_type` is 7; expected a string"),
        (FALCON_7B, {"model_type": "falcon_mamba"}, '`model_type` is "falcon_mamba"'),
        (FALCON_7B, {"architectures": ["FalconForTokenClassification"]}, "`architectures` .* FalconForCausalLM"),
        (FALCON_7B, {"architectures": "FalconForCausalLM"}, "`architectures` "),
        (FALCON_7B, {"hidden_size": 4545}, "`hidden_size` is 4545; expected a multiple of the 71 attention heads"),
        (FALCON_7B, {"hidden_size": "4544"}, '`hidden_size` is "4544"; expected a whole number from 1 to'),
        (FALCON_7B, {"hidden_size": True}, "`hidden_size` is true; expected a whole number"),
        (FALCON_7B, {"num_hidden_layers": 0}, "`num_hidden_layers` is 0"),
        (FALCON_7B, {"num_hidden_layers": 10**9}, "`num_hidden_layers` is 1000000000; .* from 1 to 10000"),
        (FALCON_7B, {"num_hidden_layers": 1.5}, "`num_hidden_layers` is 1.5"),
        (FALCON_7B, {"vocab_size": -1}, "`vocab_size` is -1"),
        (FALCON_7B, {"activation": "relu"}, '`activation` is "relu"; expected gelu'),
        (FALCON_7B, {"alibi": "yes"}, '`alibi` is "yes"; expected true or false'),
        (FALCON_7B, {"layer_norm_epsilon": 0}, "`layer_norm_epsilon` is 0; expected a number above 0"),
        (FALCON_7B, {"eos_token_id": "11"}, '`eos_token_id` is "11"; expected a token id'),
        (FALCON_7B, {"eos_token_id": [11, -1]}, "`eos_token_id` "),
        (FALCON_7B, {"torch_dtype": "int8"}, '`torch_dtype` is "int8"; expected float32, bfloat16, float16'),
        (FALCON_7B, {"rope_theta": -1.0}, "`rope_theta` is -1.0"),
        (FALCON_7B, {"rope_scaling": "linear"}, '`rope_scaling` is "linear"; expected a JSON object'),
        (FALCON_7B, {"rope_scaling": {"type": "linear"}}, "`factor` is missing"),
        (FALCON_7B, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, '`rope_type` is "dynamic"; expected default'),
        (FALCON_7B, {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, '`rope_type` is "yarn"'),
        (FALCON_7B, {"rope_parameters": {"partial_rotary_factor": 0.5}}, "`partial_rotary_factor` is 0.5; expected 1"),
        (FALCON_7B, {"hidden_size": 71 * 3}, "heads of size 3 cannot be rotated"),
        (FALCON_40B, {"num_kv_heads": 7}, "`num_kv_heads` is 7; expected a divisor of the 128"),
        (FALCON_40B, {"num_ln_in_parallel_attn": 3}, "`num_ln_in_parallel_attn` is 3; expected 1 or 2"),
        (FALCON3_7B, {"hidden_size": None}, "`hidden_size` is missing"),
        (FALCON3_7B, {"intermediate_size": None}, "`intermediate_size` is missing"),
        (FALCON3_7B, {"num_key_value_heads": 5}, "`num_key_value_heads` is 5; expected a divisor of the 12"),
        (FALCON3_7B, {"head_dim": None, "hidden_size": 3073}, "`hidden_size` is 3073; expected a multiple of the 12"),
        (FALCON3_7B, {"hidden_act": "gelu"}, '`hidden_act` is "gelu"; expected silu'),
        (FALCON3_7B, {"architectures": ["LlamaForSequenceClassification"]}, "`architectures` .* LlamaForCausalLM"),
        (
            FALCON3_7B,
            {
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 4.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 8192,
                }
            },
            "`high_freq_factor` is 4.0; expected more than low_freq_factor",
        ),
        (MISTRAL, {"sliding_window": 4096}, "`sliding_window` is 4096; expected null or at least the context of 32768"),
    ],
)
def test_what_cannot_be_served_is_refused_by_file_key_and_value(
    base: dict[str, Any], keys: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelLoadError, match=message) as raised:
        spec_of(tmp_path, base | keys)

    assert str(raised.value).startswith(f"{tmp_path / 'config.json'}: ")


def test_a_missing_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=f"{tmp_path / 'config.json'}: no such file"):
        read_spec(tmp_path)


@pytest.mark.parametrize("text", ["", "{", '{"a": 1} x', "\xff", "[" * 100_000])
def test_a_config_that_is_not_json_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text, encoding="latin-1")

    with pytest.raises(ModelLoadError, match=r"config\.json: is not valid JSON"):
        read_spec(tmp_path)


@pytest.mark.parametrize("value", [[], "falcon", 7, None])
def test_a_config_that_is_no_object_is_refused(value: object, tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="expected a JSON object"):
        read_spec(write_config(tmp_path, value))


def test_code_in_the_repository_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "configuration_RW.py").write_text("raise SystemExit('the repository ran')")

    assert spec_of(tmp_path, LEGACY_7B).num_layers == 32


def test_reading_a_spec_needs_no_torch() -> None:
    program = "import sys; import gyrfalcon.models.spec; sys.exit('torch' in sys.modules)"

    assert (
        subprocess.run([sys.executable, "-c", program], check=False, env={"PYTHONPATH": ":".join(sys.path)}).returncode
        == 0
    )

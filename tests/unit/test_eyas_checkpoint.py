"""eyas, the bundled demo model: its folder is an ordinary, complete and consistent Hugging Face checkpoint."""

import json
from pathlib import Path
from typing import Any

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment
from safetensors import safe_open
from tokenizers import Tokenizer

FOLDER = Path(__file__).parents[2] / "src" / "gyrfalcon" / "eyas"

CARD_AND_CHECKPOINT_FILES = {
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
}

TEXTS = {
    "empty": "",
    "spaces": "  two, \t a tab,\n\n\n    an indent, and an end \n",
    "carriage returns": "one\r\ntwo\rthree\r\n\r\n",
    "control characters": "".join(map(chr, range(32))) + "\x7f\x80\x9f\u2028\ufeff",
    "numbers": "0 7 42 365 65536 3.14159 1e-05 ²³¹ ٣٤",
    "identifiers": "__init__ os.path.join(*args, **kwargs) -> 'don\\'t' ## !!! ...",
    "scripts": "Füße, naïve, Ελλάδα, русский, 日本語, עברית, हिन्दी",
    "emoji": "🦅 👩‍👩‍👧‍👦 🇮🇸 \U0010ffff",
    "special token": "before<|endoftext|>after <|endoftext|> <|endof",
}


def read_json(name: str) -> dict[str, Any]:
    value = json.loads((FOLDER / name).read_text(encoding="utf-8"))
    assert isinstance(value, dict)
    return value


def render(messages: list[dict[str, str]], *, add_generation_prompt: bool = True) -> str:
    def raise_exception(message: str) -> None:
        raise ValueError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = raise_exception
    template = environment.from_string(read_json("tokenizer_config.json")["chat_template"])
    return template.render(messages=messages, add_generation_prompt=add_generation_prompt)


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(FOLDER / "tokenizer.json"))


def test_the_folder_holds_the_ordinary_files_and_nothing_else() -> None:
    assert {path.name for path in FOLDER.iterdir()} == CARD_AND_CHECKPOINT_FILES


def test_the_folder_is_smaller_than_16_megabytes() -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 16_000_000


def test_the_config_describes_a_falcon_of_the_7b_layout() -> None:
    config = read_json("config.json")
    expected = {
        "architectures": ["FalconForCausalLM"],
        "model_type": "falcon",
        "multi_query": True,
        "parallel_attn": True,
        "new_decoder_architecture": False,
        "alibi": False,
        "bias": False,
        "tie_word_embeddings": True,
        "rope_theta": 10000.0,
        "layer_norm_epsilon": 1e-5,
        "max_position_embeddings": 1024,
        "dtype": "float32",
    }
    assert {key: config[key] for key in expected} == expected
    assert config["hidden_size"] == 64 * config["num_attention_heads"]


def test_the_tensors_are_those_of_the_config_with_the_head_left_out() -> None:
    config = read_json("config.json")
    hidden, feed_forward = config["hidden_size"], config["ffn_hidden_size"]
    head_size = hidden // config["num_attention_heads"]
    expected = {
        "transformer.word_embeddings.weight": [config["vocab_size"], hidden],
        "transformer.ln_f.weight": [hidden],
        "transformer.ln_f.bias": [hidden],
    }
    for layer in range(config["num_hidden_layers"]):
        block = f"transformer.h.{layer}"
        expected |= {
            f"{block}.input_layernorm.weight": [hidden],
            f"{block}.input_layernorm.bias": [hidden],
            f"{block}.self_attention.query_key_value.weight": [hidden + 2 * head_size, hidden],
            f"{block}.self_attention.dense.weight": [hidden, hidden],
            f"{block}.mlp.dense_h_to_4h.weight": [feed_forward, hidden],
            f"{block}.mlp.dense_4h_to_h.weight": [hidden, feed_forward],
        }

    with safe_open(FOLDER / "model.safetensors", framework="numpy") as weights:
        shapes = {name: weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118 - not a dict
        dtypes = {weights.get_slice(name).get_dtype() for name in shapes}

    assert shapes == expected
    assert dtypes == {"BF16"}


def test_every_file_names_the_same_end_of_text(tokenizer: Tokenizer) -> None:
    end = read_json("tokenizer_config.json")["eos_token"]
    assert end == "<|endoftext|>"
    assert read_json("special_tokens_map.json") == {"eos_token": end}
    assert read_json("config.json")["eos_token_id"] == tokenizer.token_to_id(end)
    assert read_json("generation_config.json")["eos_token_id"] == tokenizer.token_to_id(end)


def test_the_vocabulary_is_as_large_as_the_embedding(tokenizer: Tokenizer) -> None:
    assert tokenizer.get_vocab_size(with_added_tokens=True) == read_json("config.json")["vocab_size"]


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_decoding_gives_back_what_was_encoded(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_every_byte_is_a_token_of_its_own(tokenizer: Tokenizer) -> None:
    assert len({tokenizer.id_to_token(token_id) for token_id in range(256)}) == 256
    assert all(len(tokenizer.id_to_token(token_id)) == 1 for token_id in range(256))


def test_nothing_is_added_around_a_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("a", add_special_tokens=True).ids == [tokenizer.token_to_id("a")]


def test_a_number_is_cut_into_groups_of_three_from_the_left(tokenizer: Tokenizer) -> None:
    assert all(len(token) <= 3 for token in tokenizer.encode("10002000300").tokens)


def test_the_end_of_text_is_one_token_that_decoding_can_leave_out(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a<|endoftext|>").ids
    assert ids == [tokenizer.token_to_id("a"), tokenizer.token_to_id("<|endoftext|>")]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a"


def test_a_question_alone_opens_the_prompt() -> None:
    assert render([turn("user", " Hi\n")]) == "User: Hi\n\nAssistant:"


def test_a_system_text_stands_before_the_turns() -> None:
    messages = [turn("system", " Be brief. "), turn("user", "Hi"), turn("assistant", "Hello!"), turn("user", "Bye")]
    assert render(messages) == "Be brief.\n\nUser: Hi\n\nAssistant: Hello!\n\nUser: Bye\n\nAssistant:"


def test_without_a_generation_prompt_the_last_turn_ends_the_text() -> None:
    messages = [turn("user", "Hi"), turn("assistant", "Hello!")]
    assert render(messages, add_generation_prompt=False) == "User: Hi\n\nAssistant: Hello!"


def test_blank_lines_inside_a_turn_are_closed_up() -> None:
    assert render([turn("user", "one\r\n\r\ntwo")]) == "User: one\ntwo\n\nAssistant:"


@pytest.mark.parametrize(
    "messages",
    [
        [turn("assistant", "Hello!")],
        [turn("user", "Hi"), turn("user", "Hi")],
        [turn("user", "Hi"), turn("system", "Be brief.")],
        [turn("user", "Hi"), turn("tool", "42")],
    ],
    ids=["assistant first", "user twice", "system late", "unknown role"],
)
def test_roles_that_do_not_alternate_are_refused(messages: list[dict[str, str]]) -> None:
    with pytest.raises(ValueError, match="alternate"):
        render(messages)

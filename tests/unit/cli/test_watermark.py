"""`gyrfalcon detect`: what it prints and how it exits, on a checkpoint's tokenizer alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from gyrfalcon.cli.main import app
from gyrfalcon.service.tokenizer import load_tokenizer
from gyrfalcon.splitmix import are_green
from gyrfalcon.testing.text import write_tokenizer

KEY = 2**63 + 11
NUM_IDS = 500


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint without weights, whose model has more ids than its tokenizer."""
    folder = write_tokenizer(tmp_path_factory.mktemp("tiny"))
    (folder / "config.json").write_text(json.dumps({"vocab_size": NUM_IDS}))
    return folder


@pytest.fixture(scope="module")
def marked(model: Path) -> list[int]:
    """Ids that are green one after the other under KEY, no pair twice, and that are those of their own text."""
    tokenizer = load_tokenizer(model)
    words = [id_ for id_ in range(260, 400) if tokenizer.token_text(id_)[:1] == " "]
    words = [id_ for id_ in words if tokenizer.encode(tokenizer.token_text(id_)) == [id_]]
    ids, seen = [words[0]], set[tuple[int, int]]()
    while len(ids) < 30:
        flags = are_green(KEY, 0.5, np.full(len(words), ids[-1]), np.array(words))
        fresh = next(id_ for id_, flag in zip(words, flags, strict=True) if flag and (ids[-1], id_) not in seen)
        seen.add((ids[-1], fresh))
        ids.append(fresh)
    assert tokenizer.encode(tokenizer.decode(ids)) == ids
    return ids


@pytest.fixture
def text_file(model: Path, marked: list[int], tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(load_tokenizer(model).decode(marked), encoding="utf-8")
    return file


def detect(model: Path, *arguments: object, **options: str | bytes | dict[str, str]) -> Result:
    return CliRunner().invoke(app, ["detect", "--model", str(model), *map(str, arguments)], **options)


def test_a_marked_file_is_found(model: Path, text_file: Path) -> None:
    done = detect(model, text_file, "--key", KEY)
    assert done.exit_code == 0
    assert done.stdout.splitlines()[0] == "watermark found"
    assert f"29 scored of 30, by the tokenizer of {model.name}" in done.stdout
    assert "29 green (100.0%, 50.0% expected), z = 5.39, p = 1.9e-09" in done.stdout
    assert str(KEY) not in done.output


def test_standard_input_is_read_and_another_key_finds_nothing(model: Path, text_file: Path) -> None:
    done = detect(model, "-", "--key", "1", input=text_file.read_bytes())
    assert (done.exit_code, done.stdout.splitlines()[0]) == (1, "no watermark found")


def test_a_short_text_is_undecided(model: Path, text_file: Path) -> None:
    done = detect(model, "-", input="the town")
    assert done.exit_code == 3
    assert done.stdout.startswith("cannot be said: ")


def test_the_configured_key_and_gamma_hold(model: Path, text_file: Path) -> None:
    environ = {"GYRFALCON_WATERMARK_KEY": str(KEY), "WATERMARK_GAMMA": "0.5"}
    assert detect(model, text_file, env=environ).exit_code == 0
    assert detect(model, text_file, "--watermark-key", KEY).exit_code == 0
    assert detect(model, text_file, "--key", "3", env=environ).exit_code == 1
    assert "90.0% expected" in detect(model, text_file, "--gamma", "0.9", env=environ).stdout


def test_several_keys_share_the_threshold(model: Path, text_file: Path) -> None:
    done = detect(model, text_file, "--key", "1", "--key", KEY, "--json")
    found = json.loads(done.stdout)
    assert done.exit_code == 0
    assert [score["is_found"] for score in found["keys"]] == [False, True]
    assert found["keys"][1]["corrected_p_value"] == pytest.approx(2 * found["keys"][1]["p_value"])
    assert "corrected for the number of keys" in detect(model, text_file, "--key", "1", "--key", "2").stdout


def test_json_flags_every_token(model: Path, marked: list[int], text_file: Path) -> None:
    found = json.loads(detect(model, text_file, "--key", KEY, "--json").stdout)
    assert [token["id"] for token in found["tokens"]] == marked
    assert found["keys"][0]["green"] == [None, *[True] * 29]


def test_token_ids_are_scored_as_they_are(model: Path, marked: list[int]) -> None:
    done = detect(model, "-", "--token-ids", "--key", KEY, "--json", input=json.dumps([*marked, NUM_IDS - 1]))
    assert [token["id"] for token in json.loads(done.stdout)["tokens"]] == [*marked, NUM_IDS - 1]


def test_a_prompt_lets_the_first_token_be_scored(model: Path, text_file: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("My name")
    done = detect(model, text_file, "--prompt", tmp_path / "prompt.txt")
    assert "30 scored of 30" in done.stdout


def test_repeated_pairs_count_when_asked_for(model: Path) -> None:
    assert "2 scored of 40" in detect(model, "-", "--token-ids", input=json.dumps([3, 4] * 20)).stdout
    counted = detect(model, "-", "--token-ids", "--count-repeated", input=json.dumps([3, 4] * 20))
    assert "39 scored of 40" in counted.stdout


def test_alpha_is_the_threshold(model: Path, text_file: Path) -> None:
    assert "threshold  p <= 0.25" in detect(model, text_file, "--alpha", "0.25").stdout


@pytest.mark.parametrize(
    ("arguments", "content", "message"),
    [
        (["missing.txt"], "", "error: FILE: `missing.txt` cannot be read: No such file or directory"),
        (["."], "", "error: FILE: `.` cannot be read: Is a directory"),
        (["-"], b"ab\xff", "error: FILE: `-` is not UTF-8 text: invalid start byte at byte 2"),
        (["-"], "", "error: `text` must not be empty"),
        (["-", "--token-ids"], "1, 2", "error: FILE: `-` is not a JSON list of token ids: "),
        (["-", "--token-ids"], '{"ids": [1]}', "error: FILE: `-` is not a JSON list of token ids"),
        (["-", "--token-ids"], "[1, true]", "error: FILE: `-` is not a JSON list of token ids"),
        (["-", "--token-ids"], "[1, 500]", "error: `token_ids` holds 500 at position 1; the model's ids are 0 to 499"),
        (["-", "--prompt", "-"], "x", "error: --prompt: standard input is FILE's already"),
        (["-", "--prompt", "missing.txt"], "x", "error: --prompt: `missing.txt` cannot be read"),
        (["-", "--key", "1234567890123456789012"], "x", "error: --key: the hidden value (flag) is not a whole number"),
        (["-", "--key", "secret"], "x", "error: --key: the hidden value (flag) is not a whole number from 0 to"),
        (["-", "--key", "1", "--key", "1"], "x", "error: `keys` must differ; entry 1 is the same as entry 0"),
        (["-", "--gamma", "1"], "x", "error: --watermark-gamma: `1` (flag) is not a number above 0 and below 1"),
        (["-", "--alpha", "2"], "x", "error: `alpha` must be >= 1e-100 and < 1.0. Given: 2.0"),
        (["-", "--model", "./nowhere"], "x", "error: there is no folder `./nowhere`"),
    ],
)
def test_what_is_wrong_is_one_line_and_exit_code_two(
    model: Path, arguments: list[str], content: str | bytes, message: str
) -> None:
    done = detect(model, *arguments, input=content)
    assert done.exit_code == 2
    assert done.stdout == ""
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1


def test_wrong_usage_is_exit_code_two(model: Path) -> None:
    assert detect(model).exit_code == 2


def test_the_command_loads_neither_torch_nor_a_web_framework(model: Path, text_file: Path) -> None:
    program = (
        "import sys\n"
        "from gyrfalcon.cli.main import main\n"
        f"sys.argv = ['gyrfalcon', 'detect', {str(text_file)!r}, '--model', {str(model)!r}]\n"
        "try:\n    main()\n"
        "except SystemExit:\n    pass\n"
        "print('loaded:', *sorted({'torch', 'transformers', 'fastapi', 'uvicorn'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "loaded:"
    assert "scored of 30" in done.stdout

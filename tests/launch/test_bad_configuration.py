"""What is wrong with a start is told in one line that names the setting and a remedy, and the process fails."""

from __future__ import annotations

import json
import re
import shutil
import socket
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gyrfalcon.config import Settings
from gyrfalcon.errors import SettingsError
from gyrfalcon.hub import unfinished_files
from gyrfalcon.launch import device
from gyrfalcon.presets import bundled_folder


def fail_to_serve(*arguments: str, cache: Path | None = None) -> str:
    """The one line that a start ends with."""
    where = [] if cache is None else ["--huggingface-hub-cache", str(cache)]
    command = [sys.executable, "-m", "gyrfalcon", "serve", *arguments, "--log-level", "error", *where]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
    assert ended.returncode == 1, ended.stderr
    assert ended.stdout == ""
    (line,) = ended.stderr.splitlines()
    assert line.startswith("error: ")
    return line


def copy_of_eyas(folder: Path) -> Path:
    shutil.copytree(bundled_folder(), folder)
    return folder


def test_an_unknown_preset() -> None:
    assert "`falcon7b` is neither a folder nor a preset" in (line := fail_to_serve("falcon7b"))
    assert "did you mean `falcon-7b`?" in line


def test_weights_that_are_not_there(tmp_path: Path) -> None:
    line = fail_to_serve("falcon-7b", "--offline", cache=tmp_path)
    assert "--offline" in line
    assert "the cache does not hold it" in line


def test_weights_of_which_a_file_has_not_arrived(tmp_path: Path) -> None:
    folder = copy_of_eyas(tmp_path / "half")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    line = fail_to_serve(str(folder))
    assert "--model: 1 weight files" in line
    assert "`model-00002-of-00002.safetensors`; copy them again" in line


def test_a_download_that_was_cut_short(tmp_path: Path) -> None:
    commit = "0" * 40
    repository = tmp_path / "models--tiiuae--falcon-7b"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    weights = copy_of_eyas(repository / "snapshots" / commit) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    line = fail_to_serve("falcon-7b", "--offline", cache=tmp_path)
    assert "--model: 1 weight files of `falcon-7b` are missing or cut short" in line
    assert "run `gyrfalcon download falcon-7b`" in line


def test_a_port_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        line = fail_to_serve("--port", str(port))
    assert f"--port: {port} on 127.0.0.1 is in use" in line
    assert re.search(r"choose another: --port \d+", line)


def write_huge(folder: Path) -> Path:
    """A checkpoint of a hundred times this machine's memory, as a file with a hole."""
    copy_of_eyas(folder)
    config = json.loads((folder / "config.json").read_text())
    layers = 400_000
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 9_999, "hidden_size": 32768}))
    header = json.dumps({"x": {"dtype": "F32", "shape": [layers, 2**20], "data_offsets": [0, layers * 2**22]}}).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + layers * 2**22)
    return folder


def test_memory_too_small_for_the_model(tmp_path: Path) -> None:
    line = fail_to_serve(str(write_huge(tmp_path / "huge")))
    assert re.search(r"--model: the weights of `.*huge` take \d+ bytes in float32, and \d+ bytes of memory are", line)
    assert "choose a smaller --dtype, --quantize int8 or int4 (on CPU), a smaller model, or more memory" in line


def test_memory_too_small_for_the_cache() -> None:
    line = fail_to_serve("--kv-cache-memory", "900TiB")
    assert "set --kv-cache-memory or --max-batch-total-tokens" in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there() -> None:
    line = fail_to_serve("--device", "cuda")
    assert "--device: cuda is asked for, but torch finds no CUDA device; use `--device cpu`" in line


@pytest.fixture
def volta(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU of the generation before bfloat16, as far as choosing a precision asks for one."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "V100")


def write_config(folder: Path, dtype: str) -> Path:
    config = json.loads((bundled_folder() / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": dtype}))
    return folder


@pytest.mark.usefixtures("volta")
def test_a_precision_that_the_device_lacks_is_refused_when_asked_for(tmp_path: Path) -> None:
    folder = write_config(tmp_path, "bfloat16")
    message = r"^--dtype: V100 \(compute capability 7.0\) does not compute in bfloat16; say `--dtype float16`$"
    with pytest.raises(SettingsError, match=message):
        device._choose_dtype(Settings(dtype="bfloat16"), folder, "cuda")


@pytest.mark.usefixtures("volta")
@pytest.mark.parametrize(
    ("stored", "chosen"), [("bfloat16", "float16"), ("float16", "float16"), ("float32", "float32")]
)
def test_a_precision_that_is_left_open_is_one_that_the_device_has(tmp_path: Path, stored: str, chosen: str) -> None:
    assert device._choose_dtype(Settings(), write_config(tmp_path, stored), "cuda") == chosen


@pytest.mark.usefixtures("volta")
def test_the_cpu_computes_in_every_precision(tmp_path: Path) -> None:
    folder = write_config(tmp_path, "bfloat16")
    assert device._choose_dtype(Settings(), folder, "cpu") == "bfloat16"
    assert device._choose_dtype(Settings(dtype="float16"), folder, "cpu") == "float16"


def test_a_whole_checkpoint_has_no_unfinished_files(tmp_path: Path) -> None:
    assert unfinished_files(bundled_folder()) == []
    folder = copy_of_eyas(tmp_path / "eyas")
    (folder / "model.safetensors.index.json").write_text("{}")
    assert unfinished_files(folder) == ["model.safetensors.index.json"]

"""Every way in which a folder's weights can be wrong, and every harmless oddity that must be accepted."""

from __future__ import annotations

import contextlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from gyrfalcon.errors import ModelLoadError
from gyrfalcon.models.spec import read_spec
from gyrfalcon.models.weights import RowRun, WeightReader, open_checkpoint, read_header

Folders = Callable[[str], Path]
CPU = torch.device("cpu")
EMBEDDING = "transformer.word_embeddings.weight"
QKV = "transformer.h.1.self_attention.query_key_value.weight"


def check(folder: Path) -> None:
    open_checkpoint(folder, read_spec(folder))


def reader(
    folder: Path, dtype: torch.dtype = torch.float32, *, progress: list[tuple[int, int]] | None = None
) -> WeightReader:
    report = None if progress is None else lambda done, total: progress.append((done, total))
    return WeightReader(open_checkpoint(folder, read_spec(folder)), dtype, CPU, report)


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """Rewrite model.safetensors with its tensors changed in place by `change`; returns the file."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    return path


def change_header(folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Rewrite the header of model.safetensors, leaving the data as it is; returns the file."""
    path = folder / "model.safetensors"
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    return path


def split_into_shards(folder: Path) -> Path:
    """Two shards and their index instead of one file; returns the index."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for shard, part in shards.items():
        save_file({name: tensors[name] for name in part}, folder / shard)
    (folder / "model.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    weight_map = {name: shard for shard, part in shards.items() for name in part}
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index


def change_index(index: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(index.read_text())
    change(content)
    index.write_text(json.dumps(content))


# Files that are not what they should be


@pytest.mark.parametrize("missing_bytes", [1, 1000])
def test_a_truncated_file_is_named_with_its_size_and_the_right_one(missing_bytes: int, damaged: Folders) -> None:
    path = damaged("falcon-7b") / "model.safetensors"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-missing_bytes])

    with pytest.raises(
        ModelLoadError, match=f"{path}: is {size - missing_bytes} bytes long, expected {size}: it is trunc"
    ):
        check(path.parent)


@pytest.mark.parametrize("kept_bytes", [0, 5, 8, 100])
def test_a_file_cut_off_in_its_header_is_refused(kept_bytes: int, damaged: Folders) -> None:
    path = damaged("falcon-7b") / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept_bytes])

    with pytest.raises(ModelLoadError, match=f"{path}: is {kept_bytes} bytes long, .* truncated or not a safetensors"):
        check(path.parent)


def test_bytes_after_the_tensors_are_refused(damaged: Folders) -> None:
    path = damaged("falcon-7b") / "model.safetensors"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes() + b"more")

    with pytest.raises(ModelLoadError, match=f"is {size + 4} bytes long, expected {size}: it has bytes after"):
        check(path.parent)


def test_a_git_lfs_pointer_is_recognised(damaged: Folders) -> None:
    path = damaged("falcon-7b") / "model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 14\n")

    with pytest.raises(ModelLoadError, match="is a Git LFS pointer"):
        check(path.parent)


def test_a_folder_in_place_of_the_file_is_refused(damaged: Folders) -> None:
    path = damaged("falcon-7b") / "model.safetensors"
    path.unlink()
    path.mkdir()

    with pytest.raises(ModelLoadError, match=f"{path}: cannot be read: "):
        check(path.parent)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"not json",
        b"[]",
        b"null",
        b'{"a": 1}',
        b'{"a": {"dtype": "F32"}}',
        b'{"a": {"dtype": 4, "shape": [1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}',
        b'{"a": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [true], "data_offsets": [0, 4]}}',
        b"\xff\xfe\x00",
        b"[" * 50_000,
    ],
)
def test_a_corrupt_header_is_refused(text: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))

    with pytest.raises(ModelLoadError, match=f"{path}: its header of {len(text)} bytes is corrupt"):
        read_header(path)


@settings(max_examples=200)
@given(st.binary(max_size=200), st.integers(0, 260))
def test_no_bytes_make_the_header_reader_fail_otherwise(tmp_path_factory: Any, content: bytes, length: int) -> None:
    path = tmp_path_factory.mktemp("fuzz", numbered=True) / "model.safetensors"
    path.write_bytes(struct.pack("<Q", length) + content)

    with contextlib.suppress(ModelLoadError):
        tensors = read_header(path)
        assert sum(tensor.num_bytes for tensor in tensors.values()) == len(content) - length


def test_tensors_that_overlap_are_refused(damaged: Folders) -> None:
    def overlap(header: dict[str, Any]) -> None:
        header[QKV]["data_offsets"] = [offset - 4 for offset in header[QKV]["data_offsets"]]

    path = change_header(damaged("falcon-7b"), overlap)

    with pytest.raises(ModelLoadError, match=rf"{path}: `{QKV}` starts at byte \d+, expected \d+: it overlaps"):
        check(path.parent)


def test_a_gap_between_tensors_is_refused(damaged: Folders) -> None:
    path = change_header(damaged("falcon-7b"), lambda header: header.pop(QKV))

    with pytest.raises(ModelLoadError, match="it leaves a gap before it"):
        check(path.parent)


def test_a_tensor_whose_bytes_do_not_fit_its_shape_is_refused(damaged: Folders) -> None:
    path = change_header(damaged("falcon-7b"), lambda header: header[QKV].update(shape=[96, 63]))

    with pytest.raises(
        ModelLoadError, match=rf"{path}: `{QKV}` takes 24576 bytes; its shape \[96, 63\] in F32 needs 24192"
    ):
        check(path.parent)


# Files that are in order but not this model's


def test_missing_tensors_are_named(damaged: Folders) -> None:
    path = change_tensors(damaged("falcon-7b"), lambda tensors: tensors.pop(QKV))

    with pytest.raises(
        ModelLoadError, match=f"{path}: missing `{QKV}`; config.json asks for a falcon model of 2 layers"
    ):
        check(path.parent)


def test_extra_tensors_are_named(damaged: Folders) -> None:
    extra = "transformer.h.0.self_attention.dense.bias"
    path = change_tensors(damaged("falcon-7b"), lambda tensors: tensors.update({extra: torch.zeros(64)}))

    with pytest.raises(ModelLoadError, match=f"{path}: holds `{extra}`; config.json asks for"):
        check(path.parent)


def test_a_wrong_shape_is_named_with_the_right_one(damaged: Folders) -> None:
    path = change_tensors(damaged("falcon-7b"), lambda tensors: tensors.update({QKV: torch.zeros(192, 64)}))

    with pytest.raises(ModelLoadError, match=rf"{path}: `{QKV}` has shape \[192, 64\], expected \[96, 64\]"):
        check(path.parent)


def test_an_embedding_of_another_size_than_the_vocabulary_is_refused(damaged: Folders) -> None:
    path = change_tensors(damaged("falcon-7b"), lambda tensors: tensors.update({EMBEDDING: torch.zeros(385, 64)}))

    with pytest.raises(ModelLoadError, match=rf"`{EMBEDDING}` has shape \[385, 64\], expected \[384, 64\]"):
        check(path.parent)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float64, torch.float8_e4m3fn], ids=str)
def test_a_dtype_that_is_no_weights_is_refused(dtype: torch.dtype, damaged: Folders) -> None:
    path = change_tensors(damaged("falcon-7b"), lambda tensors: tensors.update({QKV: torch.zeros(96, 64).to(dtype)}))

    with pytest.raises(ModelLoadError, match=f"`{QKV}` is stored as .*, expected F32, BF16, F16"):
        check(path.parent)


def test_the_norms_of_another_variant_are_named_beside_those_expected(damaged: Folders) -> None:
    folder = damaged("falcon-40b")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_ln_in_parallel_attn": 1}))

    with pytest.raises(
        ModelLoadError, match=r"missing `transformer.h.0.input_layernorm.weight`.* hold `.*ln_(attn|mlp)"
    ):
        check(folder)


def test_an_untied_model_needs_its_head(damaged: Folders) -> None:
    path = change_tensors(damaged("falcon-11b"), lambda tensors: tensors.pop("lm_head.weight"))

    with pytest.raises(ModelLoadError, match="missing `lm_head.weight`; .* head its own"):
        check(path.parent)


# Folders


def test_a_folder_without_weights_is_refused(damaged: Folders) -> None:
    folder = damaged("falcon-7b")
    (folder / "model.safetensors").unlink()

    with pytest.raises(
        ModelLoadError, match=f"{folder}: has neither model.safetensors nor model.safetensors.index.json"
    ):
        check(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "consolidated.00.pth"])
def test_pickled_weights_are_refused_with_a_way_out(name: str, damaged: Folders) -> None:
    folder = damaged("falcon-7b")
    (folder / "model.safetensors").rename(folder / name)

    with pytest.raises(
        ModelLoadError, match=rf"only pickled weights \(`{name}`\), .* refused; convert .* save_pretrained"
    ):
        check(folder)


def test_pickled_weights_beside_safetensors_do_no_harm(damaged: Folders) -> None:
    folder = damaged("falcon-7b")
    (folder / "pytorch_model.bin").write_bytes(b"unread")

    check(folder)


def test_missing_shards_are_listed(damaged: Folders) -> None:
    index = split_into_shards(damaged("falcon-7b"))
    (index.parent / "model-00002-of-00002.safetensors").unlink()

    with pytest.raises(ModelLoadError, match=f"{index}: 1 of 2 shards are missing: `model-00002-of-00002.safetensors`"):
        check(index.parent)


def test_a_truncated_shard_is_named(damaged: Folders) -> None:
    index = split_into_shards(damaged("falcon-7b"))
    shard = index.parent / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-10])

    with pytest.raises(ModelLoadError, match=f"{shard}: is .* bytes long, expected"):
        check(index.parent)


def test_an_index_that_names_the_wrong_shard_is_refused(damaged: Folders) -> None:
    index = split_into_shards(damaged("falcon-7b"))
    name = next(iter(load_file(index.parent / "model-00002-of-00002.safetensors")))
    change_index(index, lambda content: content["weight_map"].update({name: "model-00001-of-00002.safetensors"}))

    with pytest.raises(ModelLoadError, match=f"model-00001-of-00002.safetensors: `{name}` is not in it, though"):
        check(index.parent)


def test_a_tensor_in_two_shards_is_refused(damaged: Folders) -> None:
    index = split_into_shards(damaged("falcon-7b"))
    shard = index.parent / "model-00002-of-00002.safetensors"
    other = load_file(index.parent / "model-00001-of-00002.safetensors")
    name = sorted(other)[0]
    save_file(load_file(shard) | {name: other[name]}, shard)

    with pytest.raises(ModelLoadError, match=f"{shard}: `{name}` is also in model-00001-of-00002.safetensors"):
        check(index.parent)


@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/passwd", "a/b.safetensors"])
def test_an_index_may_not_lead_out_of_its_folder(shard: str, damaged: Folders) -> None:
    index = split_into_shards(damaged("falcon-7b"))
    change_index(index, lambda content: content["weight_map"].update({EMBEDDING: shard}))

    with pytest.raises(ModelLoadError, match=f"{index}: `{shard}` is not a plain file name"):
        check(index.parent)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "nothing"])
def test_a_corrupt_index_is_refused(content: str, damaged: Folders) -> None:
    index = split_into_shards(damaged("falcon-7b"))
    index.write_text(content)

    with pytest.raises(ModelLoadError, match=str(index)):
        check(index.parent)


# Harmless oddities


@pytest.mark.parametrize("form", ["falcon-40b", "falcon-11b", "llama", "llama-tied"])
def test_names_without_the_leading_part_are_the_same_tensors(form: str, damaged: Folders, checkpoint: Folders) -> None:
    def drop_prefix(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.").removeprefix("model.")] = tensors.pop(name)

    folder = damaged(form)
    change_tensors(folder, drop_prefix)
    name = next(
        name for name in load_file(checkpoint(form) / "model.safetensors") if "h.1" in name or "layers.1" in name
    )

    assert torch.equal(reader(folder).load(name), reader(checkpoint(form)).load(name))


@pytest.mark.parametrize(
    "name",
    [
        "transformer.h.0.self_attention.rotary.inv_freq",
        "transformer.h.0.self_attention.maybe_rotary.inv_freq",
        "transformer.h.0.attn.masked_bias",
    ],
)
def test_buffers_of_older_exports_are_ignored(name: str, damaged: Folders) -> None:
    path = change_tensors(
        damaged("falcon-7b"), lambda tensors: tensors.update({name: torch.zeros(8, dtype=torch.uint8)})
    )

    check(path.parent)


def test_the_stored_head_of_a_tied_model_is_ignored_when_it_equals_the_embedding(damaged: Folders) -> None:
    path = change_tensors(
        damaged("falcon-7b"), lambda tensors: tensors.update({"lm_head.weight": tensors[EMBEDDING].clone()})
    )
    weights = reader(path.parent, torch.bfloat16)

    weights.check_spare_head(weights.load(EMBEDDING))

    assert not weights.holds("lm_head.weight")


def test_the_stored_head_of_a_tied_model_must_equal_the_embedding(damaged: Folders) -> None:
    def alter(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors[EMBEDDING].clone()
        tensors["lm_head.weight"][383, 63] += 1

    path = change_tensors(damaged("falcon-7b"), alter)
    weights = reader(path.parent)

    with pytest.raises(
        ModelLoadError, match=f"{path}: `lm_head.weight` differs from the embedding, .*tie_word_embeddings"
    ):
        weights.check_spare_head(weights.load(EMBEDDING))


def test_the_stored_head_of_a_tied_model_must_have_the_embeddings_shape(damaged: Folders) -> None:
    path = change_tensors(damaged("falcon-7b"), lambda tensors: tensors.update({"lm_head.weight": torch.zeros(9, 64)}))

    with pytest.raises(ModelLoadError, match=r"`lm_head.weight` has shape \[9, 64\], expected \[384, 64\]"):
        check(path.parent)


def test_a_tensor_under_both_of_its_names_is_refused(damaged: Folders) -> None:
    def double(tensors: dict[str, Tensor]) -> None:
        tensors[QKV.removeprefix("transformer.")] = tensors[QKV].clone()

    path = change_tensors(damaged("falcon-7b"), double)

    with pytest.raises(ModelLoadError, match=f"{path}: `.*query_key_value.weight` is also stored as `"):
        check(path.parent)


def test_the_embedding_of_a_tied_model_may_be_stored_as_its_head(damaged: Folders, checkpoint: Folders) -> None:
    path = change_tensors(
        damaged("falcon-7b"), lambda tensors: tensors.update({"lm_head.weight": tensors.pop(EMBEDDING)})
    )

    assert torch.equal(reader(path.parent).load(EMBEDDING), reader(checkpoint("falcon-7b")).load(EMBEDDING))


# Reading


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_tensors_arrive_in_the_dtype_asked_for(stored: torch.dtype, dtype: torch.dtype, damaged: Folders) -> None:
    folder = damaged("falcon-7b")
    change_tensors(folder, lambda tensors: tensors.update({name: tensors[name].to(stored) for name in tensors}))

    loaded = reader(folder, dtype).load(QKV)

    assert torch.equal(loaded, load_file(folder / "model.safetensors")[QKV].to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_are_put_where_asked(dtype: torch.dtype, checkpoint: Folders) -> None:
    whole = reader(checkpoint("falcon-7b"), dtype).load(QKV)

    moved = reader(checkpoint("falcon-7b"), dtype).load(QKV, [RowRun(0, 40, 56), RowRun(56, 0, 40)])

    assert torch.equal(moved, torch.cat((whole[56:], whole[:56])))


def test_several_tensors_are_stacked_in_order(checkpoint: Folders) -> None:
    weights = reader(checkpoint("llama-biased"))
    names = [f"model.layers.0.self_attn.{part}_proj.bias" for part in "qkv"]

    assert torch.equal(weights.load_stacked(names), torch.cat([weights.load(name) for name in names]))


def test_shards_hold_what_the_single_file_held(damaged: Folders, checkpoint: Folders) -> None:
    index = split_into_shards(damaged("falcon-rw"))
    expected = load_file(checkpoint("falcon-rw") / "model.safetensors")
    weights = reader(index.parent)

    assert all(torch.equal(weights.load(name), tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("chunk_bytes", [1, 1000, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_size_of_the_chunks_does_not_matter(
    chunk_bytes: int, dtype: torch.dtype, checkpoint: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = load_file(checkpoint("falcon-7b") / "model.safetensors")[QKV].to(dtype)
    monkeypatch.setattr("gyrfalcon.models.weights._CHUNK_BYTES", chunk_bytes)

    assert torch.equal(reader(checkpoint("falcon-7b"), dtype).load(QKV), expected)


def test_progress_grows_to_the_bytes_of_all_weights(checkpoint: Folders) -> None:
    progress: list[tuple[int, int]] = []
    weights = reader(checkpoint("falcon-7b"), torch.bfloat16, progress=progress)
    stored = load_file(checkpoint("falcon-7b") / "model.safetensors")

    for name in stored:
        weights.load(name)

    total = sum(tensor.numel() * 4 for tensor in stored.values())
    assert [done for done, _ in progress] == sorted(done for done, _ in progress)
    assert progress[-1] == (total, total)
    assert weights.bytes_loaded == total // 2


def test_a_file_that_shrinks_after_the_check_ends_in_an_error(damaged: Folders) -> None:
    folder = damaged("falcon-7b")
    weights = reader(folder)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:2000])

    with pytest.raises(ModelLoadError, match=rf"{path}: ended at byte \d+ while `{QKV}` was read"):
        weights.load(QKV)


def test_a_file_that_goes_away_after_the_check_ends_in_an_error(damaged: Folders) -> None:
    folder = damaged("falcon-7b")
    weights = reader(folder)
    (folder / "model.safetensors").unlink()

    with pytest.raises(ModelLoadError, match="model.safetensors: cannot be read: No such file"):
        weights.load(QKV)

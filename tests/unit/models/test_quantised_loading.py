"""Matrices as codes: read from quantised checkpoints, or made while a checkpoint is read."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gyrfalcon.errors import ModelLoadError, SettingsError
from gyrfalcon.kernels.quantised import CodeFormat, QuantisedMatrix
from gyrfalcon.kernels.reference import ReferenceOps
from gyrfalcon.models import falcon
from gyrfalcon.models.decoder import CausalLM
from gyrfalcon.models.quantisation import read_format
from gyrfalcon.models.registry import load_model
from gyrfalcon.models.spec import read_spec
from gyrfalcon.models.weights import WeightReader, open_checkpoint
from gyrfalcon.testing.paged import PagedRows
from tests.unit.models.packed_checkpoints import (
    Recipe,
    awq,
    compressed,
    gptq,
    store_codes,
    write_awq,
    write_gptq,
    write_packed,
    write_plain,
)

Folders = Callable[[str], Path]
LAYER = "model.layers.1"
STACKS = (
    [f"{LAYER}.self_attn.{part}_proj" for part in ("q", "k", "v")],
    [f"{LAYER}.self_attn.o_proj"],
    [f"{LAYER}.mlp.gate_proj", f"{LAYER}.mlp.up_proj"],
    [f"{LAYER}.mlp.down_proj"],
)
ops = ReferenceOps()

NATIVE = {
    "gptq": Recipe(write_gptq, gptq()),
    "gptq of zeros that are the middle": Recipe(write_gptq, gptq(), is_symmetric=True),
    "gptq v2": Recipe(write_gptq, gptq(checkpoint_format="gptq_v2")),
    "gptq in act-order": Recipe(write_gptq, gptq(desc_act=True), is_ordered=True),
    "gptq in one group": Recipe(write_gptq, gptq(group_size=-1), group=0),
    "gptq in one group, 8 bits": Recipe(write_gptq, gptq(group_size=-1, bits=8), 8, 0, is_symmetric=True),
    "gptq in groups of 160": Recipe(write_gptq, gptq(group_size=160), group=160),
    "awq": Recipe(write_awq, awq()),
    "awq in groups of 64": Recipe(write_awq, awq(group_size=64), group=64),
    "packed": Recipe(write_packed, compressed(), is_symmetric=True),
    "packed with zeros": Recipe(write_packed, compressed(symmetric=False)),
    "packed in act-order": Recipe(write_packed, compressed(actorder="group"), is_symmetric=True, is_ordered=True),
    "packed by channel": Recipe(write_packed, compressed(strategy="channel"), group=0, is_symmetric=True),
    "packed by channel, 8 bits": Recipe(
        write_packed, compressed(strategy="channel", num_bits=8), 8, 0, is_symmetric=True
    ),
    "int8": Recipe(write_plain, compressed("int-quantized", num_bits=8, strategy="channel"), 8, 0, is_symmetric=True),
}
DEQUANTISED = {
    "gptq of 8 bits in groups": Recipe(write_gptq, gptq(bits=8), 8),
    "gptq of 8 bits with zeros": Recipe(write_gptq, gptq(bits=8, group_size=-1), 8, 0),
    "gptq in groups of 16": Recipe(write_gptq, gptq(group_size=16), group=16),
    "packed 8 bits in groups": Recipe(write_packed, compressed(num_bits=8), 8, is_symmetric=True),
    "int8 with zeros": Recipe(
        write_plain, compressed("naive-quantized", num_bits=8, strategy="channel", symmetric=False), 8, 0
    ),
}


def reader(folder: Path, **options: CodeFormat) -> WeightReader:
    spec = read_spec(folder)
    checkpoint = open_checkpoint(folder, spec, read_format(folder))
    return WeightReader(checkpoint, torch.float32, torch.device("cpu"), None, **options)


def logits(model: CausalLM) -> Tensor:
    ids_T = torch.arange(3, 43)
    rows = PagedRows(1, 64, block_size=16)
    caches = rows.empty_caches(model.spec.num_layers, model.spec.num_kv_heads, model.spec.head_size, model.cache_dtype)
    step = rows.grow({0: len(ids_T)})
    return model.logits(model.forward(ids_T, step.attention, caches))


def load(folder: Path, quantize: str | None = None) -> CausalLM:
    return load_model(folder, dtype="float32", device="cpu", ops=ops, quantize=quantize)


@pytest.mark.parametrize("name", NATIVE)
def test_stored_codes_stay_codes(name: str, damaged: Folders) -> None:
    folder = damaged("llama")
    dense = store_codes(folder, NATIVE[name])
    weights = reader(folder)

    for stack in STACKS:
        matrix = weights.load_matrix(stack)
        assert isinstance(matrix, QuantisedMatrix)
        assert torch.equal(matrix.dequantise(torch.float32), torch.cat([dense[part] for part in stack]))
        assert matrix.bits == NATIVE[name].bits
    assert not weights.dequantised


@pytest.mark.parametrize("name", DEQUANTISED)
def test_codes_without_a_fast_form_become_numbers(name: str, damaged: Folders) -> None:
    folder = damaged("llama")
    dense = store_codes(folder, DEQUANTISED[name])
    weights = reader(folder)

    for stack in STACKS:
        matrix = weights.load_matrix(stack)
        assert isinstance(matrix, Tensor)
        assert torch.equal(matrix, torch.cat([dense[part] for part in stack]))
    assert weights.dequantised == [part for stack in STACKS for part in stack]


def test_codes_that_became_numbers_get_a_line(damaged: Folders, caplog: pytest.LogCaptureFixture) -> None:
    folder = damaged("llama")
    store_codes(folder, DEQUANTISED["gptq in groups of 16"])

    with caplog.at_level(logging.WARNING):
        load(folder)

    (record,) = caplog.records
    assert record.getMessage().startswith("14 of 14 matrices stored as codes are served in float32")
    assert "`model.layers.0.self_attn.q_proj`" in record.getMessage()


def test_stacked_parts_in_different_orders_become_numbers(damaged: Folders) -> None:
    folder = damaged("llama")
    dense = store_codes(folder, NATIVE["gptq in act-order"])
    change(folder, lambda tensors: tensors[f"{STACKS[0][1]}.g_idx"].copy_(torch.arange(64) // 32))
    weights = reader(folder)

    matrix = weights.load_matrix(STACKS[0])

    assert isinstance(matrix, Tensor)
    assert torch.equal(matrix[:64], dense[STACKS[0][0]])
    assert isinstance(weights.load_matrix(STACKS[1]), QuantisedMatrix)


def test_a_matrix_left_out_of_the_quantisation_is_stacked_as_numbers(damaged: Folders) -> None:
    folder = damaged("llama")
    plain = load_file(folder / "model.safetensors")[f"{STACKS[0][1]}.weight"]
    dense = store_codes(folder, replace(NATIVE["awq"], skipped=("lm_head", STACKS[0][1])))

    matrix = reader(folder).load_matrix(STACKS[0])

    assert isinstance(matrix, Tensor)
    assert torch.equal(matrix, torch.cat([dense[STACKS[0][0]], plain, dense[STACKS[0][2]]]))


def test_a_quantised_head_is_read_too(damaged: Folders) -> None:
    folder = damaged("llama")
    dense = store_codes(folder, replace(NATIVE["gptq"], skipped=()))

    head = reader(folder).load_head("lm_head.weight")

    assert isinstance(head, QuantisedMatrix)
    assert torch.equal(head.dequantise(torch.float32), dense["lm_head"])


@pytest.mark.parametrize("form", ["falcon-7b", "falcon-40b", "falcon-rw"])
@pytest.mark.parametrize("name", ["gptq", "awq", "packed with zeros", "int8"])
def test_falcons_rows_are_reordered_with_their_scales(form: str, name: str, damaged: Folders) -> None:
    folder = damaged(form)
    dense = store_codes(folder, NATIVE[name])
    tensors = load_file(folder / "model.safetensors")
    plain = folder.parent / "plain"
    plain.mkdir()
    kept = {key: tensor for key, tensor in tensors.items() if not any(key.startswith(matrix) for matrix in dense)}
    biases = {key: tensor for key, tensor in tensors.items() if key.endswith(".bias")}
    save_file(kept | biases | {f"{key}.weight": tensor for key, tensor in dense.items()}, plain / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (plain / "config.json").write_text(json.dumps(config))

    spec = read_spec(folder)
    quantised = falcon.load_block(spec, 1, reader(folder)).parts()
    expected = falcon.load_block(spec, 1, reader(plain)).parts()

    for part in ("qkv", "output", "up", "down"):
        matrix, numbers = getattr(quantised, part).weight_OI, getattr(expected, part).weight_OI
        assert isinstance(matrix, QuantisedMatrix)
        assert torch.equal(matrix.dequantise(torch.float32), numbers)


@pytest.mark.parametrize("form", ["llama", "falcon-7b"])
def test_a_quantised_checkpoint_answers_nearly_as_its_numbers_do(form: str, damaged: Folders) -> None:
    folder = damaged(form)
    dense = store_codes(folder, NATIVE["gptq in act-order"])
    got = logits(load(folder, "gptq"))
    change(folder, lambda tensors: replace_matrices(tensors, dense))
    remove_from_config(folder, "quantization_config")

    expected = logits(load(folder))

    assert torch.nn.functional.cosine_similarity(got, expected).mean() > 0.995
    assert not torch.equal(got, expected)


def test_biases_of_zeros_beside_codes_are_accepted(damaged: Folders) -> None:
    folder = damaged("llama")
    dense = store_codes(folder, NATIVE["gptq"])
    plain = logits(load(folder))
    change(folder, lambda t: t.update({f"{name}.bias": torch.zeros(len(d)).half() for name, d in dense.items()}))

    assert torch.equal(logits(load(folder)), plain)

    change(folder, lambda tensors: tensors.pop(f"{STACKS[0][2]}.bias"))
    with pytest.raises(ModelLoadError, match=rf"`{STACKS[0][0]}\.bias` is there, and `{STACKS[0][2]}\.bias` is miss"):
        load(folder)


def change(folder: Path, action: Callable[[dict[str, Tensor]], object]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    action(tensors)
    save_file(tensors, path)


def replace_matrices(tensors: dict[str, Tensor], dense: dict[str, Tensor]) -> None:
    for name, numbers in dense.items():
        for key in [key for key in tensors if key.startswith(f"{name}.")]:
            del tensors[key]
        tensors[f"{name}.weight"] = numbers


def remove_from_config(folder: Path, key: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config[key]
    (folder / "config.json").write_text(json.dumps(config))


Q = STACKS[0][0]


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lambda t: t.pop(f"{Q}.scales"), rf"missing `{Q}\.scales`"),
        (lambda t: t.update({f"{Q}.scales": t[f"{Q}.scales"][:1]}), r"has shape \[1, 64\], expected \[2, 64\]"),
        (lambda t: t.update({f"{Q}.qweight": t[f"{Q}.qweight"].long()}), "is stored as I64, expected I32"),
        (lambda t: t.update({f"{Q}.qweight": t[f"{Q}.qweight"][:4]}), r"has shape \[4, 64\], expected \[8, 64\]"),
        (lambda t: t[f"{Q}.scales"].__setitem__((0, 0), float("inf")), f"`{Q}`: a scale is not finite"),
        (lambda t: t[f"{Q}.g_idx"].__setitem__(5, 2), f"`{Q}`: an input is of group 2, and there are 2"),
        (lambda t: t[f"{Q}.g_idx"].__setitem__(5, -1), f"`{Q}`: an input is of group -1, and there are 2"),
        (lambda t: t.update({f"{Q}.weight": torch.ones(64, 64)}), rf"holds `{Q}\.weight`"),
    ],
)
def test_damaged_codes_are_refused(
    action: Callable[[dict[str, Tensor]], object], message: str, damaged: Folders
) -> None:
    folder = damaged("llama")
    store_codes(folder, NATIVE["gptq"])
    change(folder, action)

    with pytest.raises(ModelLoadError, match=message):
        load(folder)


def test_a_shape_beside_the_codes_must_be_that_of_config_json(damaged: Folders) -> None:
    folder = damaged("llama")
    store_codes(folder, NATIVE["packed"])
    change(folder, lambda tensors: tensors[f"{Q}.weight_shape"].__setitem__(1, 60))

    with pytest.raises(ModelLoadError, match=rf"`{Q}`: `weight_shape` is \[64, 60\], expected \[64, 64\]"):
        load(folder)


def test_codes_that_config_json_promises_must_be_there(damaged: Folders) -> None:
    folder = damaged("llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": gptq()}))

    with pytest.raises(ModelLoadError, match="stored as gptq codes, but none is"):
        load(folder)


def test_integers_are_no_weights_elsewhere(damaged: Folders) -> None:
    folder = damaged("llama")
    change(folder, lambda t: t.update({f"{Q}.weight": t[f"{Q}.weight"].to(torch.int8)}))

    with pytest.raises(ModelLoadError, match="is stored as I8, expected F32, BF16, F16"):
        load(folder)


@pytest.mark.parametrize("form", ["falcon-7b", "falcon-40b", "falcon-11b", "falcon-rw", "llama", "llama-biased"])
@pytest.mark.parametrize(("quantize", "least_similarity"), [("int8", 0.995), ("int4", 0.93)])
def test_codes_made_at_load_answer_nearly_as_the_numbers_do(
    form: str, quantize: str, least_similarity: float, checkpoint: Folders
) -> None:
    expected, got = logits(load(checkpoint(form))), logits(load(checkpoint(form), quantize))

    assert torch.nn.functional.cosine_similarity(got, expected).mean() > least_similarity
    assert not torch.equal(got, expected)


@pytest.mark.parametrize(("form", "bits"), [(CodeFormat(8), 8), (CodeFormat(4, 32), 4), (CodeFormat(4, 128), 4)])
def test_rows_read_in_pieces_have_the_codes_of_the_whole(
    form: CodeFormat, bits: int, checkpoint: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gyrfalcon.models.weights._CHUNK_BYTES", 1000)
    folder = checkpoint("llama")
    stored = load_file(folder / "model.safetensors")

    matrix = reader(folder, quantised=form).load_matrix(STACKS[0])

    assert isinstance(matrix, QuantisedMatrix)
    whole = form.quantise(torch.cat([stored[f"{name}.weight"] for name in STACKS[0]]))
    assert matrix.bits == bits
    assert torch.equal(matrix.codes_OI, whole.codes_OI)
    assert torch.equal(matrix.scales, whole.scales)


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_the_head_has_8_bits_and_a_tied_embedding_stays_as_it_is(quantize: str, checkpoint: Folders) -> None:
    form = {"int8": CodeFormat(8), "int4": CodeFormat(4, 64)}[quantize]
    folder = checkpoint("falcon-7b")
    stored = load_file(folder / "model.safetensors")["transformer.word_embeddings.weight"]
    weights = reader(folder, quantised=form)

    head = weights.load_head("transformer.word_embeddings.weight")

    assert isinstance(head, QuantisedMatrix)
    assert head.bits == 8
    assert torch.equal(head.codes_OI, CodeFormat(8).quantise(stored).codes_OI)
    assert torch.equal(weights.load("transformer.word_embeddings.weight"), stored)


def test_codes_take_less_memory(checkpoint: Folders) -> None:
    model, plain = load(checkpoint("falcon-11b"), "int8"), load(checkpoint("falcon-11b"))

    assert model.weight_bytes < 0.45 * plain.weight_bytes


def test_progress_ends_at_the_total_although_a_tied_head_is_read_twice(checkpoint: Folders) -> None:
    seen: list[tuple[int, int]] = []

    load_model(
        checkpoint("falcon-7b"),
        dtype="float32",
        device="cpu",
        ops=ops,
        quantize="int8",
        on_progress=lambda *now: seen.append(now),
    )

    assert seen[-1][0] == seen[-1][1] > 0
    assert all(done <= total for done, total in seen)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_a_weight_that_is_not_finite_gets_no_code(value: float, quantize: str, damaged: Folders) -> None:
    folder = damaged("llama")
    change(folder, lambda tensors: tensors[f"{Q}.weight"].__setitem__((3, 7), value))

    with pytest.raises(ModelLoadError, match=rf"`{Q}\.weight` holds a value that is not finite or too large for codes"):
        load(folder, quantize)


def test_codes_are_not_made_for_a_gpu(checkpoint: Folders) -> None:
    with pytest.raises(SettingsError, match="--quantize: `int8` runs on the CPU only in this version"):
        load_model(checkpoint("llama"), dtype="float32", device="cuda", ops=ops, quantize="int8")


def test_codes_of_codes_are_refused_before_anything_is_read(damaged: Folders) -> None:
    folder = damaged("llama")
    store_codes(folder, NATIVE["awq"])

    with pytest.raises(SettingsError, match=r"--quantize: `int8` is for unquantised checkpoints"):
        load(folder, "int8")

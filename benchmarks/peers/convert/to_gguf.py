"""A checkpoint of benchmarks/checkpoints.py as llama.cpp's GGUF: python to_gguf.py CHECKPOINT OUTPUT.gguf PRECISION

Runs in llama.cpp's environment. Llama in the ordinary layout and Falcon with one key/value head are known here: what
the comparison needs. Matrices are written in bfloat16; q8_0 and q4_0 are made from that by llama.cpp's own quantiser,
with the head and the embedding in the format that it chooses for them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np

Tensor = tuple[str, list[int], np.ndarray]
"""Name, shape with rows first, and the bits of bfloat16 values."""


def read_tensors(path: Path) -> Iterator[Tensor]:
    """The tensors of a safetensors file that holds bfloat16 only."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    data = np.memmap(path, dtype=np.uint8, mode="r", offset=8 + size)
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] != "BF16":
            raise SystemExit(f"{path}: tensor {name} is {entry['dtype']}; only BF16 is converted")
        start, stop = entry["data_offsets"]
        yield name, entry["shape"], data[start:stop].view(np.uint16)


FALCON_NAMES = {
    "transformer.word_embeddings.weight": "token_embd.weight",
    "transformer.ln_f.weight": "output_norm.weight",
    "transformer.ln_f.bias": "output_norm.bias",
    "self_attention.query_key_value.weight": "attn_qkv.weight",
    "self_attention.dense.weight": "attn_output.weight",
    "mlp.dense_h_to_4h.weight": "ffn_up.weight",
    "mlp.dense_4h_to_h.weight": "ffn_down.weight",
    "input_layernorm.weight": "attn_norm.weight",
    "input_layernorm.bias": "attn_norm.bias",
}
LLAMA_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
}


def gguf_name(name: str, names: dict[str, str], layers_prefix: str) -> str:
    if name.startswith(layers_prefix):
        layer, rest = name.removeprefix(layers_prefix).split(".", 1)
        return f"blk.{layer}.{names[rest]}"
    return names[name]


def interleave_heads(values: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of a Llama query or key matrix in the order in which llama.cpp rotates them: pairs side by side.

    Hugging Face pairs a head's row i with row i + half; llama.cpp's Llama pairs rows 2 i and 2 i + 1.
    """
    rows, width = values.shape
    return values.reshape(num_heads, 2, rows // num_heads // 2, width).swapaxes(1, 2).reshape(rows, width)


def write_gguf(checkpoint: Path, output: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    family = config["model_type"]
    writer = gguf.GGUFWriter(output, family)
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    writer.add_name(checkpoint.name)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(heads)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    if family == "llama":
        writer.add_head_count_kv(config["num_key_value_heads"])
        writer.add_feed_forward_length(config["intermediate_size"])
        writer.add_rope_dimension_count(hidden // heads)
        writer.add_rope_freq_base(config["rope_theta"])
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
        writer.add_vocab_size(config["vocab_size"])
        names, prefix = LLAMA_NAMES, "model.layers."
    else:
        writer.add_head_count_kv(1)
        writer.add_feed_forward_length(4 * hidden)
        writer.add_layer_norm_eps(1e-5)
        names, prefix = FALCON_NAMES, "transformer.h."
    add_tokenizer(writer, checkpoint, config)
    for name, shape, bits in read_tensors(checkpoint / "model.safetensors"):
        add_tensor(writer, gguf_name(name, names, prefix), shape, bits, reorder(name, config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def reorder(name: str, config: dict[str, Any]) -> Callable[[np.ndarray], np.ndarray]:
    if name.endswith("q_proj.weight"):
        return lambda values: interleave_heads(values, config["num_attention_heads"])
    if name.endswith("k_proj.weight"):
        return lambda values: interleave_heads(values, config["num_key_value_heads"])
    return lambda values: values


def add_tensor(
    writer: gguf.GGUFWriter,
    name: str,
    shape: list[int],
    bits: np.ndarray,
    order: Callable[[np.ndarray], np.ndarray],
) -> None:
    if len(shape) == 1:  # llama.cpp wants vectors in single precision
        writer.add_tensor(name, (bits.astype(np.uint32) << 16).view(np.float32))
        return
    matrix = np.ascontiguousarray(order(bits.reshape(shape)))
    writer.add_tensor(name, matrix.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)


def add_tokenizer(writer: gguf.GGUFWriter, checkpoint: Path, config: dict[str, Any]) -> None:
    """The byte-level BPE of tokenizer.json. Prompts come as ids or as text that both cut into similar counts."""
    tokenizer = json.loads((checkpoint / "tokenizer.json").read_text(encoding="utf-8"))
    tokens = [""] * config["vocab_size"]
    kinds = [int(gguf.TokenType.NORMAL)] * config["vocab_size"]
    for text, token_id in tokenizer["model"]["vocab"].items():
        tokens[token_id] = text
    for entry in tokenizer["added_tokens"]:
        tokens[entry["id"]] = entry["content"]
        kinds[entry["id"]] = int(gguf.TokenType.CONTROL)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("falcon")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(False)


def quantise(source: Path, output: Path, precision: str) -> None:
    import llama_cpp

    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = {"q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, "q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0}[precision]
    status = llama_cpp.llama_model_quantize(str(source).encode(), str(output).encode(), parameters)
    if status != 0:
        raise SystemExit(f"llama.cpp could not quantise {source} to {precision}: status {status}")


def main() -> None:
    checkpoint, output, precision = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    if precision == "bf16":
        write_gguf(checkpoint, output)
        return
    plain = output.with_name(f"{output.name}.bf16")
    write_gguf(checkpoint, plain)
    try:
        quantise(plain, output, precision)
    finally:
        plain.unlink()


if __name__ == "__main__":
    main()

"""A checkpoint as CTranslate2's model: python to_ctranslate2.py CHECKPOINT OUTPUT PRECISION. In its environment."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import ctranslate2

QUANTIZATION = {"int8": "int8", "bf16": "bfloat16", "float32": "float32"}


def main() -> None:
    checkpoint, output, precision = sys.argv[1:]
    converter = ctranslate2.converters.TransformersConverter(checkpoint, low_cpu_mem_usage=True)
    converter.convert(output, quantization=QUANTIZATION[precision])
    name_missing_tokens(Path(output, "config.json"))


def name_missing_tokens(path: Path) -> None:
    """Our tokenizer knows no unknown or first token; CTranslate2 cannot load a model whose configuration says so."""
    config = json.loads(path.read_text())
    for name in ("bos_token", "eos_token", "unk_token"):
        config[name] = config.get(name) or "<|endoftext|>"
    path.write_text(json.dumps(config, indent=2))


if __name__ == "__main__":
    main()

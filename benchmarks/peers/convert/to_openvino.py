"""A checkpoint as OpenVINO's model: python to_openvino.py CHECKPOINT OUTPUT PRECISION. Runs in its environment.

bf16 keeps the weights in 16 bits; its computing is in bfloat16 where the processor can. int8 is per channel, int4 in
groups of 64: a width every checkpoint here can be divided by, and nncf's default of 128 is not one.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

FORMATS = {
    "bf16": ["--weight-format", "fp16"],
    "int8": ["--weight-format", "int8"],
    "int4": ["--weight-format", "int4", "--sym", "--group-size", "64", "--ratio", "1.0"],
}


def main() -> None:
    checkpoint, output, precision = sys.argv[1:]
    program = Path(sys.executable).with_name("optimum-cli")
    command = [str(program), "export", "openvino", "--model", checkpoint, "--task", "text-generation-with-past"]
    sys.exit(subprocess.run([*command, *FORMATS[precision], output], check=False).returncode)


if __name__ == "__main__":
    main()

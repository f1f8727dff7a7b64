"""A checkpoint as onnxruntime-genai's model: python to_onnx.py CHECKPOINT OUTPUT PRECISION. Runs in its environment.

With its defaults for CPUs: blocks of 32 weights share a scale, and activations are quantised to eight bits.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile


def main() -> None:
    checkpoint, output, precision = sys.argv[1:]
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", checkpoint]
    command += ["-o", output, "-p", precision, "-e", "cpu"]
    with tempfile.TemporaryDirectory() as cache:
        sys.exit(subprocess.run([*command, "-c", cache], check=False).returncode)


if __name__ == "__main__":
    main()

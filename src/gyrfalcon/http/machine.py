"""What KAITO's service tells at /metrics about the machine: its GPUs, or without one its processor."""

from __future__ import annotations

import shutil
import subprocess
from typing import Any

import psutil

SAMPLE_S = 0.1
NVIDIA_SMI_TIMEOUT_S = 5
GPU_FIELDS = ("index", "name", "utilization.gpu", "temperature.gpu", "memory.used", "memory.total")  # memory in MiB


def read_machine() -> dict[str, Any]:
    """The report, `gpu_info` or else `cpu_info` filled in. Takes a moment: call it in a thread."""
    gpus = parse_gpus(_ask_nvidia_smi())
    return {"gpu_info": gpus or None, "cpu_info": None if gpus else _read_cpu()}


def wants_machine(accept: str | None) -> bool:
    """Whether a request for metrics asks for this report: by JSON, where Prometheus names its own formats."""
    kinds = {part.partition(";")[0].strip().lower() for part in (accept or "").split(",")}
    return "application/json" in kinds and not kinds & {"text/plain", "application/openmetrics-text"}


def parse_gpus(table: str) -> list[dict[str, Any]]:
    """GPUs from the rows of nvidia-smi's table; a row that is not whole is left out."""
    gpus = []
    for line in table.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) == len(GPU_FIELDS) and all(cell.replace(".", "", 1).isdecimal() for cell in cells[2:]):
            index, name, load, temperature, used, total = cells
            memory = {"used": _gigabytes(float(used) * 2**20), "total": _gigabytes(float(total) * 2**20)}
            gpus.append(
                {
                    "id": index,
                    "name": name,
                    "load": f"{float(load):.2f}%",
                    "temperature": f"{float(temperature):.1f} C",
                    "memory": memory,
                }
            )
    return gpus


def _ask_nvidia_smi() -> str:
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    command = [program, f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        return subprocess.run(  # noqa: S603  (nothing of it comes from a request)
            command, capture_output=True, text=True, timeout=NVIDIA_SMI_TIMEOUT_S, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def _read_cpu() -> dict[str, Any]:
    memory = psutil.virtual_memory()
    return {
        "load_percentage": psutil.cpu_percent(interval=SAMPLE_S),
        "physical_cores": psutil.cpu_count(logical=False),
        "total_cores": psutil.cpu_count(logical=True),
        "memory": {"used": _gigabytes(memory.used), "total": _gigabytes(memory.total)},
    }


def _gigabytes(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.2f} GB"

"""What a model takes, beside what the arithmetic of `gyrfalcon fit` says: python benchmarks/footprint.py [MODEL ...]

Each model runs in a process of its own: weights loaded, the whole cache written, full steps run. Measured is how far
its resident memory grows beyond that of the same process before, and its peak beyond that.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

MIB = 1024**2


@dataclass(frozen=True, slots=True)
class Case:
    """A checkpoint folder and what runs on it."""

    folder: str
    dtype: str
    context: int
    concurrency: int
    token_budget: int = 512
    block_size: int = 32
    quantize: str = "none"


def measure(case: Case, threads: int = 1) -> dict[str, dict[str, int]]:
    """{"predicted": bytes by part, "measured": bytes by part}, from a fresh process."""
    command = [sys.executable, __file__, "--child", json.dumps(asdict(case)), "--threads", str(threads)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, dict[str, int]] = json.loads(done.stdout.splitlines()[-1])
    return result


def _run(case: Case, threads: int) -> dict[str, dict[str, int]]:
    import psutil
    import torch

    from gyrfalcon.config import Settings
    from gyrfalcon.engine.core import StepOutcome
    from gyrfalcon.engine.interface import EngineRequest
    from gyrfalcon.footprint import Load, footprint, read_spec
    from gyrfalcon.launch.device import build_core

    process = psutil.Process()
    # Libraries load parts of themselves when they are first used.
    ones = torch.ones(64, 64, dtype=torch.bfloat16)
    torch.nn.functional.linear(ones, ones)
    before = process.memory_info().rss

    spec = read_spec(Path(case.folder))
    load = Load(case.context, case.concurrency, case.token_budget, case.block_size)
    quantize = None if case.quantize == "none" else case.quantize
    predicted = footprint(spec, load, dtype=case.dtype, quantize=quantize, device="cpu")
    settings = Settings(
        model=case.folder,
        dtype=case.dtype,
        device="cpu",
        max_batch_size=case.concurrency,
        max_total_tokens=case.context,
        max_batch_total_tokens=case.concurrency * -(-case.context // case.block_size) * case.block_size,
        max_batch_prefill_tokens=case.token_budget,
        block_size=case.block_size,
        num_threads=threads,
        **({} if quantize is None else {"quantize": quantize}),
        **({"packed_cache": "off"} if "packed_cache" in Settings.__dataclass_fields__ else {}),
    )
    core = build_core(settings, Path(case.folder), lambda done, total: None)
    loaded = process.memory_info().rss
    # Sequences of the whole length, all in the cache at the end: every page of it is written.
    for number in range(case.concurrency):
        prompt = tuple((number + 7 * position) % spec.vocab_size for position in range(case.context - 2))
        core.submit(EngineRequest(request_id=str(number), prompt_ids=prompt, max_new_tokens=2), StepOutcome())
    failures = []
    while core.has_work:
        outcome = StepOutcome()
        core.step(outcome)
        failures += [*outcome.failures.values(), *outcome.refusals.values()]
    if failures:
        raise RuntimeError(f"requests failed: {failures}")
    peak = _peak_bytes()
    return {
        "predicted": {
            "weights": predicted.weights,
            "cache": predicted.cache,
            "activations": predicted.activations,
            "total": predicted.weights + predicted.cache + predicted.activations,
        },
        "measured": {
            "weights": loaded - before,
            "total": peak - before,
            "before": before,
        },
        "reported": {"weights": core.facts.weight_bytes, "cache": core.facts.cache_bytes},
    }


def _peak_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this system does not tell the peak of a process's memory")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", help="checkpoint folders; eyas if absent")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--quantize", default="none", choices=("none", "int8", "int4"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--child")
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(_run(Case(**json.loads(arguments.child)), arguments.threads)))
        return
    from gyrfalcon.presets import bundled_folder

    print(f"{'':<28}{'weights':>10}{'cache':>10}{'activ.':>10}{'total':>10}   MiB")
    for model in arguments.models or [str(bundled_folder())]:
        case = Case(model, arguments.dtype, arguments.context, arguments.concurrency, quantize=arguments.quantize)
        for kind, parts in measure(case, arguments.threads).items():
            names = ("weights", "cache", "activations", "total")
            cells = "".join(f"{parts[name] / MIB:>10.1f}" if name in parts else " " * 10 for name in names)
            print(f"{Path(model).name + ', ' + kind:<28}{cells}")


if __name__ == "__main__":
    main()

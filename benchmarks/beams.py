"""Beam search beside transformers', on one checkpoint, in one interleaved run.

    python benchmarks/beams.py [--folder DIR] [--rounds 3]

Four beams, bfloat16, all cores. Transformers runs one request at a time; Gyrfalcon one, then eight at once. Medians
over the rounds; the ratios are what to quote.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import time
from pathlib import Path
from tempfile import gettempdir

import torch
from transformers import AutoModelForCausalLM

from checkpoints import FALCON_1B, write_falcon
from gyrfalcon.config import Settings
from gyrfalcon.engine.interface import BeamParams, Engine, EngineRequest
from gyrfalcon.engine.process import ProcessEngine
from gyrfalcon.launch.child import CoreRecipe

NUM_BEAMS = 4
NUM_CONCURRENT = 8


def random_ids(num_tokens: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, FALCON_1B["vocab_size"], (num_tokens,), generator=generator).tolist()


def run_transformers(model: torch.nn.Module, ids: list[int], num_new: int) -> float:
    """New tokens a second of the returned sequence, the prompt's time included."""
    prompt = torch.tensor([ids])
    start_s = time.perf_counter()
    model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=num_new,
        min_new_tokens=num_new,
        do_sample=False,
        num_beams=NUM_BEAMS,
    )
    return num_new / (time.perf_counter() - start_s)


async def run_engine(engine: Engine, prompts: list[list[int]], num_new: int, serial: int) -> float:
    """New tokens a second of all returned sequences together."""

    async def run_one(index: int, ids: list[int]) -> None:
        request = EngineRequest(
            request_id=f"{serial}-{index}",
            prompt_ids=tuple(ids),
            max_new_tokens=num_new,
            beams=BeamParams(num_beams=NUM_BEAMS),
        )
        async for _ in engine.generate(request):
            pass

    start_s = time.perf_counter()
    await asyncio.gather(*(run_one(index, ids) for index, ids in enumerate(prompts)))
    return len(prompts) * num_new / (time.perf_counter() - start_s)


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(gettempdir()) / "gyrfalcon-falcon-1b")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    arguments = parser.parse_args()
    folder = write_falcon(arguments.folder, FALCON_1B)
    torch.set_num_threads(os.cpu_count() or 1)
    oracle = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    settings = Settings(model=str(folder), log_level="warning", max_total_tokens=1024)
    engine = await ProcessEngine.start(CoreRecipe(settings, folder))
    figures: dict[str, list[float]] = {name: [] for name in ("transformers 1", "gyrfalcon 1", "gyrfalcon 8")}
    with torch.inference_mode():
        run_transformers(oracle, random_ids(16, 0), 2)
        await run_engine(engine, [random_ids(16, 0)], 2, serial=0)
        for turn in range(1, arguments.rounds + 1):
            prompts = [random_ids(arguments.prompt_tokens, 100 * turn + index) for index in range(NUM_CONCURRENT)]
            figures["transformers 1"].append(run_transformers(oracle, prompts[0], arguments.new_tokens))
            figures["gyrfalcon 1"].append(await run_engine(engine, prompts[:1], arguments.new_tokens, 2 * turn))
            figures["gyrfalcon 8"].append(await run_engine(engine, prompts, arguments.new_tokens, 2 * turn + 1))
            print({name: round(values[-1], 2) for name, values in figures.items()}, flush=True)
    await engine.close()
    medians = {name: statistics.median(values) for name, values in figures.items()}
    for name, value in medians.items():
        print(f"{name:15s} {value:7.2f} tokens/s")
    print(f"ratio of one request: {medians['gyrfalcon 1'] / medians['transformers 1']:.2f}")
    together = medians["gyrfalcon 8"] / medians["transformers 1"]
    print(f"ratio of {NUM_CONCURRENT} at once to one after another: {together:.2f}")


if __name__ == "__main__":
    asyncio.run(main())

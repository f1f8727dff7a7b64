"""Gyrfalcon beside transformers' `generate`, on one checkpoint, in one interleaved run.

    python benchmarks/compare_transformers.py [--folder DIR] [--rounds 3]

Both generate greedily from random prompts in bfloat16 on all cores. Transformers runs its requests one after another;
Gyrfalcon runs one, then sixteen at once. Medians over the rounds; the ratios are what to quote.
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
from gyrfalcon.cli.bench import ServiceTarget, summarise
from gyrfalcon.config import Settings
from gyrfalcon.launch.serving import open_text_service

NUM_CONCURRENT = 16


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(gettempdir()) / "gyrfalcon-falcon-1b")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=32)
    return parser.parse_args()


def run_transformers(model: torch.nn.Module, num_prompt: int, num_new: int, seed: int) -> tuple[float, float]:
    """Tokens a second of one request, prompt included in the time; and without the prompt's time."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, FALCON_1B["vocab_size"], (1, num_prompt), generator=generator)
    times = {}
    for length in (1, num_new):
        start_s = time.perf_counter()
        model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=length, min_new_tokens=length, do_sample=False
        )
        times[length] = time.perf_counter() - start_s
    return num_new / times[num_new], (num_new - 1) / (times[num_new] - times[1])


async def main() -> None:
    arguments = parse_arguments()
    folder = write_falcon(arguments.folder, FALCON_1B)
    shape = (arguments.prompt_tokens, arguments.new_tokens)
    torch.set_num_threads(os.cpu_count() or 1)
    oracle = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    settings = Settings(model=str(folder), log_level="warning", max_total_tokens=1024)
    figures: dict[str, list[float]] = {name: [] for name in ("t1", "t1 decode", "g1", "g1 decode", "g16")}
    async with open_text_service(settings, on_progress=lambda done, total: None) as service:
        target = ServiceTarget(service)
        await target.run(*shape, seed=0)
        with torch.inference_mode():
            run_transformers(oracle, 16, 2, seed=0)
            for round_number in range(1, arguments.rounds + 1):
                whole, decode = run_transformers(oracle, *shape, seed=round_number)
                figures["t1"].append(whole)
                figures["t1 decode"].append(decode)
                one = summarise([await target.run(*shape, seed=round_number)], shape[0])
                figures["g1"].append(one.tokens_per_s)
                figures["g1 decode"].append(one.decode_tokens_per_s)
                seeds = range(100 * round_number, 100 * round_number + NUM_CONCURRENT)
                many = summarise(await asyncio.gather(*(target.run(*shape, seed=seed) for seed in seeds)), shape[0])
                figures["g16"].append(many.tokens_per_s)
                print({name: round(values[-1], 2) for name, values in figures.items()}, flush=True)
    medians = {name: statistics.median(values) for name, values in figures.items()}
    print(f"transformers, one request   {medians['t1']:7.2f} tokens/s   decoding {medians['t1 decode']:7.2f}")
    print(f"gyrfalcon, one request      {medians['g1']:7.2f} tokens/s   decoding {medians['g1 decode']:7.2f}")
    print(f"gyrfalcon, {NUM_CONCURRENT} requests      {medians['g16']:7.2f} tokens/s")
    whole, decode = medians["g1"] / medians["t1"], medians["g1 decode"] / medians["t1 decode"]
    print(f"ratio at batch 1: {whole:.2f} (decoding {decode:.2f})")
    print(f"ratio of {NUM_CONCURRENT} concurrent to one after another: {medians['g16'] / medians['t1']:.2f}")


if __name__ == "__main__":
    asyncio.run(main())

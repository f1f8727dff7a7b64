"""What speculation is worth where a text repeats, and what it costs where it does not.

    python benchmarks/speculation.py [--model DIR] [--dtype auto] [--draft 8] [--rows 1,8,32] [--rounds 3] [--cpu-time]

The model computes every step as ever, but the tokens it chooses are replaced by those of a script, so that any weights
will do: `copy` repeats the prompt with one token in twenty changed, as an edited document does; `free` is text that
eyas wrote by sampling at temperature 1; `loop` is what eyas writes greedily, which soon repeats itself. All rows sample
at temperature 1, so that each step costs what it costs. With and without take turns step by step, so that a busy
machine slows both; only steps that run no prompt are counted; medians over the rounds, and the ratio's range. The
goals: `free` keeps 0.97 of the speed, and no text changes. On a machine that is busy with other things,
`--cpu-time --threads 1` counts the processor's time instead of the clock's.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch

from gyrfalcon.engine.core import CoreLimits, EngineCore, StepOutcome
from gyrfalcon.engine.interface import EngineRequest, SamplingParams, TokenEvent
from gyrfalcon.kernels.cpu.threads import choose_num_threads
from gyrfalcon.kernels.select import select_ops
from gyrfalcon.models.registry import load_model
from gyrfalcon.runner.interface import Executor, SamplingColumns, StepPlan, StepResult
from gyrfalcon.runner.model_runner import ModelRunner
from gyrfalcon.service.tokenizer import load_tokenizer

EYAS = Path(str(files("gyrfalcon") / "eyas"))
NUM_PROMPT, NUM_NEW, BLOCK_SIZE = 256, 256, 32
GOAL = 0.97

Script = list[int]


class ScriptedExecutor:
    """Runs each plan on a real executor and answers with the script of the sample's seed."""

    def __init__(self, executor: Executor, scripts: list[Script]) -> None:
        self.facts = executor.facts
        self._executor = executor
        self._scripts = scripts

    def execute(self, plan: StepPlan) -> StepResult:
        return dataclasses.replace(self._executor.execute(plan), token_ids_S=self._answers(plan.samples))

    def choose(self, samples: SamplingColumns) -> StepResult:
        return dataclasses.replace(self._executor.choose(samples), token_ids_S=self._answers(samples))

    def close(self) -> None:
        self._executor.close()

    def _answers(self, samples: SamplingColumns) -> np.ndarray:
        places = (samples.positions_S - samples.prompt_lens_S).tolist()
        seeds = samples.seeds_S.tolist()
        return np.array([self._scripts[seed][place] for seed, place in zip(seeds, places, strict=True)], dtype=np.int32)


class Run:
    """Prompts that run together, step by step, and what the steps that ran no prompt took."""

    def __init__(
        self,
        executor: Executor,
        prompts: list[Script],
        num_new: int,
        *,
        do_sample: bool = True,
        num_draft: int = 0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Requests have the seeds 0, 1, 2, ..."""
        # Another core has written to the cache before: nothing there is to be reused.
        self.core = EngineCore(executor, CoreLimits(prefix_caching=False, max_draft_tokens=num_draft))
        self.texts: dict[int, Script] = {}
        self.seconds = 0.0
        self.num_tokens = 0
        self.num_row_steps = 0  # rows of these steps, all added up
        self._clock = clock
        for index, prompt in enumerate(prompts):
            request = EngineRequest(
                request_id=str(index),
                prompt_ids=tuple(prompt),
                max_new_tokens=num_new,
                sampling=SamplingParams(do_sample=do_sample, seed=index),
            )
            self.core.submit(request, StepOutcome())

    def step(self) -> None:
        outcome = StepOutcome()
        start_s = self._clock()
        self.core.step(outcome)
        seconds = self._clock() - start_s
        assert not outcome.failures, outcome.failures
        assert outcome.step is not None
        for name, events in outcome.events.items():
            tokens = [event.token_id for event in events if isinstance(event, TokenEvent)]
            self.texts.setdefault(int(name), []).extend(tokens)
        if outcome.step.num_prefill_tokens == 0:
            self.seconds += seconds
            self.num_row_steps += outcome.step.num_decode_rows
            self.num_tokens += outcome.step.num_decode_rows + sum(outcome.step.num_accepted_tokens)

    def finish(self) -> dict[int, Script]:
        while self.core.has_work:
            self.step()
        return self.texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=EYAS)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--quantize", default=None)
    parser.add_argument("--draft", type=int, default=8)
    parser.add_argument("--rows", default="1,8,32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--cpu-time", action="store_true")
    options = parser.parse_args()
    clock = time.process_time if options.cpu_time else time.perf_counter
    levels = [int(level) for level in options.rows.split(",")]
    eyas = load(EYAS, "float32", None, max(levels), options.threads)
    texts = {"free": write(eyas[0], max(levels), do_sample=True), "loop": write(eyas[0], max(levels), do_sample=False)}
    executors = eyas
    if options.model != EYAS or options.dtype != "auto" or options.quantize:
        executors = load(options.model, options.dtype, options.quantize, max(levels), options.threads)
    prompts = [text[:NUM_PROMPT] for text in texts["free"]]
    scripts = {
        "copy": [copied(prompt, seed) for seed, prompt in enumerate(prompts)],
        "free": [text[NUM_PROMPT:] for text in texts["free"]],
        "loop": [text[NUM_PROMPT:] for text in texts["loop"]],
    }
    facts = executors[0].facts
    print(f"{options.model.name}, {facts.dtype}, {torch.get_num_threads()} threads, drafts of up to {options.draft}")
    print("text  rows  tokens/s without    with  ratio                  tokens a row and step  accepted of drafted")
    for name, script in scripts.items():
        for num_rows in levels:
            compare(name, executors, script, prompts[:num_rows], options.draft, options.rounds, clock)
    print(f"goal for free: a ratio of {GOAL} at least")


def load(folder: Path, dtype: str, quantize: str | None, num_rows: int, num_threads: int | None) -> list[Executor]:
    """Two executors, each with a cache of its own, over one model."""
    ops = select_ops("cpu", block_size=BLOCK_SIZE, num_threads=num_threads)
    model = load_model(folder, dtype=dtype, device="cpu", ops=ops, quantize=quantize)
    torch.set_num_threads(choose_num_threads(num_threads, model.weight_bytes))
    num_blocks = 1 + num_rows * -(-(NUM_PROMPT + NUM_NEW) // BLOCK_SIZE)
    return [ModelRunner(model, "cpu", num_blocks=num_blocks, block_size=BLOCK_SIZE) for _ in range(2)]


def write(eyas: Executor, num_texts: int, *, do_sample: bool) -> list[Script]:
    """Texts of a prompt's and an answer's length by eyas; the first half is sampled in any case."""
    start = list(load_tokenizer(EYAS).encode("This module"))
    sampled = Run(eyas, [start] * num_texts, NUM_PROMPT - len(start)).finish()
    prompts = [start + sampled[index] for index in range(num_texts)]
    rest = Run(eyas, prompts, NUM_NEW, do_sample=do_sample).finish()
    return [prompt + rest[index] for index, prompt in enumerate(prompts)]


def copied(prompt: Script, seed: int) -> Script:
    """The prompt once more, with one token in twenty replaced."""
    random = np.random.default_rng(seed)
    return [int(random.integers(256, 4000)) if random.random() < 0.05 else token for token in prompt][:NUM_NEW]


def compare(
    name: str,
    executors: list[Executor],
    scripts: list[Script],
    prompts: list[Script],
    draft: int,
    rounds: int,
    clock: Callable[[], float],
) -> None:
    scripted = [ScriptedExecutor(executor, scripts) for executor in executors]
    speeds: list[tuple[float, float]] = []
    for turn in range(rounds + 1):
        without = Run(scripted[0], prompts, NUM_NEW, clock=clock)
        ahead = Run(scripted[1], prompts, NUM_NEW, num_draft=draft, clock=clock)
        while without.core.has_work or ahead.core.has_work:
            for run in (without, ahead) if turn % 2 else (ahead, without):
                if run.core.has_work:
                    run.step()
        assert ahead.texts == without.texts
        if turn:  # the first round warms up
            speeds.append((without.num_tokens / without.seconds, ahead.num_tokens / ahead.seconds))
    stats = ahead.core.stats()
    ratios = [fast / slow for slow, fast in speeds]
    print(
        f"{name:5} {len(prompts):4}  {statistics.median(slow for slow, _ in speeds):16.1f}  "
        f"{statistics.median(fast for _, fast in speeds):6.1f}  {statistics.median(ratios):5.3f} "
        f"({min(ratios):.3f} to {max(ratios):.3f})  {ahead.num_tokens / ahead.num_row_steps:17.2f}  "
        f"{stats.accepted_tokens:8} of {stats.draft_tokens}",
        flush=True,
    )


if __name__ == "__main__":
    main()

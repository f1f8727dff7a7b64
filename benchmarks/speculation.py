"""What speculation is worth where a text repeats, and what it costs where it does not.

    python benchmarks/speculation.py [--model DIR] [--dtype auto] [--draft 8] [--rows 1,8,32] [--rounds 3] [--cpu-time]

The model computes every step as ever, but the tokens it chooses are replaced by those of a script, so that any weights
will do: `copy` repeats the prompt with one token in twenty changed, as an edited document does; `free` is text that
eyas wrote by sampling at temperature 1; `loop` is what eyas writes greedily, which soon repeats itself. All rows sample
at temperature 1, so that each step costs what it costs. With and without take turns; medians over the rounds, of the
steps that run no prompt. The goals: `free` keeps 0.97 of the speed, and no text changes. On a machine that is busy with
other things, `--cpu-time --threads 1` counts the processor's time instead of the clock's.
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
from gyrfalcon.runner.interface import Executor, SamplingColumns, StepPlan, StepResult
from gyrfalcon.runner.model_runner import load_runner
from gyrfalcon.service.tokenizer import load_tokenizer

EYAS = Path(str(files("gyrfalcon") / "eyas"))
NUM_PROMPT, NUM_NEW = 256, 256
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


@dataclasses.dataclass(slots=True)
class Run:
    """What one run took, and what came of it."""

    seconds: float = 0.0  # of the steps that ran no prompt
    num_tokens: int = 0  # they drew
    num_row_steps: int = 0  # rows of these steps, all added up
    draft_tokens: int = 0
    accepted_tokens: int = 0
    texts: dict[int, Script] = dataclasses.field(default_factory=dict)


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
    texts = {"free": write(eyas, max(levels), do_sample=True), "loop": write(eyas, max(levels), do_sample=False)}
    executor = eyas
    if options.model != EYAS or options.dtype != "auto" or options.quantize:
        executor = load(options.model, options.dtype, options.quantize, max(levels), options.threads)
    prompts = [text[:NUM_PROMPT] for text in texts["free"]]
    scripts = {
        "copy": [copied(prompt, seed) for seed, prompt in enumerate(prompts)],
        "free": [text[NUM_PROMPT:] for text in texts["free"]],
        "loop": [text[NUM_PROMPT:] for text in texts["loop"]],
    }
    print(f"{options.model.name}, {executor.facts.dtype}, {torch.get_num_threads()} threads, drafts of {options.draft}")
    print("text  rows  tokens/s without   with  ratio  tokens a row and step  accepted of drafted")
    for name, script in scripts.items():
        for num_rows in levels:
            compare(name, executor, script, prompts[:num_rows], options.draft, options.rounds, clock)
    print(f"goal for free: a ratio of {GOAL} at least")


def load(folder: Path, dtype: str, quantize: str | None, num_rows: int, num_threads: int | None) -> Executor:
    return load_runner(
        folder,
        dtype=dtype,
        device="cpu",
        quantize=quantize,
        block_size=32,
        max_rows=num_rows,
        max_total_tokens=NUM_PROMPT + NUM_NEW,
        cache_tokens=None,
        cache_bytes=None,
        cache_fraction=0.5,
        num_threads=num_threads,
        keeps_packed=False,
        packed_directory=None,
        on_progress=lambda done, total: None,
    )


def write(eyas: Executor, num_texts: int, *, do_sample: bool) -> list[Script]:
    """Texts of a prompt's and an answer's length by eyas; the first half is sampled in any case."""
    start = list(load_tokenizer(EYAS).encode("This module"))
    sampled = generate(eyas, [start] * num_texts, NUM_PROMPT - len(start)).texts
    prompts = [start + sampled[index] for index in range(num_texts)]
    rest = generate(eyas, prompts, NUM_NEW, do_sample=do_sample).texts
    return [prompt + rest[index] for index, prompt in enumerate(prompts)]


def copied(prompt: Script, seed: int) -> Script:
    """The prompt once more, with one token in twenty replaced."""
    random = np.random.default_rng(seed)
    return [int(random.integers(256, 4000)) if random.random() < 0.05 else token for token in prompt][:NUM_NEW]


def compare(
    name: str,
    executor: Executor,
    scripts: list[Script],
    prompts: list[Script],
    draft: int,
    rounds: int,
    clock: Callable[[], float],
) -> None:
    scripted = ScriptedExecutor(executor, scripts)
    runs: dict[int, list[Run]] = {0: [], draft: []}
    for turn in range(rounds + 1):
        # Whoever goes first in a round goes second in the next. The first round warms up.
        for num_draft in (0, draft) if turn % 2 else (draft, 0):
            run = generate(scripted, prompts, NUM_NEW, num_draft=num_draft, clock=clock)
            if turn:
                runs[num_draft].append(run)
    without, ahead = runs[0], runs[draft]
    assert ahead[0].texts == without[0].texts
    speeds = [statistics.median(run.num_tokens / run.seconds for run in each) for each in (without, ahead)]
    last = ahead[-1]
    print(
        f"{name:5} {len(prompts):4}  {speeds[0]:16.1f}  {speeds[1]:6.1f}  {speeds[1] / speeds[0]:5.2f}  "
        f"{last.num_tokens / last.num_row_steps:21.2f}  {last.accepted_tokens:8} of {last.draft_tokens}",
        flush=True,
    )


def generate(
    executor: Executor,
    prompts: list[Script],
    num_new: int,
    *,
    do_sample: bool = True,
    num_draft: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> Run:
    """All prompts at once. Requests have the seeds 0, 1, 2, ..."""
    # Another core has written to the cache since: nothing there is to be reused.
    core = EngineCore(executor, CoreLimits(prefix_caching=False, max_draft_tokens=num_draft))
    for index, prompt in enumerate(prompts):
        request = EngineRequest(
            request_id=str(index),
            prompt_ids=tuple(prompt),
            max_new_tokens=num_new,
            sampling=SamplingParams(do_sample=do_sample, seed=index),
        )
        core.submit(request, StepOutcome())
    run = Run()
    while core.has_work:
        outcome = StepOutcome()
        start_s = clock()
        core.step(outcome)
        seconds = clock() - start_s
        assert not outcome.failures, outcome.failures
        assert outcome.step is not None
        for name, events in outcome.events.items():
            for event in events:
                if isinstance(event, TokenEvent):
                    run.texts.setdefault(int(name), []).append(event.token_id)
        step = outcome.step
        if step.num_prefill_tokens == 0:
            run.seconds += seconds
            run.num_row_steps += step.num_decode_rows
            run.num_tokens += step.num_decode_rows + sum(step.num_accepted_tokens)
            run.draft_tokens += step.num_draft_tokens
            run.accepted_tokens += sum(step.num_accepted_tokens)
    return run


if __name__ == "__main__":
    main()

"""What logits processors and sampling cost, beside the matrix products of a decode step of Falcon-7B's shape.

    python benchmarks/processors.py [--rows 16] [--history 512] [--threads 2] [--repeats 5]

Three requests' settings are measured, each on all rows at once: greedy, sampling as most do it, and every processor
and warper active. The time is from the sequences' token ids to the chosen tokens: gathering the columns, processing,
choosing. The step it is compared with is its floor: the weights' products alone, in bfloat16, from four layers'
matrices that do not fit a cache, scaled to 32 layers. Steps and processors are measured in turn, and medians reported.
Logits are drawn so that likely tokens are few, as a language model's are: a wide normal with a heavy upper tail.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from gyrfalcon.engine.interface import EngineRequest, SamplingParams, WatermarkParams
from gyrfalcon.engine.plan import Draw, gather_samples
from gyrfalcon.engine.sequence import SequenceGroup
from gyrfalcon.runner.logits import process_logits
from gyrfalcon.runner.sampler import choose

VOCAB_SIZE, HIDDEN_SIZE, NUM_LAYERS = 65024, 4544, 32
LAYER_SHAPES = ((4672, 4544), (4544, 4544), (18176, 4544), (4544, 18176))  # query-key-value, attention, mlp up and down
MEASURED_LAYERS = 4
GOAL = 0.05

EVERYTHING = SamplingParams(
    watermark=WatermarkParams(),
    sequence_bias=(*(((i, i + 1), 0.5) for i in range(20)), ((7,), -1.0)),
    encoder_repetition_penalty=1.1,
    repetition_penalty=1.2,
    frequency_penalty=0.5,
    no_repeat_ngram_size=3,
    encoder_no_repeat_ngram_size=4,
    bad_words_ids=tuple((i, i + 1, i + 2) for i in range(100)),
    forced_eos_token_ids=(11,),
    remove_invalid_values=True,
    exponential_decay_length_penalty=(4, 1.01),
    suppress_tokens=tuple(range(20)),
    begin_suppress_tokens=(30, 31),
    temperature=0.8,
    top_k=50,
    top_p=0.95,
    min_p=0.01,
    typical_p=0.95,
    epsilon_cutoff=1e-4,
    eta_cutoff=1e-4,
    renormalize_logits=True,
    do_sample=True,
)
CASES = {
    "greedy": SamplingParams(),
    "sampling": SamplingParams(do_sample=True),
    "top-k 50, top-p": SamplingParams(do_sample=True, temperature=0.8, top_k=50, top_p=0.95),
    "top-p alone": SamplingParams(do_sample=True, top_p=0.95),
    "typical-p alone": SamplingParams(do_sample=True, typical_p=0.95),
    "watermark": SamplingParams(watermark=WatermarkParams()),
    "every one": EVERYTHING,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--history", type=int, default=512)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    step = decode_step(options.rows)
    logits = language_like_logits(options.rows)
    cases = {name: sampling_step(params, logits, options.history) for name, params in CASES.items()}
    times: dict[str, list[float]] = {name: [] for name in ("step", *cases)}
    for repeat in range(options.repeats + 1):
        for name, run in (("step", step), *cases.items()):
            started = time.perf_counter()
            run()
            if repeat:  # the first round warms up
                times[name].append(time.perf_counter() - started)
    step_s = statistics.median(times["step"]) * NUM_LAYERS / MEASURED_LAYERS
    print(f"{options.rows} rows, {options.history} tokens each, {VOCAB_SIZE} logits, {options.threads} threads")
    print(f"decode step (matrix products of {NUM_LAYERS} layers, bfloat16): {1e3 * step_s:.0f} ms")
    for name in cases:
        case_s = statistics.median(times[name])
        print(f"{name:16} {1e3 * case_s:8.2f} ms  {100 * case_s / step_s:6.2f} % of the step")
    print(f"goal for every one: below {100 * GOAL:.0f} %")


def decode_step(rows: int) -> Callable[[], None]:
    """The products of a few layers, each with matrices of its own."""
    layers = [[torch.full(shape, 0.01, dtype=torch.bfloat16) for shape in LAYER_SHAPES] for _ in range(MEASURED_LAYERS)]
    inputs = {width: torch.ones(rows, width, dtype=torch.bfloat16) for width in {shape[1] for shape in LAYER_SHAPES}}

    @torch.inference_mode()
    def run() -> None:
        for matrices in layers:
            for matrix in matrices:
                F.linear(inputs[matrix.shape[1]], matrix)

    return run


def language_like_logits(rows: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    body = 2.0 * torch.randn(rows, VOCAB_SIZE, generator=generator)
    tail = torch.empty_like(body).exponential_(generator=generator)
    return body + torch.where(torch.rand(rows, VOCAB_SIZE, generator=generator) < 0.001, 3.0 * tail + 6.0, 0.0)


def sampling_step(params: SamplingParams, logits: Tensor, num_tokens: int) -> Callable[[], None]:
    """Everything between the logits and the chosen tokens, for rows that all have these parameters."""
    ids = np.random.default_rng(0).zipf(1.3, size=(len(logits), num_tokens)) % VOCAB_SIZE
    draws = []
    for row, text in enumerate(ids.tolist()):
        request = EngineRequest(
            request_id=str(row),
            prompt_ids=tuple(text[: num_tokens // 2]),
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            stop_token_ids=(11,),
            sampling=params,
        )
        group = SequenceGroup(request, arrival_s=0.0, salt="")
        for token_id in text[num_tokens // 2 :]:
            group.sequences[0].append(token_id)
        draws.append(Draw(row, group, group.sequences[0].token_ids, 0))
    last_ids = ids[:, -1].astype(np.int32)

    @torch.inference_mode()
    def run() -> None:
        columns = gather_samples(draws)
        choose(process_logits(logits.clone(), columns, last_ids), columns)

    return run


if __name__ == "__main__":
    main()

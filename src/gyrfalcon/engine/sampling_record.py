"""A request's parameters as one record of numbers, so that a step's columns are gathered with one concatenation.

A record is the bytes of a `RECORD`: equal parameters have equal records.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gyrfalcon.engine.interface import EngineRequest

SEED_MASK = 2**64 - 1

# Named as the columns of `runner.interface.SamplingColumns`, without their `_S`. Aligned, so that a column of several
# records is an array like any other.
_COLUMNS: dict[str, type[np.generic]] = {
    "seeds": np.uint64,  # of the first choice
    "watermark_key": np.uint64,
    "watermark_gamma": np.float32,
    "watermark_delta": np.float32,
    "diversity_penalty": np.float32,
    "prompt_lens": np.int32,
    "encoder_repetition_factor": np.float32,
    "repetition_penalty": np.float32,
    "frequency_penalty": np.float32,
    "temperature": np.float32,
    "top_k": np.int32,
    "top_p": np.float32,
    "min_p": np.float32,
    "typical_p": np.float32,
    "epsilon_cutoff": np.float32,
    "eta_cutoff": np.float32,
    "keep": np.int32,
    "top_n": np.int32,
    "do_sample": np.bool_,
    "remove_invalid": np.bool_,
    "renormalize": np.bool_,
    "is_plain": np.bool_,
}
RECORD = np.dtype([*_COLUMNS.items(), ("reads_text", np.bool_)], align=True)


def make_record(request: EngineRequest) -> bytes:
    """The request's record.

    reads_text: whether what may follow depends on the text so far, beyond its last token.
    """
    params, mark, beams = request.sampling, request.sampling.watermark, request.beams
    record = np.zeros(1, dtype=RECORD)
    values = {
        "seeds": params.seed & SEED_MASK,
        "watermark_key": mark.key if mark else 0,
        "watermark_gamma": mark.gamma if mark else 0.0,
        "watermark_delta": mark.delta if mark else 0.0,
        "diversity_penalty": beams.diversity_penalty if beams else 0.0,
        "prompt_lens": len(request.prompt_ids),
        "encoder_repetition_factor": 1 / params.encoder_repetition_penalty,
        "repetition_penalty": params.repetition_penalty,
        "frequency_penalty": params.frequency_penalty,
        "temperature": params.temperature,
        "top_k": params.top_k,
        "top_p": params.top_p,
        "min_p": params.min_p,
        "typical_p": params.typical_p,
        "epsilon_cutoff": params.epsilon_cutoff,
        "eta_cutoff": params.eta_cutoff,
        # Beams need a candidate that goes on besides every stop id.
        "keep": 1 + len(request.stop_token_ids) if beams else 1,
        "top_n": 0 if beams else request.top_n,
        "do_sample": params.do_sample,
        "remove_invalid": params.remove_invalid_values,
        "renormalize": params.renormalize_logits,
        "is_plain": is_plain(request),
        "reads_text": _reads_text(request),
    }
    for name, value in values.items():
        record[name] = value
    return record.tobytes()


def columns(records: bytes) -> tuple[dict[str, Any], bool]:
    """The columns of records end to end, named as in `SamplingColumns`, and whether one of them reads its text."""
    # torch computes with arrays that could be written to, which bytes could not.
    found = np.frombuffer(bytearray(records), dtype=RECORD)
    return {f"{name}_S": found[name] for name in _COLUMNS}, bool(found["reads_text"].any())


def weighs_history(request: EngineRequest) -> bool:
    """Whether a penalty looks at all the ids so far."""
    params = request.sampling
    return (
        params.repetition_penalty != 1.0 or params.frequency_penalty != 0.0 or params.encoder_repetition_penalty != 1.0
    )


def is_plain(request: EngineRequest) -> bool:
    """Whether the likeliest token by the model's own logits is all that is asked for."""
    params = request.sampling
    changes_logits = _reads_text(request) or params.watermark or params.remove_invalid_values
    return not (changes_logits or params.do_sample or request.top_n)


def _reads_text(request: EngineRequest) -> bool:
    params = request.sampling
    return bool(
        request.beams
        or weighs_history(request)
        or (params.watermark and params.watermark.context_width > 1)
        or params.sequence_bias
        or params.bad_words_ids
        or params.no_repeat_ngram_size
        or params.encoder_no_repeat_ngram_size
        or request.min_new_tokens
        or params.forced_eos_token_ids
        or params.forced_bos_token_id is not None
        or params.exponential_decay_length_penalty
        or params.suppress_tokens
        or params.begin_suppress_tokens
    )

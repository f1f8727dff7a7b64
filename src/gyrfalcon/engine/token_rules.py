"""What a request's rules say of a sequence's next token by its ids alone: which are banned, biased, forced, suppressed.

The scores themselves are the runner's; these lists are what its processors need to know of the text.
"""

from __future__ import annotations

from collections.abc import Sequence as Listing
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from gyrfalcon.engine.interface import EngineRequest, SamplingParams
from gyrfalcon.runner.interface import NO_IDS, Floats, Ints

NO_WEIGHTS: Floats = np.empty(0, dtype=np.float32)


class Phrases:
    """Lists of ids, sorted by length so that all of one length are compared with a text's end at once."""

    def __init__(self, phrases: Listing[tuple[int, ...]]) -> None:
        """Empty phrases are left out: nothing completes them."""
        by_length: dict[int, list[int]] = {1: []}  # single ids come first, the other lengths as they appear
        for index, phrase in enumerate(phrases):
            by_length.setdefault(len(phrase), []).append(index)
        by_length.pop(0, None)
        self._tables = [
            (np.array([phrases[index][:-1] for index in indices], dtype=np.int32), np.array(indices, dtype=np.intp))
            for indices in by_length.values()
            if indices
        ]
        self._last_ids = np.array([phrase[-1] if phrase else -1 for phrase in phrases], dtype=np.int32)

    def completed(self, token_ids: Ints) -> tuple[npt.NDArray[np.intp], Ints]:
        """The phrases whose last id alone is missing at the end of the text: their indices and that id."""
        indices = [
            which[(heads == token_ids[len(token_ids) - heads.shape[1] :]).all(axis=1)]
            for heads, which in self._tables
            if heads.shape[1] <= len(token_ids)
        ]
        found = np.concatenate(indices) if indices else np.empty(0, dtype=np.intp)
        return found, self._last_ids[found]


class _Tables:
    """The rules of one `SamplingParams` that take a moment to prepare."""

    def __init__(self, params: SamplingParams) -> None:
        self.bad_words = Phrases(params.bad_words_ids)
        # Of equal phrases the last one's bias counts.
        biases = dict(params.sequence_bias)
        self.biased = Phrases(list(biases))
        self.biases = np.array(list(biases.values()), dtype=np.float32)
        self.suppressed = np.array(params.suppress_tokens, dtype=np.int32)
        self.begin_suppressed = np.array(params.begin_suppress_tokens, dtype=np.int32)


_tables: WeakKeyDictionary[SamplingParams, _Tables] = WeakKeyDictionary()
"""Prepared once for parameters that are equal, and gone with them: a function of its key, so that nobody owns it."""


def _tables_of(params: SamplingParams) -> _Tables:
    tables = _tables.get(params)
    if tables is None:
        tables = _tables[params] = _Tables(params)
    return tables


def biased_ids(request: EngineRequest, token_ids: Ints) -> tuple[Ints, Floats]:
    """The ids whose logits are biased after this text, each once, and what is added."""
    if not request.sampling.sequence_bias:
        return NO_IDS, NO_WEIGHTS
    tables = _tables_of(request.sampling)
    phrases, last_ids = tables.biased.completed(token_ids)
    ids, places = np.unique(last_ids, return_inverse=True)
    sums = np.zeros(len(ids), dtype=np.float32)
    np.add.at(sums, places, tables.biases[phrases])
    return ids, sums


def banned_ids(request: EngineRequest, token_ids: Ints) -> Ints:
    """The ids that would repeat an n-gram, complete a bad word, or end the choice too early; repeats possible."""
    params, num_prompt_tokens = request.sampling, len(request.prompt_ids)
    parts = []
    if (size := params.no_repeat_ngram_size) > 0:
        parts.append(_repeating_ids(token_ids, token_ids, size))
    if (size := params.encoder_no_repeat_ngram_size) > 0:
        parts.append(_repeating_ids(token_ids[:num_prompt_tokens], token_ids, size))
    if params.bad_words_ids:
        parts.append(_bad_word_ends(request, token_ids))
    if len(token_ids) - num_prompt_tokens < request.min_new_tokens:
        parts.append(np.array(request.stop_token_ids, dtype=np.int32))
    return np.concatenate(parts) if parts else NO_IDS


def _repeating_ids(source: Ints, token_ids: Ints, size: int) -> Ints:
    """What completes an n-gram of `source` when it follows the last size - 1 of `token_ids`."""
    places = np.arange(size - 1, len(source))  # where an n-gram of the source ends
    for back in range(1, size):
        if not places.size:
            break
        places = places[source[places - back] == token_ids[-back]]
    return source[places]


def _bad_word_ends(request: EngineRequest, token_ids: Ints) -> Ints:
    phrases, last_ids = _tables_of(request.sampling).bad_words.completed(token_ids)
    words, stop_ids = request.sampling.bad_words_ids, request.stop_token_ids
    # A word that is one stop id alone is void: the choice could never end.
    is_lone_stop = np.isin(last_ids, stop_ids)
    if is_lone_stop.any():
        is_lone_stop &= [len(words[phrase]) == 1 for phrase in phrases]
    return last_ids[~is_lone_stop]


def forced_ids(request: EngineRequest, num_tokens: int) -> tuple[int, ...]:
    """The only ids that may follow a text of this many tokens; none where all may."""
    params = request.sampling
    if params.forced_eos_token_ids and num_tokens == len(request.prompt_ids) + request.max_new_tokens - 1:
        return params.forced_eos_token_ids
    if params.forced_bos_token_id is not None and num_tokens == 1:
        return (params.forced_bos_token_id,)
    return ()


def decay(request: EngineRequest, num_tokens: int) -> float:
    """What times their absolute value the stop ids' logits gain after this many tokens; finite in single precision."""
    if request.sampling.exponential_decay_length_penalty is None:
        return 0.0
    start, factor = request.sampling.exponential_decay_length_penalty
    num_steps = num_tokens - len(request.prompt_ids) - start
    if num_steps <= 0:
        return 0.0
    largest = float(np.finfo(np.float32).max)
    try:
        return min(factor**num_steps - 1.0, largest)
    except OverflowError:
        return largest


def suppressed_ids(request: EngineRequest, num_tokens: int) -> Ints:
    """The ids that cannot follow a text of this many tokens, forced or not; repeats possible."""
    params = request.sampling
    if not params.suppress_tokens and not params.begin_suppress_tokens:
        return NO_IDS
    tables = _tables_of(params)
    first = len(request.prompt_ids)
    if first == 1 and params.forced_bos_token_id is not None:
        first = 2  # the forced token does not count as the first
    if num_tokens == first:
        return np.concatenate([tables.suppressed, tables.begin_suppressed])
    return tables.suppressed

"""What beams and the rules about single ids may be: their limits, defaults and contradictions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec
import numpy as np

from gyrfalcon.engine.interface import BeamParams, EarlyStopping, SamplingParams
from gyrfalcon.errors import InvalidRequest, NotSupported
from gyrfalcon.service.interface import GenerateCall

MAX_BAD_WORDS = 1000
MAX_BIASED_PHRASES = 300
MAX_PHRASE_IDS = 64  # of one bad word, of one biased phrase
MAX_LISTED_IDS = 1000  # of a list of single ids
# Sums of as many biases as a request may have stay finite in single precision.
MAX_BIAS = 1e30
# Powers of a length by more than this are no numbers to divide scores by.
MAX_LENGTH_PENALTY = 10.0
MAX_DECAY_START = 2**31 - 1
STOPPING_MODES: dict[bool | str | None, EarlyStopping] = {
    None: EarlyStopping.FALSE,
    False: EarlyStopping.FALSE,
    True: EarlyStopping.TRUE,
    "never": EarlyStopping.NEVER,
}


def count_beams(call: GenerateCall, most: int) -> int:
    """How many beams the call searches with; 1 is no search."""
    beams = 1 if call.num_beams is None else call.num_beams
    if not 0 < beams <= most:
        raise InvalidRequest("num_beams", f"`num_beams` must be > 0 and <= {most}. Given: {beams}")
    return beams


def check_returned_beams(call: GenerateCall, num_beams: int) -> int:
    """How many of a search's sequences the call returns."""
    if call.best_of is not None and call.best_of > 1:
        raise InvalidRequest("best_of", f"`best_of` > 1 cannot go with `num_beams` > 1. Given: {call.best_of}")
    sequences = 1 if call.num_return_sequences is None else call.num_return_sequences
    if not 0 < sequences <= num_beams:
        raise InvalidRequest(
            "num_return_sequences",
            f"`num_return_sequences` must be > 0 and <= `num_beams`, which is {num_beams}. Given: {sequences}",
        )
    return sequences


def implies_sampling(call: GenerateCall) -> bool:
    """Whether a cut-off is set that has an effect on sampling only."""
    return call.do_sample is not False and any((call.min_p, call.epsilon_cutoff, call.eta_cutoff))


def beams_of(call: GenerateCall, *, num_beams: int, does_sample: bool) -> BeamParams | None:
    """The search that the call asks for, None with one beam."""
    mode = STOPPING_MODES.get(call.early_stopping)
    if mode is None:
        raise InvalidRequest(
            "early_stopping", f'`early_stopping` must be a boolean or "never". Given: {call.early_stopping!r:.50}'
        )
    length_penalty = 1.0 if call.length_penalty is None else call.length_penalty
    if not -MAX_LENGTH_PENALTY <= length_penalty <= MAX_LENGTH_PENALTY:
        raise InvalidRequest(
            "length_penalty",
            f"`length_penalty` must be >= -{MAX_LENGTH_PENALTY:g} and <= {MAX_LENGTH_PENALTY:g}. "
            f"Given: {length_penalty}",
        )
    if num_beams == 1:
        return None
    for name, is_asked in (("stop", bool(call.stop)), ("top_n", bool(call.top_n))):
        if is_asked:
            raise NotSupported(name, f"`{name}` cannot go with `num_beams` > 1: the search works on token ids alone")
    groups = 1 if call.num_beam_groups is None else call.num_beam_groups
    return BeamParams(
        num_beams=num_beams,
        num_beam_groups=groups,
        diversity_penalty=_diversity_penalty(call, num_beams, groups, does_sample=does_sample),
        length_penalty=length_penalty,
        early_stopping=mode,
        padding_id=call.pad_token_id,
    )


def with_rules(
    sampling: SamplingParams,
    call: GenerateCall,
    *,
    max_total_tokens: int,
    max_biased_phrases: int = MAX_BIASED_PHRASES,
    max_bad_words: int = MAX_BAD_WORDS,
) -> SamplingParams:
    """The sampling parameters with all that the call says of ids, of their repetition and of small probabilities."""
    encoder_penalty = 1.0
    if call.encoder_repetition_penalty is not None:
        encoder_penalty = check_positive("encoder_repetition_penalty", call.encoder_repetition_penalty)
        if not _as_single(1.0 / encoder_penalty) < float("inf"):  # which is multiplied by
            raise InvalidRequest(
                "encoder_repetition_penalty",
                "`encoder_repetition_penalty` must have an inverse that is finite in single precision. "
                f"Given: {encoder_penalty}",
            )
    return msgspec.structs.replace(
        sampling,
        sequence_bias=_sequence_bias(call, max_biased_phrases),
        encoder_repetition_penalty=encoder_penalty,
        no_repeat_ngram_size=_ngram_size(call.no_repeat_ngram_size, max_total_tokens),
        encoder_no_repeat_ngram_size=_ngram_size(call.encoder_no_repeat_ngram_size, max_total_tokens),
        bad_words_ids=_bad_words(call, max_bad_words),
        forced_bos_token_id=call.forced_bos_token_id,
        forced_eos_token_ids=_listed("forced_eos_token_id", call.forced_eos_token_id, least=1),
        remove_invalid_values=call.remove_invalid_values,
        exponential_decay_length_penalty=_decay(call),
        suppress_tokens=_listed("suppress_tokens", call.suppress_tokens),
        begin_suppress_tokens=_listed("begin_suppress_tokens", call.begin_suppress_tokens),
        min_p=_share(call, "min_p", call.min_p, may_be_one=True),
        epsilon_cutoff=_share(call, "epsilon_cutoff", call.epsilon_cutoff),
        eta_cutoff=_share(call, "eta_cutoff", call.eta_cutoff),
        renormalize_logits=call.renormalize_logits,
    )


def check_ids(call: GenerateCall, width: int) -> None:
    """Refuse ids that the model's logits do not have; `width` is how many they are."""
    for parameter, ids in _all_ids(call):
        check_ids_within(parameter, ids, width)
    first_id = call.forced_bos_token_id
    for parameter, only_ids in (
        ("forced_bos_token_id", () if first_id is None else (first_id,)),
        ("forced_eos_token_id", call.forced_eos_token_id),
    ):
        if only_ids and set(only_ids) <= set(call.suppress_tokens or ()):
            raise InvalidRequest(
                parameter, f"`{parameter}` forces what `suppress_tokens` rules out. Given: {only_ids[0]}"
            )


def check_ids_within(parameter: str, ids: Sequence[int], width: int) -> None:
    strange = next((id_ for id_ in ids if not 0 <= id_ < width), None)
    if strange is not None:
        raise InvalidRequest(parameter, f"`{parameter}` holds token id {strange}; the model's ids are 0 to {width - 1}")


def check_positive(name: str, value: float) -> float:
    """The value, which must be a positive number also as the float32 it is computed with."""
    if not value > 0.0:
        raise InvalidRequest(name, f"`{name}` must be strictly positive. Given: {value}")
    if not 0.0 < _as_single(value) < float("inf"):
        raise InvalidRequest(name, f"`{name}` must be strictly positive and finite in single precision. Given: {value}")
    return value


def _as_single(value: float) -> float:
    """The value in single precision, infinite or 0 where it is too large or too small for it."""
    with np.errstate(over="ignore", under="ignore"):
        return float(np.float32(value))


def _diversity_penalty(call: GenerateCall, num_beams: int, groups: int, *, does_sample: bool) -> float:
    """The penalty of a search in these many groups; whether they can be is judged too."""
    penalty = call.diversity_penalty or 0.0
    if groups < 1 or num_beams % groups:
        raise InvalidRequest(
            "num_beam_groups",
            f"`num_beam_groups` must divide `num_beams`, which is {num_beams}. Given: {groups}",
        )
    if groups == 1:
        if penalty:
            raise InvalidRequest(
                "diversity_penalty", f"`diversity_penalty` needs `num_beam_groups` > 1. Given: {penalty}"
            )
        return 0.0
    if does_sample:
        raise InvalidRequest(
            "num_beam_groups",
            f"`num_beam_groups` > 1 cannot go with sampling: set `do_sample` to false. Given: {groups}",
        )
    if not penalty > 0.0:
        raise InvalidRequest(
            "diversity_penalty",
            f"`diversity_penalty` must be strictly positive where `num_beam_groups` > 1. Given: {penalty}",
        )
    return check_positive("diversity_penalty", penalty)


def _ngram_size(size: int | None, max_total_tokens: int) -> int:
    """The size; 0 where no n-gram of it can come again, as none is so short or so long."""
    return size if size is not None and 0 < size <= max_total_tokens else 0


def _bad_words(call: GenerateCall, most: int) -> tuple[tuple[int, ...], ...]:
    """The words that have ids."""
    words = call.bad_words_ids
    if words is None:
        return ()
    _check_size("bad_words_ids", len(words), most, least=1)
    for word in words:
        _check_size("bad_words_ids", len(word), MAX_PHRASE_IDS, what="ids in an entry")
    return tuple(word for word in words if word)


def _sequence_bias(call: GenerateCall, most: int) -> tuple[tuple[tuple[int, ...], float], ...]:
    biases = call.sequence_bias
    if biases is None:
        return ()
    _check_size("sequence_bias", len(biases), most, least=1)
    for ids, bias in biases:
        _check_size("sequence_bias", len(ids), MAX_PHRASE_IDS, least=1, what="ids in an entry")
        if not -MAX_BIAS <= bias <= MAX_BIAS:
            raise InvalidRequest(
                "sequence_bias", f"`sequence_bias` may add -{MAX_BIAS:g} to {MAX_BIAS:g} to a logit. Given: {bias}"
            )
    return biases


def _decay(call: GenerateCall) -> tuple[int, float] | None:
    if call.exponential_decay_length_penalty is None:
        return None
    name = "exponential_decay_length_penalty"
    start, factor = call.exponential_decay_length_penalty
    if not 0 <= start <= MAX_DECAY_START:
        raise InvalidRequest(name, f"`{name}` must start at >= 0 and <= {MAX_DECAY_START} new tokens. Given: {start}")
    return start, check_positive(name, factor)


def _share(call: GenerateCall, name: str, value: float | None, *, may_be_one: bool = False) -> float:
    """A share of probability; not judged where an explicit greedy choice leaves it without effect."""
    if value is None or call.do_sample is False:
        return 0.0
    if not (0.0 <= value <= 1.0 and (may_be_one or _as_single(value) < 1.0)):
        raise InvalidRequest(name, f"`{name}` must be >= 0.0 and {'<=' if may_be_one else '<'} 1.0. Given: {value}")
    return value


def _listed(name: str, ids: tuple[int, ...] | None, *, least: int = 0) -> tuple[int, ...]:
    if ids is None:
        return ()
    _check_size(name, len(ids), MAX_LISTED_IDS, least=least, what="ids")
    return ids


def _check_size(name: str, size: int, most: int, *, least: int = 0, what: str = "entries") -> None:
    if not least <= size <= most:
        raise InvalidRequest(name, f"`{name}` must have {least} to {most} {what}. Given: {size}")


def _all_ids(call: GenerateCall) -> Iterator[tuple[str, Sequence[int]]]:
    """Every id that the call names, with the parameter it is in."""
    yield "stop_token_ids", call.stop_token_ids or ()
    yield "bad_words_ids", [id_ for word in call.bad_words_ids or () for id_ in word]
    yield "sequence_bias", [id_ for ids, _ in call.sequence_bias or () for id_ in ids]
    yield "suppress_tokens", call.suppress_tokens or ()
    yield "begin_suppress_tokens", call.begin_suppress_tokens or ()
    yield "forced_eos_token_id", call.forced_eos_token_id or ()
    for name, id_ in (("forced_bos_token_id", call.forced_bos_token_id), ("pad_token_id", call.pad_token_id)):
        yield name, () if id_ is None else (id_,)

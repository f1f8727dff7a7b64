"""The watermark's other half: whether a text carries it.

A text that does not know a key has each token green with probability gamma, so the number of green ones follows a
binomial distribution. A text marked with the key has more (Kirchenbauer et al. 2023, arXiv 2301.10226, section 3).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from gyrfalcon.engine.interface import WatermarkParams
from gyrfalcon.errors import InvalidRequest
from gyrfalcon.service.interface import DetectCall, Detection, KeyScore, ScoredToken, TokenPrompt
from gyrfalcon.service.tokenizer import TextTokenizer
from gyrfalcon.service.validation import check_encodable
from gyrfalcon.splitmix import MANTISSA_BITS, are_green, green_threshold

DEFAULT_ALPHA = 1e-4
MIN_ALPHA = 1e-100  # far above where doubles end, as it is divided by the number of keys
MAX_KEYS = 16
KEY_RANGE = 2**64
# What one call to a server may ask for; a file on the command line has no such limit.
MAX_CHARS = 200_000
MAX_IDS = 50_000


def detect(
    call: DetectCall, *, model: str, tokenizer: TextTokenizer, num_ids: int, settings: WatermarkParams
) -> Detection:
    """Score the text against every key. Raises InvalidRequest naming the parameter.

    num_ids: the model's ids are below it. settings: give the key and gamma where the call does not.
    """
    keys = _check_keys(call.keys) if call.keys is not None else (settings.key,)
    gamma = _check_gamma(settings.gamma if call.gamma is None else call.gamma)
    alpha = DEFAULT_ALPHA if call.alpha is None else call.alpha
    if not MIN_ALPHA <= alpha < 1.0:
        raise InvalidRequest("alpha", f"`alpha` must be >= {MIN_ALPHA:g} and < 1.0. Given: {alpha}")
    ids = _to_ids(call.text, ("text", "token_ids"), tokenizer, num_ids)
    # A prompt has the special tokens around it that it had when it was continued; a continuation has none.
    context = _to_ids(call.prompt, ("prompt", "prompt_token_ids"), tokenizer, num_ids, add_special_tokens=True)

    contexts, is_known = _contexts(ids, context, settings.context_width)
    is_scored = is_known & _are_first(contexts, ids) if call.ignore_repeated else is_known
    num_scored = int(is_scored.sum())
    reason = _too_short(num_scored, gamma, alpha, len(keys))
    scores = tuple(_score(key, gamma, alpha, len(keys), ids, contexts, is_known, is_scored, reason) for key in keys)
    return Detection(
        model=model,
        gamma=gamma,
        alpha=alpha,
        num_scored=num_scored,
        is_found=None if reason else any(score.is_found for score in scores),
        reason=reason,
        keys=scores,
        tokens=tuple(
            ScoredToken(id_, tokenizer.token_text(id_), scored)
            for id_, scored in zip(ids.tolist(), is_scored.tolist(), strict=True)
        ),
    )


def check_size(call: DetectCall) -> None:
    """Refuse what is too long for one call to a server."""
    for names, content in ((("text", "token_ids"), call.text), (("prompt", "prompt_token_ids"), call.prompt)):
        if isinstance(content, str) and len(content) > MAX_CHARS:
            raise InvalidRequest(
                names[0], f"`{names[0]}` may have {MAX_CHARS} characters. Given: {len(content)}; send it in parts"
            )
        if isinstance(content, TokenPrompt) and len(content.ids) > MAX_IDS:
            raise InvalidRequest(
                names[1], f"`{names[1]}` may have {MAX_IDS} token ids. Given: {len(content.ids)}; send it in parts"
            )


def z_score(num_green: int, num_scored: int, gamma: float) -> float:
    """Standard deviations by which the green tokens exceed the expected number; `num_scored` is above 0."""
    return (num_green - gamma * num_scored) / math.sqrt(num_scored * gamma * (1.0 - gamma))


def p_value(num_green: int, num_scored: int, gamma: float) -> float:
    """Chance of at least `num_green` successes in `num_scored` trials of probability gamma, summed exactly."""
    if num_green == 0:
        return 1.0
    if num_green > gamma * num_scored:
        return min(_tail_away_from_mean(num_green, num_scored, gamma), 1.0)
    # Below the mean this is nearly 1, and the other tail is the one whose terms fall from the first on.
    return 1.0 - min(_tail_away_from_mean(num_scored - num_green + 1, num_scored, 1.0 - gamma), 1.0)


def corrected(p: float, num_tests: int) -> float:
    """Chance that the smallest of `num_tests` independent p-values is at most p (Šidák 1967).

    For one text the colours under different keys are independent, so this is exact where p itself is.
    """
    return 1.0 if p >= 1.0 else -math.expm1(num_tests * math.log1p(-p))


def _check_keys(keys: Sequence[int]) -> tuple[int, ...]:
    # No message repeats a key: they are secrets, and messages are logged.
    if not 1 <= len(keys) <= MAX_KEYS:
        raise InvalidRequest("keys", f"`keys` may have 1 to {MAX_KEYS} entries. Given: {len(keys)}")
    for index, key in enumerate(keys):
        if not 0 <= key < KEY_RANGE:
            raise InvalidRequest("keys", f"`keys` must be >= 0 and below 2^64; entry {index} is not")
        if key in keys[:index]:
            raise InvalidRequest("keys", f"`keys` must differ; entry {index} is the same as entry {keys.index(key)}")
    return tuple(keys)


def _check_gamma(gamma: float) -> float:
    if not (0.0 < gamma < 1.0 and 0 < green_threshold(gamma) < 2**MANTISSA_BITS):
        raise InvalidRequest("gamma", f"`gamma` must be > 0.0 and < 1.0, also in single precision. Given: {gamma}")
    return gamma


def _to_ids(
    content: str | TokenPrompt | None,
    names: tuple[str, str],
    tokenizer: TextTokenizer,
    num_ids: int,
    *,
    add_special_tokens: bool = False,
) -> npt.NDArray[np.int64]:
    """The content's ids, judged. names: what messages call a text and a list of ids."""
    if content is None:
        return np.empty(0, dtype=np.int64)
    if isinstance(content, str):
        if not content:
            raise InvalidRequest(names[0], f"`{names[0]}` must not be empty")
        check_encodable(names[0], content)
        return np.array(tokenizer.encode(content, add_special_tokens=add_special_tokens), dtype=np.int64)
    if not content.ids:
        raise InvalidRequest(names[1], f"`{names[1]}` must not be empty")
    for index, id_ in enumerate(content.ids):
        if not 0 <= id_ < num_ids:
            raise InvalidRequest(
                names[1], f"`{names[1]}` holds {id_} at position {index}; the model's ids are 0 to {num_ids - 1}"
            )
    return np.array(content.ids, dtype=np.int64)


def _contexts(
    ids: npt.NDArray[np.int64], prompt: npt.NDArray[np.int64], width: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """The ids before each id, [N, width], the nearest first, -1 where there is none; and where that is all of them.

    With the prompt the text's beginning is known, so that a short context is a whole one.
    """
    whole = np.concatenate([np.full(width, -1), prompt[-width:], ids]).astype(np.int64)
    first = len(whole) - len(ids)
    contexts = np.stack([whole[first - back : len(whole) - back] for back in range(1, width + 1)], axis=1)
    is_known = np.asarray(contexts[:, 0] >= 0 if prompt.size else np.all(contexts >= 0, axis=1), dtype=np.bool_)
    return contexts, is_known


def _are_first(contexts: npt.NDArray[np.int64], ids: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Which ids come after their context for the first time.

    A token after the same tokens has the same colour each time: only the first time is it evidence, as trials of a
    binomial distribution are independent.
    """
    is_first = np.zeros(len(ids), dtype=np.bool_)
    if len(ids):
        _, places = np.unique(np.column_stack([contexts, ids]), axis=0, return_index=True)
        is_first[places] = True
    return is_first


def _too_short(num_scored: int, gamma: float, alpha: float, num_keys: int) -> str | None:
    """Why nothing can be decided: not even a text that is all green would be found."""
    single = -math.expm1(math.log1p(-alpha) / num_keys)
    needed = math.ceil(math.log(single) / math.log(gamma))
    if num_scored >= needed:
        return None
    return f"{num_scored} tokens can be scored; at this alpha, gamma and number of keys it takes {needed}"


def _score(
    key: int,
    gamma: float,
    alpha: float,
    num_keys: int,
    ids: npt.NDArray[np.int64],
    contexts: npt.NDArray[np.int64],
    is_known: npt.NDArray[np.bool_],
    is_scored: npt.NDArray[np.bool_],
    reason: str | None,
) -> KeyScore:
    is_green = are_green(key, gamma, contexts, ids)
    num_green, num_scored = int((is_green & is_scored).sum()), int(is_scored.sum())
    p = p_value(num_green, num_scored, gamma) if num_scored else 1.0
    corrected_p = corrected(p, num_keys)
    return KeyScore(
        num_green=num_green,
        green_fraction=num_green / num_scored if num_scored else None,
        z_score=z_score(num_green, num_scored, gamma) if num_scored else None,
        p_value=p,
        corrected_p_value=corrected_p,
        is_found=None if reason else corrected_p <= alpha,
        green=tuple(
            green if known else None for green, known in zip(is_green.tolist(), is_known.tolist(), strict=True)
        ),
    )


def _tail_away_from_mean(first: int, trials: int, probability: float) -> float:
    """P(X >= first) of a binomial X whose mean is below `first`: terms fall, so the sum ends when they no longer count.

    P(X >= first) = sum over k >= first of C(n, k) p^k (1-p)^(n-k), each term a ratio times the one before.
    """
    log_term = (
        math.lgamma(trials + 1)
        - math.lgamma(first + 1)
        - math.lgamma(trials - first + 1)
        + first * math.log(probability)
        + (trials - first) * math.log1p(-probability)
    )
    odds = probability / (1.0 - probability)
    term = total = 1.0
    for successes in range(first, trials):
        term *= odds * (trials - successes) / (successes + 1)
        total += term
        if term < total * 1e-17:
            break
    return math.exp(log_term + math.log(total))

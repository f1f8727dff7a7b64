"""How much may run beside sequences that decode, so that they wait at most about twice as long for their next token."""

from __future__ import annotations

MOST_SLOWDOWN = 2.0
"""Of a step with other work in it over one without."""

_AIM = 1.8  # below it by what single steps vary, and later chunks of a prompt take longer
_MOST_CHANGE = 2.0  # of the allowance by one step, up or down, before it is weighted
_WEIGHT_OF_NEWEST = 0.2
_WEIGHT_OF_TOO_LONG = 0.6


class Pace:
    """The allowance in tokens, on top of one for each sequence that decodes, learnt from how long steps take.

    What reading the weights costs beside a token's arithmetic differs by a factor of ten between models, so no
    constant fits all. It only decides how prompts are cut into chunks, which no answer depends on.
    """

    def __init__(self, first_tokens: int, most_tokens: int) -> None:
        """first_tokens: where learning begins; never fewer than half of them in a step, nor more than `most_tokens`."""
        self._least = max(first_tokens / 2, 1.0)
        self._most = float(max(most_tokens, first_tokens))
        self._allowance = float(first_tokens)
        # Steps with nothing but decoding: what they took lately, for how many sequences. 0: there was none.
        self._known_s = 0.0
        self._known_num = 0.0
        self._token_s = 0.0  # what each token more adds

    def num_tokens(self, num_decoding: int) -> int:
        """Those that may run beside so many sequences."""
        return int(self._allowed(num_decoding))

    def calm_s(self, num_decoding: int) -> float | None:
        """What a step takes that does nothing but decode so many sequences, at least 1; None as long as there was none.

        Above 0. From the steps there were lately: as long, and longer or shorter by what tokens add, but never shorter
        than in proportion.
        """
        if self._known_s == 0:
            return None
        by_token_s = self._known_s + (num_decoding - self._known_num) * self._token_s
        return max(by_token_s, self._known_s * min(1.0, num_decoding / self._known_num))

    def begin(self, calm_s: float, token_s: float) -> None:
        """Start from what was measured before anyone came: a step of one token, and what each further one adds.

        The first requests often come together: no step of theirs is calm until all their prompts have run. How long it
        would take with as many streams as there are by then is known from here.
        """
        if calm_s > 0:
            self._known_s, self._known_num, self._token_s = calm_s, 1.0, max(token_s, 0.0)
            worth = (_AIM - 1) * calm_s / token_s if token_s > 0 else self._most
            self._allowance = min(max(worth, self._least), self._most)

    def observe(self, num_decoding: int, num_others: int, step_s: float) -> None:
        """Learn from a step. num_others: its tokens besides one for each of the `num_decoding` sequences."""
        if num_decoding == 0 or step_s <= 0:
            return
        calm_s = self.calm_s(num_decoding)
        if num_others == 0:
            weight = 1.0 if calm_s is None else _WEIGHT_OF_NEWEST
            self._known_s += weight * (step_s - self._known_s)
            self._known_num += weight * (num_decoding - self._known_num)
        elif calm_s is not None and num_others >= self.num_tokens(num_decoding):
            num_more = num_decoding + num_others - self._known_num
            if num_more > 0:
                token_s = max(0.0, step_s - self._known_s) / num_more
                self._token_s += _WEIGHT_OF_NEWEST * (token_s - self._token_s)
            # What as many tokens as are allowed would have added, were a step's time in proportion to them.
            allowed = self._allowed(num_decoding)
            excess = max(step_s / calm_s - 1, 0.0) * allowed / num_others
            change = (_AIM - 1) / excess if excess > 0 else _MOST_CHANGE
            change = min(max(change, 1 / _MOST_CHANGE), _MOST_CHANGE)
            # Weighted as a factor: steps that were as much too long as others too short cancel out.
            weight = _WEIGHT_OF_TOO_LONG if excess > MOST_SLOWDOWN - 1 else _WEIGHT_OF_NEWEST
            self._allowance = min(self._most, max(self._least, allowed * change**weight) - num_decoding)

    def _allowed(self, num_decoding: int) -> float:
        return max(self._least, self._allowance + num_decoding)

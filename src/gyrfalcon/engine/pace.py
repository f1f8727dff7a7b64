"""How much may run beside sequences that decode, so that they wait at most about twice as long for their next token."""

from __future__ import annotations

MOST_SLOWDOWN = 2.0
"""Of a step with other work in it over one without."""

_CAUTION = 0.9
_GROWTH, _SHRINKAGE = 1.25, 0.8
_WEIGHT_OF_NEWEST = 0.2


class Pace:
    """The allowance in tokens, on top of one for each sequence that decodes; learnt from how long steps take.

    What reading the weights costs beside a token's arithmetic differs by a factor of ten between models, so no
    constant fits all. It only decides how prompts are cut into chunks, which no answer depends on.
    """

    def __init__(self, least_tokens: int, most_tokens: int) -> None:
        """least_tokens: where learning begins, and never fewer."""
        self._least = float(least_tokens)
        self._most = float(max(most_tokens, least_tokens))
        self._allowance = self._least
        self._calm_s: float | None = None  # a step with nothing but decoding

    @property
    def num_tokens(self) -> int:
        return int(self._allowance)

    @property
    def calm_s(self) -> float | None:
        """What a step with nothing but decoding takes; None as long as there was none."""
        return self._calm_s

    def begin(self, calm_s: float, token_s: float) -> None:
        """Start from what was measured before anyone came: a step of one token, and what each further one adds.

        The first requests often come together: no step of theirs is calm until all their prompts have run.
        """
        if calm_s > 0:
            self._calm_s = calm_s
            worth = (MOST_SLOWDOWN - 1) * calm_s / token_s if token_s > 0 else self._most
            self._allowance = min(max(worth, self._least), self._most)

    def observe(self, num_decoding: int, num_others: int, step_s: float) -> None:
        """Learn from a step. num_others: its tokens besides one for each of the `num_decoding` sequences."""
        if num_decoding == 0 or step_s <= 0:
            return
        if num_others == 0:
            calm_s = step_s if self._calm_s is None else self._calm_s
            self._calm_s = calm_s + _WEIGHT_OF_NEWEST * (step_s - calm_s)
        elif self._calm_s is not None and num_others >= self.num_tokens + num_decoding:
            slowdown = step_s / self._calm_s
            if slowdown > MOST_SLOWDOWN:
                self._allowance = max(self._least, self._allowance * _SHRINKAGE)
            elif slowdown < MOST_SLOWDOWN * _CAUTION:
                self._allowance = min(self._most, self._allowance * _GROWTH)

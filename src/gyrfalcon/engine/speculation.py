"""Prompt-lookup speculation: a draft of a sequence's next tokens, taken from its own text.

What followed the text's last tokens when they stood there before is run along with the newest token. The draws decide
as always: where one is the draft's token, the draw after it is valid too, and a step has produced more than one token.
"""

from __future__ import annotations

import math

import numpy as np

from gyrfalcon.runner.interface import Ints

NGRAM_SIZES = (3, 2)
"""Tokens that must stand there again; more of them make a guess right more often, so they are looked up first."""

FIRST_CHANCE = 0.25
"""A guess's chance of being right before the text has shown it."""

LEARNING_RATE = 0.2
"""Weight of the newest guess in that chance."""

MOST_CHANCE = 0.98

_ID_BITS = 21  # three ids make one key of 63 bits; ids beyond would share keys, which costs speed alone
_MASKS = {size: (1 << size * _ID_BITS) - 1 for size in NGRAM_SIZES}


class NgramIndex:
    """Where each n-gram of a text was last followed by a token: for each size its places by key."""

    def __init__(self, token_ids: Ints) -> None:
        self.num_tokens = len(token_ids)
        self.last_ids: list[int] = token_ids[-max(NGRAM_SIZES) :].tolist()
        ids = token_ids.astype(np.int64)
        self.places: dict[int, dict[int, int]] = {}
        for size in NGRAM_SIZES:
            count = max(len(ids) - size, 0)
            keys = np.zeros(count, dtype=np.int64)
            for offset in range(size):
                keys = (keys << _ID_BITS) | ids[offset : offset + count]
            self.places[size] = dict(zip(keys.tolist(), range(size, len(ids)), strict=True))


class Drafter:
    """Guesses how one sequence goes on, and keeps count of how often it is right.

    Every token is guessed, whether or not a draft is run: how likely the next guess is to be right is known before it
    costs anything. All of it depends on the text alone, and takes a few microseconds a token.
    """

    def __init__(self, prompt: NgramIndex) -> None:
        """prompt: only read, so the choices of a request share it."""
        self._prompt = prompt.places
        self._generated: dict[int, dict[int, int]] = {size: {} for size in NGRAM_SIZES}  # a generated token followed
        self._num_seen = prompt.num_tokens
        self._tail = 0  # the last ids, as many as the largest key has
        for token_id in prompt.last_ids:
            self._tail = (self._tail << _ID_BITS) | token_id
        self._chances = dict.fromkeys(NGRAM_SIZES, FIRST_CHANCE)
        self._guess = self._look_up()

    def length_worth(self, token_ids: Ints, least_chance: float) -> int:
        """How many tokens of a draft have at least that chance of being right, all together.

        token_ids: all of the text; it only grows from call to call.
        """
        for token_id in token_ids[self._num_seen :].tolist():
            self._learn(token_ids, token_id)
        if self._guess is None or least_chance >= 1.0:
            return 0
        chance = min(self._chances[self._guess[0]], MOST_CHANCE)
        return int(math.log(least_chance) / math.log(chance)) if chance >= least_chance else 0

    def draft(self, token_ids: Ints, length: int) -> Ints:
        """So many tokens that may follow the text, which `length_worth` has seen and found a draft for."""
        assert self._guess is not None
        # Beyond its end the text is taken to go on repeating what it then repeats.
        return np.resize(token_ids[self._guess[1] :], length)

    def _learn(self, token_ids: Ints, token_id: int) -> None:
        """Take in the text's next token: was it the one guessed, and what does it follow?"""
        if self._guess is not None:
            size, place = self._guess
            self._chances[size] += LEARNING_RATE * ((int(token_ids[place]) == token_id) - self._chances[size])
        for size, mask in _MASKS.items():
            if size <= self._num_seen:
                self._generated[size][self._tail & mask] = self._num_seen
        self._num_seen += 1
        self._tail = (self._tail << _ID_BITS | token_id) & _MASKS[max(NGRAM_SIZES)]
        self._guess = self._look_up()

    def _look_up(self) -> tuple[int, int] | None:
        """The size of the n-gram at the text's end that stood there before, and the place after it."""
        for size, mask in _MASKS.items():
            if size <= self._num_seen:
                key = self._tail & mask
                place = self._generated[size].get(key) or self._prompt[size].get(key)
                if place is not None:
                    return size, place
        return None


def least_chance(num_rows: int, num_tokens: int, step_cost_tokens: int) -> float:
    """The chance from which on a drafted token is worth running in a step.

    num_rows: sequences that draw a token in it. num_tokens: it runs without drafts. step_cost_tokens: running no
    token at all would cost as much as this many. A step then costs `step_cost_tokens + num_tokens` and yields
    `num_rows`; one token more is worth its cost when it yields more than that quotient.
    """
    return num_rows / (step_cost_tokens + num_tokens)

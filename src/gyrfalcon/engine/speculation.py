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


class NgramIndex:
    """Where each n-gram of a text was last followed by a token."""

    def __init__(self, token_ids: Ints) -> None:
        ids = token_ids.astype(np.int64)
        self._places: dict[int, dict[int, int]] = {}
        for size in NGRAM_SIZES:
            count = max(len(ids) - size, 0)
            keys = np.zeros(count, dtype=np.int64)
            for offset in range(size):
                keys = (keys << _ID_BITS) | ids[offset : offset + count]
            self._places[size] = dict(zip(keys.tolist(), range(size, len(ids)), strict=True))

    def add(self, size: int, key: int, place: int) -> None:
        """The n-gram ends right before `place`."""
        self._places[size][key] = place

    def find(self, size: int, key: int) -> int | None:
        return self._places[size].get(key)


class Drafter:
    """Guesses how one sequence goes on, and keeps count of how often it is right.

    Every token is guessed, whether or not the guess is run: how likely the next guess is to be right is known before
    it costs anything. All of it depends on the text alone.
    """

    def __init__(self, prompt: NgramIndex, prompt_ids: Ints) -> None:
        """prompt: the index of `prompt_ids`; only read, so the choices of a request share it."""
        self._prompt = prompt
        self._generated = NgramIndex(prompt_ids[:0])  # n-grams that a generated token followed
        self._num_seen = len(prompt_ids)
        self._last_ids = prompt_ids[-max(NGRAM_SIZES) :].tolist()
        self._chances = dict.fromkeys(NGRAM_SIZES, FIRST_CHANCE)
        self._guess = self._look_up()

    def draft(self, token_ids: Ints, most: int, least_chance: float) -> Ints:
        """What may follow the text: up to `most` tokens, as long as all of them together have this chance at least.

        token_ids: all of the text; it only grows from call to call.
        """
        for token_id in token_ids[self._num_seen :].tolist():
            self._learn(token_ids, token_id)
        if self._guess is None:
            return token_ids[:0]
        size, place = self._guess
        # Beyond its end the text is taken to go on repeating what it then repeats.
        return np.resize(token_ids[place:], min(most, _length_worth(self._chances[size], least_chance)))

    def _learn(self, token_ids: Ints, token_id: int) -> None:
        if self._guess is not None:
            size, place = self._guess
            was_right = int(token_ids[place]) == token_id
            self._chances[size] += LEARNING_RATE * (was_right - self._chances[size])
        for size, key in self._keys():
            self._generated.add(size, key, self._num_seen)
        self._num_seen += 1
        self._last_ids = [*self._last_ids, token_id][-max(NGRAM_SIZES) :]
        self._guess = self._look_up()

    def _look_up(self) -> tuple[int, int] | None:
        """The size of the n-gram at the text's end that stood there before, and the place after it."""
        for size, key in self._keys():
            place = self._generated.find(size, key)
            if place is None:
                place = self._prompt.find(size, key)
            if place is not None:
                return size, place
        return None

    def _keys(self) -> list[tuple[int, int]]:
        """The n-grams at the text's end: size and key."""
        keys = []
        for size in NGRAM_SIZES:
            if len(self._last_ids) >= size:
                key = 0
                for token_id in self._last_ids[-size:]:
                    key = (key << _ID_BITS) | token_id
                keys.append((size, key))
        return keys


def least_chance(num_rows: int, num_tokens: int, step_cost_tokens: int) -> float:
    """The chance from which on a drafted token is worth running in a step.

    num_rows: sequences that draw a token in it. num_tokens: it runs without drafts. step_cost_tokens: running no
    token at all would cost as much as this many. A step then costs `step_cost_tokens + num_tokens` and yields
    `num_rows`; one token more is worth its cost when it yields more than that quotient.
    """
    return num_rows / (step_cost_tokens + num_tokens)


def _length_worth(chance: float, least: float) -> int:
    """The largest n with chance**n >= least, where each token's guess is right with `chance`; least > 0."""
    if least > 1.0:
        return 0
    return int(math.log(least) / math.log(min(max(chance, 1e-6), MOST_CHANCE)))

"""A choice's token ids to text, token by token, and the stop strings found in that text.

Two rules hold for every choice. The texts of its tokens that are not special join to its text. A stop string ends
the choice at the token that completes it; the text is cut right after it, and so is that token's.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from gyrfalcon.service.tokenizer import REPLACEMENT, TextTokenizer

CONTEXT_TOKENS = 5  # tokens to the left that decide about spaces and joints
LONG_WINDOW = 24  # tokens decoded at once before the window is moved on ...
LONGEST_WINDOW = 96  # ... and where it is moved even amid an incomplete character


class Decoder(Protocol):
    """Decodes a growing list of ids, giving each character with the token that completes it.

    A token that ends inside a character yields the complete characters before it; what stays incomplete at the end
    belongs to no token's text.
    """

    def push(self, token_id: int) -> str:
        """The text that this token completes."""
        ...


def incremental_decoder(tokenizer: TextTokenizer, prompt_ids: Sequence[int]) -> Decoder:
    """The decoder of what follows a prompt."""
    kind = ByteDecoder if tokenizer.is_byte_level else WindowDecoder
    return kind(tokenizer, prompt_ids)


class ByteDecoder:
    """For tokens that are bytes: their text depends on no neighbour but for characters that span several."""

    def __init__(self, tokenizer: TextTokenizer, prompt_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._incomplete = b""  # the first bytes of a character
        self._invalid = ""  # replacements of bytes that are none, shown once something follows
        for token_id in prompt_ids[-CONTEXT_TOKENS:]:
            self._decode(tokenizer.token_piece(token_id).raw)

    def push(self, token_id: int) -> str:
        piece = self._tokenizer.token_piece(token_id)
        if piece.is_special:
            # It ends whatever character was incomplete.
            self._incomplete, self._invalid = b"", ""
            return piece.text or ""
        if piece.text is not None and not self._incomplete and not self._invalid:
            return piece.text
        return self._decode(piece.raw)

    def _decode(self, raw: bytes) -> str:
        raw = self._incomplete + raw
        new, num_used = codecs.utf_8_decode(raw, "replace", False)
        self._incomplete = raw[num_used:]
        text = self._invalid + new
        given = text.rstrip(REPLACEMENT)
        self._invalid = text[len(given) :]
        return given


class WindowDecoder:
    """For any tokenizer: decodes the last few tokens again and again, and gives what has been added."""

    def __init__(self, tokenizer: TextTokenizer, prompt_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._window = list(prompt_ids[-CONTEXT_TOKENS:])
        self._given = len(self._complete(tokenizer.decode(self._window)))  # characters of the window's text

    def push(self, token_id: int) -> str:
        if self._tokenizer.is_special(token_id):
            return self._push_special(token_id)
        self._window.append(token_id)
        text = self._tokenizer.decode(self._window)
        complete = self._complete(text)
        new = complete[self._given :]
        self._given = max(self._given, len(complete))
        ends_clean = len(complete) == len(text)
        if len(self._window) >= (LONG_WINDOW if ends_clean else LONGEST_WINDOW):
            self._window = self._window[-CONTEXT_TOKENS:]
            self._given = len(self._complete(self._tokenizer.decode(self._window)))
        return new

    def _push_special(self, token_id: int) -> str:
        # A special token ends whatever character was incomplete, and is the left context of what follows.
        text = self._tokenizer.special_text(token_id)
        self._window = [token_id]
        self._given = len(self._complete(self._tokenizer.decode(self._window)))
        return text

    @staticmethod
    def _complete(text: str) -> str:
        return text.rstrip(REPLACEMENT)


class StopFinder:
    """Finds the first stop string to be completed in a text that arrives in pieces, special tokens included."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._longest = max((len(text) for text in self._stop), default=0)
        self._tail = ""  # what a stop string may have begun in: shorter than the longest one

    def push(self, piece: str) -> int | None:
        """How much of the piece belongs to the text: its characters up to the end of the stop string that ends
        first, or None while no stop string is complete. An empty stop string is complete at once.
        """
        text = self._tail + piece
        num_old = len(self._tail)
        ends = []
        for stop in self._stop:
            # A match must end in the new piece; one that ended earlier would have ended the choice.
            found = text.find(stop, max(num_old - len(stop) + 1, 0)) if stop else len(text)
            if found >= 0:
                ends.append(found + len(stop))
        if ends:
            return min(ends) - num_old
        self._tail = text[-(self._longest - 1) :] if self._longest > 1 else ""
        return None


class Piece(NamedTuple):
    """One token's text, and whether it completes a stop string."""

    text: str
    is_special: bool
    is_stop: bool


class Detokenizer:
    """One choice's text."""

    def __init__(self, tokenizer: TextTokenizer, prompt_ids: Sequence[int], stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._decoder = incremental_decoder(tokenizer, prompt_ids)
        self._stop = StopFinder(stop) if stop else None
        self._pieces: list[str] = []

    @property
    def text(self) -> str:
        """The text so far, special tokens left out."""
        return "".join(self._pieces)

    def push(self, token_id: int) -> Piece:
        """The text of the choice's next token."""
        text = self._decoder.push(token_id)
        is_special = self._tokenizer.is_special(token_id)
        kept = None if self._stop is None else self._stop.push(text)
        if not is_special:
            if kept is not None:
                text = text[:kept]
            self._pieces.append(text)
        return Piece(text, is_special, kept is not None)

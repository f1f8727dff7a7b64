"""Valid inputs changed at random: most of what a parser does is behind its first checks."""

from __future__ import annotations

import random


def mutated(data: bytes, num_changes: int, tokens: tuple[bytes, ...], chance: random.Random) -> bytes:
    """The bytes with a few of them replaced, left out, repeated or cut off, or a token put in."""
    changed = bytearray(data)
    for _ in range(num_changes):
        at = chance.randrange(len(changed) + 1)
        match chance.randrange(5 if tokens else 4):
            case 0:
                changed[at : at + 1] = bytes([chance.randrange(256)])
            case 1:
                del changed[at : at + chance.randrange(1, 20)]
            case 2:
                changed[at:at] = changed[at : at + chance.randrange(1, 50)] * chance.randrange(1, 10)
            case 3:
                del changed[at:]
            case _:
                changed[at:at] = chance.choice(tokens)
    return bytes(changed)

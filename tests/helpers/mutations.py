"""Changed files: what a transfer, a disk or an enemy makes of a file."""

from __future__ import annotations

import random
import re
import struct

__all__ = ["mutated"]

NUMBERS = (0, 1, -1, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1, 10**30, 4.7, 1e308)
WORDS = (
    "null",
    "true",
    '""',
    '"F33"',
    '"U8"',
    "[]",
    "{}",
    "[[[[0]]]]",
    '"\\ud800"',
    '"../x"',
    "NaN",
    "-0",
    "[" * 5000,
)


def mutated(data: bytes, choose: random.Random) -> bytes:
    """Return a changed copy: one to three changes of bytes, of lengths, or of values in text."""
    for _ in range(choose.randint(1, 3)):
        data = choose.choice(CHANGES)(data, choose)
    return data


def _flip(data: bytes, choose: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(choose.choice((1, 2, 16))):
        if changed:
            # Headers and tables are at the ends.
            near = min(len(changed), choose.choice((16, 256, len(changed))))
            at = choose.randrange(near)
            changed[at if choose.random() < 0.6 else -1 - at] = choose.randrange(256)
    return bytes(changed)


def _cut(data: bytes, choose: random.Random) -> bytes:
    return data[: choose.randint(0, len(data))]


def _grow(data: bytes, choose: random.Random) -> bytes:
    return data + choose.randbytes(choose.choice((1, 8, 100)))


def _remove(data: bytes, choose: random.Random) -> bytes:
    begin = choose.randint(0, len(data))
    return data[:begin] + data[begin + choose.choice((1, 8, 50)) :]


def _repeat(data: bytes, choose: random.Random) -> bytes:
    begin = choose.randint(0, len(data))
    end = begin + choose.choice((1, 8, 50))
    return data[:end] + data[begin:]


def _length(data: bytes, choose: random.Random) -> bytes:
    return struct.pack("<Q", choose.choice((0, 1, len(data), 10**8, 2**63, 2**64 - 1))) + data[8:]


def _number(data: bytes, choose: random.Random) -> bytes:
    return _replaced(data, rb"\d+", str(choose.choice(NUMBERS)).encode(), choose)


def _value(data: bytes, choose: random.Random) -> bytes:
    pattern = choose.choice((rb'"[^"]*"', rb"\[[^\[\]]*\]", rb"\d+", rb"\{[^{}]*\}"))
    return _replaced(data, pattern, choose.choice(WORDS).encode(), choose)


def _swap(data: bytes, choose: random.Random) -> bytes:
    found = [m.group() for m in re.finditer(rb'"[^"]*"', data)]
    return _replaced(data, rb'"[^"]*"', choose.choice(found), choose) if found else data


def _replaced(data: bytes, pattern: bytes, by: bytes, choose: random.Random) -> bytes:
    """One match replaced; the length before a safetensors header follows, so that the change is not found by it alone."""
    found = list(re.finditer(pattern, data))
    if not found:
        return data
    match = choose.choice(found)
    changed = data[: match.start()] + by + data[match.end() :]
    length = int.from_bytes(data[:8], "little")
    if match.start() >= 8 and match.end() <= 8 + length < len(data):
        changed = (length + len(by) - (match.end() - match.start())).to_bytes(8, "little") + changed[8:]
    return changed


CHANGES = (_flip, _cut, _grow, _remove, _repeat, _length, _number, _value, _swap)

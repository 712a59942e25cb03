"""Changes of valid inputs, drawn from a generator: of bytes, of tables, and of trees of plain values."""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

WHOLE = (
    0,
    1,
    -1,
    2,
    127,
    128,
    255,
    256,
    32767,
    65535,
    65536,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**32,
    2**63 - 1,
    2**63,
    2**64,
)
"""Numbers at the limits of integer types."""
TEXTS = (
    "", " ", "0", "-1", "1e309", "nan", "inf", "null", "true", "~", "auto", "a" * 300, "é", "日本", "\u202e", "\0",
    "\n",
    "\r", "\ud800", "\udcff", "../../x", "/etc/passwd", "/dev/stdin", "/proc/self/mem", "~root", "-", "--help", "a=b",
    "a.b.c",
    "%s%n", "{0}", "<script>", '"', "'", ",", ";", "\\", "{{7*7}}", "[bold]", "[/]", "http://127.0.0.1:9/x", "file:///etc/passwd",
    "9" * 400, "9" * 5000, "1_000", "٣", "²", "0x10", "1.5",
)  # fmt: skip
"""Texts that have a meaning somewhere."""
FLOATS = (0.0, -0.0, 0.5, -1.0, 1e-320, 1e308, math.nan, math.inf, -math.inf, 1.0 + 2**-52)
NUMBER = re.compile(rb"-?\d+(?:\.\d+)?")


def bytes_like(rng: Random, size: int) -> bytes:
    """Return random bytes, sometimes of one value or of text alone."""
    kind = rng.random()
    if kind < 0.2:
        return bytes([rng.randrange(256)]) * size
    if kind < 0.5:
        return bytes(rng.choices(b" \t\n,:;{}[]()\"'-+.0123456789abcdefnrtuxPK", k=size))
    return rng.randbytes(size)


def mutate(rng: Random, data: bytes, others: Sequence[bytes] = (), tokens: Sequence[bytes] = ()) -> bytes:
    """Return bytes with one to eight random changes, mostly few.

    Args:
        rng: the generator.
        data: what is changed.
        others: inputs of the same kind, of which parts are taken.
        tokens: words that have a meaning in this kind of input.
    """
    if rng.random() < 0.01:
        return bytes_like(rng, rng.choice((0, 1, 7, 64, 700)))
    changed = bytearray(data)
    for _ in range(min(8, 1 + int(rng.expovariate(0.8)))):
        rng.choice(_CHANGES)(rng, changed, others, tokens)
    return bytes(changed)


def _place(rng: Random, data: bytearray) -> int:
    """Return a place in the data; the first and last bytes, which headers and directories take, come up more often."""
    if not data:
        return 0
    kind, size = rng.random(), len(data)
    if kind < 0.25:
        return rng.randrange(min(size, 64))
    if kind < 0.4:
        return size - 1 - rng.randrange(min(size, 128))
    return rng.randrange(size)


def _flip(rng: Random, data: bytearray, others: Sequence[bytes], tokens: Sequence[bytes]) -> None:
    if data:
        data[_place(rng, data)] ^= 1 << rng.randrange(8)


def _byte(rng: Random, data: bytearray, others: Sequence[bytes], tokens: Sequence[bytes]) -> None:
    if data:
        data[_place(rng, data)] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))


def _number(rng: Random, data: bytearray, others: Sequence[bytes], tokens: Sequence[bytes]) -> None:
    """Overwrite 2, 4 or 8 bytes with a number at a limit, or one near the size of the data."""
    width = rng.choice((2, 4, 8))
    at = _place(rng, data)
    value = rng.choice((*WHOLE, len(data), len(data) - 1, at)) % (1 << 8 * width)
    order = ">" if rng.random() < 0.5 else "<"
    data[at : at + width] = struct.pack(f"{order}{ {2: 'H', 4: 'I', 8: 'Q'}[width] }", value)


def _insert(rng: Random, data: bytearray, others: Sequence[bytes], tokens: Sequence[bytes]) -> None:
    at = _place(rng, data)
    data[at:at] = bytes_like(rng, rng.choice((1, 2, 4, 16, 100)))


def _remove(rng: Random, data: bytearray, others: Sequence[bytes], tokens: Sequence[bytes]) -> None:
    at = _place(rng, data)
    del data[at : at + rng.choice((1, 1, 2, 4, 8, 64, 1000))]


def _repeat(rng: Random, data: bytearray, others: Sequence[bytes], tokens: Sequence[bytes]) -> None:
    at = _place(rng, data)
    data[at:at] = bytes(data[at : at + rng.choice((1, 4, 16, 64))]) * rng.choice((1, 1, 2, 50))


def _cut(rng: Random, data: bytearray, others: Sequence[bytes], tokens: Sequence[bytes]) -> None:
    del data[_place(rng, data) :]


def _splice(rng: Random, data: bytearray, others: Sequence[bytes], tokens: Sequence[bytes]) -> None:
    """Go on with the end of another input, or take a part of one."""
    other = rng.choice(others) if others else bytes(data)
    start, at = rng.randrange(len(other) + 1), _place(rng, data)
    if rng.random() < 0.5:
        data[at:] = other[start:]
    else:
        part = other[start : start + rng.choice((4, 16, 64, 256))]
        data[at : at + len(part)] = part


def _token(rng: Random, data: bytearray, others: Sequence[bytes], tokens: Sequence[bytes]) -> None:
    token = rng.choice(tokens) if tokens else rng.choice(TEXTS).encode("utf-8", "surrogatepass")
    at = _place(rng, data)
    data[at : at + (len(token) if rng.random() < 0.5 else 0)] = token


def _digits(rng: Random, data: bytearray, others: Sequence[bytes], tokens: Sequence[bytes]) -> None:
    """Replace a number that is written in digits."""
    found = list(NUMBER.finditer(bytes(data[:20_000])))
    if found:
        match = rng.choice(found)
        value = rng.choice((*WHOLE, *FLOATS, 10**30, "9" * 5000, ""))
        data[match.start() : match.end()] = str(value).encode()


_Change = Callable[[Random, bytearray, Sequence[bytes], Sequence[bytes]], None]
_CHANGES: tuple[_Change, ...] = (
    *(_flip, _flip, _byte, _byte, _number, _number),
    *(_insert, _remove, _repeat, _cut, _splice, _token, _token, _digits),
)


# -- trees of plain values ---------------------------------------------------------------------------------------------


def value_of(rng: Random, depth: int = 0) -> Any:
    """Return a random plain value: JSON can hold it, but for numbers that are not finite."""
    kind = rng.random()
    if kind < 0.1:
        return None
    if kind < 0.2:
        return rng.random() < 0.5
    if kind < 0.4:
        return rng.choice((*WHOLE, 10**30, rng.randrange(-1000, 1000)))
    if kind < 0.5:
        return rng.choice((*FLOATS, rng.random()))
    if kind < 0.75 or depth > 3:
        return rng.choice(TEXTS)
    if kind < 0.88:
        return [value_of(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {rng.choice(TEXTS): value_of(rng, depth + 1) for _ in range(rng.randrange(4))}


def deep(rng: Random) -> Any:
    """Return lists or mappings nested beyond the limit of recursion."""
    value: Any = 1
    mapping = rng.random() < 0.5
    for _ in range(rng.choice((50, 200, 3000))):
        value = {"a": value} if mapping else [value]
    return value


def change_tree(rng: Random, tree: Any, others: Sequence[Any] = ()) -> Any:
    """Return a copy of a tree of plain values with one to six changes.

    Args:
        rng: the generator.
        tree: what is changed; it stays as it is.
        others: values that may take the place of one, beside random ones.
    """
    for _ in range(min(6, 1 + int(rng.expovariate(0.8)))):
        tree = _changed(rng, tree, others)
    return tree


def _changed(rng: Random, node: Any, others: Sequence[Any]) -> Any:
    inside = isinstance(node, (dict, list)) and node and rng.random() < 0.85
    if not inside:
        if others and rng.random() < 0.3:
            return rng.choice(others)
        return value_of(rng) if rng.random() < 0.995 else deep(rng)
    kind = rng.random()
    if isinstance(node, dict):
        entries = list(node.items())
        at = rng.randrange(len(entries))
        key, value = entries[at]
        if kind < 0.1:
            del entries[at]
        elif kind < 0.2:
            entries[at] = (rng.choice((*TEXTS, *node)), value)
        elif kind < 0.3:
            entries.append((rng.choice(TEXTS), value_of(rng)))
        else:
            entries[at] = (key, _changed(rng, value, others))
        return dict(entries)
    items = list(node)
    at = rng.randrange(len(items))
    if kind < 0.15:
        del items[at]
    elif kind < 0.3:
        items.insert(at, rng.choice((*items, value_of(rng))))
    else:
        items[at] = _changed(rng, items[at], others)
    return items


def as_json(tree: Any) -> bytes:
    """Return a tree as JSON; of one that is too deep for the library, another one that is as deep."""
    try:
        return json.dumps(tree).encode()
    except RecursionError:
        return b'{"a":' * 3000 + b"1" + b"}" * 3000


def change_table(rng: Random, rows: Sequence[Sequence[str]]) -> list[list[str]]:
    """Return the rows of a table with one to six changes of cells, rows, columns and names."""
    changed = [list(row) for row in rows]
    for _ in range(min(6, 1 + int(rng.expovariate(0.8)))):
        if not changed:
            break
        row = rng.choice(changed)
        kind = rng.random()
        if kind < 0.6 and row:
            row[rng.randrange(len(row))] = rng.choice(
                (*TEXTS, *map(str, WHOLE), *map(str, FLOATS), "x" * 140_000, "1" * 30)
            )
        elif kind < 0.7:
            row.insert(rng.randrange(len(row) + 1), rng.choice(TEXTS))
        elif kind < 0.8 and row:
            del row[rng.randrange(len(row))]
        elif kind < 0.9:
            changed.insert(rng.randrange(len(changed) + 1), list(row))
        else:
            changed.remove(row)
    return changed

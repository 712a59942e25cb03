"""Names and messages as they may be shown or written: what a terminal would obey is escaped.

File names, class names and the texts of errors may hold any character: escape sequences that move the cursor, line
breaks, marks that reverse the order of what follows, and bytes that are no text at all.
"""

from __future__ import annotations

import re
import sys
from typing import TextIO

# Control characters, line and paragraph separators, overrides and isolates of the direction, and halves of pairs: the
# halves U+DC80 to U+DCFF are how Python reads bytes of file names that are no UTF-8.
_ESCAPED = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_ESCAPE = re.compile(
    r"\\(?:x(?:[0189a-f][0-9a-f]|7f|5c)|u(?:00[89][0-9a-f]|061c|202[89a-e]|206[6-9]|d[89a-f][0-9a-f]{2}))"
)


def shown(text: str) -> str:
    r"""Return one line of text with escapes such as ``\x1b`` and ``\u202e`` in place of what a terminal would obey."""
    return _ESCAPED.sub(lambda found: _escape(found[0]), text)


def shown_lines(text: str) -> str:
    """Return a text of several lines, each as :func:`shown` returns it, tabs included."""
    return "\n".join("\t".join(map(shown, line.split("\t"))) for line in text.split("\n"))


def written(text: str) -> str:
    r"""Return what :func:`shown` does, such that :func:`restored` gives the text back: two names stay two names.

    A backslash that would be taken for the start of an escape becomes ``\x5c``. Any other backslash stays.
    """
    return shown(_ESCAPE.sub(lambda found: r"\x5c" + found[0][1:], text))


def restored(text: str) -> str:
    """Return the text of which :func:`written` made this."""
    return _ESCAPE.sub(lambda found: _unescape(found[0]), text)


def show(text: str, file: TextIO | None = None) -> None:
    """Print one line, by default on standard output."""
    print(shown(text), file=sys.stdout if file is None else file)


def _escape(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:
        return f"\\x{code - 0xDC00:02x}"
    return f"\\x{code:02x}" if code < 0x80 else f"\\u{code:04x}"


def _unescape(escape: str) -> str:
    code = int(escape[2:], 16)
    return chr(code + 0xDC00 if escape[1] == "x" and code >= 0x80 else code)

"""Text from outside (names of files, classes and sites, DICOM strings) made safe to print and to put in a CSV cell."""

from __future__ import annotations

import re
import unicodedata

_FORMULA = re.compile(r"'*[=+\-@\t\r\n＝＋－＠]")
"""Start of a cell that a spreadsheet would read as a formula (wide forms too), or that `cell` made out of one."""

_HIDDEN = frozenset({"Cc", "Cs", "Zl", "Zp"})
"""Unicode categories that are written as escapes: control characters, surrogates, line and paragraph separators."""

_DIRECTION = frozenset("\u200e\u200f\u061c\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Marks that change the order in which text is displayed."""


def printable(text: str, keep: str = "") -> str:
    r"""Return a text without characters that a terminal would act on.

    Control characters, bytes that are not UTF-8 (as Python decodes them in file names) and marks of text direction
    become escapes: ``\x1b``, ``\xe9``, ``\u202e``. All other text is unchanged.

    Args:
        text: The text.
        keep: Control characters that may stay, for example a line feed.
    """
    if text.isprintable() and text.isascii():
        return text
    return "".join(one if one in keep or not _acts(one) else _escape(one) for one in text)


def is_printable(text: str) -> bool:
    """Return whether ``printable`` leaves a text as it is."""
    return printable(text) == text


def cell(text: str) -> str:
    """Return a text as a CSV cell that no spreadsheet takes for a formula.

    A text that begins with ``=``, ``+``, ``-``, ``@``, a tab or a line break gets a ``'`` in front; so does one that
    begins with ``'`` and such a character, so that `from_cell` returns exactly what was given.
    """
    return f"'{text}" if _FORMULA.match(text) else text


def from_cell(text: str) -> str:
    """Return the text of which ``cell`` made a cell."""
    return text[1:] if text.startswith("'") and _FORMULA.match(text) else text


def _acts(character: str) -> bool:
    return unicodedata.category(character) in _HIDDEN or character in _DIRECTION


def _escape(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte that is not UTF-8
        return f"\\x{code - 0xDC00:02x}"
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"

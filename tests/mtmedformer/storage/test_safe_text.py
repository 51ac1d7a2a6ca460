"""Text from outside, on a terminal and in a spreadsheet."""

import csv
import io

import pytest

from mtmedformer.storage.safe_text import cell, from_cell, is_printable, printable


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("a/film 1 (2).png", "a/film 1 (2).png"),
        ("Größe ×2 – 影像", "Größe ×2 – 影像"),
        ("red\x1b[31m", "red\\x1b[31m"),
        ("two\r\nlines\t", "two\\x0d\\x0alines\\x09"),
        ("caf\udce9", "caf\\xe9"),
        ("\x9b2J", "\\x9b2J"),
        ("gnp.\u202eexe", "gnp.\\u202eexe"),
        ("a\u2028b", "a\\u2028b"),
    ],
)
def test_only_characters_that_a_terminal_acts_on_are_escaped(raw, shown):
    assert printable(raw) == shown
    assert is_printable(raw) == (raw == shown)
    shown.encode()


def test_chosen_control_characters_stay():
    assert printable("a\n\x07b", keep="\n") == "a\n\\x07b"


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r", "\n", "＝", "'=", "''-", "'", "", "a=", "1"])
def test_a_cell_is_no_formula_and_is_read_back_exactly(start):
    text = f"{start}1+1"
    written = cell(text)
    assert written[0] not in "=+-@\t\r\n＝"
    stream = io.StringIO()
    csv.writer(stream).writerow([written])
    read = next(csv.reader(io.StringIO(stream.getvalue(), newline="")))[0]
    assert from_cell(read) == text

"""Seeded mutations of bytes and of tables for the fuzz tests.

``MTMEDFORMER_FUZZ=1000 pytest tests/fuzz`` runs 1000 mutations per test; the ordinary suite runs a small number.
"""

import os
import random
from collections.abc import Callable, Iterator

ODD_CELLS = (
    *("", " ", "-", "?", "None", "NA", "N/A", "null", "nan", "NaN", "inf", "-inf", "1e400", "1e308", "-1", "-0", "00"),
    *("0.0", "0.5", "1.0", "2", "Y", "N", "x", "t", "f", "yes", "FALSE", "99999999999999999999", "0x10", "1_0", "1,5"),
    *("[]", "[[]]", "[[1]]", "[[0,0,0,0]]", "[[9,9,1,1]]", "[[NaN,0,1,1]]", "[[1e400,0,1,1]]", "[[-5,-5,9e9,9e9]]"),
    *("[[1,2,3,'4']]", '[["a",2,3,4]]', "[[true,false,true,true]]", "{}", '{"a": 1}', "[", "]" * 40, "[" * 5000),
    *('["opacity"]', '["unseen"]', "[null]", "opacity", '"', '""', "a\nb", "a\r\nb", "\x00", "\x1b[31m", "\ufeff"),
    *(
        "é",
        "\udcff",
        "肺",
        "a" * 5000,
        "/" * 300,
        "../../etc/passwd",
        "/etc/passwd",
        "C:\\films\\a.png",
        ".",
        "..",
        "/",
    ),
    *("films", "=1+1", "#REF!", "train", "Val", "9" * 5000, "-" + "9" * 400, "٣", "²", "1e", "+1", "1 ", "NULL", "~"),
)
"""Cells that people, spreadsheets and broken programs write."""


def seeds(ordinary: int) -> Iterator[int]:
    """Yield the seeds of a fuzz test: ``MTMEDFORMER_FUZZ`` of them, else ``ordinary``."""
    return iter(range(int(os.environ.get("MTMEDFORMER_FUZZ", ordinary))))


def mutate_bytes(content: bytes, rng: random.Random, most: int = 4) -> bytes:
    """Return a copy with 1 to ``most`` mutations: changed, added, removed, repeated or swapped bytes, or a cut end."""
    data = bytearray(content)
    for _ in range(rng.randint(1, most)):
        rng.choice(_BYTE_MUTATIONS)(data, rng)
    return bytes(data)


def mutate_cells(rows: list[list[str]], rng: random.Random, most: int = 4) -> list[list[str]]:
    """Return a copy of a table (header first) with 1 to ``most`` mutations of cells, rows and columns."""
    table = [list(row) for row in rows]
    for _ in range(rng.randint(1, most)):
        if table and any(table):
            rng.choice(_CELL_MUTATIONS)(table, rng)
    return table


def _spot(data: bytearray, rng: random.Random) -> int:
    return rng.randrange(len(data)) if data else 0


def _flip_bit(data: bytearray, rng: random.Random) -> None:
    if data:
        data[_spot(data, rng)] ^= 1 << rng.randrange(8)


def _set_extreme(data: bytearray, rng: random.Random) -> None:
    start, width = _spot(data, rng), rng.choice((1, 2, 4, 8))
    data[start : start + width] = rng.choice((b"\x00", b"\xff", b"\x7f", b"\x80", b"\x01")) * width


def _insert(data: bytearray, rng: random.Random) -> None:
    start = _spot(data, rng)
    data[start:start] = rng.randbytes(rng.choice((1, 2, 7, 64)))


def _remove(data: bytearray, rng: random.Random) -> None:
    start = _spot(data, rng)
    del data[start : start + rng.choice((1, 2, 7, 64, 1024))]


def _repeat(data: bytearray, rng: random.Random) -> None:
    start = _spot(data, rng)
    part = data[start : start + rng.choice((1, 8, 64, 512))]
    data[start:start] = part * rng.randint(1, 4)


def _swap(data: bytearray, rng: random.Random) -> None:
    a, b, width = _spot(data, rng), _spot(data, rng), rng.choice((1, 4, 16))
    if abs(a - b) >= width and max(a, b) + width <= len(data):
        data[a : a + width], data[b : b + width] = data[b : b + width], data[a : a + width]


def _cut(data: bytearray, rng: random.Random) -> None:
    del data[_spot(data, rng) :]


_BYTE_MUTATIONS: tuple[Callable[[bytearray, random.Random], None], ...] = (
    *(_flip_bit, _flip_bit, _set_extreme, _set_extreme, _insert, _remove, _repeat, _swap, _cut),
)

Cells = list[list[str]]


def _place(table: Cells, rng: random.Random) -> tuple[list[str], int]:
    row = rng.choice([row for row in table if row])
    return row, rng.randrange(len(row))


def _odd_cell(table: Cells, rng: random.Random) -> None:
    row, column = _place(table, rng)
    row[column] = rng.choice(ODD_CELLS)


def _odd_column(table: Cells, rng: random.Random) -> None:
    _, column = _place(table, rng)
    value = rng.choice(ODD_CELLS)
    for row in table[1:]:
        if column < len(row) and rng.random() < 0.7:
            row[column] = value


def _swap_cells(table: Cells, rng: random.Random) -> None:
    (a, i), (b, j) = _place(table, rng), _place(table, rng)
    a[i], b[j] = b[j], a[i]


def _delete_cell(table: Cells, rng: random.Random) -> None:
    row, column = _place(table, rng)
    del row[column]


def _repeat_cell(table: Cells, rng: random.Random) -> None:
    row, column = _place(table, rng)
    row.insert(column, row[column])


def _change_character(table: Cells, rng: random.Random) -> None:
    row, column = _place(table, rng)
    text = bytearray(row[column].encode("utf-8", "surrogateescape"))
    _flip_bit(text, rng)
    row[column] = text.decode("utf-8", "surrogateescape")


def _delete_row(table: Cells, rng: random.Random) -> None:
    del table[rng.randrange(len(table))]


def _repeat_row(table: Cells, rng: random.Random) -> None:
    row = rng.randrange(len(table))
    table.insert(rng.randrange(len(table) + 1), list(table[row]))


def _delete_column(table: Cells, rng: random.Random) -> None:
    _, column = _place(table, rng)
    for row in table:
        del row[column : column + 1]


def _totals_row(table: Cells, rng: random.Random) -> None:
    table.append(["" if rng.random() < 0.4 else str(rng.randint(0, 99)) for _ in table[0]])


_CELL_MUTATIONS: tuple[Callable[[Cells, random.Random], None], ...] = (
    *(_odd_cell, _odd_cell, _odd_cell, _odd_column, _swap_cells, _delete_cell, _repeat_cell, _change_character),
    *(_delete_row, _repeat_row, _delete_column, _totals_row),
)

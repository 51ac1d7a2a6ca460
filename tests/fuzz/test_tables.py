"""Mutated tables: each is read, refused in one sentence, or its rows are quarantined; never a traceback.

``MTMEDFORMER_FUZZ=1000 pytest tests/fuzz/test_tables.py`` reads 1000 tables per test.
"""

import contextlib
import csv
import io
import math
import random
import re

import numpy as np
import pytest
from PIL import Image

from datamodules.cache.quarantine import IMAGE
from datamodules.labels_csv.columns import BoxColumns, ClassColumns, MaskColumns
from datamodules.labels_csv.datamodule import LabelsCSVDataModule
from datamodules.records import BoxTruth, ClassTruth, MaskTruth
from mtmedformer.errors import UserError
from tests.fuzz.mutations import ODD_CELLS, mutate_bytes, mutate_cells, seeds

HEADER = ["image", "patient", "site", "split", "label", "fluid", "has_boxes", "boxes", "box_labels", "mask"]
HEADER += ["height", "width", "view", "laterality"]
COUNT = 14
SEPARATORS = (",", ";", "\t", "|")
ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "cp1252")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tables")
    rng = np.random.default_rng(0)
    for name in ("films", "masks"):
        (folder / name).mkdir()
        for n in range(COUNT):
            Image.fromarray(rng.integers(1, 255, (48, 40), np.uint8)).save(folder / name / f"i{n}.png")
    return folder


def row_of(n):
    boxes, labels = ("[[2, 3, 20, 30]]", '["opacity"]') if n % 2 else ("[]", "[]")
    label = ("normal", "pneumonia", "Ödem")[n % 3]
    row = [f"films/i{n}.png", f"p{n}", ("south", "north")[n % 2], "", label, str(n % 2), "1", boxes, labels]
    return [*row, f"masks/i{n}.png", "48", "40", "PA", "L"]


ROWS = [HEADER, *map(row_of, range(COUNT))]


def data_of(root, given):
    return LabelsCSVDataModule(
        root,
        classification={
            "finding": ClassColumns("label", classes=["normal", "pneumonia", "Ödem"] if given else None),
            "signs": ClassColumns(columns=["fluid"]),
        },
        detection={"lesions": BoxColumns(classes=["opacity"] if given else None, flag="has_boxes")},
        segmentation={"lungs": MaskColumns({"lung": "mask"})},
        **{"image_size": 32, "num_workers": 0, "cache_dir": None, "max_quarantine_share": 1.0},
    )


def text_of(rows, separator):
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=separator, lineterminator=random.Random(len(rows)).choice(("\n", "\r\n"))).writerows(
        rows
    )
    return text.getvalue()


def read(root, content, given):
    """Return the planned data module, or the message it is refused with."""
    (root / "labels.csv").write_bytes(content)
    data = data_of(root, given)
    try:
        data.plan()
    except UserError as error:
        return str(error)
    return data


def truth_of(row):
    """Return the truth that a row of ``ROWS`` has, by task."""
    n = int(re.search(r"\d+", row[0])[0])
    label = ("normal", "pneumonia", "Ödem").index(row[4])
    return {
        "finding": label,
        "signs": ClassTruth((float(n % 2),)),
        "lesions": BoxTruth(((2.0, 3.0, 20.0, 30.0),), (0,)) if n % 2 else BoxTruth(),
        "lungs": "mask",
    }


def check(data, content):
    """Check that nothing of an accepted table is invented, and that what is quarantined is named."""
    for record in data.records:
        assert record.patient.strip()
        assert record.file.is_relative_to(data.root)
        for name, truth in record.truth.items():
            classes = data.tasks[name].classes
            if isinstance(truth, ClassTruth):
                assert all(math.isnan(v) or v in (0, 1) for v in truth.values)
                assert name == "signs" or sum(truth.values) == 1
            elif isinstance(truth, BoxTruth):
                assert np.isfinite(np.array(truth.boxes, float)).all()
                assert all(0 <= label < len(classes) for label in truth.labels)
            else:
                assert isinstance(truth, MaskTruth)
    for issue in data.quarantine.issues:
        assert re.search(r"line \d+", issue.detail), issue
        assert len(issue.detail) < 500
        assert issue.detail.isprintable(), issue
        assert issue.subject == IMAGE or issue.subject in data.tasks
    assert len(data.records) <= content.count(b"\n") + content.count(b"\r")


def message_is_one_sentence(message):
    assert 20 < len(message) < 2500, message[:200]
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", message), repr(message[:300])
    assert "Traceback" not in message


def test_tables_with_mutated_cells(root):
    refused = quarantined = plain = 0
    for seed in seeds(60):
        rng = random.Random(seed)
        rows = mutate_cells(ROWS, rng)
        content = text_of(rows, rng.choice(SEPARATORS)).encode(rng.choice(ENCODINGS), "replace")
        data = read(root, content, given=bool(seed % 2))
        if isinstance(data, str):
            message_is_one_sentence(data)
            refused += 1
            continue
        check(data, content)
        quarantined += bool(data.quarantine.issues)
        plain += not data.quarantine.issues
        if seed % 2:  # rows that were not touched are read as before
            untouched = {row[0]: row for row in ROWS[1:] if rows.count(row) == 1 and rows[0] == HEADER}
            held = {str(r.file.relative_to(data.root)): r for r in data.records}
            twice = [row[0] for row in rows if row]
            for image, row in untouched.items():
                if twice.count(image) == 1:
                    truth = held[image].truth
                    expected = truth_of(row)
                    assert truth["finding"].values.index(1) == expected["finding"]
                    assert truth["lesions"] == expected["lesions"]
                    assert truth["signs"] == expected["signs"]
                    assert truth["lungs"].channels[0].file.name == f"i{image[7:-4]}.png"
    print(f"cells: {refused} refused, {quarantined} with quarantine, {plain} without")


def test_tables_with_mutated_bytes(root):
    refused = accepted = 0
    for seed in seeds(60):
        rng = random.Random(seed)
        content = mutate_bytes(text_of(ROWS, ",").encode(rng.choice(ENCODINGS)), rng)
        data = read(root, content, given=bool(seed % 2))
        if isinstance(data, str):
            message_is_one_sentence(data)
            refused += 1
        else:
            check(data, content)
            accepted += 1
    print(f"bytes: {refused} refused, {accepted} accepted")


def test_odd_cells_in_every_column(root):
    """Put one odd value into one row, or into a whole column; decode some of the tables as well."""
    every = [(column, cell, whole) for column in range(len(HEADER)) for cell in ODD_CELLS for whole in (False, True)]
    refused = decoded = 0
    for seed in seeds(40):
        column, cell, whole = every[seed * 7919 % len(every)]
        rows = [list(row) for row in ROWS]
        for row in rows[1:] if whole else rows[4:5]:
            row[column] = cell
        content = text_of(rows, ",").encode("utf-8", "replace")
        data = read(root, content, given=bool(seed % 3))
        if isinstance(data, str):
            message_is_one_sentence(data)
            refused += 1
            continue
        check(data, content)
        if not whole:
            lost = {issue.id for issue in data.quarantine.issues}
            assert len(data.records) + len({i for i in lost if i.startswith("line")}) >= COUNT - 1
        if seed % 8 == 0:
            decoded += 1
            with contextlib.suppress(UserError):
                data.setup(None)
                assert all(len(images[0].image) for images in data.datasets.values())
    print(f"odd cells: {refused} refused, {decoded} decoded")


@pytest.mark.parametrize("separator", SEPARATORS)
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_the_table_itself_is_read_without_a_word(root, separator, encoding):
    data = read(root, text_of(ROWS, separator).encode(encoding), given=False)
    assert not isinstance(data, str), data
    assert data.quarantine.issues == []
    assert len(data.records) == COUNT
    assert all(len(record.truth) == 4 for record in data.records)

import logging
import os
import struct
import zlib

import pytest

from datamodules.public import layout
from datamodules.public.layout import clipped, disjoint_splits, files_below, locate, number, read_table, unique_ids
from datamodules.records import BoxTruth, Record
from mtmedformer.errors import DataError


def touch(*files):
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()


def test_layout_is_found_below_wrapping_folders_shallowest_first(tmp_path):
    touch(tmp_path / "b" / "t.csv", tmp_path / "a" / "c" / "t.csv", tmp_path / "__MACOSX" / "t.csv")
    assert locate(tmp_path, ["t.csv"], "set") == tmp_path / "b"
    assert locate(tmp_path / "a", ["none.csv|t.csv"], "set") == tmp_path / "a" / "c"


def test_closest_folder_and_what_it_lacks_are_named(tmp_path):
    touch(tmp_path / "x" / "y" / "images" / "1.png", tmp_path / "x" / "y" / "readme")
    with pytest.raises(DataError, match=r"closest is .*y, which lacks t\.csv and holds images, readme"):
        locate(tmp_path, ["t.csv", "images"], "set")


def test_the_search_stops_in_a_home_folder(tmp_path, monkeypatch):
    for i in range(30):
        (tmp_path / str(i)).mkdir()
    touch(tmp_path / "9" / "t.csv")
    monkeypatch.setattr(layout, "MOST_FOLDERS", 10)
    with pytest.raises(DataError, match="not found"):
        locate(tmp_path, ["t.csv"], "set")


def test_an_unreadable_folder_is_logged_and_skipped(tmp_path, monkeypatch, caplog):
    touch(tmp_path / "z" / "t.csv")
    (tmp_path / "shut").mkdir()
    access = os.access
    monkeypatch.setattr(layout.os, "access", lambda path, mode: path.name != "shut" and access(path, mode))
    with caplog.at_level(logging.WARNING):
        assert locate(tmp_path, ["u.csv|z/t.csv"], "set") == tmp_path
        with pytest.raises(DataError):
            locate(tmp_path, ["none.csv"], "set")
    assert "shut cannot be read" in caplog.text


def test_files_below_skips_litter_and_ignores_case(tmp_path):
    touch(tmp_path / "b.PNG", tmp_path / "a.png", tmp_path / "._a.png", tmp_path / ".hidden" / "c.png")
    assert [f.name for f in files_below(tmp_path, (".png",))] == ["a.png", "b.PNG"]


def test_table_cells_are_stripped_text(tmp_path):
    file = tmp_path / "t.csv"
    file.write_bytes(b'\xef\xbb\xbf a ,b,\n007,"x.dcm\n",\nNA,   ,\n')
    table = read_table(file, ["a", "b"])
    assert table["a"].tolist() == ["007", "NA"]
    assert table["b"].tolist() == ["x.dcm", ""]


@pytest.mark.parametrize(
    "content, words",
    [(b"", "EmptyDataError"), (b"a\n", "no rows"), (b"b\n1\n", "lacks the column"), (b"a\n1,2,3\n1\n,,,,\n", "")],
)
def test_table_that_cannot_be_used_names_itself(tmp_path, content, words):
    file = tmp_path / "t.csv"
    file.write_bytes(content)
    with pytest.raises(DataError, match=rf"t\.csv.*{words}"):
        read_table(file, ["a"])


def test_numbers_are_finite_or_none(tmp_path):
    row = {"a": "1.5", "b": "", "c": "NaN", "d": "inf", "e": "1,5"}
    assert [number(row, key, tmp_path) for key in "abc"] == [1.5, None, None]
    for key in "de":
        with pytest.raises(DataError, match="not a number"):
            number(row, key, tmp_path)


def test_clipping_keeps_labels_with_their_boxes():
    boxes = [(-1.0, -1.0, 4.0, 4.0), (20.0, 20.0, 30.0, 30.0), (8.0, 8.0, 12.0, 12.0)]
    assert clipped(boxes, [0, 1, 2], 10, 10) == (BoxTruth(((0, 0, 4, 4), (8, 8, 10, 10)), (0, 2)), 1)


def test_patients_of_later_splits_leave_the_earlier_ones(tmp_path):
    def record(name, patient, split):
        return Record(name, tmp_path, patient, split=split)

    records = [
        record("a", "1", "train"),
        record("b", "1", "val"),
        record("c", "2", "val"),
        record("d", "2", "test"),
        record("e", "2", "train"),
        record("f", "3", "train"),
        record("g", "4", None),
    ]
    kept, notes = disjoint_splits(records, "set")
    assert [r.id for r in kept] == ["b", "d", "f", "g"]
    assert "3 images of 2 patients" in notes[0]
    assert disjoint_splits(kept, "set") == (kept, [])


def test_repeated_ids_are_numbered(tmp_path):
    records = [Record(name, tmp_path, "p") for name in ("a", "b", "a", "a")]
    assert [r.id for r in unique_ids(records)] == ["a", "b", "a_2", "a_3"]


def test_the_size_of_a_damaged_or_hostile_image_is_unknown(tmp_path):
    ihdr = b"IHDR" + struct.pack(">IIBBBBB", 60000, 60000, 8, 0, 0, 0, 0)
    huge = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + ihdr + struct.pack(">I", zlib.crc32(ihdr)) + b"\0\0\0\1IDAT\0"
    for name, content in (("huge.png", huge), ("cut.png", huge[:20]), ("empty.jpg", b""), ("no.dcm", b"no DICOM")):
        (tmp_path / name).write_bytes(content)
        assert layout.image_size(tmp_path / name) is None, name

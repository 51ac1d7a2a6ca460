"""Files that are written completely or not at all."""

import os

import pytest

from mtmedformer.storage.atomic_write import atomic_write, remove_partial_files


def test_the_new_content_replaces_the_old_file(tmp_path):
    file = tmp_path / "facts.json"
    file.write_text("old")
    with atomic_write(file) as part:
        part.write_text("new")
        assert file.read_text() == "old", "nothing is in its place before all is written"
    assert file.read_text() == "new"
    assert list(tmp_path.iterdir()) == [file]


def test_missing_folders_are_made(tmp_path):
    with atomic_write(tmp_path / "a/b/facts.json") as part:
        part.write_text("new")
    assert (tmp_path / "a/b/facts.json").read_text() == "new"


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("written", [True, False])
def test_an_exception_leaves_the_old_file_and_no_partial_one(tmp_path, error, written):
    def write() -> None:
        with atomic_write(file) as part:
            if written:
                part.write_text("half")
            raise error("full")

    file = tmp_path / "facts.json"
    file.write_text("old")
    with pytest.raises(error, match="full"):
        write()
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_a_failed_replacement_leaves_no_partial_file(tmp_path):
    (tmp_path / "facts.json").mkdir()
    with pytest.raises(OSError), atomic_write(tmp_path / "facts.json") as part:
        part.write_text("new")
    assert list(tmp_path.iterdir()) == [tmp_path / "facts.json"]


def test_long_names(tmp_path):
    with atomic_write(tmp_path / ("x" * 250 + ".txt")) as part:
        part.write_text("new")
    assert [len(file.name) for file in tmp_path.iterdir()] == [254]


def test_content_and_name_are_flushed_to_the_disk(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.append(os.fstat(descriptor).st_ino))
    with atomic_write(tmp_path / "facts.json") as part:
        part.write_text("new")
    assert flushed == [(tmp_path / "facts.json").stat().st_ino, tmp_path.stat().st_ino]


def test_partial_files_of_killed_processes_are_removed(tmp_path):
    with atomic_write(tmp_path / "last.ckpt") as part:
        part.write_text("new")
        left = part.with_name(part.name.replace(str(os.getpid()), "1"))
        left.write_text("half")
    remove_partial_files(tmp_path)
    assert list(tmp_path.iterdir()) == [tmp_path / "last.ckpt"]
    remove_partial_files(tmp_path / "missing")

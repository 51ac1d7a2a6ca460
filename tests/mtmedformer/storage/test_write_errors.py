"""What the system refuses, in the exceptions of the libraries that meet it."""

import errno
import sqlite3

import pytest
import torch
from safetensors import SafetensorError

from mtmedformer.commands.messages import explain
from mtmedformer.errors import ConfigError
from mtmedformer.storage.write_errors import ends_every_write, name_file, system_error


class FullStream:
    """A file on a full disk, as Python's own files behave on it."""

    def __init__(self, room: int) -> None:
        self.room = room

    def write(self, content) -> int:
        self.room -= len(content)
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return len(content)

    def flush(self) -> None:
        """Do nothing."""


@pytest.mark.parametrize("room", [0, 10, 1000, 5000])
def test_torch_on_a_full_disk(room):
    with pytest.raises((RuntimeError, OSError)) as caught:
        torch.save({"a": torch.zeros(1000)}, FullStream(room))
    assert system_error(caught.value)[1] == 1
    assert ends_every_write(caught.value)
    message, code = explain(caught.value)
    assert code == 1
    assert "no space left" in message


@pytest.mark.parametrize(
    ("error", "words", "code"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "x/y.png"), "x/y.png: no space left", 1),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "quota", 1),
        (OSError(errno.EMFILE, "Too many open files"), "ulimit -n", 1),
        (OSError(errno.EROFS, "Read-only file system", "x"), "x: the file system is read-only", 2),
        (PermissionError(errno.EACCES, "Permission denied", "x"), "x: permission denied", 2),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "x"), "is a file and not a folder", 2),
        (OSError("1000 requested and 12 written"), "a write failed", 1),
        (RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"), "a write failed", 1),
        (RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"), "a write failed", 1),
        (RuntimeError("received 0 items of ancdata"), "ulimit -n", 1),
        (RuntimeError("DataLoader worker: insufficient shared memory (shm)"), "/dev/shm", 1),
        (
            SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
            "no space left",
            1,
        ),
        (sqlite3.OperationalError("database or disk is full"), "no space left", 1),
        (sqlite3.OperationalError("attempt to write a readonly database"), "read-only", 2),
    ],
)
def test_each_library_has_its_words(error, words, code):
    message, exit_code = explain(error)
    assert words in message
    assert exit_code == code
    wrapped = ValueError("while saving")
    wrapped.__cause__ = error
    assert explain(wrapped)[1] == code


def test_other_errors_are_left_alone():
    for error in (
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        FileNotFoundError(errno.ENOENT, "x"),
        KeyError("a"),
    ):
        assert system_error(error) is None
        assert explain(error)[1] is None
    mistake = ConfigError("data.root=x: choose another")
    mistake.__cause__ = OSError(errno.EACCES, "Permission denied")
    assert explain(mistake) == ("data.root=x: choose another", 2)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError("1000 requested and 12 written"),
        RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_the_message_names_the_file_that_was_written(error, tmp_path):
    text = str(error)
    for name in ("inner.npy", "outer.npy"):
        name_file(error, tmp_path / name)
    words, code = system_error(error)
    assert code == 1
    assert words.startswith(f"{tmp_path / 'inner.npy'}: ")
    assert isinstance(error, OSError) or str(error) == text

"""The code that decides an image's pixels is part of the name of its cache entry."""

from __future__ import annotations

import ast
import importlib.util
import shutil
from pathlib import Path

import pytest

import datamodules
from datamodules.cache import preprocessing
from datamodules.cache.preprocessing import DECODERS, PIXEL_CODE, Preprocessing, pixel_code
from datamodules.images.presets import PlainPreset
from datamodules.records import Record
from mtmedformer.storage.hashing import source_digest

ROOT = Path(datamodules.__file__).resolve().parents[1]
PACKAGES = ("mtmedformer", "datamodules", "federation", "callbacks")
STARTS = ("datamodules.images.pixels", "datamodules.cache.rasterize")  # read_image; rasterize, read_mask
FILES = [file.relative_to(ROOT).as_posix() for file in pixel_code(ROOT)]


def file_of(module: str) -> Path | None:
    """Return the file of a module of this project, ``None`` for anything else, such as a name in a module."""
    base = ROOT.joinpath(*module.split("."))
    return next((f for f in (base.with_suffix(".py"), base / "__init__.py") if f.is_file()), None)


def imported(file: Path) -> set[str]:
    """Return the modules of this project that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.split(".")[0] in PACKAGES and file_of(name)}


def reached() -> set[str]:
    """Return the files of all modules that decoding and drawing an image can reach, without lists of public names."""
    waiting, seen = list(STARTS), set()
    while waiting:
        module = waiting.pop()
        file = file_of(module)
        assert file is not None
        if module not in seen and file.name != "__init__.py":
            seen.add(module)
            waiting += imported(file)
    return {file.relative_to(ROOT).as_posix() for module in seen if (file := file_of(module))}


def test_every_module_that_decoding_an_image_reaches_is_in_the_key():
    assert reached() - set(FILES) == set()
    assert {"datamodules/images/grayscale.py", "datamodules/images/decoding_process.py", "mtmedformer/geometry.py"} <= (
        reached()
    )


def test_every_entry_of_pixel_code_exists_and_is_needed():
    for name in PIXEL_CODE:
        assert (ROOT / name).exists(), name
        assert any(file.startswith(name) for file in reached()), f"{name}: decoding does not reach it"


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    """A copy of the code that decides pixels."""
    root = tmp_path_factory.mktemp("code")
    for name in FILES:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    return root


@pytest.mark.parametrize("name", FILES)
def test_a_changed_constant_in_any_of_these_files_changes_the_key_and_a_comment_does_not(copied, name):
    before = source_digest(pixel_code(copied), copied)
    assert before == source_digest(pixel_code(ROOT), ROOT), "the place of the code is no part of the digest"
    file, text = copied / name, (ROOT / name).read_text()
    try:
        file.write_text(f"# a comment\n{text}\n\n# another one\n")
        assert source_digest(pixel_code(copied), copied) == before
        file.write_text(f"{text}\nA_CONSTANT = 1\n")
        one = source_digest(pixel_code(copied), copied)
        file.write_text(f"{text}\nA_CONSTANT = 2\n")
        assert len({before, one, source_digest(pixel_code(copied), copied)}) == 3
    finally:
        file.write_text(text)


def test_a_new_file_beside_them_changes_the_key(copied):
    before = source_digest(pixel_code(copied), copied)
    file = copied / "datamodules/images/another_format.py"
    file.write_text("WHITE = 255\n")
    try:
        assert source_digest(pixel_code(copied), copied) != before
    finally:
        file.unlink()


def key_of(tmp_path):
    preprocessing._code.cache_clear()
    return Preprocessing(PlainPreset(), (24, 24)).keys([Record("a", tmp_path / "a.png", "p")])


@pytest.mark.parametrize("library", DECODERS)
def test_another_version_of_a_decoding_library_decodes_again(tmp_path, monkeypatch, library):
    before = key_of(tmp_path)
    real = preprocessing.version
    monkeypatch.setattr(preprocessing, "version", lambda name: "0.0.1" if name == library else real(name))
    assert key_of(tmp_path) != before
    monkeypatch.undo()
    assert key_of(tmp_path) == before


PRESET = """
from datamodules.images.presets import PlainPreset

MARGIN = {margin}  # {comment}


class Own(PlainPreset):
    def frame(self, pixels, size, laterality):
        return super().frame(pixels[: pixels.shape[0] - MARGIN], size, laterality)
"""


def test_the_file_of_a_user_preset_is_in_the_key(tmp_path):
    def key(**words):
        file = tmp_path / "own_preset.py"
        file.write_text(PRESET.format(**words))
        spec = importlib.util.spec_from_file_location("own_preset", file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setitem(__import__("sys").modules, "own_preset", module)
        return Preprocessing(module.Own(), (24, 24)).keys([Record("a", tmp_path / "a.png", "p")])

    with pytest.MonkeyPatch.context() as monkeypatch:
        plain = key(margin=1, comment="a")
        assert key(margin=1, comment="b") == plain
        assert key(margin=2, comment="a") != plain

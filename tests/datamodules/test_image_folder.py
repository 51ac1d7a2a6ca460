"""Finding images by what is in them, and serving them without labels."""

import os
import shutil

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from pydicom.uid import BasicTextSRStorage, GrayscaleSoftcopyPresentationStateStorage, MediaStorageDirectoryStorage

from datamodules.image_folder import ImageFolderDataModule
from datamodules.loading.find_images import find_images
from mtmedformer.errors import ConfigError, DataError
from mtmedformer.inference.results import ABOUT, NOTE
from tests.fixtures.dicom_files import film, write_dicom


@pytest.fixture
def tree(tmp_path):
    root = tmp_path / "tree"
    (root / "study/series").mkdir(parents=True)
    write_dicom(root / "study/series/0001", film(), bits=12)
    write_dicom(root / "study/series/0002", film(), bits=12, preamble=False)
    Image.fromarray(film(bits=8)).save(root / "one.PNG")
    return root


def test_images_are_recognised_by_content_and_by_suffix(tree):
    (tree / "notes.txt").write_text("no image")
    (tree / "broken.jpg").write_bytes(b"meant to be one")
    found, notes, failures = find_images([tree])
    assert failures == []
    assert list(found) == ["broken.jpg", "one.PNG", "study/series/0001", "study/series/0002"]
    assert notes == ["Skipped files that are no images: 1 × .txt file"]


@pytest.mark.parametrize(
    "kind", [BasicTextSRStorage, GrayscaleSoftcopyPresentationStateStorage, MediaStorageDirectoryStorage]
)
def test_other_dicom_objects_are_skipped(tree, kind):
    write_dicom(tree / "other", film(), SOPClassUID=kind, PixelData=None)
    found, notes, _ = find_images([tree])
    assert "other" not in found
    assert "1 × DICOM" in notes[0]


def test_system_files_are_skipped(tree):
    (tree / "__MACOSX").mkdir()
    for name in ("._one.PNG", "__MACOSX/one.png"):
        (tree / name).write_bytes((tree / "one.PNG").read_bytes())
    assert find_images([tree]).notes == []
    assert list(find_images([tree]).images) == ["one.PNG", "study/series/0001", "study/series/0002"]


def test_of_a_folder_of_predictions_only_what_predict_wrote_is_passed_over_and_counted(tree):
    described = PngImagePlugin.PngInfo()
    described.add_text("Description", f"MTMedFormer 1234, {NOTE}")
    for name in ("masks/organ/film.png_organ.png", "overlays/half.png.png"):
        (tree / "out" / name).parent.mkdir(parents=True)
        Image.fromarray(film(bits=8)).save(tree / "out" / name, pnginfo=described)
    for name in ("explanations/old.png", "film.png", "images/film.png", "dicom/film.png", "masks/own.png"):
        (tree / "out" / name).parent.mkdir(exist_ok=True)
        Image.fromarray(film(bits=8)).save(tree / "out" / name)
    for name in ("images/old.json", "predictions.csv", ABOUT):
        (tree / "out" / name).write_text("{}")
    found, notes, _ = find_images([tree / "out"])
    assert list(found) == ["film.png", "dicom/film.png", "images/film.png", "masks/own.png"], "films, wherever they lie"
    assert notes == ["Skipped files that are no images: 6 × file of earlier predictions"]


@pytest.mark.timeout(60)
def test_a_folder_of_odd_things_is_searched_without_a_hang(tree, monkeypatch):
    os.mkfifo(tree / "pipe.png")
    (tree / "folder.png").mkdir()
    Image.fromarray(film(bits=8)).save(tree / "folder.png/inner.png")
    for name, target in (("loop.png", "loop.png"), ("gone.png", "nowhere.png"), ("itself", "."), ("up", "..")):
        (tree / name).symlink_to(target)
    for raw in (b"caf\xe9.png", b"red\x1b[31m.png", b"two\nlines.png", b"=1+1.png"):
        os.rename(shutil.copy(tree / "one.PNG", tree / "copy"), os.fsencode(tree) + b"/" + raw)
    listed = os.scandir

    def scandir(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    (tree / "study/closed").mkdir()
    monkeypatch.setattr(os, "scandir", scandir)
    data = ImageFolderDataModule([tree, tree / "pipe.png"], image_size=32, num_workers=0)
    data.setup("predict")
    served = [meta.id for batch in data.predict_dataloader() for meta in batch.meta]
    assert served == [
        f"tree/{name}"
        for name in (
            *("=1+1.png", "caf\\xe9.png", "one.PNG", "red\\x1b[31m.png", "two\\x0alines.png"),
            *("folder.png/inner.png", "study/series/0001", "study/series/0002"),
        )
    ]
    assert {issue.id: issue.reason for issue in data.failures} == {
        "pipe.png": "not a file",
        "tree/gone.png": "image file missing",
        "tree/loop.png": "image file missing",
        "tree/study/closed/": "folder cannot be read",
    }
    assert find_images([tree]).notes == [
        "Skipped files that are no images: 2 × link to a folder, 1 × pipe, device or socket"
    ]


def test_files_are_taken_as_they_are_and_each_once(tree):
    (tree / "notes.txt").write_text("no image")
    found, *_ = find_images([tree / "notes.txt", tree / "one.PNG", tree / "one.PNG"])
    assert list(found) == ["notes.txt", "one.PNG"], "a file that is named is meant"
    found, *_ = find_images([tree / "one.PNG", tree])
    assert list(found) == ["one.PNG", "tree/study/series/0001", "tree/study/series/0002"]
    other = tree.parent / "other/tree"
    other.mkdir(parents=True)
    (other / "one.PNG").write_bytes(b"")
    assert list(find_images([tree, other])[0])[-1] == "tree/one.PNG_2"


def test_nothing_to_predict_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no such file or folder"):
        find_images([tmp_path / "absent"])
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(DataError, match=r"no image found \(1 × \.txt file\)"):
        find_images([tmp_path])


@pytest.mark.parametrize("workers", [0, 2])
def test_readable_images_are_in_batches_and_others_in_failures(tree, workers):
    for name in ("a.png", "z.png"):
        (tree / name).write_bytes(b"broken")
    data = ImageFolderDataModule([tree], image_size=[32, 48], batch_size=2, num_workers=workers)
    data.setup("predict")
    batches = list(data.predict_dataloader())
    assert [[meta.id for meta in batch.meta] for batch in batches] == [
        ["one.PNG", "study/series/0001"],
        ["study/series/0002"],
    ]
    assert batches[0].image.shape == (2, 1, 32, 48)
    assert batches[0].targets == {}
    assert sorted(issue.id for issue in data.failures) == ["a.png", "z.png"]
    assert all("secret" not in meta.patient.lower() for batch in batches for meta in batch.meta)


def test_an_error_in_one_image_leaves_the_other_images(tree, monkeypatch, caplog):
    apply = type(ImageFolderDataModule([tree]).preprocessing).apply

    def faulty(self, record):
        if record.id == "one.PNG":
            raise ZeroDivisionError("a fault of ours")
        return apply(self, record)

    data = ImageFolderDataModule([tree], image_size=32, num_workers=0)
    monkeypatch.setattr(type(data.preprocessing), "apply", faulty)
    data.setup("predict")
    assert len(list(data.predict_dataloader())) == 2
    assert (data.failures[0].id, data.failures[0].detail) == ("one.PNG", "ZeroDivisionError")
    assert "could not be prepared" in caplog.text


def test_finished_images_are_left_out(tree):
    data = ImageFolderDataModule([tree], image_size=32, num_workers=0)
    data.setup("predict")
    asked = []
    data.skip_finished(lambda files: asked.append(dict(files)) or {"one.PNG"})
    batches = data.predict_dataloader()
    assert asked == [], "the weights may not be there yet"
    assert len(batches) == 2
    assert [batch.meta[0].id for batch in batches] == ["study/series/0001", "study/series/0002"]
    assert asked == [data.files]


def test_originals_are_the_images_as_read(tree):
    data = ImageFolderDataModule([tree], image_size=32)
    data.setup("predict")
    pixels = data.original(data.files["one.PNG"])
    assert pixels.shape == film().shape
    np.testing.assert_allclose(pixels, film(bits=8) / 255, atol=1e-6)
    assert [data.is_dicom(file) for file in data.files.values()] == [False, True, True]


def test_stages_other_than_predict_are_an_error(tree):
    with pytest.raises(ConfigError, match="predict only"):
        ImageFolderDataModule([tree]).setup("fit")
    with pytest.raises(ConfigError, match="image_size"):
        ImageFolderDataModule([tree], image_size=(8, 8))

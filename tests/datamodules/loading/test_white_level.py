"""One white level for the 16-bit images of a set: found once, kept, and the same for training and prediction."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from datamodules.cache.preprocessing import Preprocessing
from datamodules.image_folder import ImageFolderDataModule
from datamodules.images.pixels import read_image
from datamodules.images.presets import PlainPreset
from datamodules.labels_csv.columns import ClassColumns
from datamodules.labels_csv.datamodule import LabelsCSVDataModule
from datamodules.loading import white_level
from datamodules.loading.single_image import prepare_array
from datamodules.loading.white_level import common_level, find_white_level
from datamodules.records import Record
from federation.datamodule import FederatedDataModule
from mtmedformer.errors import ConfigError, DataError
from tests.fixtures.dicom_files import film, write_dicom

TASK = {"finding": ClassColumns(column="label", classes=["well", "sick"])}


def save(file: Path, bits: int, share: float = 1.0, seed: int = 0) -> Path:
    """Write a 16-bit file with a film of fewer bits, whose brightest pixel is a share of white."""
    file.parent.mkdir(parents=True, exist_ok=True)
    values = np.rint(film(64, 64, bits=bits, seed=seed).astype(float) * share).astype(np.uint16)
    Image.fromarray(values).save(file)
    return file


def labelled(folder: Path, bits: int, name: str = "labels.csv", suffix: str = "png", number: int = 12) -> Path:
    """Write a set of films, each darker than the one before."""
    rows = ["image,patient,label,split"]
    for i in range(number):
        save(folder / f"films/{i}.{suffix}", bits, share=1 - i / (number + 1), seed=i)
        rows.append(f"films/{i}.{suffix},p{i},{'sick' if i % 2 else 'well'},{('train', 'val', 'test')[i // 2 % 3]}")
    (folder / name).write_text("\n".join(rows))
    return folder


def data_of(folder: Path, cache: Path | None = None, **arguments) -> LabelsCSVDataModule:
    data = LabelsCSVDataModule(
        folder,
        classification=TASK,
        image_size=64,
        preset=None,
        num_workers=0,
        cache_dir=cache,
        **arguments,
    )
    data.setup(None)
    return data


def level_of(data: LabelsCSVDataModule) -> int | None:
    return data.preprocessing.white_level


@pytest.mark.parametrize("bits, level", [(8, 255), (10, 1023), (12, 4095), (14, 16383), (16, 65535)])
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_dark_and_bright_images_of_a_set_share_one_level(tmp_path, bits, level, suffix):
    data = data_of(labelled(tmp_path, bits, suffix=suffix))
    assert level_of(data) == level
    shown = {r.id: data.original(r.file).max() for r in data.records}
    assert sorted(shown.values(), reverse=True) == pytest.approx([1 - i / 13 for i in range(12)], abs=0.01)
    for dataset in data.datasets.values():
        for sample, record in zip(dataset, dataset.records, strict=True):
            assert float(sample.image.max()) == pytest.approx(shown[record.id], abs=0.01)


def test_formats_that_state_their_white_have_no_level(tmp_path):
    grey = film(bits=8)
    Image.fromarray(grey).save(tmp_path / "a.png")
    Image.fromarray(grey).save(tmp_path / "a.tif")
    Image.fromarray(grey).save(tmp_path / "a.jpg")
    (tmp_path / "a.pgm").write_bytes(b"P5 32 40 4095\n" + film(bits=12).astype(">u2").tobytes())
    write_dicom(tmp_path / "a.dcm", film(bits=12), bits=12)
    (tmp_path / "broken.png").write_bytes(save(tmp_path / "b.png", 12).read_bytes()[:200])
    files = [tmp_path / name for name in ("a.png", "a.tif", "a.jpg", "a.pgm", "a.dcm", "broken.png", "none.png")]
    assert find_white_level(files) is None
    assert find_white_level([*files, save(tmp_path / "c.png", 14)]) == 16383


def test_colour_images_of_16_bits_have_a_level(tmp_path):
    cv2.imwrite(str(tmp_path / "a.png"), np.dstack([film(bits=14)] * 3))
    assert find_white_level([tmp_path / "a.png"]) == 16383
    assert read_image(tmp_path / "a.png", 16383).pixels.max() == 1
    assert read_image(tmp_path / "a.png", 65535).pixels.max() == pytest.approx(0.25, abs=1e-3)


def test_each_file_is_decoded_for_its_level_once(tmp_path, monkeypatch):
    labelled(tmp_path, 14)
    assert level_of(data_of(tmp_path, tmp_path / "cache")) == 16383
    monkeypatch.setattr(white_level, "brightest", lambda file: pytest.fail(f"{file} was read again"))
    assert level_of(data_of(tmp_path, tmp_path / "cache")) == 16383
    monkeypatch.undo()
    (tmp_path / "cache/brightest_values.json").write_text("damaged")
    assert level_of(data_of(tmp_path, tmp_path / "cache")) == 16383


def test_parts_of_a_set_have_the_level_of_the_set(tmp_path):
    labelled(tmp_path, 14)
    dark = ["p11", "p10", "p9", "p8"]
    data = LabelsCSVDataModule(tmp_path, classification=TASK, image_size=64, num_workers=0, cache_dir=None)
    data.only_patients = frozenset(dark)
    data.setup(None)
    assert len(data.records) == 4
    assert level_of(data) == 16383


def test_the_level_is_part_of_the_keys(tmp_path):
    record = Record(id="a", file=save(tmp_path / "a.png", 12), patient="a")
    keys = {Preprocessing(PlainPreset(), (64, 64), level).keys([record])[0] for level in (None, 4095, 16383, 65535)}
    assert len(keys) == 4


def test_a_level_can_be_given(tmp_path):
    labelled(tmp_path, 12)
    assert level_of(data_of(tmp_path, white_level=16383)) == 16383
    with pytest.raises(DataError, match="above the white level 1000 of its set"):
        data_of(tmp_path, white_level=1000)
    for wrong in (0, 70000, -1):
        with pytest.raises(ConfigError, match=f"white_level is {wrong}; give auto or a value from 1 to 65535"):
            data_of(tmp_path, white_level=wrong)


def test_a_brighter_image_than_white_is_left_out_and_counted(tmp_path):
    labelled(tmp_path, 12)
    save(tmp_path / "films/3.png", 14)
    data = data_of(tmp_path, white_level=4095, max_quarantine_share=0.2)
    assert [issue.file for issue in data.quarantine.issues] == ["3.png"]
    assert "values up to 16383, above the white level 4095" in data.quarantine.issues[0].detail


def test_the_level_of_the_training_is_used_for_other_images(tmp_path, caplog):
    trained = data_of(labelled(tmp_path / "a", 14))
    other = LabelsCSVDataModule(
        labelled(tmp_path / "b", 12),
        classification=TASK,
        image_size=64,
        num_workers=0,
        cache_dir=None,
    )
    other.load_state_dict(trained.state_dict())
    with caplog.at_level(logging.WARNING):
        other.setup("test")
    assert level_of(other) == 16383
    assert "reach the white level 4095, those of the training 16383" in caplog.text
    assert other.state_dict() == {"white_level": 16383}
    images = ImageFolderDataModule([tmp_path / "b/films"], image_size=64, preset=None, num_workers=0)
    images.load_state_dict(trained.state_dict())
    images.setup("predict")
    assert images.settings["white_level"] == 16383
    batch = next(iter(images.predict_dataloader()))
    assert float(batch.image.max()) == pytest.approx(4095 / 16383, abs=0.01)


def test_images_without_a_training_share_the_level_that_fits_them(tmp_path):
    labelled(tmp_path, 14)
    images = ImageFolderDataModule([tmp_path / "films"], image_size=64, preset=None, num_workers=0)
    images.setup("predict")
    assert images.preprocessing.white_level == 16383


def test_sets_without_16_bit_images_have_no_state(tmp_path):
    labelled(tmp_path, 8)
    for file in (tmp_path / "films").iterdir():
        Image.fromarray(film(64, 64, bits=8)).save(file)
    data = data_of(tmp_path)
    assert level_of(data) is None
    assert data.state_dict() == {}


def test_each_site_of_a_federation_keeps_its_level(tmp_path):
    def federation() -> FederatedDataModule:
        sets = {name: labelled(tmp_path / name, bits) for name, bits in (("a", 14), ("b", 12))}
        return FederatedDataModule(
            {
                name: LabelsCSVDataModule(folder, classification=TASK, image_size=64, num_workers=0, cache_dir=None)
                for name, folder in sets.items()
            }
        )

    data = federation()
    data.setup("fit")
    assert data.state_dict() == {"white_level": {"a": 16383, "b": 4095}}
    resumed = federation()
    resumed.load_state_dict({"white_level": {"a": 65535, "b": 16383}})
    resumed.setup("fit")
    assert resumed.state_dict() == {"white_level": {"a": 65535, "b": 16383}}


@pytest.mark.parametrize(
    "state, level",
    [
        ({}, None),
        ({"white_level": 4095}, 4095),
        ({"white_level": None}, None),
        ({"white_level": "auto"}, None),
        ({"white_level": -3}, None),
        ({"white_level": {"a": 4095, "b": 4095, "c": None}}, 4095),
        ({"white_level": {"a": 4095, "b": 255}}, None),
        ({"white_level": {}}, None),
    ],
)
def test_the_common_level_of_a_state(state, level):
    assert common_level(json.loads(json.dumps(state))) == level


def test_arrays_are_divided_by_the_level_of_the_training(tmp_path):
    values = film(64, 64, bits=12)
    for level, white in ((None, 4095), (16383, 16383), (65535, 65535)):
        sample = prepare_array(values, Preprocessing(PlainPreset(), (64, 64), level))
        assert float(sample.image.max()) == pytest.approx(values.max() / white, abs=1e-4)
    with pytest.raises(DataError, match="the array: a 16-bit image with values up to 4095, above the white level 255"):
        prepare_array(values, Preprocessing(PlainPreset(), (64, 64), 255))

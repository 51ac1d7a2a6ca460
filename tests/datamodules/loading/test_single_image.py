"""One image, from a file or an array, is prepared as training images are."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.cache.preprocessing import Preprocessing
from datamodules.cache.quarantine import IMAGE, Issue
from datamodules.images.presets import BreastPreset, ChestPreset
from datamodules.loading.dataset import pixels_of
from datamodules.loading.single_image import prepare_array, prepare_file
from datamodules.records import Record
from mtmedformer.errors import DataError


@pytest.fixture
def values():
    y, x = np.mgrid[0:60, 0:48]
    return (4000 * np.exp(-(((y - 30) / 20) ** 2) - (x / 25) ** 2)).astype(np.uint16)


@pytest.mark.parametrize("preset", [ChestPreset(), BreastPreset()], ids=["chest", "breast"])
@pytest.mark.parametrize("levels", [12, 8])
def test_a_file_and_its_array_give_the_sample_of_the_cache_entry(tmp_path, values, preset, levels):
    values = values if levels == 12 else (values // 16).astype(np.uint8)
    file = tmp_path / "one.png"
    Image.fromarray(values).save(file)
    preprocessing = Preprocessing(preset, (32, 24))
    record = Record("one", file, "p", laterality="L")
    sample, array = prepare_file(record, preprocessing), prepare_array(values, preprocessing, "L")
    assert sample.image.shape == (1, 32, 24)
    assert torch.equal(sample.image[0], torch.from_numpy(pixels_of(preprocessing.apply(record))))
    assert torch.equal(sample.image, array.image)
    assert sample.truth == array.truth == {}
    assert sample.meta.to_original == array.meta.to_original
    assert sample.meta.original_size == array.meta.original_size == (60, 48)


def test_an_unusable_file_is_an_issue_and_an_unusable_array_an_error(tmp_path):
    preprocessing = Preprocessing(ChestPreset(), (32, 24))
    (tmp_path / "one.png").write_bytes(b"broken")
    issue = prepare_file(Record("one", tmp_path / "one.png", "p"), preprocessing)
    assert isinstance(issue, Issue)
    assert issue.subject == IMAGE
    for array in (np.zeros((8, 8), np.uint8), np.ones((4, 9), np.float32), np.full((9, 9), 2.0), np.zeros((9, 9, 3))):
        with pytest.raises(DataError, match="the array"):
            prepare_array(array, preprocessing)

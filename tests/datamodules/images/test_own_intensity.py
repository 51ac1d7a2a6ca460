"""Intensity changes of a user: albumentations' own YAML is used as it is, everything else is refused in words."""

import io
import os

import numpy as np
import pytest

from datamodules.images.own_intensity import intensity_pipeline, intensity_text, with_texts
from datamodules.images.presets import ChestPreset
from mtmedformer.errors import ConfigError

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
import albumentations as A


def text_of(*transforms: A.BasicTransform) -> str:
    """Return the YAML of a pipeline, as ``albumentations.save`` writes it."""
    stream = io.StringIO()
    A.save(A.Compose(list(transforms)), stream, data_format="yaml")
    return stream.getvalue()


USUAL = (
    A.RandomBrightnessContrast(p=1),
    A.OneOf([A.GaussNoise(), A.GaussianBlur(), A.MotionBlur()]),
    A.CLAHE(),
    A.RandomGamma(),
    A.Sharpen(),
    A.MultiplicativeNoise(),
    A.Downscale(),
    A.ImageCompression(),
)


def test_usual_intensity_transforms_pass_and_change_the_image_alone(recwarn):
    preset = ChestPreset(rotation=0, zoom=0, shift=0, intensity=text_of(*USUAL))
    image = np.random.default_rng(0).random((64, 48), dtype=np.float32)
    image[:8] = 0
    masks, boxes = np.ones((1, 64, 48), np.uint8), np.array([[4, 4, 20, 30]], np.float32)

    def augmented(seed: int):
        return preset.augment(image, masks, boxes, np.zeros(1, np.int64), np.random.default_rng(seed))

    changed = augmented(1)
    assert changed.image.shape == image.shape
    assert changed.image.dtype == np.float32
    assert 0 <= changed.image.min() <= changed.image.max() <= 1
    assert not np.allclose(changed.image, image)
    assert not changed.image[:8].any(), "padding stays black"
    np.testing.assert_array_equal(changed.masks, masks)
    np.testing.assert_array_equal(changed.boxes, boxes)
    np.testing.assert_array_equal(augmented(1).image, changed.image)
    assert not np.array_equal(augmented(2).image, changed.image)


@pytest.mark.parametrize(
    ("transform", "words"),
    [
        (A.HorizontalFlip(), "HorizontalFlip is a spatial transform"),
        (A.OneOf([A.GaussNoise(), A.Rotate()]), "Rotate is a spatial transform"),
        (A.CoarseDropout(), "CoarseDropout is a spatial transform"),
        (A.Normalize(), "Normalize returns values far outside"),
        (A.ToRGB(), "ToRGB returns an image of another size"),
        (A.HueSaturationValue(), "HueSaturationValue does not work on images of 1 channel"),
        (A.Lambda(image=None, name="mine"), "Lambda runs code"),
    ],
)
def test_what_cannot_be_used_is_named_with_the_reason(transform, words):
    with pytest.raises(ConfigError, match=words):
        intensity_pipeline(text_of(transform))


def test_a_colour_transform_works_on_colour():
    assert intensity_pipeline(text_of(A.HueSaturationValue()), channels=3)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [", "no valid YAML"),
        ("x: 1", "no entry 'transform'"),
        ("transform: {__class_fullname__: os.system, p: 1.0}", "system is no transform of albumentations"),
        ("transform: {__class_fullname__: Compose, transforms: [3]}", "is no transform"),
        ("transform: {__class_fullname__: RandomGamma, gama_limit: 3, p: 1}", "gama_limit"),
        ("transform: {__class_fullname__: RandomGamma, gamma_limit: x, p: 1}", "gamma_limit"),
    ],
)
def test_other_texts_are_refused(text, words):
    with pytest.raises(ConfigError, match=words):
        intensity_pipeline(text)


def test_no_code_of_the_file_is_run(tmp_path, monkeypatch):
    ran = tmp_path / "ran"
    with pytest.raises(ConfigError, match="no valid YAML"):
        intensity_pipeline(f"transform: !!python/object/apply:os.system ['touch {ran}']")
    (tmp_path / "evil.py").write_text(f"open({str(ran)!r}, 'w')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match="no transform of albumentations"):
        intensity_pipeline("transform: {__class_fullname__: evil.Transform, p: 1.0}")
    assert not ran.exists()


def test_files_become_texts_in_the_configuration_of_a_run(tmp_path):
    file = tmp_path / "aug.yaml"
    file.write_text(text_of(A.RandomGamma()))
    preset = {"class_path": "datamodules.ChestPreset", "init_args": {"intensity": str(file), "zoom": 0.1}}
    kept = with_texts({"data": {"init_args": {"sites": [{"preset": preset}]}}, "n": 1})
    stored = kept["data"]["init_args"]["sites"][0]["preset"]["init_args"]
    assert stored == {"intensity": file.read_text(), "zoom": 0.1}
    assert with_texts(kept) == kept
    for wrong in (tmp_path / "absent.yaml", tmp_path):
        with pytest.raises(ConfigError, match=r"preset\.intensity"):
            intensity_text(str(wrong))

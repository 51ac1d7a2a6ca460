from __future__ import annotations

import io
import json
from dataclasses import asdict
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy import ndimage

from datamodules.audit.near_duplicates import find_duplicates, leak_report, perceptual_hash, thumbnail
from datamodules.records import Record
from mtmedformer.errors import DataError
from tests.fixtures.real_data import real


def film(seed, size=(180, 160)):
    """A smooth random image with fine texture: unrelated to that of any other seed."""
    rng = np.random.default_rng(seed)
    coarse = ndimage.gaussian_filter(rng.normal(size=size), 12) * 12
    fine = ndimage.gaussian_filter(rng.normal(size=size), 2)
    image = coarse + fine
    return ((image - image.min()) / np.ptp(image)).astype(np.float32)


def jpeg(image, quality=40):
    buffer = io.BytesIO()
    Image.fromarray((image * 255).astype(np.uint8)).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer), np.float32) / 255


def resized(image, factor):
    return cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA)


def cropped(image, share):
    h, w = image.shape
    return image[round(share * h) :, round(share * w) : w - round(share * w / 2)]


COPIES = {
    "the same": lambda image: image,
    "rescaled": lambda image: resized(image, 0.6),
    "compressed": jpeg,
    "brighter": lambda image: np.clip(image**0.7 * 0.8 + 0.15, 0, 1),
    "rescaled, darker, compressed": lambda image: jpeg(np.clip(resized(image, 0.7) ** 1.4, 0, 1)),
    "noisy": lambda image: np.clip(image + np.random.default_rng(9).normal(0, 0.03, image.shape), 0, 1),
    "equalised": lambda image: (
        cv2.createCLAHE(2.0, (8, 8)).apply((image * 255).astype(np.uint8)).astype(np.float32) / 255
    ),
    "cropped by 1 %": lambda image: cropped(image, 0.01),
    "cropped by 3 %": lambda image: cropped(image, 0.03),
    "mirrored": lambda image: image[:, ::-1],
    "inverted": lambda image: 1 - image,
    "stretched": lambda image: cv2.resize(image, (300, 200)),
}


def thumbnails(images):
    return np.stack([thumbnail(np.ascontiguousarray(image, np.float32)) for image in images])


def records_of(*rows):
    return [Record(name, Path(f"{name}.png"), patient, site=site) for name, patient, site in rows]


@pytest.mark.parametrize("copy", COPIES)
def test_a_planted_copy_is_the_only_duplicate(copy):
    images = [film(seed) for seed in range(40)]
    names = [str(i) for i in range(40)]
    found = find_duplicates(thumbnails([*images, COPIES[copy](images[7])]), [*names, "copy"])
    assert [(p.first, p.second) for p in found] == [("7", "copy")]
    assert found[0].mirrored == (copy == "mirrored")
    assert (found[0].correlation < 0) == (copy == "inverted")
    assert found[0].distance <= 14


def test_unrelated_images_do_not_match():
    assert find_duplicates(thumbnails([film(seed) for seed in range(150)]), [str(i) for i in range(150)]) == []


def test_blank_images_match_nothing():
    images = [np.zeros((50, 50)), np.ones((40, 60)), np.full((9, 9), 0.3), film(0)]
    assert find_duplicates(thumbnails(images), ["a", "b", "c", "d"]) == []


@pytest.mark.parametrize("count", [0, 1])
def test_nothing_to_compare(count):
    assert find_duplicates(thumbnails([film(0)])[:count], ["a"][:count]) == []


def test_ids_must_fit():
    with pytest.raises(DataError, match="1 thumbnails but 2 ids"):
        find_duplicates(thumbnails([film(0)]), ["a", "b"])


def test_the_hash_ignores_brightness_and_flips_under_inversion():
    one, brighter, inverted = perceptual_hash(thumbnails([film(1), film(1) * 0.5 + 0.3, 1 - film(1)]))
    assert (one != brighter).sum() <= 2
    assert (one != inverted).sum() >= 60


def test_groups_of_copies_across_blocks():
    images = [film(seed) for seed in range(6)]
    stack = np.concatenate([thumbnails(images), np.zeros((1100, 64, 64), np.uint8), thumbnails(images[:2])])
    found = find_duplicates(stack, [str(i) for i in range(len(stack))])
    assert {(p.first, p.second) for p in found} == {("0", "1106"), ("1", "1107")}


def test_report_sorts_pairs_by_harm():
    rows = [("a", "p", "x"), ("b", "p", "x"), ("c", "q", "x"), ("d", "p", "y"), ("e", "p", "x")]
    records = records_of(*rows)
    image = film(3)
    pairs = find_duplicates(thumbnails([image] * 5), [r.id for r in records])
    assert len(pairs) == 10
    splits = {"a": "train", "b": "train", "c": "train", "d": "train", "e": "test"}
    report = leak_report(pairs, records, splits)
    named = [
        {p.first + p.second for p in g} for g in (report.across_splits, report.across_sites, report.across_patients)
    ]
    assert named == [{"ae", "be", "ce", "de"}, {"ad", "bd", "cd"}, {"ac", "bc"}]
    assert len(pairs) - sum(map(len, named)) == 1, "two images of one patient in one split are in no list"
    assert report.images == 5
    assert "4 across splits, 3 across sites, 2 under two patient keys" in report.summary()
    assert json.loads(json.dumps(asdict(report)))["across_splits"][0]["correlation"] == pytest.approx(1, abs=1e-3)
    assert "no near-duplicate" in leak_report([], records, splits).summary()


def test_chest_films_of_different_patients_are_not_alike_and_planted_copies_are_found():
    root = real("covid_cxr")
    table = pd.read_csv(root / "labels.csv", dtype=str)
    images = [np.asarray(Image.open(root / f).convert("L"), np.float32) / 255 for f in table.image]
    planted = [COPIES["rescaled, darker, compressed"](images[k]) for k in range(0, 360, 12)]
    ids = [*table.image, *(f"copy of {table.image[k]}" for k in range(0, 360, 12))]
    found = find_duplicates(thumbnails([*images, *planted]), ids, mirrored=False)
    planted_found = {(p.first, p.second) for p in found if p.second == f"copy of {p.first}"}
    assert len(planted_found) == 30
    patient = dict(zip(table.image, table.patient, strict=True))
    others = [p for p in found if "copy" not in p.second and patient[p.first] != patient[p.second]]
    # a few pairs under two patient keys are in the public collection itself; looked at, they are the same exposures
    assert len(others) <= 0.01 * len(table)
    assert all(p.correlation > 0.9 for p in others)


def test_mammograms_of_one_woman_are_no_duplicates():
    root = real("mini_mias")
    files = sorted((root / "images").glob("*.png"))[::3]
    stack = thumbnails([np.asarray(Image.open(f).convert("L"), np.float32) / 255 for f in files])
    assert find_duplicates(stack, [f.name for f in files]) == []

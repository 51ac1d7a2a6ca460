"""The look over a whole set: what is probably a mistake is found, and what is right passes without a word."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from datamodules import LabelsCSVDataModule
from datamodules.audit.plausibility import of_images, of_records
from datamodules.cache.entries import MaskMeasure, Measures
from datamodules.cache.quarantine import Issue
from datamodules.images.masks import TOO_FAINT
from datamodules.labels_csv.columns import BoxColumns, ClassColumns, MaskColumns
from datamodules.phantom.datamodule import PhantomDataModule
from datamodules.records import BoxTruth, ClassTruth, MaskSource, MaskTruth, Record, ValueTruth
from federation import FederatedDataModule
from mtmedformer.batch import Task
from mtmedformer.errors import DataError

LESIONS = {"lesions": Task("lesions", "detection", ("mass",))}
LUNGS = {"lungs": Task("lungs", "segmentation", ("lung",))}
FINDING = {"finding": Task("finding", "classification", ("normal", "ill"))}

Box = tuple[float, float, float, float]


def boxed(*images: list[Box]) -> list[Record]:
    return [
        Record(f"r{i}", Path(f"{i}.png"), f"p{i}", {"lesions": BoxTruth(tuple(boxes), (0,) * len(boxes))})
        for i, boxes in enumerate(images)
    ]


def measured(records: list[Record], size: tuple[int, int] = (512, 640), border: float = 0.1) -> dict[str, Measures]:
    return {record.id: Measures(size, border) for record in records}


def drawn(n: int, seed: int = 0) -> list[list[Box]]:
    rng = np.random.default_rng(seed)
    corners = rng.integers(0, 400, (n, 2))
    return [[(float(x), float(y), float(x + 40), float(y + 60))] for x, y in corners]


def masked(shares: list[tuple[float, float]]) -> tuple[list[Record], dict[str, Measures]]:
    source = MaskSource(Path("m.png"))
    records = [Record(f"r{i}", Path(f"{i}.png"), f"p{i}", {"lungs": MaskTruth((source,))}) for i in range(len(shares))]
    measures = [Measures((64, 64), 0.1, (MaskMeasure("lungs", 0, inside, border),)) for inside, border in shares]
    return records, {record.id: measure for record, measure in zip(records, measures, strict=True)}


def test_ordinary_boxes_pass():
    for boxes in (drawn(30), drawn(1), [[(3.0, 4.0, 9.0, 10.0)]], [[], [(0.0, 0.0, 512.0, 512.0)]], [[]] * 8):
        records = boxed(*boxes)
        assert of_records(records, LESIONS) == {}
        assert of_images(records, LESIONS, measured(records)) == {}


@pytest.mark.parametrize(
    "box", [(0.1, 0.2, 0.4, 0.6), (0.0, 0.0, 1.0, 1.0), (0.5, 0.5, 0.2, 0.3)], ids=["corners", "whole image", "YOLO"]
)
@pytest.mark.parametrize("count", [1, 12])
def test_fractions_are_refused(box, count):
    with pytest.raises(DataError, match=rf"lesions: all {count} boxes lie in the first pixel.*fractions of the image"):
        of_records(boxed(*[[box]] * count), LESIONS)


def test_some_fractions_are_a_finding():
    (sentence,) = of_records(boxed(*drawn(10), [(0.1, 0.1, 0.5, 0.5)]), LESIONS).values()
    assert "boxes of 1 of 11 images lie in the first pixel" in sentence


def test_boxes_with_width_and_height_are_a_finding():
    wide = [[(x0, y0, x1 - x0, y1 - y0)] for [(x0, y0, x1, y1)] in drawn(20)]
    (sentence,) = of_records(boxed(*wide), LESIONS).values()
    assert "swapped corners. Are all boxes [x, y, width, height]?" in sentence


def test_boxes_below_a_pixel_are_a_finding():
    (sentence,) = of_records(boxed(*drawn(10), [(50.0, 50.0, 50.5, 60.0)]), LESIONS).values()
    assert sentence == "lesions: 1 of 11 boxes are narrower or lower than one pixel."


def test_one_box_for_all_is_a_finding_from_five_images():
    box: list[Box] = [(10.0, 20.0, 300.0, 400.0)]
    assert of_records(boxed(*[box] * 4), LESIONS) == {}
    assert of_records(boxed(*[box] * 4, [(11.0, 20.0, 300.0, 400.0)]), LESIONS) == {}
    (sentence,) = of_records(boxed(*[box] * 5), LESIONS).values()
    assert "all 5 images with boxes have the same ones" in sentence


@pytest.mark.parametrize("scale, unit", [(100 / 460, "percent"), (300 / 640, "pixels of smaller images")])
def test_boxes_in_other_units_are_a_finding(scale, unit):
    records = boxed(*[[tuple(v * scale for v in box)] for [box] in drawn(20)])  # type: ignore[misc]
    (sentence,) = of_images(records, LESIONS, measured(records, (640, 640))).values()
    assert f"Are they in {unit}?" in sentence
    assert "all 20 images lie in the upper left part" in sentence
    assert of_images(records[:4], LESIONS, measured(records, (640, 640))) == {}


def test_boxes_of_whole_images_are_a_finding():
    records = boxed(*[[(0.0, 0.0, 400.0 + i, 300.0 + i)] for i in range(6)])
    measures = {record.id: Measures((300 + i, 400 + i), 0.1) for i, record in enumerate(records)}
    assert list(of_images(records, LESIONS, measures)) == ["whole boxes of lesions"]
    assert of_images(records[:4], LESIONS, measures) == {}


def test_ordinary_masks_pass():
    rng = np.random.default_rng(0)
    for shares in (
        [(float(i), 0.0) for i in rng.uniform(0.1, 0.6, 20)],
        [(float(i), 0.35) for i in rng.uniform(0.2, 0.93, 20)],  # breasts touch the edge
        [(1.0, 1.0), *[(0.3, 0.1)] * 9],  # one image is cropped to the organ
        [(1.0, 1.0)],
        [(0.0, 0.0)] * 4,
        [(0.0, 0.0)] * 30 + [(0.01, 0.0)],
    ):
        records, measures = masked(shares)
        assert of_images(records, LUNGS, measures) == {}


@pytest.mark.parametrize(
    "shares, words",
    [
        ([(1.0, 1.0)] * 6, "every mask covers its whole image (6 of 6 masks)"),
        ([(1.0, 1.0)] * 4 + [(0.2, 0.0)] * 3, "the mask covers the whole image (4 of 7 masks)"),
        ([(0.2, 0.1)] * 20 + [(0.8, 1.0)] * 3, "3 of 23 masks contain the border"),
        ([(0.8, 1.0)] * 6, "6 of 6 masks contain the border of the image. Are shape and background exchanged?"),
        ([(0.0, 0.0)] * 6, "all 6 mask files are empty"),
    ],
)
def test_masks_of_other_polarity_are_a_finding(shares, words):
    records, measures = masked(shares)
    (sentence,) = of_images(records, LUNGS, measures).values()
    assert words in sentence


def test_faint_jpeg_masks_beside_empty_ones_are_refused():
    records, measures = masked([(0.0, 0.0)] * 10)
    issue = Issue("r99", "99.png", "lungs", "uncertain", f"a JPEG mask {TOO_FAINT}, but not all 0")
    with pytest.raises(DataError, match=r"lungs: 1 JPEG masks are too faint .* and the other 10 are empty"):
        of_images(records, LUNGS, measures, [issue])
    records, measures = masked([(0.0, 0.0)] * 10 + [(0.2, 0.0)])
    assert of_images(records, LUNGS, measures, [issue]) == {}


def test_white_films_are_a_finding():
    records = boxed(*[[]] * 10)
    assert of_images(records, {}, measured(records, border=0.6)) == {}
    assert of_images(records, {}, measured(records[:6]) | measured(records[6:], border=0.95)) == {}  # four
    (sentence,) = of_images(records, {}, measured(records[:4]) | measured(records[4:], border=0.95)).values()
    assert "6 of 10 images have a white border" in sentence
    records = boxed(*[[]] * 100)
    assert of_images(records, {}, measured(records[:96]) | measured(records[96:], border=0.95)) == {}  # 4 %
    records = [replace(record, site="ab"[n > 49]) for n, record in enumerate(records)]
    (sentence,) = of_images(records, {}, measured(records[:81]) | measured(records[81:], border=0.95)).values()
    assert "19 of 100 images have a white border (b 19 of 50)" in sentence


def labelled(classes: dict[str, list[int]]) -> list[Record]:
    labels = [(site, k) for site, ks in classes.items() for k in ks]
    truths = [(site, {"finding": ClassTruth((float(k == 0), float(k == 1)))}) for site, k in labels]
    return [Record(f"r{i}", Path(f"{i}.png"), f"p{i}", truth, site=s) for i, (s, truth) in enumerate(truths)]


def test_a_class_of_one_site_is_a_finding():
    assert of_records(labelled({"a": [0, 1] * 10, "b": [0] * 19 + [1]}), FINDING) == {}
    assert of_records(labelled({"a": [0, 1] * 10}), FINDING) == {}
    assert of_records(labelled({"a": [0, 1] * 10, "b": [0] * 9}), FINDING) == {}  # too few to tell
    (sentence,) = of_records(labelled({"a": [0, 1] * 10, "b": [0] * 10}), FINDING).values()
    assert "all 10 images of 'ill' are of site 'a', and 1 other site(s)" in sentence


# -- of whole data modules


def write_set(root: Path, **columns: list[object]) -> Path:
    """Write a folder with one image a row; boxes and masks are as given."""
    rng = np.random.default_rng(0)
    count = len(next(iter(columns.values())))
    for i in range(count):
        Image.fromarray(rng.integers(0, 200, (96, 80)).astype(np.uint8)).save(root / f"{i}.png")
    table = {"image": [f"{i}.png" for i in range(count)], "patient": [f"p{i}" for i in range(count)], **columns}
    pd.DataFrame(table).to_csv(root / "labels.csv", index=False)
    return root


def module(root: Path, **options: object) -> LabelsCSVDataModule:
    return LabelsCSVDataModule(root, image_size=32, num_workers=0, cache_dir=None, **options)  # type: ignore[arg-type]


def test_fractions_stop_a_set_before_it_is_decoded(tmp_path, monkeypatch):
    write_set(tmp_path, boxes=[json.dumps([[0.1, 0.2, 0.4, 0.6]])] * 12)
    data = module(tmp_path, detection={"op": BoxColumns(labels=None)})
    monkeypatch.setattr(data.cache, "fill", None)
    with pytest.raises(DataError, match="op: all 12 boxes lie in the first pixel"):
        data.setup("fit")


def test_boxes_of_some_images_as_fractions_are_unknown(tmp_path):
    boxes = [json.dumps([[10, 5 + i, 40, 50]]) for i in range(12)]
    write_set(tmp_path, boxes=[*boxes, json.dumps([[0.1, 0.2, 0.4, 0.6]])])
    data = module(tmp_path, detection={"op": BoxColumns(labels=None)})
    data.setup(None)
    assert [issue.reason for issue in data.quarantine.issues] == [
        "boxes in the first pixel, as fractions of the image are"
    ]
    assert sum("op" in record.truth for record in data.records) == 12


def test_findings_are_logged_once_and_name_no_patient(tmp_path, caplog):
    labels = ["Pneumonia", "normal", "PNEUMONIA", "normal"] * 5
    write_set(tmp_path, label=labels, patient=[f"Secret {i // 2}" if i % 2 else f"secret{i // 2}" for i in range(20)])
    data = module(tmp_path, classification={"finding": ClassColumns(column="label")})
    with caplog.at_level(logging.WARNING):
        data.setup("fit")
        data.setup("test")
    said = [r.getMessage() for r in caplog.records if "Pneumonia" in r.getMessage() or "patient(s)" in r.getMessage()]
    assert len(said) == len(data.implausible) == 2
    assert "'PNEUMONIA' (5 images), 'Pneumonia' (5 images)" in said[1]
    assert "labels.csv, column 'label': 5 cells 'PNEUMONIA' (lines 4, 8, 12, " in said[1]
    assert "ids of 10 patient(s) with 20 images are written in several ways" in said[0]
    assert not any("secret" in r.getMessage().lower() for r in caplog.records)
    assert len({record.patient for record in data.records}) == 10


def test_masks_that_cover_everything_are_logged_by_fit(tmp_path, caplog):
    Image.fromarray(np.full((96, 80), 255, np.uint8)).save(tmp_path / "m.png")
    write_set(tmp_path, mask=["m.png"] * 8)
    data = module(tmp_path, segmentation={"lungs": MaskColumns(columns={"lung": "mask"})})
    with caplog.at_level(logging.WARNING):
        data.setup("fit")
    assert "lungs: every mask covers its whole image" in caplog.text


def test_findings_do_not_depend_on_the_cache(tmp_path):
    Image.fromarray(np.full((96, 80), 255, np.uint8)).save(tmp_path / "m.png")
    write_set(tmp_path, mask=["m.png"] * 8)
    seen = []
    for _ in range(2):
        data = module(tmp_path, segmentation={"lungs": MaskColumns(columns={"lung": "mask"})})
        data.cache.folder = tmp_path / "cache"
        data.setup("fit")
        seen.append(data.implausible)
    assert seen[0] == seen[1] != {}


def test_generated_images_are_plausible():
    data = PhantomDataModule(image_size=64, num_workers=0, cache_dir=None)
    data.setup(None)
    assert data.implausible == {}


def test_a_federation_names_the_site_and_the_class_of_one_site(tmp_path, caplog):
    sites = {}
    for name, labels in {"a": ["normal", "ill"] * 10, "b": ["normal"] * 20}.items():
        (tmp_path / name).mkdir()
        Image.fromarray(np.full((96, 80), 255, np.uint8)).save(tmp_path / name / "m.png")
        write_set(tmp_path / name, label=labels, mask=["m.png" if name == "b" else ""] * 20)
        sites[name] = module(
            tmp_path / name,
            classification={"finding": ClassColumns(column="label", classes=["normal", "ill"])},
            segmentation={"lungs": MaskColumns(columns={"lung": "mask"})},
        )
    data = FederatedDataModule(sites=dict(sites))
    with caplog.at_level(logging.WARNING):
        data.setup("fit")
    assert any("all 10 images of 'ill' are of site 'a'" in note for note in data.notes())
    assert set(sites["a"].implausible) == set()
    assert set(sites["b"].implausible) == {"full masks of lungs"}


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ([40, 50, 60, 70, 80, 999, 999], "2 of 7 numbers are 999"),
        ([0, 5, 1, 2, 3, -1], "1 of 6 numbers are -1"),
        ([-2, -1, 0, 1, 2, 0.5], ""),
        ([900, 950, 999, 1020, 870, 990], ""),
        ([40, 50, 60, 999], ""),
    ],
)
def test_codes_for_numbers_that_are_not_known(values, found):
    records = [Record(str(i), Path(f"{i}.png"), f"p{i}", {"age": ValueTruth(float(v))}) for i, v in enumerate(values)]
    sentences = of_records(records, {"age": Task("age", "regression", (), range=(min(values), max(values)))})
    assert [key for key in sentences] == (["codes in age"] if found else [])
    assert found in "".join(sentences.values())

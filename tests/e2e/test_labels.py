"""Labels that are wrong in the whole set, as a user meets them: refused before anything is written, or one warning."""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from mtmedformer.commands.main import main
from tests.fixtures.small_set import small_config, write_config, write_small_set

Row = dict[str, str]


@pytest.fixture
def root(tmp_path):
    return write_small_set(tmp_path / "set", patients=10)


def rewrite(root: Path, change: Callable[[Row], Row]) -> None:
    with (root / "labels.csv").open(newline="") as file:
        rows = [change(row) for row in csv.DictReader(file)]
    with (root / "labels.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def as_fractions(row: Row) -> Row:
    return row | {"boxes": json.dumps([[v / 64 for v in box] for box in json.loads(row["boxes"])])}


def run(command: str, root: Path, folder: Path, *arguments: str) -> int:
    config = small_config(root, folder)
    return main([command, "--config", write_config(config, folder / "config.yaml"), *arguments])


def test_boxes_as_fractions_are_refused_by_every_command(root, tmp_path, capsys):
    rewrite(root, as_fractions)
    for command, *arguments in (["fit"], ["fingerprint", "--output", str(tmp_path / "print")]):
        assert run(command, root, tmp_path, *arguments) == 2
        message = " ".join(capsys.readouterr().err.split())
        assert "nodules: all" in message
        assert "Are they fractions of the image?" in message
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "cache").exists()


def test_faint_jpeg_masks_are_not_empty(root, tmp_path, capsys):
    for file in (root / "masks").glob("*.png"):
        mask = (np.asarray(Image.open(file)) > 0).astype(np.uint8)
        Image.fromarray(mask).save(file.with_suffix(".jpg"), quality=95)
    rewrite(root, lambda row: row | {"mask_organ": row["mask_organ"].replace(".png", ".jpg")})
    assert run("fit", root, tmp_path) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert "images labelled for task 'organ' cannot be used" in message
    assert "a JPEG mask without a value above 48" in message


def test_findings_are_warnings_of_fit_and_a_section_of_fingerprint(root, tmp_path, caplog, capsys):
    for file in (root / "masks").glob("*.png"):
        soft = ndimage.gaussian_filter(np.asarray(Image.open(file)).astype(float), 1)
        Image.fromarray(255 - np.rint(soft).astype(np.uint8)).save(file)
    rewrite(root, lambda row: row | {"patient": row["patient"].upper() if row["view"] == "AP" else row["patient"]})
    with caplog.at_level(logging.WARNING):
        assert run("fit", root, tmp_path, "--trainer.fast_dev_run=true") == 0
    assert "masks contain the border of the image. Are shape and background exchanged?" in caplog.text
    assert caplog.text.count("The ids of 10 patient(s) with 20 images are written in several ways") == 1
    assert "secret" not in caplog.text.lower()
    assert run("fingerprint", root, tmp_path, "--output", str(tmp_path / "print")) == 0
    found = json.loads((tmp_path / "print" / "fingerprint.json").read_text())
    assert found["patients"] == 10
    assert len(found["implausible"]) == 2
    assert any("masks with grey edges (pixels of at least half" in warning for warning in found["warnings"])
    assert capsys.readouterr().out.count("Implausible:") == 2

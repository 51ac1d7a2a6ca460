"""Stored results that must not change: decoded pixels, predictions of a model, weights of a federation.

Pixels are compared bit by bit. Numbers are compared to a relative tolerance, because another processor sums in another
order. A change that is meant is recorded by ``python tests/e2e/test_goldens.py``.
"""

import hashlib
import json
import tempfile
from pathlib import Path

import numpy as np
import pydicom
import pytest
import torch

from datamodules.images.pixels import read_image
from mtmedformer.commands.main import main
from tests.fixtures.small_set import small_config, write_config, write_small_set

FILE = Path(__file__).with_name("goldens.json")
GOLDENS = json.loads(FILE.read_text()) if FILE.is_file() else {}

DICOM_FOLDER = Path(pydicom.__file__).parent / "data/test_files"
DICOM_FILES = (  # uncompressed and lossless: every correct decoder gives the same values
    "CT_small",
    "J2K_pixelrep_mismatch",
    "MR_small",
    "MR_small_RLE",
    "MR_small_bigendian",
    "MR_small_implicit",
    "MR_small_jp2klossless",
    "MR_small_jpeg_ls_lossless",
    "MR_small_padded",
    "examples_overlay",
    "image_dfl",
    "liver_1frame",
    "rtdose_1frame",
    "rtdose_rle_1frame",
)


def pixel_hash(name: str) -> str:
    """Return a hash of the shape and the float32 values of a decoded DICOM file."""
    pixels = read_image(DICOM_FOLDER / f"{name}.dcm").pixels
    return hashlib.sha256(f"{pixels.shape} {pixels.dtype}".encode() + pixels.tobytes()).hexdigest()


def magnitudes(checkpoint: Path) -> list[float]:
    """Return the mean absolute value of every weight tensor of a checkpoint, in the order of the state."""
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    return [float(value.double().abs().mean()) for value in state.values() if value.is_floating_point()]


def single_model(folder: Path) -> dict[str, list[float]]:
    """Train the small model for two epochs and predict; return magnitudes of its weights and its probabilities."""
    images = write_small_set(folder / "set")
    config = write_config(small_config(images, folder), folder / "one.yaml")
    assert main(["fit", "--config", config]) == 0
    checkpoint = folder / "run/checkpoints/last.ckpt"
    output = folder / "predicted"
    plain = ["--dicom=false", "--overlays=false"]
    arguments = ["predict", "--ckpt_path", str(checkpoint), "--images", str(images / "images")]
    assert main([*arguments, "--output", str(output), *plain]) == 0
    lines = (output / "predictions.csv").read_text().splitlines()
    header = lines[0].split(",")
    columns = [n for n, name in enumerate(header) if name.startswith("health")]
    cells = [line.split(",")[n] for line in lines[1:] for n in columns]
    return {"weights": magnitudes(checkpoint), "probabilities": [float(c) for c in cells if _is_number(c)]}


def federation(folder: Path, aggregator: str) -> list[float]:
    """Train the small model at two sites for three rounds; return magnitudes of the merged weights."""
    config = small_config(write_small_set(folder / "set"), folder, max_epochs=3)
    config["data"] = {
        "class_path": "federation.FederatedDataModule",
        "init_args": {"data": config["data"], "by": "site"},
    }
    config["federation"] = {
        "class_path": "callbacks.Federation",
        "init_args": {"aggregator": {"class_path": f"federation.{aggregator}"}},
    }
    assert main(["fit", "--config", write_config(config, folder / "federation.yaml")]) == 0
    return magnitudes(folder / "run/checkpoints/last.ckpt")


def _is_number(text: str) -> bool:
    return text.replace(".", "", 1).replace("e-", "", 1).isdigit()


@pytest.mark.parametrize("name", DICOM_FILES)
def test_decoded_pixels_are_the_stored_ones(name):
    assert pixel_hash(name) == GOLDENS["pixels"][name]


def test_a_trained_model_predicts_the_stored_values(tmp_path):
    values, stored = single_model(tmp_path), GOLDENS["single_model"]
    assert len(values["probabilities"]) > 20
    for key in stored:
        np.testing.assert_allclose(values[key], stored[key], rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("aggregator", ["FedAvg", "BayesianAggregator"])
def test_a_federation_ends_in_the_stored_weights(aggregator, tmp_path):
    np.testing.assert_allclose(
        federation(tmp_path, aggregator), GOLDENS["federation"][aggregator], rtol=2e-3, atol=1e-5
    )


def _folder() -> Path:
    return Path(tempfile.mkdtemp())


if __name__ == "__main__":
    record = {
        "pixels": {name: pixel_hash(name) for name in DICOM_FILES},
        "single_model": single_model(_folder()),
        "federation": {name: federation(_folder(), name) for name in ("FedAvg", "BayesianAggregator")},
    }
    FILE.write_text(json.dumps(record, indent=1) + "\n")

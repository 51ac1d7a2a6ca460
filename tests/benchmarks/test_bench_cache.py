"""How much faster a warm cache is than decoding, on DICOM files of the size a digital X-ray has.

Processor time of one process is measured, so that whatever else the machine does leaves the figures alone.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import DigitalXRayImageStorageForPresentation, ExplicitVRLittleEndian, JPEG2000Lossless, RLELossless

from datamodules.base import MedicalDataModule
from datamodules.cache import rasterize
from datamodules.images.presets import ChestPreset, PlainPreset, Preset
from datamodules.records import BoxTruth, Catalogue, ClassTruth, MaskSource, MaskTruth, Record
from mtmedformer.batch import Task

SIDE = 2048
FILES = 2
PATIENTS = 60  # who share the files, so that an epoch is of many images and decoding of few
EPOCHS = 5  # timed; the median is taken


class Radiographs(MedicalDataModule):
    """One 12-bit film per patient, with a class, a box and a mask drawn from a polygon."""

    def __init__(self, root: Path, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.root = root

    def catalogue(self) -> Catalogue:
        lung = ((300.0, 300.0), (900.0, 280.0), (950.0, 1700.0), (250.0, 1750.0))
        truth = {
            "finding": ClassTruth((1.0, 0.0)),
            "lesions": BoxTruth(((400.0, 500.0, 600.0, 800.0),), (0,)),
            "lungs": MaskTruth((MaskSource(polygons=(lung,)),)),
        }
        tasks = [
            Task("finding", "classification", ("sick", "well")),
            Task("lesions", "detection", ("opacity",)),
            Task("lungs", "segmentation", ("lung",)),
        ]
        files = sorted(self.root.glob("*.dcm"))
        records = [Record(f"{n}", files[n % FILES], f"{n}", truth, split="train") for n in range(PATIENTS)]
        return Catalogue({task.name: task for task in tasks}, records)


def write_dicom(file: Path, seed: int, syntax: str) -> None:
    rng = np.random.default_rng(seed)
    smooth = np.kron(rng.random((32, 32)), np.ones((SIDE // 32, SIDE // 32)))
    pixels = (smooth * 3000 + rng.integers(0, 64, (SIDE, SIDE))).astype(np.uint16)
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = DigitalXRayImageStorageForPresentation
    meta.MediaStorageSOPInstanceUID = f"1.2.3.{seed}"
    dicom = FileDataset(file, {}, file_meta=meta, preamble=b"\0" * 128)
    dicom.SOPClassUID, dicom.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    dicom.Modality, dicom.PhotometricInterpretation, dicom.SamplesPerPixel = "DX", "MONOCHROME2", 1
    dicom.Rows = dicom.Columns = SIDE
    dicom.BitsAllocated, dicom.BitsStored, dicom.HighBit, dicom.PixelRepresentation = 16, 12, 11, 0
    dicom.PixelData = pixels.tobytes()
    dicom.compress(syntax)
    dicom.save_as(file)


def films(folder: Path, syntax: str) -> Path:
    for seed in range(FILES):
        write_dicom(folder / f"film{seed}.dcm", seed, syntax)
    return folder


def ready(root: Path, preset: Preset) -> tuple[Radiographs, float]:
    """Return a data module with a warm cache, and the processor seconds it took to decode one of its files."""
    data = Radiographs(
        root,
        image_size=256,
        num_workers=0,
        batch_size=8,
        preset=preset,
        val_fraction=0.0,
        test_fraction=0.0,
        cache_dir=root / "cache",
    )
    start = time.process_time()
    data.setup("fit")
    return data, (time.process_time() - start) / FILES


def seconds_per_image(data: Radiographs) -> float:
    """Return the median processor seconds per image in an epoch from the warm cache, with the decoder disabled."""
    loader = data.train_dataloader()
    seconds = []
    for _ in range(EPOCHS):
        start = time.process_time()
        count = sum(len(batch) for batch in loader)
        seconds.append((time.process_time() - start) / count)
    return float(np.median(seconds))


@pytest.mark.parametrize("syntax", [JPEG2000Lossless, RLELossless], ids=["JPEG2000", "RLE"])
def test_a_warm_epoch_is_twenty_times_faster_than_decoding(
    tmp_path: Path, syntax: str, monkeypatch: pytest.MonkeyPatch, record_property: Any
) -> None:
    data, cold = ready(films(tmp_path, syntax), PlainPreset())
    monkeypatch.setattr(rasterize, "read_image", lambda file: pytest.fail("the warm cache was not used"))
    warm = seconds_per_image(data)
    record_property("decode_ms", round(1e3 * cold, 1))
    record_property("warm_ms", round(1e3 * warm, 2))
    print(f"decoding {1e3 * cold:.0f} ms, warm {1e3 * warm:.1f} ms an image: {cold / warm:.0f} times faster")


def test_augmented_images_per_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_property: Any) -> None:
    data, cold = ready(films(tmp_path, RLELossless), ChestPreset())
    monkeypatch.setattr(rasterize, "read_image", lambda file: pytest.fail("the warm cache was not used"))
    warm = seconds_per_image(data)
    record_property("images_per_second", round(1 / warm))
    print(f"{1 / warm:.0f} augmented images a second and core: {cold / warm:.0f} times faster than decoding")

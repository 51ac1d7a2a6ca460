"""``mtmedformer predict --images`` as a user calls it: folders of real and generated files, kills and mistakes."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import highdicom as hd
import numpy as np
import pytest
import torch
from PIL import Image
from pydicom import dcmread
from pydicom.data import get_testdata_file
from pydicom.uid import (
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
)

from callbacks.prediction.image_writer import ImageWriter
from mtmedformer.commands.main import main
from mtmedformer.storage.hashing import weights_digest
from tests.fixtures.dicom_files import film, write_dicom
from tests.fixtures.real_data import real
from tests.fixtures.small_set import small_config, write_config

QUIET = "--trainer.enable_progress_bar=false"


@pytest.fixture(scope="module")
def checkpoint(images, tmp_path_factory) -> Path:
    """A model that has seen a few batches."""
    runs = tmp_path_factory.mktemp("runs")
    config = small_config(images, runs, max_epochs=1, limit_train_batches=2)
    assert main(["fit", "--config", write_config(config, runs / "config.yaml")]) == 0
    return runs / "run/checkpoints/last.ckpt"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tree of files of every kind."""
    root = tmp_path_factory.mktemp("folder")
    (root / "ward/2").mkdir(parents=True)
    picture = Image.fromarray(film(70, 50, bits=8))
    for name in ("a.png", "b.jpg", "ward/c.tif"):
        picture.save(root / name)
    syntaxes = (ExplicitVRLittleEndian, ImplicitVRLittleEndian, JPEG2000Lossless, JPEGLSLossless, RLELossless)
    for number, syntax in enumerate(syntaxes):
        uids = {"StudyInstanceUID": "1.2.3", "SeriesInstanceUID": f"1.2.3.{number + 1}"}
        write_dicom(
            root / f"ward/2/{number}", film(70, 50, seed=number), syntax, bits=12, PixelSpacing=[0.2, 0.2], **uids
        )
    (root / "readme.txt").write_text("no image")
    return root


def predict(checkpoint: Path, output: Path, *images: Path | str, more: tuple[str, ...] = ()) -> int:
    arguments = ["--ckpt_path", str(checkpoint), "--images", *map(str, images), "--output", str(output)]
    return main(["predict", *arguments, QUIET, "--data.num_workers=0", *more])


def rows_of(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def test_a_folder_of_everything(checkpoint, folder, tmp_path):
    output = tmp_path / "out"
    assert predict(checkpoint, output, folder) == 0
    rows = rows_of(output / "predictions.csv")
    films = [f"ward/2/{n}" for n in range(5)]
    assert [row["image"] for row in rows] == ["a.png", "b.jpg", *films, "ward/c.tif"]
    assert {row["model"] for row in rows} == {weights_digest(torch.load(checkpoint, weights_only=True)["state_dict"])}
    for row in rows:
        assert abs(float(row["health:well"]) + float(row["health:sick"]) - 1) < 2e-4
        assert bool(row["organ:organ:mm2"]) == (row["image"] in films)
        assert Image.open(output / f"masks/organ/{row['image']}_organ.png").size == (50, 70)
        assert Image.open(output / f"overlays/{row['image']}.png").width > 600
        assert json.loads((output / f"images/{row['image']}.json").read_text())["size"] == [70, 50]
    for name in films:
        masks = hd.seg.segread(output / f"dicom/{name}.seg.dcm")
        pixels = masks.get_pixels_by_source_instance([dcmread(folder / name).SOPInstanceUID])[0, ..., 0]
        np.testing.assert_array_equal(pixels > 0, np.asarray(Image.open(output / f"masks/organ/{name}_organ.png")) > 0)
        assert hd.sr.srread(output / f"dicom/{name}.sr.dcm").Modality == "SR"
    assert not (output / "dicom/a.png.sr.dcm").exists()
    assert not (output / "quarantine.csv").exists(), "failed.csv is the list of what could not be read"
    assert rows_of(output / "failed.csv") == []


def test_single_files_and_options(checkpoint, folder, tmp_path):
    more = ("--dicom=false", "--overlays=false", "--data.image_size=[48,64]", "--data.batch_size=2")
    assert predict(checkpoint, tmp_path / "out", folder / "a.png", folder / "ward/2/0", more=more) == 0
    assert [row["image"] for row in rows_of(tmp_path / "out/predictions.csv")] == ["0", "a.png"]
    assert not (tmp_path / "out/dicom").exists()
    assert not (tmp_path / "out/overlays").exists()
    assert json.loads((tmp_path / "out/about_predictions.json").read_text())["settings"]["image_size"] == [48, 64]


def test_unreadable_files_are_listed_and_change_the_exit_code(checkpoint, folder, tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_bytes((folder / "a.png").read_bytes()[:100])
    assert predict(checkpoint, tmp_path / "out", folder / "a.png", bad) == 3
    assert [row["image"] for row in rows_of(tmp_path / "out/failed.csv")] == ["bad.png"]
    assert [row["image"] for row in rows_of(tmp_path / "out/predictions.csv")] == ["a.png"]


def test_mistakes_exit_with_2_and_a_message(checkpoint, folder, tmp_path, capsys):
    output = tmp_path / "out"
    for arguments, words in (
        ((checkpoint, output, tmp_path / "absent"), "no such file or folder"),
        ((checkpoint.with_name("none.ckpt"), output, folder), "no such file"),
        ((checkpoint, output, tmp_path), "no image found"),
    ):
        assert predict(*arguments) == 2
        assert words in " ".join(capsys.readouterr().err.split())
    assert predict(checkpoint, output, folder / "readme.txt") == 3, "a file that is named is meant, and failed"


def test_a_second_call_skips_finished_images_and_another_model_is_refused(
    checkpoint, folder, tmp_path, monkeypatch, capsys
):
    written: list[str] = []
    write = ImageWriter.write

    def counted(self, found, *arguments):
        written.append(found.meta.id)
        write(self, found, *arguments)

    monkeypatch.setattr(ImageWriter, "write", counted)
    assert predict(checkpoint, tmp_path / "out", folder / "a.png") == 0
    assert predict(checkpoint, tmp_path / "out", folder) == 0
    assert written.count("a.png") == 1
    assert len(written) == 8
    stored = torch.load(checkpoint, weights_only=True)
    next(iter(stored["state_dict"].values())).add_(1)
    assert stored.pop("weights_sha256")  # another model, not the same one damaged
    other = tmp_path / "run/checkpoints/other.ckpt"
    other.parent.mkdir(parents=True)
    torch.save(stored, other)
    (tmp_path / "run/config.yaml").write_text((checkpoint.parent.parent / "config.yaml").read_text())
    assert predict(other, tmp_path / "out", folder) == 2
    assert "holds predictions of model" in " ".join(capsys.readouterr().err.split())


def test_a_killed_prediction_is_continued(checkpoint, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for number in range(60):
        Image.fromarray(film(60, 40, bits=8, seed=number)).save(images / f"{number:02d}.png")
    output = tmp_path / "out"
    less = ("--overlays=false",)
    command = ["predict", "--ckpt_path", str(checkpoint), "--images", str(images), "--output", str(output)]
    process = subprocess.Popen(
        [sys.executable, "-m", "mtmedformer", *command, QUIET, "--data.num_workers=0", *less],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while len(list(output.glob("images/*.json"))) < 3 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = {file.stem: file.stat().st_mtime_ns for file in output.glob("images/*.json")}
    assert 3 <= len(done) < 60
    assert predict(checkpoint, output, images, more=less) == 0
    after = {file.stem: file.stat().st_mtime_ns for file in output.glob("images/*.json")}
    assert len(after) == 60
    assert {name: after[name] for name in done} == done, "what was done is left as it is"
    assert predict(checkpoint, tmp_path / "once", images, more=less) == 0
    assert (output / "predictions.csv").read_bytes() == (tmp_path / "once/predictions.csv").read_bytes()
    assert not list(output.rglob(".*.part"))


def test_a_checkpoint_without_preprocessing_needs_it_on_the_command_line(checkpoint, folder, tmp_path, capsys):
    bare = tmp_path / "model.ckpt"
    bare.write_bytes(checkpoint.read_bytes())
    assert predict(bare, tmp_path / "out", folder / "a.png") == 2
    assert "--data.image_size" in capsys.readouterr().err
    assert predict(bare, tmp_path / "out", folder / "a.png", more=("--data.image_size=64",)) == 0


def test_a_data_set_is_predicted_completely_by_each_call(checkpoint):
    output = checkpoint.parent.parent / "predictions"
    for _ in range(2):
        assert main(["predict", "--ckpt_path", str(checkpoint), QUIET, "--data.predict_split=val"]) == 0
    rows, masks = rows_of(output / "predictions.csv"), list(output.glob("masks/organ/**/*.png"))
    assert len(rows) == len(masks) > 0
    assert all(row["site"] in {"north", "south"} for row in rows)
    for file in filter(Path.is_file, output.rglob("*")):
        assert b"secret-patient" not in file.read_bytes()


def test_real_films(checkpoint, tmp_path):
    root = real("dicom_fixtures")
    films = [root / "dicom_raw/cxr_Fake_MONOHR1.dcm", *sorted((root / "dicom_small").glob("*.dcm"))[:2]]
    assert predict(checkpoint, tmp_path / "out", *films, *sorted((root / "png512").glob("*.png"))[:1]) == 0
    rows = {row["image"]: row for row in rows_of(tmp_path / "out/predictions.csv")}
    assert len(rows) == 4
    assert rows["ddsm_P_00173_LCC.dcm"]["laterality"] == "L"
    assert rows["cxr_Fake_MONOHR1.dcm"]["organ:organ:mm2"]
    for name in films:
        assert hd.seg.segread(tmp_path / f"out/dicom/{name.name}.seg.dcm").Rows == dcmread(name).Rows


SAME = ("MR_small.dcm", "MR_small_bigendian.dcm", "MR_small_RLE.dcm", "MR_small_jp2klossless.dcm")
REAL = (*SAME, "CT_small.dcm", "JPGLosslessP14SV1_1s_1f_8b.dcm", "RG1_UNCR.dcm", "693_J2KI.dcm")


def test_real_transfer_syntaxes(checkpoint, tmp_path):
    found = {name: get_testdata_file(name, download=False) for name in REAL}
    files = [Path(file) for file in found.values() if file]
    if len(files) < len(REAL):
        pytest.skip("pydicom-data is not installed")
    assert predict(checkpoint, tmp_path / "out", *files, more=("--overlays=false",)) == 3
    rows = {row["image"]: row for row in rows_of(tmp_path / "out/predictions.csv")}
    assert set(rows) == set(REAL)
    assert len({(rows[name]["organ:organ:pixels"], rows[name]["health:sick"]) for name in SAME}) == 1
    failed = rows_of(tmp_path / "out/failed.csv")
    assert [(row["image"], row["reason"]) for row in failed] == [("693_J2KI.dcm", "no DICOM objects")], (
        "it has no frame"
    )
    assert {file.name.removesuffix(".sr.dcm") for file in (tmp_path / "out/dicom").glob("*.sr.dcm")} == (
        set(REAL) - {"693_J2KI.dcm"}
    )

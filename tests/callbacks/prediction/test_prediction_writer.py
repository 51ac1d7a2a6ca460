"""Output of predict: exact in original pixels, atomic, resumable, and without patient data."""

import csv
import errno
import json
import os
from pathlib import Path

import highdicom as hd
import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pydicom import dcmread
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    RLELossless,
)

from callbacks.prediction.image_writer import ImageWriter
from callbacks.prediction.prediction_folder import PredictionFolder, safe_class, safe_name
from callbacks.prediction.prediction_writer import PredictionWriter
from datamodules.image_folder import ImageFolderDataModule
from datamodules.images.presets import BreastPreset, PlainPreset
from mtmedformer.batch import Task
from mtmedformer.calibration import TaskCalibration
from mtmedformer.errors import ConfigError
from mtmedformer.storage.hashing import file_digest
from mtmedformer.storage.safe_text import from_cell
from tests.fixtures.dicom_files import write_dicom

SYNTAXES = [
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    ExplicitVRBigEndian,
    DeflatedExplicitVRLittleEndian,
    JPEG2000Lossless,
    RLELossless,
]
PLACE = (slice(64, 128), slice(32, 96))
"""Rows and columns of the bright rectangle, aligned to the grid of the network input."""
BOX = [32, 64, 96, 128]


class Echo(L.LightningModule):
    """Predicts exactly the bright pixels of the network input."""

    def __init__(self, bias: float = 0.0) -> None:
        super().__init__()
        self.bias = torch.nn.Parameter(torch.tensor(bias))
        self.seen = 0

    @property
    def tasks(self):
        kinds = {"health": "classification", "lesions": "detection", "organ": "segmentation"}
        classes = {"health": ("well", "sick"), "lesions": ("nodule",), "organ": ("organ",)}
        return {name: Task(name, kind, classes[name]) for name, kind in kinds.items()}

    def predict_step(self, batch, batch_idx):
        self.seen += len(batch)
        bright = batch.image[:, 0] > 0.5
        boxes = []
        for one in bright:
            rows, columns = torch.nonzero(one, as_tuple=True)
            xyxy = [[columns.min(), rows.min(), columns.max() + 1, rows.max() + 1], [20, 0, 29, 9]]
            boxes.append(
                {
                    "boxes": torch.tensor(xyxy).float(),
                    "scores": torch.tensor([0.9, 0.2]),
                    "labels": torch.zeros(2, dtype=torch.int64),
                }
            )
        share = bright.float().mean(dim=(1, 2))
        return {
            "health": torch.stack([1 - share, share], dim=1),
            "lesions": boxes,
            "organ": bright.float()[:, None],
            "uncertainty": {"health": {"mutual_information": share}},
        }


def planted(bright: int = 255, dark: int = 40, kind: str = "u1") -> np.ndarray:
    pixels = np.random.default_rng(0).integers(0, dark, (256, 192)).astype(kind)
    pixels[PLACE] = bright
    return pixels


def dicom(file: Path, syntax=ExplicitVRLittleEndian, pixels=None, **attributes) -> Path:
    pixels = planted(4095, 600, "u2") if pixels is None else pixels
    references = {"StudyInstanceUID": "1.2.3", "SeriesInstanceUID": "1.2.3.4", "PixelSpacing": [0.5, 0.25]}
    return write_dicom(file, pixels, syntax, bits=12, **(references | attributes))


def predict(images, output: Path, preset=None, model=None, batch_size=2, **options) -> PredictionWriter:
    writer = PredictionWriter(str(output), **({"overlays": False, "dicom": True} | options))
    data = ImageFolderDataModule(images, image_size=128, preset=preset, batch_size=batch_size, num_workers=0)
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[writer],
    )
    trainer.predict(model or Echo(), datamodule=data, return_predictions=False)
    return writer


def rows_of(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def mask_of(output: Path, name: str) -> np.ndarray:
    return np.asarray(Image.open(output / f"masks/organ/{name}_organ.png")) > 0


def expected() -> np.ndarray:
    mask = np.zeros((256, 192), bool)
    mask[PLACE] = True
    return mask


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """A folder of images in every format, and the predictions for it."""
    root = tmp_path_factory.mktemp("images")
    (root / "a/deep").mkdir(parents=True)
    for name in ("one.png", "two.tif", "three.jpg", "a/one.png"):
        Image.fromarray(planted()).save(root / name)
    for number, syntax in enumerate(SYNTAXES):
        dicom(root / "a/deep" / f"film{number}", syntax)
    output = tmp_path_factory.mktemp("output")
    writer = predict([root], output)
    return root, output, writer


def test_every_format_is_mapped_back_to_the_exact_pixel(everything):
    root, output, writer = everything
    names = sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())
    assert writer.exit_code == 0
    assert [row["image"] for row in rows_of(output / "predictions.csv")] == names
    assert len(names) == 4 + len(SYNTAXES)
    for name in names:
        np.testing.assert_array_equal(mask_of(output, name), expected(), err_msg=name)
        entry = json.loads((output / f"images/{name}.json").read_text())
        assert entry["boxes"]["lesions"][0] == {"class": "nodule", "score": 0.9, "xyxy": BOX}
        assert entry["input"]["sha256"] == file_digest(root / name)


def test_rows_agree_with_the_predictions(everything):
    _, output, _ = everything
    rows = {row["image"]: row for row in rows_of(output / "predictions.csv")}
    plain, film = rows["one.png"], rows["a/deep/film0"]
    assert plain["health:sick"] == f"{64 * 64 / 4 / 128**2:.4f}"
    assert plain["lesions:boxes"] == "1", "a box below the threshold does not count"
    assert (plain["lesions:best"], plain["organ:organ:pixels"], plain["organ:organ:mm2"]) == ("0.9000", "4096", "")
    assert film["organ:organ:mm2"] == f"{4096 * 0.5 * 0.25:.1f}"
    assert float(plain["organ:entropy"]) == 0
    assert float(plain["health:entropy"]) == pytest.approx(0.2338, abs=1e-3)
    assert plain["health:mutual_information"] == plain["health:sick"], (
        "uncertainties added by the model are written too"
    )
    assert len({row["model"] for row in rows.values()}) == 1


def test_boxes_are_valid_coco(everything, capsys):
    _, output, _ = everything
    coco = COCO(str(output / "boxes.json"))
    assert {one["file_name"] for one in coco.imgs.values()} == {
        row["image"] for row in rows_of(output / "predictions.csv")
    }
    best = [one for one in coco.anns.values() if one["score"] == 0.9]
    assert all(one["bbox"] == [32, 64, 64, 64] for one in best)
    assert len(best) == len(coco.imgs)
    assert [c["name"] for c in coco.cats.values()] == ["nodule"]


@pytest.mark.parametrize("number", range(len(SYNTAXES)))
def test_dicom_objects_refer_to_their_image(everything, number):
    root, output, _ = everything
    uid = dcmread(root / f"a/deep/film{number}").SOPInstanceUID
    masks = hd.seg.segread(output / f"dicom/a/deep/film{number}.seg.dcm")
    pixels = masks.get_pixels_by_source_instance([uid])
    np.testing.assert_array_equal(pixels[0, ..., 0] > 0, expected())
    report = hd.sr.srread(output / f"dicom/a/deep/film{number}.sr.dcm")
    box = report.content.get_planar_roi_measurement_groups()[0].roi.value
    np.testing.assert_allclose([*box.min(axis=0), *box.max(axis=0)], BOX)


def test_only_dicom_objects_hold_patient_data_and_every_file_has_the_research_note(everything):
    _, output, _ = everything
    for file in filter(Path.is_file, output.rglob("*")):
        content = file.read_bytes()
        assert (b"Secret" in content) == (file.suffix == ".dcm"), file
        if file.name != "failed.csv":  # it is empty when nothing failed
            assert b"esearch use only" in content, file


@pytest.mark.parametrize("side", ["L", "R"])
def test_masks_of_a_flipped_image_return_to_the_original_orientation(side, tmp_path):
    pixels = np.zeros((256, 192), np.uint16)
    pixels[20:236, :120] = 1500  # chest wall at the left edge
    pixels[PLACE] = 4095
    mask = expected()
    if side == "R":
        pixels, mask = pixels[:, ::-1].copy(), mask[:, ::-1]
    dicom(tmp_path / "film.dcm", pixels=pixels, ImageLaterality=side, ViewPosition="MLO")
    predict([tmp_path / "film.dcm"], tmp_path / "out", BreastPreset(crop=False, flip_to="L"), overlays=True)
    np.testing.assert_array_equal(mask_of(tmp_path / "out", "film.dcm"), mask)
    row = rows_of(tmp_path / "out/predictions.csv")[0]
    assert (row["laterality"], row["view"]) == (side, "MLO")
    assert Image.open(tmp_path / "out/overlays/film.dcm.png").width > 500


def test_unreadable_files_are_listed_and_the_others_are_predicted(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for number in range(3):
        Image.fromarray(planted()).save(images / f"good{number}.png")
    (images / "broken.png").write_bytes((images / "good0.png").read_bytes()[:200])
    (images / "empty.jpg").write_bytes(b"")
    dicom(images / "cut.dcm").write_bytes((images / "cut.dcm").read_bytes()[:-500])
    (images / "notes.txt").write_text("not an image, and not taken for one")
    writer = predict([images], tmp_path / "out")
    assert writer.exit_code == 3
    failed = rows_of(tmp_path / "out/failed.csv")
    assert [row["image"] for row in failed] == ["broken.png", "cut.dcm", "empty.jpg"]
    assert all(row["reason"] == "image unreadable" and row["detail"] for row in failed)
    assert not any(str(tmp_path) in row["detail"] for row in failed), "folders may be named after patients"
    assert len(rows_of(tmp_path / "out/predictions.csv")) == 3
    for row in failed:
        (images / row["image"]).unlink()
    model = Echo()
    assert predict([images], tmp_path / "out", model=model).exit_code == 0
    assert model.seen == 0
    assert rows_of(tmp_path / "out/failed.csv") == []


def test_a_failed_image_with_control_characters_in_its_name_is_listed_with_escapes(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images/\x1b[31mbad.png").write_bytes(b"no image")
    assert predict([tmp_path / "images"], tmp_path / "out").exit_code == 3
    text = (tmp_path / "out/failed.csv").read_text()
    assert "\x1b" not in text
    assert text.count("\\x1b[31mbad.png") == 2, "in the name and in the detail"


def test_run_without_a_readable_image_fails_without_a_crash(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG and no more")
    assert predict([tmp_path / "broken.png"], tmp_path / "out").exit_code == 3
    assert (tmp_path / "out/predictions.csv").is_file()


def test_image_without_identifiers_is_predicted_without_dicom_objects_and_listed(tmp_path):
    dicom(tmp_path / "film.dcm", SeriesInstanceUID="")
    assert predict([tmp_path / "film.dcm"], tmp_path / "out").exit_code == 3
    assert rows_of(tmp_path / "out/failed.csv")[0]["reason"] == "no DICOM objects"
    assert rows_of(tmp_path / "out/predictions.csv")[0]["organ:organ:pixels"] == "4096"


def test_calibrated_thresholds_decide_what_counts(four, tmp_path):
    model = Echo()
    model.calibration = {
        "health": TaskCalibration(images=9, thresholds={"sick": {"youden": 0.05, "f1": 0.9}}),
        "lesions": TaskCalibration(images=9, thresholds={"nodule": {"f1": 0.1}}),
    }
    predict([four], tmp_path / "out", model=model)
    row = rows_of(tmp_path / "out/predictions.csv")[0]
    assert row["health:sick:found"] == "1"
    assert "health:well:found" not in row, "it has no threshold"
    assert row["lesions:boxes"] == "2"
    predict([four], tmp_path / "other", model=model, threshold=0.95, operating_point="f1")
    row = rows_of(tmp_path / "other/predictions.csv")[0]
    assert (row["health:sick:found"], row["lesions:boxes"]) == ("0", "0")
    with pytest.raises(ConfigError, match="calibration"):
        predict([four], tmp_path / "out")


@pytest.fixture
def four(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for number in range(4):
        Image.fromarray(planted(dark=40 + number)).save(images / f"{number}.png")
    return images


def interrupt(monkeypatch, at: int) -> None:
    """Interrupt the run after all files of an image except its JSON are written."""
    finish = PredictionFolder.finish

    def stop(self, image, entry):
        if image == f"{at}.png":
            raise KeyboardInterrupt
        finish(self, image, entry)

    monkeypatch.setattr(PredictionFolder, "finish", stop)


def test_interrupted_run_continues_with_the_missing_images(four, tmp_path, monkeypatch):
    predict([four], tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt(patch, at=2)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            predict([four], tmp_path / "out", batch_size=1)
    assert [row["image"] for row in rows_of(tmp_path / "out/predictions.csv")] == ["0.png", "1.png"]
    model = Echo()
    predict([four], tmp_path / "out", model=model, batch_size=1)
    assert model.seen == 2
    for name in ("predictions.csv", "boxes.json", "masks/organ/2.png_organ.png"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not list((tmp_path / "out").rglob(".*.part"))


def test_changed_images_and_missing_outputs_are_predicted_again(four, tmp_path):
    predict([four], tmp_path / "out")
    Image.fromarray(planted(dark=200)).save(four / "0.png")
    (tmp_path / "out/masks/organ/1.png_organ.png").unlink()
    (tmp_path / "out/images/2.png.json").write_text('{"image": ')
    (four / "3.png").touch()  # new modification time, same content
    model = Echo()
    predict([four], tmp_path / "out", model=model)
    assert model.seen == 3
    assert len(rows_of(tmp_path / "out/predictions.csv")) == 4


def test_partial_files_of_a_killed_run_are_removed(four, tmp_path):
    predict([four], tmp_path / "out")
    left = tmp_path / "out/masks/organ/.9.png_organ.png.123.part"
    left.write_bytes(b"half")
    predict([four], tmp_path / "out")
    assert not left.exists()


def test_predictions_of_two_models_or_settings_are_not_mixed(four, tmp_path):
    predict([four], tmp_path / "out")
    with pytest.raises(ConfigError, match="holds predictions of model"):
        predict([four], tmp_path / "out", model=Echo(bias=1.0))
    with pytest.raises(ConfigError, match=r"other settings \(score differ\)"):
        predict([four], tmp_path / "out", score=0.5)
    with pytest.raises(ConfigError, match=r"other settings \(preset differ\)"):
        predict([four], tmp_path / "out", preset=BreastPreset())
    predict([four], tmp_path / "out", preset=PlainPreset())


def test_predictions_in_the_image_folder_are_not_taken_for_images(four):
    predict([four], four / "out")
    model = Echo()
    predict([four], four / "out", model=model)
    assert model.seen == 0
    assert len(rows_of(four / "out/predictions.csv")) == 4


@pytest.mark.parametrize("output", ["", "deeper", "link"])
def test_an_output_folder_with_images_to_predict_is_refused_and_left_as_it_is(four, output, tmp_path):
    (four / "deeper").mkdir()
    (four / "deeper/e.png").write_bytes((four / "0.png").read_bytes())
    (four / "link").symlink_to(four / "deeper")
    before = sorted(four.rglob("*"))
    with pytest.raises(ConfigError, match="images to predict lie in this folder; choose another one"):
        predict([four], four / output)
    assert sorted(four.rglob("*")) == before


def test_a_file_that_changes_or_vanishes_is_listed_and_the_others_are_predicted(four, tmp_path, monkeypatch):
    changes = {"0.png": lambda file: Image.fromarray(planted(dark=90)).save(file), "1.png": Path.unlink}

    class Meanwhile(Echo):
        def predict_step(self, batch, batch_idx):
            change = changes.get(batch.meta[0].id)
            if change:
                change(four / batch.meta[0].id)
            return super().predict_step(batch, batch_idx)

    predict([four], tmp_path / "out", model=Meanwhile(), batch_size=1)
    failed = {row["image"]: row["detail"] for row in rows_of(tmp_path / "out/failed.csv")}
    assert failed.keys() == {"0.png", "1.png"}
    assert "changed while it was predicted" in failed["0.png"]
    assert failed["1.png"] == "No such file or directory"
    assert [row["image"] for row in rows_of(tmp_path / "out/predictions.csv")] == ["2.png", "3.png"]


@pytest.mark.parametrize("task", ["health", "lesions", "organ"])
def test_an_output_of_nan_is_a_failure_and_never_a_result(four, task, tmp_path):
    class Broken(Echo):
        def predict_step(self, batch, batch_idx):
            outputs = super().predict_step(batch, batch_idx)
            if batch.meta[0].id == "1.png":
                if task == "lesions":
                    outputs[task][0]["scores"][0] = torch.nan
                else:
                    outputs[task][0].view(-1)[0] = torch.inf
            return outputs

    writer = predict([four], tmp_path / "out", model=Broken(), batch_size=1)
    assert writer.exit_code == 3
    assert [row["image"] for row in rows_of(tmp_path / "out/predictions.csv")] == ["0.png", "2.png", "3.png"]
    failed = rows_of(tmp_path / "out/failed.csv")
    assert [row["image"] for row in failed] == ["1.png"]
    assert f"output for {task} is NaN or infinite" in failed[0]["detail"]
    assert not list((tmp_path / "out").rglob("*1.png_organ.png"))


def test_an_image_whose_files_cannot_be_written_is_listed_but_a_full_disk_ends_the_run(four, tmp_path, monkeypatch):
    write = ImageWriter._masks

    def failing(number):
        def masks(self, result):
            if result.meta.id == "1.png":
                raise OSError(number, os.strerror(number), "secret/1.png")
            return write(self, result)

        return masks

    monkeypatch.setattr(ImageWriter, "_masks", failing(errno.ENAMETOOLONG))
    assert predict([four], tmp_path / "out").exit_code == 3
    assert [row["detail"] for row in rows_of(tmp_path / "out/failed.csv")] == ["File name too long"]
    assert len(rows_of(tmp_path / "out/predictions.csv")) == 3
    monkeypatch.setattr(ImageWriter, "_masks", failing(errno.ENOSPC))
    with pytest.raises(OSError, match="No space left"):
        predict([four], tmp_path / "full")
    monkeypatch.undo()
    assert predict([four], tmp_path / "full").exit_code == 0
    assert len(rows_of(tmp_path / "full/predictions.csv")) == 4


def test_cells_are_no_formulas_and_can_be_read_back(four, tmp_path):
    names = ["=HYPERLINK(1).png", "+1.png", "-1.png", "@sum.png", "'=1.png", "plain.png"]
    for name in names:
        (four / name).write_bytes((four / "0.png").read_bytes())
    (four / "-broken.png").write_bytes(b"")
    predict([four], tmp_path / "out")
    cells = [row["image"] for row in rows_of(tmp_path / "out/predictions.csv")]
    assert all(one[0] not in "=+-@" for one in cells)
    assert {from_cell(one) for one in cells} == {*names, *(f"{one}.png" for one in range(4))}
    assert rows_of(tmp_path / "out/failed.csv")[0]["image"] == "'-broken.png"


def test_the_json_of_an_earlier_run_deletes_nothing_outside_and_no_foreign_file(four, tmp_path):
    out, outside = tmp_path / "out", tmp_path / "outside.png"
    predict([four], out)
    outside.write_bytes(b"kept")
    entry = json.loads((out / "images/0.png.json").read_text())
    hostile = {"image": "0.png", "failed": "x", "files": ["../outside.png", str(outside)]}
    (out / "images/0.png.json").write_text(json.dumps(hostile))
    (out / "images/annotations.json").write_text('{"categories": []}')
    (out / "images/1.png.json").write_text("[" * 100_000)
    (out / "images/2.png.json").write_text(json.dumps({key: entry[key] for key in ("image", "row")}))
    predict([four], out)
    assert outside.read_bytes() == b"kept"
    assert (out / "images/annotations.json").exists()
    assert len(rows_of(out / "predictions.csv")) == 4
    (out / "about_predictions.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        predict([four], out)


def test_safe_names_are_valid_paths_and_unique():
    ids = [
        "a/b.png",
        "a_b.png",
        "a b.png",
        "../../etc/passwd",
        "ä/ö.png",
        "x" * 300,
        "影" * 300,
        "caf\udce9",
        "/".join(["deep"] * 400),
        ".hidden",
        "a//b.png",
        "a/./b.png",
    ]
    names = [safe_name(one) for one in ids]
    assert names[0] == "a/b.png"
    assert len(set(names)) == len(ids)
    for name in names:
        assert ".." not in name.split("/")
        assert not name.startswith("/")
        assert len(name.encode()) < 600
        assert all(len(part.encode()) <= 120 for part in name.split("/"))


def test_the_name_of_a_class_stays_within_the_folder():
    assert safe_class("ground glass") == "ground glass"
    hostile = ["/../../x", "..\\x", "a/b", "a_b", "x\x1b[1m", "x" * 300]
    assert not any(set("/\\\x1b") & set(safe_class(one)) for one in hostile)
    assert len({safe_class(one) for one in hostile}) == len(hostile)

"""Colour images by the command line: fit, test, predict on colour and multi-frame DICOM files, export."""

import csv
import json

import numpy as np
import onnx
import pytest
from PIL import Image
from pydicom import dcmread
from pydicom.pixels.processing import convert_color_space
from pydicom.uid import MultiFrameTrueColorSecondaryCaptureImageStorage, UltrasoundImageStorage, generate_uid

from datamodules.images.pixels import read_image
from mtmedformer.commands.main import main
from tests.fixtures.dicom_files import film, write_dicom, write_frames
from tests.fixtures.small_set import small_config, write_config

QUIET = "--trainer.enable_progress_bar=false"


def photograph(red: bool, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a red or blue spot on skin, uint8 (64, 64, 3), and its mask; both colours are equally bright."""
    spot = film(64, 64, bits=8, seed=seed) > 100
    pixels = np.full((64, 64, 3), (180, 150, 120), np.uint8)
    pixels[spot] = (200, 40, 40) if red else (40, 99, 145)
    return pixels, spot


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run on twelve PNG and JPEG photographs with a class and a mask each."""
    root, runs = tmp_path_factory.mktemp("set"), tmp_path_factory.mktemp("runs")
    rows = []
    for n in range(12):
        pixels, spot = photograph(n % 2 == 0, n)
        name = f"{n:02d}.{('png', 'jpg')[n // 2 % 2]}"
        Image.fromarray(pixels).save(root / name)
        Image.fromarray(spot).save(root / f"mask{n:02d}.png")
        rows.append({"image": name, "label": ("red", "blue")[n % 2], "mask_spot": f"mask{n:02d}.png"})
    with (root / "labels.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    config = small_config(root, runs, max_epochs=1)
    config["model"]["init_args"]["encoder"]["init_args"]["in_chans"] = 3
    config["model"]["init_args"]["heads"] = {
        "hue": {"class_path": "mtmedformer.ClassificationHead", "init_args": {"classes": ["red", "blue"]}},
        "lesion": {"class_path": "mtmedformer.SegmentationHead", "init_args": {"classes": ["spot"]}},
    }
    arguments = config["data"]["init_args"]
    del arguments["detection"]
    arguments |= {
        "patient_column": None,
        "classification": {"hue": {"column": "label", "classes": ["red", "blue"]}},
        "segmentation": {"lesion": {"columns": {"spot": "mask_spot"}}},
        "preset": {"class_path": "datamodules.ColourPreset", "init_args": {"hue": 0.03, "saturation": 0.2}},
        "val_fraction": 0.25,
        "test_fraction": 0.25,
    }
    assert main(["fit", "--config", write_config(config, runs / "config.yaml")]) == 0
    return runs / "run"


def test_a_colour_model_is_tested(trained):
    assert main(["test", "--ckpt_path", f"{trained}/checkpoints/best.ckpt", QUIET]) == 0
    metrics = json.loads((trained / "test_metrics.json").read_text())
    assert metrics["test/hue/n_images"] == metrics["test/lesion/n_images"] == 3


@pytest.fixture(scope="module")
def ward(tmp_path_factory):
    """A folder with a colour image, a colour cine of three frames and a grey cine of three frames."""
    folder = tmp_path_factory.mktemp("ward")
    frames = np.stack([photograph(n == 1, n)[0] for n in range(3)])
    ybr = convert_color_space(frames[1], "RGB", "YBR_FULL")
    study, cine = {"StudyInstanceUID": "1.2.3"}, {"SOPClassUID": MultiFrameTrueColorSecondaryCaptureImageStorage}
    write_dicom(
        folder / "skin.dcm", ybr, PhotometricInterpretation="YBR_FULL", SeriesInstanceUID=generate_uid(),
        SOPClassUID=UltrasoundImageStorage, Modality="US", **study,
    )  # fmt: skip
    write_frames(folder / "cine.dcm", frames, SeriesInstanceUID=generate_uid(), Modality="XC", **cine, **study)
    grey = np.stack([film(50, 40, seed=n) for n in range(3)])
    write_frames(folder / "tomo.dcm", grey, bits=12, SeriesInstanceUID=generate_uid(), **study)
    return folder


def references(item, uid):
    """Return the frames of all references of an object, at any depth, to an instance; ``None`` for all frames."""
    found = []
    for element in item:
        if element.VR == "SQ":
            for inner in element.value:
                if inner.get("ReferencedSOPInstanceUID") == uid:
                    found.append(inner.get("ReferencedFrameNumber"))
                found += references(inner, uid)
    return found


def files_of(output, name):
    """Return the DICOM objects of an image by kind."""
    entries = [json.loads(file.read_text()) for file in output.glob("images/*.json")]
    (entry,) = [entry for entry in entries if entry["image"] == name]
    return {file.split(".")[-2]: file for file in entry["files"] if file.endswith(".dcm")}


def test_each_frame_is_predicted_with_objects_that_refer_to_it(trained, ward, tmp_path):
    command = ["predict", "--ckpt_path", f"{trained}/checkpoints/best.ckpt", "--images", str(ward)]
    more = ["--gsps", "--secondary_capture", "--data.num_workers=0", QUIET]
    assert main([*command, f"--output={tmp_path}", *more]) == 0
    with (tmp_path / "predictions.csv").open(newline="") as file:
        rows = {row["image"]: row for row in csv.DictReader(file)}
    cines = {name: [f"{name}#{n}" for n in (1, 2, 3)] for name in ("cine.dcm", "tomo.dcm")}
    assert list(rows) == [*cines["cine.dcm"], "skin.dcm", *cines["tomo.dcm"]]
    # the colour image is the second frame of the cine, but for the rounding of YBR_FULL
    assert float(rows["skin.dcm"]["hue:red"]) == pytest.approx(float(rows["cine.dcm#2"]["hue:red"]), abs=0.02)
    for name in rows:
        files = files_of(tmp_path, name)
        source = dcmread(ward / name.split("#")[0])
        frame = int(name.split("#")[1]) if "#" in name else None
        made = {kind: dcmread(tmp_path / file) for kind, file in files.items()}
        assert made.keys() == {"seg", "sr", "gsps", "sc"}
        for kind, written in made.items():
            assert written.StudyInstanceUID == source.StudyInstanceUID
            frames = references(written, source.SOPInstanceUID)
            assert frames, f"{name}: the {kind} does not refer to its image"
            # lists of the files that an object uses have no frame
            assert {None if n is None else int(n) for n in frames} - {None} == ({frame} if frame else set()), kind
        assert made["seg"].Rows == made["sc"].Rows == source.Rows
        if name not in cines["tomo.dcm"]:  # the colours of the frame, outside of what is drawn into it
            shown = read_image(ward / name.split("#")[0], colour=True, frame=frame).pixels * 255
            same = np.abs(made["sc"].pixel_array - shown).max(axis=2) <= 1
            assert same.mean() > 0.3
            assert np.ptp(shown[same], axis=1).mean() > 50
    assert (tmp_path / "failed.csv").read_text().count("\n") == 1


def test_the_exported_graph_takes_three_channels(trained, tmp_path):
    checkpoint = f"{trained}/checkpoints/best.ckpt"
    assert main(["export", f"--ckpt_path={checkpoint}", f"--output={tmp_path}"]) == 0
    graph = onnx.load(tmp_path / "model.onnx").graph
    (image,) = graph.input
    assert image.type.tensor_type.shape.dim[1].dim_value == 3

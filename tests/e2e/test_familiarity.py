"""A model refuses what it was not made for: fit, test, predict, load and export as a user calls them."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import mtmedformer
from mtmedformer.commands.main import main
from tests.fixtures.dicom_files import film, write_dicom
from tests.fixtures.small_set import small_config, write_config, write_small_set

CHEST = {"BodyPartExamined": "CHEST", "ViewPosition": "PA", "Modality": "DX"}


def write_films(folder: Path, count: int, first: int = 0, **more: str) -> list[Path]:
    """Write chest films of one kind as DICOM files, each of its own study."""
    folder.mkdir(parents=True, exist_ok=True)
    return [
        write_dicom(
            folder / f"{n}.dcm",
            film(72, 64, seed=n),
            bits=12,
            StudyInstanceUID=f"1.2.{n + 1}",
            SeriesInstanceUID=f"1.3.{n + 1}",
            **{**CHEST, **more},
        )
        for n in range(first, first + count)
    ]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The run folder of a small chest model, trained on DICOM films and tested."""
    root, runs = tmp_path_factory.mktemp("films"), tmp_path_factory.mktemp("runs")
    files = write_films(root, 40)
    with (root / "labels.csv").open("w", newline="") as table:
        rows = csv.writer(table)
        rows.writerow(["image", "patient", "site", "label", "split"])
        for n, file in enumerate(files):
            split = "train" if n < 24 else "val" if n < 34 else "test"
            rows.writerow([file.name, f"secret-{n}", ("north", "south")[n % 2], ("well", "sick")[n // 2 % 2], split])
    config = small_config(root, runs, max_epochs=1)
    heads = config["model"]["init_args"]["heads"]
    config["model"]["init_args"]["heads"] = {name: heads[name] for name in ("health", "organ")}
    config["model"]["init_args"]["tasks"] = ["health"]
    arguments = config["data"]["init_args"]
    del arguments["detection"], arguments["segmentation"]
    path = write_config(config, runs / "config.yaml")
    assert main(["fit", "--config", path]) == 0
    assert main(["test", "--config", path, "--ckpt_path", str(runs / "run/checkpoints/best.ckpt")]) == 0
    return runs / "run"


def predict(run: Path, output: Path, *images: Path, more: tuple[str, ...] = ()) -> int:
    arguments = ["--ckpt_path", str(run / "checkpoints/best.ckpt"), "--images", *map(str, images)]
    quiet = ["--trainer.enable_progress_bar=false", "--data.num_workers=0", "--output", str(output)]
    return main(["predict", *arguments, *quiet, *more])


def rows_of(file: Path) -> dict[str, dict[str, str]]:
    with file.open(newline="") as lines:
        return {row["image"]: row for row in csv.DictReader(lines)}


def noise(folder: Path, **more: str) -> Path:
    """Write a DICOM file with the header of a chest film whose pixels are none."""
    pixels = np.random.default_rng(0).integers(0, 4096, (72, 64)).astype(np.uint16)
    uids = {"StudyInstanceUID": "1.2.900", "SeriesInstanceUID": "1.3.900"}
    return write_dicom(folder / "noise.dcm", pixels, bits=12, **{**CHEST, **uids, **more})


def test_the_checkpoints_describe_the_training_images_without_naming_one(run):
    for name in ("best.ckpt", "last.ckpt"):
        stored = torch.load(run / "checkpoints" / name, weights_only=True)["familiarity"]
        assert stored["images"] == 24
        assert stored["validation"]["images"] == 10
        assert stored["headers"]["Modality"] == {"images": 24, "patients": {"CR/DX": 24}}
        assert stored["headers"]["View"]["patients"] == {"PA": 24}
        assert "secret" not in json.dumps(stored, default=lambda tensor: list(tensor.shape)).lower()


def test_a_test_lists_the_distances_and_reports_drift(run):
    rows = rows_of(run / "familiarity.csv")
    assert len(rows) == 6
    assert [row["unfamiliar"] for row in rows.values()] == ["0"] * 6, "images of the same kind pass"
    page = (run / "report.html").read_text()
    assert "Unfamiliar test images by site" in page
    assert "south" in page


def test_predict_marks_unlike_images_and_passes_like_ones(run, tmp_path):
    like = write_films(tmp_path / "like", 3, first=50, Modality="CR")
    (breast,) = write_films(
        tmp_path / "breast", 1, first=60, Modality="MG", BodyPartExamined="BREAST", ViewPosition="CC"
    )
    assert predict(run, tmp_path / "out", *like, breast, noise(tmp_path)) == 0
    rows = rows_of(tmp_path / "out/predictions.csv")
    assert [rows[file.name]["unfamiliar"] for file in like] == ["0"] * 3
    assert all(0 < float(rows[file.name]["unfamiliar:distance"]) <= 1 for file in like)
    why = "BodyPartExamined BREAST (training: CHEST); Modality MG (training: CR/DX); View CC (training: PA)"
    assert set(why.split("; ")) == set(rows[breast.name]["unfamiliar:why"].split("; "))
    assert float(rows["noise.dcm"]["unfamiliar:distance"]) > 1
    assert "times the largest usual distance" in rows["noise.dcm"]["unfamiliar:why"]
    entry = json.loads((tmp_path / f"out/images/{breast.name}.json").read_text())
    assert len(entry["familiarity"]["reasons"]) == 3
    assert (tmp_path / f"out/dicom/{breast.name}.sr.dcm").is_file(), "a warning alone keeps the objects"


def test_refused_images_have_no_prediction_and_are_listed(run, tmp_path):
    like = write_films(tmp_path / "like", 2, first=50)
    (breast,) = write_films(tmp_path / "breast", 1, first=60, Modality="MG")
    assert predict(run, tmp_path / "out", *like, breast, noise(tmp_path), more=("--refuse_unfamiliar",)) == 3
    failed = rows_of(tmp_path / "out/failed.csv")
    assert set(failed) == {breast.name, "noise.dcm"}
    assert failed[breast.name]["reason"] == "refused: unlike the training images"
    assert failed[breast.name]["detail"] == "Modality MG (training: CR/DX)"
    written = sorted(file.name for file in (tmp_path / "out").rglob("*") if file.parent.name != "images")
    assert not any(name.startswith((breast.name, "noise")) for name in written), "no SR, no mask, no picture"
    assert {name for name in written if name.endswith(".sr.dcm")} == {f"{file.name}.sr.dcm" for file in like}
    rows = rows_of(tmp_path / "out/predictions.csv")
    assert rows[breast.name]["unfamiliar"] == "1"
    assert rows[breast.name]["health:sick"] == ""
    assert rows[like[0].name]["health:sick"]


def test_python_and_an_export_give_the_same_familiarity(run, tmp_path):
    (breast,) = write_films(tmp_path, 1, Modality="MG")
    found = mtmedformer.load(run / "checkpoints/best.ckpt").predict(breast).familiarity
    assert found.reasons == ("Modality MG (training: CR/DX)",)
    assert 0 < found.distance <= 1
    checkpoint = ["--ckpt_path", str(run / "checkpoints/best.ckpt")]
    assert main(["export", *checkpoint, "--output", str(tmp_path / "exported"), "--format=safetensors"]) == 0
    assert mtmedformer.load(tmp_path / "exported").predict(breast).familiarity == found


def test_a_checkpoint_without_familiarity_predicts_but_cannot_refuse(run, tmp_path, capsys):
    stored = torch.load(run / "checkpoints/best.ckpt", weights_only=True)
    del stored["familiarity"]
    older = tmp_path / "run/checkpoints/best.ckpt"
    older.parent.mkdir(parents=True)
    torch.save(stored, older)
    (tmp_path / "run/config.yaml").write_text((run / "config.yaml").read_text())
    image = write_films(tmp_path / "films", 1)[0]
    assert predict(tmp_path / "run", tmp_path / "out", image, more=("--refuse_unfamiliar",)) == 2
    assert "does not describe its training images" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists(), "a command that fails to start changes nothing"
    assert predict(tmp_path / "run", tmp_path / "out", image) == 0
    assert "unfamiliar" not in (tmp_path / "out/predictions.csv").read_text()


def test_a_federation_is_described_by_sums_over_its_sites(tmp_path):
    config = small_config(write_small_set(tmp_path / "set", patients=20), tmp_path, max_epochs=1)
    data = {"data": config["data"], "by": "site"}
    config["data"] = {"class_path": "federation.FederatedDataModule", "init_args": data}
    federation = {"aggregator": {"class_path": "federation.FedAvg"}, "align": False, "validate_sites": False}
    config["federation"] = {"class_path": "callbacks.Federation", "init_args": federation}
    assert main(["fit", "--config", write_config(config, tmp_path / "config.yaml")]) == 0
    stored = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["familiarity"]
    sites = json.loads((tmp_path / "run/sites.json").read_text())
    assert stored["images"] == sum(site["images"] for site in sites)
    assert stored["headers"]["View"]["patients"].keys() == {"PA", "AP"}
    assert stored["limit"] > 0

"""Exams and breasts as a user calls them: ``data.case`` in ``test`` and ``predict``."""

import csv
import json
import shutil
from collections import Counter
from pathlib import Path

import highdicom as hd
import numpy as np
import pytest
import yaml
from PIL import Image

from datamodules import LabelsCSVDataModule
from datamodules.labels_csv.columns import ClassColumns
from mtmedformer.commands.main import main
from tests.fixtures.dicom_files import film, write_dicom
from tests.fixtures.pairs import write_pairs
from tests.fixtures.real_data import real
from tests.fixtures.small_set import small_config, write_config
from tests.fixtures.stored_models import OF_FIT, description, write_checkpoint

QUIET = "--trainer.enable_progress_bar=false"


@pytest.fixture(scope="module")
def run(images, tmp_path_factory) -> Path:
    """A run of an untrained model on the small set, whose patients have two images each."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    file = write_checkpoint(folder, description("health", "organ"), 1, **OF_FIT)
    data = small_config(images, folder.parent)["data"]
    del data["init_args"]["detection"]
    data["init_args"] |= {"negative": ["well"], "test_split": "all"}
    (folder / "config.yaml").write_text(yaml.safe_dump({"data": data}))
    return file


def test_test_gives_results_by_case(run, images, capsys):
    assert main(["test", f"--ckpt_path={run}", QUIET, "--data.case=[patient]"]) == 0
    printed = capsys.readouterr().out
    assert "health by case: 32 images" in printed
    folder = run.parents[1]
    metrics = json.loads((folder / "test_metrics.json").read_text())
    assert metrics["test/health by case/n_images"] == 32
    with (images / "labels.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    by_patient = [{row["label"] for row in rows if row["patient"] == p} for p in {row["patient"] for row in rows}]
    labelled = [("sick" in one) or one == {"well"} for one in by_patient]
    assert metrics["test/health by case/n_cases"] == sum(labelled) < 16
    assert metrics["test/health by case/n_unlabelled"] == 16 - sum(labelled)
    assert metrics["test/health by case/auroc_ci_low"] <= metrics["test/health by case/auroc"]
    page = (folder / "report.html").read_text()
    assert "health by case" in page
    card = (folder / "model_card.md").read_text()
    assert f" on {sum(labelled)} cases of " in next(line for line in card.splitlines() if "health by case: " in line)
    assert "secret-patient" not in page


def test_predict_images_pools_the_files_of_a_study(run, tmp_path):
    """Two views of a left breast and one of the right; a picture without a header belongs to no case."""
    files = tmp_path / "files"
    files.mkdir()
    for number, (side, view) in enumerate((("L", "CC"), ("L", "MLO"), ("R", "CC"))):
        own = {"StudyInstanceUID": "1.2.3", "SeriesInstanceUID": f"1.2.3.{number + 1}", "PatientID": "secret"}
        more = {"ImageLaterality": side, "ViewPosition": view, "Modality": "MG"}
        write_dicom(files / f"{side}{view}.dcm", film(70, 50, seed=number), bits=12, **own, **more)
    Image.fromarray(film(70, 50, bits=8)).save(files / "plain.png")
    output = tmp_path / "out"
    command = ["predict", f"--ckpt_path={run}", "--images", str(files), f"--output={output}", "--overlays=false", QUIET]
    options = ["--data.case=[study,laterality]", "--data.negative_classes=[well]", "--data.num_workers=0"]
    assert main([*command, *options]) == 0
    with (output / "predictions.csv").open(newline="") as file:
        rows = {row["image"]: row for row in csv.DictReader(file)}
    with (output / "cases.csv").open(newline="") as file:
        cases = {row["laterality"]: row for row in csv.DictReader(file)}
    assert rows["plain.png"]["case"] == ""
    assert (cases["L"]["images"], cases["R"]["images"]) == ("2", "1")
    sick = [float(rows[f"L{view}.dcm"]["health:sick"]) for view in ("CC", "MLO")]
    assert sick[0] != sick[1]
    assert float(cases["L"]["health:sick"]) == pytest.approx(max(sick), abs=1e-4)
    report = hd.sr.srread(output / f"dicom/cases/{cases['L']['case']}.sr.dcm")
    assert len(report.content.get_image_measurement_groups()[0].source_images) == 2
    assert "secret" not in (output / "cases.csv").read_text() + (output / "predictions.csv").read_text()


def test_mistakes_in_cases_are_one_sentence(run, capsys):
    for options, words in (
        (["--data.case=[patient,study]"], "images have no 'study'; choose from patient, site, view, laterality"),
        (["--data.case_batches=true"], "case_batches needs data.init_args.case"),
    ):
        assert main(["test", f"--ckpt_path={run}", QUIET, *options]) == 2
        assert words in " ".join(capsys.readouterr().err.split())


def pair_config(root: Path, runs: Path, head: str) -> dict:
    """Return a configuration that trains a head on `write_pairs`."""
    config = small_config(root, runs, max_epochs=6)
    heads = {"pair": {"class_path": f"mtmedformer.{head}", "init_args": {"classes": ["equal", "unequal"]}}}
    config["model"]["init_args"]["heads"] = heads
    arguments = config["data"]["init_args"]
    arguments.pop("detection"), arguments.pop("segmentation")
    arguments["classification"] = {"pair": {"column": "label", "classes": ["equal", "unequal"]}}
    arguments |= {"image_size": 32, "batch_size": 8, "preset": None, "case": ["patient"]}
    arguments |= {"negative": ["equal"], "case_batches": head == "CaseHead"}
    return config


def test_a_head_over_cases_learns_what_no_single_image_shows(tmp_path, capsys):
    """Both greys are as frequent in equal as in unequal pairs; only the pair shows the label."""
    root = write_pairs(tmp_path / "pairs")
    with (root / "labels.csv").open(newline="") as file:
        bright = {label: [] for label in ("equal", "unequal")}
        for row in csv.DictReader(file):
            bright[row["label"]].append(np.asarray(Image.open(root / row["image"]))[16, 16] > 140)
    assert np.mean(bright["equal"]) == np.mean(bright["unequal"]) == 0.5
    config = pair_config(root, tmp_path, "CaseHead")
    config["trainer"]["callbacks"] = [{"class_path": "callbacks.PredictionWriter"}]
    assert main(["fit", "--config", write_config(config, tmp_path / "pairs.yaml")]) == 0
    checkpoint = f"--ckpt_path={tmp_path}/run/checkpoints/best.ckpt"
    assert main(["test", checkpoint, QUIET]) == 0
    metrics = json.loads((tmp_path / "run/test_metrics.json").read_text())
    assert metrics["test/pair by case/auroc"] > 0.9
    assert main(["predict", checkpoint, QUIET, "--data.predict_split=test"]) == 0
    with (tmp_path / "run/predictions/cases.csv").open(newline="") as file:
        cases = list(csv.DictReader(file))
    with (tmp_path / "run/predictions/predictions.csv").open(newline="") as file:
        by_case = {row["case"]: float(row["pair:unequal"]) for row in csv.DictReader(file)}
    assert len(cases) == metrics["test/pair by case/n_cases"]
    assert {row["images"] for row in cases} == {"2"}
    for row in cases:
        assert float(row["pair:unequal"]) == pytest.approx(by_case[row["case"]], abs=1e-4)
    assert "secret" not in (tmp_path / "run/predictions/cases.csv").read_text()
    capsys.readouterr()
    assert main(["test", checkpoint, QUIET, "--data.case_batches=false"]) == 2
    assert "data.case_batches=true" in " ".join(capsys.readouterr().err.split())


def test_the_configuration_of_cases_trains(images, tmp_path):
    """The shipped file, on the small set with its own words."""
    with (images / "labels.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    shutil.copytree(images / "images", tmp_path / "images")
    for row in rows:
        row["label"] = {"well": "normal", "sick": "malignant"}.get(row["label"], "")
        row |= {"has_cls": int(bool(row["label"])), "box_labels": row["box_labels"].replace("nodule", "lesion")}
    with (tmp_path / "labels.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    config = Path(__file__).resolve().parents[2] / "configs/cases/mammography.yaml"
    assert config.read_text().startswith(f"# mtmedformer fit --config configs/cases/{config.name} ")
    small = ["--model.encoder.channels=16", "--data.image_size=64", "--data.num_workers=0", "--trainer.fast_dev_run=1"]
    cache = f"--data.cache_dir={tmp_path / 'cache'}"
    assert main(["fit", "--config", str(config), f"--data.root={tmp_path}", cache, *small, QUIET]) == 0


def test_real_mammograms_are_paired_by_woman(tmp_path):
    """mini-MIAS: the two breasts of a woman are one case, and its label that of the diseased side."""
    root = real("mini_mias")
    arguments = yaml.safe_load((Path(__file__).resolve().parents[2] / "configs/cases/mammography.yaml").read_text())
    given = arguments["data"]["init_args"] | {"root": root, "image_size": 32, "num_workers": 0, "cache_dir": None}
    columns = ClassColumns(**given["classification"]["pathology"])
    changed = {"preset": None, "limit": 12, "classification": {"pathology": columns}, "detection": None}
    data = LabelsCSVDataModule(**{**given, **changed})
    data.setup("fit")
    sizes = []
    for batch in data.train_dataloader():
        by_case = {}
        for meta, labels in zip(batch.meta, batch.targets["pathology"].labels, strict=True):
            by_case.setdefault(meta.case, []).append((meta.patient, labels))
        sizes += [len(images) for images in by_case.values()]
        assert all(len({patient for patient, _ in images}) == 1 for images in by_case.values())
    pairs = Counter(record.patient for record in data.datasets["train"].records)
    assert sorted(sizes) == sorted(pairs.values())
    assert 2 in sizes

"""Exams and breasts as a user calls them: ``data.case`` in ``test`` and ``predict``."""

import csv
import json
from pathlib import Path

import pytest
import yaml

from mtmedformer.commands.main import main
from tests.fixtures.small_set import small_config
from tests.fixtures.stored_models import OF_FIT, description, write_checkpoint

QUIET = "--trainer.enable_progress_bar=false"


@pytest.fixture(scope="module")
def run(images, tmp_path_factory) -> Path:
    """A run of an untrained model on the small set, whose patients have two images each."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    file = write_checkpoint(folder, description("health", "organ"), 1, **OF_FIT)
    data = small_config(images, folder.parent)["data"]
    del data["init_args"]["detection"]
    data["init_args"] |= {"negative_classes": ["well"], "test_split": "all"}
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
    assert "health by case" in (folder / "model_card.md").read_text()
    assert "secret-patient" not in page


def test_mistakes_in_cases_are_one_sentence(run, capsys):
    for options, words in (
        (["--data.case=[patient,study]"], "images have no 'study'; choose from patient, site, view, laterality"),
        (["--data.case_batches=true"], "case_batches needs data.init_args.case"),
    ):
        assert main(["test", f"--ckpt_path={run}", QUIET, *options]) == 2
        assert words in " ".join(capsys.readouterr().err.split())

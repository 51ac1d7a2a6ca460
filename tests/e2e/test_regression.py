"""Numbers and grades as a user trains them: from columns of a table to test, predict, export and a federation."""

import csv
import json

import pytest
import torch

import mtmedformer
from mtmedformer.commands.export.onnx_outputs import decode, read_heads
from mtmedformer.commands.main import main
from tests.fixtures.small_set import small_config, write_config, write_small_set

REGRESSION = {
    "age": {"column": "age", "unit": "years", "range": [0, 100]},
    "grade": {"column": "grade", "classes": ["none", "some", "many"]},
}
HEADS = {
    "health": {"class_path": "mtmedformer.ClassificationHead", "init_args": {"classes": ["well", "sick"]}},
    "age": {"class_path": "mtmedformer.RegressionHead", "init_args": {"range": [0, 100], "unit": "years"}},
    "grade": {"class_path": "mtmedformer.OrdinalHead", "init_args": {"classes": ["none", "some", "many"]}},
}


def set_with_numbers(root):
    """Write the small set with an age, which the south does not know, and a grade, blank in every fourth image."""
    write_small_set(root, patients=24)
    with (root / "labels.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for n, row in enumerate(rows):
        row["age"] = "" if row["site"] == "south" else str(20 + n)
        row["sex"] = "FM"[n // 4 % 2]
        row["grade"] = "" if n % 4 == 3 else ("many" if row["label"] == "sick" else ("none", "some")[n % 2])
    with (root / "labels.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return root


def config_of(root, runs, **trainer):
    config = small_config(root, runs, callbacks=[{"class_path": "callbacks.Calibrate", "init_args": {"coverage": 0.6}}])
    config["trainer"] |= {"max_epochs": 1, **trainer}
    config["model"]["init_args"]["heads"] = HEADS
    arguments = config["data"]["init_args"]
    del arguments["detection"], arguments["segmentation"]
    arguments |= {"group_columns": ["sex", "age"], "regression": REGRESSION, "val_fraction": 0.3, "test_fraction": 0.3}
    return config


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    root, runs = set_with_numbers(tmp_path_factory.mktemp("set")), tmp_path_factory.mktemp("runs")
    assert main(["fit", "--config", write_config(config_of(root, runs), runs / "config.yaml")]) == 0
    return root, runs / "run"


def test_test_reports_numbers_and_grades_with_intervals(trained, capsys):
    _, run = trained
    assert main(["test", "--ckpt_path", f"{run}/checkpoints/best.ckpt"]) == 0
    metrics = json.loads((run / "test_metrics.json").read_text())
    for key in ("age/mae", "age/r2", "age/ccc", "grade/kappa", "grade/mae"):
        assert f"test/{key}_ci_low" in metrics, key
    assert metrics["test/age/n_images"] < metrics["test/grade/n_images"]
    assert "test/age/mae/site=south" not in metrics  # no image of the south has an age
    assert "test/grade/mae_ci_low/sex=F" in metrics
    assert (
        metrics["test/health/n_images/sex=F"] + metrics["test/health/n_images/sex=M"] == metrics["test/health/n_images"]
    )
    assert any(key.startswith("test/health/n_positive/sick/age=") for key in metrics)
    reliability = json.loads((run / "reliability.json").read_text())
    assert reliability["age"]["margin"] > 0
    assert 0 <= reliability["age"]["coverage_test"] <= 1
    assert {"temperature", "ece", "ece_raw"} <= reliability["grade"].keys()
    out = capsys.readouterr().out
    assert "interval of" in out
    assert "fewer than 20 patients" in out
    page, card = (run / "report.html").read_text(), (run / "model_card.md").read_text()
    assert "mean absolute error" in card
    assert "years" in card
    assert "weighted kappa" in card
    for text in ("Prediction and truth", "Confusion matrix", "kappa", "by group", "sex F", "age 40-59"):
        assert text in page


def test_predictions_are_in_the_unit_of_the_labels_everywhere(trained, tmp_path):
    root, run = trained
    checkpoint = f"{run}/checkpoints/best.ckpt"
    picked = tmp_path / "films"
    picked.mkdir()
    film = root / "images" / "im003.png"
    (picked / film.name).write_bytes(film.read_bytes())
    assert (
        main(
            [
                "predict",
                f"--ckpt_path={checkpoint}",
                f"--images={picked}",
                f"--output={tmp_path / 'out'}",
                "--overlays=true",
            ]
        )
        == 0
    )
    with (tmp_path / "out" / "predictions.csv").open(newline="") as file:
        row = next(csv.DictReader(file))
    assert 0 <= float(row["age:low"]) <= float(row["age:value"]) <= float(row["age:high"]) <= 100
    assert row["age:unit"] == "years"
    assert row["grade:grade"] in REGRESSION["grade"]["classes"]
    entry = json.loads(next((tmp_path / "out" / "images").glob("*.json")).read_text())
    assert entry["values"]["age"]["unit"] == "years"

    model = mtmedformer.load(checkpoint)
    found = model.predict(film)
    assert found.values["age"].value == pytest.approx(float(row["age:value"]), rel=1e-4)
    assert found.values["grade"].grade == row["grade:grade"]
    assert sum(found.classes["grade"].values()) == pytest.approx(1, abs=1e-5)
    assert str(found.values["age"]).endswith("years")

    assert main(["export", f"--ckpt_path={checkpoint}", f"--output={tmp_path / 'exported'}"]) == 0
    import onnxruntime

    session = onnxruntime.InferenceSession(str(tmp_path / "exported" / "model.onnx"))
    image = torch.rand(1, 1, 64, 64)
    names = [one.name for one in session.get_outputs()]
    outputs = dict(zip(names, session.run(names, {"image": image.numpy()}), strict=True))
    decoded = decode(outputs, read_heads(tmp_path / "exported"), (64, 64))
    with torch.inference_mode():
        ours = model.module.predict(image)
    for task in ("age", "grade"):
        torch.testing.assert_close(decoded[task], ours[task], atol=1e-3, rtol=1e-3)


def test_a_federation_trains_a_head_at_the_sites_that_have_its_labels(tmp_path):
    root = set_with_numbers(tmp_path / "set")
    config = config_of(root, tmp_path)
    del config["model"]["init_args"]["heads"]  # built from the tasks of the data
    config["data"] = {
        "class_path": "federation.FederatedDataModule",
        "init_args": {"data": config["data"], "by": "site"},
    }
    config["federation"] = {"class_path": "callbacks.Federation"}
    assert main(["fit", "--config", write_config(config, tmp_path / "config.yaml")]) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    held = {one["site"]: one["labels"] for one in report["holdings"]} if "holdings" in report else {}
    assert not held or (held["south"]["age"] == 0 and held["north"]["age"] > 0)
    stored = torch.load(tmp_path / "run" / "checkpoints" / "best.ckpt", weights_only=True)
    assert all(value.isfinite().all() for value in stored["state_dict"].values())
    assert stored["calibration"]["age"]["margin"] > 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("--model.heads.age.init_args.unit=months", "unit"),
        ("--model.heads.age.init_args.range=[0,30]", "range"),
        ("--data.regression={age: {column: agee}}", "did you mean 'age'"),
        ("--data.regression={age: {column: grade}}", "no number"),
    ],
)
def test_mistakes_end_in_one_sentence_and_change_nothing(trained, tmp_path, capsys, change, words):
    root, _ = trained
    file = write_config(config_of(root, tmp_path), tmp_path / "config.yaml")
    assert main(["fit", "--config", file, change]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run").exists()

"""``mtmedformer compare`` from the command line: every study in the repository, and one of them run to its end."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from mtmedformer.commands.compare.study import metric_words, read_study
from mtmedformer.commands.main import main
from tests.fixtures.real_data import real

ROOT = Path(__file__).resolve().parents[2]
STUDIES = sorted((ROOT / "configs/compare").glob("*.yaml"))
DEMO = str(ROOT / "configs/compare/demo.yaml")


def forms(file: Path) -> list[str | None]:
    result = yaml.safe_load(file.read_text())
    return list(result.get("forms", {})) or [None]


EVERY_FORM = [pytest.param(file, form, id=f"{file.stem}-{form}") for file in STUDIES for form in forms(file)]


@pytest.mark.parametrize("file", STUDIES, ids=lambda p: p.stem)
def test_the_first_line_is_the_command(file):
    first = file.read_text().splitlines()[0]
    assert first.startswith(f"# mtmedformer compare --config {file.relative_to(ROOT)}")
    assert len(file.read_text().splitlines()) <= 90


@pytest.mark.parametrize(("file", "form"), EVERY_FORM)
def test_every_form_is_complete_and_evaluates_existing_tasks(file, form, tmp_path, capsys):
    study = read_study(file, form)
    tasks = {task for base in study.base for task in yaml.safe_load(base.read_text())["model"]["init_args"]["heads"]}
    assert {words[0] for words in map(metric_words, study.metrics) if len(words) > 1} <= tasks
    if form == "small":
        assert len(study.seeds) >= 5
    other = next(name for name in study.variants if name != study.reference)
    chosen = [f"--form={form}"] if form else []
    command = ["compare", f"--config={file}", *chosen, f"--only={other}", f"--output={tmp_path}", "--dry-run"]
    assert main(command) == 0
    assert "Nothing was run" in " ".join(capsys.readouterr().out.split())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("file", STUDIES, ids=lambda p: p.stem)
def test_every_variant_can_be_configured(file, tmp_path):
    assert main(["compare", f"--config={file}", f"--output={tmp_path}", "--dry-run"]) == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config=nowhere.yaml"], "no such file"),
        (["--config", DEMO, "--only=eqal"], "did you mean equal"),
        (["--config", DEMO, "--form=small"], "no forms"),
        (["--config", DEMO, "--set=trainer"], "KEY=VALUE"),
        (["--config", DEMO, "--seeds=7"], "choose from the study's, 0, 1"),
        (["--config", DEMO, "--set=trainer.max_epocs=3", "--dry-run"], "max_epochs"),
        (["--config", DEMO, "--jobs=0"], "1 or more"),
        (["--config", DEMO, "--job", "x"], "invalid int value"),
    ],
)
def test_a_mistake_is_one_paragraph(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["compare", *arguments]) == 2
    assert words in " ".join(capsys.readouterr().err.split())


def compare(folder: Path, *arguments: str) -> subprocess.Popen:
    """Start the demo in a folder of its own, one training at a time."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "300"}
    command = [sys.executable, "-m", "mtmedformer", "compare", f"--config={DEMO}", "--jobs=1", *arguments]
    with (folder / "log.txt").open("w") as log:
        return subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=log)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_an_interrupted_demo_continues_without_training_anything_twice(tmp_path):
    arguments = ["--set=trainer.max_epochs=2", "--output=study"]
    process = compare(tmp_path, *arguments)
    trainings = tmp_path / "study/trainings"
    deadline = time.monotonic() + 400
    while len(list(trainings.glob("*/*/*/run/metrics.csv"))) < 2 and time.monotonic() < deadline:
        assert process.poll() is None, (tmp_path / "log.txt").read_text()
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)  # as Ctrl-C, and not ignored where a runner is in the background
    assert process.wait(timeout=90) == 143
    assert "the same command continues" in (tmp_path / "log.txt").read_text()
    first = next(
        file for file in trainings.glob("counts/*/*/status.json") if "test" in json.loads(file.read_text())["evaluated"]
    )
    finished = first.stat().st_mtime_ns

    assert compare(tmp_path, *arguments).wait(timeout=500) == 0
    assert "1 finished before" in (tmp_path / "log.txt").read_text()
    assert first.stat().st_mtime_ns == finished
    result = json.loads((tmp_path / "study/comparison.json").read_text())
    assert result["trainings"] == {"finished": 4, "all": 4}
    dice = result["metrics"]["test/lungs/dice"]["values"]
    assert all(0.05 < value["mean"]["value"] < 1 for value in dice.values())
    assert set(dice["equal"]["by_site"]) == {"near", "far"}
    assert result["remarks"] == [
        "There are 2 runs; with fewer than five, the variance between seeds is a rough estimate."
    ], "every variant of a run started from the same weights and was evaluated on the same images"
    assert result["costs"]["equal"]["bytes"] > 1e6
    assert result["costs"]["equal"]["bytes_down"] == pytest.approx(
        result["costs"]["equal"]["bytes"], rel=0.05
    )  # FedAvg
    for training in trainings.glob("*/*/*"):
        files = sorted(file.name for file in (training / "run/checkpoints").iterdir())
        assert files == ["last.ckpt"], "a finished training keeps the evaluated weights"
        reported = json.loads((training / "run/test_metrics.json").read_text())["test/lungs/dice"]
        name, run = training.parent.parent.name, training.parent.name.split("-")[0]
        sites = {s: v for s, v in dice[name]["by_run_and_site"][run].items()}
        assert min(sites.values()) - 1e-9 <= reported <= max(sites.values()) + 1e-9

    assert compare(tmp_path, *arguments).wait(timeout=200) == 0
    assert "4 finished before" in (tmp_path / "log.txt").read_text()
    rows = list(csv.DictReader((tmp_path / "study/comparison.csv").open(newline="")))
    assert {row["variant"] for row in rows} == {"counts", "equal"}
    assert "demo" in (tmp_path / "study/comparison.html").read_text()

    assert compare(tmp_path, *arguments, "--split=val").wait(timeout=280) == 0
    chosen = json.loads((tmp_path / "study/comparison_val.json").read_text())
    assert chosen["split"] == "val"
    assert chosen["patients"] != result["patients"]
    assert first.parent.joinpath("run/val_rows.npz").is_file()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_sites_that_keep_their_models_are_evaluated_with_them(tmp_path):
    study = yaml.safe_load(Path(DEMO).read_text())
    study |= {
        "base": str(ROOT / "configs/federation/quickstart.yaml"),
        "seeds": [0],
        "variants": {
            "local": {"federation.aggregator": "federation.Local"},
            "personal": {"federation.aggregator": {"class_path": "federation.Ditto"}},
        },
        "reference": "personal",
        "metrics": ["test/lungs/dice", "own/lungs/dice", "test/lungs/nll"],
        "tuning": {},
    }
    study["overrides"]["trainer.max_epochs"] = 1
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "mtmedformer", "compare", "--config=study.yaml", "--jobs=1", "--output=out"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "out/comparison.json").read_text())
    assert {name: one["evaluated"] for name, one in result["variants"].items()} == {
        "local": "own",
        "personal": "global",
    }
    together, own = (result["metrics"][m]["values"] for m in ("test/lungs/dice", "own/lungs/dice"))
    assert together["local"]["mean"] == own["local"]["mean"]
    assert together["personal"]["mean"]["value"] != own["personal"]["mean"]["value"]
    assert result["metrics"]["test/lungs/nll"]["values"]["personal"]["mean"]["value"] > 0


def test_the_federation_of_two_real_organs_runs(tmp_path, monkeypatch):
    data, config = tmp_path / "data", ROOT / "configs/federation/two_organs_real.yaml"
    data.mkdir()
    for folder in ("covid_cxr", "mini_mias"):
        (data / folder).symlink_to(real(folder).resolve())
    monkeypatch.chdir(tmp_path)
    sites = list(yaml.safe_load(config.read_text())["data"]["init_args"]["sites"])
    small = [f"--data.sites.{s}.{k}" for s in sites for k in ("image_size=64", "num_workers=0", "limit=60")]
    short = ["--trainer.max_epochs=1", "--federation.site_trainer.limit_train_batches=1"]
    quiet = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    assert main(["fit", f"--config={config}", *small, *short, *quiet]) == 0
    rows = list(csv.DictReader((tmp_path / "runs/two_organs_real/metrics.csv").open(newline="")))
    assert {"site/eurorad/train/lungs/loss", "site/tissue_F/train/breast/loss"} <= rows[-1].keys()
    assert "site/eurorad/train/breast/loss" not in rows[-1]

"""A finished model on another hospital's table, with the command of the documentation."""

import csv
import re
import shlex
from pathlib import Path

import pytest

from mtmedformer.commands.main import main
from tests.fixtures.small_set import small_config, write_config, write_small_set

PAGE = Path(__file__).resolve().parents[2] / "docs" / "external_test.md"


@pytest.fixture(scope="module")
def model(images, tmp_path_factory):
    """Checkpoint of a finished run."""
    runs = tmp_path_factory.mktemp("runs")
    config = small_config(images, runs, max_epochs=1, limit_train_batches=1, enable_model_summary=False)
    assert main(["fit", "--config", write_config(config, runs / "config.yaml")]) == 0
    return runs / "run" / "checkpoints" / "best.ckpt"


@pytest.fixture(scope="module")
def hospital(tmp_path_factory):
    """Ten images of five patients whose table has no split column."""
    return write_small_set(tmp_path_factory.mktemp("hospital"), patients=5, seed=7)


def documented(model, hospital, folder):
    """Return the arguments of the first command of the page, with the folders of this test."""
    command = re.search(r"```bash\n(.*?)```", PAGE.read_text(), re.DOTALL)[1].replace("\\\n", " ")
    for name, path in (
        ("runs/mine/checkpoints/best.ckpt", model),
        ("path/to/other_hospital", hospital),
        ("runs/mine_other_hospital", folder),
    ):
        assert name in command
        command = command.replace(name, str(path))
    return shlex.split(command)[1:]


def with_column(hospital, **columns):
    """Write a copy of the table with further columns and return its name."""
    with (hospital / "labels.csv").open(newline="") as file:
        rows = [row | columns for row in csv.DictReader(file)]
    with (hospital / "other.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return "--data.table=other.csv"


def test_the_documented_command_tests_every_image(model, hospital, tmp_path, capsys):
    before = sorted(model.parent.parent.iterdir())
    assert main(documented(model, hospital, tmp_path / "away")) == 0
    assert sorted(model.parent.parent.iterdir()) == before
    shown = capsys.readouterr().out
    assert re.search(r"site north +│ +4", shown)  # every fifth of ten images has no class
    assert re.search(r"site south +│ +4", shown)
    assert (tmp_path / "away" / "report.html").is_file()
    assert "secret-patient" not in (tmp_path / "away" / "test_metrics.json").read_text()


def test_a_share_is_tested_without_the_option_and_it_is_reported(model, hospital, tmp_path, caplog):
    command = documented(model, hospital, tmp_path / "away")
    with caplog.at_level("INFO"):
        assert main([part for part in command if "test_split" not in part]) == 0
    assert "2 of 10 images are tested: a share of the patients; data.init_args.test_split=all tests all" in caplog.text


def test_a_table_of_test_rows_needs_no_option(model, hospital, tmp_path, capsys):
    table = with_column(hospital, split="test")
    *arguments, _, root_dir = documented(model, hospital, tmp_path / "away")
    assert main([*arguments, table, root_dir]) == 0
    assert re.search(r"site north +│ +4", capsys.readouterr().out)


def test_other_commands_name_the_split_that_they_miss(model, hospital, tmp_path, capsys):
    table = with_column(hospital, split="test")
    root = [f"--data.root={hospital}", table, f"--trainer.default_root_dir={tmp_path / 'away'}"]
    assert main(["validate", "--ckpt_path", str(model), *root]) == 2
    assert "no image to validate; its splits hold 10 test images" in " ".join(capsys.readouterr().err.split())
    config = str(model.parent.parent / "config.yaml")
    assert main(["fit", "--config", config, *root]) == 2
    assert "no image to fit; its splits hold 10 test images" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "away").exists()

"""Every configuration file runs: what its first line says, on small generated data and a small model."""

import csv
import json
from pathlib import Path

import pytest
import yaml

from mtmedformer.commands.main import main
from tests.fixtures.public_layouts import write_layout
from tests.fixtures.small_set import write_small_set

ROOT = Path(__file__).resolve().parents[2]
NATIVE = sorted(p.stem for p in (ROOT / "configs/data").glob("*.yaml") if p.stem not in {"labels_csv", "phantom"})
TRAINED = sorted(p for folder in ("", "data", "federation") for p in (ROOT / "configs" / folder).glob("*.yaml"))
NAMES = {"multitask": "rsna_pneumonia"}
"""The data set in the command of a file that is not named for it."""

PHANTOMS = [
    {"a": {"patients": 12, "labelled": {"finding": 1.0, "lesions": 1.0, "lungs": 1.0}}, "b": {"patients": 12}},
    {"a": {"patients": 12}, "b": {"patients": 12, "organ": "breast"}},
]
"""Small phantom sites: of chests, and of both organs."""

SMALL = [
    "--model.encoder.name=mtmedformer_tiny",
    "--model.encoder.channels=16",
    "--trainer.fast_dev_run=1",
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
]


def command(config: Path) -> list[str]:
    """Return the arguments of the command in a file's first line, its config paths made absolute."""
    words = config.read_text().splitlines()[0].removeprefix("# mtmedformer ").split()
    return [str(ROOT / w) if w.startswith("configs/") else w for w in words if "=PATH" not in w]


@pytest.mark.parametrize(
    "config",
    sorted(path for folder in ("", "data", "sweeps") for path in (ROOT / "configs" / folder).glob("*.yaml")),
    ids=lambda p: p.stem,
)
def test_the_first_line_is_a_command_that_names_the_file(config):
    first = config.read_text().splitlines()[0]
    tool = "sweep" if config.parent.name == "sweeps" else "fit"  # sweeps are run by test_sweeps.py
    assert first.startswith(f"# mtmedformer {tool} --config ")
    assert str(config.relative_to(ROOT)) in first
    assert all(Path(w).is_file() for w in command(config) if w.endswith(".yaml"))


@pytest.mark.parametrize("name", NATIVE)
def test_native_sets_train(name, tmp_path, monkeypatch):
    assert run(ROOT / f"configs/data/{name}.yaml", [], tmp_path, monkeypatch) == 0


@pytest.mark.parametrize("name", ["quickstart", "debug", "data/phantom"])
def test_phantom_configurations_train(name, tmp_path, monkeypatch):
    assert run(ROOT / f"configs/{name}.yaml", [], tmp_path, monkeypatch) == 0


@pytest.mark.parametrize("name", ["chest", "mammography", "data/labels_csv", "own_data"])
def test_table_configurations_train(name, tmp_path, monkeypatch):
    assert run(ROOT / f"configs/{name}.yaml", [], tmp_path, monkeypatch) == 0


@pytest.mark.parametrize("config", TRAINED, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_configuration_trains_with_debug(config, tmp_path, monkeypatch):
    assert run(config, ["--config", str(ROOT / "configs/debug.yaml")], tmp_path, monkeypatch) == 0


def run(config: Path, more: list[str], folder: Path, monkeypatch) -> int:
    """Run the command of a configuration on generated data, with a small model and a few steps."""
    monkeypatch.chdir(folder)
    section = merged_data(config)
    write_data(section, config.stem)
    if section["class_path"] == "federation.FederatedDataModule":
        sets = (
            ["data.data"]
            if "data" in section["init_args"]
            else [f"data.sites.{s}" for s in section["init_args"]["sites"]]
        )
    else:
        sets = ["data"]
    size = [f"--{prefix}.{option}" for prefix in sets for option in ("image_size=64", "batch_size=2", "num_workers=0")]
    if section["init_args"].get("data", section)["class_path"] == "datamodules.PhantomDataModule":
        size += [f"--{sets[0]}.size=96", f"--{sets[0]}.sites={json.dumps(PHANTOMS[config.stem == 'two_organs'])}"]
    return main([*command(config), *more, *size, *SMALL])


def merged_data(config: Path) -> dict:
    """Return the last ``data`` section with a class among the files of a configuration's command."""
    sections = [yaml.safe_load(Path(w).read_text()).get("data") for w in command(config) if w.endswith(".yaml")]
    return [one for one in sections if one and "class_path" in one][-1]


def write_data(section: dict, name: str) -> None:
    """Write the files that a ``data`` section reads, unless it generates them."""
    arguments = section["init_args"]
    if section["class_path"] == "federation.FederatedDataModule":
        sets = list(arguments["sites"].values()) if "sites" in arguments else [arguments["data"]]
    else:
        sets = [section]
    for root in {one["init_args"]["root"] for one in sets if "root" in one["init_args"]}:
        same = [one["init_args"] for one in sets if one["init_args"].get("root") == root]
        if sets[0]["class_path"] == "datamodules.LabelsCSVDataModule":
            write_table(Path(root), same)
        else:
            write_layout(NAMES.get(name, name), Path(root))


def write_table(root: Path, users: list[dict]) -> None:
    """Write the small set as a table in the words of the data sets that read it."""
    write_small_set(root, patients=32)
    rows = list(csv.DictReader((root / "labels.csv").open(newline="")))
    for n, row in enumerate(rows):
        patient = n // 2
        row["client"] = row["site"]
        for key in ("site", "client"):
            values = [user["where"][key] for user in users if key in user.get("where", {})]
            row[key] = values[patient % len(values)] if values else row[key]
        has_boxes = row.pop("has_det")
        if not any("detection" in user for user in users):  # the columns have the names that are found without a task
            row["has_boxes"] = has_boxes
        for user in users:
            for label in user.get("classification", {}).values():
                row[label["column"]] = label["classes"][patient % len(label["classes"])]
                row |= {label["flag"]: 1} if "flag" in label else {}
            for boxes in user.get("detection", {}).values():
                row["box_labels"] = row["box_labels"].replace("nodule", boxes["classes"][n % len(boxes["classes"])])
                row[boxes["flag"]] = has_boxes
            for spec in user.get("segmentation", {}).values():
                (column,) = spec["columns"].values()
                row[column], row[spec["flag"]] = row["mask_organ"], int(bool(row["mask_organ"]))
    with (root / "labels.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)

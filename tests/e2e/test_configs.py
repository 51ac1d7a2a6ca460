"""Every configuration file runs: what its first line says, on small generated data and a small model."""

from pathlib import Path

import pytest
import yaml

from mtmedformer.commands.main import main
from tests.fixtures.public_layouts import write_layout
from tests.fixtures.small_set import write_small_set

ROOT = Path(__file__).resolve().parents[2]
NATIVE = sorted(p.stem for p in (ROOT / "configs/data").glob("*.yaml") if p.stem not in {"labels_csv", "phantom"})
SMALL = [
    "--model.encoder.name=mtmedformer_tiny",
    "--model.encoder.channels=16",
    "--data.num_workers=0",
    "--data.image_size=64",
    "--data.batch_size=2",
    "--trainer.fast_dev_run=1",
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
]


def command(config: Path) -> list[str]:
    """Return the arguments of the command in a file's first line, its config paths made absolute."""
    words = config.read_text().splitlines()[0].removeprefix("# mtmedformer ").split()
    return [str(ROOT / w) if w.startswith("configs/") else w for w in words if not w.startswith("--data.root=PATH")]


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
def test_native_sets_train(name, tmp_path):
    root = write_layout(name, tmp_path / "tree")
    assert (
        main(
            [
                *command(ROOT / f"configs/data/{name}.yaml"),
                f"--data.root={root}",
                f"--data.cache_dir={tmp_path / 'cache'}",
                *SMALL,
            ]
        )
        == 0
    )


@pytest.mark.parametrize("name", ["quickstart", "debug", "data/phantom"])
def test_phantom_configurations_train(name, tmp_path):
    sites = "{a: {patients: 12, labelled: {finding: 1.0, lesions: 1.0, lungs: 1.0}}, b: {patients: 12}}"
    arguments = [
        f"--data.root={tmp_path / 'phantom'}",
        "--data.size=96",
        f"--data.sites={sites}",
        f"--data.cache_dir={tmp_path / 'cache'}",
    ]
    assert (
        main([*command(ROOT / f"configs/{name}.yaml"), *arguments, *SMALL, f"--trainer.default_root_dir={tmp_path}"])
        == 0
    )


@pytest.mark.parametrize("name", ["chest", "mammography", "data/labels_csv"])
def test_table_configurations_train(name, tmp_path):
    import csv

    config = yaml.safe_load((ROOT / f"configs/{name}.yaml").read_text())["data"]["init_args"]
    root = write_small_set(tmp_path / "set")
    rows = list(csv.DictReader((root / "labels.csv").open(newline="")))
    labels = config["classification"].values()
    (boxes,) = config["detection"].values()
    for n, row in enumerate(rows):  # the table of the small set, told in the words of this configuration
        for label in labels:
            row[label["column"]] = label["classes"][n // 2 % 3]
            if "flag" in label:
                row[label["flag"]] = 1
        kind = boxes["classes"][n % len(boxes["classes"])]
        row["box_labels"] = row["box_labels"].replace("nodule", kind)
        row[boxes["flag"]] = row.pop("has_det")
        for spec in config["segmentation"].values():
            (column,) = spec["columns"].values()
            row[column], row[spec["flag"]] = row["mask_organ"], int(bool(row["mask_organ"]))
    with (root / "labels.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    assert (
        main(
            [
                *command(ROOT / f"configs/{name}.yaml"),
                f"--data.root={root}",
                f"--data.cache_dir={tmp_path / 'cache'}",
                *SMALL,
            ]
        )
        == 0
    )

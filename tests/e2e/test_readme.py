"""What README says, done: its commands, its table of flags, its example of a table and of a data set."""

import re
import shlex
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

import mtmedformer
from datamodules.records import BoxTruth, MaskTruth
from mtmedformer.commands.load.predictor import Prediction
from mtmedformer.commands.main import COMMANDS, main
from tests.fixtures.dicom_files import film, write_dicom

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", TEXT, re.DOTALL)
TABLES = TEXT + (ROOT / "docs/cli.md").read_text()
FLAGS = sorted({tuple(shlex.split(cell)) for cell in re.findall(r"^\| [^|`]+ \| `(--[^`]+)`", TABLES, re.MULTILINE)})


def blocks(kind):
    return [body for name, body in BLOCKS if name == kind]


def commands():
    lines = [line.split("#")[0].split("&&")[-1].strip() for body in blocks("bash") for line in body.splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith("mtmedformer ")]


def here(argument):
    return re.sub(r"(^|=)configs/", rf"\g<1>{ROOT}/configs/", argument)


def test_the_quickstart_trains_tests_and_predicts(tmp_path):
    fit, test, predict = commands()[:3]
    assert (fit[0], test[0], predict[0]) == ("fit", "test", "predict")
    sites = "{a: {patients: 12}, b: {patients: 12}}"
    small = [
        f"--trainer.default_root_dir={tmp_path / 'run'}",
        f"--data.root={tmp_path / 'phantom'}",
        f"--data.sites={sites}",
        f"--data.cache_dir={tmp_path / 'cache'}",
        "--data.size=96",
        "--data.image_size=64",
        "--data.num_workers=0",
        "--trainer.max_epochs=1",
        "--trainer.accelerator=cpu",
    ]
    assert main([*map(here, fit), *small]) == 0
    checkpoint = str(tmp_path / "run/checkpoints/best.ckpt")
    for command in (test, predict):
        assert main([checkpoint if a.startswith("runs/") else a for a in command]) == 0
    for name in ("config.yaml", "metrics.csv", "test_metrics.json", "predictions/predictions.csv"):
        assert (tmp_path / "run" / name).is_file(), name


@pytest.mark.parametrize("flags", FLAGS, ids=lambda f: f[0].removeprefix("--"))
def test_every_flag_of_the_table_parses(flags, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    if flags[0] == "--ckpt_path=last":
        pytest.skip("its meaning is tested in test_cli.py")
    with pytest.raises(SystemExit) as end:
        main(["fit", "--config", "configs/quickstart.yaml", *flags, "--print_config"])
    assert end.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["class_path"] == "mtmedformer.MultiTaskModule"


def test_the_table_has_flags():
    assert len(FLAGS) >= 10


def write_example(folder, copies=1):
    """Write README's table and its images; further copies belong to further patients."""
    (table,) = blocks("csv")
    header, *rows = table.splitlines()
    lines = [header]
    for copy in range(copies):
        mark = f"_{copy}" if copy else ""
        lines += [re.sub(r"((?:films|masks)/\w)|(p\d)", rf"\g<0>{mark}", row) for row in rows]
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")
    for name in ("films", "masks"):
        (folder / name).mkdir()
    for copy in range(copies):
        mark = f"_{copy}" if copy else ""
        for name in ("a", "b"):
            write_dicom(folder / f"films/{name}{mark}.dcm", film(512, 512, seed=copy))
        grey = np.arange(512 * 512, dtype=np.uint64) * (copy + 1) % 251
        Image.fromarray(grey.astype(np.uint8).reshape(512, 512)).save(folder / f"films/c{mark}.png")
        for name in ("a", "c"):
            Image.fromarray(np.full((512, 512), 255, np.uint8)).save(folder / f"masks/{name}{mark}.png")


def test_the_example_configuration_trains_on_the_example_table(tmp_path, monkeypatch, capsys):
    (tmp_path / "path/to/folder").mkdir(parents=True)
    write_example(tmp_path / "path/to/folder", copies=4)
    (tmp_path / "mine.yaml").write_text(next(b for b in blocks("yaml") if "LabelsCSVDataModule" in b))
    monkeypatch.chdir(tmp_path)
    fingerprint, fit = [command for command in commands() if "mine.yaml" in command]
    small = ["--data.image_size=64", "--data.num_workers=0", "--data.batch_size=4"]
    assert main([*fingerprint, *small]) == 0
    assert main([*fit, *small, "--trainer.fast_dev_run=true", "--trainer.accelerator=cpu"]) == 0


@pytest.mark.parametrize("page", ["README.md", "docs/python_api.md"])
def test_the_example_in_python_trains(page, tmp_path, monkeypatch):
    code = next(
        code for code in re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL) if "fit(" in code
    )
    monkeypatch.chdir(tmp_path)
    small = 'root="phantom", sites={"a": PhantomSite(patients=6), "b": PhantomSite(patients=6)}, size=64, num_workers=0'
    code = code.replace("import PhantomDataModule", "import PhantomDataModule, PhantomSite")
    code = code.replace("image_size=128", f"image_size=64, {small}")
    code = code.replace("max_epochs=12", "fast_dev_run=True, accelerator='cpu', logger=False")
    space: dict = {}
    exec(compile(code, page, "exec"), space)
    (optimizer,) = space["module"].trainer.optimizers
    assert {group["lr"] for group in optimizer.param_groups} == {1e-3}


def test_the_table_of_commands_is_the_command_line():
    table = re.findall(r"^\| `mtmedformer (\w+)`", TEXT, re.MULTILINE)
    assert table == list(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_help(command, capsys):
    with pytest.raises(SystemExit) as end:
        raise SystemExit(main([command, "--help"]))
    assert end.value.code == 0
    assert "--" in capsys.readouterr().out


def test_a_command_that_needs_an_extra_follows_its_installation():
    needed = {"export": "export", "sweep": "sweep"}
    for body in blocks("bash"):
        extras = set(",".join(re.findall(r"pip install -e '\.\[([\w,]+)\]'", body)).split(","))
        used = set(re.findall(r"^mtmedformer (\w+)", body, re.MULTILINE))
        assert {needed[name] for name in used & set(needed)} <= extras


def test_the_example_table_matches_the_text(tmp_path):
    write_example(tmp_path)
    from jsonargparse import ArgumentParser

    from datamodules import MedicalDataModule

    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(MedicalDataModule, "data")
    section = yaml.safe_load(next(b for b in blocks("yaml") if "LabelsCSVDataModule" in b))["data"]
    section["init_args"]["root"] = str(tmp_path)
    data = parser.instantiate(parser.parse_object({"data": section})).data
    a, b, c = data.catalogue().records
    assert len(a.truth["opacities"].boxes) == 1
    assert b.truth["opacities"] == BoxTruth(), "read, and none found: a true negative"
    assert "lungs" not in b.truth, "not drawn: unknown"
    assert set(c.truth) == {"lungs"}
    assert isinstance(c.truth["lungs"], MaskTruth)


def test_the_example_data_set_loads(tmp_path):
    code = next(code for code in blocks("python") if "MyDataModule" in code)
    space: dict = {}
    exec(compile(code, "README.md", "exec"), space)
    for name in ("p1_a", "p1_b", "p2_a", "p3_a", "p4_a", "p5_a"):
        write_dicom(tmp_path / f"{name}.dcm", film(64, 64))
    data = space["MyDataModule"](tmp_path, image_size=32, num_workers=0, cache_dir=None, batch_size=2)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch.image.shape[1:] == (1, 32, 32)
    assert batch.targets["finding"].present.all()


def test_the_example_of_loading_names_what_a_prediction_has():
    code = next(code for code in blocks("python") if "mtmedformer.load" in code)
    named = set(re.findall(r"result\.(\w+)", code))
    assert callable(mtmedformer.load)
    assert named
    assert named <= {field.name for field in fields(Prediction)}


def test_every_tool_of_readme_is_one():
    named = {command[0] for command in commands()}
    assert named <= set(COMMANDS)
    assert set(COMMANDS) <= named | {"validate"}, "validate is in the table of commands alone"


def test_every_file_that_readme_and_docs_link_to_exists():
    for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        for link in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
            if not link.startswith(("http", "mailto")):
                assert (page.parent / link).exists(), f"{page.name} links to {link}"

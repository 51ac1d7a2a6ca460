"""A key that stands twice in a section is refused by every command; ordinary files are read as before."""

from pathlib import Path

import pytest
import yaml
from jsonargparse import get_loader

from mtmedformer.commands.main import main
from mtmedformer.commands.yaml_files import check_keys, read_yaml
from mtmedformer.errors import ConfigError

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", r"a is given twice \(lines 1 and 3\)"),
        (
            "data:\n  sites:\n    north: {x: 1}\n    south: {x: 1}\n    north: {x: 2}\n",
            r"data\.sites\.north .* 3 and 5",
        ),
        ("sites: {a: 1, b: 2, a: 1}", r"sites\.a is given twice \(line 1\)"),
        ("north: 1\n'north': 2\n", r"north is given twice"),
        ("1: a\n0x1: b\n", r"0x1 is given twice"),
        ("yes: a\ntrue: b\n", r"true is given twice"),
        ("list:\n- {a: 1}\n- {a: 1, a: 2}\n", r"list\[1\]\.a is given twice \(line 3\)"),
        ("x: &x {a: 1, a: 2}\ny: *x\n", r"x\.a is given twice"),
        ('{"a": {"b": 1, "b": 2}}', r"a\.b is given twice"),
        ("null: 1\n~: 2\n", "~ is given twice"),
        ("a:\n  {? [1] : 2, c: 1, c: 2}\n", r"a\.c is given twice"),
    ],
)
def test_a_key_twice_in_one_section_is_refused(tmp_path, text, message):
    (tmp_path / "file.yaml").write_text(text)
    with pytest.raises(ConfigError, match=rf"file\.yaml: .*{message}"):
        read_yaml(tmp_path / "file.yaml")


@pytest.mark.parametrize(
    "text",
    [
        "a: {x: 1}\nb: {x: 1}\n",
        "- {x: 1}\n- {x: 1}\n",
        "base: &b {x: 1, y: 2}\nown: {<<: *b, x: 3}\n",
        "one: &a {x: 1}\ntwo: &b {y: 1}\nboth:\n  <<: *a\n  <<: *b\n",
        "'1': a\n1: b\n",
        "Yes please: a\nyes: b\n",
        "",
        "text without a key",
    ],
)
def test_right_files_are_read_as_before(tmp_path, text):
    (tmp_path / "file.yaml").write_text(text)
    assert read_yaml(tmp_path / "file.yaml") == yaml.safe_load(text)


def test_no_shipped_configuration_has_a_key_twice():
    files = [*ROOT.glob("configs/**/*.yaml"), ROOT / "mkdocs.yml"]
    assert len(files) > 20
    for file in files:
        check_keys(file.read_text(), file)


def test_unreadable_files_are_refused_in_words(tmp_path):
    for content in (b"\xff\xfe\x00bad", b"a: [", b"[" * 100_000):
        (tmp_path / "file.yaml").write_bytes(content)
        with pytest.raises(ConfigError, match=r"file\.yaml: cannot be read as YAML"):
            read_yaml(tmp_path / "file.yaml")


@pytest.mark.parametrize(
    "command",
    [
        ["fit"],
        ["validate"],
        ["test"],
        ["predict"],
        ["fingerprint", "--output=out"],
        ["compare"],
        ["sweep"],
    ],
)
def test_every_command_refuses_a_key_twice(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = "data:\n  class_path: datamodules.PhantomDataModule\n  init_args:\n    seed: 1\n    seed: 2\n"
    Path("twice.yaml").write_text(text)
    assert main([*command, "--config", "twice.yaml"]) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert "twice.yaml: data.init_args.seed is given twice (lines 4 and 5)" in message
    assert [path.name for path in tmp_path.iterdir()] == ["twice.yaml"]


def test_a_key_twice_on_the_command_line_or_in_a_nested_file_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "--data=federation.FederatedDataModule", "--data.sites={a: 1, a: 2}"]) == 2
    assert "a is given twice (line 1)" in " ".join(capsys.readouterr().err.split())
    Path("data.yaml").write_text("class_path: datamodules.PhantomDataModule\nclass_path: x\n")
    Path("config.yaml").write_text("data: data.yaml\n")
    assert main(["fit", "--config=config.yaml"]) == 2
    assert "class_path is given twice (lines 1 and 2)" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    "section", ["{client_trainer: {a: 1}}", "{class_path: X, init_args: {client_trainer: {a: 1}}}"]
)
def test_a_former_key_of_a_federation_is_read_with_a_note(section, capsys):
    read = get_loader("yaml")(f"federation: {section}\ndata: {{client_trainer: 2}}")
    part = read["federation"].get("init_args", read["federation"])
    assert part == {"site_trainer": {"a": 1}}
    assert read["data"] == {"client_trainer": 2}
    assert "federation.client_trainer is now called federation.site_trainer" in capsys.readouterr().err

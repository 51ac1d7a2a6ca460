"""The documentation: links, line lengths, tables, code blocks, commands, and pages that are generated."""

import ast
import re
import runpy
import shlex
import textwrap
from itertools import takewhile
from pathlib import Path

import lightning as L
import pytest
import yaml
from jsonargparse import ArgumentParser

from datamodules.labels_csv.columns import BoxColumns, ClassColumns, MaskColumns
from datamodules.labels_csv.datamodule import LabelsCSVDataModule
from mtmedformer.commands.main import COMMANDS, main

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
LONGEST_LINE = 120
SHELL = {"pip", "pytest", "python", "mtmedformer", "mkdocs", "wandb", "git", "common"}
"""First words of shell lines in the documentation."""

named = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def without_code(text):
    return re.sub(r"^ *```.*?^ *```$", "", text, flags=re.DOTALL | re.MULTILINE)


def blocks(page, kind):
    found = re.findall(rf"^( *)```{kind}\n(.*?)^\1```$", page.read_text(), re.DOTALL | re.MULTILINE)
    return [textwrap.dedent(body) for _, body in found]


def anchors(page):
    titles = re.findall(r"^#+ (.+)$", without_code(page.read_text()), re.MULTILINE)
    plain = (re.sub(r"[^\w\s-]", "", title.replace("`", "")).strip().lower() for title in titles)
    return {re.sub(r"[\s]+", "-", title) for title in plain}


def commands(page):
    lines = "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    parts = [part.strip() for line in lines for part in line.split(" #")[0].split("&&")]
    return [shlex.split(part) for part in parts if part and not part.startswith("#")]


@named
def test_every_link_leads_to_a_file_and_a_title(page):
    for link in re.findall(r"\]\(([^)]+)\)", without_code(page.read_text())):
        if link.startswith(("http", "mailto")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name} links to {link}"
        if anchor:
            assert anchor in anchors(target), f"{page.name} links to {link}, which is no title of {target.name}"


@named
def test_no_line_is_too_long(page):
    for number, line in enumerate(page.read_text().splitlines(), 1):
        assert len(line) <= LONGEST_LINE, f"{page.name}, line {number}: {len(line)} characters"


@named
def test_every_table_has_a_header_and_equal_rows(page):
    lines = without_code(page.read_text()).splitlines()
    before = ["", *lines]
    starts = [i for i, line in enumerate(lines) if line.startswith("|") and not before[i].startswith("|")]
    for start in starts:
        rows = [cells(line) for line in takewhile(lambda line: line.startswith("|"), lines[start:])]
        where = f"{page.name}: the table that begins with {lines[start][:60]}"
        assert not before[start].strip(), f"{where} needs a blank line before it"
        assert len(rows) >= 3, where
        assert all(re.fullmatch(r"\s*:?-+:?\s*", cell) for cell in rows[1]), f"{where} has no row of dashes"
        assert {len(row) for row in rows} == {len(rows[1])}, f"{where} has rows of different lengths"


def cells(line):
    return re.split(r"(?<!\\)\|", line.strip()[1:-1])


@named
def test_every_block_of_code_has_its_language_and_parses(page):
    fences = re.findall(r"^ *```(.*)$", page.read_text(), re.MULTILINE)
    assert len(fences) % 2 == 0, f"{page.name}: a block of code is not closed"
    assert set(fences[::2]) <= {"", "bash", "python", "yaml", "csv"}, page.name
    for body in blocks(page, "yaml"):
        assert isinstance(yaml.safe_load(body), dict), page.name
    for body in blocks(page, "python"):
        assert ast.parse(body).body, page.name


@named
def test_every_shell_command_exists(page):
    for command in commands(page):
        assert command[0].split("=")[0] in SHELL, f"{page.name}: {command[0]}"
        if command[0] == "mtmedformer":
            assert command[1] in {*COMMANDS, "--help", "--version"}, f"{page.name}: {shlex.join(command)}"
        for argument in command:
            for file in re.findall(r"(?:configs|docs|tests)/[\w./-]+", argument):
                assert (ROOT / file).exists(), f"{page.name}: {file} of {shlex.join(command)}"


@named
def test_every_file_that_the_text_names_exists(page):
    if page.name == "CHANGELOG.md":
        pytest.skip("names files of earlier versions")
    code = re.findall(r"`([^`\n]+)`", without_code(page.read_text()))
    for name in code:
        if re.fullmatch(r"(mtmedformer|datamodules|federation|callbacks|tests|configs|docs)/[\w./-]*", name):
            assert (ROOT / name).exists(), f"{page.name} names {name}"


def test_every_class_path_that_a_page_names_exists():
    from jsonargparse.util import import_object

    for page in PAGES:
        for body in blocks(page, "yaml"):
            for path in re.findall(r"class_path: ([\w.]+)", body):
                if not path.startswith("my_parts."):
                    assert import_object(path), f"{page.name} names {path}"


@pytest.mark.parametrize("page", [page for page in PAGES if any("\nmodel:" in f"\n{b}" for b in blocks(page, "yaml"))])
def test_every_whole_configuration_parses(page, tmp_path, capsys):
    for body in blocks(page, "yaml"):
        if body.startswith("model:"):
            (tmp_path / "config.yaml").write_text(body)
            with pytest.raises(SystemExit) as end:
                main(["fit", "--config", str(tmp_path / "config.yaml"), "--print_config"])
            assert end.value.code == 0, page.name


@named
def test_every_data_module_of_a_page_is_built(page):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(L.LightningDataModule, "data")
    for body in blocks(page, "yaml"):
        if body.startswith("data:"):
            built = parser.instantiate(parser.parse_object({"data": yaml.safe_load(body)["data"]}))
            assert isinstance(built.data, L.LightningDataModule)


def test_the_federation_in_python_trains(tmp_path, monkeypatch):
    code = next(code for code in blocks(ROOT / "docs/python_api.md", "python") if "Federation(" in code)
    small = 'root="phantom", sites={"a": PhantomSite(patients=6), "b": PhantomSite(patients=6)}, size=64, num_workers=0'
    code = code.replace("import PhantomDataModule", "import PhantomDataModule, PhantomSite")
    code = code.replace("image_size=128", f"image_size=64, {small}")
    code = code.replace("max_epochs=4,", "max_epochs=2, accelerator='cpu', logger=False,")
    monkeypatch.chdir(tmp_path)
    space: dict = {}
    exec(compile(code, "docs/python_api.md", "exec"), space)
    assert [len(record.sites) for record in space["federation"].history] == [2, 2]


def test_every_option_of_a_table_of_your_own_is_documented():
    text = (ROOT / "docs/your_own_data.md").read_text()
    options = set(LabelsCSVDataModule.__init__.__annotations__) - {"return", "kwargs"}
    options |= {name for kind in (ClassColumns, BoxColumns, MaskColumns) for name in kind.__dataclass_fields__}
    options |= set(LabelsCSVDataModule.__mro__[1].__init__.__annotations__) - {"return", "kwargs", "pin_memory"}
    missing = {name for name in options if not re.search(rf"^\|.*`{name}`.*\|", text, re.MULTILINE)}
    assert not missing, f"docs/your_own_data.md has no row for {', '.join(sorted(missing))}"


def test_the_table_of_aggregators_names_their_files():
    text = (ROOT / "docs/federation/index.md").read_text()
    rows = re.findall(r"^\| (`\w+.*?) \| `(\w+\.py)` \|", text, re.MULTILINE)
    assert rows
    for names, file in rows:
        source = (ROOT / "federation/aggregators" / file).read_text()
        for name in re.findall(r"`(\w+)", names):
            assert f"class {name}(" in source, f"{name} is not in {file}"


def test_every_page_is_in_the_navigation():
    navigation = re.findall(r"[\w/]+\.md", (ROOT / "mkdocs.yml").read_text())
    pages = {page.relative_to(ROOT / "docs").as_posix() for page in PAGES if page.is_relative_to(ROOT / "docs")}
    assert set(navigation) == pages


def test_the_table_of_modules_is_up_to_date():
    table = runpy.run_path(str(ROOT / "docs/module_table.py"))
    page = (ROOT / "docs/modules.md").read_text()
    assert page == table["render"](), f"docs/modules.md is not up to date: run `{table['COMMAND']}`"


def test_the_changelog_keeps_its_form():
    text = (ROOT / "CHANGELOG.md").read_text()
    sections = re.findall(r"^### (\w+)$", text, re.MULTILINE)
    assert sections
    assert set(sections) <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}

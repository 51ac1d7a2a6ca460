"""The structure of the packages: import contracts, dependencies, licences, sizes, private names of libraries."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from functools import cache
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("mtmedformer", "callbacks", "datamodules", "federation")
FILES = sorted(file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

PLUGINS = {  # dependencies that another library loads: no module of this project imports them
    "faster-coco-eval": "backend of torchmetrics' MeanAveragePrecision",
    "openpyxl": "engine of pandas.read_excel",
    "pylibjpeg": "decoder plug-ins of pydicom",
    "pylibjpeg-openjpeg": "decoder plug-in of pydicom",
    "pylibjpeg-rle": "decoder plug-in of pydicom",
}

LICENCES_WITHOUT_METADATA = {  # packages whose metadata names no licence, and the licence in their repository
    "cuda-toolkit": "NVIDIA Software License: may be used and redistributed with applications",
    "faster-coco-eval": "Apache-2.0",
}

MAX_LINES = 350
MAX_ROOT_MODULES = 14


@cache
def trees() -> list[tuple[Path, ast.Module]]:
    """Return every module of the packages with its syntax tree."""
    return [(file, ast.parse(file.read_text())) for file in FILES]


def imported() -> dict[str, set[str]]:
    """Return the files that import each third-party module, by its top-level name."""
    found: dict[str, set[str]] = {}
    for file, tree in trees():
        for node in ast.walk(tree):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
                names = [node.module]
            for name in names:
                top = name.split(".")[0]
                if top not in sys.stdlib_module_names and top not in PACKAGES:
                    found.setdefault(top, set()).add(file.relative_to(ROOT).as_posix())
    return found


def distributions(module: str) -> set[str]:
    """Return the names of the installed distributions that provide a top-level module."""
    return {canonicalize_name(name) for name in _providers().get(module, ())}


@cache
def _providers() -> Mapping[str, list[str]]:
    return metadata.packages_distributions()  # reads the file lists of every installed distribution


def declared() -> set[str]:
    """Return the dependencies of a plain install."""
    return {canonicalize_name(Requirement(line).name) for line in PROJECT["dependencies"]}


def optional() -> set[str]:
    """Return the dependencies of the extras that users install."""
    users = {k: v for k, v in PROJECT["optional-dependencies"].items() if k not in {"test", "dev", "docs"}}
    return {canonicalize_name(Requirement(line).name) for lines in users.values() for line in lines}


def test_import_contracts_hold():
    run = [
        sys.executable,
        "-c",
        "from importlinter.cli import lint_imports_command; lint_imports_command()",
        "--no-cache",
    ]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_import_is_a_declared_dependency():
    known = declared() | optional()
    undeclared = {name: sorted(files) for name, files in imported().items() if not distributions(name) & known}
    assert not undeclared


def test_every_declared_dependency_is_imported_or_a_plugin():
    used = set().union(*map(distributions, imported()))
    assert declared() - used == PLUGINS.keys()


def closure() -> dict[str, metadata.Distribution]:
    """Return the distributions that a plain install of the project brings, by name."""
    found: dict[str, metadata.Distribution] = {}
    waiting: list[tuple[str, frozenset[str]]] = [("mtmedformer", frozenset())]
    seen = set(waiting)
    while waiting:
        name, extras = waiting.pop()
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:  # not for this platform
            continue
        found[canonicalize_name(name)] = distribution
        for line in distribution.requires or ():
            requirement = Requirement(line)
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in extras | {""}):
                step = (canonicalize_name(requirement.name), frozenset(requirement.extras))
                if step not in seen:
                    seen.add(step)
                    waiting.append(step)
    return found


def licence(distribution: metadata.Distribution) -> str:
    """Return what a distribution's metadata states of its licence, in one line."""
    data = distribution.metadata
    classifiers = [c.removeprefix("License :: ") for c in data.get_all("Classifier") or () if c.startswith("License")]
    free_text = (data.get("License") or "").strip().split("\n")[0]
    return " | ".join(filter(None, [data.get("License-Expression"), *classifiers, free_text]))


def test_the_closure_of_a_plain_install_has_no_copyleft_or_non_commercial_licence():
    licences = {name: licence(distribution) for name, distribution in closure().items()}
    assert len(licences) > 50, "the walk over the dependencies found too few"
    forbidden = re.compile(r"\b[AL]?GPL|Affero|non-?commercial|CC-BY-NC", re.IGNORECASE)
    assert {name: text for name, text in licences.items() if forbidden.search(text)} == {}
    unnamed = {name for name, text in licences.items() if not text}
    assert unnamed <= LICENCES_WITHOUT_METADATA.keys()


def test_no_product_file_is_called_like_a_test():
    names = [file.relative_to(ROOT).as_posix() for file in FILES]
    assert [n for n in names if re.match(r"(test_.*|.*_test)\.py$", n.rsplit("/", 1)[-1])] == []


def test_no_module_is_longer_than_the_limit():
    lines = {file.relative_to(ROOT).as_posix(): len(file.read_text().splitlines()) for file in FILES}
    assert {name: count for name, count in lines.items() if count > MAX_LINES} == {}


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_root_shows_few_modules(package):
    assert len(list((ROOT / package).glob("*.py"))) <= MAX_ROOT_MODULES


def own_private_names() -> set[str]:
    """Return every name with a leading underscore that the packages define themselves."""
    names: set[str] = set()
    for _, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_self(node.value):
                names.add(node.attr)
    return {name for name in names if re.match(r"_[^_]", name)}


def _is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in {"self", "cls"}


def foreign_private_names() -> dict[str, set[str]]:
    """Return the private names of other libraries that each module uses."""
    own = own_private_names()
    found: dict[str, set[str]] = {}
    for file, tree in trees():
        names = set()
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Attribute) and re.match(r"_[^_]", node.attr) and node.attr not in own | {"_exit"}
            ):  # os._exit is public
                names.add(node.attr)
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] not in PACKAGES:
                parts = [*node.module.split("."), *(alias.name for alias in node.names)]
                names |= {part for part in parts if re.match(r"_[^_]", part)}
        if names:
            found[file.relative_to(ROOT).as_posix()] = names
    return found


def test_private_names_of_libraries_are_used_in_one_kind_of_file_only():
    outside = {name: used for name, used in foreign_private_names().items() if not name.endswith("_internals.py")}
    assert outside == {}


def test_no_two_classes_have_one_name():
    homes: dict[str, list[str]] = {}
    for file, tree in trees():
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                homes.setdefault(node.name, []).append(file.relative_to(ROOT).as_posix())
    assert {name: files for name, files in homes.items() if len(files) > 1} == {}

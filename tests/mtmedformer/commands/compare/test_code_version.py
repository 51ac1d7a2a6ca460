"""The version of the code: which edits train a finished study again, and which do not."""

import ast
import shutil

import pytest

from mtmedformer.commands.compare.code_version import PACKAGES, ROOT, WITHOUT_RESULTS, code_version

APPENDED = {
    "mtmedformer/losses/hybrid.py": True,
    "mtmedformer/metrics/froc.py": True,
    "mtmedformer/commands/lightning_cli.py": True,
    "datamodules/images/pixels.py": True,
    "federation/aggregators/fedavg.py": True,
    "callbacks/evaluation/calibrate.py": True,
    "callbacks/evaluation/per_image_results.py": True,
    "callbacks/run/checkpoints.py": True,
    "mtmedformer/plots/overlays.py": False,
    "mtmedformer/plots/heatmaps.py": False,
    "mtmedformer/commands/compare/statistics.py": False,
    "mtmedformer/commands/sweep/trials.py": False,
    "callbacks/reports/overlays.py": False,
    "callbacks/prediction/dicom/segmentation.py": False,
    "datamodules/audit/shortcuts.py": False,
}
"""Whether a new constant in a file is another version."""


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """Copy the packages."""
    root = tmp_path_factory.mktemp("code")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, root / package, ignore=shutil.ignore_patterns("__pycache__", "*.pyi"))
    return root


def version(root):
    return code_version.__wrapped__(root)


def test_every_folder_without_results_exists():
    assert [folder for folder in WITHOUT_RESULTS if not any((ROOT / folder).glob("*.py"))] == []


@pytest.mark.parametrize("name", APPENDED)
def test_a_new_constant_changes_the_version_where_a_training_runs_through_the_file(copy, name):
    before, text = version(copy), (copy / name).read_text()
    assert before == code_version(), "the place of the packages is no part of the version"
    try:
        (copy / name).write_text(f"# Another comment.\n{text}\n\n\n# And one more.\n")
        assert version(copy) == before
        (copy / name).write_text(f"{text}\nCOLUMNS_OF_A_DRAWING = 5\n")
        assert (version(copy) != before) == APPENDED[name]
    finally:
        (copy / name).write_text(text)


def test_what_a_training_computes_with_imports_no_folder_without_results():
    files = [*(ROOT / "federation").rglob("*.py")]
    for folder in ("encoders", "heads", "losses", "metrics", "inference", "storage"):
        files += (ROOT / "mtmedformer" / folder).rglob("*.py")
    aside = tuple(folder.replace("/", ".") for folder in WITHOUT_RESULTS)
    nodes = [(file, node) for file in files for node in ast.walk(ast.parse(file.read_text()))]
    imported = {(file, node.module) for file, node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    imported |= {(file, name.name) for file, node in nodes if isinstance(node, ast.Import) for name in node.names}
    assert len(imported) > 100
    assert {(file, name) for file, name in imported if name.startswith(aside)} == set()

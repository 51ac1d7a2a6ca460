"""The documentation: links, line lengths, tables, code blocks, and pages that are generated."""

import runpy
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_the_table_of_modules_is_up_to_date():
    table = runpy.run_path(str(ROOT / "docs/module_table.py"))
    page = (ROOT / "docs/modules.md").read_text()
    assert page == table["render"](), f"docs/modules.md is not up to date: run `{table['COMMAND']}`"

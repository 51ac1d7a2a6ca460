"""Hooks of MkDocs: formulas as MathML, so that no script draws them; API pages with the public names of a package."""

import ast
import html
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert

ROOT = Path(__file__).resolve().parents[1]
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
PACKAGE = re.compile(r"^::: (\w+)$", re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Extend ``::: package`` by one entry per public name of that package; called by MkDocs for every page."""
    return PACKAGE.sub(lambda found: _entries(found[1]), markdown)


def on_page_content(content: str, **_: Any) -> str:
    """Replace each formula that ``pymdownx.arithmatex`` marked; called by MkDocs for every page."""
    return FORMULA.sub(_mathml, content)


def public_names(package: str) -> list[str]:
    """Return the names that a package's ``__init__`` imports, in alphabetical order."""
    folder = ROOT / package
    file = next(file for file in (folder / "__init__.pyi", folder / "__init__.py") if file.is_file())
    imports = [node for node in ast.parse(file.read_text()).body if isinstance(node, ast.ImportFrom)]
    inside = [node for node in imports if node.level or (node.module or "").split(".")[0] == package]
    return sorted({alias.asname or alias.name for node in inside for alias in node.names})


def _entries(package: str) -> str:
    entries = [f"::: {package}\n    options: {{members: false}}"]
    options = "    options: {show_root_heading: true, show_root_toc_entry: true}"
    entries += [f"::: {package}.{name}\n{options}" for name in public_names(package)]
    return "\n\n".join(entries)


def _mathml(found: re.Match[str]) -> str:
    return convert(html.unescape(found[3]), display="block" if found[2] == "[" else "inline")

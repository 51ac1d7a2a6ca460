"""Write docs/modules.md: every module of the four packages with the first sentence of its docstring.

Run it after a module was added, moved or described anew:

    python docs/module_table.py

``tests/e2e/test_docs.py`` fails while the page is not up to date.
"""

import ast
import html
import re
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "modules.md"
PACKAGES = ("mtmedformer", "datamodules", "federation", "callbacks")
WIDTH = 120
COMMAND = "python docs/module_table.py"


def summary(file: Path) -> str:
    """Return the first paragraph of a module's docstring as one line of HTML, or an empty string."""
    text = ast.get_docstring(ast.parse(file.read_text())) or ""
    line = html.escape(" ".join(text.split("\n\n")[0].split()), quote=False)
    return re.sub(r"(`{1,2})(.+?)\1", r"<code>\2</code>", line)


def modules(package: str) -> dict[Path, list[Path]]:
    """Return a package's module files by their folder, relative to the repository, both in alphabetical order."""
    folders: dict[Path, list[Path]] = {}
    for file in sorted((ROOT / package).rglob("*.py"), key=lambda path: (path.parent.parts, path.name)):
        folders.setdefault(file.parent.relative_to(ROOT), []).append(file.relative_to(ROOT))
    return folders


def row(file: Path) -> list[str]:
    """Return one row of a table; HTML, because a row of a Markdown table cannot be broken into lines."""
    text = f"<tr><td><code>{file.name}</code></td><td>{summary(ROOT / file)}</td></tr>"
    return textwrap.wrap(text, WIDTH, break_long_words=False, break_on_hyphens=False)


def render() -> str:
    """Return the whole page: one section per package, one table per folder, one row per module."""
    lines = [
        "# Modules",
        "",
        f"<!-- Generated from the module docstrings by `{COMMAND}`: do not edit this page by hand. -->",
        "",
        "This table is generated from the docstrings of the modules. The design behind it is in",
        "[Architecture](architecture.md).",
    ]
    for package in PACKAGES:
        for folder, files in modules(package).items():
            level = "##" if len(folder.parts) == 1 else "###"
            lines += ["", f"{level} `{folder.as_posix()}/`", ""]
            about = next((summary(ROOT / file) for file in files if file.name == "__init__.py"), "")
            if about:
                lines += [*textwrap.wrap(about, WIDTH), ""]
            rows = [line for file in files if file.name != "__init__.py" for line in row(file)]
            lines += ["<table>", "<tr><th>module</th><th>what it contains</th></tr>", *rows, "</table>"] if rows else []
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    """Write the page."""
    PAGE.write_text(render())


if __name__ == "__main__":
    main()

"""Print on the terminal: names of files, classes and sites appear as they are, and control nothing."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.text import Text

from mtmedformer.storage.safe_text import printable


class SafeConsole(Console):
    """A console that takes no text for markup or emoji codes, and writes control characters as escapes.

    Args:
        markup: Read markup of Rich in texts; names in them must be escaped by the caller.
    """

    def __init__(self, markup: bool = False, **arguments: Any) -> None:
        super().__init__(markup=markup, emoji=False, **arguments)

    def render_str(self, text: str, **arguments: Any) -> Text:
        """Render a text or the cell of a table, with control characters other than line feed and tab as escapes."""
        return super().render_str(printable(text, keep="\n\t"), **arguments)

"""Names in the output of commands: shown as they are, without an effect on the terminal or on the table."""

import io

import pytest
from rich.table import Table

from callbacks.reports.metrics_table import print_metrics
from mtmedformer.plots.terminal import SafeConsole

NAMES = [
    "[/] x",
    "[/bold]",
    "[red]a[/red]",
    "\x1b[31mred",
    "<script>alert(1)</script>",
    ":boom:",
    "a\x07\x9b2J",
    "b\u202ec",
]


def shown(name: str) -> str:
    """Return what a name looks like in the output."""
    escapes = {"\x1b": "\\x1b", "\x07": "\\x07", "\x9b": "\\x9b", "\u202e": "\\u202e"}
    return "".join(escapes.get(one, one) for one in name)


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_printed_as_it_is_and_controls_nothing(name):
    stream = io.StringIO()
    console = SafeConsole(file=stream, width=200)
    table = Table(name, title=name)
    table.add_row(name)
    console.print(table)
    console.print(name, style="bold")
    assert stream.getvalue().count(shown(name)) == 4
    assert "\x1b" not in stream.getvalue()


def test_ordinary_lines_stay_as_they_are():
    stream = io.StringIO()
    SafeConsole(file=stream, width=200).print("Größe – 3\n\tµm, 胸部")
    assert stream.getvalue() == "Größe – 3\n        µm, 胸部\n"


@pytest.mark.parametrize("name", NAMES[:3])
def test_metrics_of_any_class_and_site_are_printed(name, capsys):
    metrics = {"test/organ/dice": 0.5, f"test/organ/dice/{name}": 0.5, "test/score": 0.5}
    metrics |= {f"test/organ/dice/site={site}": 0.5 for site in (name.replace("/", ""), "south")}
    print_metrics(metrics, "test", "Test")
    printed = capsys.readouterr().out
    assert name in printed
    assert f"site {name.replace('/', '')}" in printed

"""Writes the model card: what the report says, as Markdown, without pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from callbacks.reports.metrics_table import HIDDEN
from callbacks.reports.model_page import leak_words
from callbacks.reports.summary_text import abilities, interval, limits
from mtmedformer.plots.html import number

Facts = dict[str, Any]


def model_card(told: Facts, report: str) -> str:
    """Return the card.

    Args:
        told: What ``ModelReport.facts`` returned.
        report: Name of the report beside it.
    """
    model = told["model"]
    parts = [
        f"# Model card: {_text(', '.join(told['tasks']))}",
        "**Research use only. Not a medical device, not for diagnosis.**",
        f"Curves, reliability and example images are in [{report}]({report}).",
        "## What it can do",
        _points(abilities(told)),
        "## What it cannot do, and what is not known",
        _points(limits(told)),
        "## Intended use",
        _intended(told),
        "## Data",
        *(_part(name, part, list(told["tasks"])) for name, part in told["data"].items()),
        "## Results on the test images",
        *(_results(told, task) for task in told["tasks"]),
        "## Left out",
        _left_out(told["data"]),
        "## Model and environment",
        _table(
            ["what", "value"],
            [
                ["model", model["class"]],
                ["encoder", model["encoder"]],
                ["weights", number(model["parameters"])],
                ["checkpoint", model["checkpoint"]],
                ["calibrated tasks", ", ".join(model["calibrated"]) or "none"],
                *([name, value] for name, value in told["versions"].items()),
            ],
        ),
    ]
    if told["config"]:
        fence = "````"
        parts += ["## Configuration", f"{fence}yaml\n{told['config'].replace(fence, '')}\n{fence}"]
    return "\n\n".join(part for part in parts if part) + "\n"


def _intended(told: Facts) -> str:
    names = {part["dataset"] for part in told["data"].values()}
    views = sorted({view for part in told["data"].values() for view in part["views"]} - {"unknown"})
    like = f"images like those of {', '.join(sorted(names))}" if names else "images like those it was trained on"
    seen = f" (views {', '.join(views)})" if views else ""
    return _text(
        f"Research on {', '.join(told['tasks'])} in {like}{seen}, read by people who know its limits. Body parts, "
        "modalities, ages and devices other than those in the data are out of scope; so are decisions about a patient."
    )


def _part(name: str, part: Facts, tasks: list[str]) -> str:
    rows = [
        [split, n["patients"], n["images"], *(n["labelled"].get(t, 0) for t in tasks)]
        for split, n in part["splits"].items()
    ]
    sites = [
        [site, *(counts.get(split, 0) for split in ("train", "val", "test"))] for site, counts in part["sites"].items()
    ]
    return "\n\n".join(
        [
            f"### {_text(f'{name}: ' * bool(name) + part['dataset'])}",
            _table(["split", "patients", "images", *(f"labelled: {t}" for t in tasks)], rows),
            _table(["site", "training", "validation", "test"], sites),
            _text(leak_words(part)),
        ]
    )


def _results(told: Facts, task: str) -> str:
    values = {k.removeprefix(f"{task}/"): v for k, v in told["values"].items() if k.startswith(f"{task}/")}
    plain = [k for k in values if "=" not in k and "/" not in k and not k.endswith(("_ci_low", "_ci_high"))]
    rows = [[name, interval(told["values"], task, name)] for name in plain if not name.startswith(HIDDEN)]
    primary = told["tasks"][task]["primary"]
    groups = {
        k.removeprefix(f"{primary}/"): v
        for k, v in values.items()
        if k.startswith((f"{primary}/site=", f"{primary}/view="))
    }
    by_group = [[name.replace("=", " "), number(value)] for name, value in groups.items()]
    shown = [f"### {_text(task)}", _table(["metric", "value (95 % interval)"], rows)]
    return "\n\n".join([*shown, _table([f"{primary} by", "value"], by_group)] if len(by_group) > 1 else shown)


def _left_out(parts: dict[str, Facts]) -> str:
    rows = [[name, reason, count] for name, part in parts.items() for reason, count in part["quarantine"].items()]
    if not rows:
        return "Every image and every truth that was read could be used."
    return _table(["site", "what and why", "count"], rows)


def _points(lines: Sequence[str]) -> str:
    return "\n".join(f"- {_text(line)}" for line in lines) or "Nothing could be judged."


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(_text(cell) for cell in line) + " |" for line in lines) if rows else ""


def _text(value: Any) -> str:
    """Return text on one line in which no character of a name is markup."""
    text = " ".join(str(value).split())
    for character in "\\`*_[]<>|#":
        text = text.replace(character, f"\\{character}")
    return text

"""Model card in Markdown: the content of the model report without pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from callbacks.reports.metrics_table import HIDDEN
from callbacks.reports.model_evaluation import DataDescription, ModelEvaluation, TaskEvaluation
from callbacks.reports.subgroups import remarks, subgroups, with_interval
from callbacks.reports.summary_text import limitations, performance
from mtmedformer.plots.html import number


def model_card(evaluation: ModelEvaluation, report: str) -> str:
    """Return the card.

    Args:
        evaluation: Results of the test.
        report: File name of the HTML report in the same folder.
    """
    model, tasks = evaluation.model, evaluation.names
    parts = [
        f"# Model card: {_text(', '.join(tasks))}",
        "**Research use only. Not a medical device, not for diagnosis.**",
        f"Curves, reliability diagrams and example images are in [{report}]({report}).",
        "## Performance",
        _points(performance(evaluation)),
        "## Limitations",
        _points(limitations(evaluation)),
        "## Intended use",
        _intended_use(evaluation),
        "## Data",
        *(_part(site, part, tasks) for site, part in evaluation.data.items()),
        "## Results on the test images",
        *(_results(name, task) for name, task in evaluation.tasks.items()),
        "## Excluded",
        _excluded(evaluation.data),
        "## Model and environment",
        _table(
            ["item", "value"],
            [
                ["model", model.name],
                ["encoder", model.encoder],
                ["weights", number(model.parameters)],
                ["checkpoint", model.checkpoint],
                ["calibrated tasks", ", ".join(model.calibrated) or "none"],
                *([name, value] for name, value in evaluation.versions.items()),
            ],
        ),
    ]
    if evaluation.config:
        fence = "````"
        parts += ["## Configuration", f"{fence}yaml\n{evaluation.config.replace(fence, '').rstrip()}\n{fence}"]
    return "\n\n".join(part for part in parts if part) + "\n"


def _intended_use(evaluation: ModelEvaluation) -> str:
    parts = evaluation.data.values()
    views = sorted({view for part in parts for view in part.views} - {"unknown"})
    names = ", ".join(sorted({part.dataset for part in parts})) or "the training data"
    shown = f" (views {', '.join(views)})" if views else ""
    return _text(
        f"Research on {', '.join(evaluation.names)} in images like those of {names}{shown}. Out of scope: body parts, "
        "modalities, age groups and devices other than those in the data, and decisions about a patient."
    )


def _part(site: str, part: DataDescription, tasks: list[str]) -> str:
    columns = ["split", "patients", "images", *(f"labelled: {task}" for task in tasks)]
    return "\n\n".join(
        [
            f"### {_text(f'{site}: {part.dataset}' if site else part.dataset)}",
            _table(columns, part.split_rows(tasks)),
            _table(["site", "training", "validation", "test"], part.site_rows()),
            _text(part.leak_text()),
        ]
    )


def _results(name: str, task: TaskEvaluation) -> str:
    rows = [[k, task.interval(k)] for k in task.overall if "/" not in k and not k.startswith(HIDDEN)]
    found = subgroups(task.values)
    groups = [[str(g), g.images, g.patients, with_interval(task.values, task.primary, g)] for g in found]
    shown = [f"### {_text(name)}", _table(["metric", "value (95 % interval)"], rows)]
    if groups:
        shown.append(_table([f"{task.primary} by", "images", "patients", "value (95 % interval)"], groups))
        shown += [_points(found_remarks)] if (found_remarks := remarks(found, task.values)) else []
    return "\n\n".join(shown)


def _excluded(parts: Mapping[str, DataDescription]) -> str:
    rows = [[site, reason, count] for site, part in parts.items() for reason, count in part.quarantine.items()]
    if not rows:
        return "All images and labels could be used."
    return _table(["site", "item and reason", "count"], rows)


def _points(lines: Sequence[str]) -> str:
    return "\n".join(f"- {_text(line)}" for line in lines) or "No task has a result."


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(_text(cell) for cell in line) + " |" for line in lines) if rows else ""


def _text(value: Any) -> str:
    """Return text on one line with all Markdown characters escaped."""
    text = " ".join(str(value).split())
    for character in "\\`*_[]<>|#":
        text = text.replace(character, f"\\{character}")
    return text

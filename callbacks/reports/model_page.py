"""HTML page of a model report: results, curves, data and configuration of a tested model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from callbacks.reports.drift_section import drift_section
from callbacks.reports.metrics_table import HEADLINES, HIDDEN
from callbacks.reports.model_evaluation import DataDescription, ModelEvaluation, TaskEvaluation
from callbacks.reports.ranking_curves import task_figure
from callbacks.reports.reliability_report import TaskReliability
from callbacks.reports.subgroups import remarks, subgroup_figure, subgroups, with_interval
from callbacks.reports.summary_text import limitations, performance
from mtmedformer.plots.html import (
    Html,
    ShadedCell,
    code,
    details,
    facts,
    figure,
    heading,
    join,
    number,
    page,
    paragraph,
    points,
    table,
    tiles,
)
from mtmedformer.plots.style import COLOURS

GLOSSARY = {
    "auroc": "Probability that an image with the finding scores higher than one without. 0.5 is chance, 1 is perfect.",
    "ap": "Mean precision over all sensitivities. Chance level is the share of images with the finding.",
    "sensitivity": "Share of images with the finding (or of lesions) that are detected.",
    "specificity": "Share of images without the finding that are classified as such.",
    "balanced_accuracy": "Mean sensitivity over the classes.",
    "f1": "Harmonic mean of sensitivity and precision.",
    "ece": "Expected calibration error: mean gap between predicted probability and observed frequency. 0 is perfect.",
    "nll": "Negative log-likelihood of the truth; lower is better.",
    "map, map50": "Average precision of boxes: mean over overlaps (IoU) from 0.5 to 0.95, and at 0.5.",
    "rsna_map": "Average precision of boxes by the rules of the RSNA pneumonia challenge.",
    "froc": "Share of lesions found, mean over 1/8 to 8 false alarms per image.",
    "dice, iou": "Overlap of the predicted mask with the truth. 0 is none, 1 is perfect.",
    "hd95": "95th percentile of the distance between the outlines, in pixels of the network input.",
    "mae, rmse, bias": "Mean absolute error, root of the mean squared error, mean of prediction minus truth: in the "
    "unit of the number, or in grades.",
    "r2": "Explained share of the variance. 1 is perfect, 0 is as good as the mean of all images.",
    "ccc": "Concordance correlation: agreement of numbers. 1 is perfect, 0 is none.",
    "kappa": "Cohen's kappa with quadratic weights: agreement of grades beyond chance. 1 is perfect, 0 is chance.",
    "within_one": "Share of grades that are at most one off.",
    "empty_correct": "Share of images without the structure for which no mask was predicted.",
    "95 % interval": "Contains the true value in about 95 of 100 such tests; computed by resampling patients.",
}


def model_page(
    evaluation: ModelEvaluation, pictures: Mapping[str, Html], colours: Mapping[tuple[str, str], str]
) -> str:
    """Return the whole page.

    Args:
        evaluation: Results of the test.
        pictures: Example images by task.
        colours: Colours of masks and boxes by task and class, the same as in the pictures.
    """
    sections = [
        *((name, _task(name, task, pictures.get(name), colours)) for name, task in evaluation.tasks.items()),
        *([("Drift", drift_section(evaluation.drift))] if evaluation.drift else []),
        ("Data", _data(evaluation.data, evaluation.names)),
        ("Excluded", _excluded(evaluation.data)),
        ("Model and configuration", _run(evaluation)),
    ]
    return page(f"Model report: {', '.join(evaluation.names)}", _subtitle(evaluation), sections, _summary(evaluation))


def _subtitle(evaluation: ModelEvaluation) -> str:
    model = evaluation.model
    sets = ", ".join(dict.fromkeys(part.dataset for part in evaluation.data.values())) or "unknown data"
    return f"{model.encoder}, {_millions(model.parameters)} weights · {model.checkpoint} · tested on {sets}"


def _millions(count: int) -> str:
    return f"{count / 1e6:.2g} million" if count >= 100_000 else number(count)


def _summary(evaluation: ModelEvaluation) -> Html:
    tasks = evaluation.tasks
    images = max((task.values.get("n_images", 0) for task in tasks.values()), default=0)
    patients = max((task.values.get("n_patients", 0) for task in tasks.values()), default=0)
    boxes = [(number(evaluation.score), "score: mean of the main metrics")]
    boxes += [(number(task.value(task.primary)), f"{name}: {task.primary}") for name, task in tasks.items()]
    if images:
        boxes.append((f"{images:.0f}", f"test images of {patients:.0f} patients"))
    return join(
        tiles(boxes),
        heading("Performance"),
        points(performance(evaluation)) or paragraph("No task has a result."),
        heading("Limitations"),
        points(limitations(evaluation)),
        details("Glossary", facts(GLOSSARY)),
    )


def _task(name: str, task: TaskEvaluation, pictures: Html | None, colours: Mapping[tuple[str, str], str]) -> Html:
    by_class = {c: colours.get((name, c), COLOURS[i % len(COLOURS)]) for i, c in enumerate(task.classes)}
    drawn = task_figure(task.curves, task.reliability, task.classes, by_class, task.unit)
    caption = ""
    if any("youden" in results for results in task.reliability.thresholds.values()):
        caption = "The dot on a ROC curve is the threshold of Youden's index, chosen on validation images. "
    if task.curves.roc and task.curves.confusion and len(task.classes) == 2:
        caption += f"Drawn for {task.classes[1]}; the curve of the other class is its mirror image."
    return join(
        _metrics(task),
        figure(drawn, caption + _interval_text(task), f"Curves of {name}: {', '.join(task.classes) or task.unit}")
        if drawn
        else Html(""),
        _confusion(task),
        _groups(name, task),
        _thresholds(task.reliability),
        _examples(pictures) if pictures else Html(""),
    )


def _interval_text(task: TaskEvaluation) -> str:
    """Return a sentence on the interval of a number and how often it holds the truth; empty without one."""
    one = task.reliability
    if one.margin is None or one.coverage is None or one.observed_coverage is None:
        return ""
    return (
        f"The band is the interval of ± {number(one.margin)} {task.unit}".rstrip()
        + f", chosen on validation images to hold {100 * one.coverage:.0f} % of them; it holds "
        f"{100 * one.observed_coverage:.0f} % of the test images."
    )


def _examples(pictures: Html) -> Html:
    text = "Image, truth and prediction. The number in brackets is the quality of the prediction, from 0 to 1."
    return join(heading("Worst, median and best, and every class"), paragraph(text, "note"), pictures)


def _metrics(task: TaskEvaluation) -> Html:
    names = [k for k in dict.fromkeys(k.split("/")[0] for k in task.overall) if not k.startswith("n_")]
    classes = [c for c in task.classes if any(f"{name}/{c}" in task.overall for name in names)]

    def rows(chosen: list[str]) -> list[list[Any]]:
        return [[name, task.interval(name), *(task.overall.get(f"{name}/{c}") for c in classes)] for name in chosen]

    columns = ["metric", "value (95 % interval)", *classes]
    hidden = [name for name in names if name.startswith(HIDDEN)]
    caption = ""
    if "n_images" in task.values:
        caption = f"{task.value('n_images'):.0f} test images of {task.value('n_patients'):.0f} patients"
    return join(
        table(rows([name for name in names if name not in hidden]), columns, caption),
        details("More metrics", table(rows(hidden), columns)) if hidden else Html(""),
    )


def _groups(name: str, task: TaskEvaluation) -> Html:
    """Return tables by site, view and group with remarks and a picture; a single site or view is not shown."""
    groups = subgroups(task.values)
    if not groups:
        return Html("")
    names = [metric for metric in HEADLINES if any(f"{metric}{group.key}" in task.values for group in groups)]
    classes = task.classes if any(len(group.counts) > 1 for group in groups) else ()
    rows: list[list[Any]] = [
        [
            str(group),
            group.images,
            group.patients,
            *(group.counts.get(c) for c in classes),
            *(with_interval(task.values, metric, group) for metric in names),
        ]
        for group in groups
    ]
    drawn = subgroup_figure(task.values, task.primary, groups)
    caption = "Points without a filling are groups of fewer than 20 patients."
    return join(
        table(rows, ["by group", "images", "patients", *(f"{c}" for c in classes), *names]),
        points([remark[0].upper() + remark[1:] for remark in remarks(groups, task.values)]) or Html(""),
        figure(drawn, caption, f"{task.primary} of {name} by group") if drawn else Html(""),
    )


def _confusion(task: TaskEvaluation) -> Html:
    rows = []
    for name, counts in zip(task.classes, task.curves.confusion, strict=False):
        total = sum(counts) or 1
        rows.append([name, *(ShadedCell(count, count / total) for count in counts)])
    return table(rows, ["true ↓ predicted →", *task.classes], "Confusion matrix (test images)")


def _thresholds(reliability: TaskReliability) -> Html:
    rows: list[list[Any]] = []
    for name, results in reliability.thresholds.items():
        for point, one in results.items():
            rows.append([name, point, one.threshold, one.sensitivity, one.specificity, one.fp_per_image])
    columns = ["class", "operating point", "threshold", "sensitivity", "specificity", "false alarms per image"]
    kept = [i for i in range(len(columns)) if any(row[i] is not None for row in rows)]
    return table(
        [[row[i] for i in kept] for row in rows],
        [columns[i] for i in kept],
        "Thresholds chosen on validation images, and their results on the test images",
    )


def _data(parts: Mapping[str, DataDescription], tasks: list[str]) -> Html:
    if not parts:
        return paragraph("The data module has no description.")
    shown: list[Html] = []
    for site, part in parts.items():
        size = " × ".join(map(str, part.image_size))
        origin = "official splits of the data set where there are any" if part.official_splits else "own splits"
        views = ", ".join(f"{view} {count}" for view, count in part.views.items())
        text = f"Input {size} pixels, prepared by {part.preset}; {origin}, by patient, seed {part.seed}. "
        text += (f"Views: {views}. " if views else "") + part.leak_text()
        shown += [
            heading(f"{site}: {part.dataset}" if site else part.dataset),
            table(part.split_rows(tasks), ["split", "patients", "images", *(f"labelled: {t}" for t in tasks)]),
            table(part.site_rows() if len(part.sites) > 1 else [], ["site", "training", "validation", "test"]),
            paragraph(text, "note"),
        ]
    return join(*shown)


def _excluded(parts: Mapping[str, DataDescription]) -> Html:
    excluded = [[reason, count, site] for site, part in parts.items() for reason, count in part.quarantine.items()]
    corrected = [[reason, count, site] for site, part in parts.items() for reason, count in part.remarks.items()]
    width = 3 if len(parts) > 1 else 2
    columns = ["item and reason", "count", "site"][:width]
    return join(
        table([row[:width] for row in excluded], columns, "Images and labels that could not be used (quarantine.csv)")
        or paragraph("All images and labels could be used."),
        table([row[:width] for row in corrected], columns, "Corrected and used"),
    )


def _run(evaluation: ModelEvaluation) -> Html:
    model = evaluation.model
    about = {
        "model": model.name,
        "encoder": model.encoder,
        "weights": number(model.parameters),
        "checkpoint": model.checkpoint,
        "calibrated tasks": ", ".join(model.calibrated) or "none",
    }
    configuration = details("Configuration", code(evaluation.config)) if evaluation.config else Html("")
    return join(facts(about | evaluation.versions), configuration)

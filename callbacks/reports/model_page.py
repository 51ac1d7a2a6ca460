"""Draws the report of a tested model from its facts and pictures."""

from __future__ import annotations

import math
from typing import Any

from callbacks.reports.metrics_table import HEADLINES, HIDDEN
from callbacks.reports.ranking_curves import task_figure
from callbacks.reports.summary_text import abilities, interval, limits
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

Facts = dict[str, Any]

GLOSSARY = {
    "auroc": "Chance that an image with the finding scores higher than one without. 0.5 is guessing, 1 is perfect.",
    "ap": "Mean precision over all sensitivities; guessing gives the share of images with the finding.",
    "sensitivity": "Share of images with the finding (or of lesions) that are found.",
    "specificity": "Share of images without the finding that are left alone.",
    "balanced_accuracy": "Mean of sensitivity over the classes.",
    "f1": "Harmonic mean of sensitivity and precision.",
    "ece": "How far probabilities are off on average. 0 is honest.",
    "nll": "Surprise at the truth; lower is better.",
    "map, map50": "Precision of boxes, averaged over overlaps from 0.5 to 0.95, and at 0.5.",
    "rsna_map": "Boxes by the rule of the RSNA pneumonia challenge.",
    "froc": "Share of lesions found, mean over 1/8 to 8 false alarms an image.",
    "dice, iou": "Overlap of the outline with the truth. 0 is none, 1 is perfect.",
    "hd95": "Distance between the outlines in pixels of the input, without the worst 5 %.",
    "empty_correct": "Share of images without the structure in which nothing was drawn.",
    "95 % interval": "Where the value would lie in 95 of 100 tests with other patients of the same kind.",
}


def model_page(told: Facts, pictures: dict[str, Html]) -> str:
    """Return the whole page.

    Args:
        told: What ``ModelReport.facts`` returned.
        pictures: The cases of each task.
    """
    tasks = ", ".join(told["tasks"])
    sections = [
        *((f"{task}", _task(told, task, pictures.get(task))) for task in told["tasks"]),
        ("Data", _data(told["data"], list(told["tasks"]))),
        ("Left out", _failures(told["data"])),
        ("Model and configuration", _run(told)),
    ]
    return page(f"What the model can do: {tasks}", _subtitle(told), sections, _summary(told))


def _subtitle(told: Facts) -> str:
    model = told["model"]
    sets = ", ".join(dict.fromkeys(part["dataset"] for part in told["data"].values())) or "unknown data"
    size = f"{model['parameters'] / 1e6:.2g} million weights"
    return f"{model['encoder']}, {size} · {model['checkpoint']} · tested on {sets}"


def _summary(told: Facts) -> Html:
    values = told["values"]
    images = max((values.get(f"{task}/n_images", 0) for task in told["tasks"]), default=0)
    patients = max((values.get(f"{task}/n_patients", 0) for task in told["tasks"]), default=0)
    boxes = [(number(told["score"]), "score: mean of the main metrics")]
    for task, about in told["tasks"].items():
        boxes.append((number(values.get(f"{task}/{about['primary']}")), f"{task}: {about['primary']}"))
    if images:
        boxes.append((f"{images:.0f}", f"test images of {patients:.0f} patients"))
    return join(
        tiles(boxes),
        heading("What it can do"),
        points(abilities(told)) or paragraph("Nothing could be judged."),
        heading("What it cannot do, and what is not known"),
        points(limits(told)),
        details("What the words mean", facts(GLOSSARY)),
    )


def _task(told: Facts, task: str, pictures: Html | None) -> Html:
    about, curves = told["tasks"][task], told["curves"].get(task, {})
    reliability = told["reliability"].get(task, {})
    drawn = task_figure(curves, reliability, about["classes"])
    alt = f"Curves of {task}: {', '.join(about['classes'])}"
    caption = (
        "A dot on the ROC curve is the threshold of Youden's index from validation. "
        if _has_youden(reliability)
        else ""
    )
    if "confusion" in curves and len(about["classes"]) == 2:
        caption += f"Drawn for {about['classes'][1]}; the other class is its mirror image."
    return join(
        _metrics(told, task),
        figure(drawn, caption, alt) if drawn else Html(""),
        _confusion(curves, about["classes"]),
        _groups(told, task),
        _thresholds(reliability),
        *(
            (
                heading("Worst, median and best"),
                paragraph(
                    "Image, truth and prediction; the number in brackets is how good it is, from 0 to 1.", "note"
                ),
                pictures,
            )
            if pictures
            else ()
        ),
    )


def _metrics(told: Facts, task: str) -> Html:
    values = {k.removeprefix(f"{task}/"): v for k, v in told["values"].items() if k.startswith(f"{task}/")}
    plain = {k: v for k, v in values.items() if "=" not in k and not k.endswith(("_ci_low", "_ci_high"))}
    names = [k for k in dict.fromkeys(k.split("/")[0] for k in plain) if not k.startswith("n_")]
    classes = [c for c in told["tasks"][task]["classes"] if any(f"{name}/{c}" in plain for name in names)]

    def rows(chosen: list[str]) -> list[list[Any]]:
        return [[n, interval(told["values"], task, n), *(plain.get(f"{n}/{c}") for c in classes)] for n in chosen]

    columns = ["metric", "value (95 % interval)", *classes]
    crowded = [name for name in names if name.startswith(HIDDEN)]
    counted = f"{values.get('n_images', math.nan):.0f} test images of {values.get('n_patients', math.nan):.0f} patients"
    return join(
        table(rows([name for name in names if name not in crowded]), columns, counted if "n_images" in values else ""),
        details("More metrics", table(rows(crowded), columns)) if crowded else Html(""),
    )


def _groups(told: Facts, task: str) -> Html:
    values = {k.removeprefix(f"{task}/"): v for k, v in told["values"].items() if k.startswith(f"{task}/") and "=" in k}
    groups = list(dict.fromkeys(k.split("/", 1)[1] for k in values if k.count("/") == 1))
    kinds = [group.split("=")[0] for group in groups]
    groups = [group for group in groups if kinds.count(group.split("=")[0]) > 1]
    names = [n for n in dict.fromkeys(k.split("/")[0] for k in values) if n in HEADLINES]
    rows = []
    for group in groups:
        count = values.get(f"n_images/{group}")
        images = int(count) if count is not None and not math.isnan(count) else None
        rows.append([group.replace("=", " "), images, *(values.get(f"{name}/{group}") for name in names)])
    return table(rows, ["by site and view", "images", *names])


def _confusion(curves: Facts, classes: list[str]) -> Html:
    counts = curves.get("confusion")
    if not counts:
        return Html("")
    rows = []
    for name, line in zip(classes, counts, strict=True):
        total = sum(line) or 1
        rows.append([name, *(ShadedCell(count, count / total) for count in line)])
    return table(rows, ["truth ↓ said →", *classes], "What is taken for what (test images)")


def _thresholds(reliability: Facts) -> Html:
    rows = []
    for name, points_ in reliability.get("thresholds", {}).items():
        for point, reached in points_.items():
            more = reached.get("specificity"), reached.get("fp_per_image")
            rows.append([name, point, reached["threshold"], reached.get("sensitivity"), *more])
    if not rows:
        return Html("")
    columns = ["class", "operating point", "threshold", "sensitivity here", "specificity here", "false alarms an image"]
    keep = [i for i in range(len(columns)) if any(row[i] is not None for row in rows)]
    return table(
        [[row[i] for i in keep] for row in rows],
        [columns[i] for i in keep],
        "Thresholds chosen on validation images, and what they reach on the test images",
    )


def _data(parts: dict[str, Facts], tasks: list[str]) -> Html:
    if not parts:
        return paragraph("The data set does not describe itself.")
    shown = []
    for name, part in parts.items():
        rows = [
            [split, n["patients"], n["images"], *(n["labelled"].get(task) for task in tasks)]
            for split, n in part["splits"].items()
        ]
        title = f"{name}: {part['dataset']}" if name else part["dataset"]
        size = " × ".join(map(str, part["image_size"]))
        origin = "the data set's own splits where it has any" if part["official_splits"] else "split anew"
        shown += [
            heading(title),
            table(rows, ["split", "patients", "images", *(f"labelled: {t}" for t in tasks)]),
            table(_site_rows(part), ["site", "training", "validation", "test"]),
            paragraph(
                f"Input {size} pixels, framed by {part['preset']}; {origin}, by patient, seed {part['seed']}. "
                f"{_views(part)}{leak_words(part)}",
                "note",
            ),
        ]
    return join(*shown)


def _site_rows(part: Facts) -> list[list[Any]]:
    sites = part["sites"]
    return [[s, *(n.get(k, 0) for k in ("train", "val", "test"))] for s, n in sites.items()] if len(sites) > 1 else []


def _views(part: Facts) -> str:
    views = ", ".join(f"{view} {count}" for view, count in part["views"].items())
    return f"Views: {views}. " if views else ""


def leak_words(part: Facts) -> str:
    """Say what the leak check found."""
    leaks, shared = part["leaks"], part["shared_patients"]
    patients = f"{shared} patients are in more than one split" if shared else "No patient is in two splits"
    if leaks["compared"] < 2:
        return f"{patients}; images were not compared for near-duplicates (mtmedformer fingerprint does)."
    some = f" of {leaks['images']}" if leaks["compared"] < leaks["images"] else ""
    rest = " (the rest is not decoded here; mtmedformer fingerprint compares all)" if some else ""
    kinds = {"across_splits": "across splits", "across_sites": "across sites", "across_patients": "of two patients"}
    found = [f"{leaks[key]} {words}" for key, words in kinds.items() if leaks[key]]
    pairs = (
        f"near-duplicate pairs {', '.join(found)}" if found else "no near-duplicate crosses a split, site or patient"
    )
    return f"{patients}; {pairs} among {leaks['compared']}{some} images{rest}."


def _failures(parts: dict[str, Facts]) -> Html:
    rows = [[reason, count, name] for name, part in parts.items() for reason, count in part["quarantine"].items()]
    mended = [[reason, count, name] for name, part in parts.items() for reason, count in part["remarks"].items()]
    several = len(parts) > 1
    cut = slice(None) if several else slice(2)
    columns = ["what and why", "count", "site"][cut]
    return join(
        table(
            [row[cut] for row in rows], columns, "Images and truths that could not be used (quarantine.csv lists them)"
        )
        or paragraph("Every image and every truth that was read could be used."),
        table([row[cut] for row in mended], columns, "Corrected and kept"),
    )


def _run(told: Facts) -> Html:
    model = told["model"]
    scaled = ", ".join(model["calibrated"]) or "none"
    return join(
        facts(
            {
                "model": model["class"],
                "encoder": model["encoder"],
                "weights": f"{model['parameters']:,}".replace(",", "\u202f"),
                "checkpoint": model["checkpoint"],
                "calibrated tasks": scaled,
                **told["versions"],
            }
        ),
        details("Configuration", code(told["config"])) if told["config"] else Html(""),
    )


def _has_youden(reliability: Facts) -> bool:
    return any("youden" in points_ for points_ in reliability.get("thresholds", {}).values())

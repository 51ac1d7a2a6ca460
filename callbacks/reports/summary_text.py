"""Sentences about performance and limitations of a tested model, derived from its test results."""

from __future__ import annotations

import math

from callbacks.reports.model_evaluation import DataDescription, ModelEvaluation, TaskEvaluation
from callbacks.reports.subgroups import remarks, subgroups
from mtmedformer.plots.html import number

GRADES = {
    "classification": ((0.95, "very good"), (0.85, "good"), (0.7, "moderate"), (-1.0, "poor")),
    "detection": ((0.9, "very good"), (0.75, "good"), (0.5, "moderate"), (-1.0, "poor")),
    "segmentation": ((0.9, "very good"), (0.8, "good"), (0.6, "moderate"), (-1.0, "poor")),
    "regression": ((0.9, "very good"), (0.75, "good"), (0.5, "moderate"), (-1.0, "poor")),
}
"""Lowest value of each grade: of AUROC, of the sensitivity at one false alarm per image, of Dice, of CCC or kappa."""

GRADED_METRIC = {
    "classification": "auroc",
    "detection": "sensitivity_at_1fp",
    "segmentation": "dice",
    "regression": "ccc",
}

FEW_PATIENTS, VERY_FEW_PATIENTS, FEW_IMAGES = 100, 20, 10
GAP = 0.05
"""Difference from the value over all images from which a weaker site or view is reported."""


def performance(evaluation: ModelEvaluation) -> list[str]:
    """Return one sentence per tested task: its grade, the value behind it and the number of images."""
    return [_performance(name, task) for name, task in evaluation.tasks.items() if grade(task) is not None]


def grade(task: TaskEvaluation) -> str | None:
    """Return ``very good``, ``good``, ``moderate`` or ``poor``; ``None`` without a result."""
    value = task.value(_graded_metric(task))
    return None if math.isnan(value) else next(word for lowest, word in GRADES[task.kind] if value >= lowest)


def _graded_metric(task: TaskEvaluation) -> str:
    metric = GRADED_METRIC[task.kind]
    return metric if metric in task.values else task.primary


def _performance(name: str, task: TaskEvaluation) -> str:
    metric, classes = _graded_metric(task), ", ".join(_tested_classes(task))
    images = ""
    if "n_images" in task.values:
        patients = task.value("n_patients")
        count = f"{task.value('n_cases'):.0f} cases" if task.by_case else f"{task.value('n_images'):.0f} images"
        images = f" on {count} of {patients:.0f} patients"
        images += ", too few for a reliable estimate" if patients < VERY_FEW_PATIENTS else ""
    result, start = task.interval(metric), f"{name}: {grade(task)}"
    if task.kind == "classification":
        several = len(task.classes) > 1
        accuracy = task.value("balanced_accuracy")
        decisions = f"; balanced accuracy {_percent(accuracy)}" if several and accuracy > 0 else ""
        return f"{start} {'separation' if several else 'recognition'} of {classes}: AUROC {result}{images}{decisions}."
    if task.kind == "segmentation":
        return f"{start} segmentation of {classes}: Dice {result}{images}."
    if task.kind == "regression" and task.classes:
        exact = _percent(task.value("accuracy"))
        return f"{start} grading: weighted kappa {result}{images}; {exact} of the grades are exact."
    if task.kind == "regression":
        error = f"{task.interval('mae')} {task.unit}".rstrip()
        return f"{start} estimate: mean absolute error {error}, R² {task.interval('r2')}{images}."
    if metric == "sensitivity_at_1fp":
        limits = task.interval_limits(metric)
        spread = f" ({_percent(limits[0])} to {_percent(limits[1])})" if limits else ""
        share = f"{_percent(task.value(metric))}{spread}"
        return f"{start} detection of {classes}: {share} found at one false alarm per image{images}."
    return f"{start} detection of {classes}: {metric} {result}{images}."


def _tested_classes(task: TaskEvaluation) -> list[str]:
    """Return the classes that occur in the test images."""
    return [name for name in task.classes if task.curves.counts.get(name, 1)]


def _percent(value: float) -> str:
    return "–" if math.isnan(value) else f"{100 * value:.0f} %"


def limitations(evaluation: ModelEvaluation) -> list[str]:
    """Return what the test does not show, and where the model is weak; the most serious points first."""
    points = _data_limitations(evaluation.data)
    for name, task in evaluation.tasks.items():
        points += _task_limitations(name, task)
    patients = {name: task.values.get("n_patients", math.inf) for name, task in evaluation.tasks.items()}
    few = [f"{name} {n:.0f}" for name, n in patients.items() if n < FEW_PATIENTS]
    if few:
        points.append(f"Few patients in the test ({', '.join(few)}): read the intervals, not the third digit.")
    sites = {site for part in evaluation.data.values() for site in part.sites} - {"unknown"}
    if len(evaluation.data) == 1 and len(sites) < 2:
        points.append(
            "All images come from one site; performance at other hospitals, with other scanners or in other "
            "populations is unknown."
        )
    points.append(
        "Tested on held-out images of the same collection, not on future patients. Not a medical device; not for "
        "diagnosis or treatment."
    )
    return points


def _data_limitations(parts: dict[str, DataDescription]) -> list[str]:
    points = []
    if any(part.generated for part in parts.values()):
        points.append("The images are synthetic: the results do not apply to images of patients.")
    shared = sum(part.shared_patients for part in parts.values())
    if shared:
        points.append(f"{shared} patients are in more than one split: the results are too optimistic.")
    crossing = sum(part.leaks["across_splits"] for part in parts.values())
    if crossing:
        points.append(f"{crossing} pairs of near-duplicate images lie in two splits: the results are too optimistic.")
    weak = {task: n for part in parts.values() for task, n in part.weak.items()}
    return points + [f"{task}: the truth is approximate in {n} images." for task, n in weak.items()]


def _task_limitations(name: str, task: TaskEvaluation) -> list[str]:
    metric = _graded_metric(task)
    if grade(task) is None:
        return [f"{name}: no test image has a usable label; performance is unknown."]
    points = []
    if task.kind == "classification" and task.values.get("auroc_ci_low", 1.0) <= 0.5:
        points.append(f"{name}: not shown to be better than chance (AUROC {task.interval('auroc')}).")
    elif task.values.get("r2_ci_low", 1.0) <= 0:
        points.append(f"{name}: not shown to be better than the mean of all images (R² {task.interval('r2')}).")
    elif grade(task) == "poor":
        points.append(f"{name}: poor result ({metric} {task.interval(metric)}); do not rely on it.")
    points += _missed_classes(name, task)
    items = "lesions" if task.kind == "detection" else "cases" if task.by_case else "images"
    counts = task.curves.counts
    points += [f"{name}: no {c} among the test {items}; performance is unknown." for c, n in counts.items() if not n]
    rare = [f"{c} ({n})" for c, n in counts.items() if 0 < n < FEW_IMAGES]
    if rare:
        points.append(f"{name}: few test {items} of {', '.join(rare)}.")
    groups = subgroups(task.values)
    points += [_weakest_group(name, task, column) for column in dict.fromkeys(group.column for group in groups)]
    points += [f"{name}: {remark}" for remark in remarks(groups, task.values)]
    ece = task.reliability.errors.get("ece", task.values.get("ece"))
    if task.kind in ("classification", "regression") and ece is not None and ece > 0.1:
        points.append(f"{name}: probabilities are off by {number(ece, 2)} on average; do not read them as risks.")
    return [point for point in points if point]


def _weakest_group(name: str, task: TaskEvaluation, kind: str) -> str:
    """Return a sentence about the group of a column with the lowest value, empty where it is close to the rest."""
    groups, overall = task.groups(task.primary, kind), task.value(task.primary)
    lowest = min(groups, key=lambda group: groups[group], default=None)
    if lowest is None or len(groups) < 2 or not groups[lowest] < overall - GAP:
        return ""
    return f"{name}: weaker for {kind} {lowest} ({task.primary} {number(groups[lowest])}, overall {number(overall)})."


def _missed_classes(name: str, task: TaskEvaluation) -> list[str]:
    """Return a sentence per class that is recognised in less than half of its images."""
    points = []
    for k, c in enumerate(task.classes):
        share = task.value(f"sensitivity/{c}")
        if share < 0.5:
            confused, row = "", task.curves.confusion[k] if task.curves.confusion else []
            if sum(row):
                count, other = max((n, o) for n, o in zip(row, task.classes, strict=True) if o != c)
                confused = f"; {count} of {sum(row)} are classified as {other}" if count else ""
            unit = "cases" if task.by_case else "images"
            points.append(f"{name}: recognises {c} in only {_percent(share)} of its {unit}{confused}.")
    return points

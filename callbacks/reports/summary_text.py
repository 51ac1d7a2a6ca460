"""Says in words what a model can do and where not to trust it, from the numbers of its test."""

from __future__ import annotations

import math
from typing import Any

from mtmedformer.plots.html import number

Facts = dict[str, Any]

WORDS = {
    "classification": ((0.95, "very well"), (0.85, "well"), (0.7, "moderately"), (-1.0, "poorly")),
    "detection": ((0.9, "very well"), (0.75, "well"), (0.5, "moderately"), (-1.0, "poorly")),
    "segmentation": ((0.9, "very well"), (0.8, "well"), (0.6, "moderately"), (-1.0, "poorly")),
}
"""From which value on a model is said to do so well: AUROC, sensitivity at one false alarm an image, Dice."""

JUDGED_BY = {"classification": "auroc", "detection": "sensitivity_at_1fp", "segmentation": "dice"}

FEW_PATIENTS, VERY_FEW_PATIENTS, FEW_IMAGES = 100, 20, 10
GAP = 0.05
"""How far below all together a site or view may lie before it is pointed out."""


def interval(values: Facts, task: str, metric: str) -> str:
    """Return a value with its interval, such as ``0.91 (0.85 to 0.95)``."""
    value, low, high = (values.get(f"{task}/{metric}{end}") for end in ("", "_ci_low", "_ci_high"))
    if low is None or high is None or math.isnan(low) or math.isnan(high):
        return number(value)
    return f"{number(value)} ({number(low)} to {number(high)})"


def abilities(told: Facts) -> list[str]:
    """Return a sentence for every task that was tested: how well it is done, on how much."""
    return [_ability(told, task) for task in told["tasks"] if judged(told, task) is not None]


def judged(told: Facts, task: str) -> str | None:
    """Return ``very well``, ``well``, ``moderately`` or ``poorly``; ``None`` where nothing is known."""
    kind = told["tasks"][task]["kind"]
    value = told["values"].get(f"{task}/{_judge(told, task)}")
    if value is None or math.isnan(value):
        return None
    return next(word for least, word in WORDS[kind] if value >= least)


def _judge(told: Facts, task: str) -> str:
    kind = told["tasks"][task]["kind"]
    judge = JUDGED_BY[kind]
    return judge if f"{task}/{judge}" in told["values"] else told["tasks"][task]["primary"]


def _ability(told: Facts, task: str) -> str:
    about, values = told["tasks"][task], told["values"]
    metric, classes = _judge(told, task), ", ".join(_seen(told, task))
    how = judged(told, task)
    result = interval(values, task, metric)
    where = ""
    if f"{task}/n_images" in values:
        where = f" on {values[f'{task}/n_images']:.0f} images of {values[f'{task}/n_patients']:.0f} patients"
        where += ", too few to be sure" if values[f"{task}/n_patients"] < VERY_FEW_PATIENTS else ""
    if about["kind"] == "classification":
        several = len(about["classes"]) > 1
        what = f"ranks images by {classes} {how}" if several else f"ranks images by how likely {classes} is {how}"
        right = values.get(f"{task}/balanced_accuracy")
        decided = f"; its decisions are right in {_percent(right)} (mean over classes)" if several and right else ""
        return f"{task}: {what}, AUROC {result}{where}{decided}."
    if about["kind"] == "detection" and metric == "sensitivity_at_1fp":
        low, high = (values.get(f"{task}/{metric}{end}") for end in ("_ci_low", "_ci_high"))
        known = low is not None and high is not None and not math.isnan(low)
        spread = f" ({_percent(low)} to {_percent(high)})" if known else ""
        share = f"{_percent(values[f'{task}/{metric}'])}{spread}"
        return f"{task}: finds {classes} {how}, {share} of them at one false alarm an image{where}."
    if about["kind"] == "segmentation":
        return f"{task}: outlines {classes} {how}, Dice {result}{where}."
    return f"{task}: finds {classes} {how}, {metric} {result}{where}."


def _seen(told: Facts, task: str) -> list[str]:
    """Return the classes that occur in the test images."""
    counts = told["curves"].get(task, {}).get("counts", {})
    return [name for name in told["tasks"][task]["classes"] if counts.get(name, 1)]


def _percent(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{100 * value:.0f} %"


def limits(told: Facts) -> list[str]:
    """Return what this test cannot vouch for, and where the model does worse; the gravest first."""
    found = [*_of_data(told["data"])]
    for task in told["tasks"]:
        found += _of_task(told, task)
    few = {task: told["values"].get(f"{task}/n_patients", math.inf) for task in told["tasks"]}
    few = {task: n for task, n in few.items() if n < FEW_PATIENTS}
    if few:
        counted = ", ".join(f"{task} {n:.0f}" for task, n in few.items())
        found.append(f"Judged on few patients ({counted}): look at the intervals, not at the third digit.")
    sites = {site for part in told["data"].values() for site in part["sites"]} - {"unknown"}
    if told["data"] and len(told["data"]) < 2 and len(sites) < 2:
        found.append("All images come from one place; nothing is known of other hospitals, scanners or populations.")
    found.append(
        "Tested on images that were put by from the same collection, not on patients to come. Not a medical device; "
        "not for diagnosis or treatment."
    )
    return found


def _of_data(parts: dict[str, Facts]) -> list[str]:
    found = []
    if any(part["generated"] for part in parts.values()):
        found.append("The images are generated, not taken of patients: the results say nothing of real films.")
    shared = sum(part["shared_patients"] for part in parts.values())
    if shared:
        found.append(f"{shared} patients are in more than one split: the results flatter the model.")
    crossing = sum(part["leaks"]["across_splits"] for part in parts.values())
    if crossing:
        found.append(f"{crossing} pairs of near-duplicate images lie in two splits: the results flatter the model.")
    weak = {task: n for part in parts.values() for task, n in part["weak"].items()}
    found += [f"{task}: the truth itself is approximate in {n} images." for task, n in weak.items()]
    return found


def _of_task(told: Facts, task: str) -> list[str]:
    values, about = told["values"], told["tasks"][task]
    metric, primary = _judge(told, task), about["primary"]
    found = []
    how = judged(told, task)
    if how is None:
        return [f"{task}: no test image is labelled for it so that it could be judged; nothing is known."]
    if about["kind"] == "classification" and values.get(f"{task}/auroc_ci_low", 1.0) <= 0.5:
        found.append(f"{task}: not shown to be better than chance (AUROC {interval(values, task, 'auroc')}).")
    elif how == "poorly":
        found.append(f"{task}: done poorly ({metric} {interval(values, task, metric)}); do not rely on it.")
    found += _missed(told, task)
    what = "lesions" if about["kind"] == "detection" else "images"
    counts = told["curves"].get(task, {}).get("counts", {})
    found += [
        f"{task}: no {name} among the test {what}; nothing is known of it." for name, n in counts.items() if not n
    ]
    rare = [f"{name} ({n})" for name, n in counts.items() if 0 < n < FEW_IMAGES]
    if rare:
        found.append(f"{task}: few test {what} of {', '.join(rare)}.")
    for kind in ("site", "view"):
        start = f"{task}/{primary}/{kind}="
        groups = {key.removeprefix(start): value for key, value in values.items() if key.startswith(start)}
        worst = min(groups, key=lambda name: groups[name], default=None)
        whole = values.get(f"{task}/{primary}", math.nan)
        if worst is not None and len(groups) > 1 and groups[worst] < whole - GAP:
            found.append(
                f"{task}: worse at {kind} {worst} ({primary} {number(groups[worst])}, {number(whole)} over all)."
            )
    ece = told["reliability"].get(task, {}).get("ece", values.get(f"{task}/ece"))
    if about["kind"] == "classification" and ece is not None and ece > 0.1:
        found.append(f"{task}: its probabilities are {number(ece, 2)} off on average; do not read them as risks.")
    return found


def _missed(told: Facts, task: str) -> list[str]:
    """Return the classes that are recognised in less than half of their images, and what they are taken for."""
    classes = told["tasks"][task]["classes"]
    confusion = told["curves"].get(task, {}).get("confusion")
    found = []
    for k, name in enumerate(classes):
        share = told["values"].get(f"{task}/sensitivity/{name}", math.nan)
        if share < 0.5:
            said = ""
            if confusion and sum(confusion[k]):
                other = max((n, c) for n, c in zip(confusion[k], classes, strict=True) if c != name)
                said = f"; {other[0]} of {sum(confusion[k])} are taken for {other[1]}" if other[0] else ""
            found.append(f"{task}: recognises {name} in {_percent(share)} of its images only{said}.")
    return found

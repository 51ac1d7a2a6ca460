"""Files of predicted cases: ``cases.csv``, and one DICOM structured report per case, from the results of its images."""

from __future__ import annotations

import csv
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from callbacks.prediction.dicom.objects import DicomObjects
from callbacks.prediction.prediction_folder import PredictionFolder
from mtmedformer.batch import Task
from mtmedformer.errors import DataError
from mtmedformer.inference.results import NOTE
from mtmedformer.metrics.cases import CaseRule
from mtmedformer.storage.atomic_write import atomic_write
from mtmedformer.storage.safe_text import cell

Json = dict[str, Any]
Scores = dict[str, dict[str, float]]
"""Probability by task and class; a number has the class ``""``."""

TABLE = "cases.csv"


def write_cases(
    folder: PredictionFolder,
    tasks: Mapping[str, Task],
    rule: CaseRule,
    pooled_before: Collection[str],
    objects: DicomObjects | None,
    files: Mapping[str, Path],
) -> list[str]:
    """Write the table of the cases and, where all images of a case have a structured report, one of the case.

    Args:
        folder: Folder of the predictions; its JSON files have the results of the images.
        tasks: Tasks of the model by name.
        rule: How the scores of images are pooled.
        pooled_before: Tasks whose head reads cases as a whole; their images have one result.
        objects: Builder of DICOM objects, or ``None`` for no reports.
        files: File of each image by its id.

    Returns:
        Why cases have no report although their images have one.
    """
    cases: dict[str, list[Json]] = {}
    for entry in folder.entries():
        if "row" in entry and entry.get("case"):
            cases.setdefault(entry["case"], []).append(entry)
    rows, problems = [], []
    for case, entries in cases.items():
        scores = pooled(entries, tasks, rule, pooled_before)
        rows.append(_row(case, entries, scores, rule))
        reported = [any(name.endswith(".sr.dcm") for name in entry["files"]) for entry in entries]
        if objects and all(reported):
            try:
                report = objects.build_case(
                    [files[entry["image"]] for entry in entries], scores, [entry.get("frame") for entry in entries]
                )
            except DataError as error:
                problems.append(str(error))
                continue
            with atomic_write(folder.path("dicom/cases", case, ".sr.dcm")) as part:
                report.save_as(part)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with atomic_write(folder.root / TABLE) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([cell(column) for column in columns])
        writer.writerows([cell(str(row.get(column, ""))) for column in columns] for row in rows)
    return problems


def pooled(
    entries: Sequence[Json], tasks: Mapping[str, Task], rule: CaseRule, pooled_before: Collection[str]
) -> Scores:
    """Return the pooled scores of one case.

    Args:
        entries: JSON of its images.
        tasks: Tasks of the model.
        rule: How scores are pooled.
        pooled_before: Tasks whose images have one result; it is taken as it is.
    """
    scores: Scores = {}
    for name, task in tasks.items():
        if all(name in entry["classes"] for entry in entries):
            values = [[entry["classes"][name][label] for label in task.classes] for entry in entries]
        elif task.kind == "regression" and all(name in entry["values"] for entry in entries):
            values = [[entry["values"][name]["value"]] for entry in entries]
        else:
            continue
        own = CaseRule("mean") if name in pooled_before else rule
        result = own.scores(task, np.array(values, np.float64), np.zeros(len(values), np.int64))[0]
        scores[name] = dict(zip(task.classes or ("",), map(float, result), strict=True))
    return scores


def _row(case: str, entries: Sequence[Json], scores: Scores, rule: CaseRule) -> Json:
    views = " ".join(entry["view"] or "?" for entry in entries)
    sides = " ".join(dict.fromkeys(entry["laterality"] or "?" for entry in entries))
    row: Json = {"case": case, "site": entries[0]["site"], "images": len(entries), "views": views, "laterality": sides}
    for task, classes in scores.items():
        row |= {f"{task}:{label}" if label else f"{task}:value": f"{value:.6g}" for label, value in classes.items()}
    return row | {"pooling": rule.pooling, "model": entries[0]["model"], "note": NOTE}

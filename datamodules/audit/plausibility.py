"""Look once over the labels of a whole set for what is probably a mistake of units, polarity or spelling.

Single labels that cannot be right are left out where they are read. Here are mistakes that show only in the whole set.
``of_records`` needs no pixel, ``of_images`` what was measured while the images were decoded.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from datamodules.audit.group_classes import classes_missing_in_groups
from datamodules.audit.spellings import Place, class_spellings, site_spellings
from datamodules.cache.entries import Measures
from datamodules.cache.quarantine import Issue
from datamodules.images.masks import TOO_FAINT
from datamodules.records import BoxTruth, Record, ValueTruth
from mtmedformer.batch import Task
from mtmedformer.errors import DataError
from mtmedformer.site_classes import classes_of_one_site

Findings = dict[str, str]
"""Sentences for the user by a key of what was found, so that each is logged once; no id and no path is in them."""

LEAST_IMAGES = 5
"""A property that all images share is a finding from this number of images."""

CODES = frozenset({-1.0, -9.0, -99.0, -999.0, -9999.0, 999.0, 9999.0, 99999.0})
"""Numbers that often stand for one that is not known."""

WHITE_SHARE = 0.05
"""Films with a white border are a finding from this share of the images."""

LEAST_MASKS = 3
"""As ``LEAST_IMAGES``, for masks that cover everything or the border."""


def of_records(records: Sequence[Record], tasks: Mapping[str, Task], place: Place = lambda task, label: "") -> Findings:
    """Check classes, sites, groups and boxes before an image is decoded.

    Args:
        records: The records in use.
        tasks: The tasks by name.
        place: Returns where the table names the class of a task.

    Raises:
        DataError: All boxes of a task are fractions of the image.
    """
    found = {f"spelling of {name}": sentence for name, sentence in class_spellings(records, tasks, place).items()}
    if sentence := site_spellings(records):
        found["spelling of sites"] = sentence
    for name, task in tasks.items():
        if task.kind == "detection":
            found |= _boxes(name, [t for r in records if isinstance(t := r.truth.get(name), BoxTruth) and t.boxes])
        elif task.kind == "regression" and not task.classes:
            found |= _codes(name, [t.value for r in records if isinstance(t := r.truth.get(name), ValueTruth)])
    found |= classes_of_one_site(((record.site, record.truth) for record in records), tasks)
    return found | classes_missing_in_groups(records, tasks, known=found)


def of_images(
    records: Sequence[Record], tasks: Mapping[str, Task], measures: Mapping[str, Measures], issues: Sequence[Issue] = ()
) -> Findings:
    """Check masks, boxes and films with what was measured while they were decoded.

    Args:
        records: The usable records.
        tasks: The tasks by name.
        measures: What was measured, by record id.
        issues: Labels that were left out.

    Raises:
        DataError: Every mask of a task is either empty or too faint a JPEG.
    """
    known = [(record, measures[record.id]) for record in records if record.id in measures]
    found = _white_films(known)
    for name, task in tasks.items():
        if task.kind == "detection":
            found |= _boxes_in_images(name, known)
        elif task.kind == "segmentation":
            _check_faint(name, known, issues)
            for channel, label in enumerate(task.classes):
                found |= _masks(f"{name}/{label}" if len(task.classes) > 1 else name, name, channel, known)
    return found


def _codes(name: str, values: Sequence[float]) -> Findings:
    """Find codes such as 999 or -1 that stand for a number that is not known."""
    others = [value for value in values if value not in CODES]
    if len(others) < LEAST_IMAGES:
        return {}
    low, high = min(others), max(others)
    space = (high - low) / 2
    odd = sorted({v for v in values if v in CODES and (v < low - space or v > high + space or v < 0 <= low)})
    if not odd:
        return {}
    count = sum(value in odd for value in values)
    return {
        f"codes in {name}": (
            f"{name}: {count} of {len(values)} numbers are {' or '.join(f'{v:g}' for v in odd)}, the others lie in "
            f"{low:g} to {high:g}. Is it a code for 'not known'? Give the range of the task, so that it is unknown."
        )
    }


def _boxes(name: str, truths: Sequence[BoxTruth]) -> Findings:
    if not truths:
        return {}
    found = {}
    boxes = np.array([box for truth in truths for box in truth.boxes], np.float64)
    count = len(boxes)
    if boxes.max() <= 1:  # False for NaN, which is an issue of its image
        raise DataError(
            f"{name}: all {count} boxes lie in the first pixel of their images (no coordinate is above "
            f"{boxes.max():g}). Are they fractions of the image? Boxes are [x0, y0, x1, y1] in pixels: multiply x by "
            "the image's width and y by its height."
        )
    first = sum(bool(np.max(truth.boxes) <= 1) for truth in truths)
    if first:
        found[f"fractions in {name}"] = (
            f"{name}: the boxes of {first} of {len(truths)} images lie in the first pixel, as fractions of the image "
            "do; these images are unknown for the task. Boxes are in pixels."
        )
    sides = boxes[:, 2:] - boxes[:, :2]
    swapped = int((sides <= 0).any(axis=1).sum())
    if swapped > max(1, 0.02 * count):
        found[f"corners in {name}"] = (
            f"{name}: {swapped} of {count} boxes have swapped corners. Are all boxes [x, y, width, height]? Then the "
            "others are wrong too; boxes are [x0, y0, x1, y1]."
        )
    large = boxes.max(axis=1) > 1
    small = int((large & (sides > 0).all(axis=1) & (sides < 1).any(axis=1)).sum())
    if small:
        found[f"sizes in {name}"] = f"{name}: {small} of {count} boxes are narrower or lower than one pixel."
    if len(truths) >= LEAST_IMAGES and len({truth.boxes for truth in truths}) == 1:
        found[f"one box in {name}"] = (
            f"{name}: all {len(truths)} images with boxes have the same ones, {list(truths[0].boxes[0])}. Is it a "
            "placeholder?"
        )
    return found


def _boxes_in_images(name: str, known: Sequence[tuple[Record, Measures]]) -> Findings:
    """Find boxes in percent or in pixels of a smaller image, all in the upper left part, and boxes of whole images."""
    extents, corners, smallest, whole = [], [], math.inf, 0
    for record, measure in known:
        truth = record.truth.get(name)
        if isinstance(truth, BoxTruth) and truth.boxes:
            height, width = record.size or measure.size
            x, y = np.max(truth.boxes, axis=0)[2:]
            extents.append(max(x / width, y / height))
            corners.append(max(x, y))
            smallest = min(smallest, height, width)
            left, top, right, bottom = truth.boxes[0]
            whole += max(left, top) <= 1 and right >= width - 1 and bottom >= height - 1
    if len(extents) >= LEAST_IMAGES and whole == len(extents):
        return {f"whole boxes of {name}": f"{name}: the boxes of all {whole} images cover the whole image."}
    if len(extents) < LEAST_IMAGES or len(set(corners)) == 1:
        return {}
    percent = 50 < max(corners) <= 100 and smallest >= 150
    if max(extents) > 0.5 and not percent:
        return {}
    unit = "percent" if percent else "pixels of smaller images"
    return {
        f"corner in {name}": (
            f"{name}: the boxes of all {len(extents)} images lie in the upper left part of the image (no coordinate "
            f"is above {max(corners):g}). Are they in {unit}? Boxes are in pixels of the file, or of the size in the "
            "table."
        )
    }


def _check_faint(name: str, known: Sequence[tuple[Record, Measures]], issues: Sequence[Issue]) -> None:
    """Raise if JPEG masks of 0 and 1 were found and all others are empty: compression has removed their shapes."""
    faint = sum(issue.subject == name and TOO_FAINT in issue.detail for issue in issues)
    own = [m for record, measure in known if name in record.truth for m in measure.masks if m.task == name]
    if faint and own and not any(mask.inside for mask in own):
        raise DataError(
            f"{name}: {faint} JPEG masks are too faint to be read ({TOO_FAINT}) and the other {len(own)} are empty, "
            "perhaps because compression removed levels such as 0 and 1. Save the masks as PNG."
        )


def _masks(what: str, name: str, channel: int, known: Sequence[tuple[Record, Measures]]) -> Findings:
    own = [
        mask
        for record, measure in known
        if name in record.truth
        for mask in measure.masks
        if mask.task == name and mask.channel == channel
    ]
    count = len(own)
    full = sum(mask.inside >= 0.99 for mask in own)
    outside = sum(mask.border >= 0.9 and mask.inside < 0.99 for mask in own)
    if full >= max(LEAST_MASKS, 0.2 * count):
        every = "every mask covers its whole image" if full == count else "the mask covers the whole image"
        return {
            f"full masks of {what}": f"{what}: {every} ({full} of {count} masks). Is the background 0, and the shape "
            "in this channel of the file?"
        }
    if outside >= max(LEAST_MASKS, 0.1 * count):
        return {
            f"polarity of {what}": f"{what}: {outside} of {count} masks contain the border of the image. Are shape and "
            "background exchanged? The background is 0."
        }
    if count >= LEAST_IMAGES and not any(mask.inside for mask in own):
        return {
            f"empty masks of {what}": f"{what}: all {count} mask files are empty, so every image counts as negative."
        }
    return {}


def _white_films(known: Sequence[tuple[Record, Measures]]) -> Findings:
    """Find films with a white border: some have one by collimation, about 2 % in ordinary sets."""
    white = Counter(record.site for record, measure in known if measure.border >= 0.9)
    count = white.total()
    if count < max(LEAST_IMAGES, WHITE_SHARE * len(known)):
        return {}
    films = Counter(record.site for record, _ in known)
    places = ", ".join(f"{site} {n} of {films[site]}" for site, n in white.most_common(3)) if len(films) > 1 else ""
    return {
        "white films": f"{count} of {len(known)} images have a white border{f' ({places})' if places else ''}. Are "
        "they negatives (bones dark), or scans with a white margin? In a radiograph air is black. Mark negatives with "
        "1 in a column 'inverted' of the table; they are then inverted when they are read."
    }

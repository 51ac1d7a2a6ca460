"""Section of a model report on drift: how the test images differ from the images of the training."""

from __future__ import annotations

from collections import Counter

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from callbacks.evaluation.familiarity import TestDrift
from mtmedformer.encoders.familiarity import BINS_PER_OCTAVE, HIGHEST, LOWEST
from mtmedformer.plots.html import Html, ShadedCell, figure, join, paragraph, table
from mtmedformer.plots.style import COLOURS, INK, STYLE, legend_columns

WIDTH = 7.2
"""Width of the figure in inches."""

FEW = 20
"""Number of test images of a site below which its share of unfamiliar images is uncertain."""


def drift_section(drift: TestDrift) -> Html:
    """Return the section: unfamiliar images by site, their distances against those of validation, and the reasons."""
    drawn = _figure(drift)
    text = (
        "An image is unfamiliar if a fact of its header occurs in no training image, or if its features are further "
        f"from those of the training images than the limit, the {drift.quantile:g} quantile of the validation images. "
        f"About {1 - drift.quantile:.1%} of familiar images exceed it by chance. Distances are multiples of the limit."
    )
    caption = "Distances of the test images, and of the validation images of the training"
    return join(
        paragraph(text, "note"),
        _sites(drift),
        figure(drawn, caption, "Histogram of distances of test and validation images") if drawn else Html(""),
        _reasons(drift),
    )


def _sites(drift: TestDrift) -> Html:
    usual = drift.usual()
    rows = []
    for site, images, unfamiliar, median in drift.by_site():
        shift = None if median is None or not usual else median / usual
        note = "few images" if images < FEW else ""
        rows.append(
            [site, images, unfamiliar, ShadedCell(unfamiliar / images, unfamiliar / images), median, shift, note]
        )
    columns = ["site", "test images", "unfamiliar", "share", "median distance", "relative to validation", ""]
    kept = range(len(columns)) if any(row[-1] for row in rows) else range(len(columns) - 1)
    return table([[row[i] for i in kept] for row in rows], [columns[i] for i in kept], "Unfamiliar test images by site")


def _reasons(drift: TestDrift) -> Html:
    """Return how many images each reason holds for; distances differ in every image and are counted together."""
    reasons = Counter(
        "distance in feature space" if reason.startswith("features at") else reason
        for image in drift.images
        for reason in image.assessment.reasons
    )
    return table([[reason, count] for reason, count in reasons.most_common(12)], ["why unfamiliar", "images"])


def _figure(drift: TestDrift) -> Figure | None:
    """Draw shares of images over the distance, of the test by site and of validation; ``None`` without distances."""
    if drift.validation is None or drift.limit is None or not drift.distances():
        return None
    edges = 2.0 ** (np.arange(len(drift.validation.histogram) + 1) / BINS_PER_OCTAVE + LOWEST) / drift.limit
    assert len(edges) == (HIGHEST - LOWEST) * BINS_PER_OCTAVE + 1
    sites = [site for site, *_ in drift.by_site()]
    with rc_context(STYLE):
        drawn = Figure(figsize=(WIDTH, 2.9), layout="constrained")
        axis = drawn.add_subplot()
        counts = np.array(drift.validation.histogram, float)
        axis.stairs(counts / counts.sum(), edges, fill=True, color=INK, alpha=0.25, label="validation")
        shown = [counts]
        for number, site in enumerate(sites):
            of_site = np.histogram(drift.distances(site), edges)[0].astype(float)
            if of_site.sum():
                colour = COLOURS[number % len(COLOURS)]
                axis.stairs(of_site / of_site.sum(), edges, color=colour, linewidth=1.6, label=f"test: {site}")
                shown.append(of_site)
        axis.axvline(1, color="#b4281e", linestyle="--", linewidth=1.2, label="limit")
        used = np.flatnonzero(np.sum(shown, axis=0))
        axis.set_xscale("log", base=2)
        axis.set_xlim(min(edges[used[0]], 0.5), max(edges[used[-1] + 1], 2.0))
        axis.set_xlabel("distance, as a multiple of the limit")
        axis.set_ylabel("share of images")
        ticks = [2.0**k for k in range(-8, 24) if axis.get_xlim()[0] <= 2.0**k <= axis.get_xlim()[1]]
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        labels = axis.get_legend_handles_labels()[1]
        columns = legend_columns(labels, WIDTH, 8)
        drawn.set_figheight(2.9 + 0.2 * -(-len(labels) // columns))
        drawn.legend(loc="outside lower center", ncols=columns, frameon=False, fontsize=8)
    return drawn

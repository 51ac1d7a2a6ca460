"""The picture of a fingerprint: six panels of numbers about a data set or a federation, no image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, ScalarFormatter

from datamodules.audit.image_statistics import ImageStatistics
from mtmedformer.commands.fingerprint.summary import SPLITS, Fingerprint

COLOURS = {"train": "#4c72b0", "val": "#dd8452", "test": "#55a868"}
INK, WARN = "#333333", "#c44e52"
MOST_SITES = 12
"""Sites drawn; further ones are left out of the picture, not of the tables and the JSON file."""


def draw(summary: Fingerprint, facts: Sequence[ImageStatistics], file: Path) -> None:
    """Draw the fingerprint into a PNG: labels by site, classes, sizes, structures, grey values, shortcuts.

    Args:
        summary: The fingerprint.
        facts: The images it was made from.
        file: Where to write.
    """
    figure = Figure(figsize=(15, 9.6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(rect=(0.005, 0.075, 0.99, 0.86), h_pad=0.09, w_pad=0.06)  # type: ignore[call-arg, union-attr]
    panels = figure.subplots(2, 3)
    _draw_labels(panels[0, 0], summary)
    _draw_classes(panels[0, 1], summary)
    _draw_structures(panels[0, 2], summary)
    _draw_sizes(panels[1, 0], summary, facts)
    _draw_grey(panels[1, 1], summary)
    _draw_shortcuts(panels[1, 2], summary)
    for panel in panels.flat:
        panel.title.set_fontweight("bold")
        panel.title.set_fontsize(11)
        panel.tick_params(labelsize=8.5)
        panel.spines[["top", "right"]].set_visible(False)
    splits = " · ".join(f"{s} {n.images} images / {n.patients} patients" for s, n in summary.splits.items())
    figure.text(0.012, 0.972, summary.dataset, fontsize=17, weight="bold", color=INK, va="center")
    figure.text(
        0.988, 0.972, f"{summary.images} images · {summary.patients} patients · {len(summary.labelled)} site(s)",
        fontsize=13, ha="right", va="center", color=INK,
    )  # fmt: skip
    figure.text(0.988, 0.945, splits, fontsize=10, ha="right", va="center", color=INK)
    wish = summary.suggestion
    figure.text(
        0.012, 0.052,
        f"Suggested: image_size [{wish.image_size[0]}, {wish.image_size[1]}] · sampler {wish.sampler} · detection from "
        f"stride {wish.strides[0]}",
        fontsize=12, weight="bold", color=COLOURS["test"], va="center",
    )  # fmt: skip
    figure.text(
        0.012, 0.022, f"Leak check: {summary.leaks.summary()}", fontsize=11, va="center",
        color=WARN if summary.leaks.across_splits else INK, weight="bold" if summary.leaks.across_splits else "normal",
    )  # fmt: skip
    figure.savefig(file, dpi=110)


def _draw_labels(panel: Axes, summary: Fingerprint) -> None:
    """Draw how many images of each site are labelled for each task, as a heat map of shares with the counts in it."""
    sites, tasks = list(summary.labelled)[:MOST_SITES], list(summary.tasks)
    counts = np.zeros((len(sites), len(tasks)), int)
    hits = np.zeros_like(counts)
    for i, site in enumerate(sites):
        for cells in summary.labelled[site].values():
            for name, count in cells.items():
                counts[i, tasks.index(name)] += count.labelled
                hits[i, tasks.index(name)] += count.positive
    panel.imshow(counts / np.maximum(counts.max(axis=1, keepdims=True), 1), cmap="Blues", vmin=0, vmax=2, aspect="auto")
    for i, j in np.ndindex(counts.shape):
        some = counts[i, j] > 0
        panel.text(
            j, i, f"{counts[i, j]}\n({hits[i, j]} pos.)" if some else "unknown", ha="center", va="center", fontsize=8.5,
            color=INK if some else "#999999", style="normal" if some else "italic",
        )  # fmt: skip
    panel.set_xticks(range(len(tasks)), tasks)
    panel.set_yticks(range(len(sites)), sites)
    more = len(summary.labelled) - len(sites)
    panel.set_title("Labelled images by site and task" + (f" ({more} more sites)" if more else ""))


def _draw_classes(panel: Axes, summary: Fingerprint) -> None:
    """Draw images per class as bars, one colour a split."""
    rows = [(task, label, n) for task, classes in summary.classes.items() for label, n in classes.items()]
    left = np.zeros(len(rows))
    for split in SPLITS:
        width = np.array([n[split] for _, _, n in rows], float)
        if width.any():
            panel.barh(range(len(rows)), width, left=left, color=COLOURS[split], label=split, height=0.72)
        left += width
    for i, total in enumerate(left):
        panel.text(total, i, f" {total:.0f}", va="center", fontsize=8, color=INK)
    panel.set_yticks(range(len(rows)), [f"{task}: {label}" for task, label, _ in rows])
    panel.invert_yaxis()
    panel.margins(x=0.12)
    panel.legend(frameon=False, fontsize=8.5, loc="best")
    panel.set_xlabel("images", fontsize=9)
    panel.set_title("Images with each class, box or mask")


def _draw_structures(panel: Axes, summary: Fingerprint) -> None:
    """Draw the range of sizes at the suggested input against the strides of the network."""
    rows = [(t, label, row) for t, classes in summary.structures.items() for label, row in classes.items()]
    for i, (_, _, row) in enumerate(rows):
        q = row.suggested_px
        panel.plot([q["5"], q["95"]], [i, i], color=COLOURS["train"], lw=2, alpha=0.5, solid_capstyle="round")
        panel.plot([q["25"], q["75"]], [i, i], color=COLOURS["train"], lw=7, alpha=0.8, solid_capstyle="round")
        panel.plot(q["50"], i, "o", color="white", ms=4.5, mec=INK)
        panel.text(q["95"] * 1.08, i, f"n={row.count}", va="center", fontsize=8, color=INK)
    if not rows:
        panel.text(0.5, 0.5, "no boxes or masks", transform=panel.transAxes, ha="center", color="#999999")
    else:
        for stride in (4, 8, 16, 32):
            panel.axvline(stride, color="#bbbbbb", lw=0.8, ls=":", zorder=0)
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_formatter(ScalarFormatter())
        panel.set_ylim(len(rows) - 0.4, -0.6)
    panel.set_yticks(range(len(rows)), [f"{task}: {label}" for task, label, _ in rows])
    height, width = summary.suggestion.image_size
    panel.set_xlabel(f"√area in pixels of a {height} x {width} input", fontsize=9)
    panel.set_title("Sizes (5–95 %, quartiles, median) and strides")


def _draw_sizes(panel: Axes, summary: Fingerprint, facts: Sequence[ImageStatistics]) -> None:
    """Draw width against height of the original images, one colour a site."""
    sites = list(summary.labelled)[:MOST_SITES]
    for k, site in enumerate(sites):
        sizes = np.array([f.size for f in facts if f.record.site == site], float).reshape(-1, 2)
        panel.scatter(sizes[:, 1], sizes[:, 0], s=16, alpha=0.45, color=f"C{k % 10}", label=site, edgecolors="none")
    biggest = max(max(f.size) for f in facts) * 1.06
    panel.set(xlim=(0, biggest), ylim=(0, biggest), aspect="equal")
    panel.xaxis.set_major_locator(MaxNLocator(6))
    if len(sites) > 1:
        panel.legend(frameon=False, fontsize=8.5, loc="lower left")
    panel.set_xlabel("width in pixels", fontsize=9)
    panel.set_ylabel("height in pixels", fontsize=9)
    spacing = f"spacing {summary.spacing_mm['50']:.3g} mm" if summary.spacing_mm else "spacing unknown"
    panel.set_title(f"Original sizes ({spacing})")


def _draw_grey(panel: Axes, summary: Fingerprint) -> None:
    """Draw the grey values of each site; sites that differ here differ in scanner or processing."""
    tallest = 0.0
    for k, (site, row) in enumerate(list(summary.intensity.items())[:MOST_SITES]):
        density = np.array(row.histogram) * len(row.histogram)
        panel.stairs(density, np.linspace(0, 1, len(density) + 1), color=f"C{k % 10}", lw=1.6, label=site)
        tallest = max(tallest, float(np.sort(density)[-3]))
    panel.set(xlim=(0, 1), ylim=(0, tallest * 1.25))  # the black of the background may rise above it
    panel.set_xlabel("grey value", fontsize=9)
    panel.set_yticks([])
    if len(summary.intensity) > 1:
        panel.legend(frameon=False, fontsize=8.5)
    panel.set_title("Grey values by site")


def _draw_shortcuts(panel: Axes, summary: Fingerprint) -> None:
    """Draw how well findings can be predicted without the image."""
    rows = summary.shortcuts[:10]
    colours = [WARN if s.warning else "#bbbbbb" for s in rows]
    panel.barh(range(len(rows)), [max(s.auc - 0.5, 0) for s in rows], left=0.5, color=colours, height=0.72)
    for i, s in enumerate(rows):
        panel.text(max(s.auc, 0.5) + 0.005, i, f"{s.auc:.2f}", va="center", fontsize=8.5, color=INK)
    panel.set_yticks(range(len(rows)), [f"{s.source} → {s.task}: {s.finding}" for s in rows])
    panel.set_xlim(0.5, 1)
    panel.invert_yaxis()
    if not rows:
        panel.text(0.5, 0.5, "nothing to compare", transform=panel.transAxes, ha="center", color="#999999")
    panel.set_xlabel("AUC without the image (0.5 is chance)", fontsize=9)
    panel.set_title("Shortcuts")

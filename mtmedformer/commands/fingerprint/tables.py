"""A fingerprint as tables and sentences for the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mtmedformer.commands.fingerprint.summary import SPLITS, Fingerprint, Quantiles


def show(summary: Fingerprint, console: Console) -> None:
    """Print a fingerprint: labels, sites, sizes, leaks, shortcuts, plausibility, warnings and suggested settings."""
    splits = ", ".join(f"{s} {n.images} images / {n.patients} patients" for s, n in summary.splits.items())
    console.print(
        f"\n[bold]{escape(summary.dataset)}[/]: {summary.images} images of {summary.patients} patients at "
        f"{len(summary.labelled)} site(s); {splits}"
    )
    if summary.sites:
        console.print(_sites_table(summary))
    console.print(_labels_table(summary))
    if any(summary.structures.values()):
        console.print(_structures_table(summary))
    height, width = summary.content_size
    console.print(
        f"Images: median {_median_size(summary)} px (5-95 %: {_range(summary)}); pixel spacing {_spacing(summary)}; "
        f"kept region {height} x {width} px."
    )
    if summary.white_level is not None:
        console.print(f"White level of the 16-bit images: {summary.white_level} (data.white_level).")
    console.print(f"Leak check: {summary.leaks.summary()}.")
    if summary.shortcuts:
        best = summary.shortcuts[0]
        console.print(
            f"Strongest shortcut: the {best.source} predicts {escape(best.task)}/{escape(best.finding)} without the "
            f"image with an AUC of {best.auc:.2f} (0.5 is chance)."
        )
    if not summary.implausible:
        console.print("Plausibility of labels and films: nothing found.")
    for sentence in summary.implausible:
        console.print(f"[bold yellow]! Implausible:[/] {escape(sentence)}", highlight=False)
    for warning in summary.warnings:
        console.print(f"[bold yellow]![/] {escape(warning)}", highlight=False)
    wish = summary.suggestion
    console.print(
        f"[bold green]Suggested[/]: image_size {list(wish.image_size)}, sampler {wish.sampler}, strides from "
        f"{wish.strides[0]}."
    )
    for reason in wish.reasons:
        console.print(f"  - {escape(reason)}", highlight=False)


def _sites_table(summary: Fingerprint) -> Table:
    table = Table(title="Sites; counts are images (patients)", title_justify="left", pad_edge=False)
    several = len({one.dataset for one in summary.sites.values()}) > 1
    columns = [*(["data set"] if several else []), *SPLITS, "median px", "spacing", "left out", "suggested"]
    table.add_column("site")
    for name in columns:
        table.add_column(name, justify="left" if name == "data set" else "right")
    for name, one in (*summary.sites.items(), ("all", summary)):
        if one is summary:
            table.add_section()
        counts = [f"{one.splits[s].images} ({one.splits[s].patients})" if s in one.splits else "–" for s in SPLITS]
        table.add_row(
            escape(name),
            *([escape(one.dataset) if one is not summary else ""] if several else []),
            *counts,
            _median_size(one).replace(" ", ""),
            _spacing(one),
            str(sum(one.quarantine.values())),
            f"{one.suggestion.image_size[0]}x{one.suggestion.image_size[1]}",
        )
    return table


def _labels_table(summary: Fingerprint) -> Table:
    table = Table(title="Labelled images (positive) by site; – is unknown, not negative", title_justify="left")
    table.add_column("site")
    table.add_column("split")
    for name in summary.tasks:
        table.add_column(escape(name), justify="right")
    for site, splits in summary.labelled.items():
        for split in SPLITS:
            if split in splits:
                counts = [splits[split].get(name) for name in summary.tasks]
                table.add_row(escape(site), split, *(f"{c.labelled} ({c.positive})" if c else "–" for c in counts))
        table.add_section()
    return table


def _structures_table(summary: Fingerprint) -> Table:
    table = Table(title="Sizes: √area, 5 % / median / 95 %", title_justify="left", pad_edge=False)
    table.add_column("task: class", overflow="fold")
    for name in ("count", "original px", "mm", "input px now", "suggested"):
        table.add_column(name, justify="right", no_wrap=name != "input px now")
    for task, classes in summary.structures.items():
        for label in classes:
            for site, one in (("", summary), *summary.sites.items()):
                row = one.structures.get(task, {}).get(label)
                if row is not None:
                    sizes = (row.original_px, row.mm, row.input_px, row.suggested_px)
                    name = f"  {site}" if site else f"{task}: {label}"
                    table.add_row(escape(name), str(row.count), *map(_three, sizes))
            if summary.sites:
                table.add_section()
    return table


def _three(sizes: Quantiles | None) -> str:
    return f"{sizes['5']:.0f}/{sizes['50']:.0f}/{sizes['95']:.0f}" if sizes else "–"


def _median_size(summary: Fingerprint) -> str:
    return f"{summary.original_size.height['50']:.0f} x {summary.original_size.width['50']:.0f}"


def _range(summary: Fingerprint) -> str:
    height, width = summary.original_size.height, summary.original_size.width
    return f"{height['5']:.0f}-{height['95']:.0f} x {width['5']:.0f}-{width['95']:.0f}"


def _spacing(summary: Fingerprint) -> str:
    return f"{summary.spacing_mm['50']:.3g} mm" if summary.spacing_mm else "unknown"

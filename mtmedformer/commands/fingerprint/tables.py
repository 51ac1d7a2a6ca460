"""A fingerprint as tables and sentences for the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mtmedformer.commands.fingerprint.summary import SPLITS, Fingerprint, Quantiles


def show(found: Fingerprint, console: Console) -> None:
    """Print a fingerprint: labels, sites, sizes, leak check, shortcuts, warnings and suggested settings."""
    splits = ", ".join(f"{s} {n.images} images / {n.patients} patients" for s, n in found.splits.items())
    console.print(
        f"\n[bold]{escape(found.dataset)}[/]: {found.images} images of {found.patients} patients at "
        f"{len(found.labelled)} site(s); {splits}"
    )
    if found.sites:
        console.print(_sites_table(found))
    console.print(_labels_table(found))
    if any(found.structures.values()):
        console.print(_structures_table(found))
    console.print(
        f"Images: median {_median_size(found)} px (5-95 %: {_range(found)}); pixel spacing {_spacing(found)}; kept "
        f"region {found.content_size[0]} x {found.content_size[1]} px."
    )
    console.print(f"Leak check: {found.leaks.summary()}.")
    if found.shortcuts:
        best = found.shortcuts[0]
        console.print(
            f"Strongest shortcut: the {best.source} predicts {escape(best.task)}/{escape(best.finding)} without the "
            f"image with an AUC of {best.auc:.2f} (0.5 is chance)."
        )
    for warning in found.warnings:
        console.print(f"[bold yellow]![/] {escape(warning)}", highlight=False)
    wish = found.suggestion
    console.print(
        f"[bold green]Suggested[/]: image_size {list(wish.image_size)}, sampler {wish.sampler}, strides from "
        f"{wish.strides[0]}."
    )
    for reason in wish.reasons:
        console.print(f"  - {escape(reason)}", highlight=False)


def _sites_table(found: Fingerprint) -> Table:
    table = Table(title="Sites; counts are images (patients)", title_justify="left", pad_edge=False)
    several = len({one.dataset for one in found.sites.values()}) > 1
    columns = [*(["data set"] if several else []), *SPLITS, "median px", "spacing", "left out", "suggested"]
    table.add_column("site")
    for name in columns:
        table.add_column(name, justify="left" if name == "data set" else "right")
    for name, one in (*found.sites.items(), ("all", found)):
        if one is found:
            table.add_section()
        counts = [f"{one.splits[s].images} ({one.splits[s].patients})" if s in one.splits else "–" for s in SPLITS]
        table.add_row(
            escape(name),
            *([escape(one.dataset) if one is not found else ""] if several else []),
            *counts,
            _median_size(one).replace(" ", ""),
            _spacing(one),
            str(sum(one.quarantine.values())),
            f"{one.suggestion.image_size[0]}x{one.suggestion.image_size[1]}",
        )
    return table


def _labels_table(found: Fingerprint) -> Table:
    table = Table(title="Labelled images (positive) by site; – is unknown, not negative", title_justify="left")
    table.add_column("site")
    table.add_column("split")
    for name in found.tasks:
        table.add_column(escape(name), justify="right")
    for site, splits in found.labelled.items():
        for split in SPLITS:
            if split in splits:
                counts = [splits[split].get(name) for name in found.tasks]
                table.add_row(escape(site), split, *(f"{c.labelled} ({c.positive})" if c else "–" for c in counts))
        table.add_section()
    return table


def _structures_table(found: Fingerprint) -> Table:
    table = Table(title="Sizes: √area, 5 % / median / 95 %", title_justify="left", pad_edge=False)
    table.add_column("task: class", overflow="fold")
    for name in ("count", "original px", "mm", "input px now", "suggested"):
        table.add_column(name, justify="right", no_wrap=name != "input px now")
    for task, classes in found.structures.items():
        for label in classes:
            for site, one in (("", found), *found.sites.items()):
                row = one.structures.get(task, {}).get(label)
                if row is not None:
                    sizes = (row.original_px, row.mm, row.input_px, row.suggested_px)
                    name = f"  {site}" if site else f"{task}: {label}"
                    table.add_row(escape(name), str(row.count), *map(_three, sizes))
            if found.sites:
                table.add_section()
    return table


def _three(sizes: Quantiles | None) -> str:
    return f"{sizes['5']:.0f}/{sizes['50']:.0f}/{sizes['95']:.0f}" if sizes else "–"


def _median_size(found: Fingerprint) -> str:
    return f"{found.original_size.height['50']:.0f} x {found.original_size.width['50']:.0f}"


def _range(found: Fingerprint) -> str:
    height, width = found.original_size.height, found.original_size.width
    return f"{height['5']:.0f}-{height['95']:.0f} x {width['5']:.0f}-{width['95']:.0f}"


def _spacing(found: Fingerprint) -> str:
    return f"{found.spacing_mm['50']:.3g} mm" if found.spacing_mm else "unknown"

"""``mtmedformer fingerprint``: what a data set holds, what is wrong with it, and what settings it asks for.

Written before the first training: ``fingerprint.json`` for programs, ``fingerprint.png`` and a table for people. All
three hold numbers and names of tasks, sites and image files only, no picture and no patient.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml
from rich.console import Console

from mtmedformer.commands.fingerprint.suggestions import Suggestion, suggest
from mtmedformer.errors import ConfigError

if TYPE_CHECKING:
    from datamodules.audit.near_duplicates import LeakReport
    from datamodules.audit.shortcuts import Shortcut
    from datamodules.audit.survey import Facts
    from datamodules.base import MedicalDataModule

QUANTILES = (5, 25, 50, 75, 95)


@dataclass(frozen=True)
class Fingerprint:
    """What a data set holds, in plain values.

    Attributes:
        dataset: Class of the data module.
        images: Usable images that are labelled for some task.
        patients: Number of patients.
        splits: Images and patients by split.
        tasks: Kind and classes by task.
        labelled: Images by site, split and task: ``labelled`` for it, and ``positive`` (a class that is not called
            normal, a box, a mask). A task that nobody labelled at a site has no entry there.
        classes: Images with a class (or boxes of it, or its mask) by task, class and split.
        original_size: Quantiles of height and width in pixels, and the most common sizes.
        content_size: Median height and width in original pixels of what the preset frames.
        spacing_mm: Quantiles of the pixel spacing in mm; ``None`` where no file tells it.
        intensity: Quantiles of the grey values in [0, 1] by site, and their histogram.
        structures: By task and class how many boxes or masks there are, and the quantiles of the square root of their
            areas in original pixels, in mm (``None`` if unknown) and in pixels of the present and the suggested input.
        image_size: Height and width of the present input.
        quarantine: How many images or truths were left out, by reason.
        leaks: Near-duplicates (see ``datamodules.audit.near_duplicates.LeakReport``).
        shortcuts: What can be told without the image (see ``datamodules.audit.shortcuts.Shortcut``).
        suggestion: Settings the data asks for, with reasons.
        warnings: Sentences to read before training.
    """

    dataset: str
    images: int
    patients: int
    splits: dict[str, dict[str, int]]
    tasks: dict[str, dict[str, Any]]
    labelled: dict[str, dict[str, dict[str, dict[str, int]]]]
    classes: dict[str, dict[str, dict[str, int]]]
    original_size: dict[str, Any]
    content_size: tuple[int, int]
    spacing_mm: dict[str, float] | None
    intensity: dict[str, dict[str, Any]]
    structures: dict[str, dict[str, dict[str, Any]]]
    image_size: tuple[int, int]
    quarantine: dict[str, int]
    leaks: LeakReport
    shortcuts: list[Shortcut]
    suggestion: Suggestion
    warnings: list[str]


def fingerprint(datamodule: MedicalDataModule, output: Path, console: Console | None = None) -> Fingerprint:
    """Look at every image of a data set, print what is in it and write ``fingerprint.json`` and ``fingerprint.png``.

    Args:
        datamodule: The data set; set up here, its images decoded into its cache.
        output: Folder of the two files; made if needed.
        console: Where the table is printed; the terminal by default.

    Raises:
        DataError: As ``MedicalDataModule.setup``.
        ConfigError: The folder cannot be made or written.
    """
    from datamodules.audit.survey import survey
    from mtmedformer.commands.fingerprint.report import draw, show

    try:
        output.mkdir(parents=True, exist_ok=True)
        facts = survey(datamodule)
        found = summarise(datamodule, facts)
        (output / "fingerprint.json").write_text(json.dumps(asdict(found), indent=2, allow_nan=False) + "\n")
        draw(found, facts, output / "fingerprint.png")
    except OSError as error:
        raise ConfigError(
            f"--output {output}: {error.strerror or error}; choose a folder that can be written"
        ) from error
    console = console or Console()
    show(found, console)
    console.print(
        f"Written: {output / 'fingerprint.json'} and {output / 'fingerprint.png'}", markup=False, soft_wrap=True
    )
    return found


def summarise(data: MedicalDataModule, facts: Sequence[Facts]) -> Fingerprint:
    """Turn what was seen of each image into the fingerprint of the data set."""
    from datamodules.audit.near_duplicates import find_duplicates, leak_report
    from datamodules.audit.shortcuts import find_shortcuts

    duplicates = find_duplicates(np.stack([f.thumbnail for f in facts]), [f.record.id for f in facts])
    leaks = leak_report(duplicates, [f.record for f in facts], {f.record.id: f.split for f in facts})
    shortcuts = find_shortcuts(facts, data.tasks)
    suggestion = suggest(facts, data.tasks, data.batch_size)
    spacings = [float(np.mean(f.spacing)) for f in facts if f.spacing]
    patients = {s: len({f.record.patient for f in facts if f.split == s}) for s in ("train", "val", "test")}
    images = Counter(f.split for f in facts)
    return Fingerprint(
        dataset=type(data).__name__,
        images=len(facts),
        patients=len({f.record.patient for f in facts}),
        splits={s: {"images": images[s], "patients": n} for s, n in patients.items() if n},  # type: ignore[index]
        tasks={n: {"kind": t.kind, "classes": list(t.classes)} for n, t in data.tasks.items()},
        labelled=_labelled(data, facts),
        classes=_classes(data, facts),
        original_size={
            "height": _quantiles([f.size[0] for f in facts]),
            "width": _quantiles([f.size[1] for f in facts]),
            "most_common": [[*size, n] for size, n in Counter(f.size for f in facts).most_common(5)],
        },
        content_size=suggestion.content,
        spacing_mm=_quantiles(spacings) if spacings else None,
        intensity=_intensity(facts),
        structures=_structures(facts, suggestion),
        image_size=(data.image_size[0], data.image_size[1]),
        quarantine=dict(data.quarantine.by_reason()),
        leaks=leaks,
        shortcuts=shortcuts,
        suggestion=suggestion,
        warnings=_warnings(data, facts, leaks, shortcuts),
    )


def main(argv: list[str]) -> int:
    """Run ``mtmedformer fingerprint --config FILE [--output DIR] [--data.init_args.KEY VALUE …]``.

    Sections of a config file other than ``data`` are ignored, so that the file of a training serves as it is.

    Returns:
        0; mistakes raise ``UserError``.
    """
    import datamodules  # noqa: F401  short class names
    from datamodules.base import MedicalDataModule

    parser = _parser(MedicalDataModule)
    with ExitStack() as stack:
        namespace = parser.parse_args(_data_sections(argv, Path(stack.enter_context(tempfile.TemporaryDirectory()))))
    instantiate = getattr(parser, "instantiate", parser.instantiate_classes)  # the new name is of jsonargparse 4.49
    data = instantiate(namespace).data
    fingerprint(data, Path(namespace.output))
    return 0


def _parser(data_class: type) -> Any:
    from jsonargparse import ArgumentParser

    class Parser(ArgumentParser):  # type: ignore[misc, unused-ignore]
        def error(self, message: str, ex: Exception | None = None) -> Any:
            raise ConfigError(" ".join(message.split())) from ex

    parser = Parser(prog="mtmedformer fingerprint", description="Describe a data set before training on it.")
    parser.add_argument("--config", action="config", help="YAML file with a data section; may come several times")
    parser.add_argument("--output", type=str, default="fingerprint", help="folder of the JSON and PNG files")
    parser.add_subclass_arguments(data_class, "data", required=True)
    return parser


def _data_sections(argv: Sequence[str], folder: Path) -> list[str]:
    """Replace every config file on a command line by one that holds its ``data`` section only."""
    out: list[str] = []
    files = 0
    for word in argv:
        follows = out and out[-1] in ("--config", "-c")
        if not follows and not word.startswith("--config="):
            out.append("--config" if word == "-c" else word)
            continue
        file = Path(word.removeprefix("--config="))
        try:
            config = yaml.safe_load(file.read_text())
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"--config {file}: cannot be read as YAML ({' '.join(str(error).split())})") from error
        if not isinstance(config, dict):
            raise ConfigError(f"--config {file}: holds no keys; it needs a data section, like configs/quickstart.yaml")
        section = {"data": config["data"]} if "data" in config else {}
        target = folder / f"{files}.yaml"
        target.write_text(yaml.safe_dump(section))
        files += 1
        out = [*out, str(target)] if follows else [*out, f"--config={target}"]
    return out


# Parts of the summary


def _labelled(data: MedicalDataModule, facts: Sequence[Facts]) -> dict[str, dict[str, dict[str, dict[str, int]]]]:
    from datamodules.loading.samplers import is_positive, strata

    table: dict[str, dict[str, dict[str, dict[str, int]]]] = {}
    for fact in facts:
        for name in data.tasks:
            words = strata(fact.record, {name: data.tasks[name]})
            if words:
                cell = table.setdefault(fact.record.site, {}).setdefault(fact.split, {}).setdefault(name, {})
                cell["labelled"] = cell.get("labelled", 0) + 1
                cell["positive"] = cell.get("positive", 0) + any(is_positive(word) for word in words)
    return {site: table[site] for site in sorted(table)}


def _classes(data: MedicalDataModule, facts: Sequence[Facts]) -> dict[str, dict[str, dict[str, int]]]:
    from datamodules.records import ClassTruth

    counts: Counter[tuple[str, str, str]] = Counter()
    for fact in facts:
        counts.update({(s.task, s.label, fact.split) for s in fact.structures})
        for name, truth in fact.record.truth.items():
            if name in data.tasks and isinstance(truth, ClassTruth):
                there = zip(data.tasks[name].classes, truth.values, strict=True)
                counts.update((name, label, fact.split) for label, value in there if value == 1)
    return {
        name: {label: {s: counts[name, label, s] for s in ("train", "val", "test")} for label in task.classes}
        for name, task in data.tasks.items()
    }


def _intensity(facts: Sequence[Facts]) -> dict[str, dict[str, Any]]:
    out = {}
    for site in sorted({f.record.site for f in facts}):
        mean = np.mean([f.histogram for f in facts if f.record.site == site], axis=0)
        edges = np.linspace(0, 1, len(mean) + 1)
        below = np.concatenate([[0], np.cumsum(mean)])
        quantiles = {str(q): round(float(np.interp(q / 100, below, edges)), 3) for q in QUANTILES}
        out[site] = {"quantiles": quantiles, "histogram": [round(float(v), 5) for v in mean]}
    return out


def _structures(facts: Sequence[Facts], suggestion: Suggestion) -> dict[str, dict[str, dict[str, Any]]]:
    out: dict[str, dict[str, dict[str, Any]]] = {}
    every = [s for f in facts for s in f.structures]
    for task, label in sorted({(s.task, s.label) for s in every}):
        mine = [s for s in every if (s.task, s.label) == (task, label)]
        mm = [s.size * s.spacing for s in mine if s.spacing is not None]
        out.setdefault(task, {})[label] = {
            "count": len(mine),
            "original_px": _quantiles([s.size for s in mine]),
            "mm": _quantiles(mm) if mm else None,
            "input_px": _quantiles([s.framed for s in mine]),
            "suggested_px": _quantiles([s.size / suggestion.pixels_per_pixel for s in mine]),
        }
    return out


def _warnings(
    data: MedicalDataModule, facts: Sequence[Facts], leaks: LeakReport, shortcuts: Sequence[Shortcut]
) -> list[str]:
    found = []
    if leaks.across_splits:
        pairs = "; ".join(f"{p.first} and {p.second}" for p in leaks.across_splits[:3])
        found.append(
            f"{len(leaks.across_splits)} near-duplicate pair(s) cross splits, so scores will flatter ({pairs}). Give "
            f"both images one patient key, or drop one."
        )
    if leaks.across_sites:
        found.append(
            f"{len(leaks.across_sites)} near-duplicate pair(s) are at two sites; a federation counts them twice."
        )
    if leaks.across_patients:
        found.append(
            f"{len(leaks.across_patients)} near-duplicate pair(s) have two patient keys; another split may part them."
        )
    for s in [s for s in shortcuts if s.warning][:5]:
        found.append(
            f"{s.source} alone tells {s.task}/{s.finding} with an AUC of {s.auc:.2f}; a model may learn that instead. "
            f"Report metrics within each {s.source}."
        )
    for name in data.tasks:
        for split in ("train", "val", "test"):
            images = [f for f in facts if f.split == split]
            if images and not any(name in f.record.truth for f in images):
                found.append(f"Nobody labelled {name} in {split}.")
    if data.quarantine.issues:
        found.append(data.quarantine.summary())
    return found


def _quantiles(values: Sequence[float]) -> dict[str, float]:
    return {str(q): round(float(np.percentile(values, q)), 3) for q in QUANTILES}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

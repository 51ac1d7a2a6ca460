"""What a study says: base configuration, variants, seeds, and the metrics that decide."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from mtmedformer.errors import ConfigError

Average = Literal["sites", "images"]
Checkpoint = Literal["last", "best"]


@dataclass(frozen=True)
class Variant:
    """One way of training.

    Attributes:
        name: What it is called, in tables and in folders.
        about: What it is, in a few words.
        config: Further configuration files, after those of the study.
        overrides: Values by dotted key, as on the command line.
    """

    name: str
    about: str = ""
    config: tuple[Path, ...] = ()
    overrides: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Study:
    """A comparison of variants, each trained with every seed on every fold.

    Attributes:
        name: What the study is called.
        base: Configuration files that all variants share.
        variants: The variants by name, in the order of the table.
        reference: The variant that the others are compared with.
        metrics: What is compared, the deciding one first: ``<task>/<metric>``, or ``<metric>`` for the mean over the
            tasks that have it; after ``own/`` it is that of each site's own model where it keeps one.
        question: What the study asks, in a sentence.
        overrides: Values by dotted key for all variants.
        seeds: Seeds of the weights and of everything drawn in training.
        folds: Folds of the cross-validation of a data set (``data.fold``); ``null`` is its fixed validation split.
        splits: Seeds of the splits and of the order of the images (``data.seed``); ``null`` is the configuration's.
        average: Whether means go over ``sites`` (every site counts the same) or over ``images``.
        checkpoint: Which weights are judged: the ``last``, or the ``best`` on validation. Models that sites keep for
            themselves are always their last.
        yardstick: The variant trained on all data in one place, if there is one.
        tuning: How many settings were tried for each variant, on validation images.
        form: Name of the form that was chosen, such as ``small``.
    """

    name: str
    base: tuple[Path, ...]
    variants: dict[str, Variant]
    reference: str
    metrics: tuple[str, ...]
    question: str = ""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0,)
    folds: tuple[int | None, ...] = (None,)
    splits: tuple[int | None, ...] = (None,)
    average: Average = "sites"
    checkpoint: Checkpoint = "last"
    yardstick: str | None = None
    tuning: Mapping[str, int] = field(default_factory=dict)
    form: str = ""

    def against(self, reference: str) -> Study:
        """Return the study with another reference.

        Raises:
            ConfigError: When there is no such variant.
        """
        _choose("--reference", reference, self.variants)
        return replace(self, reference=reference)

    def led_by(self, metric: str) -> Study:
        """Return the study with one of its metrics first, which is the one the terminal and the page begin with.

        Raises:
            ConfigError: When the study has no such metric.
        """
        _choose("--metric", metric, self.metrics)
        return replace(self, metrics=(metric, *(name for name in self.metrics if name != metric)))

    def only(self, names: Sequence[str]) -> Study:
        """Return the study of some of its variants; the reference stays in.

        Raises:
            ConfigError: When a variant is unknown.
        """
        for name in names:
            _choose("--only", name, self.variants)
        kept = {n: v for n, v in self.variants.items() if n in {*names, self.reference}}
        return replace(self, variants=kept, yardstick=self.yardstick if self.yardstick in kept else None)


KEYS = {f.name for f in fields(Study)} - {"form"} | {"forms", "like"}
OF_A_FORM = {"overrides", "seeds", "folds", "splits", "metrics", "checkpoint", "average", "variants"}


def read_study(file: Path, form: str | None = None, extra: Mapping[str, Any] | None = None) -> Study:
    """Read a study and choose its form.

    A study that is ``like`` another takes over what it does not say itself, and of the variants those it does not name.

    Args:
        file: The YAML file; files it names lie beside it.
        form: Name of the form; ``None`` is the first there is.
        extra: Further overrides for all variants, after all others.

    Raises:
        ConfigError: A key, a name or a value that cannot be, with what was probably meant.
    """
    table = _told(file)
    for key in ("base", "variants", "reference", "metrics"):
        if not table.get(key):
            raise ConfigError(f"{file}: {key} is missing; a study has base, variants, reference and metrics")
    forms = _mapping(file, "forms", table.pop("forms", {}))
    chosen = (form or next(iter(forms))) if forms else ""
    if form and not forms:
        raise ConfigError(f"--form {form}: {file} has no forms")
    if forms:
        _choose("--form", chosen, forms)
        told = _mapping(file, f"forms.{chosen}", forms[chosen])
        _known(f"{file}: forms.{chosen}", told, OF_A_FORM)
        overrides = {**_mapping(file, "overrides", table.get("overrides")), **(told.pop("overrides", None) or {})}
        more = _mapping(file, f"forms.{chosen}.variants", told.pop("variants", {}))
        table["variants"] = _merged(file, table["variants"], more)
        table |= told | {"overrides": overrides}
    study = _study(file, table, chosen)
    _check(file, study)
    return replace(study, overrides={**study.overrides, **(extra or {})})


def _told(file: Path, after: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Return what a file says, on top of what the study it is like says."""
    table = _loaded(file)
    _known(str(file), table, KEYS)
    other = table.pop("like", None)
    if other is None:
        return table
    (path,) = _files(file, "like", other)
    if path.resolve() in after:
        raise ConfigError(f"{file}: like: {other} is like this study in turn")
    below = _told(path, (*after, file.resolve()))
    variants = _merged(file, below["variants"], {}) | {
        name: told for name, told in _mapping(file, "variants", table.get("variants")).items()
    }
    return {**below, "name": file.stem, **table, "variants": {n: v for n, v in variants.items() if v != "absent"}}


def _study(file: Path, table: dict[str, Any], form: str) -> Study:
    variants = {
        str(name): _variant(file, str(name), _mapping(file, f"variants.{name}", told))
        for name, told in _mapping(file, "variants", table["variants"]).items()
    }
    return Study(
        name=str(table.get("name") or file.stem),
        base=_files(file, "base", table["base"]),
        variants=variants,
        reference=str(table["reference"]),
        metrics=tuple(str(m) for m in _list(table["metrics"])),
        question=str(table.get("question") or ""),
        overrides=_mapping(file, "overrides", table.get("overrides")),
        seeds=_numbers(file, "seeds", table.get("seeds", [0])),  # type: ignore[arg-type]
        folds=_numbers(file, "folds", table.get("folds", [None])),
        splits=_numbers(file, "splits", table.get("splits", [None])),
        average=table.get("average", "sites"),
        checkpoint=table.get("checkpoint", "last"),
        yardstick=table.get("yardstick"),
        tuning={str(k): v for k, v in _mapping(file, "tuning", table.get("tuning")).items()},
        form=form,
    )


def _variant(file: Path, name: str, told: dict[str, Any]) -> Variant:
    about, config = str(told.pop("about", "")), told.pop("config", [])
    return Variant(name, about, _files(file, f"variants.{name}.config", config), told)


def _check(file: Path, study: Study) -> None:
    for name in study.variants:
        if not re.fullmatch(r"\w[\w.+-]*", name):
            raise ConfigError(f"{file}: variants: {name!r} cannot be a folder; use letters, digits, '_', '-', '+', '.'")
    if len(study.variants) < 2:
        raise ConfigError(f"{file}: variants: there is one; a comparison has two or more")
    _choose(f"{file}: reference", study.reference, study.variants)
    if study.yardstick is not None:
        _choose(f"{file}: yardstick", study.yardstick, study.variants)
    for name in study.tuning:
        _choose(f"{file}: tuning", name, study.variants)
    _choose(f"{file}: average", study.average, get_args(Average))
    _choose(f"{file}: checkpoint", study.checkpoint, get_args(Checkpoint))
    for metric in study.metrics:
        words = metric_words(metric)
        if not 1 <= len(words) <= 3 or not all(words):
            raise ConfigError(
                f"{file}: metrics: {metric!r} is not of the form <task>/<metric>, such as test/lungs/dice"
            )
    if None in study.seeds:
        raise ConfigError(f"{file}: seeds: null is no seed; give whole numbers")


def metric_words(metric: str) -> list[str]:
    """Return the parts of a metric's name without ``test/`` and ``own/``: task and metric, or the metric alone."""
    words = metric.split("/")
    return words[1:] if words[0] in ("test", "own") else words


def is_own(metric: str) -> bool:
    """Return whether a metric is that of the sites' own models."""
    return metric.split("/")[0] == "own"


def _merged(file: Path, variants: Any, more: Mapping[str, Any]) -> dict[str, Any]:
    """Return the variants with what a form says of some of them, by name or by pattern, such as ``lungs*``."""
    merged = dict(_mapping(file, "variants", variants))
    for pattern, told in more.items():
        names = fnmatch.filter(merged, pattern)
        if not names:
            _choose(f"{file}: forms.….variants", pattern, merged)
        for name in names:
            merged[name] = {**(merged[name] or {}), **(told or {})}
    return merged


def _loaded(file: Path) -> dict[str, Any]:
    if not file.is_file():
        known = sorted(p.name for p in file.parent.glob("*.yaml")) if file.parent.is_dir() else []
        raise ConfigError(f"--config {file}: no such file; {file.parent} holds {', '.join(known) or 'no .yaml'}")
    try:
        table = yaml.safe_load(file.read_text())
    except yaml.YAMLError as error:
        raise ConfigError(f"{file}: not YAML: {' '.join(str(error).split())}") from error
    return _mapping(file, "the file", table)


def _mapping(file: Path, key: str, value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"{file}: {key}: {value!r} is not of the form name: value")
    return {str(k): v for k, v in value.items()}


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _files(file: Path, key: str, value: Any) -> tuple[Path, ...]:
    found = tuple(file.parent / str(name) for name in _list(value))
    for path in found:
        if not path.is_file():
            raise ConfigError(f"{file}: {key}: no file {path}; paths are relative to the study's own folder")
    return found


def _numbers(file: Path, key: str, value: Any) -> tuple[int | None, ...]:
    found = _list(value)
    if not found or not all(n is None or (isinstance(n, int) and not isinstance(n, bool)) for n in found):
        raise ConfigError(f"{file}: {key} is {value!r}; give whole numbers, such as [0, 1, 2]")
    if len(set(found)) < len(found):
        raise ConfigError(f"{file}: {key} is {value!r}; the same number twice would count one training as two")
    return tuple(found)


def _known(where: str, table: Mapping[str, Any], keys: set[str]) -> None:
    for key in table:
        _choose(where, key, sorted(keys))


def _choose(where: str, value: Any, choices: Any) -> None:
    """Raise unless a value is one of the choices, with the one that was probably meant."""
    names = [str(choice) for choice in choices]
    if value in names:
        return
    close = get_close_matches(str(value), names, n=1)
    hint = f"did you mean {close[0]}?" if close else f"choose from {', '.join(names)}"
    raise ConfigError(f"{where}: {value!r} is unknown; {hint}")

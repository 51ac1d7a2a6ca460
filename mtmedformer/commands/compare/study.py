"""Read a study: base configuration, variants, seeds and metrics."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, get_args

from mtmedformer.commands.yaml_files import read_yaml
from mtmedformer.errors import ConfigError

Average = Literal["sites", "images"]
Checkpoint = Literal["last", "best"]


@dataclass(frozen=True)
class Variant:
    """One way of training.

    Attributes:
        name: Its name, in tables and in folders.
        about: A short description.
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
        name: Name of the study.
        base: Configuration files that all variants share.
        variants: The variants by name, in the order of the tables.
        reference: The variant that the others are compared with.
        metrics: Metrics to compare, the deciding one first: ``<task>/<metric>``, or ``<metric>`` for the mean over the
            tasks that have it; with ``own/`` before it, the metric of each site's own model, if it keeps one.
        question: The question of the study, in one sentence.
        overrides: Values by dotted key for all variants.
        seeds: Seeds of the initial weights and of all random numbers in training.
        folds: Folds of the cross-validation of a data set (``data.fold``); ``null`` is its fixed validation split.
        splits: Seeds of the splits and of the order of the images (``data.seed``); ``null`` is that of the
            configuration.
        average: Whether means are taken over ``sites`` (all sites have the same weight) or over ``images``.
        checkpoint: Which weights are evaluated: the ``last``, or the ``best`` on validation. The sites' own models are
            always the last.
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
        """Return the study with one of its metrics first; terminal and page begin with it.

        Raises:
            ConfigError: When the study has no such metric.
        """
        _choose("--metric", metric, self.metrics)
        return replace(self, metrics=(metric, *(name for name in self.metrics if name != metric)))

    def only(self, names: Sequence[str]) -> Study:
        """Return the study with some of its variants and the reference.

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

    A study with a key ``like`` takes the keys and the variants that it does not have from another study.

    Args:
        file: The YAML file; files it names lie beside it.
        form: Name of the form; ``None`` is the first.
        extra: Further overrides for all variants, applied last.

    Raises:
        ConfigError: A key, a name or a value is invalid; the message suggests a similar one.
    """
    table = _with_parent(file)
    for key in ("base", "variants", "reference", "metrics"):
        if not table.get(key):
            raise ConfigError(f"{file}: {key} is missing; a study has base, variants, reference and metrics")
    forms = _mapping(file, "forms", table.pop("forms", {}))
    chosen = (form or next(iter(forms))) if forms else ""
    if form and not forms:
        raise ConfigError(f"--form {form}: {file} has no forms")
    if forms:
        _choose("--form", chosen, forms)
        content = _mapping(file, f"forms.{chosen}", forms[chosen])
        _known(f"{file}: forms.{chosen}", content, OF_A_FORM)
        overrides = {**_mapping(file, "overrides", table.get("overrides")), **(content.pop("overrides", None) or {})}
        more = _mapping(file, f"forms.{chosen}.variants", content.pop("variants", {}))
        table["variants"] = _merged(file, table["variants"], more)
        table |= content | {"overrides": overrides}
    study = _study(file, table, chosen)
    _check(file, study)
    return replace(study, overrides={**study.overrides, **(extra or {})})


def _with_parent(file: Path, after: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Return the content of a file, merged into that of the study it is ``like``."""
    table = _loaded(file)
    _known(str(file), table, KEYS)
    other = table.pop("like", None)
    if other is None:
        return table
    (path,) = _files(file, "like", other)
    if path.resolve() in after:
        raise ConfigError(f"{file}: like: {other} is in turn like this study")
    below = _with_parent(path, (*after, file.resolve()))
    variants = _merged(file, below["variants"], {}) | _mapping(file, "variants", table.get("variants"))
    return {**below, "name": file.stem, **table, "variants": {n: v for n, v in variants.items() if v != "absent"}}


def _study(file: Path, table: dict[str, Any], form: str) -> Study:
    variants = {
        str(name): _variant(file, str(name), _mapping(file, f"variants.{name}", one))
        for name, one in _mapping(file, "variants", table["variants"]).items()
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


def _variant(file: Path, name: str, content: dict[str, Any]) -> Variant:
    about, config = str(content.pop("about", "")), content.pop("config", [])
    return Variant(name, about, _files(file, f"variants.{name}.config", config), content)


def _check(file: Path, study: Study) -> None:
    for name in study.variants:
        if not re.fullmatch(r"\w[\w.+-]*", name):
            raise ConfigError(f"{file}: variants: {name!r} is no folder name; use letters, digits, '_', '-', '+', '.'")
    if len(study.variants) < 2:
        raise ConfigError(f"{file}: variants: there is one; a comparison needs two or more")
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
    """Return the parts of a metric's name without ``test/`` and ``own/``: task and metric, or only the metric."""
    words = metric.split("/")
    return words[1:] if words[0] in ("test", "own") else words


def is_own(metric: str) -> bool:
    """Return whether a metric is one of the sites' own models."""
    return metric.split("/")[0] == "own"


def _merged(file: Path, variants: Any, more: Mapping[str, Any]) -> dict[str, Any]:
    """Return the variants with the changes of a form, which names them or gives a pattern such as ``lungs*``."""
    merged = dict(_mapping(file, "variants", variants))
    for pattern, changes in more.items():
        names = fnmatch.filter(merged, pattern)
        if not names:
            _choose(f"{file}: forms.….variants", pattern, merged)
        for name in names:
            merged[name] = {**(merged[name] or {}), **(changes or {})}
    return merged


def _loaded(file: Path) -> dict[str, Any]:
    if not file.is_file():
        known = sorted(p.name for p in file.parent.glob("*.yaml")) if file.parent.is_dir() else []
        raise ConfigError(f"--config {file}: no such file; {file.parent} contains {', '.join(known) or 'no .yaml'}")
    return _mapping(file, "the file", read_yaml(file))


def _mapping(file: Path, key: str, value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"{file}: {key}: {value!r} is not of the form name: value")
    return {str(k): v for k, v in value.items()}


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _files(file: Path, key: str, value: Any) -> tuple[Path, ...]:
    listed = tuple(file.parent / str(name) for name in _list(value))
    for path in listed:
        if not path.is_file():
            raise ConfigError(f"{file}: {key}: no file {path}; paths are relative to the study's own folder")
    return listed


def _numbers(file: Path, key: str, value: Any) -> tuple[int | None, ...]:
    listed = _list(value)
    if not listed or not all(n is None or (isinstance(n, int) and not isinstance(n, bool)) for n in listed):
        raise ConfigError(f"{file}: {key} is {value!r}; give whole numbers, such as [0, 1, 2]")
    if len(set(listed)) < len(listed):
        raise ConfigError(f"{file}: {key} is {value!r}; each number may be given once")
    return tuple(listed)


def _known(where: str, table: Mapping[str, Any], keys: set[str]) -> None:
    for key in table:
        _choose(where, key, sorted(keys))


def _choose(where: str, value: Any, choices: Any) -> None:
    """Raise an error unless a value is one of the choices; the message suggests a similar one."""
    names = [str(choice) for choice in choices]
    if value in names:
        return
    close = get_close_matches(str(value), names, n=1)
    hint = f"did you mean {close[0]}?" if close else f"choose from {', '.join(names)}"
    raise ConfigError(f"{where}: {value!r} is unknown; {hint}")

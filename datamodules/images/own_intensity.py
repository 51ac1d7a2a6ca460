"""Intensity changes of a user, from the YAML file that ``albumentations.save`` writes.

The file names transforms of albumentations only: others are refused before anything is built, so that loading it runs
no code from elsewhere. Geometry is that of the preset, because masks and boxes move with the image there.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from mtmedformer.errors import ConfigError

KEY = "__class_fullname__"
LARGEST = 1 << 18
"""Largest file in bytes."""

_OTHERS_NEEDED = ("mixing", "text")
"""Modules of albumentations whose transforms read other images or fonts."""

_HOW = "write it with albumentations.save(pipeline, 'aug.yaml', data_format='yaml')"


def intensity_text(value: str) -> str:
    """Return the text of a configured value: of the file that it names, or the value itself if it is such a text.

    Raises:
        ConfigError: The file cannot be read.
    """
    if KEY in value:
        return value
    file = Path(value)
    try:
        if file.stat().st_size > LARGEST:
            raise ConfigError(f"preset.intensity={value}: larger than {LARGEST // 1024} kB; {_HOW}")
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        why = "no such file" if isinstance(error, FileNotFoundError) else f"cannot be read ({type(error).__name__})"
        raise ConfigError(f"preset.intensity={value}: {why}; {_HOW}") from error


def with_texts(config: Any) -> Any:
    """Return a configuration in which every file of a preset's ``intensity`` is replaced by its text.

    A run keeps this configuration, so that a file that is moved or changed later does not change or break the run.

    Raises:
        ConfigError: A file cannot be read.
    """
    if isinstance(config, list):
        return [with_texts(one) for one in config]
    if not isinstance(config, Mapping):
        return config
    filled = {key: with_texts(one) for key, one in config.items()}
    arguments, kind = filled.get("init_args"), filled.get("class_path")
    if isinstance(arguments, dict) and isinstance(kind, str) and isinstance(arguments.get("intensity"), str):
        arguments["intensity"] = intensity_text(arguments["intensity"])
    return filled


def intensity_pipeline(text: str, channels: int = 1) -> Any:
    """Build the pipeline of a text, and try every transform of it on a small image.

    Args:
        text: The YAML of ``albumentations.save``.
        channels: Channels of the images, 1 or 3.

    Returns:
        A pipeline with ``set_random_seed(int)``, as of ``datamodules.images.presets.exposure_pipeline``.

    Raises:
        ConfigError: The text is no such YAML, or a transform moves pixels, needs other images, is not one of
            albumentations, or does not work on these images.
    """
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # else the import requests its version from PyPI
    import albumentations as A

    described = _parsed(text)
    for one in _described(described["transform"]):
        _check(one)
    built = _built(described)
    for leaf in _leaves(built):
        _try(leaf, channels)
    return built if isinstance(built, A.Compose) else A.Compose([built])


def _parsed(text: str) -> Mapping[str, Any]:
    try:
        described = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"preset.intensity: no valid YAML ({type(error).__name__}); {_HOW}") from error
    if not isinstance(described, Mapping) or not isinstance(described.get("transform"), Mapping):
        raise ConfigError(f"preset.intensity: the YAML has no entry 'transform' of a pipeline; {_HOW}")
    return described


def _described(transform: Any, depth: int = 0) -> Iterator[Mapping[str, Any]]:
    """Yield the description of every transform, those of compositions included."""
    if not isinstance(transform, Mapping) or not isinstance(transform.get(KEY), str) or depth > 20:
        raise ConfigError(f"preset.intensity: an entry of 'transforms' is no transform; {_HOW}")
    yield transform
    for one in transform.get("transforms") or ():
        yield from _described(one, depth + 1)


def _check(described: Mapping[str, Any]) -> None:
    """Refuse a transform that is no intensity change of albumentations."""
    import albumentations as A
    from albumentations.core.serialization import SERIALIZABLE_REGISTRY, shorten_class_name

    name = str(described[KEY]).rpartition(".")[2]
    kind = SERIALIZABLE_REGISTRY.get(shorten_class_name(described[KEY]))
    if name == "Lambda":
        raise ConfigError("preset.intensity: Lambda runs code that no YAML holds; use a transform of albumentations")
    if kind is None or kind.__module__.partition(".")[0] != "albumentations":
        raise ConfigError(
            f"preset.intensity: {name} is no transform of albumentations {A.__version__}; correct its name, or leave "
            "it out"
        )
    if issubclass(kind, A.BaseCompose):
        return
    if not issubclass(kind, A.ImageOnlyTransform):
        raise ConfigError(
            f"preset.intensity: {name} is a spatial transform: it moves or removes pixels, and boxes, masks and the "
            "way back to the original image would not follow; leave it out, and set rotation, zoom, shift or flips of "
            "the preset"
        )
    if any(part in _OTHERS_NEEDED for part in kind.__module__.split(".")):
        raise ConfigError(
            f"preset.intensity: {name} needs other images or files, which a run does not have; leave it out"
        )


def _built(described: Mapping[str, Any]) -> Any:
    import albumentations as A

    try:
        with warnings.catch_warnings(record=True) as raised:
            warnings.simplefilter("always")
            built = A.from_dict(dict(described))
    except Exception as error:  # the arguments may be anything, and so may what they raise
        lines = [line.strip() for line in str(error).splitlines() if "errors.pydantic.dev" not in line]
        reason = ": ".join(lines[-2:]) or type(error).__name__
        raise ConfigError(f"preset.intensity: a transform does not accept its arguments ({reason[:200]})") from error
    unknown = [str(one.message) for one in raised if "not valid" in str(one.message)]
    if unknown:
        raise ConfigError(f"preset.intensity: {unknown[0]}; correct or remove it")
    return built


def _leaves(transform: Any) -> Iterator[Any]:
    inner = vars(transform).get("transforms")
    if inner is None:
        yield transform
    for one in inner or ():
        yield from _leaves(one)


def _try(leaf: Any, channels: int) -> None:
    """Apply a transform to a small image, as in training: it must return an image of the same form."""
    import albumentations as A

    name, p = type(leaf).__name__, leaf.p
    size = (64, 64) if channels == 1 else (64, 64, channels)
    image = np.random.default_rng(0).random(size, dtype=np.float32)
    try:
        leaf.p = 1.0
        with warnings.catch_warnings():
            warnings.filterwarnings("error", ".*not applicable to grayscale")
            changed = A.Compose([leaf], seed=0)(image=image.copy())["image"]
    except Exception as error:  # transforms raise anything for images they do not take
        raise ConfigError(
            f"preset.intensity: {name} does not work on images of {channels} channel{'s' if channels > 1 else ''} in "
            f"[0, 1] ({type(error).__name__}: {str(error).strip().splitlines()[0][:120] if str(error).strip() else ''})"
        ) from error
    finally:
        leaf.p = p
    changed = np.asarray(changed)
    if changed.shape != size or changed.dtype != np.float32 or not np.isfinite(changed).all():
        raise ConfigError(
            f"preset.intensity: {name} returns an image of another size, type or range (float32 in [0, 1] is needed); "
            "leave it out"
        )
    if changed.min() < -1 or changed.max() > 2:
        raise ConfigError(
            f"preset.intensity: {name} returns values far outside [0, 1], which the network's own normalization "
            "expects; leave it out"
        )

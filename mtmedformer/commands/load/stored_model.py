"""A model at rest: read from a checkpoint or an export without running anything that is in it, and built again.

Weights are tensors and nothing else (``weights_only``, safetensors). A configuration names classes; only this project's
own encoders, heads, losses and presets are imported for it, unless the reader vouches for the file.
"""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mtmedformer.calibration import restored
from mtmedformer.commands.predict_images import preparation
from mtmedformer.errors import ConfigError
from mtmedformer.module import MultiTaskModule

ABOUT, WEIGHTS, GRAPH, CONFIG = "model.json", "model.safetensors", "model.onnx", "config.yaml"
"""Files of an export."""

MODEL_HOMES = (
    "mtmedformer",
    "mtmedformer.encoders.shared",
    "mtmedformer.heads",
    "mtmedformer.losses",
    "mtmedformer.module",
)
PRESET_HOMES = ("datamodules", "datamodules.images.presets")
"""Packages whose classes a model file may name; a module below one of them counts too, where classes are defined."""

T = TypeVar("T")

NO_PART = "loss."
"""Weights of the loss, which takes no part in a prediction."""


@dataclass(frozen=True)
class StoredModel:
    """What a file says of a model.

    Attributes:
        source: The file or folder.
        model: ``class_path`` and ``init_args`` of the module, without its loss and without files to load.
        weights: Its tensors by name, those of the loss left out.
        calibration: As ``mtmedformer.calibration.plain`` has it; empty where there is none.
        preparation: ``image_size`` and ``preset`` of its training; empty where nothing tells.
    """

    source: Path
    model: dict[str, Any]
    weights: dict[str, Tensor]
    calibration: dict[str, Any] = field(default_factory=dict)
    preparation: dict[str, Any] = field(default_factory=dict)


def read_model(path: str | Path) -> StoredModel:
    """Read a checkpoint, or the folder of an export.

    Raises:
        ConfigError: It is not there, damaged, or holds anything but tensors and plain values.
    """
    path = Path(path)
    if path.is_dir():
        return _read_export(path)
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; give a checkpoint (.ckpt) or the folder of an export")
    return _read_checkpoint(path)


def build_model(stored: StoredModel, trusted: bool = False) -> MultiTaskModule:
    """Build the module and fill it, ready to predict.

    Args:
        stored: What was read.
        trusted: Import whatever classes the file names, which runs their code.

    Raises:
        ConfigError: The file names a class that is not this project's, or weights and configuration do not fit.
    """
    module = build(stored.model, MultiTaskModule, MODEL_HOMES, trusted, str(stored.source))
    unused = {name: tensor for name, tensor in module.state_dict().items() if name.startswith(NO_PART)}
    broken = [name for name, tensor in stored.weights.items() if not tensor.float().isfinite().all()]
    if broken:
        raise ConfigError(f"{stored.source}: {broken[0]} holds NaN or infinite values ({len(broken)} tensors do)")
    try:
        module.on_load_checkpoint({"state_dict": stored.weights | unused})  # refuses another architecture in words
        module.calibration = restored(stored.calibration)
    except TypeError as error:
        raise ConfigError(f"{stored.source}: its calibration is of another version ({error})") from error
    except ConfigError as error:
        raise ConfigError(f"{stored.source}: {str(error).removeprefix('--ckpt_path ')}") from error
    module.load_state_dict(stored.weights | unused)
    return module.eval().requires_grad_(False)


def build(
    config: Mapping[str, Any], base: type[T], homes: tuple[str, ...], trusted: bool = False, source: str = "model"
) -> T:
    """Make the object that ``class_path`` and ``init_args`` describe, nested ones first; strings stay strings.

    Args:
        config: The description.
        base: What the object must be.
        homes: Packages whose classes may be named.
        trusted: Take classes from anywhere.
        source: The file, for messages.

    Raises:
        ConfigError: A class that may not be named, is not there, or does not take its arguments.
    """

    def made(value: Any) -> Any:
        if isinstance(value, Mapping) and "class_path" in value:
            kind = _class(value["class_path"], (base, nn.Module), homes, trusted, source)
            arguments = value.get("init_args") or {}
            try:
                return kind(**{name: made(one) for name, one in arguments.items()})
            except (TypeError, ValueError, AttributeError) as error:
                raise ConfigError(f"{source}: {value['class_path']} cannot be built ({error})") from error
        if isinstance(value, Mapping):
            return {key: made(one) for key, one in value.items()}
        return [made(one) for one in value] if isinstance(value, list) else value

    try:
        found = made(config)
    except RecursionError as error:
        raise ConfigError(f"{source}: its configuration is nested without end") from error
    if not isinstance(found, base):
        raise ConfigError(f"{source}: describes no {base.__name__}")
    return found


def _class(path: Any, bases: tuple[type, ...], homes: tuple[str, ...], trusted: bool, source: str) -> type:
    """Import a class; nothing is imported for a name that is not allowed."""
    module, _, name = path.rpartition(".") if isinstance(path, str) else ("", "", "")
    own = module in homes or module.startswith(tuple(f"{home}." for home in homes[1:]))
    if not (own or trusted):
        raise ConfigError(
            f"{source}: refused, because it names {path!r}, which is not a part of MTMedFormer, and importing a class "
            "runs its code; where you know the file and the class, say trusted=True (--trusted on the command line)"
        )
    try:
        kind = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{source}: names {path!r}, which is not there ({error})") from error
    elsewhere = inspect.isclass(kind) and not kind.__module__.startswith(tuple(f"{home}." for home in homes))
    if not inspect.isclass(kind) or not issubclass(kind, bases) or (elsewhere and not trusted):
        raise ConfigError(f"{source}: refused, because {path!r} is no encoder, head, loss or preset")
    return kind


def _read_checkpoint(path: Path) -> StoredModel:
    try:
        stored = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
        weights = {name: tensor for name, tensor in stored["state_dict"].items() if not name.startswith(NO_PART)}
        arguments = dict(stored.get("hyper_parameters") or {})
    except Exception as error:  # any unreadable file ends here, whatever torch makes of it
        raise ConfigError(
            f"{path}: refused, because it is no whole checkpoint or holds objects besides tensors and plain values, "
            f"and unpickling objects can run any code ({type(error).__name__})"
        ) from error
    class_path = arguments.pop("_class_path", None)
    arguments.pop("_instantiator", None)
    if class_path is None:
        raise ConfigError(
            f"{path}: does not say how its model is built, because that was done in Python and not by a configuration; "
            "build it in Python again and use load_state_dict"
        )
    run = path.parent.parent / "config.yaml"
    try:
        section = yaml.safe_load(run.read_text(encoding="utf-8"))["data"] if run.is_file() else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError) as error:
        raise ConfigError(f"{run}: is not the config.yaml of a run ({type(error).__name__})") from error
    try:
        prepared = preparation(section)
    except ConfigError:  # the sites differ; whoever loads the model says which way is meant
        prepared = {}
    model = _at_rest({"class_path": class_path, "init_args": arguments})
    return StoredModel(path, model, weights, dict(stored.get("calibration") or {}), prepared)


def _read_export(folder: Path) -> StoredModel:
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        model, calibration, prepared = _at_rest(about["model"]), about["calibration"], about["preparation"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(
            f"{folder}: {ABOUT} is missing or damaged ({type(error).__name__}); give the folder that "
            "'mtmedformer export' wrote, or a checkpoint"
        ) from error
    try:
        weights = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"{folder / WEIGHTS}: missing or damaged ({error}); export with --format=safetensors or both"
        ) from error
    return StoredModel(folder, model, weights, calibration, prepared)


def _at_rest(model: Any) -> dict[str, Any]:
    """Return a description without what belongs to training: the loss, files to start from, downloads, compilation."""
    arguments = dict(model["init_args"])
    arguments |= {"loss": None, "init_weights": None, "compile": None}
    encoder = arguments.get("encoder")
    if isinstance(encoder, Mapping):
        own = dict(encoder.get("init_args") or {}) | {"pretrained": False, "checkpoint_path": None}
        if own.get("model_kwargs"):
            drop = ("pretrained", "checkpoint_path", "cache_dir")
            own["model_kwargs"] = {key: value for key, value in own["model_kwargs"].items() if key not in drop}
        arguments["encoder"] = {"class_path": encoder.get("class_path"), "init_args": own}
    return {"class_path": model["class_path"], "init_args": arguments}

"""Read a model from a checkpoint or an export without running code from the file, and build it.

Weights are read as tensors only (``weights_only``, safetensors). A configuration names classes; only encoders, heads,
losses and presets of this project are imported, unless the caller trusts the file.
"""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from datamodules.loading.white_level import common_level
from mtmedformer.calibration import restored
from mtmedformer.checks import check_digest, check_members, malformed, no_larger_than
from mtmedformer.commands.load.preparation import data_state, preparation
from mtmedformer.commands.named_classes import check_plain
from mtmedformer.commands.yaml_files import read_yaml
from mtmedformer.encoders import familiarity
from mtmedformer.errors import ConfigError, UserError
from mtmedformer.inference.ensemble import join
from mtmedformer.module import MultiTaskModule
from mtmedformer.storage.hashing import weights_digest

ABOUT, WEIGHTS, GRAPH, CONFIG = "model.json", "model.safetensors", "model.onnx", "config.yaml"
FAMILIARITY = "familiarity.safetensors"
"""Files of an export."""

MODEL_HOMES = (
    "mtmedformer",
    "mtmedformer.encoders",
    "mtmedformer.heads",
    "mtmedformer.losses",
    "mtmedformer.module",
)
PRESET_HOMES = ("datamodules", "datamodules.images.presets")
"""Packages and modules whose classes a model file may name, including the modules below them."""

T = TypeVar("T")

LARGEST_ABOUT = 8 * 2**20
"""Largest description of a model in bytes."""

NO_PART = "loss."
"""Prefix of the weights of the loss, which predictions do not use."""


@dataclass(frozen=True)
class StoredModel:
    """A model as read from a file.

    Attributes:
        source: The file or folder.
        model: ``class_path`` and ``init_args`` of the module, without its loss and without files to load.
        weights: Its tensors by name, without those of the loss.
        calibration: As from ``mtmedformer.calibration.plain``; empty if there is none.
        preparation: ``image_size``, ``preset`` and ``white_level`` of its training, as far as they are known.
        members: The other members of an ensemble of which this is the first.
        familiarity: As from ``mtmedformer.encoders.familiarity.plain``; empty if there is none.
    """

    source: Path
    model: dict[str, Any]
    weights: dict[str, Tensor]
    calibration: dict[str, Any] = field(default_factory=dict)
    preparation: dict[str, Any] = field(default_factory=dict)
    members: tuple[StoredModel, ...] = ()
    familiarity: dict[str, Any] = field(default_factory=dict)


def weights_file(number: int) -> str:
    """Return the name of the weights of a member of an exported ensemble; number 1 is the model itself."""
    return WEIGHTS if number == 1 else f"model-{number}.safetensors"


def read_model(path: str | Path | Sequence[str | Path]) -> StoredModel:
    """Read a checkpoint or the folder of an export; of several, read an ensemble.

    Raises:
        ConfigError: It is missing, damaged, or contains objects other than tensors and plain values.
    """
    if not isinstance(path, str | Path):
        if not path:
            raise ConfigError("no checkpoint is named; give one, or several for an ensemble")
        first, *others = map(read_model, path)
        return replace(first, members=(*first.members, *(each for one in others for each in (one, *one.members))))
    path = Path(path)
    if path.is_dir():
        return _read_export(path)
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; give a checkpoint (.ckpt) or the folder of an export")
    return _read_checkpoint(path)


def build_model(stored: StoredModel, trusted: bool = False) -> MultiTaskModule:
    """Build the module and load its weights, ready to predict.

    Args:
        stored: The model as read.
        trusted: Import any class that the file names, which runs its code.

    Raises:
        ConfigError: The file names a class of another project, weights and configuration do not match, or the members
            of an ensemble do not belong together.
    """
    module = _build_alone(stored, trusted)
    if stored.members:
        join(module, build_members(stored, module, trusted))
    return module


def build_members(stored: StoredModel, first: MultiTaskModule, trusted: bool = False) -> list[MultiTaskModule]:
    """Build the other members of an ensemble, ready to predict.

    Args:
        stored: The ensemble as read.
        first: Its first member.
        trusted: Import any class that a file names.

    Raises:
        ConfigError: As `build_model`.
    """
    built = [_build_alone(one, trusted) for one in stored.members]
    check_members(
        [str(one.source) for one in (stored, *stored.members)],
        [one.tasks for one in (first, *built)],
        [one.preparation for one in (stored, *stored.members)],
    )
    return built


def _build_alone(stored: StoredModel, trusted: bool) -> MultiTaskModule:
    with no_larger_than(stored.weights):
        module = build(stored.model, MultiTaskModule, MODEL_HOMES, trusted, str(stored.source))
    unused = {name: tensor for name, tensor in module.state_dict().items() if name.startswith(NO_PART)}
    broken = [name for name, tensor in stored.weights.items() if not tensor.float().isfinite().all()]
    if broken:
        raise ConfigError(f"{stored.source}: {broken[0]} contains NaN or infinite values ({len(broken)} tensors do)")
    try:
        module.on_load_checkpoint({"state_dict": stored.weights | unused})  # explains a different architecture
        module.calibration = restored(stored.calibration)
        module.familiarity = familiarity.restored(stored.familiarity)
    except ConfigError as error:
        raise ConfigError(f"{stored.source}: {str(error).removeprefix('--ckpt_path ')}") from error
    module.load_state_dict(stored.weights | unused)
    return module.eval().requires_grad_(False)


def build(
    config: Mapping[str, Any], base: type[T], homes: tuple[str, ...], trusted: bool = False, source: str = "model"
) -> T:
    """Build the object that ``class_path`` and ``init_args`` describe, nested objects first; strings stay strings.

    Args:
        config: The description.
        base: Class of the object.
        homes: Packages whose classes may be named.
        trusted: Allow classes of any package.
        source: The file, for messages.

    Raises:
        ConfigError: A class is not allowed, does not exist, or does not accept its arguments.
    """

    def made(value: Any) -> Any:
        if isinstance(value, Mapping) and "class_path" in value:
            kind = _class(value["class_path"], (base, nn.Module), homes, trusted, source)
            arguments = value.get("init_args") or {}
            try:
                return kind(**{name: made(one) for name, one in arguments.items()})
            except UserError:
                raise
            except Exception as error:  # the arguments may be anything, and so may what they raise
                raise ConfigError(f"{source}: {value['class_path']} cannot be built ({error})") from error
        if isinstance(value, Mapping):
            return {key: made(one) for key, one in value.items()}
        return [made(one) for one in value] if isinstance(value, list) else value

    try:
        built = made(config)
    except RecursionError as error:
        raise ConfigError(f"{source}: its configuration is nested too deeply") from error
    if not isinstance(built, base):
        raise ConfigError(f"{source}: describes no {base.__name__}")
    return built


def _class(path: Any, bases: tuple[type, ...], homes: tuple[str, ...], trusted: bool, source: str) -> type:
    """Import a class; for a name that is not allowed, nothing is imported."""
    module, _, name = path.rpartition(".") if isinstance(path, str) else ("", "", "")
    own = module in homes or module.startswith(tuple(f"{home}." for home in homes[1:]))
    if not (own or trusted):
        raise ConfigError(
            f"{source}: refused, because it names {path!r}, which is not a part of MTMedFormer, and importing a class "
            "runs its code; if you trust the file and the class, use trusted=True (--trusted on the command line)"
        )
    try:
        kind = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{source}: names {path!r}, which does not exist ({error})") from error
    elsewhere = inspect.isclass(kind) and not kind.__module__.startswith(tuple(f"{home}." for home in homes))
    if not inspect.isclass(kind) or not issubclass(kind, bases) or (elsewhere and not trusted):
        raise ConfigError(f"{source}: refused, because {path!r} is no encoder, head, loss or preset")
    return kind


def _read_checkpoint(path: Path) -> StoredModel:
    try:
        stored = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
    except Exception as error:  # torch raises many types of exceptions for unreadable files
        raise ConfigError(
            f"{path}: refused, because it is no complete checkpoint or contains objects other than tensors and plain "
            f"values, and unpickling objects can run any code ({type(error).__name__})"
        ) from error
    if wrong := malformed(stored):
        raise ConfigError(f"{path}: is no complete checkpoint ({wrong})")
    check_digest(stored, str(path))
    weights = {name: tensor for name, tensor in stored["state_dict"].items() if not name.startswith(NO_PART)}
    arguments = dict(stored.get("hyper_parameters") or {})
    check_plain(arguments, str(path))
    class_path = arguments.pop("_class_path", None)
    arguments.pop("_instantiator", None)
    if class_path is None:
        raise ConfigError(
            f"{path}: does not describe its model, because it was built in Python and not from a configuration; "
            "build it in Python again and use load_state_dict"
        )
    run = path.parent.parent / "config.yaml"
    try:
        section = read_yaml(run)["data"] if run.is_file() else None
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{run}: is not the config.yaml of a run ({type(error).__name__})") from error
    try:
        check_plain(section, str(run))
        prepared = preparation(section)
    except ConfigError:  # the sites differ; the caller of load chooses
        prepared = {}
    if (level := common_level(data_state(stored))) is not None:
        prepared = prepared | {"white_level": level}
    model = _for_prediction({"class_path": class_path, "init_args": arguments})
    calibration, known = (dict(stored.get(key) or {}) for key in ("calibration", "familiarity"))
    return StoredModel(path, model, weights, calibration, prepared, familiarity=known)


def _read_export(folder: Path) -> StoredModel:
    try:
        if (folder / ABOUT).stat().st_size > LARGEST_ABOUT:
            raise ValueError("too large")
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        parts = [(about["weights"], _for_prediction(about["model"]), about["calibration"])]
        for one in about.get("members", ()):
            parts.append((one["weights"], _for_prediction(one["model"]), one["calibration"]))
        prepared = about["preparation"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(
            f"{folder}: {ABOUT} is missing or damaged ({type(error).__name__}); give the folder that "
            "'mtmedformer export' wrote, or a checkpoint"
        ) from error
    check_plain(about, str(folder / ABOUT))
    if not all(isinstance(one, dict) for one in (prepared, *(calibration for *_, calibration in parts))):
        raise ConfigError(f"{folder / ABOUT}: its calibration or preparation is damaged; export the model again")
    first, *others = [
        StoredModel(folder, model, _exported_weights(folder / weights_file(number), digest), calibration, prepared)
        for number, (digest, model, calibration) in enumerate(parts, start=1)
    ]
    return replace(first, members=tuple(others), familiarity=_exported_familiarity(folder, about))


def _exported_familiarity(folder: Path, about: Mapping[str, Any]) -> dict[str, Any]:
    """Return the familiarity of an export; empty where it has none."""
    file, known = folder / FAMILIARITY, about.get("familiarity")
    if not known or not file.is_file():
        return {}
    try:
        return {**known, **load_file(file)}
    except (TypeError, OSError, SafetensorError) as error:
        raise ConfigError(f"{file}: damaged ({type(error).__name__}); export the model again") from error


def _exported_weights(file: Path, digest: Any) -> dict[str, Tensor]:
    try:
        weights = load_file(file)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{file}: missing or damaged ({error}); export with --format=safetensors or both") from error
    if weights_digest(weights) != digest:
        raise ConfigError(
            f"{file}: its weights do not have the digest in {ABOUT}; they were damaged or exchanged. "
            "Export the model again"
        )
    return weights


def _for_prediction(model: Any) -> dict[str, Any]:
    """Return a description without the parts for training: the loss, initial weights, downloads, compilation."""
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

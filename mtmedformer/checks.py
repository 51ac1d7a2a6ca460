"""Checks that the model, its data, its trainer and a checkpoint fit together, before anything is computed."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from mtmedformer.batch import Task
from mtmedformer.errors import ConfigError
from mtmedformer.optim import CONFIGURED
from mtmedformer.protocols import PlannedData, TaskedData
from mtmedformer.storage.hashing import digest_fits


def check_tasks(
    stage: str,
    model: Mapping[str, Task],
    data: Mapping[str, Task],
    place: Callable[[str, str], str] = lambda task, label: "",
) -> None:
    """Check that heads and data set have the same tasks; a task without data is allowed except in ``fit``.

    Args:
        stage: Stage of the trainer: ``fit``, ``validate``, ``test`` or ``predict``.
        model: Tasks of the model by name.
        data: Tasks of the data set by name.
        place: Returns where the data set names a class of a task, or an empty string.

    Raises:
        ConfigError: A task is missing, its kind or classes differ, or it has a single class to choose from.
    """
    absent = [name for name in model if name not in data]
    if absent and (stage == "fit" or len(absent) == len(model)):
        raise ConfigError(
            f"model.heads.{absent[0]}: the data set has no task of this name{_meant(absent[0], list(data))}; it has "
            f"{', '.join(data) or 'none'}. Rename the head, or drop it with model.tasks."
        )
    for name, task in model.items():
        known = data.get(name, task)
        key = f"model.heads.{name}.classes={list(task.classes)}"
        if task.kind != known.kind:
            raise ConfigError(f"model.heads.{name}: a head for {task.kind}, but in the data set it is {known.kind}.")
        alone = known.kind == "classification" and len(known.classes) == 1 and not known.multi_label
        if alone and name in data:
            raise ConfigError(
                f"model.heads.{name}: the data leave this task with a single class, {known.classes[0]!r}"
                f"{_at(place(name, known.classes[0]))}. Write the class of the other images into the data, or give the "
                "classes of the task in data.init_args where some have no image."
            )
        if known.kind == "regression" and bool(task.classes) != bool(known.classes):
            found = f"one of the grades {', '.join(known.classes)}" if known.classes else "a number, not a grade"
            fits = "OrdinalHead" if known.classes else "RegressionHead"
            raise ConfigError(f"model.heads.{name}: in the data it is {found}; use {fits}.")
        if task.classes != known.classes:
            raise ConfigError(f"{key}: {_difference(task, known, place)}")
        if task.unit != known.unit:
            raise ConfigError(
                f"model.heads.{name}.unit={task.unit!r}: in the data the unit is {known.unit!r}; write one unit in "
                "both (numbers are not converted)."
            )
        if stage == "fit" and _outside(task.range, known.range):
            raise ConfigError(
                f"model.heads.{name}.range={_ends(task.range)}: the data have numbers in {_ends(known.range)}. Widen "
                "the range of the head, or give the range of the task in data.init_args, so that numbers outside "
                "of it are unknown."
            )
        if alone:
            raise ConfigError(
                f"{key}: with a single class there is nothing to choose; name the class of the others too."
            )
    if absent:
        rank_zero_info(f"Not evaluated, because the data have no labels for it: {', '.join(absent)}")


def tasks_of(data: object) -> Mapping[str, Task]:
    """Return the tasks of a data module, from which a model with ``heads: auto`` gets its heads; read its records.

    Args:
        data: The data module of the Trainer, if there is one.

    Raises:
        ConfigError: It declares no tasks.
        UserError: Its records cannot be read.
    """
    if isinstance(data, PlannedData):
        data.plan()
    if not isinstance(data, TaskedData) or not data.tasks:
        raise ConfigError(
            f"model.heads is auto, but the data ({'none' if data is None else type(data).__name__}) declare no tasks "
            "to build heads for; name the heads in model.heads, or take the model from a checkpoint with --ckpt_path"
        )
    return data.tasks


def common_tasks(by_site: Mapping[str, Mapping[str, Task]]) -> dict[str, Task]:
    """Return the tasks of all sites; a task must have the same kind, classes and unit at each.

    The range of a number is that of all sites together.

    Args:
        by_site: Tasks by name, by site.

    Raises:
        ConfigError: Two sites contradict each other.
    """
    found: dict[str, tuple[str, Task]] = {}
    for site, tasks in by_site.items():
        for name, task in tasks.items():
            other, known = found.setdefault(name, (site, task))
            if (known.kind, known.classes, known.multi_label) != (task.kind, task.classes, task.multi_label):
                raise ConfigError(
                    f"task {name}: {list(known.classes)} ({known.kind}) at {other}, but {list(task.classes)} "
                    f"({task.kind}) at {site}; give it the same classes in the same order, or two names"
                )
            if known.unit != task.unit:
                raise ConfigError(f"task {name}: unit {known.unit!r} at {other}, {task.unit!r} at {site}; give it one")
            if known.range and task.range:
                ends = sorted((*known.range, *task.range))
                found[name] = (other, replace(known, range=(ends[0], ends[-1])))
    return {name: task for name, (_, task) in found.items()}


def _difference(head: Task, data: Task, place: Callable[[str, str], str]) -> str:
    """Return in which classes a head differs from the data set, where the data name them, and the fix."""
    found = f"the classes of the data are {list(data.classes)}"
    if set(head.classes) == set(data.classes):
        return f"{found}; write them in this order."
    parts = [
        f"the data have no class {name!r}{_meant(name, data.classes)}{_at(place(data.name, name))}"
        for name in head.classes
        if name not in data.classes
    ]
    parts += [
        f"the head lacks {name!r}{_at(place(data.name, name))}" for name in data.classes if name not in head.classes
    ]
    return f"{'; '.join(parts[:5])}; {found}. Correct the name in the head, or the labels where they are wrong."


def _outside(head: tuple[float, float] | None, data: tuple[float, float] | None) -> bool:
    return head is not None and data is not None and (data[0] < head[0] or data[1] > head[1])


def _ends(bounds: tuple[float, float] | None) -> str:
    return "null" if bounds is None else f"[{bounds[0]:g}, {bounds[1]:g}]"


def _at(place: str) -> str:
    return f" ({place})" if place else ""


def _meant(name: str, known: Sequence[str]) -> str:
    """Return a question with the most similar of the known names, or nothing."""
    near = difflib.get_close_matches(name.lower(), [one.lower() for one in known], 1)
    return next((f" (did you mean {one!r}?)" for one in known if near and one.lower() == near[0]), "")


def check_members(
    names: Sequence[str], tasks: Sequence[Mapping[str, Task]], preparations: Sequence[Mapping[str, Any]]
) -> None:
    """Check that the members of an ensemble have the same tasks and prepare images in the same way.

    Args:
        names: Their files, for the message.
        tasks: Tasks by name of each member; their order may differ, that of their classes may not.
        preparations: ``image_size``, ``preset`` and ``white_level`` of each member, as far as they are known.

    Raises:
        ConfigError: One differs from the first one.
    """
    fix = "give members that were trained for the same tasks on images prepared in the same way"
    for name, own, prepared in zip(names[1:], tasks[1:], preparations[1:], strict=True):
        for task in {**tasks[0], **own}:
            if task not in own or task not in tasks[0]:
                lacking, other = (name, names[0]) if task not in own else (names[0], name)
                raise ConfigError(f"--ckpt_path: {other} has a task {task!r} and {lacking} has none; {fix}")
            ours, theirs = asdict(tasks[0][task]), asdict(own[task])
            for what in ("kind", "classes", "multi_label", "unit"):
                if ours[what] != theirs[what]:
                    raise ConfigError(
                        f"--ckpt_path: {what} of task {task!r} is {_plain(ours[what])} in {names[0]} and "
                        f"{_plain(theirs[what])} in {name}; {fix}"
                    )
        for key in {**preparations[0], **prepared}:
            ways = [_sides(key, one[key]) for one in (preparations[0], prepared) if key in one]
            if len(ways) == 2 and ways[0] != ways[1]:
                raise ConfigError(f"--ckpt_path: {key} is {ways[0]} in {names[0]} and {ways[1]} in {name}; {fix}")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _sides(key: str, value: Any) -> Any:
    """Return an image size as [height, width]; other values as they are."""
    return [value, value] if key == "image_size" and isinstance(value, int) else value


def check_gradient_aggregation(trainer: L.Trainer) -> None:
    """Check that the trainer supports a weighting that combines the gradients of the tasks.

    Raises:
        ConfigError: The trainer runs on several devices, or scales the loss.
    """
    if trainer.world_size > 1:
        raise ConfigError(
            "model.loss.weighting: gradient aggregation needs the batch on one device; set trainer.devices=1"
        )
    if trainer.precision == "16-mixed":
        raise ConfigError(
            "trainer.precision=16-mixed scales the loss, which gradient aggregation cannot follow; "
            "choose bf16-mixed or 32-true"
        )


def check_resumed(stored: Sequence[Mapping[str, Any]], configured: Sequence[Mapping[str, Any]]) -> None:
    """Check that the optimizer in a checkpoint has the configured hyperparameters.

    Args:
        stored: Parameter groups of the optimizer in the checkpoint.
        configured: Parameter groups of the model, with ``lr`` and ``weight_decay``. A schedule may have changed the
            ``lr`` in the checkpoint; compared is the configured one, which is kept beside it.

    Raises:
        ConfigError: Number of groups, or learning rate or weight decay of a group differs.
    """
    if len(stored) != len(configured):
        raise ConfigError(
            f"--ckpt_path: its optimizer has {len(stored)} parameter groups, but the configured one has "
            f"{len(configured)}. Use the configuration it was trained with, or start a new run from its weights with "
            "model.init_weights=PATH instead of --ckpt_path."
        )
    for before, group in zip(stored, configured, strict=True):
        lr = before.get(CONFIGURED, before.get("initial_lr", before["lr"]))
        weight_decay = before.get("weight_decay", group["weight_decay"])
        for key, now, then in (("lr", group["lr"], lr), ("weight_decay", group["weight_decay"], weight_decay)):
            if not math.isclose(float(now), float(then), rel_tol=1e-6):
                raise ConfigError(
                    f"optimizer.{key}={now:g}, but the run you resume was trained with {then:g}. Keep that value, or "
                    "start a new run from its weights with model.init_weights=PATH instead of --ckpt_path."
                )


@contextmanager
def no_larger_than(state: Mapping[str, Tensor]) -> Iterator[None]:
    """Stop the construction of a model that becomes much larger than its stored weights, before its memory is used.

    Args:
        state: The stored weights.

    Raises:
        ConfigError: The model has more than about twice as many weights.
    """
    largest, most = 2 * sum(tensor.numel() for tensor in state.values()) + 2**24, 4 * len(state) + 10_000
    weights = parameters = 0

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal weights, parameters
        weights += 0 if parameter is None else parameter.numel()
        parameters += 1
        if weights > largest or parameters > most:
            raise ConfigError("the configuration describes a much larger model than the file holds weights of")

    handle = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


def check_digest(checkpoint: Mapping[str, Any], source: str = "--ckpt_path") -> None:
    """Check that the weights of a checkpoint have the digest that was stored with them.

    Args:
        checkpoint: The checkpoint; one without a digest passes.
        source: The file, for the message.

    Raises:
        ConfigError: They have another one.
    """
    if not digest_fits(checkpoint):
        raise ConfigError(
            f"{source}: its weights do not have the digest that was stored with them; they were damaged or exchanged. "
            "Use another copy"
        )


def malformed(checkpoint: Any) -> str | None:
    """Return what is wrong with the form of a checkpoint, in a few words; ``None`` where its parts have their types."""
    if not isinstance(checkpoint, dict):
        return f"it is a {type(checkpoint).__name__}"
    state = checkpoint.get("state_dict")
    if not isinstance(state, dict):
        return "it has no state_dict"
    if not all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in state.items()):
        return "its state_dict holds something other than tensors"
    for key in ("hyper_parameters", "calibration", "callbacks", "familiarity"):
        if not isinstance(checkpoint.get(key, {}), dict | None):
            return f"its {key} are a {type(checkpoint[key]).__name__}"
    return None


def check_weights(own: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> None:
    """Check that two states have the same names and shapes.

    Args:
        own: State of the model.
        stored: State in a checkpoint.

    Raises:
        ConfigError: They differ (the message names the first three differences), or a weight is not finite.
    """
    broken = [name for name, one in stored.items() if not name.startswith("loss.") and not one.isfinite().all()]
    if broken:
        raise ConfigError(
            f"--ckpt_path: {broken[0]} contains NaN or infinite values ({len(broken)} tensors do); the training had "
            "diverged. Use an earlier checkpoint"
        )
    wrong = [
        f"{name} is {_shape(stored[name])}, not {_shape(own[name])}"
        for name in own
        if name in stored and stored[name].shape != own[name].shape
    ]
    missing, surplus = sorted(own.keys() - stored.keys()), sorted(stored.keys() - own.keys())
    if not (wrong or missing or surplus):
        return
    differences = [
        *wrong,
        *(f"{name} is missing" for name in missing),
        *(f"{name} is not in the model" for name in surplus),
    ]
    more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
    raise ConfigError(
        f"--ckpt_path holds another model than the configuration describes: {'; '.join(differences[:3])}{more}. "
        "Use the configuration it was trained with, or load what fits with model.init_weights=PATH."
    )


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a number"

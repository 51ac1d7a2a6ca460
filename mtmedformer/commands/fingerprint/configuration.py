"""A whole configuration of ``fit`` for the data set of a fingerprint, with the reason of each choice as a comment."""

from __future__ import annotations

import copy
import inspect
import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

import mtmedformer
from datamodules.base import MedicalDataModule
from datamodules.labels_csv.columns import described
from datamodules.labels_csv.datamodule import LabelsCSVDataModule
from federation.datamodule import FederatedDataModule
from mtmedformer.batch import Task
from mtmedformer.commands.fingerprint.summary import Fingerprint
from mtmedformer.heads.base import TaskHead
from mtmedformer.heads.classification import ClassificationHead
from mtmedformer.heads.from_tasks import heads_for
from mtmedformer.metrics.cases import plain_name
from mtmedformer.storage.constructor_arguments import class_path, describe

ENCODER = {"class_path": "mtmedformer.SharedEncoder", "init_args": {"name": "pvt_v2_b0", "channels": 128}}
OPTIMIZER = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 5e-4, "weight_decay": 0.05}}
SCHEDULE = {"class_path": "mtmedformer.WarmupCosine"}
ROUNDS = {
    "class_path": "callbacks.Federation",
    "init_args": {
        "aggregator": {"class_path": "federation.BayesianAggregator"},
        "site_trainer": {
            "class_path": "lightning.pytorch.Trainer",
            "init_args": {"max_epochs": 1, "gradient_clip_val": 1.0},
        },
    },
}
STEPS, FEWEST_EPOCHS, MOST_EPOCHS = 4000, 10, 100
"""Steps of a training where nothing else is configured, and bounds of its epochs."""

UNEVEN = 3.0
"""Classes get weights in the loss where the largest has this many times as many images as the smallest."""

LARGEST_WEIGHT = 10.0
WIDTH = 118

Comments = dict[tuple[str, ...], Sequence[str]]
"""Sentences by the path of the key above which they are written."""


def configuration(
    summary: Fingerprint, data: object, section: Mapping[str, Any], given: Mapping[str, Any], file: Path
) -> str:
    """Return a configuration of ``fit`` as YAML.

    Args:
        summary: The fingerprint, with the suggested settings.
        data: The data module that was described.
        section: The section ``data`` that it was built from, without defaults.
        given: The other sections of the configuration files; what they set is kept.
        file: Where the configuration will be written; names the run folder.
    """
    comments: Comments = {}
    counts = ", ".join(f"{split} {n.images} images of {n.patients} patients" for split, n in summary.splits.items())
    config = {
        "model": _model(summary, given.get("model") or {}, comments),
        "data": _data(summary, data, section, comments),
        "optimizer": given.get("optimizer") or OPTIMIZER,
        "lr_scheduler": given.get("lr_scheduler") or SCHEDULE,
    }
    rounds = isinstance(data, FederatedDataModule)
    if given.get("federation") or rounds:
        config["federation"] = given.get("federation") or ROUNDS
        comments["federation",] = [] if given.get("federation") else [f"{len(summary.sites)} sites train in rounds."]
    config["trainer"] = _trainer(summary, given, rounds, file, comments)
    head = [f"mtmedformer fit --config {file}", f"For {summary.dataset}, described by fingerprint: {counts}."]
    return "".join(f"# {line}\n" for sentence in head for line in textwrap.wrap(sentence, WIDTH)) + "".join(
        f"{line}\n" for line in _lines(config, comments)
    )


def _model(summary: Fingerprint, given: Mapping[str, Any], comments: Comments) -> dict[str, Any]:
    arguments = dict(given.get("init_args") or {})
    comments["model", "init_args", "encoder"] = (
        ["As given."] if "encoder" in arguments else ["A small encoder; on a GPU pvt_v2_b2 for the final model."]
    )
    heads = arguments.pop("heads", None)
    arguments.setdefault("encoder", ENCODER)
    own = heads if isinstance(heads, Mapping) else None
    described_heads = dict(own) if own else {}
    for name, head in {} if own else heads_for(summary.tasks).items():
        options, why = _options(name, head, summary)
        described_heads[name] = {"class_path": _short_path(head), "init_args": _changed(head) | options}
        comments["model", "init_args", "heads", name] = why
    arguments["heads"] = described_heads
    if "loss" not in arguments:
        arguments["loss"] = {
            "class_path": "mtmedformer.losses.HybridLoss",
            "init_args": {"weights": dict.fromkeys(described_heads, 1.0)},
        }
        labelled = {name: _labelled(summary, name) for name in summary.tasks}
        listing = ", ".join(f"{name} {count}" for name, count in labelled.items())
        comments["model", "init_args", "loss"] = [
            "Each loss is brought to one scale by its first mean and is a mean over the labelled images, so equal "
            f"weights hold whatever their number (training images with labels: {listing})."
        ]
    order = ["encoder", "heads", "loss"]
    rest = {key: value for key, value in arguments.items() if key not in order}
    return {
        "class_path": given.get("class_path") or "mtmedformer.MultiTaskModule",
        "init_args": {key: arguments[key] for key in order} | rest,
    }


def _options(name: str, head: TaskHead, summary: Fingerprint) -> tuple[dict[str, Any], list[str]]:
    """Return the options of a head that follow from the data, and the sentences on the task."""
    task, wish = summary.tasks[name], summary.suggestion
    counts = {label: by_split.get("train", 0) for label, by_split in summary.classes[name].items()}
    listing = ", ".join(f"{label} {count}" for label, count in counts.items())
    if task.kind == "detection":
        fine = wish.strides[0] == 4
        return {} if fine else {"strides": list(wish.strides)}, [
            f"Training images with a box: {listing or 'none'}.",
            *wish.why.get("strides", ()),
        ]
    if task.kind == "segmentation":
        sizes = [row.suggested_px["50"] for row in summary.structures.get(name, {}).values()]
        share = sizes and min(sizes) ** 2 / (wish.image_size[0] * wish.image_size[1])
        small = [f"The smallest class covers {share:.1%} of the input in the median; Dice, a part of the default loss, "
                 "does not depend on the area."] if sizes else []  # fmt: skip
        return {}, [f"Training images with a mask: {listing or 'none'}.", *small]
    if task.ordinal:
        return {}, [f"Training images by grade, the lowest first: {listing}."]
    if task.kind == "regression":
        numbers = _labelled(summary, name)
        return {}, [f"Training images with a number: {numbers}. The range is that of the task in the data."]
    if not isinstance(head, ClassificationHead):
        return {}, []
    return _class_weights(task, counts, _labelled(summary, name), wish.sampler, f"Training images: {listing}.")


def _class_weights(
    task: Task, counts: Mapping[str, int], labelled: int, sampler: str, listing: str
) -> tuple[dict[str, Any], list[str]]:
    """Return a loss with a weight for each class where their numbers differ much."""
    present = [count for count in counts.values() if count]
    if task.multi_label:
        ratios = [(labelled - count) / count if count else 1.0 for count in counts.values()]
        uneven, kind, key = max(ratios, default=1.0) > UNEVEN**2, "BinaryCrossEntropy", "pos_weight"
        weights = [max(1.0, math.sqrt(ratio)) for ratio in ratios]
        why = "a positive label weighs √(negatives / positives)"
    else:
        uneven = len(present) == len(counts) > 1 and max(present) > UNEVEN * min(present)
        kind, key, why = "CrossEntropy", "class_weights", "a class weighs √(mean number / its number)"
        mean = sum(present) / max(1, len(present))
        weights = [math.sqrt(mean / count) if count else 1.0 for count in counts.values()]
    if not uneven:
        return {}, [listing]
    if sampler == "sqrt":
        return {}, [listing, "The sampler draws the rare classes more often, so the loss has no class weights."]
    weights = [round(min(weight, LARGEST_WEIGHT), 2) for weight in weights]
    term = {"class_path": f"mtmedformer.losses.{kind}", "init_args": {key: weights}}
    return {"terms": {"cross_entropy": term}}, [listing, f"The classes are uneven: {why}, at most {LARGEST_WEIGHT:g}."]


def _data(summary: Fingerprint, data: object, section: Mapping[str, Any], comments: Comments) -> dict[str, Any]:
    """Return the section with the suggested settings, and with the tasks that were found in tables."""
    config = copy.deepcopy(dict(section))
    wish = summary.suggestion
    sets: list[tuple[tuple[str, ...], dict[str, Any], object]] = [(("data",), config, data)]
    if isinstance(data, FederatedDataModule):
        inner = config.setdefault("init_args", {})
        if data.data is not None:
            part = next(iter(data.sites.values())).source  # the parts know the tasks that were found
            sets = [(("data", "init_args", "data"), inner["data"], part)]
        else:
            named = inner["sites"]
            sets = [(("data", "init_args", "sites", n), named[n], (data.named or {})[n]) for n in named]
    for number, (path, own, source) in enumerate(sets):
        arguments = own.setdefault("init_args", {})
        if isinstance(source, LabelsCSVDataModule) and source.tasks_found:
            arguments |= described(source.specs, source.tasks)
        arguments |= {"image_size": list(wish.image_size), "batch_size": wish.batch_size, "sampler": wish.sampler}
        named = {"negative", "positive", "negative_classes"} & arguments.keys()
        if isinstance(source, MedicalDataModule) and not named and (absent := _negative(source)):
            arguments["negative"] = absent
            comments[*path, "init_args", "negative"] = ["By their names; all other classes are findings."]
        for key, sentences in wish.why.items() if not number else ():
            if key in arguments:
                comments[*path, "init_args", key] = sentences
    return config


def _negative(data: MedicalDataModule) -> list[str]:
    labels = (c for task in data.tasks.values() if task.kind == "classification" for c in task.classes)
    return list(dict.fromkeys(label for label in labels if plain_name(label) in data.negative))


def _trainer(
    summary: Fingerprint, given: Mapping[str, Any], rounds: bool, file: Path, comments: Comments
) -> dict[str, Any]:
    trainer = dict(given.get("trainer") or ({} if rounds else {"gradient_clip_val": 1.0}))
    if "max_epochs" not in trainer:
        images = summary.splits["train"].images if "train" in summary.splits else 1
        steps = math.ceil(images / summary.suggestion.batch_size)
        trainer["max_epochs"] = min(MOST_EPOCHS, max(FEWEST_EPOCHS, math.ceil(STEPS / steps)))
        comments["trainer", "max_epochs"] = [f"{steps} steps per epoch."]
    return trainer | {"default_root_dir": f"runs/{file.stem}"}


def _labelled(summary: Fingerprint, task: str) -> int:
    cells = (splits.get("train", {}).get(task) for splits in summary.labelled.values())
    return sum(cell.labelled for cell in cells if cell)


def _short_path(head: TaskHead) -> str:
    name = type(head).__name__
    return f"mtmedformer.{name}" if name in dir(mtmedformer) else class_path(type(head))


def _changed(head: TaskHead) -> dict[str, Any]:
    """Return the arguments of a head that are not the defaults of its constructor."""
    defaults = {name: one.default for name, one in inspect.signature(type(head).__init__).parameters.items()}
    arguments = head.init_args or {}
    return {key: value for key, value in arguments.items() if key not in defaults or value != _plain(defaults[key])}


def _plain(default: Any) -> Any:
    return None if default is inspect.Parameter.empty else describe(default)


def _lines(value: Mapping[str, Any], comments: Comments, path: tuple[str, ...] = ()) -> Iterator[str]:
    """Yield the lines of a mapping in block style, each comment above its key."""
    indent = "  " * len(path)
    for key, one in value.items():
        place = (*path, str(key))
        for sentence in comments.get(place, ()):
            for line in textwrap.wrap(sentence, WIDTH - len(indent)):
                yield f"{indent}# {line}"
        name = _scalar(str(key))
        if (
            isinstance(one, Mapping)
            and one
            and (_holds_mapping(one) or any(p[: len(place)] == place for p in comments))
        ):
            yield f"{indent}{name}:"
            yield from _lines(one, comments, place)
        else:
            yield f"{indent}{name}: {_scalar(one)}"


def _holds_mapping(value: Mapping[str, Any]) -> bool:
    return any(isinstance(one, Mapping) for one in value.values()) or len(value) > 4


def _scalar(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=math.inf, allow_unicode=True)
    return text.removesuffix("...\n").strip()

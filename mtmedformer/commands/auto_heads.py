"""``heads: auto`` on the command line: the heads of a checkpoint, or those of the tasks of the data."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from jsonargparse import Namespace

from mtmedformer.checks import tasks_of
from mtmedformer.commands.checkpoint_config import checkpoint_file, stored_model
from mtmedformer.module import MultiTaskModule

AUTO = "auto"


def with_heads_of_checkpoint(argv: list[str], config: Namespace, stack: ExitStack, trusted: bool) -> list[str]:
    """Return a command line whose heads are those of the checkpoint where its configuration has ``heads: auto``.

    Args:
        argv: The command line.
        config: The configuration that was parsed from it, of the subcommand.
        stack: Deletes the file of the heads when it is closed.
        trusted: Allow classes of other projects.

    Raises:
        ConfigError: The checkpoint is damaged, or names a class that is not allowed.
    """
    if config.get("ckpt_path") is None or config.model.get("init_args", {}).get("heads") != AUTO:
        return argv
    model = stored_model(checkpoint_file(config), argv, trusted)
    heads = model["init_args"].get("heads") if model else None
    if not isinstance(heads, Mapping):
        return argv
    file = Path(stack.enter_context(TemporaryDirectory()), "heads.yaml")
    file.write_text(yaml.safe_dump({"model": {"init_args": {"heads": dict(heads)}}}, sort_keys=False))
    return [*argv, "--config", str(file)]


def add_heads(model: object, data: object, record: dict[str, Any]) -> None:
    """Build the heads of a model with ``heads: auto`` from the tasks of its data, and write them into the record.

    Args:
        model: The model; nothing is done where its heads exist.
        data: Its data; the records are read.
        record: The configuration of the run, as plain values.

    Raises:
        UserError: The data declare no tasks, or cannot be read.
    """
    if isinstance(model, MultiTaskModule) and model.awaits_tasks:
        model.add_heads(tasks_of(data))
        record["model"]["init_args"]["heads"] = model.hparams["heads"]

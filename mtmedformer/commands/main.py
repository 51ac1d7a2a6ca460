"""The command line: one table of all commands, their exit codes, and what becomes of an error.

Neither torch nor Lightning is imported here, so that help and version are printed at once.
"""

from __future__ import annotations

import importlib
import logging
import os
import resource
import sys
import warnings
from typing import NamedTuple

import mtmedformer
from mtmedformer.commands.messages import explain, print_error
from mtmedformer.errors import ConfigError

FEWEST_FILES, USUAL_FILES = 128, 4096
"""Files that a process must be allowed to open, and the limit that it raises its own to where it may."""

LIGHTNING_CLI = "mtmedformer.commands.lightning_cli"

USELESS = ("litlogger", "litmodels", "Skipping setting a", "TPU available", "Detected KeyboardInterrupt", "to estimate")
"""Parts of messages of Lightning that are not shown."""


class Command(NamedTuple):
    """A command: its line in the help, and the module whose ``main(argv)`` runs it."""

    summary: str
    module: str


COMMANDS = {
    "fit": Command("train a model, or a federation of sites", LIGHTNING_CLI),
    "validate": Command("evaluate a checkpoint on the validation images", LIGHTNING_CLI),
    "test": Command("evaluate a checkpoint on the test images, with confidence intervals", LIGHTNING_CLI),
    "predict": Command("write predictions for a data set, or for files (--images)", LIGHTNING_CLI),
    "fingerprint": Command("describe a data set before training on it", "mtmedformer.commands.fingerprint.command"),
    "compare": Command("train and compare variants of a configuration", "mtmedformer.commands.compare.command"),
    "sweep": Command("search hyperparameters from a W&B sweep file, without W&B", "mtmedformer.commands.sweep.command"),
    "folds": Command("train the folds of a cross-validation, and test their ensemble", "mtmedformer.commands.folds"),
    "export": Command("write a trained model as ONNX or safetensors", "mtmedformer.commands.export.command"),
}


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code.

    0: done. 1: failed; continue with ``--ckpt_path=last`` (``predict --images``: some images failed; repeat the
    command). 2: an error in the command or the configuration, explained on standard error. 3: done, but incomplete, by
    the ``exit_code`` of a callback. 130 and 143: stopped by Ctrl-C or SIGTERM; continue as after 1.

    Args:
        argv: Arguments, the command first; ``None`` takes those of this process.
    """
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] in (["--version"], ["-V"]):
        print(f"mtmedformer {mtmedformer.__version__}")
        return 0
    if argv[:1] in ([], ["--help"], ["-h"], ["help"]):
        print(usage(), file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    _quieten()
    try:
        _check_process()
        return _run(argv)
    except (Exception, SystemExit, KeyboardInterrupt) as error:
        message, exit_code = explain(error)
        if exit_code is None:
            raise
        print_error(message)
        return exit_code


def usage() -> str:
    """Return the help of the command line: every command with its line."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: mtmedformer COMMAND [arguments]",
            "",
            "Train one transformer on several tasks in the same medical image, on one computer or across sites.",
            "",
            "commands:",
            *lines,
            "",
            "'mtmedformer COMMAND --help' lists the arguments of a command, 'mtmedformer --version' the version.",
        ]
    )


def _run(argv: list[str]) -> int:
    command = COMMANDS.get(argv[0])
    if command is None:
        raise ConfigError(f"unknown command '{argv[0]}'; the command comes first and is one of {', '.join(COMMANDS)}")
    arguments = argv if command.module == LIGHTNING_CLI else argv[1:]
    exit_code: int = importlib.import_module(command.module).main(arguments)
    return exit_code


def _check_process() -> None:
    """Refuse to start where the process could only fail later, in a worker or without a message.

    Raises:
        ConfigError: The current folder is gone, or too few files may be open.
    """
    try:
        os.getcwd()
    except OSError as error:
        raise ConfigError("the current folder does not exist any more; change to another one") from error
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return
    now = max(soft, USUAL_FILES if hard == resource.RLIM_INFINITY else min(hard, USUAL_FILES))
    if now > soft:  # workers share tensors by open files
        resource.setrlimit(resource.RLIMIT_NOFILE, (now, hard))
    if now < FEWEST_FILES:
        raise ConfigError(
            f"a process may open only {now} files here, and processes that read images would hang; allow at least "
            f"{FEWEST_FILES} with 'ulimit -n {FEWEST_FILES}'"
        )


def _quieten() -> None:
    """Drop a few messages of Lightning that do not help a user: an advertisement, deprecations, expected warnings."""
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    warnings.filterwarnings("ignore", r"The number of training batches .* is smaller than the logging interval")
    warnings.filterwarnings("ignore", r"Checkpoint directory .* exists and is not empty")
    warnings.filterwarnings("ignore", r"Be aware that when using `ckpt_path`, callbacks used to create the checkpoint")
    # predict: every image was finished before
    warnings.filterwarnings("ignore", r"Total length of `ImageBatches` across ranks is zero")
    warnings.filterwarnings("ignore", r"The dirpath has changed from .*")  # resumed in a new run folder
    # metrics of torchmetrics are combined before; per-task training losses cannot be, see docs/training_options.md
    warnings.filterwarnings("ignore", r"It is recommended to use `self.log\(.*sync_dist=True")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_useful)
    warnings.filterwarnings("ignore", r".*isinstance\(treespec, LeafSpec\)", module="lightning")


def _is_useful(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    return not any(words in message for words in USELESS)


if __name__ == "__main__":
    sys.exit(main())

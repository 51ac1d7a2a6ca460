"""Texts of errors: one paragraph that names the key, what is wrong with it and close choices."""

from __future__ import annotations

import errno
import inspect
import re
import sys
import textwrap
from difflib import get_close_matches
from typing import Any

import mtmedformer
from mtmedformer.errors import ConfigError, UserError


def print_error(message: str) -> None:
    """Print an error as one paragraph on standard error."""
    text = " ".join(message.split())
    print(textwrap.fill(f"mtmedformer: {text}", width=100, break_long_words=False), file=sys.stderr)


def explain(error: BaseException) -> tuple[str, int | None]:
    """Return the message and exit code of an error that a user can act on; the code is ``None`` for any other."""
    if isinstance(error, UserError):
        return str(error), error.exit_code
    from lightning.fabric.utilities.exceptions import MisconfigurationException  # here, because it imports torch
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    if isinstance(error, MisconfigurationException):
        return str(error), 2
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"no space left to write ({error}); free some and continue with --ckpt_path=last", 1
    if isinstance(error, ValueError) and (cause := user_error(error)):  # jsonargparse wraps what a constructor raises
        return str(cause), cause.exit_code
    if isinstance(error, SIGTERMException):  # a SystemExit without a code, which would mean success
        return "stopped by SIGTERM; continue with --ckpt_path=last", 1
    return "", None


def user_error(error: BaseException | None) -> UserError | None:
    """Return the ``UserError`` among the causes of an exception, if there is one; a missing package counts as one."""
    while error is not None and not isinstance(error, UserError):
        if isinstance(error, ModuleNotFoundError) and "pip install" in str(error):  # a logger, a profiler
            return ConfigError(str(error).replace("`", "'"))
        error = error.__cause__ or error.__context__
    return error


def paragraph(message: str) -> str:
    """Shorten a jsonargparse message to what a person needs: the key, what is wrong with it, and close choices."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    reasons = [line.removeprefix("- ") for line in lines if line.startswith("- ") and "NoneType" not in line]
    key = re.search(r'[Kk]ey "([^"]+)"', message)
    text = f"{key[1]}: {'; '.join(dict.fromkeys(reasons))}" if key and reasons else " ".join(lines)
    text = re.split(r" Given value|\.? For help|usage:", text)[0][:900]
    unknown = re.search(r"Option '([\w.]+)' is not accepted|[Uu]nrecognized arguments: (?:--)?([\w.]+)", text)
    if unknown and "did you mean" not in text:
        name = (unknown[1] or unknown[2]).split(".")[-1]
        close = get_close_matches(name, _parameters(), n=3)
        text += f"; did you mean {' or '.join(close)}?" if close else ""
    return text


def _parameters() -> list[str]:
    """Return every constructor argument that YAML can name in this project and in Lightning's Trainer."""
    from lightning.pytorch import Trainer

    from datamodules import MedicalDataModule
    from mtmedformer.heads import TaskHead

    kinds: list[Any] = [Trainer, mtmedformer.MultiTaskModule, mtmedformer.SharedEncoder, mtmedformer.HybridLoss]
    for base in (MedicalDataModule, TaskHead):
        kinds += [base, *base.__subclasses__()]
    return sorted({name for kind in kinds for name in inspect.signature(kind.__init__).parameters} - {"self", "kwargs"})

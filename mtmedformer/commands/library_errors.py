"""Exceptions of libraries: which are a mistake in the settings, shown as one sentence, and which are a fault.

A mistake is, by type and origin,

1. an exception of a type that exists for mistakes: ``UserError``, Lightning's ``MisconfigurationException``, W&B's
   ``UsageError``, and a missing package where the message gives the command that installs it;
2. any other exception that a ``raise`` statement of Lightning, W&B, jsonargparse or ``torch.optim`` raised, if the last
   function of this project on the way there only passes settings on (``PASSING_ON``).

jsonargparse wraps what a constructor raises, so causes count too. Everything else is a fault and keeps its traceback:
exceptions of our own functions, of a user's own classes, and of compiled code, such as a lack of GPU memory.
"""

from __future__ import annotations

import linecache
from collections.abc import Iterator
from types import TracebackType

from mtmedformer.errors import UserError

LIBRARIES = ("lightning.", "wandb.", "jsonargparse.", "torch.optim.")
"""Beginnings of the names of modules that check settings."""

PROJECT = frozenset({"mtmedformer", "callbacks", "datamodules", "federation"})

PASSING_ON = (
    "mtmedformer.commands.lightning_cli.",
    "mtmedformer.optim.",
    "mtmedformer.module.MultiTaskModule.configure_optimizers",
    "mtmedformer.module.MultiTaskModule.check_optimizer",
    "callbacks.run.wandb_run.check_wandb_names",
    "mtmedformer.module.MultiTaskModule._configured_groups",
)
"""Beginnings of the names of functions that pass settings on to a library and compute nothing with them."""


def mistake(error: BaseException) -> tuple[str, int] | None:
    """Return the message and exit code of an exception that is a mistake in the settings, or ``None`` for a fault."""
    for one in _chain(error):
        if isinstance(one, UserError):
            return str(one), one.exit_code
        if _is_type_of_mistakes(one) or (isinstance(one, Exception) and _checked_settings(one.__traceback__)):
            return " ".join(str(one).replace("`", "'").split()) or type(one).__name__, 2
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield the causes of an exception, the first one first, then the exception.

    An exception met while handling another one is a cause where jsonargparse raised it.
    """
    wrapped = _names(error.__traceback__)[-1:]
    context = error.__context__ if wrapped and wrapped[0].startswith("jsonargparse.") else None
    if cause := error.__cause__ or context:
        yield from _chain(cause)
    yield error


def _is_type_of_mistakes(error: BaseException) -> bool:
    kind = type(error)
    if kind.__name__ == "MisconfigurationException" and kind.__module__.startswith("lightning."):
        return True  # by name: Lightning has two modules for it, and importing them imports torch
    if kind.__name__ == "UsageError" and kind.__module__.startswith("wandb."):
        return True
    return isinstance(error, ModuleNotFoundError) and "pip install" in str(error)


def _checked_settings(traceback: TracebackType | None) -> bool:
    """Return whether a library raised this on purpose, and our code on the way there only passed settings on."""
    names = _names(traceback)
    last = next((name for name in reversed(names) if name.split(".")[0] in PROJECT), "")
    if not names or not names[-1].startswith(LIBRARIES) or not last.startswith(PASSING_ON):
        return False
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    assert traceback is not None
    line = linecache.getline(traceback.tb_frame.f_code.co_filename, traceback.tb_lineno)
    return line.lstrip().startswith("raise ")


def _names(traceback: TracebackType | None) -> list[str]:
    """Return the functions of a traceback with their modules, from the outermost to the one that raised."""
    names = []
    while traceback is not None:
        frame = traceback.tb_frame
        names.append(f"{frame.f_globals.get('__name__', '')}.{frame.f_code.co_qualname}")
        traceback = traceback.tb_next
    return names

"""Texts of errors: one paragraph that names the key, what is wrong with it and close choices."""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Iterable
from difflib import get_close_matches

from mtmedformer.errors import ConfigError, UserError
from mtmedformer.storage.safe_text import printable
from mtmedformer.storage.write_errors import system_error


def print_error(message: str) -> None:
    """Print an error as one paragraph on standard error."""
    text = printable(" ".join(message.split()))
    print(textwrap.fill(f"mtmedformer: {text}", width=100, break_long_words=False), file=sys.stderr)


def explain(error: BaseException) -> tuple[str, int | None]:
    """Return the message and exit code of an error that a user can act on; the code is ``None`` for any other."""
    if isinstance(error, UserError):
        return str(error), error.exit_code
    from lightning.fabric.utilities.exceptions import MisconfigurationException  # here, because it imports torch
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    if isinstance(error, MisconfigurationException):
        return str(error), 2
    if isinstance(error, ValueError) and (cause := user_error(error)):  # jsonargparse wraps what a constructor raises
        return str(cause), cause.exit_code
    if isinstance(error, SIGTERMException):  # a SystemExit without a code, which would mean success
        return "stopped by SIGTERM; continue with --ckpt_path=last", 1
    if found := system_error(error):  # last, because a UserError may have such a cause
        words, code = found
        again = "mend it and continue, fit with --ckpt_path=last, predict with the same command"
        return f"{words}; {'choose another path or change its permissions' if code == 2 else again}", code
    return "", None


def user_error(error: BaseException | None) -> UserError | None:
    """Return the ``UserError`` among the causes of an exception, if there is one; a missing package counts as one."""
    while error is not None and not isinstance(error, UserError):
        if isinstance(error, ModuleNotFoundError) and "pip install" in str(error):  # a logger, a profiler
            return ConfigError(str(error).replace("`", "'"))
        error = error.__cause__ or error.__context__
    return error


def parser_message(message: str, error: BaseException | None, known: Iterable[str]) -> str:
    """Return an error of jsonargparse as one sentence: the key, what is wrong with it, close choices.

    The parser of a nested class raises first. Its message becomes a ``ConfigError`` by this function, which is then
    among the causes of the error of the parser around it.

    Args:
        message: Text of jsonargparse.
        error: The exception that the parser met.
        known: Options of the parser that raises, which are the arguments of the class at hand.
    """
    key = re.search(r'[Kk]ey "([^"]+)"', message)
    nested = _nested(error)
    if nested is not None and key:
        return f"{key[1]}: {nested}"
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    reasons = [line.removeprefix("- ") for line in lines if line.startswith("- ") and "NoneType" not in line]
    text = f"{key[1]}: {'; '.join(dict.fromkeys(reasons))}" if key and reasons else " ".join(lines)
    text = re.split(r" Given value|\.? For help|usage:", text)[0][:900]
    unknown = re.match(r"Option '([\w.]+)' is not accepted|[Uu]nrecognized arguments: (?:--)?([\w.]+)", text)
    close = get_close_matches(unknown[1] or unknown[2], sorted(set(known)), n=3) if unknown else []
    return text + (f"; did you mean {' or '.join(close)}?" if close else "")


def _nested(error: BaseException | None) -> ConfigError | None:
    """Return the ``ConfigError`` among the causes of an exception, if there is one."""
    while error is not None and not isinstance(error, ConfigError):
        error = error.__cause__ or error.__context__
    return error

"""Texts of errors: one paragraph that names the key, what is wrong with it and close choices."""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Iterable
from difflib import get_close_matches

from mtmedformer.commands.library_errors import mistake
from mtmedformer.errors import ConfigError, UserError
from mtmedformer.storage.safe_text import printable
from mtmedformer.storage.write_errors import system_error

INTERRUPTED, TERMINATED = 130, 143
"""Exit codes after Ctrl-C (SIGINT) and SIGTERM: 128 and the number of the signal, as in a shell."""


def print_error(message: str) -> None:
    """Print an error as one paragraph on standard error."""
    text = printable(" ".join(message.split()))
    first = f"mtmedformer:\N{NO-BREAK SPACE}{text}"  # the message begins beside the name, and no path is broken
    lines = textwrap.fill(first, width=100, break_long_words=False, break_on_hyphens=False)
    print(lines.replace("\N{NO-BREAK SPACE}", " "), file=sys.stderr)


def explain(error: BaseException) -> tuple[str, int | None]:
    """Return the message and exit code of an error that a user can act on; the code is ``None`` for any other."""
    if isinstance(error, UserError):
        return str(error), error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return "interrupted by Ctrl-C", INTERRUPTED
    if isinstance(error, SystemExit):
        return _explain_exit(error)
    if found := mistake(error):
        return found
    if system := system_error(error):  # last, because a UserError may have such a cause
        words, code = system
        again = "mend it and continue, fit with --ckpt_path=last, predict with the same command"
        return f"{words}; {'choose another path or change its permissions' if code == 2 else again}", code
    return "", None


def _explain_exit(error: SystemExit) -> tuple[str, int | None]:
    """Return the message and exit code where Lightning ended the process after a signal."""
    from lightning.pytorch.utilities.exceptions import SIGTERMException  # here, because it imports torch

    if isinstance(error, SIGTERMException):  # without a code, which would mean success
        return str(error) or "stopped by SIGTERM; continue a training with --ckpt_path=last", TERMINATED
    if isinstance(error.__context__, KeyboardInterrupt):
        return str(error.__context__) or "interrupted by Ctrl-C", INTERRUPTED
    return "", None


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
    several = re.search(r"Multiple subclasses with name (\S+)\. .* ambiguity: ([\w., ]+)\.", message)
    if several and key:
        return f"{key[1]}: several classes are called {several[1]}; give the whole import path, one of {several[2]}"
    absent = re.search(r"dot import path string: (\S+)|given class_path '(\S+)':\s+(No module named|module)", message)
    name = (absent[1] or absent[2]) if absent else ""
    if name and key and not _is_number(name):
        return (
            f"{key[1]}: there is no class {name}; give the name of a class of Lightning, torch or MTMedFormer, or the "
            "whole import path of your own"
        )
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


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True

"""Check a stored configuration before anything in it is imported: a file may name only classes of MTMedFormer.

Importing a class runs its code. Classes of other projects need the user's word: his own configuration names them, or
``--trusted`` is on the command line.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints, is_typeddict

from mtmedformer.commands.yaml_files import read_yaml
from mtmedformer.errors import ConfigError
from mtmedformer.storage.safe_text import printable

HOMES = ("mtmedformer", "datamodules", "federation", "callbacks")
"""Packages whose classes a file may name."""

TRUSTED = "--trusted"
"""Flag of the command line."""

_IMPORT_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")

_NODES, _DEPTH, _TEXT = 100_000, 60, 20_000
"""Most values of a stored configuration, their deepest nesting, and the longest text among them."""


def check_stored(section: Any, source: str, own: Collection[str] = (), trusted: bool = False) -> None:
    """Check a section of a stored configuration: plain values, of a usual size, without foreign classes.

    Args:
        section: The section, such as ``model``: ``class_path`` and ``init_args``.
        source: The file, for messages.
        own: Texts of the user's own configuration and command line (see `own_words`); classes among them are allowed.
        trusted: Allow every class.

    Raises:
        ConfigError: It names a class that is not allowed, or holds something that no configuration does.
    """
    if not isinstance(section, Mapping) or not isinstance(section.get("class_path"), str):
        raise ConfigError(f"{source}: describes no class (class_path and init_args); use another file")
    for key, value in _leaves(section, source):
        if key == "class_path" and not isinstance(value, str):
            raise ConfigError(f"{source}: a class_path is {type(value).__name__} and not text; use another file")
        if isinstance(value, str) and not trusted and value not in own and _is_foreign(key, value):
            raise ConfigError(
                f"{source}: refused, because it names '{printable(value)[:100]}', which is not a part of MTMedFormer, "
                f"and importing it runs its code. If you trust the file and the class, add {TRUSTED}, or name the "
                "class in a --config of your own"
            )
    for text in () if trusted else _in_place_of_objects(section):
        if text not in own and Path(text).is_file():
            raise ConfigError(
                f"{source}: refused, because it names the file '{printable(text)[:100]}' in place of an object, and a "
                f"file may name any class. If you trust it, add {TRUSTED}"
            )


def check_plain(value: Any, source: str) -> None:
    """Check that nested values are plain, and of the size and depth of a configuration.

    Raises:
        ConfigError: They are not.
    """
    for _ in _leaves(value, source):
        pass


def own_words(argv: list[str]) -> set[str]:
    """Return every text of a command line and of the configuration files that it names."""
    words: set[str] = set()
    for option, following in zip(argv, [*argv[1:], ""], strict=True):
        words |= {option, *option.split("=", 1)}
        file = following if option in {"--config", "-c"} else option.removeprefix("--config=")
        if (option in {"--config", "-c"} or option.startswith("--config=")) and Path(file).is_file():
            words |= {value for _, value in _leaves(read_yaml(Path(file)), file) if isinstance(value, str)}
    return words


def _is_foreign(key: str, value: str) -> bool:
    """Return whether a text is the path of a class outside ``HOMES``, as far as one could be imported."""
    if key == "class_path" and "." not in value:
        return False  # a short name, which is looked up among the classes that are imported already
    home = value.split(".", 1)[0]
    if home in HOMES:
        return False
    if key == "class_path":
        return True
    if not _IMPORT_PATH.fullmatch(value):
        return False
    try:
        return importlib.util.find_spec(home) is not None  # a name such as resnet50.a1_in1k is no module
    except (ImportError, ValueError):
        return True


def _in_place_of_objects(value: Any) -> Iterator[str]:
    """Yield the texts where a class of MTMedFormer expects an object; jsonargparse may read one as a file."""
    if isinstance(value, list | tuple):
        for one in value:
            yield from _in_place_of_objects(one)
    if not isinstance(value, Mapping):
        return
    hints = _parameters(value.get("class_path"))
    for key, one in value.items():
        arguments = one if key in ("init_args", "dict_kwargs") and isinstance(one, Mapping) else {}
        for name, argument in arguments.items():
            if not _takes_text(hints.get(name)):
                yield from _texts(argument)
        yield from (text for inner in (arguments.values() or [one]) for text in _in_place_of_objects(inner))


def _parameters(class_path: Any) -> dict[str, Any]:
    """Return the types of the parameters of a class, inherited ones included; empty for a class of another home."""
    module, _, name = class_path.rpartition(".") if isinstance(class_path, str) else ("", "", "")
    if module.split(".", 1)[0] not in HOMES:
        return {}
    try:
        cls = getattr(importlib.import_module(module), name)
        constructors = [vars(one)["__init__"] for one in reversed(cls.__mro__) if "__init__" in vars(one)]
        return {key: hint for one in constructors if one is not object.__init__ for key, hint in _hints(one).items()}
    except (ImportError, AttributeError):  # the parser reports a class that does not exist
        return {}


def _hints(constructor: Any) -> dict[str, Any]:
    try:
        return get_type_hints(constructor)
    except (NameError, TypeError):  # types that exist for a type checker only
        return {}


def _takes_text(hint: Any) -> bool:
    """Return whether a parameter of a type may be plain text or a path, itself or within a container."""
    if hint in (str, Path, Any) or get_origin(hint) is Literal or is_dataclass(hint) or is_typeddict(hint):
        return True
    parts = get_args(hint)[1:] if get_origin(hint) in (dict, Mapping) else get_args(hint)
    return get_origin(hint) is not Callable and any(_takes_text(part) for part in parts)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | tuple) or (isinstance(value, Mapping) and "class_path" not in value):
        for one in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(one)


def _leaves(value: Any, source: str) -> Iterator[tuple[str, Any]]:
    """Yield the values of nested mappings and lists with the last key above each.

    Raises:
        ConfigError: There are too many of them, they are nested too deeply, or one is no plain value.
    """
    waiting, nodes = [("", value, 0)], 0
    while waiting:
        key, one, depth = waiting.pop()
        nodes += 1
        if nodes > _NODES or depth > _DEPTH:
            raise ConfigError(f"{source}: its configuration is too large or nested too deeply; use another file")
        if isinstance(one, Mapping):
            if not all(isinstance(name, str | int) for name in one):
                raise ConfigError(f"{source}: a key of its configuration is no text; use another file")
            waiting += [(str(name), inner, depth + 1) for name, inner in one.items()]
            if "class_path" in one:
                yield "class_path", one["class_path"]
        elif isinstance(one, list | tuple):
            waiting += [(key, inner, depth + 1) for inner in one]
        elif _is_usual(one):
            yield key, one
        else:
            raise ConfigError(f"{source}: its configuration holds a {type(one).__name__} of an odd kind or size")


def _is_usual(value: Any) -> bool:
    if isinstance(value, str):
        return len(value) <= _TEXT
    return value is None or isinstance(value, bool | float) or (isinstance(value, int) and abs(value) < 2**63)

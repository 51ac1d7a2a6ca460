"""Record how an object was constructed, as plain values that YAML and a checkpoint can hold."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

WEIGHT_FILES = frozenset({"init_weights", "checkpoint_path"})
"""Arguments that name a file of first weights."""


class RecordsArguments:
    """Keeps the constructor arguments of every subclass as ``init_args``, defaults included.

    Nested objects of this class are described as ``{class_path, init_args}``, the form that jsonargparse reads.

    Attributes:
        init_args: Arguments by name; ``None`` where one of them is an object of another class.
    """

    not_recorded: ClassVar[frozenset[str]] = frozenset()
    """Arguments that are left out of ``init_args``."""

    init_args: dict[str, Any] | None

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Record the arguments before ``__init__`` runs."""
        new = super().__new__(cls)
        new.__dict__["init_args"] = _recorded(cls, args, kwargs)
        return new


def describe(value: Any) -> Any:
    """Return a value as None, bool, int, float, str, list or dict.

    Raises:
        TypeError: The value is an object whose constructor arguments are not recorded.
    """
    if isinstance(value, RecordsArguments):
        if value.init_args is None:
            raise TypeError(f"an argument of {type(value).__name__} cannot be described")
        return {"class_path": class_path(type(value)), "init_args": value.init_args}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): describe(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [describe(one) for one in value]
    raise TypeError(f"a {type(value).__name__} cannot be described")


def class_path(cls: type) -> str:
    """Return the import path of a class."""
    return f"{cls.__module__}.{cls.__qualname__}"


def hyperparameters(class_path: str, init_args: Mapping[str, Any]) -> dict[str, Any]:
    """Return the hyperparameters of a module in the form in which LightningCLI stores and rebuilds them.

    Files of first weights are left out (``None``): a checkpoint contains the weights that came of them, and is handed
    on, so it must not depend on paths of the computer or contain them.

    Args:
        class_path: Import path of the module's class.
        init_args: Its constructor arguments as plain values.
    """
    kept = _without_weight_files(init_args)
    return {"_class_path": class_path, "_instantiator": "lightning.pytorch.cli.instantiate_module", **kept}


def _without_weight_files(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: None if key in WEIGHT_FILES else _without_weight_files(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_without_weight_files(one) for one in value]
    return value


def _recorded(cls: type[RecordsArguments], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any] | None:
    signature = inspect.signature(cls.__init__)
    try:
        bound = signature.bind(None, *args, **kwargs)
    except TypeError:  # copying and unpickling call no constructor; a wrong call is reported by __init__
        return None
    bound.apply_defaults()
    own = next(iter(signature.parameters))
    extra = [name for name, one in signature.parameters.items() if one.kind is inspect.Parameter.VAR_KEYWORD]
    given = {name: value for name, value in bound.arguments.items() if name not in {own, *extra}}
    given |= {key: value for name in extra for key, value in bound.arguments[name].items()}
    try:
        return {name: describe(value) for name, value in given.items() if name not in cls.not_recorded}
    except TypeError:
        return None

"""A configuration without the paths of the computer it ran on, for files and services that others see."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "(path)"
"""What stands in place of a path."""

PATH_KEYS = frozenset(
    {
        *("root", "images", "table", "cache_dir", "init_weights", "checkpoint_path", "ckpt_path", "default_root_dir"),
        *("folder", "dirpath", "save_dir", "dir", "salt_file", "posterior", "predictions"),
    }
)
"""Keys whose text is a path, also where it is a relative one."""

_ABSOLUTE = re.compile(r"^(~|file:|/|\\\\|[A-Za-z]:[\\/])")


def without_paths(config: Any, key: str = "") -> Any:
    """Return nested plain values in which every absolute path, and every text under ``PATH_KEYS``, is hidden.

    Args:
        config: The configuration.
        key: Key above it.
    """
    if isinstance(config, Mapping):
        return {name: without_paths(value, str(name)) for name, value in config.items()}
    if isinstance(config, list | tuple):
        return [without_paths(value, key) for value in config]
    if isinstance(config, str) and config and (key in PATH_KEYS or _ABSOLUTE.match(config)):
        return HIDDEN
    return config

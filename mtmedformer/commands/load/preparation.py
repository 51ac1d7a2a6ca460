"""How the images of a run were prepared, read from the ``data`` section of its ``config.yaml``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mtmedformer.errors import ConfigError

PREPARATION = ("image_size", "preset")
"""Arguments of a data set that decide how an image is prepared for the network."""


def preparation(data: Any) -> dict[str, Any]:
    """Return how a run prepares images; for a federation, how its data sets do.

    Args:
        data: The section ``data`` of the ``config.yaml`` of a run.

    Returns:
        ``image_size``, ``preset`` and a ``white_level`` that is a number, as far as the section has them.

    Raises:
        ConfigError: Two sites prepare images differently.
    """
    arguments = data.get("init_args", {}) if isinstance(data, dict) else {}
    sites = arguments.get("sites")
    nested = [arguments.get("data"), *(sites.values() if isinstance(sites, dict) else ())]
    ways = [preparation(one) for one in nested if isinstance(one, dict) and "class_path" in one]
    level = arguments.get("white_level")
    white = {"white_level": level} if isinstance(level, int) else {}
    ways = ways or [{name: arguments[name] for name in PREPARATION if name in arguments} | white]
    if any(way != ways[0] for way in ways):
        raise ConfigError(
            "predict --images: the sites of this run prepare images differently; choose one way with "
            "--data.image_size=[HEIGHT,WIDTH] and --data.preset=datamodules.ChestPreset (or another)"
        )
    return ways[0]


def data_state(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state of the data module in a checkpoint; empty where it has none.

    Args:
        stored: The contents of a checkpoint.

    Returns:
        ``white_level``: the white level of the 16-bit images of the training, or one for each site of a federation.
    """
    states = [value for value in stored.values() if isinstance(value, Mapping) and set(value) == {"white_level"}]
    return dict(states[0]) if states else {}

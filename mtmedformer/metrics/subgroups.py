"""Subgroups of images: which images are of one site, view, sex, age band, scanner or another group."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

MOST_VALUES = 30
"""A column with more values holds names or numbers, not groups, and is not reported by value."""

SITE, VIEW = "site", "view"

_BAND = re.compile(r"(under )?(-?\d+(?:\.\d+)?)")


def members_by_group(
    sites: Sequence[str], views: Sequence[str | None], groups: Sequence[Mapping[str, str]]
) -> dict[str, NDArray[np.bool_]]:
    """Return which images are in each group, bool (n,), by ``<column>=<value>``.

    An image without a value of a column is in none of its groups. Of the columns besides site and view those are left
    out that have one value, more than ``MOST_VALUES``, or the same groups as the sites.

    Args:
        sites: (n,) site of each image.
        views: (n,) view of each image, or ``None``.
        groups: (n,) further values of each image by column.
    """
    members = _members(SITE, list(sites)) | _members(VIEW, list(views))
    for column in dict.fromkeys(name for one in groups for name in one):
        values = [one.get(column) for one in groups]
        known = {value for value in values if value is not None}
        if column not in (SITE, VIEW) and 1 < len(known) <= MOST_VALUES and not _same_groups(values, sites):
            members |= _members(column, values)
    return members


def _members(column: str, values: Sequence[str | None]) -> dict[str, NDArray[np.bool_]]:
    known = _sorted({value for value in values if value is not None})
    return {f"{column}={value}": np.array([value == other for other in values]) for value in known}


def _sorted(values: Collection[str]) -> list[str]:
    """Sort values; bands of numbers by these, ``under 40`` before ``40-59``."""
    starts = {value: _BAND.match(value) for value in values}
    bands = {value: (float(start[2]), start[1] is None) for value, start in starts.items() if start}
    return sorted(values, key=lambda value: (bands[value], value)) if len(bands) == len(values) else sorted(values)


def _same_groups(values: Sequence[str | None], sites: Sequence[str]) -> bool:
    pairs = set(zip(values, sites, strict=True))
    return len(pairs) == len(set(values)) == len(set(sites))

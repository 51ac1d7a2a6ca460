"""Checks of the arguments that data modules share."""

from __future__ import annotations

from typing import Protocol

from datamodules.loading.white_level import WhiteLevel, check_white_level
from mtmedformer.errors import ConfigError


class Arguments(Protocol):
    """Arguments of a data module with ranges; `datamodules.MedicalDataModule` documents them."""

    batch_size: int
    num_workers: int
    limit: int | None
    max_quarantine_share: float
    cache_max_gb: float
    size_limits: tuple[int | None, int | None] | None
    white_level: WhiteLevel
    case: tuple[str, ...]
    case_batches: bool


def height_width(size: int | tuple[int, int]) -> tuple[int, int]:
    """Return ``image_size`` as ``(height, width)`` in pixels.

    Raises:
        ConfigError: It is neither one number nor two, or a side is below 16 pixels.
    """
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if len(sides) != 2:
        raise ConfigError(f"data.init_args.image_size is {size}; give one number or [height, width]")
    if min(sides) < 16:
        raise ConfigError(f"data.init_args.image_size is {size}; it must be at least 16")
    return (sides[0], sides[1])


def check_arguments(data: Arguments) -> None:
    """Check that every argument is in its range.

    Raises:
        ConfigError: One is not.
    """
    for name, value, least in (
        ("batch_size", data.batch_size, 1),
        ("num_workers", data.num_workers, 0),
        ("limit", data.limit, 1),
    ):
        if value is not None and value < least:
            raise ConfigError(f"data.init_args.{name} is {value}; it must be at least {least}")
    check_white_level(data.white_level)
    if data.case_batches and not data.case:
        raise ConfigError("data.init_args.case_batches needs data.init_args.case, such as [patient, laterality]")
    if not 0 <= data.max_quarantine_share <= 1:
        raise ConfigError(f"data.init_args.max_quarantine_share is {data.max_quarantine_share}; it is a share, 0 to 1")
    small, large = data.size_limits or (None, None)
    if (small or 0) < 0 or (large is not None and large < max(1, small or 0)):
        raise ConfigError(f"data.init_args.size_limits is {[small, large]}; give the smallest and the largest side")
    if data.cache_max_gb <= 0:
        raise ConfigError(f"data.init_args.cache_max_gb is {data.cache_max_gb}; it must be above 0")

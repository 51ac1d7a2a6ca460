"""What a variant's files and overrides mean, as the command line itself understands them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from mtmedformer.commands.compare.study import Study, Variant
from mtmedformer.errors import ConfigError
from mtmedformer.storage.atomic_write import whole

WITHOUT_EFFECT = {
    "default_root_dir",
    "enable_model_summary",
    "enable_progress_bar",
    "logger",
    "log_every_n_steps",
    "num_workers",
    "pin_memory",
    "cache_dir",
    "cache_max_gb",
}
"""Keys that change where a training runs and what it says, not what comes out."""


def arguments(study: Study, variant: Variant) -> list[str]:
    """Return the arguments of ``mtmedformer fit`` that train a variant."""
    files = [f"--config={file.resolve()}" for file in (*study.base, *variant.config)]
    values = {**study.overrides, **variant.overrides}
    return [*files, *(f"--{key}={_spoken(value)}" for key, value in values.items())]


def resolved(study: Study, variant: Variant) -> dict[str, Any]:
    """Return a variant's whole configuration, every default filled in; nothing is built.

    Raises:
        ConfigError: What the command line says of a mistake, and in which variant it is.
    """
    from mtmedformer.commands.lightning_cli import CommandLine

    class Reader(CommandLine):
        """A command line that stops once it has understood its arguments."""

        def before_instantiate_classes(self) -> None:
            """Claim no run folder."""

        def instantiate_classes(self) -> None:
            """Build nothing."""

        def _run_subcommand(self, subcommand: str | None) -> None:
            """Run nothing."""

        def _set_seed(self) -> None:
            """Seed nothing."""

    try:
        with _quiet():
            read = Reader(["fit", *arguments(study, variant)])
            text = read._parser("fit").dump(read.config["fit"], skip_none=False)
    except ConfigError as error:
        raise ConfigError(f"variant {variant.name}: {error}") from error
    config: dict[str, Any] = yaml.safe_load(text)
    return config


def data_sets(config: Any) -> Iterator[dict[str, Any]]:
    """Yield the arguments of every data set in a configuration of data: one, that which is cut, or each site's."""
    if isinstance(config, dict):
        arguments = config.get("init_args")
        if isinstance(arguments, dict) and "fold" in arguments and "folds" in arguments:
            yield arguments
            return
        for value in config.values():
            yield from data_sets(value)


def essence(config: Any) -> Any:
    """Return a configuration without the keys that cannot change what comes out, for its hash."""
    if isinstance(config, dict):
        return {key: essence(value) for key, value in config.items() if key not in WITHOUT_EFFECT}
    return [essence(value) for value in config] if isinstance(config, list) else config


def parse_value(text: str) -> Any:
    """Return the value of ``--set key=value`` as YAML reads it."""
    return yaml.safe_load(text)


def write_config(config: dict[str, Any], file: Path) -> None:
    """Write a configuration, whole or not at all."""
    with whole(file) as part:
        part.write_text(yaml.safe_dump(config, sort_keys=False))


def read_config(file: Path) -> dict[str, Any]:
    """Return the configuration in a file."""
    config: dict[str, Any] = yaml.safe_load(file.read_text())
    return config


def _spoken(value: Any) -> str:
    """Return a value as one writes it on the command line."""
    return value if isinstance(value, str) else json.dumps(value)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep jsonargparse from speaking of its own future."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield

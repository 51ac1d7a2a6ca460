"""Resolve the configuration of a variant with the command line of ``fit``."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.cli import LightningArgumentParser

from mtmedformer.commands.compare.study import Study, Variant
from mtmedformer.commands.lightning_cli import CommandLine
from mtmedformer.commands.yaml_files import check_keys, read_yaml
from mtmedformer.errors import ConfigError
from mtmedformer.storage.atomic_write import atomic_write

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
"""Keys of a configuration that cannot change a result: where a training runs and what it prints."""


class _Parsed(Exception):  # noqa: N818  carries a result, is no error
    """Ends a command line after its arguments were parsed; its argument is the configuration as YAML."""


class _ConfigReader(CommandLine):
    """A command line that stops after parsing: nothing is seeded, built or run."""

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the arguments and stop."""
        super().parse_arguments(parser, args)
        raise _Parsed(parser.dump(self.config, skip_none=False))


def arguments(study: Study, variant: Variant) -> list[str]:
    """Return the arguments of ``mtmedformer fit`` that train a variant."""
    files = [f"--config={file.resolve()}" for file in (*study.base, *variant.config)]
    values = {**study.overrides, **variant.overrides}
    return [*files, *(f"--{key}={_as_argument(value)}" for key, value in values.items())]


def resolved(study: Study, variant: Variant) -> dict[str, Any]:
    """Return the whole configuration of a variant with all defaults; nothing is built.

    Raises:
        ConfigError: The command line does not accept the configuration; the message names the variant.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations of jsonargparse
        try:
            _ConfigReader(["fit", *arguments(study, variant)])
        except _Parsed as parsed:
            config: dict[str, Any] = yaml.safe_load(str(parsed))["fit"]
            return config
        except ConfigError as error:
            raise ConfigError(f"variant {variant.name}: {error}") from error
    raise ConfigError(f"variant {variant.name}: its arguments were not parsed")


def data_sets(config: Any) -> Iterator[dict[str, Any]]:
    """Yield the arguments of every data set in a ``data`` section: of the one, or of each site of a federation."""
    if isinstance(config, dict):
        arguments = config.get("init_args")
        if isinstance(arguments, dict) and "fold" in arguments and "folds" in arguments:
            yield arguments
            return
        for value in config.values():
            yield from data_sets(value)


def relevant_keys(config: Any) -> Any:
    """Return a configuration without the keys that cannot change a result, to be hashed."""
    if isinstance(config, dict):
        return {key: relevant_keys(value) for key, value in config.items() if key not in WITHOUT_EFFECT}
    return [relevant_keys(value) for value in config] if isinstance(config, list) else config


def parse_value(text: str) -> Any:
    """Return the value of ``--set key=value``, read as YAML."""
    check_keys(text, f"--set {text}")
    return yaml.safe_load(text)


def write_config(config: dict[str, Any], file: Path) -> None:
    """Write a configuration file, whole or not at all."""
    with atomic_write(file) as part:
        part.write_text(yaml.safe_dump(config, sort_keys=False))


def read_config(file: Path) -> dict[str, Any]:
    """Return the content of a configuration file."""
    config: dict[str, Any] = read_yaml(file)
    return config


def _as_argument(value: Any) -> str:
    """Return a value as text of the command line."""
    return value if isinstance(value, str) else json.dumps(value)

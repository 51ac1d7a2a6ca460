"""``mtmedformer fingerprint``: describe a data set, or every site of a federation, before the first training.

Writes ``fingerprint.json`` and ``fingerprint.png`` and prints tables. They contain numbers and the names of tasks,
sites and image files, no image and no patient. Also prints and writes a configuration of ``fit`` for the set.
"""

from __future__ import annotations

import inspect
import json
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import lightning as L
import yaml
from jsonargparse import ArgumentParser
from rich.console import Console

from datamodules.base import MedicalDataModule
from federation.datamodule import FederatedDataModule
from mtmedformer.commands.fingerprint.configuration import configuration
from mtmedformer.commands.fingerprint.image_sets import read_images, read_sites
from mtmedformer.commands.fingerprint.picture import draw
from mtmedformer.commands.fingerprint.summary import Fingerprint, summarise, summarise_sites
from mtmedformer.commands.fingerprint.tables import show
from mtmedformer.commands.yaml_files import read_yaml
from mtmedformer.errors import ConfigError
from mtmedformer.plots.terminal import SafeConsole

FOLDER, CONFIG = "fingerprint", "config.yaml"
"""The default folder, and the configuration in a folder."""


def main(argv: Sequence[str]) -> int:
    """Run ``mtmedformer fingerprint --config FILE [--output DIR|FILE.yaml] [--data.init_args.KEY VALUE …]``.

    Sections of a config file other than ``data`` are not used to describe the set, so the config file of a training can
    be given; the suggested configuration keeps what they set.

    Returns:
        0; mistakes raise ``UserError``.
    """
    parser = _parser()
    with ExitStack() as stack:
        words, given = _data_sections(argv, Path(stack.enter_context(tempfile.TemporaryDirectory())))
        namespace = parser.parse_args(words)
    output = Path(namespace.output)
    folder, file = (Path(FOLDER), output) if output.suffix in (".yaml", ".yml") else (output, output / CONFIG)
    if file == output and file.exists():
        raise ConfigError(f"--output {file}: the file exists; choose another name, or remove it")
    section = _without_defaults(yaml.safe_load(parser.dump(namespace))["data"], parser)
    instantiate = getattr(parser, "instantiate", parser.instantiate_classes)  # the new name is of jsonargparse 4.49
    data, console = instantiate(namespace).data, SafeConsole(markup=True)
    text = configuration(fingerprint(data, folder, console), data, section, given, file)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--output {file}: {error.strerror or error}; choose a file that can be written") from error
    console.print("\nSuggested configuration:\n", style="bold green")
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    console.print(f"Written: {file}. Train with: mtmedformer fit --config {file}", markup=False, soft_wrap=True)
    return 0


def fingerprint(data: L.LightningDataModule, output: Path, console: Console | None = None) -> Fingerprint:
    """Measure every image of a data set or a federation, print tables, write ``fingerprint.json`` and ``.png``.

    Args:
        data: The data set or federation; set up here, its images decoded into its cache.
        output: Folder of the two files; created if needed.
        console: Where the tables are printed; the terminal by default.

    Raises:
        DataError: As ``MedicalDataModule.setup``.
        ConfigError: The data module is of another kind, or the folder cannot be created or written.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        if isinstance(data, FederatedDataModule):
            sites = read_sites(data)
            summary, facts = summarise_sites(sites, data.tasks)
        elif isinstance(data, MedicalDataModule):
            images = read_images(data)
            summary, facts = summarise(images), list(images.facts)
        else:
            raise ConfigError(
                f"fingerprint: {type(data).__name__} cannot be described; data must be a datamodules.MedicalDataModule "
                "or a federation.FederatedDataModule"
            )
        (output / "fingerprint.json").write_text(json.dumps(asdict(summary), indent=2, allow_nan=False) + "\n")
        draw(summary, facts, output / "fingerprint.png")
    except OSError as error:
        raise ConfigError(
            f"--output {output}: {error.strerror or error}; choose a folder that can be written"
        ) from error
    console = console or SafeConsole(markup=True)
    show(summary, console)
    for note in data.notes() if isinstance(data, FederatedDataModule) else ():
        console.print(f"! {note}", markup=False, soft_wrap=True)
    files = f"{output / 'fingerprint.json'} and {output / 'fingerprint.png'}"
    console.print(f"Written: {files}", markup=False, soft_wrap=True)
    return summary


class _Parser(ArgumentParser):  # type: ignore[misc, unused-ignore]
    def error(self, message: str, ex: Exception | None = None) -> Any:
        raise ConfigError(" ".join(message.split())) from ex


def _parser() -> _Parser:
    parser = _Parser(prog="mtmedformer fingerprint", description="Describe a data set before training on it.")
    parser.add_argument("--config", action="config", help="YAML file with a data section; may be given several times")
    parser.add_argument(
        "--output", type=str, default=FOLDER, help="folder of the JSON, PNG and YAML files, or the YAML file (.yaml)"
    )
    parser.add_subclass_arguments(L.LightningDataModule, "data", required=True)
    return parser


def _without_defaults(section: dict[str, Any], parser: _Parser) -> dict[str, Any]:
    """Return the description of a data module without the arguments that have their defaults."""
    arguments, home = section.get("init_args", {}), resolve_name(section["class_path"])
    defaults = {
        name: one.default
        for cls in reversed(home.__mro__)
        for name, one in inspect.signature(cls.__init__).parameters.items()
    }
    required = {key: value for key, value in arguments.items() if defaults.get(key) is inspect.Parameter.empty}
    plain = parser.parse_object({"data": {"class_path": section["class_path"], "init_args": required}})
    usual = yaml.safe_load(parser.dump(plain))["data"].get("init_args", {})
    kept = {key: value for key, value in arguments.items() if key in required or usual.get(key) != value}
    if issubclass(home, FederatedDataModule):
        if "data" in kept:
            kept["data"] = _without_defaults(kept["data"], parser)
        if "sites" in kept:
            kept["sites"] = {name: _without_defaults(one, parser) for name, one in kept["sites"].items()}
    return {"class_path": section["class_path"], "init_args": kept}


def _data_sections(argv: Sequence[str], folder: Path) -> tuple[list[str], dict[str, Any]]:
    """Replace every config file on a command line by one that contains only its ``data`` section.

    Returns:
        The command line, and the other sections of the files; of two files the later one counts.
    """
    words: list[str] = []
    others: dict[str, Any] = {}
    files = 0
    for word in argv:
        follows = words and words[-1] in ("--config", "-c")
        if not follows and not word.startswith("--config="):
            words.append("--config" if word == "-c" else word)
            continue
        file = Path(word.removeprefix("--config="))
        config = read_yaml(file)
        if not isinstance(config, dict):
            raise ConfigError(f"--config {file}: has no keys; it needs a data section, like configs/quickstart.yaml")
        section = {"data": config["data"]} if "data" in config else {}
        others = _merged(others, {key: value for key, value in config.items() if key != "data"})
        target = folder / f"{files}.yaml"
        target.write_text(yaml.safe_dump(section))
        files += 1
        words = [*words, str(target)] if follows else [*words, f"--config={target}"]
    return words, others


def _merged(first: dict[str, Any], then: dict[str, Any]) -> dict[str, Any]:
    """Return two nested mappings as one; where both have a value that is no mapping, the second counts."""
    both = {
        key: _merged(first[key], value) if isinstance(value, dict) and isinstance(first.get(key), dict) else value
        for key, value in then.items()
    }
    return first | both

"""Read YAML with one rule for every command: a key stands once in its section, since YAML keeps only the last value.

Importing this module gives the rule to jsonargparse too, for config files and values on the command line.
"""

from __future__ import annotations

import sys
from os import PathLike
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader, set_loader

from mtmedformer.errors import ConfigError

FORMER_KEYS = {"client_trainer": "site_trainer"}
"""Keys of the section ``federation`` by their former names."""

_Parser: type[Any] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_load = get_loader("yaml")


def read_yaml(file: Path) -> Any:
    """Return the content of a YAML file.

    Raises:
        ConfigError: The file cannot be read, is no YAML, or has a key twice in one section.
    """
    try:
        text = file.read_text(encoding="utf-8")
        check_keys(text, file)
        return yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{file}: cannot be read as YAML ({' '.join(str(error).split())})") from error


def check_keys(text: str, path: str | PathLike[str] = "") -> None:
    """Check that no section of a YAML text has the same key twice.

    Args:
        text: The text.
        path: Its file; empty for a value on the command line.

    Raises:
        ConfigError: A key stands twice; the message names it, its section and both lines.
        yaml.YAMLError: The text is no YAML.
    """
    if ":" not in text:
        return
    waiting: list[tuple[str, yaml.Node | None]] = [("", yaml.compose(text, Loader=_Parser))]
    seen: set[int] = set()
    while waiting:
        section, node = waiting.pop(0)
        if id(node) in seen:  # an alias
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            waiting += [(f"{section}[{i}]", part) for i, part in enumerate(node.value)]
        elif isinstance(node, yaml.MappingNode):
            _check_section(section, node, path)
            waiting += [(f"{section}.{_name(key)}".lstrip("."), value) for key, value in node.value]


def _check_section(section: str, node: yaml.MappingNode, path: str | PathLike[str]) -> None:
    lines: dict[Any, int] = {}
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
            continue
        known = (key.tag, key.value if key.tag.endswith(":str") else yaml.safe_load(key.value))  # 1 and 0x1 are one
        line = key.start_mark.line + 1
        if known in lines:
            place = f"{path}: " if path else "configuration: "
            where = f"line {line}" if lines[known] == line else f"lines {lines[known]} and {line}"
            raise ConfigError(
                f"{place}{f'{section}.{key.value}'.lstrip('.')} is given twice ({where}), and YAML would keep only the "
                "last; remove one, or give one of them another name"
            )
        lines[known] = line


def _name(key: yaml.Node) -> str:
    return str(key.value) if isinstance(key, yaml.ScalarNode) else "?"


def _checked(stream: str, path: str | PathLike[str] = "") -> Any:
    check_keys(stream, path)
    return _with_present_names(_load(stream))


def _with_present_names(values: Any) -> Any:
    """Replace the former names of keys of the section ``federation``, with a note."""
    section = values.get("federation") if isinstance(values, dict) else None
    for part in (section, section.get("init_args") if isinstance(section, dict) else None):
        for old, new in FORMER_KEYS.items():
            if isinstance(part, dict) and old in part and new not in part:
                part[new] = part.pop(old)
                print(
                    f"federation.{old} is now called federation.{new}; rename it in the configuration", file=sys.stderr
                )
    return values


set_loader("yaml", _checked, (yaml.YAMLError,))

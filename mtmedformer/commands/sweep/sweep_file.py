"""Read a W&B sweep file: the parameters to vary, the metric, and the command line of a trial."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from mtmedformer.commands.yaml_files import read_yaml
from mtmedformer.errors import ConfigError

Method = Literal["bayes", "grid", "random"]

TRIALS = 20
"""Number of trials of a sweep without ``run_cap``."""

RANGES = ("uniform", "q_uniform", "int_uniform", "log_uniform", "log_uniform_values")


@dataclass(frozen=True)
class Sweep:
    """The content of a sweep file.

    Attributes:
        name: Its ``name``, or that of the file.
        method: How parameters are chosen.
        metric: The metric to optimise, a column of ``metrics.csv``.
        maximise: Whether more of it is better.
        space: Distributions of the parameters to vary, by dotted key.
        fixed: Parameters with one value, by dotted key.
        command: The command line after the program, with ``${args}`` in place of the parameters.
        trials: Number of trials.
    """

    name: str
    method: Method
    metric: str
    maximise: bool
    space: dict[str, BaseDistribution]
    fixed: dict[str, Any]
    command: tuple[str, ...]
    trials: int

    def with_settings(self, words: Sequence[str]) -> Sweep:
        """Return the sweep with further arguments for every trial; the varied parameters override them."""
        return replace(self, command=(*self.command[:-1], *words, self.command[-1]))

    def arguments(self, parameters: Mapping[str, Any]) -> list[str]:
        """Return the command line of a trial after the program, the same as ``wandb agent`` builds."""
        flags = [f"--{key}={value}" for key, value in {**self.fixed, **parameters}.items()]
        return [word for part in self.command for word in (flags if part == "${args}" else [part])]


def read_sweep(file: Path) -> Sweep:
    """Read a sweep file.

    Raises:
        ConfigError: The file is no sweep, or uses something that Optuna does not have.
    """
    content = read_yaml(file)
    if not isinstance(content, dict) or not isinstance(content.get("parameters"), dict):
        raise ConfigError(f"--config {file}: is no sweep; it needs parameters, like configs/sweeps/loss_weights.yaml")
    method = content.get("method")
    if method not in ("bayes", "grid", "random"):
        raise ConfigError(f"{file}: method is {method!r}; choose bayes, grid or random")
    metric = content.get("metric")
    if not isinstance(metric, dict) or not metric.get("name") or metric.get("goal") not in ("minimize", "maximize"):
        raise ConfigError(f"{file}: metric is {metric!r}; write metric: {{name: val/score, goal: maximize}}")
    space, fixed = dict[str, Any](), dict[str, Any]()
    for key, spec in content["parameters"].items():
        if isinstance(spec, dict) and "value" in spec:
            fixed[key] = spec["value"]
        else:
            space[key] = _distribution(f"{file}: parameters.{key}", spec)
    if method == "grid" and (open_ended := [key for key, one in space.items() if not choices(one)]):
        raise ConfigError(f"{file}: a grid needs values: for every parameter, and {open_ended[0]} has none")
    trials = content.get("run_cap", TRIALS)
    if method == "grid":
        combinations = math.prod(len(choices(one)) for one in space.values())
        trials = min(combinations, content.get("run_cap", combinations))
    name = str(content.get("name", file.stem))
    command = _command(file, content.get("command"))
    return Sweep(name, method, metric["name"], metric["goal"] == "maximize", space, fixed, command, trials)


def choices(distribution: BaseDistribution) -> list[Any]:
    """Return the values of a parameter with ``values``, and an empty list for one with a range."""
    return list(distribution.choices) if isinstance(distribution, CategoricalDistribution) else []


def _command(file: Path, command: Any) -> tuple[str, ...]:
    """Return the command without the program itself, which here is this project's own command line."""
    words = [str(word) for word in command] if isinstance(command, list) else []
    rest = [word for word in words if word not in ("${env}", "${interpreter}", "${program}")]
    if rest[:1] != ["fit"] or rest[-1:] != ["${args}"]:
        raise ConfigError(
            f"{file}: command is {words}; it must be a list like those in configs/sweeps: ${{env}}, ${{program}}, fit, "
            'and "${args}" last, because --config overrides the arguments before it'
        )
    return tuple(rest)


def _distribution(where: str, spec: Any) -> BaseDistribution:
    if isinstance(spec, dict) and "parameters" in spec:
        raise ConfigError(f"{where}: write nested keys with dots; nested parameters would be passed as one dictionary")
    if isinstance(spec, dict) and isinstance(spec.get("values"), list) and spec["values"]:
        if not all(value is None or isinstance(value, bool | int | float | str) for value in spec["values"]):
            raise ConfigError(f"{where}: values must be numbers or text; write a list as text, '[1, 2]'")
        return CategoricalDistribution(spec["values"])
    low, high = (spec.get("min"), spec.get("max")) if isinstance(spec, dict) else (None, None)
    if not isinstance(low, int | float) or not isinstance(high, int | float) or low >= high:
        raise ConfigError(f"{where}: {spec!r} needs value, values, or min and max with min below max")
    whole = isinstance(low, int) and isinstance(high, int)
    kind = spec.get("distribution", "int_uniform" if whole else "uniform")
    if kind == "int_uniform":
        return IntDistribution(int(low), int(high))
    if kind == "log_uniform":  # whose bounds are exponents in W&B
        return FloatDistribution(math.exp(low), math.exp(high), log=True)
    if kind not in RANGES or (kind == "log_uniform_values" and low <= 0):
        raise ConfigError(
            f"{where}: distribution {kind} from {low} to {high} is not supported without W&B; choose from "
            f"{', '.join(RANGES)}"
        )
    step = float(spec.get("q", 1)) if kind == "q_uniform" else None
    return FloatDistribution(float(low), float(high), log=kind == "log_uniform_values", step=step)

"""Reading sweep files: ranges, the command line of a trial, and the messages for mistakes."""

import math

import optuna
import pytest

from mtmedformer.commands.sweep.sweep_file import read_sweep
from mtmedformer.errors import ConfigError
from tests.fixtures.sweep_files import write


def test_ranges_are_those_of_wandb(tmp_path):
    specs = {
        "a": {"min": 0.5, "max": 2.0},
        "b": {"min": 1, "max": 5},
        "c": {"distribution": "log_uniform_values", "min": 0.01, "max": 10},
        "d": {"distribution": "log_uniform", "min": -2, "max": 1},
        "e": {"distribution": "q_uniform", "min": 0, "max": 1, "q": 0.25},
        "f": {"values": [1, "x", None, True]},
        "g": {"distribution": "uniform", "min": 0, "max": 1},
    }
    space = read_sweep(write(tmp_path, parameters=specs)).space
    assert space["a"] == optuna.distributions.FloatDistribution(0.5, 2.0)
    assert space["b"] == optuna.distributions.IntDistribution(1, 5)
    assert space["c"] == optuna.distributions.FloatDistribution(0.01, 10, log=True)
    assert (space["d"].low, space["d"].high, space["d"].log) == (math.exp(-2), math.exp(1), True)
    assert space["e"].step == 0.25
    assert space["f"].choices == (1, "x", None, True)
    assert space["g"] == optuna.distributions.FloatDistribution(0, 1)


def test_the_command_line_of_a_trial(tmp_path):
    sweep = read_sweep(write(tmp_path))
    assert sweep.arguments({"model.lr": 1e-05, "model.kind": "b"}) == [
        "fit",
        "--config",
        "x.yaml",
        "--model.fixed=7",
        "--model.lr=1e-05",
        "--model.kind=b",
    ]


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"method": "genetic"}, "bayes, grid or random"),
        ({"metric": {"name": "val/score"}}, "goal: maximize"),
        ({"metric": None}, "metric is None"),
        ({"parameters": None}, "needs parameters"),
        ({"parameters": {"model": {"parameters": {"lr": {"value": 1}}}}}, "with dots"),
        ({"parameters": {"a": {"values": [[1, 2]]}}}, "write a list as text"),
        ({"parameters": {"a": {"min": 2, "max": 1}}}, "min below max"),
        ({"parameters": {"a": 3}}, "parameters.a: 3"),
        ({"parameters": {"a": {"distribution": "beta", "min": 0, "max": 1}}}, "distribution beta"),
        ({"parameters": {"a": {"distribution": "log_uniform_values", "min": 0, "max": 1}}}, "from 0 to 1"),
        ({"method": "grid"}, "a grid needs values: for every parameter, and model.lr"),
        ({"command": ["${program}", "fit", "${args}", "--config", "x"]}, "last"),
        ({"command": None}, "must be a list"),
    ],
)
def test_a_mistake_in_a_file_is_explained(tmp_path, changes, words):
    with pytest.raises(ConfigError) as error:
        read_sweep(write(tmp_path, **changes))
    assert words in str(error.value)
    assert "sweep.yaml" in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml"):
        read_sweep(tmp_path / "none.yaml")

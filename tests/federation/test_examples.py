"""The examples in the docstrings of the federation run."""

import doctest
from importlib import import_module
from pkgutil import iter_modules

import pytest

import federation

PACKAGES = ("aggregators", "alignment", "bayes", "privacy")
MODULES = [
    f"federation.{package}.{module.name}"
    for package in PACKAGES
    for module in iter_modules([f"{federation.__path__[0]}/{package}"])
]
WITH_EXAMPLES = {"bayesian", "fedavg", "fedopt", "fedprox", "robust", "server_step", "curvature", "groups"}


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_the_docstrings_run(name):
    result = doctest.testmod(import_module(name))
    assert result.failed == 0
    assert result.attempted > 0 or name.rpartition(".")[2] not in WITH_EXAMPLES

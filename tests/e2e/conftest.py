"""What the tests of the whole share."""

import pytest

from tests.fixtures.small_set import write_small_set


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of small images with one table, partly labelled."""
    return write_small_set(tmp_path_factory.mktemp("set"))

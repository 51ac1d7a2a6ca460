"""Where real images lie, for tests that need them: beside the project, or where MTMEDFORMER_DATA points."""

import os
from pathlib import Path

import pytest

ROOT = Path(os.environ.get("MTMEDFORMER_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


def real(*parts: str) -> Path:
    """Return a path under the real-data folder, or skip the test saying what is absent."""
    path = ROOT.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"real data not here: {path} (set MTMEDFORMER_DATA)")
    return path

"""The public names of ``mtmedformer`` are imported on first use."""

import subprocess
import sys

import mtmedformer


def test_every_public_name_can_be_imported():
    assert "MultiTaskModule" in mtmedformer.__all__
    for name in mtmedformer.__all__:
        assert callable(getattr(mtmedformer, name)), name


def test_importing_the_package_does_not_import_torch():
    code = "import sys, mtmedformer; mtmedformer.__version__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0

"""``python -m mtmedformer``: the command line, with the current folder importable for your own classes."""

import sys

from mtmedformer.commands.main import main

sys.exit(main())

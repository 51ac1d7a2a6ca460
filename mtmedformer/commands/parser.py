"""The parser of the tools beside Lightning's subcommands."""

from __future__ import annotations

import argparse
from typing import NoReturn

from mtmedformer.errors import ConfigError


class ToolParser(argparse.ArgumentParser):
    """Tells a mistake in one paragraph that begins with the tool's name, as the rest of the command line does."""

    def error(self, message: str) -> NoReturn:
        """Raise the mistake as a ``ConfigError``."""
        raise ConfigError(f"{self.prog.split()[-1]}: {message}")

"""The argument parser of the commands that are not subcommands of Lightning."""

from __future__ import annotations

import argparse
from typing import NoReturn

from mtmedformer.errors import ConfigError


class ToolParser(argparse.ArgumentParser):
    """Reports an error in one paragraph that begins with the name of the command."""

    def error(self, message: str) -> NoReturn:
        """Raise the error as a ``ConfigError``."""
        raise ConfigError(f"{self.prog.split()[-1]}: {message}")

"""Lightning's MLflow logger with names of metrics that a local file store of MLflow can hold."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from lightning.pytorch.loggers import MLFlowLogger
from lightning.pytorch.utilities import rank_zero_only


class NamedMLFlowLogger(MLFlowLogger):
    """Logs ``val/organ/dice/left`` as ``val/organ/dice.left``, and ``site=north`` as ``site.north``.

    In a file store a metric is a file, so that ``val/organ/dice`` and a metric below it exclude each other. A continued
    run keeps its parameters. The command line uses this class where ``MLFlowLogger`` is configured.
    """

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log metrics under their names in MLflow."""
        super().log_metrics({mlflow_name(name): value for name, value in metrics.items()}, step)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace) -> None:
        """Log the parameters of a new run; MLflow lets no run change its own, so a continued one keeps them."""
        if not self.experiment.get_run(self.run_id).data.params:
            super().log_hyperparams(params)


def mlflow_name(name: str) -> str:
    """Return the name of a metric in MLflow: at most three parts, and no character that MLflow refuses."""
    parts = name.split("/", 2)
    short = "/".join([*parts[:2], *(part.replace("/", ".") for part in parts[2:])])
    return re.sub(r"[^\w/. -]", "_", short.replace("=", "."), flags=re.ASCII)

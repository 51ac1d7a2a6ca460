"""One run in W&B for every site of a federation, in one group with the server's."""

from __future__ import annotations

import os
from typing import Any

import lightning as L
from lightning.pytorch.loggers import Logger, WandbLogger


class SiteLoggers:
    """Opens a W&B run for each site, where the server has one, and goes on with the same runs after a resume.

    Two W&B loggers of one process would share the server's run; each site's gets a run object of its own. Under a sweep
    the process owns one run id only, so there sites are logged in the server's run alone (``site/<site>/…``).
    """

    def __init__(self) -> None:
        self._group: str | None = None
        self._open: dict[str, WandbLogger] = {}

    def open(self, trainer: L.Trainer) -> None:
        """Note the server's run, on every process."""
        server = _server(trainer)
        own = str(server.version) if server is not None and trainer.is_global_zero else None
        self._group = trainer.strategy.broadcast(self._group or own)

    def get(self, trainer: L.Trainer, site: str) -> Logger | None:
        """Return a site's logger on the process that trains it; ``None`` where there is nothing to log to."""
        server = _server(trainer)
        if server is None or self._group is None or "WANDB_SWEEP_ID" in os.environ:
            return None
        if site not in self._open:
            import wandb

            run = wandb.init(
                project=server._wandb_init.get("project"),
                dir=server._wandb_init.get("dir"),
                group=self._group,
                job_type="site",
                name=site,
                id=f"{self._group}-{site}",
                resume="allow",
                reinit="create_new",
            )
            run.define_metric("trainer/global_step")
            run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
            self._open[site] = WandbLogger(experiment=run)
        return self._open[site]

    def close(self) -> None:
        """Finish the sites' runs."""
        for logger in self._open.values():
            logger.experiment.finish()
        self._open = {}

    def state_dict(self) -> dict[str, Any]:
        """Return the group the runs belong to."""
        return {"group": self._group}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Log on in the same group."""
        self._group = state["group"]


def _server(trainer: L.Trainer) -> WandbLogger | None:
    return next((logger for logger in trainer.loggers if isinstance(logger, WandbLogger)), None)

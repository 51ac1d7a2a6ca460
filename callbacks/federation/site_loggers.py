"""One W&B run per site of a federation, in the same group as the server's run."""

from __future__ import annotations

import os
from typing import Any

import lightning as L
from lightning.pytorch.loggers import Logger, WandbLogger


class SiteLoggers:
    """Opens one W&B run per site if the server has a W&B logger; after a resume the same runs are continued.

    ``WandbLogger`` would reuse the server's run in the same process, so each site's logger gets its own run object.
    A sweep gives the process one run id only: in a sweep, the sites are logged in the server's run (``site/<site>/…``).
    """

    def __init__(self) -> None:
        self._group: str | None = None
        self._open: dict[str, WandbLogger] = {}

    def open(self, trainer: L.Trainer) -> None:
        """Use the id of the server's run as the group of the sites' runs, on every process."""
        server = _server(trainer)
        own = str(server.version) if server is not None and trainer.is_global_zero else None
        self._group = trainer.strategy.broadcast(self._group or own)

    def get(self, trainer: L.Trainer, site: str) -> Logger | None:
        """Return the logger of a site, on the process that trains it; ``None`` if the site has no run of its own."""
        server = _server(trainer)
        if server is None or self._group is None or "WANDB_SWEEP_ID" in os.environ:
            return None
        if site not in self._open:
            import wandb

            run = wandb.init(
                project=server.name,  # of a WandbLogger, this is the project
                dir=server.save_dir,
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
        """Return the group of the runs."""
        return {"group": self._group}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the group, so that the same runs are continued."""
        self._group = state["group"]


def _server(trainer: L.Trainer) -> WandbLogger | None:
    return next((logger for logger in trainer.loggers if isinstance(logger, WandbLogger)), None)

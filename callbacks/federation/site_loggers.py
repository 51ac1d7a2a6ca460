"""One run per site of a federation in W&B, MLflow and TensorBoard, beside the server's run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from callbacks.run.mlflow_logger import NamedMLFlowLogger

PARENT, SITE = "mlflow.parentRunId", "mtmedformer.site"
"""Tags of a site's run in MLflow: the id of the server's run, and the name of the site."""


class SiteLoggers:
    """Opens one run per site for each logger of the server; after a resume the same runs are continued.

    - W&B: runs in the group of the server's run. ``WandbLogger`` would reuse the server's run in the same process, so
      each site's logger gets its own run object. A sweep gives the process one run id only: in a sweep, the sites are
      logged in the server's run (``site/<site>/…``).
    - MLflow: child runs of the server's run, found again by the tags ``PARENT`` and ``SITE``.
    - TensorBoard: ``sites/<site>`` in the folder of the server's run.
    """

    def __init__(self) -> None:
        self._group: str | None = None
        self._mlflow: tuple[str, str, str] | None = None
        self._tensorboard: str | None = None
        self._open: dict[str, list[Logger]] = {}

    def open(self, trainer: L.Trainer) -> None:
        """Share the identity of the server's runs with every process."""
        wandb = _server(trainer)
        own: tuple[str | None, tuple[str, str, str] | None, str | None] = (None, None, None)
        mlflow = next((one for one in trainer.loggers if isinstance(one, MLFlowLogger)), None)
        boards = [one for one in trainer.loggers if isinstance(one, TensorBoardLogger)]
        if trainer.is_global_zero:
            group = str(wandb.version) if wandb is not None else None
            own = (group, _mlflow_run(mlflow) if mlflow is not None else None, boards[0].log_dir if boards else None)
        shared = trainer.strategy.broadcast(own)
        self._group, self._mlflow, self._tensorboard = self._group or shared[0], shared[1], shared[2]

    def get(self, trainer: L.Trainer, site: str) -> list[Logger]:
        """Return the loggers of a site, on the process that trains it."""
        if site not in self._open:
            opened = (self._in_wandb(trainer, site), self._in_mlflow(site), self._in_tensorboard(site))
            self._open[site] = [logger for logger in opened if logger is not None]
        return self._open[site]

    def close(self) -> None:
        """Finish the sites' runs."""
        for loggers in self._open.values():
            for logger in loggers:
                if isinstance(logger, WandbLogger):
                    logger.experiment.finish()
                else:
                    logger.finalize("success")
        self._open = {}

    def state_dict(self) -> dict[str, Any]:
        """Return the group of the runs."""
        return {"group": self._group}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the group, so that the same runs are continued."""
        self._group = state["group"]

    def _in_wandb(self, trainer: L.Trainer, site: str) -> Logger | None:
        server = _server(trainer)
        if server is None or self._group is None or "WANDB_SWEEP_ID" in os.environ:
            return None
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
        return WandbLogger(experiment=run)

    def _in_mlflow(self, site: str) -> Logger | None:
        if self._mlflow is None:
            return None
        from mlflow.tracking import MlflowClient

        address, experiment, parent = self._mlflow
        client = MlflowClient(address)
        found = client.get_experiment_by_name(experiment)
        query = f"tags.`{PARENT}` = '{parent}' and tags.`{SITE}` = '{site}'"
        runs = client.search_runs([found.experiment_id], query) if found is not None else []
        return NamedMLFlowLogger(
            experiment_name=experiment,
            run_name=site,
            tracking_uri=address,
            tags={PARENT: parent, SITE: site},
            run_id=runs[0].info.run_id if runs else None,
        )

    def _in_tensorboard(self, site: str) -> Logger | None:
        if self._tensorboard is None:
            return None
        return TensorBoardLogger(Path(self._tensorboard), name="sites", version=site)


def _server(trainer: L.Trainer) -> WandbLogger | None:
    return next((logger for logger in trainer.loggers if isinstance(logger, WandbLogger)), None)


def _mlflow_run(logger: MLFlowLogger) -> tuple[str, str, str]:
    """Return the address, the name of the experiment and the id of the server's run."""
    client, run = logger.experiment, str(logger.run_id)
    experiment = client.get_experiment(client.get_run(run).info.experiment_id)
    return str(client.tracking_uri), str(experiment.name), run

"""Report of a federation: ``report.html`` and ``report.json`` in the run folder."""

from __future__ import annotations

import inspect
import json
import os
import sys
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities.exceptions import SIGTERMException

from callbacks.federation.callback import Federation
from callbacks.reports.environment import versions
from callbacks.reports.federation_page import federation_page
from callbacks.reports.federation_summary import FederationSummary, PartDescription
from callbacks.reports.federation_warnings import warnings_of
from mtmedformer.errors import UserError
from mtmedformer.metrics.base import TaskMetrics
from mtmedformer.module import MultiTaskModule
from mtmedformer.plots.html import write_page


class FederationReport(L.Callback):
    """Writes the report at the end of a federation: finished, interrupted or failed.

    It covers every completed round, also those before a resume. Both files are written atomically, by the first process
    alone.

    Args:
        folder: The run folder; ``None`` is the trainer's ``default_root_dir``.
    """

    def __init__(self, folder: str | None = None) -> None:
        self.folder = folder
        self.pooled: dict[int, dict[str, float]] = {}
        self.primary: dict[str, str] = {}

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the metrics of the round over all sites together."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        metrics: dict[str, Any] = dict(pl_module.val_metrics.items()) if isinstance(pl_module, MultiTaskModule) else {}
        self.primary = {task: m.primary for task, m in metrics.items() if isinstance(m, TaskMetrics)}
        values = {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("val/")}
        self.pooled[trainer.current_epoch] = {key: value for key, value in values.items() if "site" not in key}

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Write the report of a finished federation."""
        if stage == "fit":
            self._write(trainer, "finished", "")

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Write the report of the rounds completed so far; the exception is raised in any case."""
        if not any(isinstance(c, Federation) and c.state is not None for c in trainer.callbacks):  # type: ignore[attr-defined]
            return  # the run has not started
        stopped = isinstance(exception, KeyboardInterrupt | SIGTERMException)
        reason = str(exception) if isinstance(exception, UserError) else type(exception).__name__
        try:
            self._write(trainer, "interrupted" if stopped else "failed", reason)
        except OSError as error:  # a full disk must not hide the reason why the run ended
            print(f"the report cannot be written: {error.strerror}", file=sys.stderr)

    def state_dict(self) -> dict[str, Any]:
        """Return the metrics of the rounds so far, for a resumed run."""
        return {"pooled": self.pooled, "primary": self.primary}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the metrics of earlier rounds."""
        self.pooled, self.primary = dict(state_dict["pooled"]), dict(state_dict["primary"])

    def summary(self, trainer: L.Trainer, federation: Federation, state: str, reason: str) -> FederationSummary:
        """Return the course of the federation.

        Args:
            trainer: Trainer of the server.
            federation: The federation.
            state: ``finished``, ``interrupted`` or ``failed``; a final state in ``run_state.json`` takes precedence.
            reason: Reason of the state in a few words.
        """
        state, reason = self._run_state(trainer) or (state, reason)
        done = {record.round for record in federation.history}
        return FederationSummary(
            state=state,
            reason=reason,
            rounds=int(trainer.max_epochs or len(done)),
            aggregator=_description(federation.aggregator),
            options=_description(federation).options,
            primary=self.primary,
            sites=federation.holdings,
            history=federation.history,
            arrays=_array_names(federation),
            pooled={number: metrics for number, metrics in sorted(self.pooled.items()) if number in done},
            seed=os.environ.get("PL_GLOBAL_SEED"),
            versions=versions(),
        )

    def _write(self, trainer: L.Trainer, state: str, reason: str) -> None:
        federation = next((c for c in trainer.callbacks if isinstance(c, Federation)), None)  # type: ignore[attr-defined]
        if federation is None or not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        folder = Path(self.folder or trainer.default_root_dir)
        summary = self.summary(trainer, federation, state, reason)
        content = summary.to_json() | {"warnings": warnings_of(summary)}
        write_page(folder / "report.json", json.dumps(content, indent=1) + "\n")
        write_page(folder / "report.html", federation_page(summary))

    def _run_state(self, trainer: L.Trainer) -> tuple[str, str] | None:
        """Return the final state and its reason from ``run_state.json``, ``None`` where there is none."""
        file = Path(self.folder or trainer.default_root_dir, "run_state.json")
        try:
            stored = json.loads(file.read_text())
        except (OSError, ValueError):
            return None
        if stored.get("state") in (None, "running"):
            return None
        return str(stored["state"]), str(stored.get("reason", ""))


def _description(part: object) -> PartDescription:
    """Return the class of an object, and the constructor options that it keeps as attributes."""
    names = list(inspect.signature(type(part).__init__).parameters)[1:]
    values = {name: vars(part)[name] for name in names if name in vars(part)}
    plain = {k: v for k, v in values.items() if isinstance(v, str | int | float | bool | list)}
    parts = {k: type(v).__name__ for k, v in values.items() if type(v).__module__.split(".")[0] == "federation"}
    return PartDescription(type(part).__name__, plain | parts)


def _array_names(federation: Federation) -> dict[str, list[str]]:
    """Return the names of the arrays that each site with a privacy policy sent last."""
    names: dict[str, list[str]] = {}
    for record in federation.history:
        names |= {
            name: site.privacy["names"]
            for name, site in record.sites.items()
            if isinstance(site.privacy.get("names"), list)
        }
    return names

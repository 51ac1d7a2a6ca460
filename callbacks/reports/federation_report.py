"""What a federation did, for people and for programs: ``report.html`` and ``report.json`` in the run folder."""

from __future__ import annotations

import inspect
import json
import math
import os
import sys
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities.exceptions import SIGTERMException

from callbacks.federation.callback import Federation
from callbacks.reports.environment import versions
from callbacks.reports.federation_page import federation_page
from federation.server.history import RoundRecord
from mtmedformer.errors import UserError
from mtmedformer.metrics.base import TaskMetrics
from mtmedformer.plots.html import write_page

Facts = dict[str, Any]
"""Plain JSON values; no NaN, nothing of a patient."""


class FederationReport(L.Callback):
    """Writes the report once a federation ends, whether it finished, was interrupted or failed.

    It tells of every whole round, those before a resume too. Both files are replaced whole or not at all, by the first
    process alone.

    Args:
        folder: The run folder; ``None`` is the trainer's ``default_root_dir``.
    """

    def __init__(self, folder: str | None = None) -> None:
        self.folder = folder
        self.pooled: dict[int, dict[str, float]] = {}
        self.primary: dict[str, str] = {}

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remember the round's metrics over all sites together."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        metrics = getattr(pl_module, "val_metrics", {})
        self.primary = {task: m.primary for task, m in metrics.items() if isinstance(m, TaskMetrics)}
        own = {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("val/")}
        self.pooled[trainer.current_epoch] = {key: v for key, v in own.items() if "site" not in key}

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Write the report of a federation that came to its end."""
        if stage == "fit":
            self._write(trainer, "finished", "")

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Write the report as far as the federation got; the exception goes on its way whatever comes of it."""
        stopped = isinstance(exception, KeyboardInterrupt | SIGTERMException)
        words = str(exception) if isinstance(exception, UserError) else type(exception).__name__
        try:
            self._write(trainer, "interrupted" if stopped else "failed", words)
        except OSError as error:  # a full disk must not hide why the run ended
            print(f"the report cannot be written: {error.strerror}", file=sys.stderr)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to report on the earlier rounds too."""
        return {"pooled": self.pooled, "primary": self.primary}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the earlier rounds."""
        self.pooled, self.primary = dict(state_dict["pooled"]), dict(state_dict["primary"])

    def facts(self, trainer: L.Trainer, federation: Federation, state: str, reason: str) -> Facts:
        """Return everything the report tells as plain JSON values.

        Args:
            trainer: The server's Trainer.
            federation: The federation.
            state: ``finished``, ``interrupted`` or ``failed``.
            reason: Why, in a few words.
        """
        done = {record.round for record in federation.history}
        told = {
            "state": {"state": state, "reason": reason} | self._run_state(trainer),
            "rounds": {"done": len(done), "asked": int(trainer.max_epochs or len(done))},
            "aggregator": _described(federation.aggregator),
            "options": _described(federation)["options"],
            "primary": self.primary,
            "sites": [asdict(holding) for holding in federation.holdings],
            "history": [_slim(record) for record in federation.history],
            "arrays": _names(federation.history),
            "pooled": [{"round": r, "metrics": m} for r, m in sorted(self.pooled.items()) if r in done],
            "seed": os.environ.get("PL_GLOBAL_SEED"),
            "versions": versions(),
        }
        plain: Facts = _finite(told)
        return plain

    def _write(self, trainer: L.Trainer, state: str, reason: str) -> None:
        federation = next((c for c in trainer.callbacks if isinstance(c, Federation)), None)  # type: ignore[attr-defined]
        if federation is None or not trainer.is_global_zero or getattr(trainer, "fast_dev_run", False):
            return
        folder = Path(self.folder or trainer.default_root_dir)
        facts = self.facts(trainer, federation, state, reason)
        write_page(folder / "report.json", json.dumps(facts, indent=1) + "\n")
        write_page(folder / "report.html", federation_page(facts))

    def _run_state(self, trainer: L.Trainer) -> dict[str, str]:
        """Return what the federation itself says of its end, where it has said so."""
        file = Path(self.folder or trainer.default_root_dir, "run_state.json")
        try:
            said = json.loads(file.read_text())
        except (OSError, ValueError):
            return {}
        return {} if said.get("state") in (None, "running") else {k: str(said.get(k, "")) for k in ("state", "reason")}


def _described(part: object) -> Facts:
    """Return a part's class and those of its options that are plain values."""
    names = list(inspect.signature(type(part).__init__).parameters)[1:]
    values = {name: getattr(part, name) for name in names if hasattr(part, name)}
    plain = {k: v for k, v in values.items() if isinstance(v, str | int | float | bool | list)}
    parts = {k: type(v).__name__ for k, v in values.items() if type(v).__module__.split(".")[0] == "federation"}
    return {"class": type(part).__name__, "options": plain | parts}


def _slim(record: RoundRecord) -> Facts:
    """Return a round as JSON values, without the entries of every tensor, which are too many for a page."""
    sites = {}
    for name, site in record.sites.items():
        kept = {f.name: getattr(site, f.name) for f in fields(site) if f.name != "blocks"}
        kept = {key: value for key, value in kept.items() if key != "share" or value}
        kept["num_examples"] = {block: held["num_examples"] for block, held in site.blocks.items()}
        if site.privacy:
            kept["privacy"] = {k: len(v) if k == "names" else v for k, v in site.privacy.items()}
        sites[name] = kept
    return {**record.to_dict(), "sites": sites}


def _names(history: list[RoundRecord]) -> dict[str, list[str]]:
    """Return the names of the arrays that last left each site that has a privacy policy."""
    names: dict[str, list[str]] = {}
    for record in history:
        names |= {name: site.privacy["names"] for name, site in record.sites.items() if site.privacy}
    return names


def _finite(value: Any) -> Any:
    """Replace what JSON has no number for by ``None``, at any depth."""
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

"""What the model is at the start: a table of its parts with their sizes, and a file with a hash of each part."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelSummary
from rich.table import Table
from torch import Tensor, nn

from mtmedformer.module import MultiTaskModule
from mtmedformer.plots.terminal import SafeConsole
from mtmedformer.storage.hashing import state_hash


class PartsSummary(ModelSummary):
    """Prints one line for the encoder and one per head: kind, classes, parameters; then the reports of weight files."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the table on the first process; another module than ``MultiTaskModule`` gets Lightning's summary."""
        if not trainer.is_global_zero or not isinstance(pl_module, MultiTaskModule):
            super().on_fit_start(trainer, pl_module)
            return
        table = Table("part", "kind: classes", "parameters", pad_edge=False)
        table.columns[2].justify = "right"
        encoder = pl_module.encoder
        table.add_row("encoder", encoder.name, f"{_size(encoder):,}")
        for name, task in pl_module.tasks.items():
            table.add_row(
                name,
                f"{task.kind}: {', '.join(task.classes) or task.unit}".rstrip(": "),
                f"{_size(pl_module.heads[name]):,}",
            )
        table.add_row("all", "", f"{_size(pl_module):,}")
        SafeConsole().print(table)
        for report in (getattr(encoder, "report", None), pl_module.weights_report):
            if report is not None:
                print(report)  # which tensors ``encoder.checkpoint_path`` and ``init_weights`` filled


class StartWeights(Callback):
    """Writes ``start_weights.json``: a hash and the number of weights of every part, before the first step.

    Parts are the encoder and each head. With it ``compare`` checks that runs started from the same weights. A resumed
    run keeps the file of its start.

    Args:
        folder: Folder of the file; ``None`` is the trainer's ``default_root_dir``.
    """

    def __init__(self, folder: str | None = None) -> None:
        self.folder = folder
        self._parts: dict[str, dict[str, Any]] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Hash the weights as built, before a checkpoint is loaded."""
        parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
        if stage != "fit" or not trainer.is_global_zero:
            return
        for name, weight in pl_module.named_parameters():
            words = name.split(".")
            if words[0] == "loss":  # its weights are not random, and differ with the weighting
                continue
            parts[".".join(words[:2]) if words[0] == "heads" else words[0]][name] = weight.detach()
        self._parts = {part: _described(weights) for part, weights in parts.items()}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file, unless this run is resumed."""
        file = Path(self.folder or trainer.default_root_dir, "start_weights.json")
        if trainer.is_global_zero and not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(self._parts, indent=1) + "\n")


def _described(weights: dict[str, Tensor]) -> dict[str, Any]:
    return {"hash": state_hash(weights)[:24], "weights": sum(weight.numel() for weight in weights.values())}


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)

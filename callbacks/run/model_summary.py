"""Says before training how large the shared encoder and each head are, and what a file of weights filled."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelSummary
from rich.console import Console
from rich.table import Table
from torch import nn


class PartsSummary(ModelSummary):
    """Prints one line for the encoder and one for each head: kind, classes and parameters; then reports of weights."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the table on the first process."""
        heads, encoder = getattr(pl_module, "heads", None), getattr(pl_module, "encoder", None)
        if not trainer.is_global_zero or not isinstance(heads, nn.ModuleDict) or not isinstance(encoder, nn.Module):
            super().on_fit_start(trainer, pl_module)
            return
        table = Table("part", "what it is", "parameters", pad_edge=False)
        table.columns[2].justify = "right"
        table.add_row("encoder", str(getattr(encoder, "name", type(encoder).__name__)), f"{_size(encoder):,}")
        for name, head in heads.items():
            what = f"{getattr(head, 'kind', '')}: {', '.join(getattr(head, 'classes', ()))}"
            table.add_row(name, what, f"{_size(head):,}")
        table.add_row("all", "", f"{_size(pl_module):,}")
        Console().print(table)
        for report in (getattr(encoder, "report", None), getattr(pl_module, "weights_report", None)):
            if report is not None:
                print(report)  # what ``encoder.checkpoint_path`` and ``init_weights`` filled, and what not


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)

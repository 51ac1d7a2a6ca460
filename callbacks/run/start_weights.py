"""Notes what a run starts from, so that it can be shown that runs which are compared started alike."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor


class StartWeights(Callback):
    """Writes ``start_weights.json``: a hash and the number of weights of every part, before the first step.

    Parts are the encoder and each head. A run that is resumed keeps the note of its start.

    Args:
        folder: Where the file goes; ``None`` is the trainer's ``default_root_dir``.
    """

    def __init__(self, folder: str | None = None) -> None:
        self.folder = folder

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Hash the weights as they were built."""
        file = Path(self.folder or trainer.default_root_dir, "start_weights.json")
        if stage != "fit" or not trainer.is_global_zero or file.exists():
            return
        parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for name, weight in pl_module.named_parameters():
            words = name.split(".")
            if words[0] == "loss":  # its weights are no drawn ones, and differ with the weighting
                continue
            parts[".".join(words[:2]) if words[0] == "heads" else words[0]][name] = weight.detach()
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({part: _described(weights) for part, weights in parts.items()}, indent=1) + "\n")


def _described(weights: dict[str, Tensor]) -> dict[str, Any]:
    digest = hashlib.blake2b(digest_size=12)
    for name, weight in sorted(weights.items()):
        digest.update(f"{name}{tuple(weight.shape)}".encode())
        digest.update(weight.cpu().contiguous().numpy().tobytes())
    return {"hash": digest.hexdigest(), "weights": sum(weight.numel() for weight in weights.values())}

"""Heat maps of attention and Grad-CAM, written beside the predictions of ``mtmedformer predict``."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from callbacks.prediction.prediction_folder import PredictionFolder, predictions_root
from mtmedformer.batch import Batch
from mtmedformer.errors import ConfigError
from mtmedformer.heads.base import TaskHead
from mtmedformer.inference.gradcam import attention_map, grad_cam
from mtmedformer.inference.results import NOTE
from mtmedformer.module import MultiTaskModule
from mtmedformer.plots.heatmaps import HeatMap, maps_figure
from mtmedformer.plots.style import picture_of
from mtmedformer.storage.atomic_write import atomic_write


class Explanations(Callback):
    """Writes ``explanations/<image>.png``: attention maps of heads that pool by attention, and Grad-CAM on request.

    The whole image passes through the model once more, also where predictions are made in tiles.

    Args:
        attention: Draw attention maps.
        grad_cam: Heads with a Grad-CAM map per class; each map costs one backward pass of the head.
        folder: Folder of the predictions; ``null`` is the folder of the ``PredictionWriter``.

    Raises:
        ConfigError: There is nothing to draw.
    """

    def __init__(self, attention: bool = True, grad_cam: list[str] | None = None, folder: str | None = None) -> None:
        self.attention, self.grad_cam, self.root = attention, list(grad_cam or []), folder
        if not attention and not grad_cam:
            raise ConfigError("Explanations: nothing to draw; set attention to true or name a head in grad_cam")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the names of the heads.

        Raises:
            ConfigError: The model has no head of a given name.
        """
        if stage != "predict":
            return
        if not isinstance(pl_module, MultiTaskModule):
            raise ConfigError(f"Explanations: a {type(pl_module).__name__} has no heads; use a MultiTaskModule")
        if pl_module.members:
            raise ConfigError("Explanations: draws the maps of one model; give --ckpt_path one checkpoint")
        unknown = sorted(set(self.grad_cam) - set(pl_module.heads))
        if unknown:
            raise ConfigError(f"Explanations.grad_cam: there is no head {', '.join(unknown)}; heads are "
                              f"{', '.join(pl_module.heads)}")  # fmt: skip

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int, *args: Any
    ) -> None:
        """Draw the maps of a batch."""
        assert isinstance(pl_module, MultiTaskModule)
        maps = self.maps(pl_module, batch.image)
        folder = PredictionFolder(predictions_root(trainer, self.root))
        for i, meta in enumerate(batch.meta):
            drawn = {title: HeatMap(values[i].float().cpu().numpy()) for title, values in maps.items()}
            if drawn:
                picture = picture_of(batch.image[i])
                footer = "each map is scaled to its own maximum in this image"
                with atomic_write(folder.path("explanations", meta.id, ".png")) as file:
                    maps_figure(picture, drawn, meta, footer).savefig(
                        file, dpi=110, format="png", metadata={"Description": NOTE}
                    )

    def maps(self, module: MultiTaskModule, image: Tensor) -> dict[str, Tensor]:
        """Compute the maps of a batch, float32 (B, H, W) in [0, 1], by title.

        Args:
            module: The model.
            image: float (B, C, H, W) in [0, 1].
        """
        size = (int(image.shape[-2]), int(image.shape[-1]))
        maps: dict[str, Tensor] = {}
        if self.attention:
            with torch.no_grad():
                outputs = module(image)
            for name, head in module.heads.items():
                assert isinstance(head, TaskHead)
                values = attention_map(head, outputs[name], size)
                if values is not None:
                    maps[f"{name}: attention"] = values
        for name in self.grad_cam:
            task = module.tasks[name]
            titles = [name] if task.kind == "regression" else [f"{name}: {c}" for c in task.classes]  # one for a number
            for label, title in enumerate(titles):
                maps[f"{title} (Grad-CAM)"] = grad_cam(module, image, name, label)
        return maps

"""Pictures of predictions and truth during training, in the run folder, in W&B, in MLflow and in TensorBoard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger, WandbLogger
from PIL import Image

from callbacks.reports.shown_images import ShownImages
from mtmedformer.batch import Batch, DetectionTarget, SegmentationTarget, Task
from mtmedformer.plots.overlays import overlay_figure
from mtmedformer.plots.style import picture_of


class Overlays(Callback):
    """Draws validation images with truth and predictions every few epochs.

    Args:
        folder: The run folder; pictures are in ``overlays/``. ``None`` is the trainer's ``default_root_dir``.
        images: Images per picture; more, up to 12, where they do not show every class; 0 turns the callback off.
        every_n_epochs: Epochs between two pictures; the last epoch always has one.
        score: Boxes below this score are not drawn.
    """

    def __init__(self, folder: str | None = None, images: int = 4, every_n_epochs: int = 5, score: float = 0.4) -> None:
        self.folder = folder
        self.images, self.every_n_epochs, self.score = images, every_n_epochs, score
        self._shown: ShownImages | None = None

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int, *args: Any
    ) -> None:
        """Keep images of every class, with the most labelled tasks and findings, from as many sites as possible."""
        if self._due(trainer):
            if self._shown is None:
                self._shown = ShownImages(pl_module.tasks, self.images)  # type: ignore[arg-type]
            self._shown.add(batch)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the selected images."""
        images, self._shown = self._shown.chosen() if self._shown else [], None
        if not images or not trainer.is_global_zero:
            return
        tasks: dict[str, Task] = pl_module.tasks  # type: ignore[assignment]
        with torch.no_grad():
            predictions = [pl_module.predict(batch.image) for batch in images]  # type: ignore[operator]
        picture = self._save(trainer, images, predictions, tasks)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                _to_wandb(logger, images, predictions, tasks, self.score)
            elif isinstance(logger, MLFlowLogger):
                logger.experiment.log_artifact(logger.run_id, str(picture), "overlays")
            elif isinstance(logger, TensorBoardLogger):
                pixels = np.asarray(Image.open(picture).convert("RGB"))
                logger.experiment.add_image("overlays", pixels, trainer.global_step, dataformats="HWC")

    def _due(self, trainer: Trainer) -> bool:
        last = trainer.max_epochs is not None and trainer.current_epoch + 1 == trainer.max_epochs
        return bool(
            self.images
            and not trainer.sanity_checking
            and not trainer.fast_dev_run  # type: ignore[attr-defined]
            and (last or (trainer.current_epoch + 1) % self.every_n_epochs == 0)
        )

    def _save(
        self, trainer: Trainer, images: list[Batch], predictions: list[dict[str, Any]], tasks: dict[str, Task]
    ) -> Path:
        folder = Path(self.folder or trainer.default_root_dir, "overlays")
        folder.mkdir(parents=True, exist_ok=True)
        with mpl.rc_context({"backend": "agg"}):
            figure = overlay_figure(images, predictions, tasks, self.score)
            figure.savefig(file := folder / f"epoch_{trainer.current_epoch + 1:03d}.png", dpi=110)
            plt.close(figure)
        return file


def _to_wandb(
    logger: WandbLogger,
    images: list[Batch],
    predictions: list[dict[str, Any]],
    tasks: dict[str, Task],
    score: float,
) -> None:
    import wandb  # here, because it is an optional dependency

    pictures = []
    for batch, predicted in zip(images, predictions, strict=True):
        masks: dict[str, Any] = {}
        boxes: dict[str, Any] = {}
        for name, task in tasks.items():
            target, names = batch.targets[name], dict(enumerate(task.classes, start=1))
            if isinstance(target, SegmentationTarget):
                masks[f"{name}_prediction"] = _wandb_mask(predicted[name][0] >= 0.5, names)
                if bool(target.present[0]):
                    masks[f"{name}_truth"] = _wandb_mask(target.masks[0] == 1, names)
            elif isinstance(target, DetectionTarget):
                detected = predicted[name][0]
                kept = detected["scores"] >= score
                detected = {key: detected[key][kept] for key in ("boxes", "labels", "scores")}
                boxes[f"{name}_prediction"] = _wandb_boxes(
                    detected["boxes"], detected["labels"], names, detected["scores"]
                )
                if bool(target.present[0]):
                    boxes[f"{name}_truth"] = _wandb_boxes(target.boxes[0], target.labels[0], names, None)
        picture = (picture_of(batch.image[0]) * 255).astype(np.uint8)
        pictures.append(wandb.Image(picture, masks=masks or None, boxes=boxes or None, caption=batch.meta[0].site))
    logger.experiment.log({"overlays": pictures}, commit=False)


def _wandb_mask(channels: torch.Tensor, names: dict[int, str]) -> dict[str, Any]:
    """Flatten channels (K, H, W) into one label map; where classes overlap, the last one is shown."""
    flat = torch.zeros(channels.shape[-2:], dtype=torch.uint8)
    for k, channel in enumerate(channels.cpu(), start=1):
        flat[channel.bool()] = k
    return {"mask_data": flat.numpy(), "class_labels": {0: "background", **names}}


def _wandb_boxes(
    boxes: torch.Tensor, labels: torch.Tensor, names: dict[int, str], scores: torch.Tensor | None
) -> dict[str, Any]:
    data = [
        {
            "position": {"minX": box[0], "minY": box[1], "maxX": box[2], "maxY": box[3]},
            "domain": "pixel",
            "class_id": int(label) + 1,
            "box_caption": names[int(label) + 1],
            **({"scores": {"score": float(scores[k])}} if scores is not None else {}),
        }
        for k, (box, label) in enumerate(zip(boxes.tolist(), labels.tolist(), strict=True))
    ]
    return {"box_data": data, "class_labels": names}

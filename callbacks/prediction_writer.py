"""Writes predictions of ``mtmedformer predict`` in the frame of the original images: CSV, COCO JSON, mask PNG."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image
from scipy.ndimage import affine_transform
from torch import Tensor

from mtmedformer.batch import Batch, Meta, Task


class PredictionWriter(Callback):
    """Writes each batch's predictions as they come, so that memory does not grow with the data set.

    ``predictions.csv`` has one row an image (class probabilities, number of boxes, mask areas in pixels and, where the
    spacing is known, in mm²), ``boxes.json`` the boxes as COCO results, ``masks/<task>/`` one PNG an image and class.

    Args:
        folder: The run folder; everything goes to ``predictions/`` in it.
        score: Boxes below this score are neither counted in the CSV nor written to JSON.
    """

    def __init__(self, folder: str | None = None, score: float = 0.05) -> None:
        self.root, self.score = folder, score
        self._rows: list[dict[str, Any]] = []
        self._boxes: list[dict[str, Any]] = []

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start with empty tables."""
        self._rows, self._boxes = [], []

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int, *args: Any
    ) -> None:
        """Map a batch's predictions to the original frames and write its masks."""
        tasks: dict[str, Task] = pl_module.tasks  # type: ignore[assignment]
        for i, meta in enumerate(batch.meta):
            row: dict[str, Any] = {"image": meta.id, "site": meta.site, "note": "research use only"}
            for name, task in tasks.items():
                if task.kind == "classification":
                    probabilities = outputs[name][i].float().tolist()
                    row |= {f"{name}:{c}": f"{p:.4f}" for c, p in zip(task.classes, probabilities, strict=True)}
                elif task.kind == "detection":
                    row[f"{name}:boxes"] = self._keep_boxes(outputs[name][i], meta, name, task)
                else:
                    row |= self._write_masks(trainer, outputs[name][i], meta, name, task)
            self._rows.append(row)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the tables."""
        if not self._rows:
            return
        folder, rank = self._folder(trainer), f"_{trainer.global_rank}" if trainer.world_size > 1 else ""
        with (folder / f"predictions{rank}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(self._rows[0]))
            writer.writeheader()
            writer.writerows(self._rows)
        (folder / f"boxes{rank}.json").write_text(json.dumps(self._boxes, indent=1) + "\n")

    def _folder(self, trainer: Trainer) -> Path:
        folder = Path(self.root or trainer.default_root_dir, "predictions")
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _keep_boxes(self, found: dict[str, Tensor], meta: Meta, name: str, task: Task) -> int:
        kept = found["scores"] >= self.score
        boxes = to_original(found["boxes"][kept].cpu().numpy(), meta)
        for box, score, label in zip(
            boxes, found["scores"][kept].tolist(), found["labels"][kept].tolist(), strict=True
        ):
            x0, y0, x1, y1 = (round(float(v), 2) for v in box)
            self._boxes.append(
                {
                    "image_id": meta.id,
                    "task": name,
                    "category_id": int(label) + 1,
                    "category": task.classes[int(label)],
                    "bbox": [x0, y0, round(x1 - x0, 2), round(y1 - y0, 2)],
                    "score": round(float(score), 4),
                }
            )
        return len(boxes)

    def _write_masks(self, trainer: Trainer, masks: Tensor, meta: Meta, name: str, task: Task) -> dict[str, Any]:
        folder = self._folder(trainer) / "masks" / name
        folder.mkdir(parents=True, exist_ok=True)
        row: dict[str, Any] = {}
        for c, channel in zip(task.classes, masks.float().cpu().numpy(), strict=True):
            mask = mask_to_original(channel, meta) >= 0.5
            file = re.sub(r"[^\w.-]+", "_", f"{meta.id}_{c}") + ".png"
            Image.fromarray(mask.astype(np.uint8) * 255).save(folder / file)
            row[f"{name}:{c}:pixels"] = int(mask.sum())
            if meta.spacing:
                row[f"{name}:{c}:mm2"] = f"{mask.sum() * meta.spacing[0] * meta.spacing[1]:.1f}"
        return row


def to_original(boxes: npt.NDArray[Any], meta: Meta) -> npt.NDArray[np.float64]:
    """Map boxes (N, 4) xyxy from the network's input to the original frame, clipped to it."""
    a, b, c, d, e, f = meta.to_original
    height, width = meta.original_size
    corners = boxes.astype(np.float64).reshape(-1, 2, 2)
    x = a * corners[..., 0] + b * corners[..., 1] + c
    y = d * corners[..., 0] + e * corners[..., 1] + f
    lower, upper = np.stack([x.min(1), y.min(1)], axis=1), np.stack([x.max(1), y.max(1)], axis=1)
    limit = np.array([width, height], dtype=np.float64)
    return np.concatenate([lower.clip(0, limit), upper.clip(0, limit)], axis=1)


def mask_to_original(channel: npt.NDArray[np.float32], meta: Meta) -> npt.NDArray[np.float32]:
    """Resample a probability map (h, w) of the network's input into the original frame (H, W), zero outside."""
    a, b, c, d, e, f = meta.to_original
    forward = np.array([[a, b, c], [d, e, f], [0, 0, 1]])
    inverse = np.linalg.inv(forward)  # original corner coordinates -> input corner coordinates
    swap = np.array([[0, 1, 0], [1, 0, 0], [0, 0, 1]])
    half = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])  # pixel index -> corner coordinate of its centre
    rows = swap @ np.linalg.inv(half) @ inverse @ half @ swap
    out: npt.NDArray[np.float32] = affine_transform(
        channel, rows[:2, :2], offset=rows[:2, 2], output_shape=meta.original_size, order=1, mode="constant"
    )
    return out

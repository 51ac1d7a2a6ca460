"""Prediction of an image by a trained module: in one pass, in windows, or with mirrored images."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from mtmedformer.errors import ConfigError
from mtmedformer.inference.tiling import predict_tiled
from mtmedformer.protocols import PredictingModule


@dataclass(frozen=True)
class TiledPredictor:
    """Predict in sliding windows, averaged with the left-right mirror if configured; without either, in one pass.

    Attributes:
        tile: ``(height, width)`` of the window; ``None`` predicts every image as a whole.
        overlap: Overlap of neighbouring windows as a share of the window, in [0, 1).
        flip_tta: Whether to average over each window and its mirror.

    Raises:
        ConfigError: When a number is out of its range.
    """

    tile: tuple[int, int] | None = None
    overlap: float = 0.25
    flip_tta: bool = False

    def __post_init__(self) -> None:
        if self.tile is not None and min(self.tile) < 1:
            raise ConfigError(f"model.tile is {list(self.tile)}; height and width must be at least 1 pixel")
        if not 0 <= self.overlap < 1:
            raise ConfigError(f"model.overlap is {self.overlap}; it must be in [0, 1)")

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that change predictions."""
        tile = None if self.tile is None else list(self.tile)
        return {"tile": tile, "overlap": self.overlap, "flip_tta": self.flip_tta, "sampling": None}

    def predict(self, module: PredictingModule, image: Tensor, raw: bool = False) -> dict[str, Any]:
        """Return the predictions by task; see ``mtmedformer.protocols.PredictionStrategy``."""
        predict = partial(module.predict, raw=raw)
        if self.tile is None and not self.flip_tta:
            return predict(image)
        tasks = module.tasks
        if raw:
            calibrated = [name for name, one in module.calibration.items() if one.temperature is not None]
            tasks |= {f"raw/{name}": tasks[name] for name in calibrated if name in tasks}
        tile = self.tile or (int(image.shape[-2]), int(image.shape[-1]))
        return predict_tiled(predict, image, tasks, tile, overlap=self.overlap, flip_tta=self.flip_tta)

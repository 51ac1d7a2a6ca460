"""Predict with samples of a federation's posterior, and write the uncertainty of the predictions."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from callbacks.federation.console import print_line
from callbacks.federation.tune_posterior import FILE
from callbacks.prediction.prediction_folder import PredictionFolder, predictions_root
from federation.bayes.posterior import Posterior
from federation.bayes.sampling import BOX_SCORE, Sampled, SampledModel
from federation.client.train import state_of
from mtmedformer.batch import Batch, Meta, Task
from mtmedformer.errors import ConfigError
from mtmedformer.geometry import boxes_in_original
from mtmedformer.inference.results import NOTE, UNCERTAINTY, inside_original
from mtmedformer.module import MultiTaskModule
from mtmedformer.plots.heatmaps import HeatMap, maps_figure
from mtmedformer.plots.style import picture_of
from mtmedformer.protocols import PredictingModule, PredictionStrategy
from mtmedformer.storage.atomic_write import atomic_write


class PosteriorPredictor:
    """Averages the predictions of another predictor over samples of the weights.

    Args:
        inner: Predicts with the current weights of the module.
        settings: Number of samples and scale by task.

    Attributes:
        model: The samples, once the weights are loaded.
        sampled: Predictions and uncertainties of the last batch.
    """

    def __init__(self, inner: PredictionStrategy, settings: dict[str, Any]) -> None:
        self.inner, self.sampling = inner, settings
        self.model: SampledModel | None = None
        self.sampled: Sampled | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that change predictions."""
        return dict(self.inner.settings) | {"sampling": self.sampling}

    def predict(self, module: PredictingModule, image: Tensor, raw: bool = False) -> dict[str, Any]:
        """Return the mean predictions by task; see ``mtmedformer.protocols.PredictionStrategy``."""
        if self.model is None:
            raise RuntimeError("the posterior is sampled once the test or prediction has started")
        self.sampled = self.model(lambda part: self.inner.predict(module, part, raw), image)
        return self.sampled.predictions


class PosteriorPrediction(Callback):
    """Averages the predictions of ``test`` and ``predict`` over samples of the posterior, and writes their uncertainty.

    Reads the ``posterior.safetensors`` that ``TunePosterior`` wrote for the weights of ``--ckpt_path``. A task for
    which tuning refused sampling is predicted by the mean model, bit for bit. ``predict`` adds columns with entropy and
    mutual information (nats), and writes both for every box to ``uncertainty/<image>.json``.

    Args:
        samples: Samples per prediction; each is one forward pass for every distinct scale.
        maps: Also draw ``uncertainty/<image>.png``: both for every pixel of the masks.
        posterior: The file; ``null`` is that of the run folder.
        folder: Folder of the predictions; ``null`` is that of the run.
    """

    def __init__(
        self, samples: int = 8, maps: bool = False, posterior: str | None = None, folder: str | None = None
    ) -> None:
        if samples < 1:
            raise ConfigError(f"PosteriorPrediction.samples={samples} must be at least 1")
        self.samples, self.maps, self.file, self.root = samples, maps, posterior, folder
        self._posterior: Posterior | None = None
        self._predictor: PosteriorPredictor | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Read the posterior.

        Raises:
            ConfigError: There is none, or sampling was refused for every task.
        """
        if stage not in ("test", "predict"):
            return
        if not isinstance(pl_module, MultiTaskModule):
            raise ConfigError(f"PosteriorPrediction: a {type(pl_module).__name__} has no tasks")
        if pl_module.members:
            raise ConfigError("PosteriorPrediction: samples one model; give --ckpt_path one checkpoint")
        file = Path(self.file or Path(trainer.default_root_dir, FILE))
        if not file.is_file():
            raise ConfigError(
                f"PosteriorPrediction: {file} is not there; fit the federation with --trainer.callbacks+=TunePosterior"
            )
        self._posterior = Posterior.load(file)
        tasks = self._posterior.tuning.get("tasks", {})
        if not any(one["scale"] for one in tasks.values()):
            reasons = "; ".join(f"{name}: {one['message']}" for name, one in tasks.items()) or "it was never tuned"
            raise ConfigError(
                f"PosteriorPrediction: {file.name} cannot be used: {reasons}. Predict without this callback."
            )
        settings = {"samples": self.samples, "scales": {name: one["scale"] for name, one in tasks.items()}}
        self._predictor = PosteriorPredictor(pl_module.predictor, settings)
        pl_module.predictor = self._predictor

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Replace the mean model by samples."""
        self._start(trainer, pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Replace the mean model by samples."""
        self._start(trainer, pl_module)

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int, *args: Any
    ) -> None:
        """Write the uncertainty of the boxes of a batch and, with ``maps``, of its pixels."""
        assert isinstance(pl_module, MultiTaskModule)
        assert self._predictor is not None
        assert self._predictor.sampled is not None
        tasks, sampled = pl_module.tasks, self._predictor.sampled
        uncertainties = [image_doubts(sampled, tasks, i, meta) for i, meta in enumerate(batch.meta)]
        outputs[UNCERTAINTY] = {
            name: {key: torch.tensor([one[name][key] for one in uncertainties]) for key in measures}
            for name, measures in (uncertainties[0] if uncertainties else {}).items()
        }
        folder = PredictionFolder(predictions_root(trainer, self.root))
        for i, meta in enumerate(batch.meta):
            with atomic_write(folder.path("uncertainty", meta.id, ".json")) as file:
                file.write_text(json.dumps(_facts(sampled, tasks, i, meta), indent=1) + "\n")
            maps = _maps(sampled, tasks, i) if self.maps else {}
            if maps:
                picture = picture_of(batch.image[i])
                footer = "entropy: all uncertainty; mutual information: the part that the samples disagree about"
                with atomic_write(folder.path("uncertainty", meta.id, ".png")) as file:
                    maps_figure(picture, maps, meta, footer).savefig(
                        file, dpi=110, format="png", metadata={"Description": NOTE}
                    )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the module its previous predictor back."""
        if self._predictor is not None and isinstance(pl_module, MultiTaskModule):
            pl_module.predictor = self._predictor.inner
            self._predictor = None

    def _start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, MultiTaskModule)
        posterior = self._posterior
        assert posterior is not None
        own = state_of(pl_module)
        if own.keys() != posterior.mean.keys() or any(not torch.equal(own[k], posterior.mean[k]) for k in own):
            raise ConfigError(
                "PosteriorPrediction: the posterior belongs to other weights than --ckpt_path; give the checkpoint it "
                "was tuned for (TunePosterior.checkpoint, best.ckpt by default)"
            )
        tuning = posterior.tuning
        if trainer.is_global_zero:
            for name, one in tuning["tasks"].items():
                print_line(trainer, f"{name}: {one['message']}")
        scales = {name: float(one["scale"]) for name, one in tuning["tasks"].items()}
        assert self._predictor is not None
        self._predictor.model = SampledModel(
            pl_module, posterior, scales, self.samples, tuning["seed"], tuning["blocks"]
        )


def image_doubts(sampled: Sampled, tasks: Mapping[str, Task], i: int, meta: Meta) -> dict[str, dict[str, float]]:
    """Return entropy and mutual information of one image by task that was sampled, in nats.

    For masks it is the mean over the pixels inside the original image, for independent classes the mean over the
    classes, for boxes the mean over those with a score of at least 0.05, 0 without such a box.

    Args:
        sampled: Predictions and uncertainties of its batch.
        tasks: All tasks.
        i: Number of the image in the batch.
        meta: Its identity and geometry.
    """
    found: dict[str, dict[str, float]] = {}
    for name, measured in sampled.uncertainties.items():
        values = {"entropy": measured.entropy[i], "mutual_information": measured.mutual_information[i]}
        if tasks[name].kind == "segmentation":
            within = inside_original(meta, (int(measured.mean.shape[-2]), int(measured.mean.shape[-1])))
            values = {key: value.cpu()[..., within] for key, value in values.items()}
        found[name] = {key: float(value.mean()) for key, value in values.items()}
    for name, task in tasks.items():
        if task.kind == "detection" and sampled.predictions[name] and "entropy" in sampled.predictions[name][i]:
            boxes = sampled.predictions[name][i]
            seen = boxes["scores"] >= BOX_SCORE
            keys = ("entropy", "mutual_information")
            found[name] = {key: float(boxes[key][seen].mean()) if seen.any() else 0.0 for key in keys}
    return found


def _facts(sampled: Sampled, tasks: Mapping[str, Task], i: int, meta: Meta) -> dict[str, Any]:
    """Return the contents of ``uncertainty/<image>.json``."""
    boxes = []
    for name, task in tasks.items():
        found = sampled.predictions[name][i] if task.kind == "detection" else {}
        if "entropy" in found:
            places = boxes_in_original(found["boxes"].float().cpu().numpy(), meta).round(2).tolist()
            numbers = zip(
                *(found[k].tolist() for k in ("labels", "scores", "entropy", "mutual_information")), strict=True
            )
            for xyxy, (label, score, entropy, mutual) in zip(places, numbers, strict=True):
                if score >= BOX_SCORE:
                    own = {"score": score, "entropy": entropy, "mutual_information": mutual}
                    boxes.append({"task": name, "class": task.classes[label], "xyxy": xyxy, **own})
    return {
        "image": meta.id,
        "note": NOTE,
        "unit": "nats",
        "tasks": image_doubts(sampled, tasks, i, meta),
        "boxes": boxes,
    }


def _maps(sampled: Sampled, tasks: Mapping[str, Task], i: int) -> dict[str, HeatMap]:
    """Return the maps of the masks of an image: one per independent class, or one over all exclusive classes."""
    found: dict[str, HeatMap] = {}
    for name, measured in sampled.uncertainties.items():
        if tasks[name].kind == "segmentation":
            names = tasks[name].classes if measured.entropy.ndim == 4 else ("",)
            top = math.log(2) if measured.entropy.ndim == 4 else math.log(len(tasks[name].classes) + 1)
            for words, values in (("entropy", measured.entropy), ("mutual information", measured.mutual_information)):
                channels = values[i].float().cpu().numpy().reshape(len(names), *values.shape[-2:])
                for c, channel in zip(names, channels, strict=True):
                    title = f"{name}: {words}" if c in ("", name) else f"{name}: {c}, {words}"
                    highest = top if words == "entropy" else max(float(channel.max()), 1e-3)
                    found[title] = HeatMap(channel, highest, "nats")
    return found

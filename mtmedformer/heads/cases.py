"""Classification of a case (an exam, a breast, both breasts) with attention over its images."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import override

from mtmedformer.batch import ClassificationTarget, Target
from mtmedformer.errors import ConfigError
from mtmedformer.heads.capabilities import GroupsImages
from mtmedformer.heads.classification import ClassificationHead, ClassificationOutputs
from mtmedformer.losses.classification import ClassLoss
from mtmedformer.metrics.cases import CasedData, CaseRule, plain_name


@dataclass
class CaseOutputs(ClassificationOutputs):
    """Outputs of the images of several cases; all images of a case have its ``logits``.

    Attributes:
        cases: Number of the case of each image, int64 (B,).
        views: Attention of the case to each image, float32 (B,); sums to 1 over a case.
    """

    cases: Tensor
    views: Tensor


class CaseHead(ClassificationHead):
    r"""Classifies a case from all its images: one image, two views, both breasts, any number in any order.

    The features of each image are pooled as by `ClassificationHead`. Over the images of a case the head then computes
    their mean with gated attention, the maximum of each channel (a finding in any view), and its range, the maximum
    minus the minimum (a difference between views or sides; 0 for a single image). Views that a case lacks are masked.

    The label of a case follows from those of its images: a class holds if it does in any image; it is absent if it is
    known to be absent in every image; else it is unknown. Images of the other classes of an exclusive task must agree
    unless ``negative`` names the class without a finding (`mtmedformer.metrics.cases.CaseRule.labels`).

    The data need ``case`` and ``case_batches: true``, which put the images of a case into one batch.

    Args:
        classes: Class names in channel order.
        multi_label: Whether several classes may hold at once (sigmoids) or exactly one does (softmax).
        terms: Loss terms by name, summed by their weights; ``None`` is binary or categorical cross-entropy.
        strides: Strides of the pyramid levels whose tokens are pooled.
        width: Channels of the tokens; ``None`` is the width of the pyramid.
        num_heads: Number of attention heads over the tokens of an image; divides ``width``.
        peak: Also use the channel maxima of an image.
        negative: Names of the classes without a finding, which a class with one outweighs in a case.

    Raises:
        ConfigError: A term does not fit the classes, or a negative class is none of them.
    """

    def __init__(
        self,
        classes: Sequence[str],
        multi_label: bool = False,
        terms: dict[str, ClassLoss] | None = None,
        strides: tuple[int, ...] = (8, 16, 32),
        width: int | None = None,
        num_heads: int = 4,
        peak: bool = True,
        negative: list[str] | None = None,
    ) -> None:
        super().__init__(classes, multi_label, terms, strides, width, num_heads, peak)
        if unknown := sorted(set(negative or []) - set(self.classes)):
            raise ConfigError(f"negative: no class is called {unknown[0]!r}; choose from {list(self.classes)}")
        self.rule = CaseRule("max", frozenset(map(plain_name, negative or [])))
        self._cases: Tensor | None = None

    @override
    def build(self, channels: int, strides: Sequence[int]) -> None:
        super().build(channels, strides)
        width = self.width or channels
        features = 2 * width if self.peak else width
        self.view = nn.Sequential(nn.LayerNorm(features), nn.Linear(features, width), nn.GELU())
        self.view_gate = nn.Linear(width, 2 * (width // 2))
        self.view_score = nn.Linear(width // 2, 1)
        self.classifier = nn.Sequential(nn.LayerNorm(3 * width), nn.Linear(3 * width, len(self.classes)))

    def group(self, cases: Tensor | None) -> None:
        """Set the case of each image of the next batches, int64 (B,) from 0; ``None``: each image is its own case."""
        self._cases = cases

    @override
    def forward(self, pyramid: list[Tensor], size: tuple[int, int]) -> CaseOutputs:
        features, attention = self.features(pyramid)
        count = len(features)
        cases = torch.arange(count, device=features.device) if self._cases is None else self._cases
        if len(cases) != count:
            raise RuntimeError(f"{count} images were given for a batch of {len(cases)}; cases cannot be cut")
        logits, views = self._of_cases(self.view(features), cases.to(features.device))
        return CaseOutputs(logits, attention, cases.to(features.device), views)

    def _of_cases(self, features: Tensor, cases: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits (B, K) of each image's case, and the attention (B,) to each image.

        Args:
            features: Of the images, (B, C).
            cases: Number of the case of each image, (B,).
        """
        same = cases[:, None] == cases[None, :]  # (B, B): the images of each image's case
        content, gate = self.view_gate(features).chunk(2, dim=-1)
        score = self.view_score(content.tanh() * gate.sigmoid()).float()[:, 0]
        weights = score[None, :].expand(same.shape).masked_fill(~same, -torch.inf).softmax(dim=1)
        mean = weights.to(features.dtype) @ features
        each = features[None, :, :].expand(len(features), -1, -1)
        highest = each.masked_fill(~same[:, :, None], -torch.inf).amax(1)
        lowest = each.masked_fill(~same[:, :, None], torch.inf).amin(1)
        logits = self.classifier(torch.cat([mean, highest, highest - lowest], dim=1))
        return logits, weights.diagonal()

    @override
    def loss(self, outputs: ClassificationOutputs, target: Target) -> dict[str, Tensor]:
        """Return the named loss terms, means over the labelled cases."""
        assert isinstance(target, ClassificationTarget)
        assert isinstance(outputs, CaseOutputs)
        known = target.labels.float().masked_fill(~target.present[:, None], torch.nan).cpu().numpy()
        _, first, cases = np.unique(outputs.cases.cpu().numpy(), return_index=True, return_inverse=True)
        labels = torch.from_numpy(self.rule.labels(self.task(""), known.astype(np.float64), cases)).float()
        present = ~labels.isnan().all(1)
        device = outputs.logits.device
        rows = torch.from_numpy(first)[present].to(device)
        logits, labels = outputs.logits[rows].float(), labels[present].to(device)
        with torch.autocast(device.type, enabled=False):
            return {name: term.weight * term(logits, labels) for name, term in self.terms.items()}


def check_case_batches(heads: Iterable[Any], data: object, stage: str, tile: object) -> None:
    """Check that the data bring the images of a case together, where a head reads them so.

    Args:
        heads: The heads of the model.
        data: The data module.
        stage: Stage of the Trainer.
        tile: Size of the windows of prediction, or ``None``.

    Raises:
        ConfigError: They do not.
    """
    if not any(isinstance(head, GroupsImages) for head in heads):
        return
    if not isinstance(data, CasedData) or not data.case or not data.case_batches:
        raise ConfigError(
            f"{stage}: a head of the model reads all images of a case together; set data.case, for example "
            "[patient, laterality], and data.case_batches=true"
        )
    if tile is not None:
        raise ConfigError("model.tile: a head of the model reads all images of a case whole; set model.tile to null")

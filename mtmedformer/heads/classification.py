"""Classification of the whole image from attention-pooled tokens of the pyramid and their channel maxima."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from typing_extensions import override

from mtmedformer.batch import ClassificationTarget, Target
from mtmedformer.heads.attention_pooling import AttentionPoolingHead
from mtmedformer.losses.classification import BinaryCrossEntropy, ClassLoss, CrossEntropy
from mtmedformer.metrics.base import TaskMetrics
from mtmedformer.metrics.classification import ClassificationMetrics


@dataclass
class ClassificationOutputs:
    """``logits`` (B, K), and the attention (B, h, w) on the finest level of the head; each map sums to 1."""

    logits: Tensor
    attention: Tensor


class ClassificationHead(AttentionPoolingHead):
    """Classifies features that `AttentionPoolingHead` pools.

    Args:
        classes: Class names in channel order.
        multi_label: Whether several classes may hold at once (sigmoids) or exactly one does (softmax).
        terms: Loss terms by name, summed by their weights; ``None`` is binary or categorical cross-entropy.
        strides: Strides of the pyramid levels whose tokens are pooled.
        width: Channels of the tokens; ``None`` is the width of the pyramid.
        num_heads: Number of attention heads; divides ``width``.
        peak: Also classify the channel maxima; without them, the attention map covers all input of the classifier.

    Raises:
        ConfigError: A term does not fit the classes.
    """

    kind = "classification"

    def __init__(
        self,
        classes: Sequence[str],
        multi_label: bool = False,
        terms: dict[str, ClassLoss] | None = None,
        strides: tuple[int, ...] = (8, 16, 32),
        width: int | None = None,
        num_heads: int = 4,
        peak: bool = True,
    ) -> None:
        super().__init__(classes, len(classes), strides, width, num_heads, peak)
        self.multi_label = multi_label
        default: dict[str, ClassLoss] = {"cross_entropy": BinaryCrossEntropy() if multi_label else CrossEntropy()}
        self.terms = nn.ModuleDict(terms or default)
        for term in (terms or default).values():
            term.check(len(self.classes), multi_label)

    @override
    def forward(self, pyramid: list[Tensor], size: tuple[int, int]) -> ClassificationOutputs:
        return ClassificationOutputs(*self.pooled(pyramid))

    @override
    def loss(self, outputs: ClassificationOutputs, target: Target) -> dict[str, Tensor]:
        assert isinstance(target, ClassificationTarget)
        logits, labels = outputs.logits[target.present].float(), target.labels[target.present].float()
        with torch.autocast(logits.device.type, enabled=False):
            return {name: term.weight * term(logits, labels) for name, term in self.terms.items()}

    @override
    def predict(self, outputs: ClassificationOutputs, size: tuple[int, int]) -> Tensor:
        logits = outputs.logits.float()
        return logits.sigmoid() if self.multi_label else logits.softmax(dim=1)

    def class_logits(self, outputs: ClassificationOutputs, size: tuple[int, int]) -> Tensor:
        """Return the logits, float32 (B, K)."""
        return outputs.logits.float()

    def scaled(self, outputs: ClassificationOutputs, temperature: float) -> ClassificationOutputs:
        """Return the outputs with their logits divided by a temperature."""
        return replace(outputs, logits=outputs.logits.float() / temperature)

    def class_score(self, outputs: ClassificationOutputs, label: int) -> Tensor:
        """Return the logit of a class, float32 (B,)."""
        return outputs.logits[:, label].float()

    def exported(self, outputs: ClassificationOutputs, size: tuple[int, int]) -> dict[str, Tensor]:
        """Return the probabilities (B, K) under the empty name, and ``attention`` (B, h, w)."""
        return {"": self.predict(outputs, size), "attention": outputs.attention.float()}

    def decoded(self, exported: dict[str, Tensor], size: tuple[int, int]) -> Tensor:
        """Return the probabilities."""
        return exported[""]

    @override
    def metrics(self) -> TaskMetrics:
        return ClassificationMetrics(self.classes, self.multi_label)

"""Classes of the whole image, by attention over the coarse tokens of the pyramid and by their strongest signals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from mtmedformer.batch import ClassificationTarget, Target
from mtmedformer.errors import ConfigError
from mtmedformer.heads.base import TaskHead
from mtmedformer.heads.layers import pick_levels
from mtmedformer.losses.classification import BinaryCrossEntropy, ClassLoss, CrossEntropy

if TYPE_CHECKING:
    from mtmedformer.metrics.base import TaskMetrics


@dataclass
class ClassificationOutputs:
    """``logits`` (B, K) and ``attention`` (B, h, w), summing to 1: where the head looked, on its finest level."""

    logits: Tensor
    attention: Tensor


class ClassificationHead(TaskHead):
    r"""Pools pyramid tokens by gated attention and classifies the pool.

    Each attention head scores token $h$ with $w^\top(\tanh(V h) \odot \sigma(U h))$, takes the softmax over the tokens
    of all its levels and pools its share of the channels. Beside it each channel's maximum over the tokens is kept
    (``peak``): a lesion of one token in a thousand would otherwise reach the classifier, and be reached by its
    gradient, as a thousandth of what it is. The attention map does not show what the peaks contribute.

    Args:
        classes: Class names in channel order.
        multi_label: Whether several classes may hold at once (sigmoids) or exactly one does (softmax).
        terms: Loss terms by name, summed by their weights; ``None`` is binary or categorical cross-entropy.
        strides: Strides of the pyramid levels whose tokens are pooled.
        width: Channels of the tokens; ``None`` is the pyramid's.
        num_heads: Attention heads; divides ``width``.
        peak: Classify the channels' maxima too; without them, the attention map covers everything the classifier reads.
        dropout: Dropout on the pooled features, in [0, 1).

    Raises:
        ConfigError: One class without ``multi_label``, or a term that does not fit the classes.

    Reference:
        Ilse et al., Attention-based deep multiple instance learning, ICML 2018, equation 9.
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
        dropout: float = 0.0,
    ) -> None:
        super().__init__(classes)
        if len(self.classes) == 1 and not multi_label:
            raise ConfigError(
                f"classes: [{self.classes[0]}] with multi_label: false leaves nothing to choose; set multi_label: true"
            )
        self.multi_label = multi_label
        self.strides = tuple(sorted(strides))
        self.width = width
        self.num_heads = num_heads
        self.peak = peak
        self.dropout = dropout
        default: dict[str, ClassLoss] = {"cross_entropy": BinaryCrossEntropy() if multi_label else CrossEntropy()}
        self.terms = nn.ModuleDict(terms or default)
        for term in (terms or default).values():
            term.check(len(self.classes), multi_label)

    @override
    def build(self, channels: int, strides: Sequence[int]) -> None:
        self.levels = pick_levels(strides, self.strides)
        width = self.width or channels
        if width % self.num_heads:
            raise ConfigError(f"num_heads: {self.num_heads} does not divide the head's width of {width}")
        self.token = nn.ModuleList(nn.Conv2d(channels, width, 1) for _ in self.levels)
        self.norm = nn.ModuleList(nn.LayerNorm(width) for _ in self.levels)
        self.gate = nn.Linear(width, 2 * (width // 2))
        self.score = nn.Linear(width // 2, self.num_heads)
        features = 2 * width if self.peak else width
        self.classifier = nn.Sequential(
            nn.LayerNorm(features), nn.Dropout(self.dropout), nn.Linear(features, len(self.classes))
        )

    @override
    def forward(self, pyramid: list[Tensor], size: tuple[int, int]) -> ClassificationOutputs:
        maps = [pyramid[level] for level in self.levels]
        tokens = torch.cat(
            [
                F.gelu(norm(token(x).flatten(2).transpose(1, 2)))
                for token, norm, x in zip(self.token, self.norm, maps, strict=True)
            ],
            dim=1,
        )
        content, gate = self.gate(tokens).chunk(2, dim=-1)
        attention = self.score(content.tanh() * gate.sigmoid()).float().softmax(dim=1)
        values = tokens.view(*tokens.shape[:2], self.num_heads, -1)
        pooled = (attention.to(values.dtype).unsqueeze(3) * values).sum(1).flatten(1)
        features = torch.cat([pooled, tokens.amax(dim=1)], dim=1) if self.peak else pooled
        return ClassificationOutputs(self.classifier(features), self._attention_map(attention.mean(2), maps))

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

    @override
    def exported(self, outputs: ClassificationOutputs, size: tuple[int, int]) -> dict[str, Tensor]:
        return {"": self.predict(outputs, size), "attention": outputs.attention.float()}

    @override
    def class_logits(self, outputs: ClassificationOutputs, size: tuple[int, int]) -> Tensor:
        return outputs.logits.float()

    @override
    def scaled(self, outputs: ClassificationOutputs, temperature: float) -> ClassificationOutputs:
        return replace(outputs, logits=outputs.logits.float() / temperature)

    @override
    def metrics(self) -> TaskMetrics:
        from mtmedformer.metrics import ClassificationMetrics

        return ClassificationMetrics(self.classes, self.multi_label)

    def _attention_map(self, attention: Tensor, maps: list[Tensor]) -> Tensor:
        """Spread every level's attention (B, T) over the cells of the finest one, keeping its sum of 1."""
        (h, w), finest = maps[0].shape[-2:], self.strides[0]
        total = attention.new_zeros(attention.shape[0], h, w)
        parts = torch.split(attention, [m.shape[-2] * m.shape[-1] for m in maps], dim=1)
        for part, level, stride in zip(parts, maps, self.strides, strict=True):
            repeat = stride // finest
            spread = part.view(-1, *level.shape[-2:]).repeat_interleave(repeat, 1).repeat_interleave(repeat, 2)
            total = total + spread[:, :h, :w] / repeat**2
        return total / total.sum((1, 2), keepdim=True)

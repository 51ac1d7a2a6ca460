"""Distance of an image from the training images in feature space, and the header values that the training had.

The features of an image are the means of every channel of every level of the encoder's pyramid. Their mean and
covariance over the training images, and the distribution of distances of the validation images, are computed from
sums over images. Sites of a federation share these sums only.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from scipy.stats import t as student
from torch import Tensor

from mtmedformer.errors import ConfigError

FEWEST_TRAINING, FEWEST_VALIDATION = 10, 5
"""Images below which no distance is fitted: the mean of fewer would describe single patients."""

NO_FAMILIARITY = (
    "refuse_unfamiliar: the checkpoint does not describe its training images, because its training did not end or used "
    "a privacy policy; end it with fit --ckpt_path=last, or predict without refuse_unfamiliar"
)
"""Error of a model that cannot tell which images are unlike its training images."""

BINS_PER_OCTAVE, LOWEST, HIGHEST = 4, -8, 24
"""Histogram of distances: bins per factor of 2, and the powers of 2 at which it begins and ends."""


@dataclass
class FeatureSums:
    """Sums of features over images: their number, the sum of the vectors and of their outer products.

    Attributes:
        images: Number of images.
        total: float64 (P,).
        outer: float64 (P, P).
    """

    images: int = 0
    total: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    outer: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.float64))

    def add(self, features: Tensor) -> None:
        """Add the features (B, P) of a batch."""
        rows = features.detach().double().cpu()
        if not self.images:
            self.total, self.outer = rows.new_zeros(rows.shape[1]), rows.new_zeros(rows.shape[1], rows.shape[1])
        self.images += len(rows)
        self.total += rows.sum(dim=0)
        self.outer += rows.T @ rows

    def united(self, other: FeatureSums) -> FeatureSums:
        """Return the sums over the images of both."""
        if not self.images or not other.images:
            return other if other.images else self
        return FeatureSums(self.images + other.images, self.total + other.total, self.outer + other.outer)


@dataclass
class DistanceSums:
    """Sums over images of the logarithm of their distances, and a histogram of them.

    Attributes:
        images: Number of images.
        total: Sum of the natural logarithms of the distances.
        squares: Sum of their squares.
        histogram: Number of distances per bin (see ``BINS_PER_OCTAVE``).
    """

    images: int = 0
    total: float = 0.0
    squares: float = 0.0
    histogram: list[int] = field(default_factory=lambda: [0] * ((HIGHEST - LOWEST) * BINS_PER_OCTAVE))

    def add(self, distances: Tensor) -> None:
        """Add distances (B,) of a batch."""
        logs = distances.double().clamp(min=2.0**LOWEST).log()
        self.images += len(logs)
        self.total += float(logs.sum())
        self.squares += float(logs.square().sum())
        for log in logs.tolist():
            place = math.floor((log / math.log(2) - LOWEST) * BINS_PER_OCTAVE)
            self.histogram[min(max(place, 0), len(self.histogram) - 1)] += 1

    def united(self, other: DistanceSums) -> DistanceSums:
        """Return the sums over the images of both."""
        return DistanceSums(
            self.images + other.images,
            self.total + other.total,
            self.squares + other.squares,
            [a + b for a, b in zip(self.histogram, other.histogram, strict=True)],
        )

    def limit(self, quantile: float) -> float:
        r"""Return the distance that a further image of the same kind exceeds with probability ``1 - quantile``.

        Logarithms of distances are taken to be normal; the bound is that of one new observation after $n$,
        $\exp(m + t_{n-1}(q)\, s \sqrt{1 + 1/n})$, which is wider the fewer images there were.
        """
        n = self.images
        mean = self.total / n
        deviation = math.sqrt(max(0.0, self.squares - n * mean**2) / (n - 1))
        return math.exp(mean + float(student.ppf(quantile, n - 1)) * deviation * math.sqrt(1 + 1 / n))


@dataclass(frozen=True)
class HeaderValues:
    """Values of one fact of the headers, over the training images.

    Attributes:
        images: Images whose header has the fact.
        patients: Number of patients by value; values of a single patient are left out.
    """

    images: int = 0
    patients: dict[str, int] = field(default_factory=dict)

    def united(self, other: HeaderValues) -> HeaderValues:
        """Return the counts over the images of both."""
        return HeaderValues(self.images + other.images, dict(Counter(self.patients) + Counter(other.patients)))


@dataclass(frozen=True)
class TrainingDistribution:
    """What a model was made for.

    Attributes:
        images: Training images behind it.
        validation: Distances of the validation images; ``None`` where no distance could be fitted.
        quantile: Quantile of the validation distances that is the limit.
        limit: Largest distance of a familiar image; ``None`` where no distance could be fitted.
        mean: float32 (P,) mean of the features.
        scale: float32 (P,) their standard deviations.
        precision: float32 (P, P) inverse of their shrunken correlation matrix.
        headers: Values of the training images by fact (``Modality``, ``BodyPartExamined``, ``View`` …).
    """

    images: int
    quantile: float
    headers: dict[str, HeaderValues] = field(default_factory=dict)
    validation: DistanceSums | None = None
    limit: float | None = None
    mean: Tensor | None = None
    scale: Tensor | None = None
    precision: Tensor | None = None

    def distance(self, features: Tensor) -> Tensor:
        """Return the Mahalanobis distance of features (B, P), divided by the square root of P, as float64 (B,).

        Features that are not finite have an infinite distance.
        """
        assert self.mean is not None
        assert self.scale is not None
        assert self.precision is not None
        z = (features.detach().double().cpu() - self.mean.double()) / self.scale.double()
        squared = ((z @ self.precision.double()) * z).sum(dim=1) / z.shape[1]
        return squared.clamp(min=0).sqrt().nan_to_num(nan=math.inf)

    def assess(self, features: Tensor, facts: Sequence[Mapping[str, str]]) -> list[Assessment]:
        """Compare images with the training images.

        Args:
            features: (B, P), from ``MultiTaskNetwork.features``.
            facts: Known facts of the headers, by name, of each image.
        """
        relative: list[float | None] = [None] * len(facts)
        if self.limit is not None:
            relative = [float(one) / self.limit for one in self.distance(features)]
        return [self._assessment(one, known) for one, known in zip(relative, facts, strict=True)]

    def _assessment(self, relative: float | None, facts: Mapping[str, str]) -> Assessment:
        reasons = []
        for name, value in facts.items():
            known = self.headers.get(name, HeaderValues())
            if value not in known.patients and known.patients and 2 * known.images >= self.images:
                reasons.append(f"{name} {value} (training: {', '.join(sorted(known.patients))})")
        if relative is not None and relative > 1:
            reasons.append(f"features at {relative:.3g} times the largest usual distance")
        return Assessment(relative, tuple(reasons))

    def settings(self) -> dict[str, Any]:
        """Return what decides which images are unfamiliar, as plain values for a record beside predictions."""
        values = {name: sorted(known.patients) for name, known in self.headers.items()}
        return {"limit": self.limit, "quantile": self.quantile, "images": self.images, "headers": values}


@dataclass(frozen=True)
class Assessment:
    """How familiar one image is.

    Attributes:
        distance: Distance in feature space, divided by the limit; ``None`` where it was not fitted.
        reasons: Why the image is unfamiliar; empty for a familiar image.
    """

    distance: float | None
    reasons: tuple[str, ...] = ()

    @property
    def unfamiliar(self) -> bool:
        """Whether the image is unlike the training images."""
        return bool(self.reasons)


def fitted_features(sums: FeatureSums) -> tuple[Tensor, Tensor, Tensor] | None:
    r"""Return mean, standard deviation and inverse correlation of the features, float32; ``None`` for too few images.

    The correlation matrix $R$ of $n$ images and $P$ features is shrunk towards the identity, with the weight of the
    oracle approximating shrinkage estimator, which needs no more than $R$, $n$ and $P$.

    Reference:
        Chen, Wiesel, Eldar, Hero, Shrinkage algorithms for MMSE covariance estimation, IEEE TSP 2010, equation 23.
    """
    n = sums.images
    if n < FEWEST_TRAINING or not sums.outer.isfinite().all():
        return None
    mean = sums.total / n
    covariance = sums.outer / n - torch.outer(mean, mean)
    deviation = covariance.diagonal().clamp(min=0).sqrt()
    known = deviation[deviation > 0]
    scale = deviation.clamp(min=1e-3 * float(known.median()) if len(known) else 1.0)
    correlation = covariance / torch.outer(scale, scale)
    p = len(mean)
    level = float(correlation.diagonal().mean())
    alpha = float(correlation.square().mean())
    apart = (n + 1) * (alpha - level**2 / p)
    weight = 1.0 if apart <= 0 else min(1.0, (alpha + level**2) / apart)
    shrunk = (1 - weight) * correlation + weight * (level or 1.0) * torch.eye(p, dtype=torch.float64)
    return mean.float(), scale.float(), torch.linalg.inv(shrunk).float()


def plain(familiarity: TrainingDistribution) -> dict[str, Any]:
    """Return it as dicts of tensors, strings and numbers, for a checkpoint."""
    stored = {
        name: getattr(familiarity, name) for name in ("images", "quantile", "limit", "mean", "scale", "precision")
    }
    stored["headers"] = {name: asdict(values) for name, values in familiarity.headers.items()}
    stored["validation"] = asdict(familiarity.validation) if familiarity.validation else None
    return stored


def restored(stored: Mapping[str, Any] | None) -> TrainingDistribution | None:
    """Return what ``plain`` stored; ``None`` where a checkpoint has none.

    Raises:
        ConfigError: It has another form, or numbers that cannot be used.
    """
    if not stored:
        return None
    try:
        headers = {str(name): HeaderValues(**values) for name, values in stored["headers"].items()}
        validation = DistanceSums(**stored["validation"]) if stored["validation"] else None
        familiarity = TrainingDistribution(**{**stored, "headers": headers, "validation": validation})
        parts = (familiarity.mean, familiarity.scale, familiarity.precision)
        usable = familiarity.limit is None or (
            0 < familiarity.limit < math.inf
            and all(isinstance(part, Tensor) and bool(part.isfinite().all()) for part in parts)
            and [len(part.shape) for part in parts if part is not None] == [1, 1, 2]
        )
        if not usable or not all(isinstance(values.patients, dict) for values in headers.values()):
            raise ValueError("a number that is not finite, or a part of another shape")
    except (TypeError, AttributeError, KeyError, ValueError) as error:
        raise ConfigError(f"its familiarity has the format of another version ({error})") from error
    return familiarity

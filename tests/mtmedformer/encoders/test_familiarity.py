"""Familiarity: sums over parts give the fit of the whole, and unlike images are far away or have unlike headers."""

import math

import pytest
import torch
from scipy.stats import t as student
from sklearn.covariance import OAS

from mtmedformer.encoders.familiarity import (
    DistanceSums,
    FeatureSums,
    HeaderValues,
    TrainingDistribution,
    fitted_features,
    plain,
    restored,
)
from mtmedformer.errors import ConfigError

MIXING = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def drawn(images: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    """Return correlated features of images; ``shift`` moves them all."""
    return torch.randn(images, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) @ MIXING + shift


def fitted(headers: dict[str, HeaderValues] | None = None, quantile: float = 0.99) -> TrainingDistribution:
    sums, distances = FeatureSums(), DistanceSums()
    sums.add(drawn(300, seed=2))
    parts = fitted_features(sums)
    familiarity = TrainingDistribution(300, quantile, headers or {}, None, None, *parts)
    distances.add(familiarity.distance(drawn(200, seed=3)))
    return TrainingDistribution(300, quantile, headers or {}, distances, distances.limit(quantile), *parts)


def test_the_fit_is_that_of_sklearn_and_the_same_from_sums_of_parts():
    rows = drawn(40, seed=0)
    whole, parts = FeatureSums(), FeatureSums()
    whole.add(rows)
    for part in rows.split([5, 20, 15]):
        sums = FeatureSums()
        sums.add(part)
        parts = parts.united(sums)
    mean, scale, precision = fitted_features(whole)
    for one, other in zip((mean, scale, precision), fitted_features(parts), strict=True):
        torch.testing.assert_close(one, other)
    oracle = OAS().fit(((rows - rows.mean(0)) / rows.std(0, correction=0)).numpy())
    torch.testing.assert_close(precision.double(), torch.from_numpy(oracle.precision_), rtol=1e-4, atol=1e-5)
    far = rows + 3
    squared = oracle.mahalanobis(((far - rows.mean(0)) / rows.std(0, correction=0)).numpy()) / 6
    distance = TrainingDistribution(40, 0.99, {}, None, 1.0, mean, scale, precision).distance(far)
    torch.testing.assert_close(distance, torch.from_numpy(squared).sqrt(), rtol=1e-4, atol=1e-5)


def test_the_limit_is_the_quantile_of_the_validation_distances():
    familiarity = fitted(quantile=0.9)
    fresh = familiarity.distance(drawn(4000, seed=4))
    assert 0.06 < float((fresh > familiarity.limit).double().mean()) < 0.14
    logs, n = familiarity.distance(drawn(200, seed=3)).log(), 200
    bound = logs.mean() + student.ppf(0.9, n - 1) * logs.std() * math.sqrt(1 + 1 / n)
    assert familiarity.limit == pytest.approx(math.exp(bound))
    assert sum(familiarity.validation.histogram) == n
    halves = [DistanceSums(), DistanceSums()]
    for half, part in zip(halves, logs.exp().split(100), strict=True):
        half.add(part)
    assert halves[0].united(halves[1]).limit(0.9) == pytest.approx(familiarity.limit)


def test_unlike_images_are_far_and_like_images_pass_without_a_word():
    familiarity = fitted(quantile=0.9999)
    assert not any(one.unfamiliar for one in familiarity.assess(drawn(50, seed=5), [{}] * 50))
    for one in familiarity.assess(drawn(50, seed=6, shift=30.0), [{}] * 50):
        assert one.distance > 1
        assert "times the largest usual distance" in one.reasons[0]
    broken = familiarity.assess(torch.full((1, 6), math.nan), [{}])[0]
    assert broken.unfamiliar


def test_a_header_value_of_no_training_image_is_named_and_unknown_ones_are_not():
    headers = {
        "Modality": HeaderValues(280, {"CR/DX": 200}),
        "View": HeaderValues(20, {"PA": 15}),  # known of 20 of 300 images: the others may have been AP
        "BodyPartExamined": HeaderValues(300, {}),  # a different one in every image
    }
    familiarity, features = fitted(headers, quantile=0.9999), drawn(1, seed=5)
    facts = {"Modality": "MG", "View": "AP", "BodyPartExamined": "BREAST", "Photometric": "grey"}
    assert familiarity.assess(features, [facts])[0].reasons == ("Modality MG (training: CR/DX)",)
    assert familiarity.assess(features, [{"Modality": "CR/DX"}])[0].reasons == ()
    assert familiarity.assess(features, [{}])[0].reasons == ()


def test_too_few_images_give_header_checks_only():
    sums = FeatureSums()
    sums.add(drawn(9, seed=0))
    assert fitted_features(sums) is None
    alone = TrainingDistribution(9, 0.99, {"Modality": HeaderValues(9, {"MG": 9})})
    (one,) = alone.assess(drawn(1, seed=1), [{"Modality": "CT"}])
    assert one.distance is None
    assert one.reasons == ("Modality CT (training: MG)",)


def test_it_survives_a_checkpoint_and_a_damaged_one_is_explained(tmp_path):
    familiarity = fitted({"View": HeaderValues(300, {"PA": 300})})
    torch.save(plain(familiarity), tmp_path / "stored")
    stored = torch.load(tmp_path / "stored", weights_only=True)
    again, rows = restored(stored), drawn(3, seed=9)
    assert again.assess(rows, [{"View": "AP"}] * 3) == familiarity.assess(rows, [{"View": "AP"}] * 3)
    assert again.settings() == familiarity.settings()
    assert restored({}) is None
    for wrong in ({"limit": math.nan}, {"mean": torch.tensor(math.nan)}, {"headers": 3}, {"surplus": 1}):
        with pytest.raises(ConfigError, match="familiarity"):
            restored(stored | wrong)

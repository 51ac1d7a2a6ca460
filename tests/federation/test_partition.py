"""Patients dealt out to sites: never torn apart, the same every time, as even or uneven as asked for."""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest

from federation.partition import Dirichlet, EqualShares, Holding, picture
from mtmedformer.errors import ConfigError


@dataclass(frozen=True)
class Classes:
    values: tuple[float, ...]


@dataclass(frozen=True)
class Image:
    id: str
    patient: str
    truth: dict = field(default_factory=dict)


def patients(n: int = 200, seed: int = 0):
    """Return n patients of one to four images in three classes, and a split for every image."""
    rng = np.random.default_rng(seed)
    found, splits = {}, {}
    for i in range(n):
        label = Classes(tuple(float(k == rng.integers(3)) for k in range(3)) if i % 10 else (float("nan"),) * 3)
        images = [Image(f"{i}_{k}", f"p{i}", {"finding": label}) for k in range(int(rng.integers(1, 5)))]
        found[f"p{i}"] = images
        splits |= {image.id: ("train", "val", "test")[0 if i % 5 < 3 else i % 5 - 2] for image in images}
    return found, splits


def images_of(found, owners, splits, split="train"):
    return Counter(owners[p] for p, images in found.items() for image in images if splits[image.id] == split)


def test_equal_shares_are_equal_in_every_split():
    found, splits = patients()
    owners = EqualShares(4).assign(found, splits)
    assert set(owners) == set(found)
    for split in ("train", "val", "test"):
        counts = images_of(found, owners, splits, split)
        assert len(counts) == 4
        assert max(counts.values()) - min(counts.values()) <= 8, "to within a patient or two"


@pytest.mark.parametrize("partition", [EqualShares(3, seed=1), Dirichlet(3, 0.5, seed=1)], ids=["equal", "dirichlet"])
def test_the_deal_depends_on_patients_and_seed_not_on_order(partition):
    found, splits = patients()
    backwards = {p: found[p] for p in reversed(found)}
    assert partition.assign(found, splits) == partition.assign(backwards, splits)
    other = type(partition)(3, seed=2)
    assert other.assign(found, splits) != partition.assign(found, splits)


def spread(alpha: float) -> float:
    """Return how unevenly one class is shared out, as the standard deviation of the shares over sites."""
    found, splits = patients(400)
    deviations = []
    for seed in range(5):
        partition = Dirichlet(4, alpha, seed=seed)
        owners = partition.assign(found, splits)
        table = np.zeros((3, 4))
        for patient, images in found.items():
            word = partition.stratum(images)
            if word != "none":
                table[int(word), partition.sites.index(owners[patient])] += 1
        deviations.append((table / table.sum(1, keepdims=True)).std(1).mean())
    return float(np.mean(deviations))


def test_a_smaller_alpha_makes_sites_less_alike():
    assert spread(100.0) < 0.06 < spread(1.0) < spread(0.1)


def test_shares_are_those_that_were_drawn():
    found, splits = patients(2000)
    partition = Dirichlet(4, 0.7, seed=3)
    owners = partition.assign(found, splits)
    members = [p for p, images in found.items() if partition.stratum(images) == "1"]
    dealt = Counter(owners[p] for p in members)
    shares = [dealt[site] / len(members) for site in partition.sites]
    assert shares == pytest.approx(partition.shares("1"), abs=0.03)


def test_no_site_is_left_without_anyone():
    found, splits = patients(60)
    for seed in range(10):
        owners = Dirichlet(6, 0.02, seed=seed).assign(found, splits)
        for split in ("train", "val", "test"):
            assert len(images_of(found, owners, splits, split)) == 6


def test_without_classes_it_goes_by_what_is_labelled():
    partition = Dirichlet(2)
    assert partition.stratum([Image("a", "p", {"lungs": object(), "boxes": object()})]) == "boxes+lungs"
    by = Dirichlet(2, by="finding")
    assert by.stratum([Image("a", "p", {"finding": Classes((0.0, 1.0))}), Image("b", "p", {})]) in ("1", "none")
    assert by.stratum([Image("a", "p", {"other": Classes((1.0, 0.0))})]) == "none"


def test_sites_may_have_names():
    found, splits = patients()
    assert set(EqualShares(["a", "b"]).assign(found, splits).values()) == {"a", "b"}


def test_mistakes_are_named():
    with pytest.raises(ConfigError, match="alpha is 0"):
        Dirichlet(2, alpha=0)
    with pytest.raises(ConfigError, match="sites is 0"):
        EqualShares(0)
    found, splits = patients(4)
    with pytest.raises(ConfigError, match="training patients cannot be 9 sites"):
        EqualShares(9).assign(found, splits)


def test_the_picture_shows_every_site_and_task():
    figure = picture(
        [Holding("north", 3, 6, 2, {"lungs": 6, "boxes": 0}), Holding("south", 2, 4, 0, {"lungs": 0, "boxes": 4})]
    )
    axes = figure.axes[0]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["north", "south"]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["images", "lungs", "boxes"]
    assert [t.get_text() for t in axes.texts] == ["6", "6", "–", "4", "–", "4"]

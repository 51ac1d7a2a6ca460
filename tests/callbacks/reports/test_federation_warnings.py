"""Warnings about uneven federations and about sites that the merge harms."""

from dataclasses import replace

import pytest

from callbacks.reports.federation_summary import FederationSummary, PartDescription
from callbacks.reports.federation_warnings import warnings_of
from federation.partition import Holding
from federation.server.history import RoundRecord, SiteRecord

EVEN = {"north": (100, 100, 100), "south": (90, 80, 90), "east": (110, 0, 110)}


def summary(held=None, steps=None, trained=None, merged=None, **options):
    """Return a summary of one round; by site: images, labels of lungs and of finding; steps; scores."""
    held = held or EVEN
    sites = [Holding(name, n, n, 9, {"lungs": lungs, "finding": f}) for name, (n, lungs, f) in held.items()]
    steps, trained, merged = steps or dict.fromkeys(held, 20), trained or {}, merged or {}
    records = {
        name: SiteRecord(steps=steps[name], trained={"lungs/dice": trained[name]} if name in trained else {})
        for name in held
    }
    validation = {f"val/lungs/dice/site={name}": value for name, value in merged.items()}
    return FederationSummary(
        state="finished",
        reason="",
        rounds=1,
        aggregator=PartDescription("BayesianAggregator", options),
        options={},
        primary={"lungs": "dice", "finding": "auroc"},
        sites=sites,
        history=[RoundRecord(0, records, validation=validation)],
        arrays={},
        pooled={},
        seed=None,
        versions={},
    )


def test_an_even_federation_that_harms_no_site_has_no_warning():
    scores = {"north": 0.9, "south": 0.88}
    assert warnings_of(summary(trained=scores, merged={"north": 0.89, "south": 0.91})) == []


def test_a_dominant_site_is_named_with_its_share():
    held = {"children": (790, 0, 790), "adults": (160, 20, 160), "masks": (50, 50, 0)}
    (text,) = warnings_of(summary(held))
    assert text.startswith("children holds 79% of the labelled training images")
    assert "federation.aggregator.saturation=100" in text


@pytest.mark.parametrize("options", [{"a": 0.0}, {"weights": "equal"}, {"saturation": 100.0}])
def test_a_dominant_site_is_no_problem_where_sites_have_equal_weight(options):
    held = {"children": (790, 0, 790), "adults": (160, 20, 160), "masks": (50, 50, 0)}
    assert warnings_of(summary(held, **options)) == []


def test_a_task_of_one_site_is_named():
    (text,) = warnings_of(summary({"north": (100, 100, 100), "south": (90, 0, 90)}))
    assert text.startswith("Only north has labels for lungs")


def test_one_site_alone_depends_on_no_other():
    assert warnings_of(summary({"north": (100, 100, 100)})) == []


def test_few_steps_are_listed_with_the_mean():
    (text,) = warnings_of(summary(steps={"north": 160, "south": 9, "east": 31}))
    assert text.startswith("Optimizer steps per round: south 9; the mean of all sites is 67")
    assert "federation.local_steps=equal" in text


def test_a_site_that_the_merge_harms_is_named_with_both_values():
    (text,) = warnings_of(summary(trained={"north": 0.9, "south": 0.7}, merged={"north": 0.9, "south": 0.45}))
    assert "south, lungs dice: 0.450 merged, 0.700 alone" in text
    assert "north" not in text


def test_an_unknown_score_harms_nobody():
    assert warnings_of(summary(trained={"north": 0.9}, merged={"south": 0.45})) == []


def test_without_a_round_only_the_data_are_examined():
    assert warnings_of(replace(summary(), history=[])) == []

"""Intervals and verdicts of a comparison: against scipy, closed forms, and how often they raise a false alarm."""

import math

import numpy as np
import pytest
from scipy import stats

from mtmedformer.commands.compare.statistics import MetricPanel, draw_patients, draw_runs, estimate, holm, verdict

REPLICATES = 4000


def panel(values, replicates=REPLICATES, seed=0):
    """Return the panel of means of values by site: {site: (runs, patients)}."""
    sites = sorted(values)
    drawn = draw_patients({s: [str(i) for i in range(values[s].shape[1])] for s in sites}, replicates, seed)
    mean = np.stack([values[s].mean(axis=1) for s in sites], axis=1)
    resampled = np.stack([drawn[s] @ values[s].T / drawn[s].sum(axis=1, keepdims=True) for s in sites], axis=2)
    patients = sum(values[s].shape[1] for s in sites)
    runs = tuple(f"seed{i}" for i in range(len(mean)))
    return MetricPanel(runs, tuple(sites), patients, mean, resampled)


def test_one_run_at_one_site_is_the_paired_t_test():
    rng = np.random.default_rng(1)
    a, b = rng.normal(0.8, 0.1, (1, 40)), rng.normal(0.78, 0.1, (1, 40))
    found = estimate(panel({"x": a}), panel({"x": b}))
    oracle = stats.ttest_rel(a[0], b[0])
    assert found.value == pytest.approx((a - b).mean())
    assert found.p == pytest.approx(oracle.pvalue, abs=0.02)
    low, high = oracle.confidence_interval()
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.002)
    assert found.freedom == 39
    assert math.isnan(found.from_runs)


def test_runs_alone_are_the_paired_t_test_over_runs():
    rng = np.random.default_rng(2)
    a, b = rng.normal(0.8, 0.02, (5, 1)), rng.normal(0.78, 0.02, (5, 1))
    found = estimate(panel({"x": np.repeat(a, 9, axis=1)}), panel({"x": np.repeat(b, 9, axis=1)}))
    oracle = stats.ttest_rel(a[:, 0], b[:, 0])
    assert found.p == pytest.approx(oracle.pvalue, abs=0.01)
    assert found.from_runs == pytest.approx(1)


def test_the_standard_error_is_that_of_scipys_bootstrap_but_for_its_bias():
    x = np.random.default_rng(3).gamma(2.0, size=15)
    found = estimate(panel({"x": x[None]}))
    oracle = stats.bootstrap((x,), np.mean, n_resamples=REPLICATES, rng=np.random.default_rng(0)).standard_error
    assert found.error == pytest.approx(oracle * math.sqrt(15 / 14), rel=0.05)
    assert found.error == pytest.approx(x.std(ddof=1) / math.sqrt(15), rel=0.05), "in closed form"


def test_sites_count_the_same_whatever_their_size():
    values = {"large": np.full((2, 90), 0.9), "small": np.full((2, 3), 0.5)}
    assert estimate(panel(values)).value == pytest.approx(0.7)
    assert estimate(panel(values), of="worst").value == pytest.approx(0.5)
    assert estimate(panel(values), of="worst", higher_is_better=False).value == pytest.approx(0.9)


def test_means_over_images_count_every_image():
    values = panel({"large": np.full((1, 90), 0.9), "small": np.full((1, 10), 0.5)})
    whole = MetricPanel(
        values.runs, values.sites, 100, values.value, values.resampled, np.array([0.86]), np.full((REPLICATES, 1), 0.86)
    )
    assert estimate(whole).value == pytest.approx(0.86)
    assert estimate(whole, of="worst").value == pytest.approx(0.5)


def simulated(rng, seeds, sites, patient, method, seed_effect, rest):
    """Return two variants between which there is no difference: values by patient, method, seed, and all three."""
    base = {s: rng.normal(0, patient, n) for s, n in sites.items()}
    found = []
    for _ in range(2):
        by_seed = rng.normal(0, seed_effect, (seeds, 1))
        found.append(
            {
                s: base[s] + rng.normal(0, method, n) + by_seed + rng.normal(0, rest, (seeds, n))
                for s, n in sites.items()
            }
        )
    return found


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ({"seeds": 5, "patient": 0.1, "method": 0.05, "seed_effect": 0.01, "rest": 0.05}, (0.02, 0.085)),
        ({"seeds": 5, "patient": 0.1, "method": 0.0, "seed_effect": 0.05, "rest": 0.02}, (0.02, 0.085)),
        ({"seeds": 3, "patient": 0.1, "method": 0.0, "seed_effect": 0.05, "rest": 0.02}, (0.02, 0.085)),
        ({"seeds": 1, "patient": 0.1, "method": 0.05, "seed_effect": 0.0, "rest": 0.0}, (0.02, 0.085)),
        ({"seeds": 5, "patient": 0.1, "method": 0.0, "seed_effect": 0.0, "rest": 0.1}, (0.0, 0.085)),
    ],
    ids=["everything", "seeds", "three seeds", "one seed", "noise alone"],
)
def test_where_there_is_no_difference_one_alarm_in_twenty_is_raised(case, expected):
    rng, alarms, tries = np.random.default_rng(0), 0, 300
    sites = {"a": 30, "b": 20, "c": 10, "d": 12}
    for i in range(tries):
        one, other = simulated(rng, sites=sites, **case)
        alarms += estimate(panel(one, 600, i), panel(other, 600, i), seed=i).p < 0.05
    assert expected[0] <= alarms / tries <= expected[1]


def test_a_real_difference_is_found():
    rng = np.random.default_rng(5)
    one, other = simulated(rng, 5, {"a": 30, "b": 20}, 0.1, 0.03, 0.005, 0.03)
    better = {site: value + 0.05 for site, value in one.items()}
    found = estimate(panel(better), panel(other))
    assert found.low > 0
    assert verdict(found.value, found.p) == "better"
    assert verdict(found.value, found.p, higher_is_better=False) == "worse"


def test_two_names_for_one_model_do_not_differ():
    values = {"x": np.random.default_rng(0).random((3, 8))}
    found = estimate(panel(values), panel(values))
    assert (found.value, found.p) == (0, 1)
    assert verdict(found.value, found.p) == "no difference shown"


def test_only_runs_that_both_have_are_compared():
    rng = np.random.default_rng(6)
    a, b = panel({"x": rng.random((3, 9))}), panel({"x": rng.random((3, 9))})
    part = b.of(["seed2", "seed0"])
    expected = a.value[[0, 2]].mean() - b.value[[0, 2]].mean()
    assert estimate(a, part).value == pytest.approx(expected)


def test_a_site_without_truth_is_left_out_of_both():
    a, b = panel({"x": np.full((2, 5), 0.5), "y": np.full((2, 5), 0.1)}), None
    b = panel({"x": np.full((2, 5), 0.7), "y": np.full((2, 5), np.nan)})
    assert estimate(a, b).value == pytest.approx(-0.2)
    nothing = panel({"x": np.full((2, 5), np.nan), "y": np.full((2, 5), np.nan)})
    assert math.isnan(estimate(a, nothing).value)
    assert verdict(float("nan"), float("nan")) == "not determined"


def test_one_patient_and_one_run_give_no_interval():
    found = estimate(panel({"x": np.array([[0.5]])}), panel({"x": np.array([[0.4]])}))
    assert found.value == pytest.approx(0.1)
    assert math.isnan(found.low)
    assert math.isnan(found.p)


def test_resamples_leave_one_out_and_pair_variants():
    drawn = draw_patients({"b": ["p", "q", "r"], "a": ["s"]}, 50, 7)
    assert (drawn["b"].sum(axis=1) == 2).all()
    assert (drawn["a"] == 1).all()
    again = draw_patients({"a": ["s"], "b": ["p", "q", "r"]}, 50, 7)
    assert (drawn["b"] == again["b"]).all(), "the order in which sites are named does not matter"
    assert np.allclose(draw_runs(4, 50, 0).sum(axis=1), 1)
    assert (draw_runs(1, 3, 0) == 1).all()


@pytest.mark.parametrize(
    ("p_values", "expected"),
    [
        ({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}, {"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02}),
        ({"a": 0.5}, {"a": 0.5}),
        ({"a": 0.6, "b": 0.7}, {"a": 1.0, "b": 1.0}),
        ({}, {}),
    ],
)
def test_holm_by_hand(p_values, expected):
    assert holm(p_values) == pytest.approx(expected)


def test_holm_leaves_out_what_is_not_known():
    found = holm({"a": 0.02, "b": float("nan"), "c": 0.04})
    assert found["a"] == pytest.approx(0.04)
    assert found["c"] == pytest.approx(0.04)
    assert math.isnan(found["b"])

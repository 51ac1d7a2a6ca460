"""Checks of one decoded update: what is wrong is named, what is right passes without a word."""

import dataclasses
import math
import re

import pytest
import torch

from federation.aggregators import BayesianAggregator, FedAvg, FisherMerging, InverseVariance
from federation.exchange.update import load_update, save_update
from federation.server.update_checks import MOST_EXAMPLES, Declaration, Expected
from mtmedformer.storage.hashing import state_hash
from tests.fixtures.toy_federation import make_update, toy

BIAS, WEIGHT, COUNTER = "encoder.0.bias", "encoder.0.weight", "encoder.2.num_batches_tracked"


def expected(**changes) -> Expected:
    state, schema = toy()
    settings = {"state": state, "local": FedAvg().exchange.local_keys(schema), **changes}
    return Expected(0, state_hash(state), schema, **settings)


def reason(change, **changes) -> str | None:
    state, schema = toy()
    update = make_update("a", state, schema, precision="row")
    change(update)
    return expected(**changes).refusal("a", update)


def of(update, name="encoder"):
    return update.blocks[name]


def put(field, key, value):
    """Return what sets one entry of a field of the encoder's block."""
    return lambda update: getattr(of(update), field).update({key: value})


def num_examples(count):
    return lambda update: setattr(of(update), "num_examples", count)


CASES = {
    "site": (lambda u: setattr(u, "site", "b"), "another site"),
    "schema": (lambda u: setattr(u, "schema", "other"), "another model"),
    "round": (lambda u: setattr(u, "round", 3), r"another round \(4, not 1\)"),
    "round_bool": (lambda u: setattr(u, "round", False), r"another round \(\?, not 1\)"),
    "base": (lambda u: setattr(u, "base", "other"), "another round"),
    "block": (lambda u: u.blocks.update(stranger=of(u)), "unknown block 'stranger'"),
    "personal": (lambda u: u.blocks.update(loss=of(u)), "unknown block 'loss'"),
    "none": (num_examples(0), "encoder: no examples"),
    "negative": (num_examples(-5), "encoder: no examples"),
    "nan": (num_examples(math.nan), "not a number"),
    "bool": (num_examples(True), "not a number"),
    "text": (num_examples("100"), "not a number"),
    "fraction": (num_examples(100.0), "not a number"),
    "many": (num_examples(10**12), r"more examples than the site declared \(1000000000000, at most 1000000000\)"),
    "very_many": (num_examples(10**308), r"declared \(about 10\^308"),
    "too_many_for_a_float": (num_examples(10**400), r"declared \(about 10\^400"),
    "name": (put("delta", "other", torch.zeros(1)), "unknown weights"),
    "foreign": (put("delta", "heads.lungs.bias", torch.zeros(3)), "unknown weights"),
    "missing": (lambda u: of(u).delta.pop(BIAS), "encoder: weights are missing"),
    "shape": (put("delta", BIAS, torch.zeros(4)), r"shape \(4,\), not \(5,\)"),
    "delta_nan": (lambda u: of(u).delta[BIAS].fill_(math.nan), f"{BIAS}: not finite"),
    "delta_inf": (lambda u: of(u).delta[BIAS].fill_(math.inf), "not finite"),
    "integers": (put("delta", BIAS, torch.zeros(5, dtype=torch.long)), "type torch.int64, not float32"),
    "double": (put("delta", BIAS, torch.zeros(5, dtype=torch.double)), "type torch.float64, not float32"),
    "complex": (put("delta", BIAS, torch.zeros(5, dtype=torch.cfloat)), "type torch.complex64, not float32"),
    "precision_below": (lambda u: of(u).precision[WEIGHT].neg_(), "precision that is not finite or below"),
    "precision_nan": (lambda u: of(u).precision[WEIGHT].fill_(math.nan), "precision that is not finite"),
    "precision_shape": (put("precision", WEIGHT, torch.ones(3)), "precision of shape"),
    "precision_large": (put("precision", BIAS, torch.ones(2, 5)), "precision of shape"),
    "precision_type": (put("precision", BIAS, torch.ones(5).half()), "precision of type torch.float16"),
    "precision_alone": (put("precision", "other", torch.ones(1)), "were not sent"),
    "precision_of_all": (put("precision", BIAS, torch.full((5,), 1e6)), "mean precision above 10"),
    "scale_inf": (put("scale", BIAS, math.inf), "curvature"),
    "scale_below": (put("scale", BIAS, -1.0), "curvature"),
    "scale_large": (put("scale", BIAS, 1e40), "curvature"),
    "scale_integer": (put("scale", BIAS, 10**400), "curvature"),
    "scale_text": (put("scale", BIAS, "1"), "curvature"),
    "weight": (put("scale", BIAS, 9e35), "weight above 1e[+]36"),
    "step": (lambda u: (put("step", BIAS, 0.0)(u), setattr(u, "rounding", "int8")), "rounding step"),
    "step_nan": (lambda u: (put("step", BIAS, math.nan)(u), setattr(u, "rounding", "int8")), "rounding step"),
    "step_alone": (put("step", "other", 1.0), "were not rounded"),
    "step_without_rounding": (put("step", BIAS, 1.0), "were not rounded"),
    "counter": (lambda u: u.counters.update({COUNTER: torch.zeros(2)}), "not a counter"),
    "counter_name": (lambda u: u.counters.update(other=torch.tensor(1)), "not a counter"),
    "counter_type": (lambda u: u.counters.update({COUNTER: torch.tensor(1, dtype=torch.int8)}), "not a counter"),
    "counter_large": (lambda u: u.counters.update({COUNTER: torch.tensor(2**62)}), "counter above"),
    "counter_low": (lambda u: u.counters.update({COUNTER: torch.tensor(-(2**62))}), "counter above"),
    "extra_nan": (lambda u: u.extra.update(other=torch.tensor(math.nan)), "extra tensors that are not finite"),
    "extra_type": (lambda u: u.extra.update(other=torch.tensor(1)), "extra tensors that are not finite"),
    "extra_shape": (lambda u: u.extra.update({BIAS: torch.zeros(7)}), r"shape \(7,\), not \(5,\)"),
    "extra_size": (lambda u: u.extra.update(other=torch.zeros(10_000)), "larger than the model"),
    "samples": (lambda u: u.samples.update(lungs=10**400), "number of labelled samples"),
    "samples_bool": (lambda u: u.samples.update(lungs=True), "number of labelled samples"),
    "steps": (lambda u: setattr(u, "steps", -1), "number of steps"),
    "steps_float": (lambda u: setattr(u, "steps", math.inf), "number of steps"),
    "seconds": (lambda u: setattr(u, "seconds", math.nan), "time that is not"),
    "metrics": (lambda u: u.metrics.update({str(i): 0.5 for i in range(1001)}), "more than 1000 metrics"),
    "metric": (lambda u: u.metrics.update(score="high"), "a metric that is not a number"),
}


@pytest.mark.parametrize("case", CASES)
def test_an_invalid_update_is_refused_with_the_reason(case):
    change, words = CASES[case]
    assert re.search(words, reason(change) or "")


@pytest.mark.parametrize("precision", [None, "tensor", "row", "element", "ones"])
@pytest.mark.parametrize("tasks", [("finding", "lungs"), ("lungs",), ("finding",)])
def test_a_valid_update_is_admitted(precision, tasks):
    state, schema = toy()
    update = make_update("a", state, schema, precision=precision, tasks=tasks)
    update.metrics = {"lungs/dice": math.nan}
    assert expected().refusal("a", update) is None


@pytest.mark.parametrize("aggregator", [BayesianAggregator(), FisherMerging(), InverseVariance()])
@pytest.mark.parametrize("size", [1e-12, 1e-3, 1e3])
def test_curvature_of_any_ordinary_size_is_admitted(aggregator, size):
    state, schema = toy()
    update = make_update("a", state, schema, precision=None)
    for block in update.blocks.values():
        raw = {key: torch.rand(state[key].shape) ** 4 * size for key in block.delta if key in schema.parameters}
        block.precision, block.scale = aggregator.relative(raw)
    assert expected().refusal("a", update) is None


def test_a_change_that_leaves_the_range_of_float32_is_refused():
    large = toy()[0] | {BIAS: torch.full((5,), 3e38)}
    assert reason(lambda u: of(u).delta[BIAS].fill_(3e38), state=large) == f"{BIAS}: not finite after the change"
    assert reason(lambda u: None, state=large) is None


def test_a_site_counts_at_most_what_it_declared():
    def declared(**fields):
        return {"declared": {"a": Declaration(**fields)}}

    assert reason(num_examples(200), **declared(examples=200)) is None
    assert "at most 200" in (reason(num_examples(201), **declared(examples=200)) or "")
    assert reason(num_examples(201), declared={"b": Declaration(examples=200)}) is None
    assert "heads.lungs: more examples" in (reason(lambda u: None, **declared(tasks=frozenset({"finding"}))) or "")
    assert reason(lambda u: None, **declared(tasks=frozenset({"finding", "lungs"}))) is None
    assert reason(lambda u: u.samples.update(lungs=201), **declared(examples=200)) is not None
    assert reason(num_examples(MOST_EXAMPLES)) is None


def test_a_privacy_policy_may_hold_back_single_tensors():
    assert reason(lambda u: of(u).delta.pop(BIAS), declared={"a": Declaration(partial=True)}) is not None, (
        "its precision"
    )
    without = make_update("a", *toy(), precision=None)
    del of(without).delta[BIAS]
    assert expected(declared={"a": Declaration(partial=True)}).refusal("a", without) is None
    assert "missing" in (expected().refusal("a", without) or "")


def test_extra_tensors_are_refused_where_the_aggregator_uses_none():
    assert reason(lambda u: None, sends_extra=False) == "extra tensors that the aggregator does not use"
    assert reason(lambda u: u.extra.clear(), sends_extra=False) is None


@pytest.mark.parametrize("rounding", ["none", "fp16", "int8"])
def test_what_is_read_back_from_disk_passes(tmp_path, rounding):
    from federation.privacy.accounting import PrivacyMemory
    from federation.privacy.policy import PrivacyPolicy

    state, schema = toy()
    update = make_update("a", state, schema)
    if rounding != "none":
        update, _, _ = PrivacyPolicy(rounding=rounding).apply(update, PrivacyMemory(), schema.parameters)
    save_update(update, tmp_path / "a.safetensors")
    back = load_update(tmp_path / "a.safetensors")
    assert expected().refusal("a", back) is None
    save_update(dataclasses.replace(back, round=1), tmp_path / "a.safetensors")
    assert "another round" in (expected().refusal("a", load_update(tmp_path / "a.safetensors")) or "")

"""The contract of every aggregator."""

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor

from federation.aggregators import (
    Aggregator,
    BayesianAggregator,
    CoordinateMedian,
    Ditto,
    Exchange,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedBN,
    FedProx,
    FedYogi,
    FineTuned,
    FisherMerging,
    InverseVariance,
    Local,
    PersonalModel,
    Pooled,
    Scaffold,
    TrimmedMean,
    merge,
)
from federation.bayes.curvature import NoCurvature
from federation.exchange.schema import State
from tests.fixtures.toy_federation import make_update, toy

MEANS: dict[str, Callable[[], Aggregator]] = {
    "fedavg": FedAvg,
    "equal": lambda: FedAvg("equal"),
    "fedprox": lambda: FedProx(0.1),
    "fedbn": FedBN,
    "ditto": lambda: Ditto(0.3),
    "fine-tuned": lambda: FineTuned(after=1),
    "scaffold": Scaffold,
    "median": CoordinateMedian,
    "trimmed": lambda: TrimmedMean(0.3),
    "fisher-merging": FisherMerging,
    "inverse-variance": InverseVariance,
    "bayesian": lambda: BayesianAggregator(momentum=0),
    "bayesian-counts": lambda: BayesianAggregator(momentum=0, a=1, rho=1, kappa=0),
    "bayesian-loud": lambda: BayesianAggregator(b=0.5, momentum=0),
    "bayesian-row": lambda: BayesianAggregator(momentum=0, granularity="row", beta=0.1),
    "bayesian-off": lambda: BayesianAggregator(NoCurvature(), momentum=0),
    "bayesian-between": lambda: BayesianAggregator(momentum=0, between=True, personal_models=True),
    "bayesian-remember": lambda: BayesianAggregator(momentum=0, remember=True, gamma=0.5),
}
STEPPING: dict[str, Callable[[], Aggregator]] = {
    "fedavgm": FedAvgM,
    "fedavgm-ahead": lambda: FedAvgM(lookahead=True),
    "fedadam": FedAdam,
    "fedyogi": FedYogi,
    "bayesian-default": BayesianAggregator,
    "bayesian-behind": lambda: BayesianAggregator(lookahead=False),
    "bayesian-eta": lambda: BayesianAggregator(eta=1.5),
}
MERGING = MEANS | STEPPING
EVERY = MERGING | {"local": Local, "pooled": Pooled}
KEEPS_SITES = {"median", "trimmed", "scaffold", "bayesian-between", "bayesian-remember"}


def over(table: dict[str, Callable[[], Aggregator]]) -> Any:
    return pytest.mark.parametrize("make", list(table.values()), ids=list(table))


def same(one: State, other: State) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert torch.equal(value, other[key]), key


def tensors(thing: Any) -> Iterator[Tensor]:
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, dict):
        for value in thing.values():
            yield from tensors(value)
    elif isinstance(thing, list | tuple | set):
        for value in thing:
            yield from tensors(value)
    elif hasattr(thing, "__dict__"):
        yield from tensors({name: value for name, value in vars(thing).items() if name != "_state"})


@over(EVERY)
def test_strategy_objects_are_complete_and_pickled(make):
    aggregator, (_, schema) = make(), toy()
    assert isinstance(aggregator.exchange, Exchange)
    assert aggregator.personal is None or isinstance(aggregator.personal, PersonalModel)
    assert aggregator.data in ("sites", "pooled")
    assert pickle.loads(pickle.dumps(aggregator)).exchange.local_keys(schema) == aggregator.exchange.local_keys(schema)


@over(EVERY)
def test_local_keys_hold_every_personal_block_and_are_never_merged(make):
    state, schema = toy()
    aggregator = make()
    local = aggregator.exchange.local_keys(schema)
    assert schema.personal_keys() <= local <= schema.shapes.keys()
    assert (local == schema.shapes.keys()) == (not aggregator.exchange.merged)
    assert (schema.norms <= local) == (not aggregator.exchange.global_model)
    update = make_update("a", state, schema)
    update.counters |= {key: state[key] + 1 for key in schema.counters}
    merged = merge(aggregator, state, schema, [update])
    same({key: merged[key] for key in local}, {key: state[key] for key in local})


@over(EVERY)
def test_sites_without_change_change_nothing(make):
    state, schema = toy()
    sites = ["a"] if make is Pooled else ["a", "b", "c"]
    updates = [make_update(site, state, schema, seed=i, size=0.0) for i, site in enumerate(sites)]
    for update in updates:
        update.counters = {}
    same(merge(make(), state, schema, updates), state)


@over(EVERY)
def test_a_round_without_updates_changes_nothing(make):
    state, schema = toy()
    same(merge(make(), state, schema, []), state)


@over(MEANS)
def test_identical_sites_move_like_one_site(make):
    state, schema = toy()
    updates = [
        make_update(site, state, schema, seed=7, num_examples=n) for site, n in {"a": 10, "b": 300, "c": 41}.items()
    ]
    aggregator = make()
    merged = merge(aggregator, state, schema, updates)
    for block in updates[0].blocks.values():
        for key, delta in block.delta.items():
            local = key in aggregator.exchange.local_keys(schema)
            torch.testing.assert_close(merged[key], state[key] if local else state[key] + delta, rtol=1e-6, atol=1e-6)


@over(MERGING)
def test_order_of_arrival_changes_no_bit(make):
    state, schema = toy()
    sizes = {"a": 10, "b": 300, "c": 41, "d": 3}
    updates = [
        make_update(site, state, schema, i, num_examples=n, precision=["element", "row", None, "tensor"][i])
        for i, (site, n) in enumerate(sizes.items())
    ]
    first = merge(make(), state, schema, updates)
    for order in permutations(updates):
        same(merge(make(), state, schema, order), first)


@over(MERGING)
def test_wrong_order_and_repeated_sites_are_refused(make):
    state, schema = toy()
    for later in ("a", "b"):
        aggregator = make()
        aggregator.start(state, schema)
        aggregator.add(make_update("b", state, schema))
        with pytest.raises(ValueError, match="name order"):
            aggregator.add(make_update(later, state, schema))


@over(EVERY)
def test_an_unlabelled_task_stays_unchanged(make):
    state, schema = toy()
    sites = ["a"] if make is Pooled else ["a", "b"]
    merged = merge(make(), state, schema, [make_update(s, state, schema, i, ["finding"]) for i, s in enumerate(sites)])
    for key in schema.block("heads.lungs").keys:
        assert torch.equal(merged[key], state[key])
    moved = [not torch.equal(merged[key], state[key]) for key in schema.block("heads.finding").keys]
    assert all(moved) != (make is Local)


@over({name: make for name, make in EVERY.items() if name != "bayesian-remember"})
def test_a_task_without_further_labels_stays_unchanged_for_every_starting_state(make):
    state, schema = toy()
    aggregator = make()
    sites = ["a"] if make is Pooled else ["a", "b"]
    for number, tasks in enumerate([["finding", "lungs"], ["finding"], ["finding"]]):
        before, begun = state, aggregator.starting_state(state)
        updates = [make_update(s, begun, schema, 10 * number + i, tasks, round=number) for i, s in enumerate(sites)]
        state = merge(aggregator, begun, schema, updates)
        assert state.keys() == before.keys()
    for key in schema.block("heads.lungs").keys:
        assert torch.equal(state[key], before[key])


@over(MEANS)
def test_a_site_without_a_task_leaves_its_decoder_to_the_owners(make):
    state, schema = toy()
    owner = make_update("b", state, schema, seed=2, num_examples=3)
    without = [
        make_update("a", state, schema, 1, ["finding"], 1000),
        make_update("c", state, schema, 3, ["finding"], 1000),
    ]
    merged = merge(make(), state, schema, [*without, owner])
    for key, delta in owner.blocks["heads.lungs"].delta.items():
        torch.testing.assert_close(merged[key], state[key] + delta, rtol=1e-6, atol=1e-6)


@over(EVERY)
def test_blocks_without_examples_and_personal_blocks_are_never_merged(make):
    state, schema = toy()
    update = make_update("a", state, schema)
    update.blocks["heads.lungs"].num_examples = 0
    update.blocks["loss"] = copy.deepcopy(update.blocks["heads.finding"])
    update.blocks["loss"].delta = {"loss.weights": torch.ones(2)}
    merged = merge(make(), state, schema, [update])
    for key in (*schema.block("heads.lungs").keys, "loss.weights"):
        assert torch.equal(merged[key], state[key])


@over(EVERY)
def test_counters_take_the_largest_value(make):
    state, schema = toy()
    (counter,) = schema.counters
    for values, expected in {(9, 3): 9, (2, 3): 5}.items():
        updates = [make_update(site, state, schema) for site in ("a", "b")][: 1 if make is Pooled else 2]
        for update, value in zip(updates, values, strict=False):
            update.counters = {counter: torch.tensor(value)}
        merged = merge(make(), state, schema, updates)
        stays = not make().exchange.global_model
        assert merged[counter] == (5 if stays else expected)
        assert merged[counter].dtype == torch.int64


@over(EVERY)
def test_every_key_shape_and_type_survives_and_the_start_is_not_written_to(make):
    state, schema = toy()
    state["heads.lungs.bias"] = state["heads.lungs.bias"].half()
    before = copy.deepcopy(state)
    aggregator = make()
    for round in range(2):
        sites = ["a"] if make is Pooled else ["a", "b"]
        merged = merge(
            aggregator, state, schema, [make_update(s, state, schema, i, round=round) for i, s in enumerate(sites)]
        )
        assert {k: (v.shape, v.dtype) for k, v in merged.items()} == {k: (v.shape, v.dtype) for k, v in state.items()}
    same(state, before)


def rounds(make: Callable[[], Aggregator], restarts: bool) -> tuple[State, Aggregator]:
    """Run four rounds with a changing set of sites; a restart keeps what weights-only loading lets through."""
    state, schema = toy()
    aggregator = make()
    for number, sites in enumerate(["ab", "abc", "b", "ac"]):
        begun = aggregator.starting_state(state)
        updates = [
            make_update(
                s, begun, schema, 10 * number + i, ["finding"] if s == "b" else ["finding", "lungs"], round=number
            )
            for i, s in enumerate(sites[: 1 if make is Pooled else 3])
        ]
        state = merge(aggregator, begun, schema, updates)
        if restarts:
            file = io.BytesIO()
            torch.save({"state": state, "aggregator": aggregator.state_dict()}, file)
            file.seek(0)
            loaded = torch.load(file, weights_only=True)
            state, aggregator = loaded["state"], make()
            aggregator.load_state_dict(loaded["aggregator"])
    return state, aggregator


@over(EVERY)
def test_a_restarted_run_equals_an_uninterrupted_one(make):
    straight, one = rounds(make, restarts=False)
    resumed, other = rounds(make, restarts=True)
    same(straight, resumed)
    parameter, start = torch.full((5, 6), 0.5), torch.zeros(5, 6)
    for site in ("a", "b", "never seen"):
        pulls = [a.site_objective(site).gradient("encoder.0.weight", parameter, start) for a in (one, other)]
        assert (pulls[0] is None) == (pulls[1] is None)
        assert pulls[0] is None or torch.equal(pulls[0], pulls[1])


@over(MERGING)
@pytest.mark.parametrize("kinds", [["zero", "zero"], ["zero", "element"], [None, "row"], ["row", "element"]])
def test_precision_that_is_zero_missing_or_of_another_grain_gives_numbers(make, kinds):
    state, schema = toy()
    updates = [make_update("ab"[i], state, schema, i, precision=kind) for i, kind in enumerate(kinds)]
    for update in updates:
        for block in update.blocks.values():
            block.scale = dict.fromkeys(block.scale, 0.0)
    merged = merge(make(), state, schema, updates)
    for key, value in merged.items():
        assert value.isfinite().all(), key


@over({name: make for name, make in MERGING.items() if name not in KEEPS_SITES})
def test_memory_does_not_grow_with_the_number_of_sites(make):
    state, schema = toy()
    aggregator = make()
    aggregator.start(state, schema)
    held = []
    for i in range(20):
        aggregator.add(make_update(f"site{i:02}", state, schema, i))
        held.append(sum(t.numel() * t.element_size() for t in tensors(aggregator)))
    rows = sum(len(state[key]) for key in schema.parameters)
    assert held[-1] - held[0] <= 4 * 19 * rows  # the site memory: one number a row, a bias and a norm


@over(EVERY)
def test_site_objectives_are_pickled_and_fit_the_parameters(make):
    _, aggregator = rounds(make, restarts=False)
    state, _ = toy()
    personal = aggregator.personal.objective if aggregator.personal else None
    for objective in (aggregator.site_objective("a"), personal):
        if objective is None:
            continue
        copied = pickle.loads(pickle.dumps(objective))
        for name in ("encoder.0.weight", "encoder.3.weight", "heads.lungs.bias"):
            here, there = (r.gradient(name, state[name] + 1, state[name]) for r in (objective, copied))
            assert (here is None) == (there is None)
            if here is not None:
                assert here.shape == state[name].shape
                assert torch.equal(here, there)

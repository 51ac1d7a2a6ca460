"""The merge from sums alone: what each site adds, and how the server turns the totals into the next state.

A library building block: ``fit`` does not use it (see ``docs/privacy.md``).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from federation.aggregators.bayesian import BayesianAggregator
from federation.aggregators.fedavg import FedAvg
from federation.aggregators.weighted_mean import WeightedMeans
from federation.exchange.schema import Schema, State
from federation.exchange.update import Update
from mtmedformer.errors import ConfigError


def summands(
    aggregator: FedAvg, update: Update, schema: Schema, declared: Mapping[str, Mapping[str, int]] | None = None
) -> dict[str, Tensor]:
    r"""Return a site's summands: for every weight $c\, \Delta$ (``top``) and $c$ (``bottom``), float64.

    For a running mean of BatchNorm $c\, \Delta^2$ (``square``) too, from which the merged variance follows.

    $c$ is the aggregator's ``weight``, $n^a (r + \kappa)$ for the Bayesian one. A block that the site did not train is
    zero in both, so the totals do not reveal which site has labels for which task. Counters and ``num_examples`` are
    not sent.

    Args:
        aggregator: As configured at the server; needs no state.
        update: The site's update.
        schema: The model's schema.
        declared: By site and block name, the labelled images that every site of the round declared before it. Needed
            where the weight of a site depends on the counts of the others (``BayesianAggregator.balance_tasks``).

    Raises:
        ConfigError: When the aggregator needs more than sums, or counts that are not given.
    """
    require_sums(aggregator)
    if declared is not None:
        aggregator.expect(declared, schema)
    elif isinstance(aggregator, BayesianAggregator) and aggregator.balance_tasks:
        raise ConfigError(
            "BayesianAggregator as configured weights a site by its share of each task, which depends on the other "
            "sites' counts; give the counts that the sites declared, or set aggregator.balance_tasks to false"
        )
    local = aggregator.exchange.local_keys(schema)
    sums: dict[str, Tensor] = {}
    statistics = schema.statistics()
    for block in schema.blocks:
        sent = update.blocks.get(block.name)
        for key in (key for key in block.keys if key not in local):
            weight = torch.zeros(schema.shapes[key], dtype=torch.float64)
            change = torch.zeros_like(weight)
            if sent is not None and sent.num_examples > 0 and key in sent.delta:
                weight += aggregator.weight(update.site, sent, key)
                change = sent.delta[key].double()
            sums[f"top|{key}"], sums[f"bottom|{key}"] = weight * change, weight
            if key in statistics:
                sums[f"square|{key}"] = weight * change.square()
    return sums


def merge_sums(aggregator: FedAvg, state: State, sums: Mapping[str, Tensor], schema: Schema) -> State:
    """Return the next global state from the totals of ``summands``; a weight that no site trained stays, bit for bit.

    Args:
        aggregator: The same as at the sites.
        state: The state that the sites started from (``Aggregator.starting_state``).
        sums: Totals by name.
        schema: The model's schema.
    """
    require_sums(aggregator)
    merged, statistics = dict(state), schema.statistics()
    between: dict[str, Tensor] = {}
    for name, bottom in sums.items():
        kind, key = name.split("|", 1)
        if kind == "bottom" and bool((bottom > 0).any()):
            mean = torch.where(bottom > 0, sums[f"top|{key}"] / bottom, 0.0)
            if key in statistics:
                squares = torch.where(bottom > 0, sums[f"square|{key}"] / bottom, 0.0)
                between[statistics[key]] = squares.sub_(mean.square()).clamp_min_(0)
            change = aggregator.server.step(key, mean) if key in schema.parameters else mean
            merged[key] = (change + state[key]).to(state[key].dtype)
    for key, variance in between.items():
        merged[key] = merged[key].double().add_(variance).to(merged[key].dtype)
    return merged | aggregator.server.untouched_state()


def require_sums(aggregator: FedAvg) -> None:
    """Refuse an aggregator that needs single updates.

    Raises:
        ConfigError: When it does.
    """
    bayes = aggregator if isinstance(aggregator, BayesianAggregator) else None
    alone = bayes is None or not (bayes.memory.weights or bayes.beta > 0)
    plain = isinstance(aggregator.centre(), WeightedMeans) and not aggregator.site_objective("").sends_extra
    if not (alone and plain):
        raise ConfigError(
            f"{type(aggregator).__name__} as configured needs single updates, and secure summation reveals only their "
            "sum; switch between, remember and beta off, or choose FedAvg"
        )
    if bayes is not None and bayes.b > 0:
        raise ConfigError(
            "BayesianAggregator as configured needs single updates (each site's mean curvature); for secure summation "
            "set aggregator.b to 0"
        )

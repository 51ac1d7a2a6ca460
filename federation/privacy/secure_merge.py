"""The Bayesian merge from sums alone: what each site adds, and what the server makes of the totals."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from federation.aggregators.base import ClientObjective
from federation.aggregators.bayesian import BayesianAggregator
from federation.aggregators.fedavg import FedAvg
from federation.exchange.schema import Schema, State
from federation.exchange.update import Update
from mtmedformer.errors import ConfigError


def summands(aggregator: FedAvg, update: Update, schema: Schema) -> dict[str, Tensor]:
    r"""Return a site's summands: of every weight $c\, \Delta$ (``top``) and $c$ (``bottom``), float64.

    $c = n^a (r + \kappa)$ as the aggregator has it. A block the site did not train is zeros in both, so the server does
    not learn who holds which task. Counters and ``num_examples`` are not sent.

    Args:
        aggregator: As the server configured it; needs no state.
        update: The site's update.
        schema: The model's schema.

    Raises:
        ConfigError: When the aggregator needs more than sums.
    """
    require_sums(aggregator)
    found: dict[str, Tensor] = {}
    for block in schema.blocks:
        if block.personal:
            continue
        sent = update.blocks.get(block.name)
        for key in block.keys:
            if aggregator.personal_norms and key in schema.norms:
                continue
            weight = torch.zeros(schema.shapes[key], dtype=torch.float64)
            change = torch.zeros_like(weight)
            if sent is not None and sent.num_examples > 0 and key in sent.delta:
                weight += aggregator.weight(sent, key)
                change = sent.delta[key].double()
            found[f"top|{key}"], found[f"bottom|{key}"] = weight * change, weight
    return found


def merge_sums(aggregator: FedAvg, state: State, sums: Mapping[str, Tensor], schema: Schema) -> State:
    """Return the next global state from the totals of ``summands``; a weight nobody trained stays, bit for bit.

    Args:
        aggregator: The same as the sites'.
        state: The state that the sites began at, as ``Aggregator.starting_state`` gave it.
        sums: Totals by name.
        schema: The model's schema.
    """
    require_sums(aggregator)
    merged = dict(state)
    for name, bottom in sums.items():
        kind, key = name.split("|", 1)
        if kind == "bottom" and bool((bottom > 0).any()):
            mean = torch.where(bottom > 0, sums[f"top|{key}"] / bottom, 0.0)
            change = aggregator.step(key, mean) if key in schema.parameters else mean
            merged[key] = (change + state[key]).to(state[key].dtype)
    return merged | aggregator.untouched_state()


def require_sums(aggregator: FedAvg) -> None:
    """Refuse an aggregator that must see single updates.

    Raises:
        ConfigError: When it does.
    """
    bayes = aggregator if isinstance(aggregator, BayesianAggregator) else None
    alone = bayes is None or not (bayes.memory.weights or bayes.beta > 0)
    plain = (
        type(aggregator).centre is FedAvg.centre
        and type(aggregator.client_objective("")).extra is ClientObjective.extra
    )
    if not (alone and plain):
        raise ConfigError(
            f"{type(aggregator).__name__} as configured looks at single updates, and secure summation shows none; "
            "switch between, remember and beta off, or choose FedAvg"
        )
    if bayes is not None and bayes.b > 0:
        raise ConfigError(
            "BayesianAggregator as configured looks at single updates, at how loud each site's loss is; for secure "
            "summation set aggregator.b to 0"
        )

"""The weights of sites in a merge: by their shares of the tasks, and by the variance between sites."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from federation.exchange.schema import Schema


def task_shares(
    examples: Mapping[str, Mapping[str, int]], schema: Schema, evidence: Callable[[int], float]
) -> dict[str, float]:
    r"""Return the weight of each site in the blocks that all tasks share: every task has the weight 1 in total.

    A task's weight is divided among the sites with labels for it, $e(n_{kt}) / \sum_j e(n_{jt})$, and the weight of a
    site is the sum over its tasks. Training on the union of the data weights a site in this way, since the hybrid loss
    is a mean over tasks. Sites that trained a shared block for no task with a head share the weight of one more task.

    Args:
        examples: By site and block name, the labelled images of the round.
        schema: The model's schema.
        evidence: The weight of so many labelled images, above 0.

    Example:
        >>> from federation.exchange.schema import Block, Schema
        >>> blocks = Block("encoder", ()), Block("heads.pneumonia", (), "pneumonia"), Block("heads.lungs", (), "lungs")
        >>> schema = Schema(blocks, {}, frozenset(), frozenset(), ())
        >>> counts = {"a": {"heads.pneumonia": 300}, "b": {"heads.pneumonia": 100}, "c": {"heads.lungs": 20}}
        >>> task_shares(counts, schema, evidence=float)
        {'a': 0.75, 'b': 0.25, 'c': 1.0}
    """
    heads = {block.name for block in schema.blocks if block.task is not None}
    groups: dict[str, dict[str, float]] = {}
    for site, counts in sorted(examples.items()):
        own = {name: n for name, n in counts.items() if name in heads and n > 0}
        for name, n in (own or {"": max(counts.values(), default=0)}).items():
            if n > 0:
                groups.setdefault(name, {})[site] = evidence(n)
    shares: dict[str, float] = {}
    for _, members in sorted(groups.items()):
        total = math.fsum(members.values())
        for site, weight in members.items():
            shares[site] = shares.get(site, 0.0) + weight / total
    return dict(sorted(shares.items()))


def between_variance(changes: Sequence[Tensor], precisions: Sequence[float]) -> float:
    r"""Estimate the variance between sites in one tensor, beyond the noise within each site.

    DerSimonian and Laird's moment estimator, averaged over the $N$ elements: with $p_k$ the precision of site $k$ and
    $\bar\Delta$ the $p$-weighted mean, $Q = \frac1N \sum_k p_k \lVert \Delta_k - \bar\Delta \rVert^2$ and
    $\tau^2 = \max\bigl(0, (Q - (K - 1)) / (\sum p - \sum p^2 / \sum p)\bigr)$.

    Args:
        changes: One tensor per site, all of one shape.
        precisions: Precision of each site's tensor, in 1/weight², above 0.

    Returns:
        The variance, in weight²; 0 for a single site.

    Reference:
        DerSimonian and Laird, Meta-analysis in clinical trials, Controlled Clinical Trials 7, 1986, equation 8.
    """
    if len(changes) < 2:
        return 0.0
    weights = torch.tensor(precisions, dtype=torch.float64)
    stacked = torch.stack([change.double().flatten() for change in changes])
    mean = weights @ stacked / weights.sum()
    q = float(weights @ (stacked - mean).square_().mean(1))
    spread = float(weights.sum() - weights.square().sum() / weights.sum())
    return max(0.0, (q - (len(changes) - 1)) / spread)

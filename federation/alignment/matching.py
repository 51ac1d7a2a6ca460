"""Match a site's units to those of a reference: the distances of all pairs, and the best assignment."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from federation.alignment.groups import Part, PermutationGroup, Side
from federation.exchange.schema import State

GAIN = 0.05
"""Least share by which a matching must lower the distance to the reference; otherwise no unit is moved."""

LOW, HIGH = 0.01, 100.0
"""Range of a unit's precision relative to the mean of its group, so that units without gradient are matched too."""


def order_of(group: PermutationGroup, state: State, reference: State, precision: Mapping[str, Tensor]) -> Tensor | None:
    """Return the site's unit for each place of the reference, int64 (units,); ``None`` where all stay."""
    known = relative_precision(group, state, precision)
    if not group.circuits and settled(compared_rows(group, state, reference, known)):
        return None
    return best_matching(pair_scores(group, state, reference, known))


def best_matching(score: Tensor) -> Tensor | None:
    """Return the unit for each place with the largest sum of scores (places, units); ``None`` where all stay."""
    diagonal = score.diagonal()
    stays = (diagonal >= score.amax(1)).all() and (diagonal >= score.amax(0)).all()
    if bool(stays) or not bool(score.isfinite().all()):
        return None
    order = torch.from_numpy(linear_sum_assignment(score.numpy(), maximize=True)[1])
    before = -float(diagonal.double().sum())
    after = -float(score.double()[torch.arange(len(order)), order].sum())
    return order if before - after > GAIN * before else None


def pair_scores(group: PermutationGroup, state: State, reference: State, known: Mapping[Part, Tensor]) -> Tensor:
    """Return minus the distance of every place of the reference to every unit of the site: float32 (places, units)."""
    score = (
        _row_score(compared_rows(group, state, reference, known))
        if group.rows
        else torch.zeros(group.units, group.units)
    )
    for first, second in group.circuits:
        sides = [_read_side(side, group.units, s) for s in (reference, state) for side in (first, second)]
        means = [known[part].mean((1, 2)) for part in first + second if part in known]
        score += _product_distance(*sides) * (torch.stack(means).mean(0) if means else 1.0)
    return score.clamp_(max=0)


ComparedRows = list[tuple[Tensor, Tensor, Tensor]]
"""Per part: weights of the reference and of the site, both (units, features), and the precision of the site's."""


def compared_rows(
    group: PermutationGroup, state: State, reference: State, known: Mapping[Part, Tensor]
) -> ComparedRows:
    """Return the weights to compare by element; a precision is (units, features), or (units, 1) for all features."""
    rows = []
    for part in group.rows:
        place = _read(part, group.units, reference[part.key]).flatten(1)
        unit = _read(part, group.units, state[part.key]).flatten(1)
        sure = known.get(part, torch.ones(group.units, 1, 1)).flatten(1)
        if 1 < sure.shape[1] < unit.shape[1]:  # one number per row of the head
            sure = sure.repeat_interleave(unit.shape[1] // sure.shape[1], 1)
        rows.append((place, unit, sure))
    return rows


def _row_score(rows: ComparedRows) -> Tensor:
    r"""Return $-\frac12 \sum_d s_{ld} (m_{id} - w_{ld})^2$ for all pairs, as one matrix product."""
    left, right = [], []
    for place, unit, sure in rows:
        square = place.square().mul_(-0.5)
        weighted = sure * unit
        left += [place, square if sure.shape[1] > 1 else square.sum(1, keepdim=True), torch.ones(len(unit), 1)]
        right += [weighted, sure, (weighted * unit).sum(1, keepdim=True).mul_(-0.5)]
    return torch.cat(left, 1) @ torch.cat(right, 1).T


def settled(rows: ComparedRows) -> bool:
    """Return whether every unit is nearest to its own place, as far as an eighth of the weights shows.

    A distance over some of the weights is a lower bound of the distance over all, so ``True`` is certain; ``False``
    means that the full distances are needed.
    """
    own = torch.stack([(sure * (place - unit).square()).sum(1) for place, unit, sure in rows]).sum(0).mul_(-0.5)
    others = _row_score([(place[:, ::8], unit[:, ::8], sure[:, ::8]) for place, unit, sure in rows]).fill_diagonal_(
        -torch.inf
    )
    return bool((own >= others.amax(1)).all() and (own >= others.amax(0)).all())


def _product_distance(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    r"""Return $-\frac12 \lVert A_i^\top B_i - C_l^\top D_l \rVert^2$ for all pairs without forming a product.

    Args:
        a: The reference's first sides, (heads, width, features).
        b: Its second sides; the number of features may differ.
        c: The site's first sides.
        d: The site's second sides.
    """
    heads, width = a.shape[:2]

    def between(x: Tensor, y: Tensor) -> Tensor:
        return (x.flatten(0, 1) @ y.flatten(0, 1).T).view(heads, width, heads, width)

    def own(x: Tensor, y: Tensor) -> Tensor:
        return ((x @ x.mT) * (y @ y.mT)).sum((1, 2))

    return (between(a, c) * between(b, d)).sum((1, 3)) - 0.5 * (own(a, b)[:, None] + own(c, d)[None])


def relative_precision(group: PermutationGroup, state: State, precision: Mapping[str, Tensor]) -> dict[Part, Tensor]:
    """Return each part's precision over the group's mean, clipped: (units, width or 1, features or 1)."""
    found: dict[Part, Tensor] = {}
    total, count = 0.0, 0
    for part in group.parts:
        value, weight = precision.get(part.key), state[part.key]
        if value is None:
            continue
        if value.numel() == 1:
            read = value.float().reshape(1, 1, 1).cpu().expand(group.units, 1, 1)
        elif value.ndim == weight.ndim and value.shape[part.dim] == weight.shape[part.dim]:
            read = _read(part, group.units, value)
        else:
            read = _read(part, group.units, value.expand(weight.shape))
        found[part] = read
        numbers = weight.numel() // weight.shape[part.dim] * part.width * group.units
        total, count = total + float(read.double().mean()) * numbers, count + numbers
    if not total > 0:  # nothing known, or nothing finite
        return {}
    return {part: (read * (count / total)).clamp_(LOW, HIGH) for part, read in found.items()}


def _read(part: Part, units: int, value: Tensor) -> Tensor:
    """Return a part's weights by unit, float32 (units, width, features) on the CPU."""
    span = value.detach().narrow(part.dim, part.offset, units * part.width).movedim(part.dim, 0)
    return span.reshape(units, part.width, -1).float().cpu()


def _read_side(side: Side, units: int, state: State) -> Tensor:
    """Return a side's weights and biases by head, (heads, width, features)."""
    return torch.cat([_read(part, units, state[part.key]) for part in side], 2)

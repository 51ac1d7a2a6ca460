"""The product's namesake: each site's weights are an observation, as precise as its data make them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from federation.aggregators.base import ClientObjective
from federation.aggregators.fedopt import FedAvgM
from federation.aggregators.fedprox import Proximal
from federation.bayes.curvature import Curvature, NoCurvature, SquaredGradients, normalise
from federation.bayes.posterior import Factor, Posterior, SiteMemory, relative_precision
from federation.exchange.schema import Schema, State
from federation.exchange.update import BlockUpdate, Update
from mtmedformer.errors import ConfigError

MAX_CURVATURE_RATIO = 10.0
"""Greatest factor, up or down, by which a tensor's mean curvature changes a site's weight (before the power ``b``)."""


class BayesianAggregator(FedAvgM):
    r"""Merge the sites' Gaussian beliefs about every weight, a block at a time, over the sites that hold its labels.

    Site $k$ observes weight $i$ with precision $c_k (r_{ki} + \kappa)$, $c_k = n_k^a\, \bar\lambda_k^b$: $n_k$ labelled
    samples, mean curvature $\bar\lambda_k$ of its loss in the tensor, and curvature relative to that mean, tempered by
    $\rho$ and shrunk by $\kappa$. The global weight moves by the precision-weighted mean of the changes, filtered over
    rounds:

    $$v_i \leftarrow \mu\, v_i + \frac{\sum_k c_k (r_{ki} + \kappa)\, \Delta_{ki}}{\sum_k c_k (r_{ki} + \kappa)},
      \qquad w_i \leftarrow w_i + \eta\, v_i$$

    where with ``lookahead`` the sites measured $\Delta$ from $w + \eta \mu v$, the mean of their prior. With the
    curvature off (``rho`` and ``b`` 0, or ``NoCurvature``) this is FedAvg, with ``momentum`` FedAvgM, with or without
    lookahead, bit for bit: by counts at ``a`` 1, of equal sites at ``a`` 0, on the same sums. The mathematics of the
    paper that gave the product its name are not public; these are ours, derived and compared in
    ``docs/federation/mathematics.md``.

    While updates stream in, its sums take two copies of the model, ``momentum`` one and ``lookahead`` another.
    ``between`` and ``remember`` keep every site's weights and precision on the server: one to two copies a site.

    Args:
        curvature: What measures curvature during a site's training; ``None`` is the running mean of squared gradients,
            which costs nothing. ``NoCurvature`` turns precision off.
        granularity: Whether precision differs by ``element``, by output ``row``, or by ``tensor``.
        rho: Tempering of the relative curvature, in [0, 1]: 1 takes it as measured, which did best on validation where
            sites differ (``docs/results/``); 0 turns it off.
        low: Least relative curvature, before tempering.
        high: Greatest relative curvature, before tempering.
        a: Power of ``num_examples``, in [0, 1]: 1 counts samples; 0 counts every owner the same, which does better
            where sites differ and ``momentum`` is off, and matters little with it. ``between`` ignores it and estimates
            from the updates how much sites differ.
        b: Power of the mean curvature of a site's loss in a tensor, in [0, 1]: 0 lets no site win by a louder loss, 1
            takes it as measured, up to 10 times more or less than the sites' last. A site that is served badly has the
            louder loss.
        kappa: Shrinkage towards the owners' mean, at least 0.
        momentum: How much of the last round's step goes on into the next, $\mu$ in [0, 1): where rounds agree, the step
            becomes up to $1 / (1 - \mu)$ times as long.
        lookahead: Whether the sites begin a round where past rounds predict the weights to be, $w + \eta \mu v$, and
            not at $w$. The step is as long, but it is measured at its end: a long ``momentum`` is safe then.
        eta: Length of the server's step.
        between: Estimate each tensor's variance between sites (DerSimonian and Laird) and weigh sites by
            1 / (within + between), with within = 1 / (num_examples × curvature), absolute this time.
        remember: Keep the weights of sites that are away and count them on, discounted by ``gamma``.
        gamma: Discount per round of what an absent site last said, in [0, 1]; for the posterior in any case, for the
            merge with ``remember`` or ``between``.
        beta: Pull of local training towards the global weights, weighted by the server's relative precision a row;
            where there is none yet it is FedProx with ``mu = beta``.
        personal_models: Give each site a model of its own, $w_g + d_k$: it follows the global weights, and its
            deviation $d_k$ is kept and trained on at the site, which takes a second local training per round.

    Raises:
        ConfigError: When a number is out of its range, or the granularity is unknown.
    """

    personal_follows = True

    def __init__(
        self,
        curvature: Curvature | None = None,
        granularity: Literal["element", "row", "tensor"] = "element",
        rho: float = 1.0,
        low: float = 0.01,
        high: float = 100.0,
        a: float = 1.0,
        b: float = 0.0,
        kappa: float = 0.1,
        momentum: float = 0.7,
        lookahead: bool = True,
        eta: float = 1.0,
        between: bool = False,
        remember: bool = False,
        gamma: float = 0.9,
        beta: float = 0.0,
        personal_models: bool = False,
    ) -> None:
        super().__init__(momentum, eta, "equal", lookahead)
        self.power = a
        for name, value in {"rho": rho, "a": a, "b": b, "gamma": gamma}.items():
            if not 0 <= value <= 1:
                raise ConfigError(f"aggregator.{name}: {value} is outside [0, 1]")
        if not 0 <= momentum < 1:
            raise ConfigError(f"aggregator.momentum: {momentum} is outside [0, 1)")
        for name, value in {"kappa": kappa, "beta": beta}.items():
            if value < 0:
                raise ConfigError(f"aggregator.{name}: {value} is negative; use 0 or more")
        if granularity not in ("element", "row", "tensor"):
            raise ConfigError(f"aggregator.granularity: {granularity!r} is none of 'element', 'row', 'tensor'")
        self.curvature = SquaredGradients() if curvature is None else curvature
        self.needs_precision = (rho > 0 or b > 0) and not isinstance(self.curvature, NoCurvature)
        self.granularity, self.rho, self.low, self.high = granularity, rho, low, high
        self.b, self.kappa, self.between, self.gamma, self.beta = b, kappa, between, gamma, beta
        self.remember = remember
        self.personal_models = personal_models
        self.memory = SiteMemory(weights=between or remember)
        self._levels: dict[str, float] = {}
        self.variances: dict[str, float] = {}
        """Variance between sites by tensor, where it is estimated."""

    def start(self, state: State, schema: Schema) -> None:
        """Begin a round from the state that the sites began at."""
        super().start(state, schema)
        self._sent: dict[str, set[str]] = {}
        self._levels = self.memory.levels() if self.b > 0 else {}

    def add(self, update: Update) -> None:
        """Take one site's update, into the sums and into the site memory.

        Raises:
            ValueError: When updates do not come in the order of the site names, or one site comes twice.
        """
        if self.between:
            self._receive(update)
        else:
            super().add(update)
        for name, block in update.blocks.items():
            if block.num_examples > 0 and not self._schema.block(name).personal:
                self._sent.setdefault(name, set()).add(update.site)
        self.memory.replace(update, self._state, self._schema)

    def finish(self) -> State:
        """Return the next global state; what absent sites last said, and what needs all sites at once, joins here."""
        for name, present in sorted(self._sent.items()):
            owners = self.memory.owners(name)
            for key in self._schema.block(name).keys:
                if self.between:
                    self._estimate(key, owners)
                for site, factor in owners.items():
                    weight = self._remembered(key, factor)
                    if key in factor.weights and weight is not None and (self.between or site not in present):
                        self._means.add(key, factor.weights[key] - self._state[key], weight)
        return super().finish()

    def weight(self, block: BlockUpdate, key: str) -> Tensor | float:
        r"""Return $n^a \bar\lambda^b (r + \kappa) / (1 + \kappa)$, which is $n^a$ without curvature."""
        count = super().weight(block, key)
        if not self.needs_precision:
            return count
        count *= self._curvature_scale(key, block.scale.get(key, 1.0))
        relative = relative_precision(block, key)
        return _shrunk(relative, self.kappa).mul_(count) if relative.ndim else count

    def relative(self, curvature: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Return relative precision and mean curvature by key, as an update carries them."""
        return normalise(curvature, self.granularity, self.rho, self.low, self.high)

    def client_objective(self, site: str) -> ClientObjective:
        """Return the pull towards the global weights, strongest where the server is surest."""
        if self.beta == 0:
            return ClientObjective()
        precision = self.memory.precision(self.gamma) if self.needs_precision else {}
        return Proximal(self.beta, {key: value / value.mean() for key, value in precision.items() if value.mean() > 0})

    def posterior(self, state: State, schema: Schema) -> Posterior:
        r"""Return the posterior of the global weights: every site's latest $\gamma^{age} n_k \lambda_k$, summed.

        Args:
            state: The global state.
            schema: The model's schema.
        """
        blocks = {block.name: block.keys for block in schema.blocks if not block.personal}
        return Posterior(state, self.memory.precision(self.gamma), blocks, self.memory.summary())

    def personal_objective(self, site: str) -> ClientObjective | None:
        """Return that a site trains its own model freely; that it rides on the global one ties it enough."""
        return ClientObjective() if self.personal_models else None

    def state_dict(self) -> dict[str, Any]:
        """Return the site memory, the variances between sites and the momentum of every tensor."""
        kept = {"memory": self.memory.state_dict(), "variances": dict(self.variances)}
        return kept | {"velocity": dict(self._moments)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take memory, variances and momentum up."""
        self.memory.load_state_dict(state["memory"])
        self.variances = dict(state["variances"])
        self._moments = dict(state.get("velocity", {}))

    def _curvature_scale(self, key: str, curvature: float) -> float:
        """Return what a tensor's mean curvature counts, over the sites' last; 1 while nothing is known of those."""
        if key not in self._levels:
            return 1.0
        return math.pow(min(max(curvature / self._levels[key], 1 / MAX_CURVATURE_RATIO), MAX_CURVATURE_RATIO), self.b)

    def _precision(self, key: str, factor: Factor) -> Tensor:
        """Return the absolute precision of a site's tensor, num_examples × curvature (1 if not measured), float64."""
        curvature = factor.curvature.get(key, torch.ones(())) if self.needs_precision else torch.ones(())
        return curvature.double() * factor.num_examples

    def _estimate(self, key: str, owners: dict[str, Factor]) -> None:
        """Estimate a tensor's variance between its owners from their latest weights."""
        held = [factor for factor in owners.values() if key in factor.weights]
        if held:
            self.variances[key] = between_variance(
                [factor.weights[key] - self._state[key] for factor in held],
                [float(self._precision(key, factor).mean()) for factor in held],
            )

    def _remembered(self, key: str, factor: Factor) -> Tensor | None:
        """Return what a factor in the memory weighs in the merge; ``None`` where it is to be left out."""
        discount = self.gamma ** self.memory.age(factor)
        if discount == 0 or not (self.between or self.remember):
            return None
        precision = self._precision(key, factor)
        if self.between:
            return _shrunk(1 / (1 / precision + self.variances[key]), self.kappa).mul_(discount)
        count = math.pow(factor.num_examples, self.power)
        if self.needs_precision:
            count *= self._curvature_scale(key, float(factor.curvature[key].mean()) if key in factor.curvature else 1.0)
        return _shrunk(precision / precision.mean(), self.kappa).mul_(discount * count)


def between_variance(changes: Sequence[Tensor], precisions: Sequence[float]) -> float:
    r"""Estimate how much sites truly differ in one tensor, beyond what the noise within each explains.

    DerSimonian and Laird's moment estimator, averaged over the $N$ elements: with $p_k$ the precision of site $k$ and
    $\bar\Delta$ the $p$-weighted mean, $Q = \frac1N \sum_k p_k \lVert \Delta_k - \bar\Delta \rVert^2$ and
    $\tau^2 = \max\bigl(0, (Q - (K - 1)) / (\sum p - \sum p^2 / \sum p)\bigr)$.

    Args:
        changes: One tensor a site, all of one shape.
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


def _shrunk(precision: Tensor, kappa: float) -> Tensor:
    """Mix a precision with its own mean, in place; a scalar stays as it is, to the last bit."""
    return precision if precision.ndim == 0 else precision.add_(kappa * precision.mean()).div_(1 + kappa)

"""The Bayesian merge: each site's weights are an observation, with a precision measured during its training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import override

from federation.aggregators.base import Exchange, PersonalModel, SiteObjective
from federation.aggregators.fedavg import FedAvg
from federation.aggregators.fedprox import Proximal
from federation.aggregators.server_step import Momentum
from federation.bayes.curvature import Curvature, NoCurvature, SquaredGradients, normalise
from federation.bayes.posterior import Factor, Posterior, SiteMemory, relative_precision
from federation.bayes.site_weights import between_variance, task_shares
from federation.exchange.schema import Schema, State
from federation.exchange.update import BlockUpdate, Update
from mtmedformer.errors import ConfigError

MAX_CURVATURE_RATIO = 10.0
"""Greatest factor, up or down, by which a tensor's mean curvature changes a site's weight (before the power ``b``)."""


class BayesianAggregator(FedAvg):
    r"""Merge the sites' Gaussian estimates of every weight, per block, over the sites that hold its labels.

    Site $k$ observes weight $i$ with precision $c_k (r_{ki} + \kappa)$, $c_k = s_k\, \bar\lambda_k^b$: its share $s_k$,
    mean curvature $\bar\lambda_k$ of its loss in the tensor, and curvature relative to that mean, tempered by $\rho$
    and shrunk by $\kappa$. In the head of a task the share is the site's evidence, $e(n) = (n / (1 + n / n_0))^a$ for
    $n$ labelled images. In the blocks that all tasks share, with ``balance_tasks``, every task weighs the same:
    $s_k = \sum_t e(n_{kt}) / \sum_j e(n_{jt})$ over the tasks of the site. The global weight moves by the
    precision-weighted mean of the changes, filtered over rounds:

    $$v_i \leftarrow \mu\, v_i + \frac{\sum_k c_k (r_{ki} + \kappa)\, \Delta_{ki}}{\sum_k c_k (r_{ki} + \kappa)},
      \qquad w_i \leftarrow w_i + \eta\, v_i$$

    where with ``lookahead`` the sites measured $\Delta$ from $w + \eta \mu v$, the mean of their prior. With the
    curvature off (``rho`` and ``b`` 0, or ``NoCurvature``) and without ``balance_tasks`` and ``saturation`` this is
    FedAvg, with ``momentum`` FedAvgM, with or without lookahead, bit for bit: by counts at ``a`` 1, of equal sites at
    ``a`` 0, on the same sums. The mathematics of the paper that gave the product its name are not public; these are our
    own, derived and compared in ``docs/federation/mathematics.md``.

    The sums take two copies of the model, ``momentum`` one and ``lookahead`` another. ``between`` and ``remember`` keep
    every site's weights and precision on the server: one to two copies per site.

    Args:
        curvature: Measures the curvature during a site's training; ``None`` is the running mean of squared gradients,
            at no extra cost. ``NoCurvature`` turns precision off.
        granularity: Whether precision differs by ``element``, by output ``row``, or by ``tensor``.
        rho: Tempering of the relative curvature, in [0, 1]: 1 uses it as measured, which was best on validation data
            where sites differ (``docs/results``); 0 turns it off.
        low: Least relative curvature, before tempering.
        high: Greatest relative curvature, before tempering.
        a: Power of the evidence, in [0, 1]: 1 weights by labelled images, up to ``saturation``; 0 gives every owner the
            same weight. ``between`` ignores it and estimates from the updates how much sites differ.
        b: Exponent of a tensor's mean curvature, in [0, 1]. 0 ignores it; 1 weights sites by it, clipped to a factor of
            10 around last round's geometric mean. Poorly fitted sites have larger curvature.
        kappa: Shrinkage towards the owners' mean, at least 0.
        momentum: Share of the last round's step that is added to the next, $\mu$ in [0, 1). Where rounds agree, the
            step becomes up to $1 / (1 - \mu)$ times as long.
        lookahead: Whether the sites start a round at the predicted weights, $w + \eta \mu v$, instead of $w$. The step
            has the same length but is measured at its end, which makes a long ``momentum`` safe.
        eta: Length $\eta$ of the server's step.
        between: Estimate each tensor's variance between sites (DerSimonian and Laird) and weight sites by
            1 / (within + between), with within = 1 / (num_examples × curvature), absolute in this case.
        remember: Keep the last weights of absent sites and include them in the merge, discounted by ``gamma``.
        gamma: Discount per round of absence, in [0, 1]: always for the posterior, for the merge with ``remember`` or
            ``between``.
        beta: Pull of local training towards the global weights, weighted by the server's relative precision per row;
            without a precision it is FedProx with ``mu = beta``.
        personal_models: Give each site a personal model $w_g + d_k$: it follows the global weights, and the site keeps
            its deviation $d_k$ and trains it further, which takes a second local training per round.
        balance_tasks: Whether every task has the same weight in the blocks that all tasks share, as in the hybrid loss
            on the union of the data. Otherwise a site weighs $n_k^a$ there too, and the task with most images decides.
            ``between`` ignores it.
        personal_from: Round, from 0, in which the personal models start, from the global weights. The last fifth of the
            rounds costs a fifth more training instead of twice as much.
        saturation: Labelled images $n_0$ above which more images of a site add little evidence: sites far below it
            weigh by their images, sites far above it all the same. It is the ratio of the variance of a single image to
            the variance between sites in a random-effects model. Infinity switches it off.

    Raises:
        ConfigError: When a number is out of its range, or the granularity is unknown.

    Example:
        >>> import torch
        >>> from federation.exchange.schema import Block, Schema
        >>> from federation.exchange.update import BlockUpdate, Update
        >>> schema = Schema((Block("encoder", ("w",)),), {"w": (2,)}, frozenset({"w"}), frozenset(), ())
        >>> bayes = BayesianAggregator(kappa=0, momentum=0)
        >>> bayes.start({"w": torch.zeros(2)}, schema)
        >>> for site, change, curvature in (("a", [1.0, 1.0], [3.0, 1.0]), ("b", [5.0, 5.0], [1.0, 3.0])):
        ...     precision, scale = bayes.relative({"w": torch.tensor(curvature)})
        ...     block = BlockUpdate(10, {"w": torch.tensor(change)}, precision, scale)
        ...     bayes.add(Update(site, 0, "", "", {"encoder": block}))
        >>> bayes.finish()["w"]
        tensor([2., 4.])
    """

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
        balance_tasks: bool = True,
        personal_from: int = 0,
        saturation: float = 100.0,
    ) -> None:
        super().__init__("equal")
        for name, value in {"rho": rho, "a": a, "b": b, "gamma": gamma}.items():
            if not 0 <= value <= 1:
                raise ConfigError(f"aggregator.{name}: {value} is outside [0, 1]")
        if not 0 <= momentum < 1:
            raise ConfigError(f"aggregator.momentum: {momentum} is outside [0, 1)")
        for name, value in {"kappa": kappa, "beta": beta}.items():
            if value < 0:
                raise ConfigError(f"aggregator.{name}: {value} is negative; use 0 or more")
        if personal_from < 0:
            raise ConfigError(f"aggregator.personal_from: {personal_from} is negative; use 0 or a later round")
        if not saturation > 0:
            raise ConfigError(f"aggregator.saturation: {saturation} is not above 0; a large number weights by images")
        if granularity not in ("element", "row", "tensor"):
            raise ConfigError(f"aggregator.granularity: {granularity!r} is none of 'element', 'row', 'tensor'")
        self.curvature = SquaredGradients() if curvature is None else curvature
        self.granularity, self.rho, self.low, self.high = granularity, rho, low, high
        self.a, self.b, self.kappa = a, b, kappa
        self.momentum, self.lookahead, self.eta = momentum, lookahead, eta
        self.between, self.remember, self.gamma, self.beta = between, remember, gamma, beta
        self.personal_models, self.balance_tasks = personal_models, balance_tasks
        self.power = a
        self.server = Momentum(momentum, eta, lookahead)
        measures = (rho > 0 or b > 0) and not isinstance(self.curvature, NoCurvature)
        self.exchange = Exchange(curvature=self.curvature if measures else None)
        self.personal_from, self.saturation = personal_from, saturation
        self.personal = PersonalModel(keeps="deviation", first_round=personal_from) if personal_models else None
        self.memory = SiteMemory(weights=between or remember)
        self._levels: dict[str, float] = {}
        self._shares: dict[str, float] = {}
        self._shared: frozenset[str] = frozenset()
        self.variances: dict[str, float] = {}
        """Variance between sites per tensor, where it is estimated."""

    @override
    def start(self, state: State, schema: Schema) -> None:
        super().start(state, schema)
        self._sent: dict[str, set[str]] = {}
        self._levels = self.memory.levels() if self.b > 0 else {}

    @override
    def expect(self, examples: Mapping[str, Mapping[str, int]], schema: Schema) -> None:
        if not self.balance_tasks:
            return
        counts = dict(examples)
        if self.remember:
            absent = {site: factors for site, factors in self.memory.factors.items() if site not in counts}
            counts |= {site: {name: f.num_examples for name, f in own.items()} for site, own in absent.items()}
        self._shares = task_shares(counts, schema, self.evidence)
        self._shared = frozenset(key for block in schema.blocks if block.task is None for key in block.keys)

    @override
    def add(self, update: Update) -> None:
        if self.between:
            self.sums.receive(update)  # the changes are added in ``finish``, when the variances are known
        else:
            super().add(update)
        for name, block in update.blocks.items():
            if block.num_examples > 0 and not self.sums.schema.block(name).personal:
                self._sent.setdefault(name, set()).add(update.site)
        self.memory.replace(update, self.sums.state, self.sums.schema)

    @override
    def finish(self) -> State:
        for name, present in sorted(self._sent.items()):
            owners = self.memory.owners(name)
            for key in self.sums.schema.block(name).keys:
                if self.between:
                    self._estimate(key, owners)
                for site, factor in owners.items():
                    weight = self._remembered(site, key, factor)
                    if key in factor.weights and weight is not None and (self.between or site not in present):
                        self.sums.add(key, factor.weights[key] - self.sums.state[key], weight)
        return super().finish()

    @override
    def weight(self, site: str, block: BlockUpdate, key: str) -> Tensor | float:
        r"""Return $s \bar\lambda^b (r + \kappa) / (1 + \kappa)$, which is the site's share $s$ without curvature."""
        count = self._share(site, block.num_examples, key)
        if not self.exchange.precision:
            return count
        count *= self._curvature_scale(key, block.scale.get(key, 1.0))
        relative = relative_precision(block, key)
        return _shrunk(relative, self.kappa).mul_(count) if relative.ndim else count

    @override
    def relative(self, curvature: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, float]]:
        return normalise(curvature, self.granularity, self.rho, self.low, self.high)

    @override
    def site_objective(self, site: str) -> SiteObjective:
        if self.beta == 0:
            return SiteObjective()
        precision = self.memory.precision(self.gamma) if self.exchange.precision else {}
        return Proximal(self.beta, {key: value / value.mean() for key, value in precision.items() if value.mean() > 0})

    def posterior(self, state: State, schema: Schema) -> Posterior:
        r"""Return the posterior of the global weights: every site's latest $\gamma^{age} n_k \lambda_k$, summed.

        Args:
            state: The global state.
            schema: The model's schema.
        """
        blocks = {block.name: block.keys for block in schema.blocks if not block.personal}
        return Posterior(state, self.memory.precision(self.gamma), blocks, self.memory.summary())

    @override
    def state_dict(self) -> dict[str, Any]:
        kept = {"memory": self.memory.state_dict(), "variances": dict(self.variances)}
        return kept | {"server": self.server.state_dict()}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.memory.load_state_dict(state["memory"])
        self.variances = dict(state["variances"])
        self.server.load_state_dict(state["server"])

    def _curvature_scale(self, key: str, curvature: float) -> float:
        """Return the factor for a tensor's mean curvature, relative to the sites' last; 1 while those are unknown."""
        if key not in self._levels:
            return 1.0
        ratio = min(max(curvature / self._levels[key], 1 / MAX_CURVATURE_RATIO), MAX_CURVATURE_RATIO)
        return math.pow(ratio, self.b)

    def _precision(self, key: str, factor: Factor) -> Tensor:
        """Return the absolute precision of a site's tensor, num_examples × curvature (1 if not measured), float64."""
        curvature = factor.curvature.get(key, torch.ones(())) if self.exchange.precision else torch.ones(())
        return curvature.double() * factor.num_examples

    def _estimate(self, key: str, owners: dict[str, Factor]) -> None:
        """Estimate a tensor's variance between its owners from their latest weights."""
        held = [factor for factor in owners.values() if key in factor.weights]
        if held:
            self.variances[key] = between_variance(
                [factor.weights[key] - self.sums.state[key] for factor in held],
                [float(self._precision(key, factor).mean()) for factor in held],
            )

    def evidence(self, num_examples: int) -> float:
        r"""Return the weight $e(n)$ of so many labelled images of a site."""
        return math.pow(num_examples / (1 + num_examples / self.saturation), self.power)

    def _share(self, site: str, num_examples: int, key: str) -> float:
        """Return a site's weight before its precision: its share of the tasks in a shared block, else $n^a$."""
        return self._shares[site] if key in self._shared else self.evidence(num_examples)

    def _remembered(self, site: str, key: str, factor: Factor) -> Tensor | None:
        """Return the weight of a remembered factor in the merge; ``None`` where it is left out."""
        discount = self.gamma ** self.memory.age(factor)
        if discount == 0 or not (self.between or self.remember):
            return None
        precision = self._precision(key, factor)
        if self.between:
            return _shrunk(1 / (1 / precision + self.variances[key]), self.kappa).mul_(discount)
        count = self._share(site, factor.num_examples, key)
        if self.exchange.precision:
            curvature = float(factor.curvature[key].mean()) if key in factor.curvature else 1.0
            count *= self._curvature_scale(key, curvature)
        return _shrunk(precision / precision.mean(), self.kappa).mul_(discount * count)


def _shrunk(precision: Tensor, kappa: float) -> Tensor:
    """Mix a precision with its own mean, in place; a scalar stays unchanged, bit for bit."""
    return precision if precision.ndim == 0 else precision.add_(kappa * precision.mean()).div_(1 + kappa)

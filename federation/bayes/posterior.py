"""The posterior of the global weights: each site's latest factor per block, their product, and samples of it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from federation.exchange.schema import Schema, State
from federation.exchange.update import BlockUpdate, Update
from mtmedformer.errors import ConfigError, DataError
from mtmedformer.storage.atomic_write import atomic_write

FLOOR = 1e-6  # least precision, relative to the mean of the tensor: avoids 0/0, the other sites determine the value
LEAST_CURVATURE = 1e-12  # curvature of a tensor without any gradient


def relative_precision(block: BlockUpdate, key: str) -> Tensor:
    """Return the relative precision of one tensor, scaled to mean 1 and above 0: float32, scalar 1 if none was sent.

    The server divides by the mean once more, so no site gains weight by sending larger numbers. A constant precision,
    0 included, is returned as the scalar 1.
    """
    one = torch.ones(())
    if key not in block.precision:
        return one
    precision = block.precision[key].to(torch.float32, copy=True)
    if bool(precision.amin() == precision.amax()):
        return one
    return precision.div_(precision.mean()).clamp_min_(FLOOR)


@dataclass
class Factor:
    r"""A site's latest update of one block: an observation of its weights with precision num_examples × curvature.

    Attributes:
        num_examples: Labelled samples of the update.
        round: Round of the update.
        curvature: By parameter, mean curvature × relative precision; broadcasts to the parameter.
        weights: By key, the site's weights after its training; empty where only precision is stored.
    """

    num_examples: int
    round: int
    curvature: State = field(default_factory=dict)
    weights: State = field(default_factory=dict)


class SiteMemory:
    """One factor per site and block, replaced when the site sends the block again, so no data count twice.

    Without weights it is small: the curvature of a matrix or kernel is kept as one number per output row. With weights
    it takes one copy of the model per site, and another if precision is per element.

    Args:
        weights: Whether to keep the sites' weights and full precision.
    """

    def __init__(self, weights: bool = False) -> None:
        self.weights = weights
        self.round = 0
        self.factors: dict[str, dict[str, Factor]] = {}

    def replace(self, update: Update, start: State, schema: Schema) -> None:
        """Replace a site's factors by those of its new update.

        Args:
            update: The site's update.
            start: The global weights it began with.
            schema: The model's schema.
        """
        self.round = max(self.round, update.round)
        known = self.factors.setdefault(update.site, {})
        for name, block in update.blocks.items():
            if block.num_examples > 0 and not schema.block(name).personal:
                curvature = {
                    key: self._kept(
                        relative_precision(block, key).mul_(max(block.scale.get(key, 1.0), LEAST_CURVATURE))
                    )
                    for key in block.delta
                    if key in schema.parameters
                }
                # cloned together: interleaved with large intermediates they would fragment the memory
                curvature = {key: value.clone() for key, value in curvature.items()}
                weights = {key: start[key] + delta for key, delta in block.delta.items()} if self.weights else {}
                known[name] = Factor(block.num_examples, update.round, curvature, weights)

    def owners(self, block: str) -> dict[str, Factor]:
        """Return every factor of a block by site, in the order of the site names."""
        return {site: self.factors[site][block] for site in sorted(self.factors) if block in self.factors[site]}

    def age(self, factor: Factor) -> int:
        """Return the age of a factor in rounds."""
        return self.round - factor.round

    def precision(self, gamma: float) -> State:
        r"""Return the posterior precision of every parameter, $\sum_k \gamma^{age_k} n_k \lambda_k$, float32.

        Args:
            gamma: Discount per round of absence, in [0, 1].
        """
        total: dict[str, Tensor] = {}
        for site in sorted(self.factors):
            for factor in self.factors[site].values():
                weight = gamma ** self.age(factor) * factor.num_examples
                for key, curvature in factor.curvature.items():
                    term = curvature.double() * weight
                    total[key] = total[key] + term if key in total else term
        return {key: value.float() for key, value in total.items()}

    def levels(self) -> dict[str, float]:
        """Return the mean curvature of every parameter, the geometric mean over the sites' latest factors."""
        logs: dict[str, list[float]] = {}
        for site in sorted(self.factors):
            for factor in self.factors[site].values():
                for key, curvature in factor.curvature.items():
                    logs.setdefault(key, []).append(math.log(max(float(curvature.double().mean()), LEAST_CURVATURE)))
        return {key: math.exp(math.fsum(found) / len(found)) for key, found in logs.items()}

    def summary(self) -> dict[str, dict[str, dict[str, int]]]:
        """Return num_examples and age by site and block, for the report."""
        return {
            site: {name: {"num_examples": f.num_examples, "age": self.age(f)} for name, f in blocks.items()}
            for site, blocks in sorted(self.factors.items())
        }

    def state_dict(self) -> dict[str, Any]:
        """Return every factor as plain containers of tensors and numbers."""
        plain = {
            site: {
                name: {"num_examples": f.num_examples, "round": f.round, "curvature": f.curvature, "weights": f.weights}
                for name, f in blocks.items()
            }
            for site, blocks in self.factors.items()
        }
        return {"round": self.round, "factors": plain}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self.round = state["round"]
        self.factors = {
            site: {name: Factor(**fields) for name, fields in blocks.items()}
            for site, blocks in state["factors"].items()
        }

    def _kept(self, curvature: Tensor) -> Tensor:
        if curvature.ndim > 1 and not self.weights:
            curvature = curvature.flatten(1).mean(1).reshape(-1, *[1] * (curvature.ndim - 1))
        return curvature.float()


@dataclass
class Posterior:
    r"""A Gaussian over the global weights, $\mathcal N(\mu, \mathrm{diag}(S)^{-1})$, with $S$ the sum of the sites'.

    Attributes:
        mean: The global state.
        precision: By parameter, $S$ in 1/weight²; broadcasts to the parameter. Others are not sampled.
        blocks: Keys of every block by its name.
        sites: ``num_examples`` and age of each site's factor by site and block.
        tuning: Settings for sampling, chosen on validation data (``callbacks.TunePosterior``): ``blocks``, ``seed``
            and, by task, ``scale``, ``message`` and the ``nll`` at every scale tried; empty before.
    """

    mean: State
    precision: State
    blocks: dict[str, tuple[str, ...]]
    sites: dict[str, dict[str, dict[str, int]]] = field(default_factory=dict)
    tuning: dict[str, Any] = field(default_factory=dict)

    def sample(self, seed: int, scale: float = 1.0, blocks: Sequence[str] | None = None, damping: float = 0.1) -> State:
        r"""Draw a state: $\mu + s\,\varepsilon / \sqrt{S + d\,\bar S}$ with $\bar S$ the mean of $S$ over the tensor.

        A tensor's noise depends on the seed and its name alone: the same for every scale and choice of blocks.

        Args:
            seed: Seed of the draw.
            scale: $s$; 0 returns the mean. The raw Gaussian ($s = 1$) is nearly always too wide for a deep network:
                tune it on validation sums (``federation.bayes.uncertainty.tune_scale``).
            blocks: Blocks to draw; ``None`` draws all.
            damping: $d$, which bounds the deviation of weights with little precision.

        Raises:
            ConfigError: When a block is not one of the posterior's.
        """
        unknown = sorted(set(blocks or ()) - self.blocks.keys())
        if unknown:
            raise ConfigError(f"blocks: {', '.join(unknown)} unknown; there are {', '.join(self.blocks)}")
        drawn = dict(self.mean)
        if scale == 0:
            return drawn
        for name in self.blocks if blocks is None else blocks:
            for key in self.blocks[name]:
                precision = self.precision.get(key)
                if precision is not None and bool(precision.mean() > 0):
                    deviation = scale / (precision + damping * precision.mean()).sqrt()
                    noise = torch.randn(self.mean[key].shape, generator=_generator(seed, key))
                    drawn[key] = (self.mean[key] + noise * deviation).to(self.mean[key].dtype)
        return drawn

    def save(self, file: Path) -> None:
        """Write the posterior as safetensors, atomically."""
        states = {"mean": self.mean, "precision": self.precision}
        tensors = {f"{kind}|{key}": value for kind, state in states.items() for key, value in state.items()}
        facts = {"blocks": self.blocks, "sites": self.sites, "tuning": self.tuning}
        plain = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
        with atomic_write(file) as part:
            save_file(plain, part, metadata={"posterior": json.dumps(facts)})

    @classmethod
    def load(cls, file: Path) -> Posterior:
        """Read a posterior; the file format cannot run code.

        Raises:
            DataError: When the file is not a posterior.
        """
        try:
            with safetensors.safe_open(file, framework="pt") as opened:
                facts = json.loads(opened.metadata()["posterior"])
                states: dict[str, State] = {"mean": {}, "precision": {}}
                for name in opened.keys():  # noqa: SIM118 (not a dict)
                    kind, key = name.split("|", 1)
                    states[kind][key] = opened.get_tensor(name)
            blocks = {name: tuple(keys) for name, keys in facts["blocks"].items()}
            return cls(**states, blocks=blocks, sites=facts["sites"], tuning=facts.get("tuning", {}))
        except (safetensors.SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise DataError(f"{file.name}: not a posterior ({type(error).__name__}: {error})") from error


def _scale(block: BlockUpdate, key: str) -> float:
    return max(block.scale.get(key, 1.0), LEAST_CURVATURE)


def _generator(seed: int, key: str) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed}|{key}".encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest))

"""A site's privacy policy: select blocks, clip, add noise and round an update before it is sent, and report it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from federation.aggregators.base import Aggregator
from federation.aggregators.bayesian import BayesianAggregator
from federation.exchange.quantization import Rounding, decoded, encoded, step_of
from federation.exchange.schema import Schema, State, block_of
from federation.exchange.update import BlockUpdate, Update, norms_of, sha256
from federation.privacy.accounting import PrivacyMemory, PrivacyReport, add, guarantee, require_accountant
from federation.privacy.dp_sgd import ExamplePrivacy, refuse_batch_norm, refuse_coupled_losses
from federation.privacy.random_stream import key_of, new_key, normals
from mtmedformer.errors import ConfigError, DataError

LEAST = 2.0**-14  # least normal number of half precision: a precision must stay above 0


@dataclass
class PrivacyPolicy:
    r"""Process a site's update before it is sent; each step is off by default.

    In this order: blocks that may not be sent are removed; the change of the weights is clipped to an L2 norm, all
    blocks together; Gaussian noise is added to every trained weight; the result is rounded, and the rounding error is
    added to the site's next update (error feedback). Rounding uses the noised change only, so the guarantee is not
    affected.

    Under a guarantee (``noise_multiplier`` or ``examples``) an update holds the change of trained weights and nothing
    else that was computed from images: ``num_examples`` is sent as 1, so that owners of a block count the same, and
    curvature, counters, buffers, samples, steps, seconds, training metrics and shares of moved units stay at the site.
    The names of the sent blocks show which tasks the site has labels for; this is treated as public.
    ``docs/privacy.md`` explains the guarantees and their limits.

    Args:
        clip: Greatest L2 norm of the whole change of the weights; a larger one is scaled down to it; ``null``: none.
        noise_multiplier: Standard deviation of the noise on each weight, in units of ``clip``; 0 adds none.
        delta: δ, the probability for which the guarantee may fail, in (0, 1).
        blocks: Blocks that may be sent: ``encoder``, ``heads.<task>``; ``null`` is all. The others stay at the site and
            continue from its own last weights.
        precision: Whether curvature may be sent; ``null``: unless there is a guarantee, which does not cover it.
        rounding: ``fp16`` or ``int8`` for transfer; aggregators receive float32. Curvature is then sent as fp16.
        examples: Clip and noise the gradients of each patient during local training (DP-SGD); ``null``: off.
        seed: Seed of the noise. **Anyone who knows it can remove the noise**: for simulations only. ``null`` draws
            a key from the operating system, which stays at the site.

    Raises:
        ConfigError: When a value is out of range, or there is noise and Opacus, which computes ε, is missing.
    """

    clip: float | None = None
    noise_multiplier: float = 0.0
    delta: float = 1e-5
    blocks: list[str] | None = None
    precision: bool | None = None
    rounding: Rounding = "none"
    examples: ExamplePrivacy | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.clip is not None and not 0 < self.clip < math.inf:
            raise ConfigError(f"privacy.clip is {self.clip}; give a norm above 0, or null for no clipping")
        if not 0 <= self.noise_multiplier < math.inf:
            raise ConfigError(f"privacy.noise_multiplier is {self.noise_multiplier}; give 0 or more")
        if self.noise_multiplier > 0 and self.clip is None:
            raise ConfigError("privacy.noise_multiplier is in units of privacy.clip, which is not set; set it too")
        if not 0 < self.delta < 1:
            raise ConfigError(f"privacy.delta is {self.delta}; give a probability in (0, 1), well below 1 / patients")
        if self.rounding not in ("none", "fp16", "int8"):
            raise ConfigError(f"privacy.rounding is {self.rounding!r}; choose none, fp16 or int8")
        if self.blocks == []:
            raise ConfigError(
                "privacy.blocks is empty; name the blocks that may be sent, or exclude the site with data.only"
            )
        if self.guarantees and self.precision:
            raise ConfigError(
                "privacy.precision=true, but curvature is computed from images and no noise covers it; set it to "
                "false, or noise_multiplier to 0 and examples to null"
            )
        if self.guarantees:
            require_accountant()

    @property
    def guarantees(self) -> bool:
        """Whether noise is added, so that there is an (ε, δ) guarantee."""
        return self.noise_multiplier > 0 or self.examples is not None

    @property
    def sends_precision(self) -> bool:
        """Whether curvature may be sent."""
        return not self.guarantees if self.precision is None else self.precision

    def may_leave(self, block: str) -> bool:
        """Return whether a block may be sent."""
        return self.blocks is None or block in self.blocks

    def check(self, module: nn.Module, schema: Schema, aggregator: Aggregator, distributed: bool = False) -> None:
        """Check the model and the aggregator against the policy.

        Args:
            module: The module the sites train.
            schema: Its schema.
            aggregator: How updates are merged.
            distributed: Whether several processes train each site together.

        Raises:
            ConfigError: When the policy does not hold for them.
        """
        known = [block.name for block in schema.blocks if not block.personal]
        unknown = sorted(set(self.blocks or ()) - set(known))
        if unknown:
            raise ConfigError(f"privacy.blocks: no block is called {', '.join(unknown)}; there are {', '.join(known)}")
        if aggregator.data == "pooled":
            raise ConfigError(
                "privacy: the Pooled aggregator trains on all data in one place; choose another one, or no privacy"
            )
        if isinstance(aggregator, BayesianAggregator) and aggregator.between and not self.sends_precision:
            raise ConfigError(
                "privacy: aggregator.between needs the sites' curvature and example counts, which this policy does "
                "not send; set aggregator.between to false"
            )
        if self.noise_multiplier > 0:
            if aggregator.site_objective("").sends_extra:
                raise ConfigError(
                    f"privacy.noise_multiplier: {type(aggregator).__name__} sends more than the change of the weights, "
                    "and no noise covers that; choose FedAvg, FedProx or the Bayesian aggregator"
                )
            if aggregator.exchange.norms:
                refuse_batch_norm(module, "privacy.noise_multiplier", "or keep norms at the site with FedBN")
        if self.examples is not None:
            refuse_batch_norm(module, "privacy.examples")
            refuse_coupled_losses(module, distributed)

    def key(self, memory: PrivacyMemory) -> bytes:
        """Return the key of the site's noise; without a seed it is drawn once and kept in the memory."""
        if self.seed is not None:
            return key_of(self.seed)
        memory.key = memory.key or new_key().hex()
        return bytes.fromhex(memory.key)

    def apply(
        self, update: Update, memory: PrivacyMemory, trained: frozenset[str]
    ) -> tuple[Update, PrivacyMemory, PrivacyReport]:
        """Return the update to send, the memory to keep, and the report; the arguments are not changed.

        Args:
            update: The site's update.
            memory: The memory of earlier rounds, with this round's releases of ``examples``.
            trained: Names of the parameters that are trained; under a guarantee nothing else is sent.

        Raises:
            DataError: When a change is not finite.
        """
        memory, sent = memory.twin(), self._held_back(update, trained)
        norm = math.hypot(*norms_of(sent).values())
        if not math.isfinite(norm):
            raise DataError(f"site {update.site}: the change of the weights is not finite: its training has diverged")
        scale = 1.0 if self.clip is None or norm <= self.clip else self.clip / norm
        self._scale_and_noise(sent, scale, memory)
        if self.rounding != "none":
            self._round(sent, memory.residual)
        memory.norms.append(norm)
        add(memory.updates, self.noise_multiplier)
        report = PrivacyReport(
            names=sorted(sent.tensors()),
            bytes=sent.nbytes(),
            sha256=sha256(sent),
            norm=None if self.guarantees else norm,
            clipped=None if self.guarantees else norm * scale,
            norms=norms_of(sent),
            site=guarantee(memory.updates, "site", self.delta) if self.noise_multiplier > 0 else None,
            example=guarantee(memory.examples, self.examples.unit, self.delta) if self.examples else None,
        )
        return sent, memory, report

    def _held_back(self, update: Update, trained: frozenset[str]) -> Update:
        """Return the parts of an update that may be sent; blocks are new objects, tensors are shared."""
        blocks = {}
        for name, block in update.blocks.items():
            delta = {k: v for k, v in block.delta.items() if k in trained or not self.guarantees}
            if self.may_leave(name) and delta:
                measured = self.sends_precision
                blocks[name] = BlockUpdate(
                    num_examples=1 if self.guarantees else block.num_examples,
                    delta=delta,
                    precision=dict(block.precision) if measured else {},
                    scale=dict(block.scale) if measured else {},
                )
        sent = {key for block in blocks.values() for key in block.delta}
        held = {key for block in update.blocks.values() for key in block.delta} - sent
        extra = {k: v for k, v in update.extra.items() if k not in held and (self.blocks is None or k in sent)}
        if not self.guarantees:
            counters = {k: v for k, v in update.counters.items() if self.blocks is None or block_of(k) in self.blocks}
            return replace(update, blocks=blocks, counters=counters, extra=extra, rounding=self.rounding)
        if self.noise_multiplier > 0:
            extra = {}
        nothing: dict[str, Any] = {"counters": {}, "metrics": {}, "samples": {}, "steps": 0, "seconds": 0.0}
        return replace(update, blocks=blocks, extra=extra, rounding=self.rounding, **nothing)

    def _scale_and_noise(self, update: Update, scale: float, memory: PrivacyMemory) -> None:
        """Multiply every change and add noise to it, in float64."""
        width = self.noise_multiplier * self.clip if self.clip else 0.0
        if scale == 1 and width == 0:
            return
        for block in update.blocks.values():
            for key, delta in block.delta.items():
                changed = delta.double() * scale
                if width > 0:
                    label = f"update|{update.site}|{update.round}|{update.base}|{key}"
                    changed += width * normals(self.key(memory), label, tuple(delta.shape))
                block.delta[key] = changed.float()

    def _round(self, update: Update, residual: State) -> None:
        """Round every change plus the earlier rounding error, and keep the new error."""
        for block in update.blocks.values():
            for key, delta in block.delta.items():
                exact = delta + residual[key] if key in residual else delta
                step = step_of(exact, self.rounding)
                block.step[key] = step
                block.delta[key] = decoded(encoded(exact, step, self.rounding), step)
                residual[key] = exact - block.delta[key]
            for key, value in block.precision.items():
                block.precision[key] = value.clamp(LEAST, 1 / LEAST).half().float()


def policies_by_site(
    privacy: PrivacyPolicy | dict[str, PrivacyPolicy] | None, sites: Sequence[str], aggregator: Aggregator
) -> dict[str, PrivacyPolicy]:
    """Return each site's policy by its name; sites without one are absent.

    Args:
        privacy: One policy for all sites, or one by site.
        sites: Names of all sites.
        aggregator: How updates are merged.

    Raises:
        ConfigError: When a name is not a site, or when the counts of some sites would outweigh sites that send none.
    """
    if not isinstance(privacy, dict):
        return {} if privacy is None else dict.fromkeys(sites, privacy)
    unknown = sorted(set(privacy) - set(sites))
    if unknown:
        raise ConfigError(f"federation.privacy: no site is called {', '.join(unknown)}; there are {', '.join(sites)}")
    guarded = [site for site, policy in privacy.items() if policy.guarantees]
    if 0 < len(guarded) < len(sites) and aggregator.power > 0:
        raise ConfigError(
            f"federation.privacy: {', '.join(guarded)} would weigh as one image each, because counts are not sent "
            "under a guarantee, and the others by theirs; set aggregator.weights: equal (a: 0 for the Bayesian one)"
        )
    return dict(privacy)

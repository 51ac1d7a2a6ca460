"""Apply a site's privacy policy in one round: DP-SGD during local training, and the update before it is sent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning as L

from federation.exchange.update import Update
from federation.privacy.accounting import PrivacyMemory, add
from federation.privacy.dp_sgd import PrivateGradients
from federation.privacy.policy import PrivacyPolicy
from mtmedformer.errors import ConfigError


class OutgoingUpdate:
    """Applies a site's privacy policy in one round.

    Args:
        policy: The policy; ``None`` changes nothing.
        site: Name of the site.
        round: Number of the round, from 0.
        base: Hash of the global state at the start of the round.
        memory: ``PrivacyMemory.plain`` of earlier rounds; empty in the first.

    Raises:
        ConfigError: When earlier gradients were noised for another unit.
    """

    def __init__(
        self, policy: PrivacyPolicy | None, site: str, round: int, base: str, memory: Mapping[str, Any]
    ) -> None:
        self.policy = policy
        self.memory = PrivacyMemory(**memory).twin()
        self.gradients: PrivateGradients | None = None
        if policy is not None and policy.examples is not None:
            before, self.memory.unit = self.memory.unit, policy.examples.unit
            if before not in ("", policy.examples.unit):
                raise ConfigError(
                    f"privacy.examples.unit was {before} at the start of this federation; keep that value"
                )
            label = f"gradient|{site}|{round}|{base}"
            self.gradients = PrivateGradients(policy.examples, policy.key(self.memory), label)

    def attach_dp_sgd(self, module: L.LightningModule, trainer: L.Trainer) -> None:
        """Replace the module's gradients by clipped and noised ones, if the policy has ``examples``."""
        if self.gradients is not None:
            self.gradients.attach(module, trainer)

    def apply(self, update: Update, module: L.LightningModule) -> tuple[Update, dict[str, Any], dict[str, Any]]:
        """Return the update to send, the privacy memory, and the privacy report, both as plain values.

        Releases without noise are counted too, also without a policy: a later policy cannot undo them.
        """
        if self.gradients is None:
            add(self.memory.examples, 0.0)
        else:
            add(self.memory.examples, self.gradients.settings.noise_multiplier, self.gradients.releases)
        if self.policy is None:
            add(self.memory.updates, 0.0)
            return update, self.memory.plain(), {}
        trained = frozenset(name for name, parameter in module.named_parameters() if parameter.requires_grad)
        sent, memory, report = self.policy.apply(update, self.memory, trained)
        return sent, memory.plain(), report.plain()

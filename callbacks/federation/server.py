"""Makes a Trainer the server of a federation: its optimizer step puts the merged weights in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException

from callbacks.federation.site_trainers import SiteTrainers, processes_of
from federation.aggregators.base import Aggregator
from federation.alignment.groups import permutation_groups
from federation.client.lightning_internals import ServerLoop, copy_module, keep_metrics_local
from federation.client.site_trainer import SiteTrainer
from federation.client.train import RoundPlan, SiteState, TrainingInterrupt, state_of
from federation.exchange.schema import State, schema_of
from federation.privacy.policy import PrivacyPolicy
from federation.server.admission import Policy
from federation.server.outcome import RoundResult
from federation.server.round import Round
from federation.server.update_checks import Declaration
from mtmedformer.storage.hashing import state_hash


class MergedWeights(torch.optim.Optimizer):
    """Copies the merged weights into the server's module, bit for bit, as an optimizer step.

    Args:
        module: The server's module.

    Attributes:
        merged: The next global state; a weight without an entry stays as it is.
    """

    def __init__(self, module: L.LightningModule) -> None:
        super().__init__([p for p in module.parameters()], {"lr": 1.0})
        self.module = module
        self.merged: State = {}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Copy every merged weight and buffer."""
        for key, value in self.module.state_dict().items():
            if key in self.merged:
                value.copy_(self.merged[key])


class Server:
    """The server of a federation: it runs the rounds, and takes the optimizer steps of a Trainer.

    The module keeps all its methods. It is switched to manual optimization, in which Lightning leaves the steps to
    others, and the Trainer's manual-optimization loop is one that does not call ``training_step``. Its hooks around a
    training batch and epoch run as in any manual optimization, once per round, with ``outputs`` empty.

    Args:
        trainer: The Trainer that counts rounds.
        module: Its module, before its first step.
        aggregator: Merges the updates.
        policy: Handling of sites that fail.
        privacy: Privacy policy by site, already checked.
        trainers: Builds the Trainers of the sites.
        align: Whether the sites' hidden units are aligned to the global model.
        keep_optimizer: Whether the sites' optimizers keep their moments.

    Attributes:
        merged: The next global state; empty between rounds.
        seed: Seed of the run, from which every site derives its own.
        declared: By site, the most examples a round can use; an update that counts more is refused.
    """

    def __init__(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        aggregator: Aggregator,
        policy: Policy,
        privacy: Mapping[str, PrivacyPolicy],
        trainers: SiteTrainers,
        align: bool,
        keep_optimizer: bool,
    ) -> None:
        self.trainer, self.module, self.aggregator, self.policy = trainer, module, aggregator, policy
        self.privacy, self.trainers, self.keep_optimizer = privacy, trainers, keep_optimizer
        self.seed = 0
        self.declared: dict[str, Declaration] = {}
        self.template = copy_module(module)
        self.schema = schema_of(module)
        self.symmetries = permutation_groups(module) if align and aggregator.exchange.merged else ()
        keep_metrics_local(module)  # every process validates all images, so that all get the same metrics
        self._step = MergedWeights(module)
        self._automatic = module.automatic_optimization
        module.automatic_optimization = False
        self._loop = ServerLoop(trainer, self._step)

    @property
    def merged(self) -> State:
        """The next global state; empty between rounds."""
        return self._step.merged

    @property
    def sites_have_own_models(self) -> bool:
        """Whether some weights are not exchanged, so that the models of the sites differ from the global one."""
        own = self.aggregator.personal is not None or not self.aggregator.exchange.global_model
        return own or any(privacy.blocks is not None for privacy in self.privacy.values())

    def start(self) -> None:
        """Replace the optimizers that the module configured for training on images; call in ``on_fit_start``."""
        self.trainer.strategy.optimizers = [self._step]
        self.trainer.strategy.lr_scheduler_configs = []

    def run_round(
        self,
        names: Sequence[str],
        states: Mapping[str, SiteState],
        site_trainer: SiteTrainer,
        sites_at_once: int,
        folder: Path | None,
        steps: Mapping[str, int],
    ) -> RoundResult:
        """Train some sites from the module's weights, and merge their updates; the Trainer's next step applies them.

        Args:
            names: The sites, in the order of their names.
            states: State that each site kept from its earlier rounds.
            site_trainer: Trains one site.
            sites_at_once: Number of sites that train at the same time, where each has a process of its own.
            folder: The run folder; ``None`` writes nothing.
            steps: Optimizer steps by site; the others take the budget of their Trainer.

        Raises:
            RoundError: Too few updates were admitted.
        """
        plan, processes = self._plan(steps), processes_of(self.trainer)
        try:
            arguments = (self.aggregator, self.policy, site_trainer, processes, folder, self.declared)
            with Round(plan, states, *arguments) as current:
                result = current.run(names, self.trainers.placement == "per_rank", sites_at_once)
        except TrainingInterrupt:
            raise (SIGTERMException if self.trainer.received_sigterm else KeyboardInterrupt) from None
        self._step.merged = result.merged
        return result

    def end_round(self) -> None:
        """Free the merged weights, which the module has by now."""
        self._step.merged = {}

    def release(self) -> None:
        """Restore the loop of the Trainer and the optimization mode of the module."""
        self._loop.release()
        self.module.automatic_optimization = self._automatic

    def _plan(self, steps: Mapping[str, int]) -> RoundPlan:
        state = self.aggregator.starting_state(state_of(self.module))
        return RoundPlan(
            round=self.trainer.current_epoch,
            rounds=int(self.trainer.max_epochs or 1),
            state=state,
            base=state_hash(state),
            schema=self.schema,
            seed=self.seed,
            keep_optimizer=self.keep_optimizer,
            distributed=self.trainers.placement == "ddp",
            symmetries=self.symmetries,
            steps=steps,
        )

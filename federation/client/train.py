"""Train one site for one round in its own Trainer, and build the update that the site sends."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import lightning as L

from federation.aggregators.base import Aggregator, SiteObjective
from federation.bayes.curvature import NoCurvature
from federation.client.lightning_internals import as_single_process, continue_from, copy_module, quiet_lightning, seeded
from federation.client.local_training import LocalTraining, RoundPlan, SiteState, TrainingInterrupt, state_of
from federation.client.outgoing_update import OutgoingUpdate
from federation.exchange.schema import Schema, State, block_of
from federation.exchange.update import BlockUpdate, Update
from federation.privacy.policy import PrivacyPolicy
from federation.site_loaders import Site

__all__ = [
    "RoundPlan",
    "SiteResult",
    "SiteState",
    "TrainingInterrupt",
    "local_keys",
    "state_of",
    "train_site",
    "validate_site",
]


@dataclass
class SiteResult:
    """Result of a site's round.

    Attributes:
        update: The update that is sent to the server.
        state: State that the site keeps for its next round.
        logged: Training metrics by name.
        moved: Share of the units that alignment permuted, by group of units; empty if none was.
        privacy: Account of what was sent under the privacy policy, as plain JSON values; empty without a policy.
        trained: Validation metrics of the site's model after its local training, before the merge, by
            ``<task>/<metric>``; empty where it was not validated.
    """

    update: Update
    state: SiteState
    logged: dict[str, float]
    moved: dict[str, float] = field(default_factory=dict)
    privacy: dict[str, Any] = field(default_factory=dict)
    trained: dict[str, float] = field(default_factory=dict)


def train_site(
    site: str,
    template: L.LightningModule,
    datamodule: L.LightningDataModule,
    plan: RoundPlan,
    memory: SiteState,
    aggregator: Aggregator,
    make_trainer: Callable[[], L.Trainer],
    stop: Callable[[], bool] = lambda: False,
    privacy: PrivacyPolicy | None = None,
    make_validator: Callable[[], L.Trainer] | None = None,
) -> SiteResult:
    """Train one site for one round and return its update; the arguments are not changed.

    Args:
        site: Name of the site.
        template: The untrained module, attached to no Trainer.
        datamodule: The site's data, set up; every batch has an entry for each of the module's tasks.
        plan: Number, global weights and settings of the round, equal for all sites.
        memory: State that the site kept from its earlier rounds.
        aggregator: Defines the objective of the local training and the curvature that is measured.
        make_trainer: Builds a fresh, configured Trainer.
        stop: Called after every batch; training is abandoned when it returns ``True``.
        privacy: Privacy policy that is applied to the update; ``None`` sends the whole update.
        make_validator: Builds a fresh Trainer that validates the trained model on the site's validation images;
            ``None`` does not validate.

    Raises:
        TrainingInterrupt: ``stop`` returned ``True``.
    """
    began = time.perf_counter()
    local = local_keys(plan.schema, aggregator, privacy)
    start = plan.state | memory.local
    module = copy_module(template)
    module.load_state_dict(start)
    measured = aggregator.exchange.curvature if privacy is None or privacy.sends_precision else None
    curvature = NoCurvature() if measured is None else measured.fresh()
    objective = aggregator.site_objective(site)
    training = LocalTraining(plan, memory, objective, curvature, local, stop, _labelled(datamodule))
    outgoing = OutgoingUpdate(privacy, site, plan.round, plan.base, memory.privacy)
    trainer = make_trainer()
    outgoing.attach_dp_sgd(module, trainer)
    _fit(module, datamodule, trainer, training, plan, memory, site)
    after = state_of(module)
    kept = SiteState(
        epochs=trainer.current_epoch,
        steps=trainer.global_step,
        local={key: after[key] for key in sorted(local)},
        schedulers=training.schedulers,
        optimizers=training.optimizers if plan.keep_optimizer else [],
        own=memory.own,
        deviation=memory.deviation,
    )
    personal = aggregator.personal
    if personal is not None and plan.round >= personal.first_round:
        own = _personal(site, template, datamodule, plan, memory, personal.objective, make_trainer, stop)
        if personal.keeps == "deviation":
            kept.deviation = {key: own[key] - plan.state[key] for key in own if own[key].is_floating_point()}
        else:
            kept.own = own
    update = Update(
        site=site,
        round=plan.round,
        base=plan.base,
        schema=plan.schema.digest(),
        blocks=_block_updates(plan.schema, local, start, after, training, aggregator),
        counters={key: after[key] for key in plan.schema.counters if key not in local},
        samples=dict(sorted(training.labelled.items())),
        steps=trainer.global_step - memory.steps,
        seconds=time.perf_counter() - began,
    )
    sent = {key for block in update.blocks.values() for key in block.delta}
    extra = objective.extra(after, start, update.steps, training.mean_rate())
    update.extra = {key: value for key, value in extra.items() if key in sent or key not in start}
    logged = {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("train/")}
    update, kept.privacy, account = outgoing.apply(update, module)
    if privacy is not None and privacy.guarantees:  # what training logs is computed from images, and no noise covers it
        return SiteResult(update, kept, {}, {}, account)
    trained = validate_site(template, datamodule, after, make_validator) if make_validator else {}
    return SiteResult(update, kept, logged, training.moved, account, trained)


def validate_site(
    template: L.LightningModule,
    datamodule: L.LightningDataModule,
    state: State,
    make_trainer: Callable[[], L.Trainer],
) -> dict[str, float]:
    """Return the validation metrics of some weights on one site's own data, by ``<task>/<metric>``, if any."""
    if not datamodule.val_dataloader():
        return {}
    module = copy_module(template)
    module.load_state_dict(state)
    with as_single_process(module), quiet_lightning(), seeded("validation"):
        results = make_trainer().validate(module, datamodule=datamodule, verbose=False)
    values = {key.removeprefix("val/"): float(value) for metrics in results for key, value in metrics.items()}
    return {key: value for key, value in values.items() if value == value}


def local_keys(schema: Schema, aggregator: Aggregator, privacy: PrivacyPolicy | None = None) -> frozenset[str]:
    """Return the keys of the weights that are not sent: not exchanged, or excluded by the privacy policy."""
    held = frozenset(key for key in schema.shapes if privacy is not None and not privacy.may_leave(block_of(key)))
    return aggregator.exchange.local_keys(schema) | held


def _labelled(datamodule: L.LightningDataModule) -> dict[str | None, int]:
    """Return the labelled training images of a site by task, of any task under ``None``; empty where it is unknown."""
    if not isinstance(datamodule, Site):
        return {}
    holding = datamodule.holding()
    labelled: dict[str | None, int] = {None: holding.images}
    return labelled | holding.labels


def _fit(
    module: L.LightningModule,
    datamodule: L.LightningDataModule,
    trainer: L.Trainer,
    training: LocalTraining,
    plan: RoundPlan,
    memory: SiteState,
    site: str,
    *model: str,
) -> L.Trainer:
    """Fit a module in a fresh Trainer whose counters continue from the site's earlier rounds; return the Trainer."""
    continue_from(trainer, memory.epochs, memory.steps, plan.steps.get(site))
    trainer.callbacks.append(training)  # type: ignore[attr-defined]
    with seeded(plan.seed, plan.round, site, *model), quiet_lightning():
        if plan.distributed:
            trainer.fit(module, datamodule=datamodule)
        else:
            with as_single_process(module):
                trainer.fit(module, datamodule=datamodule)
    return trainer


def _personal(
    site: str,
    template: L.LightningModule,
    datamodule: L.LightningDataModule,
    plan: RoundPlan,
    memory: SiteState,
    objective: SiteObjective,
    make_trainer: Callable[[], L.Trainer],
    stop: Callable[[], bool],
) -> State:
    """Train the site's personal model for one round, under its own objective, and return its weights."""
    module = copy_module(template)
    module.load_state_dict(memory.weights(plan.state))
    start = SiteState(memory.epochs, memory.steps, schedulers=memory.schedulers)
    training = LocalTraining(
        plan, start, copy.deepcopy(objective), NoCurvature(), plan.schema.personal_keys(), stop, {}
    )
    _fit(module, datamodule, make_trainer(), training, plan, start, site, "personal")
    return state_of(module)


def _block_updates(
    schema: Schema,
    local: frozenset[str],
    start: State,
    after: State,
    training: LocalTraining,
    aggregator: Aggregator,
) -> dict[str, BlockUpdate]:
    """Return the change, number of examples and measured precision of every block with labelled examples."""
    measured = {key: value for key, value in training.curvatures.items() if key not in local}
    precision, scale = aggregator.relative(measured) if measured else ({}, {})
    blocks = {}
    for block in schema.blocks:
        keys = [
            key for key in block.keys if not block.personal and (key not in local or not aggregator.exchange.merged)
        ]
        num_examples = training.num_examples(block.task)
        if num_examples > 0 and keys:
            blocks[block.name] = BlockUpdate(
                num_examples=num_examples,
                delta={key: after[key].float() - start[key].float() for key in keys},
                precision={key: precision[key] for key in keys if key in precision},
                scale={key: scale[key] for key in keys if key in scale},
            )
    return blocks

"""Check one update after it was decoded: names, types, shapes, finite values, and bounds on what one site can do."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from federation.bayes.posterior import LEAST_CURVATURE
from federation.exchange.schema import Block, Schema, State
from federation.exchange.update import BlockUpdate, Update

MOST_EXAMPLES = 10**9
"""Largest number of examples, and of steps, that one site may count in a round, whatever it declared."""

MOST_MEAN_PRECISION = 10.0
"""Largest mean of a relative precision, which is about 1 by definition."""

MOST_WEIGHT = 1e36
"""Largest weight of one element in the merge; sums of more than 300 of them are finite in float32."""

MOST_COUNT = 2**40
"""Largest magnitude of an integer buffer."""

MOST_METRICS, MOST_NAME = 1000, 200
"""Largest number of metrics, and length of the name of one."""


@dataclass(frozen=True)
class Declaration:
    """What is known of a site before the first round.

    Attributes:
        examples: Largest number of labelled samples that a round of the site can use; ``None`` if it is unknown.
        tasks: The tasks that the site has training labels for; ``None`` if they are unknown.
        partial: Whether its privacy policy may hold back single tensors of a block.
    """

    examples: int | None = None
    tasks: frozenset[str] | None = None
    partial: bool = False


@dataclass(frozen=True)
class Expected:
    """What the server expects of the updates of a round.

    Attributes:
        round: Number of the round, from 0.
        base: ``state_hash`` of the global weights the round began with.
        schema: Schema of the server's model.
        state: Those weights; without them neither the values after the change nor the types of counters are checked.
        local: Keys that are not sent; ``None`` admits updates without some keys of a block.
        sends_extra: Whether the aggregator uses further tensors.
        declared: By site, what is known of it; another site is unknown.
    """

    round: int
    base: str
    schema: Schema
    state: State = field(default_factory=dict)
    local: frozenset[str] | None = None
    sends_extra: bool = True
    declared: Mapping[str, Declaration] = field(default_factory=dict)

    def refusal(self, site: str, update: Update) -> str | None:
        """Return the reason to refuse an update; ``None`` if it is valid.

        Args:
            site: The site that sent it.
            update: The update as decoded.
        """
        return next(self._reasons(site, update), None)

    def _reasons(self, site: str, update: Update) -> Iterator[str]:
        if update.site != site:
            yield "update of another site"
        if update.schema != self.schema.digest():
            yield "update of another model (schema)"
        if not _is_count(update.round) or update.round != self.round or update.base != self.base:
            number = update.round + 1 if _is_count(update.round) else "?"
            yield f"update of another round ({number}, not {self.round + 1})"
        known = {block.name: block for block in self.schema.blocks if not block.personal}
        declared = self.declared.get(site, Declaration())
        for name, block in update.blocks.items():
            if name not in known:
                yield f"unknown block {name!r:.60}"
            yield from self._of_block(known[name], block, update, declared)
        if not update.blocks:
            yield "it changes no weight (no labelled image in its training)"
        yield from self._of_counters(update.counters)
        yield from self._of_extra(update)
        yield from _of_facts(update, declared)

    def _of_block(self, known: Block, block: BlockUpdate, update: Update, declared: Declaration) -> Iterator[str]:
        name, count = known.name, block.num_examples
        if not _is_count(count):
            yield f"{name}: its number of examples is not a number"
        if count <= 0:
            yield f"{name}: no examples"
        most = MOST_EXAMPLES if declared.examples is None else min(declared.examples, MOST_EXAMPLES)
        if declared.tasks is not None and known.task is not None and known.task not in declared.tasks:
            most = 0
        if count > most:
            yield f"{name}: more examples than the site declared ({_short(count)}, at most {most})"
        if not set(block.delta) <= set(known.keys):
            yield f"{name}: unknown weights"
        if self.local is not None and not declared.partial and set(known.keys) - self.local - set(block.delta):
            yield f"{name}: weights are missing"
        if not set(block.precision) | set(block.scale) <= set(block.delta):
            yield f"{name}: precision of weights that were not sent"
        if not set(block.step) <= set(block.delta) or (block.step and update.rounding == "none"):
            yield f"{name}: rounding of weights that were not rounded"
        for key, step in block.step.items():
            if not _is_number(step) or not 0 < step <= torch.finfo(torch.float32).max:
                yield f"{key}: rounding step that is not a number above 0"
        for key, scale in block.scale.items():
            if not _is_number(scale) or not 0 <= scale <= MOST_WEIGHT:
                yield f"{name}: curvature of {key} that is not finite, below 0 or above {MOST_WEIGHT:g}"
        for key, delta in block.delta.items():
            yield from _of_tensor(key, delta, self.schema.shapes[key])
            if key in self.state and not bool(torch.isfinite(self.state[key].float() + delta).all()):
                yield f"{key}: not finite after the change"
            if key in block.precision and delta.numel():
                yield from _of_precision(key, block.precision[key], delta)
                scale = max(block.scale.get(key, 1.0), LEAST_CURVATURE)
                if float(block.precision[key].max()) * scale * count > MOST_WEIGHT:
                    yield f"{key}: weight above {MOST_WEIGHT:g}"

    def _of_counters(self, counters: Mapping[str, Tensor]) -> Iterator[str]:
        for key, value in counters.items():
            fits = key in self.schema.counters and tuple(value.shape) == self.schema.shapes[key]
            integer = not value.is_floating_point() and not value.is_complex()
            if not fits or not integer or (key in self.state and value.dtype != self.state[key].dtype):
                yield f"{key!r:.60}: not a counter of this model"
            if value.numel() and int(value.long().abs().max()) > MOST_COUNT:
                yield f"{key}: counter above {MOST_COUNT}"

    def _of_extra(self, update: Update) -> Iterator[str]:
        if update.extra and not self.sends_extra:
            yield "extra tensors that the aggregator does not use"
        size = sum(value.numel() for value in update.extra.values())
        if size > 4 * sum(math.prod(shape) for shape in self.schema.shapes.values()) + 1024:
            yield "extra tensors larger than the model"
        for key, value in update.extra.items():
            if not value.is_floating_point() or not bool(torch.isfinite(value).all()):
                yield "extra tensors that are not finite"
            if key in self.schema.parameters:
                yield from _of_tensor(key, value, self.schema.shapes[key])


def _of_tensor(key: str, value: Tensor, shape: tuple[int, ...]) -> Iterator[str]:
    if tuple(value.shape) != shape:
        yield f"{key}: shape {tuple(value.shape)}, not {shape}"
    if value.dtype != torch.float32:
        yield f"{key}: type {value.dtype}, not float32"
    if not bool(torch.isfinite(value).all()):
        yield f"{key}: not finite"


def _of_precision(key: str, precision: Tensor, delta: Tensor) -> Iterator[str]:
    theirs = (1,) * (delta.ndim - precision.ndim) + tuple(precision.shape)
    if len(theirs) != delta.ndim or any(p not in (1, d) for p, d in zip(theirs, delta.shape, strict=True)):
        yield f"{key}: precision of shape {tuple(precision.shape)} for weights of {tuple(delta.shape)}"
    if precision.dtype != torch.float32:
        yield f"{key}: precision of type {precision.dtype}, not float32"
    if not bool(torch.isfinite(precision).all()) or bool((precision < 0).any()):
        yield f"{key}: precision that is not finite or below 0"
    if float(precision.double().mean()) > MOST_MEAN_PRECISION:
        yield f"{key}: mean precision above {MOST_MEAN_PRECISION:g}; it is relative, with a mean of about 1"


def _of_facts(update: Update, declared: Declaration) -> Iterator[str]:
    most = MOST_EXAMPLES if declared.examples is None else min(declared.examples, MOST_EXAMPLES)
    for task, count in update.samples.items():
        if not _is_count(count) or not 0 <= count <= most or len(task) > MOST_NAME:
            yield "number of labelled samples that is impossible"
    if not _is_count(update.steps) or not 0 <= update.steps <= MOST_EXAMPLES:
        yield "number of steps that is impossible"
    if not _is_number(update.seconds) or not 0 <= update.seconds < math.inf:
        yield "time that is not a number of seconds"
    if len(update.metrics) > MOST_METRICS:
        yield f"more than {MOST_METRICS} metrics"
    for name, value in update.metrics.items():
        if len(name) > MOST_NAME or not (isinstance(value, float | int) and not isinstance(value, bool)):
            yield "a metric that is not a number"


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    """Return whether a value is a finite number that float64 can hold."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= 1e300


def _short(count: int) -> str:
    return str(count) if abs(count) < 10**15 else f"about 10^{round(abs(count).bit_length() * math.log10(2))}"

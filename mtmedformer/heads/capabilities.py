"""Capabilities that only some heads have: calibration, Grad-CAM, attention maps, export of more than predictions.

A head has a capability if it has the methods; it need not inherit from a class here. ``isinstance`` tests whether the
methods exist, not their types. ``outputs`` always means what the head's ``forward`` returned for B images, and ``size``
is ``(H, W)`` of the network's input.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from mtmedformer.errors import ConfigError


@runtime_checkable
class Calibratable(Protocol):
    """A head whose probabilities are computed from logits, which a temperature divides."""

    def class_logits(self, outputs: Any, size: tuple[int, int]) -> Tensor:
        """Return the logits of the probabilities of ``predict``, float32 (B, C) or (B, C, H, W).

        C is the number of classes, or one more (channel 0, background) for masks of exclusive classes.
        """
        ...

    def scaled(self, outputs: Any, temperature: float) -> Any:
        """Return the outputs with their logits divided by a temperature."""
        ...


@runtime_checkable
class Explainable(Protocol):
    """A head whose decision for a class Grad-CAM can explain."""

    def class_score(self, outputs: Any, label: int) -> Tensor:
        """Return one differentiable number per image, (B,), that rises with the evidence for a class."""
        ...


@runtime_checkable
class AttentionPooling(Protocol):
    """A head that pools the image by attention."""

    def attention_map(self, outputs: Any, size: tuple[int, int]) -> Tensor:
        """Return the attention per pixel, float32 (B, H, W), 0 or larger, on any scale."""
        ...


@runtime_checkable
class Exportable(Protocol):
    """A head that exports other tensors than its predictions, or more.

    A head without these methods exports its predictions, which must then be a tensor.
    """

    def exported(self, outputs: Any, size: tuple[int, int]) -> dict[str, Tensor]:
        """Return the tensors of an exported graph by name; the name of predictions is empty.

        Their first axis is the batch. Their shapes do not depend on the content of the images.
        """
        ...

    def decoded(self, exported: dict[str, Tensor], size: tuple[int, int]) -> Any:
        """Compute the predictions, as from ``predict``, from the exported tensors."""
        ...


@runtime_checkable
class GroupsImages(Protocol):
    """A head that reads the images of a case together; the batches must hold whole cases."""

    def group(self, cases: Tensor | None) -> None:
        """Set the case of each image of the next batches, int64 (B,) from 0; ``None``: each image is its own case."""
        ...


def calibrated(head: Any, outputs: Any, temperature: float | None) -> Any:
    """Return outputs of a head with their logits divided by a temperature; unchanged if it is ``None``.

    Raises:
        ConfigError: There is a temperature, but the head is not ``Calibratable``.
    """
    if temperature is None:
        return outputs
    if not isinstance(head, Calibratable):
        raise ConfigError(
            f"calibration: {type(head).__name__} cannot be calibrated; implement its methods class_logits and scaled "
            "(see mtmedformer.heads.capabilities.Calibratable)"
        )
    return head.scaled(outputs, temperature)

"""How much a probability leaves open."""

from __future__ import annotations

import torch
from torch import Tensor


def entropy(probability: Tensor, classes: int | None = None) -> Tensor:
    """Return the entropy of probabilities, in nats.

    Args:
        probability: Probabilities of any shape.
        classes: Dimension along which they sum to 1; it disappears. ``None``: each is a yes-or-no of its own.
    """
    terms: Tensor = torch.special.entr(probability)
    if classes is None:
        terms = terms + torch.special.entr(1 - probability)
        return terms
    return terms.sum(classes)

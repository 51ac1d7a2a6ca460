"""Federated averaging in which every site keeps its own normalisation layers."""

from __future__ import annotations

from federation.aggregators.fedavg import FedAvg


class FedBN(FedAvg):
    """FedAvg whose normalisation layers stay at the site: their weights, biases, statistics and counters.

    Written for BatchNorm; here it holds for every kind (``Schema.norms``), since transformers normalise by layer. The
    global state keeps the norms it began with, so it is each site's model with its own norms that is to be judged.

    Reference:
        Li et al., FedBN: Federated Learning on Non-IID Features via Local Batch Normalization, ICLR 2021.
    """

    personal_norms = True

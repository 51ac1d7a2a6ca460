"""Aggregators: from the sites' updates of a round to the next global state."""

from federation.aggregators.base import Aggregator, ClientObjective, merge
from federation.aggregators.bayesian import BayesianAggregator
from federation.aggregators.ditto import Ditto
from federation.aggregators.fedavg import FedAvg
from federation.aggregators.fedbn import FedBN
from federation.aggregators.fedopt import FedAdam, FedAvgM, FedYogi
from federation.aggregators.fedprox import FedProx
from federation.aggregators.fine_tuned import FineTuned
from federation.aggregators.fisher_merging import FisherMerging
from federation.aggregators.inverse_variance import InverseVariance
from federation.aggregators.reference_points import Local, Pooled
from federation.aggregators.robust import CoordinateMedian, TrimmedMean
from federation.aggregators.scaffold import Scaffold

__all__ = [
    "Aggregator",
    "BayesianAggregator",
    "ClientObjective",
    "CoordinateMedian",
    "Ditto",
    "FedAdam",
    "FedAvg",
    "FedAvgM",
    "FedBN",
    "FedProx",
    "FedYogi",
    "FineTuned",
    "FisherMerging",
    "InverseVariance",
    "Local",
    "Pooled",
    "Scaffold",
    "TrimmedMean",
    "merge",
]

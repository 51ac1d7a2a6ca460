"""Aggregators: merge the sites' updates of a round into the next global state."""

from federation.aggregators.base import Aggregator, Exchange, PersonalModel, SiteObjective, merge
from federation.aggregators.bayesian import BayesianAggregator
from federation.aggregators.fedavg import FedAvg, FedBN
from federation.aggregators.fedopt import FedAdam, FedAvgM, FedYogi
from federation.aggregators.fedprox import FedProx
from federation.aggregators.fisher_merging import FisherMerging, InverseVariance
from federation.aggregators.personal import Ditto, FineTuned
from federation.aggregators.reference_points import Local, Pooled
from federation.aggregators.robust import CoordinateMedian, TrimmedMean
from federation.aggregators.scaffold import Scaffold

__all__ = [
    "Aggregator",
    "BayesianAggregator",
    "CoordinateMedian",
    "Ditto",
    "Exchange",
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
    "PersonalModel",
    "Pooled",
    "Scaffold",
    "SiteObjective",
    "TrimmedMean",
    "merge",
]

"""Federation: many sites train one model, and no image leaves a site."""

from federation.aggregators import (
    Aggregator,
    BayesianAggregator,
    CoordinateMedian,
    Ditto,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedBN,
    FedProx,
    FedYogi,
    Local,
    LocalRule,
    Pooled,
    Scaffold,
    TrimmedMean,
    merge,
)
from federation.posterior import Posterior
from federation.uncertainty import tune_scale, uncertainty

__all__ = [
    "Aggregator",
    "BayesianAggregator",
    "CoordinateMedian",
    "Ditto",
    "FedAdam",
    "FedAvg",
    "FedAvgM",
    "FedBN",
    "FedProx",
    "FedYogi",
    "Local",
    "LocalRule",
    "Pooled",
    "Posterior",
    "Scaffold",
    "TrimmedMean",
    "merge",
    "tune_scale",
    "uncertainty",
]

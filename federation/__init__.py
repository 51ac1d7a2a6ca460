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
from federation.datamodule import FederatedDataModule
from federation.partition import Dirichlet, EqualShares, Partition
from federation.posterior import Posterior
from federation.precision import Curvature, NoCurvature, SquaredGradients
from federation.uncertainty import tune_scale, uncertainty

__all__ = [
    "Aggregator",
    "BayesianAggregator",
    "CoordinateMedian",
    "Curvature",
    "Dirichlet",
    "Ditto",
    "EqualShares",
    "FedAdam",
    "FedAvg",
    "FedAvgM",
    "FedBN",
    "FedProx",
    "FedYogi",
    "FederatedDataModule",
    "Local",
    "LocalRule",
    "NoCurvature",
    "Partition",
    "Pooled",
    "Posterior",
    "Scaffold",
    "SquaredGradients",
    "TrimmedMean",
    "merge",
    "tune_scale",
    "uncertainty",
]

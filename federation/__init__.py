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
    FineTuned,
    FisherMerging,
    InverseVariance,
    Local,
    LocalRule,
    Pooled,
    Scaffold,
    TrimmedMean,
    merge,
)
from federation.alignment import Alignment, align, permutation_groups
from federation.datamodule import FederatedDataModule
from federation.example_privacy import ExamplePrivacy
from federation.fisher import Fisher
from federation.online_newton import NewtonCurvature, OnlineNewton
from federation.partition import Dirichlet, EqualShares, Partition
from federation.posterior import Posterior
from federation.precision import Curvature, NoCurvature, SquaredGradients
from federation.privacy import PrivacyPolicy
from federation.uncertainty import tune_scale, uncertainty

__all__ = [
    "Aggregator",
    "Alignment",
    "BayesianAggregator",
    "CoordinateMedian",
    "Curvature",
    "Dirichlet",
    "Ditto",
    "EqualShares",
    "ExamplePrivacy",
    "FedAdam",
    "FedAvg",
    "FedAvgM",
    "FedBN",
    "FedProx",
    "FedYogi",
    "FederatedDataModule",
    "FineTuned",
    "Fisher",
    "FisherMerging",
    "InverseVariance",
    "Local",
    "LocalRule",
    "NewtonCurvature",
    "NoCurvature",
    "OnlineNewton",
    "Partition",
    "Pooled",
    "Posterior",
    "PrivacyPolicy",
    "Scaffold",
    "SquaredGradients",
    "TrimmedMean",
    "align",
    "merge",
    "permutation_groups",
    "tune_scale",
    "uncertainty",
]

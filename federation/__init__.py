"""Federation: many sites train one model, and no image leaves a site."""

from federation.aggregators import (
    Aggregator,
    BayesianAggregator,
    CoordinateMedian,
    Ditto,
    Exchange,
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
    PersonalModel,
    Pooled,
    Scaffold,
    SiteObjective,
    TrimmedMean,
    merge,
)
from federation.alignment.align import Alignment, align
from federation.alignment.groups import permutation_groups
from federation.bayes.curvature import Curvature, NoCurvature, SquaredGradients
from federation.bayes.fisher import Fisher
from federation.bayes.online_newton import NewtonCurvature, OnlineNewton
from federation.bayes.posterior import Posterior
from federation.bayes.uncertainty import tune_scale, uncertainty
from federation.datamodule import FederatedDataModule
from federation.partition import Dirichlet, EqualShares, Partition
from federation.privacy.dp_sgd import ExamplePrivacy
from federation.privacy.policy import PrivacyPolicy

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
    "Exchange",
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
    "NewtonCurvature",
    "NoCurvature",
    "OnlineNewton",
    "Partition",
    "PersonalModel",
    "Pooled",
    "Posterior",
    "PrivacyPolicy",
    "Scaffold",
    "SiteObjective",
    "SquaredGradients",
    "TrimmedMean",
    "align",
    "merge",
    "permutation_groups",
    "tune_scale",
    "uncertainty",
]

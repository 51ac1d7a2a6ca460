"""Lightning callbacks: evaluation, federation, prediction, reports, run folder."""

from callbacks.evaluation.calibrate import Calibrate
from callbacks.evaluation.case_results import CaseResults
from callbacks.evaluation.familiarity import Familiarity
from callbacks.evaluation.per_image_results import PerImageResults
from callbacks.federation.callback import Federation
from callbacks.federation.posterior_prediction import PosteriorPrediction
from callbacks.federation.tune_posterior import TunePosterior
from callbacks.prediction.explanations import Explanations
from callbacks.prediction.prediction_writer import PredictionWriter
from callbacks.reports.federation_report import FederationReport
from callbacks.reports.metrics_table import MetricsReport, MetricsTable
from callbacks.reports.model_report import ModelReport
from callbacks.reports.overlays import Overlays
from callbacks.reports.reliability_report import ReliabilityReport
from callbacks.run.checkpoints import AtomicCheckpoints, LastCheckpoint, ResumePoint
from callbacks.run.mlflow_logger import NamedMLFlowLogger
from callbacks.run.model_summary import PartsSummary, StartWeights
from callbacks.run.progress import RunBar
from callbacks.run.run_folder import (
    QuarantineReport,
    RunFolder,
    RunStart,
    is_run_folder_of,
    latest_run_folder,
    lock_run,
    run_folder_of,
)
from callbacks.run.run_logger import RunLogger
from callbacks.run.tracked_run import TrackedRun, mlflow_identity
from callbacks.run.wandb_run import WandbRecord, check_wandb_names, run_identity

__all__ = [
    "AtomicCheckpoints",
    "Calibrate",
    "CaseResults",
    "Explanations",
    "Familiarity",
    "Federation",
    "FederationReport",
    "LastCheckpoint",
    "MetricsReport",
    "MetricsTable",
    "ModelReport",
    "NamedMLFlowLogger",
    "Overlays",
    "PartsSummary",
    "PerImageResults",
    "PosteriorPrediction",
    "PredictionWriter",
    "QuarantineReport",
    "ReliabilityReport",
    "ResumePoint",
    "RunBar",
    "RunFolder",
    "RunLogger",
    "RunStart",
    "StartWeights",
    "TrackedRun",
    "TunePosterior",
    "WandbRecord",
    "check_wandb_names",
    "is_run_folder_of",
    "latest_run_folder",
    "lock_run",
    "mlflow_identity",
    "run_folder_of",
    "run_identity",
]

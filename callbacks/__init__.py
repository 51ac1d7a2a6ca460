"""Lightning callbacks: evaluation, federation, prediction, reports, run folder."""

from callbacks.evaluation.calibrate import Calibrate
from callbacks.evaluation.per_image_results import PerImageResults
from callbacks.federation.callback import Federation
from callbacks.federation.posterior_prediction import PosteriorPrediction
from callbacks.federation.tune_posterior import TunePosterior
from callbacks.prediction.explanations import Explanations
from callbacks.prediction.writer import PredictionWriter
from callbacks.reports.federation_report import FederationReport
from callbacks.reports.metrics_table import MetricsReport, MetricsTable
from callbacks.reports.model_report import ModelReport
from callbacks.reports.overlays import Overlays
from callbacks.reports.reliability_report import ReliabilityReport
from callbacks.run.atomic_checkpoints import AtomicCheckpoints
from callbacks.run.checkpoints import LastCheckpoint, ResumePoint
from callbacks.run.model_summary import PartsSummary
from callbacks.run.quarantine_report import QuarantineReport
from callbacks.run.run_folder import RunLogger, SaveRunConfig, claim_run_folder, latest_run_folder, run_folder_of
from callbacks.run.wandb_run import WandbRecord, record_in_wandb

__all__ = [
    "AtomicCheckpoints",
    "Calibrate",
    "Explanations",
    "Federation",
    "FederationReport",
    "LastCheckpoint",
    "MetricsReport",
    "MetricsTable",
    "ModelReport",
    "Overlays",
    "PartsSummary",
    "PerImageResults",
    "PosteriorPrediction",
    "PredictionWriter",
    "QuarantineReport",
    "ReliabilityReport",
    "ResumePoint",
    "RunLogger",
    "SaveRunConfig",
    "TunePosterior",
    "WandbRecord",
    "claim_run_folder",
    "latest_run_folder",
    "record_in_wandb",
    "run_folder_of",
]

"""Lightning callbacks of MTMedFormer, one file each."""

from callbacks.atomic_checkpoints import AtomicCheckpoints
from callbacks.calibration import Calibrate, ReliabilityReport
from callbacks.federation import Federation
from callbacks.metrics_table import MetricsTable, TestReport
from callbacks.overlays import Overlays
from callbacks.parts_summary import PartsSummary
from callbacks.prediction.explanations import Explanations
from callbacks.prediction.posterior_prediction import PosteriorPrediction
from callbacks.prediction.prediction_writer import PredictionWriter
from callbacks.quarantine_report import QuarantineReport
from callbacks.reports.federation_report import FederationReport
from callbacks.reports.model_report import ModelReport
from callbacks.resume_point import LastCheckpoint, ResumePoint
from callbacks.rounds.posterior import TunePosterior
from callbacks.run_folder import RunLogger, SaveRunConfig, claim_run_folder, latest_run_folder, run_folder_of
from callbacks.wandb_record import WandbRecord, record_in_wandb

__all__ = [
    "AtomicCheckpoints",
    "Calibrate",
    "Explanations",
    "Federation",
    "FederationReport",
    "LastCheckpoint",
    "MetricsTable",
    "ModelReport",
    "Overlays",
    "PartsSummary",
    "PosteriorPrediction",
    "PredictionWriter",
    "QuarantineReport",
    "ReliabilityReport",
    "ResumePoint",
    "RunLogger",
    "SaveRunConfig",
    "TestReport",
    "TunePosterior",
    "WandbRecord",
    "claim_run_folder",
    "latest_run_folder",
    "record_in_wandb",
    "run_folder_of",
]

"""Lightning callbacks of MTMedFormer, one file each."""

from callbacks.atomic_checkpoints import AtomicCheckpoints
from callbacks.calibration import Calibrate, ReliabilityReport
from callbacks.explanations import Explanations
from callbacks.federation import Federation
from callbacks.federation_report import FederationReport
from callbacks.metrics_table import MetricsTable, TestReport
from callbacks.model_report import ModelReport
from callbacks.overlays import Overlays
from callbacks.parts_summary import PartsSummary
from callbacks.posterior import TunePosterior
from callbacks.posterior_prediction import PosteriorPrediction
from callbacks.prediction_writer import PredictionWriter
from callbacks.quarantine_report import QuarantineReport
from callbacks.resume_point import LastCheckpoint, ResumePoint
from callbacks.run_folder import RunLogger, SaveRunConfig, claim_run_folder, latest_run_folder, run_folder_of

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
    "claim_run_folder",
    "latest_run_folder",
    "run_folder_of",
]

from .commands.load.predictor import Prediction as Prediction
from .commands.load.predictor import Predictor as Predictor
from .commands.load.predictor import load as load
from .encoders.shared import SharedEncoder as SharedEncoder
from .errors import ConfigError as ConfigError
from .errors import DataError as DataError
from .errors import UserError as UserError
from .heads import CaseHead as CaseHead
from .heads import ClassificationHead as ClassificationHead
from .heads import DetectionHead as DetectionHead
from .heads import DETRHead as DETRHead
from .heads import OrdinalHead as OrdinalHead
from .heads import RegressionHead as RegressionHead
from .heads import SegmentationHead as SegmentationHead
from .losses import HybridLoss as HybridLoss
from .module import MultiTaskModule as MultiTaskModule
from .optim import WarmupCosine as WarmupCosine

__version__: str

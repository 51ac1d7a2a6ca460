"""MTMedFormer: one transformer that classifies, detects and segments in the same medical image.

The public names are listed in ``__init__.pyi`` and imported on first use, so that ``import mtmedformer`` does not
import torch.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

__version__ = "0.1.0"

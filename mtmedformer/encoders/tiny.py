"""Two small models of equal size in timm's registry, for laptops, tests and comparisons: a transformer and a CNN.

Neither has BatchNorm, both accept any image size, and neither has published weights.
"""

from __future__ import annotations

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.convnext import ConvNeXt
from timm.models.pvt_v2 import PyramidVisionTransformerV2
from torch import nn

_CFG = {"input_size": (3, 224, 224), "mean": (0.5,) * 3, "std": (0.25,) * 3, "license": "apache-2.0"}

_FEATURES = {"out_indices": (0, 1, 2, 3), "flatten_sequential": True}

default_cfgs = generate_default_cfgs(
    {
        "mtmedformer_tiny": {**_CFG, "first_conv": "patch_embed.proj", "classifier": "head"},
        "mtmedformer_tiny_cnn": {**_CFG, "first_conv": "stem.0", "classifier": "head.fc"},
    }
)


@register_model
def mtmedformer_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Return a pyramid vision transformer (PVT v2) of 0.4 M parameters: strides 4 to 32, 16 to 128 channels."""
    shape = {
        "depths": (1, 1, 2, 1),
        "embed_dims": (16, 32, 64, 128),
        "num_heads": (1, 1, 2, 4),
        "mlp_ratios": (4, 4, 2, 2),
    }
    model: nn.Module = build_model_with_cfg(
        PyramidVisionTransformerV2, "mtmedformer_tiny", pretrained, feature_cfg=dict(_FEATURES), **{**shape, **kwargs}
    )
    return model


@register_model
def mtmedformer_tiny_cnn(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Return a ConvNeXt of as many parameters and strides as ``mtmedformer_tiny``, without attention."""
    shape = {
        "depths": (1, 1, 2, 1),
        "dims": (16, 32, 80, 160),
        "kernel_sizes": 5,
        "conv_mlp": False,
    }
    model: nn.Module = build_model_with_cfg(
        ConvNeXt, "mtmedformer_tiny_cnn", pretrained, feature_cfg=dict(_FEATURES), **{**shape, **kwargs}
    )
    return model

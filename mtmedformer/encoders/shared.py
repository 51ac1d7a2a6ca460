"""The shared encoder: any timm model as a feature pyramid of one width, with the exceptions for single models."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.models import group_parameters, load_pretrained
from timm.optim import auto_group_layers  # type: ignore[attr-defined]
from torch import Tensor
from typing_extensions import override

from mtmedformer.encoders import tiny  # noqa: F401  (registers mtmedformer_tiny with timm)
from mtmedformer.encoders.base import Encoder
from mtmedformer.encoders.neck import LEVELS, Neck
from mtmedformer.encoders.pretrained import LoadReport, load_weights, timm_renaming
from mtmedformer.errors import ConfigError
from mtmedformer.normalization import BATCH_NORMS


class SharedEncoder(Encoder):
    """Compute five feature maps of one width from an image, strides 4 to 64.

    The body is a timm model cut before its classifier, the neck a feature pyramid network with GroupNorm. The image is
    padded with black at the right and bottom to whole strides and the maps are cut back. Plain vision transformers get
    their other strides by (de)convolution of the last map, as in ViTDet; patches of 14 pixels see the image shrunk to
    14/16, so that their grid is one of stride 16.

    Args:
        name: Name of a timm model (``pvt_v2_b2``, ``swinv2_tiny_window8_256``, ``convnext_tiny`` …) or
            ``mtmedformer_tiny``, ``mtmedformer_tiny_cnn``.
        in_chans: Channels of the image.
        channels: Channels of every level of the pyramid.
        img_size: Height and width of the images, or one number for squares. Needed only by models with a built-in size.
        drop_path_rate: Stochastic depth, the probability of dropping the deepest block.
        pretrained: Whether to load timm's published weights (downloads them).
        checkpoint_path: File of weights for the body, loaded instead (see ``mtmedformer.encoders.pretrained``).
        grad_checkpointing: Whether to recompute activations in the backward pass: less memory, about a third slower.
        model_kwargs: Further arguments of the timm model.
        frozen_statistics: Whether BatchNorm layers of the body normalise by their loaded running statistics in training
            too, and keep them. Their weights and biases are trained.

    Attributes:
        strides: Stride of each level.
        report: What ``checkpoint_path`` filled, or ``None``.

    Shape:
        Image float (B, in_chans, H, W) in [0, 1]; level s: (B, channels, ceil(H / s), ceil(W / s)).

    Raises:
        ConfigError: Unknown name, a model without feature maps, a size the model cannot take, or unusable weights.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        name: str = "pvt_v2_b0",
        in_chans: int = 1,
        channels: int = 128,
        img_size: int | tuple[int, int] | None = None,
        drop_path_rate: float = 0.0,
        pretrained: bool = False,
        checkpoint_path: str | None = None,
        grad_checkpointing: bool = False,
        model_kwargs: dict[str, Any] | None = None,
        frozen_statistics: bool = False,
    ) -> None:
        super().__init__()
        self.frozen_statistics = frozen_statistics
        if in_chans < 1 or channels < 8:
            raise ConfigError(f"encoder.in_chans is {in_chans}, channels {channels}; they must be at least 1 and 8")
        self.name = name
        self.in_chans = in_chans
        self.channels = channels
        self.strides = (*LEVELS, 2 * LEVELS[-1])
        size = (img_size, img_size) if isinstance(img_size, int) else img_size
        if size is not None and min(size) < 1:
            raise ConfigError(f"encoder.img_size is {img_size}; it must be at least 1 pixel")
        if not 0 <= drop_path_rate < 1:
            raise ConfigError(f"encoder.drop_path_rate is {drop_path_rate}; it must be in [0, 1)")
        kwargs = {**(model_kwargs or {}), "in_chans": in_chans, "num_classes": 0}
        if drop_path_rate:
            kwargs["drop_path_rate"] = drop_path_rate
        self.body, self.fixed_size = _create(name, size, kwargs)
        cfg = self.body.pretrained_cfg
        self.taken, self.patch_scale, widths = _levels(name, self.body)
        if pretrained and checkpoint_path is None:
            _download(name, self.body, in_chans)
        plain = len(self.taken) == 1
        self.norm = plain  # the last map of a plain transformer is meant to be read through its final norm
        self.indices = self.body.prune_intermediate_layers(list(self.taken.values()), prune_norm=not plain)
        self.report: LoadReport | None = load_weights(self.body, checkpoint_path) if checkpoint_path else None
        if grad_checkpointing:
            try:
                self.body.set_grad_checkpointing(True)
            except AssertionError as error:
                raise ConfigError(f"encoder.grad_checkpointing: {name} cannot do it; set it to false") from error
        for key, values in (("mean", cfg["mean"]), ("std", cfg["std"])):
            value = torch.tensor(values) if in_chans == 3 else torch.tensor(values).mean().expand(in_chans).clone()
            self.register_buffer(key, value.view(1, in_chans, 1, 1), persistent=False)

        self.neck = Neck(widths, channels)
        self._check(size)

    @override
    def train(self, mode: bool = True) -> SharedEncoder:
        """Set the mode; with ``frozen_statistics`` BatchNorm layers of the body stay in evaluation mode.

        Raises:
            ConfigError: The statistics to be kept are those of random weights, or were folded into the weights.
        """
        super().train(mode)
        if mode and self.frozen_statistics:
            norms = [module for module in self.body.modules() if isinstance(module, BATCH_NORMS)]
            if not any(norm.running_mean is not None and bool(norm.running_mean.any()) for norm in norms):
                raise ConfigError(
                    f"encoder.frozen_statistics: {self.name} has no BatchNorm statistics of trained weights; set "
                    "encoder.checkpoint_path or encoder.pretrained, or frozen_statistics to false"
                )
            for norm in norms:
                norm.eval()
        return self

    @override
    def forward(self, image: Tensor) -> list[Tensor]:
        if image.ndim != 4 or image.shape[1] != self.in_chans:
            raise ConfigError(
                f"encoder.in_chans is {self.in_chans} but the images are {tuple(image.shape)}; set it to their channels"
            )
        height, width = image.shape[-2:]
        padded = _padded((height, width))
        if self.fixed_size is not None and padded != _padded(self.fixed_size):
            raise ConfigError(
                f"encoder.name={self.name} is built for images of {_by(self.fixed_size)}, not {_by((height, width))}; "
                "set encoder.img_size to the size of the images"
            )
        image = (F.pad(image, (0, padded[1] - width, 0, padded[0] - height)) - self.mean) / self.std
        if self.patch_scale != 1:
            image = F.interpolate(image, _scaled(padded, self.patch_scale), mode="bilinear", align_corners=False)
        maps = self.body.forward_intermediates(
            image, indices=self.indices, norm=self.norm, output_fmt="NCHW", intermediates_only=True
        )
        body = {s: _on_grid(m, (padded[0] // s, padded[1] // s)) for s, m in zip(self.taken, maps, strict=True)}
        if image.device.type == "cpu":  # neck and decoders are faster by it, a whole step by a tenth to a fifth
            body = {s: m.contiguous(memory_format=torch.channels_last) for s, m in body.items()}
        levels: list[Tensor] = self.neck(body, (height, width))
        return levels

    @override
    def layer_depths(self) -> dict[str, int]:
        """Return the depth of each parameter, 0 at the image, for a learning rate that falls towards it.

        The neck and the resampled levels have the largest depth; heads come above it.
        """
        if hasattr(self.body, "group_matcher"):
            depths = group_parameters(self.body, self.body.group_matcher(coarse=False), reverse=True)
        else:
            depths = auto_group_layers(self.body, num_groups=12)  # type: ignore[no-untyped-call]
        top = max(depths.values()) + 1
        return {name: depths.get(name.removeprefix("body."), top) for name, _ in self.named_parameters()}

    @override
    def no_weight_decay(self) -> set[str]:
        """Return the names of the parameters for which the body defines no weight decay (position embeddings …)."""
        names = self.body.no_weight_decay() if hasattr(self.body, "no_weight_decay") else ()
        return {f"body.{name}" for name in names}

    @torch.no_grad()
    def _check(self, size: tuple[int, int] | None) -> None:
        """Run one black image through the encoder, so that a model that does not accept it is refused at once."""
        height, width = size or (64, 96)
        was_training = self.training
        self.eval()
        try:
            levels = self(torch.zeros(1, self.in_chans, height, width))
        except ConfigError:
            raise
        except Exception as error:
            raise _unfit(self.name, (height, width), error) from error
        finally:
            super().train(was_training)  # statistics are checked when training begins
        expected = [(self.channels, -(-height // s), -(-width // s)) for s in self.strides]
        if [tuple(level.shape[1:]) for level in levels] != expected:
            raise ConfigError(f"encoder.name={self.name} gives maps of other strides than it declares; choose another")


def _create(name: str, size: tuple[int, int] | None, kwargs: dict[str, Any]) -> tuple[Any, tuple[int, int] | None]:
    """Return the timm model, and the only image size it accepts (``None``: any)."""
    model: Any = None
    arch, _, tag = name.partition(".")
    if not timm.is_model(arch):
        close = get_close_matches(arch, timm.list_models(), n=4)
        raise ConfigError(
            f"encoder.name={name} is no timm model; "
            + (f"close ones are {', '.join(close)}" if close else "timm.list_models() in Python names them all")
        )
    tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{arch}.*")]
    if tag and tag not in tags:
        raise ConfigError(
            f"encoder.name={name}: timm has no weights {tag!r} of {arch}; it has {', '.join(tags) or 'none'}"
        )
    cfg = timm.get_pretrained_cfg(arch)  # none where timm has no weights of it
    fixed = cfg is not None and cfg.fixed_input_size
    options: list[dict[str, Any]] = [{"dynamic_img_size": True}, {}] if fixed else [{}]
    if fixed and size is not None:
        options = [{**option, "img_size": _body_size(arch, size)} for option in options] + [{}]
    for option in options:
        try:
            model = timm.create_model(name, **{**option, **kwargs})
        except TypeError as error:  # an argument this model does not have
            if option is options[-1]:
                raise ConfigError(f"encoder.model_kwargs do not fit {name}: {error}") from error
        except Exception as error:
            raise _unfit(name, size, error) from error
        else:
            break
    any_size = not fixed or "dynamic_img_size" in option or bool(kwargs.get("dynamic_img_size"))
    if not any_size and size is None:
        usual = _by(tuple(model.pretrained_cfg["input_size"][1:]))
        raise ConfigError(f"encoder.name={name} takes images of one size only: set encoder.img_size (usual: {usual})")
    return model, None if any_size else size


def _levels(name: str, body: Any) -> tuple[dict[int, int], float, dict[int, int]]:
    """Return the index of the map to take for each stride, the scale of the image, and each stride's channels."""
    info = getattr(body, "feature_info", None)
    if not info or not hasattr(body, "forward_intermediates"):
        raise ConfigError(f"encoder.name={name} gives no feature maps; choose another timm model")
    last = {int(stage["reduction"]): index for index, stage in enumerate(info)}
    taken, scale = {s: last[s] for s in LEVELS if s in last}, 1.0
    if not taken and len(last) == 1:
        ((patch, index),) = last.items()
        taken, scale = {16: index}, patch / 16
    if not taken:
        raise ConfigError(f"encoder.name={name} has maps of strides {sorted(last)}; needed are some of {list(LEVELS)}")
    return taken, scale, {s: int(info[index]["num_chs"]) for s, index in taken.items()}


def _download(name: str, body: Any, in_chans: int) -> None:
    remap = timm_renaming(body)
    try:
        load_pretrained(body, body.pretrained_cfg, num_classes=0, in_chans=in_chans, filter_fn=remap, strict=False)
    except Exception as error:
        raise ConfigError(
            f"encoder.pretrained: timm's weights of {name} could not be downloaded ({_first_line(error)}); download "
            "them where there is a network and set encoder.checkpoint_path"
        ) from error


def _body_size(arch: str, size: tuple[int, int]) -> tuple[int, int]:
    patch = 14 if "patch14" in arch else 16
    return _scaled(_padded(size), patch / 16)


def _padded(size: tuple[int, int]) -> tuple[int, int]:
    return (size[0] + 31) // 32 * 32, (size[1] + 31) // 32 * 32  # no negative numbers: ONNX rounds those towards zero


def _scaled(size: tuple[int, int], scale: float) -> tuple[int, int]:
    return round(size[0] * scale), round(size[1] * scale)


def _on_grid(level: Tensor, grid: tuple[int, int]) -> Tensor:
    if level.shape[-2:] == grid:
        return level
    return F.interpolate(level, grid, mode="bilinear", align_corners=False)


def _by(size: tuple[int, ...]) -> str:
    return " x ".join(map(str, size)) + " px"


def _unfit(name: str, size: tuple[int, int] | None, error: Exception) -> ConfigError:
    cfg = timm.get_pretrained_cfg(name.partition(".")[0])
    usual = (3, 224, 224) if cfg is None else cfg.input_size
    return ConfigError(
        f"encoder.name={name} cannot take images of {_by(size) if size else 'any size'} ({_first_line(error)}); set "
        f"encoder.img_size to a size it can (its own is {_by(usual[1:])}), or choose a model for any size: pvt_v2_*, "
        "convnext*, swin_*, swinv2_*, davit_*, vit_*_patch16_*"
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]

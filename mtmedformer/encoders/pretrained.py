"""Load weights from files of several layouts without running code from them, and report what was filled.

Supported are own checkpoints (Lightning's, whole model or encoder), bare timm files, files of
segmentation-models-pytorch, and any of them inside ``module.``, ``model.``, ``backbone.``, ``encoder.`` and the like.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import adapt_input_conv
from torch import Tensor, nn

from mtmedformer.checks import check_digest, malformed
from mtmedformer.errors import ConfigError

WRAPPERS = re.compile(r"^(?:(?:module|model|backbone|encoder|body|network|net|trunk|_orig_mod)\.)+")
"""Prefixes of wrappers, which are ignored when names are compared."""

CONTAINERS = ("state_dict", "model_state_dict", "model", "net", "network", "teacher")
"""Keys under which training scripts put the weights."""


@dataclass
class LoadReport:
    """Which parameters a file filled.

    Attributes:
        path: The file.
        matched: Names in the module that were filled.
        adapted: Those among them whose tensor had to be changed (stem to other channels, resized position embeddings).
        mismatched: Names in the module whose tensor has another shape in the file: ``(name, there, here)``.
        missing: Names in the module that the file lacks.
        unexpected: Names in the file that the module lacks.
        notes: Anything else worth knowing.
    """

    path: Path
    matched: list[str] = field(default_factory=list)
    adapted: list[str] = field(default_factory=list)
    mismatched: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether every tensor of the module was filled."""
        return not self.missing and not self.mismatched

    def __str__(self) -> str:
        total = len(self.matched) + len(self.mismatched) + len(self.missing)
        lines = [f"{self.path.name}: {len(self.matched)} of {total} tensors filled"]
        shapes = [f"{name} {there} -> {here}" for name, there, here in self.mismatched]
        for label, names in (
            ("adapted", self.adapted),
            ("other shape, left as they were", shapes),
            ("not in the file, left as they were", self.missing),
            ("in the file, not used", self.unexpected),
            ("note", self.notes),
        ):
            if names:
                more = f", and {len(names) - 3} more" if len(names) > 3 else ""
                lines.append(f"  {label} ({len(names)}): {', '.join(names[:3])}{more}")
        return "\n".join(lines)


def load_weights(module: nn.Module, path: str | Path, skip: Sequence[str] = ("loss.",)) -> LoadReport:
    """Fill a module with the weights of a file, as far as names and shapes agree.

    Names are compared without the wrappers' (``WRAPPERS``) at their front; where that fails, timm's own renaming for
    the model is tried, which also resizes position embeddings. A first convolution for another number of channels is
    adapted as timm does (three to one: summed). Tensors without a partner stay as they are.

    Args:
        module: What to fill: a whole model, an encoder, or a timm model.
        path: A ``.safetensors`` file, or a pickle holding nothing but tensors and plain containers.
        skip: Names in ``module`` starting so are neither filled nor reported; the state of the loss belongs to its run.

    Returns:
        The report; print it.

    Raises:
        ConfigError: The file is absent or unreadable, contains code or objects, values that are not finite, or nothing
            that fits.
    """
    path = Path(path)
    targets = {name: t for name, t in module.state_dict().items() if not name.startswith(tuple(skip))}
    source = read_weights(path)
    report, filled = _match(path, targets, _renamed(source), module)
    for remapped, note in _by_timm(module, targets, source):
        if note:
            report.notes.append(note)
            continue
        other, other_filled = _match(path, targets, remapped, module)
        if len(other.matched) > len(report.matched):
            report, filled = other, other_filled
    if not report.matched:
        raise ConfigError(
            f"{path}: no tensor fits; the file has names like {_some(source)}, the model names like {_some(targets)}"
        )
    broken = [name for name in report.matched if not filled[name].float().isfinite().all()]
    if broken:
        raise ConfigError(
            f"{path}: {broken[0]} holds NaN or infinite values ({len(broken)} tensors do); nothing loaded"
        )
    module.load_state_dict(filled, strict=False)
    return report


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Return the tensors of a file by name, on the CPU, without running any code from it.

    Raises:
        ConfigError: The file is absent, unreadable, holds objects other than tensors, or no tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path}: no such file of weights")
    try:
        content = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except SafetensorError as error:
        raise ConfigError(f"{path}: not a readable safetensors file ({error})") from error
    except Exception as error:
        raise ConfigError(
            f"{path}: refused, because it is damaged or holds objects besides tensors, and unpickling objects can run "
            "any code; where you trust it, save its state_dict() alone, or safetensors, and load that"
        ) from error
    if malformed(content) is None:
        check_digest(content, str(path))
    for key in CONTAINERS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    tensors = {str(k): v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, dict) else {}
    if not tensors:
        raise ConfigError(f"{path}: contains no named tensors")
    return tensors


def _bare(name: str) -> str:
    """Drop wrappers, and write timm's ``stages_0`` of feature extractors as ``stages.0``."""
    return re.sub(r"^([A-Za-z]\w*?)_(\d+)\.", r"\1.\2.", WRAPPERS.sub("", name))


def _renamed(source: dict[str, Tensor]) -> dict[str, Tensor]:
    bare: dict[str, Tensor] = {}
    for name in sorted(source, key=len):  # where two names become one, the less wrapped one wins
        bare.setdefault(_bare(name), source[name])
    return bare


def _body(module: nn.Module) -> tuple[str, Any] | None:
    models = ((name, m) for name, m in module.named_modules() if hasattr(m, "pretrained_cfg"))
    return next(models, None)


def timm_renaming(model: nn.Module) -> Any:
    """Return timm's function that renames the weights of a model's authors, ``None`` where its module has none."""
    return getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)


def _by_timm(
    module: nn.Module, targets: dict[str, Tensor], source: dict[str, Tensor]
) -> list[tuple[dict[str, Tensor], str]]:
    """Return the source as renamed by timm, if the module is or contains a timm model with a renaming."""
    prefix, body = _body(module) or ("", None)
    remap = None if body is None else timm_renaming(body)
    if remap is None:
        return []
    elsewhere = {_bare(name) for name in targets if not name.startswith(prefix)}
    bare = _renamed(source)
    others = {name: t for name, t in bare.items() if name in elsewhere}
    try:
        mapped = remap({name: t for name, t in bare.items() if name not in others}, body)
    except Exception as error:  # these functions expect whole files of known origin and fail on others in many ways
        return [({}, f"timm's own renaming of {type(body).__name__} does not apply ({type(error).__name__})")]
    return [({**others, **{_bare(name): t for name, t in mapped.items()}}, "")]


def _match(
    path: Path, targets: dict[str, Tensor], bare: dict[str, Tensor], module: nn.Module
) -> tuple[LoadReport, dict[str, Tensor]]:
    report, filled, used = LoadReport(path), {}, set()
    stems = _stems(module)
    for name, target in targets.items():
        tensor = bare.get(_bare(name))
        if tensor is None:
            report.missing.append(name)
            continue
        used.add(_bare(name))
        if name in stems and tensor.ndim == 4 and tensor.shape[1] != target.shape[1]:
            tensor = adapt_input_conv(target.shape[1], tensor, base_chans=tensor.shape[1])
            report.adapted.append(name)
        if tensor.shape != target.shape:
            report.mismatched.append((name, tuple(tensor.shape), tuple(target.shape)))
            continue
        filled[name] = tensor
        report.matched.append(name)
    report.adapted = [name for name in report.adapted if name in filled]
    report.unexpected = sorted(set(bare) - used)
    return report, filled


def _stems(module: nn.Module) -> set[str]:
    prefix, body = _body(module) or ("", None)
    if body is None:
        return set()
    first = body.pretrained_cfg.get("first_conv") or ()
    names = (first,) if isinstance(first, str) else first
    return {f"{prefix}.{name}.weight".lstrip(".") for name in names}


def _some(tensors: dict[str, Tensor]) -> str:
    return ", ".join(list(tensors)[:3])

"""Small untrained models at rest, as ``fit`` leaves them."""

from pathlib import Path

import torch
import yaml

from mtmedformer import MultiTaskModule
from mtmedformer.commands.load.stored_model import build

HEADS = {
    "health": ("ClassificationHead", {"classes": ["well", "sick"]}),
    "signs": ("ClassificationHead", {"classes": ["cough", "fever", "rash"], "multi_label": True, "peak": False}),
    "nodules": ("DetectionHead", {"classes": ["round", "spiky"], "num_convs": 1, "width": 16}),
    "found": ("QueryHead", {"classes": ["round"], "num_queries": 6, "num_layers": 1}),
    "organ": ("SegmentationHead", {"classes": ["organ"]}),
    "parts": ("SegmentationHead", {"classes": ["upper", "lower"]}),
}


def description(*tasks: str) -> dict:
    """Return the configuration of a model of these tasks of ``HEADS``; by default one of each kind."""
    heads = {
        task: {"class_path": f"mtmedformer.heads.{HEADS[task][0]}", "init_args": HEADS[task][1]}
        for task in tasks or ("health", "nodules", "organ")
    }
    encoder = {"class_path": "mtmedformer.SharedEncoder", "init_args": {"name": "mtmedformer_tiny", "channels": 16}}
    return {"class_path": "mtmedformer.MultiTaskModule", "init_args": {"encoder": encoder, "heads": heads}}


def write_checkpoint(folder: Path, model: dict | None = None, seed: int = 0, **more: object) -> Path:
    """Write a run of an untrained model: its checkpoint, and the ``config.yaml`` that says how images are prepared."""
    model = model or description()
    torch.manual_seed(seed)
    module = build(model, MultiTaskModule, ("mtmedformer", "mtmedformer.heads"), trusted=True)
    for parameter in module.heads.parameters():  # heads start nearly silent; let them say something
        torch.nn.init.normal_(parameter, std=0.2) if parameter.ndim > 1 else None
    stored = {
        "state_dict": module.state_dict(),
        "hyper_parameters": {"_class_path": model["class_path"], **model["init_args"]},
        **more,
    }
    file = folder / "checkpoints/best.ckpt"
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(stored, file)
    data = {"class_path": "datamodules.LabelsCSVDataModule", "init_args": {"root": "x", "image_size": [64, 96]}}
    (folder / "config.yaml").write_text(yaml.safe_dump({"data": data}))
    return file

"""A folder of small images with one table, partly labelled, and a small model to train on it."""

import csv
import json
from pathlib import Path

import numpy as np
import yaml
from PIL import Image, ImageDraw

SITES = ("north", "south")


def write_small_set(root: Path, patients: int = 16, size: int = 64, seed: int = 0) -> Path:
    """Write two images a patient: a bright disc is a 'nodule' (boxed), an ellipse is the 'organ' (masked).

    The south labels no boxes; every fourth image has no mask; every fifth no class.
    """
    rng = np.random.default_rng(seed)
    (root / "images").mkdir(parents=True, exist_ok=True)
    (root / "masks").mkdir(exist_ok=True)
    rows = []
    for patient in range(patients):
        site = SITES[patient % 2]
        for k in range(2):
            n = 2 * patient + k
            sick = patient % 3 == 0
            image = Image.new("L", (size, size), 20)
            mask = Image.new("L", (size, size), 0)
            left = int(rng.integers(4, 12))
            organ = (left, 8, left + size // 2, size - 8)
            ImageDraw.Draw(image).ellipse(organ, fill=90)
            ImageDraw.Draw(mask).ellipse(organ, fill=255)
            boxes = []
            if sick:
                x, y = left + int(rng.integers(8, 16)), int(rng.integers(16, 40))
                ImageDraw.Draw(image).ellipse((x, y, x + 11, y + 11), fill=230)
                boxes = [[x, y, x + 12, y + 12]]
            noisy = np.asarray(image, dtype=np.float64) + rng.normal(0, 6, (size, size))
            Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(root / "images" / f"im{n:03d}.png")
            mask.save(root / "masks" / f"im{n:03d}.png")
            rows.append(
                {
                    "image": f"images/im{n:03d}.png",
                    "site": site,
                    "patient": f"secret-patient-{patient:03d}",
                    "view": ("PA", "AP")[k],
                    "label": "" if n % 5 == 4 else ("sick" if sick else "well"),
                    "has_det": int(site == "north"),
                    "boxes": json.dumps(boxes if site == "north" else []),
                    "box_labels": json.dumps(["nodule"] * len(boxes) if site == "north" else []),
                    "mask_organ": "" if n % 4 == 3 else f"masks/im{n:03d}.png",
                }
            )
    with (root / "labels.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return root


def small_config(root: Path, runs: Path, **trainer: object) -> dict:
    """Return a configuration that trains three tasks on ``write_small_set(root)`` in about a second an epoch."""
    return {
        "model": {
            "class_path": "mtmedformer.MultiTaskModule",
            "init_args": {
                "encoder": {
                    "class_path": "mtmedformer.SharedEncoder",
                    "init_args": {
                        "name": "mtmedformer_tiny",
                        "channels": 16,
                        "drop_path_rate": 0.1,
                    },
                },
                "heads": {
                    "health": {
                        "class_path": "mtmedformer.ClassificationHead",
                        "init_args": {"classes": ["well", "sick"]},
                    },
                    "nodules": {"class_path": "mtmedformer.DetectionHead", "init_args": {"classes": ["nodule"]}},
                    "organ": {"class_path": "mtmedformer.SegmentationHead", "init_args": {"classes": ["organ"]}},
                },
            },
        },
        "data": {
            "class_path": "datamodules.LabelsCSVDataModule",
            "init_args": {
                "root": str(root),
                "classification": {"health": {"column": "label", "classes": ["well", "sick"]}},
                "detection": {"nodules": {"classes": ["nodule"], "flag": "has_det"}},
                "segmentation": {"organ": {"columns": {"organ": "mask_organ"}}},
                "image_size": 64,
                "batch_size": 4,
                "num_workers": 0,
                "cache_dir": str(runs / "cache"),
            },
        },
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.002}},
        "lr_scheduler": {"class_path": "mtmedformer.WarmupCosine"},
        "trainer": {
            "max_epochs": 2,
            "accelerator": "cpu",
            "devices": 1,
            "enable_progress_bar": False,
            "default_root_dir": str(runs / "run"),
            **trainer,
        },
    }


def write_config(config: dict, file: Path) -> str:
    """Write a configuration and return its path as a string."""
    file.write_text(yaml.safe_dump(config, sort_keys=False))
    return str(file)

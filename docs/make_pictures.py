"""Make the pictures of README: docs/images/prediction.png and docs/images/federation.png.

Run it after a change of the pictures or of the quickstart configurations:

    python docs/make_pictures.py

It trains the quickstart (12 epochs) and the federation quickstart (8 rounds at 96 pixels), a few minutes on two CPU
cores. All images are synthetic. The first picture is the overlay that ``fit`` writes into its run folder, the second
one is drawn by the plotting code of the federation report.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

from callbacks.reports.round_curves import Panel, round_figure

ROOT = Path(__file__).resolve().parents[1]
PICTURES = ROOT / "docs" / "images"
WIDTH = 960


def fit(config: str, run: Path, *options: str) -> Path:
    """Train a configuration and return its run folder."""
    quiet = ("--trainer.enable_progress_bar=false", f"--trainer.default_root_dir={run}")
    command = [sys.executable, "-m", "mtmedformer", "fit", "--config", config, *quiet, *options]
    subprocess.run(command, cwd=ROOT, check=True)
    return run


def save_small(picture: Image.Image, file: Path) -> None:
    """Write a picture of ``WIDTH`` pixels with 128 colours."""
    height = round(picture.height * WIDTH / picture.width)
    small = picture.convert("RGB").resize((WIDTH, height), Image.Resampling.LANCZOS)
    small.quantize(128).save(file, optimize=True)


def prediction(run: Path) -> None:
    """Copy the last overlay of a training: two validation images with truth and prediction."""
    last = sorted((run / "overlays").glob("epoch_*.png"))[-1]
    save_small(Image.open(last), PICTURES / "prediction.png")


def federation(run: Path) -> None:
    """Draw the scores by round and site from the ``report.json`` of a federation, as its report does."""
    report = json.loads((run / "report.json").read_text())
    pooled = {entry["round"] - 1: entry["metrics"] for entry in report["pooled"]}
    sites = [site["site"] for site in report["sites"]]
    score = {site: _line(report, f"site/{site}/val/score") for site in sites}
    panels = [Panel("score", score, {number: metrics["val/score"] for number, metrics in pooled.items()})]
    for task, metric in report["primary"].items():
        key = f"val/{task}/{metric}"
        lines = {site: _line(report, f"{key}/site={site}") for site in sites}
        panels.append(Panel(f"{task}: {metric}", lines, {number: metrics[key] for number, metrics in pooled.items()}))
    figure = round_figure(panels, "all sites together")
    with tempfile.TemporaryDirectory() as folder:
        figure.savefig(file := Path(folder, "federation.png"), dpi=150, facecolor="white")
        save_small(Image.open(file), PICTURES / "federation.png")


def _line(report: dict, key: str) -> dict[int, float]:
    """Return a metric by round, without the rounds in which it is unknown."""
    values = {entry["round"] - 1: entry["validation"].get(key) for entry in report["history"]}
    return {number: value for number, value in values.items() if value is not None}


def main() -> None:
    """Train both configurations and write both pictures."""
    PICTURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        overlays = ("--trainer.callbacks+=callbacks.Overlays", "--trainer.callbacks.images=2")
        prediction(fit("configs/quickstart.yaml", Path(folder, "quickstart"), *overlays))
        small = ("--trainer.max_epochs=8", "--data.data.init_args.image_size=96")
        federation(fit("configs/federation/quickstart.yaml", Path(folder, "federation"), *small))


if __name__ == "__main__":
    main()

"""Reports through the command line: files in the run folder, and a browser opens them without errors."""

from __future__ import annotations

import json
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from mtmedformer.commands.main import main
from tests.fixtures.small_set import small_config, write_config

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
)


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.text, self.images, self.drawings, self._style = "", 0, 0, False

    def handle_starttag(self, tag, attrs):
        self._style = tag == "style"
        self.images += tag == "img" and dict(attrs)["src"].startswith("data:image/png;base64,")
        self.drawings += tag == "svg"

    def handle_data(self, data):
        self.text += "" if self._style else data + " "


def read(file):
    page = Page()
    page.feed(file.read_text())
    page.text = " ".join(page.text.split())
    return page


@pytest.fixture(scope="module")
def tested(images, tmp_path_factory):
    """A run folder after ``fit`` with calibration and ``test``."""
    runs = tmp_path_factory.mktemp("runs")
    config = small_config(images, runs, callbacks=[{"class_path": "callbacks.Calibrate"}], max_epochs=1)
    assert main(["fit", "--config", write_config(config, runs / "config.yaml")]) == 0
    assert main(["test", "--ckpt_path", str(runs / "run" / "checkpoints" / "best.ckpt")]) == 0
    return runs / "run"


@pytest.fixture(scope="module")
def federated(images, tmp_path_factory):
    """A run folder after a federation of two rounds and ``test``."""
    runs = tmp_path_factory.mktemp("federation")
    config = small_config(images, runs)
    inner = config["data"]
    config["data"] = {"class_path": "federation.FederatedDataModule", "init_args": {"by": "site", "data": inner}}
    config["federation"] = {"class_path": "callbacks.Federation"}
    assert main(["fit", "--config", write_config(config, runs / "config.yaml")]) == 0
    assert main(["test", "--ckpt_path", str(runs / "run" / "checkpoints" / "best.ckpt")]) == 0
    return runs / "run"


def test_test_command_writes_a_complete_report(tested):
    page = read(tested / "report.html")
    for text in (
        "Research use only",
        "Performance",
        "Limitations",
        "health",
        "nodules",
        "organ",
        "95 % interval",
        "site north",
        "view PA",
        "Confusion matrix",
        "Thresholds chosen on validation images",
        "No patient is in two splits",
        "LabelsCSVDataModule",
        "All images and labels could be used.",
        "PyTorch",
        "class_path: mtmedformer.SharedEncoder",
    ):
        assert text in page.text, text
    assert page.drawings >= 3
    assert 1 <= page.images <= 3
    assert "secret-patient" not in (tested / "report.html").read_text()
    assert "im0" not in page.text


def test_model_card_agrees_with_the_report(tested):
    card = (tested / "model_card.md").read_text()
    assert "# Model card: health, nodules, organ" in card
    assert "[report.html](report.html)" in card
    assert "secret-patient" not in card
    value = json.loads((tested / "test_metrics.json").read_text())["test/organ/dice"]
    assert f"| dice | {value:.3f}" in card
    assert f"{value:.3f}" in read(tested / "report.html").text


def test_federation_report_stays_beside_the_test_report(federated):
    report = json.loads((federated / "report.json").read_text())
    assert report["state"]["state"] == "finished"
    assert [entry["round"] for entry in report["history"]] == [1, 2]
    assert {s["site"]: s["labels"]["nodules"] for s in report["sites"]}["south"] == 0
    page = read(federated / "report.html")
    assert "south has no labels for nodules" in page.text
    assert "secret-patient" not in (federated / "report.html").read_text()
    test = read(federated / "test_report.html")
    assert "north: LabelsCSVDataModule" in test.text
    assert "[test_report.html](test_report.html)" in (federated / "model_card.md").read_text()


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium is installed")
@pytest.mark.parametrize("which", ["tested/report.html", "federated/report.html", "federated/test_report.html"])
def test_browser_opens_the_page_without_errors(which, request, tmp_path):
    run, name = which.split("/")
    file = request.getfixturevalue(run) / name
    opened = subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}",
            "--enable-logging=stderr", "--dump-dom", file.as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert "CONSOLE" not in opened.stderr
    assert "<h1>" in opened.stdout
    assert "Refused" not in opened.stderr

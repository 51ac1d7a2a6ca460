"""Results per image on disk: they are read back unchanged, and the file has no patient data."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from callbacks.evaluation.per_image_results import PerImageResults
from callbacks.run.model_summary import StartWeights
from mtmedformer.batch import Batch, ClassificationTarget, DetectionTarget, Meta, SegmentationTarget, Task
from mtmedformer.errors import DataError
from mtmedformer.metrics.classification import ClassificationMetrics
from mtmedformer.metrics.detection import DetectionMetrics
from mtmedformer.metrics.rows import load_rows, save_rows
from mtmedformer.metrics.segmentation import SegmentationMetrics


def metas(site, n, start=0):
    return [Meta(f"film-{site}-{start + i}", f"patient-{(start + i) // 2}", site, view="PA") for i in range(n)]


def filled(site="north", n=6, seed=0):
    """Return a metric of each kind that has seen n images of one site."""
    draw = torch.Generator().manual_seed(seed)
    meta, present = metas(site, n), torch.ones(n, dtype=torch.bool)
    present[0] = False
    masks = SegmentationMetrics(["lung"], hausdorff=False)
    masks.update(
        torch.rand(n, 1, 8, 8, generator=draw),
        SegmentationTarget((torch.rand(n, 1, 8, 8, generator=draw) > 0.5).to(torch.uint8), present),
        meta,
    )
    classes = ClassificationMetrics(["no", "yes"], specificity=0.8)
    labels = nn.functional.one_hot(torch.arange(n) % 2, 2).float()
    classes.update(torch.rand(n, 2, generator=draw).softmax(1), ClassificationTarget(labels, present), meta)
    boxes = DetectionMetrics(["nodule"], fp_rates=(1.0, 2.0))
    predictions = [
        {
            "boxes": torch.tensor([[0.0, 0, 4, 4 + i % 3]]).repeat(i % 3, 1),
            "scores": torch.rand(i % 3, generator=draw),
            "labels": torch.zeros(i % 3, dtype=torch.long),
        }
        for i in range(n)
    ]
    true = [torch.tensor([[0.0, 0, 4, 4]]).repeat(i % 2, 1) for i in range(n)]
    target = DetectionTarget(true, [torch.zeros(len(t), dtype=torch.long) for t in true], present)
    boxes.update(predictions, target, meta)
    return {"lungs": masks, "finding": classes, "lesions": boxes}


def values(evaluate, n):
    return {name: value[0] for name, value in evaluate(np.ones((1, n))).items()}


def test_stored_results_are_read_back_unchanged(tmp_path):
    metrics = filled()
    save_rows(metrics, tmp_path / "rows.npz", "salt")
    back = load_rows([tmp_path / "rows.npz"])
    assert back.keys() == metrics.keys()
    for task, metric in metrics.items():
        rows = metric.seen().rows
        expected = values(metric.prepare(rows), len(rows))
        assert len(back[task].rows) == 5, "the unlabelled image is not there"
        np.testing.assert_equal(values(back[task].evaluate(), 5), expected)
        assert type(back[task].metric) is type(metric)
    assert back["finding"].metric.specificity == 0.8
    assert back["lesions"].metric.fp_rates == (1.0, 2.0)


def test_several_files_are_read_as_one_table(tmp_path):
    together = filled("north")
    files = []
    for site, seed in (("north", 0), ("south", 1)):
        files.append(tmp_path / f"{site}.npz")
        save_rows(filled(site, seed=seed), files[-1], "salt")
    for task, metric in filled("south", seed=1).items():
        for name in metric.no_rows:
            getattr(together[task], name).extend(getattr(metric, name))
    for task, rows in load_rows(files).items():
        assert rows.sites.tolist() == ["north"] * 5 + ["south"] * 5
        images = together[task].seen()
        by_site = images.rows[[s == "south" for s in images.sites]]
        south = rows.evaluate(np.flatnonzero(rows.sites == "south"))
        np.testing.assert_equal(values(south, 5), values(together[task].prepare(by_site), 5))


def test_image_that_was_loaded_twice_counts_once(tmp_path):
    metrics = filled()
    for metric in metrics.values():
        for name in metric.no_rows:
            getattr(metric, name).extend(list(getattr(metric, name)))
    save_rows(metrics, tmp_path / "rows.npz", "salt")
    assert all(len(rows.rows) == 5 for rows in load_rows([tmp_path / "rows.npz"]).values())


def test_file_has_no_patient_data_and_the_salt_determines_the_hashes(tmp_path):
    for name, salt in (("a", "one"), ("b", "one"), ("c", "other")):
        save_rows(filled(), tmp_path / f"{name}.npz", salt)
    with np.load(tmp_path / "a.npz") as held:
        content = b"".join(held[key].tobytes() for key in held.files)
        text = " ".join(str(held[key]) for key in held.files)
    assert b"patient-" not in content
    assert "film-" not in text
    a, b, c = (load_rows([tmp_path / f"{name}.npz"])["lungs"] for name in "abc")
    assert a.patients.tolist() == b.patients.tolist()
    assert not set(a.patients.tolist()) & set(c.patients.tolist())
    assert len(set(a.patients.tolist())) == 3


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 nonsense", b"\x93NUMPY"])
def test_invalid_file_is_named_in_the_error(tmp_path, content):
    (tmp_path / "rows.npz").write_bytes(content)
    with pytest.raises(DataError, match=r"rows\.npz"):
        load_rows([tmp_path / "rows.npz"])


def test_file_cannot_execute_code(tmp_path):
    about = {"lungs": {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", str(tmp_path / "ran")]}}}
    np.savez(tmp_path / "rows.npz", about=json.dumps(about))
    with pytest.raises(DataError, match=r"subprocess\.Popen"):
        load_rows([tmp_path / "rows.npz"])
    assert not (tmp_path / "ran").exists()


class Probabilities(nn.Module):
    """A module with two tasks and their metrics, as the callback needs it."""

    def __init__(self):
        super().__init__()
        metrics = filled()
        self.tasks = {
            "lungs": Task("lungs", "segmentation", ("lung",)),
            "lesions": Task("lesions", "detection", ("n",)),
        }
        self.test_metrics = nn.ModuleDict({name: metrics[name] for name in self.tasks})


def test_callback_keeps_raw_and_calibrated_probabilities(tmp_path):
    trainer = SimpleNamespace(is_global_zero=True, fast_dev_run=False, default_root_dir=str(tmp_path))
    module, callback, meta = Probabilities(), PerImageResults(str(tmp_path / "salt")), metas("north", 6)
    target = SegmentationTarget(torch.ones(6, 1, 8, 8, dtype=torch.uint8), torch.ones(6, dtype=torch.bool))
    batch = Batch(torch.zeros(6, 1, 8, 8), {"lungs": target}, meta)
    (tmp_path / "salt").write_text("salt")
    callback.on_test_epoch_start(trainer, module)
    outputs = {"lungs": torch.full((6, 1, 8, 8), 0.8), "raw/lungs": torch.full((6, 1, 8, 8), 0.5)}
    callback.on_test_batch_end(trainer, module, outputs, batch, 0)
    callback.on_test_epoch_end(trainer, module)
    rows = load_rows([tmp_path / "test_rows.npz"])
    assert set(rows) == {"lungs", "lesions", "lungs~calibration", "lungs~raw", "lungs~referral"}
    assert values(rows["lungs~calibration"].evaluate(), 6)["nll"] == pytest.approx(-np.log(0.8), abs=1e-6)
    assert set(rows["lungs"].images.tolist()) < set(rows["lungs~raw"].images.tolist()), "one was not labelled"
    assert values(rows["lungs~raw"].evaluate(), 6)["nll"] == pytest.approx(-np.log(0.5), abs=1e-6)


def test_start_weights_are_recorded_once_per_part(tmp_path):
    trainer = SimpleNamespace(is_global_zero=True, default_root_dir=str(tmp_path))
    torch.manual_seed(0)
    module = nn.ModuleDict(
        {"encoder": nn.Linear(2, 3), "heads": nn.ModuleDict({"a": nn.Linear(3, 1)}), "loss": nn.Linear(1, 1)}
    )

    def start(callback):
        callback.setup(trainer, module, "fit")
        callback.on_train_start(trainer, module)

    start(StartWeights())
    noted = json.loads((tmp_path / "start_weights.json").read_text())
    assert {part: note["weights"] for part, note in noted.items()} == {"encoder": 9, "heads.a": 4}
    with torch.no_grad():
        module["encoder"].weight += 1
    start(StartWeights())
    assert json.loads((tmp_path / "start_weights.json").read_text()) == noted, (
        "a resumed run keeps the note of its start"
    )
    start(StartWeights(str(tmp_path / "other")))
    moved = json.loads((tmp_path / "other/start_weights.json").read_text())
    assert moved["encoder"]["hash"] != noted["encoder"]["hash"]
    assert moved["heads.a"] == noted["heads.a"]

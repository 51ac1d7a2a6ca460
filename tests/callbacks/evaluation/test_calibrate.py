"""Calibration through the Trainer: fitted to the weights it is stored with, used by test and predict."""

import json

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from torch.utils.data import DataLoader

from callbacks import Calibrate, ReliabilityReport
from mtmedformer import (
    ClassificationHead,
    ConfigError,
    DetectionHead,
    MultiTaskModule,
    SegmentationHead,
    SharedEncoder,
)
from mtmedformer.batch import Boxes, Meta, Sample, collate
from mtmedformer.calibration import TaskCalibration, class_performance
from mtmedformer.inference.predictor import TiledPredictor
from mtmedformer.metrics.calibration import CalibrationMetrics, TemperatureSums

SIZE = 32


def model(**options):
    torch.manual_seed(0)
    heads = {
        "health": ClassificationHead(["well", "sick"]),
        "signs": ClassificationHead(["a", "b"], multi_label=True),
        "nodules": DetectionHead(["nodule"]),
        "organ": SegmentationHead(["organ"]),
    }
    return MultiTaskModule(SharedEncoder("mtmedformer_tiny", channels=16), heads, **options)


def loader(module, n=24, seed=0, batch_size=4, size=SIZE):
    """Images with a bright square as organ, nodule and sign of disease; every third image lacks a label."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for i in range(n):
        image, mask = 0.3 * torch.rand(1, size, size, generator=generator), torch.zeros(1, size, size)
        sick = i % 2 == 1
        if sick:
            y, x = torch.randint(4, size - 14, (2,), generator=generator).tolist()
            image[:, y : y + 10, x : x + 10] += 0.6
            mask[:, y : y + 10, x : x + 10] = 1
        noisy = sick if torch.rand((), generator=generator) > 0.2 else not sick  # labels that no model can get right
        truth = {
            "health": None if i % 3 == 0 else torch.tensor([1.0 - noisy, float(noisy)]),
            "signs": torch.tensor([float(noisy), torch.nan if i % 4 == 0 else float(sick)]),
            "nodules": Boxes(torch.tensor([[x, y, x + 10.0, y + 10.0]]) if sick else torch.zeros(0, 4),
                             torch.zeros(int(sick), dtype=torch.int64)),
            "organ": mask.to(torch.uint8) if i % 3 else None,
        }  # fmt: skip
        samples.append(Sample(image, truth, Meta(f"im{seed}-{i}", f"p{i}")))
    return DataLoader(samples, batch_size, collate_fn=lambda part: collate(part, module.tasks))


def twin(module):
    """Return a module of the same weights and calibration."""
    other = model()
    other.load_state_dict(module.state_dict())
    other.calibration = dict(module.calibration)
    return other


def trainer(folder, *callbacks, epochs=2, **options):
    return L.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=epochs,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
        default_root_dir=folder,
        callbacks=list(callbacks),
        **options,
    )


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A run of three epochs with a checkpoint each, and one more saved between validations."""
    folder = tmp_path_factory.mktemp("run")
    module = model()
    saved = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    between = ModelCheckpoint(folder, filename="step{step}", every_n_train_steps=4, save_top_k=-1)
    run = trainer(folder, Calibrate(), saved, between, epochs=3)
    run.fit(module, loader(module), loader(module, seed=1))
    return folder, module, dict(run.callback_metrics)


def stored(folder, name):
    return torch.load(folder / name, weights_only=True)


def test_each_checkpoint_holds_the_calibration_of_its_own_weights(fitted):
    folder, module, _ = fitted
    temperatures = []
    for epoch in range(3):
        checkpoint = stored(folder, f"epoch={epoch}.ckpt")
        again = model()
        again.load_state_dict(checkpoint["state_dict"])
        sums = {name: TemperatureSums(task) for name, task in again.tasks.items() if task.kind != "detection"}
        again.eval()
        for batch in loader(again, seed=1):
            with torch.no_grad():
                outputs = again(batch.image)
            for name, one in sums.items():
                one.update(again.heads[name].class_logits(outputs[name], (SIZE, SIZE)), batch.targets[name], batch.meta)
        for name, one in sums.items():
            curve, decisions, images = one.sums()
            kept = checkpoint["calibration"][name]
            assert kept["images"] == images == {"health": 16, "organ": 16, "signs": 24}[name]
            assert kept["nll_raw"] == pytest.approx(curve[20, 0] / decisions, rel=1e-5)
            assert kept["nll"] <= kept["nll_raw"]
        temperatures.append(checkpoint["calibration"]["health"]["temperature"])
    assert len(set(temperatures)) == 3
    assert module.calibration["health"].temperature == temperatures[-1]


def test_weights_changed_since_validation_have_no_calibration(fitted):
    folder, _, _ = fitted
    for file in folder.glob("step*.ckpt"):
        checkpoint = torch.load(file, weights_only=True)
        assert "calibration" not in checkpoint, file.name
    assert list(folder.glob("step*.ckpt"))


def test_state_dict_does_not_contain_the_calibration(fitted):
    folder, module, _ = fitted
    assert module.state_dict().keys() == model().state_dict().keys()
    assert stored(folder, "epoch=0.ckpt")["state_dict"].keys() == model().state_dict().keys()


def test_temperature_and_calibrated_likelihood_are_logged(fitted):
    _, module, logged = fitted
    for name in ("health", "signs", "organ"):
        assert float(logged[f"val/{name}/temperature"]) == pytest.approx(module.calibration[name].temperature)
        assert float(logged[f"val/{name}/nll_calibrated"]) == pytest.approx(module.calibration[name].nll)
    assert not any("nodules/temperature" in key for key in logged)
    assert float(logged["val/health/nll"]) == pytest.approx(module.calibration["health"].nll_raw, rel=1e-4)


def test_thresholds_reach_their_sensitivity_on_the_calibrated_probabilities(fitted):
    _, module, _ = fitted
    calibrated = twin(module).eval()
    probabilities, truth = {"health": [], "signs": []}, {"health": [], "signs": []}
    for batch in loader(module, seed=1):
        with torch.no_grad():
            predictions = calibrated.predict(batch.image)
        for name in probabilities:
            probabilities[name].append(predictions[name][batch.targets[name].present])
            truth[name].append(batch.targets[name].labels[batch.targets[name].present])
    for name in probabilities:
        p, y = torch.cat(probabilities[name]).numpy(), torch.cat(truth[name]).numpy()
        for k, label in enumerate(module.heads[name].classes):
            known = ~np.isnan(y[:, k])
            points = module.calibration[name].thresholds[label]
            assert set(points) == {"sensitivity=0.9", "youden", "f1"}
            reached = class_performance(p[known, k], y[known, k] == 1, points["sensitivity=0.9"])
            assert reached["sensitivity"] >= 0.9
    assert set(module.calibration["nodules"].thresholds["nodule"]) <= {"sensitivity=0.9", "f1", "fp_per_image=1"}
    assert module.calibration["nodules"].temperature is None


def test_test_reports_raw_and_calibrated_from_one_pass(fitted, capsys):
    folder, module, _ = fitted
    module = twin(module)
    module.calibration["health"] = TaskCalibration(16, 2.0, 0.7, 0.6, {"sick": {"youden": 0.4}})
    report = ReliabilityReport(str(folder))
    run = trainer(folder, report)
    logged = run.test(module, loader(module, seed=2), verbose=False)[0]
    facts = json.loads((folder / "reliability.json").read_text())
    plain = twin(module)
    plain.calibration = {}
    plain.eval(), module.eval()
    raw, scaled = CalibrationMetrics(module.tasks["health"]), CalibrationMetrics(module.tasks["health"])
    for batch in loader(module, seed=2):
        with torch.no_grad():
            raw.update(plain.predict(batch.image)["health"], batch.targets["health"], batch.meta)
            scaled.update(module.predict(batch.image)["health"], batch.targets["health"], batch.meta)
    for key in ("ece", "nll"):
        assert facts["health"][f"{key}_raw"] == pytest.approx(float(raw.compute()[key]), rel=1e-5)
        assert facts["health"][key] == pytest.approx(float(scaled.compute()[key]), rel=1e-5)
        assert logged[f"test/health/{key}_raw"] == pytest.approx(facts["health"][f"{key}_raw"], rel=1e-5)
        assert logged[f"test/health/{key}"] == pytest.approx(facts["health"][key], rel=1e-5)
        assert logged[f"test/organ/{key}"] == pytest.approx(facts["organ"][key], rel=1e-5)
    assert facts["health"]["ece_raw"] != facts["health"]["ece"]
    assert facts["health"]["thresholds"]["sick"]["youden"]["threshold"] == 0.4
    assert 0 <= facts["health"]["thresholds"]["sick"]["youden"]["sensitivity"] <= 1
    assert sum(facts["health"]["bins"][""]["count"]) == 16
    assert "temperature" in capsys.readouterr().out


def test_calibration_keeps_the_ranking_and_its_absence_changes_no_bit(fitted):
    folder, module, _ = fitted
    plain = twin(module)
    plain.calibration = {}
    with_it, without = (
        trainer(folder, ReliabilityReport(str(folder / kind))).test(m, loader(m, seed=2), verbose=False)[0]
        for kind, m in (("a", module), ("b", plain))
    )
    for key in ("test/signs/auroc", "test/organ/dice", "test/nodules/map50", "test/health/balanced_accuracy"):
        assert with_it[key] == without[key], key
    assert "test/health/nll_raw" not in without
    assert with_it["test/health/nll_raw"] == pytest.approx(without["test/health/nll"], rel=1e-6)
    image = next(iter(loader(module))).image
    plain.eval()
    with torch.no_grad():
        outputs, predictions = plain(image), plain.predict(image)
    for name in ("health", "signs", "organ"):
        assert torch.equal(predictions[name], plain.heads[name].predict(outputs[name], (SIZE, SIZE)))
    assert predictions.keys() == plain.heads.keys()


def test_tiled_and_flipped_predictions_are_calibrated(fitted):
    _, module, _ = fitted
    whole = twin(module).eval()
    tiled = twin(module).eval()
    tiled.predictor = TiledPredictor((SIZE, SIZE))
    image = next(iter(loader(module))).image
    both = tiled.predict_whole(image, raw=True)
    torch.testing.assert_close(both["organ"], whole.predict(image)["organ"])
    tiled.predictor = TiledPredictor((24, 24), flip_tta=True)
    both = tiled.predict_whole(image, raw=True)
    assert {"raw/health", "raw/signs", "raw/organ"} <= both.keys()
    tiled.calibration = {}
    torch.testing.assert_close(tiled.predict_whole(image)["organ"], both["raw/organ"])


def test_test_uses_the_calibration_of_the_checkpoint_and_a_resumed_fit_does_not(fitted, tmp_path):
    folder, _, _ = fitted
    file = folder / "epoch=1.ckpt"
    expected = stored(folder, file.name)["calibration"]["health"]["temperature"]
    module = model()
    run = trainer(tmp_path, ReliabilityReport(str(tmp_path)))
    run.test(module, loader(module, seed=2), ckpt_path=file, verbose=False)
    assert module.calibration["health"].temperature == expected
    seen = []

    class Look(L.Callback):
        def on_train_start(self, trainer, pl_module):
            seen.append(dict(pl_module.calibration))

    module = model()
    trainer(tmp_path, Calibrate(), Look(), epochs=3).fit(module, loader(module), loader(module, seed=1), ckpt_path=file)
    assert seen == [{}]
    assert (
        module.calibration["health"].temperature
        == stored(folder, "epoch=2.ckpt")["calibration"]["health"]["temperature"]
    )
    old = torch.load(file, weights_only=True)
    del old["calibration"]
    torch.save(old, tmp_path / "old.ckpt")
    module.calibration = {"health": TaskCalibration(1, 9.0)}
    trainer(tmp_path).test(module, loader(module, seed=2), ckpt_path=tmp_path / "old.ckpt", verbose=False)
    assert module.calibration == {}


def test_calibration_changes_no_weight(tmp_path):
    bits = []
    for callbacks in ((), (Calibrate(),)):
        L.seed_everything(3, verbose=False)
        module = model()
        trainer(tmp_path, *callbacks).fit(module, loader(module), loader(module, seed=1))
        bits.append({key: value.clone() for key, value in module.state_dict().items()})
    assert all(torch.equal(bits[0][key], bits[1][key]) for key in bits[0])


def test_task_without_validation_labels_is_not_calibrated(tmp_path):
    module = model()
    val = loader(module, n=8, seed=1)
    for sample in val.dataset:
        sample.truth["health"] = None
    trainer(tmp_path, Calibrate(), epochs=1).fit(module, loader(module), val)
    assert "health" not in module.calibration
    assert "signs" in module.calibration


def test_error_names_a_module_that_cannot_be_calibrated(tmp_path):
    with pytest.raises(ConfigError, match="BoringModel"):
        trainer(tmp_path, Calibrate()).fit(BoringModel())
    with pytest.raises(ConfigError, match="operating_points"):
        Calibrate(["best"])

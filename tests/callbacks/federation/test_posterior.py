"""A federation's posterior from the last round to predictions: tuned at the sites, refused or used, never mixed up."""

import csv
import json

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image

from callbacks import Calibrate, Federation, PosteriorPrediction, PredictionWriter, ReliabilityReport, TunePosterior
from federation import BayesianAggregator, FedAvg, FederatedDataModule
from federation.bayes.posterior import Posterior
from federation.bayes.sampling import TruthLikelihood
from federation.bayes.uncertainty import likelihood_sums, tune_scale
from mtmedformer.errors import ConfigError
from mtmedformer.inference.predictor import TiledPredictor
from tests.fixtures.square_sites import SquareSite, square_model


def data():
    return FederatedDataModule(
        sites={"a": SquareSite(8), "b": SquareSite(6, seed=1, missing=("nodules",)), "c": SquareSite(4, 2, (), False)}
    )


def trainer(folder, *callbacks, **options):
    return L.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
        default_root_dir=folder,
        callbacks=list(callbacks),
        **options,
    )


def fit(folder, tune, rounds=2, aggregator=None):
    L.seed_everything(1, verbose=False)
    module = square_model()
    best = ModelCheckpoint(folder / "checkpoints", filename="best", monitor="val/score", mode="max")
    last = ModelCheckpoint(folder / "checkpoints", filename="last")
    federation = Federation(aggregator or BayesianAggregator())
    run = trainer(folder, federation, Calibrate(), tune, best, last, max_epochs=rounds)
    run.fit(module, datamodule=data())
    return module, federation


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("federation")
    tune = TunePosterior(grid=[0.0, 0.001, 0.1], samples=3)
    module, federation = fit(folder, tune)
    return folder, tune, module, federation


def used(folder, **scales):
    """Rewrite the posterior as if tuning had chosen these scales and refused the rest."""
    posterior = Posterior.load(folder / "posterior.safetensors")
    for name, one in posterior.tuning["tasks"].items():
        one["scale"] = scales.get(name, 0.0)
    file = folder / f"as{'-'.join(map(str, scales.items()))}.safetensors"
    posterior.save(file)
    return str(file)


def test_the_posterior_is_that_of_the_best_round_and_tuned_from_the_sites_sums(fitted):
    folder, tune, _, federation = fitted
    posterior = Posterior.load(folder / "posterior.safetensors")
    stored = torch.load(folder / "checkpoints/best.ckpt", weights_only=True)
    assert all(torch.equal(posterior.mean[key], value) for key, value in stored["state_dict"].items())
    again = BayesianAggregator()
    again.load_state_dict(stored["callbacks"][federation.state_key]["aggregator"])
    expected = again.memory.precision(again.gamma)
    assert all(torch.equal(posterior.precision[key], value) for key, value in expected.items())
    assert posterior.precision.keys() == expected.keys()
    module = square_model().eval()
    assert stored["calibration"]["organ"]["images"] > 0  # pooled over the sites
    module.on_load_checkpoint(stored)
    module.load_state_dict(stored["state_dict"])
    sums = {}
    for name, site in (("a", SquareSite(8)), ("b", SquareSite(6, seed=1, missing=("nodules",)))):
        batches = list(site.val_dataloader())
        for batch in batches:
            if "nodules" not in batch.targets:
                batch.targets["nodules"] = next(iter(SquareSite(8).val_dataloader())).targets["nodules"][
                    torch.arange(len(batch))
                ]
                batch.targets["nodules"].present[:] = False
        likelihood = TruthLikelihood(module, batches, posterior.mean)
        sums[name] = likelihood_sums(posterior, likelihood, tune.grid, 3)
    for task in module.tasks:
        known = {site: one[task] for site, one in sums.items() if task in one}
        by_hand = tune_scale({s: o[0] for s, o in known.items()}, {s: o[1] for s, o in known.items()}, tune.grid, 0.01)
        told = posterior.tuning["tasks"][task]
        assert told["scale"] == by_hand.scale == tune.tunings[task].scale
        assert told["message"] == by_hand.message
        assert [told["nll"][f"{s:g}"] for s in tune.grid] == pytest.approx([by_hand.nll[s] for s in tune.grid])


def test_tuning_changes_no_bit_of_the_run(fitted, tmp_path):
    _, _, module, _ = fitted
    plain, _ = fit(tmp_path, L.Callback())
    assert all(torch.equal(value, plain.state_dict()[key]) for key, value in module.state_dict().items())
    assert not (tmp_path / "posterior.safetensors").exists()


def test_without_a_best_checkpoint_it_is_that_of_the_last_round(tmp_path):
    tune = TunePosterior(grid=[0.0, 0.01], samples=2, checkpoint="last", blocks=["encoder"], images=4)
    module, federation = fit(tmp_path, tune, rounds=1)
    posterior = Posterior.load(tmp_path / "posterior.safetensors")
    assert all(torch.equal(posterior.mean[key], value) for key, value in module.state_dict().items())
    expected = federation.aggregator.memory.precision(federation.aggregator.gamma)
    assert all(torch.equal(posterior.precision[key], value) for key, value in expected.items())
    assert posterior.tuning["blocks"] == ["encoder"]


def test_refused_everywhere_it_refuses_with_the_message(fitted, tmp_path):
    folder, _, _, _ = fitted
    module = square_model()
    run = trainer(tmp_path, PosteriorPrediction(posterior=used(folder)))
    with pytest.raises(ConfigError, match="health: posterior"):
        run.predict(module, SquareSite(8).predict_dataloader(), ckpt_path=folder / "checkpoints/best.ckpt")
    with pytest.raises(ConfigError, match="TunePosterior"):
        trainer(tmp_path, PosteriorPrediction()).predict(module, SquareSite(8).predict_dataloader())


def predicted(folder, to, *callbacks, name="best"):
    module = square_model()
    run = trainer(to, *callbacks, PredictionWriter(str(to)))
    found = run.predict(module, SquareSite(8).predict_dataloader(), ckpt_path=folder / f"checkpoints/{name}.ckpt")
    return module, found


def test_predict_writes_uncertainty_per_image_box_and_pixel(fitted, tmp_path):
    folder, _, _, _ = fitted
    file = used(folder, health=0.1, nodules=0.001, organ=0.1)
    own = PosteriorPrediction(samples=3, maps=True, posterior=file, folder=str(tmp_path / "drawn"))
    module, found = predicted(folder, tmp_path / "drawn", own)
    _, plain = predicted(folder, tmp_path / "plain")
    assert torch.equal(found[0]["signs"], plain[0]["signs"])  # refused: the mean model, to the bit
    assert not torch.equal(found[0]["health"], plain[0]["health"])
    with (tmp_path / "drawn/predictions.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    with (tmp_path / "plain/predictions.csv").open() as lines:
        before = list(csv.DictReader(lines))
    new = set(rows[0]) - set(before[0])
    assert any("health" in key and "mutual" in key for key in new), new
    assert any("organ" in key and "mutual" in key for key in new)
    assert not any("signs" in key for key in new)
    facts = [json.loads(f.read_text()) for f in sorted((tmp_path / "drawn/uncertainty").glob("*.json"))]
    assert len(facts) == len(rows) == 8
    for one in facts:
        assert set(one["tasks"]) == {"health", "nodules", "organ"}
        for doubt in one["tasks"].values():
            assert 0 <= doubt["mutual_information"] <= doubt["entropy"] <= 0.7
    assert any(one["boxes"] for one in facts)
    assert all(
        {"entropy", "mutual_information", "score", "xyxy"} <= box.keys() for one in facts for box in one["boxes"]
    )
    pictures = list((tmp_path / "drawn/uncertainty").glob("*.png"))
    assert len(pictures) == 8
    assert Image.open(pictures[0]).size[0] > 300
    assert module.predictor == TiledPredictor()  # its own again


def test_predictions_by_sampling_are_not_mixed_with_others(fitted, tmp_path):
    folder, _, _, _ = fitted
    own = PosteriorPrediction(samples=2, posterior=used(folder, health=0.1), folder=str(tmp_path))
    predicted(folder, tmp_path, own)
    about = json.loads((tmp_path / "about_predictions.json").read_text())
    assert about["settings"]["sampling"]["samples"] == 2


def test_test_scores_the_sampled_predictions(fitted, tmp_path):
    folder, _, _, _ = fitted
    results = {}
    for name, callbacks in (
        ("plain", []),
        ("drawn", [PosteriorPrediction(samples=3, posterior=used(folder, health=0.1))]),
    ):
        module = square_model()
        run = trainer(tmp_path / name, *callbacks, ReliabilityReport(str(tmp_path / name)))
        loader = SquareSite(8).test_dataloader()
        results[name] = run.test(module, loader, ckpt_path=folder / "checkpoints/best.ckpt", verbose=False)[0]
    assert results["plain"]["test/organ/dice"] == results["drawn"]["test/organ/dice"]
    assert results["plain"]["test/health/nll"] != results["drawn"]["test/health/nll"]
    assert results["plain"]["test/health/nll_raw"] != results["drawn"]["test/health/nll_raw"]


def test_a_posterior_of_other_weights_is_refused(fitted, tmp_path):
    folder, _, _, _ = fitted
    posterior = Posterior.load(folder / "posterior.safetensors")
    posterior.mean["heads.health.classifier.1.bias"] += 1
    for one in posterior.tuning["tasks"].values():
        one["scale"] = 0.1
    posterior.save(tmp_path / "other.safetensors")
    with pytest.raises(ConfigError, match="other weights"):
        predicted(folder, tmp_path, PosteriorPrediction(posterior=str(tmp_path / "other.safetensors")))


def test_what_has_no_posterior_is_named(tmp_path):
    with pytest.raises(ConfigError, match="FedAvg keeps no precision"):
        fit(tmp_path, TunePosterior(), rounds=1, aggregator=FedAvg())
    with pytest.raises(ConfigError, match="no federation"):
        trainer(tmp_path, TunePosterior(), max_epochs=1).fit(square_model(), datamodule=SquareSite(8))
    with pytest.raises(ConfigError, match="haeds"):
        fit(tmp_path, TunePosterior(blocks=["haeds"]), rounds=1)
    with pytest.raises(ConfigError, match="grid"):
        TunePosterior(grid=[0.1])

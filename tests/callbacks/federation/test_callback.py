"""Rounds as the epochs of a Trainer, on sites that train in milliseconds."""

import copy
import os
import signal
import threading

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException

from callbacks.federation.callback import Federation
from federation import (
    BayesianAggregator,
    CoordinateMedian,
    Ditto,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedBN,
    FederatedDataModule,
    FedProx,
    FedYogi,
    FineTuned,
    Local,
    Pooled,
    Scaffold,
    TrimmedMean,
)
from federation.server.admission import RoundError
from federation.server.participation import taking_part
from mtmedformer.errors import ConfigError
from tests.fixtures.toy_sites import ToySite, toy_module


def sites(**more):
    named = {"a": ToySite(n=12), "b": ToySite(n=8, tasks=("right",), seed=1), "c": ToySite(n=6, seed=2), **more}
    return FederatedDataModule(sites=named)


def run(folder, federation=None, rounds=3, data=None, module=None, ckpt=None, callbacks=(), **settings):
    """Train a federation of three toy sites; return the Trainer, its module and the federation."""
    federation = federation or Federation(FedAvg())
    module = module or toy_module()
    L.seed_everything(1, verbose=False)
    saved = ModelCheckpoint(folder, save_last=True, filename="{epoch}", save_top_k=-1, enable_version_counter=False)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=rounds,
        default_root_dir=folder,
        callbacks=[federation, saved, *callbacks],
        enable_progress_bar=settings.pop("enable_progress_bar", False),
        enable_model_summary=False,
        logger=settings.pop("logger", False),
        **settings,
    )
    trainer.fit(module, datamodule=data or sites(), ckpt_path=ckpt)
    return trainer, module, federation


def weights(module):
    return {key: value.clone() for key, value in module.state_dict().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


AGGREGATORS = {
    "bayes": lambda: BayesianAggregator(),
    "bayes_full": lambda: BayesianAggregator(between=True, beta=0.1, personal_models=True, granularity="row"),
    "fedavg": lambda: FedAvg(),
    "prox": lambda: FedProx(0.1),
    "avgm": lambda: FedAvgM(),
    "adam": lambda: FedAdam(),
    "yogi": lambda: FedYogi(),
    "scaffold": lambda: Scaffold(),
    "bn": lambda: FedBN(),
    "ditto": lambda: Ditto(),
    "fine_tuned": lambda: FineTuned(after=2),
    "median": lambda: CoordinateMedian(),
    "trimmed": lambda: TrimmedMean(),
    "local": lambda: Local(),
    "pooled": lambda: Pooled(),
}


@pytest.mark.parametrize("name", AGGREGATORS)
@pytest.mark.parametrize("keep", ["reset", "keep"])
def test_interrupted_and_resumed_is_as_if_nothing_happened(tmp_path, name, keep):
    def federation():
        return Federation(AGGREGATORS[name](), optimizer_state=keep)

    settings = {"momentum": 0.9, "warmup": 20}
    _, whole, straight = run(tmp_path / "whole", federation(), rounds=3, module=toy_module(**settings))
    module = toy_module(seed=9, **settings)
    checkpoint = tmp_path / "whole" / "epoch=1.ckpt"
    _, resumed, told = run(tmp_path / "more", federation(), rounds=3, module=module, ckpt=checkpoint)
    assert equal(weights(whole), weights(resumed))
    assert all(equal(straight.model_of(site), told.model_of(site)) for site in straight.sites)
    assert [record.round for record in told.history] == [0, 1, 2]


def test_any_order_of_the_sites_gives_the_same_bits(tmp_path):
    _, one, _ = run(tmp_path / "a")
    turned = FederatedDataModule(sites=dict(reversed(list(sites().named.items()))))
    _, other, _ = run(tmp_path / "b", data=turned)
    assert equal(weights(one), weights(other))


def test_the_step_lands_on_the_aggregate_and_counts_rounds(tmp_path):
    merged = []

    class Watched(FedAvg):
        def finish(self):
            merged.append(super().finish())
            return merged[-1]

    trainer, module, _ = run(tmp_path, Federation(Watched()))
    assert trainer.global_step == 3
    final = weights(module)
    assert all(torch.equal(final[key], merged[-1][key]) for key in final)
    assert {p.name for p in tmp_path.glob("*.ckpt")} == {"epoch=0.ckpt", "epoch=1.ckpt", "epoch=2.ckpt", "last.ckpt"}


def test_one_site_alone_is_plain_training(tmp_path):
    """A federation of one, one epoch a round, against a Trainer of its own: the order is that of the epochs."""

    def module():
        built = toy_module(lr=0.05)
        built.encoder[3].p = 0.0
        return built

    _, federated, _ = run(tmp_path, data=FederatedDataModule(sites={"a": ToySite(n=12)}), module=module())
    plain = module()
    settings = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    L.Trainer(accelerator="cpu", max_epochs=3, **settings).fit(plain, datamodule=ToySite(n=12))
    for key, value in weights(plain).items():
        if not key.startswith("loss"):
            torch.testing.assert_close(weights(federated)[key], value, atol=1e-6, rtol=1e-5)


def test_a_task_without_labels_stays_at_its_start(tmp_path):
    module = toy_module()
    start = weights(module)
    data = FederatedDataModule(sites={"a": ToySite(tasks=("right",)), "b": ToySite(tasks=("right",), seed=1)})
    data.tasks["left"] = ToySite().tasks["left"]
    run(tmp_path, Federation(BayesianAggregator()), module=module, data=data)
    for key in start:
        moved = not torch.equal(start[key], weights(module)[key])
        assert moved == key.startswith(("encoder", "heads.right")), key


@pytest.mark.parametrize("aggregator", [FedAvg, BayesianAggregator])
def test_the_servers_own_loss_state_does_not_move(tmp_path, aggregator):
    _, module, federation = run(tmp_path, Federation(aggregator()))
    assert module.loss.seen == 0
    assert federation.sites["a"].local["loss.seen"] == 9  # three rounds of three steps


def test_early_stopping_counts_rounds(tmp_path):
    stop = EarlyStopping("val/score", mode="max", patience=1, min_delta=1e9)
    trainer, _, federation = run(tmp_path, rounds=9, callbacks=[stop])
    assert trainer.current_epoch == 2
    assert len(federation.history) == 2


def test_sites_log_under_their_names_and_the_server_counts_rounds(tmp_path):
    logger = CSVLogger(tmp_path, name="", version="")
    run(tmp_path, logger=logger, log_every_n_steps=1)
    rows = (tmp_path / "metrics.csv").read_text().splitlines()
    header = rows[0].split(",")
    assert {"site/a/train/loss", "site/b/train/loss", "val/score"} <= set(header)
    steps = [row.split(",")[header.index("step")] for row in rows[1:]]
    assert sorted(set(steps)) == ["0", "1", "2"]


@pytest.mark.parametrize(
    "participation, expected",
    [
        (1.0, [["a", "b", "c"]] * 3),
        ([["b"], ["c", "a"]], [["b"], ["a", "c"], ["b"]]),
    ],
)
def test_participation(tmp_path, participation, expected):
    _, _, federation = run(tmp_path, Federation(FedAvg(), participation=participation))
    assert [list(record.sites) for record in federation.history] == expected


def test_a_fraction_of_the_sites_is_drawn_anew_every_round_by_the_seed():
    names = [f"s{i}" for i in range(10)]
    drawn = [taking_part(0.5, r, names, seed=3) for r in range(40)]
    assert all(len(d) == 5 and d == sorted(d) for d in drawn)
    assert len({tuple(d) for d in drawn}) > 20
    assert drawn == [taking_part(0.5, r, names, seed=3) for r in range(40)]
    assert len(taking_part(0.5, 0, ["only"], seed=3)) == 1


def test_the_budget_may_be_steps(tmp_path):
    federation = Federation(FedAvg(), lambda **kw: L.Trainer(max_steps=5, **kw))
    run(tmp_path, federation, rounds=2)
    assert {name: site.steps for name, site in federation.sites.items()} == {"a": 10, "b": 10, "c": 10}


@pytest.mark.parametrize(
    "local_steps, trainer, steps",
    [
        ("equal", {}, {"a": 2, "b": 2, "c": 2}),  # the mean of 3, 2 and 2 batches
        ("equal", {"max_epochs": 3}, {"a": 7, "b": 7, "c": 7}),
        ("equal", {"max_epochs": 3, "accumulate_grad_batches": 2}, {"a": 4, "b": 4, "c": 4}),
        ("equal", {"max_epochs": 3, "limit_train_batches": 0.5}, {"a": 3, "b": 3, "c": 3}),
        ("equal", {"max_steps": 5}, {"a": 5, "b": 5, "c": 5}),
        ("epochs", {}, {"a": 3, "b": 2, "c": 2}),
        ("raised", {}, {"a": 3, "b": 2, "c": 2}),  # none below half the mean
        (4, {}, {"a": 4, "b": 4, "c": 4}),
    ],
)
def test_the_budget_of_a_round_in_steps(tmp_path, local_steps, trainer, steps):
    federation = Federation(FedAvg(), lambda **kw: L.Trainer(**trainer, **kw), local_steps=local_steps)
    run(tmp_path, federation, rounds=2)
    assert [{name: site.steps for name, site in r.sites.items()} for r in federation.history] == [steps, steps]


def test_a_small_site_takes_at_least_half_the_mean_of_the_steps(tmp_path):
    sizes = {"a": 40, "b": 36, "c": 4}  # batches of 4: 10, 9 and 1, mean 6.7
    data = FederatedDataModule(sites={name: ToySite(n=n) for name, n in sizes.items()})
    federation = Federation(FedAvg())
    run(tmp_path, federation, rounds=2, data=data)
    for round_ in federation.history:
        assert {name: site.steps for name, site in round_.sites.items()} == {"a": 10, "b": 9, "c": 3}


@pytest.mark.parametrize("local_steps, steps", [("raised", 7), ("equal", 7), ("epochs", 7), (4, 12)])
def test_pooled_training_takes_the_steps_of_all_sites_together(tmp_path, local_steps, steps):
    federation = Federation(Pooled(), local_steps=local_steps)
    run(tmp_path, federation, rounds=1)
    assert federation.history[0].sites["pooled"].steps == steps


def test_a_round_shorter_than_an_epoch_draws_other_images_each_time(tmp_path):
    seen = []

    class Look(L.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            seen.append(batch.image.flatten(1).sum(1).tolist())

    data = FederatedDataModule(sites={"a": ToySite(n=12)})
    run(tmp_path, Federation(FedAvg(), lambda **kw: L.Trainer(callbacks=[Look()], **kw), local_steps=1), data=data)
    assert len(seen) == 3
    assert len({tuple(batch) for batch in seen}) == 3


def test_steps_are_no_evidence(tmp_path):
    federation = Federation(FedAvg(), local_steps=9)
    run(tmp_path, federation, rounds=1)
    counts = {name: record.blocks["encoder"]["num_examples"] for name, record in federation.history[0].sites.items()}
    assert counts == {"a": 12, "b": 8, "c": 6}


@pytest.mark.parametrize("local_steps", [0, -3])
def test_local_steps_below_1_are_refused(local_steps):
    with pytest.raises(ConfigError, match=r"federation\.local_steps"):
        Federation(local_steps=local_steps)


def test_pooled_trains_on_the_union(tmp_path):
    _, _, federation = run(tmp_path, Federation(Pooled()), rounds=1)
    assert list(federation.history[0].sites) == ["pooled"]
    assert federation.history[0].sites["pooled"].blocks["encoder"]["num_examples"] == 26


def test_personal_models_are_validated_and_exported(tmp_path):
    logger = CSVLogger(tmp_path, name="", version="")
    _, module, federation = run(tmp_path, Federation(FedBN()), logger=logger, log_every_n_steps=1)
    header = (tmp_path / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"site/a/val/score", "site/mean_score", "site/worst_score"} <= set(header)
    from safetensors.torch import load_file

    own = load_file(tmp_path / "sites" / "a" / "model.safetensors")
    assert torch.equal(own["encoder.2.weight"], federation.sites["a"].local["encoder.2.weight"])
    assert torch.equal(own["encoder.1.weight"], weights(module)["encoder.1.weight"])


def test_personal_models_ride_on_the_global_one_which_knows_nothing_of_them(tmp_path):
    _, plain, _ = run(tmp_path / "plain", Federation(BayesianAggregator()))
    _, module, federation = run(tmp_path / "own", Federation(BayesianAggregator(personal_models=True)))
    assert equal(weights(plain), weights(module))
    shared, own = weights(module), {site: federation.model_of(site) for site in "abc"}
    assert all(not equal(own[site], shared) for site in "abc")
    assert not equal(own["a"], own["b"])
    kept = federation.sites["a"]
    assert not kept.own
    later = {key: value + 1 if value.is_floating_point() else value for key, value in shared.items()}
    for key, value in kept.weights(later).items():  # the change of a round reaches them in full
        assert torch.allclose(value, own["a"][key] + 1 if value.is_floating_point() else value, atol=1e-6)


def test_personal_models_start_in_the_round_that_is_set(tmp_path):
    for rounds, personal in ((1, False), (2, True)):
        late = BayesianAggregator(personal_models=True, personal_from=1)
        _, module, federation = run(tmp_path / str(rounds), Federation(late), rounds=rounds)
        shared = weights(module)
        for site in "abc":
            own = federation.model_of(site)
            assert any(not torch.equal(own[key], shared[key]) for key in shared if "loss" not in key) == personal


class Watched(FedAvgM):
    """Notes where every round began, what was known then, and what came out."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.rounds = []

    def start(self, state, schema):
        self.rounds.append({"began": state, "momentum": dict(self.server.moments)})
        super().start(state, schema)

    def finish(self):
        merged = super().finish()
        self.rounds[-1]["came out"] = merged
        return merged


@pytest.mark.parametrize("lookahead", [False, True])
def test_sites_begin_where_the_momentum_leads_and_the_model_is_what_came_out(tmp_path, lookahead):
    aggregator = Watched(momentum=0.5, lookahead=lookahead)
    _, module, _ = run(tmp_path, Federation(aggregator))
    first, *later = aggregator.rounds
    last = first["came out"]
    for seen in later:
        for key, value in seen["momentum"].items():
            expected = last[key] + lookahead * 0.5 * value
            torch.testing.assert_close(seen["began"][key], expected, rtol=0, atol=1e-6)
            assert (value != 0).any()
        last = seen["came out"]
    assert equal(weights(module), last)


def test_no_method_of_the_module_is_replaced(tmp_path):
    class Methods(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            self.replaced = {name for name in vars(pl_module) if callable(getattr(type(pl_module), name, None))}
            self.automatic = pl_module.automatic_optimization

    methods = Methods()
    trainer, module, _ = run(tmp_path, callbacks=[methods])
    assert not methods.replaced
    assert not methods.automatic
    assert module.automatic_optimization
    assert trainer.validate(module, datamodule=sites(), verbose=False)[0]["val/score"] < 0


def test_a_failed_run_leaves_the_module_as_it_was(tmp_path):
    class Fail(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            raise RuntimeError("stop")

    module = toy_module()
    with pytest.raises(RuntimeError, match="stop"):
        run(tmp_path, module=module, callbacks=[Fail()])
    assert module.automatic_optimization
    plain = L.Trainer(accelerator="cpu", max_epochs=1, logger=False, default_root_dir=tmp_path / "plain")
    plain.fit(module, datamodule=ToySite())
    assert plain.global_step == 3


def test_the_checkpoint_is_safe_plain_and_names_no_patient(tmp_path):
    run(tmp_path, Federation(BayesianAggregator(personal_models=True), optimizer_state="keep"))
    stored = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert stored["state_dict"].keys() == toy_module().state_dict().keys()
    content = (tmp_path / "last.ckpt").read_bytes()
    for sample in ToySite(n=12).samples:
        assert sample.meta.patient.encode() + b"x" not in content
        assert f"'{sample.meta.id}'".encode() not in content


def test_fast_dev_run_goes_through(tmp_path):
    _, _, federation = run(tmp_path, fast_dev_run=2)
    assert federation.sites["a"].steps == 2


def test_bars_and_a_line_a_round(tmp_path, capsys):
    run(tmp_path, enable_progress_bar=True)
    out = capsys.readouterr()
    assert "round 1/3 · 3 sites" in out.out + out.err
    assert "  b" in out.out + out.err, "the site's own bar"


def test_sigterm_within_a_site_stops_and_the_round_is_begun_again(tmp_path):
    class Kill(L.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if trainer.current_epoch == 1 and batch_idx == 1 and module.loss.seen > 3:
                os.kill(os.getpid(), signal.SIGTERM)

    _, whole, _ = run(tmp_path / "whole", Federation(FedAvg(), local_steps="epochs"))
    federation = Federation(FedAvg(), lambda **kw: L.Trainer(callbacks=[Kill()], **kw), local_steps="epochs")
    before = threading.active_count()
    with pytest.raises(SIGTERMException):
        run(tmp_path / "part", federation)
    assert threading.active_count() <= before + 1
    assert not (tmp_path / "part" / "epoch=1.ckpt").exists()
    again = Federation(FedAvg(), local_steps="epochs")
    _, resumed, _ = run(tmp_path / "part", again, ckpt=tmp_path / "part" / "last.ckpt")
    assert equal(weights(whole), weights(resumed))


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"gradient_clip_val": 1.0}, "federation.site_trainer.gradient_clip_val"),
        (
            {"gradient_clip_algorithm": "norm"},
            "gradient_clip_algorithm=norm .* federation.site_trainer.gradient_clip_a",
        ),
        ({"overfit_batches": 2}, "federation.site_trainer.overfit_batches"),
        ({"overfit_batches": 0.5}, "federation.site_trainer.overfit_batches"),
        ({"detect_anomaly": True}, "federation.site_trainer.detect_anomaly"),
        ({"sync_batchnorm": True}, "federation.site_trainer.sync_batchnorm"),
        ({"use_distributed_sampler": False}, "federation.site_trainer.use_distributed_sampler"),
        ({"reload_dataloaders_every_n_epochs": 1}, "reload_dataloaders_every_n_epochs has no effect .* remove it"),
        ({"val_check_interval": 0.5}, "val_check_interval=0.5: .* trainer.check_val_every_n_epoch"),
        ({"val_check_interval": 2}, "val_check_interval=2: .* trainer.check_val_every_n_epoch"),
        ({"callbacks": [GradientAccumulationScheduler({0: 2})]}, "put it in federation.site_trainer.callbacks"),
        ({"callbacks": [LearningRateFinder()]}, "LearningRateFinder cannot search in rounds"),
        ({"callbacks": [BatchSizeFinder()]}, "BatchSizeFinder cannot search in rounds"),
        ({"limit_train_batches": 3}, "federation.site_trainer.limit_train_batches"),
        ({"rounds": -1}, "counts the rounds"),
    ],
)
def test_settings_that_mean_nothing_to_rounds_are_refused(tmp_path, settings, words):
    with pytest.raises(ConfigError, match=words):
        run(tmp_path, **settings)


def test_an_ordinary_trainer_is_accepted_without_a_word(tmp_path, recwarn):
    trainer, _, federation = run(
        tmp_path, rounds=2, gradient_clip_val=0, val_check_interval=1.0, check_val_every_n_epoch=1, deterministic=True
    )
    assert federation.exit_code == 0
    assert trainer.callback_metrics["round"] == 2, "rounds are counted from 1"


def test_a_round_to_which_a_site_contributed_nothing_is_a_fault(tmp_path):
    _, _, federation = run(tmp_path, rounds=2, data=sites(d=ToySite(n=8, tasks=(), seed=3)))
    for record in federation.history:
        assert [(f.site, f.fault) for f in record.faults] == [
            ("d", "refused: it changes no weight (no labelled image in its training)")
        ]
    assert (federation.exit_code, federation.state.state) == (3, "degraded")
    alone = Federation(FedAvg(), participation=[["d"]])
    with pytest.raises(RoundError, match="round 1: 0 of 1 sites were admitted"):
        run(tmp_path / "none", alone, data=sites(d=ToySite(n=8, tasks=(), seed=3)))


@pytest.mark.parametrize("participation", [0.0, 1.5, [], [["a"], []]])
def test_a_participation_that_cannot_be_is_refused(participation):
    with pytest.raises(ConfigError, match="participation"):
        Federation(participation=participation)


def test_a_schedule_with_an_unknown_site_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no site is called z"):
        run(tmp_path, Federation(FedAvg(), participation=[["a", "z"]]))


def test_a_data_set_without_sites_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="FederatedDataModule"):
        run(tmp_path, data=ToySite())


def test_a_federation_can_be_copied_before_it_runs():
    assert copy.deepcopy(Federation(FedAvg())).aggregator.power == 1

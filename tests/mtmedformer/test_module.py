"""The laws of the whole model: partial labels, untouched tasks, equal seeds, parameter groups, schedules."""

import copy
import re

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

import mtmedformer
from mtmedformer import (
    ClassificationHead,
    ConfigError,
    DetectionHead,
    HybridLoss,
    MultiTaskModule,
    SegmentationHead,
    SharedEncoder,
    WarmupCosine,
)
from mtmedformer.batch import IGNORE, Batch, ClassificationTarget, DetectionTarget, Meta, SegmentationTarget
from mtmedformer.inference.predictor import TiledPredictor
from mtmedformer.losses import FixedWeighting

SIZE = 64


def model(**options):
    torch.manual_seed(0)
    heads = {
        "health": ClassificationHead(["well", "sick"]),
        "nodules": DetectionHead(["nodule"]),
        "organ": SegmentationHead(["organ"]),
    }
    options.setdefault("loss", HybridLoss(weighting=FixedWeighting(normalise=False)))
    return MultiTaskModule(SharedEncoder("mtmedformer_tiny", channels=16), heads, **options)


def batch(present, seed=0):
    """A batch whose images are labelled for the tasks that ``present`` (name -> list of bool) says."""
    n = len(next(iter(present.values())))
    generator = torch.Generator().manual_seed(seed)
    mask = {name: torch.tensor(flags) for name, flags in present.items()}
    labels = torch.eye(2)[torch.arange(n) % 2]
    labels[~mask["health"]] = float("nan")
    masks = (torch.rand(n, 1, SIZE, SIZE, generator=generator) > 0.5).to(torch.uint8)
    masks[~mask["organ"]] = IGNORE
    boxes = [torch.tensor([[8.0, 8.0, 30.0, 30.0]]) if p else torch.zeros(0, 4) for p in present["nodules"]]
    return Batch(
        torch.rand(n, 1, SIZE, SIZE, generator=generator),
        {
            "health": ClassificationTarget(labels, mask["health"]),
            "nodules": DetectionTarget(boxes, [torch.zeros(len(b), dtype=torch.int64) for b in boxes], mask["nodules"]),
            "organ": SegmentationTarget(masks, mask["organ"]),
        },
        [Meta(f"im{i}", f"p{i}") for i in range(n)],
    )


def gradients(module, data):
    module.zero_grad()
    losses, _, present = module.task_losses(module(data.image), data.targets)
    module.loss(losses, present).backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def trainer(**options):
    options = {"max_epochs": 1, "logger": False, "enable_checkpointing": False} | options
    return L.Trainer(accelerator="cpu", enable_progress_bar=False, enable_model_summary=False, **options)


def test_a_task_unlabelled_in_some_images_gives_the_gradient_of_the_labelled_ones():
    module = model().eval()
    whole = batch({"health": [True] * 4, "nodules": [False] * 4, "organ": [True, True, False, False]})
    part = Batch(whole.image[:2], {k: t[torch.tensor([0, 1])] for k, t in whole.targets.items()}, whole.meta[:2])
    only = ["organ"]
    organ_whole, organ_part = (gradients(copy.deepcopy(module), masked(data, only)) for data in (whole, part))
    for name, grad in organ_part.items():
        torch.testing.assert_close(organ_whole[name], grad, rtol=1e-4, atol=1e-6)


def test_a_head_reads_the_images_labelled_for_it_and_learns_the_same_as_from_all():
    module = model().eval()
    data = batch({"health": [True] * 4, "nodules": [False] * 4, "organ": [True, False, True, False]})
    rows = {}
    for name, head in module.heads.items():
        head.register_forward_pre_hook(lambda _, given, name=name: rows.update({name: len(given[0][0])}))
    expected = gradients(module, data)
    assert rows == {"health": 4, "nodules": 4, "organ": 4}

    module.zero_grad()
    losses, _, present = module.task_losses(*module.labelled(data))
    module.loss(losses, present).backward()
    assert rows == {"health": 4, "nodules": 1, "organ": 2}  # one for a task nobody labelled: DDP wants its gradient
    assert present == {"health": 4, "nodules": 0, "organ": 2}
    assert all(not p.grad.any() for p in module.heads["nodules"].parameters())
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6)


def test_a_head_with_batch_norm_reads_every_image():
    module = model()
    module.heads["organ"].fuse.append(torch.nn.BatchNorm2d(module.heads["organ"].logits.in_channels))
    rows = []
    module.heads["organ"].register_forward_pre_hook(lambda _, given: rows.append(len(given[0][0])))
    module.labelled(batch({"health": [True] * 4, "nodules": [True] * 4, "organ": [True, False, False, False]}))
    assert rows == [4]


def masked(data, tasks):
    """Return a batch in which only ``tasks`` are labelled."""
    everything = {name: data.targets[name].present.tolist() for name in data.targets}
    hidden = batch({n: p if n in tasks else [False] * len(p) for n, p in everything.items()})
    targets = {name: data.targets[name] if name in tasks else hidden.targets[name] for name in data.targets}
    return Batch(data.image, targets, data.meta)


def test_an_unlabelled_task_does_not_change_its_head():
    module = model()
    module.optimizer = lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.5)
    before = copy.deepcopy(module.heads["nodules"].state_dict())
    data = [batch({"health": [True] * 2, "nodules": [False] * 2, "organ": [True] * 2}, seed) for seed in range(3)]
    trainer().fit(module, DataLoader(data, batch_size=None))
    for name, value in module.heads["nodules"].state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_labelled_task_changes_its_head():
    module = model()
    before = copy.deepcopy(module.heads.state_dict())
    data = [batch({"health": [True] * 2, "nodules": [True] * 2, "organ": [True] * 2})]
    trainer().fit(module, DataLoader(data, batch_size=None))
    for task in module.heads:
        assert any(not torch.equal(v, before[k]) for k, v in module.heads.state_dict().items() if k.startswith(task)), (
            task
        )


def test_the_same_seed_gives_the_same_weights():
    data = [batch({"health": [True] * 2, "nodules": [True] * 2, "organ": [True] * 2}, seed) for seed in range(3)]
    results = []
    for _ in range(2):
        L.seed_everything(3, verbose=False)
        module = model()
        trainer().fit(module, DataLoader(data, batch_size=None))
        results.append(module.state_dict())
    assert all(torch.equal(results[0][k], results[1][k]) for k in results[0])


def test_metrics_and_losses_use_labelled_images_only():
    module = model()
    data = [batch({"health": [True, False], "nodules": [False] * 2, "organ": [True, False]})]
    logged = trainer().validate(module, DataLoader(data, batch_size=None), verbose=False)[0]
    assert logged["val/organ/dice"] >= 0
    assert logged["val/nodules/map50"] != logged["val/nodules/map50"], "NaN where nobody labelled"
    assert logged["val/nodules/loss"] != logged["val/nodules/loss"]
    assert logged["val/score"] == logged["val/score"]


def test_parameter_groups_contain_each_parameter_once_and_vectors_without_decay():
    module = model(layer_decay=0.5)
    groups = module.parameter_groups(1.0, 0.1)
    ids = [id(p) for g in groups for p in g["params"]]
    assert len(ids) == len(set(ids)) == len(list(module.parameters()))
    assert all(g["weight_decay"] == 0 for g in groups for p in g["params"] if p.ndim < 2)
    rate = {id(p): g["lr"] for g in groups for p in g["params"]}
    stem = next(p for n, p in module.named_parameters() if n.startswith("encoder.body."))
    head = next(module.heads.parameters())
    assert rate[id(stem)] < rate[id(head)] == 1.0


def test_unknown_tasks_are_refused_with_the_known_names():
    with pytest.raises(ConfigError, match="health, nodules, organ"):
        model(tasks=["lungs"])


def test_a_task_alone_starts_from_the_weights_it_has_in_the_joint_model():
    joint, single = model().state_dict(), model(tasks=["organ"]).state_dict()
    shared = [key for key in single if not key.startswith("loss.")]
    assert any(key.startswith("heads.organ") for key in shared)
    assert all(torch.equal(joint[key], single[key]) for key in shared)


def test_dropping_heads_does_not_change_the_others():
    assert set(model(tasks=["organ"]).heads) == {"organ"}
    image = torch.rand(1, 1, SIZE, SIZE)
    joint, single = model().eval(), model(tasks=["organ"]).eval()
    shared = {k: v for k, v in joint.state_dict().items() if k.startswith(("encoder.", "heads.organ."))}
    assert not [k for k in single.load_state_dict(shared, strict=False).missing_keys if not k.startswith("loss.")]
    torch.testing.assert_close(joint.predict(image)["organ"], single.predict(image)["organ"])


def test_predicting_in_windows_of_the_whole_image_changes_nothing():
    module = model().eval()
    image = torch.rand(1, 1, SIZE, SIZE)
    with torch.no_grad():
        whole = module.predict_whole(image)
        module.predictor = TiledPredictor(tile=(SIZE, SIZE))
        tiled = module.predict_whole(image)
    torch.testing.assert_close(whole["organ"], tiled["organ"], rtol=0, atol=1e-6)
    torch.testing.assert_close(whole["health"], tiled["health"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [(64, 96), (50, 70)])
def test_images_of_any_size_are_accepted(size):
    predictions = model().eval().predict(torch.rand(1, 1, *size))
    assert predictions["organ"].shape == (1, 1, *size)
    assert predictions["health"].shape == (1, 2)


def test_warmup_cosine_rises_then_falls_to_its_floor():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=2.0)
    schedule = WarmupCosine(optimizer, warmup=0.1, floor=0.05)
    schedule.spread(100)
    rates = []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert max(rates) == pytest.approx(2.0, rel=1e-6)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1, rel=1e-6)
    assert "total_steps" not in schedule.state_dict()


def test_a_trained_module_can_be_copied():
    module = model()
    data = batch({"health": [True] * 2, "nodules": [True] * 2, "organ": [True] * 2})
    trainer().fit(module, train_dataloaders=DataLoader([data], batch_size=None))
    assert copy.deepcopy(module).state_dict().keys() == module.state_dict().keys()


def test_optimizer_and_schedule_are_constructor_arguments():
    module = model(
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.3),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5),
    )
    fitting = trainer(max_epochs=2)
    data = [batch({"health": [True] * 2, "nodules": [True] * 2, "organ": [True] * 2})]
    fitting.fit(module, DataLoader(data, batch_size=None))
    (optimizer,) = fitting.optimizers
    assert isinstance(optimizer, torch.optim.SGD)
    assert {group["lr"] for group in optimizer.param_groups} == {0.075}


def test_a_checkpoint_of_a_module_built_in_python_can_be_loaded(tmp_path):
    module = model(loss=None, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1), tile=(48, 48))
    data = [batch({"health": [True] * 2, "nodules": [True] * 2, "organ": [True] * 2})]
    fitting = trainer()
    fitting.fit(module, DataLoader(data, batch_size=None))
    fitting.save_checkpoint(tmp_path / "model.ckpt")

    stored = torch.load(tmp_path / "model.ckpt", weights_only=True)["hyper_parameters"]
    assert (
        stored["encoder"]["init_args"] | {"name": "mtmedformer_tiny", "channels": 16} == stored["encoder"]["init_args"]
    )
    loaded = mtmedformer.load(tmp_path / "model.ckpt").module
    rebuilt = MultiTaskModule.load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True)
    for other in (loaded, rebuilt):
        assert other.predictor.settings == module.predictor.settings
        own = {key: value for key, value in module.state_dict().items() if not key.startswith("loss.")}
        assert all(torch.equal(value, other.state_dict()[key]) for key, value in own.items())


def test_a_part_that_cannot_be_described_is_not_recorded():
    class OwnHead(SegmentationHead):
        def __init__(self, classes, rule):
            super().__init__(classes)
            self.rule = rule

    module = MultiTaskModule(SharedEncoder("mtmedformer_tiny", channels=16), {"organ": OwnHead(["organ"], object())})
    assert dict(module.hparams) == {}


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: SharedEncoder(name="mtmedformer_tiny", drop_path_rate=1.5), "encoder.drop_path_rate is 1.5"),
        (lambda: SharedEncoder(name="mtmedformer_tiny", drop_path_rate=-1.0), "encoder.drop_path_rate is -1.0"),
        (lambda: TiledPredictor((0, 0)), "model.tile is [0, 0]"),
        (lambda: TiledPredictor(overlap=1.0), "model.overlap is 1.0"),
        (lambda: model(layer_decay=0.0), "model.layer_decay is 0"),
        (lambda: WarmupCosine(torch.optim.SGD([torch.zeros(1)], 0.1), warmup=2.0), "warmup 2.0 must be in [0, 1)"),
        (lambda: WarmupCosine(torch.optim.SGD([torch.zeros(1)], 0.1), floor=-0.1), "floor -0.1 in [0, 1]"),
    ],
)
def test_numbers_out_of_range_are_refused(make, words):
    with pytest.raises(ConfigError, match=re.escape(words)):
        make()

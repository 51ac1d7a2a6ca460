"""Heads that are built from the tasks of the data (``heads: auto``)."""

from functools import partial

import lightning as L
import pytest
import torch

import mtmedformer
from callbacks import Federation
from datamodules import PhantomDataModule
from datamodules.phantom.sites import PhantomSite
from federation import FederatedDataModule
from mtmedformer import ConfigError, HybridLoss, MultiTaskModule, SharedEncoder
from mtmedformer.batch import Task
from mtmedformer.heads.from_tasks import DEFAULT_HEADS, heads_for

TASKS = {
    "organ": Task("organ", "segmentation", ("lung", "heart"), multi_label=True),
    "finding": Task("finding", "classification", ("well", "sick")),
    "signs": Task("signs", "classification", ("effusion", "nodule"), multi_label=True),
    "lesions": Task("lesions", "detection", ("mass",)),
    "age": Task("age", "regression", (), unit="years", range=(18.0, 91.5)),
    "grade": Task("grade", "regression", ("A", "B", "C")),
}


def model(heads="auto", **options):
    torch.manual_seed(0)
    return MultiTaskModule(SharedEncoder("mtmedformer_tiny", channels=16), heads, **options)


def trainer(tmp_path, **options):
    return L.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, max_epochs=1,
        limit_train_batches=1, limit_val_batches=1, default_root_dir=tmp_path, **options,
    )  # fmt: skip


def small_data(folder, **sites):
    return PhantomDataModule(
        size=96, image_size=64, batch_size=2, num_workers=0, cache_dir=None, root=folder / "phantom",
        sites=sites or {"a": PhantomSite(patients=10)},
    )  # fmt: skip


def test_every_task_gets_a_head_that_has_its_description():
    heads = heads_for(TASKS)
    assert {name: head.task(name) for name, head in heads.items()} == TASKS
    assert {task.kind for task in TASKS.values()} <= set(DEFAULT_HEADS)


@pytest.mark.parametrize(("range", "found"), [(None, "no number"), ((5.0, 5.0), "no other number than 5")])
def test_a_number_without_a_range_gets_no_head(range, found):
    with pytest.raises(ConfigError, match=f"{found} for 'age'"):
        heads_for({"age": Task("age", "regression", (), range=range)})


def test_heads_that_are_added_equal_heads_that_are_given():
    automatic = model(loss=HybridLoss(weights={"organ": 2.0}))
    assert automatic.awaits_tasks
    assert automatic.tasks == {}
    automatic.add_heads(TASKS)
    given = model(heads_for(TASKS), loss=HybridLoss(weights={"organ": 2.0}))
    assert automatic.tasks == given.tasks == TASKS
    assert list(automatic.state_dict()) == list(given.state_dict())
    assert all(
        torch.equal(a, b) for a, b in zip(automatic.state_dict().values(), given.state_dict().values(), strict=False)
    )
    assert dict(automatic.hparams) == dict(given.hparams)
    automatic.add_heads({"other": TASKS["signs"]})  # nothing to do any more
    assert automatic.tasks == TASKS


def test_tasks_selects_among_the_heads_that_are_added():
    module = model(tasks=["finding"])
    module.add_heads(TASKS)
    assert list(module.tasks) == ["finding"]
    with pytest.raises(ConfigError, match="no head is called lungs; heads are organ, finding"):
        model(tasks=["lungs"]).add_heads(TASKS)


def test_fit_builds_the_heads_and_the_checkpoint_holds_them(tmp_path):
    module, data = model(), small_data(tmp_path)
    fitting = trainer(tmp_path, enable_checkpointing=False)
    fitting.fit(module, data)
    assert module.tasks == {name: Task(name, t.kind, t.classes, t.multi_label) for name, t in data.tasks.items()}
    fitting.save_checkpoint(tmp_path / "model.ckpt")
    for other in (
        mtmedformer.load(tmp_path / "model.ckpt").module,
        MultiTaskModule.load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True),
    ):
        assert other.tasks == module.tasks
        own = {key: value for key, value in module.state_dict().items() if not key.startswith("loss.")}
        assert all(torch.equal(value, other.state_dict()[key]) for key, value in own.items())


def test_a_federation_builds_the_heads_of_the_tasks_of_all_sites(tmp_path):
    sites = {"a": PhantomSite(patients=10, labelled={"finding": 1.0}), "b": PhantomSite(patients=10)}
    data = FederatedDataModule(data=small_data(tmp_path, **sites), by="site")
    module = model()
    rounds = Federation(site_trainer=partial(L.Trainer, max_epochs=1, limit_train_batches=1))
    trainer(tmp_path, enable_checkpointing=False, callbacks=[rounds]).fit(module, data)
    assert list(module.tasks) == list(data.tasks)
    assert len(module.tasks) > 1


def test_data_without_tasks_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"model.heads is auto, but the data \(none\) declare no tasks"):
        trainer(tmp_path, enable_checkpointing=False).fit(model(), torch.utils.data.DataLoader([0]))

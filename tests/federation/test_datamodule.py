"""Sites: named, cut by a column or dealt out; their batches know every task of the federation."""

import logging

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from datamodules import LabelsCSVDataModule
from datamodules.labels_csv.columns import BoxColumns, ClassColumns, MaskColumns
from federation.datamodule import FederatedDataModule
from federation.partition import Dirichlet, EqualShares
from mtmedformer.batch import Batch, Task
from mtmedformer.errors import ConfigError, DataError
from tests.fixtures.small_set import write_small_set
from tests.fixtures.toy_sites import ToySite, toy_module


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_small_set(tmp_path_factory.mktemp("set"), patients=24)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def one_set(root, cache, **settings):
    return LabelsCSVDataModule(
        root=root,
        classification={"health": ClassColumns(column="label", classes=["well", "sick"])},
        detection={"nodules": BoxColumns(classes=["nodule"], flag="has_det")},
        segmentation={"organ": MaskColumns(columns={"organ": "mask_organ"})},
        image_size=64,
        batch_size=4,
        num_workers=0,
        cache_dir=cache,
        **settings,
    )


def ids(loader) -> set[str]:
    return {meta.id for batch in loader for meta in batch.meta}


def test_a_column_cuts_one_set_into_sites_with_the_splits_of_the_whole(root, cache):
    whole = one_set(root, cache)
    whole.setup("fit")
    data = FederatedDataModule(data=one_set(root, cache), by="site")
    data.setup("fit")
    assert list(data.sites) == ["north", "south"]
    found = [ids(site.train_dataloader()) for site in data.sites.values()]
    assert not found[0] & found[1]
    assert found[0] | found[1] == {r.id for r in whole.records if r.truth and whole.splits[r.id] == "train"}
    assert ids(data.val_dataloader()) == {r.id for r in whole.records if r.truth and whole.splits[r.id] == "val"}


@pytest.mark.parametrize(
    "partition", [EqualShares(3), Dirichlet(3, alpha=0.5, by="health")], ids=["equal", "dirichlet"]
)
def test_a_partition_never_tears_a_patient_apart(root, cache, partition):
    data = FederatedDataModule(data=one_set(root, cache, val_fraction=0.25), partition=partition)
    data.setup("fit")
    assert list(data.sites) == ["site_1", "site_2", "site_3"]
    held = {name: {r.patient for r in site.source.records} for name, site in data.sites.items()}
    assert sum(map(len, held.values())) == len(set().union(*held.values())) == 24
    whole = one_set(root, cache, val_fraction=0.25)
    whole.plan()
    for site in data.sites.values():
        assert all(whole.splits[i] == split for i, split in site.source.splits.items()), (
            "the splits are those of the whole"
        )


def test_a_task_that_a_site_lacks_is_unknown_in_its_batches():
    sites = {"a": ToySite(tasks=("left",)), "b": ToySite(n=8, tasks=("right",), seed=1)}
    data = FederatedDataModule(sites=sites)
    data.setup("fit")
    assert set(data.tasks) == {"left", "right"}
    for batch in data.sites["a"].train_dataloader():
        assert bool(batch.targets["left"].present.all())
        assert not bool(batch.targets["right"].present.any())
    batches: list[Batch] = list(data.val_dataloader())
    assert [m.site for b in batches for m in b.meta] == ["a"] * 12 + ["b"] * 8, "every image under its site's name"


def test_the_holdings_count_patients_images_and_labels(root, cache):
    data = FederatedDataModule(data=one_set(root, cache), by="site")
    data.setup("fit")
    north, south = data.holdings()
    records = [r for r in data.sites["north"].source.records if data.sites["north"].source.splits[r.id] == "train"]
    assert north.patients == len({r.patient for r in records})
    assert north.images == north.labels["nodules"] == len(records)
    assert north.labels["health"] == sum("health" in r.truth for r in records) < north.images
    assert south.labels["nodules"] == 0
    assert south.validation == sum(s == "val" for s in data.sites["south"].source.splits.values())


def test_a_round_is_one_tick_and_without_rounds_the_union_is_trained_on():
    data = FederatedDataModule(sites={"a": ToySite(n=10), "b": ToySite(n=6, seed=1)})
    data.setup("fit")

    class Rounds(L.Callback):
        runs_rounds = True

    data.trainer = L.Trainer(accelerator="cpu", callbacks=[Rounds()], logger=False, enable_checkpointing=False)
    assert len(data.train_dataloader()) == 1
    data.trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    batches = list(data.train_dataloader())
    assert sum(map(len, batches)) == 16
    assert len(batches) == 4
    mixed = [{image.sum().item() for image in b.image} for b in batches]
    site_b = {sample.image.sum().item() for sample in data.sites["b"].source.samples}
    assert sum(bool(m & site_b) and bool(m - site_b) for m in mixed) >= 2, "sites are mixed within batches"


def test_the_order_of_the_union_is_that_of_the_epoch():
    def order(epoch):
        data = FederatedDataModule(sites={"a": ToySite(n=10), "b": ToySite(n=6, seed=1)})
        data.setup("fit")
        loader = data.train_dataloader()
        loader.sampler.set_epoch(epoch)
        return torch.cat([batch.image.flatten() for batch in loader])

    assert torch.equal(order(1), order(1))
    assert not torch.equal(order(1), order(2))


def test_plain_fit_and_validate_work_on_the_union():
    data = FederatedDataModule(sites={"a": ToySite(tasks=("left",)), "b": ToySite(tasks=("right",), seed=1)})
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    module = toy_module()
    trainer.fit(module, datamodule=data)
    assert trainer.global_step == 6
    assert trainer.validate(module, datamodule=data, verbose=False)[0]["val/score"] < 0


def test_only_keeps_some_sites():
    data = FederatedDataModule(sites={n: ToySite() for n in "abc"}, only=["c", "a"])
    data.setup("fit")
    assert list(data.sites) == ["a", "c"]


def test_a_site_speaks_under_its_name_and_once(caplog):
    class Talks(ToySite):
        def train_dataloader(self):
            logging.getLogger("talks").warning("three images are %s", "odd")
            return super().train_dataloader()

    data = FederatedDataModule(sites={"a": Talks(), "b": Talks()})
    data.setup("fit")
    for _ in range(3):
        for site in data.sites.values():
            site.train_dataloader()
    assert [r.getMessage() for r in caplog.records] == ["site a: three images are odd", "site b: three images are odd"]
    logging.getLogger("talks").warning("someone else")
    assert caplog.records[-1].getMessage() == "someone else"


def other_classes():
    site = ToySite()
    site.tasks = {"left": Task("left", "classification", ("no", "maybe"))}
    return site


@pytest.mark.parametrize(
    "build, words",
    [
        (lambda: FederatedDataModule(), "either sites"),
        (lambda: FederatedDataModule(sites={"a": ToySite()}, data=ToySite()), "not both"),
        (lambda: FederatedDataModule(data=ToySite()), "by: site"),
        (lambda: FederatedDataModule(data=ToySite(), by="site"), "no records to cut"),
        (lambda: FederatedDataModule(sites={"a": ToySite()}, only=["b"]), "no site is called b"),
        (lambda: FederatedDataModule(sites={"a/b": ToySite()}), "'a/b'"),
        (lambda: FederatedDataModule(sites={"a": ToySite(), "b": other_classes()}), "maybe.*at b"),
    ],
)
def test_mistakes_are_named(build, words):
    with pytest.raises(ConfigError, match=words):
        build().setup("fit")


def test_an_unknown_column_is_named(root, cache):
    with pytest.raises(ConfigError, match=r"'hospital'; choose from site"):
        FederatedDataModule(data=one_set(root, cache), by="hospital").setup("fit")


def test_a_site_trainer_leaves_no_trainer_in_the_data():
    data = FederatedDataModule(sites={"a": ToySite()})
    data.setup("fit")
    data.sites["a"].trainer = object()
    assert isinstance(data.sites["a"].train_dataloader(), DataLoader)
    assert data.sites["a"].source.trainer is None


class Broken(ToySite):
    """A site whose own loader raises a ``KeyError``."""

    def __init__(self, loader: str) -> None:
        super().__init__()
        setattr(self, loader, self.fail)

    def fail(self):
        return {"image": "a.png"}["path"]


@pytest.mark.parametrize("loader", ["train_dataloader", "val_dataloader"])
def test_an_error_in_a_sites_own_loader_is_raised_and_not_read_as_no_images(loader):
    data = FederatedDataModule(sites={"a": Broken(loader), "b": ToySite(seed=1)})
    data.setup("fit")
    with pytest.raises(KeyError, match="path"):
        getattr(data.sites["a"], loader)()


def test_a_split_without_images_is_an_empty_loader(root, cache):
    class TrainingOnly(L.LightningDataModule):
        def train_dataloader(self):
            return ToySite().train_dataloader()

    listed = one_set(root, cache, val_fraction=0, test_fraction=0, official_splits=False)
    data = FederatedDataModule(sites={"listed": listed, "plain": TrainingOnly()})
    data.setup("fit")
    assert list(data.sites["listed"].source.datasets) == ["train"]
    assert [site.val_dataloader() for site in data.sites.values()] == [[], []]
    assert data.val_dataloader() == data.test_dataloader() == []


def test_a_site_without_training_images_is_named(root, cache):
    data = FederatedDataModule(sites={"a": ToySite()})
    data.setup("fit")
    data.sites["a"].source.datasets = {}
    with pytest.raises(DataError, match="site a: it has no training images"):
        data.sites["a"].train_dataloader()


@pytest.mark.parametrize("cut", [{"by": "site"}, {"partition": EqualShares(2)}], ids=["by", "partition"])
def test_limit_keeps_whole_patients_of_every_site_in_their_splits(root, cache, cut):
    whole = one_set(root, cache, val_fraction=0.25)
    whole.plan()
    limited = [FederatedDataModule(data=one_set(root, cache, val_fraction=0.25), limit=8, **cut) for _ in range(2)]
    for data in limited:
        data.setup("fit")
    held = [{n: {r.id for r in s.source.records} for n, s in data.sites.items()} for data in limited]
    assert held[0] == held[1]
    for site in limited[0].sites.values():
        patients = {r.patient for r in site.source.records}
        assert len(patients) == 8
        assert all(whole.splits[r.id] == site.source.splits[r.id] for r in site.source.records)
    assert limited[0].data.only_patients is None, "the data set that was given keeps its own patients"


def test_limit_and_workers_reach_the_named_sites(root, cache):
    data = FederatedDataModule(sites={"a": one_set(root, cache)}, limit=8, num_workers=1)
    data.setup("fit")
    assert len({r.patient for r in data.sites["a"].source.records}) == 8
    assert data.sites["a"].train_dataloader().num_workers == 1
    with pytest.raises(ConfigError, match=r"data.limit: data.sites.a is a ToySite, which has no option limit"):
        FederatedDataModule(sites={"a": ToySite()}, limit=8).setup("fit")

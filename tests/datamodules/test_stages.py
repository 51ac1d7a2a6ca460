"""Each command asks only for the images of the split that it reads, in every data module."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datamodules.base import MedicalDataModule
from datamodules.records import BoxTruth, Catalogue, ClassTruth, MaskSource, MaskTruth, Record
from federation.datamodule import FederatedDataModule
from mtmedformer.batch import Task
from mtmedformer.errors import ConfigError, DataError

TASKS = {
    "finding": Task("finding", "classification", ("no_cancer", "cancer")),
    "lesions": Task("lesions", "detection", ("spot",)),
    "lungs": Task("lungs", "segmentation", ("lung",)),
}
STAGES = ("fit", "validate", "test", "predict")


class Films(MedicalDataModule):
    """One film per patient, with the splits given; every third is labelled cancer; every fifth mask is not empty."""

    def __init__(self, root, splits, **kwargs):
        super().__init__(
            **{"image_size": 32, "num_workers": 0, "batch_size": 2, "cache_dir": None, "test_fraction": 0.2} | kwargs
        )
        self.root, self.official = root, splits

    def catalogue(self):
        return Catalogue(TASKS, [self.record(n, split) for n, split in enumerate(self.official)])

    def record(self, n, split):
        masks = MaskTruth((MaskSource(self.root / f"mask{n}.png"),))
        truth = {
            "finding": ClassTruth((float(n % 3 != 0), float(n % 3 == 0))),
            "lesions": BoxTruth(masks=masks.channels, mask_labels=(0,)),
            "lungs": masks,
        }
        return Record(f"film{n}", self.root / f"film{n}.png", f"p{n}", truth, split=split)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for n in range(20):
        Image.fromarray(rng.integers(1, 255, (32, 32), np.uint8)).save(tmp_path / f"film{n}.png")
        mask = np.zeros((32, 32), np.uint8)
        mask[8:20, 8:20] = 255 * (n % 5 == 0)
        Image.fromarray(mask).save(tmp_path / f"mask{n}.png")
    return tmp_path


def counts(data, stage):
    data.plan()
    data.require(stage)
    data.setup(stage)
    return {name: len(images) for name, images in data.datasets.items()}


CASES = [
    (["test"] * 6, {}, {"test": {"test": 6}}),
    (["val"] * 6, {}, {"validate": {"val": 6}, "test": {"val": 6}}),
    (["val"] * 2 + ["test"] * 3, {}, {"validate": {"val": 2}, "test": {"test": 3}}),
    (["test"] * 6, {"predict_split": "all"}, {"test": {"test": 6}, "predict": {"predict": 6}}),
    (["test"] * 6, {"fold": 0}, {"test": {"test": 6}}),
    (["test"] * 5 + [None], {}, {"test": {"test": 5}}),
    (
        ["train"] * 6,
        {"test_split": "all"},
        {"test": {"test": 6}, "fit": {"train": 4, "val": 1}, "validate": {"val": 1}},
    ),
    ([None], {"test_split": "all", "predict_split": "all"}, {"test": {"test": 1}, "predict": {"predict": 1}}),
    ([None] * 10, {"test_split": "all"}, {"test": {"test": 10}}),
    ([None] * 10, {"test_split": "val"}, {"test": {"test": 2}}),
    (["train"] * 2, {}, {}),
    (["train", "val"], {"test_fraction": 0.0}, {"fit": {"train": 1, "val": 1}, "validate": {"val": 1}}),
]


@pytest.mark.parametrize("splits, options, expected", CASES)
def test_a_stage_asks_for_its_own_split_only(root, splits, options, expected):
    options = {"predict_split": "test"} | options
    for stage, images in expected.items():
        assert counts(Films(root, splits, **options), stage) == images
    if set(splits) <= {"test", "val"}:
        for stage in STAGES:
            if stage not in expected and not (stage == "predict" and "test" in splits):
                data = Films(root, splits, **options)
                with pytest.raises(DataError, match=rf"no image to {stage}; its splits hold .*Fix: "):
                    counts(data, stage)


def test_the_error_names_what_there_is_and_the_fix(root):
    with pytest.raises(DataError, match=r"no image to fit; its splits hold 6 test images. Fix: leave"):
        counts(Films(root, ["test"] * 6), "fit")
    with pytest.raises(DataError, match=r"1 patient\(s\) with 1 image\(s\) are too few to split"):
        counts(Films(root, ["test"] * 5 + [None]), "fit")
    with pytest.raises(DataError, match=r"1 patient\(s\) with 1 image\(s\) are too few to split"):
        counts(Films(root, ["test"] * 5 + [None]), "validate")


def test_a_loader_without_images_is_an_error_in_python_too(root):
    data = Films(root, ["val"] * 4, predict_split="train")
    data.setup(None)
    data.setup("predict")
    for loader, stage in ((data.train_dataloader, "fit"), (data.predict_dataloader, "predict")):
        with pytest.raises(DataError, match=f"no image to {stage}"):
            loader()
    only_train = Films(root, ["train"] * 4, test_fraction=0.0, val_fraction=0.0)
    only_train.setup("test")
    with pytest.raises(DataError, match="no image to test"):
        only_train.test_dataloader()


def test_all_images_can_be_tested_whatever_their_split(root):
    data = Films(root, ["train", "val", "test", None, None, None], test_split="all")
    data.setup("test")
    assert sum(len(batch.meta) for batch in data.test_dataloader()) == 6
    assert set(data.datasets) == {"test"}


def test_a_federation_asks_whether_some_site_has_the_split(root):
    def federation(**sites):
        data = FederatedDataModule({name: Films(root, splits) for name, splits in sites.items()})
        data.plan()
        return data

    federation(a=["test"] * 3, b=["train"] * 9).require("test")
    federation(a=["test"] * 3, b=["train"] * 9).require("fit")
    data = federation(a=["test"] * 3, b=["test"] * 3)
    data.require("test")
    data.setup("test")
    assert sum(len(batch.meta) for batch in data.test_dataloader()) == 6
    with pytest.raises(DataError, match=r"site a: .*no image to fit"):
        data.require("fit")


def test_masks_are_positive_only_where_they_are_not_empty(root, tmp_path):
    for cache in (None, tmp_path / "cache", tmp_path / "cache"):  # in memory, written, read back
        data = Films(root, ["train"] * 20, val_fraction=0.0, test_fraction=0.0, cache_dir=cache)
        data.setup("fit")
        assert [sorted({"lesions", "lungs"} - r.empty) for r in data.records[:6]] == [
            ["lesions", "lungs"], [], [], [], [], ["lesions", "lungs"],
        ]  # fmt: skip
        positive = data.train_dataloader().sampler.sampler.positive
        assert positive.tolist() == [n % 3 == 0 or n % 5 == 0 for n in range(20)]


def test_negative_classes_are_a_setting_and_are_printed(root, caplog):
    def sampled(**options):
        caplog.clear()
        data = Films(root, ["train"] * 20, val_fraction=0.0, test_fraction=0.0, tasks=["finding"], **options)
        with caplog.at_level("INFO"):
            data.setup("fit")
            data.train_dataloader()
        return data.train_dataloader().sampler.sampler.positive.tolist(), caplog.text

    sick = [n % 3 == 0 for n in range(20)]
    positive, text = sampled()
    assert positive == sick
    assert "sampler: 7 of 20 training images are positive (finding: cancer); negative classes: no_cancer" in text
    assert sampled(negative_classes=["No-Cancer"])[0] == sick
    positive, text = sampled(negative_classes=["cancer"])  # no_cancer is then positive, in more than half
    assert not any(positive)
    assert "no image is positive" in text
    assert "training images are positive" not in text
    with pytest.raises(
        ConfigError, match=r"negative_classes: no class is called 'no_cancr'; did you mean 'no_cancer'\?"
    ):
        sampled(negative_classes=["no_cancr"])
    assert "sampler: " not in sampled(sampler="shuffle")[1]


def test_images_outside_the_size_limits_are_left_out_and_counted(root):
    Image.fromarray(np.random.default_rng(9).integers(1, 255, (32, 48), np.uint8)).save(root / "film3.png")
    masks = np.zeros((32, 48), np.uint8)
    Image.fromarray(masks).save(root / "mask3.png")
    data = Films(root, ["train"] * 20, val_fraction=0.0, test_fraction=0.0, size_limits=(32, 40))
    data.setup("fit")
    assert len(data.datasets["train"]) == 19
    (issue,) = data.quarantine.issues
    assert (issue.id, issue.reason) == ("film3", "image larger than data.init_args.size_limits")
    assert issue.detail == "48x32 pixels; the limits are 32 and 40"
    small = Films(root, ["train"] * 20, size_limits=(33, None), max_quarantine_share=1.0)
    with pytest.raises(DataError, match="can be used"):
        small.setup("fit")
    assert small.quarantine.by_reason().keys() == {"image: image smaller than data.init_args.size_limits"}
    with pytest.raises(ConfigError, match=r"size_limits is \[50, 40\]; give the smallest and the largest side"):
        Films(root, ["train"] * 20, size_limits=(50, 40))

"""Sites without training images, without labels or without images, and sites whose images differ in size."""

import dataclasses
from pathlib import Path

import lightning as L
import pytest
from torch.utils.data import DataLoader

from callbacks.federation.console import round_line
from datamodules import LabelsCSVDataModule
from datamodules.labels_csv.columns import BoxColumns, ClassColumns, MaskColumns
from federation import FederatedDataModule
from federation.server.history import RoundRecord, SiteRecord
from federation.server.participation import check_participation
from mtmedformer.batch import Meta, Sample, collate
from mtmedformer.errors import ConfigError, DataError
from tests.fixtures.site_tables import ALL, write_table
from tests.fixtures.toy_sites import TASKS, ToySite

HOME = [("north", "train", ALL)] * 4 + [("north", "val", ALL)] * 2 + [("north", "test", ALL)] * 2


def table(root: Path, rows, **settings) -> LabelsCSVDataModule:
    return LabelsCSVDataModule(
        root=write_table(root, rows),
        classification={"finding": ClassColumns(column="label", classes=["sick", "well"])},
        detection={"op": BoxColumns(classes=["op"], flag="has_det")},
        segmentation={"lungs": MaskColumns(columns={"lung": "mask"})},
        **{"image_size": 32, "batch_size": 4, "num_workers": 0, "cache_dir": None, **settings},
    )


@pytest.mark.parametrize(
    ("rows", "tasks", "trains", "note"),
    [
        ([("odd", "test", ALL)] * 3, None, False, "no labelled training image (0 for validation, 3 for testing)"),
        ([("odd", "val", ALL)] * 2, None, False, "(2 for validation, 0 for testing)"),
        ([("odd", "val", ["lungs"])] * 2, None, False, "(2 for validation, 0 for testing)"),
        ([("odd", "train", [])] * 3 + [("odd", "test", ALL)], None, False, "(0 for validation, 1 for testing)"),
        (
            [("odd", "train", [])] * 3,
            None,
            False,
            "none of its 3 images has a label for finding, op, lungs; the",
        ),
        ([("odd", "", [])] * 3, None, False, "none of its 3 images has a label"),
        ([("odd", "train", ["finding"])] * 3, ["lungs"], False, "none of its 3 images has a label for lungs"),
        ([("odd", "train", ["lungs"])] * 3, ["lungs"], True, None),
        ([("odd", "train", ["op"])], None, True, None),
        ([("odd", "train", ALL)] * 2 + [("odd", "val", [])] * 2, None, True, None),
    ],
)
def test_only_sites_with_labelled_training_images_train(tmp_path, rows, tasks, trains, note):
    data = FederatedDataModule(data=table(tmp_path / "set", HOME + rows), by="site")
    data.setup("fit")
    assert list(data.training_sites(tasks)) == (["north", "odd"] if trains else ["north"])
    notes = data.notes(tasks)
    assert len(notes) == (note is not None)
    if note is not None:
        assert notes[0].startswith("site odd: ")
        assert note in notes[0]
    assert set(data.sites) == {"north", "odd"}
    validated = {meta.site for batch in data.val_dataloader() for meta in batch.meta}
    labelled = [1 for _, split, known in rows if split == "val" and known]
    assert validated == ({"north", "odd"} if labelled else {"north"})


def test_a_site_for_testing_only_is_tested_and_an_unlabelled_site_is_predicted(tmp_path):
    rows = [*HOME, *[("south", "test", ALL)] * 3, *[("blank", "test", [])] * 2]
    data = FederatedDataModule(data=table(tmp_path / "set", rows), by="site")
    data.setup("test")
    tested = [meta.site for batch in data.test_dataloader() for meta in batch.meta]
    assert sorted(tested) == ["north"] * 2 + ["south"] * 3
    data.setup("predict")
    predicted = [meta.site for batch in data.predict_dataloader() for meta in batch.meta]
    assert sorted(predicted) == ["blank"] * 2 + ["north"] * 2 + ["south"] * 3


def test_without_rounds_the_union_trains_on_the_sites_that_can(tmp_path, caplog):
    rows = [*HOME, *[("south", "test", ALL)] * 3, *[("blank", "", [])] * 2]
    data = FederatedDataModule(data=table(tmp_path / "set", rows), by="site")
    data.setup("fit")
    trained = {site for site, _ in data.train_dataloader().sampler}
    assert trained == {"north"}
    assert "site blank: none of its 2 images" in caplog.text
    assert "site south: no labelled training image" in caplog.text


def test_a_federation_in_which_no_site_can_train_is_refused(tmp_path):
    rows = [("a", "test", ALL)] * 2 + [("b", "train", [])] * 2
    data = FederatedDataModule(data=table(tmp_path / "set", rows), by="site")
    data.plan()
    with pytest.raises(
        DataError, match="none of the sites a, b has a training image with a label for finding, op, lungs"
    ):
        data.training_sites()


def test_a_site_without_images_is_left_out_and_a_broken_one_is_named(tmp_path):
    home = table(tmp_path / "home", HOME)
    data = FederatedDataModule(sites={"north": home, "empty": table(tmp_path / "empty", [])})
    data.setup("fit")
    assert list(data.sites) == ["north"]
    assert data.notes()[0].startswith("site empty: ")
    assert data.notes()[0].endswith("the table has a header but no row; the site is left out")
    with pytest.raises(DataError, match="no site has an image"):
        FederatedDataModule(sites={"empty": table(tmp_path / "empty too", [])}).plan()
    broken = table(tmp_path / "broken", HOME)
    (tmp_path / "broken/labels.csv").unlink()
    with pytest.raises(DataError, match=r"^site odd: .*labels\.csv"):
        FederatedDataModule(sites={"north": home, "odd": broken}).plan()


def test_images_that_belong_to_no_site_are_counted(tmp_path):
    data = FederatedDataModule(data=table(tmp_path / "set", HOME), by="site")
    source = data.data
    catalogue = source.catalogue

    def nameless():
        found = catalogue()
        records = [dataclasses.replace(r, site="" if i < 2 else r.site) for i, r in enumerate(found.records)]
        return dataclasses.replace(found, records=records)

    source.catalogue = nameless
    data.plan()
    assert data.notes() == ["2 of 8 images have no site; they belong to no site"]


def test_sites_whose_images_differ_in_size_are_refused_before_anything_is_decoded(tmp_path):
    sites = {
        name: table(tmp_path / name, HOME, image_size=size, cache_dir=tmp_path / "cache")
        for name, size in (("a", 32), ("b", 48), ("c", (32, 32)))
    }
    data = FederatedDataModule(sites=sites)
    for stage in ("fit", "validate", "test", "predict"):
        with pytest.raises(ConfigError, match=r"differ in size \(32x32 at a, 48x48 at b\).*same image_size"):
            data.setup(stage)
    assert not (tmp_path / "cache").exists()
    equal = FederatedDataModule(sites={name: sites[name] for name in ("a", "c")})
    equal.plan()
    assert equal.notes() == []


def test_images_of_other_channels_in_one_batch_name_their_sites():
    class Coloured(ToySite):
        def val_dataloader(self):
            samples = [Sample(s.image.expand(3, -1, -1), s.truth, Meta("i", "p", "far")) for s in self.samples]
            return DataLoader(samples, 4, collate_fn=lambda found: collate(found, TASKS))

    data = FederatedDataModule(sites={"a": ToySite(n=2), "b": Coloured(n=2)})
    data.setup("fit")
    with pytest.raises(ConfigError, match=r"differ in size \(1x2x2 at a, 3x2x2 at b\)"):
        list(data.val_dataloader())


def test_a_site_of_another_data_module_without_training_loader_does_not_train():
    class ValidationOnly(L.LightningDataModule):
        def val_dataloader(self):
            return ToySite(n=4).val_dataloader()

    data = FederatedDataModule(sites={"a": ToySite(), "b": ValidationOnly()})
    data.setup("fit")
    assert list(data.training_sites()) == ["a"]
    assert data.notes() == ["site b: it has no training images and takes no part in the training"]
    assert [h.images for h in data.holdings()] == [12, 0]
    assert {meta.site for batch in data.val_dataloader() for meta in batch.meta} == {"a", "b"}


def test_a_schedule_names_sites_that_train_and_each_once():
    check_participation([["a", "b"], ["a"]], ["a", "b", "c"], ["a", "b"])
    with pytest.raises(ConfigError, match="no labelled training image at c"):
        check_participation([["a", "c"]], ["a", "b", "c"], ["a", "b"])
    with pytest.raises(ConfigError, match="a comes twice in entry 2"):
        check_participation([["a"], ["a", "a"]])
    trained, validated = SiteRecord(blocks={"encoder": {"num_examples": 1}}), SiteRecord(metrics={"score": 0.5})
    assert "1 site ·" in round_line(RoundRecord(0, {"a": trained, "b": validated}), 2, 1.0)

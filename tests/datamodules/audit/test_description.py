"""A data set describes itself in counts, and finds what is in it twice."""

from __future__ import annotations

import json
import shutil

from datamodules import LabelsCSVDataModule, PhantomDataModule, PhantomSite
from datamodules.labels_csv.columns import ClassColumns, MaskColumns
from federation import FederatedDataModule
from tests.fixtures.small_set import write_small_set


def small(root, cache=None, **settings):
    return LabelsCSVDataModule(
        root=root,
        classification={"health": ClassColumns(column="label", classes=["well", "sick"])},
        segmentation={"organ": MaskColumns(columns={"organ": "mask_organ"})},
        image_size=64,
        num_workers=0,
        cache_dir=cache,
        **settings,
    )


def test_counts_are_those_of_the_table_and_no_patient_is_named(tmp_path):
    data = small(write_small_set(tmp_path))
    data.setup(None)
    told = data.describe()
    assert sum(split["images"] for split in told["splits"].values()) == 32
    assert sum(split["patients"] for split in told["splits"].values()) == 16
    assert sum(split["labelled"]["organ"] for split in told["splits"].values()) == 24
    assert {site: sum(n.values()) for site, n in told["sites"].items()} == {"north": 16, "south": 16}
    assert told["views"] == {"PA": 16, "AP": 16}
    assert told["shared_patients"] == 0
    assert not told["generated"]
    text = json.dumps(told)
    assert "secret" not in text
    assert str(tmp_path) not in text
    assert "im00" not in text


def test_a_copy_in_another_split_is_found_among_what_is_decoded(tmp_path):
    root = write_small_set(tmp_path)
    data = small(root)
    data.plan()
    first = {split: next(r for r in data.records if data.splits[r.id] == split) for split in ("train", "test")}
    shutil.copy(first["train"].file, first["test"].file)
    again = small(root, cache=tmp_path / "cache")
    again.setup("test")
    assert again.describe()["leaks"]["across_splits"] == 0, "nothing but the test images is decoded yet"
    assert again.describe()["leaks"]["compared"] < 32
    again.setup("fit")
    leaks = again.describe()["leaks"]
    assert leaks["compared"] == leaks["images"] == 32
    assert leaks["across_splits"] >= 1


def test_a_federation_describes_every_site():
    phantom = PhantomDataModule(
        image_size=64, num_workers=0, cache_dir=None, sites={"a": PhantomSite(patients=8), "b": PhantomSite(patients=8)}
    )
    data = FederatedDataModule(data=phantom, by="site")
    data.setup("fit")
    parts = data.describe()["parts"]
    assert set(parts) == {"a", "b"}
    assert all(part["generated"] and list(part["sites"]) == [name] for name, part in parts.items())

"""What every native data set promises, checked on a generated copy of its layout."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser

import datamodules
from datamodules.base import MedicalDataModule
from datamodules.records import BoxTruth, ClassTruth, MaskTruth
from mtmedformer.batch import IGNORE, ClassificationTarget, DetectionTarget, SegmentationTarget
from mtmedformer.errors import DataError
from tests.fixtures.public_layouts import Layout, layouts

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "data"


@dataclass(frozen=True)
class Set:
    """A data set under test: its name, how its tree is written, and what its layout's module says of it."""

    name: str
    layout: Layout
    write: Callable[[Path], Path]
    variant: str = ""

    @property
    def datamodule(self):
        return getattr(datamodules, self.layout.class_name)

    @property
    def expected(self):
        return self.layout.expected

    def build(self, root, **options):
        plain = {"image_size": 64, "batch_size": 4, "num_workers": 0, "cache_dir": None, "max_quarantine_share": 0.0}
        return self.datamodule(root=root, **plain | options)

    def tree(self, folder):
        return self.write(folder)

    def __str__(self):
        return "_".join(filter(None, (self.name, self.variant)))


def every_set():
    for name, module in layouts().items():
        yield Set(name, module.LAYOUT, module.write)
        for variant, write in getattr(module, "VARIANTS", {}).items():
            yield Set(name, module.LAYOUT, write, variant)


SETS = list(every_set())
TABLES = [pytest.param(each, table, id=f"{each}-{Path(table).name}") for each in SETS for table in each.layout.tables]


@pytest.fixture(scope="module", params=SETS, ids=str)
def dataset(request):
    return request.param


@pytest.fixture(scope="module")
def spare_trees(tmp_path_factory):
    """Return a function that writes the tree of a set the first time and gives it back afterwards."""
    written = {}

    def tree(dataset):
        if str(dataset) not in written:
            written[str(dataset)] = dataset.tree(tmp_path_factory.mktemp(str(dataset)))
        return written[str(dataset)]

    return tree


@pytest.fixture(scope="module")
def root(dataset, spare_trees):
    return spare_trees(dataset)


@pytest.fixture(scope="module")
def catalogue(dataset, root):
    return dataset.build(root).catalogue()


@pytest.fixture(scope="module")
def ready(dataset, root):
    module = dataset.build(root)
    module.setup("fit")
    return module


def sources(truth):
    """Return every mask source of a truth, nested ones too."""
    found = [s for s in truth.channels if s] if isinstance(truth, MaskTruth) else list(truth.masks)
    return found + [also for source in found for also in source.also]


def test_it_is_a_medical_datamodule_with_a_documented_constructor(dataset):
    assert issubclass(dataset.datamodule, MedicalDataModule)
    parser = ArgumentParser()
    parser.add_class_arguments(dataset.datamodule, "data", fail_untyped=True)
    assert "data.root" in parser.format_help()


def test_catalogue_is_deterministic_and_in_a_stable_order(dataset, root, catalogue):
    again = dataset.build(root).catalogue()
    assert again == catalogue
    assert [r.id for r in again.records] == [r.id for r in catalogue.records]


def test_ids_are_unique_and_files_exist(catalogue):
    ids = [r.id for r in catalogue.records]
    assert len(ids) == len(set(ids)) > 5
    for record in catalogue.records:
        assert record.file.is_file()
        for truth in record.truth.values():
            if not isinstance(truth, ClassTruth):
                assert all(source.file is None or source.file.is_file() for source in sources(truth))


def test_every_record_has_a_patient_and_a_site(catalogue):
    for record in catalogue.records:
        assert record.patient.strip()
        assert record.site not in ("", "unknown")
        assert record.laterality in ("L", "R", None)


def test_tasks_are_well_formed_and_all_of_them_are_labelled_somewhere(catalogue):
    for name, task in catalogue.tasks.items():
        assert task.name == name
        assert len(set(task.classes)) == len(task.classes) > 0
        assert any(name in record.truth for record in catalogue.records)


def test_labels_match_their_task(catalogue):
    kinds = {"classification": ClassTruth, "detection": BoxTruth, "segmentation": MaskTruth}
    for record in catalogue.records:
        assert record.truth.keys() <= catalogue.tasks.keys()
        assert record.weak <= record.truth.keys()
        for name, truth in record.truth.items():
            task = catalogue.tasks[name]
            assert type(truth) is kinds[task.kind]
            if isinstance(truth, ClassTruth):
                check_classes(truth, task)
            elif isinstance(truth, BoxTruth):
                check_boxes(truth, task)
            else:
                assert len(truth.channels) == len(task.classes)
                assert any(channel is not None for channel in truth.channels)


def check_classes(truth, task):
    assert len(truth.values) == len(task.classes)
    assert all(value in (0.0, 1.0) or math.isnan(value) for value in truth.values)
    assert not all(math.isnan(value) for value in truth.values)
    if not task.multi_label:
        assert sum(truth.values) == 1.0


def check_boxes(truth, task):
    assert len(truth.boxes) == len(truth.labels)
    assert len(truth.masks) == len(truth.mask_labels)
    assert all(0 <= label < len(task.classes) for label in truth.labels + truth.mask_labels)
    for box in truth.boxes:
        assert all(math.isfinite(side) for side in box)
        assert box[2] > box[0] >= 0
        assert box[3] > box[1] >= 0


def test_weak_tasks_are_flagged_in_the_records_too(catalogue):
    weak = {name for name, task in catalogue.tasks.items() if task.weak}
    for record in catalogue.records:
        assert record.weak == weak & record.truth.keys()


def test_official_splits_never_share_a_patient(catalogue):
    split_of = {}
    for record in catalogue.records:
        if record.split is not None:
            assert split_of.setdefault(record.patient, record.split) == record.split


def test_notes_are_sentences_about_the_set_and_name_no_patient(catalogue):
    for note in catalogue.notes:
        assert len(note) > 20
    patients = {r.patient for r in catalogue.records if len(r.patient) > 3}
    assert not any(patient in note for patient in patients for note in catalogue.notes)


def test_missing_root_names_what_is_expected(dataset, tmp_path):
    with pytest.raises(DataError, match="expected") as error:
        dataset.build(tmp_path / "nowhere").catalogue()
    assert dataset.expected in str(error.value)


def test_wrong_root_names_what_is_expected_and_the_closest_folder(dataset, tmp_path):
    (tmp_path / "something" / "else").mkdir(parents=True)
    with pytest.raises(DataError, match="not found: expected") as error:
        dataset.build(tmp_path).catalogue()
    assert dataset.expected in str(error.value)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("garbage", [b"", b"\x00\xff\xfe\x80garbage", b"a,b\n1,2\n"], ids=["empty", "binary", "other"])
@pytest.mark.parametrize("dataset, table", TABLES)
def test_garbled_table_raises_and_names_itself(dataset, table, garbage, spare_trees):
    tree = spare_trees(dataset)
    file = tree / table
    whole = file.read_bytes()
    try:
        file.write_bytes(garbage)
        with pytest.raises(DataError) as error:
            dataset.build(tree).catalogue()
    finally:
        file.write_bytes(whole)
    assert file.name in str(error.value)


def test_splits_cover_every_record_and_no_patient_is_in_two(ready):
    split_of = {}
    for record in ready.records:
        assert split_of.setdefault(record.patient, ready.splits[record.id]) == ready.splits[record.id]
    assert {"train", "val"} <= set(ready.splits.values())


def test_one_batch_obeys_the_data_contract(ready):
    batch = next(iter(ready.train_dataloader()))
    size = len(batch)
    assert batch.image.shape == (size, 1, 64, 64)
    assert batch.image.dtype == torch.float32
    assert 0 <= batch.image.min() < batch.image.max() <= 1
    assert batch.targets.keys() == ready.tasks.keys()
    for name, target in batch.targets.items():
        task, k = ready.tasks[name], len(ready.tasks[name].classes)
        assert target.present.dtype == torch.bool
        if isinstance(target, ClassificationTarget):
            assert target.labels.shape == (size, k)
            assert (~target.present == target.labels.isnan().all(1)).all()
        elif isinstance(target, DetectionTarget):
            for boxes, labels in zip(target.boxes, target.labels, strict=True):
                assert boxes.shape == (len(labels), 4)
                assert ((boxes[:, 2:] > boxes[:, :2]) & (boxes >= 0).all() & (boxes <= 64).all()).all()
                assert ((labels >= 0) & (labels < k)).all()
        else:
            assert isinstance(target, SegmentationTarget)
            assert target.masks.shape == (size, k, 64, 64)
            assert set(target.masks.unique().tolist()) <= {0, 1, IGNORE}
        assert task.kind in type(target).__name__.lower()
    hidden = {record.patient for record in ready.records}
    assert not hidden & {meta.patient for meta in batch.meta}
    assert all(meta.site != "unknown" for meta in batch.meta)


def test_nothing_of_the_generated_tree_is_implausible(ready):
    assert ready.implausible == {}


def test_nothing_of_the_generated_tree_is_quarantined(ready):
    assert ready.quarantine.issues == []


def test_a_new_split_by_patient_needs_no_official_one(dataset, root):
    module = dataset.build(root, official_splits=False)
    module.plan()
    assert not any("dropped from train or val" in note for note in module.catalogue().notes)
    assert set(module.splits.values()) == {"train", "val", "test"}


def test_a_set_without_a_training_part_can_be_tested(dataset, root, catalogue, monkeypatch):
    tested = replace(catalogue, records=[replace(record, split="test") for record in catalogue.records])
    data = dataset.build(root)
    monkeypatch.setattr(data, "catalogue", lambda: tested)
    data.plan()
    data.require("test")
    data.require("predict")
    assert set(data.splits.values()) == {"test"}
    for stage in ("fit", "validate"):
        with pytest.raises(DataError, match=f"no image to {stage}; its splits hold {len(data.records)} test images"):
            data.require(stage)


def test_config_starts_with_its_command_and_parses(dataset):
    file = CONFIGS / f"{dataset.name}.yaml"
    first, second = file.read_text().splitlines()[:2]
    assert first.startswith("# mtmedformer fit --config configs/")
    assert f"--config configs/data/{dataset.name}.yaml" in first
    assert second.startswith("# ")
    parser = ArgumentParser()
    parser.add_subclass_arguments(MedicalDataModule, "data")
    parsed = parser.parse_object({"data": yaml.safe_load(file.read_text())["data"]})
    build = getattr(parser, "instantiate", None) or parser.instantiate_classes  # renamed in jsonargparse 4.49
    module = build(parsed).data
    assert type(module) is dataset.datamodule


def test_every_native_data_set_is_in_this_suite():
    general = {"MedicalDataModule", "LabelsCSVDataModule", "PhantomDataModule"}  # no native layout: suites of their own
    exported = {
        name
        for name, each in vars(datamodules).items()
        if isinstance(each, type) and issubclass(each, MedicalDataModule)
    }
    assert exported - general == {each.layout.class_name for each in SETS}

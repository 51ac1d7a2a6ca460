from __future__ import annotations

import json
import logging
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from torch import nn

from datamodules.base import MedicalDataModule
from datamodules.cache import rasterize
from datamodules.images.presets import ChestPreset, PlainPreset
from datamodules.records import BoxTruth, Catalogue, ClassTruth, MaskSource, MaskTruth, Record
from mtmedformer.batch import Batch, ClassificationTarget, DetectionTarget, SegmentationTarget, Task
from mtmedformer.errors import ConfigError, DataError

TASKS = {
    "finding": Task("finding", "classification", ("sick", "well")),
    "lesions": Task("lesions", "detection", ("spot",)),
    "lungs": Task("lungs", "segmentation", ("lung",)),
}
PATIENTS = 24


class Films(MedicalDataModule):
    """Two 40x32 films a patient; a third is labelled with boxes, half with masks; patient 3 is at another site."""

    def __init__(self, root: Path, **kwargs: Any) -> None:
        super().__init__(**{"image_size": 32, "num_workers": 0, "batch_size": 4, "cache_dir": root / "cache"} | kwargs)
        self.root = root

    def catalogue(self) -> Catalogue:
        records = []
        for n in range(2 * PATIENTS):
            truth: dict[str, Any] = {"finding": ClassTruth((float(n % 3 == 0), float(n % 3 != 0)))}
            if n % 3 != 2:
                x = 4.0 + n % 7
                truth["lesions"] = BoxTruth(((x, 10.0, x + 8, 20.0),), (0,)) if n % 3 == 0 else BoxTruth()
            if n % 2:
                truth["lungs"] = MaskTruth((MaskSource(file=self.root / f"lungs{n}.png"),))
            site = "north" if n // 2 % 4 else "south"
            records.append(
                Record(f"film{n}", self.root / f"film{n}.png", f"Name^{n // 2}", truth, site, groups={"c": f"{n % 2}"})
            )
        return Catalogue(TASKS, records)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for n in range(2 * PATIENTS):
        Image.fromarray(rng.integers(1, 255, (40, 32), np.uint8)).save(tmp_path / f"film{n}.png")
        mask = np.zeros((40, 32), np.uint8)
        mask[8:30, 5:14] = mask[8:30, 18:28] = 255
        Image.fromarray(mask).save(tmp_path / f"lungs{n}.png")
    return tmp_path


def ready(data: Films, stage: str | None = "fit") -> Films:
    data.prepare_data()
    data.setup(stage)
    return data


def epoch(data: Films, number: int = 0) -> list[Batch]:
    loader = data.train_dataloader()
    loader.sampler.set_epoch(number)
    return list(loader)


def same(a: list[Batch], b: list[Batch]) -> bool:
    """Whether two epochs hold the same pixels, truths and facts in the same order."""
    if len(a) != len(b) or [x.meta for x in a] != [y.meta for y in b]:
        return False
    pairs = list(zip(a, b, strict=True))
    equal = all(torch.equal(x.image, y.image) for x, y in pairs)
    equal &= all(torch.equal(x.targets["lungs"].masks, y.targets["lungs"].masks) for x, y in pairs)
    for x, y in pairs:
        boxes = zip(x.targets["lesions"].boxes, y.targets["lesions"].boxes, strict=True)
        equal &= all(torch.equal(p, q) for p, q in boxes)
    return equal


def test_a_batch_has_the_labels_of_the_records(root: Path) -> None:
    data = ready(Films(root, preset=None))
    batches = [*epoch(data), *data.val_dataloader()]
    seen = 0
    for batch in batches:
        finding, lesions, lungs = (batch.targets[name] for name in TASKS)
        assert isinstance(finding, ClassificationTarget)
        assert isinstance(lesions, DetectionTarget)
        assert isinstance(lungs, SegmentationTarget)
        assert batch.image.shape[1:] == (1, 32, 32)
        assert batch.image.dtype == torch.float32
        assert 0 <= batch.image.min() < batch.image.max() <= 1
        for row, meta in enumerate(batch.meta):
            n = int(meta.id.removeprefix("film"))
            assert finding.labels[row].tolist() == [float(n % 3 == 0), float(n % 3 != 0)]
            assert bool(lesions.present[row]) == (n % 3 != 2)
            assert len(lesions.boxes[row]) == (n % 3 == 0)
            assert bool(lungs.present[row]) == (n % 2 == 1)
            if n % 3 == 0:
                x, a, c = 4.0 + n % 7, meta.to_original[0], meta.to_original[2]
                assert lesions.boxes[row][0, 0] * a + c == pytest.approx(x, abs=1e-4)
                assert lesions.boxes[row][0, 3].item() * a + meta.to_original[5] == pytest.approx(20.0, abs=1e-4)
            if n % 2:
                share = lungs.masks[row].float().mean().item() * 32 * 32 * meta.to_original[0] ** 2
                assert share == pytest.approx(22 * 19, rel=0.15)  # pixels of both lungs
            assert meta.original_size == (40, 32)
            seen += 1
    assert seen == len(data.datasets["train"]) + len(data.datasets["val"])


def test_no_patient_key_is_in_a_batch_and_none_crosses_splits(root: Path) -> None:
    data = ready(Films(root), None)
    patients: dict[str, set[str]] = {}
    for split, dataset in data.datasets.items():
        for sample in (dataset[i] for i in range(len(dataset))):
            assert "Name" not in repr(sample.meta)
            patients.setdefault(sample.meta.patient, set()).add(split)
    assert len(patients) == PATIENTS
    assert all(len(splits) == 1 for splits in patients.values())


def test_one_patient_key_hashes_differently_in_two_data_sets(root: Path) -> None:
    class OtherFilms(Films):
        pass

    first, second = (ready(kind(root)).datasets["train"][0].meta for kind in (Films, OtherFilms))
    assert first.id == second.id
    assert first.patient != second.patient


def test_the_same_seed_gives_the_same_batches_whatever_the_workers(root: Path) -> None:
    alone, several = ready(Films(root, sampler="sqrt")), ready(Films(root, sampler="sqrt", num_workers=2))
    for number in (0, 3):
        assert same(epoch(alone, number), epoch(several, number))
    assert not same(epoch(alone, 0), epoch(alone, 1))
    assert not same(epoch(alone, 0), epoch(ready(Films(root, sampler="sqrt", seed=1)), 0))


def test_persistent_workers_see_the_epoch_change(root: Path) -> None:
    data = ready(Films(root, num_workers=1, sampler="shuffle"))
    loader = data.train_dataloader()
    found = []
    for number in (0, 1):
        loader.sampler.set_epoch(number)
        found.append({m.id: m.to_original for batch in loader for m in batch.meta})
    assert found[0].keys() == found[1].keys()
    assert all(found[0][i] != found[1][i] for i in found[0])


def test_a_record_drawn_twice_in_an_epoch_is_augmented_twice(root: Path) -> None:
    data = ready(Films(root, sampler="sqrt"))
    metas = [meta for batch in epoch(data) for meta in batch.meta]
    twice = {m.id for m in metas if sum(m.id == other.id for other in metas) > 1}
    assert twice
    assert len({(m.id, m.to_original) for m in metas}) == len(metas)


def test_augmentation_moves_image_mask_and_box_together(root: Path) -> None:
    """A film that is bright where its mask and its box are stays so."""
    for n in range(2 * PATIENTS):
        pixels = np.full((40, 32), 20, np.uint8)
        pixels[8:30, 5:14] = pixels[8:30, 18:28] = 220
        Image.fromarray(pixels).save(root / f"film{n}.png")
    preset = ChestPreset(rotation=20, zoom=0.2, shift=0.1, brightness=0, contrast=0, gamma=0)
    data = ready(Films(root, preset=preset, image_size=64))
    for batch in epoch(data):
        bright = batch.image[:, 0] > 0.5
        for row in batch.targets["lungs"].present.nonzero().flatten():
            mask = batch.targets["lungs"].masks[row, 0] == 1
            overlap = (mask & bright[row]).sum() / (mask | bright[row]).sum()
            assert overlap > 0.85


def test_validation_is_never_augmented(root: Path) -> None:
    data = ready(Films(root))
    assert same(list(data.val_dataloader()), list(ready(Films(root, preset=PlainPreset())).val_dataloader()))


class Tiny(LightningModule):
    """Learns nothing of note, and keeps a fingerprint of every batch it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.seen: list[tuple[int, float, tuple[str, ...]]] = []

    def training_step(self, batch: Batch, index: int) -> torch.Tensor:
        self.seen.append((self.current_epoch, batch.image.sum().item(), tuple(m.id for m in batch.meta)))
        return self.layer(batch.image.mean().reshape(1, 1)).sum()

    def validation_step(self, batch: Batch, index: int) -> None:
        self.log("val/mean", batch.image.mean(), batch_size=len(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-3)


def fit(root: Path, epochs: int, folder: str, ckpt: Path | None = None) -> tuple[Tiny, Trainer]:
    module = Tiny()
    keep = ModelCheckpoint(root / folder, save_last=True, save_top_k=0)
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        logger=False,
        callbacks=[keep],
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, datamodule=Films(root, num_workers=0), ckpt_path=ckpt)
    return module, trainer


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_resuming_gives_the_batches_of_the_uninterrupted_run(root: Path) -> None:
    whole, _ = fit(root, 3, "whole")
    fit(root, 1, "first")
    resumed, _ = fit(root, 3, "resumed", root / "first" / "last.ckpt")
    assert resumed.seen == [entry for entry in whole.seen if entry[0] >= 1]
    assert len({entry[1] for entry in whole.seen}) == len(whole.seen)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_trainer_predicts_and_tests_every_image_once(root: Path) -> None:
    class Names(Tiny):
        def predict_step(self, batch: Batch, index: int) -> list[str]:
            return [m.id for m in batch.meta]

        test_step = Tiny.validation_step

    trainer = Trainer(accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_checkpointing=False)
    data = Films(root, predict_split="all")
    found = trainer.predict(Names(), datamodule=data)
    assert sorted(name for batch in found for name in batch) == sorted(f"film{n}" for n in range(2 * PATIENTS))
    assert set(data.datasets) == {"predict"}
    trainer.test(Names(), datamodule=data, verbose=False)
    assert set(data.datasets) == {"predict", "test"}


def test_a_stage_decodes_its_own_splits_only(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    real = rasterize.read_image
    monkeypatch.setattr(rasterize, "read_image", lambda file, *more: (read.append(file.stem), real(file, *more))[1])
    data = ready(Films(root), "test")
    assert set(data.datasets) == {"test"}
    assert sorted(read) == sorted(record.id for record in data.datasets["test"].records)
    data.setup("fit")
    data.setup("fit")
    assert sorted(read) == sorted(f"film{n}" for n in range(2 * PATIENTS))


def test_two_ranks_share_an_epoch(root: Path) -> None:
    data = ready(Films(root, sampler="shuffle"))
    everything = [m.id for batch in epoch(data) for m in batch.meta]
    halves = []
    for rank in (0, 1):
        data.trainer = type("Ranked", (), {"world_size": 2, "global_rank": rank})()
        halves.append([m.id for batch in epoch(data) for m in batch.meta])
    assert len(halves[0]) == len(halves[1])
    assert sorted({*halves[0], *halves[1]}) == sorted(everything)


DISTRIBUTED = """
import importlib.util, json, sys
from pathlib import Path
import torch
from lightning.pytorch import Trainer
spec = importlib.util.spec_from_file_location("films", sys.argv[1])
films = sys.modules["films"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(films)

class Seen(films.Tiny):
    def __init__(self):
        super().__init__()
        self.ids = {"train": [[], []], "val": [[], []]}

    def training_step(self, batch, index):
        self.ids["train"][self.current_epoch] += [m.id for m in batch.meta]
        return super().training_step(batch, index)

    def validation_step(self, batch, index):
        self.ids["val"][self.current_epoch] += [m.id for m in batch.meta]

root = Path(sys.argv[2])
data = films.Films(root, num_workers=int(sys.argv[3]))
trainer = Trainer(max_epochs=2, accelerator="cpu", devices=2, strategy="ddp", logger=False, num_sanity_val_steps=0,
                  enable_progress_bar=False, enable_checkpointing=False, enable_model_summary=False)
module = Seen()
trainer.fit(module, datamodule=data)
kind = type(trainer.train_dataloader.sampler).__name__
(root / f"rank{trainer.global_rank}.json").write_text(json.dumps([module.ids, kind]))
"""


@pytest.mark.slow
def test_two_processes_of_lightning_share_the_images(root: Path) -> None:
    """Both start on a cold cache, so they also fill it side by side."""
    (root / "run.py").write_text(DISTRIBUTED)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    run = [sys.executable, str(root / "run.py"), __file__, str(root), "1"]
    done = subprocess.run(run, capture_output=True, text=True, timeout=250, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    ranks = [json.loads((root / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    data = Films(root)
    data.plan()
    for split in ("train", "val"):
        expected = sorted(i for i, name in data.splits.items() if name == split)
        for number in (0, 1):
            halves = [ids[split][number] for ids, _ in ranks]
            assert len(halves[0]) == len(halves[1])
            assert sorted({*halves[0], *halves[1]}) == expected
    orders = [ids["train"] for ids, _ in ranks]
    assert orders[0][0] != orders[0][1]
    assert [kind for _, kind in ranks] == ["EpochSampler", "EpochSampler"]
    assert len(list((root / "cache").glob("??/*.safetensors"))) == sum(
        split != "test" for split in data.splits.values()
    )


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_overfitting_a_few_batches_works(root: Path) -> None:
    trainer = Trainer(
        max_epochs=2,
        overfit_batches=2,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    module = Tiny()
    trainer.fit(module, datamodule=Films(root))
    assert [seen[1:] for seen in module.seen[:2]] == [seen[1:] for seen in module.seen[2:]]


def test_a_dataset_survives_pickling(root: Path) -> None:
    """Workers that are spawned, not forked, get a pickled copy."""
    for cache_dir in (root / "cache", None):
        dataset = ready(Films(root, cache_dir=cache_dir)).datasets["train"]
        copy = pickle.loads(pickle.dumps(dataset))
        for key in (0, (3, 1, 2)):
            assert torch.equal(copy[key].image, dataset[key].image)
            assert copy[key].meta == dataset[key].meta


def test_splits_do_not_depend_on_the_tasks_or_sites_kept(root: Path) -> None:
    joint, single, south = (
        ready(Films(root, **more)) for more in ({}, {"tasks": ["lungs"]}, {"where": {"site": "south"}})
    )
    assert single.splits == joint.splits
    assert south.splits == {record.id: joint.splits[record.id] for record in south.records}
    assert {record.site for record in south.records} == {"south"}
    assert set(single.tasks) == {"lungs"}
    assert all("lungs" in record.truth for record in single.datasets["train"].records)
    assert set(epoch(single)[0].targets) == {"lungs"}


def test_a_single_task_baseline_decodes_nothing_again(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ready(Films(root))
    monkeypatch.setattr(rasterize, "read_image", lambda file, *_: pytest.fail(f"{file} decoded again"))
    ready(Films(root, tasks=["lesions"], where={"c": ["0", "1"]}, sampler="sqrt"))


def test_where_errors_name_the_available_values(root: Path) -> None:
    with pytest.raises(ConfigError, match=r"'hospital'; choose from site, view, laterality, c"):
        ready(Films(root, where={"hospital": "north"}))
    with pytest.raises(ConfigError, match=r"no image has site 'west'; there are north, south"):
        ready(Films(root, where={"site": "west"}))
    with pytest.raises(ConfigError, match=r"choose from finding, lesions, lungs"):
        ready(Films(root, tasks=["lung"]))


def test_limit_keeps_whole_patients(root: Path) -> None:
    data, again = ready(Films(root, limit=8), None), ready(Films(root, limit=8), None)
    assert len(data.records) == 16
    assert len({record.patient for record in data.records}) == 8
    assert data.records == again.records
    assert data.records != ready(Films(root, limit=8, seed=5), None).records


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"image_size": 4}, "image_size is 4"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"max_quarantine_share": 20}, "max_quarantine_share is 20"),
        ({"cache_max_gb": 0}, "cache_max_gb is 0"),
        ({"fold": 7}, "fold is 7"),
    ],
)
def test_invalid_arguments_are_named(root: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ready(Films(root, **arguments))


def test_folds_validate_everyone_once(root: Path) -> None:
    validated: list[str] = []
    tested = set()
    for fold in range(3):
        data = Films(root, fold=fold, folds=3)
        data.plan()
        validated += [i for i, split in data.splits.items() if split == "val"]
        tested.add(tuple(sorted(i for i, split in data.splits.items() if split == "test")))
    assert len(tested) == 1
    assert sorted(validated + list(tested.pop())) == sorted(f"film{n}" for n in range(2 * PATIENTS))


def test_validation_is_the_test_split_where_there_is_none(root: Path) -> None:
    data = ready(Films(root, test_fraction=0.0), "test")
    tested = {m.id for batch in data.test_dataloader() for m in batch.meta}
    assert tested == {i for i, split in data.splits.items() if split == "val"}


def test_no_validation_split_is_no_loader(root: Path) -> None:
    data = ready(Films(root, val_fraction=0.0))
    assert data.val_dataloader() == []


def test_broken_films_are_left_out_and_listed(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    (root / "film4.png").write_bytes(b"no picture")
    (root / "film5.png").unlink()
    Image.fromarray(np.full((40, 32), 7, np.uint8)).save(root / "film6.png")
    Image.fromarray(np.ones((32, 40), np.uint8)).save(root / "lungs9.png")
    with caplog.at_level(logging.WARNING):
        data = ready(Films(root), None)
    ids = {m.id for dataset in data.datasets.values() for m in (dataset[i].meta for i in range(len(dataset)))}
    assert ids == {f"film{n}" for n in range(2 * PATIENTS)} - {"film4", "film5", "film6"}
    assert {record.id for record in data.records} == ids == set(data.splits)
    assert data.quarantine.by_reason() == {
        "image: image unreadable": 1,
        "image: image file missing": 1,
        "image: image constant": 1,
        "lungs: mask of another aspect ratio than its image": 1,
    }
    nine = next(record for record in data.records if record.id == "film9")
    assert set(nine.truth) == {"finding", "lesions"}
    lines = [r.getMessage() for r in caplog.records if "Left out" in r.getMessage()]
    assert len(lines) == 1
    assert "Left out 3 images and 1 labels of other images" in lines[0]
    assert "Name" not in lines[0]
    table = data.quarantine.write(root / "run").read_text()
    assert "film4,film4.png,image,image unreadable" in table
    assert "film9,film9.png,lungs,mask of another aspect ratio than its image" in table


def test_too_many_broken_films_stop_the_run(root: Path) -> None:
    for n in range(12):
        (root / f"film{n}.png").write_bytes(b"no picture")
    with pytest.raises(
        DataError, match=r"(?s)12 of 48 images cannot be used, more than max_quarantine_share=0.2.*film"
    ):
        ready(Films(root), None)
    assert len(ready(Films(root, max_quarantine_share=0.3), None).records) == 2 * PATIENTS - 12


def test_a_task_whose_masks_are_broken_stops_the_run(root: Path) -> None:
    for n in range(1, 2 * PATIENTS, 2):
        (root / f"lungs{n}.png").unlink()
    with pytest.raises(DataError, match=r"24 of 24 images labelled for task 'lungs' cannot be used"):
        ready(Films(root), None)
    assert ready(Films(root, tasks=["finding"]), None).quarantine.issues == []


@pytest.mark.parametrize(
    "truth, message",
    [
        ({"finding": ClassTruth((1.0,))}, r"film0.png, task 'finding': 1 values for 2 classes \(sick, well\)"),
        ({"lesions": ClassTruth((1.0,))}, "the task.s kind is detection, but its label is a ClassTruth"),
        ({"lesions": BoxTruth(((1, 1, 5, 5),), (3,))}, r"class indices \[3\] for 1 classes"),
        ({"lesions": BoxTruth(((1, 1, 5, 5),))}, "the numbers of labels and of boxes"),
        ({"heart": ClassTruth((1.0,))}, "labelled for 'heart', which is not one of its tasks"),
    ],
)
def test_a_label_that_does_not_fit_its_task_is_refused(root: Path, truth: dict[str, Any], message: str) -> None:
    class Wrong(Films):
        def catalogue(self) -> Catalogue:
            return Catalogue(TASKS, [Record("film0", root / "film0.png", "a", truth)])

    with pytest.raises(DataError, match=message):
        ready(Wrong(root))


def test_an_empty_catalogue_and_repeated_ids_are_refused(root: Path) -> None:
    class Empty(Films):
        def catalogue(self) -> Catalogue:
            return Catalogue(TASKS, [])

    class Twice(Films):
        def catalogue(self) -> Catalogue:
            return Catalogue(TASKS, [Record("a", root / "film0.png", "p"), Record("a", root / "film1.png", "q")])

    with pytest.raises(DataError, match="Empty has no images"):
        ready(Empty(root))
    with pytest.raises(DataError, match="Twice: 1 ids belong to several images, for example 'a'"):
        ready(Twice(root))


def test_classes_without_images_are_logged(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Healthy(Films):
        def catalogue(self) -> Catalogue:
            kept = [r for n, r in enumerate(super().catalogue().records) if n % 3]
            return Catalogue(TASKS, kept)

    ready(Healthy(root))
    told = "\n".join(record.getMessage() for record in caplog.records)
    assert "finding has no image of sick" in told
    assert "labelled images and no positive one" in told


def test_the_global_random_stream_does_not_depend_on_the_cache(root: Path) -> None:
    states = []
    for _ in ("cold", "warm"):
        torch.manual_seed(3)
        np.random.seed(3)
        data = ready(Films(root, num_workers=1))
        epoch(data)
        states.append((torch.rand(1).item(), np.random.rand()))
    assert states[0] == states[1]

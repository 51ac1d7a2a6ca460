from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from datamodules.cache import cache as cache_module
from datamodules.cache import preprocessing as preprocessing_module
from datamodules.cache import rasterize
from datamodules.cache.cache import Cache
from datamodules.cache.entries import CacheEntry, load_entry, load_report, save_entry
from datamodules.cache.preprocessing import Preprocessing, digest
from datamodules.cache.quarantine import Issue
from datamodules.images.pixels import Pixels
from datamodules.images.presets import BreastPreset, ChestPreset, PlainPreset
from datamodules.records import BoxTruth, ClassTruth, MaskSource, MaskTruth, Record
from mtmedformer.errors import DataError

COUNT = 6
PREPROCESSING = Preprocessing(PlainPreset(), (24, 24))
fork = multiprocessing.get_context("fork")


@pytest.fixture
def films(tmp_path: Path) -> Path:
    folder = tmp_path / "films"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for n in range(COUNT):
        Image.fromarray(rng.integers(1, 255, (32, 32), np.uint8)).save(folder / f"{n}.png")
        Image.fromarray(np.eye(32, dtype=np.uint8)).save(folder / f"mask{n}.png")
    return folder


def records(films: Path) -> list[Record]:
    return [
        Record(
            f"{n}",
            films / f"{n}.png",
            f"p{n}",
            {
                "m": MaskTruth((MaskSource(films / f"mask{n}.png"),)),
                "b": BoxTruth(((1.0, 2.0, 9.0, 9.0),), (0,)),
                "c": ClassTruth((1.0,)),
            },
        )
        for n in range(COUNT)
    ]


def fill(cache: Cache, of: list[Record], preprocessing: Preprocessing = PREPROCESSING, workers: int = 0) -> list[str]:
    keys = preprocessing.keys(of)
    cache.fill(of, keys, preprocessing, workers)
    return keys


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the images decoded in this process, in order."""
    names: list[str] = []
    real = rasterize.read_image

    def counting(file: Path, *more: Any) -> Pixels:
        names.append(file.name)
        return real(file, *more)

    monkeypatch.setattr(rasterize, "read_image", counting)
    return names


def same(a: CacheEntry | None, b: CacheEntry | None) -> bool:
    assert a is not None
    assert b is not None
    arrays = ("image", "masks", "boxes", "labels")
    facts = replace(a, image=b.image, masks=b.masks, boxes=b.boxes, labels=b.labels)
    pairs = [(a.image, b.image)]
    for kind in arrays[1:]:
        mine, theirs = getattr(a, kind), getattr(b, kind)
        assert mine.keys() == theirs.keys()
        pairs += [(mine[name], theirs[name]) for name in mine]
    return facts == b and all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in pairs)


def test_an_entry_comes_back_as_it_was(tmp_path: Path) -> None:
    entry = CacheEntry(
        image=np.arange(12, dtype=np.uint16).reshape(3, 4) * 5000,
        to_original=(-1.5, 0.0, 3.0, 0.0, 1.5, 0.25),
        original_size=(300, 400),
        masks={"lungs / left": np.full((2, 3, 4), 255, np.uint8)},
        boxes={"b": np.zeros((0, 4), np.float32), "c": np.array([[0.5, 1, 2, 3]], np.float32)},
        labels={"b": np.zeros(0, np.int64), "c": np.array([7])},
        spacing=(0.1, 0.2),
        view="MLO",
        laterality=None,
        issues=(Issue("a", "a.png", "m", "mask file missing", "ü", True),),
        remarks=("x", "x"),
    )
    save_entry(entry, tmp_path / "entry")
    assert same(load_entry(tmp_path / "entry"), entry)
    plain = tmp_path / "plain"
    plain.touch()
    assert (tmp_path / "entry").stat().st_mode == plain.stat().st_mode  # a shared folder stays shared
    assert load_report(tmp_path / "entry") == entry.report()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kept", ["disk", "memory"])
def test_a_served_entry_is_the_rasterized_one(tmp_path: Path, films: Path, kept: str, workers: int) -> None:
    cache = Cache(tmp_path / "cache" if kept == "disk" else None)
    keys = fill(cache, records(films), workers=workers)
    for key, record in zip(keys, records(films), strict=True):
        made = PREPROCESSING.apply(record)
        assert isinstance(made, CacheEntry)
        assert same(cache.load(key), made)


def test_the_second_run_decodes_nothing(tmp_path: Path, films: Path, decoded: list[str]) -> None:
    fill(Cache(tmp_path / "cache"), records(films))
    assert len(decoded) == COUNT
    fill(Cache(tmp_path / "cache"), records(films))
    fill(Cache(tmp_path / "cache"), records(films), workers=2)
    assert len(decoded) == COUNT


def test_images_added_later_are_decoded_alone(tmp_path: Path, films: Path, decoded: list[str]) -> None:
    fill(Cache(tmp_path / "cache"), records(films)[:4])
    decoded.clear()
    fill(Cache(tmp_path / "cache"), records(films))
    assert decoded == ["4.png", "5.png"]


def test_a_copied_or_renamed_folder_is_not_decoded_again(tmp_path: Path, films: Path, decoded: list[str]) -> None:
    fill(Cache(tmp_path / "cache"), records(films))
    decoded.clear()
    shutil.copytree(films, tmp_path / "copy")
    renamed = [replace(r, id=f"x{r.id}", patient="q", site="s") for r in records(tmp_path / "copy")]
    fill(Cache(tmp_path / "cache"), renamed)
    assert decoded == []


def changed_image(films: Path, record: Record) -> tuple[Record, Preprocessing]:
    Image.fromarray(np.random.default_rng(9).integers(1, 255, (32, 32), np.uint8)).save(record.file)
    return record, PREPROCESSING


def changed_mask(films: Path, record: Record) -> tuple[Record, Preprocessing]:
    Image.fromarray(np.ones((32, 32), np.uint8)).save(films / f"mask{record.id}.png")
    return record, PREPROCESSING


def changed_box(films: Path, record: Record) -> tuple[Record, Preprocessing]:
    return replace(record, truth=record.truth | {"b": BoxTruth(((1.0, 2.0, 9.0, 9.5),), (0,))}), PREPROCESSING


def changed_mask_values(films: Path, record: Record) -> tuple[Record, Preprocessing]:
    source = MaskSource(films / f"mask{record.id}.png", values=(2,))
    return replace(record, truth=record.truth | {"m": MaskTruth((source,))}), PREPROCESSING


def changed_reference_size(films: Path, record: Record) -> tuple[Record, Preprocessing]:
    return replace(record, size=(64, 64)), PREPROCESSING


def changed_size(films: Path, record: Record) -> tuple[Record, Preprocessing]:
    return record, Preprocessing(PlainPreset(), (24, 20))


def changed_preset(films: Path, record: Record) -> tuple[Record, Preprocessing]:
    return record, Preprocessing(BreastPreset(), (24, 24))


CHANGES = [
    changed_image,
    changed_mask,
    changed_box,
    changed_mask_values,
    changed_reference_size,
    changed_size,
    changed_preset,
]


@pytest.mark.parametrize("change", CHANGES)
def test_each_change_of_an_entry_changes_its_key(
    films: Path, change: Callable[[Path, Record], tuple[Record, Preprocessing]]
) -> None:
    record, other = records(films)[:2]
    before = PREPROCESSING.keys([record, other])
    changed, preprocessing = change(films, record)
    after = preprocessing.keys([changed, other])
    assert after[0] != before[0]
    assert (after[1] == before[1]) == (preprocessing == PREPROCESSING)


def test_the_crop_is_part_of_the_key_and_the_augmentation_is_not(films: Path) -> None:
    def key(preset: ChestPreset | BreastPreset) -> str:
        return Preprocessing(preset, (24, 24)).keys(records(films)[:1])[0]

    assert key(ChestPreset()) == key(ChestPreset(rotation=30, noise=0.2, horizontal_flip=0.5))
    assert key(BreastPreset()) == key(BreastPreset(zoom=0.4, vertical_flip=0.0))
    assert (
        len({key(p) for p in (BreastPreset(), BreastPreset(crop=False), BreastPreset(flip_to="R"), ChestPreset())}) == 4
    )


def test_classes_sites_and_patients_are_not_part_of_the_key(films: Path) -> None:
    record = records(films)[0]
    other = replace(record, id="z", site="s", patient="q", truth=record.truth | {"c": ClassTruth((0.0,))})
    assert PREPROCESSING.keys([record]) == PREPROCESSING.keys([other])


def test_another_version_of_the_code_decodes_again(films: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = PREPROCESSING.keys(records(films))
    monkeypatch.setattr(preprocessing_module, "_code", lambda: "another")
    assert set(before).isdisjoint(PREPROCESSING.keys(records(films)))


def test_the_digest_of_a_large_file_uses_samples_and_its_modification_time(tmp_path: Path) -> None:
    file = tmp_path / "large"
    content = bytearray(preprocessing_module.WHOLE_BYTES + 1000)
    file.write_bytes(content)
    before = digest(file)
    os.utime(file, ns=(1, 1))
    assert digest(file) != before
    for position in (0, len(content) // 2, len(content) - 1):  # some are in a block, some are not
        content[position] ^= 1
        file.write_bytes(content)
        assert digest(file) not in (before, "missing")
    assert digest(tmp_path / "gone") == "missing"


@pytest.mark.parametrize("damage", [b"", b"\x10\x00", b"\xff" * 64])
def test_a_damaged_entry_is_decoded_again(
    tmp_path: Path, films: Path, decoded: list[str], damage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    cache = Cache(tmp_path / "cache")
    keys = fill(cache, records(films))
    whole = cache.path(keys[2]).read_bytes()
    decoded.clear()
    cache.path(keys[2]).write_bytes(damage)
    fill(cache, records(films))
    assert decoded == ["2.png"]
    assert "is damaged" in caplog.text
    cache.path(keys[3]).write_bytes(whole[: len(whole) // 2])
    fill(cache, records(films))
    assert decoded == ["2.png", "3.png"]


def test_an_entry_that_disappears_during_training_is_decoded_again(
    tmp_path: Path, films: Path, decoded: list[str]
) -> None:
    cache = Cache(tmp_path / "cache")
    keys = fill(cache, records(films))
    made = cache.load(keys[0])
    shutil.rmtree(tmp_path / "cache")
    decoded.clear()
    for _ in range(2):
        assert same(cache.fetch(keys[0], records(films)[0], PREPROCESSING), made)
    assert decoded == ["0.png"]
    (films / "1.png").unlink()
    with pytest.raises(DataError, match=r"1.png: image file missing .*It could be read when training started"):
        cache.fetch(keys[1], records(films)[1], PREPROCESSING)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_has_no_entry_and_is_decoded_again(
    tmp_path: Path, films: Path, decoded: list[str], workers: int
) -> None:
    good = (films / "1.png").read_bytes()
    (films / "1.png").write_bytes(b"no picture")
    (films / "mask3.png").write_bytes(b"no mask")
    cache = Cache(tmp_path / "cache")
    keys = PREPROCESSING.keys(records(films))
    reports = cache.fill(records(films), keys, PREPROCESSING, workers)
    assert [[i.reason for i in report.issues] for report in reports] == [
        [],
        ["image unreadable"],
        [],
        ["mask unreadable"],
        [],
        [],
    ]
    assert cache.load(keys[1]) is None
    decoded.clear()
    cache.fill(records(films), keys, PREPROCESSING)
    assert decoded == ["1.png", "3.png"]
    (films / "1.png").write_bytes(good)
    assert cache.fill(records(films), PREPROCESSING.keys(records(films)), PREPROCESSING)[1].issues == ()


@pytest.mark.parametrize("kept", ["in memory", "on disk"])
@pytest.mark.parametrize("workers", [0, 2])
def test_every_unusable_file_of_equal_content_is_named_with_its_own_path(
    tmp_path: Path, films: Path, kept: str, workers: int
) -> None:
    for n in (1, 2):
        (films / f"{n}.png").unlink()
    for n in (3, 4):
        (films / f"{n}.png").write_bytes(b"")
    shutil.copy(films / "0.png", films / "5.png")
    of = [Record(f"r{n}", films / f"{n}.png", "p") for n in range(5)]
    mask = {"lungs": MaskTruth((MaskSource(films / "gone_a.png"),))}
    other = {"lungs": MaskTruth((MaskSource(films / "gone_b.png"),))}
    of += [Record("r5", films / "5.png", "p", truth=mask), Record("r6", films / "5.png", "p", truth=other)]
    cache = Cache(tmp_path / "cache" if kept == "on disk" else None)
    for _ in range(2):  # also with what is in the cache from before
        reports = cache.fill(of, PREPROCESSING.keys(of), PREPROCESSING, workers)
        details = [[i.detail for i in report.issues] for report in reports]
        assert details[0] == []
        assert [f"{films / str(n)}.png" in "".join(details[n]) for n in (1, 2)] == [True, True]
        assert ["3.png: " in details[3][0], "4.png: " in details[4][0]] == [True, True]
        assert [details[5], details[6]] == [[str(films / "gone_a.png")], [str(films / "gone_b.png")]]


def test_a_name_that_no_file_can_have_is_a_missing_file(tmp_path: Path) -> None:
    of = [Record(f"r{n}", tmp_path / name, "p") for n, name in enumerate(("x" * 5000, "a\0b.png", "\udcff.png"))]
    reports = Cache(None).fill(of, PREPROCESSING.keys(of), PREPROCESSING)
    assert [report.issues[0].reason for report in reports] == ["image file missing"] * 3


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_full_disk_is_an_error(
    tmp_path: Path, films: Path, monkeypatch: pytest.MonkeyPatch, code: int, workers: int
) -> None:
    def full(entry: CacheEntry, path: Path) -> None:
        path.write_bytes(b"half an en")
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(cache_module, "save_entry", full)
    with pytest.raises(DataError) as error:
        fill(Cache(tmp_path / "cache"), records(films), workers=workers)
    message = str(error.value)
    assert message.startswith(f"The disk of the cache folder {tmp_path / 'cache'} is full.")
    assert "cache_dir" in message
    assert "Traceback" not in message
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file() and p.name != "filling.lock"]


def test_a_folder_that_cannot_be_created_is_an_error(tmp_path: Path, films: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cache folder .*file/cache cannot be written .*cache_dir"):
        fill(Cache(tmp_path / "file" / "cache"), records(films))


@pytest.mark.parametrize("folder", ["cache", None])
def test_too_small_a_bound_is_refused_before_anything_is_decoded(
    tmp_path: Path, films: Path, decoded: list[str], folder: str | None
) -> None:
    cache = Cache(folder and tmp_path / folder, max_gb=5e-6)
    with pytest.raises(DataError, match=r"6 decoded images take at least 6.91e-06 GB.*cache_max_gb=5e-06 allows"):
        fill(cache, records(films))
    assert decoded == []


def test_entries_unused_for_longest_are_evicted(tmp_path: Path, films: Path) -> None:
    cache = Cache(tmp_path / "cache")
    old, older = Preprocessing(PlainPreset(), (20, 20)), Preprocessing(PlainPreset(), (16, 16))
    for age, preprocessing in ((9e5, older), (8e5, old)):
        for key in fill(cache, records(films), preprocessing):
            os.utime(cache.path(key), (time.time() - age,) * 2)
    sizes = {
        preprocessing.size: cache.path(preprocessing.keys(records(films))[0]).stat().st_size
        for preprocessing in (old, older)
    }
    room = COUNT * (sizes[old.size] + sizes[older.size])  # as much as there is; the new ones need about 9 kB more
    keys = fill(Cache(tmp_path / "cache", (room + 3000) / 1e9), records(films))
    assert all(cache.path(key).exists() for key in keys)
    left = {r.size: sum(cache.path(k).exists() for k in r.keys(records(films))) for r in (old, older)}
    assert left[older.size] == 0
    assert 0 < left[old.size] <= COUNT


def test_entries_of_this_run_are_not_evicted(tmp_path: Path, films: Path) -> None:
    first = fill(Cache(tmp_path / "cache"), records(films))
    with pytest.raises(DataError, match="more than cache_max_gb"):
        fill(Cache(tmp_path / "cache", 25e-6), records(films), Preprocessing(PlainPreset(), (32, 32)))
    assert all(Cache(tmp_path / "cache").path(key).exists() for key in first)


def _slow_fill(folder: Path, films: Path, log: Path, seconds: float) -> None:
    real = rasterize.read_image

    def slow(file: Path, *more: Any) -> Pixels:
        with log.open("a") as stream:
            stream.write(f"{file.name}\n")
        time.sleep(seconds)
        return real(file, *more)

    rasterize.read_image = slow
    fill(Cache(folder), records(films))


def test_concurrent_processes_decode_each_image_once(tmp_path: Path, films: Path) -> None:
    log = tmp_path / "log"
    several = [fork.Process(target=_slow_fill, args=(tmp_path / "cache", films, log, 0.02)) for _ in range(3)]
    for process in several:
        process.start()
    for process in several:
        process.join(60)
    assert [process.exitcode for process in several] == [0, 0, 0]
    assert sorted(log.read_text().split()) == [f"{n}.png" for n in range(COUNT)]
    assert all(Cache(tmp_path / "cache").load(key) for key in PREPROCESSING.keys(records(films)))


def test_a_killed_process_leaves_no_incomplete_entry(tmp_path: Path, films: Path, decoded: list[str]) -> None:
    log = tmp_path / "log"
    process = fork.Process(target=_slow_fill, args=(tmp_path / "cache", films, log, 0.3))
    process.start()
    deadline = time.time() + 60
    while time.time() < deadline and (not log.exists() or len(log.read_text().split()) < 3):
        time.sleep(0.02)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join(60)
    done = list((tmp_path / "cache").glob("??/*.safetensors"))
    assert 0 < len(done) < COUNT
    assert all(load_entry(path).image.shape == (24, 24) for path in done)
    keys = fill(Cache(tmp_path / "cache"), records(films))
    assert len(decoded) == COUNT - len(done)
    assert all(Cache(tmp_path / "cache").load(key) for key in keys)


def test_files_of_a_killed_process_are_removed(tmp_path: Path, films: Path) -> None:
    keys = PREPROCESSING.keys(records(films))
    part = Cache(tmp_path / "cache").path(keys[0]).parent / ".abc.1.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"half")
    fill(Cache(tmp_path / "cache"), records(films)[:1])
    assert part.exists()  # may be another process's, still writing
    os.utime(part, (time.time() - 7200,) * 2)
    fill(Cache(tmp_path / "cache"), records(films))
    assert not part.exists()


def test_decoding_shows_a_progress_bar(tmp_path: Path, films: Path, capfd: pytest.CaptureFixture[str]) -> None:
    fill(Cache(tmp_path / "cache"), records(films))
    assert f"Decoding {COUNT} images once" in capfd.readouterr().err
    fill(Cache(tmp_path / "cache"), records(films))
    assert capfd.readouterr().err == ""

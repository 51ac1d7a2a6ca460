"""Detection metrics against pycocotools, MONAI's FROC and the rules of the RSNA challenge."""

from __future__ import annotations

import contextlib
import io
import math

import numpy as np
import pytest
import torch
from monai.metrics import compute_froc_curve_data, compute_froc_score
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from mtmedformer.batch import DetectionTarget, Meta
from mtmedformer.metrics import DetectionMetrics

Found = list[dict[str, Tensor]]


def metas(n: int) -> list[Meta]:
    return [Meta(id=f"i{i:04}", patient=f"p{i // 2}") for i in range(n)]


def boxes(n: int, generator: torch.Generator) -> Tensor:
    corner = 60 * torch.rand(n, 2, generator=generator)
    return torch.cat([corner, corner + 5 + 25 * torch.rand(n, 2, generator=generator)], dim=1)


def scene(images: int, classes: int, seed: int, noise: float = 2, spare: int = 4) -> tuple[Found, DetectionTarget]:
    """Make true boxes, and predictions that are jittered true boxes and false alarms; every third image is empty."""
    g = torch.Generator().manual_seed(seed)
    true = [boxes(i % 3, g) for i in range(images)]
    labels = [torch.randint(classes, (len(b),), generator=g) for b in true]
    found = []
    for b, k in zip(true, labels, strict=True):
        x = torch.cat([b + noise * torch.randn(b.shape, generator=g), boxes(spare, g)])
        scores = torch.rand(len(x), generator=g)
        scores[: len(b)] **= 0.2
        kinds = torch.cat([k, torch.randint(classes, (spare,), generator=g)])
        order = scores.argsort(descending=True)
        found.append({"boxes": x[order], "scores": scores[order], "labels": kinds[order]})
    return found, DetectionTarget(true, labels, torch.ones(images, dtype=torch.bool))


def metric(found: Found, target: DetectionTarget, classes: int = 1, **options) -> DetectionMetrics:
    result = DetectionMetrics([f"c{k}" for k in range(classes)], **options)
    result.update(found, target, metas(len(found)))
    return result


def values(m: DetectionMetrics) -> dict[str, float]:
    return {name: value.item() for name, value in m.compute().items()}


def own(m: DetectionMetrics) -> dict[str, float]:
    """Return what resamples and subgroups use, on the whole sample."""
    rows = m.seen().rows
    return {name: value[0] for name, value in m.prepare(rows)(np.ones((1, len(rows)))).items()}


def pycocotools_map(found: Found, target: DetectionTarget, classes: int) -> np.ndarray:
    """Return average precision per IoU threshold and class, (10, K)."""

    def row(i, box, label, **more):
        x0, y0, x1, y1 = box.double().tolist()
        size = {"bbox": [x0, y0, x1 - x0, y1 - y0], "area": (x1 - x0) * (y1 - y0), "iscrowd": 0}
        return {"image_id": i, "category_id": int(label) + 1, **size, **more}

    truth = [
        row(i, b, k)
        for i, (bs, ks) in enumerate(zip(target.boxes, target.labels, strict=True))
        for b, k in zip(bs, ks, strict=True)
    ]
    results = [
        row(i, b, k, score=s.item())
        for i, p in enumerate(found)
        for b, s, k in zip(p["boxes"], p["scores"], p["labels"], strict=True)
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {
            "info": {},
            "images": [{"id": i} for i in range(len(found))],
            "categories": [{"id": k + 1} for k in range(classes)],
            "annotations": [{"id": i + 1, **t} for i, t in enumerate(truth)],
        }
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"][:, :, :, 0, 2]
    return np.where(precision < 0, np.nan, precision).mean(axis=1)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("spare", [4, 260])  # 260: more than the 100 boxes a class that COCO looks at
def test_map_and_its_own_replica_equal_pycocotools(seed, spare):
    found, target = scene(24, 2, seed, spare=spare)
    expected = pycocotools_map(found, target, 2)
    m = metric(found, target, 2)
    for got in (values(m), own(m)):
        assert got["map"] == pytest.approx(expected.mean(), abs=1e-6)
        assert got["map50"] == pytest.approx(expected[0].mean(), abs=1e-6)
        assert got["map75"] == pytest.approx(expected[5].mean(), abs=1e-6)
        for k in range(2):
            assert got[f"map/c{k}"] == pytest.approx(expected[:, k].mean(), abs=1e-6)
    assert 0.005 < got["map50"] < 0.95


def test_recalls_that_meet_a_threshold_exactly_fall_as_in_pycocotools():
    found, target = scene(75, 1, 0)  # 75 true boxes: recalls such as 0.24 and 0.28 are both met and tabulated
    assert sum(len(b) for b in target.boxes) == 75
    expected = pycocotools_map(found, target, 1).mean()
    m = metric(found, target)
    assert values(m)["map"] == pytest.approx(expected, abs=1e-6)
    assert own(m)["map"] == pytest.approx(expected, abs=1e-6)


def test_resampled_map_equals_pycocotools_on_the_resampled_images():
    found, target = scene(18, 1, 5)
    m = metric(found, target)
    order = m.seen().rows
    counts = np.random.default_rng(0).integers(0, 3, 18)
    chosen = [int(order[i]) for i, c in enumerate(counts) for _ in range(c)]
    again = DetectionTarget(
        [target.boxes[i] for i in chosen], [target.labels[i] for i in chosen], torch.ones(len(chosen)).bool()
    )
    expected = pycocotools_map([found[i] for i in chosen], again, 1)
    got = m.prepare(order)(counts[None].astype(float))
    assert got["map"][0] == pytest.approx(expected.mean(), abs=1e-6)


def test_the_order_of_detections_and_of_images_changes_nothing():
    found, target = scene(20, 2, 3)
    expected = values(metric(found, target, 2))
    g = torch.Generator().manual_seed(9)
    shuffled = [
        {name: v[order] for name, v in p.items()}
        for p in found
        for order in [torch.randperm(len(p["scores"]), generator=g)]
    ]
    assert values(metric(shuffled, target, 2)) == expected
    images = torch.randperm(20, generator=g).tolist()
    m = DetectionMetrics(["c0", "c1"])
    for i in images:
        m.update([found[i]], target[torch.tensor([i])], [metas(20)[i]])
    assert values(m) == expected


def test_unlabelled_images_change_nothing():
    found, target = scene(20, 1, 4)
    target.present = torch.arange(20) < 15
    first = torch.arange(15)
    assert values(metric(found, target)) == values(metric(found[:15], target[first]))


def test_a_class_without_boxes_is_nan_and_left_out():
    found, target = scene(12, 1, 6)
    got = values(metric(found, target, 2))
    assert all(math.isnan(got[f"{name}/c1"]) for name in ("map", "map50", "map75", "rsna_map", "froc"))
    assert got["map50"] == got["map50/c0"]


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_without_images_or_boxes_every_metric_is_nan():
    none = {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0, dtype=torch.int64)}
    empty = DetectionTarget([torch.zeros(0, 4)], [torch.zeros(0, dtype=torch.int64)], torch.tensor([True]))
    for m in (DetectionMetrics(["c0"]), metric([none], empty)):
        got = values(m)
        assert got
        assert all(math.isnan(v) for v in got.values())


def test_boxes_missed_everywhere_score_zero():
    found, target = scene(12, 1, 7)
    nothing = [{name: v[:0] for name, v in p.items()} for p in found]
    got = values(metric(nothing, target))
    assert {got[name] for name in ("map", "map50", "rsna_map", "froc", "sensitivity_at_8fp")} == {0.0}


def test_froc_equals_monai():
    """MONAI leaves out the lowest score and interpolates: 16 images make its rates whole numbers of false alarms."""
    found, target = scene(16, 1, 8, spare=9)
    true = [
        torch.tensor([[8.0, 8.0, 30.0, 30.0], [40.0, 40.0, 60.0, 60.0]])[: i % 3] for i in range(16)
    ]  # apart, so that MONAI's mask of numbered lesions can hold them
    target = DetectionTarget(true, [torch.zeros(len(b), dtype=torch.int64) for b in true], target.present)
    lesion, alarm = [], [np.array([-1.0])]  # one alarm below all others takes MONAI's blind spot
    for p, b in zip(found, true, strict=True):
        p["boxes"][: len(b)] = b + 1
        centre = (p["boxes"][:, :2] + p["boxes"][:, 2:]) / 2
        inside = ((centre[:, None] >= b[None, :, :2]) & (centre[:, None] < b[None, :, 2:])).all(-1)
        alarm.append(p["scores"][~inside.any(1)].numpy())
        lesion.append(np.where(inside, p["scores"][:, None], 0).max(0, initial=0))
    total = sum(len(b) for b in true)
    curve = compute_froc_curve_data(np.concatenate(alarm), np.concatenate(lesion), total, 16)
    rates = (0.125, 0.25, 0.5, 1, 2, 4, 8)
    got = values(metric(found, target, hit="centre", fp_rates=rates))
    assert got["froc"] == pytest.approx(compute_froc_score(*curve, eval_thresholds=rates), abs=1e-6)
    for rate in rates:
        expected = compute_froc_score(*curve, eval_thresholds=(rate,))
        assert got[f"sensitivity_at_{rate:g}fp"] == pytest.approx(expected, abs=1e-6)
    assert 0 < got["sensitivity_at_0.5fp"] < got["sensitivity_at_8fp"]


def test_froc_by_hand():
    lesions = torch.tensor([[0.0, 0.0, 10.0, 10.0], [20.0, 20.0, 30.0, 30.0]])
    target = DetectionTarget(
        [lesions, torch.zeros(0, 4)], [torch.zeros(2).long(), torch.zeros(0).long()], torch.ones(2).bool()
    )
    found = [
        {  # a hit at 0.9, the same lesion again (no alarm), an alarm, and a hit that ties with the other image's alarm
            "boxes": torch.stack([lesions[0], lesions[0], torch.tensor([50.0, 50.0, 60.0, 60.0]), lesions[1]]),
            "scores": torch.tensor([0.9, 0.8, 0.7, 0.5]),
            "labels": torch.zeros(4).long(),
        },
        {"boxes": lesions[:1], "scores": torch.tensor([0.5]), "labels": torch.zeros(1).long()},
    ]
    got = values(metric(found, target, fp_rates=(0.25, 0.5, 1.0)))
    assert [got[f"sensitivity_at_{x}fp"] for x in ("0.25", "0.5", "1")] == [0.5, 0.5, 1.0]
    assert got["froc"] == pytest.approx(2 / 3)


def test_froc_rules_differ_on_a_small_box_inside_the_lesion():
    target = DetectionTarget([torch.tensor([[0.0, 0.0, 40.0, 40.0]])], [torch.zeros(1).long()], torch.ones(1).bool())
    small = {
        "boxes": torch.tensor([[15.0, 15.0, 25.0, 25.0]]),
        "scores": torch.ones(1),
        "labels": torch.zeros(1).long(),
    }
    assert values(metric([small], target, hit="centre"))["froc"] == 1
    assert values(metric([small], target, hit="iou"))["froc"] == 0
    assert values(metric([small], target, hit="iou", iou=0.05))["froc"] == 1


def rsna_by_the_rules(found: Found, target: DetectionTarget, score: float) -> float:
    """Return the challenge's score, written out from its description with plain loops."""
    per_image = []
    for p, true in zip(found, target.boxes, strict=True):
        keep = p["scores"] >= score
        boxes_, scores = p["boxes"][keep].tolist(), p["scores"][keep].tolist()
        if not boxes_ and not len(true):
            continue
        ranked = [b for _, b in sorted(zip(scores, boxes_, strict=True), key=lambda pair: -pair[0])]
        per_threshold = []
        for t in [0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75]:
            free, tp = true.tolist(), 0
            for b in ranked:
                overlaps = [
                    max(0, min(b[2], g[2]) - max(b[0], g[0])) * max(0, min(b[3], g[3]) - max(b[1], g[1])) for g in free
                ]
                area = (b[2] - b[0]) * (b[3] - b[1])
                ious = [o / (area + (g[2] - g[0]) * (g[3] - g[1]) - o) for o, g in zip(overlaps, free, strict=True)]
                if ious and max(ious) > t:
                    free.pop(ious.index(max(ious)))
                    tp += 1
            per_threshold.append(tp / (len(ranked) + len(true) - tp))
        per_image.append(sum(per_threshold) / 8)
    return sum(per_image) / len(per_image)


@pytest.mark.parametrize("score", [0.0, 0.5, 0.8, 0.97])
def test_rsna_map_follows_the_rules_of_the_challenge(score):
    found, target = scene(40, 1, 11, noise=1.5)
    got = values(metric(found, target, score_threshold=score))["rsna_map"]
    assert got == pytest.approx(rsna_by_the_rules(found, target, score), abs=1e-6)
    assert 0 < got < 1


def test_rsna_map_of_empty_images():
    box, none = torch.tensor([[0.0, 0.0, 9.0, 9.0]]), torch.zeros(0, 4)

    def case(*images: tuple[Tensor, Tensor]) -> float:
        found = [{"boxes": p, "scores": torch.ones(len(p)), "labels": torch.zeros(len(p)).long()} for p, _ in images]
        true = [t for _, t in images]
        target = DetectionTarget(true, [torch.zeros(len(t)).long() for t in true], torch.ones(len(true)).bool())
        return values(metric(found, target))["rsna_map"]

    assert case((box, box)) == 1
    assert case((box, box), (none, none)) == 1  # skipped
    assert case((box, box), (box, none)) == 0.5  # a false alarm counts
    assert case((box, box), (none, box)) == 0.5


def test_boxes_with_swapped_corners_are_false_positives():
    target = DetectionTarget([torch.tensor([[0.0, 0.0, 9.0, 9.0]])], [torch.zeros(1).long()], torch.ones(1).bool())
    found = [
        {
            "boxes": torch.tensor([[30.0, 30.0, 20.0, 40.0], [0.0, 0.0, 9.0, 9.0]]),
            "scores": torch.tensor([0.9, 0.8]),
            "labels": torch.zeros(2).long(),
        }
    ]
    m = metric(found, target)
    assert values(m)["map50"] == pytest.approx(0.5)
    assert own(m)["map50"] == pytest.approx(0.5)

"""Weighted boxes fusion, against the values of the library ensemble-boxes 1.0.9 and against cases by hand."""

import pytest
import torch

from mtmedformer.inference.box_fusion import fuse_boxes

BOXES = [
    [
        [0.404, 0.21, 0.663, 0.48],
        [0.108, 0.109, 0.355, 0.386],
        [0.46, 0.552, 0.697, 0.809],
        [0.378, 0.45, 0.646, 0.702],
        [0.604, 0.379, 0.839, 0.611],
    ],
    [
        [0.429, 0.239, 0.695, 0.494],
        [0.128, 0.095, 0.371, 0.374],
        [0.504, 0.572, 0.793, 0.858],
        [0.433, 0.44, 0.709, 0.697],
        [0.225, 0.416, 0.451, 0.666],
    ],
    [
        [0.395, 0.222, 0.657, 0.428],
        [0.112, 0.085, 0.363, 0.349],
        [0.541, 0.546, 0.812, 0.784],
        [0.41, 0.46, 0.696, 0.683],
        [0.14, 0.659, 0.376, 0.928],
    ],
]
SCORES = [[0.68, 0.65, 0.69, 0.43, 0.21], [0.15, 0.39, 0.23, 0.48, 0.78], [0.74, 0.52, 0.55, 0.77, 0.45]]
LABELS = [0, 0, 1, 0, 1]


def of(boxes, scores, labels):
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "scores": torch.tensor(scores, dtype=torch.float32),
        "labels": torch.tensor(labels, dtype=torch.int64),
    }


def test_the_fused_boxes_are_those_of_the_library():
    """``weighted_boxes_fusion(boxes, scores, labels, iou_thr=0.55, skip_box_thr=0)`` of ensemble-boxes 1.0.9."""
    expected = {
        0.56: (0, [0.40838, 0.45173, 0.68692, 0.69186]),
        0.52333: (0, [0.40215, 0.21843, 0.66323, 0.45683]),
        0.52: (0, [0.11433, 0.0975, 0.36167, 0.37067]),
        0.26: (1, [0.53009, 0.55367, 0.8064, 0.80582]),  # and [0.225, 0.416, 0.451, 0.666], of equal score
        0.23: (1, [0.46, 0.552, 0.697, 0.809]),
        0.15: (1, [0.14, 0.659, 0.376, 0.928]),
        0.07: (1, [0.604, 0.379, 0.839, 0.611]),
    }
    fused, _ = fuse_boxes([of(b, s, LABELS) for b, s in zip(BOXES, SCORES, strict=True)])
    assert len(fused["boxes"]) == 8
    for score, (label, box) in expected.items():
        places = ((fused["boxes"] - torch.tensor(box)).abs().amax(1) < 2e-5).nonzero().flatten().tolist()
        assert [(float(fused["scores"][n]), int(fused["labels"][n])) for n in places] == [
            (pytest.approx(score, abs=1e-5), label)
        ]
    assert fused["scores"].tolist() == sorted(fused["scores"].tolist(), reverse=True)


def test_two_models_by_hand():
    """Weights .8 and .4: the box lies two thirds of the way to the surer model; a box of one model keeps half."""
    first = of([[0, 0, 30, 30], [100, 100, 110, 110]], [0.8, 0.6], [0, 0])
    second = of([[3, 0, 33, 30]], [0.4], [0])
    fused, scores = fuse_boxes([first, second])
    assert fused["boxes"].tolist() == [[pytest.approx(1.0), 0, pytest.approx(31.0), 30], [100, 100, 110, 110]]
    assert fused["scores"].tolist() == pytest.approx([0.6, 0.3])
    assert scores.tolist() == [pytest.approx([0.8, 0.4]), pytest.approx([0.6, 0.0])]


def test_classes_are_fused_apart_and_nothing_stays_nothing():
    fused, _ = fuse_boxes([of([[0, 0, 10, 10]], [0.9], [0]), of([[0, 0, 10, 10]], [0.9], [1])])
    assert sorted(fused["labels"].tolist()) == [0, 1]
    assert fused["scores"].tolist() == pytest.approx([0.45, 0.45])
    nothing = of([], [], [])
    fused, scores = fuse_boxes([nothing, nothing])
    assert fused["boxes"].shape == (0, 4)
    assert fused["labels"].dtype == torch.int64
    assert scores.shape == (0, 2)


def test_equal_members_change_nothing():
    one = of([[1, 2, 30, 40], [50, 50, 70, 90]], [0.75, 0.5], [1, 0])
    fused, _ = fuse_boxes([one, one, one])
    assert all(torch.allclose(fused[key], one[key]) for key in one)

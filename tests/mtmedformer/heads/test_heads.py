"""Single heads: attention, boxes from known outputs, masks on known grids, number of parameters, YAML, errors."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import yaml
from jsonargparse import ArgumentParser
from torchvision.models.detection._utils import BoxLinearCoder
from torchvision.models.detection.fcos import FCOS

from mtmedformer.batch import IGNORE, SegmentationTarget
from mtmedformer.errors import ConfigError
from mtmedformer.heads import ClassificationHead, DetectionHead, DETRHead, SegmentationHead, TaskHead
from mtmedformer.heads.detection import DetectionOutputs
from mtmedformer.heads.layers import enlarge
from mtmedformer.losses import CIoU, CrossEntropy, Dice, MaskCrossEntropy

STRIDES, CHANNELS = (4, 8, 16, 32, 64), 16


def build(head: TaskHead, channels: int = CHANNELS) -> TaskHead:
    torch.manual_seed(0)
    head.build(channels, STRIDES)
    return head.eval()


def pyramid(size: tuple[int, int], n: int = 2, seed: int = 0) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(n, CHANNELS, -(-size[0] // s), -(-size[1] // s), generator=g) for s in STRIDES]


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def test_number_of_parameters_is_below_its_limit():
    heads = [
        ClassificationHead(("normal", "pneumonia", "tuberculosis")),
        DetectionHead(("opacity", "nodule")),
        SegmentationHead(("lungs", "heart", "infection"), multi_label=True),
    ]
    sizes = [sum(p.numel() for p in build(head, 64).parameters()) for head in heads]
    assert sum(sizes) < 350_000
    slim = DetectionHead(("opacity",), num_convs=1, width=32)
    assert sum(p.numel() for p in build(slim, 64).parameters()) < 40_000


def test_heads_are_built_from_yaml():
    parser = ArgumentParser()
    parser.add_argument("--heads", type=dict[str, TaskHead])
    text = """
    heads:
      finding:
        class_path: mtmedformer.heads.ClassificationHead
        init_args:
          classes: [a, b]
          terms: {ce: {class_path: mtmedformer.losses.CrossEntropy, init_args: {class_weights: [1, 2], weight: 0.5}}}
      lesion:
        class_path: DetectionHead
        init_args: {classes: [mass], box_loss: {class_path: CIoU, init_args: {weight: 2}}}
      lungs:
        class_path: SegmentationHead
        init_args: {classes: [left, right], terms: {bce: MaskCrossEntropy, dice: {class_path: Dice}}, strides: [4, 8]}
      queries:
        class_path: mtmedformer.heads.DETRHead
        init_args: {classes: [mass], num_queries: 3}
    """
    heads = parser.instantiate_classes(parser.parse_object(yaml.safe_load(text))).heads
    assert isinstance(heads["finding"].terms["ce"], CrossEntropy)
    assert heads["finding"].terms["ce"].weight == 0.5
    assert isinstance(heads["lesion"].box_loss, CIoU)
    assert isinstance(heads["lungs"].terms["bce"], MaskCrossEntropy)
    assert isinstance(heads["lungs"].terms["dice"], Dice)
    assert heads["lungs"].strides == (4, 8)
    assert isinstance(heads["queries"], DETRHead)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: ClassificationHead(("a", "b"), multi_label=True, terms={"x": CrossEntropy()}), "multi_label: false"),
        (lambda: SegmentationHead(("a", "b"), terms={"x": MaskCrossEntropy(pos_weight=[1.0])}), "terms.x: pos_weight"),
        (lambda: DetectionHead(("a",), nms_threshold=1.5), "nms_threshold: 1.5"),
        (lambda: build(SegmentationHead(("a",), strides=(2, 4))), r"strides: \[2, 4\].*has \[4, 8, 16, 32, 64\]"),
        (lambda: build(ClassificationHead(("a", "b"), num_heads=3)), "num_heads: 3 does not divide"),
    ],
)
def test_invalid_settings_are_errors(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize(
    "head",
    [ClassificationHead(("a", "b")), DetectionHead(("a", "b"), 1), SegmentationHead(("a", "b"))],
    ids=["classes", "boxes", "masks"],
)
def test_a_mirrored_pyramid_gives_mirrored_predictions(head):
    """With kernels that are symmetric from left to right, a head is equivariant to mirroring."""
    size = (64, 128)
    build(head)
    for module in head.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.weight.data = (module.weight.data + module.weight.data.flip(3)) / 2
    if isinstance(head, DetectionHead):  # left and right distances are channels 0 and 2
        w, b = head.bbox_reg.bbox_reg.weight.data, head.bbox_reg.bbox_reg.bias.data
        w[2], b[2] = w[0], b[0]
        head.score_threshold = 0.0
    features = pyramid(size)
    with torch.no_grad():
        straight = head(features, size)
        mirrored = head([f.flip(3) for f in features], size)
    a, b = head.predict(straight, size), head.predict(mirrored, size)
    if isinstance(head, ClassificationHead):
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(straight.attention, mirrored.attention.flip(2))
    elif isinstance(head, SegmentationHead):
        torch.testing.assert_close(a, b.flip(3))
    else:
        boxes = [decode(o) for o in (straight, mirrored)]
        for image, other in zip(*boxes, strict=True):
            flipped = torch.stack([size[1] - other[:, 2], other[:, 1], size[1] - other[:, 0], other[:, 3]], 1)
            order, other_order = (b.mul(torch.tensor([1e6, 1e3, 1, 1e-3])).sum(1).argsort() for b in (image, flipped))
            torch.testing.assert_close(image[order], flipped[other_order], atol=1e-3, rtol=1e-4)


def decode(outputs: DetectionOutputs) -> torch.Tensor:
    coder = BoxLinearCoder(normalize_by_size=True)
    return torch.stack([coder.decode(d, outputs.anchors) for d in outputs.distances])


# Attention ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(64, 128), (37, 101)], ids=str)
def test_attention_sums_to_one_on_the_finest_pooled_grid(size):
    head = build(ClassificationHead(("a", "b"), strides=(16, 32)))
    attention = head(pyramid(size), size).attention
    assert attention.shape == (2, -(-size[0] // 16), -(-size[1] // 16))
    torch.testing.assert_close(attention.sum((1, 2)), torch.ones(2))
    assert (attention >= 0).all()


def test_attention_is_largest_at_the_token_with_the_evidence():
    head = build(ClassificationHead(("a", "b"), strides=(16, 32), peak=False))
    torch.nn.init.zeros_(head.score.weight)
    size = (64, 128)
    even = head(pyramid(size), size).attention
    torch.testing.assert_close(even, torch.full_like(even, 1 / even[0].numel()))

    optimizer = torch.optim.Adam(head.parameters(), lr=1e-2)
    g = torch.Generator().manual_seed(1)
    for _ in range(60):
        features = [torch.randn(8, CHANNELS, -(-64 // s), -(-128 // s), generator=g) for s in STRIDES]
        sign = torch.arange(8) % 2
        features[2][:, :, 1, 5] = 0
        features[2][:, 0, 1, 5] = 12.0 * (2 * sign - 1)  # the only token that differs between the classes
        features[2][:, 1, 1, 5] = 12.0  # and a channel that marks its place
        optimizer.zero_grad()
        F.cross_entropy(head(features, size).logits, sign).backward()
        optimizer.step()
    attention = head(features, size).attention
    assert (attention.flatten(1).argmax(1) == 1 * 8 + 5).all()


def test_channel_maxima_let_one_token_of_many_decide():
    size, g = (64, 128), torch.Generator().manual_seed(1)
    losses = {}
    for peak in (True, False):
        torch.manual_seed(0)
        head = build(ClassificationHead(("a", "b"), strides=(8, 16, 32), peak=peak))
        optimizer = torch.optim.Adam(head.parameters(), lr=1e-2)
        for _ in range(40):
            features = [0.1 * torch.randn(8, CHANNELS, -(-64 // s), -(-128 // s), generator=g) for s in STRIDES]
            sick = torch.arange(8) % 2
            place = int(torch.randint(0, 16, (1,), generator=g))
            features[1][:, 0, 3, place] += 3.0 * sick  # one of 168 tokens, anywhere along a row
            optimizer.zero_grad()
            loss = F.cross_entropy(head(features, size).logits, sick)
            loss.backward()
            optimizer.step()
        losses[peak] = float(loss)
    assert losses[True] < 0.1
    assert losses[True] < losses[False]


# Boxes --------------------------------------------------------------------------------------------------------------


def without_boxes(size: tuple[int, int], classes: int = 2) -> DetectionOutputs:
    """Return outputs without a box."""
    head = build(DetectionHead(("a", "b")[:classes]))
    outputs = head(pyramid(size, 1), size)
    outputs.logits = torch.full_like(outputs.logits, -20.0)
    outputs.centerness = torch.full_like(outputs.centerness, logit(0.81))
    outputs.distances = torch.ones_like(outputs.distances)
    return outputs


def set_box(outputs: DetectionOutputs, at: int, label: int, box: list[float], p: float) -> None:
    anchor = outputs.anchors[at]
    stride, centre = anchor[2] - anchor[0], (anchor[:2] + anchor[2:]) / 2
    b = torch.tensor(box)
    outputs.distances = outputs.distances.clone()
    outputs.distances[0, at] = torch.cat([centre - b[:2], b[2:] - centre]) / stride
    outputs.logits[0, at, label] = logit(p)


def test_locations_are_the_centres_of_their_pixels_for_any_size():
    outputs = without_boxes((37, 53))
    assert outputs.per_level == [10 * 14, 5 * 7, 3 * 4, 2 * 2, 1]
    for level, stride in zip(outputs.anchors.split(outputs.per_level), STRIDES, strict=True):
        centre = (level[:, :2] + level[:, 2:]) / 2
        assert centre[0].tolist() == [stride / 2, stride / 2]
        assert ((level[:, 2:] - level[:, :2]) == stride).all()
        assert centre[-1, 0] == (-(-53 // stride) - 0.5) * stride
        assert centre[-1, 1] == (-(-37 // stride) - 0.5) * stride


def test_known_boxes_are_scored_clipped_and_suppressed_per_class():
    size = (60, 80)
    head, outputs = build(DetectionHead(("a", "b"))), without_boxes(size)
    set_box(outputs, 44, 0, [10, 5, 30, 25], 0.64)
    set_box(outputs, 45, 0, [11, 5, 30, 25], 0.49)  # overlaps the first box, same class: suppressed
    set_box(outputs, 46, 1, [10, 5, 31, 25], 0.36)  # overlaps it, other class: kept
    set_box(outputs, 290, 1, [-8, 40, 20, 75], 0.25)  # extends beyond two sides
    (prediction,) = head.predict(outputs, size)
    expected = torch.tensor([[10.0, 5, 30, 25], [10, 5, 31, 25], [0, 40, 20, 60]])
    torch.testing.assert_close(prediction["boxes"], expected)
    assert prediction["labels"].tolist() == [0, 1, 1]
    torch.testing.assert_close(prediction["scores"], torch.tensor([0.72, 0.54, 0.45]))

    head.max_detections = 1
    assert head.predict(outputs, size)[0]["labels"].tolist() == [0]
    head.max_detections, head.score_threshold = 100, 0.5
    assert head.predict(outputs, size)[0]["labels"].tolist() == [0, 1]


def test_predictions_equal_those_of_torchvision():
    size = (64, 96)
    head = build(DetectionHead(("a", "b"), score_threshold=0.2, nms_threshold=0.5, max_detections=40, candidates=50))
    outputs = head(pyramid(size), size)
    g = torch.Generator().manual_seed(2)
    outputs.logits = torch.randn(outputs.logits.shape, generator=g)
    outputs.distances = 3 * torch.rand(outputs.distances.shape, generator=g) + 0.1
    oracle = SimpleNamespace(
        score_thresh=0.2,
        nms_thresh=0.5,
        detections_per_img=40,
        topk_candidates=50,
        box_coder=BoxLinearCoder(normalize_by_size=True),
    )
    split = {
        "cls_logits": outputs.logits.split(outputs.per_level, 1),
        "bbox_regression": outputs.distances.split(outputs.per_level, 1),
        "bbox_ctrness": outputs.centerness.unsqueeze(2).split(outputs.per_level, 1),
    }
    anchors = [list(outputs.anchors.split(outputs.per_level))] * 2
    expected = FCOS.postprocess_detections(oracle, split, anchors, [size] * 2)
    for a, b in zip(head.predict(outputs, size), expected, strict=True):
        assert len(a["boxes"]) == 40
        for key in a:
            torch.testing.assert_close(a[key], b[key])


# Masks --------------------------------------------------------------------------------------------------------------


def test_enlarging_does_not_shift_an_image_that_is_no_multiple_of_the_stride():
    """A blob in one cell keeps its centre at the middle of the cell's pixels."""
    x = torch.zeros(1, 1, 10, 14)
    x[0, 0, 4, 9] = 1
    y = enlarge(x, 4.0, (37, 53))[0, 0]
    assert y.shape == (37, 53)
    rows, columns = torch.arange(37) + 0.5, torch.arange(53) + 0.5
    assert float((y.sum(1) * rows).sum() / y.sum()) == pytest.approx(4.5 * 4, abs=1e-4)
    assert float((y.sum(0) * columns).sum() / y.sum()) == pytest.approx(9.5 * 4, abs=1e-4)


@pytest.mark.parametrize("size", [(64, 64), (37, 53)])
def test_fusing_each_level_on_its_own_grid_equals_the_fusion_of_segformer(size):
    """Reference: project, enlarge, concatenate and fuse, as in the paper; outputs and gradients agree."""
    head = build(SegmentationHead(("a", "b"))).double()
    levels = [level.double() for level in pyramid(size)]
    joined = [
        enlarge(project(levels[level]), stride / 4, levels[0].shape[-2:])
        for project, level, stride in zip(head.project, head.levels, head.strides, strict=True)
    ]
    expected = head.logits(head.fuse(torch.cat(joined, dim=1)))
    logits = head(levels, size)
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)
    weights, toward = list(head.parameters()), torch.randn_like(expected)
    for ours, papers in zip(
        torch.autograd.grad((logits * toward).sum(), weights),
        torch.autograd.grad((expected * toward).sum(), weights),
        strict=True,
    ):
        torch.testing.assert_close(ours, papers, rtol=1e-8, atol=1e-8)


def test_one_class_is_multi_label_and_exclusive_classes_have_a_background_channel():
    size = (40, 56)
    one = build(SegmentationHead(("a",)))
    assert one.multi_label
    assert one(pyramid(size), size).shape == (2, 1, 10, 14)
    two = build(SegmentationHead(("a", "b")))
    logits = two(pyramid(size), size)
    assert logits.shape == (2, 3, 10, 14)
    assert (two.predict(logits, size).sum(1) < 1).all()


def test_partly_annotated_images_give_the_gradient_of_their_annotated_classes():
    size = (32, 48)
    head = build(SegmentationHead(("lungs", "infection"), multi_label=True))
    masks = torch.full((2, 2, *size), IGNORE, dtype=torch.uint8)
    masks[0, 0], masks[1, 1] = 0, 0
    masks[0, 0, 4:20, 6:20], masks[1, 1, 10:14, 20:30] = 1, 1
    both = torch.tensor([True, True])
    logits = head(pyramid(size), size).detach().requires_grad_()
    terms = head.loss(logits, SegmentationTarget(masks, both))
    sum(terms.values()).backward()

    full = F.interpolate(logits.detach(), scale_factor=4, mode="bilinear", align_corners=False)
    x = torch.stack([full[0, 0], full[1, 1]])
    y = torch.stack([masks[0, 0], masks[1, 1]]).float()
    torch.testing.assert_close(terms["cross_entropy"], F.binary_cross_entropy_with_logits(x, y))
    p = x.sigmoid().flatten(1)
    dice = 1 - (2 * (p * y.flatten(1)).sum(1) + 1) / (p.sum(1) + y.flatten(1).sum(1) + 1)
    torch.testing.assert_close(terms["dice"], dice.mean())
    assert logits.grad[0, 0].any()
    assert logits.grad[1, 1].any()
    assert not logits.grad[0, 1].any()
    assert not logits.grad[1, 0].any()


def test_a_pixel_of_one_exclusive_class_is_negative_for_the_others():
    """Lungs annotated, infection not: a lung pixel is no infection; other pixels may be infection."""
    size = (8, 8)
    head = build(SegmentationHead(("lungs", "infection"), terms={"ce": MaskCrossEntropy()}))
    masks = torch.full((1, 2, *size), IGNORE, dtype=torch.uint8)
    masks[0, 0] = 0
    masks[0, 0, :, :4] = 1
    logits = torch.zeros(1, 3, 2, 2)
    loss = head.loss(logits, SegmentationTarget(masks, torch.tensor([True])))["ce"]
    assert float(loss) == pytest.approx((math.log(3) + math.log(3 / 2)) / 2)  # half: 1 of 3 possible; half: 2 of 3

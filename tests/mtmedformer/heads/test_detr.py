"""DETR head: matching against all permutations, losses against the formulas of the paper, boxes in pixels."""

from itertools import permutations

import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import box_convert, generalized_box_iou

from mtmedformer.batch import DetectionTarget
from mtmedformer.errors import ConfigError
from mtmedformer.heads import DETRHead
from mtmedformer.heads.detr import DETROutputs, position_encoding

SIZE = (100, 200)


def head(**options) -> DETRHead:
    torch.manual_seed(0)
    made = DETRHead(("a", "b"), num_queries=5, **options)
    made.build(16, (4, 8, 16, 32, 64))
    return made


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def shares(n: int, rng: torch.Generator) -> torch.Tensor:
    """Return random boxes inside the image: centre and size as shares of the image."""
    wh = torch.rand(n, 2, generator=rng) * 0.4 + 0.05
    return torch.cat([wh / 2 + torch.rand(n, 2, generator=rng) * (1 - wh), wh], 1)


def pixels(boxes: torch.Tensor) -> torch.Tensor:
    return box_convert(boxes, "cxcywh", "xyxy") * torch.tensor([200.0, 100, 200, 100])


def cost(logits, boxes, true, labels, query, box) -> float:
    iou = generalized_box_iou(
        box_convert(boxes[query], "cxcywh", "xyxy")[None], box_convert(true[box], "cxcywh", "xyxy")[None]
    )
    l1 = (boxes[query] - true[box]).abs().sum()
    return float(-logits[query].softmax(0)[labels[box]] + 5 * l1 - 2 * iou)


def test_matching_has_the_least_cost_of_all_permutations(rng):
    logits, boxes = torch.randn(5, 3, generator=rng), shares(5, rng)
    true, labels = shares(3, rng), torch.tensor([0, 1, 1])
    query, box = head().match(logits, boxes, true, labels)
    assert sorted(box.tolist()) == [0, 1, 2]
    total = sum(cost(logits, boxes, true, labels, q, b) for q, b in zip(query, box, strict=True))
    best = min(
        sum(cost(logits, boxes, true, labels, q, b) for b, q in enumerate(order)) for order in permutations(range(5), 3)
    )
    assert total == pytest.approx(best, abs=1e-5)


def test_losses_equal_the_formulas_of_detr(rng):
    logits, boxes = torch.randn(2, 1, 5, 3, generator=rng), torch.stack([shares(5, rng), shares(5, rng)])[:, None]
    true, labels = [shares(2, rng), torch.zeros(0, 4)], [torch.tensor([1, 0]), torch.zeros(0, dtype=torch.int64)]
    target = DetectionTarget([pixels(t) for t in true], labels, torch.tensor([True, True]))
    h = head()
    terms = h.loss(DETROutputs(logits, boxes, SIZE), target)

    query, box = h.match(logits[0, 0], boxes[0, 0], true[0], labels[0])
    wanted = torch.full((2, 5), 2)
    wanted[0, query] = labels[0][box]
    entropy = F.cross_entropy(logits[:, 0].transpose(1, 2), wanted, torch.tensor([1.0, 1.0, 0.1]))
    torch.testing.assert_close(terms["classification"], entropy, atol=1e-5, rtol=1e-5)
    p, t = boxes[0, 0, query], true[0][box]
    torch.testing.assert_close(terms["l1"], 5 * F.l1_loss(p, t, reduction="none").sum() / 2, atol=1e-5, rtol=1e-5)
    iou = torch.diag(generalized_box_iou(box_convert(p, "cxcywh", "xyxy"), box_convert(t, "cxcywh", "xyxy")))
    torch.testing.assert_close(terms["giou"], 2 * (1 - iou).sum() / 2, atol=1e-5, rtol=1e-5)


def test_losses_are_means_over_the_decoder_layers(rng):
    h, one = head(), shares(5, rng)[None, None]
    logits = torch.randn(1, 1, 5, 3, generator=rng)
    target = DetectionTarget([pixels(shares(2, rng))], [torch.tensor([1, 0])], torch.tensor([True]))
    single = h.loss(DETROutputs(logits, one, SIZE), target)
    twice = h.loss(DETROutputs(logits.repeat(1, 2, 1, 1), one.repeat(1, 2, 1, 1), SIZE), target)
    for name in single:
        torch.testing.assert_close(single[name], twice[name])


def test_order_of_the_boxes_does_not_matter(rng):
    logits, boxes = torch.randn(1, 2, 5, 3, generator=rng), shares(10, rng).view(1, 2, 5, 4)
    true, labels = pixels(shares(4, rng)), torch.tensor([0, 1, 1, 0])
    outputs, order = DETROutputs(logits, boxes, SIZE), torch.tensor([3, 1, 0, 2])
    a = head().loss(outputs, DetectionTarget([true], [labels], torch.tensor([True])))
    b = head().loss(outputs, DetectionTarget([true[order]], [labels[order]], torch.tensor([True])))
    for name in a:
        torch.testing.assert_close(a[name], b[name])


def test_losses_are_finite_with_more_boxes_than_queries(rng):
    outputs = DETROutputs(torch.randn(1, 1, 5, 3, generator=rng), shares(5, rng)[None, None], SIZE)
    target = DetectionTarget([pixels(shares(9, rng))], [torch.zeros(9, dtype=torch.int64)], torch.tensor([True]))
    assert all(torch.isfinite(t) for t in head().loss(outputs, target).values())


def test_predictions_are_the_boxes_of_the_last_layer_in_pixels():
    logits = torch.full((1, 2, 5, 3), -9.0)
    logits[..., 2] = 9.0  # no object, except for one query of the last layer
    logits[0, 1, 3] = torch.tensor([-9.0, 9.0, -9.0])
    boxes = torch.full((1, 2, 5, 4), 0.1)
    boxes[0, 1, 3] = torch.tensor([0.5, 0.5, 0.2, 0.4])
    (prediction,) = head().predict(DETROutputs(logits, boxes, SIZE), SIZE)
    torch.testing.assert_close(prediction["boxes"], torch.tensor([[80.0, 30.0, 120.0, 70.0]]))
    assert prediction["labels"].tolist() == [1]
    assert prediction["scores"].item() > 0.99


def test_position_codes_are_distinct_and_depend_on_the_place_in_the_image_not_on_the_grid():
    codes = position_encoding(16, torch.zeros(1, 16, 7, 13), 16, (100, 200))
    assert codes.shape == (91, 16)
    assert torch.cdist(codes, codes).fill_diagonal_(1).min() > 1e-2
    # The same share of the image has the same code at twice the resolution.
    twice = position_encoding(16, torch.zeros(1, 16, 7, 13), 32, (200, 400))
    torch.testing.assert_close(codes, twice)


def test_a_width_that_the_attention_heads_do_not_divide_is_an_error():
    with pytest.raises(ConfigError, match="must be a multiple of 4 and of num_heads: 3"):
        head(num_heads=3)


def test_boxes_depend_on_the_position_of_the_features():
    """Attention without position codes does not depend on the order of the tokens."""
    h, g = head().eval(), torch.Generator().manual_seed(1)
    features = [torch.randn(1, 16, -(-64 // s), -(-128 // s), generator=g) for s in (4, 8, 16, 32, 64)]
    straight, mirrored = h(features, (64, 128)), h([f.flip(3) for f in features], (64, 128))
    assert (straight.boxes - mirrored.boxes).abs().max() > 1e-3

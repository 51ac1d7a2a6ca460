"""Task losses against the libraries they follow on fully labelled data, and against the labelled part on the rest."""

from types import SimpleNamespace

import pytest
import segmentation_models_pytorch.losses as smp
import torch
import torch.nn.functional as F
from monai.losses import BoundaryLoss, DiceLoss, TverskyLoss
from segmentation_models_pytorch.losses._functional import softmax_focal_loss_with_logits
from segmentation_models_pytorch.losses.lovasz import _lovasz_softmax
from timm.loss import AsymmetricLossMultiLabel
from timm.loss import BinaryCrossEntropy as TimmBCE
from torchvision.models.detection.fcos import FCOS, FCOSHead
from torchvision.ops import complete_box_iou_loss, distance_box_iou_loss, sigmoid_focal_loss

from mtmedformer.errors import ConfigError, DataError
from mtmedformer.losses import (
    Asymmetric,
    BinaryCrossEntropy,
    BinaryFocal,
    Boundary,
    CIoU,
    CrossEntropy,
    Dice,
    DIoU,
    GIoU,
    Lovasz,
    MaskCrossEntropy,
    MaskFocal,
    Tversky,
)
from mtmedformer.losses.detection import centerness, decode_boxes, fcos_loss, grow_boxes, match_boxes

NAN = float("nan")


def close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(torch.as_tensor(actual), torch.as_tensor(expected), atol=tolerance, rtol=tolerance)


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(3)


# Classes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 0.5, 3.0]])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_cross_entropy_is_torchs(rng, weights, smoothing):
    logits, index = torch.randn(9, 4, generator=rng), torch.randint(4, (9,), generator=rng)
    loss = CrossEntropy(class_weights=weights, label_smoothing=smoothing)(logits, F.one_hot(index, 4).float())
    w = None if weights is None else torch.tensor(weights)
    close(loss, F.cross_entropy(logits, index, w, label_smoothing=smoothing))


def test_softmax_focal_loss_is_smps(rng):
    logits, index = torch.randn(9, 4, generator=rng), torch.randint(4, (9,), generator=rng)
    loss = CrossEntropy(gamma=1.5)(logits, F.one_hot(index, 4).float())
    close(loss, softmax_focal_loss_with_logits(logits, index, gamma=1.5))


def test_cross_entropy_of_a_partly_known_row_is_over_the_possible_classes():
    logits = torch.tensor([[0.3, -1.0, 2.0], [5.0, 5.0, 5.0]], requires_grad=True)
    labels = torch.tensor([[0.0, NAN, NAN], [NAN, NAN, NAN]])
    p = logits[0].softmax(0)
    loss = CrossEntropy()(logits, labels)
    close(loss, -(p[1] + p[2]).log())
    loss.backward()
    assert not logits.grad[1].any()


def test_exclusive_labels_without_a_class_are_an_error():
    with pytest.raises(DataError, match="exactly one class must be 1"):
        CrossEntropy()(torch.zeros(1, 2), torch.zeros(1, 2))


@pytest.mark.parametrize(
    "term, oracle",
    [
        (BinaryCrossEntropy(), F.binary_cross_entropy_with_logits),
        (
            BinaryCrossEntropy(pos_weight=[1.0, 2.0, 4.0]),
            torch.nn.BCEWithLogitsLoss(pos_weight=torch.tensor([1.0, 2.0, 4.0])),
        ),
        (BinaryCrossEntropy(label_smoothing=0.1), TimmBCE(smoothing=0.1, smooth_dense=True)),
        (BinaryFocal(gamma=2.0, alpha=0.25), lambda x, y: sigmoid_focal_loss(x, y, 0.25, 2.0, "mean")),
        (BinaryFocal(), lambda x, y: sigmoid_focal_loss(x, y, -1, 2.0, "mean")),
        (Asymmetric(), AsymmetricLossMultiLabel(reduction="mean")),
    ],
    ids=["bce", "pos_weight", "smoothing", "focal", "focal-no-alpha", "asymmetric"],
)
def test_multi_label_terms_are_the_libraries_and_skip_the_unknown(rng, term, oracle):
    logits = torch.randn(8, 3, generator=rng)
    labels = (torch.rand(8, 3, generator=rng) > 0.5).float()
    close(term(logits, labels), oracle(logits, labels))

    # A fully known class set beside unknown labels: only the known ones count.
    labels[4:] = NAN
    x = logits.clone().requires_grad_()
    loss = term(x, labels)
    close(loss, oracle(logits[:4], labels[:4]))
    loss.backward()
    assert not x.grad[4:].any()

    # Element by element too.
    labels = torch.tensor([[1.0, NAN, NAN], [NAN, NAN, NAN]])
    x = logits[:2].clone().requires_grad_()
    term(x, labels).backward()
    assert (x.grad != 0).tolist() == [[True, False, False], [False, False, False]]


def test_terms_that_do_not_fit_a_task_are_refused():
    with pytest.raises(ConfigError, match="BinaryCrossEntropy is for multi_label: true"):
        BinaryCrossEntropy().check(3, multi_label=False)
    with pytest.raises(ConfigError, match="2 class weights for 3 classes"):
        CrossEntropy(class_weights=[1.0, 2.0]).check(3, multi_label=False)


def test_class_weights_are_not_in_checkpoints():
    assert not CrossEntropy(class_weights=[1.0, 2.0]).state_dict()
    assert not MaskCrossEntropy(pos_weight=[1.0, 2.0]).state_dict()


# Masks --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def sigmoid_masks(rng):
    logits, target = torch.randn(3, 2, 12, 10, generator=rng), torch.rand(3, 2, 12, 10, generator=rng) > 0.6
    target[1, 0] = False  # annotated and empty
    return logits, target, torch.ones_like(target)


@pytest.fixture
def softmax_masks(rng):
    """Logits with background first, one-hot foreground and the same truth as an index map."""
    logits, index = torch.randn(3, 3, 12, 10, generator=rng), torch.randint(3, (3, 12, 10), generator=rng)
    target = F.one_hot(index, 3).permute(0, 3, 1, 2)[:, 1:].bool()
    return logits, target, torch.ones_like(target), index


def test_binary_mask_terms_are_the_libraries(sigmoid_masks):
    logits, target, valid = sigmoid_masks
    y = target.float()
    close(MaskCrossEntropy()(logits, target, valid), smp.SoftBCEWithLogitsLoss()(logits, y))
    w = torch.tensor([1.0, 3.0])
    expected = F.binary_cross_entropy_with_logits(logits, y, pos_weight=w.view(2, 1, 1))
    close(MaskCrossEntropy(pos_weight=w.tolist())(logits, target, valid), expected)
    close(
        MaskFocal(gamma=2.0, alpha=0.25)(logits, target, valid),
        smp.FocalLoss("multilabel", alpha=0.25, gamma=2.0)(logits, y),
    )


@pytest.mark.parametrize("batch", [False, True])
def test_overlap_terms_are_monais(sigmoid_masks, batch):
    logits, target, valid = sigmoid_masks
    y = target.float()
    oracle = DiceLoss(sigmoid=True, smooth_nr=1.0, smooth_dr=1.0, batch=batch)
    close(Dice(batch=batch)(logits, target, valid), oracle(logits, y))
    oracle = TverskyLoss(sigmoid=True, alpha=0.3, beta=0.7, smooth_nr=1.0, smooth_dr=1.0, batch=batch)
    close(Tversky(batch=batch)(logits, target, valid), oracle(logits, y))
    close(Tversky(alpha=0.5, beta=0.5, smooth=0.5)(logits, target, valid), Dice()(logits, target, valid))


def test_overlap_terms_pooled_over_the_batch_are_smps(sigmoid_masks):
    logits, target, valid = sigmoid_masks
    logits, target, valid = logits[:, :1], target[:, :1], valid[:, :1]
    y = target.float()
    # smp adds the smoothing to tp / (tp + (fp + fn) / 2), half of Dice's numerator and denominator.
    close(Dice(smooth=1.0, batch=True)(logits, target, valid), smp.DiceLoss("multilabel", smooth=0.5)(logits, y))
    oracle = smp.TverskyLoss("multilabel", alpha=0.3, beta=0.7, gamma=0.75, smooth=1.0)
    close(Tversky(gamma=0.75, batch=True)(logits, target, valid), oracle(logits, y))


def test_softmax_mask_terms_are_the_libraries(softmax_masks):
    logits, target, valid, index = softmax_masks
    close(MaskCrossEntropy()(logits, target, valid), F.cross_entropy(logits, index))
    w = torch.tensor([1.0, 2.0, 5.0])
    close(MaskCrossEntropy(pos_weight=[2.0, 5.0])(logits, target, valid), F.cross_entropy(logits, index, w))
    close(MaskFocal(gamma=2.0)(logits, target, valid), softmax_focal_loss_with_logits(logits, index, gamma=2.0))
    one_hot = F.one_hot(index, 3).permute(0, 3, 1, 2).float()
    oracle = DiceLoss(softmax=True, include_background=False, smooth_nr=1.0, smooth_dr=1.0)
    close(Dice()(logits, target, valid), oracle(logits, one_hot))
    close(Boundary()(logits, target, valid), BoundaryLoss(softmax=True, include_background=False)(logits, one_hot))


def test_lovasz_is_smps(sigmoid_masks, softmax_masks):
    logits, target, valid = sigmoid_masks
    oracle = smp.LovaszLoss("multilabel", per_image=True)
    expected = torch.stack([oracle(logits[:, k], target[:, k].float()) for k in range(2)]).mean()
    close(Lovasz()(logits, target, valid), expected)

    logits, target, valid, index = softmax_masks
    expected = _lovasz_softmax(logits.softmax(1), index, classes=[1, 2], per_image=True)
    close(Lovasz()(logits, target, valid), expected)


def test_boundary_is_monais(sigmoid_masks):
    logits, target, valid = sigmoid_masks
    close(Boundary()(logits, target, valid), BoundaryLoss(sigmoid=True)(logits, target.float()))


MASK_TERMS = [MaskCrossEntropy(), MaskFocal(), Dice(), Dice(batch=True), Tversky(gamma=0.75), Lovasz(), Boundary()]
MASK_IDS = ["bce", "focal", "dice", "dice-batch", "focal-tversky", "lovasz", "boundary"]


@pytest.mark.parametrize("term", MASK_TERMS, ids=MASK_IDS)
def test_channels_annotated_in_different_images_train_independently(rng, term):
    """Image 1 has lungs annotated, image 2 infection: nothing else may be read, nor divided by."""
    target = torch.rand(2, 2, 12, 10, generator=rng) > 0.6
    logits = torch.randn(2, 2, 12, 10, generator=rng, requires_grad=True)
    valid = torch.zeros_like(target)
    valid[0, 0], valid[1, 1] = True, True
    loss = term(logits, target, valid)

    lungs = logits.detach()[:1, :1].requires_grad_()
    infection = logits.detach()[1:, 1:].requires_grad_()
    parts = [term(x, t, torch.ones_like(t)) for x, t in ((lungs, target[:1, :1]), (infection, target[1:, 1:]))]
    expected = (parts[0] + parts[1]) / 2  # equally many annotated pixels each
    close(loss, expected, 1e-6)
    loss.backward()
    expected.backward()
    close(logits.grad[0, 0], lungs.grad[0, 0], 1e-6)
    close(logits.grad[1, 1], infection.grad[0, 0], 1e-6)
    assert not logits.grad[0, 1].any()
    assert not logits.grad[1, 0].any()


@pytest.mark.parametrize("term", [t for t in MASK_TERMS if not isinstance(t, Boundary)], ids=MASK_IDS[:-1])
@pytest.mark.parametrize("extra", [0, 1], ids=["sigmoid", "softmax"])
def test_pixels_that_are_not_annotated_do_not_change_the_loss(rng, term, extra):
    """A half-annotated image costs what its annotated half costs alone."""
    logits = torch.randn(2, 2 + extra, 12, 10, generator=rng)
    target = F.one_hot(torch.randint(3, (2, 12, 10), generator=rng), 3).permute(0, 3, 1, 2)[:, 1:].bool()
    valid = torch.ones_like(target)
    valid[..., 6:] = False
    target &= valid
    close(term(logits, target, valid), term(logits[..., :6], target[..., :6], valid[..., :6]), 1e-6)


def test_smp_would_divide_by_pixels_that_are_not_annotated(sigmoid_masks):
    """Why the masking is ours: the mean of the annotated half is the reference, smp gives half of it."""
    logits, target, valid = sigmoid_masks
    valid[..., 5:] = False
    y = target.float().masked_fill(~valid, 255.0)
    expected = F.binary_cross_entropy_with_logits(logits[valid], y[valid])
    close(MaskCrossEntropy()(logits, target, valid), expected)
    close(smp.SoftBCEWithLogitsLoss(ignore_index=255)(logits, y), expected / 2)


def test_a_pixel_with_one_class_excluded_has_the_loss_of_the_other_classes():
    logits = torch.tensor([0.5, 1.0, -0.3]).view(1, 3, 1, 1)  # background, lung, infection
    target = torch.tensor([False, False]).view(1, 2, 1, 1)
    valid = torch.tensor([True, False]).view(1, 2, 1, 1)  # not lung; infection unknown
    p = logits.flatten().softmax(0)
    close(MaskCrossEntropy()(logits, target, valid), -(p[0] + p[2]).log())


@pytest.mark.parametrize("extra", [0, 1], ids=["sigmoid", "softmax"])
@pytest.mark.parametrize("fill", ["empty", "full", "unknown"])
@pytest.mark.parametrize("term", MASK_TERMS, ids=MASK_IDS)
def test_empty_full_and_unknown_masks_stay_finite(rng, term, fill, extra):
    logits = (20 * torch.randn(2, 1 + extra, 8, 8, generator=rng)).requires_grad_()
    target = torch.full((2, 1, 8, 8), fill == "full")
    valid = torch.full_like(target, fill != "unknown")
    loss = term(logits, target, valid)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(logits.grad).all()
    if fill == "unknown":
        assert loss == 0
        assert not logits.grad.any()


def test_an_empty_mask_gives_dice_a_gradient_towards_zero():
    logits = torch.zeros(1, 1, 8, 8, requires_grad=True)
    target, valid = torch.zeros(1, 1, 8, 8, dtype=torch.bool), torch.ones(1, 1, 8, 8, dtype=torch.bool)
    loss = Dice()(logits, target, valid)
    close(loss, 1 - 1 / (32 + 1))
    loss.backward()
    assert (logits.grad > 0).all()
    assert Dice()(torch.full((1, 1, 8, 8), -20.0), target, valid) < 1e-5


# Boxes --------------------------------------------------------------------------------------------------------------

STRIDES, SIZE = (4, 8, 16, 32, 64), (192, 256)


def grid() -> tuple[torch.Tensor, list[int]]:
    anchors, per_level = [], []
    for s in STRIDES:
        h, w = -(-SIZE[0] // s), -(-SIZE[1] // s)
        y, x = torch.meshgrid(torch.arange(h) * s, torch.arange(w) * s, indexing="ij")
        corner = torch.stack([x, y], -1).reshape(-1, 2).float()
        anchors.append(torch.cat([corner, corner + s], 1))
        per_level.append(h * w)
    return torch.cat(anchors), per_level


def random_boxes(n: int, rng: torch.Generator, low=12.0, high=180.0, aspect=2.0) -> torch.Tensor:
    side = low * (high / low) ** torch.rand(n, generator=rng)
    ratio = aspect ** torch.empty(n).uniform_(-1, 1, generator=rng)
    wh = torch.stack([side * ratio.sqrt(), side / ratio.sqrt()], 1)
    centre = torch.rand(n, 2, generator=rng) * torch.tensor([SIZE[1], SIZE[0]])
    boxes = torch.cat([centre - wh / 2, centre + wh / 2], 1)
    return boxes.clamp(torch.zeros(4), torch.tensor([*SIZE[::-1], *SIZE[::-1]]).float())


def usable(boxes: torch.Tensor) -> torch.Tensor:
    wh = boxes[:, 2:] - boxes[:, :2]
    return boxes[(wh.amin(1) > 8) & (wh.amax(1) / wh.amin(1) < 2.5)]


def test_fcos_loss_is_torchvisions(rng):
    """Losses and gradients of torchvision's own FCOS on the same outputs and truth, an empty image included."""
    anchors, per_level = grid()
    boxes = [usable(random_boxes(6, rng)), torch.zeros(0, 4), usable(random_boxes(2, rng))]
    labels = [torch.randint(3, (len(b),), generator=rng) for b in boxes]
    assert sum(len(b) for b in boxes) >= 4
    logits, distances, central = (torch.randn(3, len(anchors), c, generator=rng) for c in (3, 4, 1))
    distances = distances.abs() * 4

    inputs = [x.clone().requires_grad_() for x in (logits, distances, central)]
    head = FCOSHead(32, 1, 3, 1)
    fcos = SimpleNamespace(center_sampling_radius=1.5, head=head)
    truth = [{"boxes": b, "labels": k} for b, k in zip(boxes, labels, strict=True)]
    outputs = dict(zip(("cls_logits", "bbox_regression", "bbox_ctrness"), inputs, strict=True))
    expected = FCOS.compute_loss(fcos, truth, outputs, [anchors] * 3, per_level)
    sum(expected.values()).backward()

    ours = [x.clone().requires_grad_() for x in (logits, distances, central)]
    losses = fcos_loss(ours[0], ours[1], ours[2].squeeze(2), anchors, per_level, boxes, labels, GIoU())
    sum(losses.values()).backward()

    close(losses["classification"], expected["classification"])
    close(losses["box"], expected["bbox_regression"])
    close(losses["centerness"], expected["bbox_ctrness"])
    for a, b in zip(ours, inputs, strict=True):
        close(a.grad, b.grad, 1e-6)


def test_every_level_gets_the_boxes_of_its_size():
    anchors, per_level = grid()
    centre = torch.tensor([130.0, 98.0])
    for level, half in enumerate((20.0, 36.0, 72.0)):  # as seen near the centre: < 32, < 64, < 128
        box = torch.cat([centre - half, centre + half])[None]
        index = match_boxes(box, anchors, per_level)
        assert [bool((part == 0).any()) for part in index.split(per_level)] == [i == level for i in range(5)]


def test_a_location_in_two_boxes_is_assigned_to_the_smaller_one():
    anchors, per_level = grid()
    boxes = torch.tensor([[60.0, 60, 100, 100], [70.0, 70, 90, 90]])
    index = match_boxes(boxes, anchors, per_level)
    inside = ((anchors[:, :2] + 2 > 74) & (anchors[:, :2] + 2 < 86)).all(1)
    inside[per_level[0] :] = False
    assert inside.any()
    assert (index[inside] == 1).all()


def test_small_and_thin_boxes_have_a_foreground_location(rng):
    anchors, per_level = grid()
    shapes = random_boxes(300, rng, low=0.5, high=240, aspect=30.0)
    shapes = shapes[(shapes[:, 2:] - shapes[:, :2]).amin(1) > 0.1]
    assert len(shapes) > 200
    for box in grow_boxes(shapes, 5.0).split(1):
        index = match_boxes(box, anchors, per_level)
        assert (index == 0).any(), box
        sides = centerness(box.expand((index == 0).sum(), -1), anchors[index == 0])
        assert ((sides > 0) & (sides <= 1)).all()


def test_grow_boxes_keeps_centres_and_large_boxes():
    boxes = torch.tensor([[10.0, 10, 11, 40], [0.0, 0, 8, 8]])
    close(grow_boxes(boxes, 5.0), torch.tensor([[8.0, 10, 13, 40], [0.0, 0, 8, 8]]))


def test_decoding_inverts_the_distances(rng):
    anchors, per_level = grid()
    box = torch.tensor([[33.0, 21.0, 77.0, 90.0]])
    index = match_boxes(box, anchors, per_level)
    stride = anchors[:, 2:3] - anchors[:, :1]
    centre = (anchors[:, :2] + anchors[:, 2:]) / 2
    distances = torch.cat([centre - box[:, :2], box[:, 2:] - centre], 1) / stride
    close(decode_boxes(distances, anchors)[index == 0], box.expand((index == 0).sum(), -1))


@pytest.mark.parametrize("loss, oracle", [(CIoU(), complete_box_iou_loss), (DIoU(), distance_box_iou_loss)])
def test_box_losses_are_torchvisions_and_survive_empty_boxes(rng, loss, oracle):
    predicted, true = usable(random_boxes(40, rng)), usable(random_boxes(40, rng))
    n = min(len(predicted), len(true))
    close(loss(predicted[:n], true[:n]), oracle(predicted[:n], true[:n]))
    point = torch.tensor([[1000.0, 2000.0, 1000.0, 2000.0]], requires_grad=True)
    value = loss(point, torch.tensor([[900.0, 1900.0, 1100.0, 2100.0]]))
    value.sum().backward()
    assert torch.isfinite(value).all()
    assert torch.isfinite(point.grad).all()
    assert loss(point[:0], point[:0]).shape == (0,)

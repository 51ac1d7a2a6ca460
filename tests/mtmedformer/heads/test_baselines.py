"""Networks of other libraries as heads: training, predictions in pixels, images without labels."""

import pytest
import torch

from mtmedformer import MultiTaskModule, SharedEncoder
from mtmedformer.batch import DetectionTarget, SegmentationTarget
from mtmedformer.errors import ConfigError
from mtmedformer.heads.baselines import LibraryDetection, LibrarySegmentation, NoEncoder

SIZE = (70, 90)


def masks(n=4):
    truth = torch.zeros(n, 1, *SIZE, dtype=torch.uint8)
    truth[:, :, 20:50, 30:60] = 1
    return truth.float() + 0.05 * torch.randn(n, 1, *SIZE), SegmentationTarget(truth, torch.ones(n, dtype=torch.bool))


def boxes(n=4):
    image, target = masks(n)
    box = torch.tensor([[30.0, 20, 60, 50]])
    return image, DetectionTarget([box] * n, [torch.zeros(1, dtype=torch.long)] * n, target.present)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("architecture", ["unet", "fpn"])
def test_library_segmentation_trains_on_images_of_any_size(architecture):
    module = MultiTaskModule(NoEncoder(), {"m": LibrarySegmentation(["x"], architecture=architecture)})
    image, target = masks()
    optimizer = torch.optim.Adam(module.parameters(), 1e-2)
    losses = []
    for _ in range(6):
        losses.append(sum(module.heads["m"].loss(module(image)["m"], target).values()))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]
    assert module.eval().predict(image)["m"].shape == (4, 1, *SIZE)


@pytest.fixture(scope="module")
def detector():
    torch.manual_seed(0)
    return MultiTaskModule(NoEncoder(), {"b": LibraryDetection(["x"])})


def test_library_detection_returns_losses_in_both_modes_and_boxes_within_the_image(detector):
    image, target = boxes(2)
    head = detector.train().heads["b"]
    losses = head.loss(detector(image)["b"], target)
    assert {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"} == set(losses)
    sum(losses.values()).backward()
    assert any(p.grad is not None and p.grad.any() for p in head.parameters())
    detector.eval()
    with torch.no_grad():
        assert set(head.loss(detector(image)["b"], target)) == set(losses), "validation logs losses too"
        predictions = detector.predict(image)["b"]
    assert not any(m.training for m in head.modules())
    for one in predictions:
        assert (one["labels"] == 0).all()
        assert (one["boxes"][:, 2] <= SIZE[1]).all()
        assert (one["boxes"][:, 3] <= SIZE[0]).all()
        assert one["scores"].diff().le(0).all()


def test_an_unlabelled_image_does_not_change_the_loss(detector):
    image, target = boxes(2)
    head = detector.eval().heads["b"]
    target.present[1] = False
    alone = DetectionTarget(target.boxes[:1], target.labels[:1], target.present[:1])
    torch.manual_seed(1)
    both = head.loss(image.expand(-1, 3, -1, -1), target)
    torch.manual_seed(1)
    first = head.loss(image[:1].expand(-1, 3, -1, -1), alone)
    for name, value in first.items():
        torch.testing.assert_close(both[name], value)
    target.present[0] = False
    nothing = sum(head.loss(image.expand(-1, 3, -1, -1), target).values())
    assert nothing == 0
    assert nothing.requires_grad


def test_loss_is_finite_without_boxes_and_with_a_box_without_area(detector):
    image, target = boxes(2)
    target.boxes[0] = torch.zeros(0, 4)
    target.labels[0] = torch.zeros(0, dtype=torch.long)
    target.boxes[1] = torch.tensor([[5.0, 5, 5, 9], [30, 20, 60, 50]])
    target.labels[1] = torch.zeros(2, dtype=torch.long)
    assert torch.isfinite(sum(detector.train().heads["b"].loss(image.expand(-1, 3, -1, -1), target).values()))


def test_loss_of_a_batch_without_boxes_is_finite_if_the_first_stage_proposes_nothing(detector):
    image, target = boxes(2)
    target.boxes, target.labels = [torch.zeros(0, 4)] * 2, [torch.zeros(0, dtype=torch.long)] * 2
    head = detector.train().heads["b"]
    rpn = head.network.rpn
    torch.nn.init.constant_(rpn.head.cls_logits.bias, -9.0)
    threshold = rpn.score_thresh
    assert torch.isfinite(sum(head.loss(image.expand(-1, 3, -1, -1), target).values()))
    assert rpn.score_thresh == threshold > 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MultiTaskModule(NoEncoder(), {"m": LibrarySegmentation(["x"], architecture="unnet")}), "unnet"),
        (lambda: MultiTaskModule(NoEncoder(), {"b": LibraryDetection(["x"], architecture="yolo")}), "yolo"),
        (
            lambda: MultiTaskModule(SharedEncoder("mtmedformer_tiny", channels=16), {"b": LibraryDetection(["x"])}),
            "NoEncoder",
        ),
    ],
)
def test_unknown_networks_and_a_shared_encoder_are_errors(make, message):
    with pytest.raises(ConfigError, match=message):
        make()

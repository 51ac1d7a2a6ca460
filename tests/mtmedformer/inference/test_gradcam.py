"""Maps lie where the evidence is: in layers whose answer is known, and on lesions that a small model learnt to find."""

import pytest
import torch
from torch import nn

from mtmedformer import (
    ClassificationHead,
    ConfigError,
    DetectionHead,
    DETRHead,
    MultiTaskModule,
    SegmentationHead,
    SharedEncoder,
)
from mtmedformer.batch import Batch, ClassificationTarget, DetectionTarget, Meta
from mtmedformer.heads.base import TaskHead
from mtmedformer.heads.baselines import LibraryDetection, NoEncoder
from mtmedformer.inference.gradcam import attention_map, grad_cam

SIZE = 64


class Sum(TaskHead):
    """A head whose class score is a known weight times the stride-8 level, summed over places."""

    kind = "classification"

    def build(self, channels, strides):
        self.weight = nn.Parameter(torch.linspace(-1, 1, channels))

    def forward(self, pyramid, size):
        return (pyramid[1] * self.weight[:, None, None]).sum((1, 2, 3))

    def loss(self, outputs, target):
        return {"sum": outputs.mean()}

    def predict(self, outputs, size):
        return outputs.sigmoid()[:, None]

    def class_score(self, outputs, label):
        return outputs if label == 0 else -outputs

    def metrics(self):
        return ClassificationHead(["a", "b"]).metrics()


def model(**heads):
    torch.manual_seed(0)
    return MultiTaskModule(SharedEncoder("mtmedformer_tiny", channels=16), heads).eval()


def test_grad_cam_is_gradient_times_activation():
    module = model(sum=Sum(["a", "b"]))
    image = torch.rand(2, 1, SIZE, SIZE)
    for label, sign in ((0, 1), (1, -1)):
        found = grad_cam(module, image, "sum", label)
        with torch.no_grad():
            level = module.encoder(image)[1]
        share = (sign * level * module.heads["sum"].weight[:, None, None]).sum(1, keepdim=True)
        expected = nn.functional.interpolate(share, scale_factor=8, mode="bilinear")[:, 0].relu()
        torch.testing.assert_close(found, (expected / expected.amax((1, 2), keepdim=True)).detach())


@pytest.mark.parametrize("size", [(SIZE, SIZE), (50, 70)])
def test_maps_of_every_head_lie_in_the_inputs_frame_and_in_the_unit_interval(size):
    module = model(
        classes=ClassificationHead(["a", "b"]),
        boxes=DetectionHead(["a", "b"]),
        queries=DETRHead(["a", "b"]),
        mask=SegmentationHead(["a"]),
        masks=SegmentationHead(["a", "b"]),
    )
    image = torch.rand(3, 1, *size)
    with torch.inference_mode():  # as ``predict`` runs
        outputs = module(image)
        for name, head in module.heads.items():
            for label in range(len(head.classes)):
                found = grad_cam(module, image, name, label)
                assert found.shape == (3, *size), name
                assert 0 <= float(found.min()) <= float(found.max()) <= 1
                strongest = found.flatten(1).amax(1)
                assert ((strongest - 1).abs() < 1e-5).logical_or(strongest == 0).all(), name
        attention = attention_map(module.heads["classes"], outputs["classes"], size)
        assert attention.shape == (3, *size)
        assert torch.equal(attention.flatten(1).amax(1), torch.ones(3))
        assert attention_map(module.heads["boxes"], outputs["boxes"], size) is None
    assert all(p.grad is None for p in module.parameters())


def test_the_map_of_an_image_does_not_depend_on_the_batch():
    module = model(boxes=DetectionHead(["a"]), classes=ClassificationHead(["a", "b"]))
    image = torch.rand(3, 1, SIZE, SIZE)
    for name in module.heads:
        together = grad_cam(module, image, name, 0)
        torch.testing.assert_close(together[1:2], grad_cam(module, image[1:2], name, 0), rtol=1e-3, atol=1e-4)


def test_attention_is_that_of_the_pool():
    head = ClassificationHead(["a", "b"], strides=(8,))
    head.build(8, (4, 8, 16, 32, 64))
    outputs = head([torch.randn(1, 8, n, n) for n in (16, 8, 4, 2, 1)], (SIZE, SIZE))
    outputs.attention = torch.zeros(1, 8, 8)
    outputs.attention[0, 2, 5] = 1
    found = attention_map(head, outputs, (SIZE, SIZE))
    y, x = divmod(int(found[0].argmax()), SIZE)
    assert (y // 8, x // 8) == (2, 5)
    assert found[0, 40:, :].sum() == 0


def lesions(n, seed):
    """Images of noise, each with a bright square and its box."""
    generator = torch.Generator().manual_seed(seed)
    image, boxes = 0.3 * torch.rand(n, 1, SIZE, SIZE, generator=generator), []
    for i in range(n):
        y, x = torch.randint(4, SIZE - 16, (2,), generator=generator).tolist()
        image[i, :, y : y + 12, x : x + 12] += 0.6 * (i % 2)
        boxes.append(torch.tensor([[x, y, x + 12.0, y + 12.0]]) if i % 2 else torch.zeros(0, 4))
    sick = torch.arange(n) % 2
    present = torch.ones(n, dtype=torch.bool)
    targets = {
        "health": ClassificationTarget(torch.eye(2)[sick], present),
        "nodules": DetectionTarget(boxes, [torch.zeros(len(b), dtype=torch.int64) for b in boxes], present),
    }
    return Batch(image, targets, [Meta(f"im{i}", f"p{i}") for i in range(n)])


def test_maps_of_a_trained_model_peak_in_planted_lesions_far_more_often_than_chance():
    module = model(health=ClassificationHead(["well", "sick"]), nodules=DetectionHead(["nodule"])).train()
    optimizer = torch.optim.AdamW(module.parameters(), lr=2e-3)
    for step in range(60):
        batch = lesions(16, step)
        losses, _, present = module.task_losses(module(batch.image), batch.targets)
        optimizer.zero_grad()
        module.loss(losses, present).backward()
        optimizer.step()
    module.eval()
    test = lesions(48, 1000)
    sick = [i for i in range(48) if i % 2]
    with torch.no_grad():
        outputs = module(test.image)
    maps = {
        "attention": attention_map(module.heads["health"], outputs["health"], (SIZE, SIZE)),
        "nodules": grad_cam(module, test.image, "nodules", 0),
    }  # Grad-CAM of a class depends on the weights it starts from, and is no proof of anything: docs/calibration.md
    chance = 12 * 12 / SIZE**2
    for name, found in maps.items():
        inside = []
        for i in sick:
            x0, y0, x1, y1 = test.targets["nodules"].boxes[i][0].tolist()
            y, x = divmod(int(found[i].argmax()), SIZE)
            inside.append(x0 <= x < x1 and y0 <= y < y1)
        assert sum(inside) / len(inside) > 5 * chance, (name, sum(inside), len(inside))


def test_an_unknown_task_is_an_error_that_lists_the_heads():
    with pytest.raises(ConfigError, match="boxes"):
        grad_cam(model(boxes=DetectionHead(["a"])), torch.rand(1, 1, SIZE, SIZE), "box", 0)


def test_a_head_without_a_class_score_is_an_error_that_names_the_method():
    module = MultiTaskModule(NoEncoder(), {"boxes": LibraryDetection(["a"])}).eval()
    with pytest.raises(ConfigError, match="LibraryDetection has no class score; implement its method class_score"):
        grad_cam(module, torch.rand(1, 1, SIZE, SIZE), "boxes", 0)

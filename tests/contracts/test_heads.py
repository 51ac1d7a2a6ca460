"""Contract of the task heads: the same tests for every head and each of its modes."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mtmedformer.batch import (
    IGNORE,
    ClassificationTarget,
    DetectionTarget,
    RegressionTarget,
    SegmentationTarget,
    Target,
)
from mtmedformer.heads import (
    CaseHead,
    ClassificationHead,
    DetectionHead,
    DETRHead,
    OrdinalHead,
    RegressionHead,
    SegmentationHead,
    TaskHead,
)
from mtmedformer.heads.capabilities import AttentionPooling, Calibratable, Explainable, Exportable
from mtmedformer.losses import (
    AbsoluteError,
    Asymmetric,
    BinaryCrossEntropy,
    BinaryFocal,
    Boundary,
    CIoU,
    Coral,
    CrossEntropy,
    CumulativeLink,
    Dice,
    Lovasz,
    MaskCrossEntropy,
    MaskFocal,
    SquaredError,
    Tversky,
)

STRIDES = (4, 8, 16, 32, 64)
CHANNELS = 32
SIZE = (40, 56)
AB, ABC = ("a", "b"), ("a", "b", "c")


@dataclass(frozen=True)
class Case:
    head: Callable[[], TaskHead]
    target: Callable[[int, tuple[int, int]], Target]
    steps: int = 60
    lr: float = 1e-2


def one_hot(n: int, size: tuple[int, int]) -> ClassificationTarget:
    return ClassificationTarget(torch.eye(3)[torch.arange(n) % 3], torch.ones(n, dtype=torch.bool))


def multi_hot(n: int, size: tuple[int, int]) -> ClassificationTarget:
    labels = torch.tensor([[1, 0, 1], [0, 1, torch.nan], [1, 1, 0], [0, 0, 0]]).repeat(n, 1)[:n]
    return ClassificationTarget(labels, torch.ones(n, dtype=torch.bool))


def ages(n: int, size: tuple[int, int]) -> RegressionTarget:
    return RegressionTarget(torch.tensor([20.0, 90.0, 45.0, 61.0]).repeat(n)[:n], torch.ones(n, dtype=torch.bool))


def grades(n: int, size: tuple[int, int]) -> RegressionTarget:
    return RegressionTarget(torch.tensor([0.0, 2.0, 1.0, 2.0]).repeat(n)[:n], torch.ones(n, dtype=torch.bool))


def box_lists(n: int, size: tuple[int, int]) -> DetectionTarget:
    h, w = size
    boxes = [
        torch.tensor([[0.1 * w, 0.15 * h, 0.5 * w, 0.6 * h]]),
        torch.zeros(0, 4),
        torch.tensor([[0.4 * w, 0.3 * h, 0.9 * w, 0.9 * h], [0.05 * w, 0.05 * h, 0.3 * w, 0.4 * h]]),
        torch.tensor([[0.5 * w, 0.1 * h, 0.85 * w, 0.5 * h]]),
    ]
    labels = [torch.tensor([0]), torch.zeros(0, dtype=torch.int64), torch.tensor([1, 0]), torch.tensor([1])]
    return DetectionTarget((boxes * n)[:n], (labels * n)[:n], torch.ones(n, dtype=torch.bool))


def masks(channels: int, exclusive: bool) -> Callable[[int, tuple[int, int]], SegmentationTarget]:
    def target(n: int, size: tuple[int, int]) -> SegmentationTarget:
        h, w = size
        m = torch.zeros(n, channels, h, w, dtype=torch.uint8)
        for i in range(n):
            for k in range(channels):
                if (i + k) % 4 != 3:  # some masks are empty
                    top = (8 * i + 12 * k) % max(h - 16, 1)
                    m[i, k, top : top + 16, 8 + 8 * k : 24 + 16 * k] = 1
        if exclusive:
            m[:, 1:] *= 1 - m[:, :1]
        if channels > 1 and n > 1:
            m[0, 1], m[1, 0, : h // 2] = IGNORE, IGNORE  # a channel, and half of another, not annotated
        return SegmentationTarget(m, torch.ones(n, dtype=torch.bool))

    return target


CASES = {
    "classes": Case(lambda: ClassificationHead(ABC), one_hot),
    "classes of cases": Case(lambda: CaseHead(ABC), one_hot),
    "classes-terms": Case(
        lambda: ClassificationHead(
            ABC,
            terms={"ce": CrossEntropy(1.0, [1.0, 2.0, 3.0], 0.1), "focal": CrossEntropy(0.5, gamma=2.0)},
            strides=(8, 32, 64),
            width=16,
            num_heads=2,
        ),
        one_hot,
    ),
    "labels": Case(lambda: ClassificationHead(ABC, multi_label=True), multi_hot),
    "labels-terms": Case(
        lambda: ClassificationHead(
            ABC,
            multi_label=True,
            terms={"bce": BinaryCrossEntropy(1.0, [1.0, 2.0, 3.0]), "asl": Asymmetric(), "focal": BinaryFocal()},
        ),
        multi_hot,
    ),
    "number": Case(lambda: RegressionHead((0, 100), "years"), ages),
    "number-terms": Case(
        lambda: RegressionHead((0, 100), terms={"l1": AbsoluteError(0.5), "l2": SquaredError()}, width=16), ages
    ),
    "grades": Case(lambda: OrdinalHead(ABC), grades, 100),
    "grades-terms": Case(lambda: OrdinalHead(ABC, terms={"coral": Coral(), "nll": CumulativeLink(0.5)}), grades, 100),
    "boxes": Case(lambda: DetectionHead(AB, num_convs=1), box_lists, 50, 5e-3),
    "boxes-options": Case(lambda: DetectionHead(AB, width=16, box_loss=CIoU(2.0)), box_lists, 50, 5e-3),
    "boxes-strides": Case(lambda: DetectionHead(AB, num_convs=1, strides=(8, 16, 32)), box_lists, 50, 5e-3),
    "queries": Case(lambda: DETRHead(AB, num_queries=6), box_lists, 80, 2e-3),
    "mask": Case(lambda: SegmentationHead(("a",)), masks(1, False)),
    "masks": Case(lambda: SegmentationHead(AB, multi_label=True), masks(2, False)),
    "masks-terms": Case(
        lambda: SegmentationHead(
            AB,
            multi_label=True,
            terms={
                "bce": MaskCrossEntropy(1.0, [1.0, 2.0]),
                "focal": MaskFocal(),
                "dice": Dice(batch=True),
                "tversky": Tversky(gamma=0.75),
                "lovasz": Lovasz(),
                "boundary": Boundary(),
            },
        ),
        masks(2, False),
    ),
    "regions": Case(lambda: SegmentationHead(AB), masks(2, True)),
    "regions-terms": Case(
        lambda: SegmentationHead(
            AB,
            terms={
                "ce": MaskCrossEntropy(1.0, [1.0, 2.0]),
                "focal": MaskFocal(),
                "tversky": Tversky(gamma=0.75),
                "lovasz": Lovasz(),
                "boundary": Boundary(),
            },
            width=16,
        ),
        masks(2, True),
    ),
}


@pytest.fixture(params=CASES)
def case(request) -> Case:
    return CASES[request.param]


def built(case: Case, seed: int = 0) -> TaskHead:
    torch.manual_seed(seed)
    head = case.head()
    head.build(CHANNELS, STRIDES)
    return head


def pyramid(n: int, size: tuple[int, int] = SIZE, seed: int = 1) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [
        torch.randn(n, CHANNELS, -(-size[0] // s), -(-size[1] // s), generator=g, requires_grad=True) for s in STRIDES
    ]


def gradients(head: TaskHead, features: list[Tensor], target: Target, size=SIZE) -> tuple[Tensor, dict[str, Tensor]]:
    head.zero_grad()
    loss = torch.stack(list(head.loss(head(features, size), target).values())).sum()
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in head.named_parameters()}


def everywhere_positive(target: Target, rows: list[int]) -> None:
    """Fill the target of some rows with values that would change the loss most."""
    for i in rows:
        if isinstance(target, ClassificationTarget):
            target.labels[i] = 1
        elif isinstance(target, SegmentationTarget):
            target.masks[i] = 1
        elif isinstance(target, RegressionTarget):
            target.values[i] = 2
        else:
            target.boxes[i], target.labels[i] = torch.tensor([[0.0, 0.0, *SIZE[::-1]]]), torch.tensor([1])


def tensors(predictions: Any) -> list[Tensor]:
    return [predictions] if isinstance(predictions, Tensor) else [t for p in predictions for t in p.values()]


@pytest.mark.parametrize("channels", [8, 12])
def test_a_pyramid_of_few_channels_and_one_pixel_is_read(case, channels):
    head = case.head()
    head.build(channels, STRIDES)
    outputs = head.train()([torch.rand(1, channels, max(1, 32 // s), max(1, 32 // s)) for s in STRIDES], (32, 32))
    loss = torch.stack(list(head.loss(outputs, case.target(1, (32, 32))).values())).sum()
    loss.backward()
    assert loss.isfinite()


def test_unlabelled_rows_do_not_change_loss_and_gradient(case):
    head, rows = built(case), torch.tensor([0, 2])
    target = case.target(4, SIZE)
    everywhere_positive(target, [1, 3])
    target.present[[1, 3]] = False
    features = pyramid(4)
    loss, grads = gradients(head, features, target)

    part = [f.detach()[rows].requires_grad_() for f in features]
    expected, expected_grads = gradients(head, part, target[rows])

    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-5)
    assert expected > 0
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected_grads[name], atol=1e-6, rtol=1e-5, msg=name)
    for f, p in zip(features, part, strict=True):
        if p.grad is None:
            assert f.grad is None
            continue
        torch.testing.assert_close(f.grad[rows], p.grad, atol=1e-6, rtol=1e-5)
        assert not f.grad[[1, 3]].any()


def test_without_labels_the_loss_is_zero_and_every_parameter_has_a_gradient(case):
    head, features, target = built(case), pyramid(3), case.target(3, SIZE)
    everywhere_positive(target, [0, 1, 2])
    target.present[:] = False
    terms = head.loss(head(features, SIZE), target)
    assert all(t == 0 and t.requires_grad for t in terms.values())
    assert set(terms) == set(head.loss(head(features, SIZE), case.target(3, SIZE)))
    _, grads = gradients(head, features, target)
    assert len(grads) == len(list(head.parameters()))
    assert not any(g.any() for g in grads.values())
    assert not any(f.grad.any() for f in features if f.grad is not None)


def test_an_empty_target_gives_a_finite_loss_with_a_gradient(case):
    head, target = built(case), case.target(2, SIZE)
    if isinstance(target, SegmentationTarget):
        target.masks[:] = 0
    elif isinstance(target, DetectionTarget):
        target.boxes, target.labels = [torch.zeros(0, 4)] * 2, [torch.zeros(0, dtype=torch.int64)] * 2
    loss, grads = gradients(head, pyramid(2), target)
    assert torch.isfinite(loss)
    assert loss > 0
    assert all(torch.isfinite(g).all() for g in grads.values())
    assert any(g.any() for g in grads.values())


def test_order_of_the_batch_does_not_change_the_results(case):
    head, order = built(case), torch.tensor([2, 0, 3, 1])
    features, target = pyramid(4), case.target(4, SIZE)
    outputs, permuted = head(features, SIZE), head([f[order] for f in features], SIZE)
    terms, permuted_terms = head.loss(outputs, target), head.loss(permuted, target[order])
    for name in terms:
        torch.testing.assert_close(terms[name], permuted_terms[name], atol=1e-5, rtol=1e-5)
    before, after = head.predict(outputs, SIZE), head.predict(permuted, SIZE)
    before = before[order] if isinstance(before, Tensor) else [before[i] for i in order]
    for a, b in zip(tensors(before), tensors(after), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size", [(37, 53), (64, 33), (16, 130)], ids=str)
def test_predictions_are_in_range_for_odd_sizes(case, size):
    head = built(case).eval()
    outputs = head(pyramid(3, size), size)
    assert all(torch.isfinite(t) for t in head.loss(outputs, case.target(3, size)).values())
    predictions = head.predict(outputs, size)
    k = len(head.classes)
    if head.kind == "classification":
        assert predictions.shape == (3, k)
    elif head.kind == "segmentation":
        assert predictions.shape == (3, k, *size)
    elif head.kind == "regression":
        assert predictions.shape == (3, k or 1)
    if isinstance(predictions, Tensor):
        assert predictions.dtype == torch.float32
        if isinstance(head, RegressionHead):
            assert ((predictions >= head.range[0]) & (predictions <= head.range[1])).all()
            return
        assert ((predictions >= 0) & (predictions <= 1)).all()
        if not head.multi_label:
            total = predictions.sum(1)
            assert (total <= 1 + 1e-5).all()
            assert head.kind == "segmentation" or torch.allclose(total, torch.ones(3))
        return
    assert len(predictions) == 3
    assert sum(len(p["boxes"]) for p in predictions) > 0
    for p in predictions:
        n = len(p["boxes"])
        assert (p["boxes"].shape, p["scores"].shape, p["labels"].shape) == ((n, 4), (n,), (n,))
        assert p["labels"].dtype == torch.int64
        assert ((p["labels"] >= 0) & (p["labels"] < k)).all()
        assert ((p["scores"] >= 0) & (p["scores"] <= 1)).all()
        assert (p["scores"].diff() <= 0).all()
        assert (p["boxes"] >= 0).all()
        assert (p["boxes"] <= torch.tensor([*size[::-1], *size[::-1]])).all()
        assert (p["boxes"][:, 2:] > p["boxes"][:, :2]).all()


def test_overfits_four_images(case):
    head, features, target = built(case), pyramid(4), case.target(4, SIZE)
    optimizer = torch.optim.Adam([*head.parameters(), *features], lr=case.lr)
    first = last = None
    for _ in range(case.steps):
        optimizer.zero_grad()
        last = torch.stack(list(head.loss(head(features, SIZE), target).values())).sum()
        first = last.detach() if first is None else first
        last.backward()
        optimizer.step()
    assert last < 0.5 * first
    head.eval()
    with torch.no_grad():
        predictions = head.predict(head(features, SIZE), SIZE)
    if isinstance(target, ClassificationTarget):
        known = ~target.labels.isnan()
        assert ((predictions > 0.5) == target.labels.bool())[known].all()
    elif isinstance(target, RegressionTarget) and isinstance(head, RegressionHead):
        assert (predictions[:, 0] - target.values).abs().max() < 10
    elif isinstance(target, RegressionTarget):
        assert torch.equal(predictions.argmax(1), target.values.long())
    elif isinstance(target, SegmentationTarget):
        known = target.masks != IGNORE
        assert ((predictions > 0.5) == (target.masks == 1))[known].float().mean() > 0.97
    else:
        assert isinstance(target, DetectionTarget)
        for p, boxes, labels in zip(predictions, target.boxes, target.labels, strict=True):
            sure = p["scores"] > 0.5
            assert sure.sum() == len(boxes)
            if len(boxes):
                order, truth = p["labels"][sure].argsort(), labels.argsort()
                assert torch.equal(p["labels"][sure][order], labels[truth])
                assert (p["boxes"][sure][order] - boxes[truth]).abs().max() < 4


def test_a_copy_and_a_reloaded_head_predict_the_same(case):
    head, other = built(case), built(case, seed=7)
    features = [f.detach() for f in pyramid(2)]
    expected = tensors(head.predict(head(features, SIZE), SIZE))
    twin = copy.deepcopy(head)
    other.load_state_dict(head.state_dict())
    for same in (twin, other):
        for a, b in zip(tensors(same.predict(same(features, SIZE), SIZE)), expected, strict=True):
            assert torch.equal(a, b)
    assert set(head.state_dict()) == {name for name, _ in head.named_parameters()}
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in head.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_stays_finite(case, dtype):
    head, features, target = built(case), pyramid(4), case.target(4, SIZE)
    with torch.autocast("cpu", dtype=dtype):
        outputs = head(features, SIZE)
        terms = head.loss(outputs, target)
        predictions = head.predict(outputs, SIZE)
    assert all(t.dtype == torch.float32 for t in terms.values())
    loss = torch.stack(list(terms.values())).sum()
    loss.backward()
    reference = torch.stack(list(head.loss(head(features, SIZE), target).values())).sum()
    torch.testing.assert_close(loss, reference, rtol=0.1, atol=0.05)
    assert all(torch.isfinite(p.grad).all() for p in head.parameters())
    assert all(torch.isfinite(t).all() and t.dtype in (torch.float32, torch.int64) for t in tensors(predictions))


def test_extreme_logits_give_finite_losses(case):
    head, target = built(case), case.target(4, SIZE)
    loss, grads = gradients(head, [f.detach() * 1e4 for f in pyramid(4)], target)
    assert torch.isfinite(loss)
    assert all(torch.isfinite(g).all() for g in grads.values())


def test_a_head_describes_its_task_and_creates_its_metrics(case):
    head, target = built(case), case.target(4, SIZE)
    task = head.task("anything")
    assert (task.name, task.kind, task.classes) == ("anything", head.kind, head.classes)
    from mtmedformer.batch import Meta
    from mtmedformer.metrics import TaskMetrics

    metric = head.metrics()
    assert isinstance(metric, TaskMetrics)
    meta = [Meta(str(i), f"p{i}") for i in range(4)]
    with torch.no_grad():
        metric.update(head.predict(head(pyramid(4), SIZE), SIZE), target, meta)
    assert metric.primary in metric.compute()


def test_capabilities_by_kind(case):
    head = built(case)
    assert isinstance(head, Explainable)
    assert isinstance(head, Calibratable) == head.task("any").probabilistic
    assert isinstance(head, AttentionPooling) == (head.kind in ("classification", "regression"))
    assert isinstance(head, Exportable) == (head.kind != "segmentation")


def having(capability: type) -> list[str]:
    """Return the names of the cases whose head has a capability."""
    return [name for name, one in CASES.items() if isinstance(one.head(), capability)]


@pytest.mark.parametrize("case", having(Calibratable), indirect=True)
def test_temperature_divides_the_logits(case):
    head = built(case).eval()
    outputs = head(pyramid(2), SIZE)
    logits, halved = head.class_logits(outputs, SIZE), head.class_logits(head.scaled(outputs, 2.0), SIZE)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(halved, logits / 2)


@pytest.mark.parametrize("case", having(Explainable), indirect=True)
def test_class_score_is_one_differentiable_number_per_image(case):
    head, features = built(case).eval(), pyramid(3)
    for label in range(len(head.classes)):
        score = head.class_score(head(features, SIZE), label)
        assert score.shape == (3,)
        used = [g for g in torch.autograd.grad(score.sum(), features, allow_unused=True) if g is not None]
        assert any(g.any() for g in used)


@pytest.mark.parametrize("case", having(AttentionPooling), indirect=True)
def test_attention_maps_cover_the_image(case):
    head = built(case).eval()
    maps = head.attention_map(head(pyramid(2), SIZE), SIZE)
    assert maps.shape == (2, *SIZE)
    assert (maps >= 0).all()


@pytest.mark.parametrize("case", having(Exportable), indirect=True)
def test_exported_tensors_decode_to_the_predictions(case):
    head = built(case).eval()
    outputs = head(pyramid(2), SIZE)
    exported = head.exported(outputs, SIZE)
    assert all(len(t) == 2 for t in exported.values())
    for a, b in zip(tensors(head.decoded(exported, SIZE)), tensors(head.predict(outputs, SIZE)), strict=True):
        assert torch.equal(a, b)

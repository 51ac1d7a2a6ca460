"""The head over the images of a case: views in any number and order, and the label of a case."""

import pytest
import torch

from mtmedformer.batch import Batch, ClassificationTarget, Meta
from mtmedformer.errors import ConfigError
from mtmedformer.heads import CaseHead
from mtmedformer.module import MultiTaskModule
from tests.fixtures.stored_models import description

STRIDES = (4, 8, 16, 32, 64)
NAN = float("nan")


@pytest.fixture
def head():
    torch.manual_seed(0)
    head = CaseHead(["normal", "cancer"], negative=["normal"])
    head.build(16, STRIDES)
    return head.eval()


def pyramid(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(n, 16, 64 // s or 1, 64 // s or 1, generator=generator) for s in STRIDES]


def run(head, levels, cases):
    head.group(None if cases is None else torch.tensor(cases))
    return head(levels, (64, 64))


def test_images_of_a_case_have_its_prediction_whatever_their_order_and_number(head):
    levels = pyramid(5)
    found = run(head, levels, [0, 1, 0, 2, 0])
    assert torch.allclose(found.logits[0], found.logits[2])
    assert torch.allclose(found.logits[0], found.logits[4])
    assert not torch.allclose(found.logits[0], found.logits[1])
    assert float(found.views[[0, 2, 4]].sum()) == pytest.approx(1, abs=1e-6)
    order = [4, 3, 2, 1, 0]
    turned = run(head, [level[order] for level in levels], [5, 2, 5, 7, 5])
    assert torch.allclose(turned.logits[[0, 2, 4]], found.logits[[4, 2, 0]], atol=1e-6)
    alone = run(head, [level[[1]] for level in levels], None)
    assert torch.allclose(alone.logits[0], found.logits[1], atol=1e-6), "missing views are masked"


def test_without_cases_each_image_is_its_own(head):
    levels = pyramid(3)
    assert torch.allclose(run(head, levels, None).logits, run(head, levels, [0, 1, 2]).logits)
    head.group(torch.tensor([0, 0]))
    with pytest.raises(RuntimeError, match="cannot be cut"):
        head(levels, (64, 64))


def test_the_loss_is_the_mean_over_labelled_cases(head):
    outputs = run(head, pyramid(5), [0, 0, 1, 1, 2])
    labels = torch.tensor([[1.0, 0], [0, 1], [1, 0], [NAN, NAN], [1, 0]])  # cancer; unknown; normal
    target = ClassificationTarget(labels, ~labels.isnan().all(1))
    expected = torch.nn.functional.cross_entropy(outputs.logits[[0, 4]].float(), torch.tensor([1, 0]))
    assert float(head.loss(outputs, target)["cross_entropy"]) == pytest.approx(float(expected), abs=1e-6)


def test_a_negative_class_must_be_one_of_the_classes():
    with pytest.raises(ConfigError, match="no class is called 'healthy'"):
        CaseHead(["normal", "cancer"], negative=["healthy"])


def test_steps_group_the_images_and_predictions_outside_do_not():
    from mtmedformer.commands.load.stored_model import build

    described = description("health")
    described["init_args"]["heads"]["health"]["class_path"] = "mtmedformer.heads.CaseHead"
    torch.manual_seed(0)
    module = build(described, MultiTaskModule, ("mtmedformer", "mtmedformer.heads"), trusted=True).eval()
    torch.nn.init.normal_(module.heads["health"].classifier[1].weight)
    batch = Batch(torch.rand(3, 1, 64, 64), {}, [Meta("a", "p", case="x"), Meta("b", "p", case="x"), Meta("c", "q")])
    with torch.no_grad():
        together = module.predict_step(batch, 0)["health"]
        alone = module.predict_whole(batch.image)["health"]
    assert torch.allclose(together[0], together[1])
    assert not torch.allclose(alone[0], alone[1])
    assert torch.allclose(together[2], alone[2], atol=1e-6)

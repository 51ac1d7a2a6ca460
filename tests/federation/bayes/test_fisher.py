"""Fisher information: against closed forms, for labelled tasks only, and the module stays unchanged."""

import copy

import lightning as L
import pytest
import torch

from federation import Fisher
from federation.bayes.fisher import drawn_likelihood
from mtmedformer import ClassificationHead, ConfigError, DetectionHead, MultiTaskModule, SegmentationHead, SharedEncoder
from mtmedformer.batch import IGNORE, Batch, ClassificationTarget, DetectionTarget, Meta, SegmentationTarget

SIZE = 32


@pytest.fixture(scope="module")
def module():
    torch.manual_seed(0)
    heads = {
        "health": ClassificationHead(["well", "sick"]),
        "nodules": DetectionHead(["nodule"]),
        "organs": SegmentationHead(["left", "right"]),
    }
    return MultiTaskModule(SharedEncoder("mtmedformer_tiny", channels=16), heads).train()


def batch(seed=0, health=(True,) * 4, nodules=(True,) * 4, organs=(True,) * 4):
    generator = torch.Generator().manual_seed(seed)
    n = len(health)
    labels = torch.eye(2)[torch.arange(n) % 2]
    labels[~torch.tensor(health)] = float("nan")
    masks = torch.zeros(n, 2, SIZE, SIZE, dtype=torch.uint8)
    masks[~torch.tensor(organs)] = IGNORE
    boxes = [torch.tensor([[4.0, 4.0, 20.0, 20.0]]) if known else torch.zeros(0, 4) for known in nodules]
    return Batch(
        torch.rand(n, 1, SIZE, SIZE, generator=generator),
        {
            "health": ClassificationTarget(labels, torch.tensor(health)),
            "nodules": DetectionTarget(
                boxes, [torch.zeros(len(b), dtype=torch.int64) for b in boxes], torch.tensor(nodules)
            ),
            "organs": SegmentationTarget(masks, torch.tensor(organs)),
        },
        [Meta(f"im{i}", f"p{i}") for i in range(n)],
    )


NONE = (False,) * 4


def squares(logits, to_probabilities, target, multi_label, draws=3000):
    """Return the mean squared gradient of the drawn likelihood with respect to the logits."""
    generator, total = torch.Generator().manual_seed(0), torch.zeros_like(logits)
    for _ in range(draws):
        value = logits.clone().requires_grad_()
        drawn_likelihood(to_probabilities(value), target, multi_label, generator).backward()
        total += value.grad.square()
    return total / draws


def test_independent_classes_have_the_variance_of_a_coin():
    logits = torch.tensor([[0.3, -2.0, 1.0]])
    target = ClassificationTarget(torch.tensor([[1.0, 0.0, float("nan")]]), torch.tensor([True]))
    p = logits.sigmoid()
    expected = p * (1 - p) / 2**2  # the mean over the two known classes
    expected[0, 2] = 0.0
    torch.testing.assert_close(squares(logits, torch.sigmoid, target, True), expected, rtol=0.1, atol=0.0)


def test_exclusive_classes_have_the_variance_of_a_die():
    logits = torch.tensor([[0.3, -1.0, 1.0]])
    target = ClassificationTarget(torch.tensor([[0.0, 1.0, 0.0]]), torch.tensor([True]))
    p = logits.softmax(1)
    found = squares(logits, lambda x: x.softmax(1), target, False)
    torch.testing.assert_close(found, p * (1 - p), rtol=0.1, atol=0.0)


def test_masks_have_the_variance_of_each_known_pixel_background_included():
    logits = torch.randn(1, 3, 2, 3, generator=torch.Generator().manual_seed(1))  # background first
    masks = torch.zeros(1, 2, 2, 3, dtype=torch.uint8)
    masks[..., 0] = IGNORE
    target = SegmentationTarget(masks, torch.tensor([True]))
    p = logits.softmax(1)
    expected = p * (1 - p) / 4**2  # four pixels are known
    expected[..., 0] = 0.0
    found = squares(logits, lambda x: x.softmax(1)[:, 1:], target, False)
    torch.testing.assert_close(found, expected, rtol=0.15, atol=0.0)


def test_given_labels_do_not_matter_only_which_are_known(module):
    one, other = batch(), batch()
    other.targets["health"].labels.copy_(1 - other.targets["health"].labels)
    other.targets["organs"].masks.fill_(1)
    for data in (one, other):
        data.targets["nodules"].present.fill_(False)
    first, second = Fisher(seed=1).finish(module, [one]), Fisher(seed=1).finish(module, [other])
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_detection_is_the_squared_gradient_of_its_loss_on_given_boxes(module):
    data = batch(health=NONE, organs=NONE)
    found = Fisher().finish(module, [data])
    expected, count = {}, len(data)
    factor = module.loss.factors()["nodules"]
    module.eval()
    for i in range(count):
        module.zero_grad()
        sample = data.only(i)
        losses, _, _ = module.task_losses(module(sample.image), sample.targets)
        (factor * losses["nodules"]).backward()
        for name, p in module.named_parameters():
            if p.grad is not None and p.grad.any():
                expected[name] = expected.get(name, 0) + p.grad.square() / count
    module.zero_grad()
    module.train()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5 * float(value.max()))
    assert all(not value.any() for name, value in found.items() if name not in expected)


def test_a_task_without_labels_is_not_measured_and_a_head_is_averaged_over_its_own_samples(module):
    some = batch(health=(True, False, False, False), nodules=NONE, organs=(False, True, True, True))
    found = Fisher(seed=3).finish(module, [some])
    assert not any(name.startswith("heads.nodules") for name in found)
    assert all((value >= 0).all() for value in found.values())
    assert found.keys() == {
        name for name, p in module.named_parameters() if not name.startswith(("heads.nodules", "loss"))
    }
    alone = batch(health=(True, False, False, False), nodules=NONE, organs=NONE)
    single = Fisher(seed=3).finish(module, [alone])
    for name in single:
        if name.startswith("heads.health"):
            torch.testing.assert_close(found[name], single[name], msg=name)
    assert Fisher().finish(module, [batch(health=NONE, nodules=NONE, organs=NONE)]) == {}


def test_it_stops_after_its_samples_and_skips_unlabelled_ones(module):
    first = batch(0, health=(True, False, True, True), nodules=NONE, organs=NONE)

    def loader():
        yield first
        raise AssertionError("a second batch was asked for")

    few = Fisher(samples=3).finish(module, loader())
    same = Fisher(samples=256).finish(module, [first])
    assert all(torch.equal(few[key], same[key]) for key in few)
    assert not torch.equal(
        Fisher(samples=1).finish(module, [first])["heads.health.classifier.1.bias"],
        few["heads.health.classifier.1.bias"],
    )


def test_the_module_and_the_random_state_are_left_as_they_were(module):
    before = {key: value.clone() for key, value in module.state_dict().items()}
    module.heads["organs"].eval()
    module.zero_grad()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = Fisher(seed=1).finish(module, [batch()])
    assert torch.equal(torch.rand(3), expected)
    assert module.training
    assert not module.heads["organs"].training
    module.heads["organs"].train()
    assert all(p.grad is None for p in module.parameters())
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    again, other = Fisher(seed=1).finish(module, [batch()]), Fisher(seed=2).finish(module, [batch()])
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


def test_processes_of_one_site_add_up(module):
    class Strategy:
        """What a strategy of two processes with the same data does."""

        def reduce(self, value, reduce_op):
            assert reduce_op == "sum"
            return 2 * value

    alone = Fisher(seed=1).finish(module, [batch()])
    module._trainer = type("Trainer", (), {"world_size": 2, "strategy": Strategy()})()
    together = Fisher(seed=1).finish(module, [batch()])
    module._trainer = None
    for key in alone:
        torch.testing.assert_close(alone[key], together[key])


def test_modules_without_heads_and_missing_loaders_raise(module):
    with pytest.raises(ConfigError, match="samples"):
        Fisher(samples=0)
    with pytest.raises(ConfigError, match="MultiTaskModule"):
        Fisher().finish(torch.nn.Linear(2, 2), [batch()])
    with pytest.raises(ConfigError, match="batches"):
        Fisher().finish(module, None)


def test_fisher_runs_at_the_end_of_training(module):
    class AtTheEnd(L.Callback):
        def on_train_end(self, trainer, pl_module):
            self.found = Fisher(samples=3).finish(pl_module, trainer.train_dataloader)

    measure = AtTheEnd()
    data = torch.utils.data.DataLoader([batch(0), batch(1)], batch_size=None, shuffle=True)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    trainer = L.Trainer(accelerator="cpu", max_epochs=1, enable_progress_bar=False, callbacks=[measure], **quiet)
    twin = copy.deepcopy(module)
    trainer.fit(twin, data)
    assert measure.found.keys() == {name for name, _ in twin.named_parameters() if not name.startswith("loss")}
    assert all(value.isfinite().all() for value in measure.found.values())
    assert all(p.grad is None or p.grad.isfinite().all() for p in twin.parameters())

"""What the framework costs: a step through Lightning against the same step by hand, and one pyramid against three.

Medians of the ratios within one run, printed and kept in the benchmark's extra info.
"""

import resource
import time
from dataclasses import replace
from statistics import median

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from mtmedformer import ClassificationHead, DetectionHead, MultiTaskModule, SegmentationHead, SharedEncoder
from mtmedformer.batch import Batch, ClassificationTarget, DetectionTarget, Meta, SegmentationTarget

SIZE, IMAGES, STEPS = 128, 4, 24


def heads(width=32):
    return {
        "finding": ClassificationHead(["clear", "opacity"]),
        "lesions": DetectionHead(["opacity"], width=width),
        "lungs": SegmentationHead(["lung"]),
    }


def model(name=None, encoder="mtmedformer_tiny", channels=64, width=32):
    """Build the quickstart's model, or another; only the head called ``name`` if there is one."""
    torch.manual_seed(0)
    kept = {k: h for k, h in heads(width).items() if name in (None, k)}
    return MultiTaskModule(SharedEncoder(encoder, channels=channels), kept)


def batches(n=STEPS):
    generator = torch.Generator().manual_seed(0)
    made = []
    for k in range(n):
        present = torch.ones(IMAGES, dtype=torch.bool)
        box = torch.tensor([[20.0, 30.0, 60.0, 80.0]])
        made.append(
            Batch(
                torch.rand(IMAGES, 1, SIZE, SIZE, generator=generator),
                {
                    "finding": ClassificationTarget(torch.eye(2)[[0, 1, 0, 1]], present),
                    "lesions": DetectionTarget([box] * IMAGES, [torch.zeros(1, dtype=torch.int64)] * IMAGES, present),
                    "lungs": SegmentationTarget(torch.ones(IMAGES, 1, SIZE, SIZE, dtype=torch.uint8), present),
                },
                [Meta(f"{k}-{i}", "p") for i in range(IMAGES)],
            )
        )
    return made


def by_hand(module, data):
    """Train as a plain PyTorch loop would: the same parts, optimiser and loss, no Lightning. Seconds a step."""
    optimizer = torch.optim.AdamW(module.parameter_groups(5e-4, 0.05))
    module.train()
    times = []
    for batch in data:
        start = time.perf_counter()
        pyramid = module.encoder(batch.image)
        size = (SIZE, SIZE)
        losses, present = {}, {}
        for name, head in module.heads.items():
            losses[name] = sum(head.loss(head(pyramid, size), batch.targets[name]).values())
            present[name] = IMAGES
        optimizer.zero_grad()
        module.loss(losses, present).backward()
        optimizer.step()
        times.append(time.perf_counter() - start)
    return times


def tell(benchmark, what, pairs):
    """Print and keep the median ratio of pairs of seconds, and the memory the process has needed so far."""
    ratio, peak = median(a / b for a, b in pairs), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    benchmark.extra_info.update(ratio=round(ratio, 3), peak_mb=peak)
    print(f"\n{what}: {ratio:.3f}; peak {peak} MB")
    assert all(a > 0 and b > 0 for a, b in pairs)


class Clock(L.Callback):
    """Takes the time from one step's start to the next's, so that everything between them counts."""

    def __init__(self):
        self.marks = []

    def on_train_batch_start(self, *args):
        self.marks.append(time.perf_counter())


def through_lightning(module, data):
    clock = Clock()
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[clock],
    )
    trainer.fit(module, DataLoader(data, batch_size=None))
    return [b - a for a, b in zip(clock.marks, clock.marks[1:], strict=False)]


def test_a_step_through_lightning_against_one_by_hand(benchmark):
    data = batches()
    by_hand(model(), data[:3])  # warm up
    pairs = []

    def round_():
        ours = median(through_lightning(model(), data))
        theirs = median(by_hand(model(), data))
        pairs.append((ours, theirs))

    benchmark.pedantic(round_, rounds=5, iterations=1)
    tell(benchmark, "a step through Lightning against one by hand", pairs)


@pytest.mark.parametrize(
    ("encoder", "channels", "width"),
    [("mtmedformer_tiny", 64, 32), ("pvt_v2_b2", 128, None)],
    ids=["quickstart", "real-work"],
)
def test_one_joint_forward_against_three_single_ones(benchmark, encoder, channels, width):
    joint = model(None, encoder, channels, width).eval()
    singles = [model(name, encoder, channels, width).eval() for name in heads()]
    image = torch.rand(IMAGES, 1, SIZE, SIZE)
    pairs = []

    def seconds(run):
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    @torch.no_grad()
    def round_():
        pairs.append((seconds(lambda: joint(image)), seconds(lambda: [m(image) for m in singles])))

    benchmark.pedantic(round_, rounds=15, iterations=1, warmup_rounds=3)
    tell(benchmark, f"{encoder}: one joint forward against three single ones", pairs)
    with torch.no_grad():
        for module in singles:
            (name,) = module.heads
            shared = {k: v for k, v in joint.state_dict().items() if k.startswith(("encoder.", f"heads.{name}."))}
            module.load_state_dict(shared, strict=False)
            one, all_ = module.predict(image)[name], joint.predict(image)[name]
            if isinstance(one, torch.Tensor):
                torch.testing.assert_close(one, all_)
            else:
                torch.testing.assert_close(one[0]["boxes"], all_[0]["boxes"])


def test_a_step_of_which_half_is_labelled_against_a_whole_one(benchmark):
    """Decoders read the images labelled for them; half of the labels cost less than all of them."""
    module, whole = model(), batches(1)[0]
    half = torch.tensor([True, False] * (IMAGES // 2))
    targets = {name: replace(target, present=half) for name, target in whole.targets.items()}
    pairs = []

    def seconds(batch):
        start = time.perf_counter()
        losses, _, present = module.task_losses(*module.labelled(batch))
        module.loss(losses, present).backward()
        return time.perf_counter() - start

    benchmark.pedantic(
        lambda: pairs.append((seconds(Batch(whole.image, targets, whole.meta)), seconds(whole))),
        rounds=15,
        warmup_rounds=3,
    )
    tell(benchmark, "a step of which half is labelled against a whole one", pairs)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_keeps_ahead_of_the_step(benchmark, tmp_path, workers):
    """The default configuration's loader alone, against the step it feeds (quickstart: 128 px, batches of 8)."""
    from datamodules import PhantomDataModule, PhantomSite

    data = PhantomDataModule(
        root=tmp_path / "phantom",
        sites={"a": PhantomSite(patients=24)},
        size=128,
        image_size=128,
        batch_size=8,
        num_workers=workers,
        cache_dir=tmp_path / "cache",
    )
    data.prepare_data()
    data.setup("fit")
    loader = data.train_dataloader()
    list(loader)  # start the workers
    count = len(data.datasets["train"])

    start = time.perf_counter()
    benchmark.pedantic(lambda: list(loader), rounds=3, iterations=1)
    per_image = (time.perf_counter() - start) / 3 / count
    step = median(by_hand(model(), batches(8))) / IMAGES
    tell(benchmark, f"the loader with {workers} workers against the step it feeds", [(per_image, step)])

"""A small whole model, and sites whose images hold a bright square that is the sickness, the nodule and the organ."""

import lightning as L
import torch
from torch.utils.data import DataLoader, DistributedSampler

from mtmedformer import ClassificationHead, DetectionHead, MultiTaskModule, SegmentationHead, SharedEncoder
from mtmedformer.batch import Boxes, Meta, Sample, collate

SIZE = 32


def square_model(**options) -> MultiTaskModule:
    torch.manual_seed(0)
    heads = {
        "health": ClassificationHead(["well", "sick"]),
        "signs": ClassificationHead(["a", "b"], multi_label=True),
        "nodules": DetectionHead(["nodule"]),
        "organ": SegmentationHead(["organ"]),
    }
    return MultiTaskModule(SharedEncoder("mtmedformer_tiny", channels=16), heads, **options)


class SquareSite(L.LightningDataModule):
    """``n`` training and as many validation images; every fifth class label is wrong, every third image lacks some."""

    def __init__(self, n: int = 12, seed: int = 0, missing: tuple[str, ...] = (), validates: bool = True) -> None:
        super().__init__()
        self.validates = validates
        self.tasks = {name: task for name, task in square_model().tasks.items() if name not in missing}
        generator = torch.Generator().manual_seed(seed)
        self.parts = {
            part: [self._sample(f"{part}{seed}-{i}", i, generator) for i in range(n)] for part in ("train", "val")
        }

    def train_dataloader(self):
        images = self.parts["train"]
        return DataLoader(images, 4, sampler=DistributedSampler(images, 1, 0, shuffle=True), collate_fn=self._batch)

    def val_dataloader(self):
        return DataLoader(self.parts["val"], 4, collate_fn=self._batch) if self.validates else []

    def test_dataloader(self):
        return DataLoader(self.parts["val"], 4, collate_fn=self._batch)

    def predict_dataloader(self):
        return self.test_dataloader()

    def _batch(self, samples):
        return collate(samples, self.tasks)

    def _sample(self, name, i, generator):
        image, mask = 0.3 * torch.rand(1, SIZE, SIZE, generator=generator), torch.zeros(1, SIZE, SIZE)
        sick = i % 2 == 1
        y, x = torch.randint(4, SIZE - 14, (2,), generator=generator).tolist()
        boxes = torch.tensor([[x, y, x + 10.0, y + 10.0]]) if sick else torch.zeros(0, 4)
        image[:, y : y + 10, x : x + 10] += 0.6 * sick
        mask[:, y : y + 10, x : x + 10] = sick
        said = sick if i % 5 else not sick
        truth = {
            "health": None if i % 3 == 0 else torch.tensor([1.0 - said, float(said)]),
            "signs": torch.tensor([float(said), torch.nan if i % 4 == 0 else float(sick)]),
            "nodules": Boxes(boxes, torch.zeros(len(boxes), dtype=torch.int64)),
            "organ": mask.to(torch.uint8) if i % 3 else None,
        }
        kept = {task: truth[task] for task in self.tasks}
        return Sample(image, kept, Meta(name, name, original_size=(SIZE, SIZE)))

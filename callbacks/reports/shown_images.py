"""Choice of the validation images of an overlay: every class is shown, from as many sites as possible."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mtmedformer.batch import Batch, ClassificationTarget, DetectionTarget, SegmentationTarget, Task

Shown = frozenset[tuple[str, str]]
"""Task and class of every finding in an image."""

MOST = 12
"""Largest number of images of one picture, however many classes there are."""


@dataclass(frozen=True)
class Candidate:
    """An image that may be shown.

    Attributes:
        points: Number of its labelled tasks, with extra points for boxes and masks.
        shows: The classes that are true in it.
        batch: The image, as a batch of one.
    """

    points: float
    shows: Shown
    batch: Batch

    @property
    def site(self) -> str:
        """Site of the image."""
        return self.batch.meta[0].site if self.batch.meta else ""


class ShownImages:
    """Chooses images while validation batches pass; few images are kept at any time.

    Args:
        tasks: Tasks of the model.
        images: Number of images; more where they do not show every class, up to ``MOST``.
    """

    def __init__(self, tasks: Mapping[str, Task], images: int) -> None:
        self.tasks, self.images = tasks, images
        self._best: list[Candidate] = []
        self._of_class: dict[tuple[str, str], Candidate] = {}

    def add(self, batch: Batch) -> None:
        """Consider the images of a batch: of each class and overall, those with the most findings are kept."""
        sites = [kept.site for kept in self._best]
        scored = [(kept.points, kept) for kept in self._best]
        for i in range(len(batch)):
            shows, points = shown_classes(batch, i, self.tasks), labelled_points(batch, i)
            new = [key for key in shows if key not in self._of_class or self._better(shows, points, key)]
            site = batch.meta[i].site if batch.meta else ""
            candidate = Candidate(points - 10 * sites.count(site), shows, batch.only(i))
            sites.append(site)
            scored.append((candidate.points, candidate))
            self._of_class |= dict.fromkeys(new, Candidate(points, shows, candidate.batch))
        self._best = [one for _, one in sorted(scored, key=lambda item: -item[0])[: self.images]]

    def _better(self, shows: Shown, points: float, key: tuple[str, str]) -> bool:
        kept = self._of_class[key]
        return (len(shows), points) > (len(kept.shows), kept.points)

    def chosen(self) -> list[Batch]:
        """Return the images: first those that show classes not yet shown, then those with the most findings."""
        candidates = [*dict.fromkeys([*self._of_class.values(), *self._best])]
        wanted, taken = set(self._of_class), list[Candidate]()
        while wanted and len(taken) < MOST and candidates:
            sites = [one.site for one in taken]
            best = max(candidates, key=lambda c: (len(c.shows & wanted), -sites.count(c.site), c.points))
            if not best.shows & wanted:
                break
            taken.append(best)
            wanted -= best.shows
            candidates.remove(best)
        seen = [id(one.batch) for one in taken]
        rest = [one for one in self._best if id(one.batch) not in seen]
        return [one.batch for one in [*taken, *rest][: max(self.images, len(taken))]]


def shown_classes(batch: Batch, i: int, tasks: Mapping[str, Task]) -> Shown:
    """Return task and class of every class that is true in image ``i``."""
    shown: set[tuple[str, str]] = set()
    for name, task in tasks.items():
        target = batch.targets.get(name)
        if target is None or not bool(target.present[i]):
            continue
        if isinstance(target, ClassificationTarget):
            shown |= {(name, c) for c, value in zip(task.classes, target.labels[i].tolist(), strict=True) if value == 1}
        elif isinstance(target, DetectionTarget):
            shown |= {(name, task.classes[k]) for k in target.labels[i].tolist()}
        elif isinstance(target, SegmentationTarget):
            drawn = (target.masks[i] == 1).flatten(1).any(dim=1).tolist()
            shown |= {(name, c) for c, there in zip(task.classes, drawn, strict=True) if there}
    return frozenset(shown)


def labelled_points(batch: Batch, i: int) -> float:
    """Rate image ``i`` by its labelled tasks, with extra points for boxes and masks."""
    points = 0.0
    for target in batch.targets.values():
        if bool(target.present[i]):
            points += 1
            if isinstance(target, DetectionTarget) and len(target.boxes[i]):
                points += 0.5
            if isinstance(target, SegmentationTarget) and bool((target.masks[i] == 1).any()):
                points += 0.25
    return points

"""Find classes that only one site has, in a data set with sites and in a federation of data sets."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from mtmedformer.batch import Task
from mtmedformer.protocols import ClassLabels

LEAST_OF_CLASS, LEAST_OF_SITE = 5, 10
"""A class counts from this number of images, and a site without it from this number of labelled images."""


def classes_of_one_site(images: Iterable[tuple[str, Mapping[str, Any]]], tasks: Mapping[str, Task]) -> dict[str, str]:
    """Return a sentence for each class that is present at one site only, though another is labelled for the task.

    Args:
        images: Site and labels by task of every image.
        tasks: The tasks by name.

    Returns:
        Sentences by a key of task and class; without ids.
    """
    labelled: dict[str, Counter[str]] = defaultdict(Counter)
    holding: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for site, labels in images:
        for name, label in labels.items():
            if name in tasks and tasks[name].kind == "classification" and isinstance(label, ClassLabels):
                labelled[name][site] += 1
                for title, value in zip(tasks[name].classes, label.values, strict=True):
                    holding[name, title][site] += value == 1
    found = {}
    for (name, title), counts in sorted(holding.items()):
        sites = [site for site, count in counts.items() if count]
        without = sum(count >= LEAST_OF_SITE for site, count in labelled[name].items() if site not in sites)
        if len(sites) == 1 and counts[sites[0]] >= LEAST_OF_CLASS and without:
            found[f"site of {name}/{title}"] = (
                f"{name}: all {counts[sites[0]]} images of {title!r} are of site {sites[0]!r}, and {without} other "
                f"site(s) labelled for {name} have none. A model may recognise the site instead of the finding."
            )
    return found

"""Which classes are negative: as the configuration names them, else by their names, with a sentence where unsure."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping, Sequence

from mtmedformer.batch import Task
from mtmedformer.errors import ConfigError
from mtmedformer.metrics.cases import plain_name

NEGATIVE_CLASSES = (
    *("normal", "norm", "negative", "healthy", "absent", "clear", "control", "controls", "unremarkable"),
    *("none", "no", "false", "0", "nofinding", "no finding", "no findings", "no cancer", "no tumor", "no tumour"),
)
"""Names of classes of images without a finding; also ``no …``, ``without …``, ``… absent``, ``… free``."""

NEGATIVE = frozenset(NEGATIVE_CLASSES)

DOUBTFUL = frozenset({"benign"})
"""Names of classes that are a finding beside a negative class, and that stand for it where there is none."""

_PHRASE = re.compile(r"(no|without|free of) .+|.+ (absent|free)")


def is_negative_name(plain: str, others: Collection[str] = ()) -> bool:
    """Return whether a class is negative by its name.

    Args:
        plain: The name as ``plain_name`` returns it.
        others: The names of its task; ``x negative`` is negative beside ``x positive``, since ``triple negative`` is a
            cancer.
    """
    opposite = f"{plain.removesuffix('negative')}positive"
    beside = plain.endswith(" negative") and opposite in others
    return plain in NEGATIVE or beside or (_PHRASE.fullmatch(plain) is not None and not plain.startswith("not "))


def negative_names(
    tasks: Mapping[str, Task],
    negative: Sequence[str] | None = None,
    positive: Sequence[str] | None = None,
    of_set: Collection[str] = (),
    key: str = "negative",
) -> tuple[frozenset[str], str]:
    """Return the names of the negative classes, and a sentence on those that are uncertain, or nothing.

    Args:
        tasks: The tasks by name.
        negative: Negative classes as configured; all others are positive. ``None``: by their names.
        positive: Positive classes as configured; the other classes of their tasks are negative.
        of_set: Negative classes that the data set itself defines.
        key: The option that names the negative classes, for errors.

    Returns:
        Names as ``plain_name`` returns them.

    Raises:
        ConfigError: A configured name is no class, or is both.
    """
    single = {name: task for name, task in tasks.items() if task.kind == "classification"}
    given = {"negative": _known(key, negative, single), "positive": _known("positive", positive, single)}
    if both := sorted(given["negative"] & given["positive"]):
        raise ConfigError(f"data.init_args.negative and positive both name {both[0]!r}; a class is one of them")
    classes = {name: [plain_name(label) for label in task.classes] for name, task in single.items()}
    beside = {label for labels in classes.values() if given["positive"] & {*labels} for label in labels}
    found = given["negative"] | (beside - given["positive"])
    if negative is not None:
        return frozenset(found), ""
    found |= {label for labels in classes.values() for label in labels if is_negative_name(label, labels)}
    found |= {plain_name(label) for label in of_set}
    doubtful = {
        label: name
        for name, labels in classes.items()
        for label in labels
        if label in DOUBTFUL and not found & {*labels} and len(labels) > 1
    }
    settled = {label for labels in classes.values() if found & {*labels} for label in labels}
    doubtful = {label: name for label, name in doubtful.items() if label not in settled | given["positive"]}
    sentence = "; ".join(f"{label!r} counts as the negative class of {name}" for label, name in doubtful.items())
    if sentence:
        sentence += ", which has no other; if it is a finding, name the negative and positive classes with "
        sentence += "data.init_args.negative and positive"
    return frozenset((found | doubtful.keys()) - given["positive"]), sentence


def _known(option: str, names: Sequence[str] | None, tasks: Mapping[str, Task]) -> set[str]:
    """Return configured names as ``plain_name`` does; raise for one that is no class."""
    classes = {plain_name(label): label for task in tasks.values() for label in task.classes}
    for name in names or []:
        if plain_name(name) not in classes:
            near = difflib.get_close_matches(plain_name(name), classes, 1)
            hint = f"; did you mean {classes[near[0]]!r}?" if near else ""
            raise ConfigError(
                f"data.init_args.{option}: no class is called {name!r}{hint} The classes are "
                f"{', '.join(classes.values()) or 'none'}."
            )
    return {plain_name(name) for name in names or []}

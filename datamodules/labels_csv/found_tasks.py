"""Find the tasks of a label table by the names and cells of its columns, where the configuration describes none."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Sequence

from datamodules.labels_csv.cells import BLANK, NO, YES, listed, number
from datamodules.labels_csv.classes import MOST_CLASSES
from datamodules.labels_csv.columns import BoxColumns, ClassColumns, Columns, MaskColumns, ValueColumns
from datamodules.labels_csv.table import Table
from mtmedformer.errors import DataError

SEVERAL = "findings"
"""Name of the task of several columns of 0 and 1."""

ABOUT_THE_IMAGE = re.compile(
    r"(.*_)?(id|uid|file|files|filename|path|folder|url|doi|date|time|datetime|year|month|count|number|width|height|rows|"
    r"columns|cols|scale|spacing|bits|source|licen[cs]e|notes?|comments?|remarks?|reports?|text|description|index)"
    r"|(n|num|orig|native)_.*|.*_native|unnamed.*|"
    r"(patient_?)?(age|sex|gender|race|ethnicity)(_.*)?|country|hospital|institution|cent(re|er)|clinic|site|client|"
    r"manufacturer.*|model.*|scanner|device|vendor|machine|modality|body_?part.*|photometric.*|study.*|series.*|"
    r"accession.*|reader|annotator|radiologist.*|rad_id|side|laterality|view.*|projection|position.*|orientation|"
    r"frontal.*|kvp|dose|exposure|data_?set|split|fold|subset|inverted"
)
"""Names of columns, in lower case with ``_`` for blanks and hyphens, that describe an image and not what it shows."""

VIEWS = frozenset({"ap", "pa", "ll", "rl", "l", "r", "left", "right", "cc", "mlo", "ml", "lm", "lateral", "frontal"})
"""Views and sides, in lower case; a column of these words is no class."""

LABEL = re.compile(r"(.*_)?(label|labels|class|target|diagnosis|grade|stage|category|score|bi_?rads|density|severity)")
"""Names of columns whose numbers are classes."""

MASK = re.compile(r"masks?_(.+)|(.+)_masks?|(masks?)")
"""Names of columns of mask files, with the name of their task."""

SENTENCE = (
    "Other tasks, and numbers, are named under classification, detection, segmentation and regression of "
    "data.init_args; data.init_args.tasks keeps some of these"
)


def tasks_of_table(table: Table, used: Collection[str]) -> tuple[dict[str, Columns], str]:
    """Return the columns of the tasks that a table has, and a sentence on what was found.

    Found are lists of boxes (``boxes``, ``<name>_boxes``), mask files (``mask_<name>``, ``<name>_mask``), columns of 0
    and 1, and columns of a few words. A column ``has_<task>`` is the flag of its task.

    Args:
        table: The table.
        used: Columns that describe the image: file, patient, site and others.

    Raises:
        DataError: No task is found, or a column ``has_…`` is the flag of none.
    """
    free = [column for column in table.columns if column and column not in used]
    flags = {plain: column for column in free if (plain := _plain(column)).startswith("has_")}
    taken: set[str] = set()
    tasks: dict[str, Columns] = {}
    others = [column for column in free if column not in flags.values()]
    boxes = [column for column in others if re.fullmatch(r"(.+_)?boxes", _plain(column))]
    masks = [column for column in others if MASK.fullmatch(_plain(column)) and _name_files(table, column)]
    for column in others:
        plain = _plain(column)
        if column in boxes:
            name = plain.removesuffix("_boxes")
            labels = next((c for c in free if _plain(c) in _label_columns(name)), None)
            common = ("boxes", "box", "det", "detection") if name == "boxes" or len(boxes) == 1 else ()
            flag = _flag(flags, name, f"{name}_boxes", *common)
            tasks[name] = BoxColumns(column, labels, flag=flag)
            taken |= {column, labels or column}
        elif column in masks and (mask := MASK.fullmatch(plain)):
            name = mask[1] or mask[2] or mask[3]
            common = ("mask", "masks", "seg", "segmentation") if len(masks) == 1 else ()
            flag = _flag(flags, name, f"seg_{name}", f"mask_{name}", f"{name}_mask", *common)
            tasks[name] = MaskColumns({name: column}, flag=flag)
            taken.add(column)
    switches = [c for c in free if c not in taken and c not in flags.values() and _is_switch(table, c)]
    words = [c for c in free if c not in {*taken, *switches, *flags.values()} and _names_classes(table, c)]
    general = _flag(flags, "cls", "class", "label", "labels", "classification")
    for column in words:
        shared = general if general and _all_filled(table, column, general) else None
        tasks[_free(column, tasks)] = ClassColumns(column, flag=_flag(flags, _plain(column)) or shared)
    if switches:
        name = _free(switches[0] if len(switches) == 1 else SEVERAL, tasks)
        tasks[name] = ClassColumns(columns=switches, flag=general)
    _check_flags(table, {*flags.values()} - {general if words else None}, tasks)
    if not tasks:
        raise DataError(
            f"{table.file}: no column looks like labels (the columns are {listed(table.columns, 30)}); name a task in "
            "data.init_args, for example --data.classification='{finding: {column: NAME}}'"
        )
    unused = [c for c in free if c not in {*taken, *switches, *words, *flags.values()}]
    more = f" Columns without a task: {listed(unused, 20)}." if unused else ""
    return (
        tasks,
        f"{table.file.name}: tasks found: {'; '.join(map(_described, tasks, tasks.values()))}.{more} {SENTENCE}",
    )


def _plain(column: str) -> str:
    return re.sub(r"[\s\-./]+", "_", column.strip().lower())


def _label_columns(name: str) -> tuple[str, ...]:
    return ("box_labels", "boxes_labels") if name == "boxes" else (f"{name}_box_labels", f"{name}_labels")


def _flag(flags: dict[str, str], *names: str) -> str | None:
    return next((flags[f"has_{name}"] for name in names if f"has_{name}" in flags), None)


def _free(name: str, tasks: dict[str, Columns]) -> str:
    return name if name not in tasks else f"{name}_class"


def _cells(table: Table, column: str) -> list[str]:
    return [cell for row in table.rows if (cell := row.cells[column].lower()) not in BLANK]


def _name_files(table: Table, column: str) -> bool:
    """Return whether the cells of a column are names of files, not 0 and 1."""
    cells = _cells(table, column)
    return bool(cells) and all("." in cell and number(cell) is None for cell in cells)


def _is_switch(table: Table, column: str) -> bool:
    """Return whether a column has 1 and 0 (or words for them) in it, and besides them -1 only."""
    if ABOUT_THE_IMAGE.fullmatch(_plain(column)):
        return False
    cells = set(_cells(table, column))
    ones = {cell for cell in cells if cell in YES or number(cell) == 1}
    zeros = {cell for cell in cells if cell in NO or number(cell) == 0}
    unsure = {cell for cell in cells if number(cell) == -1}
    return bool(ones) and bool(zeros or unsure) and cells == ones | zeros | unsure


def _names_classes(table: Table, column: str) -> bool:
    """Return whether a column names a few classes, each of them twice on average."""
    if ABOUT_THE_IMAGE.fullmatch(_plain(column)):
        return False
    cells = Counter(_cells(table, column))
    numbers = sum(number(cell) is not None for cell in cells)
    if not 2 <= len(cells) <= min(MOST_CLASSES, cells.total() // 2) or cells.keys() <= VIEWS:
        return False
    if any(cell[0] in "[{" or len(cell) > 60 for cell in cells):
        return False
    return not numbers or (numbers == len(cells) <= 10 and LABEL.fullmatch(_plain(column)) is not None)


def _all_filled(table: Table, column: str, flag: str) -> bool:
    """Return whether every row with the flag has a class in a column, so that the flag may be the column's."""
    return all(row.cells[column].lower() not in BLANK for row in table.rows if row.cells[flag].lower() in {"1", *YES})


def _check_flags(table: Table, flags: Collection[str], tasks: dict[str, Columns]) -> None:
    """Refuse a flag without a task: its images would count as labelled, or as negative."""
    used = {task.flag for task in tasks.values()}
    for column in sorted(flags):
        if column not in used:
            raise DataError(
                f"{table.file}: column {column!r} may mark the images that are labelled for a task, but no task of "
                f"this name is found ({', '.join(tasks) or 'none'}); describe the tasks in data.init_args, with "
                f"flag: {column} for the one that it marks, or columns: [{column}] if it is a finding"
            )


def _described(name: str, spec: Columns) -> str:
    if isinstance(spec, BoxColumns):
        return f"{name} (boxes)"
    if isinstance(spec, MaskColumns):
        return f"{name} (masks)"
    if isinstance(spec, ValueColumns):
        return f"{name} (column {spec.column!r})"
    columns: Sequence[str] = [spec.column] if spec.column else list(spec.columns or [])
    return f"{name} (one class, column {columns[0]!r})" if spec.column else f"{name} (0/1: {listed(columns, 20)})"

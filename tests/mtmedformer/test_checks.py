import pytest

from mtmedformer.batch import Task
from mtmedformer.checks import check_tasks
from mtmedformer.errors import ConfigError

OTHER = {"other": Task("other", "detection", ("x",))}


def task(*classes, kind="classification", multi_label=False):
    return {"finding": Task("finding", kind, classes, multi_label=multi_label)}


def refusal(head, data, stage="fit", place=lambda task, label: ""):
    with pytest.raises(ConfigError) as caught:
        check_tasks(stage, head, data, place)
    return str(caught.value)


def test_equal_tasks_pass_and_a_task_without_labels_passes_outside_fit():
    check_tasks("fit", task("a", "b"), task("a", "b"))
    check_tasks("fit", task("a", multi_label=True), task("a", multi_label=True))
    check_tasks("fit", task("a", kind="detection"), task("a", kind="detection"))
    more = {**task("a", "b"), "other": Task("other", "detection", ("x",))}
    check_tasks("test", more, task("a", "b"))
    assert "heads.other: the data set has no task of this name; it has finding" in refusal(more, task("a", "b"))


def test_a_wrong_class_is_answered_with_the_classes_found_and_the_nearest():
    text = refusal(task("normal", "pnuemonia"), task("normal", "pneumonia"))
    assert "the data have no class 'pnuemonia' (did you mean 'pneumonia'?)" in text
    assert "the classes of the data are ['normal', 'pneumonia']" in text
    assert "(did you mean 'Normal'?)" in refusal(task("NORMAL", "x"), task("Normal", "x"))
    assert "write them in this order" in refusal(task("b", "a"), task("a", "b"))
    assert "did you mean 'finding'?" in refusal(
        {"findings": Task("findings", "classification", ("a", "b"))}, task("a", "b")
    )
    assert "a head for classification, but in the data set it is detection" in refusal(
        task("a", "b"), task("a", "b", kind="detection")
    )


def test_a_class_that_the_head_lacks_is_named_with_its_place():
    text = refusal(task("a", "b"), task("12", "a", "b"), place=lambda task, label: f"{task} {label} line 14")
    assert "the head lacks '12' (finding 12 line 14)" in text
    assert "add" not in text
    text = refusal(task("none", "a", "b"), task("a", "b"), place=lambda task, label: f"{task}: 4 cells {label}")
    assert "the data have no class 'none' (finding: 4 cells none)" in text


def test_a_task_with_a_single_class_is_named():
    place = lambda task, label: "labels.csv, column 'label': 6 cells 'mass'"  # noqa: E731
    for head in (task("mass"), task("mass", "normal"), task("mass", multi_label=True)):
        text = refusal(head, task("mass"), place=place)
        assert "heads.finding: the data leave this task with a single class, 'mass' (labels.csv, column 'label'" in text
        assert "multi_label" not in text
    assert "nothing to choose" in refusal({**task("mass"), **OTHER}, OTHER, stage="test")

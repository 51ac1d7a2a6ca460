"""Columns of numbers and grades: blank is unknown, what cannot be read is unknown and counted, nothing is changed."""

from pathlib import Path

import pytest
from PIL import Image

from datamodules import LabelsCSVDataModule
from datamodules.labels_csv.columns import ClassColumns, ValueColumns
from mtmedformer.errors import ConfigError, DataError


def table(root: Path, columns: dict[str, list[str]]) -> Path:
    count = len(next(iter(columns.values())))
    for i in range(count):
        Image.effect_noise((48, 48), 40 + i).save(root / f"{i}.png")
    lines = [",".join(["image", "patient", *columns])]
    lines += [",".join([f"{i}.png", f"p{i}", *(values[i] for values in columns.values())]) for i in range(count)]
    (root / "labels.csv").write_text("\n".join(lines) + "\n")
    return root


def data(root: Path, **regression: ValueColumns) -> LabelsCSVDataModule:
    return LabelsCSVDataModule(root, regression=regression, cache_dir=None, num_workers=0)


def values(module: LabelsCSVDataModule, task: str) -> dict[str, float]:
    return {r.id: r.truth[task].value for r in module.catalogue().records if task in r.truth}


def test_numbers_are_read_as_they_are_and_blank_ones_are_unknown(tmp_path):
    module = data(table(tmp_path, {"age": ["63", "", "40.5", "0", "n/a"]}), age=ValueColumns("age", unit="years"))
    assert values(module, "age") == {"0": 63, "2": 40.5, "3": 0}
    task = module.catalogue().tasks["age"]
    assert (task.kind, task.classes, task.unit, task.range) == ("regression", (), "years", (0.0, 63.0))
    assert not module.quarantine.issues


def test_ages_of_dicom_are_years_where_the_unit_is_years(tmp_path):
    root = table(tmp_path, {"age": ["063Y", "018M", "000D"]})
    assert values(data(root, age=ValueColumns("age", unit="years")), "age") == {"0": 63, "1": 1.5, "2": 0}
    with pytest.raises(DataError, match=r"no number of 'age' can be read.*line 2, column 'age'"):
        data(root, age=ValueColumns("age", unit="mm")).catalogue()


def test_what_is_no_number_or_outside_the_range_is_unknown_and_counted(tmp_path):
    root = table(tmp_path, {"age": ["63", "old", "999", "-1", "12,5".replace(",", ";"), "50"]})
    module = data(root, age=ValueColumns("age", range=(0, 120)))
    assert values(module, "age") == {"0": 63, "5": 50}
    reasons = {issue.id: issue.reason for issue in module.quarantine.issues}
    assert reasons == {
        "1": "cell is no number",
        "2": "number outside the range",
        "3": "number outside the range",
        "4": "cell is no number",
    }
    assert "0 to 120" in module.quarantine.issues[1].detail
    assert module.catalogue().tasks["age"].range == (0.0, 120.0)


def test_grades_keep_the_order_of_the_configuration(tmp_path):
    root = table(tmp_path, {"grade": ["mild", "none", "severe", "", "sever"], "birads": ["1", "2.0", "4", "3", ""]})
    module = data(
        root,
        grade=ValueColumns("grade", classes=["none", "mild", "severe"]),
        birads=ValueColumns("birads", classes=["1", "2", "3", "4"]),
    )
    assert values(module, "grade") == {"0": 1, "1": 0, "2": 2}
    assert values(module, "birads") == {"0": 0, "1": 1, "2": 3, "3": 2}
    assert [(i.id, i.reason) for i in module.quarantine.issues][:1] == [("4", "unknown class")]
    assert "did you mean 'severe'" in module.quarantine.issues[0].detail


def test_a_flag_of_zero_is_unknown_and_a_labelled_blank_is_an_error(tmp_path):
    root = table(tmp_path, {"age": ["63", "40", ""], "has": ["1", "0", "1"]})
    module = data(root, age=ValueColumns("age", flag="has"))
    assert values(module, "age") == {"0": 63}
    assert [issue.reason for issue in module.quarantine.issues] == ["labelled but no number given"]
    assert module.catalogue().tasks["age"].range == (63.0, 63.0)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (ValueColumns("age", range=(10, 1)), "range"),
        (ValueColumns("age", classes=["a"]), "two grades"),
        (ValueColumns("age", classes=["a", "b"], unit="mm"), "neither unit nor range"),
        (ValueColumns("age", classes=["a", "a"]), "each class once"),
    ],
)
def test_contradictions_in_the_configuration_are_refused(tmp_path, spec, words):
    with pytest.raises(ConfigError, match=words):
        data(tmp_path, age=spec)


def test_samples_of_a_split_set_have_the_numbers_and_rows_that_disagree_are_refused(tmp_path):
    root = table(tmp_path, {"age": [str(20 + i) if i % 5 else "" for i in range(20)], "label": list("ab" * 10)})
    module = LabelsCSVDataModule(
        root,
        classification={"finding": ClassColumns("label")},
        regression={"age": ValueColumns("age", unit="years")},
        cache_dir=None,
        num_workers=0,
        image_size=32,
        batch_size=4,
    )
    module.setup("fit")
    seen = 0
    for batch in module.train_dataloader():
        target = batch.targets["age"]
        for meta, value, present in zip(batch.meta, target.values.tolist(), target.present.tolist(), strict=True):
            assert present == (int(meta.id) % 5 > 0)
            assert not present or value == 20 + int(meta.id)
            seen += present
    assert seen > 5
    text = (root / "labels.csv").read_text()
    (root / "labels.csv").write_text(text + "1.png,p1,77,b\n")
    again = data(root, age=ValueColumns("age"))
    with pytest.raises(DataError, match=r"contradict.*'age'"):
        again.catalogue()

"""Numbers and grades in batches, in checks of head against data, in tiles and in calibration."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from mtmedformer.batch import Meta, RegressionTarget, Sample, Task, collate
from mtmedformer.calibration import TaskCalibration, combined_calibration, conformal_margin
from mtmedformer.checks import check_tasks, common_tasks
from mtmedformer.errors import ConfigError, DataError
from mtmedformer.inference.ensemble import combined
from mtmedformer.inference.results import FoundValue, image_result
from mtmedformer.inference.tiling import predict_tiled
from mtmedformer.metrics.calibration import TemperatureSums, decisions

AGE = Task("age", "regression", (), unit="years", range=(0.0, 100.0))
GRADE = Task("grade", "regression", ("A", "B", "C"))


def sample(truth: dict) -> Sample:
    return Sample(torch.zeros(1, 8, 8), truth, Meta("i", "p"))


def test_a_missing_number_is_unknown_and_zero_is_a_number():
    tasks = {"age": AGE}
    batch = collate([sample({"age": torch.tensor(0.0)}), sample({}), sample({"age": torch.tensor(math.nan)})], tasks)
    target = batch.targets["age"]
    assert isinstance(target, RegressionTarget)
    assert target.present.tolist() == [True, False, False]
    assert target.values[0] == 0
    assert batch.only(0).targets["age"].values.tolist() == [0.0]
    assert batch.to(torch.device("cpu")).targets["age"].values.dtype == torch.float32


def test_grades_are_exclusive_classes_and_unknown_ones_stay_unknown():
    target = RegressionTarget(torch.tensor([2.0, math.nan, 0.0]), torch.tensor([True, False, True]))
    labels = target.one_hot(3).labels
    assert labels[0].tolist() == [0, 0, 1]
    assert labels[1].isnan().all()
    p = torch.tensor([[0.1, 0.2, 0.7]] * 3)
    confidence, right, likelihood = (part.flatten() for part in decisions(GRADE, p, target))
    torch.testing.assert_close(confidence[[0, 2]], torch.tensor([0.7, 0.7]))
    assert right.nan_to_num(-1).tolist() == [1, -1, 0]
    torch.testing.assert_close(likelihood[[0, 2]], torch.tensor([0.7, 0.1]))
    sums = TemperatureSums(GRADE)
    sums.update(p.log(), target, [Meta(str(i), "p") for i in range(3)])
    curve, count, images = sums.sums()
    assert (count, images) == (2, 2)
    assert curve[20, 0] == pytest.approx(-math.log(0.7) - math.log(0.1), rel=1e-5)


def test_head_and_data_that_fit_pass_without_a_word():
    check_tasks("fit", {"age": AGE, "grade": GRADE}, {"age": AGE, "grade": GRADE})
    check_tasks("fit", {"age": AGE}, {"age": replace(AGE, range=(20.0, 80.0))})
    check_tasks("test", {"age": AGE}, {"age": replace(AGE, range=(20.0, 180.0))})  # metrics of another set


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (replace(AGE, unit="months"), "unit"),
        (replace(AGE, range=(0.0, 999.0)), r"\[0, 100\].*\[0, 999\]"),
        (replace(GRADE, name="age"), "OrdinalHead"),
        (Task("age", "classification", ("a", "b")), "regression"),
    ],
)
def test_head_and_data_that_differ_are_refused(data, words):
    with pytest.raises(ConfigError, match=words):
        check_tasks("fit", {"age": AGE}, {"age": data})


def test_sites_share_one_range_and_must_share_the_unit():
    both = common_tasks(
        {"a": {"age": replace(AGE, range=(10.0, 50.0))}, "b": {"age": replace(AGE, range=(30.0, 90.0))}}
    )
    assert both["age"].range == (10.0, 90.0)
    with pytest.raises(ConfigError, match=r"unit 'years' at a, 'months' at b"):
        common_tasks({"a": {"age": AGE}, "b": {"age": replace(AGE, unit="months")}})


def test_numbers_and_grades_of_windows_are_averaged():
    def predict(crops):
        mean = crops.mean((1, 2, 3))
        return {"age": mean[:, None] * 100, "grade": torch.stack([mean, 1 - mean, 0 * mean], 1)}

    image = torch.cat([torch.zeros(1, 1, 8, 8), torch.ones(1, 1, 8, 8)], dim=3)
    merged = predict_tiled(predict, image, {"age": AGE, "grade": GRADE}, (8, 8), overlap=0.0, flip_tta=True)
    torch.testing.assert_close(merged["age"], torch.tensor([[50.0]]))
    torch.testing.assert_close(merged["grade"], torch.tensor([[0.5, 0.5, 0.0]]))


def test_the_interval_holds_its_share_of_new_images_and_needs_enough_of_them():
    rng = np.random.default_rng(0)
    held = [
        float(np.mean(np.abs(rng.standard_t(3, 400)) <= conformal_margin(rng.standard_t(3, 60), 0.9)))
        for _ in range(200)
    ]
    assert 0.9 <= np.mean(held) < 0.93
    assert conformal_margin(np.arange(8.0), 0.9) is None
    assert conformal_margin(np.arange(9.0), 0.9) == 8
    assert conformal_margin(np.zeros(0), 0.9) is None


def test_results_of_an_image_have_unit_interval_and_grade():
    predictions = {"age": torch.tensor([[95.0]]), "grade": torch.tensor([[0.1, 0.3, 0.6]])}
    calibration = {"age": TaskCalibration(20, margin=10.0, coverage=0.9)}
    tasks = {"age": AGE, "grade": GRADE}
    result = image_result(predictions, 0, Meta("i", "p"), tasks, calibration=calibration)
    assert result.values["age"] == FoundValue(95.0, "years", 85.0, 100.0)  # numbers end at the range
    assert str(result.values["age"]) == "95 (85 to 100) years"
    assert (result.values["grade"].grade, result.values["grade"].value) == ("C", 2.0)
    assert result.classes["grade"]["B"] == pytest.approx(0.3)
    assert result.uncertainty["grade"]["entropy"] > 0
    assert "age" not in result.uncertainty
    without = image_result(predictions, 0, Meta("i", "p"), tasks)
    assert without.values["age"] == FoundValue(95.0, "years")
    with pytest.raises(DataError, match="NaN"):
        image_result({"age": torch.tensor([[torch.nan]])}, 0, Meta("i", "p"), {"age": AGE})


def test_an_ensemble_averages_numbers_and_grades_and_gives_their_spread():
    seen = [
        {"age": torch.tensor([[40.0], [60.0]]), "grade": torch.tensor([[1.0, 0.0, 0.0], [0.2, 0.2, 0.6]])},
        {"age": torch.tensor([[50.0], [60.0]]), "grade": torch.tensor([[0.0, 1.0, 0.0], [0.2, 0.2, 0.6]])},
    ]
    predictions, disagreement = combined({"age": AGE, "grade": GRADE}, seen)
    torch.testing.assert_close(predictions["age"], torch.tensor([[45.0], [60.0]]))
    torch.testing.assert_close(disagreement["age"], torch.tensor([5.0, 0.0]))
    torch.testing.assert_close(predictions["grade"][0], torch.tensor([0.5, 0.5, 0.0]))
    torch.testing.assert_close(disagreement["grade"], torch.tensor([math.log(2), 0.0]), atol=1e-6, rtol=0)
    fitted = [{"age": TaskCalibration(20, margin=m, coverage=0.9)} for m in (4.0, 8.0)]
    assert combined_calibration(fitted)["age"].margin == 6
    assert combined_calibration([*fitted, {}])["age"].margin is None

"""The mean of several models, and their disagreement."""

import math

import pytest
import torch

from mtmedformer.batch import Meta, Task
from mtmedformer.calibration import TaskCalibration, combined_calibration
from mtmedformer.inference.ensemble import DISAGREEMENT, combined
from mtmedformer.inference.results import UNCERTAINTY, image_result

TASKS = {
    "health": Task("health", "classification", ("well", "sick")),
    "signs": Task("signs", "classification", ("cough", "fever"), multi_label=True),
    "organ": Task("organ", "segmentation", ("organ",)),
    "parts": Task("parts", "segmentation", ("upper", "lower")),
    "nodules": Task("nodules", "detection", ("nodule",)),
}


def seen(p, box_scores=(0.9,)):
    """Predictions of two images that all have the probability p."""
    return {
        "health": torch.tensor([[1 - p, p]] * 2),
        "signs": torch.tensor([[p, 0.5]] * 2),
        "organ": torch.full((2, 1, 4, 4), p),
        "parts": torch.full((2, 2, 4, 4), p / 2),
        "nodules": [
            {
                "boxes": torch.tensor([[0.0, 0.0, 2.0, 2.0]] * len(box_scores)).reshape(-1, 4),
                "scores": torch.tensor(box_scores),
                "labels": torch.zeros(len(box_scores), dtype=torch.int64),
            }
        ]
        * 2,
    }


def test_probabilities_are_averaged_and_disagreement_is_mutual_information():
    predictions, disagreement = combined(TASKS, [seen(0.2), seen(0.8)])
    assert predictions["health"].tolist() == [pytest.approx([0.5, 0.5])] * 2
    assert float(predictions["organ"][0, 0, 0, 0]) == pytest.approx(0.5)
    gain = math.log(2) + 0.2 * math.log(0.2) + 0.8 * math.log(0.8)
    assert disagreement["health"].tolist() == pytest.approx([gain] * 2, abs=1e-6)
    assert disagreement["signs"].tolist() == pytest.approx([gain / 2] * 2, abs=1e-6), "mean over the classes"
    assert disagreement["organ"].shape == disagreement["parts"].shape == (2, 4, 4)
    assert float(disagreement["organ"][0, 0, 0]) == pytest.approx(gain, abs=1e-6)
    assert float(disagreement["parts"][0, 0, 0]) == pytest.approx(gain, abs=1e-6), "what is left is background"


def test_members_that_agree_have_no_disagreement():
    predictions, disagreement = combined(TASKS, [seen(0.3)] * 3)
    alone = seen(0.3)
    assert all(torch.allclose(predictions[name], alone[name]) for name in TASKS if name != "nodules")
    assert torch.allclose(predictions["nodules"][0]["scores"], alone["nodules"][0]["scores"])
    assert all(float(value.abs().max()) < 1e-6 for value in disagreement.values())


def test_a_box_of_one_member_is_disagreed_about_and_no_box_is_not():
    _, disagreement = combined(TASKS, [seen(0.5), seen(0.5, box_scores=())])
    half = -0.45 * math.log(0.45) - 0.55 * math.log(0.55) - (-0.9 * math.log(0.9) - 0.1 * math.log(0.1)) / 2
    assert disagreement["nodules"].tolist() == pytest.approx([half] * 2, abs=1e-5)
    _, disagreement = combined(TASKS, [seen(0.5, box_scores=())] * 2)
    assert disagreement["nodules"].tolist() == [0, 0]


def test_disagreement_of_a_mask_counts_inside_the_image_only():
    predictions, disagreement = combined(TASKS, [seen(0.5), seen(0.5)])
    disagreement["organ"][:, :, 2:] = 7.0  # columns beside the image
    predictions[UNCERTAINTY] = {name: {DISAGREEMENT: value} for name, value in disagreement.items()}
    meta = Meta("a", "p", original_size=(4, 2))
    result = image_result(predictions, 0, meta, TASKS)
    assert result.uncertainty["organ"][DISAGREEMENT] == pytest.approx(0, abs=1e-6)
    assert set(result.uncertainty) == set(TASKS)


def test_thresholds_are_the_mean_of_those_that_all_members_have():
    first = {"health": TaskCalibration(10, 2.0, thresholds={"sick": {"youden": 0.2, "f1": 0.4}})}
    second = {"health": TaskCalibration(10, 1.0, thresholds={"sick": {"youden": 0.6}})}
    both = combined_calibration([first, second])
    assert both["health"].thresholds == {"sick": {"youden": pytest.approx(0.4)}}
    assert both["health"].temperature == 2.0
    assert combined_calibration([first, {}])["health"].thresholds == {}
    assert combined_calibration([first]) == first

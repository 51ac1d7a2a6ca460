"""A comparison of trainings with made-up scores: table, verdicts, costs, remarks and page; nothing is trained."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from mtmedformer.batch import Meta
from mtmedformer.commands.compare import runner
from mtmedformer.commands.compare.code_version import code_version
from mtmedformer.commands.compare.comparison import Costs, write_csv, write_json_report
from mtmedformer.commands.compare.measures import costs_of, curve_of, same_start
from mtmedformer.commands.compare.report import render
from mtmedformer.commands.compare.results import compare, higher_is_better, limits
from mtmedformer.commands.compare.study import Study, Variant
from mtmedformer.commands.compare.trainings import Evaluation, RoundCosts, Status, Training, digest, write_json
from mtmedformer.metrics.rows import save_rows
from mtmedformer.metrics.segmentation import SegmentationMetrics

SITES = {"north": 14, "south": 9}


def rows_file(file: Path, dice: dict[str, np.ndarray], patients: int = 0) -> None:
    """Write scores of made-up images: by site (n,)."""
    metric = SegmentationMetrics(["lung"], hausdorff=False)
    for site, scores in dice.items():
        meta = [Meta(f"im{i}", f"p{i + patients}", site) for i in range(len(scores))]
        metric.register(meta, torch.ones(len(scores), dtype=torch.bool))
        scores = torch.tensor(scores)[:, None, None]
        metric.scores.append(torch.cat([scores, scores / 2, torch.full_like(scores, torch.nan)], dim=2))
    save_rows({"lungs": metric}, file, "salt")


def make_training(
    folder, variant, run, dice, *, own=None, by="global", start="same", curve=(0.2, 0.5, 0.6), patients=0
):
    training = Training(variant, run, {"trainer": {"max_epochs": 3}}, digest([variant, run]), folder / variant / run)
    (training.folder / "run").mkdir(parents=True)
    status = Status(code_version(), fitted=True, seconds=10.0, processor_seconds=8.0, models=by)
    status.evaluated = {"test": Evaluation(by, 1.0)}
    status.write(training.folder)
    if by == "global":
        rows_file(training.folder / "run/test_rows.npz", dice, patients)
    for site, scores in (own or {}).items():
        rows_file(training.folder / f"run/sites/{site}/test_rows.npz", {site: scores})
    write_json({"encoder": {"hash": f"{start} {run}", "weights": 5}}, training.folder / "start_weights.json")
    RoundCosts([100] * 3, [200] * 3, [1.0, 2.0, 3.0]).write(training.folder)
    lines = [["epoch", "val/lungs/dice", "val/lungs/dice/site=a", "val/lungs/dice/site=b"]]
    lines += [[i, 0.9, value - 0.1, value + 0.1] for i, value in enumerate(curve)]
    with (training.folder / "run/metrics.csv").open("w", newline="") as file:
        csv.writer(file).writerows(lines)
    return training


def scores(seed, shift=0.0):
    rng = np.random.default_rng(0)
    base = {site: rng.uniform(0.6, 0.9, n) for site, n in SITES.items()}
    noise = np.random.default_rng([seed, int(shift * 1000)])
    return {site: value + shift + noise.normal(0, 0.01, len(value)) for site, value in base.items()}


def make_study(**changes):
    names = ("plain", "better", "alike")
    result = {
        "name": "made-up",
        "base": (),
        "reference": "plain",
        "metrics": ("test/lungs/dice", "own/dice"),
        "seeds": (0, 1, 2),
        "variants": {name: Variant(name, f"the {name} one") for name in names},
        "yardstick": "better",
        "tuning": dict.fromkeys(names, 4),
    }
    return Study(**(result | changes))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    trainings = []
    for seed in range(3):
        for name, shift in (("plain", 0.0), ("better", 0.05), ("alike", 0.0)):
            own = {s: v + 0.1 for s, v in scores(seed, shift).items()} if name == "alike" else None
            trainings.append(
                make_training(folder, name, f"seed{seed}", scores(seed + (name == "alike") * 7, shift), own=own)
            )
    return compare(make_study(), trainings, "test", replicates=500), trainings


def test_a_better_variant_is_called_better_and_an_equal_one_is_not(made):
    result = made[0].metrics["test/lungs/dice"]
    assert result.differences["better"]["mean"].verdict == "better"
    assert result.differences["better"]["mean"].value == pytest.approx(0.05, abs=0.01)
    assert result.differences["better"]["worst"].verdict == "better"
    assert result.differences["alike"]["mean"].verdict == "no difference shown"
    assert set(result.pairs) == {"plain|better", "plain|alike", "better|alike"}
    assert result.pairs["plain|better"].verdict == "worse", "the first of a pair against the second"
    assert result.pairs["plain|better"].p_holm >= result.pairs["plain|better"].p


def test_the_mean_is_taken_over_sites_and_the_worst_site_is_named(made):
    value = made[0].metrics["test/lungs/dice"].values["plain"]
    by_site = {s: np.mean([scores(seed)[s].mean() for seed in range(3)]) for s in SITES}
    assert value.by_site == pytest.approx(by_site)
    assert value.mean.value == pytest.approx(np.mean(list(by_site.values())))
    assert value.worst_site == min(by_site, key=by_site.get)
    assert set(value.by_run) == {"seed0", "seed1", "seed2"}


def test_values_are_given_as_shares_of_the_yardstick(made):
    values = made[0].metrics["test/lungs/dice"].values
    assert values["better"].share == 1
    assert values["plain"].share == pytest.approx(values["plain"].mean.value / values["better"].mean.value)
    assert "share of better" in render(made[0])
    fewer = [training for training in made[1] if (training.variant, training.run) != ("better", "seed2")]
    few = compare(make_study(), fewer, "test", replicates=50).metrics["test/lungs/dice"].values
    both = [few["plain"].by_run[run] / few["better"].mean.value for run in ("seed0", "seed1")]
    assert few["plain"].share == pytest.approx(np.mean(both)), "on the runs that both have"
    alone = compare(make_study(yardstick=None), made[1], "test", replicates=50)
    assert math.isnan(alone.metrics["test/lungs/dice"].values["plain"].share)
    assert "share of better" not in render(alone)


def test_means_over_images(made):
    result = compare(make_study(average="images"), made[1], "test", replicates=50)
    every = np.mean([np.concatenate(list(scores(seed).values())).mean() for seed in range(3)])
    assert result.metrics["test/lungs/dice"].values["plain"].mean.value == pytest.approx(every)


def test_the_sites_own_models_are_evaluated_if_there_are_any(made):
    values = made[0].metrics["own/dice"].values
    together = made[0].metrics["test/lungs/dice"].values
    assert values["alike"].mean.value > together["alike"].mean.value + 0.05
    assert values["plain"].mean.value == pytest.approx(together["plain"].mean.value), "else the global one"


def test_without_a_global_model_the_sites_own_are_the_result(tmp_path):
    alone = make_training(tmp_path, "better", "seed0", {}, own=scores(0), by="own")
    plain = make_training(tmp_path, "plain", "seed0", scores(0))
    result = compare(make_study(), [plain, alone], "test", replicates=50)
    assert result.variants["better"].evaluated == "own"
    values = result.metrics["test/lungs/dice"].values
    assert values["better"].mean.value == pytest.approx(values["plain"].mean.value)


def test_costs_in_all_and_until_95_percent_of_the_yardstick(made, tmp_path):
    assert made[0].costs["plain"] == Costs(5, 10.0, 8.0, 3, 300, 600, 2, 200, 3.0)
    slow = make_training(tmp_path, "slow", "seed0", scores(0), curve=(0.1, 0.2, 0.3))
    cost = costs_of(slow, "test/lungs/dice", made[1][0], True)
    assert cost.rounds_to_95 is None
    assert cost.bytes == 300
    assert curve_of(slow, "test/lungs/dice").values == pytest.approx([0.1, 0.2, 0.3]), "the mean over sites, not images"
    assert curve_of(slow, "test/dice").values == pytest.approx([0.1, 0.2, 0.3])


def test_remarks_name_the_limits_of_the_comparison(made, tmp_path):
    assert made[0].remarks == [
        "There are 3 runs; with fewer than five, the variance between seeds is a rough estimate."
    ]
    plain = make_training(tmp_path, "plain", "seed0", scores(0))
    other = make_training(tmp_path, "better", "seed0", scores(0), start="other", patients=5)
    missing = Training("alike", "seed0", {}, "", tmp_path / "nowhere")
    study = make_study(tuning={"plain": 1, "better": 9})
    found = " ".join(compare(study, [plain, other, missing], "test", replicates=20).remarks)
    for words in (
        "1 of 3 trainings",
        "one run",
        "number of settings tried",
        "encoder started differently",
        "different images",
    ):
        assert words in found
    assert same_start([plain]) == []


def test_different_initial_weights_are_reported_once_and_not_for_other_architectures(tmp_path):
    trainings = []
    for run in ("seed0", "seed1"):
        for name, weights, head in (("plain", 5, "same"), ("better", 5, "same"), ("wide", 9, "other")):
            trainings.append(make_training(tmp_path, name, run, scores(0)))
            start = {"encoder": {"hash": name, "weights": weights}, "heads.lungs": {"hash": head, "weights": 5}}
            write_json(start, trainings[-1].folder / "start_weights.json")
    assert same_start(trainings) == ["seed0, seed1: encoder started differently in plain; better"]


def test_an_unknown_metric_is_a_remark_and_the_others_are_compared(made):
    result = compare(make_study(metrics=("test/lungs/dice", "test/dcie")), made[1], "test", replicates=20)
    assert list(result.metrics) == ["test/lungs/dice"]
    assert any("did you mean dice" in remark for remark in result.remarks)


def test_a_study_without_finished_trainings_has_a_report():
    result = compare(make_study(), [], "test")
    assert result.metrics == {}
    assert "No training is finished yet" in render(result)


def test_reports_are_written_and_need_no_other_file(made, tmp_path):
    write_json_report(made[0], tmp_path / "c.json")
    assert json.loads((tmp_path / "c.json").read_text())["reference"] == "plain"
    write_csv(made[0], tmp_path / "c.csv")
    rows = list(csv.DictReader((tmp_path / "c.csv").open(newline="")))
    assert [(r["metric"], r["variant"]) for r in rows[:2]] == [
        ("test/lungs/dice", "plain"),
        ("test/lungs/dice", "better"),
    ]
    assert rows[1]["verdict"] == "better"
    page = render(made[0])
    assert "Better than plain: better." in page
    assert "<script" not in page
    assert "http://" not in page
    assert "https://" not in page
    assert page.count("<svg") == 6


@pytest.mark.parametrize(
    ("metric", "expected"),
    [("test/lungs/dice", True), ("test/hd95", False), ("own/lungs/nll_raw", False), ("test/finding/auroc", True)],
)
def test_direction(metric, expected):
    assert higher_is_better(metric) is expected


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("test/lesions/map50", (0, 1)),
        ("test/gain_at80", (-1, 1)),
        ("test/lungs/hd95", (0, math.inf)),
        ("own/nll_raw", (0, math.inf)),
    ],
)
def test_limits_of_a_metric(metric, expected):
    assert limits(metric) == expected


def test_an_interval_stays_within_the_limits_of_its_metric(tmp_path):
    seen = {"north": np.array([0.0, 0.0, 1.0]), "south": np.array([1.0, 0.0, 1.0])}
    trainings = [make_training(tmp_path, name, f"seed{i}", seen) for name in ("plain", "better") for i in range(2)]
    result = compare(make_study(metrics=("test/lungs/dice",)), trainings, "test", replicates=50)
    value = result.metrics["test/lungs/dice"].values["plain"]
    for of in ("mean", "worst"):
        assert getattr(value, of).low == 0
        assert getattr(value, of).high <= 1
        assert getattr(value, of).error > 0.2


@pytest.mark.parametrize(("text", "share"), [("step,epoch\n3,1\n7", 0.25), ("step,epoch\n3,1\n7,2\n", 0.5), ("st", 0)])
def test_progress_is_read_from_a_half_written_file(tmp_path, text, share):
    training = Training("plain", "seed0", {"trainer": {"max_epochs": 4}}, "key", tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.csv").write_text(text)
    assert runner.epochs_done(training) == share


def test_time_left():
    progress = runner.Progress(total=10, jobs=2)
    assert progress.left([]) is None
    assert progress.left([(10.0, 0.5), (10.0, 0.5)]) == pytest.approx((10 + 10 + 8 * 20) / 2)
    progress.done = [30.0, 30.0]
    assert progress.left([(10.0, 0.0), (40.0, 0.9)]) == pytest.approx((20 + 0 + 6 * 30) / 2)
    assert [runner.duration(s) for s in (8, 200, 3600, 7500)] == ["8 s", "3 min", "60 min", "2 h 05 min"]


@pytest.mark.parametrize(
    ("metric", "higher", "ends"),
    [
        ("val/age/mae", False, (0.0, math.inf)),
        ("age/rmse", False, (0.0, math.inf)),
        ("age/r2", True, (-math.inf, 1.0)),
        ("grade/kappa", True, (-1.0, 1.0)),
    ],
)
def test_metrics_of_numbers_have_their_direction_and_limits(metric, higher, ends):
    assert higher_is_better(metric) == higher
    assert limits(metric) == ends

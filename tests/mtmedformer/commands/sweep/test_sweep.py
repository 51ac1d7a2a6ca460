"""Sweep files, the choice of trials, how they end, and what is told of them; no training in here."""

import csv
import math
import subprocess
import sys
import time
from pathlib import Path

import matplotlib.image as mpimg
import optuna
import pytest
import yaml

from mtmedformer.commands.sweep import command, trials
from mtmedformer.commands.sweep.command import main
from mtmedformer.commands.sweep.results import Objective, Row, draw, objectives, points_of, show, write_csv
from mtmedformer.commands.sweep.study import front, next_trial, open_study, unfinished
from mtmedformer.commands.sweep.sweep_file import read_sweep
from mtmedformer.commands.sweep.trials import Job, Outcome, outcome, run_trials
from mtmedformer.errors import ConfigError

COMMAND = ["${env}", "${program}", "fit", "--config", "x.yaml", "${args}"]
PARAMETERS = {
    "model.lr": {"distribution": "log_uniform_values", "min": 0.001, "max": 1},
    "model.depth": {"min": 1, "max": 3},
    "model.kind": {"values": ["a", "b"]},
    "model.fixed": {"value": 7},
}


def write(folder, **changes):
    content = {
        "program": "mtmedformer",
        "method": "random",
        "metric": {"name": "val/score", "goal": "maximize"},
        "run_cap": 4,
        "parameters": PARAMETERS,
        "command": COMMAND,
    } | changes
    file = folder / "sweep.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return file


def test_ranges_mean_what_they_mean_to_wandb(tmp_path):
    specs = {
        "a": {"min": 0.5, "max": 2.0},
        "b": {"min": 1, "max": 5},
        "c": {"distribution": "log_uniform_values", "min": 0.01, "max": 10},
        "d": {"distribution": "log_uniform", "min": -2, "max": 1},
        "e": {"distribution": "q_uniform", "min": 0, "max": 1, "q": 0.25},
        "f": {"values": [1, "x", None, True]},
        "g": {"distribution": "uniform", "min": 0, "max": 1},
    }
    space = read_sweep(write(tmp_path, parameters=specs)).space
    assert space["a"] == optuna.distributions.FloatDistribution(0.5, 2.0)
    assert space["b"] == optuna.distributions.IntDistribution(1, 5)
    assert space["c"] == optuna.distributions.FloatDistribution(0.01, 10, log=True)
    assert (space["d"].low, space["d"].high, space["d"].log) == (math.exp(-2), math.exp(1), True)
    assert space["e"].step == 0.25
    assert space["f"].choices == (1, "x", None, True)
    assert space["g"] == optuna.distributions.FloatDistribution(0, 1)


def test_the_command_line_of_a_trial(tmp_path):
    sweep = read_sweep(write(tmp_path))
    assert sweep.arguments({"model.lr": 1e-05, "model.kind": "b"}) == [
        "fit",
        "--config",
        "x.yaml",
        "--model.fixed=7",
        "--model.lr=1e-05",
        "--model.kind=b",
    ]


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"method": "genetic"}, "bayes, grid or random"),
        ({"metric": {"name": "val/score"}}, "goal: maximize"),
        ({"metric": None}, "metric is None"),
        ({"parameters": None}, "needs parameters"),
        ({"parameters": {"model": {"parameters": {"lr": {"value": 1}}}}}, "with dots"),
        ({"parameters": {"a": {"values": [[1, 2]]}}}, "write a list as text"),
        ({"parameters": {"a": {"min": 2, "max": 1}}}, "min below max"),
        ({"parameters": {"a": 3}}, "parameters.a: 3"),
        ({"parameters": {"a": {"distribution": "beta", "min": 0, "max": 1}}}, "distribution beta"),
        ({"parameters": {"a": {"distribution": "log_uniform_values", "min": 0, "max": 1}}}, "from 0 to 1"),
        ({"method": "grid"}, "a grid needs values: for every parameter; model.lr"),
        ({"command": ["${program}", "fit", "${args}", "--config", "x"]}, "last"),
        ({"command": None}, "must be a list"),
    ],
)
def test_mistakes_in_a_file_are_told(tmp_path, changes, words):
    with pytest.raises(ConfigError) as error:
        read_sweep(write(tmp_path, **changes))
    assert words in str(error.value)
    assert "sweep.yaml" in str(error.value)


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml"):
        read_sweep(tmp_path / "none.yaml")


def chosen(sweep, folder, count, stop_after=None, value=lambda p: p["model.lr"]):
    """Choose and end trials, in a new process's worth of objects after ``stop_after``."""
    study, seen = open_study(sweep, folder), []
    for number in range(count):
        if number == stop_after:
            study = open_study(sweep, folder)
        trial = next_trial(study, sweep, seed=3)
        study.tell(trial.number, value(trial.params))
        seen.append(trial.params)
    return seen


@pytest.mark.parametrize("method", ["random", "bayes"])
def test_an_interrupted_sweep_chooses_as_an_uninterrupted_one(tmp_path, method):
    sweep = read_sweep(write(tmp_path, method=method))
    whole = chosen(sweep, tmp_path / "whole", 14)
    assert whole == chosen(sweep, tmp_path / "broken", 14, stop_after=5)
    assert len({trial["model.lr"] for trial in whole}) == 14
    assert all(0.001 <= trial["model.lr"] <= 1 for trial in whole)


def test_bayes_learns_from_what_was_tried(tmp_path):
    sweep = read_sweep(write(tmp_path, method="bayes"))
    tried = chosen(sweep, tmp_path / "out", 30, value=lambda p: -abs(p["model.lr"] - 0.02))
    away = [abs(trial["model.lr"] - 0.02) for trial in tried]
    assert sum(away[-10:]) < 0.3 * sum(away[:10])


def test_a_grid_tries_every_combination_once(tmp_path):
    parameters = {"a": {"values": [1, 2, 3]}, "b": {"values": ["x", "y"]}, "c": {"value": 0}}
    sweep = read_sweep(write(tmp_path, method="grid", parameters=parameters, run_cap=99))
    assert sweep.trials == 6
    tried = chosen(sweep, tmp_path / "out", 6, stop_after=3, value=lambda p: p["a"])
    assert {(trial["a"], trial["b"]) for trial in tried} == {(a, b) for a in (1, 2, 3) for b in ("x", "y")}


def test_a_trial_that_was_begun_is_still_there(tmp_path):
    sweep = read_sweep(write(tmp_path))
    trial = next_trial(open_study(sweep, tmp_path / "out"), sweep, 0)
    (left,) = unfinished(open_study(sweep, tmp_path / "out"))
    assert (left.number, left.params) == (trial.number, trial.params)


def test_another_sweep_does_not_mix_in(tmp_path):
    open_study(read_sweep(write(tmp_path)), tmp_path / "out")
    with pytest.raises(ConfigError, match="another version of this sweep"):
        open_study(read_sweep(write(tmp_path, parameters={"a": {"values": [1, 2]}})), tmp_path / "out")


def ended(folder, code, rows=(), log=""):
    """A trial whose process has ended, and what it left."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.txt").write_text(log)
    if rows:
        with (folder / "metrics.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list({k: None for row in rows for k in row}))
            writer.writeheader()
            writer.writerows(rows)
    process = subprocess.Popen([sys.executable, "-c", f"raise SystemExit({code})"])
    process.wait()
    return Job(0, folder, process)


def test_the_best_epoch_counts(tmp_path):
    rows = [
        {"epoch": 0, "val/score": 0.4, "val/lungs/dice": 0.9, "train/loss": 3},
        {"epoch": 1, "val/score": "", "train/loss": 2},
        {"epoch": 2, "val/score": 0.7, "val/lungs/dice": 0.6},
        {"epoch": 3, "val/score": "nan", "val/lungs/dice": 1},
    ]
    most = outcome(ended(tmp_path, 0, rows), "val/score", maximise=True)
    assert (most.value, most.epoch, most.metrics) == (0.7, 2, {"val/score": 0.7, "val/lungs/dice": 0.6})
    least = outcome(ended(tmp_path, 3, rows), "val/score", maximise=False)
    assert (least.value, least.epoch) == (0.4, 0)


def test_failures_say_why(tmp_path):
    mistake = "epoch 1\nmtmedformer: the loss of task 'x' is nan:\ntraining has diverged\n"
    failed = outcome(ended(tmp_path / "a", 2, log=mistake), "val/score", maximise=True)
    assert failed.value is None
    assert failed.reason == "mtmedformer: the loss of task 'x' is nan: training has diverged (exit code 2)"
    assert "last line" in outcome(ended(tmp_path / "b", 1, log="x\nlast line"), "val/score", maximise=True).reason
    absent = outcome(ended(tmp_path / "c", 0, [{"epoch": 0, "val/score": 1}]), "val/none", maximise=True)
    assert absent.value is None
    assert "val/none was logged; there are val/score" in absent.reason


def fake_fit(monkeypatch, tmp_path, body):
    """Let trials be a short program instead of a training; ``folder`` and ``argv`` are known to it."""
    script = tmp_path / "fit.py"
    script.write_text(
        "import csv, os, pathlib, signal, sys, time\nargv = sys.argv[1:]\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "folder = pathlib.Path(next(a for a in argv if 'default_root_dir' in a).split('=')[1])\n"
        "values = dict(a[2:].split('=') for a in argv if '=' in a)\n"
        "def tell(**row):\n"
        "    with open(folder / 'metrics.csv', 'w', newline='') as f:\n"
        "        w = csv.DictWriter(f, list(row)); w.writeheader(); w.writerow(row)\n" + body
    )
    popen = subprocess.Popen

    def started(words, **options):
        return popen([sys.executable, str(script), *words[3:]], **options)

    monkeypatch.setattr(trials.subprocess, "Popen", started)


SCORES = "tell(**{'epoch': 0, 'val/score': lr, 'val/a/auroc': lr, 'val/b/dice': 1 - lr, 'val/c/map50': 0.5})\n"


def rows_of(folder):
    with (folder / "results.csv").open(newline="") as lines:
        return list(csv.DictReader(lines))


def test_a_sweep_from_its_file_to_its_results(monkeypatch, tmp_path, capsys):
    body = "lr = float(values['model.lr'])\nif lr > 0.2: sys.exit('mtmedformer: too fast')\n" + SCORES
    fake_fit(monkeypatch, tmp_path, body)
    arguments = ["--config", str(write(tmp_path)), "--output", str(tmp_path / "out"), "--jobs=2"]
    assert main([*arguments, "--trials=6"]) == 1, "some trials fail"
    told = capsys.readouterr().out
    rows = rows_of(tmp_path / "out")
    failed = [row for row in rows if row["failed"]]
    assert {row["trial"] for row in rows} == {str(n) for n in range(6)}
    assert 0 < len(failed) < 6
    assert all(row["value"] == "" and "too fast" in row["failed"] for row in failed)
    assert all(float(row["model.lr"]) == float(row["value"]) for row in rows if not row["failed"])
    assert f"{6 - len(failed)} trials ended, {len(failed)} failed" in told
    best = max((row for row in rows if row["value"]), key=lambda row: float(row["value"]))
    assert f"mtmedformer fit --config x.yaml --model.fixed=7 --model.lr={best['model.lr']}" in told.replace("\n", "")
    assert mpimg.imread(tmp_path / "out/pareto.png").std() > 0.05
    assert all(row["front"] == "1" for row in rows if row["value"]), "what one task gains the other loses"

    def never(*args, **kwargs):
        raise AssertionError("a finished trial was started again")

    monkeypatch.setattr(trials.subprocess, "Popen", never)
    before = (tmp_path / "out/results.csv").read_bytes()
    assert main([*arguments, "--trials=6"]) == 1
    assert (tmp_path / "out/results.csv").read_bytes() == before
    assert "6 ended before" in capsys.readouterr().out


def test_more_trials_go_on_from_those_there_are(monkeypatch, tmp_path):
    fake_fit(monkeypatch, tmp_path, "lr = float(values['model.lr'])\n" + SCORES)
    file = str(write(tmp_path, method="bayes"))
    assert main(["--config", file, "--output", str(tmp_path / "a"), "--trials=2"]) == 0
    assert main(["--config", file, "--output", str(tmp_path / "a"), "--trials=4"]) == 0
    assert main(["--config", file, "--output", str(tmp_path / "b"), "--trials=4"]) == 0
    one, other = rows_of(tmp_path / "a"), rows_of(tmp_path / "b")
    assert len(one) == 4
    assert [row["model.lr"] for row in one] == [row["model.lr"] for row in other]


def test_ctrl_c_lets_trials_save_themselves_and_the_next_start_continues_them(monkeypatch, tmp_path, capsys):
    body = (
        "lr = float(values['model.lr'])\n"
        "last = folder / 'checkpoints/last.ckpt'\n"
        "if 'ckpt_path' not in values:\n"
        "    last.parent.mkdir(exist_ok=True)\n"
        "    try:\n        (folder / 'begun').touch(); time.sleep(60)\n"
        "    except KeyboardInterrupt:\n        last.touch(); sys.exit(1)\n"
        "assert values['ckpt_path'] == str(last)\n" + SCORES
    )
    fake_fit(monkeypatch, tmp_path, body)
    arguments = ["--config", str(write(tmp_path)), "--output", str(tmp_path / "out"), "--trials=2", "--jobs=2"]
    real, pressed = time.sleep, []

    def sleep(seconds):
        real(seconds)
        if len(list((tmp_path / "out").glob("trials/*/begun"))) == 2 and not pressed:
            pressed.append(True)
            raise KeyboardInterrupt

    monkeypatch.setattr(trials.time, "sleep", sleep)
    assert main(arguments) == 1
    assert "goes on from here" in capsys.readouterr().out
    assert len(list((tmp_path / "out").glob("trials/*/checkpoints/last.ckpt"))) == 2
    assert main(arguments) == 0
    assert "2 begun" in capsys.readouterr().out
    assert len(rows_of(tmp_path / "out")) == 2


def test_a_killed_trial_without_a_checkpoint_starts_anew(monkeypatch, tmp_path):
    fake_fit(monkeypatch, tmp_path, "assert not (folder / 'left').exists()\nlr = 0.5\n" + SCORES)
    sweep = read_sweep(write(tmp_path))
    trial = next_trial(open_study(sweep, tmp_path / "out"), sweep, 0)
    (tmp_path / f"out/trials/{trial.number:04d}").mkdir(parents=True)
    (tmp_path / f"out/trials/{trial.number:04d}/left").touch()
    assert main(["--config", str(tmp_path / "sweep.yaml"), "--output", str(tmp_path / "out"), "--trials=1"]) == 0


def test_a_sweep_that_only_fails_is_given_up(monkeypatch, tmp_path, capsys):
    fake_fit(monkeypatch, tmp_path, "sys.exit('mtmedformer: no such key')\n")
    assert main(["--config", str(write(tmp_path)), "--output", str(tmp_path / "out"), "--trials=9"]) == 1
    told = capsys.readouterr().out
    assert told.count("FAILED") == 3
    assert "no such key" in told
    assert "nothing to compare" in told


def test_jobs_run_side_by_side_and_no_more_than_asked(monkeypatch, tmp_path):
    fake_fit(
        monkeypatch,
        tmp_path,
        "m = folder / 'at_work'; m.touch()\n"
        "(folder / 'seen').write_text(str(len(list(folder.parent.glob('*/at_work')))))\ntime.sleep(0.5); m.unlink()\n",
    )
    given = iter([(n, ["fit"]) for n in range(5)])
    ends = list(run_trials(given, lambda n: tmp_path / f"t/{n}", 2, lambda job: Outcome(job.number, 1.0)))
    assert sorted(end.number for end in ends) == list(range(5))
    seen = [int((tmp_path / f"t/{n}/seen").read_text()) for n in range(5)]
    assert max(seen) == 2


def test_two_sweeps_do_not_share_a_folder(monkeypatch, tmp_path):
    from filelock import FileLock

    (tmp_path / "out").mkdir()
    with (
        FileLock(tmp_path / "out/sweep.lock"),
        pytest.raises(ConfigError, match="running there already"),
    ):
        main(["--config", str(write(tmp_path)), "--output", str(tmp_path / "out")])


def test_optuna_is_asked_for_by_name(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match=r"pip install 'mtmedformer\[sweep\]'"):
        main(["--config", str(tmp_path / "x.yaml")])


def test_further_settings_hold_for_every_trial(monkeypatch, tmp_path):
    fake_fit(monkeypatch, tmp_path, "lr = 0.5\n(folder / 'argv').write_text(' '.join(argv))\n" + SCORES)
    arguments = ["--config", str(write(tmp_path)), "--output", str(tmp_path / "out"), "--trials=1"]
    assert main([*arguments, "--data.root=films", "--model.lr=9"]) == 0
    words = (tmp_path / "out/trials/0000/argv").read_text().split()
    assert "--data.root=films" in words
    assert words.index("--model.lr=9") < words.index(next(w for w in words if w.startswith("--model.depth")))


@pytest.mark.parametrize("argument", ["--jobs=0", "--trials=0", "--metrics=val/x:up", "--trails=3", "--data.root", "x"])
def test_options_that_cannot_be_are_refused(argument, tmp_path):
    with pytest.raises(ConfigError, match=argument.partition("=")[0]):
        main(["--config", str(write(tmp_path)), "--output", str(tmp_path / "out"), argument])


def row(number, value, **metrics):
    return Row(number, value, {"model.lr": 0.1 * number}, {f"val/{k.replace('_', '/')}": v for k, v in metrics.items()})


def test_the_front_holds_what_no_other_beats():
    points = {1: (0.9, 0.2), 2: (0.5, 0.5), 3: (0.4, 0.4), 4: (0.2, 0.9), 5: (0.9, 0.2)}
    assert front(points, (True, True)) == {1, 2, 4, 5}
    assert front(points, (True, False)) == {1, 5}
    assert front({n: (v[0],) for n, v in points.items()}, (True,)) == {1, 5}


def test_tasks_are_weighed_by_their_own_metric_unless_asked():
    rows = [row(0, 0.5, a_auroc=0.5, b_dice=0.6, b_hd95=4.0, c_map50=float("nan")), row(1, 0.4, a_auroc=0.4)]
    assert [one.name for one in objectives(rows, [])] == ["val/a/auroc", "val/b/dice"]
    assert points_of(rows, objectives(rows, [])) == {0: (0.5, 0.6)}
    asked = [Objective.parse("val/b/dice"), Objective.parse("val/b/hd95:min")]
    assert objectives(rows, asked) == asked
    assert [one.maximise for one in asked] == [True, False]
    with pytest.raises(ConfigError, match="val/none: was not logged"):
        objectives(rows, [Objective("val/none")])


def test_results_are_told_and_drawn(tmp_path):
    from io import StringIO

    from rich.console import Console

    rows = [row(0, 0.5, a_auroc=0.5, b_dice=0.6, c_map50=0.1), row(1, 0.4, a_auroc=0.7, b_dice=0.5, c_map50=0.2)]
    weighed = objectives(rows, [])
    text = StringIO()
    show(rows, weighed, {1}, "val/score", Console(file=text, width=120))
    for word in ("1*", "auroc", "dice", "0.7", "model", "lr"):
        assert word in text.getvalue()
    draw(points_of(rows, weighed), weighed, {1}, tmp_path / "p.png")
    height, width = mpimg.imread(tmp_path / "p.png").shape[:2]
    assert width > 2.5 * height, "three pairs of tasks side by side"
    write_csv(rows, {1}, tmp_path / "r.csv")
    with (tmp_path / "r.csv").open(newline="") as lines:
        read = list(csv.DictReader(lines))
    assert [(r["trial"], r["front"], r["val/a/auroc"]) for r in read] == [("0", "0", "0.5"), ("1", "1", "0.7")]


def test_nothing_else_is_left_in_the_project(tmp_path, monkeypatch):
    """By default everything goes below ``runs/sweeps/<name>``."""
    monkeypatch.chdir(tmp_path)
    fake_fit(monkeypatch, tmp_path, "lr = 0.5\n" + SCORES)
    assert main(["--config", str(write(tmp_path, name="mine")), "--trials=1"]) == 0
    assert Path("runs/sweeps/mine/results.csv").is_file()
    assert command.HOPELESS == 3

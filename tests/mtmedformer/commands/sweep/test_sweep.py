"""The choice of trials of a sweep, their results and reports; nothing is trained here."""

import csv
import subprocess
import sys
import time
from pathlib import Path

import matplotlib.image as mpimg
import pytest

from mtmedformer.commands import child_runs
from mtmedformer.commands.main import main as command_line
from mtmedformer.commands.sweep import command, trials
from mtmedformer.commands.sweep.command import main
from mtmedformer.commands.sweep.results import Objective, draw, objectives, points_of, show, write_csv
from mtmedformer.commands.sweep.study import front, next_trial, open_study, unfinished
from mtmedformer.commands.sweep.sweep_file import read_sweep
from mtmedformer.commands.sweep.trials import (
    RunningTrial,
    TrialResult,
    load_result,
    read_result,
    run_trials,
    save_result,
)
from mtmedformer.errors import ConfigError
from tests.fixtures.sweep_files import write


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


def test_bayes_uses_the_values_of_earlier_trials(tmp_path):
    sweep = read_sweep(write(tmp_path, method="bayes"))
    tried = chosen(sweep, tmp_path / "out", 30, value=lambda p: -abs(p["model.lr"] - 0.02))
    away = [abs(trial["model.lr"] - 0.02) for trial in tried]
    assert sum(away[-10:]) < 0.3 * sum(away[:10])


def test_a_result_is_read_back_by_the_next_process(tmp_path):
    result = TrialResult(3, 0.5, {"val/score": 0.5}, 2, 1.5, parameters={"model.lr": 0.1})
    save_result(result, tmp_path)
    assert load_result(tmp_path, 3, 0.5, {"model.lr": 0.1}) == result
    (tmp_path / "result.json").unlink()
    assert load_result(tmp_path, 3, 0.5, {"model.lr": 0.1}) == TrialResult(3, 0.5, parameters={"model.lr": 0.1})


def test_a_grid_tries_every_combination_once(tmp_path):
    parameters = {"a": {"values": [1, 2, 3]}, "b": {"values": ["x", "y"]}, "c": {"value": 0}}
    sweep = read_sweep(write(tmp_path, method="grid", parameters=parameters, run_cap=99))
    assert sweep.trials == 6
    tried = chosen(sweep, tmp_path / "out", 6, stop_after=3, value=lambda p: p["a"])
    assert {(trial["a"], trial["b"]) for trial in tried} == {(a, b) for a in (1, 2, 3) for b in ("x", "y")}


def test_an_unfinished_trial_is_found_by_the_next_process(tmp_path):
    sweep = read_sweep(write(tmp_path))
    trial = next_trial(open_study(sweep, tmp_path / "out"), sweep, 0)
    (left,) = unfinished(open_study(sweep, tmp_path / "out"))
    assert (left.number, left.params) == (trial.number, trial.params)


def test_a_folder_takes_one_sweep_only(tmp_path):
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
    return RunningTrial(0, folder, process)


def test_a_result_is_that_of_the_best_epoch(tmp_path):
    rows = [
        {"epoch": 0, "val/score": 0.4, "val/lungs/dice": 0.9, "train/loss": 3},
        {"epoch": 1, "val/score": "", "train/loss": 2},
        {"epoch": 2, "val/score": 0.7, "val/lungs/dice": 0.6},
        {"epoch": 3, "val/score": "nan", "val/lungs/dice": 1},
    ]
    most = read_result(ended(tmp_path, 0, rows), "val/score", maximise=True)
    assert (most.value, most.epoch, most.metrics) == (0.7, 2, {"val/score": 0.7, "val/lungs/dice": 0.6})
    least = read_result(ended(tmp_path, 3, rows), "val/score", maximise=False)
    assert (least.value, least.epoch) == (0.4, 0)


def test_a_failed_trial_has_a_reason(tmp_path):
    mistake = "epoch 1\nmtmedformer: the loss of task 'x' is nan:\ntraining has diverged\n"
    failed = read_result(ended(tmp_path / "a", 2, log=mistake), "val/score", maximise=True)
    assert failed.value is None
    assert failed.reason == "mtmedformer: the loss of task 'x' is nan: training has diverged (exit code 2)"
    assert "last line" in read_result(ended(tmp_path / "b", 1, log="x\nlast line"), "val/score", maximise=True).reason
    absent = read_result(ended(tmp_path / "c", 0, [{"epoch": 0, "val/score": 1}]), "val/none", maximise=True)
    assert absent.value is None
    assert "val/none was logged; logged were val/score" in absent.reason


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

    monkeypatch.setattr(child_runs.subprocess, "Popen", started)


SCORES = "tell(**{'epoch': 0, 'val/score': lr, 'val/a/auroc': lr, 'val/b/dice': 1 - lr, 'val/c/map50': 0.5})\n"


def rows_of(folder):
    with (folder / "results.csv").open(newline="") as lines:
        return list(csv.DictReader(lines))


def test_a_sweep_from_its_file_to_its_results(monkeypatch, tmp_path, capsys):
    body = "lr = float(values['model.lr'])\nif lr > 0.2: sys.exit('mtmedformer: too fast')\n" + SCORES
    fake_fit(monkeypatch, tmp_path, body)
    arguments = ["--config", str(write(tmp_path)), "--output", str(tmp_path / "out"), "--jobs=2"]
    assert main([*arguments, "--trials=6"]) == 1, "some trials fail"
    printed = capsys.readouterr().out
    rows = rows_of(tmp_path / "out")
    failed = [row for row in rows if row["failed"]]
    assert {row["trial"] for row in rows} == {str(n) for n in range(6)}
    assert 0 < len(failed) < 6
    assert all(row["value"] == "" and "too fast" in row["failed"] for row in failed)
    assert all(float(row["model.lr"]) == float(row["value"]) for row in rows if not row["failed"])
    assert f"{6 - len(failed)} trials succeeded, {len(failed)} failed" in printed
    best = max((row for row in rows if row["value"]), key=lambda row: float(row["value"]))
    assert f"mtmedformer fit --config x.yaml --model.fixed=7 --model.lr={best['model.lr']}" in printed.replace("\n", "")
    assert mpimg.imread(tmp_path / "out/pareto.png").std() > 0.05
    assert all(row["front"] == "1" for row in rows if row["value"]), "what one task gains the other loses"

    def never(*args, **kwargs):
        raise AssertionError("a finished trial was started again")

    monkeypatch.setattr(child_runs.subprocess, "Popen", never)
    before = (tmp_path / "out/results.csv").read_bytes()
    assert main([*arguments, "--trials=6"]) == 1
    assert (tmp_path / "out/results.csv").read_bytes() == before
    assert "6 ended before" in capsys.readouterr().out


def test_more_trials_continue_a_finished_sweep(monkeypatch, tmp_path):
    fake_fit(monkeypatch, tmp_path, "lr = float(values['model.lr'])\n" + SCORES)
    file = str(write(tmp_path, method="bayes"))
    assert main(["--config", file, "--output", str(tmp_path / "a"), "--trials=2"]) == 0
    assert main(["--config", file, "--output", str(tmp_path / "a"), "--trials=4"]) == 0
    assert main(["--config", file, "--output", str(tmp_path / "b"), "--trials=4"]) == 0
    one, other = rows_of(tmp_path / "a"), rows_of(tmp_path / "b")
    assert len(one) == 4
    assert [row["model.lr"] for row in one] == [row["model.lr"] for row in other]


def test_trials_save_after_ctrl_c_and_the_next_start_continues_them(monkeypatch, tmp_path, capsys):
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
    assert main(arguments) == 130
    assert "the same command continues" in capsys.readouterr().out
    assert len(list((tmp_path / "out").glob("trials/*/checkpoints/last.ckpt"))) == 2
    assert main(arguments) == 0
    assert "2 to continue" in capsys.readouterr().out
    assert len(rows_of(tmp_path / "out")) == 2


def test_a_killed_trial_without_a_checkpoint_is_started_again(monkeypatch, tmp_path):
    fake_fit(monkeypatch, tmp_path, "assert not (folder / 'left').exists()\nlr = 0.5\n" + SCORES)
    sweep = read_sweep(write(tmp_path))
    trial = next_trial(open_study(sweep, tmp_path / "out"), sweep, 0)
    (tmp_path / f"out/trials/{trial.number:04d}").mkdir(parents=True)
    (tmp_path / f"out/trials/{trial.number:04d}/left").touch()
    assert main(["--config", str(tmp_path / "sweep.yaml"), "--output", str(tmp_path / "out"), "--trials=1"]) == 0


def test_a_sweep_stops_after_three_failures_and_no_success(monkeypatch, tmp_path, capsys):
    fake_fit(monkeypatch, tmp_path, "sys.exit('mtmedformer: no such key')\n")
    assert main(["--config", str(write(tmp_path)), "--output", str(tmp_path / "out"), "--trials=9"]) == 1
    printed = capsys.readouterr().out
    assert printed.count("FAILED") == 3
    assert "no such key" in printed
    assert "nothing to compare" in printed


def test_at_most_jobs_trials_run_at_once(monkeypatch, tmp_path):
    fake_fit(
        monkeypatch,
        tmp_path,
        "m = folder / 'at_work'; m.touch()\n"
        "(folder / 'seen').write_text(str(len(list(folder.parent.glob('*/at_work')))))\ntime.sleep(0.5); m.unlink()\n",
    )
    given = iter([(n, ["fit"]) for n in range(5)])
    ends = list(run_trials(given, lambda n: tmp_path / f"t/{n}", 2, lambda job: TrialResult(job.number, 1.0)))
    assert sorted(end.number for end in ends) == list(range(5))
    seen = [int((tmp_path / f"t/{n}/seen").read_text()) for n in range(5)]
    assert max(seen) == 2


def test_a_folder_with_a_running_sweep_is_refused(monkeypatch, tmp_path):
    from filelock import FileLock

    (tmp_path / "out").mkdir()
    with (
        FileLock(tmp_path / "out/sweep.lock"),
        pytest.raises(ConfigError, match="running there already"),
    ):
        main(["--config", str(write(tmp_path)), "--output", str(tmp_path / "out")])


def test_a_missing_optuna_is_named_with_the_command_that_installs_it(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "optuna", None)
    for name in [name for name in sys.modules if name.startswith("mtmedformer.commands.sweep")]:
        monkeypatch.delitem(sys.modules, name)
    assert command_line(["sweep", "--config", str(tmp_path / "x.yaml")]) == 2
    assert "pip install 'mtmedformer[sweep]'" in " ".join(capsys.readouterr().err.split())


def test_further_settings_go_to_every_trial(monkeypatch, tmp_path):
    fake_fit(monkeypatch, tmp_path, "lr = 0.5\n(folder / 'argv').write_text(' '.join(argv))\n" + SCORES)
    arguments = ["--config", str(write(tmp_path)), "--output", str(tmp_path / "out"), "--trials=1"]
    assert main([*arguments, "--data.root=films", "--model.lr=9"]) == 0
    words = (tmp_path / "out/trials/0000/argv").read_text().split()
    assert "--data.root=films" in words
    assert words.index("--model.lr=9") < words.index(next(w for w in words if w.startswith("--model.depth")))


@pytest.mark.parametrize("argument", ["--jobs=0", "--trials=0", "--metrics=val/x:up", "--trails=3", "--data.root", "x"])
def test_invalid_options_are_refused(argument, tmp_path):
    with pytest.raises(ConfigError, match=argument.partition("=")[0]):
        main(["--config", str(write(tmp_path)), "--output", str(tmp_path / "out"), argument])


def row(number, value, **metrics):
    logged = {f"val/{k.replace('_', '/')}": v for k, v in metrics.items()}
    return TrialResult(number, value, logged, parameters={"model.lr": 0.1 * number})


def test_the_pareto_front_of_given_points():
    points = {1: (0.9, 0.2), 2: (0.5, 0.5), 3: (0.4, 0.4), 4: (0.2, 0.9), 5: (0.9, 0.2)}
    assert front(points, (True, True)) == {1, 2, 4, 5}
    assert front(points, (True, False)) == {1, 5}
    assert front({n: (v[0],) for n, v in points.items()}, (True,)) == {1, 5}


def test_objectives_are_the_primary_metrics_unless_named():
    rows = [row(0, 0.5, a_auroc=0.5, b_dice=0.6, b_hd95=4.0, c_map50=float("nan")), row(1, 0.4, a_auroc=0.4)]
    assert [one.name for one in objectives(rows, [])] == ["val/a/auroc", "val/b/dice"]
    assert points_of(rows, objectives(rows, [])) == {0: (0.5, 0.6)}
    asked = [Objective.parse("val/b/dice"), Objective.parse("val/b/hd95:min")]
    assert objectives(rows, asked) == asked
    assert [one.maximise for one in asked] == [True, False]
    with pytest.raises(ConfigError, match="val/none: was not logged"):
        objectives(rows, [Objective("val/none")])


def test_results_are_printed_drawn_and_written(tmp_path):
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


def test_output_goes_to_a_folder_named_after_the_sweep(tmp_path, monkeypatch):
    """By default everything goes below ``runs/sweeps/<name>``."""
    monkeypatch.chdir(tmp_path)
    fake_fit(monkeypatch, tmp_path, "lr = 0.5\n" + SCORES)
    assert main(["--config", str(write(tmp_path, name="mine")), "--trials=1"]) == 0
    assert Path("runs/sweeps/mine/results.csv").is_file()
    assert command.MOST_FAILURES == 3

"""Configurations that leave the site have no path of it."""

from pathlib import Path

import yaml

from mtmedformer.storage.shared_config import HIDDEN, without_paths


def test_paths_are_hidden_and_everything_else_stays():
    config = {
        "data": {"class_path": "datamodules.X", "init_args": {"root": "st_mary/films", "cache_dir": None, "limit": 3}},
        "list": ["/home/st_mary/a.png", "C:\\films", "~/films", "file:///x", "a/b ratio", "resnet50.a1_in1k"],
        "sites": {"north": {"init_args": {"root": Path("x").name, "table": "labels.csv"}}},
        "ckpt_path": "/runs/x/best.ckpt",
    }
    shared = without_paths(config)
    assert shared["data"]["init_args"] == {"root": HIDDEN, "cache_dir": None, "limit": 3}
    assert shared["list"] == [HIDDEN] * 4 + ["a/b ratio", "resnet50.a1_in1k"]
    assert shared["sites"]["north"]["init_args"] == {"root": HIDDEN, "table": HIDDEN}
    assert shared["ckpt_path"] == HIDDEN
    assert "st_mary" not in yaml.safe_dump(shared)
    assert config["data"]["init_args"]["root"] == "st_mary/films", "the configuration itself is unchanged"

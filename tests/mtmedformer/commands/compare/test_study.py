"""Reading a study: its content, its forms, and the messages for mistakes."""

import pytest
import yaml

from mtmedformer.commands.compare.configuration import arguments, data_sets, relevant_keys
from mtmedformer.commands.compare.study import is_own, metric_words, read_study
from mtmedformer.errors import ConfigError

PLAIN = {
    "base": "base.yaml",
    "variants": {"a": {"about": "first", "model.width": 2}, "b": {}},
    "reference": "a",
    "metrics": ["test/organ/dice", "own/dice"],
    "overrides": {"trainer.max_epochs": 3, "data.tasks": ["organ"]},
}


@pytest.fixture
def study(tmp_path):
    (tmp_path / "base.yaml").write_text("trainer: {max_epochs: 1}\n")

    def write(name="study.yaml", **changes):
        file = tmp_path / name
        file.write_text(yaml.safe_dump(PLAIN | changes, sort_keys=False))
        return file

    return write


def test_a_study_is_read(study, tmp_path):
    found = read_study(study())
    assert found.name == "study"
    assert list(found.variants) == ["a", "b"]
    assert found.variants["a"].about == "first"
    assert found.seeds == (0,)
    base = f"--config={tmp_path / 'base.yaml'}"
    assert arguments(found, found.variants["a"]) == [
        base,
        "--trainer.max_epochs=3",
        '--data.tasks=["organ"]',
        "--model.width=2",
    ]


def test_a_variant_overrides_the_study_and_the_command_line_too(study):
    found = read_study(study(variants={"a": {"trainer.max_epochs": 9}, "b": {}}), extra={"data.root": "there"})
    assert "--trainer.max_epochs=9" in arguments(found, found.variants["a"])
    assert "--trainer.max_epochs=3" in arguments(found, found.variants["b"])
    assert "--data.root=there" in arguments(found, found.variants["b"])


def test_forms_change_overrides_seeds_and_variants(study):
    forms = {
        "small": {"overrides": {"trainer.max_epochs": 2}, "seeds": [0, 1]},
        "full": {"variants": {"b": {"model.width": 8}}, "metrics": ["dice"]},
    }
    small, full = (read_study(study(forms=forms), form) for form in (None, "full"))
    assert (small.form, small.seeds, small.overrides["trainer.max_epochs"]) == ("small", (0, 1), 2)
    assert (full.form, full.overrides["trainer.max_epochs"], full.metrics) == ("full", 3, ("dice",))
    assert full.variants["b"].overrides == {"model.width": 8}


def test_a_form_names_variants_by_pattern(study):
    forms = {"long": {"variants": {"b*": {"trainer.max_epochs": 9}, "bb": {"trainer.max_epochs": 8}}}}
    found = read_study(study(variants={"a": {}, "b": {"seed": 1}, "bb": {}}, forms=forms)).variants
    assert {name: variant.overrides for name, variant in found.items()} == {
        "a": {},
        "b": {"seed": 1, "trainer.max_epochs": 9},
        "bb": {"trainer.max_epochs": 8},
    }


def test_a_study_like_another_takes_the_missing_keys_from_it(study):
    study("other.yaml", seeds=[0, 1, 2], yardstick="b")
    file = study("mine.yaml")
    file.write_text("like: other.yaml\nvariants: {b: absent, c: {model.width: 4}}\nyardstick: null\n")
    found = read_study(file)
    assert (found.name, found.seeds, list(found.variants)) == ("mine", (0, 1, 2), ["a", "c"])
    assert found.yardstick is None


def test_a_study_may_not_be_like_itself(study):
    file = study("mine.yaml")
    file.write_text("like: mine.yaml\n")
    with pytest.raises(ConfigError, match="is in turn like this study"):
        read_study(file)


def test_some_variants_keep_the_reference(study):
    variants = {"a": {}, "b": {}, "c": {}}
    found = read_study(study(variants=variants, yardstick="c")).only(["b"])
    assert list(found.variants) == ["a", "b"]
    assert found.yardstick is None
    with pytest.raises(ConfigError, match="did you mean b"):
        read_study(study(variants=variants)).only(["bb"])


def test_another_reference_and_another_metric_first(study):
    variants = {name: {"seed": 0} for name in "ab"}
    found = read_study(study(variants=variants, metrics=["test/dice", "own/dice", "test/nll"]))
    turned = found.against("b").led_by("own/dice")
    assert turned.reference == "b"
    assert turned.metrics == ("own/dice", "test/dice", "test/nll")
    assert list(turned.only(["a"]).variants) == ["a", "b"]
    with pytest.raises(ConfigError, match="--reference: 'c' is unknown"):
        found.against("c")
    with pytest.raises(ConfigError, match="--metric: 'own/dic' is unknown; did you mean own/dice"):
        found.led_by("own/dic")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"varants": {}}, "did you mean variants"),
        ({"reference": "c"}, "reference: 'c' is unknown"),
        ({"yardstick": "aa"}, "did you mean a"),
        ({"tuning": {"x": 3}}, "tuning: 'x'"),
        ({"variants": {"a": {}}}, "two or more"),
        ({"variants": {"a": {}, "b/c": {}}}, "is no folder name"),
        ({"variants": None}, "variants is missing"),
        ({"base": "bas.yaml"}, "no file"),
        ({"metrics": ["test/"]}, "not of the form"),
        ({"seeds": [0, 0]}, "given once"),
        ({"seeds": ["one"]}, "whole numbers"),
        ({"average": "site"}, "did you mean sites"),
        ({"checkpoint": "latest"}, "did you mean last"),
        ({"overrides": [1]}, "not of the form name: value"),
        ({"forms": {"small": {"seed": [1]}}}, "did you mean seeds"),
        ({"forms": {"small": {"variants": {"bb": {}}}}}, "did you mean b"),
        ({"forms": {"small": {"variants": {"c*": {}}}}}, "'c\\*' is unknown"),
    ],
)
def test_a_mistake_is_explained_with_its_key(study, changes, words):
    with pytest.raises(ConfigError, match=words):
        read_study(study(**changes))


def test_a_missing_file_and_a_missing_form_are_explained(study, tmp_path):
    file = study(forms={"small": {}})
    with pytest.raises(ConfigError, match=r"contains base\.yaml, study\.yaml"):
        read_study(tmp_path / "stduy.yaml")
    with pytest.raises(ConfigError, match="did you mean small"):
        read_study(file, "smal")
    file.write_text("a: [")
    with pytest.raises(ConfigError, match="cannot be read as YAML"):
        read_study(file)


def test_names_of_metrics():
    assert metric_words("test/lungs/dice") == metric_words("own/lungs/dice") == ["lungs", "dice"]
    assert metric_words("lungs/dice/lung") == ["lungs", "dice", "lung"]
    assert is_own("own/dice")
    assert not is_own("test/dice")


def test_keys_that_cannot_change_a_result_are_not_relevant():
    config = {"trainer": {"max_epochs": 1, "logger": True}, "data": [{"num_workers": 4, "image_size": 8}]}
    assert relevant_keys(config) == {"trainer": {"max_epochs": 1}, "data": [{"image_size": 8}]}


def test_data_sets_are_found_in_a_federation_too():
    one = {"class_path": "x", "init_args": {"fold": None, "folds": 5, "preset": {"init_args": {"fold": 1, "folds": 2}}}}
    assert list(data_sets(one)) == [one["init_args"]]
    cut = {"class_path": "F", "init_args": {"data": one, "by": "site"}}
    assert list(data_sets(cut)) == [one["init_args"]]
    named = {"class_path": "F", "init_args": {"sites": {"a": one, "b": one}}}
    assert len(list(data_sets(named))) == 2

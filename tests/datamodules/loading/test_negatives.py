"""Which classes are negative, by the options and by their names."""

import pytest

from datamodules.loading.negatives import negative_names
from mtmedformer.batch import Task
from mtmedformer.errors import ConfigError


def tasks(*classes: tuple[str, ...]) -> dict[str, Task]:
    return {f"t{n}": Task(f"t{n}", "classification", own) for n, own in enumerate(classes)}


@pytest.mark.parametrize(
    "classes, negative",
    [
        (("normal", "pneumonia"), {"normal"}),
        (("NORM", "CALC"), {"norm"}),
        (("no_cancer", "cancer"), {"no cancer"}),
        (("No-Lung-Nodule", "nodule"), {"no lung nodule"}),
        (("without lesion", "lesion"), {"without lesion"}),
        (("well", "sick"), set()),
        (("tumour free", "tumour"), {"tumour free"}),
        (("covid_negative", "covid_positive"), {"covid negative"}),
        (("triple_negative", "luminal_a"), set()),
        (("normal", "not_normal_no_opacity", "lung_opacity"), {"normal"}),
        (("non-COVID pneumonia", "COVID"), set()),
        (("normal", "benign", "malignant"), {"normal"}),
        (("A", "B"), set()),
    ],
)
def test_classes_are_negative_by_their_names(classes, negative):
    assert negative_names(tasks(classes)) == (frozenset(negative), "")


def test_benign_stands_for_the_negative_class_where_there_is_no_other_and_this_is_said():
    names, sentence = negative_names(tasks(("benign", "malignant")))
    assert names == {"benign"}
    assert sentence.startswith("'benign' counts as the negative class of t0, which has no other; if it is a finding")
    assert negative_names(tasks(("benign", "malignant")), of_set=("benign",)) == (frozenset({"benign"}), "")
    both = tasks(("benign", "malignant"), ("normal", "benign", "malignant"))
    assert negative_names(both) == (frozenset({"normal"}), ""), "a finding of one task is one of the other"


@pytest.mark.parametrize(
    "options, negative",
    [
        ({"negative": ["B"]}, {"b"}),
        ({"negative": []}, set()),
        ({"positive": ["malignant"]}, {"benign", "normal"}),
        ({"positive": ["malignant", "benign"]}, {"normal"}),
        ({"positive": ["A"]}, {"b", "normal"}),
        ({"negative": ["normal"], "positive": ["A"]}, {"b", "normal"}),
    ],
)
def test_the_options_take_precedence(options, negative):
    names, sentence = negative_names(tasks(("normal", "benign", "malignant"), ("A", "B")), **options)
    assert names == negative
    assert not sentence


@pytest.mark.parametrize(
    "options, words",
    [
        ({"negative": ["nromal"]}, r"data.init_args.negative: no class is called 'nromal'; did you mean 'normal'\?"),
        ({"positive": ["x"]}, "data.init_args.positive: no class is called 'x'"),
        ({"negative": ["normal"], "positive": ["Normal"]}, "negative and positive both name 'normal'"),
    ],
)
def test_names_that_are_no_class_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        negative_names(tasks(("normal", "benign")), **options)

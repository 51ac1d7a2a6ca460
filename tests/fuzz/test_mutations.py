import random

import pytest

from tests.fuzz.mutations import mutate_bytes, mutate_cells, seeds

TABLE = [["image", "label"], ["a.png", "normal"], ["b.png", "pneumonia"]]


def test_the_same_seed_gives_the_same_mutation():
    content = bytes(range(256)) * 8
    for seed in range(20):
        assert mutate_bytes(content, random.Random(seed)) == mutate_bytes(content, random.Random(seed))
        assert mutate_cells(TABLE, random.Random(seed)) == mutate_cells(TABLE, random.Random(seed))


def test_most_mutations_change_something_and_the_input_is_left_alone():
    content, before = bytes(range(256)) * 8, [list(row) for row in TABLE]
    assert sum(mutate_bytes(content, random.Random(seed)) != content for seed in range(200)) > 180
    assert sum(mutate_cells(TABLE, random.Random(seed)) != TABLE for seed in range(200)) > 180
    assert before == TABLE


@pytest.mark.parametrize("content", [b"", b"x"])
def test_short_contents_can_be_mutated(content):
    for seed in range(200):
        assert isinstance(mutate_bytes(content, random.Random(seed)), bytes)


def test_the_number_of_mutations_is_set_by_the_environment(monkeypatch):
    monkeypatch.delenv("MTMEDFORMER_FUZZ", raising=False)
    assert len(list(seeds(7))) == 7
    monkeypatch.setenv("MTMEDFORMER_FUZZ", "3")
    assert list(seeds(7)) == [0, 1, 2]

"""Mutated checkpoints: each is read or refused in words, in bounded time, and none runs code."""

import random
import zipfile
from io import BytesIO

import pytest
import torch

import mtmedformer
from mtmedformer.errors import UserError
from mtmedformer.storage.hashing import WEIGHTS_DIGEST, state_hash
from tests.fixtures.stored_models import description, write_checkpoint
from tests.fuzz.mutations import mutate_bytes, seeds

ODD = (
    *(None, 0, -1, 2**40, 1.5, float("nan"), "", "x" * 2000, [], {}, [[]], True),
    *("os.system", "/", "../x", "\x1b[31m", torch.zeros(2)),
)


def _mutated(value: object, rng: random.Random) -> object:
    """Return nested values with one of them replaced, removed or renamed."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        rest = {name: one for name, one in value.items() if name != key}
        kind = rng.random()
        if kind < 0.2:
            return rest if kind < 0.1 else rest | {str(rng.choice(ODD))[:20]: value[key]}
        return value | {key: _mutated(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.7:
        at = rng.randrange(len(value))
        return [*value[:at], _mutated(value[at], rng), *value[at + 1 :]]
    return rng.choice(ODD)


@pytest.mark.timeout(600)
def test_mutated_checkpoints_are_read_or_refused(tmp_path):
    file = write_checkpoint(tmp_path, description("health", "organ"))
    stored = torch.load(file, weights_only=True)
    stored[WEIGHTS_DIGEST] = state_hash(stored["state_dict"])
    torch.save(stored, file)
    whole = file.read_bytes()
    with zipfile.ZipFile(BytesIO(whole)) as archive:
        pickled = next(name for name in archive.namelist() if name.endswith("data.pkl"))
        members = {name: archive.read(name) for name in archive.namelist()}
    outcomes = {"read": 0, "refused": 0}
    for seed in seeds(60):
        rng = random.Random(seed)
        kind = seed % 3
        if kind == 0:
            file.write_bytes(mutate_bytes(whole, rng))
        elif kind == 1:  # a whole archive around a damaged pickle
            with zipfile.ZipFile(file, "w") as archive:
                for name, content in members.items():
                    archive.writestr(name, mutate_bytes(content, rng) if name == pickled else content)
        else:
            torch.save(stored | {"hyper_parameters": _mutated(stored["hyper_parameters"], rng)}, file)
        try:
            state = mtmedformer.load(file).module.state_dict()
            outcomes["read"] += 1
            if kind < 2:
                assert all(torch.equal(state[name], weight) for name, weight in stored["state_dict"].items())
        except UserError:
            outcomes["refused"] += 1
    assert outcomes["refused"] > 10
    assert sum(outcomes.values()) >= 60

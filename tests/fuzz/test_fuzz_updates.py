"""Mutated updates: reading raises one kind of error, checking none, and what is admitted merges to finite weights."""

import json
import math
import random
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from federation.aggregators import BayesianAggregator, merge
from federation.exchange.update import load_update, save_update
from federation.privacy.accounting import PrivacyMemory
from federation.privacy.policy import PrivacyPolicy
from federation.server.update_checks import Declaration, Expected
from mtmedformer.errors import DataError
from mtmedformer.storage.hashing import state_hash
from tests.fixtures.toy_federation import make_update, toy
from tests.fuzz.mutations import mutate_bytes, seeds

VALUES = (
    *(0, -1, 1, True, False, None, "", "x", [], {}, [[]], {"a": 1}, 1.5, -0.0, math.nan, math.inf, -math.inf),
    *(2**31, 2**63, 10**12, 10**308, 10**400, 1e308, 1e-320, "int8", "fp16", "encoder", "\ud800", "a" * 10_000),
)
TENSORS = (
    *(torch.tensor(math.nan), torch.tensor(3e38), torch.zeros(0), torch.zeros(3, 3), torch.zeros(5, dtype=torch.bool)),
    *(torch.full((5,), -1.0), torch.full((5,), 1e30), torch.ones(5).half(), torch.ones(5, dtype=torch.int8)),
)


@pytest.fixture(scope="module", params=["none", "int8"])
def sent(request, tmp_path_factory) -> Path:
    update = make_update("a", *toy())
    if request.param != "none":
        update, _, _ = PrivacyPolicy(rounding="int8").apply(update, PrivacyMemory(), toy()[1].parameters)
    file = tmp_path_factory.mktemp("sent") / "a.safetensors"
    save_update(update, file)
    return file


def judged(file: Path) -> str:
    """Return what became of an update: damaged, refused or admitted."""
    state, schema = toy()
    try:
        update = load_update(file)
    except DataError:
        return "damaged"
    declared = {"a": Declaration(examples=1000)}
    expected = Expected(0, state_hash(state), schema, state, frozenset(schema.personal_keys()), True, declared)
    if expected.refusal("a", update):
        return "refused"
    merged = merge(BayesianAggregator(b=0.5, remember=True), state, schema, [update, make_update("b", state, schema)])
    assert all(bool(torch.isfinite(value).all()) for value in merged.values() if value.is_floating_point())
    return "admitted"


def test_mutated_bytes(sent, tmp_path):
    content, counts = sent.read_bytes(), {"damaged": 0, "refused": 0, "admitted": 0}
    for seed in seeds(150):
        file = tmp_path / "a.safetensors"
        file.write_bytes(mutate_bytes(content, random.Random(seed)))
        counts[judged(file)] += 1
    print(counts)
    assert counts["damaged"] > 0


def test_mutated_headers_and_arrays(sent, tmp_path):
    with safe_open(sent, framework="pt") as opened:
        header = json.loads(opened.metadata()["update"])
        arrays = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
    counts = {"damaged": 0, "refused": 0, "admitted": 0}
    for seed in seeds(150):
        rng = random.Random(seed)
        changed, tensors = json.loads(json.dumps(header)), dict(arrays)
        if rng.random() < 0.7:
            _mutate(changed, rng)
        else:
            name = rng.choice(sorted(tensors))
            change = rng.choice(["drop", "other", "name"])
            if change == "other":
                tensors[name] = rng.choice(TENSORS)
            elif change == "name":
                tensors[rng.choice(["delta|encoder", "x|y|z", "extra|a|b", "delta|loss|weights"])] = tensors.pop(name)
            else:
                del tensors[name]
        save_file({k: v.clone() for k, v in tensors.items()}, tmp_path / "a", metadata={"update": json.dumps(changed)})
        counts[judged(tmp_path / "a")] += 1
    print(counts)
    assert counts["damaged"] > 0
    assert counts["refused"] > 0


def _mutate(value: dict, rng: random.Random) -> None:
    """Change, remove or add one entry somewhere in nested dictionaries."""
    while True:
        key = rng.choice(sorted(value))
        inner = value[key]
        if not isinstance(inner, dict) or not inner or rng.random() < 0.3:
            break
        value = inner
    change = rng.random()
    if change < 0.15:
        del value[key]
    elif change < 0.3:
        value[rng.choice(["new", "", "encoder", "a" * 300])] = rng.choice(VALUES)
    else:
        value[key] = rng.choice(VALUES)

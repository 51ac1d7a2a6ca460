"""One hash of a state, for updates, checkpoints and start weights."""

import torch

from mtmedformer.storage.hashing import state_hash


def test_the_hash_depends_on_names_types_shapes_and_bits_but_not_on_the_order():
    state = {"a": torch.tensor([1.0, -0.0]), "b": torch.tensor(3)}
    assert state_hash(state) == state_hash(dict(reversed(state.items())))
    others = [
        state | {"a": torch.tensor([1.0, 0.0])},
        state | {"a": torch.tensor([[1.0, -0.0]])},
        state | {"b": torch.tensor(3, dtype=torch.int32)},
        {"c" if name == "a" else name: value for name, value in state.items()},
    ]
    assert len({state_hash(one) for one in [state, *others]} | {state_hash(state, header="round 1")}) == 6

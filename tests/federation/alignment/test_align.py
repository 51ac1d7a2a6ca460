"""Shuffled units return to their order to the last bit, aligned ones do not move, and nothing else changes."""

import math

import numpy as np
import pytest
import timm
import torch
from torch import nn

from federation import BayesianAggregator, FedAvg, SquaredGradients, merge
from federation.alignment import matching
from federation.alignment.align import align, permute, permute_optimizer, shuffle
from federation.alignment.groups import Part, PermutationGroup, permutation_groups
from federation.exchange.schema import Block, Schema
from federation.exchange.update import BlockUpdate, Update
from mtmedformer.encoders import tiny  # noqa: F401  (registers mtmedformer_tiny)

SWIN = {"img_size": 64, "window_size": 4, "embed_dim": 16, "depths": (1, 2), "num_heads": (2, 4)}
VIT = {"img_size": 32, "patch_size": 8, "depth": 2}
MODELS = {
    "pvt_v2_b0": {},
    "vit_tiny_patch16_224": VIT,
    "mtmedformer_tiny": {},
    "pvt_v2_b2_li": {"depths": (1, 1, 1, 1), "embed_dims": (16, 32, 80, 64)},
    "swin_tiny_patch4_window7_224": SWIN,
    "swinv2_tiny_window8_256": SWIN,
    "mtmedformer_tiny_cnn": {},
}
VARIANTS = {
    "qk-norm": ("vit_tiny_patch16_224", {**VIT, "qk_norm": True}),
    "scale-norm": ("vit_tiny_patch16_224", {**VIT, "scale_attn_norm": True, "scale_mlp_norm": True}),
    "swiglu-packed": ("vit_giant_patch14_reg4_dinov2", {**VIT, "embed_dim": 48, "num_heads": 4, "mlp_ratio": 4}),
    "swiglu": ("vit_tiny_patch16_224", {**VIT, "mlp_layer": timm.layers.SwiGLU}),
}


def build(name, seed=0, **settings):
    """Return a model whose every tensor is random, biases, tables and norms among them."""
    torch.manual_seed(seed)
    model = timm.create_model(name, num_classes=5, **(settings or MODELS[name])).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def copied(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def trained(state, seed, size=0.01):
    """Return weights as local training leaves them: a little away from where it began."""
    generator = torch.Generator().manual_seed(seed)
    return {
        key: value + size * torch.randn(value.shape, generator=generator) if value.is_floating_point() else value
        for key, value in state.items()
    }


def by_row(precision):
    """Return the mean of each output row, as an update of that granularity carries it."""
    return {k: v.flatten(1).mean(1).reshape(-1, *[1] * (v.ndim - 1)) if v.ndim > 1 else v for k, v in precision.items()}


def image(model):
    size = getattr(getattr(model, "patch_embed", None), "img_size", None) or (64, 64)
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def pvt():
    return build("pvt_v2_b0")


@pytest.fixture
def matchings(monkeypatch):
    """Count the assignment problems that are solved."""
    calls = []
    solve = matching.linear_sum_assignment
    monkeypatch.setattr(
        matching, "linear_sum_assignment", lambda *args, **kw: calls.append(args[0].shape) or solve(*args, **kw)
    )
    return calls


def same(one, other):
    assert one.keys() == other.keys()
    assert [key for key in one if not torch.equal(one[key], other[key])] == []


@pytest.mark.parametrize("case", [*MODELS, *VARIANTS])
def test_a_shuffle_preserves_the_function_and_aligning_recovers_every_bit(case):
    name, settings = VARIANTS.get(case, (case, {}))
    model = build(name, **settings)
    groups = permutation_groups(model)
    before, picture = copied(model), image(model)
    with torch.no_grad():
        expected = model(picture)
        orders = shuffle(model, groups, seed=3)
        found = model(picture)
    assert (found - expected).abs().max() <= 2e-6 * max(1.0, float(expected.abs().max()))
    shuffled = copied(model)
    changed = {key for key in before if not torch.equal(before[key], shuffled[key])}
    assert changed == {part.key for group in groups for part in group.parts if orders_move(orders[group.name])}
    back = align(shuffled, before, groups)
    same(back.state, before)
    for group in groups:
        place = torch.arange(group.units)
        assert torch.equal(orders[group.name][back.permutations.get(group.name, place)], place)
        assert back.moved[group.name] == pytest.approx(float((orders[group.name] != place).double().mean()))


def orders_move(order):
    return bool((order != torch.arange(len(order))).any())


def test_trained_and_shuffled_weights_are_restored_bit_for_bit_with_their_precision(pvt):
    groups, start = permutation_groups(pvt), copied(pvt)
    site = trained(start, 5)
    generator = torch.Generator().manual_seed(6)
    precision = {key: torch.rand(value.shape, generator=generator) for key, value in start.items()}
    rows = by_row(precision)
    orders = {g.name: torch.randperm(g.units, generator=generator) for g in groups}
    for known in (precision, rows, {}):
        back = align(permute(site, groups, orders), start, groups, permute(known, groups, orders))
        same(back.state, site)
        same(back.precision, known)


def test_every_hidden_unit_and_head_of_the_encoders_belongs_to_a_group(pvt):
    names = [group.name for group in permutation_groups(pvt)]
    blocks = [f"stages.{s}.blocks.{b}" for s in range(4) for b in range(2)]
    heads = {"stages.0": 1, "stages.1": 2, "stages.2": 5, "stages.3": 8}
    assert set(names) == {f"{b}.mlp" for b in blocks} | {f"{b}.attn" for b in blocks if heads[b[:8]] > 1}
    units = {group.name: group.units for group in permutation_groups(pvt)}
    assert units["stages.3.blocks.0.attn"] == 8
    assert units["stages.2.blocks.1.mlp"] == pvt.stages[2].blocks[1].mlp.fc1.out_features
    keys = {part.key for group in permutation_groups(pvt) for part in group.parts}
    assert not any(".sr." in key or "norm" in key or "patch_embed" in key for key in keys), "the residual side"


def test_unknown_layers_are_not_permuted():
    class Wrapped(nn.Linear):
        pass

    model = build("vit_tiny_patch16_224")
    before = len(permutation_groups(model))
    first = model.blocks[0]
    first.mlp.fc1 = Wrapped(first.mlp.fc1.in_features, first.mlp.fc1.out_features)
    assert len(permutation_groups(model)) == before - 1
    assert permutation_groups(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))) == ()
    assert permutation_groups(timm.create_model("resnet18", num_classes=0)) == ()


def test_aligned_weights_solve_no_assignment_and_stay_the_same_objects(pvt, matchings):
    groups, start = permutation_groups(pvt), copied(pvt)
    for site in (start, trained(start, 1)):
        back = align(site, start, groups, {key: torch.rand_like(value) for key, value in site.items()})
        assert matchings == []
        assert back.permutations == {}
        assert set(back.moved.values()) == {0.0}
        assert all(back.state[key] is site[key] for key in site)
    orders = {g.name: torch.randperm(g.units, generator=torch.Generator().manual_seed(2)) for g in groups}
    align(permute(start, groups, orders), start, groups)
    assert len(matchings) == sum(orders_move(order) for order in orders.values()), "the counter counts"


def update(site, state, start, schema, precision):
    relative, scale = precision
    delta = {key: state[key].float() - start[key].float() for key in schema.blocks[0].keys}
    return Update(site, 0, "", schema.digest(), {"encoder": BlockUpdate(100, delta, relative, scale)})


@pytest.mark.parametrize(
    "make",
    [FedAvg, BayesianAggregator, lambda: BayesianAggregator(granularity="row", between=True)],
    ids=["fedavg", "bayesian", "bayesian-row-between"],
)
def test_a_shuffled_site_changes_nothing_in_the_merge(pvt, make):
    groups, start = permutation_groups(pvt), copied(pvt)
    keys = tuple(key for key, value in start.items() if value.is_floating_point())
    shapes = {key: tuple(value.shape) for key, value in start.items()}
    counters = tuple(key for key in start if key not in keys)
    schema = Schema((Block("encoder", keys),), shapes, frozenset(keys), frozenset(), counters)
    sites = {f"site{i}": trained(start, i) for i in range(3)}
    curvatures = {
        name: {k: (10.0**-6) * v.square() for k, v in trained(start, 9 + i, 1.0).items() if k in keys}
        for i, name in enumerate(sites)
    }

    def merged(shuffled, order=1):
        aggregator = make()
        updates = []
        for i, name in enumerate(sites):
            state, curvature = sites[name], curvatures[name]
            if name in shuffled:
                generator = torch.Generator().manual_seed(i)
                orders = {g.name: torch.randperm(g.units, generator=generator) for g in groups}
                state, curvature = permute(state, groups, orders), permute(curvature, groups, orders)
            back = align(state, start, groups, curvature)
            assert bool(back.permutations) == (name in shuffled)
            updates.append(update(name, back.state, start, schema, aggregator.relative(back.precision)))
        return merge(aggregator, start, schema, updates[::order])

    expected = merged(())
    same(merged(("site1",)), expected)
    same(merged(("site0", "site2"), order=-1), expected)


def test_unaligned_shuffles_degrade_the_average():
    """The control of the control: what alignment repairs is worth repairing."""
    model = build("mtmedformer_tiny")
    groups, picture, start = permutation_groups(model), image(model), copied(model)
    other = permute(start, groups, shuffle_orders(groups, 4))

    def distance(state):
        with torch.no_grad():
            model.load_state_dict(start)
            expected = model(picture)
            model.load_state_dict({k: torch.lerp(start[k], state[k], 0.5) for k in start})
            return float((model(picture) - expected).norm() / expected.norm())

    assert distance(align(other, start, groups).state) < 1e-6
    assert distance(other) > 0.05


def shuffle_orders(groups, seed):
    generator = torch.Generator().manual_seed(seed)
    return {g.name: torch.randperm(g.units, generator=generator) for g in groups}


def test_curvature_measured_on_a_shuffled_model_is_the_same_once_aligned():
    def measured(model):
        curvature = SquaredGradients()
        curvature.start(model)
        for seed in range(3):
            model.zero_grad()
            model(torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(seed))).square().sum().backward()
            curvature.observe(model)
        return curvature.finish(model)

    model, twin = build("mtmedformer_tiny"), build("mtmedformer_tiny")
    groups = permutation_groups(model)
    shuffle(twin, groups, 1)
    straight = measured(model)
    back = align(copied(twin), copied(model), groups, measured(twin))
    same(back.state, copied(model))
    for key, value in straight.items():
        torch.testing.assert_close(back.precision[key], value, rtol=1e-3, atol=1e-5 * float(value.max()))


def test_moments_of_the_optimizer_are_permuted_too():
    model, twin = build("mtmedformer_tiny"), build("mtmedformer_tiny")
    groups = permutation_groups(model)
    orders = shuffle(twin, groups, 1)
    adams = []
    for one in (model, twin):
        adam = torch.optim.AdamW(one.parameters(), lr=0.0, weight_decay=0.0)
        one(torch.ones(1, 3, 64, 64)).square().sum().backward()
        adam.step()
        adams.append(adam)
    before = {name: twin_state for name, twin_state in moments(twin, adams[1], "exp_avg").items()}
    permute_optimizer(adams[1], twin, align(copied(twin), copied(model), groups).permutations)
    for slot in ("exp_avg", "exp_avg_sq"):
        straight, moved = moments(model, adams[0], slot), moments(twin, adams[1], slot)
        for name, value in straight.items():
            torch.testing.assert_close(moved[name], value, rtol=1e-2, atol=1e-4 * float(value.abs().max()))
    same(permute(moments(twin, adams[1], "exp_avg"), groups, orders), before)
    assert all(state["step"] == 1 for state in adams[1].state.values())


def moments(model, optimizer, slot):
    return {name: optimizer.state[p][slot].clone() for name, p in model.named_parameters()}


def brute(group, state, reference, precision):
    """The definition, unit by unit, in double precision."""
    score = np.zeros((group.units, group.units))

    def unit(part, tensors, u):
        span = tensors[part.key].double().movedim(part.dim, 0)[part.offset + u * part.width :][: part.width]
        return span.reshape(part.width, -1)

    def relative(part):
        sure = {p: precision[p.key].double().expand(state[p.key].shape) for p in group.parts if p.key in precision}
        if not sure:
            return lambda u: torch.ones(())
        everything = [unit(p, {p.key: v}, u).flatten() for p, v in sure.items() for u in range(group.units)]
        values = torch.cat(everything)
        return lambda u: (unit(part, {part.key: sure[part]}, u) / values.mean()).clamp(0.01, 100)

    for i in range(group.units):
        for j in range(group.units):
            for part in group.rows:
                gap = (unit(part, reference, i) - unit(part, state, j)).square()
                score[i, j] -= 0.5 * float((relative(part)(j) * gap).sum())
            for first, second in group.circuits:

                def product(tensors, u, first=first, second=second):
                    one, two = (torch.cat([unit(p, tensors, u) for p in side], 1) for side in (first, second))
                    return one.T @ two

                weight = np.mean([float(relative(p)(j).mean()) for p in first + second])
                score[i, j] -= 0.5 * weight * float((product(reference, i) - product(state, j)).square().sum())
    return score


@pytest.mark.parametrize("kind", ["none", "element", "row", "scalar"])
def test_the_score_is_its_definition(kind):
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "fc1": (6, 4),
        "b1": (6,),
        "dw": (6, 1, 3, 3),
        "fc2": (4, 6),
        "qkv": (18, 4),
        "qb": (18,),
        "out": (5, 6),
        "t": (7, 3),
    }
    state, reference = ({k: torch.randn(s, generator=generator) for k, s in shapes.items()} for _ in range(2))
    mlp = PermutationGroup("mlp", 6, (Part("fc1"), Part("b1"), Part("dw"), Part("fc2", 1)))
    q, k, v = ((Part("qkv", 0, o, 2), Part("qb", 0, o, 2)) for o in (0, 6, 12))
    heads = PermutationGroup("attn", 3, (Part("t", 1),), ((q, k), (v, (Part("out", 1, 0, 2),))))
    element = {key: torch.rand(shape, generator=generator) * 3e-5 for key, shape in shapes.items()}
    known = {
        "none": {},
        "element": element,
        "row": by_row(element),
        "scalar": {key: v.mean() for key, v in element.items()},
    }[kind]
    for group in (mlp, heads):
        found = (
            matching.pair_scores(group, state, reference, matching.relative_precision(group, state, known))
            .double()
            .numpy()
        )
        np.testing.assert_allclose(found, brute(group, state, reference, known), rtol=1e-4, atol=1e-5)


def test_the_partial_distance_agrees_with_the_full_one_when_settled():
    """From near to far: the short look claims the identity only where it is the best matching."""
    generator = torch.Generator().manual_seed(0)
    group, claims = PermutationGroup("mlp", 12, (Part("w"), Part("b"))), 0
    reference = {"w": torch.randn(12, 160, generator=generator), "b": torch.randn(12, generator=generator)}
    for size in torch.linspace(0.02, 1.0, 60).tolist():
        site = trained(reference, int(size * 1000), size)
        precision = {key: torch.rand(value.shape, generator=generator) for key, value in site.items()}
        known = matching.relative_precision(group, site, precision)
        if matching.settled(matching.compared_rows(group, site, reference, known)):
            claims += 1
            assert matching.best_matching(matching.pair_scores(group, site, reference, known)) is None
    assert 5 < claims < 50


def test_precise_weights_decide_where_weights_disagree():
    group = PermutationGroup("mlp", 2, (Part("a"), Part("b")))
    reference = {"a": torch.tensor([[0.0], [1.0]]), "b": torch.tensor([[0.0], [1.0]])}
    site = {"a": torch.tensor([[1.0], [0.0]]), "b": torch.tensor([[-0.2], [1.2]])}
    sharp = {"a": torch.full((2, 1), 9.0), "b": torch.full((2, 1), 1.0)}
    assert align(site, reference, (group,), sharp).permutations["mlp"].tolist() == [1, 0]
    sharp = {"a": torch.full((2, 1), 1.0), "b": torch.full((2, 1), 9.0)}
    assert align(site, reference, (group,), sharp).permutations == {}


def test_a_matching_that_gains_little_is_refused(monkeypatch, matchings):
    generator = torch.Generator().manual_seed(0)
    group = PermutationGroup("mlp", 8, (Part("w"),))
    reference, site = ({"w": torch.randn(8, 20000, generator=generator)} for _ in range(2))
    assert align(site, reference, (group,)).permutations == {}
    assert len(matchings) == 1, "matching noise lowers the distance a little, but by less than 5 %"
    monkeypatch.setattr(matching, "GAIN", 0.0)
    assert align(site, reference, (group,)).permutations


def test_weights_that_are_not_finite_and_identical_units_stay():
    group = PermutationGroup("mlp", 4, (Part("w"),))
    reference = {"w": torch.ones(4, 3)}
    assert align({"w": torch.full((4, 3), math.nan)}, reference, (group,)).permutations == {}
    assert align({"w": torch.ones(4, 3)}, reference, (group,), {"w": torch.zeros(4, 3)}).permutations == {}


def test_alignment_of_independent_starts_is_measured_only(capsys):
    one, other = build("mtmedformer_tiny", 0), build("mtmedformer_tiny", 1)
    groups = permutation_groups(one)
    start, site = copied(one), copied(other)
    back = align(site, start, groups)
    keys = {part.key for group in groups for part in group.parts}

    def gap(state):
        return math.sqrt(sum(float((state[k] - start[k]).double().square().sum()) for k in keys))

    assert gap(back.state) <= gap(site) * 1.0001
    units = sum(group.units for group in groups)
    moved = sum(back.moved[group.name] * group.units for group in groups) / units
    with capsys.disabled():
        print(
            f"\nindependent starts: {moved:.0%} of {units} units and heads moved, "
            f"their distance to the reference is {gap(back.state) / gap(site):.3f} of what it was"
        )

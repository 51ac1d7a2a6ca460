"""Whole federations whose sites have privacy policies: what is told, what is kept, and resuming to the same bits."""

import copy
import json
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import ModelCheckpoint
from opacus.accountants import RDPAccountant

from callbacks import Federation
from federation import BayesianAggregator, ExamplePrivacy, FedAvg, FederatedDataModule, Pooled, PrivacyPolicy, Scaffold
from federation.server.admission import Policy
from mtmedformer.errors import ConfigError
from tests.fixtures.toy_sites import ToySite, toy_module


def sites():
    named = {"a": ToySite(n=12), "b": ToySite(n=8, tasks=("right",), seed=1), "c": ToySite(n=6, seed=2)}
    for name, site in named.items():
        for i, sample in enumerate(site.samples):
            sample.meta = type(sample.meta)(f"planted-image-{name}{i}", f"planted-patient-{name}{i}", name)
    return FederatedDataModule(sites=named)


def run(folder, federation, rounds=3, module=None, ckpt=None):
    """Train a federation of three toy sites; return the weights and the federation."""
    module = module or toy_module()
    L.seed_everything(1, verbose=False)
    saved = ModelCheckpoint(folder, save_last=True, filename="{epoch}", save_top_k=-1, enable_version_counter=False)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=rounds,
        default_root_dir=folder,
        callbacks=[federation, saved],
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
    )
    trainer.fit(module, datamodule=sites(), ckpt_path=ckpt)
    return {key: value.clone() for key, value in module.state_dict().items()}, federation


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


POLICIES = {
    "noise": lambda: PrivacyPolicy(clip=0.5, noise_multiplier=0.3, seed=5),
    "rounding": lambda: PrivacyPolicy(rounding="int8"),
    "all": lambda: PrivacyPolicy(
        clip=0.5, noise_multiplier=0.3, blocks=["encoder", "heads.right"], rounding="fp16", seed=5
    ),
    "examples": lambda: PrivacyPolicy(examples=ExamplePrivacy(1.0, 0.5), rounding="int8", seed=5),
}


@pytest.mark.parametrize("name", POLICIES)
def test_interrupted_and_resumed_is_as_if_nothing_happened(tmp_path, name):
    def federation():
        return Federation(BayesianAggregator(), optimizer_state="keep", privacy=POLICIES[name]())

    whole, told = run(tmp_path / "whole", federation(), module=toy_module(momentum=0.9))
    again = toy_module(seed=9, momentum=0.9)
    resumed, retold = run(tmp_path / "more", federation(), module=again, ckpt=tmp_path / "whole" / "epoch=1.ckpt")
    assert equal(whole, resumed)
    for entry, other in zip(told.history, retold.history, strict=True):
        for site in "abc":
            for fact in ("names", "bytes", "norms", "epsilon", "releases", "site", "example"):
                assert entry.sites[site].privacy.get(fact) == other.sites[site].privacy.get(fact)


def test_epsilon_goes_on_counting_over_a_resume(tmp_path):
    policy = {"clip": 0.5, "noise_multiplier": 1.0}
    run(tmp_path, Federation(FedAvg(), privacy=PrivacyPolicy(**policy)), rounds=2)
    _, told = run(
        tmp_path, Federation(FedAvg(), privacy=PrivacyPolicy(**policy)), rounds=4, ckpt=tmp_path / "last.ckpt"
    )
    accountant, found = RDPAccountant(), []
    for _ in range(4):
        accountant.step(noise_multiplier=0.5, sample_rate=1.0)
        found.append(accountant.get_epsilon(1e-5))
    assert [entry.sites["b"].privacy["epsilon"] for entry in told.history] == pytest.approx(found)
    assert len(told.sites["b"].privacy["key"]) == 64, "drawn in the first round, and gone on with"


def test_a_key_of_the_sites_own_survives_a_resume(tmp_path):
    def federation():
        return Federation(FedAvg(), privacy=PrivacyPolicy(clip=0.5, noise_multiplier=0.3))

    whole, _ = run(tmp_path / "whole", federation())
    resumed, _ = run(tmp_path / "more", federation(), ckpt=tmp_path / "whole" / "epoch=0.ckpt")
    assert equal(whole, resumed)
    assert not equal(whole, run(tmp_path / "other", federation())[0]), "another run draws other keys"


def test_one_site_may_have_a_policy_and_the_others_none(tmp_path):
    plain, _ = run(tmp_path / "plain", Federation(FedAvg()))
    policy = PrivacyPolicy(clip=1e6, rounding="fp16")
    found, federation = run(tmp_path / "one", Federation(FedAvg(), privacy={"b": policy}))
    for entry in federation.history:
        assert [site for site, facts in entry.sites.items() if facts.privacy] == ["b"]
        assert entry.sites["b"].privacy["bytes"] == entry.sites["b"].bytes
        assert entry.sites["b"].bytes < entry.sites["a"].bytes
    for key, value in plain.items():
        torch.testing.assert_close(found[key], value, atol=2e-3, rtol=1e-2)
    assert not equal(plain, found)


def test_a_policy_that_does_nothing_changes_no_bit(tmp_path):
    plain, _ = run(tmp_path / "plain", Federation(BayesianAggregator()))
    found, federation = run(tmp_path / "told", Federation(BayesianAggregator(), privacy=PrivacyPolicy()))
    assert equal(plain, found)
    assert federation.history[-1].sites["a"].privacy["epsilon"] is None


def test_a_block_that_may_not_leave_goes_on_from_the_sites_own_weights(tmp_path):
    start = toy_module().state_dict()
    held = {"a": PrivacyPolicy(blocks=["encoder"])}
    found, federation = run(tmp_path, Federation(FedAvg(), privacy=held))
    sent = [set(entry.sites["a"].blocks) for entry in federation.history]
    assert sent == [{"encoder"}] * 3
    own = federation.sites["a"].local["heads.left.weight"]
    assert not torch.equal(own, start["heads.left.weight"])
    assert not torch.equal(own, found["heads.left.weight"]), "the global head is that of the other sites"
    _, again = run(tmp_path / "again", Federation(FedAvg(), privacy=held), rounds=1)
    step = own - again.sites["a"].local["heads.left.weight"]
    assert float(step.norm()) > 0, "and it goes on, round by round"
    assert torch.equal(federation.model_of("a")["heads.left.weight"], own)


def test_what_was_refused_has_left_all_the_same(tmp_path):
    """A site whose noise makes it an outlier: its epsilon grows though nothing of it is merged."""
    loud = PrivacyPolicy(clip=1.0, noise_multiplier=1e4, seed=1)
    quiet = PrivacyPolicy(clip=1.0, noise_multiplier=0.01, seed=1)
    privacy = {"a": loud, "b": quiet, "c": quiet}
    federation = Federation(FedAvg(), privacy=privacy, policy=Policy(quorum=1))
    run(tmp_path, federation)
    assert all([fault.site for fault in entry.faults] == ["a"] for entry in federation.history)
    assert federation.sites["a"].privacy["updates"] == [[1e4, 3]]
    assert federation.sites["a"].steps == 0


def test_history_and_checkpoint_name_no_patient_and_the_history_holds_no_secret(tmp_path):
    policy = PrivacyPolicy(clip=0.5, noise_multiplier=0.5, examples=ExamplePrivacy(), rounding="int8")
    _, federation = run(tmp_path, Federation(FedAvg(), privacy=policy))
    text = json.dumps([record.to_dict() for record in federation.history], allow_nan=False)
    assert "planted" not in text
    assert b"planted" not in (tmp_path / "last.ckpt").read_bytes()
    for site, state in federation.sites.items():
        assert state.privacy["key"] not in text
        assert all(f"{norm:.6}" not in text for norm in state.privacy["norms"]), site
        facts = federation.history[-1].sites[site]
        assert (facts.samples, facts.steps, facts.seconds, facts.moved) == ({}, 0, 0.0, {})


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"privacy": {"z": PrivacyPolicy(clip=1.0)}}, "no site is called z; there are a, b, c"),
        ({"privacy": PrivacyPolicy(blocks=["heads.up"])}, "no block is called heads.up"),
        ({"privacy": PrivacyPolicy(clip=1.0), "aggregator": Pooled()}, "all data in one place"),
        ({"privacy": PrivacyPolicy(1.0, 1.0), "aggregator": Scaffold()}, "Scaffold sends more"),
    ],
)
def test_policies_that_cannot_hold_are_refused_before_a_round(tmp_path, settings, words):
    with pytest.raises(ConfigError, match=words):
        run(tmp_path, Federation(**{"aggregator": FedAvg(), **settings}))


@pytest.mark.parametrize("placement", ["isolated"])
def test_a_site_in_a_process_of_its_own_leaves_the_same(tmp_path, placement):
    here, told = run(tmp_path / "here", Federation(FedAvg(), privacy=POLICIES["all"]()), rounds=2)
    apart, retold = run(
        tmp_path / "apart", Federation(FedAvg(), placement=placement, privacy=POLICIES["all"]()), rounds=2
    )
    assert equal(here, apart)
    for fact in ("epsilon", "norms", "bytes"):
        assert told.history[-1].sites["c"].privacy[fact] == retold.history[-1].sites["c"].privacy[fact]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("{clip: 1.0, noise_multiplier: 0.5, rounding: int8}", PrivacyPolicy(1.0, 0.5, rounding="int8")),
        ("{a: {clip: 1.0}, b: {blocks: [encoder]}}", {"a": PrivacyPolicy(1.0), "b": PrivacyPolicy(blocks=["encoder"])}),
        ("{examples: {clip: 0.5, unit: image}}", PrivacyPolicy(examples=ExamplePrivacy(0.5, unit="image"))),
    ],
)
def test_yaml_sets_one_policy_or_one_per_site(text, expected):
    parser = ArgumentParser()
    parser.add_subclass_arguments(Federation, "federation")
    given = f"federation: {{class_path: callbacks.Federation, init_args: {{privacy: {text}}}}}"
    federation = parser.instantiate(parser.parse_object(yaml.safe_load(given))).federation
    assert federation.privacy == expected
    assert copy.deepcopy(federation).privacy == expected


def test_the_yaml_of_the_documentation_is_valid():
    page = (Path(__file__).parents[3] / "docs" / "privacy.md").read_text()
    found = [yaml.safe_load(part.split("```")[0]) for part in page.split("```yaml")[1:]]
    parser = ArgumentParser()
    parser.add_subclass_arguments(Federation, "federation")
    built = [parser.instantiate(parser.parse_object(given)).federation.privacy for given in found]
    assert built == [
        PrivacyPolicy(clip=1.0, rounding="int8"),
        {
            "north": PrivacyPolicy(blocks=["encoder"], precision=False),
            "west": PrivacyPolicy(delta=1e-4, examples=ExamplePrivacy(1.0, 1.5, "patient")),
        },
    ]

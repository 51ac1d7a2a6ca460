import os
import pickle
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mtmedformer.encoders.pretrained import load_weights, read_weights
from mtmedformer.encoders.shared import SharedEncoder
from mtmedformer.errors import ConfigError

VIT = {"depth": 2, "embed_dim": 48, "num_heads": 3}


def tiny(seed: int, in_chans: int = 1, **kwargs: object) -> SharedEncoder:
    torch.manual_seed(seed)
    return SharedEncoder("mtmedformer_tiny", channels=32, in_chans=in_chans, **kwargs)


def timm_state(name: str = "mtmedformer_tiny", **kwargs: object) -> dict[str, Tensor]:
    torch.manual_seed(7)
    return timm.create_model(name, **{"in_chans": 1, **kwargs}).state_dict()


class Model(nn.Module):
    """The shape of the whole model: an encoder, heads by name and a loss with a state."""

    def __init__(self, seed: int, classes: int = 2) -> None:
        super().__init__()
        self.encoder = tiny(seed)
        self.heads = nn.ModuleDict({"lungs": nn.Linear(32, classes)})
        self.loss = nn.BatchNorm1d(3)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".ckpt"])
def test_a_bare_timm_file_fills_the_body(tmp_path, suffix):
    state, path = timm_state(), tmp_path / f"weights{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    encoder = tiny(0, checkpoint_path=str(path))
    assert same(encoder.body.state_dict(), state)
    assert encoder.report is not None
    assert encoder.report.complete
    assert encoder.report.unexpected == ["head.bias", "head.weight"]


@pytest.mark.parametrize(
    "prefix",
    ["module.", "model.", "backbone.", "encoder.", "module.encoder.", "_orig_mod.model.backbone.", "encoder.body."],
)
@pytest.mark.parametrize("container", [None, "state_dict", "model"])
def test_prefixes_of_wrappers_are_ignored(tmp_path, prefix, container):
    state = {prefix + key: value for key, value in timm_state().items()}
    torch.save({container: state, "epoch": 3} if container else state, tmp_path / "w.pt")
    encoder = tiny(0)
    assert load_weights(encoder.body, tmp_path / "w.pt").complete
    assert same(encoder.body.state_dict(), timm_state())


def test_an_encoder_takes_a_bare_body_and_keeps_its_neck(tmp_path):
    torch.save(timm_state(), tmp_path / "w.pt")
    encoder = tiny(0)
    neck = {k: v.clone() for k, v in encoder.neck.state_dict().items()}
    report = load_weights(encoder, tmp_path / "w.pt")
    assert same(encoder.body.state_dict(), timm_state())
    assert same(encoder.neck.state_dict(), neck)
    assert sorted(report.missing) == sorted(f"neck.{k}" for k in neck)


def test_layout_of_feature_extractors_and_of_segmentation_models(tmp_path):
    torch.manual_seed(7)
    features = timm.create_model("mtmedformer_tiny", features_only=True, in_chans=1).state_dict()
    assert any(key.startswith("stages_0.") for key in features)
    torch.save({f"encoder.model.{k}": v for k, v in features.items()} | {"decoder.x": torch.ones(1)}, tmp_path / "w.pt")
    encoder = tiny(0)
    report = load_weights(encoder.body, tmp_path / "w.pt")
    assert report.complete
    assert report.unexpected == ["decoder.x"]
    assert same(encoder.body.state_dict(), timm_state())


def test_an_own_checkpoint_fills_encoder_and_heads_but_not_the_loss(tmp_path):
    old, new = Model(1), Model(2)
    old.loss.running_mean.fill_(5)
    torch.save({"state_dict": old.state_dict(), "epoch": 4, "pytorch-lightning_version": "2.6"}, tmp_path / "old.ckpt")
    report = load_weights(new, tmp_path / "old.ckpt")
    assert report.complete
    assert same(new.encoder.state_dict(), old.encoder.state_dict())
    assert same(new.heads.state_dict(), old.heads.state_dict())
    assert not new.loss.running_mean.any()
    other = tiny(3, checkpoint_path=str(tmp_path / "old.ckpt"))
    assert same(other.body.state_dict(), old.encoder.body.state_dict())


def test_a_head_for_other_classes_is_reported_and_unchanged(tmp_path):
    old, new = Model(1), Model(2, classes=5)
    torch.save(old.state_dict(), tmp_path / "old.pt")
    before = new.heads["lungs"].weight.clone()
    report = load_weights(new, tmp_path / "old.pt")
    assert ("heads.lungs.weight", (2, 32), (5, 32)) in report.mismatched
    assert not report.complete
    assert torch.equal(new.heads["lungs"].weight, before)
    text = str(report)
    assert text.startswith("old.pt: ")
    assert "heads.lungs.weight (2, 32) -> (5, 32)" in text
    assert len(text.splitlines()) < 8


def test_a_stem_for_colour_is_summed_for_gray(tmp_path):
    state = timm_state(in_chans=3)
    torch.save(state, tmp_path / "w.pt")
    encoder = tiny(0, checkpoint_path=str(tmp_path / "w.pt"))
    stem = "patch_embed.proj.weight"
    torch.testing.assert_close(encoder.body.state_dict()[stem], state[stem].sum(1, keepdim=True))
    assert encoder.report is not None
    assert encoder.report.adapted == [stem]
    report = load_weights(encoder, tmp_path / "w.pt")
    assert report.adapted == [f"body.{stem}"]


def test_timms_own_loading_is_used_for_published_weights(tmp_path):
    state = timm_state("pvt_v2_b0", in_chans=3)
    torch.save(state, tmp_path / "published.pt")
    source = {"pretrained_cfg_overlay": {"file": str(tmp_path / "published.pt")}}
    body = SharedEncoder("pvt_v2_b0.in1k", pretrained=True, model_kwargs=source).body.state_dict()
    assert torch.equal(body["stages.3.norm.weight"], state["stages.3.norm.weight"])
    torch.testing.assert_close(body["patch_embed.proj.weight"], state["patch_embed.proj.weight"].sum(1, keepdim=True))


def test_position_embeddings_of_another_size_are_resized_as_timm_does(tmp_path):
    state = timm_state("vit_small_patch16_224", img_size=224, **VIT)
    torch.save(state, tmp_path / "w.pt")
    encoder = SharedEncoder(
        "vit_small_patch16_224", img_size=128, channels=32, checkpoint_path=str(tmp_path / "w.pt"), model_kwargs=VIT
    )
    assert encoder.report is not None
    assert encoder.report.complete
    oracle = timm.create_model("vit_small_patch16_224", img_size=128, in_chans=1, **VIT)
    oracle.load_state_dict(timm.models.vision_transformer.checkpoint_filter_fn(state, oracle))
    torch.testing.assert_close(encoder.body.pos_embed, oracle.pos_embed)
    assert encoder.body.pos_embed.shape != state["pos_embed"].shape


def test_the_original_authors_names_are_understood_through_timm(tmp_path):
    """PVT v2's own files say block1.0, patch_embed2, norm3, dwconv.dwconv."""
    state = {}
    for key, value in timm_state().items():
        parts = key.split(".")
        if parts[0] == "patch_embed":
            parts[0] = "patch_embed1"
        elif parts[0] == "stages":
            stage = int(parts[1]) + 1
            parts = {"downsample": [f"patch_embed{stage}"], "blocks": [f"block{stage}"], "norm": [f"norm{stage}"]}[
                parts[2]
            ] + parts[3:]
        state[".".join(parts).replace("dwconv.", "dwconv.dwconv.")] = value
    torch.save(state, tmp_path / "w.pt")
    encoder = tiny(0, checkpoint_path=str(tmp_path / "w.pt"))
    assert encoder.report is not None
    assert encoder.report.complete
    assert same(encoder.body.state_dict(), timm_state())


class Bomb:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, legacy):
    path, crater = tmp_path / "evil.ckpt", tmp_path / "crater"
    content = {"state_dict": timm_state(), "callbacks": Bomb(crater)}
    path.write_bytes(pickle.dumps(content, protocol=2)) if legacy else torch.save(content, path)
    with pytest.raises(ConfigError, match=r"evil\.ckpt: refused, because it is damaged or holds objects"):
        load_weights(tiny(0).body, path)
    assert not crater.exists()
    pickle.loads(pickle.dumps(Bomb(crater)))
    assert crater.exists()  # the bomb is real


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("content", [b"", b"not weights at all", b"\x80\x02}", b"PK\x03\x04 half a zip"])
def test_the_message_names_a_damaged_file(tmp_path, suffix, content):
    path = tmp_path / f"broken{suffix}"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"broken"):
        read_weights(path)


def test_the_message_names_a_truncated_file(tmp_path):
    for suffix in (".safetensors", ".pt"):
        path = tmp_path / f"short{suffix}"
        save_file(timm_state(), path) if suffix == ".safetensors" else torch.save(timm_state(), path)
        path.write_bytes(path.read_bytes()[:-1000])
        with pytest.raises(ConfigError, match="short"):
            read_weights(path)


def test_weights_of_another_model_are_refused(tmp_path):
    torch.save(timm.create_model("test_resnet", in_chans=1).state_dict(), tmp_path / "resnet.pt")
    with pytest.raises(ConfigError, match=r"resnet\.pt: no tensor fits; the file has names like conv1"):
        load_weights(tiny(0).body, tmp_path / "resnet.pt")


@pytest.mark.parametrize("content", [{"epoch": 3}, [1, 2], {"state_dict": {}}, torch.ones(3)])
def test_a_file_without_named_tensors_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(ConfigError, match="contains no named tensors"):
        read_weights(tmp_path / "w.pt")


def test_weights_that_are_not_finite_are_refused_and_nothing_is_filled(tmp_path):
    state = timm_state()
    state["stages.2.norm.weight"][0] = float("nan")
    torch.save(state, tmp_path / "w.pt")
    encoder = tiny(0)
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    with pytest.raises(ConfigError, match=r"stages\.2\.norm\.weight holds NaN"):
        load_weights(encoder.body, tmp_path / "w.pt")
    assert same(encoder.state_dict(), before)


def test_half_precision_files_fill_single_precision_modules(tmp_path):
    state = {key: value.half() for key, value in timm_state().items()}
    save_file(state, tmp_path / "w.safetensors")
    encoder = tiny(0, checkpoint_path=str(tmp_path / "w.safetensors"))
    assert encoder.body.state_dict()["stages.0.norm.weight"].dtype == torch.float32
    assert same({k: v.half() for k, v in encoder.body.state_dict().items()}, state)

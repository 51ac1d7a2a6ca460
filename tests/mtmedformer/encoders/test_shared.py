import copy
import math
import pickle

import pytest
import timm
import torch
from torch import nn

from mtmedformer.encoders.neck import resampler
from mtmedformer.encoders.shared import SharedEncoder
from mtmedformer.errors import ConfigError
from mtmedformer.normalization import group_norm

SMALL_SWIN = {"depths": (1, 1, 2, 1), "embed_dim": 24, "num_heads": (1, 2, 4, 8)}
SMALL_VIT = {"depth": 2, "embed_dim": 48, "num_heads": 3}
BODIES = {
    "mtmedformer_tiny": {},
    "mtmedformer_tiny_cnn": {},
    "pvt_v2_b0": {},
    "swin_tiny_patch4_window7_224": SMALL_SWIN,  # NHWC
    "swinv2_tiny_window8_256": SMALL_SWIN,  # NHWC
    "test_resnet": {},  # five levels, stride 2 dropped
    "test_convnext": {},
    "test_efficientnet": {},
    "mobilevitv2_050": {},  # rounds its own grid
    "test_vit": {},  # one stride: 16
    "vit_small_patch16_dinov3": SMALL_VIT,  # rotary positions
    "vit_small_patch14_dinov2": SMALL_VIT,  # one stride: 14
    "vit_small_patch32_224": SMALL_VIT,  # one stride: 32
    "vit_small_patch8_224": SMALL_VIT,  # one stride: 8
    "shvit_s1": {},  # strides 16, 32, 64
}


@pytest.fixture(scope="module", params=list(BODIES), ids=list(BODIES))
def encoder(request: pytest.FixtureRequest) -> SharedEncoder:
    torch.manual_seed(0)
    return SharedEncoder(request.param, channels=32, model_kwargs=BODIES[request.param])


@pytest.mark.parametrize("size", [(64, 64), (96, 64), (75, 101)])
def test_five_levels_of_one_width_for_any_size(encoder, size):
    encoder.eval()
    with torch.no_grad():
        levels = encoder(torch.rand(2, 1, *size))
    assert encoder.strides == (4, 8, 16, 32, 64)
    assert [tuple(level.shape) for level in levels] == [
        (2, 32, math.ceil(size[0] / s), math.ceil(size[1] / s)) for s in encoder.strides
    ]
    assert all(level.isfinite().all() for level in levels)


def test_every_parameter_gets_a_gradient(encoder):
    """DDP stops at a parameter without a gradient."""
    encoder.train()
    encoder.zero_grad()
    torch.stack(
        [(level * torch.randn_like(level)).sum() for level in encoder(torch.rand(2, 1, 64, 96))]
    ).sum().backward()
    assert [name for name, p in encoder.named_parameters() if p.grad is None] == []


def test_depth_rises_from_the_image_to_the_neck(encoder):
    depths = encoder.layer_depths()
    assert depths.keys() == dict(encoder.named_parameters()).keys()
    top = max(depths.values())
    neck = {d for name, d in depths.items() if not name.startswith("body.")}
    body = [d for name, d in depths.items() if name.startswith("body.")]
    assert neck == {top}
    assert min(body) == 0
    assert max(body) < top
    assert sorted(set(depths.values())) == list(range(top + 1))
    first = encoder.body.pretrained_cfg["first_conv"]
    first = first if isinstance(first, str) else first[0]
    assert depths[f"body.{first}.weight"] == 0


@pytest.mark.parametrize("name", ["mtmedformer_tiny", "swin_tiny_patch4_window7_224", "test_vit", "test_resnet"])
def test_feature_maps_are_aligned_with_the_image(name):
    """A bright spot moves the map most at its own place, in a rectangle, on every stride from 4 to 16."""
    torch.manual_seed(0)
    encoder = SharedEncoder(name, channels=32, model_kwargs=BODIES[name]).eval()
    dark = torch.zeros(1, 1, 128, 192)
    bright = dark.clone()
    y, x = 40, 152
    bright[..., y - 6 : y + 6, x - 6 : x + 6] = 1
    with torch.no_grad():
        for s, one, other in list(zip(encoder.strides, encoder(dark), encoder(bright), strict=True))[:3]:
            change = (one - other).abs().sum(1)[0]
            row, column = divmod(int(change.argmax()), change.shape[1])
            assert abs((row + 0.5) * s - y) <= 16, (s, row, column)
            assert abs((column + 0.5) * s - x) <= 16, (s, row, column)


def test_levels_are_those_of_timms_own_feature_extractor():
    torch.manual_seed(0)
    encoder = SharedEncoder("pvt_v2_b0", in_chans=3).eval()
    torch.manual_seed(0)
    oracle = timm.create_model("pvt_v2_b0", features_only=True, in_chans=3, num_classes=0).eval()
    seen: dict[int, torch.Tensor] = {}
    encoder.neck.register_forward_hook(lambda module, args, out: seen.update(args[0]))
    image = torch.rand(1, 3, 64, 96)
    mean, std = (torch.tensor(encoder.body.pretrained_cfg[k]).view(1, 3, 1, 1) for k in ("mean", "std"))
    with torch.no_grad():
        encoder(image)
        for ours, theirs in zip(seen.values(), oracle((image - mean) / std), strict=True):
            torch.testing.assert_close(ours, theirs)


def test_gray_images_are_normalised_by_the_mean_of_the_channels():
    encoder = SharedEncoder("pvt_v2_b0", in_chans=1)
    assert encoder.mean.item() == pytest.approx((0.485 + 0.456 + 0.406) / 3)
    assert encoder.std.item() == pytest.approx((0.229 + 0.224 + 0.225) / 3)


def test_padding_is_black_and_maps_are_cropped_to_the_image():
    encoder = SharedEncoder("mtmedformer_tiny", channels=32).eval()
    image = torch.rand(1, 1, 40, 70)
    black = torch.zeros(1, 1, 64, 96)
    black[..., :40, :70] = image
    seen: list[dict[int, torch.Tensor]] = []
    encoder.neck.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    with torch.no_grad():
        encoder(image)
        encoder(black)
    for s in (4, 8, 16, 32):
        assert torch.equal(seen[0][s], seen[1][s])


def test_encoders_without_batch_norm_do_not_depend_on_the_batch():
    for name in ("mtmedformer_tiny", "mtmedformer_tiny_cnn", "pvt_v2_b0", "test_vit"):
        encoder = SharedEncoder(name, channels=32)
        assert not [m for m in encoder.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    images = torch.rand(3, 1, 64, 64)
    encoder = SharedEncoder("mtmedformer_tiny", channels=32).train()
    for together, alone in zip(encoder(images), encoder(images[1:2]), strict=True):
        torch.testing.assert_close(together[1:2], alone, rtol=1e-4, atol=1e-5)


def test_the_two_tiny_models_are_small_and_of_equal_size():
    tiny, twin = (SharedEncoder(f"mtmedformer_tiny{x}", channels=64) for x in ("", "_cnn"))
    sizes = [sum(p.numel() for p in e.parameters()) for e in (tiny, twin)]
    assert max(sizes) < 600_000
    assert abs(sizes[0] - sizes[1]) < 0.03 * sizes[0]
    assert any("attn" in name for name, _ in tiny.named_parameters())
    assert not any("attn" in name for name, _ in twin.named_parameters())


def test_the_same_seed_and_a_copy_give_the_same_encoder():
    image = torch.rand(1, 1, 64, 64)
    encoders = []
    for _ in range(2):
        torch.manual_seed(3)
        encoders.append(SharedEncoder("mtmedformer_tiny", channels=32).eval())
    encoders += [copy.deepcopy(encoders[0]), pickle.loads(pickle.dumps(encoders[0]))]
    levels = [encoder(image) for encoder in encoders]
    for other in levels[1:]:
        assert all(torch.equal(a, b) for a, b in zip(levels[0], other, strict=True))


def test_recomputed_activations_give_the_same_gradients():
    grads = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        encoder = SharedEncoder("mtmedformer_tiny", channels=32, grad_checkpointing=checkpointing).train()
        sum(level.square().sum() for level in encoder(torch.linspace(0, 1, 4096).view(1, 1, 64, 64))).backward()
        grads.append([p.grad for p in encoder.parameters()])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


def test_stochastic_depth_reaches_the_body():
    encoder = SharedEncoder("pvt_v2_b0", drop_path_rate=0.2)
    rates = [m.drop_prob for m in encoder.modules() if type(m).__name__ == "DropPath"]
    assert max(rates) == pytest.approx(0.2)


def test_models_of_a_fixed_image_size_refuse_other_sizes():
    encoder = SharedEncoder("test_maxvit", channels=32, img_size=(160, 320)).eval()
    assert encoder(torch.zeros(1, 1, 160, 320))[0].shape[-2:] == (40, 80)
    with pytest.raises(ConfigError, match=r"test_maxvit is built for images of 160 x 320 px, not 64 x 64 px.*img_size"):
        encoder(torch.zeros(1, 1, 64, 64))
    with pytest.raises(ConfigError, match=r"test_maxvit takes images of one size only: set encoder.img_size"):
        SharedEncoder("test_maxvit")


def test_image_sizes_a_model_does_not_accept_are_refused_at_construction():
    with pytest.raises(ConfigError, match=r"nest_tiny cannot take images of 64 x 96 px .*pvt_v2_\*"):
        SharedEncoder("nest_tiny", img_size=(64, 96))


def test_the_position_embedding_has_the_configured_size():
    encoder = SharedEncoder("vit_small_patch14_dinov2", img_size=(96, 128), channels=32, model_kwargs=SMALL_VIT)
    assert encoder.body.patch_embed.grid_size == (6, 8)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"name": "pvt_v2_b9"}, r"encoder\.name=pvt_v2_b9 is no timm model; close ones are .*pvt_v2_b"),
        ({"name": "pvt_v2_b0.in22k"}, r"encoder\.name=pvt_v2_b0\.in22k: timm has no weights 'in22k' .*it has in1k"),
        ({"name": "hf-hub:someone/something"}, r"is no timm model"),
        ({"name": "mtmedformer_tiny", "img_size": 0}, r"encoder\.img_size is 0"),
        ({"name": "mtmedformer_tiny", "img_size": (64, -1)}, r"encoder\.img_size is \(64, -1\)"),
        ({"name": "mtmedformer_tiny", "model_kwargs": {"nonsense": 3}}, r"encoder\.model_kwargs do not fit .*nonsense"),
        ({"name": "mtmedformer_tiny", "pretrained": True}, r"could not be downloaded.*encoder\.checkpoint_path"),
        ({"name": "crossvit_tiny_240"}, r"crossvit_tiny_240"),
        ({"name": "dla34", "grad_checkpointing": True}, r"encoder\.grad_checkpointing: dla34 cannot"),
        ({"channels": 0}, r"encoder\.in_chans is 1, channels 0"),
        ({"checkpoint_path": "nowhere.safetensors"}, r"nowhere\.safetensors: no such file"),
    ],
)
def test_invalid_arguments_are_refused_with_a_message(kwargs, message):
    with pytest.raises(ConfigError, match=message):
        SharedEncoder(**kwargs)


def test_images_of_other_channels_are_refused():
    with pytest.raises(ConfigError, match=r"encoder\.in_chans is 1 but the images are \(1, 3, 64, 64\)"):
        SharedEncoder("mtmedformer_tiny")(torch.zeros(1, 3, 64, 64))


def test_group_norm_groups_hold_at_least_eight_channels():
    assert [group_norm(c).num_groups for c in (8, 24, 64, 100, 128, 256, 512)] == [1, 3, 8, 10, 16, 32, 32]


def test_group_norm_has_at_most_the_given_number_of_groups():
    assert [group_norm(c, 8, 1).num_groups for c in (4, 8, 24, 36, 256)] == [4, 8, 8, 6, 8]


@pytest.mark.parametrize("have, want", [(16, 4), (16, 32), (8, 32), (32, 4)])
def test_resampled_levels_have_the_requested_stride(have, want):
    layers, channels = resampler(64, have, want)
    out = layers(torch.zeros(1, 64, 256 // have, 256 // have))
    assert out.shape == (1, channels, 256 // want, 256 // want)


def trained_resnet(tmp_path):
    """Return a file of weights of a small ResNet whose BatchNorm statistics are those of some images."""
    body = timm.create_model("test_resnet", in_chans=1)
    for _ in range(3):
        body(torch.rand(4, 1, 64, 64))
    torch.save(body.state_dict(), tmp_path / "resnet.pt")
    return str(tmp_path / "resnet.pt")


@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_statistics_stay_in_training_while_weights_and_biases_are_trained(tmp_path, frozen):
    path = trained_resnet(tmp_path)
    encoder = SharedEncoder("test_resnet", channels=16, checkpoint_path=path, frozen_statistics=frozen).train()
    before = {key: value.clone() for key, value in encoder.body.state_dict().items()}
    sum(level.square().sum() for level in encoder(torch.rand(2, 1, 64, 64))).backward()
    torch.optim.Adam(encoder.parameters(), lr=0.01).step()
    after = encoder.body.state_dict()
    statistics = {key for key in before if "running_" in key or "num_batches" in key}
    assert statistics
    assert all(torch.equal(before[key], after[key]) == frozen for key in statistics)
    assert not torch.equal(before["bn1.weight"], after["bn1.weight"])
    assert encoder.neck.training


def test_frozen_statistics_of_random_weights_are_refused():
    encoder = SharedEncoder("test_resnet", channels=16, frozen_statistics=True)
    encoder.eval()
    with pytest.raises(ConfigError, match=r"test_resnet has no BatchNorm statistics of trained weights; set"):
        encoder.train()

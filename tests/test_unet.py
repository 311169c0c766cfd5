"""The UNet against diffusers' UNet2DModel: same names, same outputs, same gradients."""

import math

import pytest
import torch
import torch.nn.functional as F

from modules import EMA, LabelConfig, UNet
from references import diffusers_net
from utils.configs import UNetConfig
from utils.cpu_kernels import GroupNorm, attend

CONFIGS = {
    "attention": UNetConfig(sample_size=(32, 32), block_out_channels=(32, 64, 64),
                            attention_resolutions=(16, 8)),
    "no attention on levels": UNetConfig(sample_size=(32, 32), block_out_channels=(32, 64),
                                         attention_resolutions=(), layers_per_block=1),
    "odd ratios": UNetConfig(sample_size=(24, 24), block_out_channels=(32, 96, 160),
                             attention_resolutions=(12,), layers_per_block=3),
    "labels": UNetConfig(sample_size=(16, 16), block_out_channels=(32, 64),
                         attention_resolutions=(8,), label_dim=7),
    "non-square": UNetConfig(sample_size=(52, 44), block_out_channels=(32, 64, 64),
                             attention_resolutions=(11,), layers_per_block=1),
    "groups of 8, one head": UNetConfig(sample_size=(16, 16), block_out_channels=(24, 48),
                                        norm_num_groups=8, attention_head_dim=24,
                                        attention_resolutions=(8,)),
    "patches": UNetConfig(sample_size=(32, 48), block_out_channels=(32, 64),
                          attention_resolutions=(8,), patch_size=2),
}


def randomise(net: UNet) -> UNet:
    """Random weights everywhere: zero-initialised layers would hide what stands before them."""
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return net


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_diffusers(name):
    config = CONFIGS[name]
    torch.manual_seed(0)
    ours, theirs = randomise(UNet(config)), diffusers_net(config)
    weights = ours.state_dict()
    if config.label_dim:  # one-hot labels through a linear map are a table of its columns
        weights["class_embedding.weight"] = weights["class_embedding.weight"].T
    theirs.load_state_dict(weights, strict=True)
    x = torch.randn(3, 1, *config.sample_size)
    t = torch.tensor([0, 421, 999])
    labels = torch.tensor([0, 3, 6]) if config.label_dim else None
    one_hot = F.one_hot(labels, 7) if config.label_dim else None
    weight = torch.randn_like(x)

    out = ours(x, t, one_hot)
    folded = theirs(F.pixel_unshuffle(x, config.patch_size), t, labels).sample
    expected = F.pixel_shuffle(folded, config.patch_size)
    assert out.std() > 0.1
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)

    (out * weight).mean().backward()
    (expected * weight).mean().backward()
    gradients = dict(theirs.named_parameters())
    for key, parameter in ours.named_parameters():
        expected = gradients[key].grad.T if key.startswith("class") else gradients[key].grad
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-5, atol=1e-5)


def test_channels_last_and_compute_type_change_little():
    torch.manual_seed(0)
    net = randomise(UNet(CONFIGS["attention"]))
    x, t = torch.randn(2, 1, 32, 32), torch.tensor([5, 500])
    expected = net(x, t)
    with torch.autocast("cpu", torch.bfloat16):
        out = net.to(memory_format=torch.channels_last)(x, t)
    assert ((out.float() - expected).norm() / expected.norm()) < 0.02


@pytest.mark.parametrize("name", CONFIGS)
def test_images_enter_and_leave_the_net_in_float32_under_autocast(name):
    """A difference of an eighth of a grey level, which bfloat16 cannot tell near white."""
    torch.manual_seed(0)
    net, size = randomise(UNet(CONFIGS[name])), CONFIGS[name].sample_size
    x = torch.ones(1, CONFIGS[name].in_channels, *size)
    finer, t = x - 2**-10, torch.tensor([5])
    assert torch.equal(finer.bfloat16(), x.bfloat16())
    folded = [F.pixel_unshuffle(image, net.config.patch_size) for image in (x, finer)]
    expected = net.conv_in(folded[1]) - net.conv_in(folded[0])
    with torch.autocast("cpu", torch.bfloat16):
        change = net.conv_in(folded[1]) - net.conv_in(folded[0])
        assert net(x, t).dtype == torch.float32
    torch.testing.assert_close(change, expected)
    assert expected.abs().max() > 1e-4


def distance(value: torch.Tensor, exact: torch.Tensor) -> float:
    return ((value.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("shape", [(4, 96, 32, 32), (4, 128, 13, 11), (3, 64, 8, 8)])
@pytest.mark.parametrize("shift", [0.0, 4.0])
def test_group_norm_in_bfloat16_is_as_exact_as_bfloat16(shape, shift):
    """Against PyTorch's GroupNorm and its gradients in float64, also far from a zero mean."""
    torch.manual_seed(0)
    norm = GroupNorm(32, shape[1])
    torch.nn.init.normal_(norm.weight, 1.0, 0.3)
    torch.nn.init.normal_(norm.bias)
    x = (torch.randn(shape) + shift * torch.randn(1, shape[1], 1, 1)).bfloat16()
    grad = torch.randn(shape).bfloat16().contiguous(memory_format=torch.channels_last)

    x_in = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    out = norm(x_in)
    out.backward(grad)
    x_exact, weight, bias = (t.detach().double().requires_grad_()
                             for t in (x, norm.weight, norm.bias))
    exact = F.group_norm(x_exact, 32, weight, bias, norm.eps)
    exact.backward(grad.double())

    assert out.dtype == torch.bfloat16
    assert out.is_contiguous(memory_format=torch.channels_last)
    for value, truth in ((out, exact), (x_in.grad, x_exact.grad),
                         (norm.weight.grad, weight.grad), (norm.bias.grad, bias.grad)):
        assert distance(value, truth) < 0.005  # bfloat16 rounds by up to 2^-8 = 0.004


@pytest.mark.parametrize("positions", [4, 64, 256])
def test_attention_for_training_equals_the_fused_kernel(positions):
    torch.manual_seed(0)
    qkv = [torch.randn(2, 3, positions, 32, requires_grad=True) for _ in range(3)]
    weight = torch.randn(2, 3, positions, 32)
    out, expected = attend(*qkv), F.scaled_dot_product_attention(*qkv)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(torch.autograd.grad((out * weight).sum(), qkv),
                            torch.autograd.grad((expected * weight).sum(), qkv)):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_starts_as_a_prediction_of_zero():
    net = UNet(CONFIGS["labels"])
    out = net(torch.randn(2, 1, 16, 16), torch.tensor([1, 2]), torch.randn(2, 7))
    assert torch.count_nonzero(out) == 0


def test_native_oasis_size():
    config = UNetConfig(sample_size=(208, 176), block_out_channels=(32, 32, 32, 32),
                        attention_resolutions=(11,), layers_per_block=1, patch_size=2)
    assert UNet(config)(torch.zeros(1, 1, 208, 176), torch.tensor([3])).shape == (1, 1, 208, 176)


@pytest.mark.parametrize("height, width", [(30, 32), (32, 31), (2, 32), (0, 32)])
def test_size_that_cannot_be_halved_is_named(height, width):
    net = UNet(CONFIGS["attention"])
    with pytest.raises(ValueError, match=f"{height}x{width}.*not divisible by 4.*nearest"):
        net(torch.zeros(1, 1, height, width), torch.tensor([3]))


@pytest.mark.parametrize("values, words", [
    (dict(sample_size=(30, 30)), "30x30"),
    (dict(block_out_channels=(48, 64)), "block_out_channels: 48"),
    (dict(attention_resolutions=(15,)), "attention_resolutions: no level has a side of 15"),
    (dict(dropout=(0.1, 0.2, 0.3, 0.4)), "dropout: 4 values for 3 levels"),
])
def test_bad_configs_name_the_field(values, words):
    with pytest.raises(ValueError, match=words):
        UNetConfig(**values)


def test_labels_of_zeros_are_no_labels():
    net = randomise(UNet(CONFIGS["labels"]))
    x, t = torch.randn(2, 1, 16, 16), torch.tensor([3, 700])
    assert torch.equal(net(x, t), net(x, t, torch.zeros(2, 7)))
    assert not torch.allclose(net(x, t), net(x, t, torch.eye(7)[:2]))


def test_the_final_convolution_sees_across_the_borders_of_patches():
    """Without it, no output pixel depends on the pixels of a coarse position's neighbours' outputs:
    a unit change at one place of conv_out's map must reach pixels outside its own 4x4 block."""
    config = UNetConfig(sample_size=(32, 32), block_out_channels=(32, 32), patch_size=4,
                        attention_resolutions=(), final_channels=4)
    net, changed = randomise(UNet(config)), []
    for bump in (0.0, 1.0):
        handle = net.conv_out.register_forward_hook(
            lambda module, inputs, out: out.index_put((*map(torch.tensor, (0, 0, 3, 3)),),
                                                      torch.tensor(5.0 * bump), accumulate=True))
        changed.append(net(torch.zeros(1, 1, 32, 32), torch.tensor([5])))
        handle.remove()
    rows, columns = torch.nonzero((changed[0] != changed[1])[0, 0], as_tuple=True)
    assert (rows.min(), rows.max()) == (11, 13) and (columns.min(), columns.max()) == (11, 13)


def test_dropout_may_be_a_whole_number():
    assert UNetConfig(dropout=0).level_dropout(1) == 0


def test_dropout_by_level():
    config = UNetConfig(sample_size=(32, 32), block_out_channels=(32, 32, 32), dropout=(0.0, 0.3),
                        attention_resolutions=())
    net = UNet(config)
    chances = {name: m.p for name, m in net.named_modules() if isinstance(m, torch.nn.Dropout)}
    assert {p for name, p in chances.items() if "blocks.0" in name and "down" in name} == {0.0}
    for coarse in ("down_blocks.1", "down_blocks.2", "up_blocks.0", "up_blocks.1"):
        assert {p for name, p in chances.items() if name.startswith(coarse)} == {0.3}
    assert {p for name, p in chances.items() if name.startswith("up_blocks.2")} == {0.0}
    assert {p for name, p in chances.items() if name.startswith("mid")} == {0.3}


# Labels ----------------------------------------------------------------------------------------


def test_labels_are_sums_of_parts_that_can_each_be_left_out():
    labels = LabelConfig(height_range=(0, 31), classes=("CDR 0", "CDR 1"), augmentations=3)
    nothing, height = torch.tensor([math.nan]), torch.tensor([0.3])
    both = labels.encode(height, ["CDR 1"])
    assert both.shape == (1, labels.dim) and torch.equal(
        both, labels.encode(height, [None]) + labels.encode(nothing, ["CDR 1"]))
    assert torch.equal(labels.encode(nothing, ["CDR 2"]), torch.zeros(1, labels.dim))
    assert LabelConfig().encode(height, ["CDR 1"]) is None


def test_heights_are_told_apart_and_neighbours_are_alike():
    labels = LabelConfig(height_range=(0, 31))
    vectors = labels.encode(torch.arange(32) / 31, [None] * 32)
    distances = torch.cdist(vectors, vectors)
    assert distances[~torch.eye(32, dtype=bool)].min() > 0.5
    assert all(distances[i].topk(3, largest=False).indices.sort().values.tolist()
               == [i - 1, i, i + 1] for i in range(2, 30))


def test_seeds_have_heights_of_their_own_evenly_distributed():
    labels = LabelConfig(height_range=(0, 31))
    vectors = labels.for_seeds(list(range(2000)))
    assert torch.equal(vectors[7:9], labels.for_seeds([7, 8]))
    heights = torch.acos(vectors[:, 1].clamp(-1, 1)) / math.pi
    assert ((heights * 10).long().bincount(minlength=10).float() / 200 - 1).abs().max() < 0.25


# EMA -------------------------------------------------------------------------------------------


def test_ema_has_the_profile_of_its_length():
    """The weights that an average gives to each step have, relative to the steps so far, the
    standard deviation that was asked for (Karras et al. 2024, eq. 2 and 3)."""
    for length in (0.05, 0.1, 0.25):
        net, steps = torch.nn.Linear(1, 400, bias=False), 400
        ema, weights = EMA(net, length), torch.eye(400)
        for n in range(steps):
            net.weight.data = weights[:, n:n + 1]
            ema.update(net)
        profile = ema.net.weight[:, 0].double()
        places = (torch.arange(steps) + 0.5) / steps
        mean = (profile * places).sum()
        spread = (profile * (places - mean) ** 2).sum().sqrt()
        assert profile.sum() == pytest.approx(1, abs=1e-5)
        assert spread.item() == pytest.approx(length, rel=0.02)


def test_ema_copies_buffers():
    net = torch.nn.Linear(1, 1)
    net.register_buffer("count", torch.tensor(0))
    ema = EMA(net)
    net.count.add_(3)
    ema.update(net)
    assert ema.net.count == 3  # an averaged count would lag behind

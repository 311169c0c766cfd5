"""The UNet against diffusers' UNet2DModel: same names, same outputs, same gradients."""

import pytest
import torch
import torch.nn.functional as F

from modules import EMA, UNet, UNetConfig
from references import diffusers_net
from utils.cpu_kernels import GroupNorm, attend

CONFIGS = {
    "attention": UNetConfig(sample_size=(32, 32), block_out_channels=(32, 64, 64),
                            attention_resolutions=(16, 8)),
    "no attention on levels": UNetConfig(sample_size=(32, 32), block_out_channels=(32, 64),
                                         attention_resolutions=(), layers_per_block=1),
    "odd ratios": UNetConfig(sample_size=(24, 24), block_out_channels=(32, 96, 160),
                             attention_resolutions=(12,), layers_per_block=3),
    "class embedding": UNetConfig(sample_size=(16, 16), block_out_channels=(32, 64),
                                  attention_resolutions=(8,), num_class_embeds=7),
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
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(3, 1, *config.sample_size)
    t = torch.tensor([0, 421, 999])
    labels = None if config.num_class_embeds is None else torch.tensor([0, 3, 6])
    weight = torch.randn_like(x)

    out = ours(x, t, labels)
    folded = theirs(F.pixel_unshuffle(x, config.patch_size), t, labels).sample
    expected = F.pixel_shuffle(folded, config.patch_size)
    assert out.std() > 0.1
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)

    (out * weight).mean().backward()
    (expected * weight).mean().backward()
    gradients = dict(theirs.named_parameters())
    for key, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[key].grad, rtol=1e-5, atol=1e-5)


def test_channels_last_and_compute_type_change_little():
    torch.manual_seed(0)
    net = randomise(UNet(CONFIGS["attention"]))
    x, t = torch.randn(2, 1, 32, 32), torch.tensor([5, 500])
    expected = net(x, t)
    with torch.autocast("cpu", torch.bfloat16):
        out = net.to(memory_format=torch.channels_last)(x, t)
    assert ((out.float() - expected).norm() / expected.norm()) < 0.02


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
    net = UNet(CONFIGS["class embedding"])
    out = net(torch.randn(2, 1, 16, 16), torch.tensor([1, 2]), torch.tensor([1, 2]))
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
])
def test_bad_configs_name_the_field(values, words):
    with pytest.raises(ValueError, match=words):
        UNetConfig(**values)


def test_labels_and_num_class_embeds_go_together():
    x, t = torch.zeros(1, 1, 32, 32), torch.tensor([3])
    with pytest.raises(ValueError, match="class_labels"):
        UNet(CONFIGS["attention"])(x, t, torch.tensor([1]))
    with pytest.raises(ValueError, match="class_labels"):
        UNet(CONFIGS["class embedding"])(x[..., :16, :16], t)


def test_ema_follows_its_closed_form():
    """With weights that step from 0 to 1, the average is 1 - the product of the decays."""
    net = torch.nn.Linear(1, 1, bias=False)
    net.register_buffer("count", torch.tensor(0))
    torch.nn.init.zeros_(net.weight)
    ema, left = EMA(net, decay=0.9), 1.0
    torch.nn.init.ones_(net.weight)
    for n in range(1, 201):
        net.count.add_(1)
        ema.update(net)
        left *= min(0.9, (1 + n) / (10 + n))
        assert ema.net.weight.item() == pytest.approx(1 - left, abs=1e-5)
    assert ema.net.count == 200  # copied: an averaged count would lag behind


def test_ema_of_a_short_run_forgets_the_initial_net():
    net = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(net.weight)
    ema = EMA(net, decay=0.9999)
    torch.nn.init.ones_(net.weight)
    for _ in range(300):
        ema.update(net)
    assert ema.net.weight.item() > 0.999

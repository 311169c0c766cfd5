"""The network and the diffusion: a UNet that denoises, and the process that it reverses.

Read top to bottom like the paper: `UNet` (Ho et al. 2020, section 4 and appendix B), then
`NoiseScheduler` (forward process, eq. 4), then the reverse process: `noise_levels`, `Denoiser`
and the samplers (Ho et al., eq. 7; Song et al. 2021; Lu et al. 2022; Karras et al. 2022), then
`EMA`. Their configs are in utils/configs.py. Tensor names and arithmetic are those of diffusers'
`UNet2DModel`, and the scheduler's config keys those of its `DDPMScheduler`, so that a model trained
here opens there.

Conventions: images are float32 in [-1, 1] with shape (B, C, H, W); B batch, C channels, H rows,
W columns. Timesteps count from 0 (almost clean) to T - 1 (noise). State, schedule and loss are
float32 whatever type the network computes in.
"""

import copy
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.configs import SAMPLERS, SamplerConfig, SchedulerConfig, UNetConfig
from utils.cpu_kernels import GroupNorm, attend

# ---------------------------------------------------------------------------------------------
# UNet
# ---------------------------------------------------------------------------------------------


def timestep_embedding(timesteps: Tensor, dim: int) -> Tensor:
    """Sinusoidal embedding: (B,) timesteps -> (B, dim) float32, cosines first.

    Vaswani et al. 2017, section 3.5, as Ho et al. use it for t; the order follows diffusers'
    `flip_sin_to_cos=True, freq_shift=0`.
    """
    half = dim // 2
    exponent = torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    angles = timesteps[:, None].float() * torch.exp(-math.log(10000) * exponent)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def named(**layers: nn.Module) -> nn.Sequential:
    """Layers one after the other, under the names that diffusers gives them."""
    return nn.Sequential(OrderedDict(layers))


class ResnetBlock(nn.Module):
    """Residual block: (B, in, H, W), (B, temb_dim) -> (B, out, H, W).

    GroupNorm, SiLU, 3x3 conv, timestep embedding added, GroupNorm, SiLU, dropout, 3x3 conv;
    a 1x1 convolution on the skip where the channels change (Ho et al., appendix B).
    """

    def __init__(self, in_channels: int, out_channels: int, temb_dim: int, groups: int,
                 dropout: float):
        super().__init__()
        self.norm1 = GroupNorm(groups, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(temb_dim, out_channels)
        self.norm2 = GroupNorm(groups, out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = None
        if in_channels != out_channels:
            self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time_emb_proj(F.silu(temb))[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Attention(nn.Module):
    """Multi-head self-attention over all positions, with a residual: (B, C, H, W) -> same."""

    def __init__(self, channels: int, config: UNetConfig):
        super().__init__()
        self.num_heads = channels // config.attention_head_dim
        self.group_norm = GroupNorm(config.norm_num_groups, channels)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])  # diffusers: to_out.0

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        tokens = self.group_norm(x).permute(0, 2, 3, 1).reshape(b, h * w, c)  # (B, HW, C)
        q, k, v = (
            project(tokens).view(b, h * w, self.num_heads, -1).transpose(1, 2)  # (B, nh, HW, d)
            for project in (self.to_q, self.to_k, self.to_v)
        )
        out = attend(q, k, v)
        out = self.to_out[0](out.transpose(1, 2).reshape(b, h * w, c))
        return x + out.view(b, h, w, c).permute(0, 3, 1, 2)


class Float32Conv2d(nn.Conv2d):
    """A convolution that stays in float32 under autocast: where images enter and leave the net.

    Near black and white, bfloat16 holds multiples of half a grey level of 255 only: no eye sees it,
    but half of KID came from it (docs/experiments.md, "bfloat16").
    """

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.to(self.weight.dtype))


def downsample(channels: int) -> nn.Module:
    """Strided 3x3 convolution: (B, C, H, W) -> (B, C, H/2, W/2)."""
    return named(conv=nn.Conv2d(channels, channels, 3, stride=2, padding=1))


def upsample(channels: int) -> nn.Module:
    """Nearest neighbour, then a 3x3 convolution: (B, C, H, W) -> (B, C, 2H, 2W)."""
    return named(nearest=nn.Upsample(scale_factor=2.0),
                 conv=nn.Conv2d(channels, channels, 3, padding=1))


class Level(nn.Module):
    """Residual blocks, each followed by attention where it is wanted, then a resampling.

    channels: (in, out) of each residual block; attention: whether it follows each of them; down,
        up: whether the level halves or doubles H and W.
    """

    def __init__(self, channels: list[tuple[int, int]], attention: list[bool], temb_dim: int,
                 config: UNetConfig, dropout: float, down: bool = False, up: bool = False):
        super().__init__()
        width, groups = channels[-1][1], config.norm_num_groups
        self.resnets = nn.ModuleList(
            ResnetBlock(i, o, temb_dim, groups, dropout) for i, o in channels)
        self.attentions = nn.ModuleList(
            Attention(width, config) if wanted else nn.Identity() for wanted in attention)
        self.downsamplers = nn.ModuleList([downsample(width)] if down else [])
        self.upsamplers = nn.ModuleList([upsample(width)] if up else [])

    def layer(self, index: int, x: Tensor, temb: Tensor) -> Tensor:
        """Residual block `index` and its attention: (B, in, H, W) -> (B, out, H, W)."""
        return self.attentions[index](self.resnets[index](x, temb))


class UNet(nn.Module):
    """The denoiser: noisy images and their timesteps in, one prediction per pixel out.

    Same tensor names and arithmetic as diffusers' `UNet2DModel` (with `patch_size` > 1, as that
    model between `pixel_unshuffle` and `pixel_shuffle`).
    """

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        widths, depth, patch = config.block_out_channels, config.layers_per_block, config.patch_size
        temb_dim = 4 * widths[0]
        attention = [side in config.attention_resolutions for side in config.resolutions]

        self.conv_in = Float32Conv2d(config.in_channels * patch**2, widths[0], 3, padding=1)
        self.time_embedding = named(linear_1=nn.Linear(widths[0], temb_dim), act=nn.SiLU(),
                                    linear_2=nn.Linear(temb_dim, temb_dim))
        if config.label_dim:  # without bias, zeros mean no label (Karras et al. 2022)
            self.class_embedding = nn.Linear(config.label_dim, temb_dim, bias=False)

        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        skips, current = [widths[0]], widths[0]  # channels of the skip connections, of x
        for level, width in enumerate(widths):
            channels = [(current, width)] + [(width, width)] * (depth - 1)
            down = level < len(widths) - 1
            self.down_blocks.append(
                Level(channels, [attention[level]] * depth, temb_dim, config,
                      config.level_dropout(level), down=down))
            skips += [width] * (depth + down)
            current = width
        self.mid_block = Level([(current, current)] * 2, [True, False], temb_dim, config,
                               config.level_dropout(-1))
        for level, width in reversed(list(enumerate(widths))):
            inputs = [current] + [width] * depth
            channels = [(before + skips.pop(), width) for before in inputs]
            self.up_blocks.append(
                Level(channels, [attention[level]] * len(channels), temb_dim, config,
                      config.level_dropout(level), up=level > 0))
            current = width

        self.conv_norm_out = GroupNorm(config.norm_num_groups, widths[0])
        full = config.final_channels or config.out_channels
        conv_out = nn.Conv2d if config.final_channels else Float32Conv2d
        self.conv_out = conv_out(widths[0], full * patch**2, 3, padding=1)
        if config.final_channels:
            self.conv_final = Float32Conv2d(full + config.in_channels, config.out_channels, 3,
                                            padding=1)
        if config.refine_channels:
            fine = config.refine_channels
            self.refine_in = Float32Conv2d(full + config.in_channels, fine, 3, padding=1)
            self.refine = ResnetBlock(fine, fine, temb_dim, 8, 0.0)
            self.refine_out = Float32Conv2d(fine, config.out_channels, 3, padding=1)
        self._zero_residual_branches()

    def _zero_residual_branches(self) -> None:
        """Zeroes the last layer of every residual branch and of the net (Ho et al., their code).

        Each block then starts as the identity and the net as a prediction of zero.
        """
        last_layers = [self.conv_final if self.config.final_channels else self.conv_out]
        if self.config.refine_channels:
            last_layers.append(self.refine_out)
        last_layers += [m.conv2 for m in self.modules() if isinstance(m, ResnetBlock)]
        last_layers += [m.to_out[0] for m in self.modules() if isinstance(m, Attention)]
        for layer in last_layers:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, sample: Tensor, timestep: Tensor, labels: Tensor | None = None) -> Tensor:
        """(B, in_channels, H, W), (B,) timesteps, (B, label_dim) -> (B, out_channels, H, W).

        Labels of zeros, or None, leave the prediction unconditional.

        Raises ValueError if H or W cannot be halved at every level.
        """
        self.config.check_size(*sample.shape[-2:])
        dtype = self.conv_in.weight.dtype
        temb = self.time_embedding(
            timestep_embedding(timestep, self.conv_in.out_channels).to(dtype))  # (B, 4 * C0)
        if labels is not None:
            temb = temb + self.class_embedding(labels.to(dtype))

        x = self.conv_in(F.pixel_unshuffle(sample, self.config.patch_size))  # (B, C0, H/p, W/p)
        x = x.to(temb.dtype)  # that of autocast, if it is on
        skips = [x]
        for level in self.down_blocks:  # (B, C_l, H/p/2^l, W/p/2^l) on level l
            for index in range(len(level.resnets)):
                x = level.layer(index, x, temb)
                skips.append(x)
            for halve in level.downsamplers:  # one, but none on the last level
                x = halve(x)
                skips.append(x)
        for index in range(len(self.mid_block.resnets)):
            x = self.mid_block.layer(index, x, temb)
        for level in self.up_blocks:
            for index in range(len(level.resnets)):
                x = level.layer(index, torch.cat([x, skips.pop()], dim=1), temb)
            for double in level.upsamplers:  # one, but none on the finest level
                x = double(x)
        x = self.conv_out(F.silu(self.conv_norm_out(x)))  # (B, full * p^2, H/p, W/p)
        x = F.pixel_shuffle(x, self.config.patch_size)
        if self.config.final_channels:
            fine = torch.cat([F.silu(x), sample], dim=1)  # (B, full + in_channels, H, W)
            x = self.conv_final(fine)
            if self.config.refine_channels:
                fine = self.refine(self.refine_in(fine).to(temb.dtype), temb)
                x = x + self.refine_out(F.silu(fine))
        return x


# ---------------------------------------------------------------------------------------------
# Labels
# ---------------------------------------------------------------------------------------------

HEIGHT_FREQUENCIES = 16  # resolves slices that lie 1/32 of the height apart


def seed_height(seed: int) -> float:
    """The height in the head of a seed's slice if none is asked for, uniform in [0, 1]."""
    return np.random.default_rng([seed, 1]).random()


@dataclass(frozen=True)
class LabelConfig:
    """The conditions of a slice as one label vector; stored in every checkpoint.

    A missing condition is zero, and the vector enters the net through a linear layer without bias:
    the conditions are summed embeddings, each of which can be dropped (Ho & Salimans 2022, section
    3.2).

    height_range: slice numbers of the heights 0 and 1; None for a net without heights.
    classes: names of the classes; empty for a net without classes.
    augmentations: number of augmentation parameters (Karras et al. 2022, appendix F.2), zeros when
        sampling.
    """

    height_range: tuple[float, float] | None = None
    classes: tuple[str, ...] = ()
    augmentations: int = 0

    def __post_init__(self):
        for name in ("height_range", "classes"):
            if isinstance(getattr(self, name), list):  # JSON brings lists
                object.__setattr__(self, name, tuple(getattr(self, name)))
        low, high = map(float, self.height_range or (0, 1))
        if not low < high:
            raise ValueError(f"height_range: {low} is not below {high}")

    def height(self, seed: int, position: float | None = None) -> float | None:
        """The height of a seed's slice: `position`, or else its own; None without heights."""
        return seed_height(seed) if position is None and self.height_range else position

    @property
    def dim(self) -> int:
        """Length of the label vector; 0 for an unconditional net."""
        heights = HEIGHT_FREQUENCIES if self.height_range else 0
        return heights + len(self.classes) + self.augmentations

    def encode(self, heights: Tensor, classes: Sequence[str | None],
               augmentations: Tensor | None = None) -> Tensor | None:
        """Label vectors, float32 (B, dim) on the CPU; None for an unconditional net.

        heights: (B,) in [0, 1], nan for none; classes: B names; one that is not in `classes`, such
        as None, is none; augmentations: (B, augmentations), None for none.
        """
        parts = []
        if self.height_range:
            angles = math.pi * torch.arange(HEIGHT_FREQUENCIES) * heights[:, None].float()
            parts.append(angles.cos().nan_to_num(0.0))
        if self.classes:
            parts.append(torch.tensor([[float(name == known) for known in self.classes]
                                       for name in classes]))
        if self.augmentations:
            parts.append(torch.zeros(len(heights), self.augmentations)
                         if augmentations is None else augmentations)
        return torch.cat(parts, dim=1) if parts else None

    def heights_of(self, numbers: np.ndarray) -> Tensor:
        """Slice numbers, (N,), as heights, 0 to 1 within `height_range`."""
        low, high = self.height_range or (0.0, 1.0)
        return torch.from_numpy((numbers - low) / (high - low))

    def for_seeds(self, seeds: list[int]) -> Tensor | None:
        """Label vectors, float32 (len(seeds), dim) on the CPU: each seed's height, and no class."""
        heights = torch.tensor([self.height(seed) or 0.0 for seed in seeds])
        return self.encode(heights, [None] * len(seeds))


# ---------------------------------------------------------------------------------------------
# Diffusion
# ---------------------------------------------------------------------------------------------


def make_betas(config: SchedulerConfig) -> Tensor:
    """beta_0 .. beta_{T-1} as a (T,) float64 tensor."""
    steps = config.num_train_timesteps
    if config.beta_schedule == "linear":
        betas = torch.linspace(config.beta_start, config.beta_end, steps, dtype=torch.float64)
    else:
        time = torch.arange(steps + 1, dtype=torch.float64) / steps
        alpha_bar = torch.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2
        # Capped, as otherwise the last alpha is zero and the reverse step divides by it.
        betas = (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)
    if config.rescale_betas_zero_snr:
        root = (1 - betas).cumprod(0).sqrt()
        root = (root - root[-1]) * root[0] / (root[0] - root[-1])
        betas = betas_of(root**2)
    if config.log_snr_shift:
        betas = betas_of((1 - betas).cumprod(0).logit().add(config.log_snr_shift).sigmoid())
    return betas


def betas_of(alphas_cumprod: Tensor) -> Tensor:
    """(T,) alpha-bar -> (T,) beta."""
    return 1 - torch.cat([alphas_cumprod[:1], alphas_cumprod[1:] / alphas_cumprod[:-1]])


class NoiseLevel(NamedTuple):
    """How much signal and noise x_t holds: x_t = signal * x_0 + noise * epsilon."""

    timestep: float  # from -1 (the clean image) to T - 1; may lie between the table's timesteps
    signal: float  # sqrt(alpha-bar)
    noise: float  # sqrt(1 - alpha-bar)

    @property
    def sigma(self) -> float:
        """Noise over signal: the noise level of Karras et al. 2022; infinite without signal."""
        return self.noise / self.signal if self.signal else math.inf

    @property
    def half_log_snr(self) -> float:
        """The lambda of Lu et al. 2022; not for the clean image, where it is infinite."""
        return -math.log(self.sigma)


class NoiseScheduler:
    """The forward process: a fixed table of noise levels, and the levels between them.

    The tables (`betas`, `alphas_cumprod`, (T,), on the CPU) are float64, never changed, and
    never cast to an image's type: in bfloat16, the first alphas_cumprod would round to 1 and
    leave whole timesteps without noise. `alphas_cumprod[t]` is the paper's alpha-bar_{t+1}.
    betas: (T,) float64, for a table other than that of the config.
    """

    def __init__(self, config: SchedulerConfig, betas: Tensor | None = None):
        self.config = config
        self.betas = make_betas(config) if betas is None else betas
        self.alphas_cumprod = (1 - self.betas).cumprod(0)
        self._tables: dict[torch.device, tuple[Tensor, Tensor]] = {}
        # Between timesteps, the angle phi = arctan(sigma) of Salimans & Ho 2022, appendix D, is
        # interpolated: it is finite without noise and without signal, and linear in the cosine
        # schedule.
        self._timesteps = np.arange(-1, config.num_train_timesteps)
        alpha_bar = np.append(1.0, self.alphas_cumprod.numpy())
        self._angles = np.arctan2(np.sqrt(1 - alpha_bar), np.sqrt(alpha_bar))

    def level(self, timestep: float) -> NoiseLevel:
        """The noise level at a timestep from -1 to T - 1, whole or not."""
        angle = float(np.interp(timestep, self._timesteps, self._angles))
        return NoiseLevel(timestep, math.sin(math.pi / 2 - angle), math.sin(angle))

    def level_of_sigma(self, sigma: float) -> NoiseLevel:
        """The noise level whose noise over signal is `sigma`, or the table's end nearest to it."""
        return self.level(float(np.interp(math.atan(sigma), self._angles, self._timesteps)))

    def _tables_at(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(alpha-bar) and sqrt(1 - alpha-bar) at (B,) timesteps, as float32 (B, 1, 1, 1)."""
        device = timesteps.device
        if device not in self._tables:
            pair = self.alphas_cumprod.sqrt(), (1 - self.alphas_cumprod).sqrt()
            self._tables[device] = tuple(table.float().to(device) for table in pair)
        signal, noise = self._tables[device]
        return signal[timesteps][:, None, None, None], noise[timesteps][:, None, None, None]

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """q(x_t | x_0), Ho et al. eq. 4: (B, C, H, W) images and unit noise, (B,) timesteps.

        Returns x_t as float32, whatever the type of the images.
        """
        root_alpha_bar, root_rest = self._tables_at(timesteps)
        return root_alpha_bar * original_samples.float() + root_rest * noise.float()

    def training_target(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor
                        ) -> Tensor:
        """What the net predicts at (B,) timesteps, float32 (B, C, H, W): `prediction_type`."""
        if self.config.prediction_type == "epsilon":
            return noise.float()
        if self.config.prediction_type == "sample":
            return original_samples.float()
        root_alpha_bar, root_rest = self._tables_at(timesteps)
        return root_alpha_bar * noise.float() - root_rest * original_samples.float()

    def timestep_cdf(self, p_mean: float | None = None, p_std: float = 1.2) -> Tensor:
        """Cumulative distribution of the training timesteps, float64 (T,), ending at 1.

        p_mean None: uniform. Otherwise ln sigma, with sigma = sqrt((1 - alpha-bar) / alpha-bar), is
        normal with mean p_mean and standard deviation p_std (Karras et al. 2022, table 1). The
        tails beyond the table count for its first timestep and its last one with signal.
        """
        total = self.config.num_train_timesteps
        if p_mean is None:
            return torch.arange(1, total + 1, dtype=torch.float64) / total
        log_sigma = -0.5 * self.alphas_cumprod.logit()
        bounds = (log_sigma[1:] + log_sigma[:-1]) / 2  # of the timesteps' cells
        return F.pad(torch.special.ndtr((bounds - p_mean) / p_std), (0, 1), value=1.0)


# ---------------------------------------------------------------------------------------------
# Sampling: noise levels, the denoiser, samplers
# ---------------------------------------------------------------------------------------------

def noise_levels(scheduler: NoiseScheduler, config: SamplerConfig, strength: float = 1.0
                 ) -> list[NoiseLevel]:
    """The `steps` decreasing noise levels at which the net is called, then the clean image's.

    strength: above 0 to 1; below 1, start at this fraction of the first level's timestep and leave
        out the levels above it (Meng et al. 2022, section 3).
    Raises ValueError for more trailing steps than T, or a range of sigma that is empty or too small
    for the steps.
    """
    if strength < 1:
        levels = noise_levels(scheduler, config)
        start = scheduler.level(strength * levels[0].timestep)
        return [start, *(level for level in levels if level.timestep < start.timestep - 1e-6)]
    total, steps, rho = scheduler.config.num_train_timesteps, config.steps, config.rho
    if config.spacing == "trailing":
        if steps > total:
            raise ValueError(f"steps: {steps} trailing steps, but training had {total}; give no "
                             "more, or another spacing")
        timesteps = [round(total - i * total / steps) - 1 for i in range(steps)]
        return [scheduler.level(timestep) for timestep in [*timesteps, -1]]

    first, last = scheduler.level(0).sigma, scheduler.level(total - 1).sigma
    if math.isinf(last):
        last = scheduler.level(total - 2).sigma
    low, high = max(config.sigma_min, first), min(config.sigma_max, last)
    if low >= high:
        raise ValueError(f"sigma_min: must be below sigma_max, within the {first:.3g} to "
                         f"{last:.5g} of training")
    ramp = np.linspace(0, 1, steps)
    if config.spacing == "karras":
        sigmas = (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    else:
        sigmas = high * (low / high) ** ramp
    levels = [*map(scheduler.level_of_sigma, sigmas), scheduler.level(-1)]
    if any(now.half_log_snr >= then.half_log_snr for now, then in pairwise(levels[:-1])):
        raise ValueError(f"sigma_min: is too close to sigma_max for {steps} steps")
    return levels


def run_net(net: Callable, sample: Tensor, timesteps: Tensor, dtype: torch.dtype,
            labels: Tensor | None = None) -> Tensor:
    """Calls the net in `dtype` and returns float32: (B, C, H, W) -> same.

    The memory format is channels last, with which convolutions are fastest on CPUs and GPUs.
    """
    with torch.autocast(sample.device.type, dtype, enabled=dtype != torch.float32):
        return net(sample.contiguous(memory_format=torch.channels_last), timesteps,
                   *([] if labels is None else [labels])).float()


def remove_grid(x: Tensor, patch_size: int) -> Tensor:
    """x, (B, C, H, W), without its part that repeats with the period of the patches.

    Nets of patches leave this part of the noise in the image, as a grid, probably because GroupNorm
    subtracts the means of feature maps, which hold it. Real images have almost no power there.
    """
    means = F.pixel_unshuffle(x, patch_size).mean((2, 3), keepdim=True)
    grid = F.pixel_shuffle(means, patch_size)  # (B, C, patch_size, patch_size)
    grid = grid - grid.mean((2, 3), keepdim=True)
    return x - grid.repeat(1, 1, *(side // patch_size for side in x.shape[2:]))


class Denoiser:
    """Predicts the clean image and the noise in x_t; the only function that samplers call.

    net, guide: (B, C, H, W), (B,) float timesteps and, if `labels` is set, label vectors (B, dim)
        -> (B, C, H, W), in the scheduler's `prediction_type`.
    guidance: w in D = D_guide + w (D_net - D_guide), so 1 is none. The guide is a weaker model
        (Karras et al. 2024a) or, for None, the net itself without its labels (Ho & Salimans 2022).
    guidance_interval: lowest and highest sigma with guidance (Kynkäänniemi et al. 2024).
    epsilon_scale: divides the predicted noise (Ning et al. 2024); above 1 sharpens.
    clip: whether to clip x_0 to [-1, 1]; None for the scheduler's `clip_sample`.
    dtype: the type that the nets compute in.
    patch_size: that of the net, whose grid is removed from x_0, see `remove_grid`; 1 for none.

    labels: what the images are conditioned on, set for each batch; None for nothing.
    known: (image, mask) to fill a region of an image, both (C, H, W): where the boolean mask is
        False, x_0 is known. As in RePaint (Lugmayr et al. 2022), x_t is then the noised image
        there; replacing x_0 instead of x_t does that for every sampler.
    `calls` counts the calls of net and guide so far.
    """

    def __init__(self, net: Callable[[Tensor, Tensor], Tensor], scheduler: NoiseScheduler,
                 guide: Callable[[Tensor, Tensor], Tensor] | None = None, guidance: float = 1.0,
                 guidance_interval: tuple[float, float] = (0.0, math.inf),
                 epsilon_scale: float = 1.0, clip: bool | None = None,
                 dtype: torch.dtype = torch.float32, patch_size: int = 1):
        self.net, self.scheduler, self.dtype = net, scheduler, dtype
        self.patch_size = patch_size
        self.guide, self.guidance, self.guidance_interval = guide, guidance, guidance_interval
        self.epsilon_scale = epsilon_scale
        self.clip = scheduler.config.clip_sample if clip is None else clip
        self.labels: Tensor | None = None
        self.known: tuple[Tensor, Tensor] | None = None
        self.calls = 0

    def _predict(self, net: Callable, x: Tensor, level: NoiseLevel, labels: Tensor | None
                 ) -> Tensor:
        self.calls += 1
        timesteps = torch.full((len(x),), level.timestep, dtype=torch.float32, device=x.device)
        return run_net(net, x, timesteps, self.dtype, labels)

    def __call__(self, x: Tensor, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        """The predicted x_0 and epsilon, float32 (B, C, H, W): x_t is signal x_0 + noise epsilon.

        Where x_0 is clipped or rid of the patches' grid, epsilon is made to fit it.
        """
        output = self._predict(self.net, x, level, self.labels)
        low, high = self.guidance_interval
        if self.guidance != 1 and low <= level.sigma <= high:
            # Valid for every prediction type: for a given x_t they are affine in each other, and
            # the weights w and 1 - w sum to 1.
            nothing = None if self.labels is None else torch.zeros_like(self.labels)
            weak = self._predict(self.guide or self.net, x, level,
                                 self.labels if self.guide else nothing)
            output = weak + self.guidance * (output - weak)
        prediction_type = self.scheduler.config.prediction_type
        if prediction_type == "epsilon":
            clean = (x - level.noise * output) / level.signal
        elif prediction_type == "sample":
            clean = output
        else:  # Salimans & Ho 2022, appendix D
            clean = level.signal * x - level.noise * output
        if self.epsilon_scale != 1 and level.signal:
            epsilon = (x - level.signal * clean) / (level.noise * self.epsilon_scale)
            clean = (x - level.noise * epsilon) / level.signal
        if self.patch_size > 1:
            clean = remove_grid(clean, self.patch_size)
        if self.clip:
            clean = clean.clamp(-1, 1)
        if self.known:
            image, mask = self.known
            clean = torch.where(mask, clean, image)
        return clean, (x - level.signal * clean) / level.noise


# A sampler walks from pure noise `x` down any list of noise levels to the clean image at its end.
# It yields each x_t with the x_0 predicted from it, and last the image, twice. `draw` returns unit
# noise of x's shape.


def ddpm(denoise: Denoiser, x: Tensor, levels: list[NoiseLevel], draw: Callable[[], Tensor]):
    """Ancestral sampling (Ho et al. 2020, algorithm 2) between any two levels.

    Mean and variance are those of the true posterior, eq. 7, with alpha_t taken over the gap.
    """
    for now, then in pairwise(levels):
        clean, _ = denoise(x, now)
        yield x, clean
        alpha = (now.signal / then.signal) ** 2
        beta = 1 - alpha
        mean = (then.signal * beta * clean + math.sqrt(alpha) * then.noise**2 * x) / now.noise**2
        variance = (then.noise / now.noise) ** 2 * beta
        x = mean + math.sqrt(variance) * draw() if variance else mean
    yield x, x


def implicit_step(x: Tensor, clean: Tensor, now: NoiseLevel, then: NoiseLevel, eta: float,
                  draw: Callable[[], Tensor]) -> Tensor:
    """Song et al. 2021, eq. 12, for a predicted x_0, with eta times the sigma of eq. 16."""
    epsilon = (x - now.signal * clean) / now.noise
    variance = (eta * then.noise / now.noise) ** 2 * (1 - (now.signal / then.signal) ** 2)
    x = then.signal * clean + math.sqrt(then.noise**2 - variance) * epsilon
    return x + math.sqrt(variance) * draw() if variance else x


def ddim(denoise: Denoiser, x: Tensor, levels: list[NoiseLevel], draw: Callable[[], Tensor],
         eta: float = 0.0):
    """DDIM, Song et al. 2021, section 4.1: deterministic for eta 0, and `ddpm` for eta 1."""
    for now, then in pairwise(levels):
        clean, _ = denoise(x, now)
        yield x, clean
        x = implicit_step(x, clean, now, then, eta, draw)
    yield x, x


def dpmpp(denoise: Denoiser, x: Tensor, levels: list[NoiseLevel], draw: Callable[[], Tensor],
          eta: float = 0.0):
    """DPM-Solver++(2M), Lu et al. 2022, algorithm 2; for eta 1, their SDE-DPM-Solver++(2M).

    Written as DDIM with x_0 extrapolated, in lambda, to the middle of the step. The first step,
    which has no earlier prediction, and the last, whose end has an infinite lambda, are of first
    order; with zero terminal SNR the second one too.
    """
    before = clean_before = None
    for now, then in pairwise(levels):
        clean, _ = denoise(x, now)
        yield x, clean
        middle = clean
        if before and then.noise:
            step, step_before = (end.half_log_snr - start.half_log_snr
                                 for start, end in ((now, then), (before, now)))
            middle = clean + step / (2 * step_before) * (clean - clean_before)
        x = implicit_step(x, middle, now, then, eta, draw)
        before, clean_before = now, clean
    yield x, x


def heun(denoise: Denoiser, x: Tensor, levels: list[NoiseLevel], draw: Callable[[], Tensor],
         churn: float = 0.0):
    """Karras et al. 2022, algorithm 2 (algorithm 1 with churn 0); S_tmin 0, S_tmax inf, S_noise 1.

    Two calls a step, one in the last. The paper's x is x_t / signal, and its d is epsilon.
    """
    gamma = min(churn / (len(levels) - 1), math.sqrt(2) - 1)
    for now, then in pairwise(levels):
        if gamma and now.signal:
            hotter = denoise.scheduler.level_of_sigma((1 + gamma) * now.sigma)
            added = math.sqrt(max(hotter.sigma**2 - now.sigma**2, 0))
            x = hotter.signal * (x / now.signal + added * draw())
            now = hotter
        clean, epsilon = denoise(x, now)
        yield x, clean
        x = then.signal * clean + then.noise * epsilon  # Euler's step
        if then.noise and now.signal:
            _, next_epsilon = denoise(x, then)
            x = x + then.signal * (then.sigma - now.sigma) / 2 * (next_epsilon - epsilon)
    yield x, x


def resampled(sampler: Callable, times: int, denoise: Denoiser, x: Tensor,
              levels: list[NoiseLevel], draw: Callable[[], Tensor], **options):
    """Takes each step of a sampler `times` times, each from the last result, noised again.

    This harmonises a filled region with its surroundings (RePaint, Lugmayr et al. 2022, algorithm
    1). Each step is sampled on its own, so that dpmpp is of first order here.
    """
    if "churn" in options:  # heun divides it by the number of its steps, here 1
        options["churn"] /= len(levels) - 1
    for now, then in pairwise(levels):
        for repeat in range(times):
            if repeat:
                signal = now.signal / then.signal
                x = signal * x + math.sqrt(now.noise**2 - (signal * then.noise)**2) * draw()
            start, (x, _) = sampler(denoise, x, [now, then], draw, **options)
        yield start
    yield x, x


SAMPLER_FUNCTIONS = {"ddpm": ddpm, "ddim": ddim, "dpmpp": dpmpp, "heun": heun}


def seeded_noise(seeds: list[int], shape: tuple[int, ...]) -> Callable[[], Tensor]:
    """A source of unit noise in which image i depends on seeds[i] alone.

    Each call returns the next float32 (len(seeds), *shape). Drawn on the CPU, so that a seed
    means the same noise on every device; torch's generator uses the low 32 bits only.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return lambda: torch.stack([torch.randn(shape, generator=g) for g in generators])


@torch.inference_mode()
def reverse_process(denoise: Denoiser, noise: Callable[[], Tensor],
                    config: SamplerConfig, device: torch.device | str = "cpu",
                    init: Tensor | None = None, strength: float = 1.0
                    ) -> Iterator[tuple[Tensor, Tensor]]:
    """From noise to images: yields each x_t with its predicted x_0, and last the image twice.

    noise: source of unit noise (B, C, H, W), called for the start and for each random step.
    init, strength: start from this image, (C, H, W), noised to the first of `noise_levels`
        (SDEdit, Meng et al. 2022).
    Yields as many pairs of float32 (B, C, H, W) on `device` as there are `noise_levels`.
    """
    def draw() -> Tensor:
        return noise().to(device)

    levels = noise_levels(denoise.scheduler, config, 1.0 if init is None else strength)
    options = {name: getattr(config, name) for name in SAMPLERS[config.sampler].options}
    sampler = SAMPLER_FUNCTIONS[config.sampler]
    if config.resample > 1:
        sampler = partial(resampled, sampler, config.resample)
    x = draw()
    if init is not None:
        x = levels[0].signal * init.to(device) + levels[0].noise * x
    yield from sampler(denoise, x, levels, draw, **options)


def sample(denoise: Denoiser, seeds: list, shape: tuple[int, int, int],
           config: SamplerConfig, batch_size: int = 16, device: torch.device | str = "cpu",
           watch: Callable[[Tensor, Tensor], None] | None = None,
           labels: Callable[[list], Tensor | None] = lambda seeds: None,
           noise: Callable[[list, tuple[int, ...]], Callable[[], Tensor]] = seeded_noise,
           init: Tensor | None = None, strength: float = 1.0) -> Iterator[Tensor]:
    """Images of the seeds, `batch_size` at a time: yields (B, *shape) in [-1, 1] on `device`.

    labels: seeds -> label vectors (B, dim), such as `LabelConfig.for_seeds`.
    noise: seeds, shape -> source of unit noise; seeds may be whatever it and `labels` take.
    init, strength: see `reverse_process`.
    watch: is called with every pair that `reverse_process` yields.
    """
    for start in range(0, len(seeds), batch_size):
        batch = seeds[start:start + batch_size]
        # A short batch is filled up with its last seed: the kernels that the hardware picks, and
        # with them the last bits of an image, depend on the batch's size.
        filled = batch + batch[-1:] * (batch_size - len(batch))
        vectors = labels(filled)
        denoise.labels = None if vectors is None else vectors.to(device)
        for x, clean in reverse_process(denoise, noise(filled, shape), config, device, init,
                                        strength):
            if watch:
                watch(x[:len(batch)], clean[:len(batch)])
        yield x[:len(batch)]


# ---------------------------------------------------------------------------------------------
# EMA weights
# ---------------------------------------------------------------------------------------------


class EMA:
    """Exponential moving average of a net's parameters; buffers are copied.

    With a power-function profile (Karras et al. 2024b, section 3.1): its length is a constant
    fraction of the training so far, so that short runs forget the initial net.
    length: standard deviation of the profile, relative to the training so far, 0 to 0.28.
    """

    def __init__(self, net: nn.Module, length: float = 0.09):
        # length^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)) for a profile t^gamma on [0, 1]
        self.gamma = np.roots([1, 7, 16 - length**-2, 12 - length**-2]).real.max()
        self.num_updates = 0
        self.net = copy.deepcopy(net).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, net: nn.Module) -> None:
        """Moves the EMA weights towards those of `net`."""
        self.num_updates += 1
        decay = (1 - 1 / self.num_updates) ** (self.gamma + 1)  # Karras et al. 2024b, section 3.1
        averaged, current = list(self.net.parameters()), list(net.parameters())
        torch._foreach_lerp_(averaged, current, 1 - decay)
        for ours, theirs in zip(self.net.buffers(), net.buffers()):
            ours.copy_(theirs)

"""What rebuilds a network, a diffusion, a sampler and a run: dataclasses of plain values.

All but the sampler's are stored in every checkpoint. modules.py and train.py implement what they
describe. Invalid values raise ValueError, with the name of the field.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

# ---------------------------------------------------------------------------------------------
# Network
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class UNetConfig:
    """Everything that rebuilds a `UNet`; stored in every checkpoint. Names follow diffusers.

    sample_size: (H, W) in pixels of the training images; determines the levels with attention.
    block_out_channels: channels of each level, finest first.
    attention_resolutions: levels with self-attention, by the shorter side of their feature maps in
        pixels. The middle block always has it.
    patch_size: side of the pixel blocks that are folded into channels in front of the net and
        unfolded behind it. 2 means a quarter of the positions, about a quarter of the work.
    dropout: probability in the residual blocks, of each level, finest first; the last one holds for
        all coarser levels.
    label_dim: length of the label vectors that the net is conditioned on; 0 for none.
    final_channels: input channels of a final 3x3 convolution at full resolution, after the patches
        are unfolded; it smooths the borders between patches (Bao et al. 2023, section 3.1); 0 for
        none.
    refine_channels: channels of a residual block at full resolution, in parallel with the final
        convolution, for detail finer than the patches; a multiple of 8, or 0 for none.

    Raises ValueError for a shape that cannot be built, naming the field and how to fix it.
    """

    sample_size: tuple[int, int] = (64, 64)
    in_channels: int = 1
    out_channels: int = 1
    block_out_channels: tuple[int, ...] = (64, 128, 256)
    layers_per_block: int = 2
    attention_resolutions: tuple[int, ...] = (16,)
    attention_head_dim: int = 32
    norm_num_groups: int = 32
    dropout: float | tuple[float, ...] = 0.0
    patch_size: int = 1
    label_dim: int = 0
    final_channels: int = 0
    refine_channels: int = 0

    def __post_init__(self):
        for name, value in vars(self).items():
            if isinstance(value, list):  # JSON brings lists
                object.__setattr__(self, name, tuple(value))
        if self.refine_channels % 8 or self.refine_channels and not self.final_channels:
            raise ValueError(f"refine_channels {self.refine_channels}: give a multiple of 8, with "
                             "final_channels above 0")
        if isinstance(self.dropout, tuple) and len(self.dropout) > len(self.block_out_channels):
            raise ValueError(f"dropout: {len(self.dropout)} values for "
                             f"{len(self.block_out_channels)} levels; give at most one for each")
        for channels in self.block_out_channels:
            for name in ("norm_num_groups", "attention_head_dim"):
                if channels % getattr(self, name):
                    raise ValueError(f"block_out_channels: {channels} is not a multiple of "
                                     f"{name} = {getattr(self, name)}")
        self.check_size(*self.sample_size)
        missing = set(self.attention_resolutions) - set(self.resolutions)
        if missing:
            raise ValueError(f"attention_resolutions: no level has a side of {min(missing)} px; "
                             f"the levels have {list(self.resolutions)}")

    def level_dropout(self, level: int) -> float:
        """Dropout probability of a level's residual blocks."""
        if not isinstance(self.dropout, tuple):
            return self.dropout
        return self.dropout[min(level, len(self.dropout) - 1)]

    @property
    def resolutions(self) -> tuple[int, ...]:
        """Shorter side of each level's feature map, in pixels, finest first."""
        side = min(self.sample_size) // self.patch_size
        return tuple(side // 2**level for level in range(len(self.block_out_channels)))

    def check_size(self, height: int, width: int) -> None:
        """Raises ValueError if the net cannot halve an image of this size at every level."""
        multiple = self.patch_size * 2 ** (len(self.block_out_channels) - 1)
        if height % multiple or width % multiple or min(height, width) <= 0:
            fit = [max(multiple, round(side / multiple) * multiple) for side in (height, width)]
            raise ValueError(f"image size {height}x{width} (rows x columns) is not divisible by "
                             f"{multiple}; the nearest that is: {fit[0]}x{fit[1]}")


# ---------------------------------------------------------------------------------------------
# Diffusion
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SchedulerConfig:
    """The forward process. Field names follow diffusers' `DDPMScheduler`.

    beta_schedule: "linear" (Ho et al., section 4) or "squaredcos_cap_v2", the cosine schedule
        (Nichol & Dhariwal, eq. 17).
    log_snr_shift: added to the log signal-to-noise ratio of every timestep. With 2 ln(64 / d),
        images of d x d pixels lose as much detail to the noise as those of 64 x 64 (Hoogeboom et
        al. 2023). Exported to diffusers as `trained_betas`.
    rescale_betas_zero_snr: shift the schedule so that no signal is left at T - 1 (Lin et al.
        2024, algorithm 1).
    prediction_type: what the net predicts: "epsilon", "v_prediction" (Salimans & Ho 2022,
        appendix D) or "sample".
    clip_sample: clip the predicted clean image to [-1, 1] at every reverse step.

    Raises ValueError for invalid values, naming the field.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    beta_schedule: str = "squaredcos_cap_v2"
    log_snr_shift: float = 0.0
    rescale_betas_zero_snr: bool = False
    prediction_type: str = "v_prediction"
    clip_sample: bool = True

    def __post_init__(self):
        choices = {
            "beta_schedule": ("linear", "squaredcos_cap_v2"),
            "prediction_type": ("epsilon", "v_prediction", "sample"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: {getattr(self, name)!r} is none of {list(allowed)}")
        least = 3 if self.rescale_betas_zero_snr else 2  # two finite levels to sample between
        if self.num_train_timesteps < least:
            raise ValueError(f"num_train_timesteps: must be at least {least}, not "
                             f"{self.num_train_timesteps}")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(f"beta_start, beta_end: {self.beta_start} and {self.beta_end} are not "
                             "0 < beta_start <= beta_end < 1")
        if self.rescale_betas_zero_snr and self.prediction_type == "epsilon":
            raise ValueError("prediction_type: epsilon does not determine the image at zero "
                             "signal-to-noise ratio; use v_prediction or sample with "
                             "rescale_betas_zero_snr")


SCHEDULES = ("linear", "cosine", "cosine-shifted", "zero-snr")


def make_scheduler_config(schedule: str, num_train_timesteps: int = 1000,
                          prediction_type: str = "v_prediction",
                          sample_size: tuple[int, int] = (64, 64)) -> SchedulerConfig:
    """The config of a named schedule (one of `SCHEDULES`) for any number of timesteps.

    sample_size: (H, W) of the images, which "cosine-shifted" depends on.

    Linear betas are scaled by 1000 / T, so that T steps end at the noise level that 1000 do
    (Nichol & Dhariwal's code). x_0 is clipped for "epsilon" alone, where the first steps divide
    it by almost no signal; with v-prediction, slices are better without.
    """
    scale = 1000 / num_train_timesteps
    return SchedulerConfig(
        num_train_timesteps=num_train_timesteps,
        beta_start=min(1e-4 * scale, 0.999),
        beta_end=min(0.02 * scale, 0.999),
        beta_schedule="squaredcos_cap_v2" if schedule.startswith("cosine") else "linear",
        log_snr_shift=(math.log(64**2 / math.prod(sample_size)) if schedule == "cosine-shifted"
                       else 0.0),
        rescale_betas_zero_snr=schedule == "zero-snr",
        prediction_type=prediction_type,
        clip_sample=prediction_type == "epsilon",
    )


# ---------------------------------------------------------------------------------------------
# Sampler
# ---------------------------------------------------------------------------------------------

SPACINGS = ("logsnr", "karras", "trailing")


class SamplerKind(NamedTuple):
    """Default number of steps, and the fields of `SamplerConfig` that this sampler alone has.

    The function of the same name in `modules.SAMPLER_FUNCTIONS` takes these fields as arguments.
    """

    steps: int
    options: tuple[str, ...]


SAMPLERS = {"ddpm": SamplerKind(250, ()), "ddim": SamplerKind(50, ("eta",)),
            "dpmpp": SamplerKind(15, ("eta",)), "heun": SamplerKind(20, ("churn",))}


@dataclass(frozen=True)
class SamplerConfig:
    """How to sample: one of `SAMPLERS`, its number of steps and where its noise levels lie.

    spacing: "logsnr": from sigma_max to sigma_min, even in the logarithm of sigma (Lu et al. 2022,
        section 5.1); "karras": the same, even in sigma^(1 / rho) (Karras et al. 2022, eq. 5);
        "trailing": every T / steps-th timestep of training, from T - 1 down (Lin et al. 2024,
        table 2).
    sigma_min, sigma_max: limited to what the net was trained with, where sigma is finite.
    eta: randomness of ddim and dpmpp, 0 (none) to 1 (as ddpm).
    churn: S_churn of heun, the noise added and removed again over all steps.
    resample: how many times each step is taken; see `resampled`.

    Raises ValueError for values that do not go together, starting with the field's name.
    """

    sampler: str = "dpmpp"
    steps: int = SAMPLERS["dpmpp"].steps
    spacing: str = "logsnr"
    rho: float = 7.0
    sigma_min: float = 0.01
    sigma_max: float = 500.0
    eta: float = 0.0
    churn: float = 0.0
    resample: int = 1

    def __post_init__(self):
        for name, allowed in (("sampler", tuple(SAMPLERS)), ("spacing", SPACINGS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: {getattr(self, name)!r} is not one of {list(allowed)}")
        checks = {
            "steps": (1 <= self.steps <= 100_000, "at least 1 and at most 100000"),
            "resample": (self.resample >= 1, "at least 1"),
            "rho": (1 <= self.rho <= 100, "from 1 to 100"),
            "sigma_min": (0 <= self.sigma_min < self.sigma_max, "from 0 to below sigma_max"),
            "eta": (0 <= self.eta <= 1, "from 0 to 1"),
            "churn": (self.churn >= 0, "0 or above"),
        }
        for name, (good, words) in checks.items():
            if not good:
                raise ValueError(f"{name}: must be {words}, not {getattr(self, name)}")
        if self.rho != type(self).rho and self.spacing != "karras":
            raise ValueError(f"rho: {self.spacing} spacing has none; leave it out or take karras")
        for name in ("eta", "churn"):
            if getattr(self, name) and name not in SAMPLERS[self.sampler].options:
                owners = [key for key, kind in SAMPLERS.items() if name in kind.options]
                raise ValueError(f"{name}: {self.sampler} has none; leave it out or take "
                                 + " or ".join(owners))


QUALITY = {
    "fast": SamplerConfig("dpmpp", 10),
    "default": SamplerConfig(),
    "best": SamplerConfig("dpmpp", 30),
}


# ---------------------------------------------------------------------------------------------
# Training run
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainConfig:
    """What defines a run besides its network and its diffusion; fields are train.py's options.

    Stored in every checkpoint. On the same CPU, two runs with equal configs are bit-identical.
    A continued run may have more `steps`, another `accumulate`, another `data` (the folder's name,
    not the slices, which `data_crc32` identifies), and, with --dtype auto, another `dtype`.
    extended: (step, previous `steps`) for each time that `steps` was changed under a cosine
    schedule: such a run has other weights than one with the final `steps` from the start.
    """

    data: str
    data_crc32: int
    steps: int
    batch_size: int
    accumulate: int
    learning_rate: float
    warmup_steps: int
    lr_schedule: str
    weight_decay: float
    grad_clip: float
    seed: int
    dtype: str
    # Every new field has a default, which older checkpoints get.
    ema_length: float = 0.09
    ema_short: float = 0.0
    noise_distribution: str = "uniform"
    p_mean: float = -1.2
    p_std: float = 1.2
    augment: float = 0.0
    label_dropout: float = 0.1
    offset_noise: float = 0.0
    init: str | None = None
    extended: tuple = ()

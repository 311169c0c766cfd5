"""The noise schedule and the samplers, against diffusers' and against cases solved by hand."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import (DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler,
                       HeunDiscreteScheduler)

from modules import (SAMPLER_FUNCTIONS, Denoiser, NoiseScheduler, noise_levels, reverse_process,
                     seeded_noise, timestep_embedding)
from tools.export import scheduler_config
from utils.configs import (SAMPLERS, SCHEDULES, SPACINGS, SamplerConfig, SchedulerConfig,
                           make_scheduler_config)

PREDICTIONS = ("epsilon", "v_prediction", "sample")
CASES = [(s, p) for s in SCHEDULES for p in PREDICTIONS if (s, p) != ("zero-snr", "epsilon")]
# Every sampler that there is: its name and its options.
KINDS = [("ddpm", {}), ("ddim", {}), ("ddim", {"eta": 0.5}), ("ddim", {"eta": 1.0}), ("dpmpp", {}),
         ("dpmpp", {"eta": 1.0}), ("heun", {})]


def test_every_sampler_has_a_function():
    assert list(SAMPLER_FUNCTIONS) == list(SAMPLERS)
    assert {name for name, _ in KINDS} == set(SAMPLERS)


def make_scheduler(schedule: str, prediction: str = "v_prediction", clip: bool = False,
                   total: int = 1000) -> NoiseScheduler:
    return NoiseScheduler(replace(make_scheduler_config(schedule, total, prediction),
                                  clip_sample=clip))


def as_prediction(kind: str, x, clean, level):
    """What a net of that prediction type says where it means the image `clean`."""
    noise = (x - level.signal * clean) / level.noise
    return {"sample": clean, "epsilon": noise,
            "v_prediction": level.signal * noise - level.noise * clean}[kind]


def make_net(scheduler: NoiseScheduler, means=(0.3,), std: float = 0.2):
    """The perfect denoiser of independent pixels from an even mixture of N(means, std^2).

    E[x_0 | x_t] by Gaussian regression in each part, weighted by the part's probability.
    """
    means = torch.tensor(means, dtype=torch.float64)

    def net(x, timesteps):
        level = scheduler.level(timesteps[0].item())
        y, spread = x.double()[..., None], level.signal**2 * std**2 + level.noise**2
        residual = y - level.signal * means
        weights = (-residual**2 / (2 * spread)).softmax(-1)
        clean = (weights * (means + std**2 * level.signal / spread * residual)).sum(-1)
        return as_prediction(scheduler.config.prediction_type, x.double(), clean, level).to(x.dtype)
    return net


# The schedule ----------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("total", [1000, 250, 37])
def test_tables(schedule, total):
    config = make_scheduler_config(schedule, total, sample_size=(208, 176))
    scheduler = NoiseScheduler(config)
    reference = DDPMScheduler(**scheduler_config(config))
    assert scheduler.alphas_cumprod.dtype == torch.float64
    assert scheduler.alphas_cumprod.shape == (total,)
    assert (scheduler.alphas_cumprod.diff() < 0).all()
    torch.testing.assert_close(scheduler.alphas_cumprod.float(), reference.alphas_cumprod,
                               rtol=1e-4, atol=1e-6)
    if schedule == "zero-snr":
        assert scheduler.alphas_cumprod[-1] == 0
    if schedule == "cosine-shifted":  # as much noise as at 64 pixels, seen from the same distance
        plain = NoiseScheduler(make_scheduler_config("cosine", total)).alphas_cumprod
        shift = (scheduler.alphas_cumprod.logit() - plain.logit())[:-5]
        torch.testing.assert_close(shift, torch.full_like(shift, math.log(64**2 / (208 * 176))),
                                   rtol=0, atol=1e-6)


def test_linear_schedule_ends_alike_for_any_number_of_timesteps():
    ends = [NoiseScheduler(make_scheduler_config("linear", n)).alphas_cumprod[-1].log().item()
            for n in (1000, 4000, 200)]
    assert ends == pytest.approx([ends[0]] * 3, rel=0.1)


@pytest.mark.parametrize("schedule, prediction", CASES)
def test_forward_process_equals_diffusers(schedule, prediction):
    config = make_scheduler_config(schedule, 1000, prediction)
    ours, reference = NoiseScheduler(config), DDPMScheduler(**scheduler_config(config))
    reference.alphas_cumprod = ours.alphas_cumprod  # theirs are float32
    torch.manual_seed(0)
    x, noise = torch.rand(5, 1, 8, 8) * 2 - 1, torch.randn(5, 1, 8, 8)
    t = torch.tensor([0, 1, 500, 998, 999])
    expected = reference.add_noise(x.double(), noise.double(), t)
    torch.testing.assert_close(ours.add_noise(x, noise, t), expected.float(), rtol=0, atol=1e-5)
    target = {"epsilon": noise, "sample": x,
              "v_prediction": reference.get_velocity(x.double(), noise.double(), t).float()}
    torch.testing.assert_close(ours.training_target(x, noise, t), target[prediction], rtol=0,
                               atol=1e-5)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_levels_are_the_table_and_continuous_between(schedule):
    scheduler = NoiseScheduler(make_scheduler_config(schedule))
    levels = [scheduler.level(t) for t in range(1000)]
    signals = np.array([level.signal for level in levels])
    assert signals == pytest.approx(scheduler.alphas_cumprod.sqrt().numpy(), rel=1e-9, abs=1e-14)
    noises = np.array([level.noise for level in levels])
    assert noises == pytest.approx((1 - scheduler.alphas_cumprod).sqrt().numpy(), rel=1e-9)
    assert scheduler.level(-1)[1:] == (1, 0)
    if schedule == "zero-snr":
        assert levels[-1].signal == 0 and levels[-1].sigma == math.inf
    for t in (0.0, 0.25, 17.5, 500.1, 997.9):
        level = scheduler.level(t)
        assert scheduler.level(math.floor(t)).sigma <= level.sigma
        assert level.sigma < scheduler.level(math.floor(t) + 1).sigma
        assert scheduler.level_of_sigma(level.sigma).timestep == pytest.approx(t, abs=1e-6)


def test_cosine_levels_between_timesteps_follow_the_formula():
    """Nichol & Dhariwal, eq. 17, which holds for any t, over its value at 0."""
    scheduler = NoiseScheduler(make_scheduler_config("cosine"))
    for t in (0.5, 3.7, 400.5, 990.3):
        root = [math.cos((u + 0.008) / 1.008 * math.pi / 2) for u in ((t + 1) / 1000, 0)]
        assert scheduler.level(t).signal == pytest.approx(root[0] / root[1], rel=1e-4)


def test_embedding_is_continuous_in_the_timestep():
    whole, between = (timestep_embedding(torch.tensor(t), 64)
                      for t in ([500, 501], [500.0, 500.01]))
    assert torch.equal(whole[0], between[0])
    assert (between[0] - between[1]).abs().max() <= 0.011


# Lists of noise levels -------------------------------------------------------------------------


def levels_of(scheduler: NoiseScheduler, steps: int, spacing: str, **limits):
    return noise_levels(scheduler, SamplerConfig("ddim", steps, spacing, **limits))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 7, 250])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_noise_levels_fall_to_the_clean_image(schedule, steps, spacing):
    levels = levels_of(NoiseScheduler(make_scheduler_config(schedule)), steps, spacing,
                       sigma_min=0.02, sigma_max=50)
    assert len(levels) == steps + 1
    timesteps = [level.timestep for level in levels]
    assert (np.diff(timesteps) < 0).all() and timesteps[-1] == -1 and levels[-1].noise == 0
    if spacing == "trailing":
        assert timesteps[0] == 999
    else:
        assert levels[0].sigma == pytest.approx(50)
        if steps > 1:
            assert levels[-2].sigma == pytest.approx(0.02)


def test_trailing_is_as_in_diffusers():
    for total, steps in ((1000, 7), (1000, 50), (1000, 1000), (37, 10)):
        scheduler = NoiseScheduler(make_scheduler_config("cosine", total))
        reference = DDIMScheduler(num_train_timesteps=total, timestep_spacing="trailing")
        reference.set_timesteps(steps)
        assert [level.timestep for level in levels_of(scheduler, steps, "trailing")[:-1]] \
            == reference.timesteps.tolist()


def test_karras_and_logsnr_are_as_in_diffusers():
    scheduler = NoiseScheduler(make_scheduler_config("linear"))
    reference = HeunDiscreteScheduler()
    in_sigmas = np.array([60.0, 0.03])
    for spacing, convert in (("karras", reference._convert_to_karras),
                             ("logsnr", reference._convert_to_exponential)):
        levels = levels_of(scheduler, 12, spacing, sigma_min=0.03, sigma_max=60)
        assert [level.sigma for level in levels[:-1]] == pytest.approx(convert(in_sigmas, 12),
                                                                       rel=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_noise_levels_stay_within_what_was_trained(schedule):
    scheduler = NoiseScheduler(make_scheduler_config(schedule))
    for spacing in ("karras", "logsnr"):
        levels = levels_of(scheduler, 10, spacing, sigma_min=0, sigma_max=math.inf)
        assert levels[-2].timestep == pytest.approx(0, abs=1e-6)
        last = 998 if schedule == "zero-snr" else 999  # sigma is infinite at its 999
        assert levels[0].timestep == pytest.approx(last, abs=1e-6)


@pytest.mark.parametrize("values, words", [
    (dict(steps=1001, spacing="trailing"), "steps: 1001"),
    (dict(sigma_min=0.0, sigma_max=0.001), "sigma_min"),
    (dict(sigma_min=499.9999999999, steps=1000), "sigma_min: is too close to sigma_max for 1000"),
])
def test_impossible_noise_levels(values, words):
    with pytest.raises(ValueError, match=words):
        noise_levels(NoiseScheduler(SchedulerConfig()), SamplerConfig(**values))


# The denoiser ----------------------------------------------------------------------------------


def constant_net(scheduler, value: float):
    """A net of any prediction type that always means the image `value`."""
    def net(x, timesteps):
        return as_prediction(scheduler.config.prediction_type, x, torch.full_like(x, value),
                             scheduler.level(timesteps[0].item()))
    return net


@pytest.mark.parametrize("schedule, prediction", CASES)
def test_denoiser_returns_the_image_and_the_noise(schedule, prediction):
    scheduler = make_scheduler(schedule, prediction)
    x = torch.randn(2, 1, 8, 8)
    for t in (0, 41.5, 900):
        level = scheduler.level(t)
        clean, noise = Denoiser(constant_net(scheduler, 0.4), scheduler)(x, level)
        torch.testing.assert_close(clean, torch.full_like(x, 0.4), rtol=0, atol=1e-5)
        torch.testing.assert_close(level.signal * clean + level.noise * noise, x)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_guidance_is_away_from_the_guide_in_the_image(prediction):
    """Karras et al. 2024: D = D_guide + w (D - D_guide), whatever the nets predict."""
    scheduler = make_scheduler("cosine", prediction)
    net, guide = constant_net(scheduler, 0.4), constant_net(scheduler, 0.1)
    x, level = torch.randn(2, 1, 8, 8), scheduler.level(300.5)

    def guided(**options):
        denoise = Denoiser(net, scheduler, guide, **options)
        return denoise(x, level)[0].mean().item(), denoise.calls
    assert guided(guidance=2.0) == (pytest.approx(0.1 + 2 * 0.3, abs=1e-5), 2)
    assert guided(guidance=0.0) == (pytest.approx(0.1, abs=1e-5), 2)
    assert guided(guidance=1.0) == (pytest.approx(0.4, abs=1e-5), 1)  # without the guide
    inside, outside = (0.9 * level.sigma, 1.1 * level.sigma), (1.1 * level.sigma, 50.0)
    assert guided(guidance=2.0, guidance_interval=inside) == (pytest.approx(0.7, abs=1e-5), 2)
    assert guided(guidance=2.0, guidance_interval=outside) == (pytest.approx(0.4, abs=1e-5), 1)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_epsilon_scale_divides_the_noise(prediction):
    scheduler = make_scheduler("cosine", prediction)
    x, level = torch.randn(2, 1, 8, 8), scheduler.level(200)
    (_, plain), (clean, scaled) = (
        Denoiser(constant_net(scheduler, 0.4), scheduler, epsilon_scale=scale)(x, level)
        for scale in (1.0, 1.01))
    torch.testing.assert_close(scaled, plain / 1.01, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(level.signal * clean + level.noise * scaled, x)


def test_clipped_images_get_the_noise_that_fits():
    scheduler = make_scheduler("linear", clip=True)
    x, level = torch.randn(2, 1, 8, 8), scheduler.level(600)
    clean, noise = Denoiser(constant_net(scheduler, 1.7), scheduler)(x, level)
    assert (clean == 1).all()
    torch.testing.assert_close(level.signal * clean + level.noise * noise, x)
    clean, _ = Denoiser(constant_net(scheduler, 1.7), scheduler, clip=False)(x, level)
    torch.testing.assert_close(clean, torch.full_like(x, 1.7))


def test_the_patches_grid_is_removed_and_nothing_else():
    """Against the Fourier transform: 0 at the multiples of 1/4 cycle per pixel, except the mean."""
    scheduler = make_scheduler("cosine")
    x, level = torch.randn(2, 1, 24, 16), scheduler.level(600)
    clean, noise = Denoiser(lambda x, t: x / 3, scheduler, clip=False, patch_size=4)(x, level)
    plain, _ = Denoiser(lambda x, t: x / 3, scheduler, clip=False)(x, level)
    wanted = torch.fft.fft2(plain)
    mean = wanted[..., 0, 0].clone()
    wanted[..., ::6, ::4] = 0
    wanted[..., 0, 0] = mean
    torch.testing.assert_close(torch.fft.fft2(clean), wanted, rtol=0, atol=1e-4)
    torch.testing.assert_close(level.signal * clean + level.noise * noise, x)


# Samplers against diffusers' -------------------------------------------------------------------
# Theirs in float64 and with our float64 tables: the rounding of their float32 ones, divided by the
# tiny alphas_cumprod of the noisy end, would be all that the comparison sees.


def with_our_tables(reference, scheduler, levels):
    reference.set_timesteps(len(levels) - 1)
    assert reference.timesteps.tolist() == [level.timestep for level in levels[:-1]]
    reference.alphas_cumprod = scheduler.alphas_cumprod
    reference.one = reference.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
    return reference


def their_ddpm(scheduler, levels, net, x, draw):
    reference = DDPMScheduler(**scheduler_config(scheduler.config))
    reference = with_our_tables(reference, scheduler, levels)
    for t in reference.timesteps:
        x = reference.step(net(x, t[None]), t, x, generator=draw.generator).prev_sample
        yield x


def their_ddim(scheduler, levels, net, x, draw, eta=0.0):
    values = scheduler_config(scheduler.config)
    reference = with_our_tables(DDIMScheduler(**values), scheduler, levels)
    for t in reference.timesteps:
        x = reference.step(net(x, t[None]), t, x, eta=eta, use_clipped_model_output=True,
                           variance_noise=draw()).prev_sample
        yield x


def their_solver(cls, scheduler, levels, repeats, **options):
    """Their solver over our noise levels, of which all between the ends stand there `repeats`."""
    config = scheduler.config
    reference = cls(config.num_train_timesteps, prediction_type=config.prediction_type, **options)
    reference.set_timesteps(len(levels) - 1)
    sigmas = torch.tensor([level.sigma for level in levels], dtype=torch.float64)
    reference.sigmas = torch.cat([sigmas[:1], sigmas[1:-1].repeat_interleave(repeats), sigmas[-1:]])
    reference.set_begin_index(0)
    return reference


def their_dpmpp(scheduler, levels, net, x, draw, eta=0.0):
    reference = their_solver(DPMSolverMultistepScheduler, scheduler, levels, 1,
                             algorithm_type="sde-dpmsolver++" if eta else "dpmsolver++")
    for level in levels[:-1]:
        x = reference.step(net(x, torch.tensor([level.timestep])), level.timestep, x,
                           variance_noise=draw() if eta else None).prev_sample
        yield x


def their_heun(scheduler, levels, net, x, draw):
    """States of theirs are those of Karras et al.: x_t over its signal."""
    reference = their_solver(HeunDiscreteScheduler, scheduler, levels, 2,
                             clip_sample=scheduler.config.clip_sample)
    x = x / levels[0].signal
    for now, then in zip(levels, levels[1:]):
        x = reference.step(net(now.signal * x, torch.tensor([now.timestep])), 0, x).prev_sample
        if then.noise:
            output = net(then.signal * x, torch.tensor([then.timestep]))
            x = reference.step(output, 0, x).prev_sample
        yield then.signal * x


THEIRS = {"ddpm": their_ddpm, "ddim": their_ddim, "dpmpp": their_dpmpp, "heun": their_heun}


class Draw:
    """Unit noise in float64, the same for the same seed."""

    def __init__(self, shape, seed: int):
        self.shape, self.generator = shape, torch.Generator().manual_seed(seed)

    def __call__(self):
        return torch.randn(self.shape, generator=self.generator, dtype=torch.float64)


@pytest.mark.parametrize("steps", [5, 20])
@pytest.mark.parametrize("name, options", KINDS)
@pytest.mark.parametrize("schedule, prediction", CASES)
def test_trajectories_equal_diffusers(schedule, prediction, name, options, steps):
    clip = name != "dpmpp"  # theirs has no clipping there
    scheduler = make_scheduler(schedule, prediction, clip)
    net = make_net(scheduler, means=(-0.9, 0.5))  # not linear, and beyond the clipping
    spacing = "trailing" if name in ("ddpm", "ddim") else "karras"
    levels = levels_of(scheduler, steps, spacing, sigma_min=0.02, sigma_max=80)
    start = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    ours, theirs = Draw(start.shape, 1), Draw(start.shape, 1)
    states = [x for x, _ in SAMPLER_FUNCTIONS[name](Denoiser(net, scheduler), start, levels,
                                           lambda: ours().float(), **options)]
    expected = list(THEIRS[name](scheduler, levels, net, start.double(), theirs, **options))
    assert len(states) == len(expected) + 1
    # The clean image from a float32 epsilon has its rounding error times sigma.
    rounding = 2.0**-24 * levels[0].sigma if prediction == "epsilon" else 0
    for x, wanted in zip(states[1:], expected):
        torch.testing.assert_close(x, wanted.float(), rtol=0, atol=1e-4 + rounding)


# Gaussian data: the law of the samples is known ------------------------------------------------

MEAN, STD = 0.3, 0.2


def expected_law(levels, eta: float) -> tuple[float, float]:
    """Mean and std of ddim's samples: each step is affine in x, so the two numbers say it all.

    eta 1 is the ancestral law, that of the next x given (x_t, x_0), by conditioning.
    """
    mean, variance = 0.0, 1.0
    for now, then in zip(levels, levels[1:]):
        a, b = now.signal**2, then.signal**2
        gain = STD**2 * now.signal / (STD**2 * a + 1 - a)  # clean = gain * x + offset
        offset = MEAN * (1 - gain * now.signal)
        added = eta**2 * ((1 - b) - (a / b) * (1 - b) ** 2 / (1 - a))
        on_x = math.sqrt(max(1 - b - added, 0) / (1 - a))
        on_clean = then.signal - on_x * now.signal
        mean = on_x * mean + on_clean * (gain * mean + offset)
        variance = (on_x + on_clean * gain) ** 2 * variance + added
    return mean, math.sqrt(variance)


def law_of_samples(scheduler, config: SamplerConfig) -> tuple[float, float]:
    *_, (image, again) = reverse_process(Denoiser(make_net(scheduler), scheduler),
                                         seeded_noise([3], (1, 100, 100)), config)
    assert image is again and image.dtype == torch.float32
    return image.mean().item(), image.std().item()


SAMPLING_ERROR = STD / 100  # of a mean of 100^2 pixels


@pytest.mark.parametrize("name, eta", [("ddpm", 1), ("ddim", 0), ("ddim", 0.5), ("ddim", 1)])
@pytest.mark.parametrize("schedule, prediction", CASES)
@pytest.mark.long
def test_the_law_of_ddpm_and_ddim(schedule, prediction, name, eta):
    scheduler = make_scheduler(schedule, prediction)
    config = SamplerConfig(name, 20, "trailing", eta=eta if name == "ddim" else 0)
    mean, std = law_of_samples(scheduler, config)
    expected_mean, expected_std = expected_law(levels_of(scheduler, 20, "trailing"), eta)
    assert mean == pytest.approx(expected_mean, abs=5 * SAMPLING_ERROR + 1e-4)
    assert std == pytest.approx(expected_std, rel=0.04)


STEPS_OF_LAW = {"ddpm": 400, "ddim": 400, "dpmpp": 100, "heun": 100}  # by order of convergence


@pytest.mark.parametrize("name, options", KINDS + [("heun", {"churn": 10.0})])
@pytest.mark.parametrize("schedule, prediction", CASES)
@pytest.mark.long
def test_samples_get_the_law_of_the_data(schedule, prediction, name, options):
    scheduler = make_scheduler(schedule, prediction)
    config = SamplerConfig(name, STEPS_OF_LAW[name], "logsnr", sigma_max=500, **options)
    mean, std = law_of_samples(scheduler, config)
    assert mean == pytest.approx(MEAN, abs=5 * SAMPLING_ERROR + 0.002)
    assert std == pytest.approx(STD, rel=0.05)


@pytest.mark.parametrize("name, options", KINDS + [("heun", {"churn": 10.0})])
@pytest.mark.long
def test_walks_from_no_signal_at_all_get_the_law_of_the_data(name, options):
    scheduler = make_scheduler("zero-snr")
    mean, std = law_of_samples(scheduler, SamplerConfig(name, STEPS_OF_LAW[name], "trailing",
                                                       **options))
    assert mean == pytest.approx(MEAN, abs=5 * SAMPLING_ERROR + 0.002)
    assert std == pytest.approx(STD, rel=0.1)  # most of these steps are at high noise


# Order of convergence --------------------------------------------------------------------------


def exact_flow(x, now, then):
    """The probability flow of the Gaussian: x keeps its place in units of the spread."""
    spread = [math.sqrt((STD * level.signal) ** 2 + level.noise**2) for level in (now, then)]
    return then.signal * MEAN + spread[1] / spread[0] * (x - now.signal * MEAN)


def list_of_sigmas(scheduler, steps):
    """Levels from sigma 2 to 0.2, between the table's timesteps and with neither end special."""
    return [scheduler.level_of_sigma(sigma) for sigma in np.geomspace(2, 0.2, steps + 1)]


@pytest.mark.parametrize("name, order", [("ddim", 1), ("dpmpp", 2), ("heun", 2)])
@pytest.mark.parametrize("schedule, prediction", CASES)
def test_halving_the_steps_divides_the_error(schedule, prediction, name, order):
    scheduler = make_scheduler(schedule, prediction)
    denoise = Denoiser(make_net(scheduler), scheduler)
    x = torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    errors = []
    for steps in (16, 32):
        levels = list_of_sigmas(scheduler, steps)
        *_, (end, _) = SAMPLER_FUNCTIONS[name](denoise, x, levels, draw=None)
        errors.append((end - exact_flow(x, levels[0], levels[-1])).abs().max().item())
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.15)


@pytest.mark.parametrize("name, options, order", [("ddpm", {}, 1), ("ddim", {"eta": 1.0}, 1),
                                                  ("dpmpp", {"eta": 1.0}, 2)])
@pytest.mark.parametrize("schedule, prediction", CASES)
@pytest.mark.long
def test_random_samplers_have_the_exact_mean_and_halve_the_error_of_the_spread(
        schedule, prediction, name, options, order):
    """E[x_then | x_now] is what ancestral steps of any length give for a Gaussian, and so exact.

    The spread follows from impulses: in pixel i of one walk, only draw i is 1, all else is 0.
    """
    scheduler = make_scheduler(schedule, prediction)
    denoise = Denoiser(make_net(scheduler), scheduler)
    errors = []
    for steps in (16, 32):
        levels = list_of_sigmas(scheduler, steps)
        (a, s), (b, r) = ((level.signal, level.noise) for level in (levels[0], levels[-1]))
        x = torch.zeros(1, 1, 1, steps + 2)
        x[..., -1] = 1  # the impulse at the start; the pixel before it gets none at all
        draws = iter(torch.eye(steps, steps + 2))
        *_, (end, _) = SAMPLER_FUNCTIONS[name](denoise, x, levels, lambda: next(draws), **options)
        response = (end - end[..., -2:-1]).flatten()
        covariance = STD**2 * a * b + r**2 * a / b  # of x_now and x_then
        now = (STD * a) ** 2 + s**2
        undisturbed = MEAN * (b - covariance / now * a)
        assert end[..., -2].item() == pytest.approx(undisturbed, abs=1e-5)
        assert response[-1].item() == pytest.approx(covariance / now, abs=1e-5)
        variance = (response[:-2] ** 2).sum().item() + response[-1].item() ** 2 * now
        errors.append(variance - (STD * b) ** 2 - r**2)
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.15)


# Types and rejected values ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_images_still_get_noise_at_every_timestep(dtype):
    scheduler = NoiseScheduler(make_scheduler_config("linear"))
    t = torch.arange(1000)
    x = torch.zeros(1000, 1, 16, 16, dtype=dtype)
    noisy = scheduler.add_noise(x, torch.randn(x.shape).to(dtype), t)
    assert noisy.dtype == torch.float32
    wanted = (1 - scheduler.alphas_cumprod).sqrt().float()
    assert (noisy.std(dim=(1, 2, 3)) / wanted - 1).abs().max() < 0.25
    assert scheduler.alphas_cumprod.dtype == torch.float64


@pytest.mark.parametrize("values, words", [
    (dict(beta_schedule="cosine"), "beta_schedule"),
    (dict(prediction_type="noise"), "prediction_type"),
    (dict(num_train_timesteps=0), "num_train_timesteps: must be at least 2, not 0"),
    (dict(beta_start=0.5), "beta_start, beta_end: 0.5 and 0.02"),
    (dict(num_train_timesteps=2, rescale_betas_zero_snr=True), "num_train_timesteps: .* least 3"),
    (dict(rescale_betas_zero_snr=True, prediction_type="epsilon"), "prediction_type: epsilon"),
])
def test_bad_configs_name_the_field(values, words):
    with pytest.raises(ValueError, match=words):
        SchedulerConfig(**values)


@pytest.mark.parametrize("values, words", [
    (dict(sampler="euler"), "sampler: 'euler'"), (dict(spacing="even"), "spacing: 'even'"),
    (dict(steps=0), "steps: must be at least 1"), (dict(rho=0.5), "rho: must be"),
    (dict(rho=3.0), "rho: logsnr spacing has none"),
    (dict(sigma_min=3.0, sigma_max=2.0), "sigma_min"), (dict(sigma_min=math.nan), "sigma_min"),
    (dict(sampler="ddim", eta=1.5), "eta: must be from 0 to 1"),
    (dict(sampler="heun", eta=0.5), "eta: heun has none"),
    (dict(sampler="ddpm", eta=0.5), "eta: ddpm has none"),
    (dict(sampler="heun", churn=-1.0), "churn"), (dict(churn=2.0), "churn: dpmpp has none"),
])
def test_bad_sampler_configs_name_the_field(values, words):
    with pytest.raises(ValueError, match=words):
        SamplerConfig(**values)

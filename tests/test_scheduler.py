"""The scheduler against diffusers' schedulers, and against a case that can be solved by hand."""

import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from modules import (SCHEDULES, NoiseScheduler, SchedulerConfig, make_scheduler_config,
                     reverse_process, seeded_noise)

PREDICTIONS = ("epsilon", "v_prediction", "sample")
CASES = [(s, p) for s in SCHEDULES for p in PREDICTIONS if (s, p) != ("zero-snr", "epsilon")]


def theirs(cls, config: SchedulerConfig, num_inference_steps: int):
    """diffusers' scheduler of the same config, with our float64 tables.

    Theirs are float32 (`test_tables` compares them); without ours, their rounding, divided by
    the tiny alphas_cumprod of the noisy end, would be all that a comparison of steps sees.
    """
    values = asdict(config)
    if cls is DDIMScheduler:
        values.pop("variance_type")
    scheduler = cls(**values)
    scheduler.set_timesteps(num_inference_steps)
    ours = NoiseScheduler(config)
    scheduler.betas, scheduler.alphas = ours.betas, 1 - ours.betas
    scheduler.alphas_cumprod = ours.alphas_cumprod
    scheduler.one = torch.tensor(1.0, dtype=torch.float64)
    if cls is DDIMScheduler:
        scheduler.final_alpha_cumprod = scheduler.one
    return scheduler


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("total", [1000, 250, 37])
def test_tables(schedule, total):
    config = make_scheduler_config(schedule, total)
    scheduler = NoiseScheduler(config)
    reference = DDPMScheduler(**asdict(config))
    assert scheduler.alphas_cumprod.dtype == torch.float64
    assert scheduler.alphas_cumprod.shape == (total,)
    assert (scheduler.alphas_cumprod.diff() < 0).all()
    torch.testing.assert_close(scheduler.alphas_cumprod.float(), reference.alphas_cumprod,
                               rtol=1e-4, atol=1e-6)
    if schedule == "zero-snr":
        assert scheduler.alphas_cumprod[-1] == 0


def test_linear_schedule_ends_alike_for_any_number_of_timesteps():
    ends = [NoiseScheduler(make_scheduler_config("linear", n)).alphas_cumprod[-1].log().item()
            for n in (1000, 4000, 200)]
    assert ends == pytest.approx([ends[0]] * 3, rel=0.1)


@pytest.mark.parametrize("schedule, prediction", CASES)
def test_forward_process_equals_diffusers(schedule, prediction):
    config = make_scheduler_config(schedule, 1000, prediction)
    ours, reference = NoiseScheduler(config), theirs(DDPMScheduler, config, 1000)
    torch.manual_seed(0)
    x, noise = torch.rand(5, 1, 8, 8) * 2 - 1, torch.randn(5, 1, 8, 8)
    t = torch.tensor([0, 1, 500, 998, 999])
    expected = reference.add_noise(x.double(), noise.double(), t)
    torch.testing.assert_close(ours.add_noise(x, noise, t), expected.float(), rtol=0, atol=1e-5)
    target = {"epsilon": noise, "sample": x,
              "v_prediction": reference.get_velocity(x.double(), noise.double(), t).float()}
    torch.testing.assert_close(ours.training_target(x, noise, t), target[prediction], rtol=0,
                               atol=1e-5)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("steps", [1000, 50])
@pytest.mark.parametrize("schedule, prediction", CASES)
def test_ddpm_step_equals_diffusers(schedule, prediction, steps, variance):
    config = replace(make_scheduler_config(schedule, 1000, prediction), variance_type=variance)
    ours, reference = NoiseScheduler(config), theirs(DDPMScheduler, config, steps)
    timesteps = ours.timesteps(steps)
    assert timesteps == reference.timesteps.tolist()
    for index in {0, 1, steps // 2, steps - 2, steps - 1}:
        t, prev = timesteps[index], (timesteps + [-1])[index + 1]
        if variance == "fixed_large" and prev < 0 and t > 0:
            continue  # diffusers adds noise to the finished image there; Ho et al. do not
        torch.manual_seed(index)
        output, x = torch.randn(2, 1, 8, 8), torch.randn(2, 1, 8, 8)
        expected = reference.step(output.double(), t, x.double(),
                                  generator=torch.Generator().manual_seed(7)).prev_sample
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(7),
                            dtype=torch.float64)
        step = ours.ddpm_step(output, t, prev, x, noise)
        torch.testing.assert_close(step.float(), expected.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [1000, 50])
@pytest.mark.parametrize("schedule, prediction", CASES)
def test_ddim_step_equals_diffusers(schedule, prediction, steps, eta):
    config = make_scheduler_config(schedule, 1000, prediction)
    ours, reference = NoiseScheduler(config), theirs(DDIMScheduler, config, steps)
    timesteps = ours.timesteps(steps)
    for index in {0, 1, steps // 2, steps - 2, steps - 1}:
        t, prev = timesteps[index], (timesteps + [-1])[index + 1]
        torch.manual_seed(index)
        output, x, noise = (torch.randn(2, 1, 8, 8) for _ in range(3))
        expected = reference.step(output.double(), t, x.double(), eta=eta,
                                  use_clipped_model_output=True,
                                  variance_noise=noise.double()).prev_sample
        step = ours.ddim_step(output, t, prev, x, noise, eta)
        torch.testing.assert_close(step, expected.float(), rtol=1e-5, atol=1e-5)


# Gaussian data: the perfect denoiser, and the law of the samples, are known ------------------

MEAN, STD = 0.3, 0.2


def perfect_net(scheduler: NoiseScheduler):
    """E[target | x_t] for pixels that are independent N(MEAN, STD^2), by Gaussian regression."""
    def net(x, timesteps):
        a = scheduler.alphas_cumprod[timesteps[0]].item()
        clean = MEAN + STD**2 * math.sqrt(a) / (STD**2 * a + 1 - a) * (x - math.sqrt(a) * MEAN)
        noise = (x - math.sqrt(a) * clean) / math.sqrt(1 - a)
        return {"sample": clean, "epsilon": noise,
                "v_prediction": math.sqrt(a) * noise - math.sqrt(1 - a) * clean
                }[scheduler.config.prediction_type]
    return net


def expected_law(scheduler: NoiseScheduler, timesteps: list[int], kind: str, eta: float):
    """Mean and std of the samples: each step is affine in x, so the two numbers say it all.

    The ancestral law is that of x_prev given (x_t, x_0), by conditioning the joint Gaussian.
    """
    mean, variance = 0.0, 1.0
    table = [1.0 if t < 0 else scheduler.alphas_cumprod[t].item() for t in [*timesteps, -1]]
    for a, b in zip(table, table[1:]):  # alpha-bar now and after the step
        gain = STD**2 * math.sqrt(a) / (STD**2 * a + 1 - a)  # clean = gain * x + offset
        offset = MEAN * (1 - gain * math.sqrt(a))
        posterior = (1 - b) - (a / b) * (1 - b) ** 2 / (1 - a)
        added = {"ddpm": posterior, "ddpm large": 1 - a / b if b < 1 else 0.0,
                 "ddim": eta**2 * posterior}[kind]
        if kind == "ddim":
            on_x = math.sqrt(max(1 - b - added, 0) / (1 - a))
        else:
            on_x = math.sqrt(a / b) * (1 - b) / (1 - a)  # covariance over variance of x_t
        on_clean = math.sqrt(b) - on_x * math.sqrt(a)
        mean = on_x * mean + on_clean * (gain * mean + offset)
        variance = (on_x + on_clean * gain) ** 2 * variance + added
    return mean, math.sqrt(variance)


@pytest.mark.parametrize("steps", [1000, 250, 50])
@pytest.mark.parametrize("kind, eta", [("ddpm", 0), ("ddpm large", 0), ("ddim", 0), ("ddim", 1)])
@pytest.mark.parametrize("schedule, prediction", CASES)
def test_gaussian_oracle(schedule, prediction, kind, eta, steps):
    config = replace(make_scheduler_config(schedule, 1000, prediction), clip_sample=False,
                     variance_type="fixed_large" if kind == "ddpm large" else "fixed_small")
    scheduler = NoiseScheduler(config)
    *_, samples = reverse_process(perfect_net(scheduler), scheduler,
                                  seeded_noise([3], (1, 150, 150)), steps,
                                  sampler=kind.split()[0], eta=eta)
    mean, std = expected_law(scheduler, scheduler.timesteps(steps), kind, eta)
    error = STD / 150  # of a mean of 150^2 pixels
    assert samples.mean().item() == pytest.approx(mean, abs=5 * error + 1e-4)
    assert samples.std().item() == pytest.approx(std, rel=0.03)
    if steps == 1000:  # and in the limit it is the data's law
        assert mean == pytest.approx(MEAN, abs=0.01)
        assert std == pytest.approx(STD, rel=0.06 if kind == "ddpm large" else 0.03)


def test_the_oracle_tells_a_wrong_stride():
    """What a known scheduler does (previous = t - 1 whatever the gap) is far outside 3 %."""
    scheduler = NoiseScheduler(replace(make_scheduler_config("linear"), clip_sample=False))
    timesteps = scheduler.timesteps(50)
    x = torch.randn(1, 1, 150, 150)
    for t in timesteps:
        output = perfect_net(scheduler)(x, torch.tensor([t]))
        x = scheduler.ddpm_step(output, t, t - 1, x, torch.randn_like(x))
    assert abs(x.std().item() / expected_law(scheduler, timesteps, "ddpm", 0)[1] - 1) > 0.5


def test_clipping_leaves_data_inside_the_range_alone():
    config = make_scheduler_config("cosine")
    finals = []
    for clip in (False, True):
        scheduler = NoiseScheduler(replace(config, clip_sample=clip))
        *_, x = reverse_process(perfect_net(scheduler), scheduler,
                                seeded_noise([1], (1, 64, 64)), 50)
        finals.append(x)
    torch.testing.assert_close(finals[0], finals[1], rtol=0, atol=2e-2)
    assert finals[1].abs().max() <= 1


# Range and types -------------------------------------------------------------------------------


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


@pytest.mark.parametrize("total, steps", [(1000, 1), (1000, 7), (1000, 1000), (37, 10)])
def test_timesteps_fall_from_the_noisy_end(total, steps):
    timesteps = NoiseScheduler(make_scheduler_config("cosine", total)).timesteps(steps)
    assert len(timesteps) == steps and timesteps[0] == total - 1 and timesteps[-1] >= 0
    assert (np.diff(timesteps) < 0).all()


@pytest.mark.parametrize("steps", [0, 1001])
def test_impossible_number_of_steps(steps):
    with pytest.raises(ValueError, match="1 to 1000"):
        NoiseScheduler(SchedulerConfig()).timesteps(steps)


@pytest.mark.parametrize("values, words", [
    (dict(beta_schedule="cosine"), "beta_schedule"),
    (dict(prediction_type="noise"), "prediction_type"),
    (dict(num_train_timesteps=0), "num_train_timesteps"),
    (dict(rescale_betas_zero_snr=True, prediction_type="epsilon"), "prediction_type: epsilon"),
])
def test_bad_configs_name_the_field(values, words):
    with pytest.raises(ValueError, match=words):
        SchedulerConfig(**values)

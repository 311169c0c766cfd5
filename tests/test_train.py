"""Training: it learns, it continues exactly, and its files can be trusted."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY
from safetensors import safe_open

import train as train_script
from dataset import batch_indices
from modules import HEIGHT_FREQUENCIES, LabelConfig, NoiseScheduler
from train import Run, draw_timesteps, finish, learning_rate, step_seed, train
from utils.checkpoint import read_checkpoint
from utils.cli import UserError
from utils.configs import make_scheduler_config
from utils.phantoms import draw_phantom

FIXED = ("step", "loss", "validation_loss", "validation_q1", "learning_rate", "gradient_norm")


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def metrics(run: Run) -> list[dict]:
    with (run.folder / "metrics.csv").open() as file:
        return [{key: row[key] for key in FIXED} for row in csv.DictReader(file)]


# Learning --------------------------------------------------------------------------------------


@pytest.mark.long
def test_overfits_eight_slices(make_run):
    """The net learns eight slices by heart: each sample is then one of them."""
    images = np.stack([draw_phantom(16, i, (i + 0.5) / 8) for i in range(8)])
    unet = replace(TINY, dropout=0.0, block_out_channels=(64, 64))
    run = make_run(unet=unet, data={"train": (images, [str(i) for i in range(8)])}, steps=600,
                   batch_size=16, learning_rate=2e-3, warmup_steps=50, augment=0.0,
                   labels=LabelConfig())
    first = run.loss(0).item()
    while run.step < run.config.steps:
        run.train_step()
    with torch.no_grad():
        last = np.mean([run.loss(10_000 + i).item() for i in range(20)])
    assert first > 0.5 and last < 0.06
    known = torch.from_numpy(images)[:, None].float() / 127.5 - 1
    drawn = run.sample(num=8)
    nearest = ((drawn[:, None] - known[None]) ** 2).mean(dim=(2, 3, 4)).min(dim=1).values
    spread = ((known[:, None] - known[None]) ** 2).mean(dim=(2, 3, 4))
    most_alike = spread[~torch.eye(8, dtype=bool)].min()  # of two different ones
    assert nearest.median() < most_alike / 2


def test_gradient_equals_finite_differences(make_run):
    """Along its own direction, the loss must rise by the gradient's length per unit of way."""
    run = make_run(unet=replace(TINY, dropout=0.0), batch_size=2)
    with torch.no_grad():
        for parameter in run.net.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    run.loss(3).backward()
    gradients = [p.grad.clone() for p in run.net.parameters()]
    length = torch.sqrt(sum((g**2).sum() for g in gradients))
    ends = []
    for way in (2e-3, -2e-3):
        with torch.no_grad():
            for parameter, gradient in zip(run.net.parameters(), gradients):
                parameter.add_(way * gradient / length)
            ends.append(run.loss(3).item())
            for parameter, gradient in zip(run.net.parameters(), gradients):
                parameter.sub_(way * gradient / length)
    assert (ends[0] - ends[1]) / 4e-3 == pytest.approx(length.item(), rel=0.02)


def test_accumulated_micro_batches_are_one_batch(make_run):
    """Mean of the micro-batches' gradients = gradient of the whole batch, of the same draws."""
    run = make_run(unet=replace(TINY, dropout=0.0), batch_size=8, accumulate=2, augment=0.0,
                   labels=LabelConfig())
    with torch.no_grad():
        run.net.conv_out.weight.normal_(std=0.1)
    parts = []

    def spy(x, t):
        parts.append((x.clone(), t.clone()))
        return run.net(x, t)
    run.wrapped, run.optimizer.step = spy, lambda: None
    run.optimizer.zero_grad = lambda **_: None
    before = {n: p.clone() for n, p in run.net.named_parameters()}
    run.config = replace(run.config, grad_clip=1e9)
    run.train_step()
    accumulated = [p.grad.clone() for p in run.net.parameters()]

    images = run.data["train"][batch_indices(32, 8, 0, 0)]
    torch.manual_seed(step_seed(0, 0))
    timesteps = draw_timesteps(8, run.timestep_cdf)
    noise = torch.randn(8, 1, 16, 16)
    order = [0, 2, 4, 6, 1, 3, 5, 7]  # each micro-batch has every other noise level
    images, timesteps, noise = images[order], timesteps[order], noise[order]
    x, t = (torch.cat(parts) for parts in zip(*parts))
    assert torch.equal(t, timesteps) and [len(part[0]) for part in parts] == [4, 4]
    target = run.scheduler.training_target(images, noise, t)
    torch.testing.assert_close(run.scheduler.add_noise(images, noise, t), x)
    for parameter in run.net.parameters():
        parameter.grad = None
    F.mse_loss(run.net(x, t), target).backward()
    for parameter, grad in zip(run.net.parameters(), accumulated):
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-4, atol=1e-6)
    assert all(torch.equal(before[n], p) for n, p in run.net.named_parameters())


def test_noise_has_an_offset_where_it_can_be_seen(make_run):
    """The mean of an image's noise has a standard deviation of 0.3, but of one over the square
    root of the number of pixels for sigma above 0.5; the target is that very noise."""
    run = make_run(batch_size=32, offset_noise=0.3, labels=LabelConfig())
    means, sigmas = [], []

    def oracle(x, t):
        images = run.data["train"][batch_indices(32, 32, 0, step)]
        alpha_bar = run.scheduler.alphas_cumprod[t].float()[:, None, None, None]
        noise = (x - alpha_bar.sqrt() * images) / (1 - alpha_bar).sqrt()
        means.append(noise.mean((1, 2, 3)))
        sigmas.append((1 / alpha_bar - 1).sqrt().flatten())
        return alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * images
    run.wrapped = oracle
    for step in range(30):
        assert run.loss(step) < 1e-6
    means, sigmas = torch.cat(means), torch.cat(sigmas)
    assert means[sigmas < 0.49].std() == pytest.approx((0.3**2 + 1 / 256) ** 0.5, rel=0.15)
    assert means[sigmas > 0.51].std() == pytest.approx(1 / 16, rel=0.15)


def test_timesteps_are_uniform_and_stratified():
    uniform = NoiseScheduler(make_scheduler_config("cosine")).timestep_cdf().float()
    for _ in range(20):
        t = draw_timesteps(10, uniform)
        assert (t // 100).tolist() == list(range(10))
    uniform = NoiseScheduler(make_scheduler_config("cosine", 50)).timestep_cdf().float()
    many = torch.cat([draw_timesteps(7, uniform) for _ in range(3000)])
    counts = torch.bincount(many, minlength=50).float()
    assert len(counts) == 50 and (counts / counts.mean() - 1).abs().max() < 0.25


@pytest.mark.parametrize("schedule", ["cosine", "cosine-shifted", "linear"])
def test_noise_levels_are_log_normal(schedule):
    """Quantiles of ln sigma over many draws against those of the normal distribution."""
    scheduler = NoiseScheduler(make_scheduler_config(schedule, sample_size=(208, 176)))
    cdf = scheduler.timestep_cdf(-0.5, 0.8).float()
    log_sigma = -0.5 * scheduler.alphas_cumprod.logit()
    drawn = log_sigma[torch.cat([draw_timesteps(50, cdf) for _ in range(400)])]
    points = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9], dtype=torch.float64)
    expected = -0.5 + 0.8 * torch.special.ndtri(points)
    assert (drawn.quantile(points) - expected).abs().max() < 0.03


def test_labels_are_dropped_at_their_rate_and_known_by_step(make_run):
    labels = LabelConfig(height_range=(0, 7), classes=("a", "b"), augmentations=6)
    run = make_run(labels=labels, batch_size=32, label_dropout=0.25, augment=0.3)
    run.data["train"].classes = ["a", "b"] * 16
    indices, vectors = np.arange(32), []
    for step in range(100):
        images, vector = run.label(run.data["train"][indices], indices, step, slice(0, 32))
        vectors.append(vector)
    again = run.label(run.data["train"][indices], indices, 99, slice(0, 32))
    assert torch.equal(again[0], images) and torch.equal(again[1], vectors[-1])
    height, name, geometry = torch.stack(vectors).split([HEIGHT_FREQUENCIES, 2, 6], dim=-1)
    for part, rate in ((height, 0.25), (name, 0.25), (geometry[..., :1], 0.7)):
        assert (part == 0).all(-1).float().mean() == pytest.approx(rate, abs=0.03)
    assert set(map(tuple, name[:, 1].tolist())) == {(0, 0), (0, 1)}  # slice 1 is of class "b"


def test_learning_rate_warms_up_and_falls_to_zero(make_run):
    run = make_run(steps=100, warmup_steps=10, learning_rate=1.0)
    rates = [learning_rate(run.config, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == pytest.approx(1, abs=0.03)
    assert rates[50] == pytest.approx(0.5) and rates[-1] < 0.001
    assert learning_rate(replace(run.config, lr_schedule="constant"), 99) == 1.0


def test_validation_is_the_same_at_every_call_and_sees_every_quartile(make_run):
    run = make_run()
    first = run.evaluate("validate")
    run.loss(0)  # training's random numbers must not move it
    assert run.evaluate("validate") == first
    quarters = [first[q] for q in train_script.QUARTILES]
    assert np.mean(quarters) == pytest.approx(first["loss"])
    for parameter in run.ema.net.parameters():
        parameter.data.add_(0.01)
    assert run.evaluate("validate") != first


def test_validation_of_the_zero_net_has_a_closed_form(make_run):
    """A net that says 0 errs by v^2 = alpha-bar + (1 - alpha-bar) x^2, noise being unit."""
    run = make_run()
    loss = run.evaluate("validate")["loss"]
    table = NoiseScheduler(make_scheduler_config("cosine")).alphas_cumprod
    power = (run.data["validate"][np.arange(8)] ** 2).mean().item()
    assert loss == pytest.approx((table + (1 - table) * power).mean().item(), rel=0.05)


# Saving and continuing -------------------------------------------------------------------------


@pytest.mark.parametrize("stop_at", [1, 3, 4])
def test_an_interrupted_run_equals_an_uninterrupted_one(make_run, stop_at):
    whole = make_run("whole", accumulate=2)
    assert train(whole, log_every=2, save_every=4)

    first = make_run("parts", accumulate=2)
    real = first.train_step

    def stop_after():
        norm = real()
        if first.step == stop_at:
            train_script.signal.raise_signal(train_script.signal.SIGTERM)
        return norm
    first.train_step = stop_after
    assert not train(first, log_every=2, save_every=4)
    assert first.step == stop_at

    torch.manual_seed(999)  # a new process knows nothing of the old one's random state
    second = make_run("parts", accumulate=2)
    second.resume()
    assert second.step == stop_at
    assert train(second, log_every=2, save_every=4)
    for key in ("net", "ema", "optimizer", "step", "ema_updates"):
        assert same(read_checkpoint(whole.checkpoint)[key], read_checkpoint(second.checkpoint)[key])
    assert metrics(whole) == metrics(second)
    assert [row["step"] for row in metrics(whole)] == ["2", "4", "6", "8"]
    for name in ("step_0000004.png", "step_0000008.png"):
        pair = [(r.folder / "samples" / name).read_bytes() for r in (whole, second)]
        assert pair[0] == pair[1]


def test_a_run_moves_to_a_device_with_another_optimiser(make_run):
    """Apple's mps has no fused one."""
    run = make_run()
    run.optimizer.param_groups[0]["fused"] = False
    run.train_step()
    run.save()
    again = make_run()
    again.resume()
    again.train_step()
    again.check()
    assert again.optimizer.param_groups[0]["fused"]
    assert all(state["step"] == 2 for state in again.optimizer.state.values())


def test_another_configuration_is_refused_with_the_differences(make_run):
    run = make_run()
    run.save()
    other = make_run(learning_rate=5e-4, seed=3)
    with pytest.raises(UserError, match="learning_rate = 0.001, now 0.0005.*seed = 0, now 3"):
        other.resume()
    make_run(steps=100).resume()


def test_a_run_moves_to_hardware_with_another_type(make_run, capsys):
    run = make_run()
    run.step = 3
    run.save()
    with pytest.raises(UserError, match="train.dtype = 'float32', now 'bfloat16'"):
        make_run(dtype="bfloat16").resume()  # asked for
    moved = make_run(dtype="bfloat16")
    moved.auto_dtype = True
    moved.resume()
    lines = capsys.readouterr().out.splitlines()
    assert moved.step == 3 and moved.dtype == torch.bfloat16
    assert len(lines) == 1 and "bfloat16 from step 3 on, before in float32" in lines[0]


def test_more_steps_than_planned_are_recorded(make_run, capsys):
    """Its config is no longer that of a run with these steps from the start, whose weights differ.
    """
    run = make_run(steps=6, learning_rate=1.0)
    run.step = 6
    run.save()
    longer = make_run(steps=12, learning_rate=1.0)
    longer.resume()
    assert longer.config == replace(make_run(steps=12, learning_rate=1.0).config,
                                    extended=((6, 6),))
    lines = capsys.readouterr().out.splitlines()  # half of the cosine is half of the peak
    assert len(lines) == 1 and "at step 6 the learning rate changes from 0 to 0.5," in lines[0]
    longer.save()
    again = make_run(steps=12, learning_rate=1.0)
    again.resume()
    assert again.config == longer.config and not capsys.readouterr().out


def test_a_checkpoint_from_before_an_option_continues(make_run):
    """What it lacks counts as the default, and what no longer exists is ignored."""
    run = make_run(ema_length=0.09, augment=0.0, ema_short=0.0)
    run.step = 3
    run.save()
    content = torch.load(run.checkpoint, weights_only=True)
    for part, names in (("train", ("ema_length", "augment", "p_mean")),
                        ("unet", ("final_channels",)), ("scheduler", ("log_snr_shift",))):
        for name in names:
            del content[part][name]
    content["train"]["flip"] = False
    content["rows"] = [{"step": 1, "loss": "0.5"}]  # once, the rows of metrics.csv
    torch.save(content, run.checkpoint)
    again = make_run(ema_length=0.09, augment=0.0, ema_short=0.0)
    again.resume()
    assert again.step == 3
    with pytest.raises(UserError, match="train.augment = 0.0, now 0.5"):
        make_run(ema_length=0.09, augment=0.5, ema_short=0.0).resume()


def test_run_folder(make_run):
    run = make_run()
    run.data["test"] = run.data["validate"]
    assert train(run, log_every=4, save_every=8)
    finish(run)
    content = torch.load(run.checkpoint, weights_only=True)
    assert content["step"] == 8 and content["train"]["seed"] == 0
    assert same(content["ema"], run.ema.net.state_dict())
    results = json.loads((run.folder / "results.json").read_text())
    assert results["images_seen"] == 32 and results["test"] == run.evaluate("test")
    with safe_open(run.folder / "model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["unet"])["block_out_channels"] == [32, 64]
        for name, tensor in run.ema.net.state_dict().items():
            torch.testing.assert_close(file.get_tensor(name), tensor.half())
    for name in ("loss.png", "samples/step_0000008.png"):
        assert (run.folder / name).read_bytes().startswith(b"\x89PNG")
    assert not [path for path in run.folder.rglob("*") if path.name.endswith(".tmp")]


def test_a_signal_stops_and_the_handlers_come_back(make_run):
    before = train_script.signal.getsignal(train_script.signal.SIGTERM)
    run = make_run()
    train(run, log_every=4, save_every=8)
    assert train_script.signal.getsignal(train_script.signal.SIGTERM) == before


def test_fewer_steps_than_done_are_refused(make_run):
    run = make_run()
    run.step = 6
    run.save()
    with pytest.raises(UserError, match="--steps 4: .* is at step 6 already"):
        make_run(steps=4).resume()


def test_two_validation_slices_still_give_four_quartiles(make_run):
    images = np.stack([draw_phantom(16, subject, 0.4) for subject in range(8)])
    names = [str(i) for i in range(8)]
    run = make_run(data={"train": (images, names), "validate": (images[:2], names[:2])})
    assert all(np.isfinite(value) for value in run.evaluate("validate").values())


def test_a_failed_save_leaves_the_old_checkpoint(make_run, monkeypatch):
    run = make_run()
    run.save()
    good = run.checkpoint.read_bytes()
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "disk full")))
    with pytest.raises(UserError, match="checkpoint-00000000.pt: cannot be written .disk full"):
        run.save()
    assert run.checkpoint.read_bytes() == good and len(list(run.folder.iterdir())) == 1

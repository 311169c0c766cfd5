"""What only a GPU can show: `pytest -m gpu tests`. Skipped where there is none.

The CPU in float32 is the reference: it is held to diffusers and to closed forms elsewhere.
"""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import TINY, call

from dataset import Slices
from modules import Denoiser, NoiseScheduler, UNet, run_net, sample
from train import QUARTILES, train
from utils.cli import UserError
from utils.configs import SAMPLERS, SamplerConfig, make_scheduler_config
from utils.phantoms import phantom_slices

CUDA = torch.device("cuda")
STILL = replace(TINY, dropout=0.0)  # dropout draws from each device's own generator
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA GPU here")]
bf16 = pytest.param("bfloat16", marks=pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0),
    reason="this GPU has no bfloat16"))
DTYPES = ("float32", "float16", bf16)


def randomised(config=STILL) -> UNet:
    torch.manual_seed(0)
    net = UNet(config).eval().requires_grad_(False)
    for parameter in net.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    return net


def distance(value: torch.Tensor, exact: torch.Tensor) -> float:
    return ((value.cpu().double() - exact.double()).norm() / exact.double().norm()).item()


@pytest.mark.parametrize("dtype, tolerance", [
    ("float32", 5e-3), ("float16", 0.01), pytest.param("bfloat16", 0.03, marks=bf16.marks)])
def test_the_net_computes_what_the_cpu_does(dtype, tolerance):
    """TF32 in convolutions is allowed in float32: 2.3e-3 if its inputs are cut off, not rounded."""
    net, x, t = randomised(), torch.randn(4, 1, 16, 16), torch.tensor([0, 10, 500, 999])
    on_gpu = copy.deepcopy(net).to(CUDA, memory_format=torch.channels_last)
    out = run_net(on_gpu, x.to(CUDA), t.to(CUDA), getattr(torch, dtype))
    assert out.dtype == torch.float32
    assert distance(out, net(x, t)) < tolerance


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_seed_is_the_same_slice_on_the_gpu(sampler):
    """Noise is drawn on the CPU; a checkpoint's slices differ by rounding alone."""
    net, scheduler = randomised(), NoiseScheduler(make_scheduler_config("cosine"))
    images = {}
    for device in (torch.device("cpu"), CUDA):
        denoise = Denoiser(copy.deepcopy(net).to(device), scheduler)
        images[device.type], = sample(denoise, [3, 4], (1, 16, 16), SamplerConfig(sampler, 20), 2,
                                      device)
    assert distance(images["cuda"], images["cpu"]) < 0.02


def test_the_set_lies_on_the_gpu_as_uint8():
    images, names = phantom_slices(16, 0, 5)
    before = torch.cuda.memory_allocated()
    slices = Slices(images, names, CUDA)
    assert slices.images.is_cuda and slices.images.dtype == torch.uint8
    assert torch.cuda.memory_allocated() - before <= images.nbytes + 512
    batch = slices[np.array([3, 0, 39])]
    expected = torch.from_numpy(images[[3, 0, 39]])[:, None].float() / 127.5 - 1
    torch.testing.assert_close(batch.cpu(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_learns_as_on_the_cpu(make_run, dtype):
    """By 60 steps, the validation loss falls as far as the CPU's: order and weights are the
    same, noise is not."""
    losses = {}
    for name, device, kind in (("cpu", torch.device("cpu"), "float32"), ("cuda", CUDA, dtype)):
        run = make_run(name, unet=STILL, device=device, dtype=kind, steps=60, batch_size=16)
        first = run.evaluate("validate")["loss"]
        while run.step < run.config.steps:
            run.train_step()
        run.check()
        losses[name] = run.evaluate("validate")["loss"]
        assert losses[name] < 0.6 * first
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=0.15)


def test_validation_is_the_same_on_both(make_run):
    """Its noise is fixed: the same weights have the same loss."""
    runs = [make_run(d, device=torch.device(d)) for d in ("cpu", "cuda")]
    weights = randomised(runs[0].ema.net.config).state_dict()
    for run in runs:
        run.ema.net.load_state_dict(weights)
    ours, theirs = (run.evaluate("validate") for run in runs)
    for key in ("loss", *QUARTILES):
        assert theirs[key] == pytest.approx(ours[key], rel=2e-3)


def test_compiled_is_as_eager(make_run):
    runs = [make_run(n, unet=STILL, device=CUDA, compile_net=c)
            for n, c in (("eager", False), ("compiled", True))]
    for _ in range(3):
        for run in runs:
            run.train_step()
    for a, b in zip(*(run.net.parameters() for run in runs)):
        torch.testing.assert_close(a, b, rtol=0.05, atol=2e-3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_step_waits_for_the_gpu(make_run, dtype):
    """PyTorch itself reports each operation that makes the host wait."""
    run = make_run(device=CUDA, dtype=dtype, accumulate=2)
    run.train_step()  # tables go to the GPU once
    torch.cuda.set_sync_debug_mode("error")
    try:
        run.train_step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", DTYPES)
def test_continues_on_the_gpu_and_moves_to_the_cpu(make_run, dtype):
    run = make_run(device=CUDA, dtype=dtype)
    for _ in range(3):
        run.train_step()
    run.save()
    for device in (CUDA, torch.device("cpu")):
        again = make_run(device=device, dtype=dtype)
        again.resume()
        assert again.step == 3
        for a, b in zip(run.net.parameters(), again.net.parameters()):
            assert torch.equal(a.cpu(), b.cpu())
        again.train_step()
        again.check()


@pytest.mark.parametrize("dtype", ("float32", "float16"))
def test_bad_numbers_are_noticed_without_waiting(make_run, dtype):
    """The next log line raises an error that names the step at which they began."""
    run = make_run(device=CUDA, dtype=dtype)
    run.train_step()
    true_loss, run.loss = run.loss, lambda *a: true_loss(*a) * torch.inf
    run.train_step()
    run.loss = true_loss
    run.train_step()
    with pytest.raises(UserError, match="^step 2: loss inf"):
        run.check()


def test_memory_is_bounded_by_batch_and_accumulate(make_run):
    """Half the batch at a time must save activations: peak memory falls well below the whole's."""
    peaks = []
    for accumulate in (1, 4):
        run = make_run(str(accumulate), device=CUDA, batch_size=32, accumulate=accumulate)
        run.train_step()
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        run.train_step()
        peaks.append(torch.cuda.max_memory_allocated() - start)
    assert peaks[1] < 0.6 * peaks[0]


def test_a_whole_run_and_its_slices(make_run, tmp_path):
    run = make_run("runs/x", device=CUDA, steps=4)
    assert train(run, log_every=2, save_every=4)
    done = call("predict.py", "--checkpoint", run.folder, "--num", "2", "--steps", "3", "--device",
                "cuda", "--out", tmp_path / "out", cwd=tmp_path)
    assert done.returncode == 0 and (tmp_path / "out" / "slice_000001.png").exists(), done.stderr

"""Sampling: a slice depends on its seed alone, whatever else is asked for."""

import json
import math
import os
import sys
from dataclasses import asdict

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

import predict
from modules import QUALITY, Denoiser, SamplerConfig, make_scheduler_config, sample
from predict import generate, load_model
from train import finish, train
from utils.checkpoint import SHIPPED, find_model
from utils.cli import UserError

CPU = torch.device("cpu")
SHAPE = (1, 64, 64)  # of the shipped model's slices


@pytest.fixture(scope="module")
def shipped():
    return load_model(SHIPPED["64"], CPU)


def draw(model, out, seeds, config=SamplerConfig(steps=4), batch_size=4, dtype=torch.float32,
         guide=None, **guidance) -> dict[int, np.ndarray]:
    denoise = Denoiser(model.net, model.scheduler, guide, dtype=dtype, patch_size=2, **guidance)
    generate(denoise, SHAPE, seeds, out, config, batch_size, CPU)
    return {s: np.asarray(Image.open(out / f"slice_{s:06d}.png")).astype(int) for s in seeds}


@pytest.mark.parametrize("config", [
    SamplerConfig("ddpm", 4), SamplerConfig("ddim", 4), SamplerConfig("ddim", 4, eta=0.7),
    SamplerConfig("dpmpp", 4), SamplerConfig("dpmpp", 4, eta=0.7), SamplerConfig("heun", 3),
    SamplerConfig("heun", 3, churn=1.0)], ids=lambda c: f"{c.sampler}-{c.eta}-{c.churn}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_slice_depends_on_its_seed_alone(shipped, tmp_path, config, dtype):
    many = draw(shipped, tmp_path / "a", [5, 6, 7, 8, 9], config, dtype=dtype)
    fewer = draw(shipped, tmp_path / "b", [8, 9], config, dtype=dtype)  # other count, start, place
    backwards = draw(shipped, tmp_path / "c", [9, 8, 7, 6, 5], config, dtype=dtype)
    for seed in (8, 9):
        assert (many[seed] == fewer[seed]).all()
    for seed in many:
        assert (many[seed] == backwards[seed]).all()
    assert (many[5] != many[6]).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sampler, steps", [("ddim", 5), ("ddpm", 5), ("dpmpp", 5), ("heun", 10)])
def test_batch_size_changes_next_to_nothing(shipped, tmp_path, sampler, steps, dtype):
    config = SamplerConfig(sampler, steps)
    reference = draw(shipped, tmp_path / "a", [0, 1, 2], config, 1, dtype)
    for size in (2, 5):
        other = draw(shipped, tmp_path / str(size), [0, 1, 2], config, size, dtype)
        for seed in reference:
            difference = np.abs(reference[seed] - other[seed])
            # In bfloat16 a few coarse steps amplify the kernels' rounding at single pixels.
            assert difference.max() <= 2 if dtype == torch.float32 else difference.mean() < 1


def test_files_are_rounded_grayscale(shipped, tmp_path):
    images, states = generate(Denoiser(shipped.net, shipped.scheduler), SHAPE, [3], tmp_path,
                              SamplerConfig(steps=3), 1, CPU)
    with Image.open(tmp_path / "slice_000003.png") as picture:
        assert picture.mode == "L" and picture.size == (64, 64)
        exact = (images[0, 0].numpy().clip(-1, 1) + 1) * 127.5
        assert np.abs(np.asarray(picture) - exact).max() <= 0.5 + 1e-4
    assert states.shape == (4, 1, 64, 64)
    assert torch.equal(states[-1], images[0])
    assert states[0].std() == pytest.approx(1, abs=0.05)  # the strip starts at pure noise


@pytest.mark.parametrize("config, calls", [
    (SamplerConfig("dpmpp", 3), 3), (SamplerConfig("heun", 3), 5), (SamplerConfig("ddim", 3), 3),
    (SamplerConfig("heun", 3, churn=1.0), 5)])
def test_network_calls_are_counted(shipped, config, calls):
    counted = []

    def net(x, timesteps):
        counted.append(len(x))
        return torch.zeros_like(x)
    denoise = Denoiser(net, shipped.scheduler)
    list(sample(denoise, [1, 2, 3], SHAPE, config, batch_size=2))
    assert len(counted) == denoise.calls == 2 * calls  # of each batch
    denoise = Denoiser(net, shipped.scheduler, net, guidance=2.0)
    list(sample(denoise, [1], SHAPE, config))
    assert denoise.calls == 2 * calls


def test_a_guide_that_is_the_model_changes_nothing_and_the_other_options_do(shipped, tmp_path):
    plain = draw(shipped, tmp_path / "a", [1])
    for guidance, interval in ((1.0, (0, math.inf)), (3.0, (0, math.inf)), (3.0, (1e4, 1e5))):
        same = draw(shipped, tmp_path / "b", [1], guide=shipped.net, guidance=guidance,
                    guidance_interval=interval)
        assert np.abs(plain[1] - same[1]).max() <= 1  # rounding
    weaker = draw(shipped, tmp_path / "c", [1], guide=lambda x, t: torch.zeros_like(x),
                  guidance=1.2)
    scaled = draw(shipped, tmp_path / "d", [1], epsilon_scale=1.02)
    for changed in (weaker, scaled):
        assert np.abs(plain[1] - changed[1]).max() > 2


def test_guidance_from_the_command_line(make_run, tmp_path, monkeypatch):
    run = make_run()
    run.export()
    monkeypatch.setattr(sys, "argv", list(map(str, [
        "predict.py", "--checkpoint", run.folder, "--guide", run.folder, "--guidance", 2, "--num",
        3, "--batch-size", 2, "--sampler", "heun", "--steps", 3, "--device", "cpu", "--out",
        tmp_path / "out"])))
    predict.main()
    manifest = json.loads((tmp_path / "out" / "samples.json").read_text())
    assert manifest["network_calls"] == 2 * 5
    assert manifest["sampler"] == "heun" and manifest["steps"] == 3
    assert manifest["guidance"] == 2 and manifest["guide"] == str(run.folder)


@pytest.mark.parametrize("changes, words", [
    (None, ["sample_size", "(16, 16)", "(64, 64)"]),
    (dict(schedule="linear"), ["beta_schedule", "linear", "squaredcos_cap_v2"]),
    (dict(schedule="cosine", prediction_type="sample"), ["prediction_type", "sample"]),
    (dict(schedule="cosine", num_train_timesteps=500), ["num_train_timesteps", "500"]),
])
def test_guides_of_something_else_are_rejected(make_run, tmp_path, refused, changes, words):
    guide = tmp_path / "guide.safetensors"
    if changes is None:
        run = make_run()
        run.export()
        guide = run.folder / "model.safetensors"
    else:
        with safe_open(SHIPPED["64"], framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            config = json.dumps(asdict(make_scheduler_config(**changes)))
            save_file(tensors, guide, {**file.metadata(), "scheduler": config})
    refused("predict.py", ["--model", "64", "--guide", guide], "--guide", guide.name, *words)


def test_the_shipped_model_draws_brains(shipped, tmp_path):
    """Against real slices' statistics (the data's README), not against earlier output."""
    pictures = np.stack(list(draw(shipped, tmp_path, list(range(8)), QUALITY["default"],
                                  8).values()))
    corners = np.concatenate([pictures[:, :6, :6], pictures[:, -6:, -6:]])
    assert corners.mean() < 2 and corners.max() < 16  # real: 0
    assert 45 < pictures.mean() < 78  # real: 61
    assert 0.45 < (pictures < 8).mean() < 0.68  # real: 0.57
    centre, flipped = pictures[:, 16:48, 16:48], pictures[:, 16:48, 16:48][:, :, ::-1]
    assert np.corrcoef(centre.ravel(), flipped.ravel())[0, 1] > 0.3  # two alike hemispheres


def test_a_trained_run_goes_straight_into_predict(make_run, tmp_path):
    run = make_run()
    train(run, log_every=4, save_every=8)
    finish(run)
    from_checkpoint = load_model(find_model(str(run.folder)), CPU)
    assert from_checkpoint.step == 8
    for name, tensor in from_checkpoint.net.state_dict().items():
        assert torch.equal(tensor, run.ema.net.state_dict()[name])  # the EMA weights
    half = load_model(find_model(str(run.folder / "model.safetensors")), CPU)
    for name, tensor in half.net.state_dict().items():
        torch.testing.assert_close(tensor, run.ema.net.state_dict()[name], rtol=1e-3, atol=1e-6)
    run.checkpoint.unlink()
    assert find_model(str(run.folder)).name == "model.safetensors"


def test_latest_is_the_newest_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="latest: no runs"):
        find_model("latest")
    for age, name in enumerate(("new", "old")):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "checkpoint.pt").touch()
        os.utime(tmp_path / "runs" / name / "checkpoint.pt", (1e9 - age, 1e9 - age))
    assert find_model("latest").parent.name == "new"


def test_bad_models_are_named(make_run, tmp_path):
    run = make_run()
    run.save()
    run.export()
    with pytest.raises(UserError, match="nowhere"):
        find_model(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="neither checkpoint.pt nor"):
        find_model(str(tmp_path))

    whole = (run.folder / "model.safetensors").read_bytes()
    for name, content in (("cut", whole[:-100]), ("text", b"hello there"), ("empty", b"")):
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"{name}.safetensors: is damaged"):
            load_model(path, CPU)

    content = torch.load(run.checkpoint, weights_only=True)
    for part, key, value in (("unet", "block_out_channels", (64, 64)), ("unet", "surprise", 1),
                             ("unet", "norm_num_groups", 0), ("unet", "block_out_channels", ()),
                             ("scheduler", "prediction_type", "noise")):
        wrong = {**content, part: {**content[part], key: value}}
        torch.save(wrong, tmp_path / "wrong.pt")
        with pytest.raises(UserError, match="wrong.pt: its weights and its configs do not fit"):
            load_model(tmp_path / "wrong.pt", CPU)

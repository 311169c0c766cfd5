"""Sampling: a slice depends on its seed alone, whatever else is asked for."""

import csv
import hashlib
import json
import math
import os
import subprocess
import sys
from dataclasses import asdict, replace

import nibabel
import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

import predict
from modules import (Denoiser, LabelConfig, NoiseScheduler, noise_levels, reverse_process, sample,
                     seed_height, seeded_noise)
from predict import Slice, generate, load_model, slice_noise
from tools.volumes import upright
from train import finish, train
from utils.checkpoint import FORMAT, SHIPPED, find_model
from utils.cli import UserError
from utils.configs import QUALITY, SamplerConfig, make_scheduler_config
from utils.device import choose_dtype
from utils.manifest import Manifest
from utils.phantoms import draw_phantom
from utils.pictures import read_slice, save_slice, to_uint8

CPU = torch.device("cpu")
DTYPES = [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.skipif(
    choose_dtype("auto", CPU) != torch.bfloat16, reason="a CPU without bfloat16 units is slow"))]
SHAPE = (1, 64, 64)  # of the shipped model's slices


@pytest.fixture(scope="module")
def shipped():
    return load_model(SHIPPED["64"], CPU)


def draw(model, seeds, config=SamplerConfig(steps=4), batch_size=4, dtype=torch.float32,
         guide=None, **guidance) -> dict[int, np.ndarray]:
    denoise = Denoiser(model.net, model.scheduler, guide, dtype=dtype, patch_size=2, **guidance)
    return {slice_.seed: to_uint8(image)[0].numpy().astype(int)
            for images, slices in generate(model, seeds, config, denoise, batch_size)
            for image, slice_ in zip(images, slices)}


@pytest.mark.parametrize("config", [
    SamplerConfig("ddpm", 2), SamplerConfig("ddim", 2), SamplerConfig("ddim", 2, eta=0.7),
    SamplerConfig("dpmpp", 3), SamplerConfig("dpmpp", 3, eta=0.7), SamplerConfig("heun", 2),
    SamplerConfig("heun", 2, churn=1.0)], ids=lambda c: f"{c.sampler}-{c.eta}-{c.churn}")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_slice_depends_on_its_seed_alone(shipped, config, dtype):
    many = draw(shipped, [5, 6, 7, 8, 9], config, dtype=dtype)
    fewer = draw(shipped, [8, 9], config, dtype=dtype)  # other count, start, place
    backwards = draw(shipped, [9, 8, 7, 6, 5], config, dtype=dtype)
    for seed in (8, 9):
        assert (many[seed] == fewer[seed]).all()
    for seed in many:
        assert (many[seed] == backwards[seed]).all()
    assert (many[5] != many[6]).any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sampler, steps", [("ddim", 5), ("ddpm", 5), ("dpmpp", 5), ("heun", 10)])
def test_batch_size_changes_next_to_nothing(shipped, sampler, steps, dtype):
    config = SamplerConfig(sampler, steps)
    reference = draw(shipped, [0, 1, 2], config, 1, dtype)
    for size in (2, 5):
        other = draw(shipped, [0, 1, 2], config, size, dtype)
        for seed in reference:
            difference = np.abs(reference[seed] - other[seed])
            # In bfloat16 a few coarse steps amplify the kernels' rounding at single pixels.
            assert difference.max() <= 2 if dtype == torch.float32 else difference.mean() < 1


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


def test_a_guide_that_is_the_model_changes_nothing_and_the_other_options_do(shipped):
    plain = draw(shipped, [1])
    for guidance, interval in ((1.0, (0, math.inf)), (3.0, (0, math.inf)), (3.0, (1e4, 1e5))):
        same = draw(shipped, [1], guide=shipped.net, guidance=guidance,
                    guidance_interval=interval)
        assert np.abs(plain[1] - same[1]).max() <= 1  # rounding
    weaker = draw(shipped, [1], guide=lambda x, t, labels: torch.zeros_like(x),
                  guidance=1.2)
    scaled = draw(shipped, [1], epsilon_scale=1.02)
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
    (dict(classes=["CDR 2", "CDR 1", "CDR 0.5", "CDR 0"]), ["classes", "CDR 0.5"]),
])
def test_guides_of_something_else_are_rejected(make_run, tmp_path, rejected, changes, words):
    guide = tmp_path / "guide.safetensors"
    if changes is None:
        run = make_run()
        run.export()
        guide = run.folder / "model.safetensors"
    else:
        with safe_open(SHIPPED["64"], framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            configs = {name: json.loads(file.metadata()[name]) for name in ("scheduler", "labels")}
            if "classes" in changes:
                configs["labels"] |= changes
            else:
                configs["scheduler"] = asdict(make_scheduler_config(**changes))
            save_file(tensors, guide, file.metadata() | {
                name: json.dumps(config) for name, config in configs.items()})
    rejected("predict.py", ["--model", "64", "--guide", guide], "--guide", guide.name, *words)


def test_the_shipped_model_draws_brains(shipped):
    """Against real slices' statistics (the data's README), not against earlier output."""
    pictures = np.stack(list(draw(shipped, list(range(8)), QUALITY["default"],
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
    with pytest.raises(UserError, match="neither a checkpoint nor"):
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
                             ("scheduler", "prediction_type", "noise"),
                             ("labels", "classes", ("CDR 0", "CDR 1")),
                             ("labels", "height_range", (5, 5))):
        wrong = {**content, part: {**content[part], key: value}}
        torch.save(wrong, tmp_path / "wrong.pt")
        with pytest.raises(UserError, match="wrong.pt: its weights and its configs do not fit"):
            load_model(tmp_path / "wrong.pt", CPU)
    torch.save({key: content[key] for key in content if key != "labels"}, tmp_path / "wrong.pt")
    with pytest.raises(UserError, match="wrong.pt.*0 labels for label_dim"):
        load_model(tmp_path / "wrong.pt", CPU)
    for without in ("unet", "scheduler"):
        with safe_open(run.folder / "model.safetensors", framework="pt") as file:
            metadata = {key: value for key, value in file.metadata().items() if key != without}
            save_file({name: file.get_tensor(name) for name in file.keys()},
                      tmp_path / "part.safetensors", metadata)
        with pytest.raises(UserError, match="part.safetensors: is damaged"):
            load_model(tmp_path / "part.safetensors", CPU)
    torch.save({"format": FORMAT, "ema": None}, tmp_path / "wrong.pt")
    with pytest.raises(UserError, match="--init .*wrong.pt: holds no EMA weights"):
        run.initialise(tmp_path / "wrong.pt")


# The command: files, seeds, conditions ----------------------------------------------------------


@pytest.fixture
def tiny(make_run, tmp_path, monkeypatch):
    """tiny(*options) runs predict.py on a 16-pixel model conditioned on heights -> its folder.

    The net's weights are random, so that its slices depend on all that it is given.
    """
    run = make_run()
    with torch.no_grad():
        for index, parameter in enumerate(run.ema.net.parameters()):
            generator = torch.Generator().manual_seed(index)
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    run.export()

    def call_predict(*options, out="out"):
        monkeypatch.setattr(sys, "argv", list(map(str, [
            "predict.py", "--checkpoint", run.folder, "--steps", 3, "--device", "cpu", "--dtype",
            "float32", "--out", tmp_path / out, *options])))
        predict.main()
        return tmp_path / out
    call_predict.checkpoint = run.folder
    return call_predict


def rows_of(folder) -> list[dict]:
    with (folder / "manifest.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("suffix, error", [(".png", 0.5), (".nii", 0.5), (".npy", 0)])
def test_formats_hold_the_image(tmp_path, suffix, error):
    image = torch.rand(6, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    path = tmp_path / f"slice{suffix}"
    save_slice(image, path, 1.0)
    assert torch.equal(read_slice(path), to_uint8(image))
    if suffix == ".npy":
        assert (np.load(path) == image.numpy()).all()
    assert (read_slice(path) - (image + 1) * 127.5).abs().max() <= 0.5 + 1e-4


def test_seeds_are_listed_and_batches_no_larger_than_the_slices(tiny):
    out = tiny("--seeds", "7,3-4,7", "--format", "png", "npy")
    assert sorted(path.name for path in out.glob("slice_*")) == [
        f"slice_{seed:06d}.{suffix}" for seed in (3, 4, 7) for suffix in ("npy", "png")]
    rows = rows_of(out)
    assert [row["seed"] for row in rows] == ["7", "7", "3", "3", "4", "4"]
    assert {row["batch_size"] for row in rows} == {"3"} and rows[0]["network_calls"] == "3"
    digest = hashlib.sha256((tiny.checkpoint / "model.safetensors").read_bytes()).hexdigest()
    assert {row["weights_sha256"] for row in rows} == {digest}
    assert float(rows[0]["position"]) == seed_height(7)
    assert json.loads((out / "samples.json").read_text())["network_calls"] == 3
    with Image.open(out / "reverse.gif") as film:
        assert film.size == (32, 16) and film.n_frames == 4  # x_t and x_0, 3 steps and the image


def test_a_second_call_draws_only_what_is_missing_or_damaged(tiny, capsys):
    out = tiny("--num", 4)
    before = {path.name: path.read_bytes() for path in out.glob("slice_*")}
    (out / "slice_000001.png").unlink()
    (out / "slice_000002.png").write_bytes(before["slice_000002.png"][:-9])
    with (out / "manifest.csv").open("a") as file:
        file.write("slice_000009.png,cut of")  # as by a loss of power
    times = {path.name: path.stat().st_mtime_ns for path in out.glob("slice_*")}
    tiny("--num", 4)
    assert {path.name: path.read_bytes() for path in out.glob("slice_*")} == before
    drawn = [name for name in times if (out / name).stat().st_mtime_ns != times[name]]
    assert drawn == ["slice_000002.png"] and len(rows_of(out)) == 4
    tiny("--num", 5)  # more of the same
    assert len(rows_of(out)) == 5
    (out / "reverse.png").unlink()
    tiny("--num", 5)
    assert "reverse.png" not in capsys.readouterr().out.splitlines()[-1]
    assert json.loads((out / "samples.json").read_text())["network_calls"] == 3


@pytest.mark.parametrize("before", [[], ["--format", "png"]], ids=["new", "more formats"])
def test_an_interrupted_call_continues(tiny, monkeypatch, before):
    """Stopped between a batch's files and its rows, in a folder that was empty or complete."""
    options = ["--num", 5, "--batch-size", 2, "--format", "png", "npy"]
    whole = tiny(*options, out="whole")
    if before:
        tiny("--num", 5, "--batch-size", 2, *before)
    real, calls = Manifest.append, []

    def append(self, rows):
        calls.append(rows)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(self, rows)
    monkeypatch.setattr(Manifest, "append", append)
    with pytest.raises(KeyboardInterrupt):
        tiny(*options)
    monkeypatch.undo()
    out = tiny(*options)
    assert {path.name: path.read_bytes() for path in out.glob("slice_*")} == \
        {path.name: path.read_bytes() for path in whole.glob("slice_*")}
    rows = rows_of(out)
    assert len(rows) == len({row["file"] for row in rows}) == 10
    assert all(row["crc32"] and row["network_calls"] == "3" for row in rows)


@pytest.mark.long
def test_two_ranks_draw_what_one_does(tiny, tmp_path):
    alone, shared = tiny("--num", 7, "--batch-size", 2), tmp_path / "shared"
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         "--", ROOT / "predict.py", "--checkpoint", tiny.checkpoint, "--steps", "3", "--device",
         "cpu", "--dtype", "float32", "--out", shared, "--num", "7", "--batch-size", "2"],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("7 slices of") == 1
    names = sorted(path.name for path in alone.iterdir())
    assert sorted(path.name for path in shared.iterdir()) == names and len(names) == 12
    for name in names:
        if name.endswith(".png"):
            assert (shared / name).read_bytes() == (alone / name).read_bytes(), name
    ours, theirs = ({row["file"]: row for row in rows_of(folder)} for folder in (shared, alone))
    assert ours == theirs and len(ours) == 7


def test_folders_of_something_else_are_rejected(tiny, tmp_path, rejected):
    out = tiny("--num", 1)
    other = ["--checkpoint", tiny.checkpoint, "--device", "cpu", "--dtype", "float32", "--out", out]
    rejected("predict.py", [*other, "--steps", 2, "--num", 1], "manifest.csv", "steps = 3, now 2")
    rejected("predict.py", [*other, "--steps", 3, "--num", 1, "--position", 0.25], "position",
            "now 0.25")
    (out / "slice_000001.png").touch()
    rejected("predict.py", [*other, "--steps", 3, "--num", 2], "slice_000001.png",
             "no file of manifest")
    (out / "slice_000001.png").unlink()
    (out / "manifest.csv").write_bytes(b"")
    rejected("predict.py", [*other, "--steps", 3, "--num", 1], "holds other files", "manifest.csv")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.txt").touch()
    rejected("predict.py", [*other[:-1], tmp_path / "photos"], "photos", "cat.txt", "manifest.csv")
    assert (tmp_path / "photos" / "cat.txt").exists()


def test_a_stack_is_one_noise_at_all_heights(tiny, shipped):
    out = tiny("--stack", "--seed", 5, "--num", 3)
    single = tiny("--position", 0.5, "--seed", 5, "--num", 1, "--batch-size", 1, out="single")
    middle = read_slice(out / "slice_000005_height_0.5000.png").int()
    assert (middle - read_slice(single / "slice_000005.png")).abs().max() <= 1
    volume = nibabel.load(out / "stack.nii.gz")
    assert nibabel.aff2axcodes(volume.affine) == ("L", "A", "S")
    # 16 pixels stand for 208 mm, and 8 training heights, 7 mm, for three slices.
    assert volume.header.get_zooms() == (13.0, 13.0, 3.5)
    assert volume.shape == (16, 16, 3)
    planes = upright(volume, "stack")[0][:, ::-1, 1].T  # as tools.prepare cuts volumes
    assert (np.asarray(planes) == middle.numpy()).all()
    with Image.open(out / "scan.gif") as film:
        assert film.n_frames == 3
    assert len(list(tiny("--position", "all", out="all").glob("slice_*"))) == 8  # as in training


def test_interpolation_runs_over_the_sphere(tiny, shipped):
    noise = slice_noise([Slice(1), Slice(1, None, None, 2, 0.0), Slice(1, None, None, 2, 0.3),
                         Slice(1, None, None, 2, 1.0)], (1, 100, 100))()
    first, other = torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)
    a, b = (torch.randn(1, 100, 100, generator=g) for g in (first, other))
    assert torch.equal(noise[0], a) and torch.equal(noise[1], a)
    torch.testing.assert_close(noise[3], b, rtol=0, atol=1e-6)
    mixed = math.cos(0.3 * math.pi / 2) * a + math.sin(0.3 * math.pi / 2) * b
    torch.testing.assert_close(noise[2], mixed)
    assert noise[2].std().item() == pytest.approx(1, abs=0.03)

    out = tiny("--interpolate", 3, 17, "--num", 3)
    ends = tiny("--seeds", "3,17,20", out="ends")  # the batch has the same size
    for name, seed in (("0.0000", 3), ("1.0000", 17)):
        frame = read_slice(out / f"slice_000003_000017_{name}.png").int()
        assert (frame - read_slice(ends / f"slice_{seed:06d}.png")).abs().max() <= 1
    with Image.open(out / "interpolation.gif") as film:
        assert film.n_frames == 3


@pytest.fixture
def picture(tmp_path):
    """A phantom of 16 pixels as a file, and its levels."""
    pixels = draw_phantom(16, 3, 0.5)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    return tmp_path / "picture.png", torch.from_numpy(pixels)


def test_strength_is_how_far_an_image_is_noised(picture):
    """A net that always means the noise of x_t to be what was added gives the image back."""
    scheduler = NoiseScheduler(make_scheduler_config("cosine", prediction_type="sample"))
    image = picture[1][None] / 127.5 - 1
    states = []
    for strength in (0.1, 0.4, 1.0):
        denoise = Denoiser(lambda x, t: torch.zeros_like(x), scheduler)
        walk = list(reverse_process(denoise, seeded_noise([1], (1, 16, 16)), SamplerConfig(steps=8),
                                    init=image, strength=strength))
        levels = noise_levels(scheduler, SamplerConfig(steps=8), strength)
        noise = seeded_noise([1], (1, 16, 16))()
        torch.testing.assert_close(walk[0][0],
                                   levels[0].signal * image + levels[0].noise * noise)
        assert len(walk) == len(levels)
        states.append(levels[0].timestep / 999)
    assert states == pytest.approx([0.1, 0.4, 1.0], rel=0.01)


def test_a_mask_keeps_the_rest(tiny, picture, tmp_path):
    path, levels = picture
    mask = np.zeros((16, 16), np.uint8)
    mask[4:9, 5:12] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    out = tiny("--init", path, "--mask", tmp_path / "mask.png", "--num", 2)
    for seed in (0, 1):
        drawn = read_slice(out / f"slice_{seed:06d}.png")
        assert (drawn == levels)[torch.from_numpy(mask == 0)].all()
        assert (drawn != levels)[torch.from_numpy(mask > 0)].any()


def test_a_mask_does_not_stay_with_the_denoiser(make_run):
    run = make_run()
    run.export()
    model = load_model(run.folder / "model.safetensors", torch.device("cpu"))
    denoise = Denoiser(model.net, model.scheduler)
    few, plain = SamplerConfig(steps=2), list(generate(model, [0], denoise=denoise, batch_size=1))
    init, mask = torch.ones(1, 16, 16), torch.zeros(1, 16, 16, dtype=torch.bool)
    [(filled, _)] = generate(model, [0], few, denoise, 1, init, mask)
    assert (filled == 1).all()
    assert torch.equal(list(generate(model, [0], denoise=denoise, batch_size=1))[0][0], plain[0][0])
    with pytest.raises(ValueError, match="init"):
        next(generate(model, [0], mask=mask))
    with pytest.raises(ValueError, match="class_: 'CDR 9' is not one of"):
        next(generate(model, [Slice(0, class_="CDR 9")]))
    seeds = np.arange(2)
    assert [s.seed for _, part in generate(model, seeds, few) for s in part] == [0, 1]


def test_a_filled_region_follows_what_is_around_it():
    """Of an image of which all pixels are equal, one pixel is known: the rest has to follow.

    The net knows the law: it gives the mean of x_t over signal, weighted over all pixels.
    """
    scheduler = NoiseScheduler(make_scheduler_config("cosine", prediction_type="sample"))

    def net(x, timesteps):
        signal = scheduler.level(timesteps[0].item()).signal
        return (x.mean((2, 3), keepdim=True) / signal).expand_as(x)
    denoise = Denoiser(net, scheduler)
    image, mask = torch.full((1, 16, 16), 0.5), torch.zeros(1, 16, 16, dtype=torch.bool)
    mask[:, :8] = True
    denoise.known = image, mask
    *_, (drawn, _) = reverse_process(denoise, seeded_noise([4], (1, 16, 16)),
                                     SamplerConfig("ddpm", 200))
    torch.testing.assert_close(drawn[0], image, rtol=0, atol=0.1)


def test_resampling_fills_in_by_the_conditional_distribution():
    """Two Gaussian pixels of correlation 0.9; the first is known to be 1. Then the second has mean
    0.9 and variance 0.19. Without resampling, it heeds its neighbour too late (Lugmayr et al.)."""
    scheduler = NoiseScheduler(replace(make_scheduler_config(
        "cosine", prediction_type="sample"), clip_sample=False))
    covariance = torch.tensor([[1, 0.9], [0.9, 1]], dtype=torch.float64)

    def net(x, timesteps):
        level = scheduler.level(timesteps[0].item())
        gain = level.signal * covariance @ torch.linalg.inv(
            level.signal**2 * covariance + level.noise**2 * torch.eye(2))
        return (x[:, 0, 0].double() @ gain.T).float()[:, None, None]

    def filled(resample):
        denoise, generator = Denoiser(net, scheduler), torch.Generator().manual_seed(0)
        denoise.known = torch.ones(1, 1, 2), torch.tensor([[[False, True]]])
        *_, (drawn, _) = reverse_process(
            denoise, lambda: torch.randn(4000, 1, 1, 2, generator=generator),
            SamplerConfig("heun", 40, resample=resample))
        assert (drawn[..., 0] == 1).all()
        return drawn[..., 1]
    once, often = filled(1), filled(16)
    assert abs(once.mean().item() - 0.9) > 0.3 and abs(once.var().item() - 0.19) > 0.3
    assert abs(often.mean().item() - 0.9) < 0.04 and abs(often.var().item() - 0.19) < 0.03


def test_churn_is_spread_over_all_steps_when_they_are_resampled(shipped):
    """Heun adds noise up to (1 + churn / steps) times sigma, whether steps are resampled or not."""
    highest = []
    for resample in (1, 2):
        levels, scheduler = [], NoiseScheduler(make_scheduler_config("cosine"))
        denoise = Denoiser(lambda x, t: levels.append(t[0].item()) or torch.zeros_like(x),
                           scheduler)
        config = SamplerConfig("heun", 10, churn=1.0, sigma_max=50, resample=resample)
        list(reverse_process(denoise, seeded_noise([0], (1, 4, 4)), config))
        highest.append(max(scheduler.level(t).sigma for t in levels))
    assert highest == pytest.approx([50 * 1.1] * 2, rel=0.01)


def test_wrong_use_is_one_line(tiny, picture, tmp_path, rejected, make_run):
    def attempt(args, *words):
        rejected("predict.py", ["--checkpoint", tiny.checkpoint, "--steps", 2, "--num", 1, *args],
                *words)
    path = picture[0]
    (tmp_path / "text.png").write_text("hello")
    Image.new("RGB", (16, 16), (200, 30, 20)).save(tmp_path / "colour.png")
    Image.new("L", (16, 16)).save(tmp_path / "black.png")
    Image.new("L", (12, 16), 255).save(tmp_path / "narrow.png")
    attempt(["--position", "1.5"], "--position", "'1.5'", "0 to 1")
    attempt(["--strength", "0"], "--strength", "'0'", "above 0")
    attempt(["--strength", "0.4"], "--strength needs --init")
    attempt(["--mask", path], "--mask needs --init")
    for name in ("text.png", "colour.png", "black.png", "nowhere.png"):
        attempt(["--init", tmp_path / name], name)
    Image.fromarray(np.uint8(np.eye(16) * 100)).save(tmp_path / "map.png")
    attempt(["--init", tmp_path / "map.png"], "map.png", "few grey levels", "--few-levels")
    attempt(["--init", tmp_path / "map.png", "--few-levels", "--mask", tmp_path / "black.png"],
            "nothing to fill")
    attempt(["--init", path, "--mask", tmp_path / "black.png"], "black.png", "nothing to fill")
    attempt(["--init", path, "--mask", tmp_path / "narrow.png"], "narrow.png", "12x16", "16x16")
    attempt(["--seeds", "1-0"], "--seeds", "'1-0'")
    attempt(["--seeds", "0-2147483647"], "--seeds", "more than 1,000,000")
    attempt(["--stack", "--num", "10002"], "--num 10002", "10001")
    attempt(["--interpolate", "1", "2", "--num", "10002"], "--num 10002", "10001")
    attempt(["--seeds", "3"], "--seeds", "--num")
    attempt(["--stack", "--position", "0.5"], "--stack", "--position")
    attempt(["--stack", "--interpolate", "1", "2"], "--stack", "--interpolate")
    attempt(["--interpolate", "1", "2", "--seed", "4"], "--interpolate", "--seed")
    plain = make_run("unconditional", labels=LabelConfig(), augment=0.0)
    plain.export()
    for args, *words in ((["--stack"], "--stack", "without heights"),
                         (["--class", "CDR 1"], "--class", "without classes"),
                         (["--guidance", "2"], "--guidance", "--guide")):
        rejected("predict.py", ["--checkpoint", plain.folder, *args], *words)
    rejected("predict.py", ["--model", "native", "--init", path], "picture.png", "16x16", "176x208")
    rejected("tools.evaluate", ["--data", tmp_path, "--position", "all"], "--position all")
    rejected("tools.conditions", ["--class", "CDR 1"], "--position and --class")
    rejected("tools.conditions", ["--model", "64", "--steps", "2000", "--spacing", "trailing"],
             "--steps: 2000", "1000")

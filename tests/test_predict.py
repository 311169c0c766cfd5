"""Sampling: a slice depends on its seed alone, whatever else is asked for."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from predict import generate, load_model
from train import finish, train
from utils.checkpoint import SHIPPED, find_model
from utils.cli import UserError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def shipped():
    return load_model(SHIPPED, CPU)


def draw(model, out, seeds, batch_size=4, steps=4, sampler="ddim", eta=0.0,
         dtype=torch.float32) -> dict[int, np.ndarray]:
    generate(model, seeds, out, batch_size, steps, sampler=sampler, eta=eta, device=CPU,
             dtype=dtype)
    return {s: np.asarray(Image.open(out / f"slice_{s:06d}.png")).astype(int) for s in seeds}


@pytest.mark.parametrize("sampler, eta", [("ddim", 0.0), ("ddim", 0.7), ("ddpm", 0.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_slice_depends_on_its_seed_alone(shipped, tmp_path, sampler, eta, dtype):
    how = dict(sampler=sampler, eta=eta, dtype=dtype)
    many = draw(shipped, tmp_path / "a", [5, 6, 7, 8, 9], **how)
    fewer = draw(shipped, tmp_path / "b", [8, 9], **how)  # other count, start, place in the batch
    backwards = draw(shipped, tmp_path / "c", [9, 8, 7, 6, 5], **how)
    for seed in (8, 9):
        assert (many[seed] == fewer[seed]).all()
    for seed in many:
        assert (many[seed] == backwards[seed]).all()
    assert (many[5] != many[6]).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_batch_size_changes_next_to_nothing(shipped, tmp_path, sampler, dtype):
    reference = draw(shipped, tmp_path / "a", [0, 1, 2], 1, 20, sampler, dtype=dtype)
    for size in (2, 7):
        other = draw(shipped, tmp_path / str(size), [0, 1, 2], size, 20, sampler, dtype=dtype)
        for seed in reference:
            assert np.abs(reference[seed] - other[seed]).max() <= 2


def test_files_are_rounded_grayscale(shipped, tmp_path):
    images, states = generate(shipped, [3], tmp_path, 1, 3, sampler="ddim", eta=0.0, device=CPU,
                              dtype=torch.float32)
    with Image.open(tmp_path / "slice_000003.png") as picture:
        assert picture.mode == "L" and picture.size == (64, 64)
        exact = (images[0, 0].numpy().clip(-1, 1) + 1) * 127.5
        assert np.abs(np.asarray(picture) - exact).max() <= 0.5 + 1e-4
    assert states.shape == (4, 1, 64, 64)
    assert torch.equal(states[-1], images[0])
    assert states[0].std() == pytest.approx(1, abs=0.05)  # the strip starts at pure noise


def test_the_shipped_model_draws_brains(shipped, tmp_path):
    """Against real slices' statistics (the data's README), not against earlier output."""
    pictures = np.stack(list(draw(shipped, tmp_path, list(range(8)), 8, 25).values()))
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
        assert torch.equal(tensor, run.ema.net.state_dict()[name])  # the averaged weights
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

"""The scripts as a person calls them: exit codes, one clear line, and the files that appear."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

SMALL = ["--image-size", "16", "--block-out-channels", "32", "32", "--batch-size", "4",
         "--device", "cpu", "--dtype", "float32"]


def call(script, *args, cwd):
    return subprocess.run([sys.executable, ROOT / script, *map(str, args)], cwd=cwd,
                          capture_output=True, text=True, timeout=300)


@pytest.fixture
def data(tmp_path):
    """Twelve real PNG files of three people in train, four of one in validate."""
    rng = np.random.default_rng(0)
    for split, people in (("train", (1, 2, 3)), ("validate", (4,))):
        (tmp_path / "data" / split).mkdir(parents=True)
        for person in people:
            for number in range(4):
                pixels = rng.integers(0, 255, (20, 16), np.uint8)
                Image.fromarray(pixels).save(
                    tmp_path / "data" / split / f"case_{person:03d}_slice_{number}.png")
    return tmp_path / "data"


def refused(result, *words):
    assert result.returncode == 2, result.stderr
    lines = [line for line in result.stderr.splitlines() if not line.startswith("decoding")]
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    for word in words:
        assert word in lines[0]


def test_train_continue_predict(data, tmp_path):
    first = call("train.py", "--data", data, "--run", "r", *SMALL, "--steps", 4, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    more = call("train.py", "--data", data, "--run", "r", *SMALL, "--steps", 6, cwd=tmp_path)
    assert more.returncode == 0 and "step 4 of 6" in more.stdout, more.stderr
    again = call("train.py", "--data", data, "--run", "r", *SMALL, "--steps", 6, cwd=tmp_path)
    assert again.returncode == 0 and "step 6 of 6" in again.stdout
    refused(call("train.py", "--data", data, "--run", "r", *SMALL, "--steps", 6, "--seed", 9,
                 cwd=tmp_path), "seed = 0, now 9", "--run")

    result = call("predict.py", "--checkpoint", "r", "--num", 3, "--seed", 41, "--steps", 3,
                  "--batch-size", 2, "--out", "o", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert sorted(p.name for p in (tmp_path / "o").iterdir()) == [
        "grid.png", "reverse.png", "samples.json", "slice_000041.png", "slice_000042.png",
        "slice_000043.png"]
    assert not (tmp_path / "o" / "slice_000041.png").read_bytes().startswith(b"error")


def test_train_refuses(data, tmp_path):
    def attempt(*args):
        return call("train.py", "--run", "r", *SMALL, "--steps", 2, *args, cwd=tmp_path)
    refused(attempt("--data", tmp_path / "nowhere"), "nowhere", "no such folder")
    refused(attempt("--data", data, "--image-size", "17"), "--image-size", "17x17", "divisible")
    refused(attempt("--data", data, "--image-size", "big"), "--image-size big")
    refused(attempt("--data", data, "--image-size", "native", "--patch-size", "8"),
            "--image-size", "20x16")
    refused(attempt("--data", data, "--batch-size", "13"), "--batch-size 13", "12")
    refused(attempt("--data", data, "--batch-size", "4", "--accumulate", "3"), "--accumulate 3")
    refused(attempt("--data", data, "--device", "abacus"), "--device", "abacus")
    refused(attempt("--data", data, "--steps", "none"), "--steps", "'none'")
    refused(attempt("--data", data, "--schedule", "zero-snr", "--prediction-type", "epsilon"),
            "prediction_type")
    (tmp_path / "r").write_text("a file")
    refused(attempt("--data", data), "r/config.json: cannot be written")


def test_train_names_bad_slices(data, tmp_path):
    (data / "train" / "case_001_slice_0.png").write_text("not a picture")
    refused(call("train.py", "--data", data, "--run", "r", *SMALL, cwd=tmp_path),
            "case_001_slice_0.png", "cannot be read")
    assert not (tmp_path / "r").exists()


def test_predict_refuses(tmp_path):
    (tmp_path / "text.pt").write_text("hello")
    torch.save({"state_dict": {}}, tmp_path / "other.pt")
    for args, words in [
            (["--checkpoint", "text.pt"], ["text.pt"]),
            (["--checkpoint", "other.pt"], ["other.pt", "something else"]),
            (["--checkpoint", "nowhere"], ["nowhere"]),
            (["--checkpoint", "latest"], ["latest", "train"]),
            (["--steps", "2000"], ["--steps 2000", "1000"]),
            (["--eta", "2"], ["--eta 2"]),
            (["--seed", "-1"], ["--seed", "'-1'"]),
            (["--sampler", "magic"], ["--sampler", "magic"])]:
        refused(call("predict.py", *args, cwd=tmp_path), *words)


def test_inspect(data, tmp_path):
    result = call("dataset.py", "inspect", data, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "12 slices     3 people" in result.stdout
    assert (tmp_path / "inspect.png").exists()
    refused(call("dataset.py", "inspect", tmp_path / "nowhere", cwd=tmp_path), "nowhere")


@pytest.mark.parametrize("script", ["train.py", "predict.py", "dataset.py"])
def test_help_gives_every_default(script, tmp_path):
    result = call(script, "--help", cwd=tmp_path)
    assert result.returncode == 0 and "usage" in result.stdout

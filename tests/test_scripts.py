"""The scripts as users call them: exit codes, one clear line, and the files that appear."""

import importlib
import os
import re
import signal
import subprocess
import sys
import threading

import pytest
import torch
from conftest import ROOT, SMALL, call, command
from PIL import Image

import train
from utils import device
from utils.checkpoint import newest_checkpoint
from utils.cli import run_cli
from utils.distributed import local_device
from utils.train_options import PRESETS


def test_train_continue_predict(data, tmp_path, rejected):
    run = ["--data", data, "--run", "r", *SMALL]
    first = call("train.py", *run, "--steps", 4, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    more = call("train.py", *run, "--steps", 6, cwd=tmp_path)
    assert more.returncode == 0 and "step 4 of 6" in more.stdout, more.stderr
    assert (tmp_path / "r" / "results.json").exists()
    rejected("train.py", [*run, "--steps", 6, "--seed", 9], "seed = 0, now 9", "--run")

    result = call("predict.py", "--checkpoint", "r", "--num", 3, "--seed", 41, "--steps", 3,
                  "--batch-size", 2, "--out", "o", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert sorted(p.name for p in (tmp_path / "o").iterdir()) == [
        "grid.png", "manifest.csv", "reverse.gif", "reverse.png", "samples.json",
        "slice_000041.png", "slice_000042.png",
        "slice_000043.png"]
    with Image.open(tmp_path / "o" / "slice_000042.png") as picture:
        assert picture.size == (16, 16) and picture.mode == "L"
    with Image.open(tmp_path / "o" / "grid.png") as picture:
        assert picture.size == (3 * 17 + 1, 18)


def test_train_rejects(data, tmp_path, rejected):
    def attempt(args, *words):
        rejected("train.py", ["--run", "r", *SMALL, "--steps", 2, "--data", data, *args], *words)
    attempt(["--data", tmp_path / "nowhere"], "nowhere", "no such folder")
    attempt(["--image-size", "17"], "--image-size", "17x17", "divisible")
    attempt(["--image-size", "big"], "--image-size", "'big'")
    attempt(["--image-size", "native", "--patch-size", "8"], "--image-size", "20x16")
    attempt(["--batch-size", "13"], "--batch-size 13", "12")
    attempt(["--batch-size", "4", "--accumulate", "3"], "--accumulate 3")
    attempt(["--device", "abacus"], "--device", "abacus")
    attempt(["--steps", "none"], "--steps", "'none'")
    attempt(["--ema-short", "0.5"], "--ema-short", "0.28")
    attempt(["--p-mean", "nan"], "--p-mean", "finite")
    attempt(["--num-train-timesteps", "3"], "--num-train-timesteps", "from 4 on")
    attempt(["--condition", "none", "height"], "--condition none height")
    attempt(["--schedule", "zero-snr", "--prediction-type", "epsilon"], "prediction_type")
    (tmp_path / "r").write_text("a file")
    attempt([], "cannot be written")


def test_train_names_bad_slices(data, tmp_path, rejected):
    (data / "train" / "case_001_slice_0.png").write_text("not a picture")
    rejected("train.py", ["--data", data, "--run", "r", *SMALL], "case_001_slice_0.png",
            "cannot be read")
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("args, words", [
    (["--checkpoint", "text.pt"], ["text.pt"]),
    (["--checkpoint", "other.pt"], ["other.pt", "something else"]),
    (["--checkpoint", "nowhere"], ["nowhere"]),
    (["--checkpoint", "latest"], ["latest", "train"]),
    (["--steps", "2000", "--spacing", "trailing"], ["--steps", "2000", "1000"]),
    (["--steps", "0"], ["--steps", "at least 1"]),
    (["--eta", "2"], ["--eta", "0 to 1"]),
    (["--sampler", "heun", "--eta", "0.5"], ["--eta", "heun", "ddim"]),
    (["--churn", "5"], ["--churn", "dpmpp", "heun"]),
    (["--rho", "0"], ["--rho"]),
    (["--resample", "0"], ["--resample", "at least 1"]),
    (["--sigma-min", "5", "--sigma-max", "2"], ["--sigma-min", "sigma_max"]),
    (["--sigma-min", "0", "--sigma-max", "0.001"], ["--sigma-min", "training"]),
    (["--quality", "best", "--sampler", "ddim"], ["--quality", "--sampler"]),
    (["--quality", "great"], ["--quality", "great"]),
    (["--model", "64", "--guidance-interval", "0", "1"], ["--guidance-interval", "--guide"]),
    (["--guide", "nowhere"], ["--guide nowhere"]),
    (["--guide", "text.pt"], ["text.pt", "damaged"]),
    (["--guide", "text.pt", "--guidance", "nan"], ["--guidance nan"]),
    (["--guide", "text.pt", "--guidance-interval", "3", "1"], ["--guidance-interval 3.0 1.0"]),
    (["--epsilon-scale", "0"], ["--epsilon-scale", "'0'"]),
    (["--seed=-1"], ["--seed", "'-1'"]),
    (["--sampler", "magic"], ["--sampler", "magic"]),
    (["--device", "abacus"], ["--device", "abacus"]),
    (["--out", "text.pt", "--num", "1", "--steps", "1", "--batch-size", "1"],
     ["text.pt", "cannot be opened"]),
])
def test_predict_rejects(tmp_path, rejected, args, words):
    (tmp_path / "text.pt").write_text("hello")
    torch.save({"state_dict": {}}, tmp_path / "other.pt")
    rejected("predict.py", args, *words)


def test_inspect(data, tmp_path, rejected):
    result = call("tools.inspect", data, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "12 slices     3 subjects" in result.stdout
    with Image.open(tmp_path / "inspect.png") as picture:
        assert picture.size == (8 * 129 + 1, 2 * 129 + 1)
    rejected("tools.inspect", [tmp_path / "nowhere"], "nowhere")


@pytest.mark.parametrize("name", ["evaluate", "inspect", "prepare"])
def test_a_tool_started_as_a_file_says_how_to_start_it(name):
    done = subprocess.run([sys.executable, ROOT / "tools" / f"{name}.py"], capture_output=True,
                          text=True)
    assert done.returncode == 2 and done.stderr.splitlines() == [
        "error: give python -m tools.NAME, in the folder of README.md"]


def test_inspect_into_a_pipe_that_is_closed(data, tmp_path):
    """As by `python -m tools.inspect ROOT | head -1`."""
    process = subprocess.Popen(command("tools.inspect", data), cwd=tmp_path,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               env={**os.environ, "PYTHONPATH": str(ROOT)})
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 128 + signal.SIGPIPE


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_sigterm_saves_and_the_same_command_continues(data, tmp_path):
    command = [sys.executable, ROOT / "train.py", "--data", data, "--run", "r", *SMALL,
               "--steps", "100000", "--log-every", "1"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    alarm = threading.Timer(120, process.kill)
    alarm.start()
    for line in process.stdout:
        if line.startswith("step 3/"):
            process.send_signal(signal.SIGTERM)
            break
    rest, _ = process.communicate()
    alarm.cancel()
    assert process.returncode == 0 and "stopped by SIGTERM" in rest
    step = newest_checkpoint(tmp_path / "r")["step"]
    rows = (tmp_path / "r" / "metrics.csv").read_text().splitlines()
    assert step >= 3 and len(rows) == step + 1

    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    alarm = threading.Timer(120, process.kill)
    alarm.start()
    lines = [next(process.stdout), next(process.stdout)]
    process.kill()
    process.communicate()
    alarm.cancel()
    assert f"step {step} of" in lines[0] and lines[1].startswith(f"step {step + 1}/")


@pytest.mark.parametrize("script", ["train.py", "predict.py", "tools.prepare", "tools.inspect"])
def test_help_explains_every_option_and_its_default(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(script.removesuffix(".py")).main()
    text = capsys.readouterr().out
    assert stopped.value.code == 0
    body = text[text.index("options:"):].split("presets")[0]
    for option in re.split(r"\n  (?=-)", body)[2:]:  # past the heading and --help itself
        words = " ".join(option.split())
        from_preset = words.split()[0].lstrip("-").replace("-", "_") in PRESETS["64"]
        assert "(default: " in words or from_preset, words


def test_a_finished_run_is_not_tested_twice(data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", "--data", str(data), "--run", "r", *SMALL,
                                      "--steps", "2"])
    train.main()
    (tmp_path / "r" / ".checkpoint-00000001.pt.1.tmp").touch()
    results = (tmp_path / "r" / "results.json").stat().st_mtime_ns
    train.main()
    assert "finished before" in capsys.readouterr().out
    assert (tmp_path / "r" / "results.json").stat().st_mtime_ns == results
    sys.argv[-1] = "3"
    train.main()
    assert "step 2 of 3" in capsys.readouterr().out
    assert not list((tmp_path / "r").glob(".*.tmp"))


def test_a_gpu_that_torch_cannot_use_is_one_warning(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(device, "NVIDIA_DRIVER", tmp_path / "version")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert local_device("auto").type == "cpu" and not capsys.readouterr().err
    (tmp_path / "version").write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.57.02  Tue Jul 13 16:14:05 UTC 2021\n"
        "GCC version:  gcc version 9.4.0\n")
    assert local_device("auto").type == "cpu"
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("warning: the CPU is used")
    assert "driver 470.57.02" in lines[0] and f"torch {torch.__version__}" in lines[0]
    local_device("cpu")  # asked for
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    local_device("auto")
    assert not capsys.readouterr().err


def test_a_bug_is_not_called_out_of_memory():
    def broken():
        raise RuntimeError("unsupported memory format option")
    with pytest.raises(RuntimeError, match="memory format"):
        run_cli(broken)


def test_out_of_memory_is_one_line(data, tmp_path, rejected, monkeypatch):
    def greedy(self):
        torch.empty(2**60)
    monkeypatch.setattr(train.Run, "train_step", greedy)
    rejected("train.py", ["--data", data, "--run", "r", *SMALL], "out of memory",
            "smaller --batch-size", "larger --accumulate")


def test_imports_without_what_windows_lacks():
    """predict.py and the tools work there; train.py says in one line that it does not."""
    code = """
import signal, sys
for name in ("fcntl", "resource"):
    sys.modules[name] = None
for name in ("SIGUSR1", "SIGPIPE"):
    delattr(signal, name)
import predict, tools.inspect, tools.prepare, train
from utils.cli import run_cli
run_cli(train.main)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          timeout=300)
    assert done.returncode == 2
    assert done.stderr == "error: train.py needs Linux or macOS; on Windows, run it in WSL\n"

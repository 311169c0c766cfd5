"""Shared by the tests: the scripts on the path, real slices if they are at hand, a tiny run."""

import importlib
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

# A process of pytest-xdist has a core to itself: threads of several would wait for each other.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# Or matplotlib would build its font cache anew in every test's own cache folder.
os.environ.setdefault("MPLCONFIGDIR", tempfile.mkdtemp())

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dataset import AUGMENTATIONS, Slices
from modules import LabelConfig
from train import Run
from utils.cli import run_cli  # noqa: E402
from utils.configs import TrainConfig, UNetConfig, make_scheduler_config
from utils.phantoms import phantom_slices

LABELS = LabelConfig(height_range=(0, 7), augmentations=len(AUGMENTATIONS))
TINY = UNetConfig(sample_size=(16, 16), block_out_channels=(32, 64), layers_per_block=1,
                  attention_resolutions=(8,), dropout=0.1)


SMALL = ["--image-size", "16", "--block-out-channels", "32", "32", "--batch-size", "4",
         "--device", "cpu", "--dtype", "float32"]


def command(script, *args):
    """The words that start a script, train.py say, or a command, tools.prepare say."""
    return [sys.executable, *(["-m", script] if script.startswith("tools.") else [ROOT / script]),
            *map(str, args)]


def call(script, *args, cwd):
    """The script or command in a process of its own."""
    return subprocess.run(command(script, *args), cwd=cwd, capture_output=True, text=True,
                          timeout=300, env={**os.environ, "PYTHONPATH": str(ROOT)})


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a CUDA GPU; `pytest -m gpu` runs these alone")
    config.addinivalue_line("markers", "long: not run unless -m or -k chooses it; `pytest -m long`")
    if not (config.option.markexpr or config.option.keyword):
        config.option.markexpr = "not long"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """No test reads or fills the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def oasis() -> Path:
    """The folder of real slices: $OASIS_ROOT, or shared/oasis beside the checkout."""
    root = Path(os.environ.get("OASIS_ROOT", ROOT.parent / "shared" / "oasis"))
    if not (root / "train").is_dir():
        pytest.skip(f"no real slices in {root}; set OASIS_ROOT")
    return root


@pytest.fixture
def make_run(tmp_path):
    """make_run(name, **changes of TrainConfig) -> a Run on 40 phantoms of 16 pixels."""
    def make(name="run", unet=TINY, data=None, device=torch.device("cpu"), compile_net=False,
             labels=LABELS, **changes) -> Run:
        values = dict(data="phantoms", data_crc32=0, steps=8, batch_size=4, accumulate=1,
                      learning_rate=1e-3, warmup_steps=2, lr_schedule="cosine", weight_decay=0.0,
                      grad_clip=1.0, ema_length=0.1, seed=0, dtype="float32",
                      ema_short=0.05, augment=0.5)
        if data is None:
            images, names = phantom_slices(16, 0, 5)
            data = {"train": (images[:32], names[:32]), "validate": (images[32:], names[32:])}
        slices = {split: Slices(np.ascontiguousarray(images), names, device)
                  for split, (images, names) in data.items()}
        unet = replace(unet, label_dim=labels.dim)
        return Run(tmp_path / name, unet, make_scheduler_config("cosine"), labels,
                   TrainConfig(**{**values, **changes}), slices, device, compile_net)
    return make


@pytest.fixture
def rejected(tmp_path, monkeypatch, capsys):
    """rejected(script, args, *words): exit code 2, and one error line with the words on stderr.

    In this process, since a dozen starts of torch would take a minute.
    """
    def check(script, args, *words):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [script, *map(str, args)])
        with pytest.raises(SystemExit) as stopped:
            run_cli(importlib.import_module(script.removesuffix(".py")).main)
        *warnings, error = capsys.readouterr().err.splitlines()
        assert stopped.value.code == 2 and error.startswith("error: "), error
        assert all(line.startswith("warning: ") for line in warnings), warnings
        for word in words:
            assert word in error, error
    return check


@pytest.fixture
def data(tmp_path):
    """Twelve real PNG files of three subjects in train, four of one in validate."""
    rng = np.random.default_rng(0)
    for split, subjects in (("train", (1, 2, 3)), ("validate", (4,))):
        (tmp_path / "data" / split).mkdir(parents=True)
        for subject in subjects:
            for number in range(4):
                pixels = rng.integers(0, 255, (20, 16), np.uint8)
                Image.fromarray(pixels).save(
                    tmp_path / "data" / split / f"case_{subject:03d}_slice_{number}.png")
    return tmp_path / "data"

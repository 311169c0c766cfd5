"""Shared by the tests: the scripts on the path, real slices if they are at hand, a tiny run."""

import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
# Or matplotlib would build its font cache anew in every test's own cache folder.
os.environ.setdefault("MPLCONFIGDIR", tempfile.mkdtemp())
sys.path.insert(0, str(ROOT))

from dataset import Slices, phantom_slices  # noqa: E402
from modules import UNetConfig, make_scheduler_config  # noqa: E402
from train import Run, TrainConfig  # noqa: E402

TINY = UNetConfig(sample_size=(16, 16), block_out_channels=(32, 64), layers_per_block=1,
                  attention_resolutions=(8,), dropout=0.1)


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
    def make(name="run", unet=TINY, data=None, **changes) -> Run:
        values = dict(data="phantoms", data_crc32=0, steps=8, batch_size=4, accumulate=1,
                      learning_rate=1e-3, warmup_steps=2, lr_schedule="cosine", weight_decay=0.0,
                      grad_clip=1.0, ema_decay=0.99, flip=True, seed=0, dtype="float32")
        if data is None:
            images, names = phantom_slices(16, 0, 5)
            data = {"train": (images[:32], names[:32]), "validate": (images[32:], names[32:])}
        cpu = torch.device("cpu")
        slices = {split: Slices(np.ascontiguousarray(images), names, cpu)
                  for split, (images, names) in data.items()}
        return Run(tmp_path / name, unet, make_scheduler_config("cosine"),
                   TrainConfig(**{**values, **changes}), slices, cpu)
    return make

"""README's numbers and pictures against the files that hold the measurements."""

import json
import re
from dataclasses import asdict, fields, replace

import numpy as np
import pytest
import torch
from conftest import call
from PIL import Image

from dataset import load_splits
from predict import load_model
from tools.tables import BLOCK, PAGES, ROOT, TABLES, fill
from train import Run
from utils.checkpoint import SHIPPED
from utils.configs import QUALITY, TrainConfig
from utils.device import choose_dtype
from utils.files import sha256

DOCUMENTS = [ROOT / "README.md", ROOT / "weights" / "README.md",
             *sorted((ROOT / "docs").glob("*.md"))]


def test_the_tables_are_those_of_the_measurements():
    texts = [page.read_text(encoding="utf-8") for page in PAGES]
    assert [match[2] for text in texts for match in BLOCK.finditer(text)] == list(TABLES)
    assert [fill(text) for text in texts] == texts, "run: python -m tools.tables"


def test_links_and_pictures_of_the_documents_exist():
    for page in DOCUMENTS:
        links = re.findall(r"\]\((?!http|#)([^)#]+)\)", page.read_text(encoding="utf-8"))
        missing = [link for link in links if not (page.parent / link).exists()]
        assert not missing, f"{page}: {missing}"


def test_pictures_are_small_and_all_are_shown():
    text = "".join(page.read_text(encoding="utf-8") for page in DOCUMENTS)
    pictures = sorted((ROOT / "images").iterdir())
    assert sum(picture.stat().st_size for picture in pictures) < 15e6
    assert not [picture.name for picture in pictures if picture.name not in text]


def test_figures_of_nothing_are_one_line(rejected):
    rejected("tools.figures", ["--measure"], "--measure needs --data")
    rejected("tools.figures", ["--data", "nowhere"], "nowhere: no such folder")
    rejected("tools.figures", ["--run", "nowhere"], "--run nowhere", "metrics.csv")


@pytest.mark.parametrize("kind", ["evaluation", "conditions"])
@pytest.mark.parametrize("name", SHIPPED)
def test_the_measurements_are_of_the_shipped_weights_by_the_default_sampler(name, kind):
    found = json.loads(SHIPPED[name].with_name(f"oasis-{name}.{kind}.json").read_text("utf-8"))
    assert found["weights_sha256"] == sha256(SHIPPED[name])
    for field, value in asdict(QUALITY["default"]).items():
        assert found[field] == value


@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_models_sample_what_they_did(name, tmp_path):
    """Seeds 0 to 3 in float32 against a committed grid: at most 4 of 255 apart, 0.1 on average."""
    out = call("predict.py", "--model", name, "--num", 4, "--dtype", "float32", "--device", "cpu",
               "--out", "new", cwd=tmp_path)
    assert out.returncode == 0, out.stderr
    new, old = (np.asarray(Image.open(path)).astype(int) for path in (
        tmp_path / "new" / "grid.png", SHIPPED[name].with_name(f"oasis-{name}.seeds.png")))
    assert np.abs(new - old).max() <= 4 and np.abs(new - old).mean() < 0.1


@pytest.mark.long
@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_models_reach_their_validation_loss(name, oasis, tmp_path):
    """On all validation slices, against the result of the training run: within 1%."""
    model = load_model(SHIPPED[name], torch.device("cpu"))
    results = json.loads(SHIPPED[name].with_name(f"oasis-{name}.results.json").read_text("utf-8"))
    names = {field.name for field in fields(TrainConfig)}
    config = TrainConfig(**{key: value for key, value in results["train"].items() if key in names})
    height, width = model.net.config.sample_size
    slices = load_splits(oasis, width if height == width else None, tmp_path)
    cpu = torch.device("cpu")
    dtype = str(choose_dtype("auto", cpu)).removeprefix("torch.")  # float32 takes minutes
    run = Run(tmp_path, model.net.config, model.scheduler.config, model.labels,
              replace(config, dtype=dtype), slices, cpu)
    run.ema.net.load_state_dict(model.net.state_dict())
    assert run.evaluate("validate")["loss"] == pytest.approx(results["validate"]["loss"], rel=0.01)

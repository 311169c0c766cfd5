"""Redraws the figures of README.md into images/ and fills in its tables.

    python -m tools.figures --data ROOT --run RUN --measure

ROOT holds the real slices that stand beside generated ones, RUN is the run folder whose loss and
samples are shown. Without them, their figures stay as they are. With --measure, the shipped models
are measured first.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import nibabel as nib
import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from dataset import Slices, find_slices, load_splits, subject_of
from modules import Denoiser, UNet, noise_levels
from predict import Model, Slice, load_model
from tools.evaluate import sampled
from tools.evaluation_page import draw_comparison
from tools.tables import ROOT, write_tables
from tools.volumes import Cutting, cut_volume, upright
from utils.checkpoint import SHIPPED
from utils.cli import Parser, UserError, run_cli
from utils.configs import QUALITY, UNetConfig
from utils.device import choose_dtype
from utils.log import draw_losses
from utils.phantoms import draw_phantom, phantom_slices
from utils.pictures import STRIP_LENGTH, read_slice, save_grid, save_png, to_uint8
from utils.sampling_options import MASK_RESAMPLE

IMAGES = ROOT / "images"
CPU = torch.device("cpu")


def show(axes, image: torch.Tensor, title: str = "") -> None:
    """One (1, H, W) image in [-1, 1], without axes."""
    axes.imshow(to_uint8(image)[0], cmap="gray", vmin=0, vmax=255)
    axes.set_axis_off()
    axes.set_title(title, fontsize=9)


def measure(data: Path) -> None:
    """Measures the shipped models: evaluation.json and conditions.json of each, and four slices.

    Ends the program if one of the commands fails, which has printed why.
    """
    def call(*words) -> None:
        code = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT).returncode
        if code:
            sys.exit(code)
    for name, path in SHIPPED.items():
        options = ("--data", data.resolve(), "--model", name)
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder)
            call("-m", "tools.evaluate", *options, "--out", out)
            call("-m", "tools.conditions", *options, "--num", 24, "--out", out / "conditions.json")
            call("predict.py", "--model", name, "--num", 4, "--dtype", "float32", "--out",
                 out / "slices")
            for file in ("evaluation.json", "conditions.json"):
                shutil.copyfile(out / file, path.with_suffix(f".{file}"))
            shutil.copyfile(out / "slices" / "grid.png", path.with_suffix(".seeds.png"))
            if name == "native":
                shutil.copyfile(out / "evaluation.png", IMAGES / "evaluation.png")


def draw_process(model, states: torch.Tensor) -> None:
    """Forward process of a generated slice above, the reverse process that made it below."""
    scheduler, columns = model.scheduler, 8
    total, clean = scheduler.config.num_train_timesteps, states[-1:]
    figure, rows = plt.subplots(2, columns, figsize=(11, 3.3), layout="constrained")
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))
    for axes, t in zip(rows[0], np.linspace(0, total - 1, columns).round().astype(int)):
        show(axes, scheduler.add_noise(clean, noise, torch.tensor([t]))[0], f"t = {t}")
    levels = noise_levels(scheduler, QUALITY["default"])
    for axes, i in zip(rows[1], np.linspace(0, len(states) - 1, columns).round().astype(int)):
        show(axes, states[i], f"t = {levels[i].timestep:.0f}" if levels[i].noise else "slice")
    rows[0][0].text(-0.15, 0.5, "forward", rotation=90, va="center", ha="right",
                    transform=rows[0][0].transAxes)
    rows[1][0].text(-0.15, 0.5, "reverse", rotation=90, va="center", ha="right",
                    transform=rows[1][0].transAxes)
    figure.savefig(IMAGES / "process.png", dpi=110)


def box(axes, x: float, y: float, text: str, colour: str, width: float = 2.3,
        height: float = 0.78) -> None:
    axes.add_patch(FancyBboxPatch((x - width / 2, y - height / 2), width, height, fc=colour,
                                  ec="0.25", boxstyle="round,pad=0.04"))
    axes.text(x, y, text, ha="center", va="center", fontsize=8)


def arrow(axes, start: tuple, end: tuple, **style) -> None:
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=10,
                                   color=style.pop("color", "0.25"), **style))


def draw_unet(config: UNetConfig) -> None:
    """The architecture, from the config of the shipped net: every number is read off it."""
    figure, axes = plt.subplots(figsize=(10, 5.6), layout="constrained")
    (height, width), patch = config.sample_size, config.patch_size
    count, last = sum(p.numel() for p in UNet(config).parameters()), len(config.resolutions) - 1
    colours = ("#cfe3f5", "#d7ecd3", "#f7e3bf", "#f2cfd4", "#ddd3ee")

    def level_text(level: int, blocks: int) -> str:
        scale = patch * 2**level
        attention = config.resolutions[level] in config.attention_resolutions
        return (f"{config.block_out_channels[level]} channels, {height // scale}x{width // scale}"
                f"\n{blocks} residual block" + "s" * (blocks > 1) + " + attention" * attention)

    end = f"unfold: {config.out_channels} x {height}x{width} prediction of v"
    if config.refine_channels:
        end = (f"unfold to {height}x{width}; 3x3 conv, and beside\nit a residual block of "
               f"{config.refine_channels} channels")
    box(axes, 0, 1.3, f"noisy slice, {config.in_channels} x {height}x{width}\nfold {patch}x{patch}"
        " blocks, 3x3 conv", "white", 2.6)
    box(axes, 8, 1.3, f"GroupNorm, SiLU, 3x3 conv\n{end}", "white", 2.9)
    for level in range(last + 1):
        y, shift, colour = -1.3 * level, 0.55 * level, colours[level]
        box(axes, shift, y, level_text(level, config.layers_per_block), colour)
        box(axes, 8 - shift, y, level_text(level, config.layers_per_block + 1), colour)
        arrow(axes, (shift + 1.25, y), (8 - shift - 1.25, y), linestyle="--", color="0.5")
        axes.text(4, y + 0.09, f"{config.layers_per_block + 1} skip connections", fontsize=7,
                  ha="center", color="0.4")
        above = shift - 0.55 if level else 0
        arrow(axes, (above, y + 0.86), (shift, y + 0.44))
        arrow(axes, (8 - shift, y + 0.44), (8 - above, y + 0.86))
        if level:
            axes.text(shift - 0.6, y + 0.65, "3x3 conv, stride 2", fontsize=7, ha="right",
                      va="center")
            axes.text(8.6 - shift, y + 0.65, "nearest x2, 3x3 conv", fontsize=7, va="center")
    bottom, shift = -1.3 * (last + 1), 0.55 * last
    box(axes, 4, bottom, "middle: residual block, attention,\nresidual block", colours[last], 2.9)
    arrow(axes, (shift, bottom + 0.86), (2.5, bottom + 0.1))
    arrow(axes, (5.5, bottom + 0.1), (8 - shift, bottom + 0.86))
    label = "; label: linear layer" if config.label_dim else ""
    box(axes, 4, 1.3, f"timestep t: sinusoids, 2-layer MLP{label}\nadded in every residual block",
        "#eeeeee", 3.4)
    arrow(axes, (4, 0.86), (4, 0.3), linestyle=":")
    axes.set(xlim=(-1.6, 9.6), ylim=(bottom - 0.6, 1.9),
             title=f"UNet of the native model: {count / 1e6:.1f} M parameters")
    axes.set_axis_off()
    figure.savefig(IMAGES / "unet.png", dpi=110)


def draw_preparation() -> None:
    """A phantom volume as four scanners might store it, and the slices that come of each."""
    planes = [draw_phantom(128, 3, height) for height in np.linspace(0, 1, 64)]
    volume = np.pad(np.stack(planes)[:, ::-1].transpose(2, 1, 0), ((0, 0), (0, 0), (4, 4)))
    las = nib.Nifti1Image(volume, np.diag([-1, 1, 2, 1]))  # from right to left, front, up
    figure, axes = plt.subplots(4, 5, figsize=(8.4, 6.8), layout="constrained")
    for row, codes in zip(axes, ("LAS", "RPI", "PSR", "AIL")):
        turn = nib.orientations.ornt_transform(nib.io_orientation(las.affine),
                                               nib.orientations.axcodes2ornt(tuple(codes)))
        stored = las.as_reoriented(turn)
        middle = np.asarray(stored.dataobj)[:, :, stored.shape[2] // 2]
        row[0].imshow(middle, cmap="gray", aspect="auto" if codes[:2] != "LA" else None)
        row[0].set_title(f"as stored: axes to {codes}", fontsize=9)
        slices = cut_volume(*upright(stored, "phantom.nii"), Cutting(32), "phantom.nii")
        for panel, number in zip(row[1:], (0, 10, 20, 31)):
            panel.imshow(slices[number], cmap="gray", vmin=0, vmax=255)
            panel.set_title(f"slice_{number}", fontsize=9)
        for panel in row:
            panel.set_axis_off()
    figure.savefig(IMAGES / "preparation.png", dpi=100)


def real_slices(data: Path, size: tuple[int, int], subjects: int) -> Slices:
    """One random slice of each of the first subjects of the test split."""
    height, width = size
    test = load_splits(data, width if height == width else None)["test"]
    rng, of = np.random.default_rng(0), np.array([subject_of(Path(name)) for name in test.names])
    chosen = [rng.choice(np.flatnonzero(of == subject)) for subject in sorted(set(of))[:subjects]]
    return test[np.array(chosen)].cpu()


def draw_rows(generated: torch.Tensor, data: Path, name: str) -> None:
    """Unpicked generated slices below, a few real ones (one per subject of test) above."""
    height, width = generated.shape[-2:]
    real = real_slices(data, (height, width), 8)
    figure, panels = plt.subplots(5, 8, figsize=(10.4, 6.8 * height / width),
                                  gridspec_kw=dict(wspace=0.03, hspace=0.03, left=0.04, right=0.995,
                                                   top=0.995, bottom=0.005))
    for axes, image in zip(panels.flat, torch.cat([real, generated[:32]])):
        show(axes, image)
    figure.text(0.02, 0.9, "real (test)", rotation=90, va="center", ha="center")
    figure.text(0.02, 0.4, "generated, seeds 0 to 31", rotation=90, va="center", ha="center")
    figure.savefig(IMAGES / name, dpi=110 if height == width else 140)


def draw_blind(generated: torch.Tensor, data: Path) -> None:
    """Twelve real and twelve generated slices in random order, and the same with the answers."""
    images = torch.cat([real_slices(data, generated.shape[-2:], 12), generated[32:44]])
    order = np.random.default_rng(1).permutation(len(images))
    figure, panels = plt.subplots(3, 8, figsize=(10.4, 4.7), layout="constrained")
    for axes, index in zip(panels.flat, order):
        show(axes, images[index])
    figure.savefig(IMAGES / "blind.png", dpi=140)
    for axes, index in zip(panels.flat, order):
        axes.set_title("real" if index < 12 else f"seed {index + 20}", fontsize=8)
    figure.savefig(IMAGES / "blind_answers.png", dpi=60)


def draw_conditions(model: Model) -> None:
    """One noise at eight heights, conditioned on CDR 0 and CDR 1; then the next noise."""
    names = list(model.labels.classes)
    denoise = Denoiser(model.net, model.scheduler, guidance=2.0, dtype=choose_dtype("auto", CPU),
                       patch_size=model.net.config.patch_size)
    figure, axes = plt.subplots(4, 8, figsize=(10.4, 6.3), layout="constrained")
    heights = np.linspace(0, 1, 8).tolist()
    for number, panels in enumerate(axes):
        seed, name = number // 2, names[(0, 2)[number % 2]]
        slices = [Slice(seed, height, name) for height in heights]
        images = sampled(model, slices, f"conditions, row {number}", denoise=denoise)
        for panel, image, height in zip(panels, images, heights):
            show(panel, image)
            if number == 0:
                panel.set_title(f"height {height:.2f}", fontsize=8)
        panels[0].text(-0.1, 0.5, f"seed {seed}, {name}", rotation=90, va="center", ha="center",
                       fontsize=8, transform=panels[0].transAxes)
    figure.savefig(IMAGES / "conditions.png", dpi=120)


def draw_features(model: Model) -> None:
    """A stack, an interpolation, a slice denoised again, and a region filled in, a row each."""
    height, width = model.net.config.sample_size
    init = sampled(model, [Slice(3, 0.6)], "features, --init")[0]
    mask = torch.zeros(1, height, width, dtype=torch.bool)
    mask[:, height // 3:2 * height // 3, width // 3:2 * width // 3] = True
    save_png(255 * mask[0].to(torch.uint8), IMAGES / "mask.png")
    steps, seeds = np.linspace(0, 1, 8).tolist(), [Slice(seed, 0.6) for seed in range(8)]
    rows = {"--stack": ([Slice(5, step) for step in steps], {}),
            "--interpolate": ([Slice(3, 0.6, None, 17, step) for step in steps], {}),
            "--init": (seeds, dict(init=init, strength=0.4)),
            "--mask": (seeds, dict(init=init, mask=mask, config=replace(
                QUALITY["default"], resample=MASK_RESAMPLE)))}
    figure, axes = plt.subplots(4, 8, figsize=(10.4, 6.1), layout="constrained")
    for panels, (name, (slices, options)) in zip(axes, rows.items()):
        images = sampled(model, slices, f"features, {name}", **options)
        for panel, image in zip(panels, images):
            show(panel, image)
        panels[0].text(-0.1, 0.5, name, rotation=90, va="center", ha="center", fontsize=8,
                       transform=panels[0].transAxes)
    figure.savefig(IMAGES / "features.png", dpi=110)


def draw_training(run: Path) -> None:
    """The loss of a run, and what its EMA model drew from the same four seeds at five steps."""
    draw_losses(run)
    shutil.copy(run / "loss.png", IMAGES / "loss.png")
    saved = sorted((run / "samples").glob("step_*.png"))
    shown = [saved[i] for i in np.geomspace(1, len(saved), 5).round().astype(int) - 1]
    figure, panels = plt.subplots(1, len(shown), figsize=(10.4, 2.6), layout="constrained")
    for axes, path in zip(panels, shown):
        grid = read_slice(path)  # 4 by 4 slices
        axes.imshow(grid[:grid.shape[0] // 2, :grid.shape[1] // 2], cmap="gray", vmin=0, vmax=255)
        axes.set_axis_off()
        axes.set_title(f"step {int(path.stem[5:]):,}", fontsize=9)
    figure.savefig(IMAGES / "training.png", dpi=120)


def draw_samplers() -> None:
    """Quality of both models against network calls, from docs/samplers-*.json."""
    figure = plt.figure(figsize=(10, 5.6), layout="constrained")
    for part, (name, path) in zip(figure.subfigures(2, 1), SHIPPED.items()):
        text = (ROOT / "docs" / f"samplers-{name}.json").read_text("utf-8")
        draw_comparison(part, json.loads(text)["compare"])
        part.suptitle(path.stem, fontsize=9, x=0.01, ha="left")
    figure.savefig(IMAGES / "samplers.png", dpi=110)


def draw_slices(model: Model, num: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """The slices of the first seeds as predict.py samples them, and the first one's states."""
    states = []
    slices = sampled(model, list(range(num)), f"slices of {model.path.stem}",
                     watch=lambda x, clean: states.append(x[:1]))
    return slices, torch.cat(states[:QUALITY["default"].steps + 1])


def main() -> None:
    parser = Parser(prog="python -m tools.figures", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder of real slices (default: none)")
    parser.add_argument("--run", type=Path,
                        help="run folder whose training is shown (default: none)")
    parser.add_argument("--measure", action="store_true",
                        help="measure the shipped models on --data first (default: off)")
    args = parser.parse_args()
    if args.data:
        find_slices(args.data)  # a wrong folder ends it here
    if args.run and not (args.run / "metrics.csv").exists():
        raise UserError(f"--run {args.run}: has no metrics.csv; give a run folder of train.py")
    if args.measure and not args.data:
        raise UserError("--measure needs --data ROOT, the real slices to compare with")
    if args.measure:
        measure(args.data)
    IMAGES.mkdir(exist_ok=True)
    native = load_model(SHIPPED["native"], CPU)
    draw_unet(native.net.config)
    images, names = phantom_slices(128, 0, 8, 2)
    save_grid(Slices(images, names, CPU)[np.arange(16)], IMAGES / "phantoms.png", columns=8)
    draw_preparation()
    generated, states = draw_slices(native)
    draw_process(native, states)
    shown = torch.linspace(0, len(states) - 1, STRIP_LENGTH).round().long()
    save_grid(states[shown], IMAGES / "reverse.png", columns=STRIP_LENGTH)
    draw_conditions(native)
    draw_features(native)
    if args.data:
        draw_rows(generated, args.data, "native.png")
        draw_blind(generated, args.data)
        small = draw_slices(load_model(SHIPPED["64"], CPU))[0]
        draw_rows(small, args.data, "real_and_generated.png")
    if args.run:
        draw_training(args.run)
    draw_samplers()
    write_tables()


if __name__ == "__main__":
    run_cli(main)

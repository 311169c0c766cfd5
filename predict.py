"""Samples brain slices out of noise with a trained model.

    python predict.py                          the shipped native model, or --model 64
    python predict.py --checkpoint RUN         a run folder, a checkpoint or model.safetensors
    python predict.py --checkpoint latest      the newest run under runs/
    torchrun --nproc-per-node 2 -- predict.py --num 10000         ranks share the slices

Writes slice_000042.png (8-bit grayscale, drawn from seed 42 alone), grid.png (the first slices),
reverse.png and reverse.gif (the first slice's way from noise to brain), manifest.csv (a row for
each file) and samples.json (how they were made). The same command again samples what is missing.
From Python: `load_model` and `generate`.
"""

import argparse
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from modules import (Denoiser, LabelConfig, NoiseScheduler, UNet, noise_levels, sample,
                     seeded_noise)
from utils.checkpoint import SHIPPED, find_model, read_model
from utils.cli import EVAL_SEED, UserError, progress_bar, run_cli
from utils.configs import QUALITY, SamplerConfig, SchedulerConfig, UNetConfig
from utils.device import choose_dtype, keep_freed_memory
from utils.distributed import (join_processes, leave_processes, local_device, on_all_ranks, rank,
                               world_size)
from utils.files import sha256, write_json
from utils.images import BadSlice, fit, read_gray, read_mr_slice
from utils.manifest import Manifest
from utils.pictures import save_overviews, save_reverse, save_slice
from utils.sampling_options import option_error, parse_args, sampler_config

# In configs of older versions, where each had only one possible value.
FORMER_FIELDS = (("unet", "num_class_embeds"), ("scheduler", "variance_type"),
                 ("scheduler", "timestep_spacing"))
FIELD_MM = 208  # longer side of a slice of OASIS-1's T88 volumes

# ---------------------------------------------------------------------------------------------
# Loading
# ---------------------------------------------------------------------------------------------


@dataclass
class Model:
    """A trained net with its EMA weights, its diffusion, and where it came from."""

    net: UNet
    scheduler: NoiseScheduler
    path: Path
    step: int
    labels: LabelConfig

    @property
    def pixel_mm(self) -> float:
        """Side of a pixel in mm, if the slices cover the field of OASIS-1's T88 volumes."""
        return FIELD_MM / max(self.net.config.sample_size)


def load_model(path: Path, device: torch.device) -> Model:
    """Rebuilds the net of a file from the configs in it, with the EMA weights.

    Raises UserError if the file is damaged, of something else, or its weights do not fit its
    configs.
    """
    content = read_model(path)
    try:
        for part, name in FORMER_FIELDS:
            content[part].pop(name, None)
        net = UNet(UNetConfig(**content["unet"]))
        labels = LabelConfig(**content.get("labels", {}))
        if labels.dim != net.config.label_dim:
            raise ValueError(f"{labels.dim} labels for label_dim {net.config.label_dim}")
        scheduler = NoiseScheduler(SchedulerConfig(**content["scheduler"]))
        net.load_state_dict(content["ema"])
        step = int(content["step"])
    except Exception as error:  # whatever configs and weights from elsewhere can break
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: its weights and its configs do not fit ({reason}); give another "
                        "one") from None
    net.eval().requires_grad_(False)
    return Model(net.to(device, memory_format=torch.channels_last), scheduler, path, step,
                 labels)


def load_guide(name: str, model: Model, device: torch.device) -> Model:
    """The model of --guide, for guidance away from it.

    Raises UserError if it cannot be loaded, or is not of the same slices and diffusion.
    """
    guide = load_model(find_model(name, "--guide"), device)
    for field in ("sample_size", "in_channels", "out_channels"):
        check_equal(guide, field, guide.net.config, model.net.config)
    for field in vars(model.labels):
        check_equal(guide, field, guide.labels, model.labels)
    for field in vars(model.scheduler.config):
        check_equal(guide, field, guide.scheduler.config, model.scheduler.config)
    return guide


def check_equal(guide: Model, field: str, theirs, ours) -> None:
    if getattr(theirs, field) != getattr(ours, field):
        raise UserError(f"--guide {guide.path}: its {field} is {getattr(theirs, field)}, the "
                        f"model's {getattr(ours, field)}; give a guide of the same image size, "
                        "labels, noise schedule and prediction type")


# ---------------------------------------------------------------------------------------------
# Sampling
# ---------------------------------------------------------------------------------------------


def make_denoiser(model: Model, args: argparse.Namespace, device: torch.device) -> Denoiser:
    """The model with its guidance: away from --guide, or from the model without its labels.

    Raises UserError for guidance without either, or values that make no sense.
    """
    if args.guidance_interval and args.guidance is None and not args.guide:
        raise UserError("--guidance-interval needs --guidance W or --guide CHECKPOINT")
    labels = model.labels.height_range or model.labels.classes
    if args.guidance is not None and not args.guide and not labels:
        raise UserError(f"--guidance needs a model to guide away from, since {model.path} has no "
                        "labels; give --guide CHECKPOINT")
    guidance = (1.5 if args.guide else 1.0) if args.guidance is None else args.guidance
    if not 0 <= guidance < math.inf:
        raise UserError(f"--guidance {guidance}: give a number from 0 on; 1 is no guidance")
    low, high = args.guidance_interval or (0.0, math.inf)
    if not 0 <= low < high:
        raise UserError(f"--guidance-interval {low} {high}: give the lower sigma first, from 0 on")
    guide = load_guide(args.guide, model, device).net if args.guide else None
    return Denoiser(model.net, model.scheduler, guide, guidance, (low, high), args.epsilon_scale,
                    args.clip, choose_dtype(args.dtype, device), model.net.config.patch_size)


def checked_sampler(model: Model, args: argparse.Namespace) -> SamplerConfig:
    """`sampler_config`, with noise levels that the model has. Raises UserError."""
    config = sampler_config(args)
    try:
        noise_levels(model.scheduler, config)
    except ValueError as error:
        raise option_error(error) from None
    return config


def check_labels(model: Model, args: argparse.Namespace) -> None:
    """Raises UserError for a --position or --class that the model was not trained with."""
    labels = model.labels
    if args.position is not None and not labels.height_range:
        raise UserError(f"--position {args.position}: {model.path} was trained without heights; "
                        "leave it out")
    if args.class_ is not None and args.class_ not in labels.classes:
        known = "its classes are " + ", ".join(labels.classes) if labels.classes else \
            "it was trained without classes; leave it out"
        raise UserError(f"--class {args.class_}: unknown to {model.path}; {known}")


class Slice(NamedTuple):
    """What to sample: the noise, by its seed, and the conditions.

    height: 0 to 1, or None; class_: one of the model's class names, or None.
    other_seed, mix: with another seed, `mix` from 0 to 1 interpolates to that one's noise.
    """

    seed: int
    height: float | None = None
    class_: str | None = None
    other_seed: int | None = None
    mix: float = 0.0


def slice_noise(slices: list[Slice], shape: tuple[int, ...]) -> Callable[[], Tensor]:
    """A source of unit noise (B, *shape) for these slices; see `seeded_noise`.

    Between two seeds by spherical interpolation (Shoemake 1985), since independent noises are as
    good as orthogonal: cos and sin keep the variance at 1 on the whole way.
    """
    first = seeded_noise([s.seed for s in slices], shape)
    if all(s.other_seed is None for s in slices):
        return first
    other = seeded_noise([s.seed if s.other_seed is None else s.other_seed for s in slices], shape)
    angle = torch.tensor([s.mix for s in slices]).reshape(-1, *[1] * len(shape)) * math.pi / 2
    # sin(pi/2 - angle) is exactly 1 and 0 at the ends, where cos(pi/2) is not 0 in floats.
    return lambda: torch.sin(math.pi / 2 - angle) * first() + torch.sin(angle) * other()


def generate(model: Model, slices: Iterable[Slice | int],
             config: SamplerConfig = QUALITY["default"], denoise: Denoiser | None = None,
             batch_size: int = 16, init: Tensor | None = None, mask: Tensor | None = None,
             strength: float = 1.0, watch: Callable[[Tensor, Tensor], None] | None = None
             ) -> Iterator[tuple[Tensor, list[Slice]]]:
    """Samples slices: yields batches of images, (B, C, H, W) in [-1, 1], with their `Slice`s.

    slices: what to sample; a plain number is a seed, with its own height if the model has heights.
    denoise: the model with guidance, for example, for one `generate` at a time; None for the model
        alone.
    batch_size: a short last batch is filled up to it, since the last bits of an image depend on it:
        images of a seed are bit-equal at one batch size, and equal up to rounding at others.
    init: (C, H, W) in [-1, 1], noised to `strength`, above 0 to 1, and denoised again (SDEdit, Meng
        et al. 2022); 1 starts from noise.
    mask: boolean (C, H, W), True where to fill in; elsewhere `init` is kept (RePaint, Lugmayr et
        al. 2022). With `resample` above 1 in config, the region fits better.
    watch: is called with each x_t and its predicted x_0 (B, C, H, W).

    Raises ValueError for a class that the model does not know, or a mask without `init`.
    """
    net, labels = model.net, model.labels
    device = next(net.parameters()).device
    denoise = denoise or Denoiser(net, model.scheduler, dtype=choose_dtype("auto", device),
                                  patch_size=net.config.patch_size)
    if mask is not None and init is None:
        raise ValueError("mask: needs init, the image to fill in")
    denoise.known = None if mask is None else (init.to(device), mask.to(device))
    slices = [s if isinstance(s, Slice) else Slice(int(s), labels.height(int(s))) for s in slices]
    for name in {s.class_ for s in slices} - {None, *labels.classes}:
        raise ValueError(f"class_: {name!r} is not one of the model's {list(labels.classes)}")

    def encode(batch: list[Slice]) -> Tensor | None:
        heights = [math.nan if s.height is None else s.height for s in batch]
        return labels.encode(torch.tensor(heights), [s.class_ for s in batch])

    shape = (net.config.in_channels, *net.config.sample_size)
    done = 0
    for images in sample(denoise, slices, shape, config, batch_size, device, watch, encode,
                         slice_noise, init, strength):
        yield images, slices[done:done + len(images)]
        done += len(images)


# ---------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------


def requested(args: argparse.Namespace, model: Model) -> dict[str, Slice]:
    """The slices that the options ask for, by the stems of their files.

    Raises UserError for options that do not go together.
    """
    span, height = model.labels.height_range, model.labels.height
    stack = args.stack or args.position == "all"
    if args.seeds and (args.num or args.seed):
        raise UserError("--seeds names all seeds; leave out --seed and --num")
    if stack and (args.seeds or args.interpolate or not span or args.position not in (None, "all")):
        raise UserError(f"--stack: {model.path} was trained without heights; give another model"
                        if not span else "--stack draws all heights of one --seed; leave out "
                        "--position, --seeds and --interpolate")
    if args.interpolate and (args.seeds or args.seed):
        raise UserError("--interpolate names its seeds; leave out --seed and --seeds")
    if (stack or args.interpolate) and (args.num or 0) > 10_001:
        raise UserError(f"--num {args.num}: at most 10001 heights or frames, since names have four "
                        "digits of them")
    if stack:
        low, high = span
        heights = np.linspace(0, 1, args.num or round(high - low) + 1).tolist()
        return {f"slice_{args.seed:06d}_height_{h:.4f}": Slice(args.seed, h, args.class_)
                for h in heights}

    if args.interpolate:
        a, b = args.interpolate
        return {f"slice_{a:06d}_{b:06d}_{t:.4f}": Slice(
            a, span and (1 - t) * height(a, args.position) + t * height(b, args.position),
            args.class_, b, t)
            for t in np.linspace(0, 1, args.num or 16).tolist()}
    num = args.num or 16
    if args.seed + num > EVAL_SEED:
        raise UserError(f"--seed {args.seed} and --num {num} go beyond the last seed, "
                        f"{EVAL_SEED - 1}")
    return {f"slice_{seed:06d}": Slice(seed, height(seed, args.position), args.class_)
            for seed in args.seeds or range(args.seed, args.seed + num)}


def read_init(args: argparse.Namespace, model: Model) -> dict:
    """--init, --mask and --strength as `generate` takes them.

    Raises UserError for images that are no slices of the model's size.
    """
    if not args.init:
        if args.mask or args.strength:
            raise UserError(f"--{'mask' if args.mask else 'strength'} needs --init IMAGE")
        return {}
    height, width = model.net.config.sample_size
    pictures = [read_mr_slice(args.init, args.few_levels)]
    if args.mask:
        pictures.append(read_gray(args.mask))
    for path, picture in zip((args.init, args.mask), pictures):
        if height != width and picture.size != (width, height) or picture.size != pictures[0].size:
            wanted = pictures[0].size if height == width else (width, height)
            raise BadSlice(path, f"has {picture.width}x{picture.height} pixels (columns x rows), "
                           f"not {wanted[0]}x{wanted[1]}", "give images of the model's size")
    levels = [torch.from_numpy(fit(picture, height if height == width else None))[None]
              for picture in pictures]
    values = {"init": levels[0] / 127.5 - 1,
              "strength": args.strength or (1.0 if args.mask else 0.5)}
    if args.mask:
        values["mask"] = levels[1] > 127
        if not values["mask"].any():
            raise BadSlice(args.mask, "has nothing to fill in", "paint the region white")
    return values


def sampling_settings(args: argparse.Namespace, model: Model, config: SamplerConfig,
                      denoise: Denoiser) -> dict:
    """What makes the slices of a model, besides their seed and height."""
    guide = args.guide and sha256(find_model(args.guide, "--guide"))[:16]
    return {"class": args.class_, "weights_sha256": sha256(model.path), "step": model.step,
            **asdict(config), "clip": denoise.clip, "guidance": denoise.guidance,
            "guidance_interval": args.guidance_interval, "guide_sha256": guide,
            "epsilon_scale": args.epsilon_scale, "dtype": str(denoise.dtype).split(".")[1]}


def manifest_settings(args: argparse.Namespace, model: Model, config: SamplerConfig,
                      denoise: Denoiser, start: dict) -> dict:
    """The manifest's columns that are the same for all slices."""
    init, mask = (path and sha256(path)[:16] for path in (args.init, args.mask))
    return sampling_settings(args, model, config, denoise) | {
        "init_sha256": init, "strength": start.get("strength"), "mask_sha256": mask}


def row_of(slice_: Slice) -> dict:
    """The manifest's columns of one slice."""
    return {"seed": slice_.seed, "position": slice_.height, "other_seed": slice_.other_seed,
            "mix": slice_.mix if slice_.other_seed is not None else None}


def write_slices(model: Model, args: argparse.Namespace, config: SamplerConfig, denoise: Denoiser,
                 slices: dict[str, Slice], batch_size: int, start: dict, manifest: Manifest,
                 first: str) -> None:
    """Samples slices and writes each batch's files, and the reverse process of `first`."""
    states: list[tuple[Tensor, Tensor]] = []
    names = list(slices)
    levels = noise_levels(model.scheduler, config, start.get("strength", 1.0))
    with progress_bar(-(-len(slices) // batch_size) * len(levels), "sampling", "state") as bar:
        def watch(x: Tensor, clean: Tensor) -> None:
            bar.update()
            if names[0] == first and len(states) < len(levels):
                states.append((x[0].cpu(), clean[0].cpu()))

        done = calls = 0
        for images, batch in generate(model, slices.values(), config, denoise, batch_size,
                                      watch=watch, **start):
            if states and not done:
                save_reverse(states, args.out)
            if not images.isfinite().all():
                raise UserError("slices became infinite or NaN; give a smaller --guidance, or "
                                "--epsilon-scale 1")
            rows = []
            for name, slice_, image in zip(names[done:], batch, images):
                for suffix in args.format:
                    save_slice(image[0], args.out / f"{name}.{suffix}", model.pixel_mm)
                    rows.append({"file": f"{name}.{suffix}", **row_of(slice_),
                                 "network_calls": denoise.calls - calls, "batch_size": batch_size,
                                 "torch": torch.__version__})
            manifest.append(rows)
            done, calls = done + len(batch), denoise.calls


def open_manifest(args: argparse.Namespace, settings: dict, slices: dict[str, Slice]
                  ) -> tuple[Manifest, dict[str, Slice]]:
    """The manifest of --out, and the slices of which a file is missing or damaged."""
    manifest = Manifest(args.out, settings, ("seed", "position", "other_seed", "mix",
                                             "network_calls", "batch_size", "torch"))
    todo = {name: slice_ for name, slice_ in slices.items()
            if not all([manifest.is_done(f"{name}.{suffix}", row_of(slice_))
                        for suffix in args.format])}
    manifest.start({f"{name}.{suffix}": row_of(slice_) for name, slice_ in todo.items()
                    for suffix in args.format})
    return manifest, todo


def overviews(args: argparse.Namespace, model: Model, slices: dict[str, Slice]) -> list[str]:
    """Writes the overviews of the slices in --out; returns their names."""
    files = [args.out / f"{name}.{args.format[0]}" for name in slices]
    animation = "scan.gif" if args.stack else "interpolation.gif" if args.interpolate else None
    spacing = None
    if args.stack:
        low, high = model.labels.height_range
        spacing = (model.pixel_mm, model.pixel_mm,
                   (high - low) * args.slice_step / max(len(slices) - 1, 1))
    reverse = ["reverse.png"] if (args.out / "reverse.png").exists() else []
    return save_overviews(files, args.out, animation, spacing) + reverse


def predict(args: argparse.Namespace) -> None:
    """Samples what the options ask for, and writes it."""
    begin = time.monotonic()
    device = local_device(args.device)
    model = load_model(find_model(args.checkpoint or SHIPPED[args.model]), device)
    config, denoise = checked_sampler(model, args), make_denoiser(model, args, device)
    check_labels(model, args)
    args.stack = args.stack or args.position == "all"
    slices, start = requested(args, model), read_init(args, model)
    settings = manifest_settings(args, model, config, denoise, start)
    manifest, todo = on_all_ranks(lambda: open_manifest(args, settings, slices), first=True)
    mine = {name: todo[name] for name in list(todo)[rank()::world_size()]}
    batch_size = min(args.batch_size, -(-len(slices) // world_size()))
    on_all_ranks(lambda: mine and write_slices(model, args, config, denoise, mine, batch_size,
                                               start, manifest, next(iter(slices))))
    if rank() > 0:
        return
    manifest.finish()
    calls = manifest.rows[f"{next(iter(slices))}.{args.format[0]}"]["network_calls"]
    write_json(args.out / "samples.json", {
        "model": str(model.path), **settings, "guide": args.guide, "position": args.position,
        "network_calls": int(calls) if calls.isdigit() else None,
        "first_seed": next(iter(slices.values())).seed, "num": len(slices),
        "batch_size": batch_size})
    there = f" ({len(slices) - len(todo)} were there)" if len(todo) < len(slices) else ""
    print(f"{len(slices)} slices{there} of {model.path} (step {model.step}), {config.steps} "
          f"{config.sampler} steps, {calls} network calls each, in "
          f"{time.monotonic() - begin:.0f} s: {args.out}/slice_*, "
          + ", ".join(overviews(args, model, slices)))


def main() -> None:
    args = parse_args()
    join_processes()
    keep_freed_memory()
    on_all_ranks(lambda: predict(args))
    leave_processes()


if __name__ == "__main__":
    run_cli(main)

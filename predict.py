"""Samples brain slices out of noise with a trained model.

    python predict.py                          the shipped native model, or --model 64
    python predict.py --checkpoint RUN         a run folder, its checkpoint.pt or model.safetensors
    python predict.py --checkpoint latest      the newest run under runs/

Writes slice_000042.png (8-bit grayscale, drawn from seed 42 alone), grid.png (all of them),
reverse.png (the first slice's way from noise to brain) and samples.json (how they were made).
"""

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from modules import (DEFAULT_STEPS, QUALITY, SAMPLERS, SPACINGS, Denoiser, LabelConfig,
                     NoiseScheduler, SamplerConfig, SchedulerConfig, UNet, UNetConfig,
                     noise_levels, sample)
from utils.checkpoint import SHIPPED, find_model, read_model
from utils.cli import (EVAL_SEED, Parser, UserError, checked, positive_float, positive_int,
                       progress_bar, run_cli, seed_number)
from utils.device import choose_dtype, keep_freed_memory
from utils.distributed import local_device
from utils.files import save_grid, save_png, to_uint8, write_json

position = checked(float, lambda v: 0 <= v <= 1, "a height from 0 to 1")
STRIP_LENGTH = 10  # pictures in the strip of the reverse process

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


def load_model(path: Path, device: torch.device) -> Model:
    """Rebuilds the net of a file from the configs in it, with the EMA weights.

    Raises UserError if the file is damaged, of something else, or its weights do not fit its
    configs.
    """
    content = read_model(path)
    try:
        content["unet"].pop("num_class_embeds", None)  # always None in files that have it
        net = UNet(UNetConfig(**content["unet"]))
        labels = LabelConfig(**content.get("labels", {}))
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
    for field in ("sample_size", "in_channels", "out_channels", "label_dim"):
        check_equal(guide, field, guide.net.config, model.net.config)
    for field in ("prediction_type", *vars(model.scheduler.config)):
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


def sampler_config(args: argparse.Namespace) -> SamplerConfig:
    """The sampler of --quality or --sampler, with the options that were given.

    Raises UserError for values that do not go together, naming the option.
    """
    if args.quality and args.sampler:
        raise UserError(f"--quality {args.quality} names a sampler; leave out --sampler or "
                        "--quality")
    config = QUALITY[args.quality or "default"]
    if args.sampler:
        config = SamplerConfig(args.sampler, DEFAULT_STEPS[args.sampler])
    given = {field.name: getattr(args, field.name) for field in fields(SamplerConfig)
             if getattr(args, field.name) is not None}
    try:
        return replace(config, **given)
    except ValueError as error:
        raise option_error(error) from None


def option_error(error: ValueError) -> UserError:
    """An error of a config, "field: ...", as one of the option of that field."""
    field, _, text = str(error).partition(": ")
    return UserError(f"--{field.replace('_', '-')}: {text}")


def make_denoiser(model: Model, args: argparse.Namespace, device: torch.device) -> Denoiser:
    """The model with its guidance: away from --guide, or from the model without its labels.

    Raises UserError for guidance without either, or values that make no sense.
    """
    asked = args.guidance is not None or args.guidance_interval
    if args.guidance_interval and args.guidance is None and not args.guide:
        raise UserError("--guidance-interval needs --guidance W or --guide CHECKPOINT")
    if asked and not args.guide and not model.labels.dim:
        option = "--guidance" if args.guidance is not None else "--guidance-interval"
        raise UserError(f"{option} needs a model to guide away from, since {model.path} has no "
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


def make_labels(model: Model, args: argparse.Namespace) -> Callable[[list[int]], Tensor | None]:
    """Seeds -> label vectors: --position and --class for all, else a height for each seed.

    Raises UserError for what the model was not trained with.
    """
    labels = model.labels
    if args.position is not None and not labels.height_range:
        raise UserError(f"--position {args.position}: {model.path} was trained without heights; "
                        "leave it out")
    if args.class_ is not None and args.class_ not in labels.classes:
        known = "its classes are " + ", ".join(labels.classes) if labels.classes else \
            "it was trained without classes; leave it out"
        raise UserError(f"--class {args.class_}: unknown to {model.path}; {known}")
    return partial(labels.for_seeds, height=args.position, class_=args.class_)


def generate(denoise: Denoiser, shape: tuple[int, int, int], seeds: list[int], out: Path,
             config: SamplerConfig, batch_size: int, device: torch.device,
             labels: Callable[[list[int]], Tensor | None] = lambda seeds: None
             ) -> tuple[Tensor, Tensor]:
    """Samples all seeds, saving each batch's slices when it is done.

    Returns all slices, (N, C, H, W) in [-1, 1], and the states of the first slice,
    (steps + 1, C, H, W), on the CPU.
    """
    images, states = [], []
    batches = -(-len(seeds) // batch_size)
    with progress_bar(batches * (config.steps + 1), "sampling", "state") as bar:
        def watch(x: Tensor, clean: Tensor) -> None:
            bar.update()
            if len(states) <= config.steps:
                states.append(x[:1].cpu())

        for batch in sample(denoise, seeds, shape, config, batch_size, device, watch,
                            labels):
            first = sum(map(len, images))
            for seed, slice_ in zip(seeds[first:], to_uint8(batch)):
                save_png(slice_[0], out / f"slice_{seed:06d}.png")
            images.append(batch.cpu())
    return torch.cat(images), torch.cat(states)


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """What to sample with and how, for every command that draws slices."""
    add = parser.add_argument
    add("--model", choices=SHIPPED, default="native",
        help="shipped model: native, 176x208 pixels, told heights and classes; or 64, 64x64 pixels "
             "(default: %(default)s)")
    add("--checkpoint", metavar="RUN_OR_FILE",
        help="run folder, checkpoint.pt, model.safetensors, or 'latest' for the newest run under "
             "runs/ (default: a shipped model, see --model)")
    add("--seed", type=seed_number, default=0, metavar="K",
        help="seed of the first slice; slice i is drawn from K+i alone (default: %(default)s)")
    add("--position", type=position, metavar="P",
        help="height in the head, 0 (lowest training slices) to 1 (highest) (default: each seed "
             "has its own, distributed as in training)")
    add("--class", dest="class_", metavar="NAME",
        help="class, as named in training, such as 'CDR 1' (default: none is told)")
    add("--quality", choices=QUALITY,
        help="; ".join(f"{name}: {config.sampler} in {config.steps} steps"
                       for name, config in QUALITY.items()) + " (default: default)")
    add("--batch-size", type=positive_int, default=16, metavar="B",
        help="slices sampled at once; short batches are filled up (default: %(default)s)")
    add("--device", default="auto", metavar="D",
        help="cuda, cuda:1, mps or cpu (default: the fastest here)")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto",
        help="type the network computes in (default: bfloat16 where the hardware has it)")

    add = parser.add_argument_group(
        "sampler", "instead of --quality; sigma is noise over signal").add_argument
    add("--sampler", choices=SAMPLERS,
        help="ddpm (Ho et al. 2020), ddim (Song et al. 2021), dpmpp (DPM-Solver++(2M), Lu et al. "
             "2022) or heun (Karras et al. 2022) (default: that of --quality)")
    add("--steps", type=int, metavar="N", help="steps of the sampler (default: "
        + ", ".join(f"{steps} of {name}" for name, steps in DEFAULT_STEPS.items()) + ")")
    add("--spacing", choices=SPACINGS,
        help="noise levels even in sigma^(1/rho), in log sigma, or in training's timesteps "
             f"(default: {SamplerConfig.spacing})")
    for name, metavar, text in (
            ("rho", "R", "exponent of karras spacing"),
            ("sigma-min", "S", "last noise level before the clean slice"),
            ("sigma-max", "S", "first noise level"),
            ("eta", "E", "randomness of ddim and dpmpp, from 0 (none) to 1 (as ddpm)"),
            ("churn", "S", "randomness of heun, S_churn of the paper")):
        default = getattr(SamplerConfig, name.replace("-", "_"))
        add(f"--{name}", type=float, metavar=metavar, help=f"{text} (default: {default:g})")
    add("--clip", action=argparse.BooleanOptionalAction,
        help="clip the predicted slice to the range of grey levels in every step (default: as the "
             "model was trained)")

    add = parser.add_argument_group("guidance").add_argument
    add("--guide", metavar="RUN_OR_FILE",
        help="a weaker model of the same data, smaller or less trained, to guide away from, as in "
             "Karras et al. 2024 (default: the model itself without its labels)")
    add("--guidance", type=float, metavar="W",
        help="guide + W (model - guide); 1 is none (default: 1.5 with --guide, else 1)")
    add("--guidance-interval", type=float, nargs=2, metavar=("LOW", "HIGH"),
        help="sigmas between which to guide (default: all)")
    add("--epsilon-scale", type=positive_float, default=1.0, metavar="S",
        help="divides the predicted noise; above 1 sharpens, Ning et al. 2024 (default: 1)")


def parse_args() -> argparse.Namespace:
    parser = Parser(description="Samples brain MRI slices out of noise.")
    add = parser.add_argument
    add("--out", type=Path, default=Path("samples"), metavar="DIR",
        help="folder for the pictures (default: %(default)s)")
    add("--num", type=positive_int, default=16, metavar="N",
        help="how many slices (default: %(default)s)")
    add_sampling_options(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    keep_freed_memory()
    config = sampler_config(args)
    device = local_device(args.device)
    model = load_model(find_model(args.checkpoint or SHIPPED[args.model]), device)
    try:
        noise_levels(model.scheduler, config)
    except ValueError as error:
        raise option_error(error) from None
    denoise, labels = make_denoiser(model, args, device), make_labels(model, args)
    if args.seed + args.num > EVAL_SEED:
        raise UserError(f"--seed {args.seed} and --num {args.num} go beyond the last seed, "
                        f"{EVAL_SEED - 1}")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {args.out}: cannot be written ({error.strerror}); give another "
                        "folder") from None

    start = time.monotonic()
    seeds = list(range(args.seed, args.seed + args.num))
    shape = (model.net.config.in_channels, *model.net.config.sample_size)
    images, states = generate(denoise, shape, seeds, args.out, config, args.batch_size, device,
                              labels)
    calls = denoise.calls // -(-args.num // args.batch_size)  # of each batch
    save_grid(images, args.out / "grid.png", columns=min(8, args.num))
    shown = torch.linspace(0, len(states) - 1, min(STRIP_LENGTH, len(states))).round().long()
    save_grid(states[shown], args.out / "reverse.png", columns=len(shown))
    write_json(args.out / "samples.json", {
        "model": str(model.path), "step": model.step, **asdict(config), "guide": args.guide,
        "guidance": denoise.guidance,
        "guidance_interval": args.guidance_interval, "epsilon_scale": args.epsilon_scale,
        "clip": denoise.clip, "position": args.position, "class": args.class_,
        "network_calls": calls, "first_seed": args.seed, "num": args.num,
        "batch_size": args.batch_size})
    print(f"{args.num} slices of {model.path} (step {model.step}), {config.steps} {config.sampler} "
          f"steps, {calls} network calls each, in {time.monotonic() - start:.0f} s: "
          f"{args.out}/slice_*.png, grid.png, reverse.png")


if __name__ == "__main__":
    run_cli(main)

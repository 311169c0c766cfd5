"""The options of predict.py, and those of every command that samples slices."""

import argparse
from dataclasses import fields, replace
from pathlib import Path

from utils.checkpoint import SHIPPED
from utils.cli import (Parser, UserError, checked, positive_float, positive_int, seed_list,
                       seed_number)
from utils.configs import QUALITY, SAMPLERS, SPACINGS, SamplerConfig

position = checked(lambda text: text if text == "all" else float(text),
                   lambda v: v == "all" or 0 <= v <= 1, "a height from 0 to 1, or 'all'")
strength = checked(float, lambda v: 0 < v <= 1, "a number above 0, up to 1")
slice_step = checked(float, lambda v: 0.01 <= v <= 1000, "a number from 0.01 to 1000")
MASK_RESAMPLE = 4  # measured: docs/experiments.md, "Filling a region"


def sampler_config(args: argparse.Namespace) -> SamplerConfig:
    """The sampler of --quality or --sampler, with the options that were given.

    Raises UserError for values that do not go together, naming the option.
    """
    if args.quality and args.sampler:
        raise UserError(f"--quality {args.quality} names a sampler; leave out --sampler or "
                        "--quality")
    config = QUALITY[args.quality or "default"]
    if args.sampler:
        config = SamplerConfig(args.sampler, SAMPLERS[args.sampler].steps)
    given = {field.name: getattr(args, field.name) for field in fields(SamplerConfig)
             if getattr(args, field.name) is not None}
    try:
        return replace(config, **given)
    except ValueError as error:
        raise option_error(error) from None


def option_error(error: ValueError) -> UserError:
    """Turns a config's error, "field: ...", into one that names the option of that field."""
    field, _, text = str(error).partition(": ")
    return UserError(f"--{field.replace('_', '-')}: {text}")


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """What to sample with and how, for every command that draws slices."""
    add = parser.add_argument
    add("--model", choices=SHIPPED, default="native",
        help="shipped model: native, 176x208 pixels; or 64, 64x64 pixels "
             "(default: %(default)s)")
    add("--checkpoint", metavar="RUN_OR_FILE",
        help="run folder, checkpoint, model.safetensors, or 'latest' for the newest run under "
             "runs/ (default: a shipped model, see --model)")
    add("--seed", type=seed_number, default=0, metavar="K",
        help="seed of the first slice; slice i depends on seed K+i alone (default: %(default)s)")
    add("--position", type=position, metavar="P",
        help="height in the head, 0 (lowest training slices) to 1 (highest), or all of them, as "
             "--stack of predict.py (default: each seed has its own, distributed as in training)")
    add("--class", dest="class_", metavar="NAME",
        help="class, as named in training, such as 'CDR 1' (default: none)")
    add("--quality", choices=QUALITY,
        help="; ".join(f"{name}: {config.sampler} in {config.steps} steps"
                       for name, config in QUALITY.items()) + " (default: that named default)")
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
        + ", ".join(f"{kind.steps} of {name}" for name, kind in SAMPLERS.items()) + ")")
    add("--spacing", choices=SPACINGS,
        help="noise levels even in log sigma, in sigma^(1/rho), or in training's timesteps "
             f"(default: {SamplerConfig.spacing})")
    add("--resample", type=int, metavar="N",
        help="times that each step is taken, each from the result of the last one noised again, "
             "so that a filled region fits what is around it (default: 1, with --mask "
             f"{MASK_RESAMPLE})")
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
             "Karras et al. 2024a (default: the model itself without its labels)")
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
        help="new folder, or one of the same settings to go on with (default: %(default)s)")
    add("--num", type=positive_int, metavar="N",
        help="how many slices, heights of --stack or frames of --interpolate (default: 16; of "
             "--stack as many as in training)")
    add("--seeds", type=seed_list, metavar="LIST",
        help="seeds instead of --seed and --num, such as 0-63,100 (default: --num seeds from "
             "--seed on)")
    add("--format", nargs="+", choices=("png", "npy", "nii"), default=["png"],
        help="files of each slice: png and nii of 8 bits, npy of float32 in [-1, 1] (default: png)")
    add("--stack", action="store_true",
        help="one head: all heights from the noise of --seed, with a montage, scan.gif and "
             "stack.nii.gz (default: off)")
    add("--slice-step", type=slice_step, default=1.0, metavar="MM",
        help="distance of neighbouring training slices, for stack.nii.gz (default: 1)")
    add("--interpolate", type=seed_number, nargs=2, metavar=("A", "B"),
        help="from seed A's noise to seed B's, on the sphere, with interpolation.gif (default: "
             "off)")
    add("--init", type=Path, metavar="IMAGE",
        help="slice to noise and denoise again (default: start from noise)")
    add("--strength", type=strength, metavar="S",
        help="how far to noise --init, above 0 to 1 (pure noise) (default: 0.5; 1 with "
             "--mask)")
    add("--mask", type=Path, metavar="IMAGE",
        help="fill in only where this image is white; --init is kept elsewhere "
             "(default: everywhere)")
    add("--few-levels", action="store_true",
        help="accept an --init with few grey levels, which otherwise is rejected as a segmentation "
             "map (default: off)")
    add_sampling_options(parser)
    args = parser.parse_args()
    if args.mask and args.resample is None:
        args.resample = MASK_RESAMPLE
    return args

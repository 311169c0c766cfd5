"""The options of train.py and its presets."""

import argparse
import importlib.util
import os
import shutil
from pathlib import Path

import torch

from utils.cli import (Parser, UserError, checked, finite_float, fraction, natural, positive_float,
                       positive_int, seed_number)
from utils.configs import SCHEDULES

# Sources of the values: README, "Training", and docs/experiments.md. Patches of 2x2 pixels let the
# finest level of the 64-pixel net work at 32x32, the size of the CIFAR nets of Ho et al.
RECIPE = dict(
    block_out_channels=[96, 128, 128, 128], layers_per_block=1, attention_up_to=16, patch_size=2,
    dropout=[0.0, 0.1], final_channels=4, refine_channels=32, schedule="cosine-shifted",
    noise_distribution="log-normal", p_mean=-2.0, p_std=1.6, offset_noise=0.0,
    augment=0.15, condition=["height", "class"], ema_short=0.05, batch_size=64,
    learning_rate=1.2e-3, steps=10_000, save_every=1250)
PRESETS = {
    "quick": RECIPE | dict(
        image_size=48, block_out_channels=[32, 64, 96], attention_up_to=6, dropout=[0.0],
        final_channels=0, refine_channels=0, schedule="cosine", p_mean=-1.2, p_std=1.2,
        augment=0.0, ema_short=0.0, batch_size=16, learning_rate=2e-3, steps=600, save_every=150),
    "64": RECIPE | dict(
        image_size=64, block_out_channels=[96, 128, 128], attention_up_to=8,
        schedule="cosine", p_mean=-1.2, offset_noise=0.1, batch_size=16, learning_rate=8e-4,
        steps=20_000, save_every=1000),
    "128": RECIPE | dict(image_size=128),
    "native": RECIPE | dict(image_size="native"),
    "256": RECIPE | dict(image_size=256),
}

image_size = checked(lambda text: text if text == "native" else int(text),
                    lambda v: v == "native" or v >= 1, "a number of pixels or native")
timestep_count = checked(int, lambda n: n >= 4, "a whole number from 4 on")  # one a quartile
ema_length = checked(float, lambda v: 0.001 <= v <= 0.28, "a number from 0.001 to 0.28")
ema_short = checked(float, lambda v: v == 0 or 0.001 <= v <= 0.28,
                    "0 or a number from 0.001 to 0.28")

# Options: name, help, default (None: from the preset), type or choices.
OPTIONS = {
    "data and run": [
        ("data", "folder of slices (default: built-in phantoms)", None, Path),
        ("run", "run folder (default: runs/DATA-PRESET)", None, Path),
        ("preset", "net and hyperparameters, below (default: 64 with --data, else quick)", None,
         tuple(PRESETS)),
        ("image-size", "side in pixels after square padding, or 'native' for the slices' own size",
         None, image_size),
        ("cache", "folder for decoded slices (default: ~/.cache/oasis-diffusion)", None, Path),
        ("skip-bad", "ignore images that cannot be read or are not MR slices (default: off)",
         False, bool),
        ("few-levels", "accept images with few grey levels, which otherwise are rejected as "
         "segmentation maps (default: off)", False, bool),
        ("augment", "probability of each of flip, rotation, scale, aspect and shift, on which the "
         "network is conditioned (0: off)", None, fraction),
        ("condition", "conditions besides the timestep: height in the head, class (from "
         "cases.csv), or none; ignored where the data lack it", None, ("height", "class", "none")),
        ("label-dropout", "probability of dropping each condition", 0.1, fraction),
        ("init", "run folder or file with EMA weights to start from, for fine-tuning (default: "
         "random weights)", None, str),
        ("seed", "seed of initial weights, order, timesteps and noise", 0, seed_number),
    ],
    "optimisation": [
        ("steps", "total number of optimiser steps", None, positive_int),
        ("batch-size", "slices per step, over all processes", None, positive_int),
        ("accumulate", "micro-batches per step on each process; more need less memory", 1,
         positive_int),
        ("learning-rate", "AdamW's learning rate, which warm-up and decay multiply", None,
         positive_float),
        ("warmup-steps", "steps of linear warm-up", 200, natural),
        ("lr-schedule", "cosine decay to zero, from the first step on, or constant", "cosine",
         ("cosine", "constant")),
        ("weight-decay", "AdamW's weight decay", 0.0, fraction),
        ("grad-clip", "maximum gradient norm", 1.0, positive_float),
        ("ema-length", "length of the EMA, as a fraction of the training so far", 0.09, ema_length),
        ("ema-short", "length of a second, shorter EMA (0: none)", None, ema_short),
    ],
    "diffusion and net": [
        ("schedule", "noise schedule; cosine-shifted is shifted according to the image size", None,
         SCHEDULES),
        ("noise-distribution", "noise levels in training: uniform in the timestep, or log-normal "
         "in sigma", None, ("uniform", "log-normal")),
        ("p-mean", "mean of ln sigma at 64 pixels; cosine-shifted shifts it too", None,
         finite_float),
        ("p-std", "standard deviation of ln sigma", None, positive_float),
        ("offset-noise", "standard deviation of an offset of each image's noise where sigma is "
         "below 0.5, which teaches the network to keep backgrounds black (0: none)", None,
         fraction),
        ("prediction-type", "what the network predicts", "v_prediction",
         ("epsilon", "v_prediction", "sample")),
        ("num-train-timesteps", "number of noise levels", 1000, timestep_count),
        ("block-out-channels", "channels of each level, multiples of 32", None, positive_int),
        ("layers-per-block", "residual blocks per level", None, positive_int),
        ("attention-up-to", "self-attention on feature maps up to this side", None, natural),
        ("dropout", "dropout probability in the residual blocks of each level, finest first; the "
         "last one holds for all coarser levels", None, fraction),
        ("patch-size", "side in pixels of the patches folded into channels", None, positive_int),
        ("final-channels", "channels of a final convolution at full resolution (0: none)", None,
         natural),
        ("refine-channels", "channels of a residual block parallel to it (0: none)",
         None, natural),
    ],
    "machine": [
        ("device", "cuda, cuda:1, mps or cpu; auto is the fastest available", "auto", str),
        ("dtype", "precision of the network; auto is bfloat16 where the hardware supports it",
         "auto", ("auto", "float32", "bfloat16", "float16")),
        ("compile", "torch.compile the network (default: off; needs a compiler, and takes one "
         "to two minutes at the start)", False, bool),
        ("log-every", "steps between lines of metrics.csv", 50, positive_int),
        ("save-every", "steps between validation, samples and checkpoint; guide.safetensors is of "
         "the last one in the first quarter of the steps", None, positive_int),
        ("keep", "older checkpoints to keep besides the newest", 1, positive_int),
        ("max-hours", "save and stop within this time (default: no limit)", None, positive_float),
        ("tensorboard", "also write RUN/tensorboard (default: off)", False, bool),
    ],
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the options; those not given get the preset's values."""
    parser = Parser(
        description="Trains a denoising diffusion model of brain MRI slices.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="presets (defaults of the options above that show none):\n" + "\n".join(
            f"  {name:7s}" + ", ".join(f"{k} {v}" for k, v in preset.items())
            for name, preset in PRESETS.items()))
    for title, options in OPTIONS.items():
        group = parser.add_argument_group(title)
        for name, text, default, kind in options:
            if default is not None and default is not False:
                text += f" (default: {default})"
            more = dict(action="store_true") if kind is bool else \
                dict(choices=kind) if isinstance(kind, tuple) else \
                dict(type=kind, metavar=name.split("-")[-1].upper())
            if name in ("block-out-channels", "dropout", "condition"):
                more["nargs"] = "+"
            group.add_argument(f"--{name}", help=text, default=default, **more)
    args = parser.parse_args(argv)
    if args.condition and "none" in args.condition and len(args.condition) > 1:
        raise UserError(f"--condition {' '.join(args.condition)}: give none alone, or leave it out")
    args.preset = args.preset or ("64" if args.data else "quick")
    for name, value in PRESETS[args.preset].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def check_tools(args: argparse.Namespace, device: torch.device) -> None:
    """Raises UserError if an option needs a compiler or a package that is missing."""
    # For a GPU, torch.compile generates C code that launches the kernels.
    compilers = ("g++", "c++") if device.type == "cpu" else (os.environ.get("CC", "gcc"), "clang")
    if args.compile and not any(map(shutil.which, compilers)):
        raise UserError(f"--compile: no compiler ({compilers[0]}) found; install one, or omit "
                        "the option")
    if args.tensorboard and not importlib.util.find_spec("tensorboard"):
        raise UserError("--tensorboard: the package is missing; pip install tensorboard, or omit "
                        "the option (metrics.csv has the same values)")

"""Samples brain slices out of noise with a trained model.

    python predict.py                          the shipped model
    python predict.py --checkpoint RUN         a run folder, its checkpoint.pt or model.safetensors
    python predict.py --checkpoint latest      the newest run under runs/

Writes slice_000042.png (8-bit grayscale, drawn from seed 42 alone), grid.png (all of them),
reverse.png (the first slice's way from noise to brain) and samples.json (how they were made).
"""

import argparse
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from modules import (SAMPLERS, LabelConfig, NoiseScheduler, SchedulerConfig, UNet, UNetConfig,
                     reverse_process, seeded_noise)
from utils.checkpoint import find_model, read_checkpoint, read_safetensors
from utils.cli import (EVAL_SEED, Parser, UserError, positive_int, progress_bar, run_cli,
                       seed_number)
from utils.device import choose_dtype, keep_freed_memory
from utils.distributed import local_device
from utils.files import save_grid, save_png, to_uint8, write_json

STRIP_LENGTH = 10  # pictures in the strip of the reverse process

# ---------------------------------------------------------------------------------------------
# Loading
# ---------------------------------------------------------------------------------------------


@dataclass
class Model:
    """A trained net with its averaged weights, its diffusion, and where it came from."""

    net: UNet
    scheduler: NoiseScheduler
    path: Path
    step: int
    labels: LabelConfig


def load_model(path: Path, device: torch.device) -> Model:
    """Rebuilds the net of a file from the configs in it, with the averaged weights.

    Raises UserError if the file is damaged, of something else, or its weights do not fit its
    configs.
    """
    content = read_safetensors(path) if path.suffix == ".safetensors" else read_checkpoint(path)
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


# ---------------------------------------------------------------------------------------------
# Sampling
# ---------------------------------------------------------------------------------------------


def sample_batch(model: Model, seeds: list[int], batch_size: int, num_inference_steps: int,
                 sampler: str, eta: float, device: torch.device, dtype: torch.dtype):
    """Yields the states of `reverse_process` for up to `batch_size` seeds, float32 (B, C, H, W).

    A short batch is filled up with its last seed: the kernels that the hardware picks, and with
    them the last bits of a slice, depend on the batch's size.
    """
    filled = seeds + seeds[-1:] * (batch_size - len(seeds))
    config = model.net.config
    noise = seeded_noise(filled, (config.in_channels, *config.sample_size))
    labels = model.labels.for_seeds(filled)
    net = model.net if labels is None else partial(model.net, labels=labels.to(device))
    for state in reverse_process(net, model.scheduler, noise, num_inference_steps, sampler,
                                 eta, device, dtype):
        yield state[:len(seeds)]


def generate(model: Model, seeds: list[int], out: Path, batch_size: int,
             num_inference_steps: int, **how) -> tuple[Tensor, Tensor]:
    """Samples all seeds, saving each batch's slices when it is done.

    Returns all slices, (N, C, H, W) in [-1, 1], and the states of the first slice,
    (num_inference_steps + 1, C, H, W), on the CPU.
    """
    images, states = [], []
    batches = [seeds[i:i + batch_size] for i in range(0, len(seeds), batch_size)]
    with progress_bar(len(batches) * num_inference_steps, "sampling", "step") as bar:
        for batch in batches:
            for index, state in enumerate(sample_batch(model, batch, batch_size,
                                                       num_inference_steps, **how)):
                bar.update(index > 0)
                if batch is batches[0]:
                    states.append(state[:1].cpu())
            images.append(state.cpu())
            for seed, slice_ in zip(batch, to_uint8(state)):
                save_png(slice_[0], out / f"slice_{seed:06d}.png")
    return torch.cat(images), torch.cat(states)


def parse_args() -> argparse.Namespace:
    parser = Parser(description="Samples brain MRI slices out of noise.")
    add = parser.add_argument
    add("--checkpoint", metavar="RUN_OR_FILE",
        help="run folder, checkpoint.pt, model.safetensors, or 'latest' for the newest run under "
             "runs/ (default: the shipped model)")
    add("--out", type=Path, default=Path("samples"), metavar="DIR",
        help="folder for the pictures (default: %(default)s)")
    add("--num", type=positive_int, default=16, metavar="N",
        help="how many slices (default: %(default)s)")
    add("--seed", type=seed_number, default=0, metavar="K",
        help="seed of the first slice; slice i is drawn from K+i alone (default: %(default)s)")
    add("--sampler", choices=SAMPLERS, default="ddim",
        help="ddim (Song et al.) or the ancestral ddpm (Ho et al.) (default: %(default)s)")
    add("--steps", type=positive_int, metavar="N",
        help="reverse steps (default: 50 for ddim, all that the model was trained with for ddpm)")
    add("--eta", type=float, default=0.0, metavar="E",
        help="randomness of ddim, 0 none to 1 as ancestral (default: %(default)s)")
    add("--batch-size", type=positive_int, default=16, metavar="B",
        help="slices sampled at once; short batches are filled up (default: %(default)s)")
    add("--device", default="auto", metavar="D",
        help="cuda, cuda:1, mps or cpu (default: the fastest here)")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto",
        help="type the network computes in (default: bfloat16 where the hardware has it)")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    keep_freed_memory()
    device = local_device(args.device)
    model = load_model(find_model(args.checkpoint), device)
    total = model.scheduler.config.num_train_timesteps
    steps = args.steps or (total if args.sampler == "ddpm" else min(50, total))
    if steps > total:
        raise UserError(f"--steps {steps}: the model was trained with {total}; give no more")
    if args.seed + args.num > EVAL_SEED:
        raise UserError(f"--seed {args.seed} and --num {args.num} go beyond the last seed, "
                        f"{EVAL_SEED - 1}")
    if not 0 <= args.eta <= 1:
        raise UserError(f"--eta {args.eta}: give a value from 0 to 1")

    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {args.out}: cannot be written ({error.strerror}); give another "
                        "folder") from None

    start = time.monotonic()
    seeds = list(range(args.seed, args.seed + args.num))
    images, states = generate(model, seeds, args.out, args.batch_size, steps, device=device,
                              sampler=args.sampler, eta=args.eta,
                              dtype=choose_dtype(args.dtype, device))
    save_grid(images, args.out / "grid.png", columns=min(8, args.num))
    shown = torch.linspace(0, steps, min(STRIP_LENGTH, steps + 1)).round().long()
    save_grid(states[shown], args.out / "reverse.png", columns=len(shown))
    manifest = {"model": str(model.path), "step": model.step, "sampler": args.sampler,
                "num_inference_steps": steps, "eta": args.eta, "first_seed": args.seed,
                "num": args.num, "batch_size": args.batch_size}
    write_json(args.out / "samples.json", manifest)
    print(f"{args.num} slices of {model.path} (step {model.step}), {steps} {args.sampler} steps, "
          f"in {time.monotonic() - start:.0f} s: {args.out}/slice_*.png, grid.png, reverse.png")


if __name__ == "__main__":
    run_cli(main)

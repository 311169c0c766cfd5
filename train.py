"""Trains, validates, tests and saves the diffusion model.

    python train.py                          phantoms, a few minutes on two cores
    python train.py --data ROOT              real slices at 64 pixels
    python train.py --data ROOT --preset 128

Everything goes to one run folder: checkpoint.pt, config.json, metrics.csv, loss.png, samples/ and,
at the end, results.json and model.safetensors (the averaged weights in half precision). The same
command again continues where the run stopped, also after Ctrl-C, SIGTERM or SIGUSR1.
"""

import argparse
import contextlib
import csv
import io
import json
import math
import platform
import resource
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save as safetensors_bytes
from torch import Tensor
from tqdm import tqdm

from dataset import (Parser, Slices, UserError, batch_indices, load_splits, run_cli, save_grid,
                     write_atomic)
from modules import (EMA, SCHEDULES, NoiseScheduler, SchedulerConfig, UNet, UNetConfig,
                     choose_device, choose_dtype, keep_freed_memory, make_scheduler_config,
                     reverse_process, run_net, seeded_noise)

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  (the backend comes first)

FORMAT = "oasis-diffusion-1"
EVAL_SEED = 2**31  # far from the seeds that people give their slices
QUARTILES = ("q1", "q2", "q3", "q4")
COLUMNS = ("step", "loss", "validation_loss", *(f"validation_{q}" for q in QUARTILES),
           "learning_rate", "gradient_norm", "images_per_second", "memory_gib")

# ---------------------------------------------------------------------------------------------
# Settings
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainConfig:
    """What a run is, beside its net and its diffusion; the fields are train.py's options.

    Stored in every checkpoint. On equal CPUs, two runs with equal configs are equal bit for bit.
    When a run is continued, `steps` may grow, and `data`, the folder's name, may change; what
    is in it, `data_crc32`, may not.
    """

    data: str
    data_crc32: int
    steps: int
    batch_size: int
    accumulate: int
    learning_rate: float
    warmup_steps: int
    lr_schedule: str
    weight_decay: float
    grad_clip: float
    ema_decay: float
    flip: bool
    seed: int
    dtype: str


# Grounds for the numbers: README, "Training". Every preset folds 2x2 pixel blocks, so that the
# finest level of the 64-pixel net works at 32x32, the size of the CIFAR nets of Ho et al.
PRESETS = {
    "quick": dict(image_size=48, block_out_channels=(32, 64, 96), layers_per_block=1,
                  attention_up_to=6, dropout=0.0, batch_size=16, steps=1200, learning_rate=1e-3,
                  save_every=300),
    "64": dict(image_size=64, block_out_channels=(96, 128, 128), layers_per_block=2,
               attention_up_to=8, dropout=0.0, batch_size=16, steps=7500, learning_rate=5e-4,
               save_every=750),
    "128": dict(image_size=128, block_out_channels=(64, 128, 192, 256), layers_per_block=2,
                attention_up_to=16, dropout=0.1, batch_size=32, steps=60_000, learning_rate=3e-4,
                save_every=2000),
    "256": dict(image_size=256, block_out_channels=(64, 64, 128, 192, 256), layers_per_block=2,
                attention_up_to=16, dropout=0.1, batch_size=16, steps=100_000, learning_rate=2e-4,
                save_every=2000),
}


def number(kind: Callable, fits: Callable, wanted: str) -> Callable:
    """An argparse type: a number of a kind, with a check and its words for the error line."""
    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not fits(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
        return value
    return parse


natural = number(int, lambda v: v >= 0, "a whole number from 0 on")
seed_number = number(int, lambda v: 0 <= v < EVAL_SEED, "a whole number from 0 to 2^31 - 1")
positive_int = number(int, lambda v: v >= 1, "a whole number from 1 on")
positive_float = number(float, lambda v: 0 < v < math.inf, "a number above 0")
image_size = number(lambda text: text if text == "native" else int(text),
                    lambda v: v == "native" or v >= 1, "a number of pixels, nor native")
fraction = number(float, lambda v: 0 <= v < 1, "a number from 0 to below 1")


# Every option: name, what it means with its unit, default (None: the preset's), and its type.
OPTIONS = {
    "data and run": [
        ("data", "folder of slices (default: built-in phantoms)", None, Path, "ROOT"),
        ("run", "run folder (default: runs/DATA-PRESET)", None, Path, "DIR"),
        ("preset", "net and hyperparameters, below (default: 64 with --data, else quick)", None,
         tuple(PRESETS), None),
        ("image-size", "side in pixels after square padding, or 'native' for the slices' own size",
         None, image_size, "S"),
        ("cache", "where decoded slices are kept (default: ~/.cache/oasis-diffusion)", None, Path,
         "DIR"),
        ("skip-bad", "go on without images that cannot be read or are no MR slices (default: off)",
         False, bool, None),
        ("flip", "flip slices left to right at random (default: off; anatomy is not symmetric)",
         False, bool, None),
        ("seed", "seed of weights, order, timesteps and noise", 0, seed_number, "K"),
    ],
    "optimisation": [
        ("steps", "optimiser steps in all", None, positive_int, "N"),
        ("batch-size", "slices per step", None, positive_int, "B"),
        ("accumulate", "micro-batches that a step is worked off in, to save memory", 1,
         positive_int, "A"),
        ("learning-rate", "AdamW's peak learning rate", None, positive_float, "R"),
        ("warmup-steps", "steps of linear warm-up", 200, natural, "N"),
        ("lr-schedule", "after the warm-up: down to zero at the last step, or constant", "cosine",
         ("cosine", "constant"), None),
        ("weight-decay", "AdamW's weight decay, per step and unit of learning rate", 0.0, fraction,
         "W"),
        ("grad-clip", "largest gradient norm", 1.0, positive_float, "G"),
        ("ema-decay", "decay per step of the averaged weights, reached by a ramp", 0.9999, fraction,
         "D"),
    ],
    "diffusion and net": [
        ("schedule", "noise schedule", "cosine", SCHEDULES, None),
        ("prediction-type", "what the net predicts", "v_prediction",
         ("epsilon", "v_prediction", "sample"), None),
        ("num-train-timesteps", "noise levels", 1000, positive_int, "T"),
        ("block-out-channels", "channels of each level, multiples of 32", None, positive_int, "C"),
        ("layers-per-block", "residual blocks per level", None, positive_int, "L"),
        ("attention-up-to", "self-attention on levels whose feature map is S pixels or less", None,
         natural, "S"),
        ("dropout", "dropout probability in the residual blocks", None, fraction, "P"),
        ("patch-size", "side in pixels of the blocks folded into channels", 2, positive_int, "P"),
    ],
    "machine": [
        ("device", "cuda, cuda:1, mps or cpu; auto is the fastest here", "auto", str, "D"),
        ("dtype", "type the network computes in; auto is bfloat16 where the hardware has it",
         "auto", ("auto", "float32", "bfloat16"), None),
        ("compile", "torch.compile the network (default: off; needs a C++ compiler, and one to two "
         "minutes at start)", False, bool, None),
        ("log-every", "steps between lines of metrics.csv", 50, positive_int, "N"),
        ("save-every", "steps between validation, samples and checkpoint", None, positive_int, "N"),
    ],
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The options, with the preset's values where none are given."""
    parser = Parser(
        description="Trains a denoising diffusion model of brain MRI slices.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="presets (the defaults of the options that name none):\n" + "\n".join(
            f"  {name:6s}" + ", ".join(f"{k} {v}" for k, v in preset.items())
            for name, preset in PRESETS.items()))
    for title, options in OPTIONS.items():
        group = parser.add_argument_group(title)
        for name, text, default, kind, metavar in options:
            if default is not None and default is not False:
                text += f" (default: {default})"
            more = dict(action="store_true") if kind is bool else \
                dict(choices=kind) if isinstance(kind, tuple) else dict(type=kind, metavar=metavar)
            if name == "block-out-channels":
                more["nargs"] = "+"
            group.add_argument(f"--{name}", help=text, default=default, **more)
    args = parser.parse_args(argv)
    args.preset = args.preset or ("64" if args.data else "quick")
    for name, value in PRESETS[args.preset].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def make_configs(args: argparse.Namespace, size: tuple[int, int], device: torch.device,
                 data_crc32: int) -> tuple[UNetConfig, SchedulerConfig, TrainConfig]:
    """The three configs of a run from its options, the slices' (H, W) and their checksum.

    Raises UserError for values that do not go together, naming the option.
    """
    settings = {f.name: getattr(args, f.name) for f in fields(TrainConfig)
                if f.name != "data_crc32"}
    settings["data"] = args.data.resolve().name if args.data else "phantoms"
    settings["dtype"] = str(choose_dtype(args.dtype, device)).removeprefix("torch.")
    if args.batch_size % args.accumulate:
        raise UserError(f"--accumulate {args.accumulate} does not divide --batch-size "
                        f"{args.batch_size}")
    shape = dict(sample_size=size, block_out_channels=args.block_out_channels,
                 layers_per_block=args.layers_per_block, dropout=args.dropout,
                 patch_size=args.patch_size)
    try:
        levels = UNetConfig(attention_resolutions=(), **shape).resolutions
        unet = UNetConfig(attention_resolutions=[r for r in levels if r <= args.attention_up_to],
                          **shape)
        scheduler = make_scheduler_config(args.schedule, args.num_train_timesteps,
                                          args.prediction_type)
    except ValueError as error:
        option = "--image-size" if "image size" in str(error) else "--preset or its options"
        raise UserError(f"{option}: {error}") from None
    return unet, scheduler, TrainConfig(**settings, data_crc32=data_crc32)


# ---------------------------------------------------------------------------------------------
# Checkpoints
# ---------------------------------------------------------------------------------------------


def read_checkpoint(path: Path) -> dict:
    """A checkpoint's contents, on the CPU; only tensors and plain values are ever unpickled.

    Raises UserError if the file is missing, damaged, or a checkpoint of something else.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        with warnings.catch_warnings(action="ignore"):  # about foreign files
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # a damaged file can make the reader raise anything
        raise UserError(f"{path}: is damaged, or no checkpoint of train.py; give another "
                        "one") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path}: is a checkpoint of something else; give one that train.py "
                        "wrote") from None
    return content


def to_cpu(value):
    """A nest of dicts and lists with its tensors on the CPU, so that it loads anywhere."""
    if isinstance(value, dict):
        return {key: to_cpu(item) for key, item in value.items()}
    if isinstance(value, list):
        return [to_cpu(item) for item in value]
    return value.cpu() if isinstance(value, Tensor) else value


def describe_machine(device: torch.device) -> str:
    """The hardware in words, for results.json and the model card."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((li.split(":")[1].strip() for li in lines if li.startswith("model name")),
                     model)
    return f"{model}, {torch.get_num_threads()} threads"


# ---------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------


def step_seed(seed: int, step: int, rank: int = 0) -> int:
    """One 32-bit seed out of (seed, step, rank), well mixed."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0])


def stratified_timesteps(count: int, total: int, device: torch.device) -> Tensor:
    """(count,) timesteps, one from each of `count` equal parts of [0, total), in order.

    Each timestep is as likely as by independent draws, and the loss varies less from step to
    step (the low-discrepancy sampler of Kingma et al. 2021). The slices' order is random, so
    that of the timesteps need not be.
    """
    places = (torch.arange(count, device=device) + torch.rand(count, device=device)) / count
    return (places * total).long().clamp(max=total - 1)


class Run:
    """A training run: its net, averaged net, optimiser, data and folder."""

    def __init__(self, folder: Path, unet: UNetConfig, scheduler: SchedulerConfig,
                 config: TrainConfig, data: dict[str, Slices], device: torch.device,
                 compile_net: bool = False):
        self.folder, self.config, self.data, self.device = folder, config, data, device
        self.scheduler = NoiseScheduler(scheduler)
        torch.manual_seed(config.seed)
        self.net = UNet(unet).to(device, memory_format=torch.channels_last)
        self.ema = EMA(self.net, config.ema_decay)
        self.forward = torch.compile(self.net) if compile_net else self.net
        self.optimizer = torch.optim.AdamW(
            self.net.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay,
            fused=device.type in ("cpu", "cuda"))
        self.dtype = getattr(torch, config.dtype)
        self.step = 0
        self.seconds = 0.0
        self.loss_sum, self.loss_count = torch.zeros((), device=device), 0
        self.rows: list[dict] = []

    # Training ----------------------------------------------------------------------------

    def learning_rate(self) -> float:
        """Of the coming step: linear warm-up, then half a cosine to zero, or constant."""
        warm_up = min(1.0, (self.step + 1) / max(1, self.config.warmup_steps))
        if self.config.lr_schedule == "constant":
            return self.config.learning_rate * warm_up
        done = self.step / self.config.steps
        return self.config.learning_rate * warm_up * 0.5 * (1 + math.cos(math.pi * done))

    def loss(self, micro_step: int) -> Tensor:
        """Mean squared error of one micro-batch (Ho et al., algorithm 1), a float32 scalar.

        Slices, flips, timesteps, noise and dropout depend on (seed, micro_step) alone.
        """
        config = self.config
        train, count = self.data["train"], config.batch_size // config.accumulate
        images = train[batch_indices(len(train), count, config.seed, micro_step)]
        torch.manual_seed(step_seed(config.seed, micro_step))
        if config.flip:
            flipped = torch.rand(count, 1, 1, 1, device=self.device) < 0.5
            images = torch.where(flipped, images.flip(3), images)
        timesteps = stratified_timesteps(count, self.scheduler.config.num_train_timesteps,
                                         self.device)
        noise = torch.randn_like(images)
        noisy = self.scheduler.add_noise(images, noise, timesteps)
        target = self.scheduler.training_target(images, noise, timesteps)
        return F.mse_loss(run_net(self.forward, noisy, timesteps, self.dtype), target)

    def train_step(self) -> Tensor:
        """One optimiser step; returns the gradient norm before clipping, left on the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        for micro in range(self.config.accumulate):
            loss = self.loss(self.step * self.config.accumulate + micro) / self.config.accumulate
            loss.backward()
            self.loss_sum += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(self.net.parameters(), self.config.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(self.net)
        self.loss_count += 1
        self.step += 1
        return norm

    # Validation and samples --------------------------------------------------------------

    @torch.inference_mode()
    def evaluate(self, split: str) -> dict[str, float]:
        """Loss of the averaged net on a split: the mean, and by quartile of the timestep.

        Every slice has its own fixed noise and timestep (several, if there are few slices), and
        the timesteps are spread evenly over [0, T): two evaluations differ by the weights alone.
        """
        data, total = self.data[split], self.scheduler.config.num_train_timesteps
        count = len(data) * -(-64 // len(data))
        order = np.random.default_rng(0).permutation(count)
        timesteps = torch.from_numpy(((order + 0.5) / count * total).astype(np.int64))
        losses = []
        for indices in np.array_split(np.arange(count), -(-count // 32)):
            images, steps = data[indices % len(data)], timesteps[indices].to(self.device)
            noise = seeded_noise([EVAL_SEED + i for i in indices.tolist()], images.shape[1:])()
            noise = noise.to(self.device)
            noisy = self.scheduler.add_noise(images, noise, steps)
            error = (run_net(self.ema.net, noisy, steps, self.dtype)
                     - self.scheduler.training_target(images, noise, steps))
            losses.append((error**2).mean(dim=(1, 2, 3)))
        losses = torch.cat(losses).cpu().double()
        quartile = timesteps * 4 // total
        parts = {q: losses[quartile == i].mean().item() for i, q in enumerate(QUARTILES)}
        return {"loss": losses.mean().item(), **parts}

    def sample(self, num: int = 16, num_inference_steps: int = 50) -> Tensor:
        """Slices of the averaged net from the seeds 0 to num - 1, the same at every call."""
        config = self.net.config
        noise = seeded_noise(list(range(num)), (config.in_channels, *config.sample_size))
        steps = min(num_inference_steps, self.scheduler.config.num_train_timesteps)
        *_, images = reverse_process(self.ema.net, self.scheduler, noise, steps,
                                     device=self.device, dtype=self.dtype)
        return images

    # Saving and loading ------------------------------------------------------------------

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint.pt"

    def configs(self) -> dict[str, dict]:
        return {"unet": asdict(self.net.config), "scheduler": asdict(self.scheduler.config),
                "train": asdict(self.config)}

    def save(self) -> None:
        """Writes checkpoint.pt, whole or not at all."""
        buffer = io.BytesIO()
        torch.save(to_cpu({
            "format": FORMAT, **self.configs(),
            "net": self.net.state_dict(), "ema": self.ema.net.state_dict(),
            "ema_updates": self.ema.num_updates, "optimizer": self.optimizer.state_dict(),
            "step": self.step, "seed": self.config.seed, "seconds": self.seconds,
            "loss_sum": self.loss_sum, "loss_count": self.loss_count,
            "normalisation": "uint8 / 127.5 - 1",
            "versions": {"torch": str(torch.__version__), "python": platform.python_version()},
        }), buffer)
        write_atomic(self.checkpoint, lambda file: file.write(buffer.getbuffer()))

    def resume(self) -> None:
        """Takes up the run in its folder.

        Raises UserError if that is another configuration, further than `steps`, or damaged.
        """
        content = read_checkpoint(self.checkpoint)
        mine = self.configs()
        changed = [f"{part}.{key} = {content[part].get(key)!r}, now {value!r}"
                   for part, values in mine.items() for key, value in values.items()
                   if content[part].get(key) != value and key not in ("steps", "data")]
        if changed:
            raise UserError(f"{self.folder}: holds another run ({'; '.join(changed)}); give those "
                            "values again, or another --run")
        if content["step"] > self.config.steps:
            raise UserError(f"--steps {self.config.steps}: {self.folder} is at step "
                            f"{content['step']} already; give more, or another --run")
        self.net.load_state_dict(content["net"])
        self.ema.net.load_state_dict(content["ema"])
        self.ema.num_updates = content["ema_updates"]
        self.optimizer.load_state_dict(content["optimizer"])
        self.step, self.seconds = content["step"], content["seconds"]
        self.loss_sum, self.loss_count = content["loss_sum"].to(self.device), content["loss_count"]
        self.rows = [row for row in read_metrics(self.folder) if int(row["step"]) <= self.step]

    def export(self) -> None:
        """Writes the averaged weights in half precision with their configs as metadata."""
        tensors = {name: tensor.half().contiguous().cpu()
                   for name, tensor in self.ema.net.state_dict().items()}
        metadata = {key: json.dumps(value) for key, value in self.configs().items()}
        content = safetensors_bytes(tensors, {"format": FORMAT, "step": str(self.step), **metadata})
        write_atomic(self.folder / "model.safetensors", lambda file: file.write(content))


def read_metrics(folder: Path) -> list[dict]:
    """The rows of a run's metrics.csv; none if there is no such file."""
    path = folder / "metrics.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_metrics(folder: Path, rows: list[dict]) -> None:
    """Writes metrics.csv anew; what was not measured at a step is left empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(folder / "metrics.csv", lambda file: file.write(text.getvalue().encode()))


def write_json(path: Path, values: dict) -> None:
    text = json.dumps(values, indent=2) + "\n"
    write_atomic(path, lambda file: file.write(text.encode()))


def draw_losses(folder: Path, rows: list[dict]) -> None:
    """Redraws loss.png: training and validation loss, and validation by timestep quartile."""
    def column(name: str) -> tuple[list[int], list[float]]:
        pairs = [(int(r["step"]), float(r[name])) for r in rows if r.get(name) not in (None, "")]
        return [p[0] for p in pairs], [p[1] for p in pairs]

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    left.plot(*column("loss"), color="0.7", label="train")
    left.plot(*column("validation_loss"), "o-", ms=3, color="C3", label="validation, averaged net")
    left.set(title="Loss", xlabel="step", ylabel="mean squared error", yscale="log")
    for index, quartile in enumerate(QUARTILES):
        label = f"t in [{index}/4, {index + 1}/4) of T"
        right.plot(*column(f"validation_{quartile}"), "o-", ms=3, label=label)
    right.set(title="Validation loss by timestep", xlabel="step", yscale="log")
    for axes in (left, right):
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False)
        axes.grid(alpha=0.3, which="both")
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110, format="png")
    plt.close(figure)
    write_atomic(folder / "loss.png", lambda file: file.write(buffer.getvalue()))


def memory_gib(device: torch.device) -> float:
    """Peak memory so far, in GiB: of the card, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


# ---------------------------------------------------------------------------------------------
# The loop
# ---------------------------------------------------------------------------------------------


class StopSignal(contextlib.AbstractContextManager):
    """Turns the first SIGINT, SIGTERM or SIGUSR1 into a wish to stop; a second SIGINT stops."""

    def __enter__(self):
        self.name = None
        self.before = {number: signal.signal(number, self._catch) for number in
                       (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
        return self

    def _catch(self, number: int, frame) -> None:
        self.name = signal.Signals(number).name
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)


class Log:
    """One line of metrics.csv, and one of the log or the bar, per interval."""

    def __init__(self, run: Run, every: int):
        self.run, self.every = run, every
        self.bar = tqdm(total=run.config.steps, initial=run.step, unit="step", desc="training",
                        dynamic_ncols=True, disable=not sys.stderr.isatty())
        self.since, self.at_step = time.monotonic(), run.step

    def due(self) -> bool:
        return self.run.step % self.every == 0 or self.run.step == self.run.config.steps

    def pause(self) -> None:
        """Ends a stretch of training, whose time counts as the run's."""
        self.run.loss_sum.item()  # waits for the device
        self.stretch = time.monotonic() - self.since
        self.run.seconds += self.stretch

    def restart(self) -> None:
        """Begins one, after what else was to be done, such as validation."""
        self.since, self.at_step = time.monotonic(), self.run.step

    def check(self, norm: Tensor) -> None:
        """Raises UserError if loss or gradient are no longer finite, before that is saved."""
        if not torch.isfinite(self.run.loss_sum) or not torch.isfinite(norm):
            raise UserError(f"step {self.run.step}: the loss or its gradient is not finite (norm "
                            f"{norm.item():.3g}); start again with a smaller --learning-rate or "
                            "with --dtype float32, in another --run")

    def write(self, norm: Tensor, validation: dict[str, float] | None) -> None:
        """Closes the interval."""
        run = self.run
        loss = run.loss_sum.item() / run.loss_count
        speed = (run.step - self.at_step) * run.config.batch_size / max(1e-9, self.stretch)
        row = {"step": run.step, "loss": f"{loss:.6g}",
               "learning_rate": f"{run.optimizer.param_groups[0]['lr']:.6g}",
               "gradient_norm": f"{norm.item():.6g}", "images_per_second": f"{speed:.4g}",
               "memory_gib": f"{memory_gib(run.device):.3g}"}
        if validation:
            row["validation_loss"] = f"{validation['loss']:.6g}"
            row |= {f"validation_{q}": f"{validation[q]:.6g}" for q in QUARTILES}
        run.rows.append(row)
        write_metrics(run.folder, run.rows)
        run.loss_sum.zero_()
        run.loss_count = 0
        self._show(row, speed)

    def _show(self, row: dict, speed: float) -> None:
        if not self.bar.disable:
            last = next((r["validation_loss"] for r in reversed(self.run.rows)
                         if r.get("validation_loss")), "-")
            self.bar.set_postfix_str(f"loss {row['loss']}, validation {last}, "
                                     f"{speed:.3g} images/s")
            return
        left = (self.run.config.steps - self.run.step) * self.run.config.batch_size / speed
        validation = f"validation {row['validation_loss']}  " if "validation_loss" in row else ""
        print(f"step {self.run.step}/{self.run.config.steps}  loss {row['loss']}  {validation}"
              f"{speed:.3g} images/s  {row['memory_gib']} GiB  "
              f"{left / 60:.0f} min left", flush=True)


def train(run: Run, log_every: int, save_every: int) -> bool:
    """The loop. Returns whether the run is finished; else a signal has stopped it, and it is
    saved. Raises UserError as soon as the loss is seen not to be finite."""
    log, norm = Log(run, log_every), None
    with StopSignal() as stop:
        while run.step < run.config.steps and stop.name is None:
            norm = run.train_step()
            log.bar.update()
            save = run.step % save_every == 0 or run.step == run.config.steps
            if not (save or log.due()):
                continue
            log.pause()
            log.check(norm)
            log.write(norm, run.evaluate("validate") if save and "validate" in run.data else None)
            if save:  # pictures first: once the checkpoint stands, they are not drawn again
                save_grid(run.sample(), run.folder / "samples" / f"step_{run.step:07d}.png", 4)
                draw_losses(run.folder, run.rows)
                run.save()
            log.restart()
        if run.step < run.config.steps and norm is not None:
            log.pause()
            log.check(norm)
            run.save()
    log.bar.close()
    if run.step < run.config.steps:
        print(f"stopped by {stop.name} after step {run.step}; the same command continues",
              flush=True)
    return run.step == run.config.steps


def finish(run: Run) -> None:
    """Tests once, on the people kept for it, and writes results.json and model.safetensors."""
    results = {"steps": run.step, "images_seen": run.step * run.config.batch_size,
               "seconds": round(run.seconds), "hardware": describe_machine(run.device),
               "parameters": sum(p.numel() for p in run.net.parameters()),
               "torch": str(torch.__version__), **run.configs()}
    for split in ("validate", "test"):
        if split in run.data:
            results[split] = run.evaluate(split)
            print(f"{split} loss {results[split]['loss']:.5f}")
    run.export()
    write_json(run.folder / "results.json", results)


def finished(run: Run) -> bool:
    """Whether the run's results, for these steps, are written already."""
    try:
        return json.loads((run.folder / "results.json").read_text())["steps"] == run.config.steps
    except (OSError, ValueError, KeyError):
        return False


def prepare(args: argparse.Namespace) -> Run:
    """The run that the options mean, at the step where its folder stands.

    Raises UserError for options, data or a folder that do not do, before anything is written.
    """
    try:
        device = choose_device(args.device)
    except ValueError as error:
        raise UserError(f"--device: {error}") from None
    if args.compile and device.type == "cpu" and not (shutil.which("g++") or shutil.which("c++")):
        raise UserError("--compile: no C++ compiler (g++) here; install one, or leave it out")
    size = None if args.image_size == "native" else args.image_size
    if size is not None:
        make_configs(args, (size, size), device, 0)  # refuses before hours of decoding
    loaded = load_splits(args.data, size, args.cache, args.skip_bad)
    images, count = loaded["train"].images, len(loaded["train"].images)
    configs = make_configs(args, images.shape[1:], device, loaded["train"].crc32)
    if count < args.batch_size:
        raise UserError(f"--batch-size {args.batch_size} is more than the {count} slices in "
                        "train; give less")
    folder = args.run or Path("runs") / f"{configs[2].data}-{args.preset}"
    data = {name: Slices(split.images, split.names, device, split.people)
            for name, split in loaded.items()}
    run = Run(folder, *configs, data, device, args.compile)
    if run.checkpoint.exists():
        try:
            run.resume()
        except (KeyError, ValueError, RuntimeError, TypeError, AttributeError) as error:
            raise UserError(f"{folder}: its checkpoint.pt or metrics.csv is damaged "
                            f"({str(error).splitlines()[0]}); give another --run") from None
    return run


def main() -> None:
    args = parse_args()
    keep_freed_memory()
    run = prepare(args)
    folder = run.folder
    print(f"{folder}: step {run.step} of {run.config.steps}, {len(run.data['train'])} slices of "
          f"{'x'.join(map(str, run.net.config.sample_size))}, "
          f"{sum(p.numel() for p in run.net.parameters()) / 1e6:.1f} M parameters, "
          f"{run.config.dtype} on {run.device}", flush=True)
    if run.step == run.config.steps and finished(run):
        print("finished before; give more --steps to go on")
        return
    write_json(folder / "config.json", run.configs())
    for left_over in folder.glob(".*.tmp"):  # of a process that was killed while it wrote
        left_over.unlink(missing_ok=True)
    if not train(run, args.log_every, args.save_every):
        return
    finish(run)
    print(f"done: look at {folder / 'samples'} and {folder / 'loss.png'}, then: "
          f"python predict.py --checkpoint {folder}")


if __name__ == "__main__":
    run_cli(main)

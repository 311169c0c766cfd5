"""Trains, validates, tests and saves the diffusion model.

    python train.py                          phantoms, a few minutes on two cores
    python train.py --data ROOT              real slices at 64 pixels
    python train.py --data ROOT --preset 128
    torchrun --standalone --nproc-per-node gpu -- train.py --data ROOT --preset 128

Everything goes to one run folder: the last checkpoint-STEP.pt, config.json, metrics.csv, loss.png,
samples/ and, at the end, results.json and model.safetensors (the EMA weights in half
precision). The same command continues a run, on any number of processes: from the step at which
Ctrl-C, SIGTERM, SIGUSR1 or --max-hours stopped it, else from the last checkpoint.
"""

import argparse
import contextlib
import json
import math
import os
import platform
import signal
import time
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from dataset import (AUGMENTATIONS, Slices, augment, batch_indices, draw_augmentations, load_splits,
                     moved)
from modules import EMA, Denoiser, LabelConfig, NoiseScheduler, UNet, run_net, sample, seeded_noise
from utils.checkpoint import (check_same_run, checkpoints, find_model, fitting_weights,
                              newest_checkpoint, write_checkpoint,
                              write_safetensors)
from utils.cli import EVAL_SEED, UserError, run_cli
from utils.configs import (QUALITY, SamplerConfig, SchedulerConfig, TrainConfig, UNetConfig,
                           make_scheduler_config)
from utils.device import (choose_dtype, describe_machine, keep_freed_memory, memory_gib,
                          out_of_memory)
from utils.distributed import (Stop, join_processes, leave_processes, local_device, on_all_ranks,
                               on_rank_zero, rank, world_size)
from utils.files import write_json
from utils.log import QUARTILES, Log, draw_losses
from utils.pictures import save_grid
from utils.train_options import check_tools, parse_args

STARTED = time.monotonic()  # --max-hours counts from here
OFFSET_SIGMA = 0.5  # --offset-noise acts below it
LABEL_STREAM = 2**31  # `part` of `step_seed` for labels and augmentation; no micro-batch has it

# ---------------------------------------------------------------------------------------------
# Settings
# ---------------------------------------------------------------------------------------------


def make_labels(args: argparse.Namespace, train: Slices) -> LabelConfig:
    """What the network is conditioned on; all splits use the range of heights of train."""
    low, high = float(train.numbers.min()), float(train.numbers.max())
    classes = sorted(set(train.classes) - {""})
    return LabelConfig(
        height_range=(low, high) if "height" in args.condition and high > low else None,
        classes=classes if "class" in args.condition and len(classes) > 1 else (),
        augmentations=len(AUGMENTATIONS) if args.augment else 0)


def make_configs(args: argparse.Namespace, size: tuple[int, int], device: torch.device,
                 data_crc32: int, labels: LabelConfig = LabelConfig()
                 ) -> tuple[UNetConfig, SchedulerConfig, LabelConfig, TrainConfig]:
    """Builds a run's configs from its options, the slices' (H, W), their checksum and the labels.

    Raises UserError for options that contradict each other.
    """
    if args.batch_size % (args.accumulate * world_size()):
        processes = f" times {world_size()} processes" if world_size() > 1 else ""
        raise UserError(f"--accumulate {args.accumulate}{processes} does not divide --batch-size "
                        f"{args.batch_size}")
    try:
        unet = UNetConfig(
            sample_size=size, block_out_channels=args.block_out_channels,
            layers_per_block=args.layers_per_block, attention_resolutions=(),
            # Normalising a group of one channel would remove the timestep embedding.
            norm_num_groups=32 if min(args.block_out_channels) >= 64 else 8,
            dropout=args.dropout[0] if len(args.dropout) == 1 else args.dropout,
            patch_size=args.patch_size, label_dim=labels.dim, final_channels=args.final_channels,
            refine_channels=args.refine_channels)
        unet = replace(unet, attention_resolutions=[
            side for side in unet.resolutions if side <= args.attention_up_to])
        scheduler = make_scheduler_config(args.schedule, args.num_train_timesteps,
                                          args.prediction_type, size)
    except ValueError as error:
        option = "--image-size" if "image size" in str(error) else "--preset or its options"
        raise UserError(f"{option}: {error}") from None
    values = {**vars(args), "data": args.data.resolve().name if args.data else "phantoms",
              "init": args.init and Path(args.init).name,  # models are shared; paths are private
              "dtype": str(choose_dtype(args.dtype, device)).removeprefix("torch."),
              "data_crc32": data_crc32}
    config = TrainConfig(**{f.name: values[f.name] for f in fields(TrainConfig)
                            if f.name in values})
    return unet, scheduler, labels, config


# ---------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------


def step_seed(seed: int, step: int, part: int = 0) -> int:
    """A 32-bit seed, hashed from (seed, step, part)."""
    return int(np.random.SeedSequence([seed, step, part]).generate_state(1)[0])


def learning_rate(config: TrainConfig, step: int) -> float:
    """Learning rate of a step: linear warm-up, then cosine decay to zero, or constant."""
    warm_up = min(1.0, (step + 1) / max(1, config.warmup_steps))
    if config.lr_schedule == "constant":
        return config.learning_rate * warm_up
    done = min(1.0, step / config.steps)
    return config.learning_rate * warm_up * 0.5 * (1 + math.cos(math.pi * done))


def draw_timesteps(count: int, cdf: Tensor) -> Tensor:
    """Draws (count,) timesteps in ascending order from a cumulative distribution, float32 (T,).

    One is drawn from each of `count` intervals of equal probability: the loss varies less from
    step to step than with independent draws from the same distribution (stratified sampling;
    Kingma et al. 2021 use one offset for all intervals). Ascending order does no harm, since the
    slices of a batch are in random order.
    """
    device = cdf.device
    places = (torch.arange(count, device=device) + torch.rand(count, device=device)) / count
    return torch.searchsorted(cdf, places, right=True).clamp(max=len(cdf) - 1)


class Run:
    """A training run: network, EMA model, optimiser, data and folder."""

    def __init__(self, folder: Path, unet: UNetConfig, scheduler: SchedulerConfig,
                 labels: LabelConfig, config: TrainConfig, data: dict[str, Slices],
                 device: torch.device, compile_net: bool = False):
        self.folder, self.config, self.data, self.device = folder, config, data, device
        self.scheduler, self.labels = NoiseScheduler(scheduler), labels
        # Shifting the log signal-to-noise ratio by s shifts ln sigma by -s/2.
        self.timestep_cdf = self.scheduler.timestep_cdf(
            None if config.noise_distribution == "uniform"
            else config.p_mean - scheduler.log_snr_shift / 2, config.p_std).float().to(device)
        self.offset_end = self.scheduler.level_of_sigma(OFFSET_SIGMA).timestep
        torch.manual_seed(config.seed)
        self.net = UNet(unet).to(device, memory_format=torch.channels_last)
        self.ema = EMA(self.net, config.ema_length)
        self.ema_short = EMA(self.net, config.ema_short) if config.ema_short else None
        self.wrapped = torch.compile(self.net) if compile_net else self.net
        self.optimizer = torch.optim.AdamW(
            self.net.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay,
            fused=device.type in ("cpu", "cuda"))
        self.dtype = getattr(torch, config.dtype)
        if world_size() > 1:
            self.wrapped = DistributedDataParallel(self.wrapped, broadcast_buffers=False)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        self.bad = torch.zeros(3, device=device)  # first non-finite step, its loss and norm
        self.step, self.saved_step, self.keep, self.auto_dtype = 0, 0, 1, False
        self.seconds = 0.0
        self.loss_sum, self.loss_count = torch.zeros((), device=device), 0

    def initialise(self, path: Path) -> None:
        """Starts from the EMA weights of a model, for fine-tuning.

        Tensors that do not fit, because labels or the image size differ, keep their random values
        and are listed. Raises UserError as `fitting_weights` does.
        """
        ours = self.net.state_dict()
        fitting = fitting_weights(path, ours)
        self.net.load_state_dict(fitting, strict=False)
        self.ema.net.load_state_dict(self.net.state_dict())
        if self.ema_short:
            self.ema_short.net.load_state_dict(self.net.state_dict())
        new = ", ".join(name for name in ours if name not in fitting)
        if rank() == 0:
            print(f"--init {path}: {len(fitting)} of {len(ours)} tensors; random: {new or 'none'}",
                  flush=True)

    # Training ----------------------------------------------------------------------------

    def loss(self, step: int, part: int = 0, parts: int = 1) -> Tensor:
        """Mean squared error of micro-batch `part` of a step (Ho et al., algorithm 1), a scalar.

        A micro-batch is every `parts`-th slice of the batch from `part` on: timesteps ascend, so
        that contiguous parts would differ in noise. Slices, augmentation, labels, timesteps and
        noise depend on (seed, step) alone, not on `parts`; dropout depends on `part` too.
        """
        config, train = self.config, self.data["train"]
        count = config.batch_size
        mine = slice(part, count, parts)
        indices = batch_indices(len(train), count, config.seed, step)[mine]
        images, labels = train[indices], None
        if self.labels.dim:
            images, labels = self.label(images, indices, step, mine)
        torch.manual_seed(step_seed(config.seed, step))
        timesteps = draw_timesteps(count, self.timestep_cdf)
        noise = torch.randn(count, *images.shape[1:], device=self.device)
        if config.offset_noise:  # Guttenberg 2023, but only where the background shows the offset
            offset = config.offset_noise * torch.randn(count, 1, 1, 1, device=self.device)
            noise += offset * (timesteps < self.offset_end)[:, None, None, None]
        noise, timesteps = noise[mine], timesteps[mine]
        if parts > 1:
            torch.manual_seed(step_seed(config.seed, step, 1 + part))
        noisy = self.scheduler.add_noise(images, noise, timesteps)
        target = self.scheduler.training_target(images, noise, timesteps)
        return F.mse_loss(run_net(self.wrapped, noisy, timesteps, self.dtype, labels), target)

    def label(self, images: Tensor, indices: np.ndarray, step: int, mine: slice
              ) -> tuple[Tensor, Tensor]:
        """Augments a micro-batch and encodes its labels, some of which are dropped.

        Random numbers are drawn for the whole batch, so that they depend on (seed, step) alone.
        """
        config, count = self.config, self.config.batch_size
        seed = step_seed(config.seed, step, LABEL_STREAM)
        drop = (np.random.default_rng(seed).random((2, count)) < config.label_dropout)[:, mine]
        generator = torch.Generator().manual_seed(seed)
        parameters = draw_augmentations(count, config.augment, generator)[mine]
        if config.augment:
            images = augment(images, moved(parameters, self.device))
        return images, self.encode("train", indices, drop, parameters)

    def encode(self, split: str, indices: np.ndarray, drop: np.ndarray | None = None,
               augmentations: Tensor | None = None) -> Tensor | None:
        """Label vectors of slices, (B, dim), on the device.

        drop: boolean (2, B), the heights and the classes to drop; None for none.
        """
        data = self.data[split]
        numbers, classes = data.numbers[indices], [data.classes[i] for i in indices]
        if drop is not None:
            numbers = np.where(drop[0], np.nan, numbers)
            classes = [None if gone else name for name, gone in zip(classes, drop[1])]
        heights = self.labels.heights_of(numbers)
        vectors = self.labels.encode(heights, classes, augmentations)
        return None if vectors is None else moved(vectors, self.device)

    def backward(self) -> Tensor:
        """Computes the gradient of the next step's batch; returns its loss over all ranks."""
        accumulate, total = self.config.accumulate, torch.zeros((), device=self.device)
        for micro in range(accumulate):
            silent = world_size() > 1 and micro < accumulate - 1  # gradients are averaged once
            with self.wrapped.no_sync() if silent else contextlib.nullcontext():
                loss = self.loss(self.step, rank() * accumulate + micro, accumulate * world_size())
                self.scaler.scale(loss / accumulate).backward()
            total += loss.detach() / accumulate
        if world_size() > 1:
            dist.all_reduce(total)
        return total / world_size()

    def train_step(self) -> Tensor:
        """One optimiser step; returns the gradient norm before clipping, left on the device.

        Does not wait for a GPU: call `check` before the weights are used or saved.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.step)
        loss = self.backward()
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.net.parameters(), self.config.grad_clip)
        self.scaler.step(self.optimizer)  # in float16, skips a step whose gradient overflows
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(self.net)
        if self.ema_short:
            self.ema_short.update(self.net)
        self.loss_sum += loss
        self.loss_count += 1
        self.step += 1
        finite = loss.isfinite() & (norm.isfinite() | self.scaler.is_enabled())
        now = torch.stack([torch.full_like(loss, self.step), loss, norm])
        self.bad = torch.where(finite | (self.bad[0] > 0), self.bad, now)
        return norm

    def check(self) -> None:
        """Raises UserError if loss or gradient were not finite at a step since the last check.

        The weights are lost then, and must not be saved. In float16, a gradient may overflow until
        the scaler has found its scale: it fails if no scale of 1 or more is small enough.
        """
        step, loss, norm = self.bad.tolist()
        if not step and self.scaler.is_enabled() and self.scaler.get_scale() < 1:
            raise UserError(
                f"step {self.step}: gradients overflow in float16 at every loss scale; the last "
                f"good checkpoint is of step {self.saved_step}; start again in another --run with "
                "a smaller --learning-rate or --dtype float32")
        if not step:
            return
        train, count = self.data["train"], self.config.batch_size
        batch = batch_indices(len(train), count, self.config.seed, int(step) - 1)
        names = ", ".join(train.names[index] for index in batch[:10])
        raise UserError(
            f"step {int(step)}: loss {loss:.4g}, gradient norm {norm:.4g}: not finite; the step's "
            f"{count} slices: {names}{', ...' if count > 10 else ''}; the last good checkpoint is "
            f"of step {self.saved_step}; start again in another --run with a smaller "
            "--learning-rate or with --dtype float32")

    # Validation and samples --------------------------------------------------------------

    @torch.inference_mode()
    def evaluate(self, split: str) -> dict[str, float]:
        """Loss of the EMA model on a split: mean, and mean by quartile of the timestep.

        Each slice has a fixed noise and timestep (several if there are few slices), with timesteps
        evenly spaced over [0, T): two evaluations differ in the weights alone. The batches are
        distributed over the ranks and do not depend on their number.
        """
        data, total = self.data[split], self.scheduler.config.num_train_timesteps
        count = len(data) * -(-64 // len(data))
        order = np.random.default_rng(0).permutation(count)
        timesteps = torch.from_numpy(((order + 0.5) / count * total).astype(np.int64))
        losses = torch.zeros(count, device=self.device)
        batches = np.array_split(np.arange(count), -(-count // 32))
        for indices in batches[rank()::world_size()]:
            images, steps = data[indices % len(data)], timesteps[indices].to(self.device)
            noise = seeded_noise([EVAL_SEED + i for i in indices.tolist()], images.shape[1:])()
            noise = noise.to(self.device)
            labels = self.encode(split, indices % len(data))
            noisy = self.scheduler.add_noise(images, noise, steps)
            error = (run_net(self.ema.net, noisy, steps, self.dtype, labels)
                     - self.scheduler.training_target(images, noise, steps))
            losses[indices[0]:indices[-1] + 1] = (error**2).mean(dim=(1, 2, 3))
        losses = losses.cpu().double()
        if world_size() > 1:
            dist.all_reduce(losses)
        quartile = timesteps * 4 // total
        parts = {q: losses[quartile == i].mean().item() for i, q in enumerate(QUARTILES)}
        return {"loss": losses.mean().item(), **parts}

    def metrics(self, norm: Tensor, validate: bool) -> dict[str, float]:
        """A row of metrics.csv: the loss since the last one, and that of validation if asked for.

        norm: the last gradient norm.
        """
        row = {"loss": self.loss_sum.item() / self.loss_count, "gradient_norm": norm.item(),
               "learning_rate": self.optimizer.param_groups[0]["lr"],
               "memory_gib": memory_gib(self.device)}
        self.loss_sum.zero_()
        self.loss_count = 0
        if validate and "validate" in self.data:
            row |= {f"validation_{name}": value for name, value in
                    self.evaluate("validate").items()}
        return row

    def sample(self, num: int = 16, sampler: SamplerConfig = QUALITY["default"]) -> Tensor:
        """Samples slices from seeds 0 to num - 1 with the EMA model, the same seeds each time."""
        config = self.net.config
        denoise = Denoiser(self.ema.net, self.scheduler, dtype=self.dtype,
                           patch_size=config.patch_size)
        shape = (config.in_channels, *config.sample_size)
        return torch.cat([*sample(denoise, list(range(num)), shape, sampler, num, self.device,
                                  labels=self.labels.for_seeds)])

    # Saving and loading ------------------------------------------------------------------

    @property
    def checkpoint(self) -> Path:
        """The newest checkpoint."""
        return next(iter(checkpoints(self.folder)), self.folder / "checkpoint-*.pt")

    def parts(self) -> dict[str, object]:
        """The configs from which the run can be rebuilt."""
        return {"unet": self.net.config, "scheduler": self.scheduler.config, "labels": self.labels,
                "train": self.config}

    def configs(self) -> dict[str, dict]:
        return {part: asdict(config) for part, config in self.parts().items()}

    def save(self) -> None:
        """Writes checkpoint-STEP.pt and keeps the `keep` checkpoints before it.

        Raises UserError if it cannot be written and read back; nothing is changed then.
        """
        write_checkpoint(self.folder / f"checkpoint-{self.step:08d}.pt", {
            **self.configs(),
            "net": self.net.state_dict(), "ema": self.ema.net.state_dict(),
            "ema_short": self.ema_short.net.state_dict() if self.ema_short else {},
            "ema_updates": self.ema.num_updates, "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(), "step": self.step, "seconds": self.seconds,
            "loss_sum": self.loss_sum, "loss_count": self.loss_count,
            "normalisation": "uint8 / 127.5 - 1",
            "versions": {"torch": str(torch.__version__), "python": platform.python_version()}})
        self.saved_step = self.step
        for old in checkpoints(self.folder)[self.keep + 1:]:
            with contextlib.suppress(OSError):
                old.unlink()

    def resume(self) -> None:
        """Loads the newest checkpoint of the folder, if there is one.

        Raises UserError if its config differs, its step is beyond `steps`, or it is damaged.
        """
        content = on_all_ranks(lambda: newest_checkpoint(self.folder), first=True)
        if content is None:
            return
        stored = content["train"]
        may_change = ["steps", "data", "init", "accumulate", "extended", "clip_sample"]
        if self.auto_dtype and stored["dtype"] != "float16":
            may_change.append("dtype")
        check_same_run(self.folder, content, self.parts(), may_change)
        if content["step"] > self.config.steps:
            raise UserError(f"--steps {self.config.steps}: {self.folder} is at step "
                            f"{content['step']} already; give more, or another --run")
        self._note_changes(content["step"], stored)
        self.net.load_state_dict(content["net"])
        self.ema.net.load_state_dict(content["ema"])
        self.ema.num_updates = int(content["ema_updates"])
        if self.ema_short:
            self.ema_short.net.load_state_dict(content["ema_short"])
            self.ema_short.num_updates = self.ema.num_updates
        # The optimiser's own groups: they say whether it is fused, which depends on the device.
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({**content["optimizer"], "param_groups": groups})
        self.scaler.load_state_dict(content["scaler"])
        self.step = self.saved_step = int(content["step"])
        self.seconds, self.loss_count = float(content["seconds"]), int(content["loss_count"])
        self.loss_sum.copy_(content["loss_sum"])

    def _note_changes(self, step: int, stored: dict) -> None:
        """Prints what changes in a continued run, and records a change of `steps`."""
        config, extended = self.config, tuple(stored.get("extended", ()))
        if config.dtype != stored["dtype"]:
            print(f"{self.folder}: computes in {config.dtype} from step {step} on, before in "
                  f"{stored['dtype']}: --dtype auto depends on the hardware", flush=True)
        if step and config.lr_schedule == "cosine" and config.steps != stored["steps"]:
            before = replace(config, steps=stored["steps"])
            rates = [learning_rate(each, step) for each in (before, config)]
            print(f"{self.folder}: --steps {config.steps}, before {before.steps}: at step {step} "
                  f"the learning rate changes from {rates[0]:.3g} to {rates[1]:.3g}, and falls to "
                  f"zero at step {config.steps}", flush=True)
            extended += ((step, before.steps),)
        self.config = replace(config, extended=extended)

    def export(self, name: str = "model", ema: EMA | None = None) -> None:
        """Writes NAME.safetensors: EMA weights in half precision, with the configs as metadata."""
        write_safetensors(self.folder / f"{name}.safetensors",
                          (ema or self.ema).net.state_dict(), self.configs(), self.step)


# ---------------------------------------------------------------------------------------------
# The loop
# ---------------------------------------------------------------------------------------------


def train(run: Run, log_every: int, save_every: int, hours: float = math.inf,
          tensorboard: bool = False) -> bool:
    """Trains up to the last step and returns True, or until asked to stop and returns False.

    Raises UserError if the loss or the gradient is not finite.
    """
    log = Log(run.folder, run.step, run.config.steps, tensorboard)
    with Stop(STARTED + 3600 * hours) as stop:
        while run.step < run.config.steps and not stop.agreed(log.reserve()):
            norm = run.train_step()
            log.count()
            save = run.step % save_every == 0 or run.step == run.config.steps
            if not save and run.step % log_every:
                continue
            run.check()  # waits for the device
            run.seconds += log.pause()
            log.write(run.metrics(norm, save) | {
                "images_per_second": log.steps_per_second() * run.config.batch_size})
            if save:  # images first: they are not drawn again once the checkpoint exists
                picture = run.folder / "samples" / f"step_{run.step:07d}.png"
                on_rank_zero(lambda: save_grid(run.sample(), picture, 4))
                on_rank_zero(draw_losses, run.folder)
                on_rank_zero(run.save)
                if run.step <= run.config.steps / 4:  # for autoguidance (Karras et al. 2024a)
                    on_rank_zero(run.export, "guide")
            log.restart()
        if stop.reason and run.step != run.saved_step:
            run.check()
            run.seconds += log.pause()
            on_rank_zero(run.save)
    log.bar.close()
    if stop.reason:
        print(f"stopped by {stop.reason} after step {run.step}; the same command continues",
              flush=True)
    return not stop.reason


def finish(run: Run) -> None:
    """Evaluates on validate and test, and writes results.json and model.safetensors."""
    results = {"steps": run.step, "images_seen": run.step * run.config.batch_size,
               "seconds": round(run.seconds), "hardware": describe_machine(run.device),
               "processes": world_size(),
               "parameters": sum(p.numel() for p in run.net.parameters()),
               "torch": str(torch.__version__), **run.configs()}
    for split in ("validate", "test"):
        if split in run.data:
            results[split] = run.evaluate(split)
            print(f"{split} loss {results[split]['loss']:.5f}")
    if rank() == 0:
        run.export()
        if run.ema_short:
            run.export("model-short", run.ema_short)
        write_json(run.folder / "results.json", results)


def finished(run: Run) -> bool:
    """Whether results.json exists for this number of steps."""
    try:
        text = (run.folder / "results.json").read_text(encoding="utf-8")
        return json.loads(text)["steps"] == run.config.steps
    except (OSError, ValueError, KeyError):
        return False


def prepare(args: argparse.Namespace) -> Run:
    """Builds the run of the options, and resumes it if its folder has a checkpoint.

    Raises UserError for invalid options, data or folder, before anything is written.
    """
    device = local_device(args.device)
    check_tools(args, device)
    size = None if args.image_size == "native" else args.image_size
    if size is not None:
        make_configs(args, (size, size), device, 0)  # rejects before hours of decoding
    # The first process of each machine decodes the slices; the others then read its cache.
    load = partial(load_splits, args.data, size, args.cache, args.skip_bad,
                   args.few_levels)
    loaded = on_all_ranks(load if os.environ.get("LOCAL_RANK", "0") == "0" else lambda: None)
    loaded = on_all_ranks(lambda: loaded or load())
    data = {name: split.to(device) for name, split in loaded.items()}
    labels = make_labels(args, data["train"])
    size, count = tuple(data["train"].images.shape[1:]), len(data["train"])
    configs = make_configs(args, size, device, data["train"].crc32, labels)
    if count < args.batch_size:
        raise UserError(f"--batch-size {args.batch_size} is more than the {count} slices in "
                        "train; give a smaller one")
    folder = args.run or Path("runs") / f"{configs[-1].data}-{args.preset}"
    run = Run(folder, *configs, data, device, args.compile)
    run.keep, run.auto_dtype = args.keep, args.dtype == "auto"
    try:
        run.resume()
    except (KeyError, IndexError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        if out_of_memory(error):
            raise
        raise UserError(f"{run.checkpoint}: is damaged ({str(error).splitlines()[-1]}); give "
                        "another --run") from None
    if args.init and run.step == 0:
        on_all_ranks(lambda: run.initialise(find_model(args.init, "--init")))
    return run


def start(run: Run) -> None:
    """Prepares the folder: writes the configs, and removes files that were left incomplete."""
    write_json(run.folder / "config.json", run.configs())
    for left_over in run.folder.glob(".*.tmp"):  # of a process that was killed while it wrote
        left_over.unlink(missing_ok=True)


def carry_out(args: argparse.Namespace) -> None:
    """Starts or continues the run of the options, and finishes it."""
    run = on_all_ranks(lambda: prepare(args))
    folder = run.folder
    height, width = run.net.config.sample_size
    print(f"{folder}: step {run.step} of {run.config.steps}, {len(run.data['train'])} slices "
          f"of {width}x{height}, "
          f"{sum(p.numel() for p in run.net.parameters()) / 1e6:.1f} M parameters, "
          f"{run.config.dtype} on {run.device}"
          + (f" and {world_size() - 1} more" if world_size() > 1 else ""), flush=True)
    if on_all_ranks(lambda: run.step == run.config.steps and finished(run), first=True):
        print("finished before; give more --steps to continue")
        return
    on_all_ranks(lambda: start(run), first=True)
    done = on_all_ranks(lambda: train(run, args.log_every, args.save_every,
                                  args.max_hours or math.inf, args.tensorboard))
    if done:
        finish(run)
    if rank() == 0 and run.saved_step != run.step:
        raise UserError(f"{run.checkpoint}: the last save failed, see above; the last good "
                        f"checkpoint is of step {run.saved_step}, and this was {run.step}; "
                        "free some space, then the same command continues from there")
    if done:
        print(f"done: look at {folder / 'samples'} and {folder / 'loss.png'}, then: "
              f"python predict.py --checkpoint {folder} --out {folder / 'slices'}")


def main() -> None:
    if not hasattr(signal, "SIGUSR1"):
        raise UserError("train.py needs Linux or macOS; on Windows, run it in WSL")
    join_processes()
    keep_freed_memory()
    args = on_all_ranks(parse_args)
    carry_out(args)
    leave_processes()


if __name__ == "__main__":
    run_cli(main)

"""The record of a training run: metrics.csv, loss.png, TensorBoard, and a bar or lines."""

import math
import sys
import time
from pathlib import Path

from matplotlib.figure import Figure
from tqdm import tqdm

from utils.distributed import on_rank_zero, rank
from utils.files import append_csv, read_csv, write_atomic, write_csv

QUARTILES = ("q1", "q2", "q3", "q4")  # of the timesteps
COLUMNS = ("step", "loss", "validation_loss", *(f"validation_{q}" for q in QUARTILES),
           "learning_rate", "gradient_norm", "images_per_second", "memory_gib")


class Log:
    """Writes a row of metrics.csv, and a line of the log or the bar, per interval, and keeps time.

    folder: that of the run, whose metrics.csv is cut back to `step`, at which training continues;
    total: the last step.
    """

    def __init__(self, folder: Path, step: int, total: int, tensorboard: bool = False):
        self.path, self.step, self.first, self.total = folder / "metrics.csv", step, step, total
        self.unwritten: list[dict] = []
        self.writer, self.validation = None, "-"
        if rank() == 0:
            self._cut_back()
        if tensorboard and rank() == 0:
            from torch.utils.tensorboard import SummaryWriter
            self.writer = SummaryWriter(folder / "tensorboard", purge_step=step + 1)
        self.bar = tqdm(total=total, initial=step, unit="step", desc="training",
                        dynamic_ncols=True, disable=rank() > 0 or not sys.stderr.isatty())
        self.longest, self.paused = 0.0, time.monotonic()
        self.restart()

    def count(self) -> None:
        """Counts a step."""
        self.step += 1
        self.bar.update()

    def reserve(self) -> float:
        """Seconds to reserve for the last save: a minute plus twice the longest validation and save
        so far; -inf before the first step, so that every start makes progress."""
        return 60 + 2 * self.longest if self.step > self.first else -math.inf

    def pause(self) -> float:
        """Ends a stretch of training and returns its seconds."""
        self.paused = time.monotonic()
        return self.paused - self.since

    def restart(self) -> None:
        """Begins a stretch of training, after validation or saving."""
        self.since, self.at_step = time.monotonic(), self.step
        self.longest = max(self.longest, self.since - self.paused)

    def steps_per_second(self) -> float:
        """Speed of the stretch that `pause` ended."""
        return (self.step - self.at_step) / max(1e-9, self.paused - self.since)

    def write(self, values: dict[str, float]) -> None:
        """Writes the values of this step, whose names are `COLUMNS`."""
        row = {"step": self.step} | {name: f"{value:.6g}" for name, value in values.items()}
        self.validation = row.get("validation_loss", self.validation)
        self.unwritten.append(row)
        on_rank_zero(self._append)
        if self.writer:
            on_rank_zero(self._write_events, row)
        self._show(row)

    def _cut_back(self) -> None:
        """Removes the rows beyond the checkpoint, and one that was not written completely."""
        if self.path.exists():
            rows = [row for row in read_csv(self.path)
                    if row.get("step", "").isdigit() and int(row["step"]) <= self.step]
            write_csv(self.path, COLUMNS, rows)
            self.validation = next((row["validation_loss"] for row in rows[::-1]
                                    if row.get("validation_loss")), "-")

    def _append(self) -> None:
        append_csv(self.path, COLUMNS, self.unwritten)
        self.unwritten.clear()

    def _write_events(self, row: dict) -> None:
        for name, value in row.items():
            self.writer.add_scalar(name, float(value), row["step"])
        self.writer.flush()

    def _show(self, row: dict) -> None:
        speed = float(row["images_per_second"])
        text = f"loss {row['loss']}  validation {self.validation}  {speed:.3g} images/s"
        self.bar.set_postfix_str(text)
        if self.bar.disable:
            left = (self.total - self.step) / max(1e-9, self.steps_per_second())
            print(f"step {self.step}/{self.total}  {text}  {float(row['memory_gib']):.3g} GiB  "
                  f"{left / 60:.0f} min of training left", flush=True)


def draw_losses(folder: Path) -> None:
    """Draws loss.png from metrics.csv: training and validation loss, the latter by quartile of the
    timestep as well."""
    rows = read_csv(folder / "metrics.csv")
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    curves = [(left, "loss", "train", dict(color="0.7")),
              (left, "validation_loss", "validation, EMA model",
               dict(marker="o", ms=3, color="C3"))]
    bounds = ("0", "T/4", "T/2", "3T/4", "T")
    curves += [(right, f"validation_{quartile}", f"t from {bounds[i]} to {bounds[i + 1]}",
                dict(marker="o", ms=3)) for i, quartile in enumerate(QUARTILES)]
    for axes, name, label, how in curves:
        points = [(int(row["step"]), float(row[name])) for row in rows if row.get(name)]
        if points:
            axes.plot(*zip(*points), label=label, **how)
            axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    left.set(title="Loss", xlabel="step", ylabel="mean squared error", yscale="log")
    right.set(title="Validation loss by timestep", xlabel="step", yscale="log")
    for axes in (left, right):
        axes.grid(alpha=0.3, which="both")
    write_atomic(folder / "loss.png", lambda file: figure.savefig(file, dpi=110, format="png"))

"""Shared by the benchmarks: contenders in processes of their own, taking turns; table, plot, JSON.

Each contender lives in its own process, so that none profits from another's memory settings or
kernel choices and its peak memory is its own. One runs at a time and all take turns, so that a
machine that slows down or speeds up does so for all of them.
"""

import argparse
import contextlib
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from matplotlib import pyplot as plt  # noqa: E402

from utils.cli import Parser  # noqa: E402
from utils.device import describe_machine, memory_gib  # noqa: E402
from utils.files import write_json  # noqa: E402


def make_parser(description: str, name: str, repeats: int) -> argparse.ArgumentParser:
    parser = Parser(description=description)
    parser.add_argument("--device", default="auto", metavar="D",
                        help="cuda, cuda:1 or cpu (default: the fastest here)")
    parser.add_argument("--repeats", type=int, default=repeats, metavar="N",
                        help="turns of each contender, whose median counts (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there too")
    parser.add_argument("--plot", type=Path, default=Path("runs/benchmarks") / f"{name}.png",
                        metavar="FILE", help="where the plot goes (default: %(default)s)")
    return parser


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def fastest(work: Callable, repeats: int, device: torch.device) -> float:
    """The shortest of some runs, in seconds: what the work costs when nothing disturbs it."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times)


def _serve(pipe, make: Callable, device: torch.device, settings: dict) -> None:
    """A contender's process: builds it, warms it up, then runs as many steps as it is asked for."""
    sys.stderr = open(os.devnull, "w")  # compilers talk
    start = time.perf_counter()
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # accelerate takes the current GPU
    try:
        made = make(device, **settings)
        step = getattr(made, "step", made)
        for _ in range(3):
            step()
        synchronize(device)
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        return
    pipe.send(time.perf_counter() - start)
    while (steps := pipe.recv()) is not None:
        start = time.perf_counter()
        for _ in range(steps):
            step()
        synchronize(device)
        pipe.send(((time.perf_counter() - start) / steps, memory_gib(device)))


class Contender:
    """`make(device, **settings)` returns a function that does one step; it runs elsewhere."""

    def __init__(self, name: str, make: Callable, device: torch.device, **settings):
        self.name, self.times, self.memory = name, [], 0.0
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, make, device, settings),
                                       daemon=True)
        self.process.start()
        theirs.close()
        try:
            ready = self.pipe.recv()
        except EOFError:
            ready = "its process died"
        self.alive = not isinstance(ready, str)
        self.start_seconds = ready if self.alive else None
        print(f"  {name}: " + (f"ready in {ready:.0f} s" if self.alive else f"FAILED ({ready})"),
              flush=True)

    def turn(self, steps: int) -> None:
        self.pipe.send(steps)
        seconds, self.memory = self.pipe.recv()
        self.times.append(seconds)

    def close(self) -> None:
        if self.alive:
            self.pipe.send(None)
        self.process.join()

    @property
    def seconds(self) -> float:
        return statistics.median(self.times)


def take_turns(contenders: list[Contender], repeats: int, seconds: float = 2.0) -> None:
    """Fills `times` of all that are alive; a turn lasts about `seconds`."""
    alive = [c for c in contenders if c.alive]
    for contender in alive:
        contender.turn(1)
    steps = {c: max(1, round(seconds / c.times.pop())) for c in alive}
    for _ in range(repeats):
        for contender in alive:
            contender.turn(steps[contender])
    for contender in contenders:
        contender.close()


def facts(device: torch.device) -> dict:
    """What the numbers were taken on."""
    versions = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for package in ("diffusers", "denoising_diffusion_pytorch", "torchvision"):
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return {"hardware": describe_machine(device), "versions": versions,
            "command": "python " + " ".join([os.path.relpath(sys.argv[0]), *sys.argv[1:]])}


def print_table(header: list[str], rows: list[list]) -> None:
    """A Markdown table, columns aligned."""
    cells = [header] + [[f"{v:.4g}" if isinstance(v, float) else str(v) for v in row]
                        for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    for index, row in enumerate(cells):
        print("| " + " | ".join(c.ljust(w) for c, w in zip(row, widths)) + " |")
        if index == 0:
            print("|" + "|".join("-" * (w + 2) for w in widths) + "|")


def draw_bars(path: Path, groups: dict[str, dict[str, float]], unit: str, title: str) -> None:
    """One panel of horizontal bars per group: {group: {name: value}}."""
    figure, panels = plt.subplots(1, len(groups), figsize=(4.6 * len(groups), 2.9),
                                  layout="constrained", squeeze=False)
    for axes, (group, values) in zip(panels[0], groups.items()):
        names = list(values)[::-1]
        colours = ["C3" if name.startswith("ours") else "0.7" for name in names]
        bars = axes.barh(names, [values[name] for name in names], color=colours)
        axes.bar_label(bars, fmt="%.3g", padding=2, fontsize=8)
        axes.set(title=group, xlabel=unit)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.15)
    figure.suptitle(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    print(f"plot: {path}")


def save_json(path: Path | None, values: dict) -> None:
    if path:
        write_json(path, values)
        print(f"numbers: {path}")

"""How training speed and memory go with the batch and the processes, and what the loop costs.

    python tests/benchmarks/train_scaling.py

Three tables: images/s and peak memory against the batch size; images/s against the number of
processes (torchrun, the same global batch); and what a run spends outside the net's forward and
backward pass and the optimiser, in seconds per 1,000 steps.
"""

import contextlib
import csv
import io
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import bench  # first: it puts the scripts on the path
import torch
from bench import ROOT, Contender, draw_bars, facts, fastest, print_table, save_json, take_turns
from contenders import comparable, our_configs, ours
from dataset import Slices
from train import Run
from utils.cli import run_cli
from utils.distributed import local_device
from utils.log import Log, draw_losses
from utils.phantoms import phantom_slices
from utils.train_options import PRESETS


def against_batch(size: int, batches: list[int], device: torch.device, repeats: int) -> list[dict]:
    contenders = [Contender(f"batch {b}", ours, device, size=size, batch_size=b) for b in batches]
    take_turns(contenders, repeats)
    return [dict(batch_size=b, images_per_second=b / c.seconds, peak_gib=c.memory)
            for b, c in zip(batches, contenders) if c.alive]


def against_processes(size: int, counts: list[int], device: torch.device) -> list[dict]:
    """Whole runs of train.py on phantoms under torchrun; cores are shared out among processes."""
    rows = []
    for count in counts:
        with tempfile.TemporaryDirectory() as scratch:
            threads = str(max(1, torch.get_num_threads() // count))
            subprocess.run(
                [sys.executable, "-m", "torch.distributed.run", "--standalone",
                 "--nproc-per-node", str(count), "--", str(ROOT / "train.py"),
                 *comparable(size), "--steps", "40", "--log-every", "10", "--save-every",
                 "1000", "--run", scratch, "--device", device.type],
                env={**os.environ, "OMP_NUM_THREADS": threads}, check=True, capture_output=True)
            with open(Path(scratch) / "metrics.csv", newline="") as file:
                speeds = [float(row["images_per_second"]) for row in csv.DictReader(file)]
        rows.append(dict(processes=count, images_per_second=max(speeds[1:])))
    return rows


def loop_costs(size: int, device: torch.device) -> list[dict]:
    """Seconds per 1,000 steps of all that is not the net's own work, at the preset's intervals."""
    preset = PRESETS["64"]
    images = phantom_slices(size, 0, 60)[0]  # 480, as many as the real set has for validation
    data = {s: Slices(images, [f"slice_{i}" for i in range(len(images))], device)
            for s in ("train", "validate")}
    with tempfile.TemporaryDirectory() as scratch:
        run = Run(Path(scratch), *our_configs(size, preset["batch_size"], device), data, device)
        whole = fastest(run.train_step, 8, device)
        log, per_save = Log(run.folder, 0, 1000), 1000 / preset["save_every"]
        norm = run.train_step()
        log.count()
        log.pause()
        parts = {  # name: (the work, how often in 1,000 steps)
            "a log line and metrics.csv": (lambda: (
                setattr(run, "loss_count", 1),
                log.write(run.metrics(norm, False) | {"images_per_second": 1.0})), 1000 / 50),
            "validation, 480 slices": (lambda: run.evaluate("validate"), per_save),
            "samples, 16 slices": (run.sample, per_save),
            "loss.png": (lambda: draw_losses(run.folder), per_save),
            "checkpoint": (run.save, per_save),
            "EMA weights": (lambda: run.ema.update(run.net), 1000),
        }
        with contextlib.redirect_stdout(io.StringIO()):  # the log's lines
            costs = {name: fastest(work, 5, device) * n for name, (work, n) in parts.items()}
        # A net of one weight: what is left of a step is the loop, EMA weights included.
        weight = torch.ones((), device=device, requires_grad=True)
        run.wrapped = lambda sample, timesteps: sample * weight
        loop = fastest(run.train_step, 20, device)
    costs = {"the step itself": whole * 1000,
             "data, noise, target, EMA weights, bookkeeping": loop * 1000, **costs}
    return [dict(name=name, seconds=seconds, share=seconds / (whole * 1000))
            for name, seconds in costs.items()]


def main() -> None:
    parser = bench.make_parser("Scaling of training, and the cost of the loop.",
                               "train_scaling", repeats=3)
    parser.add_argument("--size", type=int, default=64, metavar="S",
                        help="side in pixels (default: %(default)s)")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[2, 4, 8, 16, 32],
                        metavar="B", help="slices per step (default: 2 4 8 16 32)")
    parser.add_argument("--processes", type=int, nargs="+", metavar="N",
                        help="numbers of processes (default: 1 2 on a CPU, else all that divide "
                             "the batch, up to one a GPU)")
    args = parser.parse_args()
    device = local_device(args.device)
    gpus = torch.cuda.device_count() if device.type == "cuda" else 2
    counts = args.processes or [n for n in range(1, gpus + 1)
                                if PRESETS["64"]["batch_size"] % n == 0]

    batches = against_batch(args.size, args.batch_sizes, device, args.repeats)
    print(f"\n{args.size} px\n")
    print_table(["batch", "images/s", "peak GiB"],
                [[r["batch_size"], f"{r['images_per_second']:.1f}", f"{r['peak_gib']:.2f}"]
                 for r in batches])
    processes = against_processes(args.size, counts, device)
    print("\nthe preset's batch, shared out\n")
    print_table(["processes", "images/s"],
                [[r["processes"], f"{r['images_per_second']:.1f}"] for r in processes])
    costs = loop_costs(args.size, device)
    print("\nper 1,000 steps\n")
    print_table(["what", "seconds", "of the steps' time"],
                [[r["name"], f"{r['seconds']:.1f}", f"{r['share']:.1%}"] for r in costs])
    print(f"\n{facts(device)}")
    draw_bars(args.plot, {
        "images/s": {f"ours, batch {r['batch_size']}": r["images_per_second"] for r in batches},
        "peak GiB": {f"ours, batch {r['batch_size']}": r["peak_gib"] for r in batches}},
        "", facts(device)["hardware"])
    save_json(args.json, {**facts(device), "size": args.size, "batch": batches,
                          "processes": processes, "costs": costs})


if __name__ == "__main__":
    run_cli(main)

"""Whether bfloat16 trains as float32 does: the same 500 steps in both, and float32 once more
from another seed, which shows how far two runs lie apart by chance.

    python tests/benchmarks/precision.py --data ROOT
"""

import tempfile
from pathlib import Path

import bench  # first: it puts the scripts on the path
import numpy as np
from bench import facts, print_table, save_json
from dataset import load_splits
from matplotlib import pyplot as plt
from train import Run, make_configs, parse_args
from utils.cli import progress_bar, run_cli
from utils.device import keep_freed_memory
from utils.distributed import local_device


def train(args, dtype: str, seed: int, loaded: dict, device) -> dict:
    """One run: its training losses step by step, and its validation loss at the end."""
    options = ["--preset", args.preset, "--steps", str(args.steps), "--dtype", dtype, "--seed",
               str(seed), "--warmup-steps", "50"]
    configs = make_configs(parse_args(options), tuple(loaded["train"].images.shape[1:]), device, 0)
    data = {name: split.to(device) for name, split in loaded.items()}
    with tempfile.TemporaryDirectory() as scratch:
        run, losses = Run(Path(scratch), *configs, data, device), []
        with progress_bar(args.steps, f"{dtype}, seed {seed}", "step") as bar:
            for _ in range(args.steps):
                before = run.loss_sum.clone()
                run.train_step()
                losses.append((run.loss_sum - before).item())
                bar.update()
        return {"losses": losses, "validation": run.evaluate("validate")["loss"]}


def main() -> None:
    parser = bench.make_parser("bfloat16 against float32.", "precision", repeats=1)
    parser.add_argument("--data", type=Path, metavar="ROOT",
                        help="folder of slices (default: built-in phantoms)")
    parser.add_argument("--preset", default="quick", help="of train.py (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=500, help="(default: %(default)s)")
    args = parser.parse_args()
    device = local_device(args.device)
    keep_freed_memory()
    size = parse_args(["--preset", args.preset]).image_size
    loaded = load_splits(args.data, size)
    runs = {f"{dtype}, seed {seed}": train(args, dtype, seed, loaded, device)
            for dtype, seed in (("float32", 0), ("bfloat16", 0), ("float32", 1))}
    window = max(1, args.steps // 20)
    smooth = {name: np.convolve(run["losses"], np.ones(window) / window, "valid")
              for name, run in runs.items()}
    exact, low, other = smooth.values()
    rows = [[name, f"{np.mean(run['losses'][-100:]):.5f}", f"{run['validation']:.5f}",
             f"{np.mean(np.abs(smooth[name] / exact - 1)):.2%}"] for name, run in runs.items()]
    print()
    print_table(["run", "training loss, last 100 steps", "validation loss",
                 f"mean distance to the first curve ({window}-step means)"], rows)
    figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
    for (name, curve), colour in zip(smooth.items(), ("k", "C3", "0.7")):
        axes.plot(np.arange(len(curve)) + window, curve, label=name, color=colour, lw=1)
    axes.set(xlabel="step", ylabel=f"loss, mean of {window} steps", yscale="log")
    axes.legend(frameon=False)
    args.plot.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.plot, dpi=110)
    print(f"\nplot: {args.plot}\n{facts(device)}")
    save_json(args.json, {**facts(device), "runs": runs})


if __name__ == "__main__":
    run_cli(main)

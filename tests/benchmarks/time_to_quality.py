"""Quality after the same training time: ours, diffusers' example, denoising-diffusion-pytorch.

    python tests/benchmarks/time_to_quality.py --data ROOT

Each trains on the same 64-pixel slices for the same time with its project's defaults, with the net
that its project proposes and with one of the size of ours, in bfloat16 where the hardware has it.
The same sampler, predict.py's default, then draws slices from each one's EMA weights, and the
measures of tools.evaluate judge them. What --out holds of the same settings is not done again.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import bench  # first: it puts the scripts on the path
import torch
from bench import facts, print_table
from contenders import Training, ddp_training, diffusers_training
from matplotlib import pyplot as plt
from modules import Denoiser, sample
from tools.evaluate import Reference, assess, load_data, rounded
from tools.features import load_network
from tools.figures import real_slices, show
from torch import Tensor
from utils.cli import Parser, positive_float, positive_int, progress_bar, run_cli
from utils.configs import QUALITY
from utils.device import choose_dtype, keep_freed_memory
from utils.distributed import local_device
from utils.files import write_json
from utils.pictures import read_slice, save_png, to_uint8

import train

SIZE, BATCH = 64, 16
MEASURES = ("spectrum", "kid", "frechet", "two_sample", "precision", "recall")


def clock(device: torch.device) -> float:
    """Seconds: on a CPU of its cores' time, so that other programs do not count."""
    if device.type == "cpu":
        return time.process_time() / torch.get_num_threads()
    torch.accelerator.synchronize(device)
    return time.monotonic()


def run_for(step: Callable, seconds: float, device: torch.device) -> int:
    """Calls `step` for this time; returns how often."""
    count, start = 0, clock(device)
    while clock(device) - start < seconds:
        step()
        count += 1
    return count


def our_run(args: argparse.Namespace, steps: int) -> train.Run:
    """train.py's default run on slices; nothing is written."""
    options = train.parse_args(["--data", str(args.data), "--steps", str(steps), "--run",
                                str(args.out / "unused"), "--device", args.device])
    return train.prepare(options)


def train_ours(args: argparse.Namespace, device: torch.device) -> dict:
    """train.py for --minutes: its learning rate has to fall to zero with the last step, so that
    the number of steps is estimated first, from a tenth of the time (which is not counted)."""
    seconds = 60 * args.minutes
    steps = 10 * run_for(our_run(args, 10**6).train_step, seconds / 10, device)
    run, start = our_run(args, steps), clock(device)
    for _ in range(steps):
        run.train_step()
    denoise = Denoiser(run.ema.net, run.scheduler, dtype=run.dtype,
                       patch_size=run.net.config.patch_size)
    return {"steps": steps, "minutes": (clock(device) - start) / 60,
            "parameters": sum(p.numel() for p in run.net.parameters()), "denoise": denoise,
            "labels": run.labels.for_seeds}


def train_theirs(training: Training, args: argparse.Namespace, device: torch.device) -> dict:
    """Another project's loop for --minutes."""
    start = clock(device)
    steps = run_for(training.step, 60 * args.minutes, device)
    denoise = Denoiser(training.net(), training.scheduler, dtype=choose_dtype("auto", device),
                       patch_size=training.patch)
    return {"steps": steps, "minutes": (clock(device) - start) / 60,
            "parameters": training.parameters, "denoise": denoise, "labels": lambda seeds: None}


def draw(trained: dict, num: int, device: torch.device) -> Tensor:
    """Slices of seeds 0 on, uint8 (num, H, W)."""
    with progress_bar(num, "sampling", "slice") as bar:
        batches = []
        for images in sample(trained["denoise"], list(range(num)), (1, SIZE, SIZE),
                             QUALITY["default"], BATCH, device, labels=trained["labels"]):
            batches.append(to_uint8(images.cpu())[:, 0])
            bar.update(len(images))
    return torch.cat(batches)


def contenders(images: Tensor, args: argparse.Namespace, device: torch.device) -> dict:
    """Name -> a function that trains it."""
    precision = "no" if choose_dtype("auto", device) == torch.float32 else "bf16"

    def theirs(make: Callable, own_net: bool) -> Callable:
        return lambda: train_theirs(make(device, SIZE, BATCH, precision, images=images,
                                         own_net=own_net), args, device)
    names = {"same": "our size", "own": "its net"}
    return {"ours": lambda: train_ours(args, device)} | {
        f"{project}, {names[nets]}": theirs(make, nets == "own") for nets in args.nets
        for project, make in (("diffusers", diffusers_training),
                              ("denoising-diffusion-pytorch", ddp_training))}


def folder_of(name: str, args: argparse.Namespace) -> Path:
    """Where a contender's slices and result lie."""
    return args.out / f"{name.replace(', ', '-').replace(' ', '-')}-{args.minutes:g}min-{args.num}"


def compete(name: str, make: Callable, args: argparse.Namespace, reference: Reference,
            device: torch.device) -> dict:
    """Trains a contender, draws its slices into a folder and measures them; or reads them."""
    folder = folder_of(name, args)
    if (folder / "result.json").exists():
        return json.loads((folder / "result.json").read_text("utf-8"))
    folder.mkdir(parents=True, exist_ok=True)
    trained = make()
    images = draw(trained, args.num, device)
    found = rounded(assess(reference, images, [f"seed {i}" for i in range(len(images))]))
    result = {"name": name, "images_seen": trained["steps"] * BATCH,
              **{key: trained[key] for key in ("steps", "minutes", "parameters")},
              "measures": found["measures"]}
    for index, image in enumerate(images[:8]):
        save_png(image, folder / f"slice_{index}.png")
    write_json(folder / "result.json", result)
    return result


def plot(results: list[dict], args: argparse.Namespace) -> None:
    """Real slices above, then eight of each contender."""
    figure, rows = plt.subplots(len(results) + 1, 8, figsize=(9, 1.15 * (len(results) + 1)),
                                layout="constrained")
    pictures = {"real (test)": real_slices(args.data, (SIZE, SIZE), 8)}
    for result in results:
        folder = folder_of(result["name"], args)
        pictures[result["name"]] = torch.stack([read_slice(folder / f"slice_{i}.png")[None]
                                                for i in range(8)]) / 127.5 - 1
    for axes, (name, images) in zip(rows, pictures.items()):
        for panel, image in zip(axes, images):
            show(panel, image)
        axes[0].text(-0.1, 0.5, name.replace(", ", ",\n").replace("n-diff", "n-\ndiff"), ha="right",
                     va="center", fontsize=8, transform=axes[0].transAxes)
    figure.savefig(args.plot, dpi=120)


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of real slices")
    parser.add_argument("--minutes", type=positive_float, default=30.0, metavar="M",
                        help="training time of each (default: %(default)s)")
    parser.add_argument("--nets", nargs="+", choices=("same", "own"), default=["same", "own"],
                        help="the others' nets: as large as ours, or their own, which take a GPU "
                             "(default: both)")
    parser.add_argument("--num", type=positive_int, default=200, metavar="N",
                        help="slices to draw of each (default: %(default)s)")
    parser.add_argument("--device", default="auto", metavar="D",
                        help="cuda, cuda:1 or cpu (default: the fastest here)")
    parser.add_argument("--out", type=Path, default=Path("runs/time_to_quality"), metavar="DIR",
                        help="where slices and results go (default: %(default)s)")
    parser.add_argument("--json", type=Path, default=bench.ROOT / "docs/time_to_quality.json",
                        metavar="FILE", help="where the numbers go (default: %(default)s)")
    parser.add_argument("--plot", type=Path, default=bench.ROOT / "images/time_to_quality.png",
                        metavar="FILE", help="where the picture goes (default: %(default)s)")
    args = parser.parse_args()
    keep_freed_memory()
    device = local_device(args.device)
    splits = load_data(args.data, (SIZE, SIZE), "--data")
    reference = Reference(splits, load_network(None))
    results = []
    for name, make in contenders(splits["train"].images, args, device).items():
        results.append(compete(name, make, args, reference, device))
        print(f"{name}: {results[-1]['images_seen']} images, "
              f"KID {results[-1]['measures']['kid']['value']:.3f}", flush=True)
    plot(results, args)
    names = [m for m in MEASURES if m in results[0]["measures"]]  # few slices allow fewer
    rows = [[r["name"], f"{r['parameters'] / 1e6:.1f} M", r["images_seen"],
             *(r["measures"][m]["value"] for m in names)] for r in results]
    rows.append(["floor", "", "", *(results[0]["measures"][m]["floor"] for m in names)])
    print_table(["trained", "parameters", "images seen", *names], rows)
    write_json(args.json, {**facts(device), "minutes": args.minutes, "num": args.num,
                           "threads": torch.get_num_threads(), "results": results})


if __name__ == "__main__":
    run_cli(main)

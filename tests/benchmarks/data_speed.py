"""Speed of the data path against torchvision's ImageFolder and DataLoader, and of the start.

    python tests/benchmarks/data_speed.py

Writes 256x256 PNG slices (phantoms) to a temporary folder, as many as the course's set has;
measures cold decoding, the cached start, batches per second in the steady state, and the time
from `python train.py` to its first step.
"""

import io
import itertools
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import bench  # first: it puts the scripts on the path
import numpy as np
import torch
from bench import ROOT, draw_bars, facts, fastest, print_table, save_json
from dataset import Slices, batch_indices, load_images
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder
from utils.cli import run_cli
from utils.device import keep_freed_memory
from utils.distributed import local_device
from utils.phantoms import phantom_slices


def write_slices(folder: Path, count: int) -> None:
    """`count` PNGs of 256 pixels, in the one class folder that ImageFolder wants."""
    pictures = []
    for image in phantom_slices(256, 0, 8)[0]:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG")
        pictures.append(buffer.getvalue())
    target = folder / "train"
    target.mkdir()
    for index in range(count):
        subject, slice_ = divmod(index, 32)
        (target / f"case_{subject:03d}_slice_{slice_}.nii.png").write_bytes(
            pictures[index % len(pictures)])


def our_batches(images: np.ndarray, batch_size: int, device: torch.device, repeats: int) -> float:
    data = Slices(images, [""] * len(images), device)

    def some(batches: int = 20):
        for step in range(batches):
            data[batch_indices(len(data), batch_size, 0, step)]
    some()
    return 20 / fastest(some, repeats, device)


def their_batches(folder: Path, size: int, batch_size: int, workers: int, device: torch.device
                  ) -> float:
    """ImageFolder and DataLoader as diffusers' example and DiT set them up."""
    transform = transforms.Compose([
        transforms.Grayscale(), transforms.Resize(size), transforms.CenterCrop(size),
        transforms.ToTensor(), transforms.Normalize([0.5], [0.5])])
    loader = DataLoader(ImageFolder(str(folder), transform), batch_size, shuffle=True,
                        num_workers=workers, drop_last=True, persistent_workers=workers > 0,
                        pin_memory=device.type == "cuda")
    batches = (batch for _ in itertools.count() for batch in loader)  # epoch after epoch
    for _ in range(4):  # the workers' start does not count
        next(batches)[0].to(device)
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < 8:
        next(batches)[0].to(device)
        count += 1
    return count / (time.perf_counter() - start)


def time_scripts(folder: Path, cache: Path, device: str) -> dict[str, float]:
    """Seconds of fresh processes: imports alone, --help, and train.py to its first step."""
    def run(*command: str) -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, *command], cwd=ROOT, check=True, capture_output=True)
        return time.perf_counter() - start

    with tempfile.TemporaryDirectory() as runs:
        def first_step() -> float:
            """Until the line of the first step is printed."""
            start = time.perf_counter()
            with subprocess.Popen(
                    [sys.executable, "-u", "train.py", "--data", str(folder), "--image-size",
                     "256", "--preset", "64", "--batch-size", "1", "--cache", str(cache), "--run",
                     f"{runs}/{start}", "--device", device, "--log-every", "1",
                     "--steps", "1000"], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
                for line in process.stdout:
                    if line.startswith("step 1/"):
                        break
                seconds = time.perf_counter() - start
                process.kill()
            return seconds
        first_step()  # the other kernels' and files' first time
        return {"python -c 'import train'": min(run("-c", "import train") for _ in range(3)),
                "python train.py --help": min(run("train.py", "--help") for _ in range(3)),
                "python train.py to its first step": min(first_step() for _ in range(3))}


def main() -> None:
    parser = bench.make_parser("Speed of the data path and of the start.", "data_speed", 5)
    parser.add_argument("--count", type=int, default=11_328, metavar="N",
                        help="slices (default: %(default)s, the course's set)")
    parser.add_argument("--batch-size", type=int, default=32, metavar="B",
                        help="slices per batch (default: %(default)s)")
    args = parser.parse_args()
    device = local_device(args.device)
    keep_freed_memory()  # as train.py does
    workers = os.cpu_count()
    with tempfile.TemporaryDirectory() as scratch:
        folder, cache = Path(scratch) / "slices", Path(scratch) / "cache"
        folder.mkdir()
        print(f"writing {args.count} slices of 256x256", flush=True)
        write_slices(folder, args.count)
        files = sorted((folder / "train").iterdir())
        start = time.perf_counter()
        images, _ = load_images(files, 256, cache)
        cold = time.perf_counter() - start
        cached = fastest(lambda: load_images(files, 256, cache), args.repeats, device)
        ours = our_batches(images, args.batch_size, device, args.repeats)
        theirs = {f"ImageFolder, {n} workers": their_batches(folder, 256, args.batch_size, n,
                                                             device)
                  for n in dict.fromkeys((0, workers, 2 * workers))}
        starts = time_scripts(folder, cache, args.device)
    best = max(theirs.values())
    rows = [["decode all, once", f"{cold:.1f} s ({args.count / cold:.0f} slices/s)"],
            ["start from the cache", f"{cached:.2f} s"],
            [f"batches of {args.batch_size}, ours", f"{ours:.0f} /s"],
            *[[f"batches of {args.batch_size}, {name}", f"{speed:.1f} /s"]
              for name, speed in theirs.items()],
            ["ours against their best", f"{ours / best:.0f}x"],
            *[[name, f"{seconds:.2f} s"] for name, seconds in starts.items()]]
    print(f"\n{args.count} slices of 256x256 pixels\n")
    print_table(["data", "measured"], rows)
    print(f"\n{facts(device)}")
    draw_bars(args.plot, {f"batches of {args.batch_size}": {"ours": ours, **theirs}},
              "batches/s", facts(device)["hardware"])
    save_json(args.json, {**facts(device), "count": args.count, "cold_seconds": cold,
                          "cached_seconds": cached, "ours_batches_per_second": ours,
                          "theirs_batches_per_second": theirs, "starts_seconds": starts})


if __name__ == "__main__":
    run_cli(main)

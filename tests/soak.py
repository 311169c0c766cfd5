"""Kills a training run with kill -9 again and again, and looks whether anything was lost.

    OMP_NUM_THREADS=1 python tests/soak.py              50 kills, a few minutes

Half of the kills come at a random moment; half come from a writer that dies inside a save: at a
random call of fsync, link, unlink or replace, or with half of a file's bytes written. After each,
every file in the run folder is opened. At the end the run is compared with an undisturbed one, bit
for bit, and a table is printed. Exit code 1 if a file was lost or a bit differs.
"""

import argparse
import csv
import io
import itertools
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train  # noqa: E402
from utils import checkpoint, cli, files, pictures  # noqa: E402
from utils.phantoms import draw_phantom  # noqa: E402

MEASURED = ("images_per_second", "memory_gib")  # differ from run to run


def make_data(root: Path) -> Path:
    """Twelve slices of three subjects to train on, four of one to validate with."""
    for split, subjects in (("train", (1, 2, 3)), ("validate", (4,))):
        for subject in subjects:
            for height in range(4):
                pixels = draw_phantom(16, subject, height / 4)
                path = root / split / f"case_{subject:03d}_slice_{height}.png"
                pictures.save_png(torch.from_numpy(pixels), path)
    return root


def options(data: Path, run: Path, steps: int) -> list[str]:
    return ["train.py", "--data", str(data), "--run", str(run), "--steps", str(steps),
            "--cache", str(data / "cache"), "--image-size", "16", "--block-out-channels", "32",
            "32", "--batch-size", "4", "--num-train-timesteps", "20", "--dropout", "0.1",
            "--device", "cpu", "--dtype", "float32", "--log-every", "2", "--save-every", "5"]


def die_inside_a_save(call: int, halfway: bool) -> None:
    """From now on, the process dies halfway through its call-th file, or else before its call-th
    fsync, link, unlink or replace."""
    def count(here: bool) -> bool:
        nonlocal call
        call -= here
        return here and call == 0

    def dying(real):
        def replaced(*args, **more):
            if count(not halfway):
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **more)
        return replaced

    def half_written(path, write) -> None:
        def half(file) -> None:
            if count(halfway):
                whole = io.BytesIO()
                whole.name = os.devnull
                try:
                    write(whole)
                except (OSError, io.UnsupportedOperation):
                    pass
                file.write(whole.getvalue()[:len(whole.getvalue()) // 2])
                file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            write(file)
        whole_write(path, half)

    whole_write = files.write_atomic
    files.write_atomic = train.write_atomic = half_written
    checkpoint.write_atomic = pictures.write_atomic = half_written
    for name in ("fsync", "link", "unlink", "replace"):
        setattr(os, name, dying(getattr(os, name)))


def live(argv: list[str], seconds: float | None = None,
         call: tuple[int, bool] | None = None) -> bool:
    """One life of train.py in a child; returns whether it was killed, not finished.

    Forked, since the child then need not import torch anew.
    """
    child = os.fork()
    if child == 0:
        sys.argv, sys.stdout = argv, open(os.devnull, "w")
        if call is not None:
            die_inside_a_save(*call)
        try:
            cli.run_cli(train.main)
            os._exit(0)
        except BaseException as error:  # noqa: BLE001
            print(f"the run died of {error!r}", file=sys.stderr, flush=True)
            os._exit(1)
    if seconds is not None:
        time.sleep(seconds)
        if os.waitpid(child, os.WNOHANG) != (0, 0):
            return False
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if status and not os.WIFSIGNALED(status):
        raise SystemExit("the run ended by itself, with an error")
    return os.WIFSIGNALED(status)


def unreadable(folder: Path) -> list[str]:
    """The files of a run that do not open; a half file in the making is hidden and not one."""
    bad = []
    for path in [path for path in folder.rglob("*") if path.is_file() and path.name[0] != "."]:
        try:
            if path.suffix == ".pt":
                checkpoint.read_checkpoint(path)
            elif path.suffix == ".csv":
                rows = list(csv.DictReader(path.open()))
                assert all(None not in row and None not in row.values() for row in rows)
            elif path.suffix == ".json":
                json.loads(path.read_text())
            elif path.suffix == ".png":
                with Image.open(path) as image:
                    image.load()
            elif path.suffix == ".damaged":
                bad.append(path.name)
        except Exception as error:  # noqa: BLE001
            bad.append(f"{path.name} ({error!r})")
    return bad


def equal(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a
                                            if k not in (*MEASURED, "seconds"))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def compare(a: Path, b: Path) -> dict[str, bool]:
    """Whether two finished run folders are the same, bit for bit, but for times and memory."""
    rows = [list(csv.DictReader((run / "metrics.csv").open())) for run in (a, b)]
    pictures = [{p.name: p.read_bytes() for p in run.glob("samples/*.png")} for run in (a, b)]
    # The library writes a file's metadata in any order.
    weights = [checkpoint.read_safetensors(run / "model.safetensors") for run in (a, b)]
    checkpoints = [checkpoint.newest_checkpoint(run) for run in (a, b)]
    return {"weights, EMA weights, optimiser": equal(*checkpoints),
            "metrics.csv": equal(*rows), "samples": equal(*pictures),
            "model.safetensors": equal(*weights)}


def soak(kills: int, folder: Path, seed: int) -> dict[str, object]:
    """The run that is killed and the one that is not; returns the table's rows."""
    chance, steps = random.Random(seed), max(30, 10 * kills)
    data = make_data(folder / "data")
    undisturbed, disturbed = (options(data, folder / name, steps) for name in ("one", "two"))
    start = time.monotonic()
    live(undisturbed)
    whole = time.monotonic() - start
    counts, lost = {"moment": 0, "save": 0}, []
    with cli.progress_bar(kills, "killing", "kill") as bar:
        for kind in itertools.islice(itertools.cycle(counts), kills):
            if kind == "save":
                halfway = chance.random() < 0.5
                call = chance.randint(1, 8 if halfway else 40), halfway
                killed = live(disturbed, call=call)
            else:
                killed = live(disturbed, seconds=chance.uniform(0.1, 0.2 + 2 * whole / kills))
            if not killed:
                raise SystemExit("the run ended before its last kill; give another --seed")
            counts[kind] += 1
            bar.update()
            lost += unreadable(folder / "two")
    live(disturbed)
    lost += unreadable(folder / "two")
    same = compare(folder / "one", folder / "two")
    return {"steps of the run": steps, "kills at a random moment": counts["moment"],
            "kills inside a save": counts["save"], "files lost or unreadable": len(lost),
            **{f"bit-equal: {what}": "yes" if value else "NO" for what, value in same.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description="Kills a run and looks whether it survives.")
    parser.add_argument("--kills", type=int, default=50, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="K")
    args = parser.parse_args()
    torch.set_num_threads(1)  # a fork of a process with more of them would hang
    with tempfile.TemporaryDirectory() as folder:
        table = soak(args.kills, Path(folder), args.seed)
    print("\n".join(f"| {what} | {value} |" for what, value in table.items()))
    sys.exit("NO" in table.values() or table["files lost or unreadable"] > 0)


if __name__ == "__main__":
    main()

"""Files that are written whole or not at all, pictures, and locks."""

import contextlib
import csv
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from utils.cli import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


def write_atomic(path: Path, write: Callable) -> None:
    """Calls write(file) on a new file beside `path`, then moves it over: old or new, never half.

    Raises UserError if the folder cannot be written; `path` is then as it was.
    """
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        with contextlib.suppress(OSError):  # not every file system can
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)  # the new name, too, outlives a power cut
            os.close(folder)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error}); free some space "
                        "or choose another folder") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_json(path: Path, values: dict) -> None:
    """Writes values as JSON, whole or not at all."""
    text = json.dumps(values, indent=2) + "\n"
    write_atomic(path, lambda file: file.write(text.encode()))


def write_csv(path: Path, columns: tuple[str, ...], rows: Iterable[dict]) -> None:
    """Writes rows as CSV, whole or not at all; what a row lacks stays empty."""
    table = io.StringIO()
    writer = csv.DictWriter(table, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(path, lambda file: file.write(table.getvalue().encode()))


def to_uint8(images: Tensor) -> Tensor:
    """[-1, 1] -> uint8 0 to 255 of the same shape, rounded (truncation darkens by half a level)."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()


def save_png(image: Tensor, path: Path) -> None:
    """Writes one uint8 (H, W) image as an 8-bit grayscale PNG."""
    picture = Image.fromarray(image.numpy())
    write_atomic(path, lambda file: picture.save(file, "PNG"))


def save_grid(images: Tensor, path: Path, columns: int) -> None:
    """Writes images, (B, 1, H, W) in [-1, 1], as one grayscale PNG, row by row."""
    save_png(make_grid(to_uint8(images), nrow=columns, padding=1, pad_value=0)[0], path)


@contextlib.contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[None]:
    """Holds a lock file while one process works for all. Raises BlockingIOError if not to wait.

    The file stays: whoever waits holds the lock of the file that was there, and a new file would
    let a third one in. On Windows, nothing is locked, and two processes may do the same work.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield

"""Files that are written whole or not at all, pictures, volumes, manifests and locks."""

import contextlib
import csv
import gzip
import hashlib
import io
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
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


def csv_bytes(columns: tuple[str, ...], rows: Iterable[dict], header: bool = True) -> bytes:
    """Rows as CSV; what a row lacks stays empty."""
    table = io.StringIO()
    writer = csv.DictWriter(table, columns, extrasaction="ignore", lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return table.getvalue().encode()


def write_csv(path: Path, columns: tuple[str, ...], rows: Iterable[dict]) -> None:
    """Writes rows as CSV, whole or not at all."""
    write_atomic(path, lambda file: file.write(csv_bytes(columns, rows)))


def append_csv(path: Path, columns: tuple[str, ...], rows: Iterable[dict]) -> None:
    """Appends rows to a CSV file, all or none; a new file starts with a header.

    Raises UserError if the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab", buffering=0) as file:
            size = file.tell()
            data = csv_bytes(columns, rows, header=size == 0)
            try:
                if file.write(data) < len(data):
                    raise OSError("no space left")
                os.fsync(file.fileno())
            except OSError:
                file.truncate(size)
                raise
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error}); free some space "
                        "or choose another folder") from None


def read_csv(path: Path) -> list[dict[str, str]]:
    """The complete rows of a CSV file without quotes; none if there is no such file."""
    try:
        header, *lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    except (OSError, ValueError):
        return []
    names = header.split(",")
    return [dict(zip(names, line.split(","))) for line in lines
            if line.count(",") == len(names) - 1]


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


def save_gif(frames: Tensor, path: Path, milliseconds: int = 80) -> None:
    """Writes uint8 (N, H, W) frames as an endless animation that rests on the last one."""
    first, *others = [Image.fromarray(frame) for frame in frames.numpy()]
    durations = [milliseconds] * len(others) + [1500]
    write_atomic(path, lambda file: first.save(
        file, "GIF", save_all=True, append_images=others, duration=durations, loop=0))


def save_nifti(slices: Tensor, path: Path, spacing: tuple[float, float, float]) -> None:
    """Writes uint8 (Z, H, W) axial slices, from low to high, as a NIfTI volume, .nii or .nii.gz.

    Slices are upright and in radiological convention, as `tools.volumes` cuts them: the patient's
    right is on the left, the front on top. spacing: mm along x, y and z.
    Raises UserError without nibabel.
    """
    try:
        import nibabel
    except ImportError:
        raise UserError(f"{path}: writing NIfTI needs nibabel; pip install nibabel") from None
    volume = slices.numpy()[:, ::-1].transpose(2, 1, 0)  # (X, Y, Z): right to left, back to front
    affine = np.diag([-spacing[0], spacing[1], spacing[2], 1.0])  # NIfTI's x runs to the right
    affine[:3, 3] = -affine[:3, :3] @ (np.array(volume.shape) - 1) / 2  # the centre is at 0
    image = nibabel.Nifti1Image(np.ascontiguousarray(volume), affine)
    image.header.set_xyzt_units("mm")
    content = image.to_bytes()
    if path.suffix == ".gz":
        content = gzip.compress(content, mtime=0)
    write_atomic(path, lambda file: file.write(content))


def save_slice(image: Tensor, path: Path, pixel_mm: float) -> None:
    """Writes a float32 (H, W) image in [-1, 1]: .npy as it is; .png or .nii in 8 bits."""
    if path.suffix == ".npy":
        write_atomic(path, lambda file: np.save(file, image.cpu().numpy()))
    elif path.suffix == ".nii":
        save_nifti(to_uint8(image)[None], path, (pixel_mm, pixel_mm, 1.0))
    else:
        save_png(to_uint8(image), path)


def read_slice(path: Path) -> Tensor:
    """A file of `save_slice` as uint8 (H, W)."""
    if path.suffix == ".npy":
        return to_uint8(torch.from_numpy(np.load(path)))
    if path.suffix == ".nii":
        import nibabel
        volume = np.asarray(nibabel.load(path).dataobj)
        return torch.from_numpy(np.ascontiguousarray(volume[:, ::-1, 0].T))
    return torch.from_numpy(np.array(Image.open(path)))


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Manifest:
    """manifest.csv in a folder: one row for each file, with the settings that made it.

    Processes append rows when files are done, so its cost does not grow with the rows that are
    there. A file counts as done if its row's settings and checksum (CRC-32) hold.
    settings: column -> value, the same for all files of the folder.
    columns: further columns, of a single file.

    Raises UserError for a folder with other files or of other settings, or one that cannot be read.
    """

    def __init__(self, folder: Path, settings: dict, columns: tuple[str, ...]):
        self.folder, self.path = folder, folder / "manifest.csv"
        self.settings = {name: cell(value) for name, value in settings.items()}
        self.columns = ("file", "crc32", *columns, *settings)
        self.rows: dict[str, dict[str, str]] = {}
        try:
            others = [path.name for path in sorted(folder.iterdir())
                      if not path.name.startswith(".")]
            text = self.path.read_text(encoding="utf-8") if self.path.exists() else None
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8"
            raise UserError(f"{folder}: cannot be read ({reason}); give another folder") from None
        if text is None and others:
            raise UserError(f"{folder}: holds other files ({others[0]}) and no manifest.csv; give "
                            "an empty or a new folder")
        # A line without an end was cut off while it was written.
        self._read([line for line in (text or "").splitlines(keepends=True) if line[-1] == "\n"])

    def _read(self, lines: list[str]) -> None:
        reader = csv.DictReader(lines)
        if lines and tuple(reader.fieldnames or ()) != self.columns:
            raise UserError(f"{self.path}: has other columns than this version writes; give "
                            "another folder")
        for row in reader:
            for name, value in self.settings.items():
                if row[name] != value:
                    raise UserError(f"{self.path}: its files have {name} = {row[name] or 'none'}, "
                                    f"now {value or 'none'}; give another folder, or the same "
                                    "options to go on")
            self.rows[row["file"]] = row

    def is_done(self, name: str, values: dict) -> bool:
        """Whether the file is there and whole. Raises UserError if its row has other values."""
        row, path = self.rows.get(name), self.folder / name
        for column, value in values.items() if row else ():
            if row[column] != cell(value):
                raise UserError(f"{self.path}: {name} has {column} = {row[column] or 'none'}, now "
                                f"{cell(value) or 'none'}; give another folder")
        if row is None and path.exists():
            raise UserError(f"{path}: is not in manifest.csv; give another folder, or remove it")
        return row is not None and path.exists() and crc32(path) == row["crc32"]

    def start(self, redo: Iterable[str]) -> None:
        """Writes the header and the rows of all files but those that will be written again."""
        redo = set(redo)
        self.rows = {name: row for name, row in self.rows.items() if name not in redo}
        write_csv(self.path, self.columns, self.rows.values())

    def append(self, rows: list[dict]) -> None:
        """Adds rows of finished files: "file" and the further columns. Raises UserError."""
        table = io.StringIO()
        writer = csv.DictWriter(table, self.columns, lineterminator="\n")
        for row in rows:
            values = {"crc32": crc32(self.folder / row["file"])} | row
            writer.writerow({name: cell(value) for name, value in values.items()} | self.settings)
        try:
            with self.path.open("a", encoding="utf-8") as file:
                if fcntl:
                    fcntl.flock(file, fcntl.LOCK_EX)
                file.write(table.getvalue())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror}); free some space "
                            "and run the same command again") from None


def cell(value) -> str:
    """A value as the manifest has it; None is empty."""
    return "" if value is None else str(value)


def crc32(path: Path) -> str:
    return f"{zlib.crc32(path.read_bytes()):08x}"


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

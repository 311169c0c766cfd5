"""Files that are written whole or not at all, CSV and JSON, checksums and locks."""

import contextlib
import csv
import hashlib
import io
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

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


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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

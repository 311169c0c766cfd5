"""Decoded images as an array on disk, which processes share and which is checked when read."""

import contextlib
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from utils.cli import UserError
from utils.files import locked, write_atomic
from utils.images import BadSlice, BadSlices

CACHE_LIMIT = 32 * 2**30  # bytes of decoded slices; the least recently used are removed first


def cache_folder() -> Path:
    """The default folder for decoded slices and their features."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(home, "oasis-diffusion")


def prune_cache(folder: Path, limit: int | None = None) -> None:
    """Removes the least recently used sets of decoded slices, and of their features, while all take
    more than `limit` bytes; never the newest one."""
    limit = CACHE_LIMIT if limit is None else limit
    with contextlib.suppress(OSError):
        sets = sorted(((path.stat().st_mtime_ns, path.stat().st_size, path)
                       for path in folder.glob("*.npy")
                       if re.fullmatch(r"[0-9a-f]{24}(\.features)?", path.stem)), reverse=True)
        total = 0
        for index, (_, size, path) in enumerate(sets):
            total += size
            if index and total > limit:
                path.unlink()


def write_array(path: Path, images: Iterable[np.ndarray], count: int) -> None:
    """Writes `count` images, uint8 (H, W), one by one into a .npy file, with the array's CRC-32
    behind it: whole or not at all."""
    def write(file) -> None:
        crc = 0
        for index, image in enumerate(images):
            if index == 0:
                np.lib.format.write_array_header_1_0(file, {
                    "descr": "|u1", "fortran_order": False, "shape": (count, *image.shape)})
            file.write(image)
            crc = zlib.crc32(image, crc)
        file.write(crc.to_bytes(4, "little"))
    write_atomic(path, write)


def read_array(path: Path) -> tuple[np.ndarray, int]:
    """The array of `write_array` and its CRC-32. Raises ValueError or EOFError if damaged."""
    images = np.load(path, mmap_mode="c", allow_pickle=False)  # shared until written
    crc = zlib.crc32(images)
    if np.fromfile(path, "<u4", offset=path.stat().st_size - 4)[0] != crc:
        raise ValueError("not what was written")
    with contextlib.suppress(OSError):  # for `prune_cache`
        os.utime(path)
    return images, crc


def cached_images(path: Path, decode: Callable[[], Iterable[np.ndarray]], count: int
                  ) -> tuple[np.ndarray, int]:
    """The `count` images of `decode`, as one uint8 (N, H, W) cached at `path`, and their CRC-32.

    A cache file whose checksum is wrong is decoded again. One process decodes to disk while others
    wait, and all map the file into memory. Without a disk to write to, images are decoded into
    memory, with a warning. What `decode` raises, BadSlice or BadSlices, is raised.
    """
    try:
        with locked(path.with_suffix(".lock")) if not path.exists() else contextlib.nullcontext():
            if not path.exists():
                write_array(path, decode(), count)
                prune_cache(path.parent)
        return read_array(path)
    except (BadSlice, BadSlices):
        raise
    except (ValueError, EOFError):
        print(f"warning: {path} is damaged; decoding again", file=sys.stderr)
        with contextlib.suppress(OSError):
            path.unlink()
            return cached_images(path, decode, count)
    except (OSError, UserError) as error:
        print(f"warning: no cache, the slices will be decoded again next time: {error}",
              file=sys.stderr)
    images = np.stack(list(decode()))
    return images, zlib.crc32(images)

"""OASIS slices: prepares, finds, checks, decodes and caches them, and hands out batches.

Three layouts are read, each with PNG, JPEG, TIFF or BMP images of 8 or 16 bits:

    ROOT/train/ validate/ test/                        (case_001_slice_0.jpg ...)
    ROOT/keras_png_slices_train/ ..._validate/ ..._test/   (case_001_slice_0.nii.png ...)
    ROOT/*.png                                         (one folder; split here, by person)

and the second one is made of OASIS as it comes: the discs' tar.gz files or folders, NIfTI trees,
PNGs, folders of JPEGs by class. With no data at all, phantom slices are drawn.

    python dataset.py prepare SOURCE OUT  volumes or pictures into slices, split by person
    python dataset.py inspect ROOT        what is there, as a report and a picture
    python dataset.py inspect             the same for the phantoms

Training needs what stands above "Volumes"; below it are these commands, each a reading of its own.

Slices stand upright in the radiological convention: the front of the head on top, the patient's
right on the picture's left. Images leave this module as float32 in [-1, 1], shape (B, 1, H, W).
"""

import argparse
import contextlib
import csv
import errno
import fcntl
import hashlib
import io
import json
import os
import re
import shutil
import signal
import sys
import tarfile
import tempfile
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid
from tqdm import tqdm

SPLITS = ("train", "validate", "test")
RATIOS = (0.85, 0.10, 0.05)  # near the 9,664 / 1,120 / 544 slices of the report's set
EXTENSIONS = {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp"}
IMAGES = ", ".join(sorted(EXTENSIONS))
PERSON = re.compile(r"(case_\d+|OAS\d+_\d+|OAS3\d{4}|sub-[A-Za-z0-9]+|phantom_\d+)")
# What sources call the splits: Train, val, validation, testing, keras_png_slices_train, ...
SPLIT_FOLDER = re.compile(
    r"(?:keras_png_slices_)?(train|val|test)(?:ing|id|idate|idation)?(?:_?set)?", re.I)
LARGEST_SIDE = 8192  # pixels; beyond it, a file is no slice, and padding would eat the memory
CACHE_VERSION = 2  # raise it when the same files would decode to other pixels, or be refused
CASE_COLUMNS = ("case", "split", "person", "session", "class", "age", "sex", "cdr", "slices",
                "source")

# ---------------------------------------------------------------------------------------------
# What the three scripts share: errors in one line, whole files, bars, pictures
# ---------------------------------------------------------------------------------------------


class UserError(Exception):
    """A failure that the user can mend; its text is the one line that is shown."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line too."""

    def error(self, message: str) -> None:
        raise UserError(f"{message}; {self.prog} --help explains the options")


def checked(parse: Callable, fits: Callable, wanted: str) -> Callable:
    """An argparse type: what parse(text) gives, with a check and its words for the error line."""
    def convert(text: str):
        with contextlib.suppress(ValueError):
            value = parse(text)
            if fits(value):
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
    return convert


natural = checked(int, lambda n: n >= 0, "a whole number from 0 on")
positive_int = checked(int, lambda n: n >= 1, "a whole number from 1 on")


def out_of_memory(error: Exception) -> bool:
    """Whether memory ran out: a CPU's allocator raises a plain RuntimeError, told by its text."""
    return isinstance(error, MemoryError) or isinstance(error, RuntimeError) and bool(
        re.search("out of memory|allocate memory|not enough memory|ALLOC_FAILED", str(error)))


def run_cli(main: Callable[[], None]) -> None:
    """Runs a script's `main`; a `UserError` becomes one line on stderr and exit code 2."""
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # as of `inspect ROOT | head`; what is still to be flushed, too
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except (UserError, MemoryError, RuntimeError) as error:
        if not isinstance(error, UserError) and not out_of_memory(error):
            raise
        text = str(error) if isinstance(error, UserError) else (
            "out of memory; give a smaller --batch-size, --image-size or --num")
        print("error: " + " ".join(text.split()), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


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


class _PlainLines:
    """Turns a bar's carriage returns into lines of a log; stderr is kept for errors."""

    def write(self, text: str) -> None:
        if text.strip():
            print(text.strip(), flush=True)

    def flush(self) -> None:
        pass


def progress_bar(total: int, desc: str, unit: str) -> tqdm:
    """A tqdm bar on a terminal; in a log, a plain line every 30 seconds once it takes over 5."""
    if sys.stderr.isatty():
        return tqdm(total=total, desc=desc, unit=unit, dynamic_ncols=True)
    return tqdm(total=total, desc=desc, unit=unit, file=_PlainLines(), delay=5, mininterval=30,
                maxinterval=30,
                bar_format="{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}]")


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
    """Holds a lock file while one process works for all. Raises BlockingIOError if not to wait."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


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


# ---------------------------------------------------------------------------------------------
# Finding slices
# ---------------------------------------------------------------------------------------------


def person_of(path: Path) -> str | None:
    """The person a slice is of, from names as in case_001_slice_0 or OAS1_0001_MR1, or None."""
    match = PERSON.search(path.name)
    return match[0] if match else None


def slice_number(name: str) -> int:
    """The last number of a file's name, as 7 of case_001_slice_7.nii.png; 0 if there is none."""
    return int((re.findall(r"\d+", name) or [0])[-1])


def read_cases(root: Path) -> list[dict[str, str]]:
    """The rows of ROOT/cases.csv; none if there is no such file. Raises UserError for no CSV."""
    path = root / "cases.csv"
    try:
        return list(csv.DictReader(io.StringIO(path.read_text())))
    except FileNotFoundError:
        return []
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read ({error}); mend or remove it") from None


def person_finder(root: Path) -> Callable[[Path], str | None]:
    """`person_of`, but for cases that ROOT/cases.csv says whose they are: people come again."""
    of_case = {f"case_{int(row['case']):03d}": row["person"] for row in read_cases(root)
               if row.get("person") and str(row.get("case")).isdigit()}
    return lambda path: of_case.get(person_of(path), person_of(path))


def images_in(folder: Path) -> list[Path]:
    """Image files directly in `folder`, sorted by name, hidden ones left out.

    Raises UserError if the folder cannot be listed.
    """
    try:
        return sorted(path for path in folder.iterdir()
                      if path.suffix.lower() in EXTENSIONS and not path.name.startswith("."))
    except OSError as error:
        raise UserError(f"{folder}: cannot be listed ({error.strerror})") from None


def find_slices(root: Path) -> dict[str, list[Path]]:
    """The image files of each split of any of the three layouts; a flat folder is split here.

    Raises UserError for a missing or empty folder, or one that `prepare` has not finished.
    """
    if not os.path.isdir(root):
        raise UserError(f"{root}: no such folder; --data takes the folder that holds the slices")
    if os.path.isdir(root / ".staged"):
        raise UserError(f"{root}: its preparation is not finished; give the same python dataset.py "
                        "prepare again")
    for prefix in ("", "keras_png_slices_"):
        folders = {split: root / (prefix + split) for split in SPLITS}
        if os.path.isdir(folders["train"]):
            splits = {s: images_in(f) if os.path.isdir(f) else [] for s, f in folders.items()}
            if not splits["train"]:
                raise UserError(f"{folders['train']}: holds no images ({IMAGES})")
            return splits
    files = images_in(root)
    if not files:
        raise UserError(f"{root}: neither train/, nor keras_png_slices_train/, nor images "
                        f"({IMAGES}) in it; python dataset.py prepare {root} OUT makes slices of "
                        "volumes, discs and class folders")
    return split_by_person(files, person_finder(root))


def split_by_person(files: list[Path], person: Callable) -> dict[str, list[Path]]:
    """The files of one folder, divided by person; one whose name tells none counts as one."""
    people = {path: person(path) or path.stem for path in files}
    warn_of_nobody([path.name for path in files if person(path) is None])
    split_of = assign_splits(people.values())
    return {s: [path for path in files if split_of[people[path]] == s] for s in SPLITS}


def warn_of_nobody(names: list[str]) -> None:
    """Says that names tell no person, so that one head may stand in two splits."""
    if names:
        print(f"warning: {len(names)} names, such as {names[0]}, tell no person (case_001_..., "
              "OAS1_0001_..., sub-01_...); slices of one head may stand in two splits",
              file=sys.stderr)


def assign_splits(people: Iterable[str], known: dict[str, str] | None = None,
                  ratios: tuple[float, ...] = RATIOS, seed: int = 0) -> dict[str, str]:
    """Person -> split: by default about 85 / 10 / 5 % of the people, by a seeded shuffle.

    All slices of one person stay together: neighbours are near-copies, so that a split by slice
    would leak. At least one person goes to each split with a ratio above 0 if three are there,
    else all go to train. Who is `known` stays where they are; the others fill up.
    """
    split_of = dict(known or {})
    new = sorted(set(people) - set(split_of))
    count = len(new) + len(split_of)
    order = [new[i] for i in np.random.default_rng(seed).permutation(len(new))]
    for split, share in zip(SPLITS[1:], ratios[1:]):
        quota = max(1, round(count * share)) if count >= 3 and share > 0 else 0
        short = max(0, quota - list(split_of.values()).count(split))
        kept = 0 if "train" in split_of.values() else 1  # since shares may round up together
        take = min(short, len(order) - kept)
        split_of |= dict.fromkeys(order[:take], split)
        order = order[take:]
    return split_of | dict.fromkeys(order, "train")


def in_two_splits(items: Iterable[tuple[str, Hashable, str]], what: str, mend: str) -> list[str]:
    """Of (split, key, name): a line for each two splits that share keys."""
    first, shared = {}, {}
    for split, key, name in items:
        other, where = first.setdefault(key, (split, name))
        if other != split:
            shared.setdefault((other, split), []).append(
                name if name == where else f"{where} and {name}")
    return [f"{len(names)} {what} stand in both {a} and {b}, such as {names[0]}; {mend}"
            for (a, b), names in shared.items()]


def people_in_two_splits(pairs: Iterable[tuple[str, str | None]]) -> list[str]:
    """Of (split, person): a line for each two splits that share people."""
    return in_two_splits(((split, who, who) for split, who in dict.fromkeys(pairs) if who),
                         "people", "move each person's slices to one split")


# ---------------------------------------------------------------------------------------------
# Decoding and checking
# ---------------------------------------------------------------------------------------------


class BadSlice(UserError):
    """A file that is no slice to train on: what it is, and the mend."""

    def __init__(self, path: Path | str, what: str, mend: str = "replace or remove it"):
        super().__init__(f"{path}: {what}; {mend}")
        self.path, self.what, self.mend = path, what, mend


class BadSlices(UserError):
    """Several of them: up to ten by name, a count, and the mends."""

    def __init__(self, bad: list[BadSlice], total: int, unit: str = "images"):
        mends = "; ".join(dict.fromkeys(b.mend for b in bad))
        super().__init__((f"{bad[0].path}: {bad[0].what}" if len(bad) == 1 else
                          f"{len(bad)} of {total} {unit} cannot be used: {listing(bad)}")
                         + f"; {mends}; or give --skip-bad to go on without")
        self.bad = bad


def listing(bad: list[BadSlice]) -> str:
    """Up to ten files and what is wrong with them."""
    return "; ".join(f"{b.path} ({b.what})" for b in bad[:10]) + "; ..." * (len(bad) > 10)


def need_plain_file(path: Path) -> None:
    """Raises BadSlice for a broken link, or what would be waited for for ever, such as a pipe."""
    if not os.path.isfile(path):
        raise BadSlice(path, "cannot be read (a broken link, or no plain file)")


def read_gray(path: Path) -> Image.Image:
    """One image file -> mode L, or F in [0, 255] for 16 bits (65535 is white), of its own size.

    Raises BadSlice if the file is no whole grey image of 8 or 16 bits.
    """
    need_plain_file(path)
    try:
        with Image.open(path) as image:
            if max(image.size) > LARGEST_SIDE:
                raise BadSlice(path, f"has a side of {max(image.size)} pixels; slices have at "
                                     f"most {LARGEST_SIDE}")
            image.load()
            return to_gray(image)
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        reason = "no image" if isinstance(error, Image.UnidentifiedImageError) else \
            getattr(error, "strerror", None) or error
        raise BadSlice(path, f"cannot be read ({reason})") from None


def to_gray(image: Image.Image) -> Image.Image:
    """An image of any mode -> mode L, or F in [0, 255] for 16 bits; black where transparent.

    Raises ValueError for pixels that are neither 8 nor 16 bits, or in colour.
    """
    if image.mode.startswith(("I", "F")):
        pixels = np.asarray(image).astype(np.float32)
        if image.mode == "F" or pixels.min() < 0 or pixels.max() > 65535:
            raise ValueError("its pixels have neither 8 nor 16 bits")
        return Image.fromarray(pixels / 257)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
    if image.mode not in ("L", "1"):
        channels = np.asarray(image.convert("RGB"))
        # JPEG leaves traces of colour in grey pictures.
        if np.mean(np.ptp(channels, axis=2) > 24) > 1e-3:
            raise ValueError("it is in colour, as overlays and screenshots are, not grey")
    return image.convert("L")


def is_label_map(pixels: np.ndarray) -> bool:
    """Whether an image, (..., H, W) of any range from 0 on, has next to no grey levels but a few.

    Of the pixels above the background, five bands of 7 of 256 levels hold at most 46% in each of
    5,760 OASIS slices, at most 71% in phantoms, and all in a segmentation map but for JPEG's and
    resizing's edges.
    """
    levels = np.rint(pixels * (255 / max(pixels.max(), 1e-6))).astype(np.uint8)
    counts = np.bincount(levels.ravel(), minlength=256)
    counts[:8] = 0  # the background, with JPEG's ripples
    total, held = counts.sum(), 0
    for _ in range(5):
        bands = np.convolve(counts, np.ones(7, int), "same")
        held += bands.max()
        counts[max(0, bands.argmax() - 3):bands.argmax() + 4] = 0
    return held > 0.85 * total


def check_slice(pixels: np.ndarray, path: Path | str) -> None:
    """Raises BadSlice for pixels of a file's own size that one would rue to have trained on."""
    if pixels.min() == pixels.max():
        raise BadSlice(path, "is black all over" if pixels.max() == 0 else "is of one grey level",
                       "remove the slices that show nothing")
    if is_label_map(pixels):
        raise BadSlice(path, "has few grey levels, as a segmentation map",
                       "give the folder of MR slices, as keras_png_slices_train, not "
                       "keras_png_slices_seg_train")


def fit(image: Image.Image, image_size: int | None) -> np.ndarray:
    """An image of mode L or F -> uint8 (S, S) for an image size S, or (H, W) as it is for None.

    The slice is made square by black padding, never squashed, then resized by an antialiased
    bicubic filter (a wider one would ring into the black background).
    """
    if image_size is not None:
        side = max(image.size)
        square = Image.new(image.mode, (side, side))
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        image = square.resize((image_size, image_size), Image.Resampling.BICUBIC)
    return np.asarray(image).round().clip(0, 255).astype(np.uint8)


def read_slice(path: Path) -> Image.Image:
    """An image file as `read_gray` gives it, checked. Raises BadSlice."""
    image = read_gray(path)
    check_slice(np.asarray(image), path)
    return image


def decode(path: Path, image_size: int | None) -> np.ndarray:
    """One image file -> uint8 (S, S), or (H, W) for None; see `fit`. Raises BadSlice."""
    return fit(read_slice(path), image_size)


def in_parallel(work: Callable, items: list, desc: str) -> Iterator:
    """Yields work(item) for each, in order, with a bar; a BadSlice is yielded too, not raised."""
    def attempt(item):
        try:
            return work(item)
        except BadSlice as error:
            return error

    with ThreadPoolExecutor(os.cpu_count()) as pool, \
            progress_bar(len(items), desc, "slice") as bar:
        for result in pool.map(attempt, items):
            bar.update()
            yield result


# ---------------------------------------------------------------------------------------------
# Decoding and caching a set
# ---------------------------------------------------------------------------------------------


def decode_all(files: list[Path], image_size: int | None) -> Iterator[np.ndarray]:
    """Decodes in parallel, with a bar, and yields the images, uint8 (H, W), in order.

    Raises BadSlice for the first whose size differs if the size is native, or, at the end,
    BadSlices naming up to ten of the files that are no slices.
    """
    first, brightest, bad = None, 0, []
    for path, image in zip(files, in_parallel(lambda path: decode(path, image_size), files,
                                              "decoding")):
        if isinstance(image, BadSlice):
            bad.append(image)
            continue
        first = image if first is None else first
        if image.shape != first.shape:
            raise BadSlice(path, f"is {image.shape[0]}x{image.shape[1]} (rows x columns), others "
                           f"{first.shape[0]}x{first.shape[1]}",
                           "give --image-size to bring all to one size")
        brightest = max(brightest, image.max())
        yield image
    if bad:
        raise BadSlices(bad, len(files))
    if brightest < 64:
        print(f"warning: the brightest pixel of {files[0].parent} is {brightest} of 255; 12-bit "
              "values in 16-bit files? scale them so that 65535 is white", file=sys.stderr)


def cache_file(files: list[Path], image_size: int | None, cache: Path | None) -> Path:
    """A name that changes with the image size and any file's path, size or time."""
    facts = []
    for path in files:
        facts.append(os.path.abspath(path))
        with contextlib.suppress(OSError):  # a broken link; never cached, since it is refused
            found = path.stat()
            facts += [found.st_size, found.st_mtime_ns]
    key = hashlib.sha256(repr((CACHE_VERSION, image_size, facts)).encode()).hexdigest()
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return (cache or Path(home, "oasis-diffusion")) / f"{key[:24]}.npy"


def load_images(files: list[Path], image_size: int | None, cache: Path | None = None
                ) -> tuple[np.ndarray, int]:
    """The slices as one uint8 (N, H, W), decoded once and cached on disk, and their CRC-32.

    The cache is trusted only if its checksum holds: a stale or damaged one is decoded again. It
    is decoded straight to the disk, by one process while others wait, and mapped into the memory
    of all. Raises UserError as `decode_all` does.
    """
    kept = cache_file(files, image_size, cache)
    try:
        with locked(kept.with_suffix(".lock")) if not kept.exists() else contextlib.nullcontext():
            if not kept.exists():
                write_atomic(kept, partial(_write_cache, files, image_size))
        return _read_cache(kept)
    except (BadSlice, BadSlices):
        raise
    except (ValueError, EOFError):
        print(f"warning: {kept} is damaged; decoding again", file=sys.stderr)
        with contextlib.suppress(OSError):
            kept.unlink()
            return load_images(files, image_size, cache)
    except (OSError, UserError) as error:
        print(f"warning: no cache, the slices will be decoded again next time: {error}",
              file=sys.stderr)
    images = np.stack(list(decode_all(files, image_size)))
    return images, zlib.crc32(images)


def without_bad(files: list[Path], image_size: int | None, cache: Path | None = None
                ) -> list[Path]:
    """The files that are slices. Those that are not are named in a warning, and remembered."""
    kept = cache_file(files, image_size, cache).with_suffix(".bad.json")
    try:
        bad = json.loads(kept.read_text())
    except (OSError, ValueError):
        read = in_parallel(read_slice, files, "checking")
        bad = {path.name: found.what for path, found in zip(files, read)
               if isinstance(found, BadSlice)}
        with contextlib.suppress(UserError):
            write_json(kept, bad)
    if bad:
        print(f"warning: goes on without {len(bad)} of {len(files)} images: "
              + listing([BadSlice(files[0].parent / name, what) for name, what in bad.items()]),
              file=sys.stderr)
    return [path for path in files if path.name not in bad]


def _write_cache(files: list[Path], image_size: int | None, file) -> None:
    """Decodes into a .npy file, image by image, and puts the CRC-32 of the array behind it."""
    crc = 0
    for index, image in enumerate(decode_all(files, image_size)):
        if index == 0:
            np.lib.format.write_array_header_1_0(file, {
                "descr": "|u1", "fortran_order": False, "shape": (len(files), *image.shape)})
        file.write(image)
        crc = zlib.crc32(image, crc)
    file.write(crc.to_bytes(4, "little"))


def _read_cache(path: Path) -> tuple[np.ndarray, int]:
    """The array of a cache file and its CRC-32. Raises ValueError or EOFError if damaged."""
    images = np.load(path, mmap_mode="c", allow_pickle=False)  # shared until written
    crc = zlib.crc32(images)
    if np.fromfile(path, "<u4", offset=path.stat().st_size - 4)[0] != crc:
        raise ValueError("not what was written")
    return images, crc


# ---------------------------------------------------------------------------------------------
# Batches
# ---------------------------------------------------------------------------------------------


class Split(NamedTuple):
    """One split in memory: uint8 (N, H, W), and each slice's file name and person."""

    images: np.ndarray
    names: list[str]
    people: list[str]
    crc32: int


def load_splits(root: Path | None, image_size: int | None, cache: Path | None = None,
                skip_bad: bool = False) -> dict[str, Split]:
    """The splits of a root, or of the phantoms for None; those without slices are left out.

    Raises UserError as the functions above do, or if the splits differ in size or share a
    picture. Warns of slices that are smaller than the image size.
    """
    if root is None:
        people = {"train": (0, 192), "validate": (192, 16), "test": (208, 16)}
        phantoms = {s: phantom_slices(image_size or 64, *people[s]) for s in SPLITS}
        return {s: Split(images, names, [person_of(Path(n)) for n in names], zlib.crc32(images))
                for s, (images, names) in phantoms.items()}
    person, files_of = person_finder(root), find_slices(root)
    for line in people_in_two_splits((s, person(path)) for s in files_of for path in files_of[s]):
        raise UserError(line)
    loaded = {}
    for split, files in files_of.items():
        if skip_bad and files:
            files = without_bad(files, image_size, cache)
        if files:
            images, crc = load_images(files, image_size, cache)
            loaded[split] = Split(images, [path.name for path in files],
                                  [person(path) or path.stem for path in files], crc)
            warn_if_enlarged(files, image_size)
    if "train" not in loaded:
        raise UserError(f"{root}: no slice of train can be used; give another folder")
    shapes = {split: loaded[split].images.shape[1:] for split in loaded}
    if len(set(shapes.values())) > 1:
        raise UserError(f"{root}: the splits differ in size (" + ", ".join(
            f"{s} {h}x{w}" for s, (h, w) in shapes.items()) + "); give --image-size")
    for line in in_two_splits(
            ((split, hash(image.tobytes()), f"{split}/{name}")
             for split, (images, names, *_) in loaded.items()
             for name, image in zip(names, images)), "pictures", "remove one copy"):
        raise UserError(f"{root}: {line}")
    return loaded


def warn_if_enlarged(files: list[Path], image_size: int | None) -> None:
    """Says that slices are smaller than the image size, by eight of them, since it is cheap."""
    for path in files[::max(1, len(files) // 8)] if image_size else ():
        with Image.open(path) as image:
            if max(image.size) < image_size:
                print(f"warning: slices such as {path} have {image.width}x{image.height} pixels "
                      f"and are upsampled to the image size {image_size}; a smaller --image-size "
                      "loses nothing", file=sys.stderr)
                return


@lru_cache(maxsize=2)
def _permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)


def batch_indices(count: int, batch_size: int, seed: int, step: int) -> np.ndarray:
    """Which slices make the batch of a step: int64 (batch_size,) in [0, count).

    A pure function of its arguments: every epoch is a fresh permutation, so that there is no
    order to save and none to fast-forward. Several processes share the batch out by place.
    """
    places = np.arange(step * batch_size, (step + 1) * batch_size)
    return np.array([_permutation(count, seed, place // count)[place % count]
                     for place in places.tolist()])


class Slices:
    """Slices of one split, kept as uint8 where that is fastest, handed out as [-1, 1].

    positions: float32 (N,), the height of each slice by its number, 0 (lowest of the split) to 1;
    people: whose each is. On a GPU the set is copied to the card if it takes less than a quarter
    of the free memory.
    """

    def __init__(self, images: np.ndarray, names: list[str], device: torch.device,
                 people: list[str] | None = None):
        self.names = names
        self.people = people or [person_of(Path(name)) or name for name in names]
        numbers = np.array([slice_number(name) for name in names], np.float32)
        self.positions = (numbers - numbers.min()) / max(1, np.ptp(numbers))
        self.device = device
        self.images = torch.from_numpy(images)
        if device.type == "cuda" and images.nbytes < torch.cuda.mem_get_info(device)[0] / 4:
            self.images = self.images.to(device)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, indices: np.ndarray) -> Tensor:
        """int64 (B,) -> float32 (B, 1, H, W) in [-1, 1] on the device."""
        index = _moved(torch.from_numpy(indices), self.images.device)
        return _moved(self.images[index], self.device)[:, None].float().div_(127.5).sub_(1)


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """On the device; the host does not wait for a GPU's copy, which only pinned memory allows."""
    if device.type == "cuda" and not tensor.is_cuda:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=device.type == "cuda")


# ---------------------------------------------------------------------------------------------
# Phantoms
# ---------------------------------------------------------------------------------------------


def _smooth_noise(rng: np.random.Generator, cells: int, size: int) -> np.ndarray:
    """A smooth random field, (size, size), with features of about size / cells pixels."""
    coarse = Image.fromarray(rng.standard_normal((cells + 1, cells + 1)).astype(np.float32))
    return np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC,
                                    box=(0.5, 0.5, cells + 0.5, cells + 0.5)))


def draw_phantom(image_size: int, person: int, position: float, seed: int = 0) -> np.ndarray:
    """One phantom slice, uint8 (S, S): an axial brain drawn from formulas, front of the head up.

    person: chooses the anatomy (outline, folds, ventricle width); position: height in the head,
    0 (low) to 1 (high). Skull-free outline, folded cortex, grey and white matter, ventricles,
    deep nuclei, bias field and noise; black outside. A pure function of its arguments.
    """
    rng = np.random.default_rng([seed, person])
    size = 2 * image_size  # drawn at twice the size, then averaged: antialiased
    y, x = np.mgrid[-1:1:size * 1j, -1:1:size * 1j].astype(np.float32)
    width, length = rng.uniform(0.60, 0.68), rng.uniform(0.76, 0.84)
    shrink = np.sqrt(1 - 0.45 * position**2)  # the head closes towards the top
    angle = np.arctan2(x, -y)
    lobes = 1 + 0.03 * np.cos(3 * angle + rng.normal(0, 0.2)) - 0.05 * np.cos(angle)
    radius = np.hypot(x / (width * shrink), y / (length * shrink)) / lobes  # 1 on the surface

    # Sulci are the zero lines of smooth noise: they meander, branch and end as real ones do.
    folds = _smooth_noise(rng, 12, size) + (position - 0.5) * _smooth_noise(rng, 12, size)
    depth = np.clip((radius - 0.45) / 0.4, 0, 1)
    ribbon = np.abs(folds) / (0.05 + 0.95 * depth)
    white, grey, fluid = 0.80, 0.55, 0.12
    image = np.where((ribbon < 0.65) & (radius > 0.5) | (radius > 0.93), grey, white)
    image = np.where((ribbon < 0.13) & (radius > 0.62), fluid, image)

    nuclei = np.hypot((np.abs(x) - 0.19) / 0.08, (y - 0.02) / 0.17) < 1 - 0.5 * position
    image = np.where(nuclei, 0.5 * (grey + white), image)
    swelling = rng.uniform(0.03, 0.11) * (1 - 0.7 * position)
    centre = 0.05 + 0.45 * (y - 0.02) ** 2 + swelling
    reach = np.clip(1 - ((y - 0.02) / (0.40 - 0.12 * position)) ** 2, 0, None)
    image = np.where(np.abs(np.abs(x) - centre) < swelling * np.sqrt(reach), fluid, image)
    midline = np.abs(x + 0.01 * _smooth_noise(rng, 4, size)) < 0.012 + 0.008 * radius
    image = np.where(midline & (np.abs(y) > 0.38 - 0.3 * position), fluid, image)

    image = image * np.exp(0.06 * _smooth_noise(rng, 2, size))
    image = image + 0.03 * np.random.default_rng([seed, person, round(position * 1e6)]
                                                 ).standard_normal(image.shape)
    image = np.where(radius < 1, image, 0).clip(0, 1)
    image = image.reshape(image_size, 2, image_size, 2).mean(axis=(1, 3))
    return (255 * image).round().astype(np.uint8)


def phantom_slices(image_size: int, first_person: int, people: int, per_person: int = 8,
                   seed: int = 0) -> tuple[np.ndarray, list[str]]:
    """Phantoms of `people` anatomies, evenly spaced heights each: uint8 (N, S, S) and names."""
    places = [(person, slice_) for person in range(first_person, first_person + people)
              for slice_ in range(per_person)]
    images = list(in_parallel(
        lambda p: draw_phantom(image_size, p[0], (p[1] + 0.5) / per_person, seed), places,
        "drawing phantoms"))
    return np.stack(images), [f"phantom_{p:03d}_slice_{s}" for p, s in places]


# ---------------------------------------------------------------------------------------------
# Volumes
# ---------------------------------------------------------------------------------------------

# What OASIS-1 calls the skull-stripped, gain-field corrected volume in the T88 atlas space; its
# label map ends in _fseg, the volume with the skull lacks _masked.
T88 = re.compile(r"(OAS1_\d+_MR\d+)_mpr_n\w+_anon_111_t88_masked_gfc\.(hdr|img)")
T88_SHAPE = (176, 208, 176)


class Cutting(NamedTuple):
    """How volumes are cut: slices per session, and from where to where of the brain's height."""

    slices: int = 32
    low: float = 0.2
    high: float = 0.85


def upright(image, name: str) -> tuple[np.ndarray, tuple[float, float]]:
    """A nibabel image -> its voxels, (X, Y, Z), from right to left, back to front and low to
    high, and the lengths of a voxel's first two sides in mm.

    A NIfTI header says how its voxels stand. Of Analyze, only OASIS-1's T88 volumes are taken,
    which stand so already (grounds: README, "Loading Training Data").
    Raises BadSlice for a header without orientation, and for all but 3-D volumes of numbers.
    """
    import nibabel as nib  # here, since training need not wait for it

    nifti = isinstance(image, nib.Nifti1Pair)
    if nifti and not (image.header["sform_code"] or image.header["qform_code"]) or \
            not np.isfinite(image.affine).all() or not np.linalg.det(image.affine[:3, :3]):
        raise BadSlice(name, "its header states no orientation",
                       "set its sform or qform code, as with nibabel or fslorient")
    image = nib.squeeze_image(image)
    if len(image.shape) != 3:
        raise BadSlice(name, f"has {len(image.shape)} dimensions ("
                       + "x".join(map(str, image.shape)) + "), not 3",
                       "give one T1-weighted volume per session, not a time series")
    if not nifti and not (T88.fullmatch(Path(name).name) and image.shape == T88_SHAPE):
        raise BadSlice(name, "Analyze headers state no orientation, and this is no T88 volume of "
                       "OASIS-1", "convert it to NIfTI with the orientation that you know it has")
    image = nib.as_closest_canonical(image)  # from left to right, the rest as wanted
    volume = np.asanyarray(image.dataobj)[::-1]
    if volume.dtype.kind not in "iuf":
        raise BadSlice(name, f"has voxels of type {volume.dtype}, not grey levels",
                       "give a T1-weighted volume")
    return np.nan_to_num(volume, copy=False) if volume.dtype.kind == "f" else volume, \
        nib.affines.voxel_sizes(image.affine)[:2]


def cut_volume(volume: np.ndarray, zooms: tuple[float, float], cutting: Cutting, name: str
               ) -> dict[int, np.ndarray]:
    """A volume as `upright` gives it -> number (0 is low) and uint8 (S, S) of its axial slices.

    The 99.5th percentile of the voxels above 0 becomes white, so that a few bright vessels do not
    darken the rest; 0 stays 0. The brain reaches as far as 0.5% of a plane are above a tenth of
    that. Pixels are made square by their size in mm, pictures by black padding.
    Raises BadSlice for a volume with nothing in it, a label map, or one too low for the slices.
    """
    inside = volume[volume > 0]
    if not inside.size or volume.min() == volume.max():
        raise BadSlice(name, "is of one value all over", "remove it")
    white = np.percentile(inside, 99.5)
    tall = np.flatnonzero((volume > 0.1 * white).mean(axis=(0, 1)) > 0.005)
    low, high = (tall[[0, -1]] if tall.size else (0, 0))
    shares = np.linspace(cutting.low, cutting.high, cutting.slices)
    planes = np.rint(low + (high - low) * shares).astype(int)
    levels = (255 / white * volume[:, ::-1, planes].transpose(2, 1, 0).astype(np.float32))
    levels = np.rint(levels.clip(0, 255)).astype(np.uint8)
    if is_label_map(levels):
        raise BadSlice(name, "has few grey levels, as a segmentation map",
                       "give the T1-weighted volume")
    if len(set(planes)) < cutting.slices:
        raise BadSlice(name, f"its brain is {high - low + 1} planes high, too low for "
                       f"{cutting.slices} slices", "give fewer --slices or a wider --range")
    width, height = (round(n * mm / min(zooms)) for n, mm in zip(volume.shape, zooms))
    return {number: fit(Image.fromarray(plane).resize((width, height), Image.Resampling.BICUBIC),
                        max(width, height)) for number, plane in enumerate(levels)}


def cut_file(path: Path, cutting: Cutting, name: str) -> dict[int, np.ndarray]:
    """The slices of a volume file, called `name` in errors; see `cut_volume`. Raises BadSlice."""
    import nibabel as nib

    need_plain_file(path)
    # OASIS-1's header fields beyond 7.5 mean nothing; nibabel's guess may be SPM's dialect.
    load = nib.AnalyzeImage.from_filename if T88.fullmatch(path.name) else nib.load
    try:
        return cut_volume(*upright(load(path), name), cutting, name)
    except (UserError, MemoryError):
        raise
    except Exception as error:  # a damaged file can make the reader raise anything
        words = getattr(error, "strerror", None) or str(error).split("\n")[0]
        raise BadSlice(name, f"cannot be read ({words or type(error).__name__})") from None


# ---------------------------------------------------------------------------------------------
# prepare
# ---------------------------------------------------------------------------------------------


class Scan(NamedTuple):
    """One session of one person, as one volume or as pictures."""

    session: str
    person: str | None
    source: str  # what cases.csv and errors call it
    files: list[Path]
    facts: dict[str, str]  # split or class, where the source has them; age, sex, cdr


def _not_listed(error: OSError) -> None:
    raise UserError(f"{error.filename}: cannot be listed ({error.strerror}); make it readable")


def find_scans(source: Path) -> tuple[list[Path], list[Scan]]:
    """The tar files, and the other scans, of a source.

    Volumes go before pictures: of OASIS-1 the T88 volumes alone, of a BIDS tree the T1w ones.
    Raises UserError if there is nothing, or nothing of a known kind.
    """
    if not os.path.lexists(source):
        raise UserError(f"{source}: no such file or folder; prepare takes a disc's tar.gz, or a "
                        "folder of volumes or pictures")
    root = source if source.is_dir() else source.parent
    files = [source] if not source.is_dir() else sorted(
        Path(folder) / name for folder, _, names in os.walk(source, onerror=_not_listed)
        for name in names if not name.startswith("."))
    tars = [path for path in files if path.name.endswith((".tar.gz", ".tgz", ".tar"))]
    volumes = [path for path in files if T88.fullmatch(path.name) and path.suffix == ".hdr"]
    if tars or volumes:
        return tars, volume_scans(root, volumes)
    volumes = [path for path in files if path.name.endswith((".nii", ".nii.gz", ".hdr"))
               and "derivatives" not in path.relative_to(root).parts]
    volumes = [path for path in volumes if "_T1w." in path.name] or volumes
    pictures = [path for path in files if path.suffix.lower() in EXTENSIONS
                and "_seg_" not in path.parent.name]
    if not volumes and not pictures:
        raise UserError(f"{source}: holds no *_t88_masked_gfc.hdr, no tar.gz, no .nii or .nii.gz, "
                        f"and no images ({IMAGES}); give a disc of OASIS-1 or another folder")
    return [], volume_scans(root, volumes) or picture_scans(root, pictures)


def volume_scans(root: Path, files: list[Path]) -> list[Scan]:
    """A scan for each volume file, named by the file, or by the way to it if names repeat."""
    stem = {path: T88.sub(r"\1", path.name).split(".")[0] for path in files}
    often = Counter(stem.values())
    facts = participants(root)
    scans = []
    for path in files:
        way = path.relative_to(root).as_posix()
        person = (PERSON.findall(way) or [None])[-1]
        about = path.parent / "../../.." / f"{stem[path]}.txt"  # SESSION/PROCESSED/MPRAGE/T88_111
        named = T88.fullmatch(path.name) or often[stem[path]] == 1
        scans.append(Scan(stem[path] if named else way.replace("/", "_"), person, str(path), [path],
                          read_facts(about) if about.is_file() else facts.get(person, {})))
    return scans


def read_facts(path: Path) -> dict[str, str]:
    """Age, sex and CDR (dementia rating) out of the text file of an OASIS-1 session."""
    text = path.read_text(errors="replace")
    found = {key: re.search(rf"^{name}:[ \t]*(\S+)", text, re.M)
             for key, name in (("age", "AGE"), ("sex", "M/F"), ("cdr", "CDR"))}
    return {key: match[1][0] if key == "sex" else match[1]
            for key, match in found.items() if match}


def participants(root: Path) -> dict[str, dict[str, str]]:
    """Person -> age, sex and cdr out of a BIDS tree's participants.tsv, as far as it is there."""
    path = root / "participants.tsv"
    if not path.is_file():
        return {}
    rows = csv.DictReader(io.StringIO(path.read_text(errors="replace")), delimiter="\t")
    return {row["participant_id"]: {key: row[key] for key in ("age", "sex", "cdr")
                                    if row.get(key) not in (None, "", "n/a")}
            for row in rows if row.get("participant_id")}


def picture_scans(root: Path, files: list[Path]) -> list[Scan]:
    """A scan for each series of numbered pictures of a person, or for each picture of nobody.

    Folders named as a split tell the split; else the last folder's name is the class.
    """
    series: dict[tuple[str, str, str], list[Path]] = {}
    for path in files:
        folders = path.relative_to(root).parts[:-1]
        named = [match[1].lower() for match in map(SPLIT_FOLDER.fullmatch, folders) if match]
        split = next((s for s in SPLITS if named and s.startswith(named[0])), "")
        label = folders[-1] if folders and not SPLIT_FOLDER.fullmatch(folders[-1]) else ""
        name, person = path.stem.removesuffix(".nii"), PERSON.search(path.name)
        end = person.end() if person else len(name)  # the person's own number stays
        name = name[:end] + re.sub(r"(_slice|[ _-])[ _-]*\d+$", "", name[end:])
        series.setdefault((split, label, name), []).append(path)
    often = Counter(name for *_, name in series)
    return [Scan(name if often[name] == 1 else "_".join(filter(None, (split, label, name))),
                 person_of(paths[0]), str(paths[0].parent), paths, {"split": split, "class": label})
            for (split, label, name), paths in series.items()]


def cut_scan(scan: Scan, cutting: Cutting) -> tuple[dict[int, np.ndarray], list[BadSlice]]:
    """The slices of a scan, uint8 (S, S) by number, and what of it cannot be used."""
    if scan.files[0].suffix.lower() in EXTENSIONS:
        return cut_pictures(scan.files)
    try:
        return cut_file(scan.files[0], cutting, scan.source), []
    except BadSlice as error:
        return {}, [error]


def cut_pictures(paths: list[Path]) -> tuple[dict[int, np.ndarray], list[BadSlice]]:
    """Pictures of one series, padded to squares; see `cut_scan`."""
    slices, taken, bad = {}, {}, []
    for path in paths:
        number = slice_number(path.name)
        try:
            if number in taken:
                raise BadSlice(path, f"has the number of {taken[number]}",
                               "remove one of the two, or number them apart")
            image = read_slice(path)
            slices[number], taken[number] = fit(image, max(image.size)), path
        except BadSlice as error:
            bad.append(error)
    return slices, bad


def merge_scans(scans: list[Scan]) -> list[Scan]:
    """Each session once: a disc may lie unpacked beside its tar, or twice.

    Raises UserError if two other files have one name.
    """
    merged: dict[str, Scan] = {}
    for scan in scans:
        other = merged.setdefault(scan.session, scan)
        if other is not scan and not T88.fullmatch(Path(scan.source).name):
            raise UserError(f"{scan.source} and {other.source} have one name; prepare them into "
                            "two folders, or from the folder above them")
    warn_of_nobody([scan.session for scan in merged.values() if scan.person is None])
    return list(merged.values())


class Preparation:
    """Slices on the way from their sources to OUT.

    Each session is cut into a folder of its own under OUT/.staged, whole or not at all. Only when
    all people are known, numbers and splits are given out, cases.csv is written, and the slices
    are moved to their places: no listing of the tars beforehand, and the ratios hold exactly.
    Raises UserError for an OUT that is something else, or was made with other settings.
    """

    def __init__(self, out: Path, settings: dict, skip_bad: bool):
        self.out, self.staged, self.note = out, out / ".staged", out / "prepare.json"
        self.settings, self.skip_bad = settings, skip_bad
        self.cutting = Cutting(settings["slices"], *settings["range"])
        self.bad: list[BadSlice] = []
        self.lock, self.stop = threading.Lock(), threading.Event()
        tars_done = self.read_note()
        there = Counter(map(person_of, out.glob("keras_png_slices_*/case_*_slice_*.nii.png")))
        try:
            self.rows = {row["session"]: row for row in read_cases(out)}
            whole = {session for session, row in self.rows.items()
                     if there[f"case_{int(row['case']):03d}"] == int(row["slices"])
                     and row["split"] in SPLITS and row["person"]}
        except (KeyError, ValueError, TypeError):
            raise UserError(f"{out / 'cases.csv'}: is not as prepare wrote it; prepare into a new "
                            "folder") from None
        tars_done += [mark.stem for mark in self.staged.glob("*.done")]
        self.tars_done = tars_done if len(whole) == len(self.rows) else []
        # Sessions that are there, or that a worker has begun.
        self.taken = whole | {path.parent.name for path in self.staged.glob("*/scan.json")}

    def read_note(self) -> list[str]:
        """The tars that are done, by prepare.json, which is written if OUT is empty."""
        if not self.note.exists():
            if any(not path.name.startswith(".") for path in self.out.iterdir()):
                raise UserError(f"{self.out}: is neither empty nor made by prepare; give a new "
                                "folder")
            write_json(self.note, {"settings": self.settings, "tars": []})
        try:
            before = json.loads(self.note.read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"{self.note}: cannot be read ({error}); give a new folder") from None
        if before["settings"] != self.settings:
            raise UserError(f"{self.out}: was prepared with {before['settings']}, now "
                            f"{self.settings}; give those again, or a new folder")
        return before["tars"]

    def run(self, tars: dict[str, Path], scans: list[Scan], workers: int) -> None:
        """Stages all that is not whole yet, one volume per worker in memory at a time.

        A tar is worked off by one worker: unpacking it takes longer than cutting, and cannot be
        shared out. Raises UserError for bad scans unless they are to be skipped.
        """
        # Before anything is staged, so that the same command works once the source is mended.
        people = [(row["split"], row["person"]) for row in self.rows.values()]
        people += [(scan.facts["split"], scan.person) for scan in scans if scan.facts.get("split")]
        for line in people_in_two_splits(people):
            raise UserError(line)
        self.staged.mkdir(exist_ok=True)
        tars = {key: tar for key, tar in tars.items() if key not in self.tars_done}
        total = sum(tar.stat().st_size for tar in tars.values()) // 2**20 + len(scans)
        with progress_bar(total, "preparing", "MB" if tars else "session") as bar, \
                ThreadPoolExecutor(workers) as pool:
            jobs = [pool.submit(self.stage_tar, *tar, bar) for tar in tars.items()]
            for scan in scans:
                jobs.append(pool.submit(self.stage, scan))
                jobs[-1].add_done_callback(lambda _: bar.update())
            try:
                for job in jobs:
                    job.result()
            finally:  # after an error or Ctrl-C too
                self.stop.set()
                pool.shutdown(cancel_futures=True)
        self.bad.sort(key=lambda bad: str(bad.path))  # workers finish in any order
        if self.bad and not self.skip_bad:
            raise BadSlices(self.bad, max(len(scans), len(self.bad)), "files")
        if self.bad:
            print(f"warning: goes on without {len(self.bad)}: {listing(self.bad)}",
                  file=sys.stderr)

    def stage(self, scan: Scan) -> None:
        """Cuts one scan into OUT/.staged/SESSION, unless that is there or being made."""
        with self.lock:  # a disc may lie unpacked beside its tar
            if scan.session in self.taken:
                return
            self.taken.add(scan.session)
        slices, bad = cut_scan(scan, self.cutting)
        self.bad += bad
        if not slices or bad and not self.skip_bad:
            return
        folder = self.staged / scan.session
        shutil.rmtree(folder, ignore_errors=True)  # of a call that was killed
        for number, pixels in slices.items():
            save_png(torch.from_numpy(pixels), folder / f"{number}.png")
        write_json(folder / "scan.json", {  # the last file: with it, the session is whole
            **scan.facts, "session": scan.session, "source": scan.source,
            "person": scan.person or scan.session, "slices": len(slices)})

    def stage_tar(self, key: str, tar: Path, bar: tqdm) -> None:
        """Stages the T88 volumes of a disc's tar file, read once from front to back."""
        try:
            with tempfile.TemporaryDirectory(".tmp", ".", self.staged) as folder:
                for scan in self.scans_in(tar, Path(folder), bar):
                    self.stage(scan)
        except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                raise  # the fault is OUT's
            self.bad.append(BadSlice(tar, f"is cut short or no tar file ({error})",
                                     "download it again (the sessions before are kept)"))
        if not self.bad and not self.stop.is_set():
            (self.staged / f"{key}.done").touch()  # beside its sessions, to be lost with them alone
            self.tars_done.append(key)

    def scans_in(self, tar: Path, folder: Path, bar: tqdm) -> Iterator[Scan]:
        """The scans of a tar file, one volume at a time unpacked into `folder`.

        The sessions' texts are put into OUT/.staged for `finish`.
        """
        seen, found = 0, False
        with tar.open("rb") as raw, tarfile.open(fileobj=raw, mode="r|*") as members:
            for member in members:
                if self.stop.is_set():
                    return
                bar.update(raw.tell() // 2**20 - seen)
                seen = raw.tell() // 2**20
                name = Path(member.name).name
                match = T88.fullmatch(name)
                found |= bool(match)
                if not member.isfile():
                    continue
                if match and match[1] not in self.taken:
                    file = folder / name
                elif re.fullmatch(r"OAS1_\d+_MR\d+\.txt", name):
                    file = self.staged / name
                else:
                    continue
                with file.open("wb") as copy:
                    shutil.copyfileobj(members.extractfile(member), copy)
                header, voxels = file.with_suffix(".hdr"), file.with_suffix(".img")
                if match and header.exists() and voxels.exists():
                    where = f"{tar}:{Path(member.name).with_suffix('.hdr')}"
                    yield Scan(match[1], person_of(file), where, [header], {})
                    header.unlink(), voxels.unlink()
        if not found:
            self.bad.append(BadSlice(tar, "holds no *_t88_masked_gfc volume of OASIS-1",
                                     "unpack it and give the folder"))
        self.bad += [BadSlice(f"{tar}:{half.name}", "is only one of .hdr and .img",
                              "download the disc again") for half in folder.iterdir()
                     if T88.fullmatch(half.name)[1] not in self.taken]

    def finish(self) -> None:
        """Gives numbers and splits out, writes cases.csv, and moves the slices to their places.

        Raises UserError if a picture stands in two splits, or nothing is left.
        """
        new = [json.loads(path.read_text()) for path in sorted(self.staged.glob("*/scan.json"))]
        split_of = {row["person"]: row["split"] for row in [*new, *self.rows.values()]
                    if row.get("split")}
        split_of = assign_splits([row["person"] for row in new], split_of,
                                 self.settings["ratios"], self.settings["seed"])
        numbers = {int(row["case"]) for row in self.rows.values()}
        for row in new:
            own = re.fullmatch(r"case_(\d+)", row["session"])
            number = int(own[1]) if own and int(own[1]) not in numbers else \
                max(numbers, default=0) + 1
            row["case"] = self.rows.get(row["session"], {}).get("case", number)
            row["split"] = split_of[row["person"]]
            text = self.staged / f"{row['session']}.txt"
            row |= read_facts(text) if text.exists() else {}
            numbers.add(int(row["case"]))
            self.rows[row["session"]] = row
        if not self.rows:
            raise UserError(f"{self.out}: none of the source can be used; give another one")
        write_csv(self.out / "cases.csv", CASE_COLUMNS,
                  sorted(self.rows.values(), key=lambda row: int(row["case"])))
        for row in new:
            folder = self.out / f"keras_png_slices_{row['split']}"
            folder.mkdir(exist_ok=True)
            for path in (self.staged / row["session"]).glob("*.png"):
                os.replace(path, folder / f"case_{int(row['case']):03d}_slice_{path.stem}.nii.png")
        write_json(self.note, {"settings": self.settings, "tars": self.tars_done})
        shutil.rmtree(self.staged)
        self.refuse_pictures_in_two_splits()

    def refuse_pictures_in_two_splits(self) -> None:
        """By the PNG files' bytes, which all come from one encoder."""
        pictures = ((split, hash(path.read_bytes()), f"{split}/{path.name}") for split in SPLITS
                    for path in sorted((self.out / f"keras_png_slices_{split}").glob("*.png")))
        for line in in_two_splits(pictures, "pictures", "remove one copy of the source, and "
                                  "prepare into a new folder"):
            raise UserError(f"{self.out}: {line}")


def prepare(sources: list[Path], out: Path, settings: dict, workers: int, skip_bad: bool) -> None:
    """Makes the report's layout of any sources; what a former call has done is kept.

    settings: slices, range, ratios and seed as main's options. Raises UserError.
    """
    for source in sources:
        if out.resolve().is_relative_to(source.resolve()):
            raise UserError(f"{out}: lies in the source; give another folder")
    found = [find_scans(source) for source in sources]
    tars = {f"{tar.name} {tar.stat().st_size}": tar for group, _ in found for tar in group}
    scans = merge_scans([scan for _, group in found for scan in group])
    try:
        with locked(out / ".lock", wait=False):
            work = Preparation(out, settings, skip_bad)
            work.run(tars, scans, workers)
            work.finish()
    except BlockingIOError:
        raise UserError(f"{out}: another prepare is at work on it; wait for it") from None
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); free some space and give "
                        "the same command again") from None
    for split in SPLITS:
        rows = [row for row in work.rows.values() if row["split"] == split]
        print(f"{split:9s}{sum(int(row['slices']) for row in rows):6d} slices  "
              f"{len(rows):4d} sessions  {len({row['person'] for row in rows}):4d} people")


# ---------------------------------------------------------------------------------------------
# inspect
# ---------------------------------------------------------------------------------------------


class Facts(NamedTuple):
    """What inspect notes of one image file."""

    kind: str  # size, format, bits
    counts: np.ndarray  # of each of 256 grey levels, after square padding
    digest: int  # of the pixels, likewise
    small: np.ndarray  # uint8 (128, 128)


def facts_of(image: Image.Image, kind: str) -> Facts:
    pixels = fit(image, max(image.size))
    return Facts(kind, np.bincount(pixels.ravel(), minlength=256), hash(pixels.tobytes()),
                 fit(image, 128))


def survey(path: Path) -> Facts:
    """Reads and checks one file. Raises BadSlice."""
    image = read_slice(path)
    with Image.open(path) as header:
        bits = 16 if header.mode.startswith("I") else 8
        return facts_of(image, f"{image.width}x{image.height} {header.format} {bits} bits "
                               f"{header.mode}")


def survey_splits(root: Path | None) -> dict[str, list[tuple[Path, Facts | BadSlice]]]:
    """Split -> its files, each with what is noted of it or wrong with it; phantoms for None."""
    if root is None:
        return {split: [(Path(name), facts_of(Image.fromarray(image), "phantom"))
                        for name, image in zip(phantoms.names, phantoms.images)]
                for split, phantoms in load_splits(None, 128).items()}
    return {split: list(zip(files, in_parallel(survey, files, "reading")))
            for split, files in find_slices(root).items() if files}


def inspect(root: Path | None, picture: Path) -> None:
    """Prints what a root holds, split by split, and saves a picture of random slices.

    Raises UserError, after the report, if train.py would refuse the root.
    """
    person = person_finder(root) if root else person_of
    found = survey_splits(root)
    bad, kept, rows = [], [], []
    print(f"{root or 'phantoms (no data given)'}")
    for split, results in found.items():
        bad += [facts for _, facts in results if isinstance(facts, BadSlice)]
        good = [pair for pair in results if isinstance(pair[1], Facts)]
        kept += [(split, facts.digest, f"{split}/{path.name}") for path, facts in good]
        print(f"  {split:9s}{len(good):6d} slices", end="" if good else "\n")
        if good:
            describe(good, person)
            chosen = np.random.default_rng(0).choice(len(good), 8, replace=len(good) < 8)
            rows += [good[index][1].small for index in sorted(chosen)]
    troubles = people_in_two_splits((s, person(path)) for s in found for path, _ in found[s])
    troubles += in_two_splits(kept, "pictures", "remove one copy")
    troubles += [str(BadSlices(bad, sum(map(len, found.values()))))] if bad else []
    print("  people or pictures in two splits, files that cannot be used: "
          + ("none" if not troubles else "".join(f"\n    {line}" for line in troubles)))
    if rows:
        save_grid(torch.from_numpy(np.stack(rows))[:, None] / 127.5 - 1, picture, columns=8)
        print(f"8 random slices of each split, row by row: {picture}")
    if troubles:
        raise UserError(f"{root}: train.py would refuse it: {troubles[0]}")


def describe(good: list[tuple[Path, Facts]], person: Callable) -> None:
    """The rest of a split's line, a line of kinds and one with the histogram of grey levels."""
    counts = np.sum([facts.counts for _, facts in good], axis=0)
    people = len({person(path) for path, _ in good} - {None})
    again = len(good) - len({facts.digest for _, facts in good})
    print(f"  {people or 'unknown':>4} people  mean grey level "
          f"{counts @ np.arange(256) / counts.sum():5.1f}  black "
          f"{counts[:8].sum() / counts.sum():4.0%}  {again or 'no'} duplicates")
    kinds = Counter(facts.kind for _, facts in good)
    print(f"{'':11s}" + ", ".join(f"{n} of {kind}" for kind, n in kinds.most_common(3))
          + (f" and {len(kinds) - 3} more kinds" if len(kinds) > 3 else ""))
    bands = counts[8:].reshape(62, 4).sum(1)
    marks = " .:-=+*#%@"
    print(f"{'':11s}grey levels 8 to 255 |" + "".join(
        marks[round(9 * share)] for share in bands / max(1, bands.max())) + "|")


def numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def main() -> None:
    parser = Parser(description="Makes slices of OASIS as it comes, and shows what a folder of "
                                "slices holds before a GPU week is spent on it.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("prepare", help="volumes or pictures into slices, by person",
                                  formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    command.add_argument("sources", nargs="+", type=Path, metavar="SOURCE", help="a disc's tar.gz, "
                         "or a folder of discs, NIfTI volumes or pictures")
    command.add_argument("out", type=Path, metavar="OUT", help="folder for the slices; what is "
                         "there already is kept")
    add = command.add_argument
    add("--slices", type=positive_int, default=32, metavar="N", help="slices per volume")
    add("--range", type=checked(
        numbers, lambda r: len(r) == 2 and 0 <= r[0] < r[1] <= 1,
        "two heights from 0 to 1, such as 0.2,0.85"), default="0.2,0.85", metavar="LOW,HIGH",
        help="first and last slice as shares of the brain's height")
    add("--ratios", type=checked(
        numbers, lambda r: len(r) == 3 and r[0] > 0 and min(r) >= 0 and abs(sum(r) - 1) < 1e-6,
        "three shares that add up to 1, such as 0.85,0.10,0.05"),
        default=",".join(map(str, RATIOS)), metavar="T,V,S",
        help="shares of the people in train, validate and test, unless the source has splits")
    add("--seed", type=natural, default=0, metavar="K", help="who goes to which split")
    add("--workers", type=positive_int, default=os.cpu_count(), metavar="N",
        help="volumes in memory at a time, one per worker")
    add("--skip-bad", action="store_true", help="go on without files that cannot be used")
    command = commands.add_parser("inspect", help="counts, people, sizes, grey levels, duplicates, "
                                  "bad files, and one picture")
    command.add_argument("root", nargs="?", type=Path, metavar="ROOT",
                         help="folder of slices (default: the built-in phantoms)")
    command.add_argument("--out", type=Path, default=Path("inspect.png"), metavar="FILE",
                         help="where the picture goes (default: %(default)s)")
    args = parser.parse_args(sys.argv[1:] or ["inspect"])
    if args.command == "inspect":
        inspect(args.root, args.out)
    else:
        settings = {key: getattr(args, key) for key in ("slices", "range", "ratios", "seed")}
        prepare(args.sources, args.out, settings, args.workers, args.skip_bad)


if __name__ == "__main__":
    run_cli(main)

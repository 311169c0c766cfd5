"""OASIS slices: finds, checks, decodes and caches them, and hands out batches.

Three layouts are read, each with PNG, JPEG, TIFF or BMP images of 8 or 16 bits:

    ROOT/train/ validate/ test/                        (case_001_slice_0.jpg ...)
    ROOT/keras_png_slices_train/ ..._validate/ ..._test/   (case_001_slice_0.nii.png ...)
    ROOT/*.png                                         (one folder; split here, by person)

With no data at all, phantom slices are drawn: procedural axial brains that need no file.

    python dataset.py inspect ROOT        what is there, as a table and a picture
    python dataset.py inspect             the same for the phantoms

Images leave this module as float32 in [-1, 1], shape (B, 1, H, W): -1 black, 1 white.
"""

import argparse
import contextlib
import hashlib
import os
import re
import signal
import sys
import zlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid
from tqdm import tqdm

SPLITS = ("train", "validate", "test")
EXTENSIONS = {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp"}
PERSON = re.compile(r"(case_\d+|OAS\d+_\d+|sub-[A-Za-z0-9]+|phantom_\d+)")
LARGEST_SIDE = 8192  # pixels; beyond it, a file is no slice, and padding would eat the memory
CACHE_VERSION = 1  # raise it when the same files would decode to other pixels

# ---------------------------------------------------------------------------------------------
# What the three scripts share: errors in one line, whole files, bars, pictures
# ---------------------------------------------------------------------------------------------


class UserError(Exception):
    """A failure that the user can mend; its text is the one line that is shown."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line too."""

    def error(self, message: str) -> None:
        raise UserError(f"{message}; {self.prog} --help explains the options")


def run_cli(main: Callable[[], None]) -> None:
    """Runs a script's `main`; a `UserError` becomes one line on stderr and exit code 2."""
    try:
        main()
    except (UserError, MemoryError, RuntimeError) as error:
        # A CPU's allocator raises a plain RuntimeError, told by its text alone.
        if isinstance(error, RuntimeError) and not re.search(
                "out of memory|allocate memory|not enough memory", str(error)):
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


# ---------------------------------------------------------------------------------------------
# Finding slices
# ---------------------------------------------------------------------------------------------


def person_of(path: Path) -> str | None:
    """The person a slice is of, from names as in case_001_slice_0 or OAS1_0001_MR1, or None."""
    match = PERSON.search(path.name)
    return match[0] if match else None


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
    """The image files of each split of any of the three layouts.

    A folder without splits is divided by person (see `split_by_person`).
    Raises UserError for a missing or empty folder, or if a person stands in two splits.
    """
    if not os.path.isdir(root):
        raise UserError(f"{root}: no such folder; --data takes the folder that holds the slices")
    for prefix in ("", "keras_png_slices_"):
        folders = {split: root / (prefix + split) for split in SPLITS}
        if os.path.isdir(folders["train"]):
            splits = {s: images_in(f) if os.path.isdir(f) else [] for s, f in folders.items()}
            if not splits["train"]:
                raise UserError(f"{folders['train']}: holds no images ({_extensions()})")
            break
    else:
        files = images_in(root)
        if not files:
            raise UserError(f"{root}: neither train/, nor keras_png_slices_train/, nor images "
                            f"({_extensions()}) in it")
        splits = split_by_person(files)
    _refuse_shared_people(splits)
    return splits


def _extensions() -> str:
    return ", ".join(sorted(EXTENSIONS))


def split_by_person(files: list[Path], seed: int = 0) -> dict[str, list[Path]]:
    """About 85 / 10 / 5 % of the people for train / validate / test, by a fixed shuffle.

    All slices of one person stay together: neighbours are near-copies, so that a split by
    slice would leak. At least one person goes to each of the smaller splits if three are there,
    else all go to train. Where a name tells no person, its slice counts as one, with a warning.
    """
    person = {path: person_of(path) or path.stem for path in files}
    unknown = sum(person_of(path) is None for path in files)
    if unknown:
        print(f"warning: {unknown} names, such as {files[0].name}, tell no person (case_001_..., "
              "OAS1_0001_..., sub-01_...); slices of one head may stand in two splits",
              file=sys.stderr)
    people = sorted(set(person.values()))
    order = np.random.default_rng(seed).permutation(len(people))
    held = [max(1, round(len(people) * share)) if len(people) >= 3 else 0
            for share in (0.10, 0.05)]
    split_of = {people[index]: "validate" if place < held[0] else
                "test" if place < sum(held) else "train" for place, index in enumerate(order)}
    return {s: [path for path in files if split_of[person[path]] == s] for s in SPLITS}


def _refuse_shared_people(splits: dict[str, list[Path]]) -> None:
    people = {split: {person_of(path) for path in files} - {None}
              for split, files in splits.items()}
    for first, second in (("train", "validate"), ("train", "test"), ("validate", "test")):
        shared = people[first] & people[second]
        if shared:
            raise UserError(f"{len(shared)} people stand in both {first} and {second}, such as "
                            f"{min(shared)}; move each person's slices to one split")


# ---------------------------------------------------------------------------------------------
# Decoding and caching
# ---------------------------------------------------------------------------------------------


def decode(path: Path, image_size: int | None) -> np.ndarray:
    """One image file -> uint8 (S, S) for an image size S, or (H, W) as it is for None.

    The slice is made square by black padding, never squashed, then resized by an antialiased
    bicubic filter (a wider one would ring into the black background). 16-bit images are scaled
    so that 65535 is white.
    Raises UserError if the file is no whole image of 8 or 16 bits.
    """
    try:
        with Image.open(path) as image:
            image.load()
            if max(image.size) > LARGEST_SIDE:
                raise UserError(f"{path}: has a side of {max(image.size)} pixels; slices have at "
                                f"most {LARGEST_SIDE}")
            image = to_gray(image)
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        reason = "no image" if isinstance(error, Image.UnidentifiedImageError) else error
        raise UserError(f"{path}: cannot be read ({reason}); replace or remove it") from None
    if image_size is not None:
        side = max(image.size)
        square = Image.new(image.mode, (side, side))
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        image = square.resize((image_size, image_size), Image.Resampling.BICUBIC)
    return np.asarray(image).round().clip(0, 255).astype(np.uint8)


def to_gray(image: Image.Image) -> Image.Image:
    """An image of any mode -> mode L, or F in [0, 255] for 16 bits; black where transparent.

    Raises ValueError for pixels that are neither 8 nor 16 bits.
    """
    if image.mode.startswith(("I", "F")):
        pixels = np.asarray(image).astype(np.float32)
        if image.mode == "F" or pixels.min() < 0 or pixels.max() > 65535:
            raise ValueError("its pixels have neither 8 nor 16 bits")
        return Image.fromarray(pixels / 257)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
    return image.convert("L")


def decode_all(files: list[Path], image_size: int | None) -> np.ndarray:
    """Decodes in parallel, with a bar: paths -> uint8 (N, H, W).

    Raises UserError naming up to ten of the files that cannot be read, or the first whose size
    differs if the size is native.
    """
    def attempt(path: Path) -> np.ndarray | UserError:
        try:
            return decode(path, image_size)
        except UserError as error:
            return error

    images, bad = None, []
    with ThreadPoolExecutor(os.cpu_count()) as pool, \
            progress_bar(len(files), "decoding", "slice") as bar:
        for index, result in enumerate(pool.map(attempt, files)):
            bar.update()
            if isinstance(result, UserError):
                bad.append(str(result))
                continue
            if images is None:
                images = np.zeros((len(files), *result.shape), np.uint8)
            if result.shape != images.shape[1:]:
                raise UserError(f"{files[index]}: is {result.shape[0]}x{result.shape[1]} (rows x "
                                f"columns), others {images.shape[1]}x{images.shape[2]}; give "
                                "--image-size to bring all to one size")
            images[index] = result
    if len(bad) == 1:
        raise UserError(bad[0])
    if bad:
        raise UserError(f"{len(bad)} of {len(files)} images cannot be used: "
                        + "; ".join(bad[:10]) + ("; ..." if len(bad) > 10 else ""))
    return images


def default_cache() -> Path:
    """Where decoded slices are kept: the user's cache folder (XDG_CACHE_HOME is heeded).

    Raises UserError for a user without a home folder.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "oasis-diffusion"
    except RuntimeError:
        raise UserError("no home folder to keep decoded slices in; give --cache") from None


def load_images(files: list[Path], image_size: int | None, cache: Path | None = None
                ) -> np.ndarray:
    """The slices as one uint8 (N, H, W), decoded once and cached on disk.

    The cache is found by the files' names, sizes and times and the image size, and trusted only
    if its checksum holds, so that a stale or damaged one is decoded again. It is mapped into
    memory, and so shared by all processes of a machine.
    Raises UserError as `decode_all` does.
    """
    cache = cache or default_cache()
    facts = [_file_facts(path) for path in files]
    key = hashlib.sha256(repr((CACHE_VERSION, image_size, facts)).encode()).hexdigest()[:24]
    for found in cache.glob(f"{key}-*.npy"):
        images = _read_cache(found, len(files))
        if images is not None:
            return images
    images = decode_all(files, image_size)
    if images.max() < 64:
        print(f"warning: the brightest pixel of {files[0].parent} is {images.max()} of 255; 12-bit "
              "values in 16-bit files? scale them so that 65535 is white", file=sys.stderr)
    target = cache / f"{key}-{zlib.crc32(images):08x}.npy"
    try:
        write_atomic(target, lambda file: np.save(file, images, allow_pickle=False))
    except UserError as error:
        print(f"warning: no cache, the slices will be decoded again next time: {error}",
              file=sys.stderr)
    return images


def _file_facts(path: Path) -> tuple[str, int, int]:
    """What tells a changed file: its path, size and time. Raises UserError for no plain file."""
    try:
        if path.is_file():  # reading a pipe would wait for ever
            stat = path.stat()
            return str(path.resolve()), stat.st_size, stat.st_mtime_ns
    except OSError:
        pass
    raise UserError(f"{path}: cannot be read (a broken link, or no plain file); replace or "
                    "remove it")


def _read_cache(path: Path, count: int) -> np.ndarray | None:
    """The array of a cache file, or None (and the file removed) if it is damaged."""
    try:
        images = np.load(path, mmap_mode="c", allow_pickle=False)  # shared until written
        crc = zlib.crc32(np.ascontiguousarray(images))
        if images.dtype == np.uint8 and images.ndim == 3 and len(images) == count \
                and path.stem.endswith(f"-{crc:08x}"):
            return images
    except (OSError, ValueError, EOFError):
        pass
    print(f"warning: {path} is damaged; decoding again", file=sys.stderr)
    with contextlib.suppress(OSError):
        path.unlink()
    return None


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
    images = []
    with ThreadPoolExecutor(os.cpu_count()) as pool, \
            progress_bar(len(places), "drawing phantoms", "slice") as bar:
        for image in pool.map(
                lambda p: draw_phantom(image_size, p[0], (p[1] + 0.5) / per_person, seed), places):
            images.append(image)
            bar.update()
    return np.stack(images), [f"phantom_{p:03d}_slice_{s}" for p, s in places]


# ---------------------------------------------------------------------------------------------
# Batches
# ---------------------------------------------------------------------------------------------


def load_splits(root: Path | None, image_size: int | None, cache: Path | None = None
                ) -> dict[str, tuple[np.ndarray, list[str]]]:
    """Images, uint8 (N, H, W), and names of each split of a root, or of the phantoms for None.

    Splits without slices are left out. Raises UserError as the functions above do, or if the
    splits differ in size.
    """
    if root is None:
        people = {"train": (0, 192), "validate": (192, 16), "test": (208, 16)}
        return {s: phantom_slices(image_size or 64, *people[s]) for s in SPLITS}
    loaded = {split: (load_images(files, image_size, cache), [path.name for path in files])
              for split, files in find_slices(root).items() if files}
    shapes = {split: images.shape[1:] for split, (images, _) in loaded.items()}
    if len(set(shapes.values())) > 1:
        raise UserError(f"{root}: the splits differ in size (" + ", ".join(
            f"{s} {h}x{w}" for s, (h, w) in shapes.items()) + "); give --image-size")
    return loaded


@lru_cache(maxsize=2)
def _permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)


def batch_indices(count: int, batch_size: int, seed: int, step: int, rank: int = 0,
                  world_size: int = 1) -> np.ndarray:
    """Which slices make the batch of a rank at a step: int64 (batch_size,) in [0, count).

    A pure function of its arguments: every epoch is a fresh permutation that all ranks share
    out, so that there is no order to save and none to fast-forward.
    """
    first = (step * world_size + rank) * batch_size
    places = np.arange(first, first + batch_size)
    return np.array([_permutation(count, seed, place // count)[place % count]
                     for place in places.tolist()])


class Slices:
    """Slices of one split, kept as uint8 where that is fastest, handed out as [-1, 1].

    On a GPU the set is copied to the card if it takes less than a quarter of the free memory.
    """

    def __init__(self, images: np.ndarray, names: list[str], device: torch.device):
        self.names = names
        self.device = device
        self.images = torch.from_numpy(images)
        if device.type == "cuda" and images.nbytes < torch.cuda.mem_get_info(device)[0] / 4:
            self.images = self.images.to(device)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, indices: np.ndarray) -> Tensor:
        """int64 (B,) -> float32 (B, 1, H, W) in [-1, 1] on the device."""
        index = torch.from_numpy(indices)
        if self.images.device.type == "cuda":
            index = _to_card(index, self.device)
        batch = self.images[index]
        if self.device.type == "cuda" and batch.device.type == "cpu":
            batch = _to_card(batch, self.device)
        return batch.to(self.device)[:, None].float() / 127.5 - 1


def _to_card(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy to the GPU that the host does not wait for; only pinned memory allows that."""
    return tensor.pin_memory().to(device, non_blocking=True)


# ---------------------------------------------------------------------------------------------
# inspect
# ---------------------------------------------------------------------------------------------


def inspect(root: Path | None, picture: Path) -> None:
    """Prints what a root holds, split by split, and saves a picture of random slices.

    Raises UserError as `find_slices` and `decode_all` do.
    """
    files = {s: f for s, f in find_slices(root).items() if f} if root else {}
    splits = {s: (decode_all(f, 128), [path.name for path in f]) for s, f in files.items()} \
        if root else load_splits(None, 128)
    print(f"{root or 'phantoms (no data given)'}")
    rows = []
    for split, (images, names) in splits.items():
        people = len({person_of(Path(name)) for name in names} - {None})
        kinds = Counter(_size_and_mode(path) for path in files.get(split, []))
        print(f"  {split:9s}{len(images):6d} slices  {people or 'unknown':>4} people  mean grey "
              f"level {images.mean():5.1f}  black {np.mean(images < 8):4.0%}  "
              + ", ".join(f"{n} of {kind}" for kind, n in kinds.most_common(3)))
        chosen = np.random.default_rng(0).choice(len(images), 8, replace=len(images) < 8)
        rows.append(Slices(images, names, torch.device("cpu"))[np.sort(chosen)])
    save_grid(torch.cat(rows), picture, columns=8)
    print(f"8 random slices of each split, row by row: {picture}")


def _size_and_mode(path: Path) -> str:
    with Image.open(path) as image:  # decoded before, so it opens
        return f"{image.width}x{image.height} {image.format} {image.mode}"


def main() -> None:
    parser = Parser(
        description="Shows what a folder of slices holds, before a GPU week is spent on it.")
    commands = parser.add_subparsers(dest="command")
    command = commands.add_parser("inspect", help="counts, people, sizes, and one picture")
    command.add_argument("root", nargs="?", type=Path, metavar="ROOT",
                         help="folder of slices (default: the built-in phantoms)")
    command.add_argument("--out", type=Path, default=Path("inspect.png"), metavar="FILE",
                         help="where the picture goes (default: %(default)s)")
    args = parser.parse_args(sys.argv[1:] or ["inspect"])
    inspect(args.root, args.out)


if __name__ == "__main__":
    run_cli(main)

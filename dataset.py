"""OASIS slices: finds, checks, decodes and caches them, and hands out batches.

Three layouts are supported, each with PNG, JPEG, TIFF or BMP images of 8 or 16 bits:

    ROOT/train/ validate/ test/                        (case_001_slice_0.jpg ...)
    ROOT/keras_png_slices_train/ ..._validate/ ..._test/   (case_001_slice_0.nii.png ...)
    ROOT/*.png                                         (one folder; split here, by subject)

`python -m tools.prepare` makes the second one from the original OASIS files, and
`python -m tools.inspect` shows what a folder contains. Without data, phantom slices are drawn.

Slices stand upright in the radiological convention: the front of the head on top, the patient's
right on the picture's left. Images leave this module as float32 in [-1, 1], shape (B, 1, H, W).
"""

import contextlib
import csv
import hashlib
import io
import json
import math
import os
import re
import sys
import zlib
from collections.abc import Callable, Hashable, Iterable, Iterator
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from utils.cache import cache_folder, cached_images
from utils.cli import UserError
from utils.files import write_json
from utils.images import (IMAGES, BadSlice, BadSlices, fit, images_in, in_parallel,
                          listing, read_gray, read_mr_slice)
from utils.phantoms import phantom_slices

SPLITS = ("train", "validate", "test")
RATIOS = (0.85, 0.10, 0.05)  # near the 9,664 / 1,120 / 544 slices of the report's set
SUBJECT = re.compile(r"(case_\d+|OAS3\d{4}|OAS\d+_\d+|sub-[A-Za-z0-9]+|phantom_\d+)")
CACHE_VERSION = 3  # increase it when the same files decode to other pixels or are rejected

# ---------------------------------------------------------------------------------------------
# Finding slices
# ---------------------------------------------------------------------------------------------


def subject_of(path: Path) -> str | None:
    """The subject in a name such as case_001_slice_0 or OAS1_0001_MR1, or None."""
    match = SUBJECT.search(path.name)
    return match[0] if match else None


def slice_number(name: str) -> int:
    """The last number (its last nine digits) of a file's name, as 7 of case_001_slice_7.nii.png; 0
    if there is none."""
    return int((re.findall(r"\d+", name) or ["0"])[-1][-9:])


def read_cases(root: Path) -> list[dict[str, str]]:
    """The rows of ROOT/cases.csv, if it exists. Raises UserError if it is not a CSV file."""
    path = root / "cases.csv"
    try:
        return list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8-sig"))))
    except FileNotFoundError:
        return []
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read ({error}); fix or remove it") from None


def subject_finder(root: Path) -> Callable[[Path], str | None]:
    """`subject_of`, but ROOT/cases.csv, if it names a case's subject, has priority (a subject may
    have several cases)."""
    of_case = {f"case_{int(row['case']):03d}": row["person"] for row in read_cases(root)
               if row.get("person") and str(row.get("case")).isdecimal()}
    return lambda path: of_case.get(subject_of(path), subject_of(path))


def class_finder(root: Path) -> Callable[[Path], str]:
    """Finds a file's class in ROOT/cases.csv: its case's clinical dementia rating, as "CDR 0.5",
    or its `class` or `diagnosis`; "" if there is none."""
    of_case = {}
    for row in read_cases(root):
        stated = row.get("class") or row.get("diagnosis") or \
            (row.get("cdr") and f"CDR {row['cdr']}")
        rating = re.search(r"CDR \d+(\.\d+)?", stated or "")
        if str(row.get("case")).isdecimal():
            of_case[f"case_{int(row['case']):03d}"] = rating[0] if rating else stated or ""
    return lambda path: of_case.get(subject_of(path), "")


def find_slices(root: Path) -> dict[str, list[Path]]:
    """The image files of each split of any of the three layouts; a flat folder is split here.

    Raises UserError for a missing or empty folder, or one that `prepare` has not finished.
    """
    if not os.path.isdir(root):
        raise UserError(f"{root}: no such folder; give the one that holds the slices")
    if os.path.isdir(root / ".staged"):
        raise UserError(f"{root}: its preparation is not finished; give the same python -m "
                        "tools.prepare again")
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
                        f"({IMAGES}) in it; python -m tools.prepare {root} OUT makes slices of "
                        "volumes, discs and class folders")
    return split_by_subject(files, subject_finder(root))


def split_by_subject(files: list[Path], subject: Callable) -> dict[str, list[Path]]:
    """Splits the files of one folder by subject; a name without one counts as its own subject."""
    subjects = {path: subject(path) or path.stem for path in files}
    warn_of_unknown_subjects([path.name for path in files if subject(path) is None])
    split_of = assign_splits(subjects.values())
    return {s: [path for path in files if split_of[subjects[path]] == s] for s in SPLITS}


def warn_of_unknown_subjects(names: list[str]) -> None:
    """Warns of names without a subject: slices of one subject may then be in two splits."""
    if names:
        print(f"warning: {len(names)} names, such as {names[0]}, state no subject (case_001_..., "
              "OAS1_0001_..., sub-01_...); slices of one subject may be in two splits",
              file=sys.stderr)


def assign_splits(subjects: Iterable[str], known: dict[str, str] | None = None,
                  ratios: tuple[float, ...] = RATIOS, seed: int = 0) -> dict[str, str]:
    """Subject -> split: by default about 85 / 10 / 5 % of the subjects, by a seeded shuffle.

    All slices of a subject are in one split: neighbouring slices are nearly equal. Each split with
    a ratio above 0 gets at least one subject; with fewer than three, all are in train. `known`
    subjects keep their split.
    """
    split_of = dict(known or {})
    new = sorted(set(subjects) - set(split_of))
    count = len(new) + len(split_of)
    order = [new[i] for i in np.random.default_rng(seed).permutation(len(new))]
    for split, share in zip(SPLITS[1:], ratios[1:]):
        quota = max(1, round(count * share)) if count >= 3 and share > 0 else 0
        short = max(0, quota - list(split_of.values()).count(split))
        kept = 0 if "train" in split_of.values() else 1  # rounding up may use all subjects
        take = min(short, len(order) - kept)
        split_of |= dict.fromkeys(order[:take], split)
        order = order[take:]
    return split_of | dict.fromkeys(order, "train")


def in_two_splits(items: Iterable[tuple[str, Hashable, str]], what: str, fix: str) -> list[str]:
    """One line for each pair of splits that share a key. items: (split, key, name)."""
    first, shared = {}, {}
    for split, key, name in items:
        other, where = first.setdefault(key, (split, name))
        if other != split:
            shared.setdefault((other, split), []).append(
                name if name == where else f"{where} and {name}")
    return [f"{len(names)} {what} are in both {a} and {b}, such as {names[0]}; {fix}"
            for (a, b), names in shared.items()]


def subjects_in_two_splits(pairs: Iterable[tuple[str, str | None]]) -> list[str]:
    """One line for each pair of splits that share a subject. pairs: (split, subject)."""
    return in_two_splits(((split, who, who) for split, who in dict.fromkeys(pairs) if who),
                         "subjects", "move each subject's slices to one split")


# ---------------------------------------------------------------------------------------------
# Decoding and caching
# ---------------------------------------------------------------------------------------------


def decode(path: Path, image_size: int | None, few_levels: bool = False) -> np.ndarray:
    """One image file -> uint8 (S, S), or (H, W) for None; see `fit`. Raises BadSlice."""
    return fit(read_mr_slice(path, few_levels), image_size)


def decode_all(files: list[Path], image_size: int | None, few_levels: bool = False
               ) -> Iterator[np.ndarray]:
    """Decodes in parallel, with a bar, and yields the images, uint8 (H, W), in order.

    Raises BadSlice for the first whose size differs if the size is native, or, at the end,
    BadSlices naming up to ten of the files that are no slices.
    """
    first, brightest, bad = None, 0, []
    for path, image in zip(files, in_parallel(
            lambda path: decode(path, image_size, few_levels), files, "decoding")):
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


def cache_file(files: list[Path], image_size: int | None, cache: Path | None,
               few_levels: bool = False) -> Path:
    """A cache name that depends on the image size and each file's path, size and time."""
    facts = []
    for path in files:
        facts.append(os.path.abspath(path))
        with contextlib.suppress(OSError):  # a broken link; never cached, since it is rejected
            found = path.stat()
            facts += [found.st_size, found.st_mtime_ns]
    key = hashlib.sha256(repr((CACHE_VERSION, image_size, few_levels, facts)).encode()).hexdigest()
    return (cache or cache_folder()) / f"{key[:24]}.npy"


def load_images(files: list[Path], image_size: int | None, cache: Path | None = None,
                few_levels: bool = False) -> tuple[np.ndarray, int]:
    """The slices as one uint8 (N, H, W), decoded once and cached on disk, and their CRC-32.

    Raises UserError as `decode_all` does.
    """
    return cached_images(cache_file(files, image_size, cache, few_levels),
                         lambda: decode_all(files, image_size, few_levels), len(files))


def without_bad(files: list[Path], image_size: int | None, cache: Path | None = None,
                few_levels: bool = False) -> list[Path]:
    """The files that are valid slices; the others are listed in a warning and cached."""
    kept = cache_file(files, image_size, cache, few_levels).with_suffix(".bad.json")
    try:
        bad = json.loads(kept.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        read = in_parallel(partial(read_mr_slice, few_levels=few_levels), files, "checking")
        bad = {path.name: found.what for path, found in zip(files, read)
               if isinstance(found, BadSlice)}
        with contextlib.suppress(UserError):
            write_json(kept, bad)
    if bad:
        print(f"warning: {len(bad)} of {len(files)} images are ignored: "
              + listing([BadSlice(files[0].parent / name, what) for name, what in bad.items()]),
              file=sys.stderr)
    return [path for path in files if path.name not in bad]


# ---------------------------------------------------------------------------------------------
# Batches
# ---------------------------------------------------------------------------------------------


class Slices:
    """The slices of one split, stored as uint8 and handed out as float32 in [-1, 1].

    images: uint8 (N, H, W); names: their files' names; numbers: float32 (N,), each slice's number,
    which increases with its height in the head; subjects and classes: those of each slice, class
    "" for none; crc32: checksum of the images. A GPU holds them if that takes less than a quarter
    of its free memory.
    """

    def __init__(self, images: np.ndarray, names: list[str],
                 device: torch.device = torch.device("cpu"), subjects: list[str] | None = None,
                 classes: list[str] | None = None, crc32: int = 0):
        self.images, self.names, self.crc32 = torch.from_numpy(images), names, crc32
        self.subjects = subjects or [subject_of(Path(name)) or name for name in names]
        self.classes = classes or [""] * len(names)
        self.numbers = np.array([slice_number(name) for name in names], np.float32)
        self.to(device)

    def to(self, device: torch.device) -> "Slices":
        """Sets the device of the batches, and moves the slices to it if they fit."""
        self.device = device
        if device.type == "cuda" and self.images.nbytes < torch.cuda.mem_get_info(device)[0] / 4:
            self.images = self.images.to(device)
        return self

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, indices: np.ndarray) -> Tensor:
        """int64 (B,) -> float32 (B, 1, H, W) in [-1, 1] on the device."""
        index = moved(torch.from_numpy(indices), self.images.device)
        return moved(self.images[index], self.device)[:, None].float().div_(127.5).sub_(1)


def load_splits(root: Path | None, image_size: int | None, cache: Path | None = None,
                skip_bad: bool = False, few_levels: bool = False) -> dict[str, Slices]:
    """The non-empty splits of a root, or phantoms for None, on the CPU.

    Raises UserError as the functions above do, or if the splits differ in size or share a
    picture. Warns of slices that are smaller than the image size.
    """
    if root is None:
        subjects = {"train": (0, 192), "validate": (192, 16), "test": (208, 16)}
        phantoms = {s: phantom_slices(image_size or 64, *subjects[s]) for s in SPLITS}
        return {s: Slices(images, names, crc32=zlib.crc32(images))
                for s, (images, names) in phantoms.items()}
    files_of = find_slices(root)
    subject, class_of = subject_finder(root), class_finder(root)
    pairs = ((split, subject(path)) for split, files in files_of.items() for path in files)
    for line in subjects_in_two_splits(pairs):
        raise UserError(line)
    loaded = {}
    for split, files in files_of.items():
        if skip_bad and files:
            files = without_bad(files, image_size, cache, few_levels)
        if files:
            images, crc = load_images(files, image_size, cache, few_levels)
            loaded[split] = Slices(images, [path.name for path in files],
                                   subjects=[subject(path) or path.stem for path in files],
                                   classes=[class_of(path) for path in files], crc32=crc)
            warn_if_enlarged(files, image_size)
    if "train" not in loaded:
        raise UserError(f"{root}: no slice of train can be used; give another folder")
    shapes = {split: loaded[split].images.shape[1:] for split in loaded}
    if len(set(shapes.values())) > 1:
        raise UserError(f"{root}: the splits differ in size (" + ", ".join(
            f"{s} {h}x{w}" for s, (h, w) in shapes.items()) + "); give --image-size")
    for line in in_two_splits(picture_keys(loaded, files_of), "pictures", "remove one copy"):
        raise UserError(f"{root}: {line}")
    return loaded


def picture_keys(loaded: dict[str, Slices], files_of: dict[str, list[Path]]
                 ) -> Iterator[tuple[str, Hashable, str]]:
    """(split, key, name) of each slice, for `in_two_splits`. Equal keys: equal pictures.

    Slices that are equal at the image size are compared again at their files' size: made small,
    slices of two subjects at the top of the head can be equal by chance.
    """
    splits_of: dict[int, set[str]] = {}
    for split, slices in loaded.items():
        for image in slices.images.numpy():
            splits_of.setdefault(hash(image.tobytes()), set()).add(split)
    for split, slices in loaded.items():
        paths = {path.name: path for path in files_of[split]}
        for name, image in zip(slices.names, slices.images.numpy()):
            key = hash(image.tobytes())
            if len(splits_of[key]) > 1:
                own = read_gray(paths[name])
                key = hash((own.size, own.tobytes()))
            yield split, key, f"{split}/{name}"


def warn_if_enlarged(files: list[Path], image_size: int | None) -> None:
    """Warns if slices are smaller than the image size; checks eight of them."""
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
    """Indices of the slices in a step's batch: int64 (batch_size,) in [0, count).

    A pure function of its arguments: every epoch is a new permutation, so that no order has to be
    saved or skipped when a run continues.
    """
    places = np.arange(step * batch_size, (step + 1) * batch_size)
    return np.array([_permutation(count, seed, place // count)[place % count]
                     for place in places.tolist()])


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """Copies to the device; from pinned memory to a GPU, so that the host need not wait."""
    if device.type == "cuda" and not tensor.is_cuda:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=device.type == "cuda")


# ---------------------------------------------------------------------------------------------
# Augmentation
# ---------------------------------------------------------------------------------------------

AUGMENTATIONS = ("flip", "rotation", "scale", "aspect ratio", "shift across", "shift down")


def draw_augmentations(count: int, probability: float, generator: torch.Generator) -> Tensor:
    """Random geometry for `count` slices, float32 (count, 6): the parameters of `augment`, each in
    units of its largest value, 0 where it is off.

    Each is on with the given probability, both shifts together. A flip is 1; the others are normal
    with a standard deviation of half of their largest value. generator: on the CPU.
    """
    on = torch.rand(count, len(AUGMENTATIONS), generator=generator) < probability
    on[:, 5] = on[:, 4]
    size = (torch.randn(count, len(AUGMENTATIONS), generator=generator) / 2).clamp(-1, 1)
    size[:, 0] = 1
    return size * on


def augment(images: Tensor, parameters: Tensor) -> Tensor:
    """Flips, rotates, scales and shifts slices, float32 (B, C, H, W) in [-1, 1] -> same.

    parameters: (B, 6) of `draw_augmentations`. Largest values: rotation 5 degrees, scale 5%, aspect
    ratio 5%, shifts 4% of the side. They are the net's label too, so that the geometry does not
    leak into samples, which are drawn with zeros (Karras et al. 2022, appendix F.2).
    """
    parameters = parameters.to(images.device)
    flip, scale, aspect = (1 - 2 * parameters[:, 0], 1 + 0.05 * parameters[:, 2],
                           1 + 0.025 * parameters[:, 3])
    cos, sin = (f(parameters[:, 1] * math.radians(5)) for f in (torch.cos, torch.sin))
    ratio = images.shape[2] / images.shape[3]
    # From a pixel of the result to its place in the image, in units of half a side.
    across = [flip * cos / (scale * aspect), -flip * sin * ratio / (scale * aspect),
              0.08 * parameters[:, 4]]
    down = [sin / ratio * aspect / scale, cos * aspect / scale, 0.08 * parameters[:, 5]]
    grid = F.affine_grid(torch.stack(across + down, 1).view(-1, 2, 3), images.shape,
                         align_corners=False)
    # Outside is black, which grid_sample calls 0.
    moved = F.grid_sample(images + 1, grid, mode="bicubic", align_corners=False)
    untouched = ~parameters.any(1)[:, None, None, None]
    return torch.where(untouched, images, moved.clamp(0, 2) - 1)

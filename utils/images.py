"""Image files: read as grey slices, and checked for being MR slices at all."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from utils.cli import UserError, progress_bar

EXTENSIONS = {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp"}
IMAGES = ", ".join(sorted(EXTENSIONS))
LARGEST_SIDE = 8192  # pixels; larger images are rejected, since padding them would exhaust memory


def images_in(folder: Path) -> list[Path]:
    """Image files directly in `folder`, sorted by name, hidden ones left out.

    Raises UserError if the folder cannot be listed.
    """
    try:
        return sorted(path for path in folder.iterdir()
                      if path.suffix.lower() in EXTENSIONS and not path.name.startswith("."))
    except OSError as error:
        raise UserError(f"{folder}: cannot be listed ({error.strerror})") from None


class BadSlice(UserError):
    """A file that cannot be used as a slice: the reason, and how to fix it."""

    def __init__(self, path: Path | str, what: str, fix: str = "replace or remove it"):
        super().__init__(f"{path}: {what}; {fix}")
        self.path, self.what, self.fix = path, what, fix


class BadSlices(UserError):
    """Several bad slices: their number, up to ten names, and how to fix them."""

    def __init__(self, bad: list[BadSlice], total: int, unit: str = "images"):
        fixes = "; ".join(dict.fromkeys(b.fix for b in bad))
        super().__init__((f"{bad[0].path}: {bad[0].what}" if len(bad) == 1 else
                          f"{len(bad)} of {total} {unit} cannot be used: {listing(bad)}")
                         + f"; {fixes}; or give --skip-bad to ignore them")
        self.bad = bad


def listing(bad: list[BadSlice]) -> str:
    """Up to ten files with the reasons why they are rejected."""
    return "; ".join(f"{b.path} ({b.what})" for b in bad[:10]) + "; ..." * (len(bad) > 10)


def need_plain_file(path: Path) -> None:
    """Raises BadSlice for no file, a broken link, or a pipe, which would block."""
    if not os.path.lexists(path):
        raise BadSlice(path, "no such file", "give another one")
    if not os.path.isfile(path):
        raise BadSlice(path, "cannot be read (a broken link, or not a regular file)")


def read_gray(path: Path) -> Image.Image:
    """Reads an image file as mode L, or F in [0, 255] for 16 bits (65535 is white).

    Raises BadSlice if the file is not a complete grey image of 8 or 16 bits.
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
        reason = "not an image" if isinstance(error, Image.UnidentifiedImageError) else \
            getattr(error, "strerror", None) or error
        raise BadSlice(path, f"cannot be read ({reason})") from None


def to_gray(image: Image.Image) -> Image.Image:
    """Converts any mode to L, or to F in [0, 255] for 16 bits; transparent pixels become black.

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
        # JPEG may add slight colours to grey images.
        if np.mean(np.ptp(channels, axis=2) > 24) > 1e-3:
            raise ValueError("it is a colour image, such as an overlay or a screenshot")
    return image.convert("L")


def is_label_map(pixels: np.ndarray) -> bool:
    """Whether an image, (..., H, W) from 0 on, has only a few grey levels, as a segmentation map.

    Pixels are scaled so that the 99th percentile of those above 0 is white; a maximum would depend
    on a few bright vessels. Of the pixels above the background, the five most frequent bands of 7
    of 256 levels hold at most 46% in each of 5,760 OASIS slices, at most 71% in phantoms, and
    nearly all in segmentation maps (JPEG and resizing blur their edges).
    """
    inside = pixels[pixels > 0]
    white = np.percentile(inside, 99) if inside.size else 1
    levels = np.rint((pixels * (255 / white)).clip(0, 255)).astype(np.uint8)
    counts = np.bincount(levels.ravel(), minlength=256)
    counts[:8] = 0  # the background, with JPEG artefacts
    total, held = counts.sum(), 0
    for _ in range(5):
        bands = np.convolve(counts, np.ones(7, int), "same")
        held += bands.max()
        counts[max(0, bands.argmax() - 3):bands.argmax() + 4] = 0
    return held > 0.85 * total


def check_slice(pixels: np.ndarray, path: Path | str, few_levels: bool = False) -> None:
    """Raises BadSlice for an image, in the file's own size, that is not an MR slice.

    few_levels: whether to accept images with few grey levels.
    """
    if pixels.min() == pixels.max():
        what = "is entirely black" if pixels.max() == 0 else "has a single grey level"
        raise BadSlice(path, what, "remove empty slices")
    if not few_levels and is_label_map(pixels):
        raise BadSlice(path, "has few grey levels, as a segmentation map",
                       "give the folder of MR slices, such as keras_png_slices_train, not "
                       "keras_png_slices_seg_train, or --few-levels if they are MR slices")


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


def read_mr_slice(path: Path, few_levels: bool = False) -> Image.Image:
    """An image file as `read_gray` gives it, checked as by `check_slice`. Raises BadSlice."""
    image = read_gray(path)
    check_slice(np.asarray(image), path, few_levels)
    return image


def in_parallel(work: Callable, items: list, desc: str) -> Iterator:
    """Yields work(item) in order, with a progress bar; a BadSlice is yielded, not raised."""
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

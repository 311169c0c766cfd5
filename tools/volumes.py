"""Cuts volumes, NIfTI or OASIS-1's Analyze, into upright axial slices."""

import re
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
from PIL import Image

from utils.cli import UserError
from utils.images import BadSlice, fit, is_label_map, need_plain_file

# What OASIS-1 calls the skull-stripped, gain-field corrected volume in the T88 atlas space; its
# label map ends in _fseg, the volume with the skull lacks _masked.
T88 = re.compile(r"(OAS1_\d+_MR\d+)_mpr_n\w+_anon_111_t88_masked_gfc\.(hdr|img)")
T88_SHAPE = (176, 208, 176)


class Cutting(NamedTuple):
    """How volumes are cut: slices per session, and from where to where of the brain's height."""

    slices: int = 32
    low: float = 0.2
    high: float = 0.85
    few_levels: bool = False  # accept what looks like a label map


def upright(image, name: str) -> tuple[np.ndarray, tuple[float, float]]:
    """A nibabel image -> its voxels, (X, Y, Z), from right to left, back to front and low to
    high, and the lengths of a voxel's first two sides in mm.

    A NIfTI header says how its voxels stand. Of Analyze, only OASIS-1's T88 volumes are taken,
    which stand so already (docs/data.md, "prepare").
    Raises BadSlice for a header without orientation, and for all but 3-D volumes of numbers.
    """
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
    if not cutting.few_levels and is_label_map(levels):
        raise BadSlice(name, "has few grey levels, as a segmentation map",
                       "give the T1-weighted volume, or --few-levels if it is one")
    if len(set(planes)) < cutting.slices:
        raise BadSlice(name, f"its brain is {high - low + 1} planes high, too low for "
                       f"{cutting.slices} slices", "give fewer --slices or a wider --range")
    width, height = (round(n * mm / min(zooms)) for n, mm in zip(volume.shape, zooms))
    return {number: fit(Image.fromarray(plane).resize((width, height), Image.Resampling.BICUBIC),
                        max(width, height)) for number, plane in enumerate(levels)}


def cut_file(path: Path, cutting: Cutting, name: str) -> dict[int, np.ndarray]:
    """The slices of a volume file, called `name` in errors; see `cut_volume`. Raises BadSlice."""
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

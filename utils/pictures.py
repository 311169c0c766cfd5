"""Slices as pictures, animations, arrays and volumes."""

import gzip
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from utils.cli import UserError
from utils.files import write_atomic

GRID_LENGTH = 64  # slices in grid.png at most
STRIP_LENGTH = 10  # pictures in the strip of the reverse process


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


def save_gif(frames: Tensor, path: Path) -> None:
    """Writes uint8 (N, H, W) frames as an endless animation that rests on the last one."""
    first, *others = [Image.fromarray(frame) for frame in frames.numpy()]
    durations = [80] * len(others) + [1500]  # milliseconds
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


def save_reverse(states: list[tuple[Tensor, Tensor]], out: Path) -> None:
    """Writes reverse.png, some x_t, and reverse.gif, each x_t with its predicted x_0 beside it.

    states: pairs of (1, H, W) in [-1, 1].
    """
    shown = torch.linspace(0, len(states) - 1, min(STRIP_LENGTH, len(states))).round().long()
    save_grid(torch.stack([states[i][0] for i in shown]), out / "reverse.png", columns=len(shown))
    save_gif(torch.stack([to_uint8(torch.cat(pair, dim=2))[0] for pair in states]),
             out / "reverse.gif")


def save_overviews(files: list[Path], out: Path, animation: str | None = None,
                   spacing: tuple[float, float, float] | None = None) -> list[str]:
    """Writes overviews of the files of `save_slice`; returns their names.

    grid.png shows the first ones; animation: name of a GIF of all; spacing: that of stack.nii.gz,
    the volume of all. They are made of the files so that they are the same after an interruption.
    """
    everything = animation or spacing
    images = torch.stack([read_slice(path) for path in (files if everything else
                                                        files[:GRID_LENGTH])])
    save_grid(images[:GRID_LENGTH, None] / 127.5 - 1, out / "grid.png",
              columns=min(8, len(images)))
    if animation:
        save_gif(images, out / animation)
    if spacing:
        save_nifti(images, out / "stack.nii.gz", spacing)
    return ["grid.png"] + [animation] * bool(animation) + ["stack.nii.gz"] * bool(spacing)

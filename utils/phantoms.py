"""Phantom slices: axial brains drawn from formulas, in place of data."""

import numpy as np
from PIL import Image

from utils.images import in_parallel


def _smooth_noise(rng: np.random.Generator, cells: int, size: int) -> np.ndarray:
    """A smooth random field, (size, size), with features of about size / cells pixels."""
    coarse = Image.fromarray(rng.standard_normal((cells + 1, cells + 1)).astype(np.float32))
    return np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC,
                                    box=(0.5, 0.5, cells + 0.5, cells + 0.5)))


def draw_phantom(image_size: int, subject: int, position: float, seed: int = 0) -> np.ndarray:
    """One phantom slice, uint8 (S, S): an axial brain drawn from formulas, front of the head up.

    subject: chooses the anatomy (outline, folds, ventricle width); position: height in the head,
    0 (low) to 1 (high). Skull-free outline, folded cortex, grey and white matter, ventricles,
    deep nuclei, bias field and noise; black outside. A pure function of its arguments.
    """
    rng = np.random.default_rng([seed, subject])
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
    image = image + 0.03 * np.random.default_rng([seed, subject, round(position * 1e6)]
                                                 ).standard_normal(image.shape)
    image = np.where(radius < 1, image, 0).clip(0, 1)
    image = image.reshape(image_size, 2, image_size, 2).mean(axis=(1, 3))
    return (255 * image).round().astype(np.uint8)


def phantom_slices(image_size: int, first_subject: int, subjects: int, per_subject: int = 8
                   ) -> tuple[np.ndarray, list[str]]:
    """Phantoms of `subjects` anatomies, evenly spaced heights each: uint8 (N, S, S) and names."""
    places = [(subject, slice_) for subject in range(first_subject, first_subject + subjects)
              for slice_ in range(per_subject)]
    images = list(in_parallel(
        lambda p: draw_phantom(image_size, p[0], (p[1] + 0.5) / per_subject), places,
        "drawing phantoms"))
    return np.stack(images), [f"phantom_{p:03d}_slice_{s}" for p, s in places]

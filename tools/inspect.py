"""Shows what a folder of slices holds, as a report and a picture, before training on it.

    python -m tools.inspect ROOT
    python -m tools.inspect             the same for the phantoms
"""

import sys

if __name__ == "inspect":  # `python tools/NAME.py` finds it in place of Python's own module
    print("error: give python -m tools.NAME, in the folder of README.md", file=sys.stderr)
    sys.exit(2)

from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from dataset import (find_slices, in_two_splits, load_splits, subject_finder, subject_of,
                     subjects_in_two_splits)
from utils.cli import Parser, UserError, run_cli
from utils.images import BadSlice, BadSlices, fit, in_parallel, read_mr_slice
from utils.pictures import save_grid


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


def survey(path: Path, few_levels: bool) -> Facts:
    """Reads and checks one file. Raises BadSlice."""
    image = read_mr_slice(path, few_levels)
    with Image.open(path) as header:
        bits = 16 if header.mode.startswith("I") else 8
        return facts_of(image, f"{image.width}x{image.height} {header.format} {bits} bits "
                               f"{header.mode}")


def survey_splits(root: Path | None, few_levels: bool
                  ) -> dict[str, list[tuple[Path, Facts | BadSlice]]]:
    """Split -> its files, each with what is noted of it or wrong with it; phantoms for None."""
    if root is None:
        return {split: [(Path(name), facts_of(Image.fromarray(image), "phantom"))
                        for name, image in zip(phantoms.names, phantoms.images.numpy())]
                for split, phantoms in load_splits(None, 128).items()}
    read = partial(survey, few_levels=few_levels)
    return {split: list(zip(files, in_parallel(read, files, "reading")))
            for split, files in find_slices(root).items() if files}


def inspect(root: Path | None, picture: Path, few_levels: bool = False) -> None:
    """Prints what a root holds, split by split, and saves a picture of random slices.

    Raises UserError, after the report, if train.py would reject the root.
    """
    subject = subject_finder(root) if root else subject_of
    found = survey_splits(root, few_levels)
    bad, kept, rows = [], [], []
    print(f"{root or 'phantoms (no data given)'}")
    for split, results in found.items():
        bad += [facts for _, facts in results if isinstance(facts, BadSlice)]
        good = [pair for pair in results if isinstance(pair[1], Facts)]
        kept += [(split, facts.digest, f"{split}/{path.name}") for path, facts in good]
        print(f"  {split:9s}{len(good):6d} slices", end="" if good else "\n")
        if good:
            describe(good, subject)
            chosen = np.random.default_rng(0).choice(len(good), 8, replace=len(good) < 8)
            rows += [good[index][1].small for index in sorted(chosen)]
    troubles = subjects_in_two_splits((s, subject(path)) for s in found for path, _ in found[s])
    troubles += in_two_splits(kept, "pictures", "remove one copy")
    troubles += [str(BadSlices(bad, sum(map(len, found.values()))))] if bad else []
    print("  subjects or pictures in two splits, files that cannot be used: "
          + ("none" if not troubles else "".join(f"\n    {line}" for line in troubles)))
    if rows:
        save_grid(torch.from_numpy(np.stack(rows))[:, None] / 127.5 - 1, picture, columns=8)
        print(f"8 random slices of each split, row by row: {picture}")
    if troubles:
        raise UserError(f"{root}: train.py would reject it: {troubles[0]}")


def describe(good: list[tuple[Path, Facts]], subject: Callable) -> None:
    """The rest of a split's line, a line of kinds and one with the histogram of grey levels."""
    counts = np.sum([facts.counts for _, facts in good], axis=0)
    subjects = len({subject(path) for path, _ in good} - {None})
    again = len(good) - len({facts.digest for _, facts in good})
    print(f"  {subjects or 'unknown':>4} subjects  mean grey level "
          f"{counts @ np.arange(256) / counts.sum():5.1f}  black "
          f"{counts[:8].sum() / counts.sum():4.0%}  {again or 'no'} duplicates")
    kinds = Counter(facts.kind for _, facts in good)
    print(f"{'':11s}" + ", ".join(f"{n} of {kind}" for kind, n in kinds.most_common(3))
          + (f" and {len(kinds) - 3} more kinds" if len(kinds) > 3 else ""))
    bands = counts[8:].reshape(62, 4).sum(1)
    marks = " .:-=+*#%@"
    print(f"{'':11s}grey levels 8 to 255 |" + "".join(
        marks[round(9 * share)] for share in bands / max(1, bands.max())) + "|")


def main() -> None:
    parser = Parser(prog="python -m tools.inspect",
                    description="Shows what a folder of slices holds before a GPU week is spent on "
                                "it: counts, subjects, sizes, grey levels, duplicates, bad files, "
                                "and one picture.")
    parser.add_argument("root", nargs="?", type=Path, metavar="ROOT",
                        help="folder of slices (default: the built-in phantoms)")
    parser.add_argument("--out", type=Path, default=Path("inspect.png"), metavar="FILE",
                        help="where the picture goes (default: %(default)s)")
    parser.add_argument("--few-levels", action="store_true",
                        help="accept images of few grey levels, as train.py --few-levels does "
                             "(default: off)")
    args = parser.parse_args()
    inspect(args.root, args.out, args.few_levels)


if __name__ == "__main__":
    run_cli(main)

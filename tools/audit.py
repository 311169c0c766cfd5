"""Memorisation audit: is a sample nearer to train than slices of unseen subjects are?

For each slice the nearest train slice is found, in pixels and in features. A correlation of 0.95
says little by itself, since all heads are alike; what it is set against are the same numbers of
real subjects whom the model has never seen (the null). Stein et al. 2023: no number alone tells a
copy from a good fit, so that the tests convict copies that were made on purpose and acquit
unseen subjects.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tools.measures import Sample, bootstrap, shuffled, unit_rows
from utils.cli import progress_bar

SHIFT = 2  # pixels, in every direction
WINDOW = 0.07  # of the range of heights, either way: two slices of 32
COARSE = 32  # longer side, in pixels, of the search for the height
QUANTILE = 0.99  # of the null
HALVINGS = 200  # of the unseen subjects
SHOWN = 8  # closest pairs
LISTED = 20  # slices that a verdict names


@dataclass
class Nearest:
    """Each slice's nearest train slice: its row and height, the correlation in pixels, the
    largest cosine in features among slices of neighbouring heights. All (N,)."""

    rows: Tensor
    heights: Tensor
    pixels: Tensor
    features: Tensor


def variants(images: Tensor) -> Iterator[Tensor]:
    """float32 (N, H, W) -> the same, shifted up to `SHIFT` pixels and mirrored, one at a time.

    Mirrored too, since training may mirror its slices, and a model then copies either form.
    """
    padded = F.pad(images, (SHIFT,) * 4)
    height, width = images.shape[1:]
    for side in (padded, padded.flip(2)):
        for top in range(2 * SHIFT + 1):
            for left in range(2 * SHIFT + 1):
                yield side[:, top:top + height, left:left + width]


def best_match(candidates: Tensor, forms: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """The largest correlation with any candidate and which one that is, (N,) each.

    candidates: float32 (M, P), rows of `unit_rows`. forms: of the same N slices, (N, ...) each.
    """
    best, where = None, None
    for form in forms:
        value, index = (unit_rows(form.flatten(1)) @ candidates.T).max(1)
        if best is None:
            best, where = value, index
        else:
            better = value > best
            best, where = torch.where(better, value, best), torch.where(better, index, where)
    return best, where


def nearest(train: Sample, sample: Sample, mirrored: Tensor) -> Nearest:
    """Finds the nearest train slice of each slice of a sample.

    mirrored: features of the mirrored slices, (N, D). A slice has the height of the train slice
    that is nearest at `COARSE` pixels.
    All correlations are Pearson's over the whole slice, so that brightness and contrast do not
    count; in features, of the differences from train's mean.
    """
    heights = estimated_heights(train, sample)
    found = Nearest(torch.zeros(len(sample), dtype=torch.long), heights,
                    torch.full((len(sample),), -1.0), torch.zeros(len(sample)))
    mean = train.features.mean(0)
    with progress_bar(len(sample), "nearest train slices", "slice") as bar:
        for height in heights.unique():
            members = torch.nonzero(heights == height)[:, 0]
            near = torch.nonzero((train.heights - height).abs() <= WINDOW)[:, 0]
            images = sample.images[members].float()
            for part in near.split(1024):  # for the memory
                value, index = best_match(unit_rows(train.images[part].flatten(1).float()),
                                          variants(images))
                better = value > found.pixels[members]
                found.pixels[members[better]] = value[better]
                found.rows[members[better]] = part[index[better]]
            forms = sample.features[members] - mean, mirrored[members] - mean
            found.features[members] = best_match(unit_rows(train.features[near] - mean), forms)[0]
            bar.update(len(members))
    return found


def estimated_heights(train: Sample, sample: Sample) -> Tensor:
    """The height of the train slice that is nearest when both are made small, float32 (N,).

    Slices are shifted before they are made small, so that a shifted copy finds its original.
    """
    factor = max(1, max(train.images.shape[1:]) // COARSE)
    real = torch.cat([F.avg_pool2d(part.float(), factor).flatten(1)
                      for part in train.images.split(512)])
    forms = (F.avg_pool2d(form, factor) for form in variants(sample.images.float()))
    return train.heights[best_match(unit_rows(real), forms)[1]]


@dataclass
class Verdict:
    """The audit's result for one kind of nearness (pixels or features).

    share: of the slices that are nearer to train than the null's 99th percentile, `threshold`;
    interval: its 95% interval, from a bootstrap over slices and over the null's subjects.
    floor, low, high: the same for one half of the unseen subjects judged by the other half: mean
    and 95% range over random halvings. copies: rows of the slices that are twice as near to train
    as the nearest unseen slice, nearest first.
    """

    share: float
    interval: tuple[float, float]
    threshold: float
    floor: float
    low: float
    high: float
    copies: list[int]

    @property
    def convicted(self) -> bool:
        return self.share > self.high or len(self.copies) > 0


def judge(scores: Tensor, null: Tensor, groups: Tensor) -> Verdict:
    """Judges correlations with the nearest train slice, (N,), by those of unseen subjects.

    null: (M,), of slices whose subjects are `groups`.
    """
    threshold = null.double().quantile(QUANTILE)
    limits = iter(bootstrap(lambda rows: null[rows].double().quantile(QUANTILE), groups))
    shares = bootstrap(lambda rows: (scores[rows] > next(limits)).double().mean(),
                       torch.arange(len(scores)))
    others = torch.tensor(halvings(null, groups), dtype=torch.float64)
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    order = scores.argsort(descending=True, stable=True)
    copies = order[1 - scores[order] < (1 - null.max()) / 2].tolist()
    return Verdict((scores > threshold).double().mean().item(),
                   tuple(shares.quantile(ends).tolist()), threshold.item(), others.mean().item(),
                   *others.quantile(ends).tolist(), copies)


def halvings(null: Tensor, groups: Tensor) -> list[float]:
    """Shares of one half of the subjects above the other half's 99th percentile.

    The audit's result for slices that are not copied, with the uncertainty of a threshold that
    rests on a few subjects.
    """
    subjects, shares = groups.unique(), []
    for seed in range(HALVINGS):
        first = torch.isin(groups, subjects[shuffled(len(subjects), seed)[:len(subjects) // 2]])
        threshold = null[first].double().quantile(QUANTILE)
        shares.append((null[~first] > threshold).double().mean().item())
    return shares


def in_words(found: Nearest, verdicts: dict[str, Verdict], names: list[str]) -> str:
    """The verdict of the audit in a sentence; verdicts are of "pixels" and "features"."""
    text = []
    if copies := verdicts["pixels"].copies:
        text.append(f"{len(copies)} of {len(names)} slices are copies, twice as near to a train "
                    "slice as any slice of an unseen subject: " + listed(copies, names))
    for kind, verdict in verdicts.items():
        if verdict.share > verdict.high:
            scores = getattr(found, kind)
            rows = [row for row in scores.argsort(descending=True, stable=True).tolist()
                    if scores[row] > verdict.threshold]
            text.append(f"{len(rows)} of {len(names)} slices ({verdict.share:.1%}; of unseen "
                        f"subjects up to {verdict.high:.1%}) are nearer to train in {kind} than "
                        "99% of unseen slices: " + listed(rows, names))
    if not text:
        return "No sign of copying beyond what unseen subjects show."
    return "; ".join(text) + ". evaluation.png shows the closest pairs."


def listed(rows: list[int], names: list[str]) -> str:
    """The names of some rows, up to `LISTED` of them."""
    return ", ".join(names[row] for row in rows[:LISTED]) + ", ..." * (len(rows) > LISTED)

"""Measures of how far a sample of slices is from the train split. Numbers in, numbers out.

A measure is built once, `build(train, sample)`, and gives a function of rows of the sample:
`estimate(rows) -> float`. The same function makes the value (all rows), its interval and, for a
sample of real unseen subjects, the floor and the floor's interval (`bootstrap`).

Slices of one subject are near-copies of each other. Each measure therefore compares slices of
different groups only: a group is a subject, or a single slice if it is generated. This also
makes a bootstrap sound, in which a group that was drawn twice must not look like a copy.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

DRAWS = 200  # of a bootstrap
NEIGHBOURS = 3  # of precision and recall: k of Kynkäänniemi et al.
DIRECTIONS = 32  # leading principal components of the Frechet distance
FOLDS = 5  # of the two-sample test
RIDGE = 0.1  # weight of the two-sample test's penalty, for features scaled to variance 1 / D
LEAST_PAIRS, PAIRS = 10, 1000  # for MS-SSIM
LEVELS = 64  # bins of the grey-level histogram
SCALES = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # MS-SSIM's weights, finest scale first


class TooFew(ValueError):
    """A sample is too small for a measure; the message names what is needed."""


@dataclass
class Sample:
    """Slices to be compared, in an order that depends on their pixels alone.

    images: uint8 (N, H, W). features: float32 (N, D), of `tools.features`.
    groups: int64 (N,), the same number for slices of one subject.
    heights: float32 (N,), the position in the head from 0 (low) to 1 (high).
    names: of the files, or of the seeds.
    """

    images: Tensor
    features: Tensor
    groups: Tensor
    heights: Tensor
    names: list[str]
    kept: dict = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.images)

    def take(self, rows: Tensor) -> "Sample":
        return replace(self, images=self.images[rows], features=self.features[rows],
                       groups=self.groups[rows], heights=self.heights[rows],
                       names=[self.names[row] for row in rows.tolist()], kept={})

    def once(self, function: Callable[["Sample"], Tensor]) -> Tensor:
        """function(self), worked out at the first call: train meets many samples."""
        if function not in self.kept:
            self.kept[function] = function(self)
        return self.kept[function]


def shuffled(count: int, seed: int = 0) -> Tensor:
    """A fixed permutation of range(count)."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def bootstrap(estimate: Callable[[Tensor], float], groups: Tensor, draws: int = DRAWS) -> Tensor:
    """The estimates, float64 (draws, ...), of samples whose groups are drawn with replacement.

    All rows of a group stay together, since slices of one subject are not independent
    (Davison & Hinkley 1997, section 3.8: a cluster bootstrap).
    """
    rows_of = [torch.nonzero(groups == group)[:, 0] for group in groups.unique()]
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(rows_of), (draws, len(rows_of)), generator=generator)
    return torch.stack([torch.as_tensor(estimate(torch.cat([rows_of[i] for i in draw])),
                                        dtype=torch.float64) for draw in drawn.tolist()])


def interval(value: Tensor, estimates: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """The 95% interval of a bootstrap, centred on the value, within the range of the measure.

    A draw holds fewer different slices than the sample, which shifts measures that depend on
    their number (Frechet distance, recall); centring takes that shift out. Draws without any
    pair to compare (nan) do not count.
    """
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    spread = estimates.nanquantile(ends, dim=0) - estimates.nanmean(0) + value
    return spread[0].clamp(low, high), spread[1].clamp(low, high)


def unit_rows(rows: Tensor) -> Tensor:
    """Rows with mean 0 and length 1, whose products are correlations; a constant row becomes 0."""
    return F.normalize(rows - rows.mean(1, keepdim=True), dim=1, eps=1e-6)


def different(groups: Tensor, others: Tensor) -> Tensor:
    """bool (N, M): whether a row and a column are of different groups."""
    return groups[:, None] != others[None, :]


# ---------------------------------------------------------------------------------------------
# Distribution: distances in the feature space
# ---------------------------------------------------------------------------------------------


def kernel(a: Tensor, b: Tensor) -> Tensor:
    """KID's polynomial kernel, (N, D) and (M, D) -> float64 (N, M)."""
    return (a @ b.T / a.shape[1] + 1).double() ** 3


def kid(train: Sample, sample: Sample) -> Callable[[Tensor], float]:
    """Kernel inception distance: the squared maximum mean discrepancy of the features.

    Binkowski et al. 2018, eq. 4: the unbiased estimate, over all pairs at once instead of random
    subsets, and over pairs of different subjects instead of different slices.
    """
    for part in (train, sample):
        if len(part.groups.unique()) < 2:
            raise TooFew("slices of two subjects")
    own = train.once(mean_kernel)
    inner = kernel(sample.features, sample.features)
    cross = kernel(sample.features, train.features).mean(1)

    def estimate(rows: Tensor) -> float:
        apart = different(sample.groups[rows], sample.groups[rows])
        alike = (inner[rows][:, rows] * apart).sum() / apart.sum()
        return float(alike + own - 2 * cross[rows].mean())
    return estimate


def mean_kernel(train: Sample) -> Tensor:
    """The mean of the kernel over pairs of different subjects, a scalar."""
    total, count = 0, 0
    for rows in torch.arange(len(train)).split(512):
        apart = different(train.groups[rows], train.groups)
        total += (kernel(train.features[rows], train.features) * apart).sum()
        count += apart.sum()
    return total / count


def frechet(train: Sample, sample: Sample) -> Callable[[Tensor], float]:
    """Frechet distance of two Gaussians in the leading principal directions of train.

    Heusel et al. 2017, eq. 6, with `DIRECTIONS` dimensions: a covariance of all D needs far more
    slices than a test split has.
    """
    if min(len(sample), len(train)) < 2 * DIRECTIONS:
        raise TooFew(f"{2 * DIRECTIONS} slices")
    mean, basis = train.features.double().mean(0), train.once(principal_directions)
    real, points = ((part.features.double() - mean) @ basis for part in (train, sample))
    moments = real.mean(0), torch.cov(real.T)
    return lambda rows: frechet_distance(*moments, points[rows].mean(0),
                                         torch.cov(points[rows].T))


def principal_directions(train: Sample) -> Tensor:
    """The `DIRECTIONS` leading eigenvectors of the features' covariance, float64 (D, K)."""
    return torch.linalg.eigh(torch.cov(train.features.double().T))[1][:, -DIRECTIONS:]


def frechet_distance(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)), the trace by the eigenvalues of
    A^(1/2) B A^(1/2)."""
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return float((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross)


def radii(distances: Tensor, groups: Tensor, others: Tensor) -> Tensor:
    """Distance of each row to its `NEIGHBOURS`-th nearest column of another group, (N,)."""
    apart = distances.masked_fill(~different(groups, others), torch.inf)
    return apart.kthvalue(NEIGHBOURS, dim=1)[0]


def precision(train: Sample, sample: Sample) -> Callable[[Tensor], float]:
    """Share of the sample inside the manifold of train (Kynkäänniemi et al. 2019, eq. 2).

    The manifold is a ball about each train slice that reaches to the `NEIGHBOURS`-th nearest
    slice of another subject (of any slice, balls would shrink to one head).
    """
    _needs_neighbours(train, sample)
    inside = torch.cdist(sample.features, train.features) <= train.once(train_radii)
    inside = inside.any(1).double()
    return lambda rows: float(inside[rows].mean())


def train_radii(train: Sample) -> Tensor:
    """`radii` of train in itself, (N,)."""
    return torch.cat([radii(torch.cdist(train.features[rows], train.features),
                            train.groups[rows], train.groups)
                      for rows in torch.arange(len(train)).split(512)])


def recall(train: Sample, sample: Sample) -> Callable[[Tensor], float]:
    """Share of train inside the manifold of the sample; see `precision`."""
    _needs_neighbours(train, sample)
    inner = torch.cdist(sample.features, sample.features)
    across = torch.cdist(train.features, sample.features)

    def estimate(rows: Tensor) -> float:
        radius = radii(inner[rows][:, rows], sample.groups[rows], sample.groups[rows])
        return float((across[:, rows] <= radius).any(1).double().mean())
    return estimate


def _needs_neighbours(train: Sample, sample: Sample) -> None:
    for groups in (train.groups, sample.groups):
        if len(groups.unique()) <= NEIGHBOURS:
            raise TooFew(f"slices of {NEIGHBOURS + 1} subjects")


def two_sample(train: Sample, sample: Sample) -> Callable[[Tensor], float]:
    """Accuracy of a classifier that tells the sample from as many train slices; 0.5 is chance.

    Lopez-Paz & Oquab 2017, with ridge regression of the features to +1 and -1, and the mean of
    the accuracies on both sides. No subject stands in two folds, so that subjects are not what the
    classifier learns. The interval is that of the test slices: the classifiers stay.
    """
    partners = shuffled(len(train))[:len(sample)]
    groups = sample.groups, train.groups[partners]
    if min(len(part.unique()) for part in groups) < FOLDS:
        raise TooFew(f"slices of {FOLDS} subjects")
    fold = torch.cat([_folds(part) for part in groups])
    points = torch.cat([sample.features, train.features[partners]]) - train.features.mean(0)
    points /= train.features.std(0).clamp(min=1e-6) * points.shape[1] ** 0.5
    gram = (points @ points.T + 1).double()  # the 1 fits an offset
    side = torch.cat([torch.full((len(part),), sign) for part, sign in zip(groups, (1.0, -1.0))])
    right = torch.zeros(len(side), dtype=torch.float64)
    for held in range(FOLDS):
        seen, out = fold != held, fold == held
        system = gram[seen][:, seen] + RIDGE * torch.eye(int(seen.sum()))
        answer = gram[out][:, seen] @ torch.linalg.solve(system, side[seen].double())
        right[out] = (answer * side[out] > 0).double()
    ours, theirs = right[:len(sample)], right[len(sample):].mean()
    return lambda rows: float((ours[rows].mean() + theirs) / 2)


def _folds(groups: Tensor) -> Tensor:
    """A fold, 0 to FOLDS - 1, for each row; rows of one group share it."""
    order, inverse = groups.unique(return_inverse=True)
    return shuffled(len(order))[inverse] % FOLDS


# ---------------------------------------------------------------------------------------------
# Sharpness and diversity: pixels
# ---------------------------------------------------------------------------------------------


def radial_power(sample: Sample) -> Tensor:
    """Power by frequency, float64 (N, K), for k = 1 to K cycles per image.

    K is half of the shorter side, and cycles are counted along that side; each bin is the mean
    of |FFT|^2 over the ring of frequencies that round to it. Slices end in black, so that no
    window is needed.
    """
    height, width = sample.images.shape[1:]
    side = min(height, width)
    rows, columns = torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)
    ring = (torch.hypot(rows, columns) * side).round().long().flatten()
    twice = 1.0 + ((columns > 0) & (columns < 0.5)).expand(height, -1).flatten()  # half a plane
    rings = F.one_hot(ring)[:, 1:side // 2 + 1] * twice[:, None]
    rings = rings / rings.sum(0)
    return torch.cat([torch.fft.rfft2(part.float() / 255).abs().square().flatten(1) @ rings
                      for part in sample.images.split(64)]).double()


def spectrum_curve(train: Sample, sample: Sample) -> Callable[[Tensor], Tensor]:
    """Mean radial power of the sample over that of train, float64 (K,); below 1 is too smooth."""
    real, power = train.once(radial_power).mean(0), sample.once(radial_power)
    return lambda rows: power[rows].mean(0) / real


def spectrum(train: Sample, sample: Sample) -> Callable[[Tensor], float]:
    """Mean |log2| of `spectrum_curve` over frequencies: 1 is half or twice the power."""
    curve = spectrum_curve(train, sample)
    return lambda rows: float(curve(rows).clamp(min=1e-12).log2().abs().mean())


def ms_ssim(train: Sample, sample: Sample) -> Callable[[Tensor], float]:
    """Mean MS-SSIM (Wang et al. 2003) of pairs of slices of the same height; high: all alike.

    Up to `PAIRS` random pairs of different subjects, with as many of the five scales as the
    slices have room for.
    """
    first, second = pairs_of_one_height(sample)
    if len(first) < LEAST_PAIRS:
        raise TooFew(f"{LEAST_PAIRS} pairs of slices of the same height")
    alike = pair_similarity(sample.images, first, second)

    def estimate(rows: Tensor) -> float:
        times = torch.bincount(rows, minlength=len(sample)).double()
        weights = times[first] * times[second]
        return float((weights * alike).sum() / weights.sum())
    return estimate


def pairs_of_one_height(sample: Sample) -> tuple[Tensor, Tensor]:
    """Rows of both slices of up to `PAIRS` pairs of one height and two groups."""
    alike = (sample.heights[:, None] - sample.heights[None]).abs() < 1e-6
    pairs = torch.nonzero((alike & different(sample.groups, sample.groups)).triu(1))
    first, second = pairs[shuffled(len(pairs))[:PAIRS]].T
    return first, second


def pair_similarity(images: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """MS-SSIM of each pair, float64 (P,). Raises TooFew for slices below 11 pixels."""
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure
    scales = sum(min(images.shape[1:]) // 2**level > 10 for level in range(len(SCALES)))
    if not scales:
        raise TooFew("slices of 11 pixels or more")
    weights = tuple(weight / sum(SCALES[:scales]) for weight in SCALES[:scales])
    return torch.cat([multiscale_structural_similarity_index_measure(
        images[a][:, None].float() / 255, images[b][:, None].float() / 255, data_range=1.0,
        betas=weights, reduction="none") for a, b in zip(first.split(8), second.split(8))]
        ).double()


# ---------------------------------------------------------------------------------------------
# Anatomy
# ---------------------------------------------------------------------------------------------


def inside_brain(images: Tensor) -> Tensor:
    """bool (N, H, W): pixels with brain on all four sides, ventricles and sulci included."""
    bright = (images > 24).to(torch.uint8)
    between = torch.ones_like(bright)
    for dim in (1, 2):
        before = bright.cummax(dim)[0]
        after = bright.flip(dim).cummax(dim)[0].flip(dim)
        between &= before & after
    return between.bool()


def grey_counts(sample: Sample) -> Tensor:
    """How many pixels inside the brain have each of 256 grey levels, float64 (N, 256)."""
    parts = []
    for part in sample.images.split(16):  # few at a time: running maxima come with int64 indices
        slot = 256 * torch.arange(len(part))[:, None, None] + part
        parts.append(torch.bincount(slot[inside_brain(part)], minlength=256 * len(part)))
    return torch.cat(parts).view(-1, 256).double()


def brain_area(sample: Sample) -> Tensor:
    """Share of the pixels that lie inside the brain, float64 (N,)."""
    return sample.once(grey_counts).sum(1) / sample.images[0].numel()


def fluid(sample: Sample) -> Tensor:
    """Share of the pixels inside the brain that are dark, as cerebrospinal fluid is, (N,).

    Dark is below 0.4 of the slice's white matter, its 90th percentile inside the brain.
    """
    counts = sample.once(grey_counts)
    summed = counts.cumsum(1) / counts.sum(1, keepdim=True).clamp(min=1)
    white = (summed < 0.9).sum(1, keepdim=True)
    dark = torch.arange(256) < 0.4 * white
    return (counts * dark).sum(1) / counts.sum(1).clamp(min=1)


def symmetry(sample: Sample) -> Tensor:
    """Correlation of each slice with its mirror image, at the best place of the midline, (N,).

    The midline may lie up to 1/16 of the width beside the middle. The sum over x of
    I(x) I(c - x) is a convolution, so that one FFT tries every c.
    """
    width = sample.images.shape[2]
    reach = 2 * (width // 16)
    centres = torch.arange(width - 1 - reach, width + reach) % width
    parts = []
    for part in sample.images.split(256):
        centred = part.float() - part.float().mean((1, 2), keepdim=True)
        sums = torch.fft.irfft(torch.fft.rfft(centred).square().sum(1), n=width)
        parts.append(sums[:, centres].amax(1) / centred.square().sum((1, 2)).clamp(min=1))
    return torch.cat(parts).double()


def corner_level(sample: Sample) -> Tensor:
    """Mean grey level, 0 to 255, of the four corners (a tenth of the shorter side), (N,)."""
    side = max(1, min(sample.images.shape[1:]) // 10)
    ends = slice(None, side), slice(-side, None)
    return torch.stack([sample.images[:, rows, columns].double().mean((1, 2))
                        for rows in ends for columns in ends]).mean(0)


def wasserstein(quantity: Callable[[Sample], Tensor]) -> Callable:
    """A measure: the Wasserstein-1 distance of a quantity's distribution from train's, by 200
    quantiles, in units of train's standard deviation."""
    levels = (torch.arange(200, dtype=torch.float64) + 0.5) / 200

    def build(train: Sample, sample: Sample) -> Callable[[Tensor], float]:
        real, values = train.once(quantity), sample.once(quantity)
        if len(real) < 2:
            raise TooFew("two train slices")
        wanted, unit = real.quantile(levels), real.std().clamp(min=1e-9)
        return lambda rows: float((values[rows].quantile(levels) - wanted).abs().mean() / unit)
    return build


def histogram(sample: Sample) -> Tensor:
    """Shares of `LEVELS` bands of grey levels inside the brain, float64 (N, LEVELS)."""
    counts = sample.once(grey_counts).reshape(len(sample), LEVELS, -1).sum(2)
    return counts / counts.sum(1, keepdim=True).clamp(min=1)


def grey_levels(train: Sample, sample: Sample) -> Callable[[Tensor], float]:
    """Half the sum of |differences| of the mean histograms inside the brain: 0 same, 1 apart."""
    real, own = train.once(histogram).mean(0), sample.once(histogram)
    return lambda rows: float((own[rows].mean(0) - real).abs().sum() / 2)


def corners(train: Sample, sample: Sample) -> Callable[[Tensor], float]:
    """Mean grey level of the corners, where real slices are black."""
    levels = sample.once(corner_level)
    return lambda rows: float(levels[rows].mean())


@dataclass(frozen=True)
class Measure:
    """A measure, the range of its values, which direction is worse, and what it is in words."""

    build: Callable[[Sample, Sample], Callable[[Tensor], float]]
    low: float
    high: float
    worse: str  # "high" or "low"
    title: str


INFINITE = float("inf")
MEASURES = {
    "spectrum": Measure(spectrum, 0, INFINITE, "high", "Sharpness: spectrum, mean |log2 ratio|"),
    "kid": Measure(kid, -INFINITE, INFINITE, "high", "Distribution: KID"),
    "frechet": Measure(frechet, 0, INFINITE, "high", "Distribution: Frechet distance"),
    "two_sample": Measure(two_sample, 0, 1, "high", "Distribution: accuracy of a classifier"),
    "precision": Measure(precision, 0, 1, "low", "Fidelity: precision"),
    "recall": Measure(recall, 0, 1, "low", "Diversity: recall"),
    "ms_ssim": Measure(ms_ssim, 0, 1, "high", "Diversity: MS-SSIM between slices of one height"),
    "brain_area": Measure(wasserstein(brain_area), 0, INFINITE, "high",
                          "Anatomy: brain area, distance in SD"),
    "fluid": Measure(wasserstein(fluid), 0, INFINITE, "high",
                     "Anatomy: share of fluid, distance in SD"),
    "symmetry": Measure(wasserstein(symmetry), 0, INFINITE, "high",
                        "Anatomy: left-right symmetry, distance in SD"),
    "grey_levels": Measure(grey_levels, 0, 1, "high", "Anatomy: grey-level histogram, difference"),
    "corners": Measure(corners, 0, 255, "high", "Background: grey level in the corners"),
}

"""Measures how good generated slices are, beside the floor, and whether they copy train slices.

    python -m tools.evaluate --data ROOT                      the shipped model
    python -m tools.evaluate --data ROOT --checkpoint RUN     another one
    python -m tools.evaluate --data ROOT --slices DIR         PNGs that any program wrote
    python -m tools.evaluate --data ROOT --compare ddim:50 dpmpp:20

Every number stands beside its floor: the same measure for as many real slices of unseen subjects
(validate and test). Writes evaluation.json and evaluation.png (one page), and prints the table.
"""

import argparse
import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from dataset import Slices, load_splits, slice_number
from predict import (Model, Slice, check_labels, checked_sampler, generate, load_model,
                     make_denoiser, sampling_settings)
from tools.audit import SHOWN, Nearest, in_words, judge, nearest
from tools.evaluation_page import draw_page
from tools.features import INSTALL, cached_features, extract, load_network
from tools.measures import (MEASURES, Measure, Sample, TooFew, bootstrap, histogram, interval,
                            shuffled, spectrum_curve)
from utils.checkpoint import SHIPPED, find_model
from utils.cli import EVAL_SEED, Parser, UserError, positive_int, progress_bar, run_cli
from utils.configs import QUALITY, SAMPLERS, SPACINGS, SamplerConfig
from utils.device import keep_freed_memory
from utils.distributed import local_device
from utils.files import write_json
from utils.images import BadSlice, images_in, in_parallel, read_gray
from utils.pictures import to_uint8
from utils.sampling_options import add_sampling_options

NUM = 400  # slices that are drawn

# ---------------------------------------------------------------------------------------------
# Slices: drawn, read from a folder, and real ones
# ---------------------------------------------------------------------------------------------


SETTING = re.compile(rf"({'|'.join(SAMPLERS)}):([1-9]\d*)(?::({'|'.join(SPACINGS)}))?")


def setting(text: str) -> dict:
    """An argparse type: SAMPLER:STEPS or SAMPLER:STEPS:SPACING -> these options of predict.py."""
    match = SETTING.fullmatch(text)
    if not match:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not SAMPLER:STEPS or SAMPLER:STEPS:SPACING, such as ddim:50:trailing, "
            f"with a sampler of {', '.join(SAMPLERS)} and a spacing of {', '.join(SPACINGS)}")
    given = {"sampler": match[1], "steps": int(match[2])}
    return given | ({"spacing": match[3]} if match[3] else {})


def sampled(model: Model, slices: list[Slice | int], title: str,
            config: SamplerConfig = QUALITY["default"], batch_size: int = 16,
            watch: Callable = lambda x, clean: None, **options) -> Tensor:
    """The images of `generate`, (N, 1, H, W), with a progress bar."""
    batch_size = min(len(slices), batch_size)
    with progress_bar(-(-len(slices) // batch_size) * (config.steps + 1), title, "state") as bar:
        def count(x: Tensor, clean: Tensor) -> None:
            bar.update()
            watch(x, clean)
        return torch.cat([images for images, _ in generate(
            model, slices, config, batch_size=batch_size, watch=count, **options)])


class Drawn(NamedTuple):
    """Slices that a model drew: uint8 (N, H, W), the seeds, the heights they are conditioned on
    (0 to 1, or None), and what made them, network calls included."""

    images: Tensor
    names: list[str]
    heights: Tensor | None
    settings: dict


def draw_slices(model: Model, args: argparse.Namespace, config: SamplerConfig,
                device: torch.device) -> Drawn:
    """Samples --num slices as predict.py does from the same options."""
    denoise, num = make_denoiser(model, args, device), args.num
    seeds = list(range(args.seed, args.seed + num))
    slices = [Slice(seed, model.labels.height(seed, args.position), args.class_)
              for seed in seeds]
    images = sampled(model, slices, f"{config.sampler}:{config.steps}", config, args.batch_size,
                     denoise=denoise)
    heights = torch.tensor([s.height for s in slices]) if model.labels.height_range else None
    settings = sampling_settings(args, model, config, denoise) | {
        "position": args.position, "calls": denoise.calls // -(-num // args.batch_size),
        "first_seed": args.seed}
    return Drawn(to_uint8(images)[:, 0], [f"seed {seed}" for seed in seeds], heights, settings)


def read_folder(folder: Path, num: int | None) -> tuple[Tensor, list[str]]:
    """The slices in a folder, uint8 (N, H, W), and their names, but for predict.py's overviews.

    The first `num` by a digest of their pixels, so that names do not matter. Raises UserError
    for no images, one that cannot be read, or different sizes.
    """
    if not folder.is_dir():
        raise UserError(f"--slices {folder}: no such folder; give one that holds images")
    paths = [path for path in images_in(folder) if path.name not in ("grid.png", "reverse.png")]
    if not paths:
        raise UserError(f"--slices {folder}: holds no images; give a folder of PNG slices")
    images = []
    for path, image in zip(paths, in_parallel(read_gray, paths, "reading")):
        if isinstance(image, BadSlice):
            raise image
        pixels = np.asarray(image).round().clip(0, 255).astype(np.uint8)
        if images and pixels.shape != images[0].shape:
            raise BadSlice(path, f"is {size_text(pixels.shape)}, {paths[0].name} "
                           f"{size_text(images[0].shape)}", "give slices of one size")
        images.append(pixels)
    images = torch.from_numpy(np.stack(images))
    kept = by_content(images)[:num]
    return images[kept], [paths[i].name for i in kept.tolist()]


def size_text(shape: tuple[int, int]) -> str:
    return f"{shape[0]}x{shape[1]} pixels (rows x columns)"


def by_content(images: Tensor) -> Tensor:
    """The rows in the order of their SHA-256: what follows cannot depend on names or order."""
    digests = [hashlib.sha256(image.numpy().tobytes()).digest() for image in images]
    return torch.tensor(sorted(range(len(digests)), key=digests.__getitem__))


def load_data(root: Path | None, shape: tuple[int, int], source: str) -> dict[str, Slices]:
    """The splits at the size of the slices. Raises UserError if they do not come in that size."""
    splits = load_splits(root, shape[0] if shape[0] == shape[1] else None)
    own = tuple(splits["train"].images.shape[1:])
    if own != shape:
        raise UserError(f"{source}: slices of {size_text(shape)}, those of {root or 'phantoms'} "
                        f"have {size_text(own)}; give slices of that size, or square ones")
    return splits


def real_sample(parts: list[Slices], lowest: int, span: int, net: nn.Module) -> Sample:
    """One sample of some splits, in the order of content. Heights are 0 at slice `lowest`."""
    images = torch.cat([part.images for part in parts])
    names = [name for part in parts for name in part.names]
    subjects = [subject for part in parts for subject in part.subjects]
    order = by_content(images)
    images, order = images[order], order.tolist()
    number_of = {}
    groups = [number_of.setdefault(subjects[i], len(number_of)) for i in order]
    heights = [(slice_number(names[i]) - lowest) / span for i in order]
    return Sample(images, cached_features(net, images), torch.tensor(groups),
                  torch.tensor(heights), [names[i] for i in order])


# ---------------------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------------------


class Reference:
    """The real side, worked out once for any number of samples.

    train; unseen: validate and test together, or None; null: the nearest train slices of unseen.
    """

    def __init__(self, splits: dict[str, Slices], net: nn.Module):
        numbers = [slice_number(name) for name in splits["train"].names]
        scale = min(numbers), max(1, max(numbers) - min(numbers))
        self.net, self.floors = net, {}
        self.train = real_sample([splits["train"]], *scale, net)
        others = [splits[name] for name in ("validate", "test") if name in splits]
        self.unseen = real_sample(others, *scale, net) if others else None
        if self.unseen:
            mirrored = cached_features(net, self.unseen.images.flip(2))
            self.null = nearest(self.train, self.unseen, mirrored)

    def floor_sample(self, count: int) -> Sample:
        """As many unseen slices as there are generated ones, or all."""
        return self.unseen.take(shuffled(len(self.unseen))[:count])

    def floor(self, name: str, count: int) -> dict:
        """The value of a measure for unseen subjects, and its interval."""
        if (name, count) not in self.floors:
            self.floors[name, count] = measured(MEASURES[name], self.train,
                                                self.floor_sample(count))
        return self.floors[name, count]


def measured(measure: Measure, train: Sample, sample: Sample) -> tuple[float, tuple[float, float]]:
    """A measure's value for a sample, and its 95% interval. Raises TooFew."""
    estimate = measure.build(train, sample)
    value = estimate(torch.arange(len(sample)))
    ends = interval(torch.tensor(value, dtype=torch.float64), bootstrap(estimate, sample.groups),
                    measure.low, measure.high)
    return value, tuple(end.item() for end in ends)


def assess(reference: Reference, images: Tensor, names: list[str],
           heights: Tensor | None = None) -> dict:
    """The contents of evaluation.json for one sample, uint8 (N, H, W), and the pairs' pictures.

    heights: what the slices were conditioned on; otherwise those of their nearest train slices.
    """
    order = by_content(images)
    images, names = images[order], [names[i] for i in order.tolist()]
    sample = Sample(images, extract(reference.net, images), torch.arange(len(images)),
                    torch.zeros(len(images)), names)
    found = nearest(reference.train, sample, extract(reference.net, images.flip(2)))
    sample.heights = found.heights
    if heights is not None:
        levels = reference.train.heights.unique()
        sample.heights = levels[(heights[order, None] - levels).abs().argmin(1)]
    result = {"measures": {}, "left_out": {}}
    # The floor's size bounds the sample's: many measures depend on the number of slices.
    count = min(len(sample), len(reference.unseen) if reference.unseen else len(sample))
    part = sample if count == len(sample) else sample.take(shuffled(len(sample))[:count])
    with progress_bar(len(MEASURES), "measures", "measure") as bar:
        for name, measure in MEASURES.items():
            try:
                value, ends = measured(measure, reference.train, part)
                floor = reference.floor(name, count) if reference.unseen else (None, None)
                result["measures"][name] = {"value": value, "floor": floor[0],
                                            "interval": floor[1], "value_interval": ends}
            except TooFew as error:
                result["left_out"][name] = f"needs {error}"
            bar.update()
    add_audit(result, reference, sample, found)
    result["curves"] = curves(reference, part, count)
    result["summary"] = summary(result)
    return result


def worse_than_real(row: dict, worse: str) -> bool:
    """Whether the value's interval lies beyond the floor's, on the side that is worse."""
    (low, high), (floor_low, floor_high) = row["value_interval"], row["interval"]
    return low > floor_high if worse == "high" else high < floor_low


def summary(result: dict) -> list[str]:
    """The results in a few sentences."""
    rows = {name: row for name, row in result["measures"].items() if row["floor"] is not None}
    for name, row in rows.items():
        worse = MEASURES[name].worse if name in MEASURES else "high"
        row["as_real"] = not worse_than_real(row, worse)
    lines = []
    if "spectrum_floor" in result["curves"]:
        lines.append(sharpness(result["curves"]))
    for verdict, text in ((True, "As unseen subjects"), (False, "Worse than unseen subjects")):
        names = [name for name, row in rows.items() if row["as_real"] == verdict]
        lines += [f"{text}: {', '.join(names)}."] if names else []
    return [*lines, result["verdict"]]


def sharpness(curves: dict) -> str:
    """The finer half of the spectrum in words."""
    half = len(curves["spectrum"]) // 2
    ratio, low, high = (float(np.exp(np.mean(np.log(np.maximum(curve[half:], 1e-12)))))
                        for curve in (curves["spectrum"], *curves["spectrum_floor"]))
    kind = "Too smooth" if ratio < low else "Too noisy" if ratio > high else "Sharp as real ones"
    return (f"{kind}: the finer half of the spectrum has {ratio:.0%} of train's power (unseen "
            f"subjects: {low:.0%} to {high:.0%}).")


def add_audit(result: dict, reference: Reference, sample: Sample, found: Nearest) -> None:
    """The audit's two measures, its verdict and the closest pairs."""
    closest = found.pixels.argsort(descending=True, stable=True)[:SHOWN]
    result["pairs"] = [{"slice": sample.names[i], "train": reference.train.names[found.rows[i]],
                        "correlation": found.pixels[i].item()} for i in closest.tolist()]
    result["pictures"] = [(sample.images[i], reference.train.images[found.rows[i]])
                          for i in closest.tolist()]
    if not reference.unseen:
        result["left_out"]["memorisation"] = "needs unseen subjects: validate or test slices"
        result["verdict"] = "Copying was not audited, for lack of unseen subjects."
        return
    verdicts = {}
    for name, kind in (("memorisation", "pixels"), ("memorisation_features", "features")):
        verdict = judge(getattr(found, kind), getattr(reference.null, kind),
                        reference.unseen.groups)
        verdicts[kind] = verdict
        result["measures"][name] = {
            "value": verdict.share, "floor": verdict.floor,
            "interval": (verdict.low, verdict.high), "value_interval": verdict.interval,
            "threshold": verdict.threshold}
    result["nearest"] = {"median": found.pixels.median().item(),
                         "unseen_median": reference.null.pixels.median().item()}
    result["copies"] = [sample.names[row] for row in verdicts["pixels"].copies]
    result["verdict"] = in_words(found, verdicts, sample.names)


def curves(reference: Reference, part: Sample, count: int) -> dict:
    """The spectrum by frequency and the histogram, each with the floor's band."""
    train = reference.train
    ratio = spectrum_curve(train, part)(torch.arange(len(part)))
    result = {"cycles_per_image": list(range(1, len(ratio) + 1)), "spectrum": ratio.tolist(),
              "histogram": part.once(histogram).mean(0).tolist(),
              "histogram_train": train.once(histogram).mean(0).tolist()}
    if reference.unseen:
        floor = reference.floor_sample(count)
        curve = spectrum_curve(train, floor)
        band = interval(curve(torch.arange(len(floor))), bootstrap(curve, floor.groups), 0,
                        float("inf"))
        result["spectrum_floor"] = [end.tolist() for end in band]
        levels = floor.once(histogram)
        band = interval(levels.mean(0), bootstrap(lambda rows: levels[rows].mean(0),
                                                  floor.groups), 0, 1)
        result["histogram_floor"] = [end.tolist() for end in band]
    return result


# ---------------------------------------------------------------------------------------------
# Reporting
# ---------------------------------------------------------------------------------------------


def table(result: dict) -> str:
    """The measures beside their floors, one a line."""
    lines = [f"{'measure':24s}{'value':>9s}  {'95% interval':20s}{'floor':>9s}  95% interval"]
    for name, row in result["measures"].items():
        ends = [f"{low:.4f} to {high:.4f}" if row["floor"] is not None else "-" for low, high in
                (row["value_interval"], row["interval"] or (0, 0))]
        floor = "-" if row["floor"] is None else f"{row['floor']:.4f}"
        lines.append(f"{name:24s}{row['value']:9.4f}  {ends[0]:20s}{floor:>9s}  {ends[1]}")
    lines += [f"{name:24s} left out: {why}" for name, why in result["left_out"].items()]
    return "\n".join([*lines, *result["summary"]])


def rounded(values):
    """The same with floats to six significant digits."""
    if isinstance(values, dict):
        return {key: rounded(value) for key, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [rounded(value) for value in values]
    return float(f"{values:.6g}") if isinstance(values, float) else values


def parse_args() -> argparse.Namespace:
    parser = Parser(prog="python -m tools.evaluate", description="Measures generated slices beside "
                    "unseen real ones, and looks for copies of train slices.")
    add = parser.add_argument
    add("--data", type=Path, metavar="ROOT",
        help="folder of real slices (default: the built-in phantoms)")
    add("--slices", type=Path, metavar="DIR",
        help="evaluate the images in DIR, draw none; --checkpoint then names their model")
    add("--num", type=positive_int, metavar="N",
        help=f"how many slices (default: {NUM}, or all that --slices holds)")
    add("--out", type=Path, default=Path("evaluation"), metavar="DIR",
        help="folder for evaluation.json and evaluation.png (default: %(default)s)")
    add("--compare", type=setting, nargs="+", metavar="SAMPLER:STEPS[:SPACING]",
        help="evaluate each of these and plot quality against network calls")
    add("--features", type=Path, metavar="FILE.pt",
        help="TorchScript network, float32 (B, 3, S, S) from 0 to 255 -> (B, D) (default: "
             "EfficientNet-Lite0, trained on ImageNet)")
    add_sampling_options(parser)
    args = parser.parse_args()
    if args.slices and args.compare:
        raise UserError("--compare draws slices itself; leave out --slices")
    if args.position == "all":
        raise UserError("--position all: slices are evaluated at their seeds' heights, or at one; "
                        "leave it out, or give a number from 0 to 1")
    if args.compare and (args.sampler or args.steps or args.quality):
        raise UserError("--compare names samplers and steps; leave out --sampler, --steps and "
                        "--quality")
    return args


def evaluate_folder(args: argparse.Namespace, net: nn.Module, model: Model | None) -> dict:
    """The contents of evaluation.json for the slices in --slices."""
    images, names = read_folder(args.slices, args.num)
    shape = tuple(images.shape[1:])
    if model and tuple(model.net.config.sample_size) != shape:
        raise UserError(f"--slices {args.slices}: slices of {size_text(shape)}, but the model of "
                        f"--checkpoint draws {size_text(model.net.config.sample_size)}; give "
                        "slices of that model, or leave out --checkpoint")
    reference = Reference(load_data(args.data, shape, f"--slices {args.slices}"), net)
    return {"num": len(images), "size": list(shape)} | assess(reference, images, names)


def evaluate_model(args: argparse.Namespace, net: nn.Module, model: Model,
                   device: torch.device) -> dict:
    """The contents of evaluation.json for a model with one sampler, or with each of --compare."""
    args.num = args.num or NUM
    if args.seed + args.num > EVAL_SEED:
        raise UserError(f"--seed {args.seed} and --num {args.num} go beyond the last seed, "
                        f"{EVAL_SEED - 1}")
    shape = tuple(model.net.config.sample_size)
    configs = [checked_sampler(model, argparse.Namespace(**vars(args) | given))
               for given in args.compare or [{}]]
    make_denoiser(model, args, device), check_labels(model, args)  # a wrong option ends it here
    reference, found = Reference(load_data(args.data, shape, str(model.path)), net), []
    for config in configs:
        drawn = draw_slices(model, args, config, device)
        found.append(drawn.settings | assess(reference, drawn.images, drawn.names, drawn.heights))
        if args.compare:
            print(f"{config.sampler}:{config.steps}, {drawn.settings['calls']} network calls\n"
                  f"{table(found[-1])}\n", flush=True)
    return {"num": args.num, "size": list(shape)} | found[0] | (
        {"compare": found} if args.compare else {})


def main() -> None:
    args = parse_args()
    keep_freed_memory()
    try:
        import torchmetrics  # noqa: F401
    except ImportError:
        raise UserError(f"torchmetrics is not installed; {INSTALL}") from None
    net, device, model = load_network(args.features), local_device(args.device), None
    if args.checkpoint or not args.slices:
        model = load_model(find_model(args.checkpoint or SHIPPED[args.model]), device)
    result = {"data": args.data.resolve().name if args.data else "phantoms", "features": net.name,
              "model": (args.checkpoint or model.path.name) if model else str(args.slices)}
    result |= evaluate_folder(args, net, model) if args.slices else \
        evaluate_model(args, net, model, device)
    if not args.compare:
        print(table(result))
    draw_page(result, args.out / "evaluation.png")
    for part in [result, *result.get("compare", [])]:
        part.pop("pictures", None)
    write_json(args.out / "evaluation.json", rounded(result))


if __name__ == "__main__":
    run_cli(main)

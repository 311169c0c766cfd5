"""Measures whether slices follow their conditions: height in the head, and class.

    python -m tools.conditions --data ROOT                 the native model, or --model 64

Writes conditions.json and prints two results:

- The correlation between the height asked for and the height of the nearest train slice (normalised
  correlation of slices made small, over all heights).
- The share of cerebrospinal fluid (`tools.measures.fluid`) by class, for generated and real slices,
  in thirds of the height. Seeds and heights are the same for every class.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from predict import (Model, Slice, checked_sampler, load_model, make_denoiser,
                     sampling_settings)
from tools.evaluate import load_data, sampled
from tools.measures import Sample, fluid, unit_rows
from utils.checkpoint import SHIPPED, find_model
from utils.cli import Parser, UserError, positive_int, run_cli
from utils.device import keep_freed_memory
from utils.distributed import local_device
from utils.files import write_json
from utils.pictures import to_uint8
from utils.sampling_options import add_sampling_options

BANDS = ("lower third", "middle third", "upper third")


def sample_of(images: Tensor) -> Sample:
    """Slices whose pixels alone are measured."""
    count = len(images)
    return Sample(images, torch.empty(count, 0), torch.arange(count), torch.zeros(count),
                  [""] * count)


def draw(model: Model, args: argparse.Namespace, heights: list[float], class_: str) -> Tensor:
    """uint8 (len(heights), H, W) of one class: from --seed on, a seed for each height."""
    slices = [Slice(seed, height, class_) for seed, height in enumerate(heights, args.seed)]
    denoise = make_denoiser(model, args, next(model.net.parameters()).device)
    return to_uint8(sampled(model, slices, class_, checked_sampler(model, args), args.batch_size,
                            denoise=denoise))[:, 0]


def nearest_heights(images: Tensor, train: Tensor, heights: Tensor) -> Tensor:
    """The height of each image's nearest train slice, (N,)."""
    rows = [unit_rows(F.interpolate(part[:, None].float(), size=(48, 48), mode="area").flatten(1))
            for part in (images, train)]
    return heights[(rows[0] @ rows[1].T).argmax(1)]


def by_band(values: Tensor, heights: Tensor) -> list[float]:
    """Means over the thirds of the height, and over all."""
    band = (heights * 3).long().clamp(max=2)
    return [values[band == index].mean().item() for index in range(3)] + [values.mean().item()]


def measure(model: Model, args: argparse.Namespace) -> dict:
    """The contents of conditions.json. Raises UserError for a model without heights or classes."""
    labels = model.labels
    if not labels.height_range or not labels.classes:
        raise UserError(f"{model.path}: was trained without heights, or without classes; give "
                        "another model")
    train = load_data(args.data, tuple(model.net.config.sample_size), str(model.path))["train"]
    real_heights = labels.heights_of(train.numbers)
    heights = np.linspace(0, 1, args.num).tolist()
    asked = torch.tensor(heights)
    real_fluid = fluid(sample_of(train.images.cpu()))
    found, nearest = {}, []
    for name in labels.classes:
        images = draw(model, args, heights, name)
        nearest.append(nearest_heights(images, train.images.cpu(), real_heights))
        rows = torch.tensor([class_ == name for class_ in train.classes])
        found[name] = {"generated": by_band(fluid(sample_of(images)), asked),
                       "real": by_band(real_fluid[rows], real_heights[rows]),
                       "real_subjects": len({subject for subject, class_ in
                                             zip(train.subjects, train.classes) if class_ == name})}
    pairs = torch.stack([asked.repeat(len(nearest)), torch.cat(nearest)])
    denoise = make_denoiser(model, args, next(model.net.parameters()).device)
    settings = sampling_settings(args, model, checked_sampler(model, args), denoise)
    del settings["class"]
    return {"model": model.path.name, "num": args.num, "first_seed": args.seed, **settings,
            "bands": [*BANDS, "all"], "height_correlation": torch.corrcoef(pairs)[0, 1].item(),
            "fluid": found}


def main() -> None:
    parser = Parser(prog="python -m tools.conditions",
                    description="Measures whether slices follow their height and class.")
    parser.add_argument("--data", type=Path, metavar="ROOT",
                        help="folder of real slices with cases.csv (default: built-in phantoms)")
    parser.add_argument("--num", type=positive_int, default=64, metavar="N",
                        help="slices of each class (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("conditions.json"), metavar="FILE",
                        help="results (default: %(default)s)")
    add_sampling_options(parser)
    args = parser.parse_args()
    if args.position is not None or args.class_ is not None:
        raise UserError("all heights and classes are measured; leave out --position and --class")
    keep_freed_memory()
    model = load_model(find_model(args.checkpoint or SHIPPED[args.model]),
                       local_device(args.device))
    result = measure(model, args)
    write_json(args.out, result)
    print(f"height asked for against height of the nearest train slice: correlation "
          f"{result['height_correlation']:.4f}")
    print(f"share of fluid    {'':20}" + "".join(f"{band:>14}" for band in result["bands"]))
    for name, rows in result["fluid"].items():
        for kind in ("generated", "real"):
            print(f"{name:17} {kind:20}" + "".join(f"{value:14.3f}" for value in rows[kind]))


if __name__ == "__main__":
    run_cli(main)

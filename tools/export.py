"""Exports a model to a folder that diffusers opens.

    python -m tools.export RUN_OR_FILE DIR     a run folder, checkpoint, model.safetensors, or
                                               the name of a shipped model: native or 64

    from diffusers import DiffusionPipeline
    pipeline = DiffusionPipeline.from_pretrained(DIR, trust_remote_code=True)

The folder holds the weights of a `UNet2DModel`, a scheduler, pipeline.py (what diffusers cannot
express: patches of pixels, the convolution behind them, conditions), and a model card.
"""

import itertools
import json
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from modules import make_betas
from predict import Model, load_model
from utils.checkpoint import SHIPPED, find_model
from utils.cli import Parser, UserError, run_cli
from utils.configs import SchedulerConfig, UNetConfig
from utils.files import write_json

CARD = """---
library_name: diffusers
pipeline_tag: unconditional-image-generation
tags:
- diffusion
- mri
- brain
- medical-imaging
---

# Axial brain MRI slices

A denoising diffusion model of {size} pixels, trained for {step:,} steps.

```python
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained("{name}", trust_remote_code=True)
pipeline({arguments}).images[0].save("slice.png")
```

{conditions}

`trust_remote_code` runs the `pipeline.py` of this folder: read it first. Schedulers:
`DPMSolverMultistepScheduler` (the one here), and from its config `DDIMScheduler` (steps that divide
{total:,} are the most exact) and `DDPMScheduler`; both need more steps.

**Intended use:** teaching, testing and comparing generative models. **No diagnostic use.** No real
subject is depicted.
"""


def label_table(model: Model) -> Tensor | None:
    """Embeddings of (none and every height) x (none and every class), float32 (rows, dim).

    diffusers adds a row of a table where our net has a linear map of a label vector: the rows are
    that map's values at the heights of training. None for an unconditional model.
    """
    labels = model.labels
    if not labels.dim:
        return None
    heights = [torch.nan, *torch.linspace(0, 1, height_rows(model)).tolist()]
    heights, classes = zip(*itertools.product(heights, [None, *labels.classes]))
    vectors = labels.encode(torch.tensor(heights), classes)
    return model.net.class_embedding(vectors)


def height_rows(model: Model) -> int:
    """Number of heights in the table: the slice numbers of training; 0 without heights."""
    span = model.labels.height_range
    return round(span[1] - span[0]) + 1 if span else 0


def unet_config(config: UNetConfig, rows: int | None) -> dict:
    """The config of the `UNet2DModel` that our net is between the patches."""
    attention = [side in config.attention_resolutions for side in config.resolutions]
    return dict(
        sample_size=[side // config.patch_size for side in config.sample_size],
        in_channels=config.in_channels * config.patch_size**2,
        out_channels=(config.final_channels or config.out_channels) * config.patch_size**2,
        block_out_channels=config.block_out_channels, layers_per_block=config.layers_per_block,
        attention_head_dim=config.attention_head_dim, norm_num_groups=config.norm_num_groups,
        num_class_embeds=rows,
        down_block_types=["AttnDownBlock2D" if a else "DownBlock2D" for a in attention],
        up_block_types=["AttnUpBlock2D" if a else "UpBlock2D" for a in attention[::-1]])


def scheduler_config(config: SchedulerConfig) -> dict:
    """The config in the keys that diffusers' schedulers take; a shifted table as its betas."""
    values = asdict(config) | {"timestep_spacing": "trailing"}
    if values.pop("log_snr_shift"):
        values["trained_betas"] = make_betas(config).tolist()
        values["rescale_betas_zero_snr"] = False  # the betas are rescaled already
    return values


def export(model: Model, folder: Path) -> None:
    """Writes the folder, or nothing.

    Raises UserError without diffusers, or if the folder holds anything or cannot be written.
    """
    try:
        import diffusers  # noqa: F401
    except ImportError:
        raise UserError("tools.export needs diffusers; pip install diffusers") from None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise UserError(f"{folder}: holds other files; give an empty or a new folder")
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); give another folder"
                        ) from None
    try:
        write_folder(model, folder)
    except BaseException as error:  # Ctrl-C, too, leaves no half export
        shutil.rmtree(folder, ignore_errors=True)
        if not isinstance(error, (OSError, SafetensorError)):
            raise
        raise UserError(f"{folder}: cannot be written ({error}); free some space or give another "
                        "folder") from None


def write_folder(model: Model, folder: Path) -> None:
    """Writes the files; diffusers opens the folder once the last, model_index.json, is there."""
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UNet2DModel, __version__
    config, labels, table = model.net.config, model.labels, label_table(model)
    weights = model.net.cpu().state_dict()
    final = {name: weights.pop(name).tolist() for name in list(weights)
             if name.startswith(("conv_final.", "refine"))}
    if table is not None:
        weights["class_embedding.weight"] = table.cpu()
    unet = UNet2DModel(**unet_config(config, None if table is None else len(table)))
    unet.load_state_dict(weights)
    unet.save_pretrained(folder / "unet")
    values = scheduler_config(model.scheduler.config) | {"clip_sample": False}  # the pipeline does
    # Its config keeps what only the others know, such as clip_sample.
    DPMSolverMultistepScheduler.from_config(DDIMScheduler(**values).config).save_pretrained(
        folder / "scheduler")
    shutil.copyfile(Path(__file__).with_name("pipeline.py"), folder / "pipeline.py")
    (folder / "README.md").write_text(card(model, folder.name), encoding="utf-8")
    write_json(folder / "model_index.json", {
        "_class_name": ["pipeline", "BrainSlicePipeline"], "_diffusers_version": __version__,
        "unet": ["diffusers", "UNet2DModel"],
        "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
        "patch_size": config.patch_size, "final_layers": final, "labels": list(labels.classes),
        "heights": height_rows(model), "clip": model.scheduler.config.clip_sample})


def card(model: Model, name: str) -> str:
    """The model card, with the metadata header that model hubs read."""
    labels, (height, width) = model.labels, model.net.config.sample_size
    names = [f"`position`, the height in the head from 0 to 1 (the nearest of {height_rows(model)})"
            ] if labels.height_range else []
    if labels.classes:
        names.append("`label`, one of " + ", ".join(json.dumps(c) for c in labels.classes))
    arguments = ["position=0.6"] * bool(labels.height_range) + [
        f"label={json.dumps(c)}" for c in labels.classes[:1]]
    return CARD.format(size=f"{width}x{height}", step=model.step, name=name,
                       total=model.scheduler.config.num_train_timesteps,
                       arguments=", ".join(arguments),
                       conditions=f"Conditions: {'; '.join(names)}. Each can be left out."
                       if names else "The model is unconditional.")


def main() -> None:
    parser = Parser(prog="python -m tools.export", description="Exports a model for diffusers.")
    parser.add_argument("model", metavar="RUN_OR_FILE",
                        help="run folder, checkpoint, model.safetensors, native or 64")
    parser.add_argument("folder", type=Path, metavar="DIR", help="new folder")
    args = parser.parse_args()
    path = find_model(SHIPPED.get(args.model, args.model), "RUN_OR_FILE")
    export(load_model(path, torch.device("cpu")), args.folder)
    print(f"{path} exported to {args.folder}; diffusers opens it with "
          f"DiffusionPipeline.from_pretrained(\"{args.folder}\", trust_remote_code=True)")


if __name__ == "__main__":
    run_cli(main)

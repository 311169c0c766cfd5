"""Writes, reads and finds checkpoints and exported models."""

import io
import json
import os
import sys
import warnings
import zipfile
from collections.abc import Collection
from dataclasses import fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.utils._pytree import tree_map_only

from utils.cli import UserError
from utils.device import out_of_memory
from utils.files import write_atomic

FORMAT = "oasis-diffusion-1"
WEIGHTS = Path(__file__).resolve().parents[1] / "weights"
SHIPPED = {"native": WEIGHTS / "oasis-native.safetensors", "64": WEIGHTS / "oasis-64.safetensors"}


class Damaged(UserError):
    """A checkpoint that is not as it was written."""


def read_checkpoint(path: Path) -> dict:
    """A checkpoint's contents, on the CPU; only tensors and plain values are ever unpickled.

    Raises Damaged for a corrupt file, UserError if it cannot be read (perhaps only for now, on a
    network disk) or is a checkpoint of something else.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); try again, or give another "
                        "one") from None
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as file:
            if file.testzip():  # torch.save writes checksums, but torch.load reads past them
                raise ValueError
        with warnings.catch_warnings(action="ignore"):  # about foreign files
            content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can make the reader raise anything
        if out_of_memory(error):
            raise
        raise Damaged(f"{path}: is damaged, or no checkpoint of train.py; give another "
                      "one") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path}: is a checkpoint of something else; give one that train.py wrote")
    return content


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run folder, newest first."""
    former = folder / "checkpoint.pt"  # older versions' name for the newest one
    numbered = [path for path in folder.glob("checkpoint-*.pt") if path.stem[11:].isdigit()]
    return [former] * former.exists() + sorted(
        numbered, key=lambda path: int(path.stem[11:]), reverse=True)


def write_checkpoint(path: Path, content: dict) -> None:
    """Writes a dict of tensors and plain values that `read_checkpoint` reads, on any device.

    Raises UserError if it cannot be written and read back; an existing file is left unchanged.
    """
    buffer = io.BytesIO()
    torch.save(tree_map_only(Tensor, Tensor.cpu, {"format": FORMAT, **content}), buffer)
    data = buffer.getvalue()

    def write(file) -> None:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):  # else it would be read back from memory
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if Path(file.name).read_bytes() != data:
            raise OSError("what is read back differs from what was written")
    write_atomic(path, write)


def newest_checkpoint(folder: Path) -> dict | None:
    """The contents of the newest checkpoint that loads; None if the folder has none.

    Newer ones that are damaged are renamed to NAME.damaged, with a warning. Raises Damaged if all
    are, and renames none then. An older version's checkpoint.pt gets the name of its step.
    """
    damaged: list[Damaged] = []
    paths = checkpoints(folder)
    for path in paths:
        try:
            content = read_checkpoint(path)
        except Damaged as error:
            damaged.append(error)
            continue
        try:
            for bad in paths[:len(damaged)]:
                os.replace(bad, f"{bad}.damaged")
                print(f"warning: {bad} is damaged; renamed to {bad.name}.damaged, continuing from "
                      f"{path.name}, step {content['step']}", file=sys.stderr)
            if path.name == "checkpoint.pt":
                os.replace(path, folder / f"checkpoint-{content['step']:08d}.pt")
                path.unlink(missing_ok=True)  # hard links to one file are not replaced
        except OSError as error:
            raise UserError(f"{folder}: cannot be written ({error.strerror}); make it writable, or "
                            "give another --run") from None
        return content
    if damaged:
        raise damaged[0]
    return None


def check_same_run(folder: Path, content: dict, configs: dict[str, object],
                   may_change: Collection[str]) -> None:
    """Compares a checkpoint's configs with those of the run that is to continue it.

    configs: part -> dataclass; `content[part]` is a dict of its fields. One that is missing there,
        because it is newer than the checkpoint, counts as its default.
    may_change: names of fields that need not be equal.

    Raises UserError for a difference, naming the fields.
    """
    changed = []
    for part, config in configs.items():
        for field in fields(config):
            before = content.get(part, {}).get(field.name, field.default)
            now = getattr(config, field.name)
            if now != before and field.name not in may_change:
                changed.append(f"{part}.{field.name} = {before!r}, now {now!r}")
    if changed:
        raise UserError(f"{folder}: holds another run ({'; '.join(changed)}); give those values, "
                        "or another --run")


def write_safetensors(path: Path, tensors: dict[str, Tensor], configs: dict[str, dict], step: int
                      ) -> None:
    """Writes weights in half precision, with the configs as metadata, for `read_safetensors`."""
    metadata = {part: json.dumps(config) for part, config in configs.items()}
    content = save({name: tensor.half().contiguous().cpu() for name, tensor in tensors.items()},
                   {"format": FORMAT, "step": str(step), **metadata})
    write_atomic(path, lambda file: file.write(content))


def read_safetensors(path: Path) -> dict:
    """The contents of a model.safetensors in the form of a checkpoint, on the CPU.

    Raises UserError if the file is damaged or not one of ours.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name).float() for name in file.keys()}
        if metadata.get("format") != FORMAT:
            raise UserError(f"{path}: holds the weights of something else; give a file that "
                            "train.py wrote")
        configs = {"unet": json.loads(metadata["unet"]),
                   "scheduler": json.loads(metadata["scheduler"]),
                   "labels": json.loads(metadata.get("labels", "{}"))}
        return {**configs, "ema": tensors, "step": int(metadata["step"])}
    except (SafetensorError, OSError, KeyError, ValueError, RecursionError):
        raise UserError(f"{path}: is damaged, or no safetensors file of train.py; give another "
                        "one") from None


def read_model(path: Path) -> dict:
    """The contents of a checkpoint or a model.safetensors; raises UserError as their readers do."""
    return read_safetensors(path) if path.suffix == ".safetensors" else read_checkpoint(path)


def fitting_weights(path: Path, ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """The EMA weights of a file whose name and shape are those of a tensor of ours.

    Raises UserError if the file is damaged, or fewer than half of our tensors fit.
    """
    content = read_model(path)
    try:
        fitting = {name: tensor for name, tensor in content["ema"].items()
                   if name in ours and tensor.shape == ours[name].shape}
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"--init {path}: holds no EMA weights; give a run folder or a file of "
                        "train.py") from None
    if len(fitting) < len(ours) / 2:
        raise UserError(f"--init {path}: only {len(fitting)} of the net's {len(ours)} tensors fit; "
                        "give a model of the same --block-out-channels and --layers-per-block")
    return fitting


def find_model(name: str | Path, option: str = "--checkpoint") -> Path:
    """The file that an option means: a file, a run folder's, or the newest run's.

    Raises UserError if there is none, naming where was looked.
    """
    if name == "latest":
        found = [checkpoints(run)[0] for run in Path("runs").glob("*") if checkpoints(run)]
        if not found:
            raise UserError(f"{option} latest: no runs/*/checkpoint-*.pt here; train first, or "
                            "give a run folder")
        return max(found, key=lambda path: path.stat().st_mtime)
    path = Path(name)
    if path.is_dir():
        for file in (*checkpoints(path), path / "model.safetensors"):
            if file.exists():
                return file
        raise UserError(f"{path}: holds neither a checkpoint nor model.safetensors; give a run "
                        "folder of train.py")
    if not path.exists():
        shipped = f"; the shipped model is {SHIPPED[name]}" if name in SHIPPED else ""
        raise UserError(f"{option} {path}: no such file or folder; give a run folder or a file of "
                        f"train.py{shipped}")
    return path

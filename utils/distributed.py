"""One process or several: ranks, what one does for all, and how all fail together."""

import datetime
import os
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist

from utils.cli import UserError
from utils.device import choose_device, unusable_gpu

# For a process that hangs; one that died is noticed by torchrun or srun at once. It has to outlast
# what only one process does, the decoding of all slices above all.
TIMEOUT = datetime.timedelta(hours=1)


def rank() -> int:
    """This process's number among all; 0 writes the files."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def join_processes() -> None:
    """Joins the processes that torchrun or srun started (README); alone, does nothing.

    Cards talk through NCCL, CPUs through gloo. Only the first process prints. Raises UserError
    if the environment does not say where the others are.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
                                timeout=TIMEOUT)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but the processes do not come "
                        f"together ({error}); start them with torchrun") from None
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")


def together(work: Callable):
    """work()'s result, once all processes are through with theirs.

    One's UserError ends all of them, and only the first of those that raised one says its line.
    """
    result = error = None
    try:
        result = work()
    except (UserError, SystemExit) as caught:  # SystemExit: of a `together` in work, or of --help
        error = caught
    failed = [isinstance(error, UserError)] * world_size()
    if world_size() > 1:
        dist.all_gather_object(failed, failed[rank()])
    if any(failed) and failed.index(True) != rank():
        raise SystemExit(2)
    if error:
        raise error
    return result


def from_first(work: Callable):
    """The first process's work(), on all of them."""
    box = [together(work if rank() == 0 else lambda: None)]
    if world_size() > 1:
        dist.broadcast_object_list(box)
    return box[0]


def local_device(name: str) -> torch.device:
    """The device of --device; of several processes, each has its own GPU.

    Raises UserError for one that is not here.
    """
    if name == "auto" and os.environ.get("LOCAL_RANK", "0") == "0" and (reason := unusable_gpu()):
        print(f"warning: the CPU is used, since {reason}", file=sys.stderr)
    if world_size() > 1:
        if name not in ("auto", "cuda", "cpu"):
            raise UserError(f"--device {name}: for several processes, give cuda or cpu")
        cards = name == "cuda" or name == "auto" and torch.cuda.is_available()
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cards else "cpu"
    try:
        device = choose_device(name)
    except ValueError as error:
        raise UserError(f"--device: {error}") from None
    if device.type == "cuda" and device.index is not None:  # plain "cuda" is the current card
        torch.cuda.set_device(device)
    return device

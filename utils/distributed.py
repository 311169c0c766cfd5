"""One process or several: ranks, working on all of them, failing together, and stopping."""

import contextlib
import datetime
import gc
import os
import signal
import sys
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from utils.cli import UserError
from utils.device import unusable_gpu

# For a process that hangs: torchrun and srun notice one that died. It must be longer than anything
# that one process does alone, such as decoding all slices.
TIMEOUT = datetime.timedelta(hours=1)


def rank() -> int:
    """Number of this process; rank 0 writes the files."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def join_processes() -> None:
    """Joins the processes that torchrun or srun started (docs/cluster.md); alone, does nothing.

    GPUs communicate through NCCL, CPUs through gloo. Only rank 0 prints. Raises UserError if the
    environment does not say where the other processes are.
    """
    if os.environ.get("WORLD_SIZE", "") in ("", "1"):
        return
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
                                timeout=TIMEOUT)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but the processes cannot "
                        f"connect ({error}); start them with torchrun") from None
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")


def leave_processes() -> None:
    """Ends what `join_processes` began; a process that exits without may abort."""
    if dist.is_initialized():
        # Objects that use the group must be deleted first: if one of them is the group's last user,
        # it waits for the group's threads while it holds the interpreter lock that they need.
        gc.collect()
        dist.destroy_process_group()


def on_all_ranks(work: Callable, first: bool = False):
    """The result of work(), once every rank has finished it; all ranks fail together.

    first: rank 0 alone works, and its result goes to all. A UserError on any rank ends all of
    them; only the first rank that raised one prints it.
    """
    result = error = None
    try:
        result = work() if rank() == 0 or not first else None
    except (UserError, SystemExit) as caught:  # SystemExit: from a nested call, or from --help
        error = caught
    failed = [isinstance(error, UserError)] * world_size()
    if world_size() > 1:
        dist.all_gather_object(failed, failed[rank()])
    if any(failed) and failed.index(True) != rank():
        raise SystemExit(2)
    if error:
        raise error
    if first and world_size() > 1:
        box = [result]
        dist.broadcast_object_list(box)
        result = box[0]
    return result


def on_rank_zero(write: Callable, *args) -> None:
    """Calls write(*args) on rank 0; a failure is a warning, and the run continues."""
    try:
        if rank() == 0:
            write(*args)
    except (UserError, OSError) as error:
        print(f"warning: {error}; training continues, and the next save tries again",
              file=sys.stderr)


def local_device(name: str) -> torch.device:
    """The device of --device, the fastest for "auto": cuda, then mps, then cpu. Each of several
    processes gets its own GPU.

    Raises UserError if it is not on this machine.
    """
    if name == "auto" and os.environ.get("LOCAL_RANK", "0") == "0" and (reason := unusable_gpu()):
        print(f"warning: the CPU is used, since {reason}", file=sys.stderr)
    if world_size() > 1 and name not in ("auto", "cuda", "cpu"):
        raise UserError(f"--device {name}: for several processes, give cuda or cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else (
            "mps" if torch.backends.mps.is_available() and world_size() == 1 else "cpu")
    if world_size() > 1 and name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(name)
        if device.type not in ("cuda", "mps", "cpu"):
            raise RuntimeError
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UserError(f"--device {name}: is not on this machine; take cpu, or leave it out for "
                        "the fastest that is") from None
    if device.type == "cuda" and device.index is not None:  # plain "cuda" is the current GPU
        torch.cuda.set_device(device)
    return device


class Stop(contextlib.AbstractContextManager):
    """Turns the first SIGINT, SIGTERM or SIGUSR1 into a vote to stop; a second SIGINT interrupts.

    deadline: the time.monotonic() at which --max-hours ends.
    """

    REASONS = ("", "SIGINT", "SIGTERM", "SIGUSR1", "--max-hours")

    def __init__(self, deadline: float):
        self.deadline, self.vote, self.reason = deadline, 0, ""
        self.work, self.ballot = None, torch.tensor(0)

    def __enter__(self):
        self.before = {number: signal.signal(number, self._catch) for number in
                       (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
        return self

    def _catch(self, number: int, frame) -> None:
        self.vote = self.REASONS.index(signal.Signals(number).name)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def agreed(self, reserve: float) -> bool:
        """Whether to stop before the next step; `reserve` seconds are kept for saving.

        Several processes count their votes while a step runs, and read the result before the
        next: all stop at the same step, and neither host nor GPU waits.
        """
        if not self.vote and time.monotonic() + reserve > self.deadline:
            self.vote = self.REASONS.index("--max-hours")
        result = self.vote
        if world_size() > 1:
            if self.work:
                self.work.wait()
            result = int(self.ballot)  # the votes before the previous step
            self.ballot = torch.tensor(self.vote)
            self.work = dist.all_reduce(self.ballot, dist.ReduceOp.MAX, async_op=True)
        self.reason = self.REASONS[result]
        return result > 0

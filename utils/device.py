"""Where and in which type the network computes, and its memory."""

import contextlib
import ctypes
import os
import platform
import re
import sys
from pathlib import Path

import torch

NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")


def unusable_gpu() -> str | None:
    """Why this build of torch cannot use the NVIDIA GPU that is here; None if it can, or if there
    is no GPU's driver or CUDA_VISIBLE_DEVICES hides the GPU."""
    if torch.cuda.is_available() or os.environ.get("CUDA_VISIBLE_DEVICES", "all") in ("", "-1") \
            or not NVIDIA_DRIVER.exists():
        return None
    version = re.search(r"\d+\.\d+[.\d]*", NVIDIA_DRIVER.read_text(encoding="utf-8"))
    return (f"the NVIDIA driver {version[0] if version else 'here'} does not work with torch "
            f"{torch.__version__} (CUDA {torch.version.cuda or 'not built in'}); see "
            "\"Older GPU drivers\" in docs/cluster.md")


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The type the network computes in: "float32", "bfloat16", or the faster one for "auto".

    bfloat16 is faster where the hardware has it: NVIDIA GPUs from Ampere on, and CPUs with the
    instructions for it (elsewhere a CPU emulates it, many times slower).
    """
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        cpuinfo = Path("/proc/cpuinfo")
        flags = ""
        if device.type == "cpu" and cpuinfo.exists():
            flags = cpuinfo.read_text(encoding="utf-8")
        native = "avx512_bf16" in flags or "amx_bf16" in flags
    return torch.bfloat16 if native else torch.float32


def keep_freed_memory() -> None:
    """Tells glibc to keep freed memory for the next tensor, for this process.

    By default every large tensor is mapped, zeroed page by page and unmapped again, at every step
    (tests/benchmarks/train_speed.py --ablate shows the cost). Does nothing without glibc.
    """
    trim_threshold, top_pad, mmap_max = -1, -2, -4  # the numbers of malloc.h
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(top_pad, 2**28)


def out_of_memory(error: Exception) -> bool:
    """Whether memory ran out; a CPU's allocator raises a RuntimeError with a message of its own."""
    return isinstance(error, MemoryError) or isinstance(error, RuntimeError) and bool(
        re.search("out of memory|allocate memory|not enough memory|ALLOC_FAILED", str(error)))


def memory_gib(device: torch.device) -> float:
    """Peak memory so far, in GiB: of the GPU, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource  # not on Windows
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def describe_machine(device: torch.device) -> str:
    """The hardware in words, for results.json and the model card."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(encoding="utf-8") if cpuinfo.exists() else ""
    found = re.search("model name.*: (.*)", text)
    model = found[1] if found else platform.processor() or platform.machine()
    return f"{model}, {torch.get_num_threads()} threads"

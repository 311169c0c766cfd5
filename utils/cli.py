"""Command lines: errors in one line, option types, progress bars."""

import argparse
import contextlib
import math
import os
import signal
import sys
from collections.abc import Callable

from tqdm import tqdm

from utils.device import out_of_memory

EVAL_SEED = 2**31  # far from the seeds of slices
MOST_SEEDS = 1_000_000


class UserError(Exception):
    """A failure that the user can fix; its text is the one line that is shown."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line too."""

    def error(self, message: str) -> None:
        raise UserError(f"{message}; {self.prog} --help explains the options")


def checked(parse: Callable, fits: Callable, wanted: str) -> Callable:
    """An argparse type: what parse(text) gives, with a check and its words for the error line."""
    def convert(text: str):
        with contextlib.suppress(ValueError):
            value = parse(text)
            if fits(value):
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
    return convert


natural = checked(int, lambda n: n >= 0, "a whole number from 0 on")
positive_int = checked(int, lambda n: n >= 1, "a whole number from 1 on")
seed_number = checked(int, lambda v: 0 <= v < EVAL_SEED, "a whole number from 0 to 2^31 - 1")
finite_float = checked(float, math.isfinite, "a finite number")
positive_float = checked(float, lambda v: 0 < v < math.inf, "a number above 0")
fraction = checked(float, lambda v: 0 <= v < 1, "a number from 0 to below 1")


def seed_list(text: str) -> list[int]:
    """An argparse type: "0-63,100" -> the seeds, each once, in this order."""
    seeds: dict[int, None] = {}
    for part in text.split(","):
        first, dash, last = part.partition("-")
        try:
            low, high = seed_number(first), seed_number(last if dash else first)
            if high < low:
                raise argparse.ArgumentTypeError
        except argparse.ArgumentTypeError:
            raise argparse.ArgumentTypeError(f"{part!r} is no seed or range of seeds such as 0-63, "
                                             "from 0 to 2^31 - 1") from None
        if high - low >= MOST_SEEDS:
            raise argparse.ArgumentTypeError(f"{part!r} is more than {MOST_SEEDS:,} seeds")
        seeds.update(dict.fromkeys(range(low, high + 1)))
    return list(seeds)


def run_cli(main: Callable[[], None]) -> None:
    """Runs a script's `main`; a `UserError` becomes one line on stderr and exit code 2."""
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # as of `inspect ROOT | head`; what is still to be flushed, too
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + 13)  # SIGPIPE, which Windows lacks
    except (UserError, MemoryError, RuntimeError) as error:
        if not isinstance(error, UserError) and not out_of_memory(error):
            raise
        text = str(error) if isinstance(error, UserError) else (
            "out of memory; give a smaller --batch-size, --image-size or --num, or, in training, a "
            "larger --accumulate (the run continues where it was)")
        print("error: " + " ".join(text.split()), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


class _PlainLines:
    """Turns a bar's carriage returns into lines of a log; stderr is kept for errors."""

    def write(self, text: str) -> None:
        if text.strip():
            print(text.strip(), flush=True)

    def flush(self) -> None:
        pass


def progress_bar(total: int, desc: str, unit: str) -> tqdm:
    """A tqdm bar on a terminal; in a log, a plain line every 30 seconds once it takes over 5."""
    if sys.stderr.isatty():
        return tqdm(total=total, desc=desc, unit=unit, dynamic_ncols=True)
    return tqdm(total=total, desc=desc, unit=unit, file=_PlainLines(), delay=5, mininterval=30,
                maxinterval=30,
                bar_format="{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}]")

"""The page of an evaluation: curves, closest pairs and the numbers, as one picture."""

import textwrap
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator, NullLocator, ScalarFormatter

from tools.measures import MEASURES
from utils.configs import SAMPLERS, SPACINGS
from utils.files import write_atomic

REAL, GENERATED, GOOD, BAD = "#8a8f98", "#1f5fa8", "#2a7f4f", "#b5442c"
TITLES = {name: measure.title for name, measure in MEASURES.items()} | {
    "memorisation": "Copying: share nearer than unseen's 99th percentile",
    "memorisation_features": "Copying: the same in features"}
LEGEND = ("Floor: the same measure for as many slices of unseen subjects; its 95% interval is the "
          "grey bar. Dot and line: the value and\nits 95% interval, green where it reaches the bar "
          "or is better, red where it is worse. Each line has a scale of its own.")
INDENT = {"fontsize": 9, "loc": "left"}


def draw_page(result: dict, path: Path) -> None:
    """Writes evaluation.png. result: of `tools.evaluate`, with the pictures of the pairs."""
    compared = result.get("compare", [])
    heights = [2.9, 3.3, 0.31 * len(result["measures"]) + 0.8] + [2.6] * bool(compared)
    with plt.rc_context({"font.size": 8.5, "axes.spines.top": False, "axes.spines.right": False}):
        lines = [line for text in [heading(result), *result["summary"]]
                 for line in textwrap.wrap(text, 130)]
        figure = plt.figure(figsize=(10, sum(heights) + 0.2 + 0.18 * len(lines)),
                            layout="constrained")
        parts = figure.subfigures(len(heights), 1, height_ratios=heights, hspace=0.02)
        figure.suptitle("\n".join(lines), fontsize=9.5, x=0.01, ha="left")
        left, right = parts[0].subplots(1, 2)
        draw_spectrum(left, result["curves"])
        draw_histogram(right, result["curves"])
        draw_pairs(parts[1], result)
        draw_numbers(parts[2], result["measures"])
        if compared:
            draw_comparison(parts[3], compared)
        write_atomic(path, lambda file: figure.savefig(file, dpi=110))
        plt.close(figure)


def heading(result: dict) -> str:
    height, width = result["size"]
    drawn = f", {result['sampler']} {result['steps']} steps" if "sampler" in result else ""
    return (f"{result['model']}{drawn}: {result['num']} slices of {height}x{width} pixels beside "
            f"the train split of {result['data']}")


def draw_spectrum(axes, curves: dict) -> None:
    """Power of the sample over train's by frequency, with the floor's band."""
    cycles = curves["cycles_per_image"]
    if "spectrum_floor" in curves:
        axes.fill_between(cycles, *curves["spectrum_floor"], color=REAL, alpha=0.35, lw=0,
                          label="unseen subjects, 95%")
    axes.axhline(1, color="black", lw=0.6)
    axes.plot(cycles, curves["spectrum"], color=GENERATED, label="evaluated slices")
    low = min(0.5, *curves["spectrum"]) * 0.95
    high = max(1.5, *curves["spectrum"]) * 1.05
    axes.set(yscale="log", ylim=(max(low, 1e-3), min(high, 1e3)), xlim=(1, cycles[-1]),
             xlabel="cycles per image")
    ticks = [tick for tick in (0.01, 0.1, 0.25, 0.5, 0.7, 1, 1.4, 2, 4, 10, 100)
             if low <= tick <= high]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_title("Radial power over that of train: below 1 too smooth, above too noisy",
                   **INDENT)
    axes.legend(frameon=False, loc="lower left")


def draw_histogram(axes, curves: dict) -> None:
    """Grey levels inside the brain."""
    share = np.array(curves["histogram"])
    levels = (np.arange(len(share)) + 0.5) * 256 / len(share)
    if "histogram_floor" in curves:
        axes.fill_between(levels, *curves["histogram_floor"], color=REAL, alpha=0.35, lw=0,
                          label="unseen subjects, 95%")
    axes.plot(levels, curves["histogram_train"], color="black", lw=0.8, label="train")
    axes.plot(levels, share, color=GENERATED, label="evaluated slices")
    axes.set(xlim=(0, 256), ylim=(0, None), xlabel="grey level", yticks=[])
    axes.spines.left.set_visible(False)
    axes.set_title("Grey levels inside the brain", **INDENT)
    axes.legend(frameon=False, loc="upper left")


def draw_pairs(figure, result: dict) -> None:
    """The closest pairs: evaluated slices above, their nearest train slices below."""
    figure.suptitle("The closest pairs: evaluated slices above, the nearest train slices below"
                    + ("" if "nearest" not in result else
                       " (correlation; median of all {median:.3f}, of unseen subjects "
                       "{unseen_median:.3f})".format(**result["nearest"])),
                    fontsize=9, x=0.01, ha="left")
    axes = figure.subplots(2, len(result["pairs"]), squeeze=False)
    for column, (pair, pictures) in enumerate(zip(result["pairs"], result["pictures"])):
        for row, picture in enumerate(pictures):
            axes[row, column].imshow(picture.numpy(), cmap="gray", vmin=0, vmax=255)
            axes[row, column].set_axis_off()
        axes[0, column].set_title(f"{pair['slice']}\n{pair['correlation']:.3f}", fontsize=7)
        axes[1, column].set_title(Path(pair["train"]).name.split(".")[0], fontsize=6)


def draw_numbers(figure, measures: dict) -> None:
    """One line a measure: its place beside the floor, and the numbers."""
    axes = figure.subplots()
    axes.set(xlim=(0, 1), ylim=(len(measures) + 0.6, -1.1))
    axes.set_axis_off()
    columns = {"measure": 0.0, "beside unseen subjects": 0.42, "value": 0.68, "floor": 0.78,
               "floor's 95% interval": 0.98}
    for text, x in columns.items():
        axes.text(x, -0.8, text, weight="bold", va="center", ha="right" if x > 0.5 else "left")
    for line, (name, row) in enumerate(measures.items()):
        if line % 2 == 0:
            axes.axhspan(line - 0.5, line + 0.5, color="#f3f4f6", lw=0)
        colour = "black" if row["floor"] is None else GOOD if row["as_real"] else BAD
        axes.text(0, line, TITLES[name], va="center")
        axes.text(0.68, line, number(row["value"]), va="center", ha="right", color=colour,
                  weight="bold")
        if row["floor"] is not None:
            draw_place(axes, line, row, colour)
            axes.text(0.78, line, number(row["floor"]), va="center", ha="right")
            axes.text(0.98, line, " to ".join(map(number, row["interval"])), va="center",
                      ha="right")
    axes.text(0, len(measures) + 0.1, LEGEND, va="center", fontsize=7.5, color="#555555")


def number(value: float) -> str:
    """Three decimals, and no minus before zero."""
    return f"{round(value, 3) + 0.0:.3f}"


def draw_place(axes, line: int, row: dict, colour: str) -> None:
    """The floor's interval as a bar and the value with its interval as a dot, each row scaled."""
    points = [*row["interval"], *row["value_interval"], row["value"], row["floor"]]
    low, scale = min(points), 0.17 / max(max(points) - min(points), 1e-12)

    def place(value):
        return 0.42 + (value - low) * scale
    axes.plot([place(end) for end in row["interval"]], [line, line], color=REAL, lw=7,
              solid_capstyle="butt", alpha=0.6)
    axes.plot(place(row["floor"]), line, "|", color=REAL, ms=8, mew=1.5)
    axes.plot([place(end) for end in row["value_interval"]], [line, line], color=colour, lw=1.2)
    axes.plot(place(row["value"]), line, "o", color=colour, ms=4.5)


def draw_comparison(figure, compared: list[dict]) -> None:
    """Quality of each setting against the network calls that a slice takes."""
    plots, calls = figure.subplots(1, 3), [found["calls"] for found in compared]
    for axes, name, title in zip(plots, ("kid", "frechet", "spectrum"), (
            "KID", "Frechet distance over its floor", "Spectrum, mean |log2 ratio|")):
        for kind in dict.fromkeys((found["sampler"], found["spacing"]) for found in compared):
            rows = [(found["calls"], found["measures"][name])
                    for found in sorted(compared, key=lambda found: found["calls"])
                    if (found["sampler"], found["spacing"]) == kind and name in found["measures"]]
            unit = rows[0][1]["floor"] if rows and name == "frechet" else None
            axes.plot([count for count, _ in rows], [row["value"] / (unit or 1) for _, row in rows],
                      "o" + ("-", "--", ":")[SPACINGS.index(kind[1])],
                      color=f"C{list(SAMPLERS).index(kind[0])}", label=", ".join(kind))
        if rows and rows[0][1].get("interval"):
            axes.axhspan(*(end / (unit or 1) for end in rows[0][1]["interval"]), color=REAL,
                         alpha=0.25, lw=0)
        axes.set(xlabel="network calls a slice", ylim=(0, None), xscale="log",
                 xlim=(min(calls) / 1.2, max(calls) * 1.2))
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_title(title, **INDENT)
    figure.legend(*plots[0].get_legend_handles_labels(), loc="outside right upper", frameon=False)

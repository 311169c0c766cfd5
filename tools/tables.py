"""The tables of measured numbers in README.md and docs/, made from the JSON files that hold them.

    python -m tools.tables          rewrites them in place; tests/test_report.py compares
"""

import json
import re
from functools import partial
from pathlib import Path

from tools.evaluation_page import TITLES, number
from utils.cli import Parser, run_cli
from utils.files import write_atomic

ROOT = Path(__file__).resolve().parents[1]
PAGES = tuple(ROOT / page for page in ("README.md", "weights/README.md", "docs/sampling.md",
                                       "docs/benchmarks.md"))
BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def evaluation(name: str, kind: str = "evaluation") -> dict:
    return json.loads((ROOT / "weights" / f"oasis-{name}.{kind}.json").read_text("utf-8"))


def table(rows: list[list[str]]) -> str:
    """Markdown, the first row as the header."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]]) + "\n"


def glance() -> str:
    """Each model's main measures beside their floors."""
    models = {"native 176x208": evaluation("native"), "64x64": evaluation("64")}

    def cells(name: str, form: str) -> list[str]:
        return [form.format(**{key: number(value) for key, value in found["measures"][name].items()
                               if key in ("value", "floor")}) for found in models.values()]
    copies = ["none found" if found["measures"]["memorisation"]["as_real"] else "found"
              for found in models.values()]
    return table([["400 slices; in parentheses: as many real slices of unseen subjects", *models],
                  ["KID", *cells("kid", "{value} ({floor})")],
                  ["Frechet distance", *cells("frechet", "{value} ({floor})")],
                  ["spectrum, mean \\|log2 ratio\\|", *cells("spectrum", "{value} ({floor})")],
                  ["two-sample test: accuracy of a classifier",
                   *cells("two_sample", "{value} ({floor})")],
                  ["precision", *cells("precision", "{value} ({floor})")],
                  ["recall", *cells("recall", "{value} ({floor})")],
                  ["copies beyond what unseen subjects show", *copies]])


def quality() -> str:
    """All measures of both models, with the floors' intervals."""
    native, small = (evaluation(name)["measures"] for name in ("native", "64"))
    rows = [["measure", "native", "floor (95% interval)", "64 px", "floor (95% interval)"]]
    for name in native:
        rows.append([TITLES[name].replace("|", "\\|")])
        for found in (native[name], small[name]):
            low, high = map(number, found["interval"])
            rows[-1] += [number(found["value"]), f"{number(found['floor'])} ({low} to {high})"]
    return table(rows)


def conditions() -> str:
    """Share of fluid of real and generated slices by class, and how well heights are followed."""
    native, small = (evaluation(name, "conditions") for name in ("native", "64"))
    rows = [["class (train subjects)", "real", "native", "real at 64 px", "64 px"]]
    for name, found in native["fluid"].items():
        shares = [kind[-1] for part in (found, small["fluid"][name])
                  for kind in (part["real"], part["generated"])]
        rows.append([f"{name} ({found['real_subjects']})", *map(number, shares)])
    heights = [number(found["height_correlation"]) for found in (native, small)]
    return table([*rows, ["height asked for and found, correlation", "", heights[0], "",
                          heights[1]]])


def samplers(name: str) -> str:
    """A model by sampler, network calls and range of seeds."""
    found = json.loads((ROOT / "docs" / f"samplers-{name}.json").read_text("utf-8"))
    names = ("spectrum", "kid", "frechet", "two_sample", "precision", "recall", "symmetry")
    rows = [["sampler, steps, spacing", "calls", "seeds from", "spectrum", "KID", "Frechet",
             "two-sample", "precision", "recall", "symmetry"]]
    for run in found["compare"]:
        rows.append([f"`{run['sampler']}` {run['steps']} {run['spacing']}",
                     str(run["calls"]), str(run["first_seed"]),
                     *(number(run["measures"][name]["value"]) for name in names)])
    floors = [number(run["measures"][name]["floor"]) for name in names]
    return table([*rows, ["floor", "", "", *floors]])


def time_to_quality() -> str:
    """Ours and other projects after the same training time."""
    found = json.loads((ROOT / "docs" / "time_to_quality.json").read_text("utf-8"))["results"]
    names = ("spectrum", "kid", "frechet", "two_sample", "precision")
    rows = [["trained", "parameters", "images seen", "spectrum", "KID", "Frechet", "two-sample",
             "precision"]]
    for run in found:
        rows.append([run["name"], f"{run['parameters'] / 1e6:.1f} M", f"{run['images_seen']:,}",
                     *(number(run["measures"][name]["value"]) for name in names)])
    floors = [number(found[0]["measures"][name]["floor"]) for name in names]
    return table([*rows, ["floor", "", "", *floors]])


TABLES = {"glance": glance, "conditions": conditions, "quality": quality,
          "samplers_native": partial(samplers, "native"), "samplers_64": partial(samplers, "64"),
          "time_to_quality": time_to_quality}


def fill(text: str) -> str:
    """The text of a page with every table made anew."""
    return BLOCK.sub(lambda match: match[1] + TABLES[match[2]]() + match[3], text)


def write_tables() -> None:
    """Rewrites the pages with every table made anew."""
    for page in PAGES:
        text = fill(page.read_text(encoding="utf-8"))
        write_atomic(page, lambda file: file.write(text.encode()))


def main() -> None:
    Parser(prog="python -m tools.tables", description=__doc__.splitlines()[0]).parse_args()
    write_tables()


if __name__ == "__main__":
    run_cli(main)

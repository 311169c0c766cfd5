"""Makes slices of OASIS as it comes: discs, volumes or pictures, split by subject.

    python -m tools.prepare SOURCE OUT

SOURCE: the discs' tar.gz files or folders, NIfTI trees, PNGs, folders of JPEGs by class.
OUT: keras_png_slices_train/ ..._validate/ ..._test/ (case_001_slice_0.nii.png ...), and cases.csv.
"""

import argparse
import csv
import errno
import io
import json
import os
import re
import shutil
import sys
import tarfile
import tempfile
import threading
import zlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from dataset import (RATIOS, SPLITS, SUBJECT, assign_splits, in_two_splits, read_cases,
                     slice_number, subject_of, subjects_in_two_splits, warn_of_unknown_subjects)
from tools.volumes import T88, Cutting, cut_file
from utils.cli import Parser, UserError, checked, natural, positive_int, progress_bar, run_cli
from utils.files import locked, write_csv, write_json
from utils.images import EXTENSIONS, IMAGES, BadSlice, BadSlices, fit, listing, read_mr_slice
from utils.pictures import save_png

CASE_COLUMNS = ("case", "split", "person", "session", "class", "age", "sex", "cdr", "slices",
                "source")
# What sources call the splits: Train, val, validation, testing, keras_png_slices_train, ...
SPLIT_FOLDER = re.compile(
    r"(?:keras_png_slices_)?(train|val|test)(?:ing|id|idate|idation)?(?:_?set)?", re.I)


class Scan(NamedTuple):
    """One session of one subject, as one volume or as pictures."""

    session: str
    subject: str | None
    source: str  # what cases.csv and errors call it
    files: list[Path]
    facts: dict[str, str]  # split or class, where the source has them; age, sex, cdr


def _not_listed(error: OSError) -> None:
    raise UserError(f"{error.filename}: cannot be listed ({error.strerror}); make it readable")


def find_scans(source: Path) -> tuple[list[Path], list[Scan]]:
    """The tar files, and the other scans, of a source.

    Volumes go before pictures: of OASIS-1 the T88 volumes alone, of a BIDS tree the T1w ones.
    Raises UserError if there is nothing, or nothing of a known kind.
    """
    if not os.path.lexists(source):
        raise UserError(f"{source}: no such file or folder; prepare takes a disc's tar.gz, or a "
                        "folder of volumes or pictures")
    root = source if source.is_dir() else source.parent
    files = [source] if not source.is_dir() else sorted(
        Path(folder) / name for folder, _, names in os.walk(source, onerror=_not_listed)
        for name in names if not name.startswith("."))
    tars = [path for path in files if path.name.endswith((".tar.gz", ".tgz", ".tar"))]
    volumes = [path for path in files if T88.fullmatch(path.name) and path.suffix == ".hdr"]
    if tars or volumes:
        return tars, volume_scans(root, volumes)
    volumes = [path for path in files if path.name.endswith((".nii", ".nii.gz", ".hdr"))
               and "derivatives" not in path.relative_to(root).parts]
    volumes = [path for path in volumes if "_T1w." in path.name] or volumes
    pictures = [path for path in files if path.suffix.lower() in EXTENSIONS
                and "_seg_" not in path.parent.name]
    if not volumes and not pictures:
        raise UserError(f"{source}: holds no *_t88_masked_gfc.hdr, no tar.gz, no .nii or .nii.gz, "
                        f"and no images ({IMAGES}); give a disc of OASIS-1 or another folder")
    return [], volume_scans(root, volumes) or picture_scans(root, pictures)


def volume_scans(root: Path, files: list[Path]) -> list[Scan]:
    """A scan for each volume file, named by the file, or by the way to it if names repeat."""
    stem = {path: T88.sub(r"\1", path.name).split(".")[0] for path in files}
    often = Counter(stem.values())
    facts = participants(root)
    scans = []
    for path in files:
        way = path.relative_to(root).as_posix()
        subject = (SUBJECT.findall(way) or [None])[-1]
        about = path.parent / "../../.." / f"{stem[path]}.txt"  # SESSION/PROCESSED/MPRAGE/T88_111
        named = T88.fullmatch(path.name) or often[stem[path]] == 1
        session = stem[path] if named else way.replace("/", "_")
        scans.append(Scan(session, subject, str(path), [path],
                          read_facts(about) if about.is_file() else facts.get(subject, {})))
    return scans


def read_facts(path: Path) -> dict[str, str]:
    """Age, sex and CDR (dementia rating) out of the text file of an OASIS-1 session."""
    text = path.read_text(errors="replace")
    found = {key: re.search(rf"^{name}:[ \t]*(\S+)", text, re.M)
             for key, name in (("age", "AGE"), ("sex", "M/F"), ("cdr", "CDR"))}
    return {key: match[1][0] if key == "sex" else match[1]
            for key, match in found.items() if match}


def participants(root: Path) -> dict[str, dict[str, str]]:
    """Person -> age, sex and cdr out of a BIDS tree's participants.tsv, as far as it is there."""
    path = root / "participants.tsv"
    if not path.is_file():
        return {}
    text = path.read_text("utf-8-sig", errors="replace")
    rows = csv.DictReader(io.StringIO(text), delimiter="\t")
    return {row["participant_id"]: {key: row[key] for key in ("age", "sex", "cdr")
                                    if row.get(key) not in (None, "", "n/a")}
            for row in rows if row.get("participant_id")}


def picture_scans(root: Path, files: list[Path]) -> list[Scan]:
    """A scan for each series of numbered pictures of a subject, or each picture without one.

    Folders named as a split tell the split; else the last folder's name is the class.
    """
    series: dict[tuple[str, str, str], list[Path]] = {}
    for path in files:
        folders = path.relative_to(root).parts[:-1]
        named = [match[1].lower() for match in map(SPLIT_FOLDER.fullmatch, folders) if match]
        split = next((s for s in SPLITS if named and s.startswith(named[0])), "")
        label = folders[-1] if folders and not SPLIT_FOLDER.fullmatch(folders[-1]) else ""
        name, subject = path.stem.removesuffix(".nii"), SUBJECT.search(path.name)
        end = subject.end() if subject else len(name)  # the subject's own number stays
        name = name[:end] + re.sub(r"(_slice|[ _-])[ _-]*\d+$", "", name[end:])
        series.setdefault((split, label, name), []).append(path)
    often = Counter(name for *_, name in series)
    return [Scan(name if often[name] == 1 else "_".join(filter(None, (split, label, name))),
                 subject_of(paths[0]), str(paths[0].parent), paths,
                 {"split": split, "class": label})
            for (split, label, name), paths in series.items()]


def cut_scan(scan: Scan, cutting: Cutting) -> tuple[dict[int, np.ndarray], list[BadSlice]]:
    """The slices of a scan, uint8 (S, S) by number, and what of it cannot be used."""
    if scan.files[0].suffix.lower() in EXTENSIONS:
        return cut_pictures(scan.files, cutting.few_levels)
    try:
        return cut_file(scan.files[0], cutting, scan.source), []
    except BadSlice as error:
        return {}, [error]


def cut_pictures(paths: list[Path], few_levels: bool = False
                 ) -> tuple[dict[int, np.ndarray], list[BadSlice]]:
    """Pictures of one series, padded to squares; see `cut_scan`."""
    slices, taken, bad = {}, {}, []
    for path in paths:
        number = slice_number(path.name)
        try:
            if number in taken:
                raise BadSlice(path, f"has the number of {taken[number]}",
                               "remove one of the two, or number them apart")
            image = read_mr_slice(path, few_levels)
            slices[number], taken[number] = fit(image, max(image.size)), path
        except BadSlice as error:
            bad.append(error)
    return slices, bad


def merge_scans(scans: list[Scan]) -> list[Scan]:
    """Each session once: a disc may lie unpacked beside its tar, or twice.

    Raises UserError if two other files have one name.
    """
    merged: dict[str, Scan] = {}
    for scan in scans:
        other = merged.setdefault(scan.session, scan)
        if other is not scan and not T88.fullmatch(Path(scan.source).name):
            raise UserError(f"{scan.source} and {other.source} have one name; prepare them into "
                            "two folders, or from the folder above them")
    warn_of_unknown_subjects([scan.session for scan in merged.values() if scan.subject is None])
    return list(merged.values())


class Preparation:
    """Slices on the way from their sources to OUT.

    Each session is cut into a folder of its own under OUT/.staged, whole or not at all. Only when
    all subjects are known, numbers and splits are assigned, cases.csv is written, and the slices
    are moved to their places: no listing of the tars beforehand, and the ratios hold exactly.
    Raises UserError for an OUT that is something else, or was made with other settings.
    """

    def __init__(self, out: Path, settings: dict, skip_bad: bool, few_levels: bool = False):
        self.out, self.staged, self.note = out, out / ".staged", out / "prepare.json"
        self.settings, self.skip_bad = settings, skip_bad
        self.cutting = Cutting(settings["slices"], *settings["range"], few_levels)
        self.bad: list[BadSlice] = []
        self.lock, self.stop = threading.Lock(), threading.Event()
        tars_done = self.read_note()
        there = Counter(map(subject_of, out.glob("keras_png_slices_*/case_*_slice_*.nii.png")))
        try:
            self.rows = {row["session"]: row for row in read_cases(out)}
            whole = {session for session, row in self.rows.items()
                     if there[f"case_{int(row['case']):03d}"] == int(row["slices"])
                     and row["split"] in SPLITS and row["person"]}
        except (KeyError, ValueError, TypeError):
            raise UserError(f"{out / 'cases.csv'}: is not as prepare wrote it; prepare into a new "
                            "folder") from None
        tars_done += [mark.stem for mark in self.staged.glob("*.done")]
        self.tars_done = tars_done if len(whole) == len(self.rows) else []
        # Sessions that are there, or that a worker has begun.
        self.taken = whole | {path.parent.name for path in self.staged.glob("*/scan.json")}

    def read_note(self) -> list[str]:
        """The tars that are done, by prepare.json, which is written if OUT is empty."""
        if not self.note.exists():
            if any(not path.name.startswith(".") for path in self.out.iterdir()):
                raise UserError(f"{self.out}: is neither empty nor made by prepare; give a new "
                                "folder")
            write_json(self.note, {"settings": self.settings, "tars": []})
        try:
            before = json.loads(self.note.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{self.note}: cannot be read ({error}); give a new folder") from None
        if before["settings"] != self.settings:
            raise UserError(f"{self.out}: was prepared with {before['settings']}, now "
                            f"{self.settings}; give those again, or a new folder")
        return before["tars"]

    def run(self, tars: dict[str, Path], scans: list[Scan], workers: int) -> None:
        """Stages all that is not whole yet, one volume per worker in memory at a time.

        A tar is worked off by one worker: unpacking it takes longer than cutting, and cannot be
        shared out. Raises UserError for bad scans unless they are to be skipped.
        """
        # Before anything is staged, so that the same command works once the source is mended.
        subjects = [(row["split"], row["person"]) for row in self.rows.values()]
        subjects += [(scan.facts["split"], scan.subject) for scan in scans
                     if scan.facts.get("split")]
        for line in subjects_in_two_splits(subjects):
            raise UserError(line)
        self.staged.mkdir(exist_ok=True)
        tars = {key: tar for key, tar in tars.items() if key not in self.tars_done}
        total = sum(tar.stat().st_size for tar in tars.values()) // 2**20 + len(scans)
        with progress_bar(total, "preparing", "MB" if tars else "session") as bar, \
                ThreadPoolExecutor(workers) as pool:
            jobs = [pool.submit(self.stage_tar, *tar, bar) for tar in tars.items()]
            for scan in scans:
                jobs.append(pool.submit(self.stage, scan))
                jobs[-1].add_done_callback(lambda _: bar.update())
            try:
                for job in jobs:
                    job.result()
            finally:  # after an error or Ctrl-C too
                self.stop.set()
                pool.shutdown(cancel_futures=True)
        self.bad.sort(key=lambda bad: str(bad.path))  # workers finish in any order
        if self.bad and not self.skip_bad:
            raise BadSlices(self.bad, max(len(scans), len(self.bad)), "files")
        if self.bad:
            print(f"warning: goes on without {len(self.bad)}: {listing(self.bad)}",
                  file=sys.stderr)

    def stage(self, scan: Scan) -> None:
        """Cuts one scan into OUT/.staged/SESSION, unless that is there or being made."""
        with self.lock:  # a disc may lie unpacked beside its tar
            if scan.session in self.taken:
                return
            self.taken.add(scan.session)
        slices, bad = cut_scan(scan, self.cutting)
        self.bad += bad
        if not slices or bad and not self.skip_bad:
            return
        folder = self.staged / scan.session
        shutil.rmtree(folder, ignore_errors=True)  # of a call that was killed
        for number, pixels in slices.items():
            save_png(torch.from_numpy(pixels), folder / f"{number}.png")
        write_json(folder / "scan.json", {  # the last file: with it, the session is whole
            **scan.facts, "session": scan.session, "source": scan.source,
            "person": scan.subject or scan.session, "slices": len(slices)})

    def stage_tar(self, key: str, tar: Path, bar: tqdm) -> None:
        """Stages the T88 volumes of a disc's tar file, read once from front to back."""
        try:
            with tempfile.TemporaryDirectory(".tmp", ".", self.staged) as folder:
                for scan in self.scans_in(tar, Path(folder), bar):
                    self.stage(scan)
        except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                raise  # the fault is OUT's
            self.bad.append(BadSlice(tar, f"is cut short or no tar file ({error})",
                                     "download it again (the sessions before are kept)"))
        if not self.bad and not self.stop.is_set():
            (self.staged / f"{key}.done").touch()  # beside its sessions, to be lost with them alone
            self.tars_done.append(key)

    def scans_in(self, tar: Path, folder: Path, bar: tqdm) -> Iterator[Scan]:
        """The scans of a tar file, one volume at a time unpacked into `folder`.

        The sessions' texts are put into OUT/.staged for `finish`.
        """
        seen, found = 0, False
        with tar.open("rb") as raw, tarfile.open(fileobj=raw, mode="r|*") as members:
            for member in members:
                if self.stop.is_set():
                    return
                bar.update(raw.tell() // 2**20 - seen)
                seen = raw.tell() // 2**20
                name = Path(member.name).name
                match = T88.fullmatch(name)
                found |= bool(match)
                if not member.isfile():
                    continue
                if match and match[1] not in self.taken:
                    file = folder / name
                elif re.fullmatch(r"OAS1_\d+_MR\d+\.txt", name):
                    file = self.staged / name
                else:
                    continue
                with file.open("wb") as copy:
                    shutil.copyfileobj(members.extractfile(member), copy)
                header, voxels = file.with_suffix(".hdr"), file.with_suffix(".img")
                if match and header.exists() and voxels.exists():
                    where = f"{tar}:{Path(member.name).with_suffix('.hdr')}"
                    yield Scan(match[1], subject_of(file), where, [header], {})
                    header.unlink(), voxels.unlink()
        if not found:
            self.bad.append(BadSlice(tar, "holds no *_t88_masked_gfc volume of OASIS-1",
                                     "unpack it and give the folder"))
        self.bad += [BadSlice(f"{tar}:{half.name}", "is only one of .hdr and .img",
                              "download the disc again") for half in folder.iterdir()
                     if T88.fullmatch(half.name)[1] not in self.taken]

    def finish(self) -> None:
        """Gives numbers and splits out, writes cases.csv, and moves the slices to their places.

        Raises UserError if a picture stands in two splits, or nothing is left.
        """
        new = [json.loads(path.read_text(encoding="utf-8"))
               for path in sorted(self.staged.glob("*/scan.json"))]
        split_of = {row["person"]: row["split"] for row in [*new, *self.rows.values()]
                    if row.get("split")}
        split_of = assign_splits([row["person"] for row in new], split_of,
                                 self.settings["ratios"], self.settings["seed"])
        numbers = {int(row["case"]) for row in self.rows.values()}
        for row in new:
            own = re.fullmatch(r"case_(\d+)", row["session"])
            number = int(own[1]) if own and int(own[1]) not in numbers else \
                max(numbers, default=0) + 1
            row["case"] = self.rows.get(row["session"], {}).get("case", number)
            row["split"] = split_of[row["person"]]
            text = self.staged / f"{row['session']}.txt"
            row |= read_facts(text) if text.exists() else {}
            numbers.add(int(row["case"]))
            self.rows[row["session"]] = row
        if not self.rows:
            raise UserError(f"{self.out}: none of the source can be used; give another one")
        write_csv(self.out / "cases.csv", CASE_COLUMNS,
                  sorted(self.rows.values(), key=lambda row: int(row["case"])))
        for row in new:
            folder = self.out / f"keras_png_slices_{row['split']}"
            folder.mkdir(exist_ok=True)
            for path in (self.staged / row["session"]).glob("*.png"):
                os.replace(path, folder / f"case_{int(row['case']):03d}_slice_{path.stem}.nii.png")
        write_json(self.note, {"settings": self.settings, "tars": self.tars_done})
        shutil.rmtree(self.staged)
        self.reject_pictures_in_two_splits()

    def reject_pictures_in_two_splits(self) -> None:
        """By the PNG files' bytes, which all come from one encoder."""
        pictures = ((split, hash(path.read_bytes()), f"{split}/{path.name}") for split in SPLITS
                    for path in sorted((self.out / f"keras_png_slices_{split}").glob("*.png")))
        for line in in_two_splits(pictures, "pictures", "remove one copy of the source, and "
                                  "prepare into a new folder"):
            raise UserError(f"{self.out}: {line}")


def prepare(sources: list[Path], out: Path, settings: dict, workers: int, skip_bad: bool,
            few_levels: bool = False) -> None:
    """Makes the report's layout of any sources; what a former call has done is kept.

    settings: slices, range, ratios and seed as main's options. Raises UserError.
    """
    for source in sources:
        if out.resolve().is_relative_to(source.resolve()):
            raise UserError(f"{out}: lies in the source; give another folder")
    found = [find_scans(source) for source in sources]
    tars = {f"{tar.name} {tar.stat().st_size}": tar for group, _ in found for tar in group}
    scans = merge_scans([scan for _, group in found for scan in group])
    try:
        with locked(out / ".lock", wait=False):
            work = Preparation(out, settings, skip_bad, few_levels)
            work.run(tars, scans, workers)
            work.finish()
    except BlockingIOError:
        raise UserError(f"{out}: another prepare is at work on it; wait for it") from None
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); free some space and give "
                        "the same command again") from None
    for split in SPLITS:
        rows = [row for row in work.rows.values() if row["split"] == split]
        print(f"{split:9s}{sum(int(row['slices']) for row in rows):6d} slices  "
              f"{len(rows):4d} sessions  {len({row['person'] for row in rows}):4d} people")


def numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def main() -> None:
    parser = Parser(prog="python -m tools.prepare",
                    description="Makes slices of OASIS as it comes, split by subject.",
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("sources", nargs="+", type=Path, metavar="SOURCE", help="a disc's tar.gz, or a folder of "
        "discs, NIfTI volumes or pictures")
    add("out", type=Path, metavar="OUT", help="folder for the slices; what is there already is "
        "kept")
    add("--slices", type=positive_int, default=32, metavar="N", help="slices per volume")
    add("--range", type=checked(
        numbers, lambda r: len(r) == 2 and 0 <= r[0] < r[1] <= 1,
        "two heights from 0 to 1, such as 0.2,0.85"), default="0.2,0.85", metavar="LOW,HIGH",
        help="first and last slice as shares of the brain's height")
    add("--ratios", type=checked(
        numbers, lambda r: len(r) == 3 and r[0] > 0 and min(r) >= 0 and abs(sum(r) - 1) < 1e-6,
        "three shares that add up to 1, such as 0.85,0.10,0.05"),
        default=",".join(map(str, RATIOS)), metavar="T,V,S",
        help="fractions of the subjects in train, validate and test, unless the source has splits")
    add("--seed", type=natural, default=0, metavar="K", help="who goes to which split")
    add("--workers", type=positive_int, default=os.cpu_count(), metavar="N",
        help="volumes in memory at a time, one per worker")
    add("--skip-bad", action="store_true", help="go on without files that cannot be used")
    add("--few-levels", action="store_true", help="accept images and volumes of few grey levels, "
        "which are else rejected as segmentation maps")
    args = parser.parse_args()
    settings = {key: getattr(args, key) for key in ("slices", "range", "ratios", "seed")}
    prepare(args.sources, args.out, settings, args.workers, args.skip_bad, args.few_levels)


if __name__ == "__main__":
    run_cli(main)

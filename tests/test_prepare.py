"""All supported formats give the same slices; what would spoil a run is rejected."""

import csv
import importlib
import io
import os
import shutil
import sys
import tarfile
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

import dataset
import train
from dataset import load_splits
from tools import prepare, volumes
from tools.volumes import T88_SHAPE, Cutting, cut_volume, upright
from utils.cli import UserError
from utils.files import locked
from utils.images import BadSlice, check_slice, is_label_map

DISC = ROOT.parent / "shared" / "oasis-disc" / "disc1" / "OAS1_0001_MR1"
FEW = ["--slices", 4]


def anatomy(shape=T88_SHAPE, seed=0):
    """An asymmetric head, (X, Y, Z) from right to left, back to front and low to high, float.

    An upright elliptic cylinder with texture; a bright nose in front, a bright ear on the
    patient's right, and a dark hole on the left at the back, so that no turn or mirror image of
    it looks the same.
    """
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij", sparse=True)
    rng = np.random.default_rng(seed)
    head = (x / 0.7)**2 + (y / 0.85)**2 + 0 * z + (np.abs(z + 0.1) > 0.8) < 1
    texture = 600 + 250 * np.sin(9 * x + seed) * np.cos(7 * y) + 100 * z + np.zeros(shape)
    texture += rng.normal(0, 20, shape)
    texture[np.broadcast_to((np.abs(x) < 0.1) & (y > 0.6), shape)] = 1300
    texture[np.broadcast_to((x < -0.45) & (np.abs(y) < 0.15), shape)] = 1250
    texture[np.broadcast_to((x > 0.3) & (y < -0.4), shape)] = 60
    return np.where(head, texture, 0)


def landmarks(image):
    """Whether a slice, uint8 (S, S), stands upright with the patient's right on its left side."""
    rows, columns = np.nonzero(image)
    top, bottom, left, right = rows.min(), rows.max(), columns.min(), columns.max()
    height, width = bottom - top, right - left
    middle, centre = (left + right) // 2, (top + bottom) // 2
    nose = image[top + 4:top + height // 10, middle - 3:middle + 4].mean()
    ear = image[centre - 4:centre + 5, left + 4:left + width // 10].mean()
    hole = image[bottom - height // 5:bottom - height // 6,
                 middle + width // 4:middle + width // 3].mean()
    return nose > 200 and ear > 200 and hole < 30


def analyze(volume, folder, name):
    """Writes NAME.hdr and NAME.img as OASIS-1 has them: Analyze 7.5, int16, big-endian, 4th axis
    of length 1, stored from right to left, back to front and low to high."""
    folder.mkdir(parents=True, exist_ok=True)
    header = nib.AnalyzeHeader(endianness=">")
    header.set_data_dtype(np.int16)
    nib.AnalyzeImage(volume.astype(">i2")[..., None], None, header).to_filename(
        folder / f"{name}.img")
    assert (folder / f"{name}.hdr").read_bytes()[:4] == b"\0\0\1\x5c"


def disc(root, sessions, texts=True):
    """A disc as OASIS-1 has it, with RAW, SUBJ_111 and FSL_SEG beside the volume that is meant."""
    for index, session in enumerate(sessions):
        folder = root / session
        mprage = folder / "PROCESSED" / "MPRAGE"
        name = f"{session}_mpr_n{3 + index % 2}_anon"
        volume = anatomy(seed=int(session[5:9]) * 2 + int(session[-1]))
        analyze(volume, mprage / "T88_111", f"{name}_111_t88_masked_gfc")
        wrong = np.full((40, 40, 40), 7)
        wrong[10:30] = 900
        analyze(wrong, mprage / "T88_111", f"{name}_111_t88_gfc")
        analyze(wrong, mprage / "SUBJ_111", f"{name}_sbj_111")
        analyze(wrong % 4, folder / "FSL_SEG", f"{name}_111_t88_masked_gfc_fseg")
        analyze(wrong, folder / "RAW", f"{session}_mpr-1_anon")
        if texts:
            (folder / f"{session}.txt").write_text(
                f"SESSION ID:   {session}\nAGE:          {60 + index}\nM/F:          Female\n"
                f"CDR:          {'0.5' if index else ''}\nMMSE:         29\n")
    return root


def pack(folder, path, order=sorted):
    """A tar.gz of a disc folder, its members in a given order."""
    with tarfile.open(path, "w:gz", compresslevel=1) as tar:
        for file in order(p for p in folder.rglob("*") if p.is_file()):
            tar.add(file, file.relative_to(folder.parent))
    return path


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """run(name, *args): the command tools.NAME with these arguments; what it printed."""
    def call(name, *args):
        monkeypatch.setattr(sys, "argv", [name, *map(str, args)])
        importlib.import_module(f"tools.{name}").main()
        return capsys.readouterr()
    return call


def pictures(out):
    """Name -> uint8 array of every slice under OUT."""
    return {str(path.relative_to(out)): np.asarray(Image.open(path))
            for path in sorted(out.glob("keras_png_slices_*/*.png"))}


def table(out):
    return list(csv.DictReader(io.StringIO((out / "cases.csv").read_text())))


# The four shapes -------------------------------------------------------------------------------

SESSIONS = ["OAS1_0001_MR1", "OAS1_0002_MR1", "OAS1_0061_MR1", "OAS1_0061_MR2"]


@pytest.fixture(scope="session")
def discs(tmp_path_factory):
    return disc(tmp_path_factory.mktemp("discs") / "disc1", SESSIONS)


def test_a_disc_folder_and_its_tar_in_any_order_give_the_same(discs, tmp_path, run):
    run("prepare", discs, tmp_path / "a", *FEW)
    expected = pictures(tmp_path / "a")
    assert len(expected) == 16
    for image in expected.values():
        assert image.shape == (208, 208) and image.dtype == np.uint8 and landmarks(image)
        assert (image[:, :16] == 0).all() and image.max() == 255
    by_name = lambda files: sorted(files, key=lambda p: (p.suffix, p.name))  # all .hdr first
    backwards = lambda files: sorted(files, reverse=True)  # .img before .hdr, texts last
    for number, order in enumerate((sorted, by_name, backwards)):
        tar = pack(discs, tmp_path / f"disc {number} é.tar.gz", order)
        run("prepare", tar, tmp_path / f"out{number}", *FEW)
        found = pictures(tmp_path / f"out{number}")
        assert found.keys() == expected.keys()
        assert all((found[name] == expected[name]).all() for name in expected)
        for row, other in zip(table(tmp_path / "a"), table(tmp_path / f"out{number}")):
            assert {**row, "source": ""} == {**other, "source": ""}
            assert tar.name in other["source"] and "t88_masked_gfc.hdr" in other["source"]
    rows = table(tmp_path / "a")
    assert [r["session"] for r in rows] == SESSIONS
    assert [(r["person"], r["age"], r["sex"], r["cdr"]) for r in rows[::3]] == [
        ("OAS1_0001", "60", "F", ""), ("OAS1_0061", "63", "F", "0.5")]
    assert rows[2]["split"] == rows[3]["split"]  # the same subject, scanned twice
    assert {r["split"] for r in rows} == {"train", "validate", "test"}
    splits = load_splits(tmp_path / "a", 32)
    assert sorted({p for s in splits.values() for p in s.subjects}) == [
        "OAS1_0001", "OAS1_0002", "OAS1_0061"]


def test_the_three_previews_of_the_disc_agree_with_the_orientation(tmp_path):
    """Coronal preview 110 and sagittal 95, put where the stated axes want them, must give row and
    column of axial preview 90, the reference for the orientation."""
    if not DISC.is_dir():
        pytest.skip("no shared/oasis-disc beside the checkout")
    stem = DISC / "PROCESSED" / "MPRAGE" / "T88_111" / f"{DISC.name}_mpr_n4_anon_111_t88_gfc_"
    axial, coronal, sagittal = (np.asarray(Image.open(f"{stem}{view}.gif").convert("L"))
                                for view in ("tra_90", "cor_110", "sag_95"))
    volume = np.zeros(T88_SHAPE, np.int16)
    volume[:, 109, :] = coronal[::-1].T  # drawn with the head up, hence z from below
    volume[94] = sagittal[::-1].T  # front to the right, hence y from the left
    name = f"{DISC.name}_mpr_n4_anon_111_t88_masked_gfc"
    analyze(volume, tmp_path, name)
    image = nib.AnalyzeImage.from_filename(tmp_path / f"{name}.hdr")
    volume, zooms = upright(image, f"{name}.hdr")
    assert zooms.tolist() == [1, 1]
    plane = volume[:, ::-1, 89].T  # as cut_volume lays it out
    for seen, cut in ((axial[207 - 109], plane[207 - 109]), (axial[:, 94], plane[:, 94])):
        assert np.corrcoef(seen, cut)[0, 1] > 0.9999


@pytest.mark.parametrize("codes", ["RAS", "LPI", "PSR", "LAS", "IRP", "ASL"])
def test_nifti_of_any_orientation(tmp_path, run, codes):
    """One anatomy, stored in many ways, with its affine: the same slices from all."""
    small = anatomy((88, 104, 88))
    las = nib.Nifti1Image(small.astype(np.int16), np.diag([-2, 2, 2, 1]))  # x runs to the left
    turn = nib.orientations.ornt_transform(nib.io_orientation(las.affine),
                                           nib.orientations.axcodes2ornt(tuple(codes)))
    stored = las.as_reoriented(turn)
    assert "".join(nib.aff2axcodes(stored.affine)) == codes
    for subject in ("01", "02"):
        path = tmp_path / "b" / f"sub-{subject}" / "anat" / f"sub-{subject}_T1w.nii.gz"
        path.parent.mkdir(parents=True)
        (stored if subject == "01" else las).to_filename(path)
    (tmp_path / "b" / "participants.tsv").write_text(
        "participant_id\tage\tsex\nsub-01\t33\tM\nsub-02\tn/a\tF\n", encoding="utf-8-sig")
    bold = tmp_path / "b" / "sub-01" / "func" / "sub-01_bold.nii.gz"
    bold.parent.mkdir()
    nib.Nifti1Image(np.zeros((4, 4, 4, 4), np.int16), np.eye(4)).to_filename(bold)
    # Two different names for one head would be the leak that is rejected, so both go to train.
    run("prepare", tmp_path / "b", tmp_path / "o", *FEW, "--ratios", "1,0,0")
    found = list(pictures(tmp_path / "o").values())
    assert len(found) == 8 and all(landmarks(image) for image in found)
    assert all((a == b).all() for a, b in zip(found[:4], found[4:]))
    assert [(r["person"], r["age"], r["sex"]) for r in table(tmp_path / "o")] == [
        ("sub-01", "33", "M"), ("sub-02", "", "F")]


def test_pixels_are_made_square_by_their_size_in_mm():
    volume = anatomy((60, 104, 40))
    thick = nib.Nifti1Image(volume.astype(np.float32), np.diag([-3, 2, 4, 1]))
    slices = cut_volume(*upright(thick, "a.nii"), Cutting(4), "a.nii")
    rows, columns = np.nonzero(slices[2] > 40)
    assert slices[2].shape == (104, 104)
    # The head is 0.7 of 60 voxels of 3 mm wide and 0.85 of 104 of 2 mm long.
    assert np.ptp(columns) / np.ptp(rows) == pytest.approx(0.7 * 180 / (0.85 * 208), rel=0.05)


def test_levels_are_scaled_by_a_robust_percentile_and_black_stays_black():
    volume = anatomy((88, 104, 88))
    image = nib.Nifti1Image((volume / 50).astype(np.float32), np.diag([-2, 2, 2, 1]))
    bright = volume.copy()
    bright[40:43, 50:53, 40:43] = 90_000  # a vessel
    other = nib.Nifti1Image(bright.astype(np.float32), np.diag([-2, 2, 2, 1]))
    a, b = (cut_volume(*upright(i, "a.nii"), Cutting(4), "a.nii") for i in (image, other))
    assert all((a[k] == 0).sum() == (b[k] == 0).sum() > 2000 for k in a)
    assert max(np.abs(a[k].astype(int) - b[k]).mean() for k in a) < 1


def shades(seed, size=(40, 30)):
    """A picture with all grey levels and black around it."""
    pixels = np.random.default_rng(seed).normal(120, 50, size).clip(1, 255)
    pixels[:4] = 0
    return Image.fromarray(pixels.astype(np.uint8))


def test_the_reports_pngs_keep_their_names_and_splits(tmp_path, run):
    source = tmp_path / "keras"
    for number, split in ((1, "train"), (2, "train"), (30, "validate"), (41, "test")):
        for kind in ("", "seg_"):
            folder = source / f"keras_png_slices_{kind}{split}"
            folder.mkdir(parents=True, exist_ok=True)
            for index in (0, 7):
                shades(number + 100 * index).save(
                    folder / f"{kind[:3] or 'case'}_{number:03d}_slice_{index}.nii.png")
    run("prepare", source, tmp_path / "o")
    assert sorted(pictures(tmp_path / "o")) == [
        f"keras_png_slices_{split}/case_{number:03d}_slice_{index}.nii.png"
        for split, number in (("test", 41), ("train", 1), ("train", 2), ("validate", 30))
        for index in (0, 7)]


@pytest.mark.parametrize("folders", [("NonDemented", "Very mild Dementia"), ("",)])
def test_class_folders_and_one_flat_folder(tmp_path, run, folders):
    source = tmp_path / "with space é"
    for index in range(6):
        folder = source / folders[index % len(folders)]
        folder.mkdir(parents=True, exist_ok=True)
        for number in (100, 101, 99):
            shades(index * 100 + number).save(
                folder / f"OAS1_{index:04d}_MR1_mpr-1_{number}.jpg", quality=95)
    run("prepare", source, tmp_path / "o")
    rows = table(tmp_path / "o")
    assert len(rows) == 6 and {r["class"] for r in rows} == set(folders)
    assert {r["person"] for r in rows} == {f"OAS1_{i:04d}" for i in range(6)}
    names = sorted(pictures(tmp_path / "o"))
    assert len(names) == 18 and names[0].endswith("_slice_100.nii.png")
    with Image.open(source / folders[0] / "OAS1_0000_MR1_mpr-1_99.jpg") as image:
        case = next(int(r["case"]) for r in rows if r["person"] == "OAS1_0000")
        found = next(v for k, v in pictures(tmp_path / "o").items()
                     if f"case_{case:03d}_slice_99." in k)
        assert (found[:, 5:35] == np.asarray(image)).all() and found.shape == (40, 40)


def test_one_picture_per_person_and_names_with_dots(tmp_path, run):
    """A subject's number is not a slice's, and a dot within a name does not end it."""
    names = ["OAS1_0001.jpg", "OAS1_0002.jpg", "OAS1_0003_MR1.jpg", "OAS1_0003_MR2.jpg",
             "sub-04.png", "1.2.840.5.png", "1.2.840.6.png", "lock.png"]
    (tmp_path / "s").mkdir()
    for seed, name in enumerate(names):
        shades(seed).save(tmp_path / "s" / name)
    run("prepare", tmp_path / "s", tmp_path / "o")
    assert sorted((r["session"], r["person"], r["slices"]) for r in table(tmp_path / "o")) == [
        (session, subject, "1") for session, subject in sorted(zip(
            ["OAS1_0001", "OAS1_0002", "OAS1_0003_MR1", "OAS1_0003_MR2", "sub-04", "1.2.840.5",
             "1.2.840.6", "lock"],
            ["OAS1_0001", "OAS1_0002", "OAS1_0003", "OAS1_0003", "sub-04", "1.2.840.5",
             "1.2.840.6", "lock"]))]
    assert len(pictures(tmp_path / "o")) == 8


def test_splits_by_other_names(tmp_path, run):
    for number, folder in enumerate(("Train/Demented", "val/Demented", "Testing/Demented")):
        source(tmp_path, folder, count=2, first=2 * number)
    run("prepare", tmp_path / "s", tmp_path / "o")
    assert [(r["person"], r["split"], r["class"]) for r in table(tmp_path / "o")] == [
        ("case_000", "train", "Demented"), ("case_001", "validate", "Demented"),
        ("case_002", "test", "Demented")]


def test_prepared_slices_train(discs, tmp_path, run, capsys):
    run("prepare", discs, tmp_path / "o", "--slices", 8)
    run_folder = tmp_path / "r"
    args = ["--data", tmp_path / "o", "--run", run_folder, "--image-size", 16,
            "--block-out-channels", 32, 32, "--batch-size", 4, "--steps", 2, "--device", "cpu"]
    prepared = train.prepare(train.parse_args(list(map(str, args))))
    data = prepared.data["train"]
    assert set(data.subjects) <= {"OAS1_0001", "OAS1_0002", "OAS1_0061"}
    assert sorted(set(data.numbers.tolist())) == list(range(8))
    assert train.train(prepared, 1, 2)
    assert "loss" in capsys.readouterr().out


# A second call -----------------------------------------------------------------------------------


def test_a_second_call_does_only_what_is_missing(discs, tmp_path, run, monkeypatch):
    out = tmp_path / "o"
    run("prepare", discs, out, *FEW)
    before = {name: image.copy() for name, image in pictures(out).items()}
    cut = []
    real = prepare.cut_file
    monkeypatch.setattr(prepare, "cut_file", lambda p, *a: (cut.append(p.name), real(p, *a))[1])
    run("prepare", discs, out, *FEW)
    assert not cut
    case = next(r for r in table(out) if r["session"] == "OAS1_0002_MR1")
    (out / f"keras_png_slices_{case['split']}" /
     f"case_{int(case['case']):03d}_slice_2.nii.png").unlink()
    run("prepare", discs, out, *FEW)
    assert len(cut) == 1 and "OAS1_0002_MR1" in cut[0]
    after = pictures(out)
    assert after.keys() == before.keys() and all((after[k] == before[k]).all() for k in after)
    assert not (out / ".staged").exists()


def test_new_people_do_not_move_old_ones(tmp_path, run):
    for number in range(1, 9):
        folder = tmp_path / "s" / f"case_{number:03d}"
        folder.mkdir(parents=True)
        shades(number).save(folder / f"case_{number:03d}_slice_0.png")
    run("prepare", tmp_path / "s", tmp_path / "o")
    before = {r["person"]: r["split"] for r in table(tmp_path / "o")}
    for number in range(9, 41):
        shades(number).save(tmp_path / "s" / f"case_{number:03d}_slice_0.png")
    run("prepare", tmp_path / "s", tmp_path / "o")
    after = {r["person"]: r["split"] for r in table(tmp_path / "o")}
    assert before.items() <= after.items() and len(after) == 40
    assert [list(after.values()).count(s) for s in dataset.SPLITS] == [34, 4, 2]


def test_a_disc_beside_its_tar_is_cut_once(discs, tmp_path, run, monkeypatch):
    """Two workers come to the same session at the same time."""
    pack(discs, tmp_path / "disc1.tar.gz")
    cut, real = [], volumes.cut_volume

    def slow(volume, zooms, cutting, name):
        cut.append(name)
        time.sleep(0.3)
        return real(volume, zooms, cutting, name)
    monkeypatch.setattr(volumes, "cut_volume", slow)
    run("prepare", discs, tmp_path / "disc1.tar.gz", tmp_path / "o", *FEW, "--workers", 2)
    assert len(cut) == len(SESSIONS) and [r["session"] for r in table(tmp_path / "o")] == SESSIONS


def test_copies_of_a_disc_in_one_source_are_one(tmp_path):
    for copy in ("a", "b"):
        name = "OAS1_0001_MR1_mpr_n4_anon_111_t88_masked_gfc.hdr"
        (tmp_path / copy).mkdir()
        (tmp_path / copy / name).touch()
    scans = prepare.merge_scans(prepare.find_scans(tmp_path)[1])
    assert [scan.session for scan in scans] == ["OAS1_0001_MR1"]


def test_what_another_prepare_did_before_the_lock_is_seen(tmp_path, monkeypatch, run):
    folder = source(tmp_path)
    cut, real = [], prepare.cut_pictures
    monkeypatch.setattr(prepare, "cut_pictures", lambda *a: (cut.append(a), real(*a))[1])

    def late(*args, **options):
        monkeypatch.setattr(prepare, "locked", locked)
        run("prepare", folder, tmp_path / "o")
        return locked(*args, **options)
    monkeypatch.setattr(prepare, "locked", late)
    run("prepare", folder, tmp_path / "o")
    assert len(cut) == len(table(tmp_path / "o")) == 3 and len(pictures(tmp_path / "o")) == 6


def test_the_same_command_works_once_the_source_is_fixed(tmp_path, rejected, run):
    folder = source(tmp_path)
    other = source(tmp_path, "test", first=5, count=3)
    rejected("tools.prepare", [tmp_path / "s", tmp_path / "o"],
            "1 subjects are in both test and train, such as case_002", "move each")
    (folder / "case_002_slice_1.png").unlink()
    (folder / "case_002_slice_0.png").rename(other / "case_002_slice_0.png")
    run("prepare", tmp_path / "s", tmp_path / "o")
    assert [(r["person"], r["split"]) for r in table(tmp_path / "o")] == [
        ("case_000", "train"), ("case_001", "train"), ("case_002", "test"), ("case_003", "test")]


@pytest.mark.parametrize("moment", ["stage", "finish", "move"])
def test_killed_at_any_moment_the_next_call_completes(discs, tmp_path, run, monkeypatch, moment):
    """A killed process leaves files as they are at that moment; an exception does so too."""
    class Killed(BaseException):
        pass

    calls = []
    real = os.replace

    def fragile(source, target):
        calls.append(target)
        name = Path(target).name
        if moment == "stage" and Path(target).match(f"{SESSIONS[2]}/scan.json") or \
                moment == "finish" and name == "cases.csv" or \
                moment == "move" and name.endswith("case_002_slice_1.nii.png"):
            raise Killed
        return real(source, target)

    run("prepare", discs, tmp_path / "whole", *FEW)
    monkeypatch.setattr(os, "replace", fragile)
    with pytest.raises(Killed):
        run("prepare", discs, tmp_path / "o", *FEW, "--workers", 1)
    monkeypatch.setattr(os, "replace", real)
    with pytest.raises(UserError, match="preparation is not finished.*prepare again"):
        dataset.find_slices(tmp_path / "o")
    run("prepare", discs, tmp_path / "o", *FEW, "--workers", 1)
    whole, found = pictures(tmp_path / "whole"), pictures(tmp_path / "o")
    assert whole.keys() == found.keys() and all((whole[k] == found[k]).all() for k in whole)
    assert table(tmp_path / "whole") == table(tmp_path / "o")
    assert not (tmp_path / "o" / ".staged").exists()


def test_a_tar_that_is_done_is_not_read_again(discs, tmp_path, run, monkeypatch):
    """Nor by the call after one that was killed in its second tar: a disc takes minutes."""
    parts = sorted(discs.iterdir())
    tars = [pack(part, tmp_path / f"disc{number}.tar.gz") for number, part in enumerate(parts)]
    read, real = [], prepare.Preparation.scans_in

    def fragile(preparation, tar, *more):
        if len(read) == 1:
            raise KeyboardInterrupt
        read.append(tar)
        return real(preparation, tar, *more)
    monkeypatch.setattr(prepare.Preparation, "scans_in", fragile)
    with pytest.raises(KeyboardInterrupt):
        run("prepare", *tars, tmp_path / "o", *FEW, "--workers", 1)
    shutil.copytree(tmp_path / "o", tmp_path / "cleared")
    read.append("killed")
    for _ in range(2):
        run("prepare", *tars, tmp_path / "o", *FEW, "--workers", 1)
    assert read == [tars[0], "killed", *tars[1:]]
    shutil.rmtree(tmp_path / "cleared" / ".staged")  # by somebody who wants to begin anew
    run("prepare", *tars, tmp_path / "cleared", *FEW, "--workers", 1)
    assert len(table(tmp_path / "o")) == len(table(tmp_path / "cleared")) == len(parts)


# Rejections --------------------------------------------------------------------------------------


def volume_file(tmp_path, array, affine=np.diag([-2, 2, 2, 1]), name="sub-01_T1w.nii.gz"):
    path = tmp_path / "v" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.Nifti1Image(array, affine).to_filename(path)
    return path


SMALL = anatomy((44, 52, 44)).astype(np.int16)


def four_d(tmp_path):
    volume_file(tmp_path, np.stack([SMALL] * 3, axis=-1))


def no_orientation(tmp_path):
    volume_file(tmp_path, SMALL, affine=None)


def foreign_analyze(tmp_path):
    analyze(SMALL, tmp_path / "v", "brain")


def t88_of_another_shape(tmp_path):
    analyze(SMALL, tmp_path / "v", "OAS1_0001_MR1_mpr_n4_anon_111_t88_masked_gfc")


def label_volume(tmp_path):
    volume_file(tmp_path, np.digitize(SMALL, [1, 500, 700]).astype(np.int16))


def empty_volume(tmp_path):
    volume_file(tmp_path, np.zeros_like(SMALL))


def colour_volume(tmp_path):
    colour = np.zeros(SMALL.shape, [(c, "u1") for c in "RGB"])
    volume_file(tmp_path, colour)


def low_volume(tmp_path):
    volume_file(tmp_path, SMALL[:, :, 20:24])


def lone_header(tmp_path):
    analyze(anatomy(), tmp_path / "v", "OAS1_0001_MR1_mpr_n4_anon_111_t88_masked_gfc")
    next((tmp_path / "v").glob("*.img")).unlink()


@pytest.mark.parametrize("make, words", [
    (four_d, ["has 4 dimensions (44x52x44x3), not 3", "give one T1-weighted volume"]),
    (no_orientation, ["header states no orientation", "set its sform or qform"]),
    (foreign_analyze, ["brain.hdr: Analyze headers state no orientation", "convert it to NIfTI"]),
    (t88_of_another_shape, ["no T88 volume of OASIS-1", "convert it to NIfTI"]),
    (label_volume, ["few grey levels, as a segmentation map", "give the T1-weighted volume"]),
    (empty_volume, ["is of one value all over", "remove it"]),
    (colour_volume, ["not grey levels", "give a T1-weighted volume"]),
    (low_volume, ["4 planes high, too low for 32 slices", "--slices"]),
    (lone_header, ["OAS1_0001_MR1", "cannot be read"]),
])
def test_volumes_rejected(tmp_path, rejected, make, words):
    make(tmp_path)
    rejected("tools.prepare", [tmp_path / "v", tmp_path / "o"], *words, "--skip-bad")
    assert not (tmp_path / "o" / "cases.csv").exists()


def test_skip_bad_goes_on_without_them(tmp_path, run):
    four_d(tmp_path)
    for subject in range(2, 5):
        volume_file(tmp_path, anatomy((44, 52, 44), subject).astype(np.int16),
                    name=f"sub-0{subject}_T1w.nii")
    said = run("prepare", tmp_path / "v", tmp_path / "o", *FEW, "--skip-bad")
    assert "warning: goes on without 1: " in said.err and "sub-01_T1w.nii.gz" in said.err
    assert [r["person"] for r in table(tmp_path / "o")] == ["sub-02", "sub-03", "sub-04"]


def source(tmp_path, split="train", count=6, first=0, folder="s"):
    """A folder of `count` good slices, two to a subject."""
    target = tmp_path / folder / split
    target.mkdir(parents=True, exist_ok=True)
    for index in range(first, first + count):
        shades(index).save(target / f"case_{index // 2:03d}_slice_{index % 2}.png")
    return target


def label_maps(tmp_path):
    for path in source(tmp_path).iterdir():
        pixels = np.digitize(np.asarray(Image.open(path)), [1, 90, 150]) * 85
        Image.fromarray(pixels.astype(np.uint8)).save(path)


def label_maps_of_small_numbers(tmp_path):
    for path in source(tmp_path).iterdir():
        pixels = np.digitize(np.asarray(Image.open(path)), [1, 90, 150])
        Image.fromarray(pixels.astype(np.uint8)).save(path)


def shared_person(tmp_path):
    source(tmp_path), source(tmp_path, "test", first=5)


def shared_picture(tmp_path):
    folder = source(tmp_path)
    shutil.copy(folder / "case_001_slice_1.png",
                source(tmp_path, "test", first=20) / "case_077_slice_0.png")


def black(tmp_path):
    Image.new("L", (30, 40)).save(source(tmp_path) / "case_001_slice_1.png")


def constant(tmp_path):
    Image.new("L", (30, 40), 99).save(source(tmp_path) / "case_001_slice_1.png")


def colour(tmp_path):
    Image.merge("RGB", [shades(i) for i in range(3)]).save(
        source(tmp_path) / "case_001_slice_1.png")


def unreadable(tmp_path):
    folder = source(tmp_path, count=40)
    for index in range(12):
        (folder / f"case_{index:03d}_slice_1.png").write_bytes(b"\x89PNG, or so")


PICTURES = [
    (label_maps, ["6 of 6 images cannot be used", "few grey levels, as a segmentation map",
                  "keras_png_slices_train, not keras_png_slices_seg_train"]),
    (label_maps_of_small_numbers, ["few grey levels, as a segmentation map"]),
    (black, ["case_001_slice_1.png: is entirely black", "remove"]),
    (constant, ["case_001_slice_1.png: has a single grey level", "remove"]),
    (colour, ["case_001_slice_1.png: cannot be read (it is a colour image", "replace or remove"]),
    (unreadable, ["12 of 40", "case_009_slice_1.png", "; ...;", "--skip-bad"]),
    (shared_person, ["1 subjects are in both train and test, such as case_002", "move each"]),
    (shared_picture, ["1 pictures are in both train and test, such as train/case_001_slice_1.png"
                      " and test/case_077_slice_0.png", "remove one copy"]),
]


@pytest.mark.parametrize("make, words", PICTURES)
def test_train_and_inspect_reject(tmp_path, rejected, make, words):
    make(tmp_path)
    args = ["--data", tmp_path / "s", "--image-size", 16, "--run", tmp_path / "r",
            "--block-out-channels", 32, 32, "--batch-size", 2, "--device", "cpu"]
    rejected("train.py", args, *words)
    rejected("tools.inspect", [tmp_path / "s", "--out", tmp_path / "i.png"], *words)
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("make, words", [case for case in PICTURES if case[0] != shared_picture])
def test_prepare_rejects_pictures(tmp_path, rejected, make, words):
    make(tmp_path)
    words = [word for word in words if " of " not in word and "in both" not in word]
    rejected("tools.prepare", [tmp_path / "s", tmp_path / "o"], *words)


def test_prepare_rejects_one_picture_in_two_splits(tmp_path, rejected):
    shared_picture(tmp_path)
    rejected("tools.prepare", [tmp_path / "s", tmp_path / "o"],
            "1 pictures are in both train and test", "remove one copy of the source")


def test_skip_bad_trains_without_them_and_remembers(tmp_path, capsys):
    unreadable(tmp_path)
    (tmp_path / "s" / "train" / "case_019_slice_1.png").unlink()
    (tmp_path / "s" / "train" / "case_019_slice_1.png").symlink_to("nowhere")
    for _ in range(2):
        split = load_splits(tmp_path / "s", 16, skip_bad=True)["train"]
        assert len(split.images) == len(split.names) == len(split.subjects) == 27
        assert "case_001_slice_1.png" not in split.names
        assert "13 of 40 images are ignored" in capsys.readouterr().err


def test_skip_bad_without_a_cache_and_with_nothing_left(tmp_path, rejected, capsys):
    unreadable(tmp_path)
    (tmp_path / "kept").write_text("a file where the folder should be")
    split = load_splits(tmp_path / "s", 16, tmp_path / "kept", skip_bad=True)["train"]
    assert len(split.images) == 28
    label_maps(tmp_path / "l")
    with pytest.raises(UserError, match="no slice of train can be used"):
        load_splits(tmp_path / "l" / "s", 16, skip_bad=True)
    capsys.readouterr()
    rejected("tools.prepare", [tmp_path / "l" / "s", tmp_path / "o", "--skip-bad"],
            "none of the source can be used")


def test_two_pictures_of_one_number_are_not_made_one(tmp_path, rejected):
    folder = source(tmp_path)
    shades(77).save(folder / "case_001_slice_1.jpg")
    rejected("tools.prepare", [folder, tmp_path / "o"], "case_001_slice_1.png: has the "
            "number of", "case_001_slice_1.jpg", "number them apart")


def test_fewer_slices_than_a_batch_and_small_ones(tmp_path, rejected, capsys):
    source(tmp_path)
    args = ["--data", tmp_path / "s", "--image-size", 64, "--run", tmp_path / "r", "--device",
            "cpu", "--block-out-channels", 32, 32]
    rejected("train.py", [*args, "--batch-size", 7], "--batch-size 7 is more than the 6 slices")
    load_splits(tmp_path / "s", 64)
    said = capsys.readouterr().err
    assert "30x40 pixels and are upsampled to the image size 64" in said and "smaller --im" in said
    load_splits(tmp_path / "s", 40)
    assert not capsys.readouterr().err


def test_sources_and_folders_that_do_not_do(tmp_path, rejected, run):
    def attempt(args, *words):
        rejected("tools.prepare", args, *words)
    (tmp_path / "empty").mkdir()
    attempt([tmp_path / "nowhere", tmp_path / "o"], "nowhere: no such file or folder")
    attempt([tmp_path / "empty", tmp_path / "o"], "holds no *_t88_masked_gfc.hdr", "give")
    (tmp_path / "no.tar.gz").write_text("no tar")
    attempt([tmp_path / "no.tar.gz", tmp_path / "o1"], "no.tar.gz: is cut short or no tar file",
            "download it again")
    other = pack(source(tmp_path, folder="t"), tmp_path / "pictures.tar")
    attempt([other, tmp_path / "o1"], "pictures.tar: holds no *_t88_masked_gfc volume", "unpack it")
    folder = source(tmp_path)
    attempt([folder, folder / "o"], "lies in the source", "another folder")
    attempt([folder, tmp_path / "s"], "neither empty nor made by prepare", "new folder")
    attempt([folder, tmp_path / "o2", "--ratios", "1,1,1"], "--ratios", "'1,1,1'")
    attempt([folder, tmp_path / "o2", "--range", "0.9,0.1"], "--range", "'0.9,0.1'")
    attempt([folder, tmp_path / "o2", "--slices", "0"], "--slices", "'0'")
    (tmp_path / "o2").mkdir(exist_ok=True)
    (tmp_path / "o2" / ".prepare.json.1.tmp").touch()  # killed at its very start
    run("prepare", folder, tmp_path / "o2")
    attempt([folder, tmp_path / "o2", "--seed", "5"], "was prepared with", "a new folder")
    (tmp_path / "o2" / "cases.csv").write_bytes(b"\xff\0")
    attempt([folder, tmp_path / "o2"], "cases.csv: cannot be read", "remove it")
    (tmp_path / "o2" / "cases.csv").write_text("case,session\n1,x\n")
    attempt([folder, tmp_path / "o2"], "cases.csv: is not as prepare wrote it", "new folder")
    attempt([folder, tmp_path / "o3", "--seed=-1"], "--seed", "'-1'")
    with locked(tmp_path / "o4" / ".lock"):
        (tmp_path / "o4" / "prepare.json").write_text(
            (tmp_path / "o2" / "prepare.json").read_text())
        attempt([folder, tmp_path / "o4"], "another prepare is at work on it")


def test_cases_csv_tells_people_that_come_again(discs, tmp_path, run):
    """A repeat scan moved to another split by hand has another case number, and is still seen."""
    run("prepare", discs, tmp_path / "o", *FEW)
    again = next(r for r in table(tmp_path / "o") if r["session"] == "OAS1_0061_MR2")
    other = next(s for s in dataset.SPLITS if s != again["split"])
    for path in (tmp_path / "o").glob(f"*/case_{int(again['case']):03d}_*"):
        path.rename(tmp_path / "o" / f"keras_png_slices_{other}" / path.name)
    with pytest.raises(UserError, match="are in both .* such as OAS1_0061"):
        load_splits(tmp_path / "o", 16)


# Detectors ---------------------------------------------------------------------------------------


def quantised(pixels, count):
    """Pixels in `count` equal bands of their range, spread over 0 to 255, as label maps are."""
    return np.digitize(pixels, np.linspace(0, pixels.max(), count + 1)[1:-1]) * (255 // count)


def test_no_real_slice_is_a_label_map_and_all_quantised_ones_are(oasis):
    files = sorted(oasis.glob("*/*.jpg"))
    assert len(files) == 5760
    for path in files:
        pixels = np.asarray(Image.open(path))
        check_slice(pixels, path)
        for count in (3, 4, 5):
            assert is_label_map(quantised(pixels, count)), (path, count)


def test_phantoms_are_slices_at_every_size():
    for size in (16, 32, 64, 128):
        for image in dataset.phantom_slices(size, 0, 4)[0]:
            check_slice(image, "phantom")


# Damaged input -----------------------------------------------------------------------------------


def damage(content, rng):
    """One of many ways in which a file can be broken."""
    kind = rng.integers(5)
    if kind == 0:
        return content[:rng.integers(len(content))]
    if kind == 1:
        return b""
    if kind == 2:
        return bytes(len(content))
    content = bytearray(content)
    if kind == 3:
        content[:8] = rng.bytes(8)
    else:
        for place in rng.integers(0, min(len(content), 400), 20):
            content[place] = rng.integers(256)
    return bytes(content)


@pytest.mark.long
def test_any_damage_ends_in_one_line_or_in_slices(tmp_path):
    """200 random damages of a PNG, a JPEG, a NIfTI and an Analyze file: a BadSlice, or an image;
    no other error, and no endless reading."""
    rng = np.random.default_rng(0)
    (tmp_path / "v").mkdir()
    shades(0).save(tmp_path / "a.png")
    shades(0).save(tmp_path / "b.jpg")
    volume_file(tmp_path, SMALL, name="c.nii")
    volume_file(tmp_path, SMALL, name="d.nii.gz")
    analyze(anatomy(), tmp_path / "v", "OAS1_0001_MR1_mpr_n4_anon_111_t88_masked_gfc")
    files = [tmp_path / "a.png", tmp_path / "b.jpg", *sorted((tmp_path / "v").glob("[cd]*")),
             *sorted((tmp_path / "v").glob("*.hdr"))]
    assert len(files) == 5
    outcomes = []
    for path in files:
        content = path.read_bytes()
        for _ in range(40):
            path.write_bytes(damage(content, rng))
            try:
                if path.suffix in (".png", ".jpg"):
                    dataset.decode(path, 16)
                else:
                    volumes.cut_file(path, Cutting(4), str(path))
                outcomes.append(None)
            except BadSlice as error:
                outcomes.append(str(error))
                assert str(error).startswith(str(path)) and error.fix
    assert sum(outcome is not None for outcome in outcomes) > 120


def test_a_tar_that_is_cut_short_keeps_what_came_before(discs, tmp_path, run, rejected):
    tar = pack(discs, tmp_path / "disc1.tar.gz")
    content = tar.read_bytes()
    tar.write_bytes(content[:len(content) * 2 // 3])
    rejected("tools.prepare", [tar, tmp_path / "o", *FEW], "disc1.tar.gz: is cut short",
            "download it again")
    kept = {p.name for p in (tmp_path / "o" / ".staged").glob("OAS1_*") if p.is_dir()}
    assert kept and kept < set(SESSIONS)
    tar.write_bytes(content)
    run("prepare", tar, tmp_path / "o", *FEW)
    assert [r["session"] for r in table(tmp_path / "o")] == SESSIONS


def test_a_full_disk_is_no_damaged_tar(discs, tmp_path, rejected, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(shutil, "copyfileobj", full)
    rejected("tools.prepare", [pack(discs, tmp_path / "disc1.tar.gz"), tmp_path / "o"],
            "o: cannot be written (No space left", "free some space")


def test_half_a_volume_in_a_tar(discs, tmp_path, rejected):
    tar = pack(discs, tmp_path / "disc1.tar.gz", lambda files: sorted(
        p for p in files if p.name != "OAS1_0002_MR1_mpr_n4_anon_111_t88_masked_gfc.img"))
    rejected("tools.prepare", [tar, tmp_path / "o", *FEW],
            "OAS1_0002_MR1_mpr_n4_anon_111_t88_masked_gfc.hdr: is only one of .hdr and .img")


def test_permission_denied(tmp_path, rejected, monkeypatch):
    """By a stand-in, since nothing is denied to root."""
    path = source(tmp_path) / "case_001_slice_1.png"
    real = Image.open

    def denied(file, *args):
        if file == path:
            raise PermissionError(13, "Permission denied", str(file))
        return real(file, *args)
    monkeypatch.setattr(Image, "open", denied)
    rejected("tools.prepare", [tmp_path / "s", tmp_path / "o"],
            "case_001_slice_1.png: cannot be read (Permission denied)")


def test_odd_files_beside_good_ones(tmp_path, rejected, run):
    """A link to itself, a link to nowhere, a pipe, a folder called .png, a one-pixel image."""
    folder = source(tmp_path)
    (folder / "case_007_slice_0.png").symlink_to(folder / "case_007_slice_0.png")
    (folder / "case_007_slice_1.png").symlink_to("nowhere")
    os.mkfifo(folder / "case_007_slice_2.png")
    (folder / "case_007_slice_3.png").mkdir()
    Image.new("L", (1, 1), 7).save(folder / "case_007_slice_4.png")
    (folder / "loop").symlink_to(tmp_path / "s")
    rejected("tools.inspect", [tmp_path / "s", "--out", tmp_path / "i.png"], "5 of 11",
            *(f"case_007_slice_{i}.png" for i in range(5)))
    said = run("prepare", tmp_path / "s", tmp_path / "o", "--skip-bad")
    assert "case_007_slice_0.png" in said.err and len(pictures(tmp_path / "o")) == 6


@pytest.mark.long
def test_ten_thousand_tiny_files(tmp_path):
    """All of one subject and one pixel: named up to ten, with a count."""
    folder = tmp_path / "s"
    folder.mkdir()
    Image.new("L", (1, 1)).save(folder / "x.png")
    content = (folder / "x.png").read_bytes()
    (folder / "x.png").unlink()
    for index in range(10_000):
        (folder / f"case_001_slice_{index}.png").write_bytes(content)
    with pytest.raises(UserError, match="10000 of 10000 images cannot be used.*black") as caught:
        load_splits(folder, 16)
    assert str(caught.value).count("is entirely black") == 10


@pytest.mark.long
def test_inspect_finds_the_people_of_the_real_slices(oasis, tmp_path, run):
    said = run("inspect", oasis, "--out", tmp_path / "i.png").out
    for words in ("4800 slices   150 subjects", "480 slices    15 subjects", "176x208 JPEG 8 bits",
                  "no duplicates", "cannot be used: none"):
        assert words in said

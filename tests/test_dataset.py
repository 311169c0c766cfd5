"""Slices in, [-1, 1] out: layouts, padding, range, cache, batches, phantoms, and bad input."""

import math
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dataset
from dataset import (AUGMENTATIONS, Slices, augment, batch_indices, decode, draw_augmentations,
                     find_slices, load_images, load_splits, subject_of)
from utils import cache as cache_module
from utils.cli import UserError
from utils.files import locked
from utils.images import fit, images_in, is_label_map, read_gray
from utils.phantoms import draw_phantom, phantom_slices
from utils.pictures import to_uint8

CPU = torch.device("cpu")


def write(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def ramp(height=20, width=12, dtype=np.uint8):
    top = np.iinfo(dtype).max
    return np.linspace(0, top, height * width).reshape(height, width).round().astype(dtype)


# Decoding --------------------------------------------------------------------------------------


def test_square_by_black_padding_not_by_squashing(tmp_path):
    path = write(tmp_path / "a.png", np.full((208, 176), 200, np.uint8))
    image = fit(read_gray(path), 208)
    assert image.shape == (208, 208)
    assert (image[:, 16:192] == 200).all()
    assert (image[:, :16] == 0).all() and (image[:, 192:] == 0).all()


def test_resizing_is_antialiased(tmp_path):
    """One-pixel stripes must average to grey; taking every nth pixel would give black or white."""
    stripes = np.zeros((64, 64), np.uint8)
    stripes[:, ::2] = 255
    image = fit(read_gray(write(tmp_path / "a.png", stripes)), 16)
    assert abs(image[:, 2:-2].astype(float) - 127.5).max() < 12


def test_background_stays_black_when_resized(oasis):
    """No ringing: where a 13x13 neighbourhood of the slice is black, so is the small slice."""
    path = next((oasis / "train").iterdir())
    full = decode(path, 208)
    small = decode(path, 64)
    padded = np.pad(full, 8)
    for row in range(64):
        for column in range(64):
            y, x = round((row + 0.5) * 3.25), round((column + 0.5) * 3.25)
            if padded[y:y + 17, x:x + 17].max() == 0:
                assert small[row, column] == 0


def test_native_size_is_untouched(tmp_path):
    array = ramp()
    assert (decode(write(tmp_path / "a.png", array), None) == array).all()


@pytest.mark.parametrize("name", ["a.png", "a.PNG", "b.Tif", "c.BMP", "d.tiff"])
def test_lossless_formats_and_any_case(tmp_path, name):
    array = ramp()
    path = write(tmp_path / name, array)
    assert (decode(path, None) == array).all()
    assert images_in(tmp_path) == [path]


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_sixteen_bits(tmp_path, name):
    array = ramp(dtype=np.uint16)
    image = decode(write(tmp_path / name, array), None)
    assert np.abs(image - array / 257).max() <= 0.5
    assert image.min() == 0 and image.max() == 255
    square = decode(tmp_path / name, 20)
    assert square.shape == (20, 20) and (square[:, :4] == 0).all()


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "P", "1"])
def test_gray_in_other_modes(tmp_path, mode):
    array = np.repeat([[0], [255]], 5, axis=1).astype(np.uint8)
    Image.fromarray(array).convert(mode).save(tmp_path / "a.png")
    assert (fit(read_gray(tmp_path / "a.png"), None) == array).all()


def test_transparent_is_black(tmp_path):
    pixels = np.full((4, 4, 4), 255, np.uint8)
    pixels[:2, :, 3] = 0
    image = fit(read_gray(write(tmp_path / "a.png", pixels)), None)
    assert (image[:2] == 0).all() and (image[2:] == 255).all()


def test_range_and_shape_of_batches():
    images = np.array([0, 127, 128, 255], np.uint8).reshape(4, 1, 1).repeat(6, 1).repeat(5, 2)
    batch = Slices(images, list("abcd"), CPU)[np.array([3, 0, 1])]
    assert batch.shape == (3, 1, 6, 5) and batch.dtype == torch.float32
    assert batch[:, 0, 0, 0].tolist() == pytest.approx([1, -1, 127 / 127.5 - 1])


def test_every_grey_level_survives_the_round_trip():
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16)
    assert (to_uint8(Slices(levels, ["a"], CPU)[np.array([0])])[0, 0].numpy() == levels).all()
    assert to_uint8(torch.tensor([-7.0, 7.0, -1 + 0.6 / 127.5])).tolist() == [0, 255, 1]


# Layouts ---------------------------------------------------------------------------------------


def fill(folder, cases, suffix=".png"):
    for case in cases:
        for number in range(2):
            write(folder / f"case_{case:03d}_slice_{number}{suffix}", ramp())


def test_split_folders(tmp_path):
    for split, cases in (("train", (1, 2, 3)), ("validate", (4,)), ("test", (5,))):
        fill(tmp_path / split, cases, ".jpg")
    assert {s: len(f) for s, f in find_slices(tmp_path).items()} == \
        {"train": 6, "validate": 2, "test": 2}


def test_report_layout_and_stray_files(tmp_path):
    for split, case in (("train", 1), ("validate", 2), ("test", 3)):
        fill(tmp_path / f"keras_png_slices_{split}", (case,), ".nii.png")
        fill(tmp_path / f"keras_png_slices_seg_{split}", (case,), ".nii.png")
    (tmp_path / "keras_png_slices_train" / ".DS_Store.png").touch()
    (tmp_path / "keras_png_slices_train" / "notes.txt").touch()
    found = find_slices(tmp_path)
    assert [len(found[s]) for s in ("train", "validate", "test")] == [2, 2, 2]
    assert all("seg" not in path.parent.name for path in found["train"])


def test_flat_folder_is_split_by_person(tmp_path):
    fill(tmp_path, range(40))
    found = find_slices(tmp_path)
    subjects = {s: {subject_of(p) for p in files} for s, files in found.items()}
    assert sum(len(files) for files in found.values()) == 80
    assert [len(subjects[s]) for s in ("train", "validate", "test")] == [34, 4, 2]
    assert not subjects["train"] & subjects["validate"] and not subjects["train"] & subjects["test"]
    assert found == find_slices(tmp_path)


def test_shares_that_round_up_leave_somebody_to_train_on():
    for subjects in range(3, 12):
        split_of = dataset.assign_splits(map(str, range(subjects)), ratios=(0.02, 0.49, 0.49))
        assert set(split_of.values()) == set(dataset.SPLITS) and len(split_of) == subjects


@pytest.mark.parametrize("name, subject", [
    ("case_001_slice_0.nii.png", "case_001"), ("OAS1_0061_MR2_90.png", "OAS1_0061"),
    ("OAS30001_12_slice_3.png", "OAS30001"), ("sub-07_T1w_80.tif", "sub-07"), ("brain7.png", None)])
def test_subject_of(tmp_path, name, subject):
    assert subject_of(tmp_path / name) == subject


def test_numbers_of_any_length_are_slice_numbers():
    assert dataset.slice_number("case_001_slice_7.nii.png") == 7
    assert dataset.slice_number("7" * 400 + ".png") == 777_777_777
    Slices(np.zeros((1, 4, 4), np.uint8), ["7" * 400 + ".png"])


def test_a_case_that_is_no_decimal_number_has_no_class(tmp_path):
    (tmp_path / "cases.csv").write_text("case,cdr\n²,1\n3,0.5\n", encoding="utf-8")
    find = dataset.class_finder(tmp_path)
    assert find(Path("case_003_slice_0.png")) == "CDR 0.5" and find(Path("case_002_a.png")) == ""


def test_names_without_a_subject(tmp_path, capsys):
    """Plain numbers start anew in every split and state no subject: a risk in one folder."""
    for folder in (tmp_path / "a" / "train", tmp_path / "a" / "test", tmp_path / "b"):
        for number in range(4):
            write(folder / f"{number:04d}.png", ramp())
    assert len(find_slices(tmp_path / "a")["test"]) == 4
    assert not capsys.readouterr().err
    found = find_slices(tmp_path / "b")
    assert sum(len(files) for files in found.values()) == 4
    assert "warning: 4 names, such as 0000.png, state no subject" in capsys.readouterr().err


def test_a_person_in_two_splits_is_refused(tmp_path):
    fill(tmp_path / "train", (1, 2))
    fill(tmp_path / "validate", (2, 3))
    with pytest.raises(UserError, match="train and validate, such as case_002"):
        load_splits(tmp_path, None)


def test_real_slices(oasis):
    splits = load_splits(oasis, 64)
    assert {s: len(split.names) for s, split in splits.items()} == \
        {"train": 4800, "validate": 480, "test": 480}
    for images in (split.images.numpy() for split in splits.values()):
        corners = images[:, [0, 0, -1, -1], [0, -1, 0, -1]]
        assert (corners == 0).all()  # padded, black outside the head
        assert 40 < images.mean() < 80 and images.max() > 200
        assert (images.reshape(len(images), -1).max(1) > 100).all()


# The cache -------------------------------------------------------------------------------------


@pytest.fixture
def counted(tmp_path, monkeypatch):
    """Three slices, their cache folder, and a list that grows with every decoded slice."""
    files = [write(tmp_path / f"case_00{i}_slice_0.png", ramp() // (i + 1)) for i in range(3)]
    decoded = []
    real = dataset.decode
    monkeypatch.setattr(dataset, "decode", lambda *a: (decoded.append(a[0]), real(*a))[1])
    return files, tmp_path / "kept", decoded


def test_decoded_once(counted):
    files, cache, decoded = counted
    first = load_images(files, 16, cache)[0].copy()
    assert len(decoded) == 3
    assert (load_images(files, 16, cache)[0] == first).all() and len(decoded) == 3
    load_images(files, 8, cache)
    assert len(decoded) == 6


def test_many_at_once_decode_once(counted):
    """As the processes of a multi-GPU run do: one decodes, the others wait, and all share it."""
    files, cache, decoded = counted
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: load_images(files, 16, cache), range(4)))
    assert len(decoded) == 3
    assert all((images == found[0][0]).all() and crc == found[0][1] for images, crc in found)
    assert isinstance(found[0][0], np.memmap)


def test_a_full_disk_is_no_reason_to_stop(counted, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")
    files, cache, _ = counted
    monkeypatch.setattr(np.lib.format, "write_array_header_1_0", full)
    assert len(load_images(files, 16, cache)[0]) == 3 and not list(cache.glob("*.npy*"))
    assert "No space left" in capsys.readouterr().err


def test_each_slice_knows_its_height_and_its_person():
    names = [f"case_00{subject}_slice_{number}.png" for subject in (1, 2) for number in (4, 2, 6)]
    slices = Slices(np.zeros((6, 2, 2), np.uint8), names, CPU)
    assert slices.numbers.tolist() == [4, 2, 6] * 2
    assert slices.subjects == ["case_001"] * 3 + ["case_002"] * 3


def test_a_changed_file_is_decoded_again(counted):
    files, cache, decoded = counted
    load_images(files, 20, cache)
    write(files[1], ramp()[::-1])
    os.utime(files[1], ns=(1, 1))
    assert (load_images(files, 20, cache)[0][1, :, 4:16] == ramp()[::-1]).all()
    assert len(decoded) == 6


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_a_damaged_cache_is_decoded_again(counted, damage, capsys):
    files, cache, decoded = counted
    good = load_images(files, 16, cache)[0].copy()
    (kept,) = cache.glob("*.npy")
    content = bytearray(kept.read_bytes())
    content[-5] ^= 1
    kept.write_bytes({"flip": content, "cut": content[:-40], "empty": b""}[damage])
    assert (load_images(files, 16, cache)[0] == good).all()
    assert len(decoded) == 6 and "damaged" in capsys.readouterr().err
    load_images(files, 16, cache)
    assert len(decoded) == 6


def test_no_cache_folder_is_no_reason_to_stop(counted, capsys):
    files, cache, _ = counted
    cache.write_text("a file where the folder should be")
    assert len(load_images(files, 16, cache)[0]) == 3
    assert "warning" in capsys.readouterr().err


# Bad input -------------------------------------------------------------------------------------


def test_missing_and_empty_folders(tmp_path):
    with pytest.raises(UserError, match="nowhere: no such folder"):
        find_slices(tmp_path / "nowhere")
    with pytest.raises(UserError, match="neither train/"):
        find_slices(tmp_path)
    (tmp_path / "train").mkdir()
    with pytest.raises(UserError, match="train: holds no images"):
        find_slices(tmp_path)


def damaged(tmp_path, kind):
    path = tmp_path / f"case_001_slice_{kind}.jpg"
    write(path, np.random.default_rng(0).integers(0, 255, (64, 64), np.uint8))
    content = path.read_bytes()
    path.write_bytes({"text": b"not a picture", "cut": content[:len(content) // 2],
                      "zero": b""}[kind])
    return path


@pytest.mark.parametrize("kind", ["text", "cut", "zero"])
def test_unreadable_files_are_named(tmp_path, kind):
    path = damaged(tmp_path, kind)
    with pytest.raises(UserError, match=f"{path.name}: cannot be read"):
        load_images([path], 16)


def test_many_unreadable_files_are_named_up_to_ten(tmp_path):
    files = []
    for i in range(12):
        files.append(tmp_path / f"bad_{i:02d}.png")
        files[-1].write_text("x")
    with pytest.raises(UserError, match=r"12 of 12 images.*bad_00.*bad_09.*\.\.\..*--skip-bad"
                       ) as caught:
        load_images(files, 16)
    assert "bad_10" not in str(caught.value)


def test_native_needs_one_size(tmp_path):
    files = [write(tmp_path / "a.png", ramp()), write(tmp_path / "b.png", ramp(24, 12))]
    with pytest.raises(UserError, match="b.png: is 24x12.*others 20x12.*--image-size"):
        load_images(files, None)


def test_pixels_of_other_depths_are_refused(tmp_path):
    for pixels in (np.ones((4, 4), np.float32), np.full((4, 4), -5, np.int32),
                   np.full((4, 4), 70_000, np.int32)):
        with pytest.raises(UserError, match="a.tif: cannot be read .*neither 8 nor 16 bits"):
            decode(write(tmp_path / "a.tif", pixels), None)


def test_links_to_nowhere_and_pipes_are_named(tmp_path):
    (tmp_path / "link.png").symlink_to(tmp_path / "nowhere.png")
    os.mkfifo(tmp_path / "pipe.png")
    for name in ("link.png", "pipe.png"):
        with pytest.raises(UserError, match=f"{name}: cannot be read"):
            load_images([tmp_path / name], 16)


def test_an_endless_side_is_refused_before_it_is_padded(tmp_path):
    with pytest.raises(UserError, match="side of 9000 pixels"):
        decode(write(tmp_path / "a.png", np.zeros((1, 9000), np.uint8)), 16)


def test_splits_of_two_native_sizes_are_refused(tmp_path):
    write(tmp_path / "train" / "case_001_slice_0.png", ramp())
    write(tmp_path / "validate" / "case_002_slice_0.png", ramp(24, 12))
    with pytest.raises(UserError, match="train 20x12, validate 24x12.*--image-size"):
        load_splits(tmp_path, None)


def test_dark_sixteen_bit_slices_are_pointed_out(tmp_path, capsys):
    load_images([write(tmp_path / "a.png", (ramp(dtype=np.uint16) // 16))], 16)
    assert "12-bit" in capsys.readouterr().err


# Batches ---------------------------------------------------------------------------------------


def test_every_epoch_visits_every_slice_once():
    seen = np.concatenate([batch_indices(30, 5, 0, step) for step in range(12)])
    for epoch in np.split(seen, 2):
        assert sorted(epoch) == list(range(30))
    assert (seen[:30] != seen[30:]).any()


def test_order_is_a_pure_function_of_seed_and_step():
    late = batch_indices(31, 8, 5, 1000)
    assert (late == batch_indices(31, 8, 5, 1000)).all()
    assert (late != batch_indices(31, 8, 6, 1000)).any()
    assert (late != batch_indices(31, 8, 5, 1001)).any()
    together = np.concatenate([batch_indices(31, 8, 5, 2 * 1000 + half) for half in (0, 1)])
    assert (together == batch_indices(31, 16, 5, 1000)).all()


# Phantoms --------------------------------------------------------------------------------------


def test_phantoms_are_brains_of_a_kind():
    images, names = phantom_slices(64, 0, 12, 4)
    assert images.shape == (48, 64, 64) and images.dtype == np.uint8
    assert names[5] == "phantom_001_slice_1"
    assert (images[:, [0, 0, -1, -1], [0, -1, 0, -1]] == 0).all()
    assert (images[:, 0] == 0).all() and (images[:, -1] == 0).all()
    assert 0.4 < np.mean(images == 0) < 0.75
    whole = np.stack([np.histogram(i, [0, 1, 60, 120, 256])[0] for i in images]).mean(0)
    assert (whole > 40).all()  # background, fluid, grey matter, white matter


def test_phantoms_depend_on_person_and_position_alone():
    one = draw_phantom(32, 3, 0.5)
    assert (one == draw_phantom(32, 3, 0.5)).all()
    assert (phantom_slices(32, 3, 1, 1)[0][0] == one).all()
    assert (one != draw_phantom(32, 4, 0.5)).any() and (one != draw_phantom(32, 3, 0.6)).any()


# Augmentation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name, back", {
    "flip": lambda x, y: (-x, y),
    "rotation": lambda x, y: (x * math.cos(math.radians(5)) - y * math.sin(math.radians(5)),
                              x * math.sin(math.radians(5)) + y * math.cos(math.radians(5))),
    "scale": lambda x, y: (x / 1.05, y / 1.05),
    "aspect ratio": lambda x, y: (x / 1.025, y * 1.025),
    "shift across": lambda x, y: (x + 0.04 * 88, y),
    "shift down": lambda x, y: (x, y + 0.04 * 104),
}.items())
def test_augmentation_of_a_formula_is_the_formula_elsewhere(name, back):
    """Each at its largest, of a smooth picture: its value at (x, y), in pixels from the middle, is
    that of the original at back(x, y)."""
    def picture(x, y):
        return 0.5 * np.exp(-((x - 25) ** 2 + (y + 15) ** 2) / 1500) + 0.3 * np.sin(x / 40 + y / 60)
    y, x = np.mgrid[0:104, 0:88].astype(float)
    x, y = x - 43.5, y - 51.5
    parameters = torch.zeros(1, 6)
    parameters[0, AUGMENTATIONS.index(name)] = 1
    image, expected = (torch.from_numpy(picture(*at)).float()[None, None] for at in
                       ((x, y), back(x, y)))
    inner = (..., slice(12, -12), slice(12, -12))  # away from the black outside
    assert (expected - image)[inner].abs().max() > 0.02
    torch.testing.assert_close(augment(image, parameters)[inner], expected[inner],
                               atol=2e-3, rtol=0)  # of bicubic interpolation


def test_augmentation_leaves_the_rest_alone_and_is_a_function_of_its_seed():
    images = torch.rand(64, 1, 16, 12) * 2 - 1
    first, second = (draw_augmentations(64, 0.2, torch.Generator().manual_seed(5)) for _ in "ab")
    assert torch.equal(first, second) and (first.abs() <= 1).all()
    untouched = ~first.any(1)
    assert 5 < untouched.sum() < 40 and torch.equal(augment(images, first)[untouched],
                                                    images[untouched])
    many = draw_augmentations(20_000, 0.2, torch.Generator().manual_seed(0))
    assert ((many != 0).float().mean(0) - 0.2).abs().max() < 0.02
    assert many[:, 1:].mean(0).abs().max() < 0.01  # no direction is preferred


def test_classes_come_from_cases_csv(data):
    (data / "cases.csv").write_text("case,split,diagnosis\n1,train,mild dementia (CDR 1)\n"
                                    "2,train,non-demented (CDR 0)\n3,train,\n")
    split = dataset.load_splits(data, 16)["train"]
    assert split.classes == ["CDR 1"] * 4 + ["CDR 0"] * 4 + [""] * 4


def test_bright_vessels_make_no_label_map(tmp_path):
    """0.3% of the head are ten times as bright as the rest, which has 16 grey levels."""
    rng = np.random.default_rng(0)
    pixels = np.zeros((100, 100), np.uint8)
    pixels[20:80, 20:80] = rng.integers(10, 26, (60, 60))
    pixels[30, 30:40] = 255
    assert not is_label_map(pixels)
    labels = np.zeros((100, 100), np.uint8)
    labels[20:80, 20:80] = 60 * rng.integers(1, 4, (60, 60))
    Image.fromarray(labels).save(tmp_path / "case_001_slice_0.png")
    with pytest.raises(UserError, match="--few-levels"):
        load_images([tmp_path / "case_001_slice_0.png"], None)
    images, _ = load_images([tmp_path / "case_001_slice_0.png"], None, few_levels=True)
    assert (images[0] == labels).all()


def test_pictures_that_are_equal_only_when_small_are_two(tmp_path):
    rng = np.random.default_rng(0)
    for split, case in (("train", 1), ("validate", 2)):
        (tmp_path / split).mkdir()
        pixels = np.full((64, 64), 100, np.uint8)
        pixels[::2] += 10  # the mean is all that one pixel keeps
        pixels[:, case] = rng.integers(0, 255, 64)
        Image.fromarray(pixels).save(tmp_path / split / f"case_{case:03d}_slice_0.png")
    same = [np.full((1, 4, 4), 7, np.uint8)] * 2
    files = {split: sorted((tmp_path / split).iterdir()) for split in ("train", "validate")}
    loaded = {split: Slices(images, [files[split][0].name])
              for split, images in zip(files, same)}
    keys = [key for _, key, _ in dataset.picture_keys(loaded, files)]
    assert keys[0] != keys[1]
    files["validate"][0].write_bytes(files["train"][0].read_bytes())
    keys = [key for _, key, _ in dataset.picture_keys(loaded, files)]
    assert keys[0] == keys[1]


def test_the_least_recently_used_sets_leave_the_cache(data, tmp_path, monkeypatch):
    folder = tmp_path / "kept"
    files = sorted((data / "train").iterdir())
    for size in (16, 17, 18):
        load_images(files, size, folder)
    (folder / "notes.npy").write_bytes(bytes(10_000))  # not ours
    features = folder / ("ab" * 12 + ".features.npy")
    features.write_bytes(bytes(10))
    os.utime(features, (1e8, 1e8))
    kept = {size: dataset.cache_file(files, size, folder) for size in (16, 17, 18)}
    for age, size in enumerate((16, 18, 17)):
        os.utime(kept[size], (1e9 - age, 1e9 - age))
    load_images(files, 17, folder)  # now used last
    monkeypatch.setattr(cache_module, "CACHE_LIMIT", 2 * kept[18].stat().st_size)
    cache_module.prune_cache(folder)
    assert {size: path.exists() for size, path in kept.items()} == {16: True, 17: True, 18: False}
    assert not features.exists()
    cache_module.prune_cache(folder, 0)
    assert kept[17].exists() and (folder / "notes.npy").exists()


def test_a_lock_holds_for_those_who_came_while_others_waited(tmp_path):
    """A lock file that is removed lets a third process in while the second one works."""
    path, inside, most = tmp_path / "lock", [], []

    def work():
        with locked(path):
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.02)
            inside.pop()
    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
        time.sleep(0.01)
    for thread in threads:
        thread.join()
    assert max(most) == 1 and len(most) == 8

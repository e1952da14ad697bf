"""Data sets in every supported layout, batches and image transforms."""

import collections
import filecmp
import multiprocessing
import os
import pathlib
import re
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from torchvision import transforms

import data

# ------------------------------------------------------------------------------------------- folders


def test_a_flat_folder_is_split_by_class(tmp_path, write_tree):
    write_tree(tmp_path, {"b": 3, "a": 2, "group/d": 4, "group/c": 2, ".thumbnails": 2, "a/.hidden": 2, "@eaDir/a": 2})
    train, test = data.load("folder", str(tmp_path))
    assert train.classes == ["a", "b"] and test.classes == ["group/c", "group/d"]
    assert train.labels == [0, 0, 1, 1, 1] and test.labels == [0, 0, 1, 1, 1, 1]
    assert train.paths[:3] == [str(tmp_path / name) for name in ("a/0.png", "a/1.png", "b/0.png")]
    assert train[1:3] == data.Split(train.paths[1:3], [0, 1], ["a", "b"])
    query, gallery = data.Split(["1", "2"], [0, 1], ["c", "d"]), data.Split(["3"], [1], ["c", "d"])
    assert data.queries_without_match(data.RetrievalSplits(train, query, gallery)) == 1


def test_train_and_test_directories_win_over_halves(tmp_path, write_tree, capsys):
    write_tree(tmp_path, {f"train/{name}": 2 for name in "abcde"} | {"test/x": 1, "test/y": 3, "test/z": 1})
    splits = data.load("folder", str(tmp_path))
    assert [split.classes for split in splits] == [list("abcde"), list("xyz")] and splits.test.labels == [0, 1, 1, 1, 2]
    assert data.queries_without_match(splits) == 2 and capsys.readouterr().out == ""
    write_tree(tmp_path, {"valid/a": 2, "val": 1})
    (tmp_path / "sheet.png").touch()
    assert data.load("folder", str(tmp_path)) == splits
    assert capsys.readouterr().out == "left out: images in ., val, valid, beside train and test\n"
    train, test = data.load("folder", str(tmp_path), validation=True)
    assert train.classes == ["a", "b"] and test.classes == ["c", "d", "e"] and test.labels == [0, 0, 1, 1, 2, 2]
    assert test.paths == splits.train.paths[4:]


@pytest.mark.parametrize(
    "classes, message",
    [
        ("", "no images in it"),
        ("a b c", "3 class.*, at least 4 are needed"),
        ("train/a test/b test/c", "1 class.* in the train split"),
        ("train/a train/b test", "1 class.* in the test split"),
        ("train/a train/b test/b test/c", "1 class.* in both training and test, such as b;"),
        ("train/x/a train/x/b test/y/a test/y/b", "2 class.* in both training and test, such as a, b;"),
        ("Train/a Train/b Test/c Test/d", "found Test, Train; give a directory that holds train/ and test/ only"),
        ("train/a train/b test/c test/d more/e", "found more beside train and test"),
        ("shop/training/a shop/training/b shop/testing/c d", "found shop/testing, shop/training;"),
        ("cars_train/a cars_train/b cars_test/c cars_test/VALID", "found cars_test, cars_test/VALID, cars_train;"),
        (". a b c", "3 class.*, at least 4 are needed"),
        ("a b one1 one2", "no query has another image of its class"),
    ],
)
def test_an_unusable_folder_is_named(classes, message, tmp_path, write_tree):
    write_tree(tmp_path, {name: 1 if name.startswith("one") else 2 for name in classes.split()})
    with pytest.raises(ValueError, match=f"^{tmp_path}: {message}"):
        data.load("folder", str(tmp_path))


@pytest.mark.parametrize(
    "classes, said",
    [
        ("bullet_train steam_train testarossa valley", "$"),
        ("train/a train/train test/b test/test", "$"),
        ("Greek/1 Greek/2 Korean/1 Korean/2 Korean/3 Latin/1", "2 class name.*, such as 1; they count as different"),
        ("a/images b/images c/images d/images", "1 class name.*, such as images; they count as different"),
    ],
)
def test_classes_may_resemble_splits_or_share_names(classes, said, tmp_path, write_tree, capsys):
    root = write_tree(tmp_path / "train" / "Test", {name: 2 for name in classes.split()})
    assert sum(len(split.classes) for split in data.load("folder", str(root))) == len(classes.split())
    assert re.match(said, capsys.readouterr().out)


def test_links_are_followed_and_no_directory_is_read_twice(tmp_path, write_tree):
    root = write_tree(tmp_path / "root", {"a": 2, "b": 2, "c": 2})
    write_tree(tmp_path, {"elsewhere/d": 2, "beside": 2})
    (root / "c" / "album.jpg").mkdir()
    (root / "c" / "0.jpg").symlink_to(root / "c" / "0.png")
    for link, target in {"d": "../elsewhere/d", "e": "a", "latest": ".", "b/up": tmp_path, "d/back": root}.items():
        (root / link).symlink_to(target)
    train, test = data.load("folder", str(root))
    assert train.classes == ["a", "b"] and test.classes == ["c", "d"] and test.labels == [0, 0, 0, 1, 1]


def test_only_regular_files_are_images(tmp_path, write_tree):
    os.mkfifo(write_tree(tmp_path, {name: 2 for name in "abcd"}) / "a" / "9.png")
    with pytest.raises(FileNotFoundError, match=f"^{tmp_path}/a/9.png: missing, not permitted or no regular file"):
        data.load("folder", str(tmp_path))


def test_files_that_are_no_images_are_counted(tmp_path, write_tree, capsys):
    write_tree(tmp_path, {name: 2 for name in "abcd"})
    for name in ("x.jfif", "x.JPE", "x.avif", "x.webp", "x.heic", "y.HEIC", "x", "notes.txt", ".DS_Store", "._x.jpg"):
        (tmp_path / "a" / name).touch()
    assert [len(split) for split in data.load("folder", str(tmp_path))] == [8, 4]
    assert sorted(capsys.readouterr().out[10:-1].split(", ")) == ["1 .txt", "1 without a suffix", "2 .heic"]


def test_a_missing_root_is_named(tmp_path):
    with pytest.raises(OSError, match=f"^{tmp_path}/x: cannot be read .no such file or directory.; check"):
        data.load("folder", str(tmp_path / "x"))


# ---------------------------------------------------------------------------------------- benchmarks

# The name of each image begins with the number of its class.


def save(path, lines=(), start="", ends="\n"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes((start + ends.join([*lines, ""])).encode())


def write_cub(root, lists=True, **style):
    base, names, labels = root / "CUB_200_2011", [], []
    for n, label in enumerate(np.repeat([1, 2, 99, 100, 101, 102, 199, 200], 3), 1):
        names.append(f"{n} {label:03d}.Bird/{label}_{n}.jpg")
        labels.append(f"{n} {label}")
        save(base / "images" / names[-1].split()[1])
    save(base / "images" / "001.Bird" / "._1_1.jpg")
    if lists:
        save(base / "images.txt", names, **style)
        save(base / "image_class_labels.txt", labels, **style)


def write_cars(root, devkit=None, nested=False):
    base, path, lists = root / "cars196", "relative_im_path", {"car_ims": "cars_annos.mat"}
    if devkit is not None:
        path = "fname"
        lists = dict(cars_train=f"{devkit}cars_train_annos.mat", cars_test="cars_test_annos_withlabels.mat")
    for top, file in lists.items():
        rows = []
        for n, label in enumerate(np.repeat([1, 2, 97, 98, 99, 100, 195, 196], 4 // len(lists))):
            name = f"{label}_{top}{n}.jpg"
            save(base / top / (top if nested else "") / name)
            rows.append((label, f"{top}/{name}" if devkit is None else name))
        save(base / file)
        savemat(base / file, {"annotations": np.array(rows, dtype=[("class", object), (path, object)])[None]})


def write_sop(root, **style):
    base = root / "Stanford_Online_Products"
    for name, first in (("train", 1), ("test", 11319)):
        lines = ["image_id class_id super_class_id path"]
        for label in np.repeat(range(first, first + 12), 3):
            lines.append(f"{first + len(lines)} {label} 1 bicycle_final/{label}_{len(lines)}.JPG")
            save(base / lines[-1].split()[-1])
        save(base / f"Ebay_{name}.txt", lines, **style)


def write_inshop(root, top="InShop_Clothes", lists="", images="Img", **style):
    lines = ["32", "image_name                item_id evaluation_status"]
    for item, n in np.ndindex(8, 4):
        part = "train" if item < 5 else ("query" if n <= item % 2 else "gallery")
        lines.append(f"img/WOMEN/{item + 1}_{n}_front.jpg{' ' * (3 + n)}id_{item + 1:08d}   {part}  ")
        save(root / top / images / lines[-1].split()[0])
    save(root / top / lists / "list_eval_partition.txt", lines, **style)


WINDOWS = dict(start="\ufeff", ends="\r\n")
LAYOUTS = [
    (write_cub, {}),
    (write_cub, dict(lists=False)),
    (write_cars, {}),
    (write_cars, dict(devkit="")),
    (write_cars, dict(devkit="devkit/", nested=True)),
    (write_cars, dict(devkit="car_devkit/devkit/")),
    (write_sop, WINDOWS),
    (write_inshop, {}),
    (write_inshop, dict(top="Inshop_Clothes", lists="Eval", images="")),
    (write_inshop, dict(top="In-shop Clothes Retrieval Benchmark", **WINDOWS)),
]
COUNTS = dict(cub=[(12, 4)] * 2, cars=[(16, 4)] * 2, sop=[(36, 12)] * 2, inshop=[(20, 5), (5, 3), (7, 3)])


@pytest.mark.parametrize("write, options", LAYOUTS)
@pytest.mark.parametrize("inner", [False, True], ids=["from its parent", "from inside"])
def test_every_layout_is_found_and_split(write, options, inner, tmp_path):
    dataset = write.__name__[6:]
    write(tmp_path, **options)
    (base,) = tmp_path.iterdir()
    splits = data.load(dataset, str(base if inner else tmp_path))
    assert [(len(split), len(split.classes)) for split in splits] == COUNTS[dataset]
    assert list(data.sizes(splits).values()) == [n for column in zip(*COUNTS[dataset]) for n in column]
    assert data.sizes(splits).keys() == data.FULL_SIZES[dataset].keys()
    assert not set(splits[0].classes) & set(splits[1].classes) and splits[1].classes == splits[-1].classes
    for split in splits:
        assert len(set(split.paths)) == len(split.labels) and set(split.labels) == set(range(len(split.classes)))
        for path, label in zip(split.paths, split.labels):
            assert re.search("[1-9][0-9]*", split.classes[label])[0] == os.path.basename(path).split("_")[0]


@pytest.mark.parametrize(
    "write, file, change, message",
    [
        (write_cub, "images", None, "CUB_200_2011/images is missing; unpack CUB"),
        (write_cub, "image_class_labels.txt", None, "labels.txt: cannot be read .no such file or directory.; check"),
        (write_cub, "images.txt", ("3 001", "33 001"), "labels.txt: does not list the same images as"),
        (write_cars, "cars_annos.mat", ("MATLAB", "junk"), "cars_annos.mat: no Cars196 list with class labels"),
        (write_cars, "cars_annos.mat", ("class", "group"), "cars_annos.mat: no Cars196 list .*ValueError: no field"),
        (write_sop, "Ebay_train.txt", ("image_id", "1"), "Ebay_train.txt: expected the columns .* line 1"),
        (write_sop, "Ebay_train.txt", (" 1 1 ", " 1 "), "Ebay_train.txt: expected the columns .* 3 were"),
        (write_sop, "Ebay_test.txt", (" 11319 ", " 1 "), "1 class.* in both training and test, such as 1;"),
        (write_inshop, "list_eval_partition.txt", ("32", "33"), "txt: line 1 must be the number of images, 32"),
        (write_inshop, "list_eval_partition.txt", (" query", " val"), "txt: every evaluation_status must"),
    ],
)
def test_missing_or_malformed_files_are_named(write, file, change, message, tmp_path):
    write(tmp_path)
    path = next(tmp_path.iterdir()) / file
    if change:
        path.write_text(path.read_text("latin1").replace(*change, 1), "latin1")
    else:
        path.rename(path.with_name("other"))
    with pytest.raises((ValueError, OSError), match=f"^{tmp_path}.*{message}") as error:
        data.load(write.__name__[6:], str(tmp_path))
    assert "\n" not in str(error.value)


def test_full_sizes_add_up_to_the_whole_sets():
    sums = dict(cub=(11788, 200), cars=(16185, 196), sop=(120053, 22634), inshop=(52712, 7982 + 3985))
    for name, full in data.FULL_SIZES.items():
        assert sums[name] == tuple(sum(n for key, n in full.items() if word in key) for word in ("images", "classes"))


# ----------------------------------------------------------------------------------------------- toy


@pytest.fixture
def small_toy(monkeypatch):
    monkeypatch.setattr(data, "TOY_CLASSES", 6)
    monkeypatch.setattr(data, "TOY_IMAGES", 2)


def test_the_toy_set_is_written_once_and_always_the_same(tmp_path, small_toy, monkeypatch):
    train, test = data.load("toy", str(tmp_path / "one"))
    data.load("toy", str(tmp_path / "other"))
    assert (len(train), len(test)) == (6, 6) and not set(train.classes) & set(test.classes)
    for path in train.paths + test.paths:
        assert filecmp.cmp(path, path.replace("one", "other"), shallow=False)
    pixels = np.stack([np.asarray(data.open_image(path)) for path in train.paths])
    assert pixels.sum() == pytest.approx(8613961, rel=1e-4)  # Pillow may change how it draws edges
    monkeypatch.setattr(data, "write_toy", None)
    assert data.load("toy", str(tmp_path / "one")).train == train


def test_processes_may_write_the_toy_set_at_the_same_time(tmp_path, small_toy):
    with multiprocessing.get_context("fork").Pool(3) as pool:
        pool.starmap(data.load, [("toy", str(tmp_path))] * 3, chunksize=1)
    assert [path.name for path in tmp_path.iterdir()] == ["toy-v1"]


# ------------------------------------------------------------------------------------------- batches

LABELS = [0] * 7 + [1] * 2 + [2] * 9 + [3] * 3 + [4] * 6


def test_shuffled_batches_take_each_image_once_at_most():
    batches = data.TrainBatches(LABELS, batch_size=4, images_per_class=0, seed=0)
    taken = [index for batch in batches for index, _ in batch]
    assert len(batches) == 6 and len(taken) == len(set(taken)) == 24 and taken != sorted(taken)


def test_balanced_batches_repeat_images_of_small_classes_only():
    batches = data.TrainBatches(LABELS, batch_size=8, images_per_class=4, seed=0)
    drawn = collections.Counter()
    for epoch in range(20):
        batches.epoch = epoch
        assert len(list(batches)) == len(batches) == 3
        for batch in batches:
            classes = collections.Counter(LABELS[index] for index, _ in batch)
            distinct = collections.Counter(LABELS[index] for index in {index for index, _ in batch})
            assert sorted(classes.values()) == [4, 4]
            assert all(distinct[c] == 4 for c in classes if LABELS.count(c) >= 4)
            drawn.update(classes.keys())
    assert max(drawn.values()) - min(drawn.values()) <= 10  # 120 draws of 5 classes, 24 each on average


def test_an_epoch_follows_from_its_seed_and_number():
    def draw(seed, epoch):
        batches = data.TrainBatches(LABELS, 8, 4, seed)
        batches.epoch = epoch
        return list(batches)

    assert draw(1, 3) == draw(1, 3) != draw(1, 4) != draw(2, 4)
    assert len({seed for batch in draw(1, 3) for _, seed in batch}) == 24


def test_impossible_batches_are_refused():
    assert len(data.TrainBatches(LABELS, 27, 0, 0)) == len(data.TrainBatches(LABELS, 20, 4, 0)) == 1
    with pytest.raises(ValueError, match="--batch-size 28 is more than the 27 training images"):
        data.TrainBatches(LABELS, 28, 0, 0)
    with pytest.raises(ValueError, match="--batch-size 24 needs 6 classes, but 5 train; use a smaller one"):
        data.TrainBatches(LABELS, 24, 4, 0)


# -------------------------------------------------------------------------------------------- images


@pytest.mark.parametrize("shape", [(60, 44), (37, 43), (131, 300)])
def test_test_images_are_torchvisions_up_to_normalize(shape, tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8))
    image.save(tmp_path / "image.png")
    split = data.Split([str(tmp_path / "image.png")] * 3, [0, 1, 1], ["a", "b"])
    (images, labels), (_, last) = data.test_loader(split, 2, 32, 0)
    assert images.dtype == torch.uint8 and labels.dtype == torch.int64 and labels.tolist() + last.tolist() == [0, 1, 1]
    steps = [transforms.Resize(37), transforms.CenterCrop(32), transforms.ToTensor()]
    steps.append(transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    expected = transforms.Compose(steps)(image).expand(2, 3, 32, 32)
    torch.testing.assert_close(data.normalize(images), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_training_images_are_torchvisions_crops_and_half_of_them_are_flipped(num_workers, tmp_path, write_tree):
    split = data.load("folder", str(write_tree(tmp_path, {"a": 24, "b": 24, "c": 2, "d": 2}))).train
    batches, flips = data.TrainBatches(split.labels, 12, 0, seed=0), 0
    loader = data.train_loader(split, batches, 32, 0.2, num_workers)
    crop = transforms.RandomResizedCrop(32, scale=(0.2, 1))
    for images, batch in [*zip(loader, batches), *zip(loader, batches)]:  # images are decoded, then cached
        for pixels, (index, seed) in zip(images[0], batch):
            torch.manual_seed(seed)
            expected = transforms.functional.pil_to_tensor(crop(data.open_image(split.paths[index])))
            flipped = not torch.equal(pixels, expected)
            assert torch.equal(pixels, expected.flip(2) if flipped else expected)
            flips += flipped
    assert 30 < flips < 66


def test_images_become_rgb_on_white_as_stored(tmp_path):
    rgba = np.full((3, 24, 4), (200, 100, 50, 255), np.uint8)
    rgba[:2, :, 3] = [[0], [128]]
    levels, turned = rgba[..., 3].astype(np.int32), Image.Exif()
    turned[274] = 6
    arrays = rgba, rgba[..., :3], rgba[..., 3], (levels * 128).astype(np.uint16), levels * 90000 - 9
    image, rgb, grey, deep, integers = map(Image.fromarray, arrays)
    floats = Image.fromarray((levels / 1000 - 0.1).astype(np.float32))
    white, half, solid, ramp = [255] * 3, [227, 177, 152], [200, 100, 50], [[0] * 3, [128] * 3, [255] * 3]
    dark = [[0] * 3, [63] * 3, [127] * 3]  # half of what 16 bits hold
    for image, name, options, expected in (
        (image, "rgba.png", {}, [white, half, solid]),
        (image.quantize(8), "palette.png", {}, [white, half, solid]),
        (image.convert("LA"), "grey.png", {}, [white, [189] * 3, [124] * 3]),
        (rgb.quantize(2), "index.gif", dict(transparency=rgb.quantize(2).getpixel((0, 0))), [white] * 3),
        (grey, "level.png", dict(transparency=0), [white, *ramp[1:]]),
        (deep, "deep.png", dict(transparency=0), [white, *dark[1:]]),
        *((deep, f"deep.{suffix}", {}, dark) for suffix in ("png", "tif", "pgm")),
        (integers, "integers.tif", {}, ramp),
        (floats, "floats.tif", {}, ramp),
        *((rgb.convert(mode), "x.tif", {}, [solid] * 3) for mode in ("CMYK", "YCbCr", "LAB")),
        (rgb, "frames.gif", dict(save_all=True, append_images=[Image.new("RGB", rgb.size)]), [solid] * 3),
        (rgb, "turned.png", dict(exif=turned), [solid] * 3),
    ):
        image.save(tmp_path / name, **options)
        pixels = np.asarray(data.open_image(str(tmp_path / name)))
        np.testing.assert_allclose(pixels, np.repeat([expected], 24, 0).swapaxes(0, 1), atol=1, err_msg=name)


def test_every_error_of_an_image_names_its_file_once(tmp_path):
    Image.new("1", (1, 1000)).save(tmp_path / "profile.png")
    png, chunk = (tmp_path / "profile.png").read_bytes(), b"iCCPk\0"  # an empty profile
    chunk = struct.pack(">I4s2sI", 2, chunk[:4], chunk[4:], zlib.crc32(chunk))
    (tmp_path / "profile.png").write_bytes(png[:-12] + chunk + png[-12:])
    (tmp_path / "empty.png").touch()
    Image.fromarray(np.full((8, 8), np.nan, np.float32)).save(tmp_path / "nan.tif")
    Image.fromarray(np.full((8, 8), 7, np.int32)).save(tmp_path / "flat.tif")
    Image.new("1", (1, 1001)).save(tmp_path / "thin.png")
    broken = "cannot be read as an image ({}); repair or remove it"
    for name, reason in {
        "missing.png": "cannot be read (no such file or directory)",
        "empty.png": broken.format("UnidentifiedImageError: cannot identify image file"),
        "profile.png": broken.format("IndexError: index out of range"),
        "nan.tif": broken.format("ValueError: its pixels range from nan to nan"),
        "flat.tif": broken.format("ValueError: its pixels range from 7 to 7"),
        "thin.png": broken.format("ValueError: 1 x 1001 pixels, too narrow to resize"),
    }.items():
        with pytest.raises(data.UnreadableImage, match=f"^{re.escape(f'{tmp_path / name}: {reason}')}$"):
            data.open_image(str(tmp_path / name))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_error_in_a_loader_names_the_file_in_its_last_line(num_workers, tmp_path, write_tree, monkeypatch):
    def refuse(*_):
        raise MemoryError

    split = data.load("folder", str(write_tree(tmp_path, {"a": 2, "b": 2, "c": 2, "d": 2}))).test
    monkeypatch.setattr(transforms.CenterCrop, "forward", refuse)
    with pytest.raises(data.UnreadableImage) as error:
        list(data.test_loader(split, 2, 32, num_workers))
    last = str(error.value).strip().splitlines()[-1].removeprefix("data.UnreadableImage: ")
    assert last == f"{split.paths[0]}: cannot be read as an image (MemoryError); repair or remove it"

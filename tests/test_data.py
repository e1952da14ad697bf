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


def test_train_and_test_directories_win_over_halves(tmp_path, write_tree, capsys):
    write_tree(tmp_path, {"train/a": 2, "train/b": 2, "train/c": 2, "test/d": 2, "test/e": 2})
    train, test = data.load("folder", str(tmp_path))
    assert train.classes == ["a", "b", "c"] and test.classes == ["d", "e"] and test.labels == [0, 0, 1, 1]
    assert capsys.readouterr().out == ""
    write_tree(tmp_path, {"valid/a": 2, "val": 1})
    (tmp_path / "sheet.png").touch()
    assert data.load("folder", str(tmp_path)) == (train, test)
    assert capsys.readouterr().out == "left out: images in ., val, valid, beside train and test\n"


def test_validation_splits_the_training_classes_in_half(tmp_path, write_tree):
    write_tree(tmp_path, {f"train/{name}": 2 for name in "abcde"} | {"test/x": 2, "test/y": 2})
    train, test = data.load("folder", str(tmp_path), validation=True)
    assert train.classes == ["a", "b"] and test.classes == ["c", "d", "e"]
    assert test.labels == [0, 0, 1, 1, 2, 2]
    assert [pathlib.Path(path).parent.name for path in test.paths] == ["c", "c", "d", "d", "e", "e"]


def test_queries_without_a_match_are_counted(tmp_path, write_tree):
    write_tree(tmp_path, {"train/a": 2, "train/b": 2, "test/c": 1, "test/d": 3, "test/e": 1})
    assert data.queries_without_match(data.load("folder", str(tmp_path))) == 2
    query, gallery = data.Split(["1", "2"], [0, 1], ["c", "d"]), data.Split(["3"], [1], ["c", "d"])
    assert data.queries_without_match(data.RetrievalSplits(None, query, gallery)) == 1


@pytest.mark.parametrize(
    "classes, message",
    [
        ("", "no images in it"),
        ("a", "1 class.*, at least 4 are needed"),
        ("train/a test/b test/c", "1 class.* in the train split"),
        ("train/a train/b test", "1 class.* in the test split"),
        ("train/a train/b test/b test/c", "1 class.* in both training and test, such as b;"),
        ("train/x/a train/x/b test/y/a test/y/b", "2 class.* in both training and test, such as a, b;"),
        ("fold1/a fold1/b fold2/a fold2/b", "2 class.* in both training and test, such as a, b;"),
        ("Train/a Train/b Test/c Test/d", "found Test, Train; give a directory that holds train/ and test/ only"),
        ("training/a training/b c d", "found training;"),
        ("train/a train/b val/c val/d", "found train, val;"),
        ("train/a train/b test/c test/d more/e", "found test, train;"),
        ("shop/train/a shop/train/b shop/test/c shop/test/d", "found shop/test, shop/train;"),
        ("a/testing b/VALID c d", "found a/testing, b/VALID;"),
        ("cars_train/a cars_train/b cars_test/c cars_test/d", "found cars_test, cars_train;"),
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


@pytest.mark.parametrize("write", [os.mkfifo, lambda path: path.symlink_to("/nowhere")], ids=["pipe", "broken link"])
def test_only_regular_files_are_images(write, tmp_path, write_tree):
    write(write_tree(tmp_path, {name: 2 for name in "abcd"}) / "a" / "9.png")
    with pytest.raises(FileNotFoundError, match=f"^{tmp_path}/a/9.png: missing or not a regular file"):
        data.load("folder", str(tmp_path))


def test_an_unreadable_directory_is_an_error(tmp_path, write_tree, monkeypatch):
    scandir = os.scandir

    def refuse(path):  # in place of chmod, which does not stop root
        if os.path.basename(path) == "d":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    write_tree(tmp_path, {name: 2 for name in "abcde"})
    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(OSError, match=rf"^{tmp_path}/d: cannot be read \(permission denied\); check --data-root$"):
        data.load("folder", str(tmp_path))


def test_files_that_are_no_images_are_counted_in_one_process(tmp_path, write_tree, capsys, monkeypatch):
    write_tree(tmp_path, {name: 2 for name in "abcd"})
    for name in ("x.jfif", "x.JPE", "x.avif", "x.webp", "x.heic", "y.HEIC", "x", "notes.txt", ".DS_Store", "._x.jpg"):
        (tmp_path / "a" / name).touch()
    assert [len(split) for split in data.load("folder", str(tmp_path))] == [8, 4]
    assert sorted(capsys.readouterr().out[10:-1].split(", ")) == ["1 .txt", "1 without a suffix", "2 .heic"]
    monkeypatch.setenv("RANK", "1")
    data.load("folder", str(tmp_path))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("dataset", ["cub", "cars", "sop", "inshop", "folder"])
def test_a_missing_root_is_named(dataset, tmp_path):
    with pytest.raises(OSError, match=f"^{tmp_path}/missing: .*--data-root"):
        data.load(dataset, str(tmp_path / "missing"))


# ---------------------------------------------------------------------------------------- benchmarks


def save(path, lines=(), start="", ends="\n"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes((start + ends.join([*lines, ""])).encode())


def save_annotations(path, rows, fields):
    table = np.array(rows, dtype=[(name, object) for name in fields.split()])[None]
    path.parent.mkdir(parents=True, exist_ok=True)
    savemat(path, {"annotations": table})


def write_cub(root, lists=True, **style):
    base, names, labels = root / "CUB_200_2011", [], []
    for label in (1, 2, 3, 4, 101, 102, 150, 200):
        for n in range(3):
            names.append(f"{len(names) + 1} {label:03d}.Bird_{label}/Bird_{n}.jpg")
            labels.append(f"{len(names)} {label}")
            save(base / "images" / names[-1].split()[1])
    save(base / "images" / "001.Bird_1" / "._Bird_0.jpg")
    if lists:
        save(base / "images.txt", names, **style)
        save(base / "image_class_labels.txt", labels, **style)


CARS = [1, 2, 97, 98, 99, 100, 195, 196]


def write_cars(root):
    rows = [(f"car_ims/{n:06d}.jpg", 1, 2, 30, 31, label, n % 2) for n, label in enumerate(np.repeat(CARS, 4), 1)]
    for row in rows:
        save(root / "cars196" / row[0])
    fields = "relative_im_path bbox_x1 bbox_y1 bbox_x2 bbox_y2 class test"
    save_annotations(root / "cars196" / "cars_annos.mat", rows, fields)


def write_cars_devkit(root, devkit="", nested=False, labels="class"):
    base, fields = root / "cars196", f"bbox_x1 bbox_y1 bbox_x2 bbox_y2 {labels} fname"
    rows = [(1, 2, 30, 31, label, f"{n:05d}.jpg") for n, label in enumerate(np.repeat(CARS, 2), 1)]
    for half, lists in (("cars_train", f"{devkit}/cars_train_annos"), ("cars_test", "cars_test_annos_withlabels")):
        for row in rows:
            save(base / half / (half if nested else "") / row[-1])
        save_annotations(base / f"{lists.lstrip('/')}.mat", rows, fields)


def write_sop(root, **style):
    base = root / "Stanford_Online_Products"
    for name, first in (("train", 1), ("test", 11319)):
        lines = []
        for label in np.repeat(range(first, first + 12), 3):
            lines.append(f"{first + len(lines)} {label} 1 bicycle_final/{label}_{len(lines)}.JPG")
            save(base / lines[-1].split()[-1])
        save(base / f"Ebay_{name}.txt", ["image_id class_id super_class_id path", *lines], **style)


def write_inshop(root, top="InShop_Clothes", lists="", images="Img", **style):
    lines = []
    for item in range(1, 9):
        for n in range(4):
            part = "train" if item <= 5 else ("query" if n <= item % 2 else "gallery")
            lines.append(f"img/WOMEN/id_{item:08d}/0{n}_1_front.jpg{' ' * (3 + n)}id_{item:08d}   {part}  ")
            save(root / top / images / lines[-1].split()[0])
    lines = ["32", "image_name                item_id evaluation_status", *lines]
    save(root / top / lists / "list_eval_partition.txt", lines, **style)


def name(write):
    """write_cars_devkit writes the data set `cars`."""
    return write.__name__.split("_")[1]


WINDOWS = dict(start="\ufeff", ends="\r\n")
LAYOUTS = [
    (write_cub, {}),
    (write_cub, dict(lists=False)),
    (write_cub, WINDOWS),
    (write_cars, {}),
    (write_cars_devkit, {}),
    (write_cars_devkit, dict(devkit="devkit", nested=True)),
    (write_cars_devkit, dict(devkit="car_devkit/devkit")),
    (write_sop, {}),
    (write_sop, WINDOWS),
    (write_inshop, {}),
    (write_inshop, dict(images="")),
    (write_inshop, dict(top="Inshop_Clothes", lists="Eval", images="")),
    (write_inshop, dict(top="In-shop Clothes Retrieval Benchmark", lists="Eval", **WINDOWS)),
]
EXPECTED = {  # (images, classes) of each split, and the class of a path
    "cub": ([(12, 4), (12, 4)], lambda path: str(int(path.parent.name[:3]))),
    "cars": ([(16, 4), (16, 4)], None),
    "sop": ([(36, 12), (36, 12)], lambda path: path.stem.split("_")[0]),
    "inshop": ([(20, 5), (4, 3), (8, 3)], lambda path: path.parent.name),
}


@pytest.mark.parametrize("write, options", LAYOUTS)
@pytest.mark.parametrize("inner", [False, True], ids=["from its parent", "from inside"])
def test_every_layout_is_found_and_split(write, options, inner, tmp_path):
    write(tmp_path, **options)
    (base,) = tmp_path.iterdir()
    splits, (counts, class_of) = data.load(name(write), str(base if inner else tmp_path)), EXPECTED[name(write)]
    assert [(len(split), len(split.classes)) for split in splits] == counts
    assert data.sizes(splits).keys() == data.FULL_SIZES[name(write)].keys()
    assert list(data.sizes(splits).values()) == [n for column in zip(*counts) for n in column]
    assert not set(splits[0].classes) & set(splits[1].classes) and splits[1].classes == splits[-1].classes
    for split in splits:
        assert len(set(split.paths)) == len(split.labels) and set(split.labels) == set(range(len(split.classes)))
        if class_of and options.get("lists", True):
            assert [split.classes[y] for y in split.labels] == [class_of(pathlib.Path(p)) for p in split.paths]


def test_labels_of_both_cars_halves_belong_to_their_paths(tmp_path):
    write_cars(tmp_path / "old")
    train, test = data.load("cars", str(tmp_path / "old"))
    assert [int(path[-10:-4]) for path in train.paths + test.paths] == list(range(1, 33))
    assert [train.classes[label] for label in train.labels[::4]] == ["1", "2", "97", "98"]
    assert [test.classes[label] for label in test.labels[::4]] == ["99", "100", "195", "196"]
    write_cars_devkit(tmp_path / "new")
    train, _ = data.load("cars", str(tmp_path / "new"))
    assert [path[-20:] for path in train.paths[:2]] == ["cars_train/00001.jpg", "cars_train/00002.jpg"]
    assert train.paths[8].endswith("cars_test/00001.jpg") and train.labels == [0, 0, 1, 1, 2, 2, 3, 3] * 2


INSHOP_LIST = "list_eval_partition.txt"


@pytest.mark.parametrize(
    "write, file, change, message",
    [
        (write_cub, "images", None, "no CUB_200_2011/images in it; unpack CUB"),
        (write_cub, "image_class_labels.txt", None, "labels.txt: cannot be read .no such file or directory.; check"),
        (write_cub, "images.txt", ("3 001", "33 001"), "labels.txt: does not list the same images as"),
        (write_cars, "cars_annos.mat", None, "cars196: no cars_annos.mat in it"),
        (write_cars, "cars_annos.mat", ("MATLAB", "junk"), "cars_annos.mat: not a Cars196 list with class labels"),
        (write_cars_devkit, "cars_test_annos_withlabels.mat", None, "no cars_test_annos_withlabels.mat in .*classes"),
        (write_sop, "Ebay_train.txt", ("image_id", "1"), "Ebay_train.txt: expected the columns .* line 1"),
        (write_sop, "Ebay_train.txt", (" 1 1 ", " 1 "), "Ebay_train.txt: expected the columns .* 3 were"),
        (write_sop, "Ebay_train.txt", (" 1 1 ", " one 1 "), "Ebay_train.txt: expected the columns .*'one'"),
        (write_sop, "Ebay_test.txt", (" 11319 ", " 1 "), "1 class.* in both training and test, such as 1;"),
        (write_sop, "bicycle_final/2_4.JPG", None, "2_4.JPG: missing or not a regular file; unpack"),
        (write_inshop, INSHOP_LIST, ("32", "33"), "partition.txt: line 1 must be the number of images, 32"),
        (write_inshop, INSHOP_LIST, None, "no InShop_Clothes/list_eval_partition.txt or "),
        (write_inshop, INSHOP_LIST, (" query", " val"), "partition.txt: every evaluation_status must"),
    ],
)
def test_missing_or_malformed_files_are_named(write, file, change, message, tmp_path):
    write(tmp_path)
    path = next(tmp_path.iterdir()) / file
    if change:
        path.write_text(path.read_text("latin1").replace(*change, 1), "latin1")
    else:
        path.rename(path.with_name("other"))
    with pytest.raises((ValueError, OSError), match=message) as error:
        data.load(name(write), str(tmp_path))
    assert str(error.value).startswith(str(tmp_path)) and "\n" not in str(error.value)


def test_a_cars_list_without_classes_is_named(tmp_path):
    write_cars_devkit(tmp_path, labels="unknown")
    with pytest.raises(ValueError, match="cars_train_annos.mat: not a Cars196 list with class labels .*class"):
        data.load("cars", str(tmp_path))


def test_full_sizes_add_up_to_the_whole_sets():
    images = {name: sum(n for key, n in full.items() if "images" in key) for name, full in data.FULL_SIZES.items()}
    assert images == dict(cub=11788, cars=16185, sop=120053, inshop=52712)
    classes = {name: sum(n for key, n in full.items() if "classes" in key) for name, full in data.FULL_SIZES.items()}
    assert classes == dict(cub=200, cars=196, sop=22634, inshop=7982 + 3985)


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
    monkeypatch.setattr(data, "write_toy", None)
    assert data.load("toy", str(tmp_path / "one")).train == train


def test_toy_pixels_are_those_of_version_1(tmp_path, small_toy):
    train, _ = data.load("toy", str(tmp_path))
    pixels = np.stack([np.asarray(data.open_image(path)) for path in train.paths])
    assert pixels.sum() == pytest.approx(8613961, rel=1e-4)  # Pillow may change how it draws edges


def test_processes_may_write_the_toy_set_at_the_same_time(tmp_path, small_toy):
    fork = multiprocessing.get_context("fork")
    writers = [fork.Process(target=data.load, args=("toy", str(tmp_path))) for _ in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
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
            images = [index for index, _ in batch]
            classes = collections.Counter(LABELS[index] for index in images)
            assert sorted(classes.values()) == [4, 4]
            drawn.update(classes.keys())
            for c in classes:
                if LABELS.count(c) >= 4:
                    assert len({index for index in images if LABELS[index] == c}) == 4
    assert max(drawn.values()) - min(drawn.values()) <= 10  # 120 draws of 5 classes, 24 each on average


def test_an_epoch_follows_from_its_seed_and_number():
    def draw(seed, epoch):
        batches = data.TrainBatches(LABELS, 8, 4, seed)
        batches.epoch = epoch
        return list(batches)

    assert draw(1, 3) == draw(1, 3) != draw(1, 4) != draw(2, 4)
    assert len({seed for batch in draw(1, 3) for _, seed in batch}) == 24


def test_impossible_batches_are_refused():
    with pytest.raises(ValueError, match="--batch-size 28 is more than the 27 training images"):
        data.TrainBatches(LABELS, 28, 0, 0)
    with pytest.raises(ValueError, match="--batch-size 24 needs 6 classes; there are 5"):
        data.TrainBatches(LABELS, 24, 4, 0)


# -------------------------------------------------------------------------------------------- images


def test_augmentation_does_not_depend_on_workers(tmp_path, write_tree):
    split = data.load("folder", str(write_tree(tmp_path, {"a": 4, "b": 4, "c": 4, "d": 4}))).train
    epochs = []
    for num_workers in (0, 2):
        loader = data.train_loader(split, data.TrainBatches(split.labels, 4, 0, seed=0), 32, 0.2, num_workers)
        epochs += [torch.stack([images for images, _ in loader]) for _ in range(2)]  # images are decoded, then cached
    assert all(torch.equal(epoch, epochs[0]) for epoch in epochs)
    assert epochs[0].shape == (2, 4, 3, 32, 32) and epochs[0].dtype == torch.uint8
    assert not torch.equal(epochs[0][0, 0], epochs[0][0, 1])
    images = data.Images(split, transforms.PILToTensor())
    for index, path in [*enumerate(split.paths)] * 2:
        assert torch.equal(images[index, 0][0], transforms.functional.pil_to_tensor(data.open_image(path)))


@pytest.mark.parametrize("shape", [(60, 44), (37, 37), (300, 131), (37, 43)])
def test_test_images_are_torchvisions_up_to_normalize(shape, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    split = data.Split([str(tmp_path / "image.png")] * 3, [0, 1, 1], ["a", "b"])
    (images, labels), (_, last) = data.test_loader(split, 2, 32, 0)
    assert images.dtype == torch.uint8 and images.shape == (2, 3, 32, 32) and images.is_contiguous()
    assert labels.dtype == torch.int64 and labels.tolist() + last.tolist() == [0, 1, 1]
    steps = [transforms.Resize(37), transforms.CenterCrop(32), transforms.ToTensor()]
    steps.append(transforms.Normalize(data.IMAGENET_MEAN, data.IMAGENET_STD))
    expected = transforms.Compose(steps)(Image.fromarray(pixels))
    torch.testing.assert_close(data.normalize(images)[0], expected, rtol=0, atol=2e-6)


def test_training_images_are_torchvisions_crops_and_half_of_them_are_flipped(tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 60, 3), dtype=np.uint8))
    image.save(tmp_path / "image.png")
    split = data.Split([str(tmp_path / "image.png")] * 100, [0] * 50 + [1] * 50, ["a", "b"])
    batches = data.TrainBatches(split.labels, 100, 0, seed=0)
    ((images, _),) = data.train_loader(split, batches, 32, 0.2, 0)
    crop, flips = transforms.RandomResizedCrop(32, scale=(0.2, 1)), 0
    for pixels, (_, seed) in zip(images, next(iter(batches))):
        torch.manual_seed(seed)
        expected = transforms.functional.pil_to_tensor(crop(image))
        flipped = not torch.equal(pixels, expected)
        assert torch.equal(pixels, expected.flip(2) if flipped else expected)
        flips += flipped
    assert 30 < flips < 70


def test_images_become_rgb_on_white_as_stored(tmp_path):
    rgba = np.full((3, 24, 4), (200, 100, 50, 255), np.uint8)
    rgba[:2, :, 3] = [[0], [128]]
    levels = rgba[..., 3].astype(float)
    grey, rgb, image = Image.fromarray(rgba[..., 3]), Image.fromarray(rgba[..., :3]), Image.fromarray(rgba)
    deep, integers = levels.astype(np.uint16) * 128, levels.astype(np.int32) * 90000 - 9
    deep, integers, floats = (Image.fromarray(x) for x in (deep, integers, (levels / 1000 - 0.1).astype(np.float32)))
    turned = Image.Exif()
    turned[274] = 6
    white, half, solid, ramp = [255] * 3, [227, 177, 152], [200, 100, 50], [[0] * 3, [128] * 3, [255] * 3]
    dark = [[0] * 3, [63] * 3, [127] * 3]  # half of what 16 bits hold
    for image, name, options, expected in (
        (image, "rgba.png", {}, [white, half, solid]),
        (image.quantize(8), "palette.png", {}, [white, half, solid]),
        (image.convert("LA"), "grey.png", {}, [white, [189] * 3, [124] * 3]),
        (rgb, "colour.png", dict(transparency=(200, 100, 50)), [white] * 3),
        (rgb.quantize(2), "index.gif", dict(transparency=rgb.quantize(2).getpixel((0, 0))), [white] * 3),
        (grey, "level.png", dict(transparency=0), [white, *ramp[1:]]),
        (deep, "deep.png", dict(transparency=0), [white, *dark[1:]]),
        *((deep, f"deep.{suffix}", {}, dark) for suffix in ("png", "tif", "jp2", "pgm")),
        (integers, "integers.tif", {}, ramp),
        (floats, "floats.tif", {}, ramp),
        (grey.point(lambda x: x // 255 * 255).convert("1"), "one.png", {}, [[0] * 3, [0] * 3, white]),
        *((rgb.convert(mode), "x.tif", {}, [solid] * 3) for mode in ("CMYK", "YCbCr", "LAB")),
        (rgb, "frames.gif", dict(save_all=True, append_images=[Image.new("RGB", rgb.size)]), [solid] * 3),
        (rgb, "turned.png", dict(exif=turned), [solid] * 3),
    ):
        image.save(tmp_path / name, **options)
        pixels = np.asarray(data.open_image(str(tmp_path / name)))
        np.testing.assert_allclose(pixels, np.repeat([expected], 24, 0).swapaxes(0, 1), atol=1, err_msg=name)


def test_every_error_of_an_image_names_its_file_once(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "profile.png")
    png, chunk = (tmp_path / "profile.png").read_bytes(), b"iCCPk\0"
    chunk = struct.pack(">I4s2sI", 2, chunk[:4], chunk[4:], zlib.crc32(chunk))
    (tmp_path / "profile.png").write_bytes(png[:-12] + chunk + png[-12:])
    (tmp_path / "directory.png").mkdir()
    (tmp_path / "empty.png").touch()
    Image.fromarray(np.full((8, 8), np.nan, np.float32)).save(tmp_path / "nan.tif")
    Image.fromarray(np.full((8, 8), 7, np.int32)).save(tmp_path / "flat.tif")
    Image.new("1", (1, 1001)).save(tmp_path / "thin.png")
    for name, reason in {
        "missing.png": "cannot be read (no such file or directory)",
        "directory.png": "cannot be read (is a directory)",
        "empty.png": "(UnidentifiedImageError: cannot identify image file)",
        "profile.png": "(IndexError: index out of range)",  # a chunk with an empty profile
        "nan.tif": "(ValueError: its pixels range from nan to nan)",
        "flat.tif": "(ValueError: its pixels range from 7 to 7)",
        "thin.png": "(ValueError: 1 x 1001 pixels, too narrow to resize)",
    }.items():
        with pytest.raises(data.UnreadableImage) as error:
            data.open_image(str(tmp_path / name))
        if reason[0] == "(":
            reason = f"cannot be read as an image {reason}; repair or remove it"
        assert str(error.value) == f"{tmp_path / name}: {reason}"


class NoMemory:
    def __init__(self, size): ...

    def __call__(self, image):
        raise MemoryError


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_error_in_a_loader_names_the_file_in_its_last_line(num_workers, tmp_path, write_tree, monkeypatch):
    split = data.load("folder", str(write_tree(tmp_path, {"a": 2, "b": 2, "c": 2, "d": 2}))).test
    monkeypatch.setattr(transforms, "CenterCrop", NoMemory)
    with pytest.raises(data.UnreadableImage) as error:
        list(data.test_loader(split, 2, 32, num_workers))
    last = str(error.value).strip().splitlines()[-1].removeprefix("data.UnreadableImage: ")
    assert last == f"{split.paths[0]}: cannot be read as an image (MemoryError); repair or remove it"

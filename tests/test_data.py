"""Data sets in every supported layout, batches and image transforms."""

import collections
import filecmp
import multiprocessing
import pathlib

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import io
from torchvision import transforms

import data

# ------------------------------------------------------------------------------------------- folders


def test_a_flat_folder_is_split_by_class(tmp_path, write_tree):
    write_tree(tmp_path, {"b": 3, "a": 2, "group/d": 4, "group/c": 2, ".thumbnails": 2, "a/.hidden": 2})
    (tmp_path / "a" / "._0.png").write_bytes(b"junk")
    (tmp_path / "a" / "notes.txt").write_text("not an image")
    train, test = data.load("folder", str(tmp_path))
    assert train.classes == ["a", "b"] and test.classes == ["group/c", "group/d"]
    assert train.labels == [0, 0, 1, 1, 1] and test.labels == [0, 0, 1, 1, 1, 1]
    assert train.paths[:3] == [str(tmp_path / name) for name in ("a/0.png", "a/1.png", "b/0.png")]
    assert train[1:3] == data.Split(train.paths[1:3], [0, 1], ["a", "b"])


def test_train_and_test_directories_win_over_halves(tmp_path, write_tree):
    write_tree(tmp_path, {"train/a": 2, "train/b": 2, "train/c": 2, "test/d": 2, "test/e": 2})
    train, test = data.load("folder", str(tmp_path))
    assert train.classes == ["a", "b", "c"] and test.classes == ["d", "e"]


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
        ({}, "no images in it"),
        ({"a": 3}, "1 class.*, at least 4 are needed"),
        ({"train/a": 3, "train/b": 3, "val/a": 3, "val/b": 3}, "only one of train/ and test/"),
        ({"train/a": 3, "test/b": 3, "test/c": 3}, "1 class.* in the train split"),
        ({"train/a": 3, "train/b": 3, "test/c": 3}, "1 class.* in the test split"),
        ({"train/a": 2, "train/b": 2, "test/b": 2, "test/c": 2}, "1 class.* in both training and test .b, "),
        ({"a": 2, "b": 2, "c": 1, "d": 1}, "no query has another image of its class"),
    ],
)
def test_an_unusable_folder_is_named(classes, message, tmp_path, write_tree):
    write_tree(tmp_path, classes)
    with pytest.raises(ValueError, match=message) as error:
        data.load("folder", str(tmp_path))
    assert str(error.value).startswith(str(tmp_path)) and "\n" not in str(error.value)


@pytest.mark.parametrize("dataset", ["cub", "cars", "sop", "inshop", "folder"])
def test_a_missing_root_is_named(dataset, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"^{tmp_path}/missing: no .*--data-root"):
        data.load(dataset, str(tmp_path / "missing"))


# ---------------------------------------------------------------------------------------- benchmarks


def save_image(path, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (36, 36), (200, 100, 50)).convert(mode).save(path, "PNG" if mode == "RGBA" else "JPEG")


def save_lines(path, lines, start="", ends="\n"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes((start + ends.join([*lines, ""])).encode())


def write_cub(root, lists=True, **style):
    base, names, labels = root / "CUB_200_2011", [], []
    for label in (1, 2, 3, 4, 101, 102, 150, 200):
        for n, mode in enumerate(("RGB", "L", "CMYK")):
            names.append(f"{len(names) + 1} {label:03d}.Bird_{label}/Bird_{n}.jpg")
            labels.append(f"{len(names)} {label}")
            save_image(base / "images" / names[-1].split()[1], mode)
    (base / "images" / "001.Bird_1" / "._Bird_0.jpg").write_bytes(b"junk")
    if lists:
        save_lines(base / "images.txt", names, **style)
        save_lines(base / "image_class_labels.txt", labels, **style)


def save_annotations(path, rows, fields):
    table = np.zeros((1, len(rows)), dtype=[(name, object) for name in fields.split()])
    for n, row in enumerate(rows):
        table[0, n] = row
    path.parent.mkdir(parents=True, exist_ok=True)
    io.savemat(path, {"annotations": table})


def write_cars(root):
    rows = []
    for n, label in enumerate(np.repeat([1, 2, 97, 98, 99, 100, 195, 196], 4), 1):
        rows.append((f"car_ims/{n:06d}.jpg", 1, 2, 30, 31, label, n % 2))
        save_image(root / "cars196" / rows[-1][0])
    fields = "relative_im_path bbox_x1 bbox_y1 bbox_x2 bbox_y2 class test"
    save_annotations(root / "cars196" / "cars_annos.mat", rows, fields)


def write_cars_devkit(root, devkit="", labels="class"):
    for half, name in (("cars_train", "cars_train_annos"), ("cars_test", "cars_test_annos_withlabels")):
        rows = []
        for n, label in enumerate(np.repeat([1, 2, 97, 98, 99, 100, 195, 196], 2), 1):
            rows.append((1, 2, 30, 31, label, f"{n:05d}.jpg"))
            save_image(root / "cars196" / half / rows[-1][-1])
        fields = f"bbox_x1 bbox_y1 bbox_x2 bbox_y2 {labels} fname"
        save_annotations(root / "cars196" / devkit / f"{name}.mat", rows, fields)


def write_sop(root, **style):
    base = root / "Stanford_Online_Products"
    for name, first in (("train", 1), ("test", 11319)):
        lines = []
        for label in np.repeat(range(first, first + 12), 3):
            lines.append(f"{first + len(lines)} {label} 1 bicycle_final/{label}_{len(lines)}.JPG")
            save_image(base / lines[-1].split()[-1], "RGBA")  # a PNG in spite of its name
        save_lines(base / f"Ebay_{name}.txt", ["image_id class_id super_class_id path", *lines], **style)


def write_inshop(root, top="InShop_Clothes", lists="", images="Img", **style):
    lines = []
    for item in range(1, 9):
        for n in range(4):
            part = "train" if item <= 5 else ("query" if n <= item % 2 else "gallery")
            lines.append(f"img/WOMEN/id_{item:08d}/0{n}_1_front.jpg{' ' * (3 + n)}id_{item:08d}   {part}  ")
            save_image(root / top / images / lines[-1].split()[0])
    lines = ["32", "image_name                item_id evaluation_status", *lines]
    save_lines(root / top / lists / "list_eval_partition.txt", lines, **style)


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
    (write_cars_devkit, dict(devkit="devkit")),
    (write_sop, {}),
    (write_sop, WINDOWS),
    (write_inshop, {}),
    (write_inshop, dict(images="")),
    (write_inshop, dict(top="Inshop_Clothes", lists="Eval", images="")),
    (write_inshop, dict(top="In-shop Clothes Retrieval Benchmark", lists="Eval", **WINDOWS)),
]
EXPECTED = {  # (images, classes) of each split
    "cub": [(12, 4), (12, 4)],
    "cars": [(16, 4), (16, 4)],
    "sop": [(36, 12), (36, 12)],
    "inshop": [(20, 5), (4, 3), (8, 3)],
}


@pytest.mark.parametrize("write, options", LAYOUTS)
@pytest.mark.parametrize("inner", [False, True], ids=["from its parent", "from inside"])
def test_every_layout_is_found_and_split(write, options, inner, tmp_path):
    write(tmp_path, **options)
    (base,) = tmp_path.iterdir()
    dataset = name(write)
    splits = data.load(dataset, str(base if inner else tmp_path))
    assert [(len(split), len(split.classes)) for split in splits] == EXPECTED[dataset]
    train, query, gallery = splits[0], splits[1], splits[-1]
    assert not set(train.classes) & set(query.classes) and query.classes == gallery.classes
    assert data.sizes(splits)["train_images"] == len(train) and data.sizes(splits) != data.FULL_SIZES[dataset]
    for split in splits:
        assert len(set(split.paths)) == len(split.labels) and set(split.labels) == set(range(len(split.classes)))
        assert {data.open_image(path).mode for path in split.paths} == {"RGB"}


@pytest.mark.parametrize(
    "write, class_from_path",
    [
        (write_cub, lambda path: str(int(path.parent.name[:3]))),
        (write_sop, lambda path: path.stem.split("_")[0]),
        (write_inshop, lambda path: path.parent.name),
    ],
)
def test_labels_belong_to_their_paths(write, class_from_path, tmp_path):
    write(tmp_path)
    for split in data.load(name(write), str(tmp_path)):
        assert [split.classes[y] for y in split.labels] == [class_from_path(pathlib.Path(p)) for p in split.paths]


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


def replace(file, old, new):
    return lambda base: (base / file).write_text((base / file).read_text().replace(old, new, 1))


def remove(file):
    return lambda base: (base / file).unlink()


def rename(file):
    return lambda base: (base / file).rename(base / "other")


def overwrite(file):
    return lambda base: (base / file).write_bytes(b"junk")


INSHOP_LIST = "list_eval_partition.txt"


@pytest.mark.parametrize(
    "write, damage, message",
    [
        (write_cub, rename("images"), "no CUB_200_2011/images in it; unpack CUB"),
        (write_cub, remove("image_class_labels.txt"), "image_class_labels.txt: no such file"),
        (write_cub, replace("images.txt", "3 001", "33 001"), "labels.txt: does not list the same images as"),
        (write_cub, replace("images.txt", "2 001", "2"), "images.txt: expected the columns image_id image_name"),
        (write_cars, remove("cars_annos.mat"), "cars196: no cars_annos.mat in it"),
        (write_cars, overwrite("cars_annos.mat"), "cars_annos.mat: not a Cars196 list"),
        (write_cars_devkit, remove("cars_test_annos_withlabels.mat"), "no cars_test_annos_with.*classes"),
        (write_sop, replace("Ebay_train.txt", "image_id", "1"), "Ebay_train.txt: expected the columns .* line 1"),
        (write_sop, replace("Ebay_train.txt", " 1 1 ", " 1 "), "Ebay_train.txt: expected the columns .* 3 were"),
        (write_sop, replace("Ebay_train.txt", " 1 1 ", " one 1 "), "Ebay_train.txt: expected the columns .*'one'"),
        (write_sop, replace("Ebay_test.txt", " 11319 ", " 1 "), "in both training and test .1, "),
        (write_sop, remove("Ebay_test.txt"), "Ebay_test.txt: no such file"),
        (write_sop, remove("bicycle_final/2_4.JPG"), "2_4.JPG: no such file, although it is listed"),
        (write_inshop, replace(INSHOP_LIST, "32", "33"), "partition.txt: line 1 must be the number of images, 32"),
        (write_inshop, remove(INSHOP_LIST), "no InShop_Clothes/list_eval_partition.txt or "),
        (write_inshop, replace(INSHOP_LIST, " query", " val"), "partition.txt: every evaluation_status must"),
        (write_inshop, replace(INSHOP_LIST, " train ", " "), "partition.txt: expected the columns image_name"),
    ],
)  # fmt: skip
def test_missing_or_malformed_files_are_named(write, damage, message, tmp_path):
    write(tmp_path)
    damage(next(tmp_path.iterdir()))
    with pytest.raises((ValueError, OSError), match=message) as error:
        data.load(name(write), str(tmp_path))
    assert str(error.value).startswith(str(tmp_path)) and "\n" not in str(error.value)


def test_a_cars_list_without_classes_is_named(tmp_path):
    write_cars_devkit(tmp_path, labels="unknown")
    with pytest.raises(ValueError, match="cars_train_annos.mat: not a Cars196 list with class labels .*class"):
        data.load("cars", str(tmp_path))


def test_full_lists_have_the_full_sizes(tmp_path):
    for name, images, first, classes in (("train", 59551, 1, 11318), ("test", 60502, 11319, 11316)):
        lines = [f"{n} {first + n % classes} 1 chair_final/{n}.JPG" for n in range(images)]
        save_lines(tmp_path / f"Ebay_{name}.txt", ["image_id class_id super_class_id path", *lines])
    assert data.sizes(data.load_sop(str(tmp_path))) == data.FULL_SIZES["sop"]
    lines = []
    parts = [("train", 25882, 0, 3997), ("query", 14218, 4000, 3985), ("gallery", 12612, 4000, 3985)]
    for part, images, first, items in parts:
        lines += [f"img/{part}/{n}.jpg  id_{first + n % items:08d}  {part}" for n in range(images)]
    save_lines(tmp_path / INSHOP_LIST, [str(len(lines)), "image_name item_id evaluation_status", *lines])
    assert data.sizes(data.load_inshop(str(tmp_path))) == data.FULL_SIZES["inshop"]


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
    for batches.epoch in range(20):
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
    with pytest.raises(ValueError, match="needs 6 classes; there are 5"):
        data.TrainBatches(LABELS, 24, 4, 0)


# -------------------------------------------------------------------------------------------- images


def test_augmentation_does_not_depend_on_workers(tmp_path, write_tree):
    split = data.load("folder", str(write_tree(tmp_path, {"a": 4, "b": 4, "c": 4, "d": 4}))).train
    epochs = []
    for num_workers in (0, 2):
        loader = data.train_loader(split, data.TrainBatches(split.labels, 4, 2, seed=0), 32, 0.2, num_workers)
        epochs += [torch.stack([images for images, _ in loader]) for _ in range(2)]  # images are decoded, then cached
    assert all(torch.equal(epoch, epochs[0]) for epoch in epochs)
    assert epochs[0].shape == (2, 4, 3, 32, 32) and epochs[0].dtype == torch.uint8
    assert not torch.equal(epochs[0][0, 0], epochs[0][0, 1])


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


def test_sixteen_bit_images_keep_their_shades(tmp_path):
    shades = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1024
    Image.fromarray(shades).save(tmp_path / "deep.png")
    np.testing.assert_allclose(np.asarray(data.open_image(str(tmp_path / "deep.png")))[..., 0], shades / 257, atol=1)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_unreadable_image_is_named_in_the_last_line(num_workers, tmp_path, write_tree):
    split = data.load("folder", str(write_tree(tmp_path, {"a": 2, "b": 2, "c": 2, "d": 2}))).test
    broken = tmp_path / "c" / "1.png"
    broken.write_bytes(broken.read_bytes()[:200])
    with pytest.raises(data.UnreadableImage) as error:
        list(data.test_loader(split, 2, 32, num_workers))
    last = str(error.value).strip().splitlines()[-1]
    assert f"{broken}: cannot be read as an image (" in last and last.endswith("); repair or remove it")

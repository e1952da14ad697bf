"""Images and labels of a data set, and how they become batches.

    load(dataset, root)   -> (train, test) or (train, query, gallery), each with .paths, .labels, .classes;
                             the classes to train on never overlap the others
    train_loader(...)     random-resized-crop + flip, shuffled or class-balanced batches
    test_loader(...)      resize + centre crop, in order
    with_cache(...)       the same splits, whose loaders then crop from images that were decoded once

cub, cars, sop and inshop are read from their own lists, in every layout they are found in. A folder is any tree of
images, and a class in it a directory that directly holds some; `toy` is generated once and then read like it:

    ROOT/train/../CLASS/IMAGE  and  ROOT/test/../CLASS/IMAGE, or
    ROOT/../CLASS/IMAGE        the first half of the sorted classes trains, the second half tests

All randomness of an epoch follows from (seed, epoch), that of an augmentation from the seed drawn for it with its index:
the same images whatever the number of workers, and the same boxes from a cache as from the files.
"""

import collections
import contextlib
import copy
import functools
import hashlib
import itertools
import json
import numbers
import os
import shutil
import tempfile
import warnings
from concurrent import futures
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw
from torchvision import transforms

from kernels.crop import crop, in_triton

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class UnreadableImage(OSError):
    """Names the file. A DataLoader worker hands errors over as text with a traceback; the last line is the message."""

    def __str__(self):
        return super().__str__().strip().splitlines()[-1].removeprefix("data.UnreadableImage: ")


@dataclass
class Split:
    paths: list  # of N file names
    labels: list  # of N ints, 0 .. len(classes)-1
    classes: list  # of names
    cache: "Cache" = None  # of the images, if they are not to be decoded again and again

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, at):
        """The images of a slice, as a split."""
        return Split(self.paths[at], self.labels[at], self.classes, self.cache and self.cache[at])


class Splits(NamedTuple):
    train: Split
    test: Split


class RetrievalSplits(NamedTuple):
    train: Split
    query: Split
    gallery: Split  # the classes of `query`, numbered alike


def load(dataset, root, validation=False):
    """The splits of a data set under `root`: Splits, or RetrievalSplits where queries search a gallery of its own.

    validation: the training classes alone; half of them trains and half tests, so that settings can be chosen while the
    test classes stay unseen. Raises ValueError or OSError with one line that names the file or directory and what to do.
    """
    splits = DATASETS[dataset](root)
    if validation:
        names = splits.train.classes
        splits = split_off(set(names[: len(names) // 2]), [(path, names[label]) for path, label in zip(splits.train.paths, splits.train.labels)])
    train, query, gallery = splits.train, splits[1], splits[-1]
    if shared := sorted(set(train.classes) & set(query.classes + gallery.classes)):
        raise ValueError(
            f"{root}: {len(shared)} classes are there to train and to test on ({', '.join(shared[:3])}, ..); "
            "retrieval is tested on classes that training never saw, so remove them from one"
        )
    for part, split in zip(splits._fields, splits):
        if len(split.classes) < 2:
            raise ValueError(f"{root}: {len(split.classes)} class(es) in the {part} split, at least 2 are needed")
    if lone_queries(splits) == len(query):
        raise ValueError(f"{root}: no query has another image of its class to find")
    return splits


def lone_queries(splits):
    """How many queries have no (other) image of their class to find."""
    query, gallery = splits[1], splits[-1]
    images_of_class = np.bincount(gallery.labels, minlength=len(query.classes))
    return int((images_of_class[query.labels] <= (query is gallery)).sum())


def check_images(splits):
    """Raise FileNotFoundError, naming it, if a listed image is not there."""
    for path in (path for split in splits for path in split.paths):
        if not os.path.exists(path):
            raise FileNotFoundError(f"{path}: no such file, though it is listed; unpack the images there")


def sizes(splits):
    """{"train_images": .., "train_classes": .., ..}"""
    counts = {f"{part}_images": len(split) for part, split in splits._asdict().items()}
    return counts | {f"{part}_classes": len(split.classes) for part, split in splits._asdict().items()}


def make_split(images, classes=None):
    """Split of (path, class) pairs in their order; the classes are numbered in sorted order."""
    classes = sorted({name for _, name in images}) if classes is None else classes
    number = {name: label for label, name in enumerate(classes)}
    return Split([path for path, _ in images], [number[name] for _, name in images], [str(name) for name in classes])


# ------------------------------------------------------------------------------------------- folders


def load_folder(root):
    if not os.path.isdir(root):
        raise FileNotFoundError(f"{root}: no such directory; give the folder that holds your images with --data-root")
    halves = [os.path.join(root, name) for name in ("train", "test")]
    there = [os.path.isdir(half) for half in halves]
    if all(there):
        return Splits(*(make_split(find_images(half)) for half in halves))
    if any(there):
        raise ValueError(f"{root}: has only one of train/ and test/; add the other, or give a folder with neither")
    return split_in_halves(root, find_images(root))


def find_images(root):
    """[(file, class), ..] below root, sorted; the class is the directory that holds the file, relative to root."""
    images, seen = [], set()
    for directory, below, files in os.walk(root, followlinks=True):
        real = os.path.realpath(directory)
        below[:] = [] if real in seen else [name for name in below if not name.startswith(".")]
        if real in seen:
            continue  # a link to a place that was already walked
        seen.add(real)
        name = os.path.relpath(directory, root)
        pictures = [f for f in files if f.lower().endswith(IMAGE_SUFFIXES) and not f.startswith(".")]
        images += [(os.path.join(directory, f), name) for f in pictures]
    if not images:
        raise ValueError(f"{root}: no images in it; looked for {' '.join(IMAGE_SUFFIXES)} in every directory below")
    return sorted(images, key=lambda image: (image[1], image[0]))


def split_in_halves(root, images):
    """The first half of the sorted classes trains, the second half tests."""
    classes = sorted({name for _, name in images})
    if len(classes) < 4:
        raise ValueError(
            f"{root}: {len(classes)} class(es), at least 4 are needed, half of them to train and half to test on; "
            "a class is a directory that directly holds images"
        )
    return split_off(set(classes[: len(classes) // 2]), images)


def split_off(train_classes, images):
    """Splits of (path, class) pairs: these classes train, all others test."""
    train, test = ([image for image in images if (image[1] in train_classes) == part] for part in (True, False))
    return Splits(make_split(train), make_split(test))


# ---------------------------------------------------------------------------------------- benchmarks

# Sizes of the full sets; with others a result cannot be compared with published ones.
FULL = {
    "cub": dict(train_images=5864, test_images=5924, train_classes=100, test_classes=100),
    "cars": dict(train_images=8054, test_images=8131, train_classes=98, test_classes=98),
    "sop": dict(train_images=59551, test_images=60502, train_classes=11318, test_classes=11316),
    "inshop": dict(
        train_images=25882, query_images=14218, gallery_images=12612,
        train_classes=3997, query_classes=3985, gallery_classes=3985,
    ),  # fmt: skip
}


def load_cub(root):
    """CUB-200-2011, by its lists: class ids 1 .. 100 train, 101 .. 200 test. Without them, by its folders."""
    base = find(root, ("CUB_200_2011", "."), "images", "CUB-200-2011 (CUB_200_2011.tgz)")
    images, names, labels = (os.path.join(base, name) for name in ("images", "images.txt", "image_class_labels.txt"))
    if not os.path.exists(names) and not os.path.exists(labels):
        return split_in_halves(images, find_images(images))
    name_of, label_of = {}, {}
    for file, columns, column_of in ((names, "image_id image_name", name_of), (labels, "image_id class_id", label_of)):
        for place, (number, value) in read_rows(file, columns):
            if number in column_of:
                raise ValueError(f"{place}: image {number} is listed twice")
            column_of[number] = as_int(value, place) if file == labels else inside(images, value, place)
    if odd := sorted(name_of.keys() ^ label_of.keys()):
        raise ValueError(f"{labels}: image {odd[0]} is only in one of this list and {names}")
    return split_by_class([(name_of[number], label) for number, label in label_of.items()], 100, labels)


def load_cars(root):
    """Cars196: classes 1 .. 98 train, 99 .. 196 test, whatever the official halves, which were made for classifying."""
    base = find(root, ("cars196", "stanford_cars", "."), ("car_ims", "cars_train"), "Cars196 (images and .mat lists)")
    lists = {"cars_annos.mat": ""}
    if not os.path.isdir(os.path.join(base, "car_ims")):
        lists = {"cars_train_annos.mat": "cars_train", "cars_test_annos_withlabels.mat": "cars_test"}
    found = []
    for name, directory in lists.items():
        file, alternative = os.path.join(base, name), os.path.join(base, "devkit", name)
        if os.path.exists(alternative) and not os.path.exists(file):
            file = alternative
        found += [(inside(os.path.join(base, directory), path, file), label) for path, label in read_mat(file)]
    return split_by_class(found, 98, base)


def load_sop(root):
    base = find(root, ("Stanford_Online_Products", "."), "Ebay_train.txt", "Stanford Online Products")
    splits = []
    for name in ("Ebay_train.txt", "Ebay_test.txt"):
        rows = read_rows(os.path.join(base, name), "image_id class_id super_class_id path", skip=1)
        splits.append(make_split([(inside(base, row[3], place), as_int(row[1], place)) for place, row in rows]))
    return Splits(*splits)


def load_inshop(root):
    """DeepFashion In-Shop: the list at the top or in Eval/, images in Img/img/ or img/; the partition is in the list."""
    directories = ("InShop_Clothes", "Inshop_Clothes", "In-shop Clothes Retrieval Benchmark", ".")
    base = find(root, directories, PARTITIONS, "In-Shop Clothes Retrieval (DeepFashion)")
    file = next(path for path in (os.path.join(base, name) for name in PARTITIONS) if os.path.exists(path))
    images = os.path.join(base, "Img") if os.path.isdir(os.path.join(base, "Img", "img")) else base
    parts = {"train": [], "query": [], "gallery": []}
    rows = read_rows(file, "image_name item_id evaluation_status", skip=2)
    with open(file, encoding="utf-8-sig") as lines:
        if (count := lines.readline().strip()) != str(len(rows)):
            raise ValueError(f"{file}: line 1 announces {count} images, {len(rows)} follow; is the file whole?")
    for place, (name, item, part) in rows:
        if part not in parts:
            raise ValueError(f"{place}: evaluation_status is {part!r}, expected train, query or gallery")
        parts[part].append((inside(images, name, place), item))
    held_out = sorted({item for part in ("query", "gallery") for _, item in parts[part]})
    return RetrievalSplits(make_split(parts["train"]), *(make_split(parts[part], held_out) for part in ("query", "gallery")))


PARTITIONS = ("list_eval_partition.txt", os.path.join("Eval", "list_eval_partition.txt"))


def find(root, directories, evidence, what):
    """The first of root/directories that holds any of `evidence`."""
    evidence = (evidence,) if isinstance(evidence, str) else evidence
    for directory in directories:
        base = os.path.normpath(os.path.join(root, directory))
        if any(os.path.exists(os.path.join(base, name)) for name in evidence):
            return base
    wanted = " or ".join(os.path.join(directories[0], name) for name in evidence)
    raise FileNotFoundError(f"{root}: no {wanted} in it; unpack {what} there, or say where it is with --data-root")


def read_rows(file, columns, skip=0):
    """[("FILE, line N", fields), ..] of a list with these columns, separated by any blanks.

    Of `skip` header lines the last names the columns.
    """
    rows, width = [], len(columns.split())
    try:
        with open(file, encoding="utf-8-sig", errors="surrogateescape") as lines:
            for number, line in enumerate(lines, 1):
                fields = line.split()
                if number == skip and fields != columns.split():
                    raise ValueError(f"{file}, line {number}: expected the header {columns}, got {line.strip()[:80]!r}")
                if number > skip and fields:
                    if len(fields) != width:
                        raise ValueError(f"{file}, line {number}: expected {columns}, got {line.strip()[:80]!r}")
                    rows.append((f"{file}, line {number}", fields))
    except FileNotFoundError:
        raise FileNotFoundError(f"{file}: no such file; it is part of the data set's download") from None
    if not rows:
        raise ValueError(f"{file}: lists no images")
    return rows


def read_mat(file):
    """[(image path, class), ..] of a Cars196 list, old (relative_im_path) or new (fname)."""
    if not os.path.exists(file):
        raise FileNotFoundError(f"{file}: no such file; Cars196 needs its lists with classes, of the test images too")
    try:
        from scipy.io import loadmat  # needed here only

        annotations = loadmat(file, squeeze_me=True)["annotations"]
        fields = annotations.dtype.names or ()
    except ImportError:
        raise ValueError(f"{file}: reading it takes scipy; pip install scipy") from None
    except Exception as error:  # scipy raises many kinds for a broken file
        raise ValueError(f"{file}: not a list of Cars196 ({type(error).__name__})") from error
    path = "relative_im_path" if "relative_im_path" in fields else "fname"
    for wanted in (path, "class"):
        if wanted not in fields:
            raise ValueError(f"{file}: has no {wanted!r}, only {', '.join(fields)}; use the list with labels")
    images = []
    for number, row in enumerate(np.atleast_1d(annotations), 1):
        name, label = row[path], row["class"]
        if not isinstance(name, str) or not name or not isinstance(label, numbers.Real) or label != label // 1:
            got = f"{str(name)[:80]!r}, {str(label)[:80]!r}"
            raise ValueError(f"{file}, image {number}: expected a file name and a class number, got {got}")
        images.append((name, int(label)))
    return images


def split_by_class(images, last_train_class, source):
    """Classes 1 .. last_train_class train, as many again test."""
    for path, label in images:
        if not 1 <= label <= 2 * last_train_class:
            raise ValueError(f"{source}: {path} is of class {label}, beyond 1 .. {2 * last_train_class}")
    return split_off(range(1, last_train_class + 1), images)


def inside(directory, path, place):
    """directory/path, which a list may not lead out of, by links neither."""
    file = os.path.join(directory, path)
    if not os.path.isabs(path) and ".." not in path.split("/") and "\0" not in path:
        root, end = real_path(directory), os.path.realpath(file) if os.path.islink(file) else real_path(os.path.dirname(file))
        if os.path.commonpath([root, end]) == root:
            return file
    raise ValueError(f"{place}: {path!r} leads out of {directory}")


real_path = functools.lru_cache(os.path.realpath)  # of directories, which many images share


def as_int(text, place):
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{place}: {text!r} is not a class number") from None


# ----------------------------------------------------------------------------------------------- toy

TOY_VERSION = 1  # of the images: a change of the generator makes a new directory
TOY_CLASSES, TOY_IMAGES, TOY_SIZE = 80, 20, 72  # classes, images a class, pixels a side
TOY_FAMILY, TOY_CONTRAST = 4, 0.8  # classes a family, and how far they stray from it (1: families mean nothing)


def load_toy(root):
    """Splits of the generated set ROOT/toy-vN, which is written first if it is not there."""
    tree = os.path.join(root, f"toy-v{TOY_VERSION}")
    if not os.path.isdir(tree):
        print(f"writing the toy data set to {tree}", flush=True)
        os.makedirs(root, exist_ok=True)
        unfinished = tempfile.mkdtemp(prefix=f"toy-v{TOY_VERSION}.unfinished-", dir=root)
        write_toy(os.path.join(unfinished, "toy"))
        try:
            os.rename(os.path.join(unfinished, "toy"), tree)
        except OSError:
            if not os.path.isdir(tree):  # else another process was faster; its images are the same
                raise
        shutil.rmtree(unfinished)
    return load_folder(tree)


def write_toy(tree):
    """Creatures of wavy outline and spotted skin. Classes of a family differ subtly; images vary in pose, colour, clutter."""
    rng = np.random.default_rng(TOY_VERSION)
    for label in range(TOY_CLASSES):
        if label % TOY_FAMILY == 0:
            family = _creature(rng)
        other = _creature(rng)
        creature = {trait: family[trait] + TOY_CONTRAST * (other[trait] - family[trait]) for trait in family}
        directory = os.path.join(tree, f"class{label:02d}")
        os.makedirs(directory)
        for n in range(TOY_IMAGES):
            _photograph(creature, rng).save(os.path.join(directory, f"{n:02d}.png"))


def _creature(rng):
    """Traits: the outline's waves (amplitude and phase of 2 .. 6 a turn), five spots (angle, distance, size), colours."""
    return {
        "amplitude": rng.uniform(0, 0.22, 5),
        "phase": rng.uniform(-np.pi, np.pi, 5),
        "angle": np.arange(5) * 2 * np.pi / 5 + rng.uniform(-0.6, 0.6, 5),
        "distance": rng.uniform(0.15, 0.7, 5),
        "size": rng.uniform(0.03, 0.2, 5),
        "colours": rng.uniform(60, 255, (2, 3)),  # of body and spots
    }


def _photograph(creature, rng):
    """One image: drawn at twice the size, then reduced, which smooths the edges."""
    size = 2 * TOY_SIZE
    image = Image.new("RGB", (size, size), _colour(rng.uniform(20, 100) + rng.normal(0, 15, 3)))
    draw = ImageDraw.Draw(image)

    def clutter(count):
        for _ in range(count):
            _blob(draw, rng.uniform(0, size, 2), rng.uniform(2, size / 12), rng.uniform(0, 255, 3))

    clutter(10)
    scale, turn = size * rng.uniform(0.28, 0.38), rng.normal(0, 0.2)
    squeeze, centre = rng.uniform(0.8, 1.0), size / 2 + rng.uniform(-0.1, 0.1, 2) * size
    body, spots = creature["colours"] * rng.uniform(0.85, 1.15) + rng.normal(0, 10, (2, 3))  # light, and each its own

    def place(distance, angle):
        return centre + scale * np.stack([distance * np.cos(angle + turn), squeeze * distance * np.sin(angle + turn)], -1)

    theta = np.linspace(0, 2 * np.pi, 120, endpoint=False)
    waves = np.cos(np.outer(theta, np.arange(2, 7)) + creature["phase"]) @ creature["amplitude"]
    draw.polygon([tuple(point) for point in place(1 + waves, theta)], fill=_colour(body))
    for angle, distance, spot in zip(creature["angle"], creature["distance"], creature["size"]):
        _blob(draw, place(distance, angle), scale * spot, spots)
    clutter(2)

    pixels = np.asarray(image.resize((TOY_SIZE, TOY_SIZE), Image.BOX)) + rng.normal(0, 8, (TOY_SIZE, TOY_SIZE, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _blob(draw, centre, radius, colour):
    (x, y), r = centre, radius
    draw.ellipse((x - r, y - r, x + r, y + r), fill=_colour(colour))


def _colour(rgb):
    return tuple(int(c) for c in np.clip(rgb, 0, 255))


DATASETS = {
    "cub": load_cub,
    "cars": load_cars,
    "sop": load_sop,
    "inshop": load_inshop,
    "folder": load_folder,
    "toy": load_toy,
}


# ------------------------------------------------------------------------------------------- batches

PATHS = ("decode", "cache")  # the ways from image files to batches
BROKEN = -1  # label of an image that cannot be read, where such are skipped


class Images(torch.utils.data.Dataset):
    """(image (3, size, size), label) of item (index, seed); the seed is that of the augmentation."""

    def __init__(self, split, transform, skip_broken):
        self.split, self.transform, self.skip_broken = split, transform, skip_broken

    def __getitem__(self, item):
        index, seed = item
        try:
            image, label = open_image(self.split.paths[index]), self.split.labels[index]
        except UnreadableImage:
            if not self.skip_broken:
                raise
            image, label = Image.new("RGB", (8, 8)), BROKEN
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return self.transform(image), label


def open_image(path):
    try:
        with Image.open(path) as image:
            if image.mode.startswith("I"):  # 16 bits a pixel, which convert would clip to white
                image = Image.fromarray((np.asarray(image) / 257).clip(0, 255).astype(np.uint8))
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # what Pillow raises
        reason = str(error).replace(repr(path), "").strip().splitlines()[0]
        raise UnreadableImage(f"{path}: cannot be read as an image ({reason}); repair or remove it") from None


class TrainBatches:
    """Batches of (index, seed); set .epoch before each pass.

    images_per_class = 0: all images in random order, the incomplete last batch dropped. Otherwise each batch takes
    batch_size / images_per_class classes without replacement, and as many images of each: without replacement too,
    unless the class is too small. Either way an epoch has N // batch_size batches.
    Raises ValueError where no batch of that kind exists.
    """

    def __init__(self, labels, batch_size, images_per_class, seed):
        self.batch_size, self.images_per_class, self.seed, self.epoch = batch_size, images_per_class, seed, 0
        labels = np.asarray(labels)
        self.members = np.split(np.argsort(labels, kind="stable"), np.cumsum(np.bincount(labels))[:-1])
        self.num_images = len(labels)
        if batch_size > len(labels):
            raise ValueError(f"--batch-size {batch_size} is more than the {len(labels)} training images")
        if images_per_class and batch_size > images_per_class * len(self.members):
            raise ValueError(
                f"--batch-size {batch_size} at {images_per_class} images per class needs "
                f"{batch_size // images_per_class} classes; there are {len(self.members)} to train on"
            )

    def __len__(self):
        return self.num_images // self.batch_size

    def __iter__(self):
        rng = np.random.default_rng((self.seed, self.epoch))
        for batch in self.balanced(rng) if self.images_per_class else self.shuffled(rng):
            seeds = rng.integers(2**63, size=len(batch))
            yield list(zip(batch.tolist(), seeds.tolist()))

    def shuffled(self, rng):
        order = rng.permutation(self.num_images)
        yield from order[: len(self) * self.batch_size].reshape(len(self), self.batch_size)

    def balanced(self, rng):
        classes_per_batch = self.batch_size // self.images_per_class
        waiting = []  # classes left of the current pass over all of them
        for _ in range(len(self)):
            if len(waiting) < classes_per_batch:
                waiting = rng.permutation(len(self.members)).tolist()
            chosen, waiting = waiting[:classes_per_batch], waiting[classes_per_batch:]
            batch = []
            for members in (self.members[c] for c in chosen):
                batch.append(rng.choice(members, self.images_per_class, replace=len(members) < self.images_per_class))
            yield np.concatenate(batch)


def train_loader(split, batches, image_size, min_crop, num_workers, skip_broken=False):
    """(images (B, 3, size, size), labels (B,)) of each of the TrainBatches; a crop keeps min_crop .. 1 of the area.

    With skip_broken an image that cannot be read is a blank with label BROKEN; else it raises UnreadableImage.
    """
    shape, flip = transforms.RandomResizedCrop(image_size, scale=(min_crop, 1)), transforms.RandomHorizontalFlip()
    if split.cache:
        return CachedLoader(split, RandomBoxes(shape, flip), batches, image_size, num_workers)
    return _loader(split, [shape, flip], batches, num_workers, skip_broken)


def test_loader(split, batch_size, image_size, num_workers, skip_broken=False):
    """Every image of a split in order: the shorter side to 256/224 of the size, then its centre."""
    order = [(index, 0) for index in range(len(split))]
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    if split.cache:
        return CachedLoader(split, CentreBoxes(resized(image_size), image_size), batches, image_size, num_workers)
    steps = [transforms.Resize(resized(image_size)), transforms.CenterCrop(image_size)]
    return _loader(split, steps, batches, num_workers, skip_broken)


def resized(image_size):
    """The shorter side of an image before its centre is cropped to test."""
    return round(image_size * 256 / 224)


def _loader(split, steps, batches, num_workers, skip_broken):
    transform = transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)])
    return torch.utils.data.DataLoader(
        Images(split, transform, skip_broken),
        batch_sampler=batches,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=torch.cuda.is_available(),
    )


# --------------------------------------------------------------------------------------------- cache
#
# A file of decoded images: their pixels end to end as kernels/crop.py reads them, a table of their sizes here and in
# the data set (int32 (N, 4)), and a seal, the SHA-256 of what the file was made of and of the table. A file without the
# seal that is expected is of other images, another size limit or version, or not whole.

CACHE_VERSION = 1  # of the file and of what is done to the images: a change makes every cache stale


class Cache:
    """Decoded images: uint8 (width, 3, height) each, from offsets[n] in `pixels`.

    pixels: (P,), mapped from the file, which other splits may share, or in a GPU's memory
    sizes, originals: int64 (N, 2), heights and widths, here and in the data set
    """

    def __init__(self, file, offsets, sizes, originals):
        self.file, self.offsets, self.sizes, self.originals = file, offsets, sizes, originals
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a tensor cannot be marked as read-only, which the map is
            self.pixels = torch.from_numpy(np.memmap(file, np.uint8, "r"))

    def __getitem__(self, at):
        part = copy.copy(self)
        part.offsets, part.sizes, part.originals = self.offsets[at], self.sizes[at], self.originals[at]
        return part


def with_cache(splits, dataset, root, limit, num_workers, device="cpu", watch=iter):
    """The splits with their images decoded once, in full, and shrunk to `limit` pixels of the shorter side.

    The file is ROOT/.metrix-cache/DATASET-LIMIT, or where that cannot be written ./data/cache/HASH/DATASET-LIMIT; it is
    built if it is not there or stale. watch: is given the (pixels, sizes) of some images at a time, and passes them on.
    On a GPU the pixels are moved to its memory if they take half of what is free at most; else they are streamed.
    Raises UnreadableImage, or OSError that names the file, if it cannot be written.
    """
    paths = [path for split in splits for path in split.paths]
    stats = [os.stat(path) for path in paths]
    images = [(os.path.relpath(path, root), stat.st_size, stat.st_mtime_ns) for path, stat in zip(paths, stats)]
    source = json.dumps([CACHE_VERSION, limit, images]).encode()
    elsewhere = hashlib.sha256(os.path.realpath(root).encode("utf-8", "surrogateescape")).hexdigest()[:16]
    files = [os.path.join(place, f"{dataset}-{limit}") for place in (f"{root}/.metrix-cache", f"data/cache/{elsewhere}")]
    for file in files:
        if (table := read_cache_table(file, source, len(paths))) is not None:
            break
    else:
        file, table = build_cache(files, source, paths, limit, num_workers, watch)

    sizes, originals = table[:, :2], table[:, 2:]
    offsets = np.cumsum(3 * sizes.prod(1)) - 3 * sizes.prod(1)
    whole = Cache(file, offsets, sizes, originals)
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()  # what an earlier run has left
        if 2 * len(whole.pixels) <= torch.cuda.mem_get_info(device)[0]:
            whole.pixels = whole.pixels.to(device)
        else:
            print(f"{file}: more than half of the GPU's free memory, so images are cropped on the CPU", flush=True)
    ends = np.cumsum([len(split) for split in splits])
    return type(splits)(*(replace(split, cache=whole[end - len(split) : end]) for split, end in zip(splits, ends)))


def read_cache_table(file, source, count):
    """Sizes here and in the data set of the `count` images of a cache, int64 (count, 4); None if it is not to be used."""
    try:
        with open(file, "rb") as stored:
            length = stored.seek(0, os.SEEK_END)
            stored.seek(max(0, length - 16 * count - 32))
            table, seal = stored.read(16 * count), stored.read()
    except OSError:  # not there, or not ours to read
        return None
    if hashlib.sha256(source + table).digest() == seal:
        sizes = np.frombuffer(table, np.int32).reshape(count, 4).astype(np.int64)
        if 3 * sizes[:, :2].prod(1).sum() + len(table) + len(seal) == length:
            return sizes
    print(f"{file}: of other images or settings, or not whole; building it again", flush=True)
    return None


def build_cache(files, source, paths, limit, num_workers, watch):
    """Write the first of the files that can be written. Returns its name and table.

    It has its name only when it is whole. A killed build leaves a file *.unfinished-.., which nobody reads.
    """
    for file in files:
        unfinished = f"{file}.unfinished-{os.urandom(4).hex()}"  # no two are the same, whoever else builds one now
        try:
            os.makedirs(os.path.dirname(file), exist_ok=True)
            out = open(unfinished, "xb")
            break
        except OSError as error:
            reason = f"{file}: cannot be written ({error.strerror})"
            if file is files[-1]:
                raise OSError(f"{reason}; --data-path decode needs no cache") from None
            print(f"{reason}; using {files[-1]}", flush=True)
    Image.init()  # two threads that need a seldom used format first would race for it
    try:
        table = []
        with out:
            for pixels, sizes in watch(_in_threads(decode, ((path, limit) for path in paths), num_workers)):
                out.write(pixels)
                table.append(sizes)
            table = np.concatenate(table)
            out.write(table)
            out.write(hashlib.sha256(source + table.tobytes()).digest())
            out.flush()
            os.fsync(out.fileno())
        os.replace(unfinished, file)
    except (UnreadableImage, BrokenPipeError):
        raise
    except OSError as error:
        raise OSError(f"{file}: cannot be written ({error.strerror}); --data-path decode needs no cache") from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(unfinished)
    return file, table.astype(np.int64)


def decode(path, limit):
    """An image in full, shrunk to `limit`: pixels uint8 (width, 3, height), and its sizes shrunk and not, int32 (1, 4)."""
    image = torch.from_numpy(np.array(open_image(path))).permute(2, 0, 1)  # (3, height, width)
    whole = image.shape[1:]
    if (shorter := min(whole)) > limit:  # bicubic: the bilinear filter would blur what a crop shows later
        size = [round(side * limit / shorter) for side in whole]
        image = torch.nn.functional.interpolate(image[None], size, mode="bicubic", antialias=True)[0]
    return image.permute(2, 0, 1).contiguous().numpy(), np.array([(*image.shape[1:], *whole)], np.int32)


def _in_threads(function, items, num_workers):
    """function(*item) of every item in turn, by `num_workers` threads some items ahead; by 0, when it is asked for.

    Decoding and cropping work outside Python's lock, and from a thread nothing need be sent, as it is from a process,
    which would take as long as making it.
    """
    if not num_workers:
        yield from itertools.starmap(function, items)
        return
    threads, waiting = torch.get_num_threads(), collections.deque()
    try:
        with futures.ThreadPoolExecutor(num_workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for item in items:
                waiting.append(pool.submit(function, *item))
                if len(waiting) > 2 * num_workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
    finally:
        torch.set_num_threads(threads)  # of threads to come: this one has kept its number


class RandomBoxes:
    """What the two transforms would do to these images if they were decoded, by their own code and random numbers."""

    within = True  # the box is cut out, then resized

    def __init__(self, shape, flip):
        self.shape, self.flip = shape, flip

    def __call__(self, sizes, seeds):
        """Boxes (B, 4), top, left, bottom, right, and flips (B,). sizes: heights and widths (B, 2)."""
        boxes, flips = [], []
        with torch.random.fork_rng(devices=[]):
            for (height, width), seed in zip(sizes.tolist(), seeds):
                torch.default_generator.manual_seed(seed)
                image = torch.empty(3, height, width, device="meta")
                top, left, height, width = self.shape.get_params(image, self.shape.scale, self.shape.ratio)
                boxes.append((top, left, top + height, left + width))
                flips.append(bool(torch.rand(1) < self.flip.p))
        return np.array(boxes, np.float64), np.array(flips)


class CentreBoxes:
    """The centre of images whose shorter side is resized to `resized`, where torchvision's rounding puts it."""

    within = False  # resized, then cut out

    def __init__(self, resized, size):
        self.resized, self.size = resized, size

    def __call__(self, sizes, seeds):
        longer = np.floor(self.resized * sizes / sizes.min(1, keepdims=True))  # exact for the shorter side too
        corner = np.round((longer - self.size) / 2)
        boxes = np.concatenate([corner, corner + self.size], axis=1)
        return boxes * np.tile(sizes / longer, 2), np.zeros(len(sizes), bool)


class CachedLoader:
    """(images (B, 3, size, size), labels (B,)) of batches of (index, seed), cropped where the pixels are."""

    def __init__(self, split, boxes, batches, size, num_workers):
        self.cache, self.labels = split.cache, torch.tensor(split.labels)
        self.boxes, self.batches, self.size = boxes, batches, size
        pixels = self.cache.pixels
        self.num_workers = 0 if pixels.is_cuda or in_triton(pixels) else num_workers  # its interpreter knows one thread

    def __iter__(self):
        return _in_threads(self.show, map(self.views, self.batches), self.num_workers)

    def views(self, batch):
        """Where the images lie, what of them to show, as `crop` takes it, and their labels."""
        index, seeds = (list(column) for column in zip(*batch))
        sizes, originals = self.cache.sizes[index], self.cache.originals[index]
        boxes, flips = self.boxes(originals, seeds)
        # In this order a border of an image stays one in floating point, and nothing moves where nothing was shrunk.
        boxes = boxes * np.tile(sizes, 2) / np.tile(originals, 2)
        views = (self.cache.offsets[index], sizes.astype(np.int32), boxes, flips)
        return [torch.from_numpy(column) for column in views], self.labels[index]

    def show(self, views, labels):
        pixels, out = self.cache.pixels, None
        if not pixels.is_cuda:  # NumPy asks for huge pages, which makes touching fresh memory several times faster
            out = torch.from_numpy(np.empty((len(labels), self.size, self.size, 3), np.float32)).permute(0, 3, 1, 2)
        views = [column.to(pixels.device, non_blocking=True) for column in views]
        return crop(pixels, *views, self.size, IMAGENET_MEAN, IMAGENET_STD, self.boxes.within, out), labels

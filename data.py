"""Images and labels of a data set, and how they become batches.

    load(dataset, root)   -> (train, test) or (train, query, gallery), each with .paths, .labels, .classes;
                             the classes to train on never overlap the others
    train_loader(...)     random-resized-crop + flip, shuffled or class-balanced batches
    test_loader(...)      resize + centre crop, in order

cub, cars, sop and inshop are read from their own lists, in every layout they are found in. A folder is any tree of
images, and a class in it a directory that directly holds some; `toy` is generated once and then read like it:

    ROOT/train/../CLASS/IMAGE  and  ROOT/test/../CLASS/IMAGE, or
    ROOT/../CLASS/IMAGE        the first half of the sorted classes trains, the second half tests

All randomness of an epoch follows from (seed, epoch), that of an augmentation from the seed drawn for it with its index:
the same images whatever the number of workers.
"""

import functools
import numbers
import os
import shutil
import tempfile
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw
from torchvision import transforms

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

    def __len__(self):
        return len(self.paths)


class Splits(NamedTuple):
    train: Split
    test: Split


class RetrievalSplits(NamedTuple):
    train: Split
    query: Split
    gallery: Split  # the classes of `query`, numbered alike


def load(dataset, root):
    """The splits of a data set under `root`: Splits, or RetrievalSplits where queries search a gallery of its own.

    Raises ValueError or OSError with one line that names the file or directory and what to do.
    """
    splits = DATASETS[dataset](root)
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
    steps = [transforms.RandomResizedCrop(image_size, scale=(min_crop, 1)), transforms.RandomHorizontalFlip()]
    return _loader(split, steps, batches, num_workers, skip_broken)


def test_loader(split, batch_size, image_size, num_workers, skip_broken=False):
    """Every image of a split in order: the shorter side to 256/224 of the size, then its centre."""
    steps = [transforms.Resize(round(image_size * 256 / 224)), transforms.CenterCrop(image_size)]
    order = [(index, 0) for index in range(len(split))]
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    return _loader(split, steps, batches, num_workers, skip_broken)


def _loader(split, steps, batches, num_workers, skip_broken):
    transform = transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)])
    return torch.utils.data.DataLoader(
        Images(split, transform, skip_broken),
        batch_sampler=batches,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=torch.cuda.is_available(),
    )

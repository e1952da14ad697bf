"""Data sets, batches and image transforms.

    load(dataset, root)   -> Splits(train, test) or RetrievalSplits(train, query, gallery)
    train_loader(...)     random resized crop + flip, shuffled or class-balanced batches
    test_loader(...)      resize + centre crop, in order
    normalize(images)     uint8 batches from the loaders -> float32, on the images' device

cub, cars, sop and inshop are read from their own lists. `folder` is any tree of images; a class is a directory that
directly holds images. `toy` is generated on first use, then read like a folder:

    ROOT/train/../CLASS/IMAGE  and  ROOT/test/../CLASS/IMAGE, or
    ROOT/../CLASS/IMAGE        the first half of the sorted classes trains, the second half tests

Training and test classes never overlap. An epoch's batches follow from (seed, epoch), and each image's augmentation
from a seed drawn with its index, so batches do not depend on the number of workers.
"""

import glob
import os
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
    """An image file that Pillow cannot read; the message names it."""


@dataclass
class Split:
    paths: list  # N file names
    labels: list  # N ints, 0 .. len(classes) - 1
    classes: list  # class names

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        """A slice of the images, as a split with the same classes."""
        return Split(self.paths[index], self.labels[index], self.classes)


class Splits(NamedTuple):
    train: Split
    test: Split


class RetrievalSplits(NamedTuple):
    train: Split
    query: Split
    gallery: Split  # same classes as query


def load(dataset, root, validation=False):
    """The splits of a data set: Splits, or RetrievalSplits if queries search a separate gallery.

    validation: use only the training classes, half to train and half to test. Choose hyperparameters on these.
    Raises ValueError or OSError with one line that names the file or directory and what to do.
    """
    splits = DATASETS[dataset](root)
    if validation:
        splits = split_classes(splits.train, len(splits.train.classes) // 2)
    train, query, gallery = splits.train, splits[1], splits[-1]
    if shared := sorted(set(train.classes) & set(query.classes + gallery.classes)):
        raise ValueError(
            f"{root}: {len(shared)} class(es) in both training and test ({', '.join(shared[:3])}, ..); "
            "retrieval is tested on unseen classes, so remove them from one"
        )
    for name, split in splits._asdict().items():
        if len(split.classes) < 2:
            raise ValueError(f"{root}: {len(split.classes)} class(es) in the {name} split, at least 2 are needed")
    if queries_without_match(splits) == len(query):
        raise ValueError(f"{root}: no query has another image of its class to find; add images to the test classes")
    for path in (path for split in splits for path in split.paths):
        if not os.path.exists(path):
            raise FileNotFoundError(f"{path}: no such file, although it is listed; unpack the images again")
    return splits


def queries_without_match(splits):
    """The number of queries whose class has no (other) image to find."""
    query, gallery = splits[1], splits[-1]
    class_sizes = np.bincount(gallery.labels, minlength=len(query.classes))
    return int((class_sizes[query.labels] <= (query is gallery)).sum())  # a query does not search for itself


def sizes(splits):
    """{"train_images": .., "test_images": .., "train_classes": .., ..}"""
    counts = {f"{name}_images": len(split) for name, split in splits._asdict().items()}
    return counts | {f"{name}_classes": len(split.classes) for name, split in splits._asdict().items()}


def make_split(directory, files, names, classes=None):
    """A split of DIRECTORY/FILE images from the class name of each. Classes are numbered in sorted order."""
    classes = sorted(set(names)) if classes is None else classes
    label = {name: n for n, name in enumerate(classes)}
    paths = [os.path.join(directory, file) for file in files]
    return Split(paths, [label[name] for name in names], [str(name) for name in classes])


def split_classes(split, num_train):
    """The first `num_train` classes train, the others test."""
    parts = []
    for first, last in ((0, num_train), (num_train, len(split.classes))):
        images = [(path, label - first) for path, label in zip(split.paths, split.labels) if first <= label < last]
        parts.append(Split([path for path, _ in images], [label for _, label in images], split.classes[first:last]))
    return Splits(*parts)


# ------------------------------------------------------------------------------------------- folders


def load_folder(root):
    if not os.path.isdir(root):
        raise FileNotFoundError(f"{root}: no such directory; give your image folder with --data-root")
    train, test = os.path.join(root, "train"), os.path.join(root, "test")
    if os.path.isdir(train) and os.path.isdir(test):
        return Splits(find_images(train), find_images(test))
    if os.path.isdir(train) or os.path.isdir(test):
        raise ValueError(f"{root}: has only one of train/ and test/; add the other, or use neither")
    split = find_images(root)
    if len(split.classes) < 4:
        raise ValueError(
            f"{root}: {len(split.classes)} class(es), at least 4 are needed, half to train and half to test; "
            "a class is a directory that directly holds images"
        )
    return split_classes(split, len(split.classes) // 2)


def find_images(root):
    """All images below root except hidden ones. An image's class is its directory, relative to root."""
    files = glob.glob("**/*", root_dir=root, recursive=True)
    images = sorted((os.path.dirname(f) or ".", f) for f in files if f.lower().endswith(IMAGE_SUFFIXES))
    if not images:
        raise ValueError(f"{root}: no images in it; looked for {' '.join(IMAGE_SUFFIXES)} in all subdirectories")
    return make_split(root, [file for _, file in images], [name for name, _ in images])


# ---------------------------------------------------------------------------------------- benchmarks

# Sizes of the full sets. Results on any other size are not comparable with published ones.
FULL_SIZES = {
    "cub": dict(train_images=5864, train_classes=100, test_images=5924, test_classes=100),
    "cars": dict(train_images=8054, train_classes=98, test_images=8131, test_classes=98),
    "sop": dict(train_images=59551, train_classes=11318, test_images=60502, test_classes=11316),
    "inshop": dict(train_images=25882, train_classes=3997, query_images=14218, query_classes=3985)
    | dict(gallery_images=12612, gallery_classes=3985),
}


def load_cub(root):
    """CUB-200-2011: class ids 1 .. 100 train, 101 .. 200 test. Without its lists, the sorted class folders."""
    images = find(root, ("CUB_200_2011", ""), ("images",), "CUB-200-2011 (CUB_200_2011.tgz)")
    base = os.path.dirname(images)
    names, labels = os.path.join(base, "images.txt"), os.path.join(base, "image_class_labels.txt")
    if not os.path.exists(names) and not os.path.exists(labels):
        return load_folder(images)
    files = dict(read_list(names, image_id=int, image_name=object).tolist())
    rows = read_list(labels, image_id=int, class_id=int)
    if set(files) != set(rows["image_id"]):
        raise ValueError(f"{labels}: does not list the same images as {names}; unpack CUB-200-2011 again")
    split = make_split(images, [files[image] for image in rows["image_id"]], rows["class_id"].tolist())
    return split_classes(split, sum(int(name) <= 100 for name in split.classes))


def load_cars(root):
    """Cars196: classes 1 .. 98 train, 99 .. 196 test. The official halves share classes, so they are pooled."""
    what = "Cars196 (its images and the .mat lists with classes)"
    images = find(root, ("cars196", "stanford_cars", ""), ("car_ims", "cars_train"), what)
    base, lists = os.path.dirname(images), {"cars_annos.mat": ""}
    if os.path.basename(images) == "cars_train":
        lists = {"cars_train_annos.mat": "cars_train", "cars_test_annos_withlabels.mat": "cars_test"}
    files, ids = [], []
    for name, directory in lists.items():
        for path, class_id in read_mat(find(base, ("", "devkit"), (name,), what)):
            files.append(os.path.join(directory, path))
            ids.append(class_id)
    split = make_split(base, files, ids)
    return split_classes(split, sum(int(name) <= 98 for name in split.classes))


def load_sop(root):
    """Stanford Online Products: a list for training, a list for testing."""
    train = find(root, ("Stanford_Online_Products", ""), ("Ebay_train.txt",), "Stanford Online Products")
    base, splits = os.path.dirname(train), []
    for file in (train, os.path.join(base, "Ebay_test.txt")):
        rows = read_list(file, header_lines=1, image_id=int, class_id=int, super_class_id=int, path=object)
        splits.append(make_split(base, rows["path"], rows["class_id"].tolist()))
    return Splits(*splits)


def load_inshop(root):
    """DeepFashion In-Shop. Its list is at the top or in Eval/, its images in Img/img/ or img/."""
    directories = ("InShop_Clothes", "Inshop_Clothes", "In-shop Clothes Retrieval Benchmark", "")
    lists = ("list_eval_partition.txt", os.path.join("Eval", "list_eval_partition.txt"))
    file = find(root, directories, lists, "In-Shop Clothes Retrieval (DeepFashion)")
    base = os.path.dirname(file)
    if os.path.basename(base) == "Eval":
        base = os.path.dirname(base)
    images = os.path.join(base, "Img") if os.path.isdir(os.path.join(base, "Img", "img")) else base
    rows = read_list(file, header_lines=2, image_name=object, item_id=object, evaluation_status=object)
    train, query, gallery = (rows[rows["evaluation_status"] == name] for name in ("train", "query", "gallery"))
    if len(train) + len(query) + len(gallery) != len(rows):
        raise ValueError(f"{file}: every evaluation_status must be train, query or gallery; download the list again")
    items = sorted({*query["item_id"], *gallery["item_id"]})
    return RetrievalSplits(
        make_split(images, train["image_name"], train["item_id"]),
        make_split(images, query["image_name"], query["item_id"], items),
        make_split(images, gallery["image_name"], gallery["item_id"], items),
    )


def find(root, directories, names, what):
    """The first existing ROOT/DIRECTORY/NAME."""
    for directory in directories:
        for name in names:
            if os.path.exists(path := os.path.join(root, directory, name)):
                return path
    missing = " or ".join(os.path.join(directories[0], name) for name in names)
    raise FileNotFoundError(f"{root}: no {missing} in it; unpack {what} in it, or set --data-root")


def read_list(file, header_lines=0, **columns):
    """The rows of a whitespace-separated list, with one field for each of `columns` ({name: type}).

    The last header line holds the column names, a line above it the number of rows.
    """
    expected = f"expected the columns {' '.join(columns)}"
    try:
        with open(file, encoding="utf-8-sig") as lines:
            header = [lines.readline().split() for _ in range(header_lines)]
            rows = np.loadtxt(lines, dtype=list(columns.items()), comments=None, ndmin=1)
    except FileNotFoundError:
        raise FileNotFoundError(f"{file}: no such file; it is part of the data set's download") from None
    except ValueError as error:
        raise ValueError(f"{file}: {expected} ({str(error).split(';')[0]})") from None
    if header and header[-1] != list(columns):
        raise ValueError(f"{file}: {expected} in header line {header_lines}, got {' '.join(header[-1])[:80]!r}")
    if header_lines == 2 and header[0] != [str(len(rows))]:
        raise ValueError(f"{file}: line 1 must be the number of images, {len(rows)}; download the list again")
    return rows


def read_mat(file):
    """[(image path, class id), ..] from a Cars196 list, old (relative_im_path) or new (fname)."""
    try:
        from scipy.io import loadmat  # only Cars196 needs it
    except ImportError:
        raise ValueError(f"{file}: reading it needs scipy; pip install scipy") from None
    try:
        rows = np.atleast_1d(loadmat(file, squeeze_me=True)["annotations"])
        path = "relative_im_path" if "relative_im_path" in rows.dtype.names else "fname"
        return [(str(row[path]), int(row["class"])) for row in rows]
    except Exception as error:  # scipy raises many types on a broken file
        raise ValueError(
            f"{file}: not a Cars196 list with class labels ({type(error).__name__}: {error}); download it again"
        ) from error


# ----------------------------------------------------------------------------------------------- toy

TOY_VERSION = 1  # increase it when the generator changes
TOY_CLASSES, TOY_IMAGES, TOY_SIZE = 80, 20, 72  # classes, images per class, pixels per side
TOY_FAMILY, TOY_CONTRAST = 4, 0.8  # classes per family; how much they differ (1: as much as different families)


def load_toy(root):
    """The generated set ROOT/toy-vN. It is written to a temporary directory, then renamed."""
    tree = os.path.join(root, f"toy-v{TOY_VERSION}")
    if not os.path.isdir(tree):
        print(f"writing the toy data set to {tree}", flush=True)
        os.makedirs(root, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"toy-v{TOY_VERSION}.unfinished-", dir=root) as unfinished:
            write_toy(os.path.join(unfinished, "toy"))
            try:
                os.rename(os.path.join(unfinished, "toy"), tree)
            except OSError:
                if not os.path.isdir(tree):  # otherwise another process has just written the same images
                    raise
    return load_folder(tree)


def write_toy(tree):
    """Creatures with a wavy outline and five spots. Classes of a family look alike; pose, colours and clutter vary."""
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
    return {
        "amplitude": rng.uniform(0, 0.22, 5),  # of the outline's waves, 2 .. 6 per turn
        "phase": rng.uniform(-np.pi, np.pi, 5),
        "angle": np.arange(5) * 2 * np.pi / 5 + rng.uniform(-0.6, 0.6, 5),  # of the spots
        "distance": rng.uniform(0.15, 0.7, 5),
        "size": rng.uniform(0.03, 0.2, 5),
        "colours": rng.uniform(60, 255, (2, 3)),  # body, spots
    }


def _photograph(creature, rng):
    """One image, drawn at twice its size and reduced to smooth the edges."""
    size = 2 * TOY_SIZE
    image = Image.new("RGB", (size, size), _colour(rng.uniform(20, 100) + rng.normal(0, 15, 3)))
    draw = ImageDraw.Draw(image)

    def clutter(count):
        for _ in range(count):
            _blob(draw, rng.uniform(0, size, 2), rng.uniform(2, size / 12), rng.uniform(0, 255, 3))

    clutter(10)
    scale, turn = size * rng.uniform(0.28, 0.38), rng.normal(0, 0.2)
    squeeze, centre = rng.uniform(0.8, 1.0), size / 2 + rng.uniform(-0.1, 0.1, 2) * size
    body, spots = creature["colours"] * rng.uniform(0.85, 1.15) + rng.normal(0, 10, (2, 3))  # brightness, then hue

    def to_pixels(distance, angle):
        x, y = distance * np.cos(angle + turn), squeeze * distance * np.sin(angle + turn)
        return centre + scale * np.stack([x, y], -1)

    theta = np.linspace(0, 2 * np.pi, 120, endpoint=False)
    waves = np.cos(np.outer(theta, np.arange(2, 7)) + creature["phase"]) @ creature["amplitude"]
    draw.polygon([tuple(point) for point in to_pixels(1 + waves, theta)], fill=_colour(body))
    for angle, distance, spot in zip(creature["angle"], creature["distance"], creature["size"]):
        _blob(draw, to_pixels(distance, angle), scale * spot, spots)
    clutter(2)

    pixels = np.asarray(image.resize((TOY_SIZE, TOY_SIZE), Image.BOX)) + rng.normal(0, 8, (TOY_SIZE, TOY_SIZE, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _blob(draw, centre, radius, colour):
    draw.ellipse((*(centre - radius), *(centre + radius)), fill=_colour(colour))


def _colour(rgb):
    return tuple(int(c) for c in np.clip(rgb, 0, 255))


DATASETS = dict(cub=load_cub, cars=load_cars, sop=load_sop, inshop=load_inshop, folder=load_folder, toy=load_toy)


# ------------------------------------------------------------------------------------------- batches


class TrainBatches:
    """Batches of (index, seed). Set .epoch before each pass.

    images_per_class = 0: all images in random order; the incomplete last batch is dropped.
    images_per_class > 0: each batch has batch_size / images_per_class classes, sampled without replacement, with this
    many images each. Images are repeated only if their class has too few.
    Either way an epoch has N // batch_size batches. shard: the slice of each batch to yield, one per process.
    """

    def __init__(self, labels, batch_size, images_per_class, seed, shard=slice(None)):
        self.batch_size, self.images_per_class, self.shard = batch_size, images_per_class, shard
        self.seed, self.epoch = seed, 0
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
            yield list(zip(batch.tolist(), seeds.tolist()))[self.shard]

    def shuffled(self, rng):
        order = rng.permutation(self.num_images)
        yield from order[: len(self) * self.batch_size].reshape(len(self), self.batch_size)

    def balanced(self, rng):
        classes_per_batch = self.batch_size // self.images_per_class
        remaining = []  # classes left in this pass over all classes
        for _ in range(len(self)):
            if len(remaining) < classes_per_batch:
                remaining = rng.permutation(len(self.members)).tolist()
            chosen, remaining = remaining[:classes_per_batch], remaining[classes_per_batch:]
            batch = []
            for members in (self.members[c] for c in chosen):
                batch.append(rng.choice(members, self.images_per_class, replace=len(members) < self.images_per_class))
            yield np.concatenate(batch)


def train_loader(split, batches, image_size, min_crop, num_workers):
    """(images, labels) of each of the TrainBatches, augmented: uint8 (B, 3, size, size), int64 (B,)."""
    crop = transforms.RandomResizedCrop(image_size, scale=(min_crop, 1))
    return _loader(split, [crop, transforms.RandomHorizontalFlip()], batches, num_workers)


def test_loader(split, batch_size, image_size, num_workers):
    """(images, labels) of a whole split in order: uint8 (B, 3, size, size), int64 (B,)."""
    items = [(index, 0) for index in range(len(split))]
    batches = [items[start : start + batch_size] for start in range(0, len(items), batch_size)]
    resize = transforms.Resize(round(image_size * 256 / 224))
    return _loader(split, [resize, transforms.CenterCrop(image_size)], batches, num_workers)


def _loader(split, steps, batches, num_workers):
    return torch.utils.data.DataLoader(
        Images(split, transforms.Compose([*steps, transforms.PILToTensor()])),
        batch_sampler=batches,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=torch.cuda.is_available(),
    )


class Images(torch.utils.data.Dataset):
    """(uint8 image (3, size, size), label) of an item (index, seed). The seed is the augmentation's."""

    def __init__(self, split, transform):
        self.split, self.transform = split, transform
        self.decoded = {}  # small images by index, at most 200 MB per worker: toy loads 3x as fast

    def __getitem__(self, item):
        index, seed = item
        image = self.decoded.get(index) or open_image(self.split.paths[index])
        if max(image.size) <= 128 and len(self.decoded) < 4096:
            self.decoded[index] = image
        torch.default_generator.manual_seed(seed)  # nothing else in training draws from it
        return self.transform(image), self.split.labels[index]


def open_image(path):
    """The image as RGB. Raises UnreadableImage."""
    try:
        with Image.open(path) as image:
            if image.mode.startswith("I"):  # 16-bit greyscale, which convert would clip to white
                image = Image.fromarray((np.asarray(image) / 257).clip(0, 255).astype(np.uint8))
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # what Pillow raises
        reason = str(error).replace(repr(path), "").strip().splitlines()[0]
        raise UnreadableImage(f"{path}: cannot be read as an image ({reason}); repair or remove it") from None


def normalize(images):
    """uint8 (B, 3, H, W) -> float32, with ImageNet's mean and standard deviation."""
    mean, std = torch.tensor([IMAGENET_MEAN, IMAGENET_STD], device=images.device)[:, :, None, None]
    return (images / 255 - mean) / std

"""Data sets, batches and image transforms.

    load(dataset, root)   -> Splits(train, test) or RetrievalSplits(train, query, gallery)
    train_loader(...)     random resized crop + flip, shuffled or class-balanced batches
    test_loader(...)      resize + centre crop, in order

cub, cars, sop and inshop are read from their own lists. `toy` is generated on first use. `folder` is any tree of
images. Every directory that directly holds images is a class. Training and test classes never overlap:

    ROOT/train/[any/]CLASS/IMAGE and ROOT/test/[any/]CLASS/IMAGE
    ROOT/[any/]CLASS/IMAGE    the first half of the sorted classes trains, the second half tests

Batches are seeded by (seed, epoch) and each image carries its own augmentation seed, so the number of workers does
not matter. Bad input raises ValueError or OSError with one line.
"""

import collections
import contextlib
import os
import pathlib
import re
import tempfile
import warnings
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw
from torchvision import transforms

warnings.filterwarnings("ignore", module="PIL")  # Pillow warns about images that it can read
IMAGE_FORMATS = {"AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP"}
IMAGE_SUFFIXES = {suffix for suffix, name in Image.registered_extensions().items() if name in IMAGE_FORMATS}
HIDDEN = (".", "@eaDir", "lost+found")  # names that begin like this are skipped
IMAGENET = torch.tensor([(0.485, 0.456, 0.406), (0.229, 0.224, 0.225)])[:, :, None, None]  # mean, deviation


class UnreadableImage(OSError):
    """An image that cannot be read. The message names its file."""


@dataclass
class Split:
    paths: list  # N file names
    labels: list  # N ints, 0 .. len(classes) - 1
    classes: list  # class names

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, part):  # a slice
        return Split(self.paths[part], self.labels[part], self.classes)


Splits = collections.namedtuple("Splits", "train test")
RetrievalSplits = collections.namedtuple("RetrievalSplits", "train query gallery")  # query and gallery: same classes


def load(dataset, root, validation=False):
    """Splits or RetrievalSplits. validation: train on half of the training classes and test on the others."""
    images = DATASETS[dataset](root)  # Splits or RetrievalSplits of [(class, path), ..]
    if validation:
        images = split_classes(images.train)
    test = [image for part in images[1:] for image in part]
    splits = type(images)(make_split(images.train, images.train), *(make_split(part, test) for part in images[1:]))
    classes = [set(split.classes) for split in splits[:2]]
    names = [{os.path.basename(name) for name in group} for group in classes]
    folds = names[0] == names[1] and len(names[0]) > 1  # such as fold1/a, fold1/b and fold2/a, fold2/b
    if shared := sorted(names[0] if folds else classes[0] & classes[1]):
        found = f"{len(shared)} class(es) in both training and test, such as {', '.join(shared[:3])}"
        raise ValueError(f"{root}: {found}; tests need unseen classes, so keep each class in one of them")
    if shared := sorted(names[0] & names[1]):
        found = f"{len(shared)} class name(s) in both training and test, such as {shared[0]}"
        print(f"{found}; they count as different classes, because they are in different directories")
    for name, split in splits._asdict().items():
        if len(split.classes) < 2:
            raise ValueError(f"{root}: {len(split.classes)} class(es) in the {name} split, at least 2 are needed")
    if queries_without_match(splits) == len(splits[1]):
        raise ValueError(f"{root}: no query has another image of its class to find; add images to the test classes")
    for path in (path for split in splits for path in split.paths):
        if not os.path.isfile(path):
            raise FileNotFoundError(f"{path}: missing, not permitted or no regular file; unpack it again, or remove it")
    return splits


def queries_without_match(splits):
    """The number of queries with no match in the gallery."""
    query, gallery = splits[1], splits[-1]
    matches = np.bincount(gallery.labels, minlength=len(query.classes))[query.labels]
    return int((matches == (1 if query is gallery else 0)).sum())  # 1: the query itself


def sizes(splits):
    """{"train_images": .., "test_images": .., "train_classes": .., ..}"""
    counts = {f"{name}_images": len(split) for name, split in splits._asdict().items()}
    return counts | {f"{name}_classes": len(split.classes) for name, split in splits._asdict().items()}


def make_split(images, others):
    """A split from the (class, path) of each image. Labels number the sorted classes of `others`."""
    label = {name: n for n, name in enumerate(sorted({name for name, _ in others}))}
    return Split([path for _, path in images], [label[name] for name, _ in images], [str(name) for name in label])


def split_classes(images, train=None):
    """Images of the classes in `train`, by default the first half of the sorted classes, and the other images."""
    if train is None:
        classes = sorted({name for name, _ in images})
        train = set(classes[: len(classes) // 2])
    return Splits(*([image for image in images if (image[0] in train) == chosen] for chosen in (True, False)))


# ------------------------------------------------------------------------------------------- folders

SPLIT_WORD = re.compile("train(ing)?|test(ing)?|val(id(ation)?)?")


def load_folder(root):
    """The images in ROOT/train and ROOT/test, or else the two halves of the sorted classes."""
    images = find_images(root)
    tops = {name.split("/")[0] for name, _ in images}
    if {"train", "test"} <= tops:
        ignored = tops & {"val", "valid", "validation", "."}
        if others := sorted(tops - ignored - {"train", "test"}):
            raise ValueError(f"{root}: found {', '.join(others[:4])} beside train and test; move this to another place")
        if ignored:
            print(f"left out: images in {', '.join(sorted(ignored))}, beside train and test")
        train = [(name[len("train/") :] or ".", path) for name, path in images if name.startswith("train")]
        test = [(name[len("test/") :] or ".", path) for name, path in images if name.startswith("test")]
        return Splits(train, test)
    if "." in tops and len(tops) > 1:  # stray images are no class
        images = [(name, path) for name, path in images if name != "."]
        print("left out: images directly in", root)
    # Directories named like a split are refused: Train, or a pair such as cars_train and cars_test.
    classes = {name for name, _ in images}
    paths = sorted({path.as_posix() for name in classes for path in pathlib.PurePath(name, "image").parents})
    keys = [SPLIT_WORD.sub("*", path.lower()) for path in paths]
    ends = [os.path.basename(key) for key in keys]
    found = [path for path, key, end in zip(paths, keys, ends) if end == "*" or ("*" in end and keys.count(key) > 1)]
    if found := ", ".join(found[:4]):
        raise ValueError(f"{root}: found {found}; give a directory that holds train/ and test/ only, or classes only")
    if len(classes) < 4:
        raise ValueError(f"{root}: {len(classes)} class(es), at least 4 are needed, half to train, half to test")
    return split_classes(images)


def find_images(root):
    """[(class, path), ..] of all images below root, sorted. A class is a directory, relative to root."""
    images, left_out = [], collections.Counter()
    seen = set(pathlib.Path(root).resolve().parents)  # links may lead back, or above root
    for directory, subdirectories, files in os.walk(root, onerror=cannot_read, followlinks=True):
        if (real := pathlib.Path(directory).resolve()) in seen:
            print(f"left out: {directory}, a link to a directory that is there already")
            subdirectories.clear()
            continue
        seen.add(real)
        subdirectories[:] = sorted(name for name in subdirectories if not name.startswith(HIDDEN))
        name = pathlib.Path(directory).relative_to(root).as_posix()
        for file in (file for file in files if not file.startswith(HIDDEN)):
            suffix = os.path.splitext(file)[1].lower()
            if suffix in IMAGE_SUFFIXES:
                images.append((name, os.path.join(directory, file)))
            else:
                left_out[suffix or "without a suffix"] += 1
    if not images:
        raise ValueError(f"{root}: no images in it or below; looked for {' '.join(sorted(IMAGE_SUFFIXES))}")
    if left_out:
        print("left out:", ", ".join(f"{count} {suffix}" for suffix, count in left_out.most_common()))
    return sorted(images)


def cannot_read(error):
    raise OSError(f"{error.filename}: cannot be read ({error.strerror.lower()}); check --data-root") from None


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
    folder = first_existing(root, ("CUB_200_2011", ""), ("images",), "CUB-200-2011 (CUB_200_2011.tgz)")
    base = os.path.dirname(folder)
    names, labels = os.path.join(base, "images.txt"), os.path.join(base, "image_class_labels.txt")
    if not os.path.exists(names) and not os.path.exists(labels):
        return load_folder(folder)
    files = dict(read_list(names, image_id=int, image_name=object))
    rows = read_list(labels, image_id=int, class_id=int)
    if files.keys() != dict(rows).keys():
        raise ValueError(f"{labels}: does not list the same images as {names}; unpack CUB-200-2011 again")
    images = [(class_id, os.path.join(folder, files[image])) for image, class_id in rows]
    return split_classes(images, train=range(1, 101))


def load_cars(root):
    """Cars196: class ids 1 .. 98 train, 99 .. 196 test. The official sets share classes, so they are merged first."""
    what = "Cars196 (its images and the .mat lists with classes)"
    folder = first_existing(root, ("cars196", "stanford_cars", ""), ("car_ims", "cars_train"), what)
    base, lists, images = os.path.dirname(folder), {"cars_annos.mat": ""}, []
    if os.path.basename(folder) == "cars_train":
        lists = {"cars_train_annos.mat": "cars_train", "cars_test_annos_withlabels.mat": "cars_test"}
    for name, directory in lists.items():
        if os.path.isdir(os.path.join(base, directory, directory)):  # cars_train/cars_train in many copies
            directory = os.path.join(directory, directory)
        rows = read_mat(first_existing(base, ("", "devkit", "car_devkit/devkit"), (name,), what))
        images += [(class_id, os.path.join(base, directory, path)) for path, class_id in rows]
    return split_classes(images, train=range(1, 99))


def load_sop(root):
    """Stanford Online Products: a list for training, a list for testing."""
    train = first_existing(root, ("Stanford_Online_Products", ""), ("Ebay_train.txt",), "Stanford Online Products")
    base, images = os.path.dirname(train), []
    for file in (train, os.path.join(base, "Ebay_test.txt")):
        rows = read_list(file, header_lines=1, image_id=int, class_id=int, super_class_id=int, path=object)
        images.append([(class_id, os.path.join(base, path)) for _, class_id, _, path in rows])
    return Splits(*images)


def load_inshop(root):
    """DeepFashion In-Shop. Its list is at the top or in Eval/, its images in Img/img/ or img/."""
    directories = ("InShop_Clothes", "Inshop_Clothes", "In-shop Clothes Retrieval Benchmark", "")
    lists = ("list_eval_partition.txt", "Eval/list_eval_partition.txt")
    file = first_existing(root, directories, lists, "In-Shop Clothes Retrieval (DeepFashion)")
    base = os.path.dirname(file).removesuffix("/Eval")
    base = os.path.join(base, "Img" if os.path.isdir(os.path.join(base, "Img/img")) else "")
    images = RetrievalSplits([], [], [])
    for path, item, status in read_list(file, 2, image_name=object, item_id=object, evaluation_status=object):
        if status not in images._fields:
            raise ValueError(f"{file}: every evaluation_status must be train, query or gallery; download it again")
        getattr(images, status).append((item, os.path.join(base, path)))
    return images


def first_existing(root, directories, names, what):
    """The first ROOT/DIRECTORY/NAME that exists."""
    paths = [os.path.join(root, directory, name) for directory in directories for name in names]
    if found := next(filter(os.path.exists, paths), None):
        return found
    missing = " or ".join(os.path.join(directories[0], name) for name in names)
    raise FileNotFoundError(f"{root}: {missing} is missing; unpack {what} into this directory, or set --data-root")


def read_list(file, header_lines=0, **columns):
    """The rows of a whitespace-separated list of `columns` ({name: type}). Headers: [row count,] column names."""
    expected = f"expected the columns {' '.join(columns)}"
    try:
        with open(file, encoding="utf-8-sig") as lines:
            header = [lines.readline().split() for _ in range(header_lines)]
            rows = np.loadtxt(lines, dtype=list(columns.items()), comments=None, ndmin=1).tolist()
    except OSError as error:
        cannot_read(error)
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

        rows = np.atleast_1d(loadmat(file, squeeze_me=True)["annotations"])
        path = "relative_im_path" if "relative_im_path" in rows.dtype.names else "fname"
        return [(str(row[path]), int(row["class"])) for row in rows]
    except Exception as error:  # scipy is missing, or raises one of many types on a broken file
        raise ValueError(f"{file}: no Cars196 list with class labels ({type(error).__name__}: {error})") from error


# ----------------------------------------------------------------------------------------------- toy

TOY_VERSION = 1  # increase it when the generator changes
TOY_CLASSES, TOY_IMAGES, TOY_SIZE = 80, 20, 72  # classes, images per class, pixels per side
TOY_FAMILY = 4  # classes per look-alike family
TOY_CONTRAST = 0.8  # how different they are: 0 identical, 1 unrelated


def load_toy(root):
    """The generated set ROOT/toy-vN. It is written to a temporary directory, then renamed."""
    tree = os.path.join(root, f"toy-v{TOY_VERSION}")
    if not os.path.isdir(tree):
        print(f"writing the toy data set to {tree}", flush=True)
        os.makedirs(root, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"toy-v{TOY_VERSION}.unfinished-", dir=root) as unfinished:
            write_toy(os.path.join(unfinished, "toy"))
            with contextlib.suppress(OSError):  # another process has just written the same images
                os.rename(os.path.join(unfinished, "toy"), tree)
    return load_folder(tree)


def write_toy(tree):
    """Creatures with a wavy outline and five spots. Classes of a family look alike; pose, colours and clutter vary."""
    rng = np.random.default_rng(TOY_VERSION)
    for label in range(TOY_CLASSES):
        family = family if label % TOY_FAMILY else _creature(rng)
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

    def blob(centre, radius, colour):
        draw.ellipse((*(centre - radius), *(centre + radius)), fill=_colour(colour))

    def clutter(count):
        for _ in range(count):
            blob(rng.uniform(0, size, 2), rng.uniform(2, size / 12), rng.uniform(0, 255, 3))

    clutter(10)
    scale, turn = size * rng.uniform(0.28, 0.38), rng.normal(0, 0.2)
    squeeze, centre = rng.uniform(0.8, 1.0), size / 2 + rng.uniform(-0.1, 0.1, 2) * size
    body, spots = creature["colours"] * rng.uniform(0.85, 1.15) + rng.normal(0, 10, (2, 3))  # brightness, then hue
    theta = np.linspace(0, 2 * np.pi, 120, endpoint=False)
    waves = np.cos(np.outer(theta, np.arange(2, 7)) + creature["phase"]) @ creature["amplitude"]
    distance = np.append(1 + waves, creature["distance"])  # of the outline and the spots
    angle = np.append(theta, creature["angle"]) + turn
    points = centre + scale * np.stack([distance * np.cos(angle), squeeze * distance * np.sin(angle)], -1)
    draw.polygon(points[:120].ravel().tolist(), fill=_colour(body))
    for point, radius in zip(points[120:], scale * creature["size"]):
        blob(point, radius, spots)
    clutter(2)
    pixels = np.asarray(image.resize((TOY_SIZE, TOY_SIZE), Image.BOX)) + rng.normal(0, 8, (TOY_SIZE, TOY_SIZE, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _colour(rgb):
    return tuple(int(c) for c in np.clip(rgb, 0, 255))


DATASETS = dict(cub=load_cub, cars=load_cars, sop=load_sop, inshop=load_inshop, folder=load_folder, toy=load_toy)


# ------------------------------------------------------------------------------------------- batches


class TrainBatches:
    """Batches of (index, seed). Set .epoch before each pass.

    images_per_class = 0: all images in random order. The incomplete last batch is dropped.
    images_per_class > 0: the same number of batches. A batch has random classes, with this many images of each. Images
    are repeated if a class has fewer.
    shard: the slice of each batch to yield, one per process.
    """

    def __init__(self, labels, batch_size, images_per_class, seed, shard=slice(None)):
        self.batch_size, self.images_per_class, self.shard = batch_size, images_per_class, shard
        self.seed, self.epoch, self.num_images = seed, 0, len(labels)
        self.members = np.split(np.argsort(labels, kind="stable"), np.cumsum(np.bincount(labels))[:-1])
        if batch_size > len(labels):
            raise ValueError(f"--batch-size {batch_size} is more than the {len(labels)} training images; use fewer")
        if images_per_class and batch_size > images_per_class * len(self.members):
            needed, found = batch_size // images_per_class, len(self.members)
            raise ValueError(f"--batch-size {batch_size} needs {needed} classes, but {found} train; use a smaller one")

    def __len__(self):
        return self.num_images // self.batch_size

    def __iter__(self):
        rng = np.random.default_rng((self.seed, self.epoch))
        for batch in self.balanced(rng) if self.images_per_class else self.shuffled(rng):
            seeds = rng.integers(2**63, size=len(batch))
            yield list(zip(batch.tolist(), seeds.tolist()))[self.shard]

    def shuffled(self, rng):
        yield from np.split(rng.permutation(self.num_images)[: len(self) * self.batch_size], len(self))

    def balanced(self, rng):
        count, num_classes = self.images_per_class, self.batch_size // self.images_per_class
        remaining = []  # classes not yet drawn in this round
        for _ in range(len(self)):
            if len(remaining) < num_classes:
                remaining = [self.members[c] for c in rng.permutation(len(self.members))]
            chosen, remaining = remaining[:num_classes], remaining[num_classes:]
            yield np.concatenate([rng.choice(images, count, replace=len(images) < count) for images in chosen])


def train_loader(split, batches, image_size, min_crop, num_workers):
    """(images, labels) of each of the TrainBatches, augmented: uint8 (B, 3, size, size), int64 (B,)."""
    steps = transforms.RandomResizedCrop(image_size, scale=(min_crop, 1)), transforms.RandomHorizontalFlip()
    return _loader(split, steps, batches, num_workers)


def test_loader(split, batch_size, image_size, num_workers):
    """(images, labels) of a whole split in order: uint8 (B, 3, size, size), int64 (B,)."""
    batches = torch.utils.data.BatchSampler([(index, 0) for index in range(len(split))], batch_size, drop_last=False)
    steps = transforms.Resize(round(image_size * 256 / 224)), transforms.CenterCrop(image_size)
    return _loader(split, steps, batches, num_workers)


def _loader(split, steps, batches, num_workers):
    images = Images(split, transforms.Compose([*steps, transforms.PILToTensor()]))
    options = dict(persistent_workers=num_workers > 0, pin_memory=torch.cuda.is_available())
    return torch.utils.data.DataLoader(images, batch_sampler=batches, num_workers=num_workers, **options)


class Images(torch.utils.data.Dataset):
    """(uint8 image (3, size, size), label) of an item (index, augmentation seed)."""

    def __init__(self, split, transform):
        self.split, self.transform, self.decoded = split, transform, {}  # a cache makes toy 3x faster

    def __getitem__(self, item):
        index, seed = item
        image = self.decoded.get(index)
        if image is None:
            image = open_image(self.split.paths[index])
            if max(image.size) <= 128 and len(self.decoded) < 4096:  # at most 270 MB per worker
                self.decoded[index] = image
        torch.default_generator.manual_seed(seed)  # safe: nothing else uses this generator during training
        with naming(self.split.paths[index]):
            return self.transform(image), self.split.labels[index]


@contextlib.contextmanager
def naming(path):
    """Any error becomes an UnreadableImage that names the file, because Pillow raises errors of many types."""
    try:
        yield
    except Exception as error:
        if reason := getattr(error, "strerror", None):  # from the operating system
            raise UnreadableImage(f"{path}: cannot be read ({reason.lower()})") from None
        reason = f"{type(error).__name__}: {error}".replace(f" {path!r}", "").splitlines()[0].rstrip(": ")
        raise UnreadableImage(f"{path}: cannot be read as an image ({reason}); repair or remove it") from None


def open_image(path):
    """The first frame as RGB, on white where it is transparent. Raises UnreadableImage."""
    with naming(path), Image.open(path) as image:
        if image.mode[0] in "IF":
            image = eight_bits(image)
        if max(image.size) > 1000 * min(image.size):
            raise ValueError(f"{image.width} x {image.height} pixels, too narrow to resize")
        if image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        return image.convert("RGB")


def eight_bits(image):
    """16-bit grey divided by 257, or 32-bit integers and floats from their minimum .. maximum to 0 .. 255."""
    pixels = np.asarray(image, dtype=float)
    low, high = pixels.min(), pixels.max()
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        low, high = 0, 65535
    if not 0 < high - low < np.inf:  # not a number fails too
        raise ValueError(f"its pixels range from {low:g} to {high:g}")
    pixels[pixels == image.info.get("transparency")] = high
    return Image.fromarray(((pixels - low) / ((high - low) / 255)).astype(np.uint8))


def normalize(images):
    """uint8 (B, 3, H, W) -> float32, with ImageNet's mean and standard deviation."""
    mean, std = IMAGENET.to(images.device, non_blocking=True)
    return (images / 255 - mean) / std

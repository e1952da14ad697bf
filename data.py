"""Images and labels of a data set, and how they become batches.

    load(dataset, root)   -> (train, test), each with .paths, .labels, .classes; their classes never overlap
    train_loader(...)     random-resized-crop + flip, shuffled or class-balanced batches
    test_loader(...)      resize + centre crop, in order

`toy` is generated once and then read like `folder`; a folder is any tree of images:

    ROOT/train/../CLASS/IMAGE  and  ROOT/test/../CLASS/IMAGE, or
    ROOT/../CLASS/IMAGE        the first half of the sorted classes trains, the second half tests

A class is a directory that directly holds images. All randomness of an epoch follows from (seed, epoch), that of an
augmentation from the seed drawn for it with its index: the same images whatever the number of workers.
"""

import os
import shutil
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


def load(dataset, root):
    """Train and test splits of a data set under `root`. Raises ValueError or OSError, one line, where it cannot."""
    return DATASETS[dataset](root)


# -------------------------------------------------------------------------------------------- folder


def load_folder(root):
    if not os.path.isdir(root):
        raise FileNotFoundError(f"{root}: no such directory; give the folder that holds your images with --data-root")
    halves = [os.path.join(root, name) for name in ("train", "test")]
    if all(os.path.isdir(half) for half in halves):
        train, test = map(find_classes, halves)
        shared = sorted(set(train) & set(test))
        if shared:
            raise ValueError(
                f"{root}: {len(shared)} classes are in both train/ and test/ ({', '.join(shared[:3])}, ..); "
                "retrieval is tested on classes that training never saw, so remove them from one"
            )
    else:
        found = find_classes(root)
        names = sorted(found)
        train = {name: found[name] for name in names[: len(names) // 2]}
        test = {name: found[name] for name in names[len(names) // 2 :]}
    for part, found in (("train", train), ("test", test)):
        if len(found) < 2:
            raise ValueError(
                f"{root}: {len(found)} class(es) to {part} on, at least 2 are needed; a class is a directory that "
                "directly holds images, and without train/ and test/ half of the classes go to each"
            )
    if max(map(len, test.values())) < 2:
        raise ValueError(f"{root}: no test class has 2 images, so no query could find anything")
    return Splits(_split(train), _split(test))


def find_classes(root):
    """{directory relative to root: its image files, sorted}, for every directory that directly holds images."""
    found = {}
    for directory, _, files in os.walk(root, followlinks=True):
        images = [f for f in sorted(files) if f.lower().endswith(IMAGE_SUFFIXES) and not f.startswith(".")]
        if images:
            found[os.path.relpath(directory, root)] = [os.path.join(directory, f) for f in images]
    if not found:
        raise ValueError(f"{root}: no images in it; looked for {' '.join(IMAGE_SUFFIXES)} in every directory below")
    return found


def _split(found):
    classes = sorted(found)
    labels = [label for label, name in enumerate(classes) for _ in found[name]]
    return Split([path for name in classes for path in found[name]], labels, classes)


# ----------------------------------------------------------------------------------------------- toy

TOY_VERSION = 1  # of the images: a change of the generator makes a new directory
TOY_CLASSES, TOY_IMAGES, TOY_SIZE = 80, 20, 72  # classes, images a class, pixels a side
TOY_FAMILY, TOY_CONTRAST = 4, 0.8  # classes a family, and how far they stray from it (1: families mean nothing)


def load_toy(root):
    """Splits of the generated set ROOT/toy-vN, which is written first if it is not there."""
    tree = os.path.join(root, f"toy-v{TOY_VERSION}")
    if not os.path.isdir(tree):
        print(f"writing the toy data set to {tree}", flush=True)
        unfinished = f"{tree}.{os.getpid()}.unfinished"
        write_toy(unfinished)
        try:
            os.rename(unfinished, tree)
        except OSError:  # another process was faster; its images are the same
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


DATASETS = {"toy": load_toy, "folder": load_folder}


# ------------------------------------------------------------------------------------------- batches


class Images(torch.utils.data.Dataset):
    """(image (3, size, size), label) of item (index, seed); the seed is that of the augmentation."""

    def __init__(self, split, transform):
        self.split, self.transform = split, transform

    def __getitem__(self, item):
        index, seed = item
        image = open_image(self.split.paths[index])
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return self.transform(image), self.split.labels[index]


def open_image(path):
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # what Pillow raises
        reason = str(error).replace(repr(path), "the file").splitlines()[0]
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
        draw = self.balanced if self.images_per_class else self.shuffled
        for batch in draw(rng):
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
            images = [self.members[c] for c in chosen]
            draw = lambda found: rng.choice(found, self.images_per_class, replace=len(found) < self.images_per_class)
            yield np.concatenate([draw(found) for found in images])


def train_loader(split, batches, image_size, min_crop, num_workers):
    """(images (B, 3, size, size), labels (B,)) of each of the TrainBatches; a crop keeps min_crop .. 1 of the area."""
    steps = [transforms.RandomResizedCrop(image_size, scale=(min_crop, 1)), transforms.RandomHorizontalFlip()]
    return _loader(split, steps, batches, num_workers)


def test_loader(split, batch_size, image_size, num_workers):
    """Every image of a split in order: the shorter side to 256/224 of the size, then its centre."""
    steps = [transforms.Resize(round(image_size * 256 / 224)), transforms.CenterCrop(image_size)]
    order = [(index, 0) for index in range(len(split))]
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    return _loader(split, steps, batches, num_workers)


def _loader(split, steps, batches, num_workers):
    transform = transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)])
    return torch.utils.data.DataLoader(
        Images(split, transform),
        batch_sampler=batches,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=torch.cuda.is_available(),
    )

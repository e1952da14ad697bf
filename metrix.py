"""Metrix: a metric-learning loss that also looks at mixed examples. The method, and the loop that trains it.

    python metrix.py [DATASET] [LOSS] [MODE] [--flag value ..]       default: toy contrastive feature
    python metrix.py all DATASET [--seeds N] [--flag value ..]       its twelve cells, and a table of them
    python metrix.py eval RUN_DIR [--split ..] [--checkpoint ..]     every metric of a run's checkpoint

`step` is the method: clean loss + mix_weight * mixed loss, one mixing weight lam ~ Beta(mix_alpha, mix_alpha) a step.
    baseline   mixes nothing
    input      mixes images: a second pass of the trunk, for hardest negatives only
    feature    mixes the last feature maps before pooling: one pass of the trunk
    embed      mixes embeddings, which takes their Gram matrix only: one pass of the trunk

A run writes OUT/ (default runs/DATASET-LOSS-MODE-seedN): config.json, log.jsonl, last.pt, best.pt, retrieval.png.
All randomness of an epoch follows from (seed, epoch), so the same command goes on where it was stopped.
"""

import argparse
import contextlib
import dataclasses
import datetime
import itertools
import json
import math
import os
import resource
import signal
import sys
import textwrap
import time
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

import data
import eval
import kernels
import losses
import model as models
from kernels.mix_pool import mix_pool

MODES = ("baseline", "input", "feature", "embed")
LOSSES = {  # run.sh reads the names here
    "contrastive": lambda num_classes, embedding_size: losses.Contrastive(),
    "multisimilarity": lambda num_classes, embedding_size: losses.MultiSimilarity(),
    "proxyanchor": losses.ProxyAnchor,
}
CHECKED_TOGETHER = 50  # steps after which a GPU is asked whether they were finite
STOPPING = (signal.SIGINT, signal.SIGTERM)


# -------------------------------------------------------------------------------------------- method


def step(model, metric, images, y, config, lam, pairing):
    """Loss of one batch. images: (B, 3, H, W), y: (B,), lam in [0, 1], pairing one of metric.pairings.

    With y on the CPU and Triton's kernels no mode but input waits for a GPU; that one does once, as its bank depends on z.
    Of many processes each runs the trunk on its share of the images, and all compute the one loss of the whole batch.
    """
    features, y = gather(model.features(images)), gather(y)  # (B, C, h, w), (B,)
    z = model.head(features)  # (B, D)
    loss = metric(z, y)

    if config.mode == "embed":
        loss = loss + config.mix_weight * metric.mixed_embed(z, y, lam, pairing)
    elif config.mode == "feature":
        i, j = losses.full_bank(y, pairing)  # (M,), empty where there is nothing to mix
        if len(i):
            v = model.embed(mix_pool(features, i, j, lam))  # (M, D)
            loss = loss + config.mix_weight * metric.mixed(z, y, v, i, lam, pairing)
    elif config.mode == "input":
        i, j = losses.hardest_bank(z, y, pairing, config.hardest)  # (M,)
        if len(i):
            images, a, b = gather(images), share(i), share(j)
            v = model.head(gather(model.features(lam * images[a] + (1 - lam) * images[b])))  # (M, D)
            loss = loss + config.mix_weight * metric.mixed(z, y, v, i, lam, pairing)
    return loss


def train_epoch(epoch, model, metric, optimizer, batches, config):
    """One pass over the training batches. Returns the mean loss, and how many steps and images were skipped.

    Raises FloatingPointError(step) where a loss or gradient is not finite. A GPU is asked for that once in a while only:
    the answer may come late, as nothing is saved before the epoch's end.
    """
    rng = np.random.default_rng((config.seed, epoch, 1))
    model.train()
    model.train_trunk(epoch >= config.warmup_epochs)
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * config.lr_gamma ** (epoch // config.lr_step)
    parameters = [*model.parameters(), *metric.parameters()]
    total, steps, skipped, broken, finite = torch.zeros((), device=config.device), 0, 0, 0, []
    for number, (images, y) in enumerate(batches):
        if not (readable := y != data.BROKEN).all():
            broken += int((~readable).sum())
            images, y = images[readable], y[readable]
        images = images.to(config.device, memory_format=torch.channels_last, non_blocking=True)
        pairing = metric.pairings[rng.integers(len(metric.pairings))]
        lam = rng.beta(config.mix_alpha, config.mix_alpha)
        with finished_first():
            with in_precision(config):
                loss = step(model, metric, images, y, config, lam, pairing)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            average(parameters)
            finite.append(all_finite(loss, parameters))
            if config.on_nonfinite == "skip" and not finite.pop():
                skipped += 1
                continue
            if loss.device.type == "cpu" or len(finite) == CHECKED_TOGETHER:
                check_finite(finite, number)
                finite.clear()
            torch.nn.utils.clip_grad_value_(parameters, config.clip)
            optimizer.step()
        total, steps = total + loss.detach(), steps + 1
    check_finite(finite, number)
    return total.item() / steps if steps else math.nan, skipped, broken


def in_precision(config):
    return torch.autocast(torch.device(config.device).type, torch.bfloat16, enabled=config.precision == "bf16")


def all_finite(loss, parameters):
    """Whether a loss and all gradients are: on their device, nothing waits."""
    values = [loss.detach(), *(p.grad for p in parameters if p.grad is not None)]
    return torch.nn.utils.get_total_norm(values, math.inf).isfinite()


def check_finite(finite, number):
    """Raise FloatingPointError(step) for the first False; `number` is the step of the last."""
    if finite and not (all_of := torch.stack(finite)).all():
        raise FloatingPointError(number + 1 - len(finite) + int(all_of.int().argmin()))


@contextlib.contextmanager
def finished_first():
    """SIGINT and SIGTERM wait until what is inside is done, then raise KeyboardInterrupt.

    Within an epoch nothing need be saved: it is replayed from (seed, epoch).
    """
    waiting = []
    usual = {number: signal.signal(number, lambda number, _: waiting.append(number)) for number in STOPPING}
    try:
        yield
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)
        if waiting:
            raise KeyboardInterrupt(waiting[0])


def make_optimizer(model, metric, config):
    groups = [dict(params=[*model.parameters()], base_lr=config.lr)]
    if proxies := [*metric.parameters()]:
        groups.append(dict(params=proxies, base_lr=100 * config.lr))
    return torch.optim.Adam(groups, lr=config.lr, weight_decay=config.weight_decay)


# -------------------------------------------------------------------------------------------- config

ON_FAULT = ("stop", "skip")
PRECISIONS = ("fp32", "bf16")


def option(default, help, **limits):
    return dataclasses.field(default=default, metadata={"help": help, **limits})


@dataclasses.dataclass
class Config:
    """A field is a flag: --batch-size sets batch_size. A recipe sets some of them, flags given win over it."""

    dataset: str = option("toy", "what to learn from", choices=tuple(data.DATASETS))
    loss: str = option("contrastive", "what to minimise", choices=tuple(LOSSES))
    mode: str = option("feature", "what to mix", choices=MODES)

    epochs: int = option(60, "passes over the training images", least=1)
    batch_size: int = option(100, "images a step", least=2)
    images_per_class: int = option(0, "of a balanced batch; 0: shuffled batches", least=0)
    lr: float = option(1e-4, "Adam's learning rate; proxies learn 100 times as fast", least=0)
    lr_step: int = option(10, "epochs after which lr is multiplied by lr_gamma, again and again", least=1)
    lr_gamma: float = option(0.1, "see lr_step", least=0, most=1)
    warmup_epochs: int = option(5, "first epochs, in which only the embedding layer and proxies learn", least=0)
    weight_decay: float = option(1e-4, "Adam's", least=0)
    clip: float = option(10.0, "largest magnitude of a gradient's element", least=0)
    mix_weight: float = option(0.4, "weight of the mixed loss", least=0)
    mix_alpha: float = option(2.0, "lam ~ Beta(mix_alpha, mix_alpha)", least=1e-3)
    hardest: int = option(1, "negatives an image is mixed with in input mode", least=1)

    net: str = option("resnet50", "trunk", choices=tuple(models.NETS))
    precision: str = option("fp32", "of the model: fp32, or bf16 by autocast; losses and metrics stay fp32", choices=PRECISIONS)
    weights: str = option("imagenet", "imagenet, none, or a file")
    bn: str = option(
        "stats",
        "batch norm: train (many processes: SyncBatchNorm, on GPUs only); stats: statistics fixed; frozen: scale, shift too",
        choices=models.BATCH_NORMS,
    )
    embedding_size: int = option(512, "dimensions", least=1, most=65536)
    image_size: int = option(224, "pixels a side of the crop", least=32, most=512)
    min_crop: float = option(0.08, "least share of an image's area that a training crop keeps", least=0.01, most=1)

    data_root: str = option("data", "where the data set is")
    # decode by default: the paper's pixels, and no gigabytes (0.4 MB an image) are written beside the data unasked
    data_path: str = option("decode", "decode: images from their files every time; cache: decoded once", choices=data.PATHS)
    cache_size: int = option(320, "pixels of an image's shorter side in the cache; smaller images stay as they are", least=32)
    out: str = option("", "where the run is written; empty: runs/DATASET-LOSS-MODE-seedN")
    validation: bool = option(False, "train on half of the training classes and test on the others, to choose settings by")
    seed: int = option(0, "of everything random", least=0)
    num_workers: int = option(min(4, os.cpu_count() or 1), "processes that load images; the result is the same", least=0)
    device: str = option("auto", "auto: cuda if there is one, else cpu")
    kernels: str = option("auto", "auto: Triton on a GPU, else torch", choices=kernels.CHOICES)
    on_nonfinite: str = option("stop", "at a loss or gradient that is not finite; skip: leave out the step", choices=ON_FAULT)
    on_broken_image: str = option("stop", "at an image that cannot be read; skip: leave it out", choices=ON_FAULT)
    resume: bool = option(False, "go on with the run in OUT, and fail if there is none")


# The recipes: what they say differently from the defaults above. The paper's, and for folder our own. "*": any other loss.
COLUMNS = ("lr", "lr_step", "lr_gamma", "warmup_epochs", "bn", "images_per_class")
RECIPES = {
    ("cub", "contrastive"): (1e-4, 10, 0.1, 5, "stats", 0),
    ("cub", "*"): (1e-4, 5, 0.5, 5, "stats", 0),
    ("cars", "contrastive"): (1e-4, 10, 0.1, 5, "stats", 0),
    ("cars", "*"): (1e-4, 5, 0.5, 5, "stats", 0),
    ("sop", "contrastive"): (3e-5, 10, 0.25, 5, "train", 5),
    ("sop", "*"): (6e-4, 20, 0.25, 1, "train", 5),
    ("inshop", "contrastive"): (1e-4, 5, 0.25, 1, "train", 5),
    ("inshop", "*"): (6e-4, 20, 0.25, 1, "train", 5),
    ("folder", "contrastive"): (1e-4, 10, 0.1, 5, "stats", 5),
    ("folder", "*"): (1e-4, 5, 0.5, 5, "stats", 5),
}
# A trunk that starts from random weights has no statistics worth freezing, nothing to warm up for, and does not learn
# small pictures from crops of a twelfth of their area. Of lr (1e-3, 3e-3, 1e-2) and epochs (15, 40) these gave the best
# baseline on toy and on Omniglot with --validation, by the mean R@1 of three seeds; for multisimilarity on toy, 15
# epochs were as good as 40.
FROM_SCRATCH = dict(weights="none", bn="train", warmup_epochs=0, min_crop=0.6, epochs=40, lr=3e-3, lr_step=16, lr_gamma=0.3)
LR_FROM_SCRATCH = {"multisimilarity": 1e-2}
TOY = dict(net="tiny", embedding_size=64, image_size=64, images_per_class=5, data_path="cache")


def recipe_of(dataset, loss, mode, from_scratch=False):
    """Every setting of a cell, flags aside."""
    recipe = {field.name: field.default for field in dataclasses.fields(Config)} | dict(dataset=dataset, loss=loss, mode=mode)
    of_all = RECIPES.get((dataset, "*"), ())  # toy has none: see TOY
    recipe |= dict(zip(COLUMNS, RECIPES.get((dataset, loss), of_all)))
    if (dataset, loss, mode) == ("inshop", "contrastive", "baseline"):
        recipe["lr"] = 3e-5
    if dataset == "toy" or from_scratch:
        recipe |= FROM_SCRATCH | dict(lr=LR_FROM_SCRATCH.get(loss, FROM_SCRATCH["lr"]))
    return recipe | TOY if dataset == "toy" else recipe


# A run may go on with others of these.
NOT_OF_THE_RESULT = ("out", "device", "kernels", "num_workers", "on_nonfinite", "on_broken_image", "resume")


def parse(arguments):
    """The Config of a command line. Bad input ends the program: one line, exit code 2."""
    parser = argparse.ArgumentParser("metrix", allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.description = "Defaults in brackets; the recipe of a data set and loss sets others, which a run prints first."
    parser.error = fail
    for field in dataclasses.fields(Config):
        about = dict(help=f"{field.metadata['help']} ({field.default})", choices=field.metadata.get("choices"))
        if field.name in ("dataset", "loss", "mode"):
            parser.add_argument(field.name, nargs="?", default=field.default, **about)
        elif field.type is bool:
            parser.add_argument(flag(field.name), action="store_true", help=field.metadata["help"])
        else:
            parser.add_argument(flag(field.name), type=field.type, **about)
    given = vars(parser.parse_intermixed_args(arguments))
    recipe = recipe_of(given["dataset"], given["loss"], given["mode"], given.get("weights") == "none")
    config = Config(**(recipe | given))
    config.data_root = os.path.normpath(config.data_root)
    config.out = config.out or f"runs/{config.dataset}-{config.loss}-{config.mode}{'-validation' * config.validation}-seed{config.seed}"
    check(config)
    return config


def check(config):
    """Fail on what can be known to be wrong before any data is read."""
    for field in dataclasses.fields(Config):
        value, least, most = getattr(config, field.name), field.metadata.get("least"), field.metadata.get("most", 2**31)
        if least is not None and not least <= value <= most:
            fail(f"{flag(field.name)} is {str(value)[:20]}; it must be at least {least} and at most {most}")
    size, per_class = config.batch_size, config.images_per_class
    if per_class and size < 2 * per_class:
        fail(f"--batch-size {size} is less than two classes of {per_class}; it must be at least {2 * per_class}")
    if per_class and size % per_class:
        fail(f"--images-per-class {per_class} does not divide --batch-size {size}; {size - size % per_class} would do")
    if config.data_path == "cache" and config.on_broken_image == "skip":
        fail("--on-broken-image skip: a cache holds whole images only; add --data-path decode")
    if config.data_path == "cache" and config.cache_size < (least := data.resized(config.image_size)):
        fail(f"--cache-size {config.cache_size} is less than {least}, to which images are resized to be tested")
    if config.weights == "imagenet" and config.net != "resnet50":
        fail(f"--net {config.net} has no ImageNet weights; add --weights none, or a file")
    if config.device == "auto":
        config.device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        one = torch.ones(1, device=config.device)
        one.item()
    except (RuntimeError, AssertionError):  # what torch raises for a device it does not know or have
        fail(f"--device {config.device} cannot be used on this machine; --device cpu always can")
    processes = here()[1]
    if processes > 1 and config.bn == "train" and one.device.type == "cpu":
        fail("--bn train over many processes is SyncBatchNorm, which needs GPUs; use --bn stats, or one process")
    if one.device.type == "cuda" and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > torch.cuda.device_count():
        fail(f"{os.environ['LOCAL_WORLD_SIZE']} processes want a GPU each, and there are {torch.cuda.device_count()} here; lower NPROC")
    if size < processes:
        fail(f"--batch-size {size} is less than an image for each of {processes} processes")
    kernels.choice = config.kernels
    with told_in_one_line(RuntimeError):
        kernels.use_triton(one)


def flag(name):
    return "--" + name.replace("_", "-")


def fail(message, by_all=False):
    """Bad input: one line, exit code 2. Of many processes the first tells what all meet, and each what it alone meets."""
    if by_all or here()[0] == 0:
        print(f"metrix: {' '.join(message.splitlines())}", file=sys.stderr)
    sys.exit(2)


@contextlib.contextmanager
def told_in_one_line(*errors, by_all=False):
    """Errors that the user can mend end the program like bad input."""
    try:
        yield
    except BrokenPipeError:
        raise
    except errors as error:
        fail(str(error), by_all)
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):  # PyTorch has no kind of its own for this
            raise
        fail("a process that loads images died, perhaps for lack of memory; the same command goes on, or try --num-workers 0", by_all)


# ----------------------------------------------------------------------------------------------- run

RECALL_AT = {
    "cub": (1, 2, 4, 8, 16, 32),
    "cars": (1, 2, 4, 8, 16, 32),
    "sop": (1, 10, 100, 1000),
    "inshop": (1, 10, 20, 30, 40, 50),
    "folder": (1, 2, 4, 8),
    "toy": (1, 2, 4, 8),
}


def run(config):
    """Train, evaluate after every epoch, write OUT/. Returns the log, a dict an epoch."""
    if torch.device(config.device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(config.device)
    with told_in_one_line(ValueError, OSError):
        splits = data.load(config.dataset, config.data_root, config.validation)
        data.check_images(splits)
        describe(config, splits)
        batches = data.TrainBatches(splits.train.labels, config.batch_size, config.images_per_class, config.seed)
        torch.manual_seed(config.seed)
        model = models.ResNet(**models.NETS[config.net], embedding_size=config.embedding_size, bn=config.bn)
        models.load_weights(model, config.weights)
        metric = LOSSES[config.loss](len(splits.train.classes), config.embedding_size)
        model.to(config.device, memory_format=torch.channels_last)
        metric.to(config.device)
        if here()[1] > 1 and config.bn == "train":
            model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
        optimizer = make_optimizer(model, metric, config)
        log = open_run(config, splits, model, metric, optimizer)
    with told_in_one_line(OSError, by_all=True):
        splits = cached(splits, config)

    skip_broken = config.on_broken_image == "skip"
    loader = data.train_loader(splits.train, Shares(batches), config.image_size, config.min_crop, config.num_workers, skip_broken)
    held_out = splits[1:]  # test, or query and gallery
    images = len(batches) * config.batch_size
    progress = Progress((config.epochs - len(log)) * (images + sum(map(len, held_out))) + len(splits.train))
    for epoch in range(len(log), config.epochs):
        title = f"epoch {epoch + 1:3d}/{config.epochs}"
        with told_in_one_line(OSError, by_all=True):  # an unreadable image, a full disk
            batches.epoch = epoch
            progress.begin(f"{title}  training")
            started = time.perf_counter()
            try:
                loss, skipped, broken = train_epoch(epoch, model, metric, optimizer, progress.of(loader), config)
            except FloatingPointError as error:
                fail(not_finite(epoch, *error.args, splits.train.paths, batches, config))
            seconds = time.perf_counter() - started
            rate, data_wait = images / seconds, progress.waited / seconds
            progress.begin(f"{title}  testing")
            embedded = [embed(model, split, config, progress) for split in held_out]
            if not math.isfinite(loss) or not all(part.z.isfinite().all() for part in embedded):
                fail(f"epoch {epoch + 1} diverged, its mean loss is {loss:.3g}; try a lower --lr and another --out", by_all=True)
            last = epoch + 1 == config.epochs
            train = embed(model, splits.train, config, progress).z if last else None
            result, ranking = measure(embedded, RECALL_AT[config.dataset], last, train)
            line = dict(epoch=epoch + 1, loss=loss, lr=optimizer.param_groups[0]["lr"], recall=result.pop("recall"))
            line |= dict(seconds=time.perf_counter() - started, images_per_second=rate, data_wait=data_wait)
            line["peak_memory_mib"] = peak_memory(config.device)
            if config.on_nonfinite == "skip":
                line["skipped_steps"] = skipped
            if skip_broken:
                line["broken_images"] = int(gather(torch.tensor([broken])).sum())
                line["broken_images"] += sum(len(split) - len(gather(part.y)) for split, part in zip(held_out, embedded))
            log.append(line | result if last else line)
            recall_at_1 = 100 * line["recall"]["1"]
            progress.end(f"{title}  loss {loss:.4f}  R@1 {recall_at_1:.1f}  {rate:.0f} images/s  {line['seconds']:.1f} s")
            with finished_first():
                write_sheet(config.out, ranking, embedded, held_out)
                save_epoch(config, log, model, metric, optimizer)
    return log


def cached(splits, config):
    """The splits, with --data-path cache set to come from it."""
    if config.data_path == "decode":
        return splits

    def watch(chunks):
        progress = Progress(sum(map(len, splits)), processes=1)
        progress.begin("decoding the images")
        yield from progress.of(chunks)
        progress.end(f"decoded {progress.images} images")

    name, size = f"{config.dataset}{'-validation' * config.validation}", config.cache_size
    # The first process builds it, then one of each other host, unless it finds it there, and all others find it.
    mine = 0 if here()[0] == 0 else 1 if os.environ.get("LOCAL_RANK", "0") == "0" else 2
    for turn in range(3 if here()[1] > 1 else 1):
        if turn == mine:
            splits = data.with_cache(splits, name, config.data_root, size, config.num_workers, config.device, watch)
        if here()[1] > 1:
            dist.barrier()
    return splits


def not_finite(epoch, step, paths, batches, config):
    """What to say of an epoch's step whose loss or gradient is not finite."""
    batch = [paths[index] for index, _ in next(itertools.islice(batches, step, None))]
    kept = f"{config.out}/last.pt is that of epoch {epoch}" if epoch else "there is no checkpoint yet"
    return (
        f"epoch {epoch + 1}, step {step + 1}: the loss or a gradient is not finite, on a batch of {len(batch)} images "
        f"({', '.join(batch[:3])}, ..); {kept}; try a lower --lr and another --out, or go on with --on-nonfinite skip"
    )


class Embedded(NamedTuple):
    """This process's share of a split, less images that could not be read."""

    z: torch.Tensor  # (N, D)
    y: torch.Tensor  # (N,)
    place: torch.Tensor  # (N,) in the split


def embed(model, split, config, progress):
    """A split, seen through the test transform."""
    skip_broken = config.on_broken_image == "skip"
    loader = data.test_loader(share(split), config.batch_size, config.image_size, config.num_workers, skip_broken)
    with in_precision(config):
        z, y = eval.embed_all(model, progress.of(loader), config.device)
    readable = y != data.BROKEN
    return Embedded(z[readable], y[readable], share(torch.arange(len(split), device=y.device))[readable])


def measure(embedded, ks, everything, train=None):
    """Recall or everything of an Embedded split, or of queries and gallery: a dict, and the share's ranking."""
    group = dist.group.WORLD if here()[1] > 1 else None
    ranking = eval.ranking(*itertools.chain(*(part[:2] for part in embedded)), nearest_only=not everything, group=group)
    result = eval.summary(ranking, ks, group)
    result["recall"] = {str(k): share for k, share in result["recall"].items()}  # as JSON will have it
    if everything:
        z, y = (torch.cat([gather(part[n]) for part in embedded]) for n in range(2))
        result |= eval.geometry(z, y, None if train is None else gather(train))
    return result, ranking


# ----------------------------------------------------------------------------------- the run's files

WRITTEN = ("config.json", "log.jsonl", "last.pt", "best.pt", "retrieval.png")


def open_run(config, splits, model, metric, optimizer):
    """Begin OUT/, or load the state of the run that is there. Returns its log so far."""
    written, wanted = f"{config.out}/config.json", vars(config) | data.sizes(splits) | dict(lone_queries=data.lone_queries(splits))
    if not os.path.exists(f"{config.out}/last.pt"):  # nothing yet, or nothing that one could go on with
        if config.resume:
            fail(f"--resume: {config.out} holds no run to go on with")
        if here()[0] == 0:
            os.makedirs(config.out, exist_ok=True)
            with replacing(written) as file, open(file, "w") as out:
                print(json.dumps(wanted, indent=2), file=out)
        return []
    there = read_settings(config.out)
    compared = [name for name in wanted if name not in NOT_OF_THE_RESULT]
    differences = [f"{name} {there.get(name)} there, {wanted[name]} now" for name in compared if there.get(name) != wanted[name]]
    if differences:
        fail(f"{config.out} holds another run ({'; '.join(differences)}); delete it, or use another --out or --seed")
    state = models.read_checkpoint(f"{config.out}/last.pt")
    try:
        for module, name in ((model, "model"), (metric, "metric"), (optimizer, "optimizer")):
            module.load_state_dict(state[name])
        best_of(state["log"])
        print(f"going on with {config.out} after epoch {len(state['log'])} of {config.epochs}")
        return state["log"]
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError):  # what a foreign one raises
        fail(f"{config.out}/last.pt: not the checkpoint of such a run; name another --out")


def read_settings(out):
    """What config.json in a run's directory says."""
    written = f"{out}/config.json"
    try:
        with open(written) as file:
            there = json.load(file)
    except OSError:
        fail(f"{written}: missing or unreadable, so {out} is no run that one could use; name another")
    except ValueError:
        fail(f"{written}: not JSON; repair it, or name another run")
    if not isinstance(there, dict):
        fail(f"{written}: not the settings of a run; repair it, or name another run")
    return there


def save_epoch(config, log, model, metric, optimizer):
    """log.jsonl, best.pt if this epoch is the best so far, and last.pt, from which the run goes on."""
    if here()[0] > 0:
        return
    with replacing(f"{config.out}/log.jsonl") as file, open(file, "w") as out:
        for line in log:
            print(json.dumps(line), file=out)
    state = dict(model=model.state_dict(), metric=metric.state_dict(), epoch=len(log), log=log, config=vars(config))
    if best_of(log) is log[-1]:
        save(state, f"{config.out}/best.pt")
    save(state | dict(optimizer=optimizer.state_dict()), f"{config.out}/last.pt")


@contextlib.contextmanager
def replacing(path):
    """A name to write to, which becomes `path` when all is on the disk: whatever happens, the old file is there or the new."""
    unfinished = f"{path}.unfinished"
    try:
        yield unfinished
        synchronise(unfinished)
        os.replace(unfinished, path)
        synchronise(os.path.dirname(path) or ".")
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.remove(unfinished)
        if isinstance(error, OSError):
            raise OSError(f"{path}: cannot be written ({error.strerror or error}); what was there before is intact") from error
        raise


def synchronise(path):
    """Wait until a file or directory is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save(state, path):
    with replacing(path) as file, open(file, "wb") as out:
        try:
            torch.save(state, out)
        except RuntimeError as error:  # of torch's writer, which cannot close what could not be written either
            raise error.__context__ or error


def best_of(log):
    return max(log, key=lambda line: line["recall"]["1"])


def write_sheet(out, ranking, embedded, splits):
    shown = []
    for part, split in zip(embedded, splits):
        z, y, place = map(gather, part)
        shown += [z, [split.paths[at] for at in place.tolist()], y.tolist()]
    rank = gather(ranking.rank)
    if here()[0] == 0:
        with replacing(f"{out}/retrieval.png") as file:
            eval.retrieval_sheet(file, rank, *shown, open_image=data.open_image)


# ----------------------------------------------------------------------------------------- processes

# Started by torchrun every process draws the same batches, lam and pairing, and loads and embeds its share of the images.
# The loss of the whole batch is then computed by all, which costs little next to the trunk, and so is its gradient.


def join_processes():
    """Find the other processes of torchrun, if it is what started this one. Only the first prints and writes."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        # NCCL for what lies on GPUs, Gloo for the rest; they may wait long for a cache to be built.
        dist.init_process_group(timeout=datetime.timedelta(hours=2))
        if here()[0] > 0:
            sys.stdout = open(os.devnull, "w")


def here():
    """The number of this process, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def share(x):
    """This process's part of a list, tensor or split: consecutive, and the parts differ in length by one at most."""
    rank, size = here()
    return x[len(x) * rank // size : len(x) * (rank + 1) // size]


class Shares:
    """This process's share of each batch."""

    def __init__(self, batches):
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        return map(share, self.batches)


def gather(x):
    """The rows of all processes, in their order."""
    return _Gather.apply(x) if here()[1] > 1 else x


class _Gather(torch.autograd.Function):
    """All processes compute the same from the result, so each has the whole gradient of its own rows.

    Times the number of processes, by which `average` divides: right for the rows' share of a gradient, which adds up,
    and for what all processes hold in full, as that of the proxies, which does not.
    """

    @staticmethod
    def forward(ctx, x):
        ctx.rank, size = here()
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(size)]
        dist.all_gather(lengths, torch.full_like(lengths[0], len(x)))  # on the CPU, so that no GPU is waited for
        ctx.lengths = torch.cat(lengths).tolist()
        padded = x.new_zeros(max(ctx.lengths), *x.shape[1:])
        padded[: len(x)] = x
        parts = [torch.empty_like(padded) for _ in range(size)]
        dist.all_gather(parts, padded)
        return torch.cat([part[:length] for part, length in zip(parts, ctx.lengths)])

    @staticmethod
    def backward(ctx, grad):
        return grad.split(ctx.lengths)[ctx.rank] * len(ctx.lengths)


def average(parameters):
    """The mean over the processes, of every gradient."""
    if here()[1] > 1:
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])  # one message
        dist.all_reduce(flat)
        flat /= here()[1]
        for gradient, mean in zip(gradients, flat.split([gradient.numel() for gradient in gradients])):
            gradient.copy_(mean.view_as(gradient))


# -------------------------------------------------------------------------------------- what is told


class Progress:
    """What is going on, its images/s and the time left: rewritten in place on a terminal, else a line a minute."""

    def __init__(self, images, processes=None):
        self.images, self.done, self.start = images, 0, time.perf_counter()
        self.processes = processes or here()[1]  # that work on them
        self.terminal = sys.stdout.isatty()

    def begin(self, title):
        self.title, self.since, self.before = title, time.perf_counter(), self.done
        self.shown, self.waited = self.since, 0.0  # seconds in which the images were not there yet

    def of(self, loader):
        asked = time.perf_counter()
        for images, y in loader:
            self.waited += time.perf_counter() - asked
            yield images, y
            self.done += len(y) * self.processes
            now = asked = time.perf_counter()
            if now - self.shown > (0.5 if self.terminal else 60):
                self.shown = now
                rate = (self.done - self.before) / (now - self.since)
                line = f"{self.title}  {rate:.0f} images/s  {self.left()} left"
                self.print(line, end="" if self.terminal else "\n")

    def end(self, line):
        self.print(f"{line}  {self.left()} left", end="\n")

    def print(self, line, end):
        print(f"\r{line}\033[K" if self.terminal else line, end=end, flush=True)

    def left(self):
        return hours((time.perf_counter() - self.start) / max(self.done, 1) * (self.images - self.done))


def peak_memory(device):
    """The most memory in MiB that tensors on a GPU took since the run began, or that this process ever took on a CPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def hours(seconds):
    seconds = int(seconds)
    return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"


def describe(config, splits):
    """What is about to be done: data, recipe, and what the flags changed of it."""
    usual = recipe_of(config.dataset, config.loss, config.mode)
    told = [name for name in usual if name not in ("dataset", "loss", "mode", *NOT_OF_THE_RESULT)]
    changed = [f"{flag(name)} {getattr(config, name)} ({usual[name]})" for name in told if getattr(config, name) != usual[name]]
    lines = {
        "data": ", ".join(f"{part}: {len(s)} images of {len(s.classes)} classes" for part, s in splits._asdict().items()),
        "recipe": ", ".join(f"{name} {getattr(config, name)}" for name in told),
        "changed": ", ".join(changed) or "nothing: the recipe as it is",
        "writes": f"{config.out}, on {config.device}",
    }
    if lone := data.lone_queries(splits):
        lines["data"] += f"; {lone} queries have no other image of their class and are left out"
    full, found = None if config.validation else data.FULL.get(config.dataset), data.sizes(splits)
    if found == full:
        lines["data"] += " (the full data set)"
    print(f"{config.dataset} {config.loss} {config.mode}")
    for name, line in lines.items():
        print(textwrap.fill(line, 110, initial_indent=f"  {name:<9}", subsequent_indent=" " * 11, break_on_hyphens=False))
    if full and found != full:
        differences = ", ".join(f"{found[name]} {name} instead of {full[name]}" for name in full if found[name] != full[name])
        print(f"WARNING: this is not the full {config.dataset} ({differences}): its results are not comparable")


def report(config, log):
    """The recall table for people, then one JSON line for programs."""
    last, best = log[-1], best_of(log)
    ks = last["recall"]
    print(f"\n{config.dataset} {config.loss} {config.mode}".ljust(45) + "".join(f"{'R@' + k:>8}" for k in ks))
    for name, line in ((f"last epoch ({last['epoch']})", last), (f"best epoch ({best['epoch']}, chosen on the test classes)", best)):
        print(name.ljust(44) + "".join(f"{100 * line['recall'][k]:8.2f}" for k in ks))
    if "map_at_r" in last:
        print("\nlast epoch, in full:", *eval.table(last), sep="\n")
    print("\nwrote " + " ".join(f"{config.out}/{name}" for name in WRITTEN) + "\n")
    summary = {name: getattr(config, name) for name in ("dataset", "loss", "mode", "seed", "out")}
    summary |= dict(last=last, best=dict(epoch=best["epoch"], recall=best["recall"]))
    print(json.dumps(summary | dict(seconds=round(sum(line["seconds"] for line in log), 1))))


# ------------------------------------------------------------------------------------------ commands


def run_all(arguments):
    """Every cell of a data set with every seed, finished ones only shown, then what the seeds say together."""
    parser = argparse.ArgumentParser("metrix all", allow_abbrev=False, epilog="Flags of a run are taken too: ./run.sh --help")
    parser.error = fail
    parser.add_argument("dataset", choices=tuple(data.DATASETS), metavar="|".join(data.DATASETS), help="what to learn from")
    parser.add_argument("--seeds", type=int, help="run every cell with the seeds 0 .. SEEDS-1")
    known, flags = parser.parse_known_args(arguments)
    words = {word.split("=")[0] for word in flags}
    for unfit in {"--out", "--resume"} & words:
        fail(f"{unfit} is for one run; all writes a run a cell under runs/ and goes on by itself")
    if known.seeds is not None and (known.seeds < 1 or "--seed" in words):
        fail(f"--seeds {known.seeds}: give how many seeds to run, at least 1, or one of them as --seed")
    seeds = [[]] if known.seeds is None else [["--seed", str(seed)] for seed in range(known.seeds)]
    cells = list(itertools.product(LOSSES, MODES))
    configs = [parse([known.dataset, *cell, *flags, *seed]) for seed in seeds for cell in cells]
    results, seconds = {cell: [] for cell in cells}, 0
    for number, config in enumerate(configs):
        left = f", about {hours(seconds / number * (len(configs) - number))} left" if number else ""
        print(f"\nrun {number + 1} of {len(configs)}{left}")
        log = run(config)
        report(config, log)
        results[config.loss, config.mode].append(log[-1] | dict(recall_at_1=log[-1]["recall"]["1"]))
        seconds += sum(line["seconds"] for line in log)
    compare(known.dataset, results, f"runs/{known.dataset}{'-validation' * config.validation}-cells.png")


PUBLISHED = {  # Recall@1 of the paper's ResNet-50, D = 512, in the order of MODES
    ("cub", "contrastive"): (64.7, 66.3, 67.4, 66.4),
    ("cub", "multisimilarity"): (67.8, 69.0, 71.4, 70.2),
    ("cub", "proxyanchor"): (69.5, 70.5, 71.0, 70.4),
    ("cars", "contrastive"): (81.6, 82.9, 85.1, 83.9),
    ("cars", "multisimilarity"): (87.8, 89.0, 89.6, 88.8),
    ("cars", "proxyanchor"): (87.6, 88.2, 89.1, 88.9),
    ("sop", "contrastive"): (74.9, 75.8, 77.5, 76.7),
    ("sop", "multisimilarity"): (76.9, 77.9, 81.0, 78.5),
    ("sop", "proxyanchor"): (79.1, 79.8, 81.3, 80.6),
    ("inshop", "contrastive"): (86.4, 87.7, 89.1, 88.4),
    ("inshop", "multisimilarity"): (90.1, 91.8, 92.2, 91.9),
    ("inshop", "proxyanchor"): (90.0, 90.9, 91.9, 91.6),
}
COMPARED = {"recall_at_1": "R@1 (%)", "map_at_r": "MAP@R (%)"} | {name: name for name in ("alignment", "uniformity", "utilization")}


def compare(dataset, results, chart_file):
    """What runs of the same seeds say of every cell: a table for people, a line of JSON, and a chart.

    results: {(loss, mode): the last line of the log, for every seed}
    """
    cells, seeds = {}, len(results["contrastive", "baseline"])
    for name, (loss, mode) in itertools.product(COMPARED, results):
        scale = 100 if "%" in COMPARED[name] else 1
        values, usual = (scale * np.array([line[name] for line in results[loss, of]]) for of in (mode, "baseline"))
        cells[name, loss, mode] = dict(values=values.tolist(), mean=mean_and_error(values), gain=mean_and_error(values - usual))
    print(f"\n{dataset}: last epoch, " + (f"mean and standard error of {seeds} seeds" if seeds > 1 else "one seed"))
    for name, title in COMPARED.items():
        digits = 2 if "%" in title else 3
        print(f"\n{title:27}" + "".join(f"{mode:>17}" for mode in MODES))
        for loss in LOSSES:
            of_loss = [cells[name, loss, mode] for mode in MODES]
            print(f"{loss:27}" + "".join(f"{told(cell['mean'], digits):>17}" for cell in of_loss))
            if "%" in title:
                gains = "".join(f"{told(cell['gain'], digits, '+'):>17}" for cell in of_loss[1:])
                print(f"{'  above baseline, by seed':44}{gains}")
            if name == "recall_at_1" and (dataset, loss) in PUBLISHED:
                print(f"{'  published*':27}" + "".join(f"{share:17}" for share in PUBLISHED[dataset, loss]))
    if any((dataset, loss) in PUBLISHED for loss in LOSSES):
        print("\n* by the paper, on the full data set with the recipe as it is")
    if here()[0] == 0:
        chart(chart_file, cells)
    tree = {loss: {mode: {name: cells[name, loss, mode] for name in COMPARED} for mode in MODES} for loss in LOSSES}
    print("\n" + json.dumps(dict(dataset=dataset, seeds=seeds, cells=tree)))


def mean_and_error(values):
    """(mean, its standard error), the latter None for a single value."""
    return values.mean(), values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else None


def told(mean_and_error, digits, sign=""):
    return " +- ".join(f"{x:{form}.{digits}f}" for x, form in zip(mean_and_error, (sign, "")) if x is not None)


def chart(file, cells):
    """What each mode gains over baseline, with standard errors, as a picture; told if matplotlib is not there to draw it."""
    try:
        from matplotlib.figure import Figure  # optional
    except ImportError:
        print(f"\nno {file}: drawing it takes matplotlib; pip install matplotlib, and give the command again")
        return
    shown = [name for name, title in COMPARED.items() if "%" in title]
    figure = Figure(figsize=(5 * len(shown), 3.2), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(shown)), shown):
        for at, mode in enumerate(MODES[1:], -1):
            gains = [cells[name, loss, mode]["gain"] for loss in LOSSES]
            heights, errors = zip(*((mean, error or 0) for mean, error in gains))
            axes.bar([number + 0.25 * at for number in range(len(gains))], heights, 0.23, yerr=errors, capsize=3, label=mode)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_xticks(range(len(LOSSES)), LOSSES)
        axes.set_ylabel(f"{COMPARED[name]} gained over baseline")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    try:
        with replacing(file) as name:
            figure.savefig(name, format="png", dpi=150)
        print(f"\nwrote {file}")
    except OSError as error:  # the numbers are still to be told
        print(f"\n{error}")


def evaluate_run(arguments):
    """Evaluate the checkpoint of a run: a table, a line of JSON, and in the run's directory eval.json and the sheet."""
    parser = argparse.ArgumentParser("metrix eval", allow_abbrev=False)
    parser.error = fail
    parser.add_argument("run_dir", help="directory that a run has written")
    parser.add_argument("--split", default="test", choices=("test", "train"), help="images to evaluate (test)")
    parser.add_argument("--checkpoint", default="last", choices=("last", "best"), help="epoch to evaluate (last)")
    parser.add_argument("--embeddings", action="store_true", help="write embeddings.npz as well, as eval.py reads it")
    parser.add_argument("--data-root", help="where the data set is now, if not where it was")
    parser.add_argument("--num-workers", type=int, help="processes that load images")
    parser.add_argument("--device", default="auto", help="auto: cuda if there is one, else cpu")
    arguments = vars(parser.parse_args(arguments))
    out = arguments["run_dir"]
    there = read_settings(out)
    for field in dataclasses.fields(Config):
        if field.name not in there:
            fail(f"{out}/config.json: no {field.name} in it; it is not of this program")
        value, choices = there[field.name], field.metadata.get("choices")
        if not isinstance(value, (int, float) if field.type is float else field.type) or choices and value not in choices:
            fail(f"{out}/config.json: {field.name} cannot be {str(value)[:80]}; repair it, or name another run")
    config = Config(**{field.name: there[field.name] for field in dataclasses.fields(Config)})
    config.out, config.device = out, arguments["device"]
    config.data_root = arguments["data_root"] or config.data_root
    config.num_workers = config.num_workers if arguments["num_workers"] is None else arguments["num_workers"]
    check(config)
    with told_in_one_line(ValueError, OSError, by_all=True):
        splits = cached(data.load(config.dataset, config.data_root, config.validation), config)
        model = models.ResNet(**models.NETS[config.net], embedding_size=config.embedding_size, bn=config.bn)
        state = models.read_checkpoint(f"{out}/{arguments['checkpoint']}.pt")
        try:
            model.load_state_dict(state["model"])
            model.to(config.device, memory_format=torch.channels_last)
        except (KeyError, TypeError, RuntimeError):
            fail(f"{out}/{arguments['checkpoint']}.pt: not the checkpoint of the run in {out}/config.json")
        progress = Progress(sum(map(len, splits)))
        progress.begin("embedding the images")
        train, *held_out = [embed(model, split, config, progress) for split in splits]
        testing = arguments["split"] == "test"
        chosen, embedded = (splits[1:], held_out) if testing else (splits[:1], [train])
        result, ranking = measure(embedded, RECALL_AT[config.dataset], True, train.z if testing else None)
        result = dict(checkpoint=arguments["checkpoint"], epoch=state["epoch"], split=arguments["split"]) | result
        write_sheet(out, ranking, embedded, chosen)
        names = ("embeddings", "labels", "gallery_embeddings", "gallery_labels")
        arrays = dict(zip(names, (gather(x).cpu().numpy() for part in embedded for x in part[:2])))
        arrays["train_embeddings"] = gather(train.z).cpu().numpy()
        if arguments["embeddings"] and here()[0] == 0:
            with replacing(f"{out}/embeddings.npz") as name, open(name, "wb") as file:
                np.savez(file, **arrays)
        if here()[0] == 0:
            with replacing(f"{out}/eval.json") as name, open(name, "w") as file:
                print(json.dumps(result, indent=2), file=file)
    print(f"{config.dataset} {config.loss} {config.mode}, {arguments['checkpoint']} checkpoint (epoch {state['epoch']}), ", end="")
    print(f"{arguments['split']}: {result['queries']} queries, and {result['lone_queries']} with nothing to find, left out")
    print(*eval.table(result), "", json.dumps(result), sep="\n")


def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else arguments
    # Pins the threads of a matrix product too, which otherwise may vary, and with them its last digits.
    torch.set_num_threads(torch.get_num_threads())
    signal.signal(signal.SIGTERM, stop)
    join_processes()
    try:
        if arguments[:1] == ["all"]:
            run_all(arguments[1:])
        elif arguments[:1] == ["eval"]:
            evaluate_run(arguments[1:])
        else:
            config = parse(arguments)
            report(config, run(config))
    except KeyboardInterrupt as stopped:
        number = stopped.args[0] if stopped.args else signal.SIGINT
        if here()[0] == 0:
            print("\n" * sys.stderr.isatty() + "metrix: stopped; the same command goes on after the last full epoch", file=sys.stderr)
        sys.exit(128 + number)
    except BrokenPipeError:  # nobody reads on: | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except RuntimeError as error:
        if here()[1] == 1 or "gloo" not in str(error):
            raise
        sys.exit(1)  # another process has ended and told why
    else:
        if dist.is_initialized():
            dist.destroy_process_group()


def stop(number, frame):
    raise KeyboardInterrupt(number)


if __name__ == "__main__":
    main()

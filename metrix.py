"""Metrix: metric learning with mixed examples. The training step, the loop around it, and the command line.

    ./run.sh [DATASET] [LOSS] [MODE] [--flag value ..]       default: toy contrastive feature
    ./run.sh eval RUN_DIR [--checkpoint best]                all metrics of a checkpoint
    ./run.sh --help                                          what each flag means

A step minimises    clean loss + mix_weight * mixed loss,    with one lam ~ Beta(mix_alpha, mix_alpha).
    baseline   mixes nothing
    input      mixes images with each anchor's hardest negatives, which costs a second forward pass
    feature    mixes the last feature maps, before pooling
    embed      mixes embeddings; their dot products are all that is needed

A run writes OUT/ (default runs/DATASET-LOSS-MODE-seedN): config.json, log.jsonl, last.pt, best.pt, retrieval.png.
The same command resumes a stopped run. Every epoch has its own seed, so on a CPU a resumed run gives the same bits.
"""

import argparse
import dataclasses
import json
import math
import os
import pathlib
import re
import sys
import time
import zlib

import numpy as np
import torch
import torch.distributed as dist
from torch.utils._pytree import tree_map_only
from torch.utils.serialization import config as save_options

import data
import eval
import kernels
import losses
from kernels.mix_pool import mix_pool
from model import BATCH_NORMS, NETS, ResNet, load_weights, no_stats_update, read_checkpoint

# ------------------------------------------------------------------------------------------ training


def step(model, metric, images, y, config, lam, pairing):
    """Loss of one batch of B: images (B, 3, H, W), labels y (B,), lam in [0, 1], pairing one of metric.pairings.

    With several processes, each gets its shard of the batch and runs the trunk on it. From then on all have the whole.
    """
    features, y = gather(model.features(images)), gather(y)  # (B, C, h, w), (B,)
    z = model.head(features)  # (B, D)
    loss = metric(z, y)
    if config.mode == "baseline":
        return loss
    if config.mode == "embed":
        return loss + config.mix_weight * metric.mixed_embed(z, y, lam, pairing)

    if config.mode == "feature":
        i, j = losses.full_bank(y, pairing)  # (M,)
        v = model.embed(mix_pool(features, i, j, lam))  # (M, D)
    else:
        i, j = losses.hardest_bank(z, y, pairing, config.hardest)  # (M,)
        images, a, b = gather(images), shard(i), shard(j)
        with no_stats_update(model):  # mixed images stay out of the running statistics
            v = gather(model(lam * images[a] + (1 - lam) * images[b]))  # (M, D)
    return loss + config.mix_weight * metric.mixed(z, y, v, i, lam, pairing)


def train_epoch(epoch, model, metric, optimizer, batches, config):
    """One pass over batches of images on the device. Returns the mean loss. ValueError if a loss is not finite."""
    rng = np.random.default_rng((config.seed, epoch, 1))
    model.train()
    model.train_trunk(epoch >= config.warmup_epochs)
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * config.lr_gamma ** (epoch // config.lr_step)
    parameters = [*model.parameters(), *metric.parameters()]
    total = 0.0
    for number, (images, y) in enumerate(batches, 1):
        pairing = metric.pairings[rng.integers(len(metric.pairings))]
        lam = rng.beta(config.mix_alpha, config.mix_alpha)
        with autocast(config):
            loss = step(model, metric, images, y, config, lam, pairing)
        total += loss.item()  # read before backward, so that a GPU has work while the next batch is fetched
        if not math.isfinite(total):
            where = f"epoch {epoch + 1}, step {number}: the loss is {loss.item()}"
            raise ValueError(f"{where}; this epoch is not saved; try a lower --lr and another --out")
        optimizer.zero_grad()
        loss.backward()
        average_gradients(parameters)
        torch.nn.utils.clip_grad_value_(parameters, config.clip)
        optimizer.step()
    return total / number


def run(config):
    """Train, evaluate after every epoch, write OUT/. Returns the log: a dict per epoch."""
    kernels.backend = config.kernels
    describe(config)
    splits = load_splits(config)
    size, per_class = config.batch_size, config.images_per_class
    batches = data.TrainBatches(splits.train.labels, size, per_class, config.seed, shard=my_slice(size))
    torch.manual_seed(config.seed)
    model = make_model(config, config.weights)
    metric = LOSSES[config.loss](len(splits.train.classes), config.embedding_size).to(config.device)
    if WORLD_SIZE > 1 and config.bn == "train":
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    optimizer = make_optimizer(model, metric, config)
    log = open_run(config, splits, model=model, metric=metric, optimizer=optimizer)

    train_loader = data.train_loader(splits.train, batches, config.image_size, config.min_crop, config.num_workers)
    test_loaders = [test_loader(split, config) for split in splits[1:]]  # test, or query and gallery
    for epoch in range(len(log), config.epochs):
        title, start, last = f"epoch {epoch + 1:3d}/{config.epochs}", time.perf_counter(), epoch + 1 == config.epochs
        batches.epoch = epoch
        loss = train_epoch(epoch, model, metric, optimizer, on_device(train_loader, config, title), config)
        rate = len(batches) * size / (time.perf_counter() - start)
        test = [embed(model, loader, config) for loader in test_loaders]
        train = embed(model, test_loader(splits.train, config), config) if last else None
        result, ranking = measure(test, config.dataset, train)
        line = dict(epoch=epoch + 1, loss=loss, lr=optimizer.param_groups[0]["lr"], recall=result["recall"])
        line |= dict(seconds=time.perf_counter() - start, images_per_second=rate)
        log.append(line | result if last else line)
        r1, left = 100 * line["recall"][1], line["seconds"] * (config.epochs - epoch - 1)
        print(f"{title}  loss {loss:.4f}  R@1 {r1:.1f}  {rate:.0f} images/s  {left / 60:.0f} min left", flush=True)
        if RANK == 0:
            if last:
                write_sheet(config.out, ranking, test, splits[1:])
            save_epoch(config, log, model=model, metric=metric, optimizer=optimizer)
    return log


def make_model(config, weights):
    model = ResNet(**NETS[config.net], embedding_size=config.embedding_size, bn=config.bn)
    load_weights(model, weights)
    return model.to(config.device, memory_format=torch.channels_last)


def make_optimizer(model, metric, config):
    groups = [dict(params=[*model.parameters()], base_lr=config.lr)]
    if proxies := [*metric.parameters()]:
        groups.append(dict(params=proxies, base_lr=config.proxy_lr * config.lr))
    return torch.optim.Adam(groups, lr=config.lr, weight_decay=config.weight_decay)


def autocast(config):
    return torch.autocast(torch.device(config.device).type, torch.bfloat16, enabled=config.precision == "bf16")


# ------------------------------------------------------------------------------------------ settings

LOSSES = {  # name: (number of classes, embedding size) -> loss
    "contrastive": lambda *_: losses.Contrastive(),
    "multisimilarity": lambda *_: losses.MultiSimilarity(),
    "proxyanchor": losses.ProxyAnchor,
}
MODES = ("baseline", "input", "feature", "embed")


def flag(default, meaning, group=None, **options):
    """A field of Config, with options for argparse. The first field of a group names it."""
    if isinstance(default, bool):
        options |= dict(action="store_true", default=None)
    else:
        options |= dict(type=type(default), metavar=None if "choices" in options else "X")
        meaning += f" (default {default})" if default != "" else ""
    return dataclasses.field(default=default, metadata=dict(group=group, options=options | dict(help=meaning)))


@dataclasses.dataclass
class Config:
    """Each field but the first three is a flag: --batch-size sets batch_size. Recipes replace some defaults."""

    dataset: str = flag("toy", "the images", "what to train", nargs="?", choices=data.DATASETS)
    loss: str = flag("contrastive", "the loss of their embeddings", nargs="?", choices=LOSSES)
    mode: str = flag("feature", "what is mixed: nothing, images, feature maps, embeddings", nargs="?", choices=MODES)

    epochs: int = flag(60, "passes over the training images", "training")
    batch_size: int = flag(100, "images per step, over all processes")
    images_per_class: int = flag(0, "images of each class in a batch; 0 shuffles all images instead")
    lr: float = flag(1e-4, "learning rate of Adam")
    proxy_lr: float = flag(100.0, "for proxyanchor: learning rate of its proxies, as a multiple of lr")
    lr_step: int = flag(10, "multiply lr by lr_gamma every lr_step epochs")
    lr_gamma: float = flag(0.1, "see --lr-step")
    warmup_epochs: int = flag(5, "first train only the embedding layer and the proxies, for this many epochs")
    weight_decay: float = flag(1e-4, "weight decay of Adam")
    clip: float = flag(10.0, "clip gradient values to +-clip")
    mix_weight: float = flag(0.4, "weight of the mixed loss")
    mix_alpha: float = flag(2.0, "draw lam from Beta(mix_alpha, mix_alpha)")
    hardest: int = flag(1, "for input: how many of the most similar negatives to mix with")

    net: str = flag("resnet50", "tiny is narrow and shallow, for small images", "model", choices=NETS)
    weights: str = flag("imagenet", "initial weights: imagenet, a file, or none, which also changes other defaults")
    bn: str = flag("stats", "batch norm: train it, freeze its statistics, or all of it", choices=BATCH_NORMS)
    embedding_size: int = flag(512, "dimension of the embeddings")
    image_size: int = flag(224, "pixels per side of a crop")
    min_crop: float = flag(0.08, "random crops keep at least this share of an image; raise it if they lose the object")
    precision: str = flag("fp32", "bf16: autocast; fp32: on a GPU, convolutions are TF32", choices=("fp32", "bf16"))

    data_root: str = flag("data", "directory of the images", "the run")
    validation: bool = flag(False, "test on half of the training classes, to choose settings")
    out: str = flag("", "directory to write (default runs/DATASET-LOSS-MODE[-validation]-seedN)")
    seed: int = flag(0, "seed of weights, batches, crops and mixing")
    num_workers: int = flag(min(4, os.cpu_count() or 1), "processes that load images; does not change results")
    device: str = flag("cuda" if torch.cuda.is_available() else "cpu", "cpu, cuda or cuda:N")
    kernels: str = flag("auto", "auto: triton for large problems on a GPU, else torch", choices=kernels.BACKENDS)
    resume: bool = flag(False, "only resume: stop if OUT holds no run")
    checkpoint: str = flag("last", "for eval: which one to evaluate", choices=("last", "best"))


MAY_CHANGE_ON_RESUME = ("data_root", "out", "num_workers", "device", "kernels", "resume", "checkpoint")

# The commands of the authors' README, as changes to Config. A folder has the settings of cars, because there all modes
# train equally long, but balanced batches. toy is ours.
ANY_LOSS, ANY_MODE, MIXED = " ".join(LOSSES), " ".join(MODES), "input feature embed"
RECIPES = [  # data sets, losses, modes, settings
    ("cub cars folder", "multisimilarity proxyanchor", ANY_MODE, dict(lr_step=5, lr_gamma=0.5)),
    ("cub", "multisimilarity proxyanchor", MIXED, dict(epochs=100, lr_step=10)),
    ("sop", "contrastive", ANY_MODE, dict(lr=3e-5, lr_gamma=0.25)),
    ("sop", "contrastive", "baseline", dict(bn="train")),
    ("inshop", "contrastive", ANY_MODE, dict(lr_gamma=0.25)),
    ("inshop", "contrastive", "baseline", dict(lr=3e-5, lr_step=5, warmup_epochs=1, bn="train")),
    ("sop inshop", "multisimilarity proxyanchor", ANY_MODE, dict(lr=6e-4, lr_step=20, lr_gamma=0.25)),
    ("sop inshop", "multisimilarity proxyanchor", ANY_MODE, dict(warmup_epochs=1, bn="train")),
    ("sop inshop folder toy", ANY_LOSS, ANY_MODE, dict(images_per_class=5)),
    ("toy", ANY_LOSS, ANY_MODE, dict(net="tiny", embedding_size=64, image_size=64)),
]
# From random weights. Tuned on the baseline with --validation.
SCRATCH = dict(weights="none", bn="train", warmup_epochs=0, min_crop=0.6)
SCRATCH |= dict(epochs=40, lr=3e-3, lr_step=16, lr_gamma=0.3, proxy_lr=30.0)
SCRATCH_LR = {"multisimilarity": 1e-2}


def recipe(dataset, loss, mode, from_scratch=False):
    """The settings that this combination changes."""
    settings = {}
    for datasets, its_losses, modes, changes in RECIPES:
        if dataset in datasets.split() and loss in its_losses.split() and mode in modes.split():
            settings |= changes
    if from_scratch or dataset == "toy":
        settings |= SCRATCH | dict(lr=SCRATCH_LR.get(loss, SCRATCH["lr"]))
    return settings


def parse(arguments, **saved):
    """The Config of a command line. Saved settings replace the recipe. Raises ValueError for an invalid command."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.usage = "./run.sh [DATASET] [LOSS] [MODE] [--flag value ..]\n       ./run.sh eval RUN_DIR [--flag value ..]"
    parser.description = "These are the defaults before a recipe changes some. A run prints what it uses."
    parser.formatter_class = lambda prog: argparse.HelpFormatter(prog, max_help_position=30, width=120)
    parser.error = raise_error
    for field in dataclasses.fields(Config):
        if field.metadata["group"]:
            group = parser.add_argument_group(field.metadata["group"])
        options = field.metadata["options"]
        group.add_argument(field.name if "nargs" in options else f"--{field.name.replace('_', '-')}", **options)
    given = {name: value for name, value in vars(parser.parse_intermixed_args(arguments)).items() if value is not None}
    draft = Config(**given)
    settings = recipe(draft.dataset, draft.loss, draft.mode, from_scratch=draft.weights == "none")
    config = Config(**(settings | saved | given))
    name = f"{config.dataset}-{config.loss}-{config.mode}" + ("-validation" if config.validation else "")
    config.out = config.out or f"runs/{name}-seed{config.seed}"
    check(config)
    return config


def check(config):
    """ValueError for settings that cannot work."""
    size, per_class = config.batch_size, config.images_per_class
    least = dict.fromkeys(("epochs", "batch_size", "lr_step", "embedding_size", "image_size", "hardest"), 1)
    least |= dict.fromkeys(("seed", "images_per_class", "warmup_epochs", "num_workers"), 0)
    for name in least:
        if getattr(config, name) < least[name]:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least[name]}")
    if config.mix_alpha <= 0 or not 0 < config.min_crop <= 1:
        raise ValueError("--mix-alpha must be above 0, and --min-crop above 0 and at most 1")
    if per_class and (size < 2 * per_class or size % per_class):
        raise ValueError(f"--batch-size {size} must be a multiple of --images-per-class {per_class}, at least twice it")
    if size < WORLD_SIZE:
        raise ValueError(f"--batch-size {size} is too small for {WORLD_SIZE} processes; use a smaller NPROC")
    if config.weights == "imagenet" and config.net != "resnet50":
        raise ValueError(f"--net {config.net} has no ImageNet weights; add --weights none, or a file")
    try:
        device = torch.empty(1, device=config.device).device
    except (RuntimeError, AssertionError):
        raise ValueError(f"--device {config.device} is not available on this machine; try --device cpu") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {config.device} is not supported; use cpu or cuda")
    if WORLD_SIZE > 1 and device.type == "cuda" and (":" in config.device or LOCAL_RANK >= torch.cuda.device_count()):
        raise ValueError(f"{torch.cuda.device_count()} GPUs are too few; use --device cuda, or a smaller NPROC")
    if config.bn == "train" and WORLD_SIZE > 1 and device.type == "cpu":
        raise ValueError("--bn train on several processes needs GPUs, for SyncBatchNorm; use one process or --bn stats")


def raise_error(message):
    raise ValueError(message)


# -------------------------------------------------------------------------------- images, evaluation

RECALL_AT = dict(sop=(1, 10, 100, 1000), inshop=(1, 10, 20, 30, 40, 50))  # the k of other data sets: 1, 2, 4, 8
RECALL_AT |= dict.fromkeys(("cub", "cars"), (1, 2, 4, 8, 16, 32))


def load_splits(config):
    """The data set. Prints its sizes, and a warning if it is incomplete."""
    splits = data.load(config.dataset, config.data_root, config.validation)
    for name, split in splits._asdict().items():
        print(f"  {name}: {len(split)} images of {len(split.classes)} classes")
        if len(split) < WORLD_SIZE:
            raise ValueError(f"{WORLD_SIZE} processes for {len(split)} {name} images; use a smaller NPROC")
    if alone := data.queries_without_match(splits):
        print(f"  {alone} queries have no other image of their class and are left out")
    full = data.FULL_SIZES.get(config.dataset)
    if full not in (None, data.sizes(splits)) and not config.validation:
        print(f"WARNING: not the full data set ({full}), so results are not comparable with published ones")
    return splits


def test_loader(split, config):
    return data.test_loader(shard(split), config.batch_size, config.image_size, config.num_workers)


def on_device(loader, config, title):
    """The batches of a loader, normalised, on the device. Prints the rate and the time left every 20 seconds."""
    start = printed = time.perf_counter()
    for number, (images, y) in enumerate(loader, 1):
        images = data.normalize(images.to(config.device, non_blocking=True))
        yield images.contiguous(memory_format=torch.channels_last), y.to(config.device, non_blocking=True)
        now = time.perf_counter()
        if now - printed > 20:
            printed, seconds = now, (now - start) / number  # per batch
            rate, left = len(y) * WORLD_SIZE / seconds, seconds * (len(loader) - number)
            print(f"{title}  {number}/{len(loader)}  {rate:.0f} images/s  {left / 60:.0f} min left", flush=True)


def embed(model, loader, config):
    """Embeddings (N, D) and labels (N,) of a split, from a loader of this process's shard."""
    with autocast(config):
        z, y = eval.embed_all(model, on_device(loader, config, "embedding"))
    return gather(z), gather(y)


def measure(test, dataset, train=None):
    """Metrics of test = [(z, y)], or [(query z, y), (gallery z, y)]: a dict, and the eval.Ranking of all queries.

    Recall only, unless train = (z, y) is given. Each process ranks its shard of the queries.
    """
    arguments = [x for z_and_y in test for x in z_and_y]
    ranking = eval.per_query(*arguments, full=train is not None, shard=my_slice(len(arguments[0])))
    ranking = eval.Ranking(*[gather(x) for x in ranking if x is not None])
    result = eval.summary(ranking, RECALL_AT.get(dataset, (1, 2, 4, 8)))
    if train is not None:
        z, y = (torch.cat(parts) for parts in zip(*test))
        result |= dict(alignment=eval.alignment(z, y), uniformity=eval.uniformity(z))
        result |= dict(utilization=eval.utilization(z, train[0]))
    return result, ranking


def evaluate_run(run_dir, flags):
    """Evaluate the checkpoint of a run: a table, a JSON line, and RUN_DIR/eval.json and retrieval.png."""
    names = {field.name for field in dataclasses.fields(Config)} - {"num_workers", "device", "kernels"}
    settings = read_settings(run_dir)
    config = parse([*flags, "--out", run_dir], **{name: x for name, x in settings.items() if name in names})
    if changed := difference(vars(config), settings):
        raise ValueError(f"eval takes the settings of the run ({changed}); leave these flags out")
    kernels.backend = config.kernels
    splits = load_splits(config)
    checksum = images_checksum(splits)
    if settings.get("images_checksum", checksum) != checksum:
        print("WARNING: these are not the images of the run, so training classes may be among the test classes")
    model = make_model(config, f"{run_dir}/{config.checkpoint}.pt")
    train, *test = [embed(model, test_loader(split, config), config) for split in splits]
    result, ranking = measure(test, config.dataset, train)
    result["checkpoint"] = config.checkpoint
    if RANK == 0:
        write_sheet(run_dir, ranking, test, splits[1:])
        write(f"{run_dir}/eval.json", lambda file: file.write_text(json.dumps(result, indent=2)))
    print(*eval.table(result), "", json.dumps(result), sep="\n")


# ------------------------------------------------------------------------------------------- files


def open_run(config, splits, **modules):
    """Load the run in OUT into the modules, or create OUT. Returns the log so far. Only rank 0 reads and writes."""
    settings = vars(config) | data.sizes(splits) | dict(images_checksum=images_checksum(splits))
    checkpoint, state = f"{config.out}/last.pt", None
    if RANK == 0 and os.path.exists(checkpoint):
        if changed := difference(settings, read_settings(config.out)):
            raise ValueError(f"{config.out} holds another run ({changed}); delete it, or use another --out or --seed")
        state = read_checkpoint(checkpoint)
    elif RANK == 0:
        if config.resume:
            raise ValueError(f"--resume: {config.out} holds no run to resume")
        try:
            os.makedirs(config.out, exist_ok=True)
        except OSError as error:
            raise OSError(f"--out {config.out}: no such directory can be made ({error.strerror.lower()})") from error
        write(f"{config.out}/config.json", lambda file: file.write_text(json.dumps(settings, indent=2)))
    state = agree(settings, state)
    if state is None:
        return []
    try:
        for name, module in modules.items():
            module.load_state_dict(state[name])
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"{checkpoint}: not a checkpoint of this run; use another --out") from error
    print(f"  resumes after epoch {state['epoch']}")
    return state["log"]


def images_checksum(splits):
    """A checksum of names, sizes in bytes and labels. It tells folders of the same structure apart."""
    images = [(path, y) for split in splits for path, y in zip(split.paths, split.labels)]
    return zlib.crc32(repr([(os.path.basename(path), os.path.getsize(path), y) for path, y in images]).encode())


def read_settings(out):
    try:
        with open(f"{out}/config.json") as file:
            settings = json.load(file)
        settings["dataset"]  # a KeyError if the file is of another program
        return settings
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{out}/config.json: missing or damaged ({error}); is {out} the directory of a run?") from None


def difference(settings, others):
    """Says which settings differ but must not."""
    names = [name for name in settings if name not in MAY_CHANGE_ON_RESUME and others.get(name) != settings[name]]
    return ", ".join(f"{name} is {others.get(name)}, not {settings[name]}" for name in names)


def save_epoch(config, log, model, metric, optimizer):
    """Write log.jsonl, best.pt if this epoch is the best so far, and last.pt, from which the run resumes."""
    write(f"{config.out}/log.jsonl", lambda file: file.write_text("".join(json.dumps(line) + "\n" for line in log)))
    state = dict(model=model.state_dict(), metric=metric.state_dict(), epoch=len(log), log=log, config=vars(config))
    # Tensors move to the CPU, because a machine without a GPU may load them.
    state = tree_map_only(torch.Tensor, torch.Tensor.cpu, state)
    optimizer = tree_map_only(torch.Tensor, torch.Tensor.cpu, optimizer.state_dict())
    with save_options.patch("save.compute_crc32", False):  # a checksum takes longer than the writing
        if best_of(log) is log[-1]:
            write(f"{config.out}/best.pt", lambda file: torch.save(state, file))
        write(f"{config.out}/last.pt", lambda file: torch.save(state | dict(optimizer=optimizer), file))


def best_of(log):
    return max(log, key=lambda line: line["recall"][1])


def write_sheet(out, ranking, test, splits):
    arguments = [ranking.rank, *(x for (z, y), split in zip(test, splits) for x in (z, split.paths, y.tolist()))]
    write(f"{out}/retrieval.png", lambda file: eval.retrieval_sheet(file, *arguments, open_image=data.open_image))


def write(path, save):
    """Save to a temporary file, then rename it: no file is ever half written."""
    temporary = pathlib.Path(f"{path}.tmp")
    try:
        save(temporary)
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError for a full disk
        temporary.unlink(missing_ok=True)
        reason = f" ({error})" if isinstance(error, OSError) else ""
        remedy = "free the disk or allow writing, and the same command resumes"
        raise OSError(f"{path}: cannot be written{reason}; {remedy}") from error


# ----------------------------------------------------------------------------------- several processes

# torchrun starts a process (rank) per GPU, on one machine or on several. All draw the same batches, lam and pairing.
# Each runs the trunk on its shard of the images. Only rank 0 prints and writes.
RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))  # on this machine


def my_slice(length):
    """The part of range(length) that this process handles."""
    return slice(length * RANK // WORLD_SIZE, length * (RANK + 1) // WORLD_SIZE)


def shard(x):
    """This process's part of a list, tensor or split."""
    return x[my_slice(len(x))]


def gather(x):
    """Concatenates the shards of all processes.

    All processes compute the same loss from the whole, so each knows the whole gradient of its own shard. Here it is
    multiplied by the number of processes, because `average_gradients` divides by that.
    """
    if WORLD_SIZE == 1:
        return x
    length = torch.tensor(len(x), device=x.device)
    dist.all_reduce(length)
    whole, mine = x.new_zeros(int(length), *x.shape[1:]), my_slice(int(length))
    whole[mine] = x.detach()
    dist.all_reduce(whole)  # each process adds its shard to zeros
    whole[mine] += WORLD_SIZE * (x - x.detach())  # adds zero, but carries the gradient
    return whole


def average_gradients(parameters):
    """Replace gradients by their mean over processes, in one message."""
    if WORLD_SIZE > 1:
        gradients = [p.grad for p in parameters if p.grad is not None]
        mean = torch.cat([gradient.flatten() for gradient in gradients]) / WORLD_SIZE
        dist.all_reduce(mean)
        for gradient, part in zip(gradients, mean.split([gradient.numel() for gradient in gradients])):
            gradient.copy_(part.view_as(gradient))


def agree(settings, state):
    """Rank 0's state, on all ranks. ValueError on all ranks if the settings or images differ."""
    if WORLD_SIZE > 1:
        every, box = [None] * WORLD_SIZE, [state]
        dist.all_gather_object(every, settings)
        for others in every:
            if changed := difference(every[0], others):
                raise ValueError(f"the processes differ ({changed}); give all machines the same flags and images")
        dist.broadcast_object_list(box)
        state = box[0]
    return state


# -------------------------------------------------------------------------------------------- output


def describe(config):
    """Print the settings that make the result, with (recipe: X) where a flag overrides X."""
    print(f"{config.dataset} {config.loss} {config.mode} on {config.device}, writes {config.out}")
    expected, shown = vars(Config()) | recipe(config.dataset, config.loss, config.mode, config.weights == "none"), []
    for name, value in vars(config).items():
        if name not in ("dataset", "loss", "mode", *MAY_CHANGE_ON_RESUME):
            shown.append(f"{name} {value}" + ("" if value == expected[name] else f" (recipe: {expected[name]})"))
    print("  " + ", ".join(shown))


def report(config, log):
    """Tables for people, then one JSON line for programs."""
    last, best = log[-1], best_of(log)
    chosen = "best epoch" if config.validation else "best epoch, chosen on the test classes"
    for title, line in ((chosen, best), ("last epoch", last)):
        print(f"\n{title}: {line['epoch']}", *eval.table(line), sep="\n")
    summary = {name: getattr(config, name) for name in ("dataset", "loss", "mode", "seed", "out")}
    summary |= dict(last=last, best=dict(epoch=best["epoch"], recall=best["recall"]))
    print("\n" + json.dumps(summary | dict(seconds=round(sum(line["seconds"] for line in log), 1))))


REMEDIES = {  # part of an error message of PyTorch: what to print instead
    r"DataLoader worker \(pid|</torch_": "no memory left to load images (RAM or /dev/shm); use --num-workers 0",
    r"out of memory|can't allocate memory": "out of memory; use a smaller --batch-size",
    r"by peer|Broken pipe|remote process exited": "another process has stopped; its message says why",
}


def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else arguments
    torch.set_num_threads(torch.get_num_threads())  # fixes the number, because MKL's choice changes the last digits
    if WORLD_SIZE > 1:
        if LOCAL_RANK < torch.cuda.device_count():
            torch.cuda.set_device(LOCAL_RANK)
        dist.init_process_group()
        if RANK > 0:
            sys.stdout = open(os.devnull, "w")
    try:
        if arguments[:1] == ["eval"] and "--help" not in arguments:
            run_dir, *flags = arguments[1:] or ["-"]
            if run_dir.startswith("-"):
                raise ValueError("eval needs a run: ./run.sh eval RUN_DIR [--flag value ..]")
            evaluate_run(run_dir, flags)
        else:
            config = parse(arguments)
            report(config, run(config))
    except KeyboardInterrupt:
        print("\nmetrix: stopped; the same command continues a training run", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, RuntimeError) as error:
        remedy = next((remedy for words, remedy in REMEDIES.items() if re.search(words, str(error))), None)
        if isinstance(error, RuntimeError) and not remedy:
            raise
        last_line = str(error).strip().splitlines()[-1]  # a loader's process puts its traceback before the message
        met_alone = isinstance(error, (RuntimeError, data.UnreadableImage)) and "another process" not in (remedy or "")
        if LOCAL_RANK == 0 or met_alone:
            print(f"metrix: {remedy or last_line.removeprefix('data.UnreadableImage: ')}", file=sys.stderr)
        sys.exit(2)
    if WORLD_SIZE > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()

"""Metrix: metric learning with mixed examples. The method, and the loop that trains it.

    ./run.sh [DATASET] [LOSS] [MODE] [--flag value ..]       default: toy contrastive feature
    ./run.sh eval RUN_DIR [--checkpoint best]                every metric of a run's checkpoint

`step` is the method: clean loss + mix_weight * mixed loss, with one lam ~ Beta(mix_alpha, mix_alpha) per step.
    baseline   mixes nothing
    input      mixes images: a second pass of the trunk, over hardest negatives only
    feature    mixes the last feature maps, before pooling: one pass of the trunk
    embed      mixes embeddings, which needs their Gram matrix only: one pass of the trunk

A run writes OUT/ (default runs/DATASET-LOSS-MODE-seedN): config.json, log.jsonl, last.pt, best.pt, retrieval.png.
Everything random in an epoch follows from (seed, epoch), so the same command resumes a run and ends with the same bits.
"""

import argparse
import dataclasses
import json
import math
import os
import sys
import time

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.nn.functional import all_gather

import data
import eval
import kernels
import losses
import model as models
from kernels.mix_pool import mix_pool

# -------------------------------------------------------------------------------------------- method


def step(model, metric, images, y, config, lam, pairing):
    """Loss of one batch: images (B, 3, H, W), labels y (B,), lam in [0, 1], pairing one of metric.pairings.

    Each rank runs the trunk on its shard; all ranks compute the loss of the global batch.
    """
    features, y = gather(model.features(images)), gather(y)  # (B, C, h, w), (B,)
    z = model.head(features)  # (B, D)
    loss = metric(z, y)

    if config.mode == "embed":
        loss = loss + config.mix_weight * metric.mixed_embed(z, y, lam, pairing)
    elif config.mode == "feature":
        i, j = losses.full_bank(y, pairing)  # (M,)
        if len(i):
            v = model.embed(mix_pool(features, i, j, lam, in_order=True))  # (M, D)
            loss = loss + config.mix_weight * metric.mixed(z, y, v, i, lam, pairing)
    elif config.mode == "input":
        i, j = losses.hardest_bank(z, y, pairing, config.hardest)  # (M,)
        if len(i):
            images, a, b = gather(images), shard(i), shard(j)
            with models.no_stats_update(model):  # mixed images are not test images
                v = model.head(gather(model.features(lam * images[a] + (1 - lam) * images[b])))  # (M, D)
            loss = loss + config.mix_weight * metric.mixed(z, y, v, i, lam, pairing)
    return loss


def train_epoch(epoch, model, metric, optimizer, batches, config):
    """One pass over batches of images on the device. Returns the mean loss; FloatingPointError if it is not finite."""
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
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        average_gradients(parameters)
        torch.nn.utils.clip_grad_value_(parameters, config.clip)
        optimizer.step()
        total += loss.item()
        if not math.isfinite(total):
            kept = f"{config.out}/last.pt holds epoch {epoch}" if epoch else "no epoch is finished"
            advice = "try a lower --lr and another --out"
            raise FloatingPointError(f"epoch {epoch + 1}, step {number}: the loss is {loss.item()}; {kept}; {advice}")
    return total / number


def autocast(config):
    return torch.autocast(torch.device(config.device).type, torch.bfloat16, enabled=config.precision == "bf16")


def make_optimizer(model, metric, config):
    groups = [dict(params=[*model.parameters()], base_lr=config.lr)]
    if proxies := [*metric.parameters()]:
        groups.append(dict(params=proxies, base_lr=config.proxy_lr * config.lr))
    return torch.optim.Adam(groups, lr=config.lr, weight_decay=config.weight_decay)


# -------------------------------------------------------------------------------------------- config

MODES = ("baseline", "input", "feature", "embed")
LOSSES = {  # name: (number of classes, embedding size) -> loss
    "contrastive": lambda *_: losses.Contrastive(),
    "multisimilarity": lambda *_: losses.MultiSimilarity(),
    "proxyanchor": losses.ProxyAnchor,
}
RECALL_AT = dict.fromkeys(("cub", "cars"), (1, 2, 4, 8, 16, 32)) | dict.fromkeys(("folder", "toy"), (1, 2, 4, 8))
RECALL_AT |= dict(sop=(1, 10, 100, 1000), inshop=(1, 10, 20, 30, 40, 50))


@dataclasses.dataclass
class Config:
    """Each field is a flag: --batch-size sets batch_size. A recipe changes some defaults; flags override the recipe."""

    dataset: str = "toy"
    loss: str = "contrastive"
    mode: str = "feature"

    epochs: int = 60
    batch_size: int = 100  # over all ranks
    images_per_class: int = 0  # of a balanced batch; 0: shuffled batches
    lr: float = 1e-4  # Adam's
    proxy_lr: float = 100.0  # how fast proxies learn, over lr
    lr_step: int = 10  # epochs after which lr is multiplied by lr_gamma, again and again
    lr_gamma: float = 0.1
    warmup_epochs: int = 5  # first epochs, which train the embedding layer and the proxies only
    weight_decay: float = 1e-4
    clip: float = 10.0  # largest magnitude of a gradient's element
    mix_weight: float = 0.4  # of the mixed loss
    mix_alpha: float = 2.0  # lam ~ Beta(mix_alpha, mix_alpha)
    hardest: int = 1  # negatives per anchor that input mode mixes with

    net: str = "resnet50"  # or tiny
    precision: str = "fp32"  # or bf16 by autocast; losses and metrics stay float32
    weights: str = "imagenet"  # or none, or a file
    bn: str = "stats"  # batch norm: train; stats: statistics frozen; frozen: scale and shift as well
    embedding_size: int = 512
    image_size: int = 224  # pixels per side of the crop
    min_crop: float = 0.08  # smallest share of an image's area that a training crop keeps

    data_root: str = "data"
    validation: bool = False  # train on half of the training classes and test on the others: to choose settings
    out: str = ""  # default: runs/DATASET-LOSS-MODE-seedN
    seed: int = 0
    num_workers: int = min(4, os.cpu_count() or 1)  # processes that load images; does not change the result
    device: str = "auto"  # cuda if available, else cpu
    kernels: str = "auto"  # Triton on a GPU, else PyTorch; or torch, triton
    resume: bool = False  # fail if OUT holds no run


RESUMABLE_WITH_ANOTHER = ("data_root", "out", "num_workers", "device", "kernels", "resume")
CHOICES = dict(dataset=data.DATASETS, loss=LOSSES, mode=MODES, net=models.NETS, precision=("fp32", "bf16"))
CHOICES |= dict(bn=models.BATCH_NORMS, kernels=kernels.BACKENDS)

# The paper's recipes by data sets, losses and mode ("mixed" for input, feature and embed), from the authors' commands.
# A folder follows CUB, with balanced batches.
COLUMNS = ("epochs", "lr", "lr_step", "lr_gamma", "warmup_epochs", "bn", "images_per_class")
RECIPES = {
    ("cub cars folder", "contrastive", "baseline"): (60, 1e-4, 10, 0.1, 5, "stats", 0),
    ("cub cars folder", "contrastive", "mixed"): (100, 1e-4, 10, 0.1, 5, "stats", 0),
    ("cub cars folder", "multisimilarity proxyanchor", "baseline"): (60, 1e-4, 5, 0.5, 5, "stats", 0),
    ("cub cars folder", "multisimilarity proxyanchor", "mixed"): (100, 1e-4, 10, 0.5, 5, "stats", 0),
    ("sop", "contrastive", "baseline"): (60, 3e-5, 10, 0.25, 5, "train", 5),
    ("sop", "contrastive", "mixed"): (100, 3e-5, 10, 0.25, 5, "stats", 5),
    ("inshop", "contrastive", "baseline"): (60, 3e-5, 5, 0.25, 1, "train", 5),
    ("inshop", "contrastive", "mixed"): (100, 1e-4, 10, 0.25, 5, "train", 5),
    ("sop inshop", "multisimilarity proxyanchor", "baseline"): (60, 6e-4, 20, 0.25, 1, "train", 5),
    ("sop inshop", "multisimilarity proxyanchor", "mixed"): (100, 6e-4, 20, 0.25, 1, "train", 5),
}
# From random weights there are no statistics worth freezing and nothing to warm up, and crops of a twelfth of a small
# picture teach little. Tuned on baseline with --validation, by mean R@1: lr of 1e-3, 3e-3, 1e-2 and epochs of 15, 40
# on toy and Omniglot, three seeds; proxy_lr of 1, 10, 30, 100, 300 on toy, seven seeds: 75.2, 75.1, 76.0, 73.5, 76.5,
# which are level but for 30 against 100, +2.5 +- 0.9 paired by seed.
SCRATCH = dict(weights="none", bn="train", warmup_epochs=0, min_crop=0.6)
SCRATCH |= dict(epochs=40, lr=3e-3, lr_step=16, lr_gamma=0.3, proxy_lr=30.0)
SCRATCH_LR = {"multisimilarity": 1e-2}
TOY = dict(net="tiny", embedding_size=64, image_size=64, images_per_class=5)


def recipe(dataset, loss, mode, from_scratch=False):
    """The settings that a cell changes, before flags."""
    settings = {}
    for (datasets, its_losses, kind), row in RECIPES.items():
        if dataset in datasets.split() and loss in its_losses.split() and (kind == "baseline") == (mode == "baseline"):
            settings = dict(zip(COLUMNS, row))
    if dataset == "folder":
        settings |= dict(images_per_class=5)
    if from_scratch or dataset == "toy":
        settings |= SCRATCH | dict(lr=SCRATCH_LR.get(loss, SCRATCH["lr"]))
    return settings | TOY if dataset == "toy" else settings


def parse(arguments):
    """The Config of a command line. ValueError for unknown words and flags, and for settings that cannot work."""
    parser = argparse.ArgumentParser("./run.sh", allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.description = "What each flag means is in Config in metrix.py. A run prints the recipe it uses."
    parser.error = raise_error
    for field in dataclasses.fields(Config):
        if field.type is bool:
            parser.add_argument(flag(field.name), action="store_true")
        else:
            words = dict(nargs="?", default=field.default) if field.name in ("dataset", "loss", "mode") else {}
            name = field.name if words else flag(field.name)
            help = f"default {field.default}" if field.default else None
            parser.add_argument(name, type=field.type, choices=CHOICES.get(field.name), help=help, **words)
    given = vars(parser.parse_intermixed_args(arguments))
    settings = recipe(given["dataset"], given["loss"], given["mode"], given.get("weights") == "none")
    config = Config(**(settings | given))
    name = f"{config.dataset}-{config.loss}-{config.mode}{'-validation' * config.validation}-seed{config.seed}"
    config.out = config.out or f"runs/{name}"
    check(config)
    return config


def check(config):
    """ValueError for settings that cannot work. Resolves the device and sets the kernels' switch."""
    size, per_class = config.batch_size, config.images_per_class
    for name in ("epochs", "batch_size", "lr_step", "embedding_size", "image_size", "hardest"):
        if getattr(config, name) < 1:
            raise ValueError(f"{flag(name)} must be at least 1")
    if per_class and (size < 2 * per_class or size % per_class):
        raise ValueError(f"--batch-size {size} must be a multiple of --images-per-class {per_class}, at least twice it")
    if size % world_size():
        raise ValueError(f"--batch-size {size} must be a multiple of the {world_size()} processes")
    if config.weights == "imagenet" and config.net != "resnet50":
        raise ValueError(f"--net {config.net} has no ImageNet weights; add --weights none, or a file")
    if config.device == "auto":
        config.device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        probe = torch.ones(1, device=config.device)
    except (RuntimeError, AssertionError):
        raise ValueError(f"--device {config.device} is not available on this machine; try --device cpu") from None
    if config.bn == "train" and world_size() > 1 and not probe.is_cuda:
        raise ValueError("--bn train on several processes is SyncBatchNorm, which needs GPUs; use --bn stats")
    kernels.backend = config.kernels
    kernels.use_triton(probe)


def flag(name):
    return "--" + name.replace("_", "-")


def raise_error(message):
    raise ValueError(message)


# ----------------------------------------------------------------------------------------------- run


def run(config):
    """Train, evaluate after every epoch, write OUT/. Returns the log: a dict per epoch."""
    describe(config)
    splits = data.load(config.dataset, config.data_root, config.validation)
    describe_data(config, splits)
    size, per_class = config.batch_size, config.images_per_class
    batches = data.TrainBatches(splits.train.labels, size, per_class, config.seed, shard=bounds(size))
    torch.manual_seed(config.seed)
    model = make_model(config, config.weights)
    metric = LOSSES[config.loss](len(splits.train.classes), config.embedding_size).to(config.device)
    if world_size() > 1 and config.bn == "train":
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    optimizer = make_optimizer(model, metric, config)
    log = open_run(config, splits, model, metric, optimizer)

    loader = data.train_loader(splits.train, batches, config.image_size, config.min_crop, config.num_workers)
    test_loaders = [test_loader(split, config) for split in splits[1:]]  # test, or query and gallery
    train_images, test_images = len(batches) * config.batch_size, sum(map(len, splits[1:]))
    progress = Progress((config.epochs - len(log)) * (train_images + test_images), config.device)
    for epoch in range(len(log), config.epochs):
        title, start = f"epoch {epoch + 1:3d}/{config.epochs}", time.perf_counter()
        batches.epoch = epoch
        loss = train_epoch(epoch, model, metric, optimizer, progress(loader, f"{title}  training"), config)
        rate = train_images / (time.perf_counter() - start)
        embedded = [embed(model, progress(loader, f"{title}  testing"), config) for loader in test_loaders]
        last = epoch + 1 == config.epochs
        train = embed(model, progress(test_loader(splits.train, config), "embedding"), config)[0] if last else None
        result, ranking = measure(embedded, config.dataset, train)
        line = dict(epoch=epoch + 1, loss=loss, lr=optimizer.param_groups[0]["lr"], recall=result.pop("recall"))
        line |= dict(seconds=time.perf_counter() - start, images_per_second=rate)
        log.append(line | result if last else line)
        r1 = 100 * line["recall"]["1"]
        progress.print(f"{title}  loss {loss:.4f}  R@1 {r1:.1f}  {rate:.0f} images/s  {progress.left()} left\n")
        if rank() == 0:
            if last:
                write_sheet(config.out, ranking, embedded, splits[1:])
            save_epoch(config, log, model, metric, optimizer)
    return log


def make_model(config, weights):
    model = models.ResNet(**models.NETS[config.net], embedding_size=config.embedding_size, bn=config.bn)
    models.load_weights(model, weights)
    return model.to(config.device, memory_format=torch.channels_last)


def test_loader(split, config):
    return data.test_loader(shard(split), config.batch_size, config.image_size, config.num_workers)


def embed(model, loader, config):
    """Embeddings (N, D) and labels (N,) of a split, from a loader of this rank's shard."""
    with autocast(config):
        return tuple(map(gather, eval.embed_all(model, loader)))


def measure(embedded, dataset, train=None):
    """Metrics of [(z, y)] of a test set, or of queries and gallery: a dict, and the eval.Ranking of all queries.

    Recall only, unless training embeddings are given. Each rank ranks its shard of the queries.
    """
    arguments, everything = [x for part in embedded for x in part], train is not None
    ranking = eval.per_query(*arguments, everything=everything, shard=bounds(len(arguments[0])))
    ranking = eval.Ranking(*(x if x is None else gather(x) for x in ranking))
    result = eval.summary(ranking, RECALL_AT[dataset])
    result["recall"] = {str(k): share for k, share in result["recall"].items()}  # as in JSON
    if everything:
        z, y = (torch.cat(parts) for parts in zip(*embedded))
        result |= dict(alignment=eval.alignment(z, y), uniformity=eval.uniformity(z))
        result |= dict(utilization=eval.utilization(z, train))
    return result, ranking


def evaluate_run(arguments):
    """Evaluate the checkpoint of a run: a table, a JSON line, and RUN_DIR/eval.json and retrieval.png."""
    parser = argparse.ArgumentParser("./run.sh eval", allow_abbrev=False)
    parser.error = raise_error
    parser.add_argument("run_dir")
    parser.add_argument("--checkpoint", default="last", choices=("last", "best"))
    parser.add_argument("--data-root", help="if the data set has moved")
    parser.add_argument("--device", default="auto")
    given = parser.parse_args(arguments)
    saved = read_settings(given.run_dir)
    config = Config(**{field.name: saved[field.name] for field in dataclasses.fields(Config) if field.name in saved})
    config.out, config.device, config.data_root = given.run_dir, given.device, given.data_root or config.data_root
    check(config)
    splits = data.load(config.dataset, config.data_root, config.validation)
    model = make_model(config, f"{config.out}/{given.checkpoint}.pt")
    progress = Progress(sum(map(len, splits)), config.device)
    (train, _), *embedded = [embed(model, progress(test_loader(s, config), "embedding"), config) for s in splits]
    result, ranking = measure(embedded, config.dataset, train)
    if rank() == 0:
        write_sheet(config.out, ranking, embedded, splits[1:])
        write(f"{config.out}/eval.json", json.dumps(dict(checkpoint=given.checkpoint) | result, indent=2))
    progress.print("")
    print(*eval.table(result), "", json.dumps(dict(checkpoint=given.checkpoint) | result), sep="\n")


# ----------------------------------------------------------------------------------- the run's files


def open_run(config, splits, model, metric, optimizer):
    """Start OUT/, or load the state of the run in it. Returns its log so far."""
    settings = vars(config) | data.sizes(splits) | dict(queries_without_match=data.queries_without_match(splits))
    if not os.path.exists(f"{config.out}/last.pt"):
        if config.resume:
            raise ValueError(f"--resume: {config.out} holds no run to resume")
        if rank() == 0:
            os.makedirs(config.out, exist_ok=True)
            write(f"{config.out}/config.json", json.dumps(settings, indent=2))
        return []
    saved = read_settings(config.out)
    changed = [name for name in settings if name not in RESUMABLE_WITH_ANOTHER and saved.get(name) != settings[name]]
    if changed:
        difference = ", ".join(f"{name} is {saved.get(name)}, not {settings[name]}" for name in changed)
        raise ValueError(f"{config.out} holds another run ({difference}); delete it, or use another --out or --seed")
    state = models.read_checkpoint(f"{config.out}/last.pt")
    try:
        for module, name in ((model, "model"), (metric, "metric"), (optimizer, "optimizer")):
            module.load_state_dict(state[name])
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"{config.out}/last.pt: not a checkpoint of this run; use another --out") from error
    print(f"  resumes after epoch {state['epoch']}")
    return state["log"]


def read_settings(out):
    try:
        with open(f"{out}/config.json") as file:
            return json.load(file)
    except (OSError, ValueError) as error:
        raise ValueError(f"{out}/config.json: missing or damaged ({error}); name another run") from None


def save_epoch(config, log, model, metric, optimizer):
    """log.jsonl, best.pt if this epoch is the best so far, and last.pt, from which the run resumes."""
    write(f"{config.out}/log.jsonl", "\n".join(map(json.dumps, log)))
    state = dict(model=model.state_dict(), metric=metric.state_dict(), epoch=len(log), log=log, config=vars(config))
    if best_of(log) is log[-1]:
        write(f"{config.out}/best.pt", state)
    write(f"{config.out}/last.pt", state | dict(optimizer=optimizer.state_dict()))


def write(path, content):
    """Atomic write of text or of a checkpoint: temporary file, then rename."""
    if isinstance(content, str):
        with open(f"{path}.tmp", "w") as file:
            print(content, file=file)
    else:
        torch.save(content, f"{path}.tmp")
    os.replace(f"{path}.tmp", path)


def best_of(log):
    return max(log, key=lambda line: line["recall"]["1"])


def write_sheet(out, ranking, embedded, splits):
    arguments = [x for (z, y), split in zip(embedded, splits) for x in (z, split.paths, y.tolist())]
    eval.retrieval_sheet(f"{out}/retrieval.png.tmp", ranking.rank, *arguments, open_image=data.open_image)
    os.replace(f"{out}/retrieval.png.tmp", f"{out}/retrieval.png")


# ----------------------------------------------------------------------------------- several processes

# torchrun starts a process (rank) per GPU. All draw the same batches, lam and pairing; each embeds its shard of images.


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def join_ranks():
    """Join the other ranks if torchrun started this process. Only rank 0 prints and writes."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group()
        if rank() > 0:
            sys.stdout = open(os.devnull, "w")


def bounds(length):
    """This rank's slice of so many items."""
    return slice(length * rank() // world_size(), length * (rank() + 1) // world_size())


def shard(x):
    """This rank's part of a list, tensor or split."""
    return x[bounds(len(x))]


def gather(x):
    """The rows of all ranks in rank order. Differentiable. Shards may differ in length."""
    if world_size() == 1:
        return x
    lengths = torch.cat(all_gather(torch.tensor([len(x)], device=x.device))).tolist()
    padded = torch.cat([x, x.new_zeros(max(lengths) - len(x), *x.shape[1:])])
    return torch.cat([part[:length] for part, length in zip(all_gather(padded), lengths)])


def average_gradients(parameters):
    """The backward pass of `gather` sums over ranks, and all ranks compute the same loss: the mean is the gradient."""
    if world_size() > 1:
        for p in parameters:
            if p.grad is not None:
                dist.all_reduce(p.grad)
                p.grad /= world_size()


# -------------------------------------------------------------------------------------------- output


class Progress:
    """Moves batches to the device and prints images/s and time left: in place on a terminal, else once a minute."""

    def __init__(self, images, device):
        self.images, self.device, self.done, self.start = images, device, 0, time.perf_counter()
        self.interval = 0.5 if sys.stdout.isatty() else 60

    def __call__(self, loader, title):
        start = printed = time.perf_counter()
        done = self.done
        for images, y in loader:
            images = data.normalize(images.to(self.device, non_blocking=True))
            yield images.contiguous(memory_format=torch.channels_last), y.to(self.device, non_blocking=True)
            self.done += len(y) * world_size()
            now = time.perf_counter()
            if now - printed > self.interval:
                printed = now
                rate = (self.done - done) / (now - start)
                self.print(f"{title}  {rate:.0f} images/s  {self.left()} left" + "\n" * (not sys.stdout.isatty()))

    def print(self, text):
        print(f"\r\033[K{text}" if sys.stdout.isatty() else text, end="", flush=True)

    def left(self):
        seconds = int((time.perf_counter() - self.start) / max(self.done, 1) * max(self.images - self.done, 0))
        return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"


def describe(config):
    """Every setting, and the recipe's value where a flag changed it."""
    print(f"{config.dataset} {config.loss} {config.mode} on {config.device}, writes {config.out}")
    settings = []
    for name, value in (vars(Config()) | recipe(config.dataset, config.loss, config.mode)).items():
        if name not in (*RESUMABLE_WITH_ANOTHER, "dataset", "loss", "mode"):
            changed = f" (recipe: {value})" * (getattr(config, name) != value)
            settings.append(f"{name} {getattr(config, name)}{changed}")
    print("  " + ", ".join(settings))


def describe_data(config, splits):
    """Sizes, and a warning if results will not be comparable with published ones."""
    parts = [f"{name}: {len(s)} images of {len(s.classes)} classes" for name, s in splits._asdict().items()]
    print("  " + ", ".join(parts))
    if lone := data.queries_without_match(splits):
        print(f"  {lone} queries have no other image of their class and are left out")
    full, found = data.FULL_SIZES.get(config.dataset), data.sizes(splits)
    if full and full != found and not config.validation:
        print(f"WARNING: not the full data set ({full}), so results are not comparable with published ones")


def report(config, log):
    """Tables for people, then one JSON line for programs."""
    last, best = log[-1], best_of(log)
    for title, line in (("best epoch, chosen on the test classes", best), ("last epoch", last)):
        print(f"\n{title}: {line['epoch']}", *eval.table(line), sep="\n")
    summary = {name: getattr(config, name) for name in ("dataset", "loss", "mode", "seed", "out")}
    summary |= dict(last=last, best=dict(epoch=best["epoch"], recall=best["recall"]))
    print("\n" + json.dumps(summary | dict(seconds=round(sum(line["seconds"] for line in log), 1))))


def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else arguments
    torch.set_num_threads(torch.get_num_threads())  # a varying number of threads would vary the last digits
    try:
        join_ranks()
        if arguments[:1] == ["eval"]:
            evaluate_run(arguments[1:])
        else:
            config = parse(arguments)
            report(config, run(config))
    except KeyboardInterrupt:
        print("\nmetrix: stopped; the same command resumes after the last finished epoch", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, FloatingPointError) as error:
        if rank() == 0 or isinstance(error, data.UnreadableImage):  # which one rank alone may meet
            message = str(error).strip().splitlines()[-1]  # of a loader's process, this is the line after its traceback
            print(f"metrix: {message.removeprefix('data.UnreadableImage: ')}", file=sys.stderr)
        sys.exit(2)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()

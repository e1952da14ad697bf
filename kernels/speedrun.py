"""A training run of CUB's size on generated images: timed whole, then taken apart, beside the floor it stands on.

    ./run.sh bench speedrun [--epochs N] [--json FILE] [--device cpu]

On a GPU 5,864 + 5,924 photos of 500 x 375, ResNet-50 at 224 px in bf16, contrastive loss, feature mode, 60 epochs of
CUB's recipe, the first twelfth of them warm-up, each with its evaluation; on a CPU the same in miniature. The parts of a
step are timed apart, one after the other, so their sum is more than the run took where one hides behind another. The
floor is the arithmetic of the trunk, forward and backward, at the rate that a large product reaches here; there is no
evaluation in it.
"""

import argparse
import dataclasses
import itertools
import json
import os
import statistics
import tempfile
import time
from concurrent import futures

import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import data
import metrix
import model as models
from kernels import bench

SHAPES = {  # images to train and to test on, in this many classes each; net, size, precision, epochs
    "cuda": dict(images=(5864, 5924), classes=100, net="resnet50", image_size=224, precision="bf16", epochs=60),
    "cpu": dict(images=(400, 400), classes=20, net="tiny", image_size=64, precision="fp32", epochs=2),
}
REPEATED = 10  # times that a part is timed; the median counts


def write_photos(root, images, classes):
    """JPEGs of 500 x 375, a folder a class, under train/ and test/."""
    halves = [os.path.join(root, "photos", half) for half in ("train", "test")]

    def write(part, number):
        label, rng = number % classes, np.random.default_rng((part, number))
        pixels = np.random.default_rng((part, label)).integers(0, 255, (6, 8, 3)) * 0.7 + rng.integers(0, 255, (6, 8, 3)) * 0.3
        photo = np.asarray(Image.fromarray(pixels.astype(np.uint8)).resize((500, 375), Image.BICUBIC))
        grain = rng.integers(-12, 12, photo.shape[:2])[..., None]  # a file then takes about as many bytes as a photo's
        photo = Image.fromarray((photo + grain).clip(0, 255).astype(np.uint8))
        photo.save(f"{halves[part]}/{part}{label:03}/{number}.jpg", quality=85)

    for part, label in itertools.product(range(2), range(classes)):
        os.makedirs(f"{halves[part]}/{part}{label:03}")
    with futures.ThreadPoolExecutor() as pool:
        list(pool.map(write, *zip(*((part, number) for part, count in enumerate(images) for number in range(count)))))


def write_weights(path, net, image_size):
    """A random trunk whose batch norm statistics are those of random images, as if it had been trained."""
    model = models.ResNet(**models.NETS[net], bn="train")
    for norm in model.norms():
        norm.momentum = 1.0
    with torch.no_grad():
        model.features(torch.randn(16, 3, image_size, image_size))
    torch.save({name: value for name, value in model.state_dict().items() if not name.startswith("embedding.")}, path)


def median_seconds(part, device, repeated=REPEATED):
    bench.seconds(part, 0, device)
    return statistics.median(bench.seconds(part, 0, device) for _ in range(repeated))


def parts_of(config, splits, product_rate):
    """Seconds an epoch of each part of the run, its floor last. product_rate: operations a second of a large product."""
    device = torch.device(config.device).type
    model = models.ResNet(**models.NETS[config.net], embedding_size=config.embedding_size, bn=config.bn)
    models.load_weights(model, config.weights)
    model.to(device, memory_format=torch.channels_last)
    metric = metrix.LOSSES[config.loss](len(splits.train.classes), config.embedding_size).to(device)
    optimizer = metrix.make_optimizer(model, metric, config)
    batches = data.TrainBatches(splits.train.labels, config.batch_size, config.images_per_class, config.seed)
    loader = data.train_loader(splits.train, batches, config.image_size, config.min_crop, config.num_workers)
    images, y = next(iter(loader))
    images = images.to(device, memory_format=torch.channels_last)

    def step(mode):
        def run(_):
            model.zero_grad(set_to_none=True)
            with metrix.in_precision(config):
                value = metrix.step(model, metric, images, y, dataclasses.replace(config, mode=mode), 0.4, "positive-negative")
            value.backward()

        return run

    def trunk(_):
        model.zero_grad(set_to_none=True)
        with metrix.in_precision(config):
            features = model.features(images)
        features.backward(features.detach())

    def update(_):
        parameters = [*model.parameters(), *metric.parameters()]
        metrix.all_finite(embedded[0].z.sum(), parameters)
        torch.nn.utils.clip_grad_value_(parameters, config.clip)
        optimizer.step()

    def deliver(_):
        for _ in loader:
            pass

    def see(_):
        progress = metrix.Progress(len(splits.test))
        progress.begin("testing")
        return metrix.embed(model, splits.test, config, progress)

    with FlopCounterMode(display=False) as counted:
        trunk(0)
    steps, names = len(batches), ("trunk", "baseline", config.mode)
    of_step = {name: steps * median_seconds(part, device) for name, part in zip(names, (trunk, *map(step, names[1:])))}
    embedded, ks = [see(0)], metrix.RECALL_AT[config.dataset]
    return {
        "trunk, forward and backward": of_step["trunk"],
        "head and clean loss": of_step["baseline"] - of_step["trunk"],
        f"{config.mode} mixing and mixed loss": of_step[config.mode] - of_step["baseline"],
        "check, clipping and optimizer": steps * median_seconds(update, device),
        "delivering the batches": median_seconds(deliver, device, 3),
        "embedding the test images": median_seconds(see, device, 3),
        "recall": median_seconds(lambda _: metrix.measure(embedded, ks, False), device, 3),
        "floor: the trunk's arithmetic": steps * counted.get_total_flops() / product_rate,
    }


def main(arguments=None):
    parser = argparse.ArgumentParser("speedrun", description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, help="instead of 60, or on a CPU 2")
    parser.add_argument("--json", help="file to write the results to")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.error = bench.fail
    given = parser.parse_args(arguments)
    bench.check_written(given.json)
    if given.epochs is not None and given.epochs < 1:
        bench.fail(f"--epochs {given.epochs}: give at least 1")
    if given.device == "cuda" and not torch.cuda.is_available():
        bench.fail("--device cuda: there is no GPU here")
    shape = SHAPES[given.device] | (dict(epochs=given.epochs) if given.epochs else {})
    ceilings, about = bench.ceilings(given.device), bench.machine(given.device)
    with tempfile.TemporaryDirectory() as root:
        print(f"making {sum(shape['images'])} photos")
        write_photos(root, shape["images"], shape["classes"])
        write_weights(f"{root}/weights.pt", shape["net"], shape["image_size"])
        flags = {name: shape[name] for name in ("net", "image_size", "precision", "epochs")}
        flags |= dict(warmup_epochs=shape["epochs"] // 12, images_per_class=0, data_path="cache", device=given.device)
        flags |= dict(data_root=f"{root}/photos", weights=f"{root}/weights.pt", out=f"{root}/run")
        words = [word for name, value in flags.items() for word in (metrix.flag(name), str(value))]
        config = metrix.parse(["folder", "contrastive", "feature", *words])
        splits = data.load(config.dataset, config.data_root)
        started = time.perf_counter()
        metrix.cached(splits, config)
        decoding = time.perf_counter() - started
        log = metrix.run(config)
        whole = time.perf_counter() - started
        parts = parts_of(config, metrix.cached(splits, config), 1e12 * ceilings[f"{config.precision} TFLOP/s"])
    result = dict(machine=about, ceilings=ceilings, shape=shape, seconds=whole, decoding_seconds=decoding)
    result |= {name: [line[name] for line in log] for name in ("images_per_second", "data_wait", "peak_memory_mib")}
    result["parts"] = parts
    print(f"\n{about['hardware']}\n")
    bench.show(lines(result))
    if given.json:
        with metrix.replacing(given.json) as name, open(name, "w") as file:
            print(json.dumps(result, indent=1), file=file)
    print(json.dumps(result))


def lines(result):
    """The table of a speed run, as lists of cells: a header, then a line a figure."""
    shape, last = result["shape"], {name: result[name][-1] for name in ("images_per_second", "data_wait", "peak_memory_mib")}
    train, test = shape["images"]
    of_trunk, clean, mixing, *_ = result["parts"].values()
    return [
        [f"speed run: {train:,} + {test:,} images, {shape['net']}, {shape['image_size']} px, {shape['precision']}", ""],
        [f"all of it: decoding once, {shape['epochs']} epochs with evaluation", f"{result['seconds']:.1f} s"],
        ["decoding once", f"{result['decoding_seconds']:.1f} s"],
        ["training, last epoch", f"{last['images_per_second']:,.0f} images/s"],
        ["a step, of baseline's images/s", f"{100 * (of_trunk + clean) / (of_trunk + clean + mixing):.0f} %"],
        ["training time spent waiting for images", f"{100 * last['data_wait']:.0f} %"],
        ["most memory taken", f"{last['peak_memory_mib']:,.0f} MiB"],
        *([f"an epoch's {name}" if "floor" not in name else name, f"{seconds:.3g} s"] for name, seconds in result["parts"].items()),
    ]


if __name__ == "__main__":
    main()

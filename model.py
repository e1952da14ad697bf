"""ResNet-50 written by hand, with the paper's pooling and embedding head.

    features(images)   (B, 3, H, W) -> (B, C, h, w)      the last feature map, which feature mode mixes
    head(features)     (B, C, h, w) -> (B, D)            z = embed(mean over positions + max over positions)
    embed(pooled)      (B, C)       -> (B, D)            linear layer, then unit length

The blocks are the bottlenecks of He et al. 2016, with the stride in the 3x3 convolution ("v1.5"). Names and shapes are
torchvision's, so weights load in both directions (with strict=False). Batch norm with frozen statistics is folded into
the convolution before it. This saves one pass over the activations and one copy of them:

    bn(conv(x; w)) = conv(x; w * gamma / sigma) + (beta - mu * gamma / sigma)
"""

import contextlib
import os
import zipfile

import torch
import torch.nn.functional as F
import torchvision
from torch import nn

NETS = dict(resnet50=dict(blocks=(3, 4, 6, 3), width=64), tiny=dict(blocks=(1, 1, 1, 1), width=16))
BATCH_NORMS = ("train", "stats", "frozen")
EXPANSION = 4  # a bottleneck's output channels over its inner channels


def conv_bn(conv, bn, x):
    """bn(conv(x)), in one convolution unless bn computes statistics."""
    if bn.training:
        return bn(conv(x))
    scale = bn.weight * torch.rsqrt(bn.running_var + bn.eps)  # gamma / sigma
    weight, bias = conv.weight * scale[:, None, None, None], bn.bias - bn.running_mean * scale
    return F.conv2d(x, weight, bias, conv.stride, conv.padding)


class Bottleneck(nn.Module):
    def __init__(self, in_channels, channels, stride):
        super().__init__()
        out_channels = channels * EXPANSION
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.downsample = None
        if in_channels != out_channels:
            shortcut = nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(out_channels))

    def forward(self, x):
        out = conv_bn(self.conv1, self.bn1, x).relu_()
        out = conv_bn(self.conv2, self.bn2, out).relu_()
        out = conv_bn(self.conv3, self.bn3, out)
        out += x if self.downsample is None else conv_bn(*self.downsample, x)
        return out.relu_()


class ResNet(nn.Module):
    """bn: "train" trains batch norm, "stats" freezes its running statistics, "frozen" its scale and shift too."""

    def __init__(self, blocks=(3, 4, 6, 3), width=64, embedding_size=512, bn="stats"):
        super().__init__()
        if bn not in BATCH_NORMS:
            raise ValueError(f"bn is {bn!r}; choose one of {', '.join(BATCH_NORMS)}")
        self.bn = bn
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layers = [f"layer{stage}" for stage in range(1, len(blocks) + 1)]
        channels = width
        for stage, count in enumerate(blocks):
            layer = nn.Sequential()
            for block in range(count):
                layer.append(Bottleneck(channels, width * 2**stage, stride=2 if stage > 0 and block == 0 else 1))
                channels = width * 2**stage * EXPANSION
            self.add_module(self.layers[stage], layer)
        self.embedding = nn.Linear(channels, embedding_size)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
        nn.init.zeros_(self.embedding.bias)
        self.train_trunk(True)
        self.train()

    def forward(self, images):
        return self.head(self.features(images))

    def features(self, images):
        x = conv_bn(self.conv1, self.bn1, images).relu_()  # (B, width, H/2, W/2)
        x = F.max_pool2d(x, 3, stride=2, padding=1)  # (B, width, H/4, W/4)
        for layer in self.layers:
            x = self.get_submodule(layer)(x)
        return x  # (B, C, H/32, W/32)

    def head(self, features):
        maps = features.flatten(2)  # (B, C, h*w)
        return self.embed(maps.mean(2) + maps.max(2).values)

    def embed(self, pooled):
        z = self.embedding(pooled)  # (B, D), in bfloat16 under autocast
        return F.normalize(z.to(torch.promote_types(z.dtype, torch.float32)), dim=1)

    def norms(self):
        kind = nn.modules.batchnorm._BatchNorm  # or SyncBatchNorm
        return nn.ModuleList([module for module in self.modules() if isinstance(module, kind)])

    def train_trunk(self, on):
        """Whether the parameters below the embedding layer train. Those of batch norm do not if bn is "frozen"."""
        self.requires_grad_(on)
        self.embedding.requires_grad_(True)
        self.norms().requires_grad_(on and self.bn != "frozen")

    def train(self, mode=True):
        super().train(mode)
        self.norms().train(mode and self.bn == "train")  # otherwise the statistics stay frozen
        return self


@contextlib.contextmanager
def no_stats_update(model):
    """Inside, batch norm does not update its running statistics."""
    for norm in model.norms():
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in model.norms():
            norm.track_running_stats = True


def load_weights(model, weights):
    """Fill a model in place from "imagenet" (torchvision's IMAGENET1K_V1) or a file; "none" leaves it as it is.

    Nested dicts and a prefix may precede torchvision's names. Other layers, such as `fc`, are ignored.
    The model keeps its embedding layer if the file has none.
    """
    if weights == "none":
        return
    tensors = named_tensors(imagenet_weights() if weights == "imagenet" else read_checkpoint(weights))
    landmark = "layer1.0.bn1.running_mean"  # in every ResNet, but not in an optimizer's state
    prefix = next((name.removesuffix(landmark) for name in tensors if name.endswith(landmark)), "")
    own = model.state_dict()
    layers = tuple({prefix + name.split(".")[0] + "." for name in own})
    others = [name for name in tensors if not name.startswith((*layers, prefix + "fc."))]
    state = {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(layers)}

    optional = ("num_batches_tracked", "embedding.weight", "embedding.bias")
    missing = [name for name in own if name not in state and not name.endswith(optional)]
    unknown = [name for name in state if name not in own]
    reshaped = [name for name in own if name in state and state[name].shape != own[name].shape]
    if missing or unknown or reshaped:
        shapes = [f"{name} {tuple(state[name].shape)}, not {tuple(own[name].shape)}" for name in reshaped]
        faults = some(missing, "tensors missing"), some(unknown + others, "unknown"), some(shapes, "of another shape")
        faults = f"{', '.join(faults)}; the file holds {some([*tensors], 'tensors')}"
        raise ValueError(f"{weights} does not fit this net: {faults}; check --net and --embedding-size")
    if prefix not in ("", "model.") or not all(name.startswith(("metric.", "optimizer.")) for name in others):
        print(f"  {weights}: loads {prefix}*, leaves out {some(others, 'tensors')}")  # not one of our checkpoints
    model.load_state_dict(own | state)


def some(names, what):
    return f"{len(names)} {what}" + f" ({', '.join(names[:3])}{', ..' * (len(names) > 3)})" * bool(names)


def named_tensors(value, name=""):
    """{name: tensor} of nested dicts. A name is the path of keys, joined by dots."""
    if isinstance(value, torch.Tensor):
        return {name: value}
    items = value.items() if isinstance(value, dict) else ()
    return {path: x for key, inner in items for path, x in named_tensors(inner, f"{name}.{key}".lstrip(".")).items()}


class Stub(dict):
    """Replaces an object of any class in a file. A module becomes the dict of its parameters, buffers and modules."""

    def __init__(self, *_):
        pass

    def __setstate__(self, state):
        for members in ("_parameters", "_buffers", "_modules"):
            self.update(state.get(members, {}) if isinstance(state, dict) else {})


def read_checkpoint(file):
    """The dict in a file written by torch.save. Objects become stubs, so no code in the file is run."""
    if not os.path.isfile(file):
        raise FileNotFoundError(f"{file}: no such weights file; expected one written by torch.save")
    zipped = zipfile.is_zipfile(file)
    # A file from before PyTorch 1.6 is not zipped, and does not list its classes.
    classes = ["argparse.Namespace", "numpy.core.multiarray.scalar", "numpy.dtype"]
    try:
        if zipped:
            classes = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        with torch.serialization.safe_globals([(Stub, name) for name in classes]):
            state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds
        with open(file, "rb") as content:
            start = content.read(16)
        hint = f"it begins with {start!r}, so it may be incomplete, such as a failed download"
        if zipped or start[:1] == b"\x80":  # a pickle
            convert = 'torch.save(torch.load(FILE, weights_only=False)["state_dict"], NEW)'
            hint = f"if it is whole and you trust it, convert it: {convert}"
        raise ValueError(f"{file}: not a readable checkpoint in the format of torch.save; {hint}") from error
    return state if isinstance(state, dict) else {}


def imagenet_weights():
    weights = torchvision.models.ResNet50_Weights.IMAGENET1K_V1
    try:
        return weights.get_state_dict(check_hash=True)
    except Exception as error:  # no network, another hash, or a damaged file from an earlier try
        reason, hub = str(error).partition("\n")[0], f"{torch.hub.get_dir()}/checkpoints"
        raise OSError(f"no ImageNet weights ({reason}); put {weights.url} into {hub}, or use --weights none") from error

"""ResNet-50 written out, with the pooling and embedding head of the paper.

Bottleneck ResNet "v1.5": the stride sits in the 3x3 convolution (He et al. 2016; torchvision's variant). Parameter
names are torchvision's, so its weights load here and a trunk trained here loads there.

    features(images)   (B, 3, H, W) -> (B, C, h, w)      the last feature map, where Metrix mixes
    head(features)     (B, C, h, w) -> (B, D)            average + max pool, then embed
    embed(pooled)      (B, C)       -> (B, D)            linear layer, rows at length 1

With frozen statistics batch norm is an affine map a channel, and folding it into its convolution,

    bn(conv(x; w)) = conv(x; w * gamma / sigma) + (beta - mu * gamma / sigma),

gives the same values and gradients for one elementwise pass and one saved activation less.
"""

import hashlib
import os

import torch
import torch.nn.functional as F
import torchvision
from torch import nn

NETS = {
    "resnet50": dict(blocks=(3, 4, 6, 3), width=64),
    "tiny": dict(blocks=(1, 1, 1, 1), width=16),
}
BATCH_NORMS = ("train", "stats", "frozen")
IMAGENET_URL = torchvision.models.ResNet50_Weights.IMAGENET1K_V1.url
EXPANSION = 4  # a bottleneck's output channels over its inner channels


class ResNet(nn.Module):
    """bn: "train" as usual; "stats" keeps the running statistics fixed; "frozen" keeps scale and shift fixed as well.

    fold=False runs batch norm on its own even where its statistics are fixed (for comparison).
    """

    def __init__(self, blocks=(3, 4, 6, 3), width=64, embedding_size=512, bn="stats", fold=True):
        super().__init__()
        if bn not in BATCH_NORMS:
            raise ValueError(f"bn is {bn!r}; choose one of {', '.join(BATCH_NORMS)}")
        self.bn, self.fold = bn, fold
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        channels = width
        for stage, count in enumerate(blocks):
            layer = []
            for block in range(count):
                stride = 2 if stage > 0 and block == 0 else 1
                layer.append(Bottleneck(channels, width * 2**stage, stride))
                channels = width * 2**stage * EXPANSION
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layer))
        self.stages = len(blocks)
        self.embedding = nn.Linear(channels, embedding_size)

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.kaiming_normal_(self.embedding.weight, mode="fan_out")
        nn.init.zeros_(self.embedding.bias)
        self.train_trunk(True)
        self.train()

    def forward(self, images):
        return self.head(self.features(images))

    def features(self, images):
        x = conv_bn(self.conv1, self.bn1, images, self.fold).relu_()
        x = F.max_pool2d(x, 3, stride=2, padding=1)
        for stage in range(self.stages):
            for block in self.get_submodule(f"layer{stage + 1}"):
                x = block(x, self.fold)
        return x

    def head(self, features):
        maps = features.flatten(2)  # (B, C, h*w)
        return self.embed(maps.mean(2) + maps.max(2).values)

    def embed(self, pooled):
        z = self.embedding(pooled)
        return F.normalize(z.to(torch.promote_types(z.dtype, torch.float32)), dim=1)  # of 16 bits under autocast

    def norms(self):
        return [module for module in self.modules() if isinstance(module, nn.BatchNorm2d)]

    def train_trunk(self, on):
        """Let everything below the embedding layer learn, or not; without, no graph is kept for it."""
        for name, parameter in self.named_parameters():
            if not name.startswith("embedding."):
                parameter.requires_grad_(on)
        if self.bn == "frozen":
            for norm in self.norms():
                norm.requires_grad_(False)

    def train(self, mode=True):
        super().train(mode)
        if self.bn != "train":
            for norm in self.norms():
                norm.eval()  # fixed statistics, in training too
        return self


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
        if stride > 1 or in_channels != out_channels:
            shortcut = nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(out_channels))

    def forward(self, x, fold):
        out = conv_bn(self.conv1, self.bn1, x, fold).relu_()
        out = conv_bn(self.conv2, self.bn2, out, fold).relu_()
        out = conv_bn(self.conv3, self.bn3, out, fold)
        out += x if self.downsample is None else conv_bn(*self.downsample, x, fold)
        return out.relu_()


def conv_bn(conv, bn, x, fold):
    """bn(conv(x)); with fixed statistics, one convolution with the affine map folded into its weight."""
    if bn.training or not fold:
        return bn(conv(x))
    scale = bn.weight * torch.rsqrt(bn.running_var + bn.eps)
    return F.conv2d(x, conv.weight * scale[:, None, None, None], bn.bias - bn.running_mean * scale, conv.stride, conv.padding)


# ------------------------------------------------------------------------------------------- weights


def load_weights(model, weights):
    """Fill a model in place from "imagenet" (torchvision's IMAGENET1K_V1), a file, or, for "none", leave it be.

    A file holds a state dict: torchvision's names without or with `fc` (the embedding layer then keeps its
    initialisation), or a checkpoint of this project. Files are read as tensors and plain values only.
    Raises ValueError or OSError with one line that names the file and what to do.
    """
    if weights == "none":
        return
    source = _imagenet_file() if weights == "imagenet" else weights
    state = read_checkpoint(source)
    state = state.get("model", state)
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in state.items()):
        raise ValueError(f"{source}: not a state dict, which is tensors by name")
    state = {name: value for name, value in state.items() if not name.startswith("fc.")}
    own = model.state_dict()
    has_embedding = any(name.startswith("embedding.") for name in state)
    for name, value in own.items():  # what a file may lack; torchvision's own has no counters
        if name.endswith("num_batches_tracked") or name.startswith("embedding.") and not has_embedding:
            state.setdefault(name, value)
    for name in sorted(own.keys() | state.keys()):
        if name not in state or name not in own:
            where = "is missing from" if name not in state else "is not part of this net but is in"
            raise ValueError(f"{source}: {name} {where} the file; is it for another --net?")
        if own[name].shape != state[name].shape:
            raise ValueError(
                f"{source}: {name} has shape {tuple(state[name].shape)}, this net wants {tuple(own[name].shape)}; "
                "check --net and --embedding-size"
            )
    model.load_state_dict(state)


def read_checkpoint(file):
    """The dict that torch.save wrote, tensors and plain values only: no code in a file is ever run."""
    if not os.path.isfile(file):
        raise FileNotFoundError(f"{file}: no such file of weights")
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen kinds for a truncated or foreign file
        raise ValueError(f"{file}: not a readable checkpoint of tensors and plain values") from error
    if not isinstance(state, dict):
        raise ValueError(f"{file}: holds a {type(state).__name__}, expected a state dict")
    return state


def _imagenet_file():
    """Path of torchvision's ImageNet weights for ResNet-50, downloaded if not yet there; their hash is checked always."""
    file = os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(IMAGENET_URL))
    prefix = file.rsplit("-", 1)[1].removesuffix(".pth")  # of the file's SHA-256
    if os.path.exists(file):
        with open(file, "rb") as content:
            if not hashlib.sha256(content.read()).hexdigest().startswith(prefix):
                raise ValueError(f"{file}: not the file that its name says (its SHA-256 is another); delete it")
    else:
        os.makedirs(os.path.dirname(file), exist_ok=True)
        try:
            torch.hub.download_url_to_file(IMAGENET_URL, file, hash_prefix=prefix)
        except (OSError, RuntimeError) as error:  # no network, or another hash
            reason = getattr(error, "reason", error)
            raise OSError(
                f"cannot download ImageNet weights ({reason}); put {IMAGENET_URL} at {file}, or use --weights none"
            ) from error
    return file

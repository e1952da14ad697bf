"""ResNet-50 written by hand, with the paper's pooling and embedding head.

Bottleneck ResNet "v1.5": the stride is in the 3x3 convolution (He et al. 2016, torchvision's variant). Parameter names
are torchvision's: its weights load here, and a trunk trained here loads there.

    features(images)   (B, 3, H, W) -> (B, C, h, w)      the last feature map, which feature mode mixes
    head(features)     (B, C, h, w) -> (B, D)            average + max pool, then embed
    embed(pooled)      (B, C)       -> (B, D)            linear layer, rows at length 1

With frozen statistics, batch norm is an affine map per channel. Folding it into its convolution,

    bn(conv(x; w)) = conv(x; w * gamma / sigma) + (beta - mu * gamma / sigma),

gives the same values and gradients with one elementwise pass and one saved activation fewer.
"""

import contextlib
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
EXPANSION = 4  # a bottleneck's output channels over its inner channels


class ResNet(nn.Module):
    """bn: "train"; "stats" freezes the running statistics; "frozen" freezes scale and shift as well.

    fold=False keeps batch norm a separate operation even where its statistics are frozen, for comparison.
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
        return F.normalize(z.to(torch.promote_types(z.dtype, torch.float32)), dim=1)  # at least float32

    def norms(self):
        return [module for module in self.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]  # or SyncBN

    def train_trunk(self, on):
        """Train the layers below the embedding layer or not. If not, autograd keeps no graph for them."""
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
                norm.eval()  # frozen statistics, also in training
        return self


@contextlib.contextmanager
def no_stats_update(model):
    """Batch norm in training mode normalises by its own batch, but leaves its running statistics as they are."""
    for norm in model.norms():
        norm.track_running_stats = False
    yield
    for norm in model.norms():
        norm.track_running_stats = True


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
    """bn(conv(x)). With frozen statistics: one convolution, with the affine map folded into its weight."""
    if bn.training or not fold:
        return bn(conv(x))
    scale = bn.weight * torch.rsqrt(bn.running_var + bn.eps)
    weight, bias = conv.weight * scale[:, None, None, None], bn.bias - bn.running_mean * scale
    return F.conv2d(x, weight, bias, conv.stride, conv.padding)


# ------------------------------------------------------------------------------------------- weights


def load_weights(model, weights):
    """Fill a model in place from "imagenet" (torchvision's IMAGENET1K_V1) or a file; "none" leaves it as it is.

    A file holds a state dict with torchvision's names, or a checkpoint of this project. `fc` is ignored, and a file
    without an embedding layer leaves the model's. Raises ValueError or OSError that names the file and what to do.
    """
    if weights == "none":
        return
    state = imagenet_weights() if weights == "imagenet" else read_checkpoint(weights)
    state = {name: value for name, value in state.get("model", state).items() if not name.startswith("fc.")}
    own = model.state_dict()
    optional = {name for name in own if name.endswith("num_batches_tracked")}
    if not any(name.startswith("embedding.") for name in state):
        optional |= {name for name in own if name.startswith("embedding.")}
    wrong = sorted(own.keys() - optional - state.keys()) + sorted(state.keys() - own.keys())
    wrong += [name for name in own.keys() & state.keys() if own[name].shape != getattr(state[name], "shape", None)]
    if wrong:
        reason = f"{len(wrong)} tensors do not fit this net ({wrong[0]}, ..)"
        raise ValueError(f"{weights}: {reason}; check --net and --embedding-size")
    model.load_state_dict(own | state)


def read_checkpoint(file):
    """The dict in a file written by torch.save. Only tensors and plain values are read: no code in a file is run."""
    if not os.path.isfile(file):
        raise FileNotFoundError(f"{file}: no such file of weights")
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a truncated or foreign file
        raise ValueError(f"{file}: not a readable checkpoint of tensors and plain values") from error
    if not isinstance(state, dict):
        raise ValueError(f"{file}: holds a {type(state).__name__}, expected a state dict")
    return state


def imagenet_weights():
    try:
        return torchvision.models.ResNet50_Weights.IMAGENET1K_V1.get_state_dict(check_hash=True)
    except (OSError, RuntimeError) as error:  # no network, or a file with another hash
        url = torchvision.models.ResNet50_Weights.IMAGENET1K_V1.url
        place = f"{torch.hub.get_dir()}/checkpoints"
        raise OSError(f"no ImageNet weights ({error}); put {url} into {place}, or use --weights none") from error

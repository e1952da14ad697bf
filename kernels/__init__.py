"""Fast forms of the places where metric learning spends its time; a file a kernel, plain tensors in and out.

Every public function has a plain PyTorch form and a Triton form of one signature. `choice`, set by --kernels, says which
one runs: "torch", "triton", or "auto", which takes Triton for tensors on a GPU. Here is what the files share: the
switch, products of tiles, and the terms that a pair of embeddings adds to a loss.
"""

import os
import types
from typing import NamedTuple

import torch

try:
    import triton
    import triton.language as tl

    jit = triton.jit
except ImportError:  # no Triton for this platform: its forms stay unused
    triton, tl, jit = None, types.SimpleNamespace(constexpr=None), lambda function: function

CHOICES = ("auto", "torch", "triton")
choice = "auto"
TILE = 1024  # rows and columns of similarities at a time; 4 MiB


def use_triton(tensor):
    """Whether the Triton form of a kernel runs on this tensor. Raises RuntimeError if it was chosen and cannot."""
    if choice == "auto":
        return tensor.is_cuda and triton is not None
    if choice == "triton":
        if triton is None:
            raise RuntimeError("--kernels triton: Triton is not installed; --kernels torch needs none")
        if not tensor.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
            raise RuntimeError("--kernels triton: no GPU; TRITON_INTERPRET=1 in front of the command runs it, slowly, on the CPU")
    return choice == "triton"


def placed(x, like):
    """x on the device of `like`; on its way to a GPU nothing waits."""
    if like.is_cuda and not x.is_cuda:
        x = x.pin_memory()
    return x.to(like.device, non_blocking=True)


def product(rows, cols):
    """rows @ cols.T, float32 in full precision whatever the caller has set; oneDNN halves the time on AMD processors."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        if rows.device.type == "cpu" and rows.dtype == torch.float32 and torch.backends.mkldnn.is_available():
            return torch.ops.mkldnn._linear_pointwise(rows, cols, None, "none", [], "")
        return rows @ cols.T
    finally:
        torch.set_float32_matmul_precision(before)


def slices(start, stop, size):
    return [slice(at, min(at + size, stop)) for at in range(start, stop, size)]


def padded(z, multiple):
    """z with zero columns up to a multiple, contiguous: no mask along D, and loads that may be wide."""
    return torch.nn.functional.pad(z, (0, -z.shape[1] % multiple)).contiguous()


@jit
def similarities(x, v, r, c, R, N, D, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr):
    """(BM, BN) inner products of rows r of x and rows c of v; D is a multiple of BK."""
    s = tl.zeros((BM, BN), tl.float32)
    k = tl.arange(0, BK)
    x += r.to(tl.int64)[:, None] * D + k[None, :]
    v += c.to(tl.int64)[None, :] * D + k[:, None]
    for _ in range(0, D, BK):
        a = tl.load(x, mask=(r < R)[:, None], other=0.0)  # (BM, BK)
        b = tl.load(v, mask=(c < N)[None, :], other=0.0)  # (BK, BN)
        s = tl.dot(a, b, s, input_precision=PRECISION)
        x += BK
        v += BK
    return s


# --------------------------------------------------------------------------------- the terms of a pair

TINY = 1e-12  # under the square root of a distance
LARGEST_EXPONENT = 70  # e^70 times a million terms is a float32
HINGE, EXPONENTIAL = 0, 1


class Rho(NamedTuple):
    """What a pair of similarity s adds to the pull and to the push of its row in a metric-learning loss.

        hinge         rho+ = d,                                 rho- = relu(push_base - d),     d = sqrt(max(2 - 2s, TINY))
        exponential   rho+ = e^{-pull_scale (s - pull_base)},   rho- = e^{push_scale (s - push_base)}

    Exponents are not shifted, so scales are served up to LARGEST_EXPONENT: |s| <= 1 bounds them.
    """

    kind: int
    pull_scale: float = 0.0
    pull_base: float = 0.0
    push_scale: float = 0.0
    push_base: float = 0.0

    def is_served(self):
        largest = max(self.pull_scale * (1 + self.pull_base), self.push_scale * (1 - self.push_base))  # |s| <= 1
        return self.kind == HINGE or largest <= LARGEST_EXPONENT


def terms(s, rho):
    """rho+ and rho- of similarities."""
    if rho.kind == HINGE:
        d = (2 - 2 * s).clamp_min_(TINY).sqrt_()
        return d, (rho.push_base - d).clamp_min_(0)
    return (-rho.pull_scale * (s - rho.pull_base)).exp_(), (rho.push_scale * (s - rho.push_base)).exp_()


def slopes(s, rho):
    """Their derivatives by s; 0 for a distance at its smallest."""
    if rho.kind == HINGE:
        square = 2 - 2 * s
        slope = square.clamp_min(TINY).rsqrt_().neg_().mul_(square > TINY)
        return slope, -slope * (square < max(rho.push_base, 0) ** 2)
    pull, push = terms(s, rho)
    return pull.mul_(-rho.pull_scale), push.mul_(rho.push_scale)


@jit
def term_tile(s, pull_scale, pull_base, push_scale, push_base, KIND: tl.constexpr):
    """`terms`, of a tile."""
    if KIND == 0:
        d = tl.sqrt_rn(tl.maximum(2.0 - 2.0 * s, 1e-12))
        return d, tl.maximum(push_base - d, 0.0)
    else:
        return tl.exp(-pull_scale * (s - pull_base)), tl.exp(push_scale * (s - push_base))


@jit
def slope_tile(s, pull_scale, pull_base, push_scale, push_base, KIND: tl.constexpr):
    """`slopes`, of a tile."""
    if KIND == 0:
        square = 2.0 - 2.0 * s
        slope = tl.where(square > 1e-12, -1.0 / tl.sqrt_rn(tl.maximum(square, 1e-12)), 0.0)
        margin = tl.maximum(push_base, 0.0)
        return slope, tl.where(square < margin * margin, -slope, 0.0)
    else:
        pull, push = term_tile(s, pull_scale, pull_base, push_scale, push_base, KIND)
        return -pull_scale * pull, push_scale * push

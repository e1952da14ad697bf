"""Fused kernels for the places where metric learning spends its time: one file each, plain tensors in and out.

Every public function has a plain PyTorch form and a Triton form with the same signature. `backend`, set by --kernels,
picks one: "torch", "triton", or "auto", which uses Triton on a GPU where there is enough to do. This file holds what
the kernels share: the switch, launches, tiled products, and the terms that a pair of embeddings adds to a loss.
"""

import contextlib
import os
import types
from typing import NamedTuple

import torch

try:
    import triton
    import triton.language as tl

    jit = triton.jit
except ImportError:  # no Triton for this platform
    triton, tl = None, types.SimpleNamespace(constexpr=None)

    def jit(function=None, **_):
        return function or jit


BACKENDS = ("auto", "torch", "triton")
backend = "auto"
# Terms (pairs, triplets, mixed features) below which "auto" stays with PyTorch on a GPU too: its matrices then fit in
# the L2 cache, and a kernel whose programs own rows would not fill the chip. By counting instructions; not measured.
TRITON_FROM = 2**24
TILE = 1024  # rows and columns of similarities at a time: 4 MiB
# Multiplications from which a CPU product goes to oneDNN: up to twice MKL's speed on AMD, but slower to start.
ONEDNN_FROM = 2**25 if torch.backends.mkldnn.is_available() else float("inf")


def use_triton(tensor, terms=TRITON_FROM):
    """Whether to run the Triton form on this tensor, never for float64.

    Raises ValueError if it was asked for and cannot run.
    """
    if backend == "triton":
        if triton is None:
            raise ValueError("--kernels triton: Triton is not installed; use --kernels torch")
        if not tensor.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError("--kernels triton: no GPU; set TRITON_INTERPRET=1 to run the kernels, slowly, on the CPU")
    automatic = backend == "auto" and tensor.is_cuda and triton is not None and terms >= TRITON_FROM
    return (backend == "triton" or automatic) and tensor.dtype != torch.float64


def launch(kernel, grid, *arguments, **options):
    """Run a kernel on the device of its first argument."""
    device = arguments[0].device
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[grid](*arguments, **options)


def chip(device):
    """Multiprocessors and compute capability of a GPU; for the interpreter, few enough to share columns among them."""
    if device.type != "cuda":
        return 5, 9
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.major


@contextlib.contextmanager
def full_precision(device):
    """Inside, products of float32 keep all its digits, even where the caller has allowed TF32, bfloat16 or autocast."""
    backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    precisions = [backend.fp32_precision for backend in backends]
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:  # PyTorch raises it where the caller has set fp32_precision
        precision = "highest"
    torch.set_float32_matmul_precision("highest")  # this sets fp32_precision to "ieee" as well
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
        for backend, precision in zip(backends, precisions):
            backend.fp32_precision = precision


def product(rows, cols):
    """rows @ cols.T in full precision."""
    with full_precision(rows.device):
        if rows.device.type == "cpu" and rows.dtype == torch.float32 and len(rows) * cols.numel() > ONEDNN_FROM:
            return torch.ops.mkldnn._linear_pointwise(rows, cols, None, "none", [], "")
        return rows @ cols.T


class _Similarities(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return product(a, b)

    @staticmethod
    def backward(ctx, grad):
        a, b = ctx.saved_tensors
        return similarities(grad, b.T), similarities(grad.T, a.T)


def similarities(a, b):
    """a @ b.T in full precision, also in the backward pass, where autograd would multiply as the caller allows."""
    return _Similarities.apply(a, b)


def row_slices(start, stop, size):
    return [slice(at, min(at + size, stop)) for at in range(start, stop, size)]


def row_chunks(rows, width, terms, device):
    """Slices of rows of so many terms on a CPU, for its caches, and of 2^26 on a GPU, where each slice is launches."""
    return row_slices(0, rows, max(1, (terms if device.type == "cpu" else 2**26) // max(width, 1)))


def pad_columns(z, multiple):
    """z with zero columns up to a multiple: the kernels then need no mask along D, and loads are wide."""
    return torch.nn.functional.pad(z, (0, -z.shape[1] % multiple)).contiguous()


# ---------------------------------------------------------------------------------- terms of a pair

TINY = 1e-12  # under the square root of a distance
HINGE, EXPONENTIAL = 0, 1


class Rho(NamedTuple):
    """What a pair with similarity s adds to the pull (if positive) or the push (if negative) of its row.

        hinge         rho+ = d = sqrt(max(2 - 2s, TINY))        rho- = relu(push_base - d)
        exponential   rho+ = e^{-pull_scale (s - pull_base)}    rho- = e^{push_scale (s - push_base)}
    """

    kind: int
    pull_scale: float = 0.0
    pull_base: float = 0.0
    push_scale: float = 0.0
    push_base: float = 0.0


def terms(s, rho):
    """rho+ and rho- of similarities (R, N), stacked: (2, R, N)."""
    both = s.new_empty(2, *s.shape)
    if rho.kind == HINGE:
        torch.mul(s, -2, out=both[0]).add_(2).clamp_min_(TINY).sqrt_()
        torch.sub(rho.push_base, both[0], out=both[1]).clamp_min_(0)
        return both
    torch.sub(s, rho.pull_base, out=both[0]).mul_(-rho.pull_scale)
    torch.sub(s, rho.push_base, out=both[1]).mul_(rho.push_scale)
    return both.exp_()


def slopes(s, rho):
    """Derivatives of `terms` with respect to s. The slope of a distance at its minimum is 0."""
    if rho.kind == HINGE:
        square = (s * -2).add_(2)
        both = s.new_empty(2, *s.shape)
        torch.gt(square, TINY, out=both[0]).mul_(square.clamp_min(TINY).rsqrt_()).neg_()
        torch.lt(square, max(rho.push_base, 0) ** 2, out=both[1]).mul_(both[0]).neg_()
        return both
    both = terms(s, rho)
    both[0] *= -rho.pull_scale
    both[1] *= rho.push_scale
    return both


@jit
def term_tile(s, pull_scale, pull_base, push_scale, push_base, KIND: tl.constexpr):
    """`terms` of a tile."""
    if KIND == 0:
        d = tl.sqrt(tl.maximum(2.0 - 2.0 * s, 1e-12))
        return d, tl.maximum(push_base - d, 0.0)
    else:
        return tl.exp(-pull_scale * (s - pull_base)), tl.exp(push_scale * (s - push_base))


@jit
def slope_tile(s, pull_scale, pull_base, push_scale, push_base, KIND: tl.constexpr):
    """`slopes` of a tile."""
    if KIND == 0:
        square = 2.0 - 2.0 * s
        slope = tl.where(square > 1e-12, -tl.rsqrt(tl.maximum(square, 1e-12)), 0.0)
        margin = tl.maximum(push_base, 0.0)
        return slope, tl.where(square < margin * margin, -slope, 0.0)
    else:
        pull, push = term_tile(s, pull_scale, pull_base, push_scale, push_base, KIND)
        return -pull_scale * pull, push_scale * push

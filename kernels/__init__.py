"""Fused kernels for pairwise losses, mixed feature maps and recall: one file each.

The functions in pairwise.py, mix_pool.py and recall.py run in PyTorch or in Triton. `backend`, set by --kernels,
chooses: "torch", "triton", or "auto", which runs Triton on a GPU if the problem is large enough.
"""

import contextlib
import os
import types

import torch

try:
    import triton
    import triton.language as tl

    jit = triton.jit
except ImportError:  # Triton exists for Linux only; without it, @jit and @jit(..) leave functions alone
    triton, tl = None, types.SimpleNamespace(constexpr=None)

    def jit(function=None, **_):
        return function or jit


BACKENDS = ("auto", "torch", "triton")
backend = "auto"
TRITON_FROM = 2**24  # with "auto", Triton runs from this many pairs or mixed values up; estimated, not measured
TILE = 1024  # side of the square tiles of pairs that PyTorch computes in recall.py and eval.py
# From this many multiplications up, `product` uses oneDNN on a CPU. It is up to twice as fast as MKL on AMD.
ONEDNN_FROM = 2**25 if torch.backends.mkldnn.is_available() else float("inf")


def use_triton(tensor, size):
    """Whether Triton should run on this tensor. ValueError if the user asked for Triton and it cannot run.

    size: how many pairs or mixed values there are. float64 always runs in PyTorch.
    """
    if backend == "triton":
        if triton is None:
            raise ValueError("--kernels triton: Triton is not installed; use --kernels torch")
        if not tensor.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError("--kernels triton: not on a CPU; TRITON_INTERPRET=1 runs the kernels there, slowly")
    large = backend == "auto" and tensor.is_cuda and triton is not None and size >= TRITON_FROM
    return (backend == "triton" or large) and tensor.dtype != torch.float64


def launch(kernel, grid, *arguments, **options):
    """Run a kernel on the device of its first argument."""
    device = arguments[0].device
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[grid](*arguments, **options)


def sm_count_and_arch(device):
    """Multiprocessors and major compute capability. A CPU pretends to have 5 and 9, so that tests split columns."""
    if device.type != "cuda":
        return 5, 9
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.major


# ------------------------------------------------------------------------------------------ products


PRECISIONS = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # of GPUs, of CPUs


def relaxed(device):
    """Whether the caller allows float32 products with fewer digits: TF32, bfloat16 or autocast."""
    return torch.is_autocast_enabled(device.type) or any(p.fp32_precision not in ("none", "ieee") for p in PRECISIONS)


@contextlib.contextmanager
def full_precision(device):
    """Inside, float32 products keep all digits, whatever the caller allows."""
    if not relaxed(device):
        yield
        return
    before = [p.fp32_precision for p in PRECISIONS]
    try:
        legacy = torch.get_float32_matmul_precision()
    except RuntimeError:  # PyTorch raises this if fp32_precision was set
        legacy = "highest"
    torch.set_float32_matmul_precision("highest")  # this sets fp32_precision to "ieee" as well
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(legacy)
        for p, precision in zip(PRECISIONS, before):
            p.fp32_precision = precision


def product(a, b):
    """a @ b.T in full precision, where no gradient is needed. a: (N, D), b: (M, D)."""
    with full_precision(a.device):
        if a.device.type == "cpu" and a.dtype == torch.float32 and len(a) * b.numel() > ONEDNN_FROM:
            return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
        return a @ b.T


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return product(a, b)

    @staticmethod
    def backward(ctx, grad):
        (a, b), (for_a, for_b) = ctx.saved_tensors, ctx.needs_input_grad
        return similarities(grad, b.T) if for_a else None, similarities(grad.T, a.T) if for_b else None


def similarities(a, b):
    """a @ b.T in full precision, like its gradient. Autograd alone would use the caller's settings for the gradient."""
    return _Product.apply(a, b) if relaxed(a.device) else a @ b.T


def row_slices(rows, size):
    return [slice(row, min(row + size, rows)) for row in range(0, rows, size)]


def row_chunks(rows, width, size, device):
    """Slices of rows of `width` elements, with `size` elements each. On a GPU 2^26, because a slice costs launches."""
    return row_slices(rows, max(1, (size if device.type == "cpu" else 2**26) // max(width, 1)))


def pad_columns(z, multiple):
    """z with zero columns up to a multiple, so that kernels load it without a mask."""
    return torch.nn.functional.pad(z, (0, -z.shape[1] % multiple)).contiguous()

"""Fast forms of the places where metric learning spends its time; a file a kernel, plain tensors in and out.

Every public function has a plain PyTorch form and a Triton form of one signature. `choice`, set by --kernels, says which
one runs: "torch", "triton", or "auto", which takes Triton for tensors on a GPU.
"""

import os
import types

import torch

try:
    import triton
    import triton.language as tl

    jit = triton.jit
except ImportError:  # no Triton for this platform: its forms stay unused
    triton, tl, jit = None, types.SimpleNamespace(constexpr=None), lambda function: function

CHOICES = ("auto", "torch", "triton")
choice = "auto"


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

"""The mixed loss of embed mode from Gram matrices: sums over triplets (anchor a, positive part p, negative part n).

With W = anchors z^T (A, B) and S = z z^T (B, B), the mixed example of p and n has the similarity

    m = (lam W[a,p] + (1-lam) W[a,n]) / L[p,n],      L = sqrt(max(lam^2 + (1-lam)^2 + 2 lam (1-lam) S[p,n], TINY))

to anchor a, so no mixed example is ever built. An anchor sums over its p and all n of another class than p:

    pull[a] = sum of rho+(m)        push[a] = sum of rho-(m)                      Rho in kernels/__init__.py

Backward, with g = pull_grad[a] rho+'(m) + push_grad[a] rho-'(m):

    dW[a,p] += g lam / L        dW[a,n] += g (1-lam) / L        dS[p,n] -= g m lam (1-lam) / L^2  (0 if L is clamped)

A program owns a row of dW (p and n never collide there: they differ in class) or of dS: no atomics, the same bits every
run. Bytes moved: two rows of B floats per pair (a, p), from cache. Nothing of the size of the triplets is written.

Shapes: A anchors, B examples, R pairs of an anchor and a positive part.
"""

import torch

from kernels import TINY, slope_tile, slopes, term_tile, terms
from kernels import row_chunks, jit, launch, tl, use_triton

CHUNK = 2**14  # triplets at a time on a CPU: a dozen float32 arrays of them, 0.75 MiB, stay in a core's L2 cache

# ------------------------------------------------------------------------------ PyTorch, by pairs (a, p)


def _mixed(W, S, a, p, lam):
    """m and L^2 of the triplets of pairs (a, p): (R, B)."""
    square = (lam**2 + (1 - lam) ** 2 + 2 * lam * (1 - lam) * S[p]).clamp_min_(TINY)
    m = torch.add(lam * W[a, p][:, None], W[a], alpha=1 - lam)
    return m.mul_(square.rsqrt()), square


def _torch_sums(W, S, y, a, p, lam, rho):
    """sums (4, A): pull, push and how many terms of each are not zero."""
    sums = W.new_zeros(4, len(W))
    for r in row_chunks(len(a), len(y), CHUNK, W.device):
        m, _ = _mixed(W, S, a[r], p[r], lam)
        both = terms(m, rho).mul_((y[p[r], None] != y).to(m.dtype))  # (2, R, B)
        sums.index_add_(1, a[r], torch.cat([both.sum(2), (both > 0).sum(2)]))
    return sums


def _torch_gradients(W, S, y, a, p, lam, rho, pull_grad, push_grad):
    """dW and dS."""
    dW, dS, grad = torch.zeros_like(W), torch.zeros_like(S), torch.stack([pull_grad, push_grad])
    for r in row_chunks(len(a), len(y), CHUNK, W.device):
        m, square = _mixed(W, S, a[r], p[r], lam)
        g = slopes(m, rho).mul_(grad[:, a[r], None]).sum(0).mul_(y[p[r], None] != y)  # (R, B)
        dS.index_add_(0, p[r], (g * m / square).mul_(square > TINY), alpha=-lam * (1 - lam))
        g *= square.rsqrt_()
        dW.index_add_(0, a[r], g, alpha=1 - lam)
        dW.index_put_((a[r], p[r]), lam * g.sum(1), accumulate=True)
    return dW, dS


# ---------------------------------------------------------------------------------------------- Triton


@jit
def _mix(to_p, to_n, s, lam):
    """m and L^2 of a tile of triplets, from W[a,p], W[a,n] and S[p,n]."""
    square = tl.maximum(lam * lam + (1 - lam) * (1 - lam) + 2 * lam * (1 - lam) * s, 1e-12)
    return (lam * to_p + (1 - lam) * to_n) * tl.rsqrt(square), square


@jit(do_not_specialize=["A", "B"])
def _sums(
    W, S, y, start, partner, sums, A, B, lam, pull_scale, pull_base, push_scale, push_base,
    KIND: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    # A program owns anchor a. It walks its p, and for each the row of all n.
    a = tl.program_id(0)
    pull_sum, push_sum = tl.zeros((BN,), tl.float32), tl.zeros((BN,), tl.float32)
    pulled, pushed = tl.zeros((BN,), tl.float32), tl.zeros((BN,), tl.float32)
    t, end = tl.load(start + a), tl.load(start + a + 1)
    while t < end:
        p = tl.load(partner + t)
        to_p, label = tl.load(W + a.to(tl.int64) * B + p), tl.load(y + p)
        for first in range(0, B, BN):
            n = first + tl.arange(0, BN)
            other = (n < B) & (tl.load(y + n, mask=n < B, other=0) != label)
            to_n = tl.load(W + a.to(tl.int64) * B + n, mask=n < B, other=0.0)
            m, _ = _mix(to_p, to_n, tl.load(S + p.to(tl.int64) * B + n, mask=n < B, other=0.0), lam)
            pull, push = term_tile(m, pull_scale, pull_base, push_scale, push_base, KIND)
            push = tl.where(other, push, 0.0)
            pull_sum += tl.where(other, pull, 0.0)
            push_sum += push
            pulled += other.to(tl.float32)
            pushed += (push > 0.0).to(tl.float32)
        t += 1
    tl.store(sums + a, tl.sum(pull_sum))
    tl.store(sums + A + a, tl.sum(push_sum))
    tl.store(sums + 2 * A + a, tl.sum(pulled))
    tl.store(sums + 3 * A + a, tl.sum(pushed))


@jit(do_not_specialize=["A", "B"])
def _row_gradient(
    W, S, y, start, partner, grad, out, A, B, lam, pull_scale, pull_base, push_scale, push_base,
    KIND: tl.constexpr, OF_S: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    # A program owns BN elements of a row: dW[a, n], summed over the p of a; or dS[p, n], summed over the a of p.
    row = tl.program_id(0)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    label = tl.load(y + n, mask=n < B, other=0)
    total = tl.zeros((BN,), tl.float32)
    t, end = tl.load(start + row), tl.load(start + row + 1)
    while t < end:
        if OF_S:
            a, p = tl.load(partner + t), row.to(tl.int64)
        else:
            a, p = row.to(tl.int64), tl.load(partner + t)
        other = (n < B) & (label != tl.load(y + p))
        to_n = tl.load(W + a * B + n, mask=n < B, other=0.0)
        m, square = _mix(tl.load(W + a * B + p), to_n, tl.load(S + p * B + n, mask=n < B, other=0.0), lam)
        pull, push = slope_tile(m, pull_scale, pull_base, push_scale, push_base, KIND)
        g = tl.where(other, pull * tl.load(grad + a) + push * tl.load(grad + A + a), 0.0)
        if OF_S:
            total -= tl.where(square > 1e-12, g * m / square, 0.0) * (lam * (1 - lam))
        else:
            total += g * tl.rsqrt(square) * (1 - lam)
        t += 1
    tl.store(out + row.to(tl.int64) * B + n, total, mask=n < B)


@jit(do_not_specialize=["A", "B"])
def _pair_gradient(
    W, S, y, anchor, partner, grad, out, A, B, lam, pull_scale, pull_base, push_scale, push_base,
    KIND: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    # A program owns one element dW[a, p], a sum over all n.
    a, p = tl.load(anchor + tl.program_id(0)), tl.load(partner + tl.program_id(0))
    to_p, label = tl.load(W + a * B + p), tl.load(y + p)
    pull_grad, push_grad = tl.load(grad + a), tl.load(grad + A + a)
    total = tl.zeros((BN,), tl.float32)
    for first in range(0, B, BN):
        n = first + tl.arange(0, BN)
        other = (n < B) & (tl.load(y + n, mask=n < B, other=0) != label)
        to_n = tl.load(W + a * B + n, mask=n < B, other=0.0)
        m, square = _mix(to_p, to_n, tl.load(S + p * B + n, mask=n < B, other=0.0), lam)
        pull, push = slope_tile(m, pull_scale, pull_base, push_scale, push_base, KIND)
        total += tl.where(other, (pull * pull_grad + push * push_grad) * tl.rsqrt(square), 0.0)
    tl.store(out + a * B + p, lam * tl.sum(total))


BN, WARPS = 256, 4  # no spills by tests/aot.py; not timed on a GPU


def _lists(owner, partner, owners):
    """Where the partners of each owner begin (owners + 1,), and all of them, owner by owner."""
    order = owner.sort(stable=True).indices
    first = torch.searchsorted(owner[order], torch.arange(owners + 1, device=owner.device))
    return first, partner[order].contiguous()


def _triton_sums(W, S, y, a, p, lam, rho):
    sums = torch.empty(4, len(W), dtype=torch.float32, device=W.device)
    arguments = (W, S, y, *_lists(a, p, len(W)), sums, *W.shape, lam, *rho[1:])
    launch(_sums, (len(W),), *arguments, KIND=rho.kind, BN=BN, num_warps=WARPS)
    return sums


def _triton_gradients(W, S, y, a, p, lam, rho, pull_grad, push_grad):
    dW, dS, grad = torch.empty_like(W), torch.empty_like(S), torch.stack([pull_grad, push_grad]).float()
    blocks, common = -(-W.shape[1] // BN), (*W.shape, lam, *rho[1:])
    options = dict(KIND=rho.kind, BN=BN, num_warps=WARPS)
    for out, lists, of_s in ((dW, _lists(a, p, len(W)), False), (dS, _lists(p, a, len(S)), True)):
        launch(_row_gradient, (len(out), blocks), W, S, y, *lists, grad, out, *common, OF_S=of_s, **options)
    if len(a):
        launch(_pair_gradient, (len(a),), W, S, y, a, p, grad, dW, *common, **options)
    return dW, dS


# ---------------------------------------------------------------------------------------------- both


class _EmbedSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx, W, S, y, a, p, lam, rho):
        ctx.save_for_backward(W, S, y, a, p)
        ctx.rest = lam, rho
        ctx.triton = use_triton(W, len(a) * len(y))
        sums = (_triton_sums if ctx.triton else _torch_sums)(W, S, y, a, p, lam, rho)
        pull, push, pulled, pushed = sums.unbind()
        ctx.mark_non_differentiable(pulled, pushed)
        return pull, push, pulled, pushed

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, pull_grad, push_grad, *_):
        gradients = _triton_gradients if ctx.triton else _torch_gradients
        return *gradients(*ctx.saved_tensors, *ctx.rest, pull_grad, push_grad), None, None, None, None, None


def embed_sums(W, S, y, a, p, lam, rho):
    """The sums at the top of the file: pull, push, and how many terms of each are not zero, (A,) each.

    W: (A, B) and S: (B, B), float32, or float64 by the PyTorch form only. y: (B,) integers. a, p: int64 (R,), the pairs
    of an anchor and a positive part. lam in [0, 1]. Differentiable in W and S.
    """
    return _EmbedSums.apply(W.contiguous(), S.contiguous(), y, a.contiguous(), p.contiguous(), float(lam), rho)

"""Sums over pairs for a metric-learning loss, without a matrix of pairs.

Rows (anchors or proxies) meet columns (examples or mixed examples). With s = similarity(row, column), each row r needs

    pull[r] = sum over its positives of rho+(s)        push[r] = sum over its negatives of rho-(s)

and how many terms are not zero. The loss is a function of these (R,) numbers, written in plain PyTorch. `Rho` in
kernels/__init__.py defines rho+ and rho-: a distance and its hinge, or two exponentials.

Every row and column has a (label, id). A pair with equal labels and different ids is positive. A pair with different
labels is negative; in a mixed loss the negatives are instead the positives themselves, which enter both sums.
Mining (if epsilon is given) keeps positives with s < highest negative + epsilon and negatives with
s > lowest positive - epsilon.

Backward, with g[r,c] = pull_grad[r] rho+'(s) + push_grad[r] rho-'(s):

    dx = g v,      dv = g^T x,

where each tile of s is recomputed rather than stored. A program owns its rows of dx or dv: no atomics, the same bits
every run. Bytes moved are those of the vectors; arithmetic is 2 R N D forward and, at D = 512, 6 R N D per gradient
(the tile of s is recomputed for every 256 columns of the result; 4 R N D would be ideal).

Precision, emulated by rounding operands (1,000 embeddings in classes of 5, D = 512; relative error against float64 of
the loss, and of the gradient in norm; "tight": all similarities above 0.95, where distances lose digits):

    product   contrastive        multi-similarity   proxy-anchor       contrastive, tight
    fp32      4e-8   8e-8        5e-8   4e-7        8e-8   5e-7        5e-7   3e-4
    tf32x3    4e-8   8e-8        5e-8   1e-7        8e-8   2e-7        1e-7   5e-5
    bf16x3    4e-8   3e-6        5e-8   4e-6        8e-8   5e-6        5e-6   1e-3
    tf32      8e-8   2e-4        9e-5   1e-2        1e-8   4e-4        3e-4   1e-1
    bf16      3e-6   2e-3        5e-6   2e-3        3e-6   3e-3        4e-3   6e-1

Shapes: R rows, N columns, D embedding size.
"""

import torch

from kernels import jit, padded, product, similarities, slices, tl, triton, use_triton
from kernels import slope_tile, slopes, term_tile, terms

CHUNK = 2**18  # pairs at a time on a CPU: a float32 array of them stays in a core's L2 cache
EXTREMES = 2  # a third kind of Rho, used by the mining kernel only

# ------------------------------------------------------------------------------------------ PyTorch


def _chunks(x, v):
    return slices(0, len(x), max(1, CHUNK // max(len(v), 1)))


def _pairs(x, v, row, column, mixed):
    """Similarities (rows, N) of a chunk, and its positive and negative pairs (2, rows, N) as 0.0 and 1.0."""
    s = product(x, v)
    masks = s.new_empty(2, *s.shape)
    positive, negative = masks
    row, column = row.to(s.dtype), column.to(s.dtype)  # a CPU compares floats faster than integers
    torch.ne(row[1, :, None], column[1], out=positive)
    positive *= torch.eq(row[0, :, None], column[0], out=negative)
    if mixed:
        negative.copy_(positive)
    else:
        negative.neg_().add_(1)
    return s, masks


def _limits(s, masks, epsilon):
    """Mining limits (2, rows): positives count below the first, negatives above the second."""
    highest_negative = torch.minimum(s, (masks[1] * 2e30).sub_(1e30)).amax(1)  # what is not negative becomes -1e30
    lowest_positive = torch.maximum(s, (masks[0] * -2e30).add_(1e30)).amin(1)
    return torch.stack([highest_negative + epsilon, lowest_positive - epsilon])


def _mine(s, masks, limits, dim):
    """The masks within the limits (2, n) of the rows (dim 1) or of the columns (dim 0)."""
    if limits is None:
        return masks
    below, above = limits.unsqueeze(dim + 1)
    mined = torch.empty_like(masks)
    torch.lt(s, below, out=mined[0])
    torch.gt(s, above, out=mined[1])
    return mined.mul_(masks)


def _torch_sums(x, v, row, column, rho, epsilon, mixed):
    """sums (4, R): pull, push and how many terms of each are not zero; and what the gradients need of them.

    That is the mining limits (2, R) or None, and the pairs if they are a single chunk.
    """
    sums, limits = x.new_empty(4, len(x)), None if epsilon is None else x.new_empty(2, len(x))
    chunks = _chunks(x, v)
    for r in chunks:
        s, masks = pairs = _pairs(x[r], v, row[:, r], column, mixed)
        if limits is not None:
            limits[:, r] = _limits(s, masks, epsilon)
            masks = _mine(s, masks, limits[:, r], 1)
        both = terms(s, rho).mul_(masks)  # (2, rows, N)
        sums[:2, r] = both.sum(2)
        sums[2:, r] = both.gt_(0).sum(2)
    return sums, limits, pairs if len(chunks) == 1 else None


def _torch_gradients(x, v, row, column, rho, limits, pairs, mixed, grad):
    """dx and dv from grad (2, R) of pull and push. If v is None, the columns are x and dx is the whole gradient."""
    symmetric, v = v is None, x if v is None else v
    dx, dv = torch.empty_like(x), None if symmetric else torch.zeros_like(v)
    for r in _chunks(x, v):
        s, masks = pairs or _pairs(x[r], v, row[:, r], column, mixed)
        weights = _mine(s, masks, None if limits is None else limits[:, r], 1) * grad[:, r, None]
        if symmetric:  # s[r,c] is also s[c,r]: add what it is to row c
            weights.addcmul_(_mine(s, masks, limits, 0), grad[:, None])
        g = weights.mul_(slopes(s, rho)).sum(0)
        dx[r] = product(g, v.T)
        if not symmetric:
            dv.addmm_(g.T, x[r])
    return dx, dv


# ---------------------------------------------------------------------------------------------- Triton


@jit
def _pair_masks(row, column, inside, R, N, r, c, MIXED: tl.constexpr):
    """Positive and negative pairs of a tile. row (2, R) and column (2, N): labels and ids."""
    row_label, row_id = tl.load(row + r, mask=r < R, other=0), tl.load(row + R + r, mask=r < R, other=0)
    label, id = tl.load(column + c, mask=c < N, other=0), tl.load(column + N + c, mask=c < N, other=0)
    same = row_label[:, None] == label[None, :]
    positive = inside & same & (row_id[:, None] != id[None, :])
    if MIXED:
        return positive, positive
    else:
        return positive, inside & (row_label[:, None] != label[None, :])


@jit
def _sums(
    x, v, row, column, limits, sums, R, N, D, pull_scale, pull_base, push_scale, push_base,
    KIND: tl.constexpr, MIXED: tl.constexpr, MINED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # A program owns BM rows: their sums and counts, or for KIND 2 their highest negative and lowest positive.
    r = tl.program_id(0) * BM + tl.arange(0, BM)
    first = tl.full((BM,), float("-inf") if KIND == 2 else 0.0, tl.float32)
    second = tl.full((BM,), float("inf") if KIND == 2 else 0.0, tl.float32)
    pulled, pushed = tl.zeros((BM,), tl.float32), tl.zeros((BM,), tl.float32)
    for start in range(0, N, BN):
        c = start + tl.arange(0, BN)
        s = similarities(x, v, r, c, R, N, D, BM, BN, BK, PRECISION)
        positive, negative = _pair_masks(row, column, (r < R)[:, None] & (c < N)[None, :], R, N, r, c, MIXED)
        if KIND == 2:
            first = tl.maximum(first, tl.max(tl.where(negative, s, float("-inf")), 1))
            second = tl.minimum(second, tl.min(tl.where(positive, s, float("inf")), 1))
        else:
            if MINED:
                positive = positive & (s < tl.load(limits + r, mask=r < R, other=0.0)[:, None])
                negative = negative & (s > tl.load(limits + R + r, mask=r < R, other=0.0)[:, None])
            pull, push = term_tile(s, pull_scale, pull_base, push_scale, push_base, KIND)
            push = tl.where(negative, push, 0.0)
            first += tl.sum(tl.where(positive, pull, 0.0), 1)
            second += tl.sum(push, 1)
            pulled += tl.sum(positive.to(tl.float32), 1)
            pushed += tl.sum((push > 0.0).to(tl.float32), 1)
    tl.store(sums + r, first, mask=r < R)
    tl.store(sums + R + r, second, mask=r < R)
    if KIND != 2:
        tl.store(sums + 2 * R + r, pulled, mask=r < R)
        tl.store(sums + 3 * R + r, pushed, mask=r < R)


@jit
def _side(g, s, positive, negative, pull, push, limits, grad, n, at, mask, ROWS: tl.constexpr, MINED: tl.constexpr):
    """Add to g what the pairs of a tile give to the rows, which lie along the tile's first axis or its second."""
    pull_grad, push_grad = tl.load(grad + at, mask=mask, other=0.0), tl.load(grad + n + at, mask=mask, other=0.0)
    if MINED:
        below, above = tl.load(limits + at, mask=mask, other=0.0), tl.load(limits + n + at, mask=mask, other=0.0)
        if ROWS:
            positive, negative = positive & (s < below[:, None]), negative & (s > above[:, None])
        else:
            positive, negative = positive & (s < below[None, :]), negative & (s > above[None, :])
    if ROWS:
        pull, push = pull * pull_grad[:, None], push * push_grad[:, None]
    else:
        pull, push = pull * pull_grad[None, :], push * push_grad[None, :]
    return g + tl.where(positive, pull, 0.0) + tl.where(negative, push, 0.0)


@jit
def _gradient(
    owner, other, owner_keys, other_keys, limits, grad, out, n, m, D, pull_scale, pull_base, push_scale, push_base,
    KIND: tl.constexpr, MIXED: tl.constexpr, MINED: tl.constexpr, AS_ROW: tl.constexpr, AS_COLUMN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # A program owns BM vectors of one side, BD of their elements: out = g other, with g (BM, BN) of each tile. The
    # owners are the rows (dx), the columns (dv), or both where the two sides are the same vectors.
    o = tl.program_id(0) * BM + tl.arange(0, BM)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    total = tl.zeros((BM, BD), tl.float32)
    for start in range(0, m, BN):
        t = start + tl.arange(0, BN)
        s = similarities(owner, other, o, t, n, m, D, BM, BN, BK, PRECISION)
        inside = (o < n)[:, None] & (t < m)[None, :]
        positive, negative = _pair_masks(owner_keys, other_keys, inside, n, m, o, t, MIXED)
        pull, push = slope_tile(s, pull_scale, pull_base, push_scale, push_base, KIND)
        g = tl.zeros((BM, BN), tl.float32)
        if AS_ROW:
            g = _side(g, s, positive, negative, pull, push, limits, grad, n, o, o < n, True, MINED)
        if AS_COLUMN:
            g = _side(g, s, positive, negative, pull, push, limits, grad, m, t, t < m, False, MINED)
        at = other + t.to(tl.int64)[:, None] * D + d[None, :]
        vectors = tl.load(at, mask=(t < m)[:, None] & (d < D)[None, :], other=0.0)
        total = tl.dot(g.to(vectors.dtype), vectors, total, input_precision=PRECISION)
    at = o.to(tl.int64)[:, None] * D + d[None, :]
    tl.store(out + at, total, mask=(o < n)[:, None] & (d < D)[None, :])


PRECISION = "tf32x3"  # of float32 products: as good as fp32 by the table at the top, and on tensor cores
# Block sizes without spills on sm80, sm90 and sm100 by tests/aot.py; not timed on a GPU. Of float32, else of 16 bits.
LAUNCH = dict(num_warps=8, num_stages=2)
WIDTH = 64  # D is padded to a multiple of this, the largest BK
SUMS = (dict(BM=32, BN=64, BK=32), dict(BM=64, BN=32, BK=64))
GRADIENT = (dict(BM=32, BN=32, BK=32, BD=256), dict(BM=64, BN=32, BK=64, BD=256))


def _triton_sums(x, v, row, column, rho, epsilon, mixed):
    """As _torch_sums."""
    x, v = padded(x, WIDTH), padded(v, WIDTH)
    blocks, size = SUMS[x.dtype != torch.float32], (len(x), len(v), x.shape[1])

    def launch(kind, limits, out, mined):
        _sums[(triton.cdiv(len(x), blocks["BM"]),)](
            x, v, row, column, limits, out, *size, *rho[1:],
            KIND=kind, MIXED=mixed, MINED=mined, PRECISION=PRECISION, **blocks, **LAUNCH,
        )  # fmt: skip
        return out

    limits, sums = None, torch.empty(4, len(x), dtype=torch.float32, device=x.device)
    if epsilon is not None:
        limits = launch(EXTREMES, x, torch.empty_like(sums[:2]), mined=False)  # x: an argument that is not read
        limits += torch.tensor([[epsilon], [-epsilon]], device=x.device)
    return launch(rho.kind, x if limits is None else limits, sums, mined=limits is not None), limits, None


def _triton_gradients(x, v, row, column, rho, limits, pairs, mixed, grad):
    """As _torch_gradients."""
    width, symmetric = x.shape[1], v is None
    x, v = padded(x, WIDTH), padded(x if v is None else v, WIDTH)
    blocks, grad = GRADIENT[x.dtype != torch.float32], grad.float().contiguous()

    def gradient(owner, other, owner_keys, other_keys, as_row, as_column):
        out = torch.empty(owner.shape, dtype=torch.float32, device=owner.device)
        grid = (triton.cdiv(len(owner), blocks["BM"]), triton.cdiv(owner.shape[1], blocks["BD"]))
        _gradient[grid](
            owner, other, owner_keys, other_keys, grad if limits is None else limits, grad, out,
            len(owner), len(other), owner.shape[1], *rho[1:],
            KIND=rho.kind, MIXED=mixed, MINED=limits is not None, AS_ROW=as_row, AS_COLUMN=as_column,
            PRECISION=PRECISION, **blocks, **LAUNCH,
        )  # fmt: skip
        return out[:, :width]

    if symmetric:
        return gradient(x, x, row, row, as_row=True, as_column=True), None
    return gradient(x, v, row, column, True, False), gradient(v, x, column, row, False, True)


# ---------------------------------------------------------------------------------------------- both


class _PairSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, v, row, column, rho, epsilon, mixed):
        ctx.triton = x.dtype != torch.float64 and use_triton(x)
        form = _triton_sums if ctx.triton else _torch_sums
        sums, limits, ctx.pairs = form(x, x if v is None else v, row, column, rho, epsilon, mixed)
        ctx.save_for_backward(x, v, row, column, limits)
        ctx.rho, ctx.mixed = rho, mixed
        pull, push, pulled, pushed = sums.unbind()
        ctx.mark_non_differentiable(pulled, pushed)
        return pull, push, pulled, pushed

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, pull_grad, push_grad, *_):
        x, v, row, column, limits = ctx.saved_tensors
        gradients = _triton_gradients if ctx.triton else _torch_gradients
        grad = torch.stack([pull_grad, push_grad])
        dx, dv = gradients(x, v, row, column, ctx.rho, limits, ctx.pairs, ctx.mixed, grad)
        return dx.to(x.dtype), None if dv is None else dv.to(v.dtype), None, None, None, None, None


def pair_sums(x, v, row, column, rho, epsilon=None, mixed=False):
    """The sums at the top of the file: pull, push, and how many terms of each are not zero, (R,) each.

    x: (R, D) and v: (N, D), rows of length 1; if v is None the columns are the rows. row: (2, R) and column: (2, N),
    int64 labels and ids below 2^24. epsilon: mine pairs with this margin. Differentiable in x and v. Takes float32;
    bfloat16 and float16 with float32 sums; float64 by the PyTorch form only.
    """
    if x.dtype not in (torch.float32, torch.float64) and not use_triton(x):
        x, v = x.float(), None if v is None else v.float()
    return _PairSums.apply(x, v, row.contiguous(), column.contiguous(), rho, epsilon, mixed)

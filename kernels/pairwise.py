"""Sums over pairs of a metric-learning loss, without ever holding a matrix of pairs.

Rows (anchors or proxies) meet columns (examples or mixed examples). With s = s(row, column), each row r needs

    pull[r] = sum over its positives of rho+(s)        push[r] = sum over its negatives of rho-(s)

and how many terms were not zero. A loss is a function of these (R,) numbers, in plain PyTorch. rho+ and rho- are the
distance and its hinge, or two exponentials: `Rho` in kernels/__init__.py.

A pair of equal labels and different ids is positive. A pair of different labels is negative, or, in a mixed loss,
whatever is positive: there every pair shown enters both sums. Mining keeps positives with s < below[r] and negatives
with s > above[r].

The gradient is that of s times the other side's vectors: with g[r,c] = pull_grad[r] rho+'(s) + push_grad[r] rho-'(s),

    dx = g v,      dv = g^T x,

where the tile of s is computed again rather than kept. Each program owns its rows of dx or dv: no atomics, so the same
bits every time. Bytes moved are those of the vectors; arithmetic is 2 R N D forward and, at D = 512, 6 R N D for
each gradient (the tile of s is made anew for every 256 elements of the result; 4 R N D would be ideal).

Precision, by rounding as the product modes do (1,000 embeddings in classes of 5, D = 512; relative error against float64
of the loss, and in norm of the gradient; "tight": all similarities above 0.95, where distances lose digits):

    product   contrastive        multi-similarity   proxy-anchor       contrastive, tight
    fp32      4e-8   8e-8        5e-8   4e-7        8e-8   5e-7        5e-7   3e-4
    tf32x3    4e-8   8e-8        5e-8   1e-7        8e-8   2e-7        1e-7   5e-5
    bf16x3    4e-8   3e-6        5e-8   4e-6        8e-8   5e-6        5e-6   1e-3
    tf32      8e-8   2e-4        9e-5   1e-2        1e-8   4e-4        3e-4   1e-1
    bf16      3e-6   2e-3        5e-6   2e-3        3e-6   3e-3        4e-3   6e-1

So float32 vectors are multiplied with tf32x3, as good as fp32 and on tensor cores. 16-bit vectors are for who can
afford the last line.

Shapes: R rows, N columns, D embedding size.
"""

from typing import NamedTuple

import torch

from kernels import EXPONENTIAL, HINGE, Rho, jit, padded, product, similarities, slope_tile, slopes, term_tile, terms, tl, triton, use_triton

CHUNK = 2**18  # pairs at a time on the CPU: a tile of float32 then stays in a core's L2 cache
EXTREMES = 2  # a kind of Rho of this file alone: no sums, but the extremes of mining


class Rows(NamedTuple):
    label: torch.Tensor  # (R,) integers
    id: torch.Tensor  # (R,) integers; a column of the same id is nothing to this row
    below: torch.Tensor | None = None  # (R,) positives count below this similarity; None: all
    above: torch.Tensor | None = None  # (R,) negatives count above this similarity; None: all


class Columns(NamedTuple):
    label: torch.Tensor  # (N,)
    id: torch.Tensor  # (N,)


# ------------------------------------------------------------------------------------ PyTorch, by rows


def _coded(rows, columns, like):
    """Labels and ids as small whole numbers of the similarities' type: floats compare much faster than integers here."""
    codes = []
    for one, other in zip(rows[:2], columns):
        both = torch.cat([one, other]).unique(return_inverse=True)[1].to(like.dtype)
        codes.append((both[: len(one), None], both[len(one) :]))
    return codes


def _masks(s, codes, r, mixed):
    """Which pairs of a chunk of rows are positive and negative, as 0.0 and 1.0."""
    (row, column), (row_id, column_id) = codes
    same = torch.eq(row[r], column, out=torch.empty_like(s))
    positive = torch.ne(row_id[r], column_id, out=torch.empty_like(s)).mul_(same)
    return positive, positive.clone() if mixed else same.neg_().add_(1)


def _mine(s, positive, negative, below, above):
    if below is not None:
        positive = torch.lt(s, below, out=torch.empty_like(s)).mul_(positive)
        negative = torch.gt(s, above, out=torch.empty_like(s)).mul_(negative)
    return positive, negative


def _chunks(x, v):
    step = max(1, CHUNK // max(len(v), 1))
    return [slice(start, start + step) for start in range(0, len(x), step)]


def _at(limit, r):
    return None if limit is None else limit[r, None]


def _torch_sums(x, v, rows, columns, rho, mixed):
    sums, codes = x.new_empty(4, len(x)), _coded(rows, columns, x)
    for r in _chunks(x, v):
        s = product(x[r], v)  # (rows of the chunk, N)
        positive, negative = _masks(s, codes, r, mixed)
        if rho.kind == EXTREMES:
            lowest = torch.maximum(s, positive.mul_(-6).add_(3)).amin(1)  # what is not positive becomes 3
            highest = torch.minimum(s, negative.mul_(6).sub_(3)).amax(1)  # what is not negative, -3
            sums[0, r], sums[1, r] = lowest.masked_fill_(lowest > 2, torch.inf), highest.masked_fill_(highest < -2, -torch.inf)
            continue
        positive, negative = _mine(s, positive, negative, _at(rows.below, r), _at(rows.above, r))
        pull, push = terms(s, rho)
        sums[0, r], sums[2, r] = pull.mul_(positive).sum(1), positive.sum(1)
        sums[1, r], sums[3, r] = push.mul_(negative).sum(1), torch.gt(push, 0, out=negative).sum(1)
    return sums


def _torch_gradients(x, v, rows, columns, rho, mixed, pull_grad, push_grad):
    """dx and dv; if v is None, the columns are x itself, and dx is the whole gradient."""
    symmetric, v = v is None, x if v is None else v
    codes, transposed = _coded(rows, columns, x), v.T.contiguous()
    dx, dv = torch.empty_like(x), None if symmetric else torch.zeros_like(v)
    for r in _chunks(x, v):
        s = product(x[r], v)
        same_class, other_class = _masks(s, codes, r, mixed)
        positive, negative = _mine(s, same_class, other_class, _at(rows.below, r), _at(rows.above, r))
        pull, push = positive * pull_grad[r, None], negative * push_grad[r, None]
        if symmetric:  # s[r,c] is s[c,r] as well: add what it is to row c
            positive, negative = _mine(s, same_class, other_class, rows.below, rows.above)
            pull.addcmul_(positive, pull_grad), push.addcmul_(negative, push_grad)
        pull_slope, push_slope = slopes(s, rho)
        g = pull.mul_(pull_slope).add_(push.mul_(push_slope))
        dx[r] = product(g, transposed)
        if not symmetric:
            dv.addmm_(g.T, x[r])
    return dx, dv


# ---------------------------------------------------------------------------------------------- Triton


@jit
def _pair_masks(row, column, inside, R, N, r, c, MIXED: tl.constexpr):
    """Positive and negative pairs of a tile. row, column: (2, R) and (2, N) labels and ids."""
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
    x, v, row, column, limit, sums, R, N, D, pull_scale, pull_base, push_scale, push_base,
    KIND: tl.constexpr, MIXED: tl.constexpr, MINED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # A program owns BM rows: their two sums and two counts, or with KIND 2 their lowest positive and highest negative.
    r = tl.program_id(0) * BM + tl.arange(0, BM)
    first = tl.full((BM,), float("inf") if KIND == 2 else 0.0, tl.float32)
    second = tl.full((BM,), float("-inf") if KIND == 2 else 0.0, tl.float32)
    pulled, pushed = tl.zeros((BM,), tl.float32), tl.zeros((BM,), tl.float32)
    for start in range(0, N, BN):
        c = start + tl.arange(0, BN)
        s = similarities(x, v, r, c, R, N, D, BM, BN, BK, PRECISION)
        positive, negative = _pair_masks(row, column, (r < R)[:, None] & (c < N)[None, :], R, N, r, c, MIXED)
        if KIND == 2:
            first = tl.minimum(first, tl.min(tl.where(positive, s, float("inf")), 1))
            second = tl.maximum(second, tl.max(tl.where(negative, s, float("-inf")), 1))
        else:
            if MINED:
                positive = positive & (s < tl.load(limit + r, mask=r < R, other=0.0)[:, None])
                negative = negative & (s > tl.load(limit + R + r, mask=r < R, other=0.0)[:, None])
            pull, push = term_tile(s, pull_scale, pull_base, push_scale, push_base, KIND)
            push = tl.where(negative, push, 0.0)
            first += tl.sum(tl.where(positive, pull, 0.0), 1)
            second += tl.sum(push, 1)
            pulled += tl.sum(positive.to(tl.float32), 1)
            pushed += tl.sum((push > 0.0).to(tl.float32), 1)
    tl.store(sums + r, first, mask=r < R)
    tl.store(sums + R + r, second, mask=r < R)
    tl.store(sums + 2 * R + r, pulled, mask=r < R)
    tl.store(sums + 3 * R + r, pushed, mask=r < R)


@jit
def _side(g, s, positive, negative, pull, push, limit, grad, n, at, mask, ROWS: tl.constexpr, MINED: tl.constexpr):
    """Add to g what the pairs of a tile give to the rows, which lie along its first axis or along its second."""
    pull_grad, push_grad = tl.load(grad + at, mask=mask, other=0.0), tl.load(grad + n + at, mask=mask, other=0.0)
    if MINED:
        below, above = tl.load(limit + at, mask=mask, other=0.0), tl.load(limit + n + at, mask=mask, other=0.0)
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
    owner, other, owner_is, other_is, owner_limit, other_limit, owner_grad, other_grad, out, n, m, D,
    pull_scale, pull_base, push_scale, push_base,
    KIND: tl.constexpr, MIXED: tl.constexpr, MINED: tl.constexpr, AS_ROW: tl.constexpr, AS_COLUMN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # A program owns BM vectors of one side, BD of their elements: out = g other, with g (BM, BN) of each tile. The
    # owners are rows (dx), columns (dv), or both at once where the two sides are the same vectors.
    o = tl.program_id(0) * BM + tl.arange(0, BM)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    total = tl.zeros((BM, BD), tl.float32)
    for start in range(0, m, BN):
        t = start + tl.arange(0, BN)
        s = similarities(owner, other, o, t, n, m, D, BM, BN, BK, PRECISION)
        inside = (o < n)[:, None] & (t < m)[None, :]
        positive, negative = _pair_masks(owner_is, other_is, inside, n, m, o, t, MIXED)
        pull, push = slope_tile(s, pull_scale, pull_base, push_scale, push_base, KIND)
        g = tl.zeros((BM, BN), tl.float32)
        if AS_ROW:
            g = _side(g, s, positive, negative, pull, push, owner_limit, owner_grad, n, o, o < n, True, MINED)
        if AS_COLUMN:
            g = _side(g, s, positive, negative, pull, push, other_limit, other_grad, m, t, t < m, False, MINED)
        vectors = tl.load(other + t.to(tl.int64)[:, None] * D + d[None, :], mask=(t < m)[:, None] & (d < D)[None, :], other=0.0)
        total = tl.dot(g.to(vectors.dtype), vectors, total, input_precision=PRECISION)
    at = o.to(tl.int64)[:, None] * D + d[None, :]
    tl.store(out + at, total, mask=(o < n)[:, None] & (d < D)[None, :])


# Products of float32 vectors: see the table at the top. "tf32x3" splits each factor in two and multiplies three times.
PRECISION = "tf32x3"
# Block sizes without spills on sm80, sm90 and sm100 by the ahead-of-time reports; not timed. Of float32, else of 16 bits.
LAUNCH = dict(num_warps=8, num_stages=2)
WIDTH = 64  # D is padded to a multiple of this, the largest BK
SUMS = (dict(BM=32, BN=64, BK=32), dict(BM=64, BN=32, BK=64))
GRADIENT = (dict(BM=32, BN=32, BK=32, BD=256), dict(BM=64, BN=32, BK=64, BD=256))


def _packed(*tensors, dtype):
    return torch.stack([tensor.to(dtype) for tensor in tensors])


def _limits(rows, x):
    if rows.below is None:
        return x  # never read
    return _packed(rows.below, rows.above, dtype=torch.float32)


def _triton_sums(x, v, rows, columns, rho, mixed):
    sums = torch.empty(4, len(x), dtype=torch.float32, device=x.device)
    x, v = padded(x, WIDTH), padded(v, WIDTH)
    blocks = SUMS[x.dtype != torch.float32]
    _sums[(triton.cdiv(len(x), blocks["BM"]),)](
        x, v, _packed(*rows[:2], dtype=torch.int64), _packed(*columns, dtype=torch.int64), _limits(rows, x), sums,
        len(x), len(v), x.shape[1], *rho[1:],
        KIND=rho.kind, MIXED=mixed, MINED=rows.below is not None, PRECISION=PRECISION, **blocks, **LAUNCH,
    )  # fmt: skip
    return sums


def _triton_gradients(x, v, rows, columns, rho, mixed, pull_grad, push_grad):
    """dx and dv; if v is None, the columns are x itself, and dx is the whole gradient."""
    width, symmetric = x.shape[1], v is None
    x, v = padded(x, WIDTH), padded(x if v is None else v, WIDTH)
    row, column = _packed(*rows[:2], dtype=torch.int64), _packed(*columns, dtype=torch.int64)
    limit, grad = _limits(rows, x), _packed(pull_grad, push_grad, dtype=torch.float32)
    unused = grad  # in place of arrays that only rows have: never read
    blocks = GRADIENT[x.dtype != torch.float32]

    def gradient(owner, other, *arguments, as_row, as_column):
        out = torch.empty(owner.shape, dtype=torch.float32, device=owner.device)
        grid = (triton.cdiv(len(owner), blocks["BM"]), triton.cdiv(owner.shape[1], blocks["BD"]))
        _gradient[grid](
            owner, other, *arguments, out, len(owner), len(other), owner.shape[1], *rho[1:],
            KIND=rho.kind, MIXED=mixed, MINED=rows.below is not None, AS_ROW=as_row, AS_COLUMN=as_column,
            PRECISION=PRECISION, **blocks, **LAUNCH,
        )  # fmt: skip
        return out[:, :width]

    if symmetric:
        return gradient(x, x, row, row, limit, limit, grad, grad, as_row=True, as_column=True), None
    dx = gradient(x, v, row, column, limit, unused, grad, unused, as_row=True, as_column=False)
    return dx, gradient(v, x, column, row, unused, limit, unused, grad, as_row=False, as_column=True)


# -------------------------------------------------------------------------------------------- in public


class _PairSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, v, rows, columns, rho, mixed):
        ctx.save_for_backward(x, v)
        ctx.rest = rows, columns, rho, mixed
        ctx.triton = _runs_triton(x)
        sums = (_triton_sums if ctx.triton else _torch_sums)(x, x if v is None else v, rows, columns, rho, mixed)
        pull, push, pulled, pushed = sums.unbind()
        ctx.mark_non_differentiable(pulled, pushed)
        return pull, push, pulled, pushed

    @staticmethod
    def backward(ctx, pull_grad, push_grad, *_):
        x, v = ctx.saved_tensors
        gradients = _triton_gradients if ctx.triton else _torch_gradients
        dx, dv = gradients(x, v, *ctx.rest, pull_grad, push_grad)
        return dx.to(x.dtype), None if dv is None else dv.to(v.dtype), None, None, None, None


def _runs_triton(x):
    return x.dtype != torch.float64 and use_triton(x)


def pair_sums(x, v, rows, columns, rho, mixed=False):
    """The sums at the top of the file: pull, push, and how many terms of each were not zero, (R,) each.

    x: (R, D) and v: (N, D), of unit length; v None: the columns are the rows. rows: Rows, columns: Columns. Differentiable
    in x and v. float32, bfloat16 or float16 with float32 sums; float64 by the PyTorch form alone.
    """
    if not _runs_triton(x) and x.dtype not in (torch.float32, torch.float64):
        x, v = x.float(), None if v is None else v.float()
    return _PairSums.apply(x, v, rows, columns, rho, mixed)


@torch.no_grad()
def extremes(x, v, rows, columns):
    """The lowest similarity to a positive and the highest to a negative, (R,) each, infinite where there is none."""
    lowest_positive, highest_negative, *_ = pair_sums(x, v, rows, columns, Rho(EXTREMES))
    return lowest_positive, highest_negative


def ahead_of_time():
    """What tests/aot.py compiles: every kernel, as it is launched."""
    cases = []
    for narrow, kind in enumerate(("*fp32", "*bf16")):
        types = dict.fromkeys(["x", "v", "owner", "other"], kind)
        types |= dict.fromkeys(["row", "column", "owner_is", "other_is"], "*i64") | dict.fromkeys("RNDnm", "i32")
        types |= dict.fromkeys(["limit", "owner_limit", "other_limit", "owner_grad", "other_grad", "sums", "out"], "*fp32")
        types |= dict.fromkeys(["pull_scale", "pull_base", "push_scale", "push_base"], "fp32")
        for KIND in (HINGE, EXPONENTIAL, EXTREMES):
            for kernel, more in (
                (_sums, SUMS[narrow] | dict(MIXED=False, MINED=KIND == EXPONENTIAL)),
                (_gradient, GRADIENT[narrow] | dict(MIXED=False, MINED=KIND == EXPONENTIAL, AS_ROW=True, AS_COLUMN=True)),
            ):
                if kernel is _gradient and KIND == EXTREMES:
                    continue
                constants = dict(KIND=KIND, PRECISION=PRECISION) | more
                used = {name: types[name] for name in kernel.arg_names if name not in constants}
                cases.append(dict(kernel=kernel, types=used, constants=constants, plain="RNnm", dot=True) | LAUNCH)
    return cases

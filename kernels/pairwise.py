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

where each tile of s is recomputed rather than stored. A program owns rows of dx or dv, and a share of the columns where
rows alone would not fill the chip; the shares are added afterwards: no atomics, the same bits every run. Vectors are
sorted by label, so most tiles hold negatives only. A tile whose highest similarity adds nothing is left at that, and
in a mixed loss a tile without positives is not even multiplied. Bytes moved are those of the vectors. Arithmetic is
2 R N D forward and 2 R N D (1 + D / BD) per gradient; bf16x3 triples it. Mining reads the limits of negatives, and then
sums positives, from the tiles that hold positives.

float32 vectors are multiplied as bf16x3: parts hi + lo in bfloat16, without lo lo. The plain form multiplies in fp32.

Precision, measured by rounding the operands of every product, forward and backward, as the kernels do (1,000 embeddings
in classes of 5, D = 512, the worst of three draws; relative error against float64 of the loss, and of the gradient in
norm; "tight": all similarities about 0.98, where distances lose digits):

    product   contrastive        multi-similarity   proxy-anchor       contrastive, tight
    fp32      9e-8   1e-7        9e-8   5e-7        5e-8   4e-7        1e-7   8e-6
    bf16x3    9e-8   3e-6        1e-7   4e-6        2e-7   6e-6        2e-7   3e-5
    bf16      5e-6   2e-3        1e-5   3e-3        2e-5   4e-3        6e-6   1e-2

Shapes: R rows, N columns, D embedding size.
"""

import torch

from kernels import HINGE, slope_tile, slopes, term_tile, terms
from kernels import chip, row_chunks, jit, launch, pad_columns, product, tl, triton, use_triton

CHUNK = 2**18  # pairs at a time on a CPU: a float32 array of them stays in a core's L2 cache
ALL, LOWEST, PUSH, PULL = range(4)  # what a launch of _sums finds; the last three are the passes of mining

# ------------------------------------------------------------------------------------------ PyTorch


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
    parts = row_chunks(len(x), len(v), CHUNK, x.device)
    for r in parts:
        s, masks = pairs = _pairs(x[r], v, row[:, r], column, mixed)
        if limits is not None:
            limits[:, r] = _limits(s, masks, epsilon)
            masks = _mine(s, masks, limits[:, r], 1)
        both = terms(s, rho).mul_(masks)  # (2, rows, N)
        sums[:2, r] = both.sum(2)
        sums[2:, r] = both.gt_(0).sum(2)
    return sums, limits, pairs if len(parts) == 1 else None


def _torch_gradients(x, v, row, column, rho, limits, pairs, mixed, grad, needs):
    """dx and dv from grad (2, R) of pull and push. If v is None, the columns are x and dx is the whole gradient.

    needs: whether each is wanted.
    """
    symmetric, v = v is None, x if v is None else v
    dx, dv = torch.empty_like(x) if needs[0] else None, torch.zeros_like(v) if needs[1] else None
    for r in row_chunks(len(x), len(v), CHUNK, x.device):
        s, masks = pairs or _pairs(x[r], v, row[:, r], column, mixed)
        weights = _mine(s, masks, None if limits is None else limits[:, r], 1) * grad[:, r, None]
        if symmetric:  # s[r,c] is also s[c,r]: add what it is to row c
            weights.addcmul_(_mine(s, masks, limits, 0), grad[:, None])
        g = weights.mul_(slopes(s, rho)).sum(0)
        if needs[0]:
            dx[r] = product(g, v.T)
        if needs[1]:
            dv += product(g.T, x[r].T)
    return dx, dv


# ---------------------------------------------------------------------------------------------- Triton


@jit
def _similarities(x, v, r, c, W, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """(BM, BN) inner products of rows r of x and rows c of v, both W wide, a multiple of BK."""
    s = tl.zeros((BM, BN), tl.float32)
    k = tl.arange(0, BK)
    x += r.to(tl.int64)[:, None] * W + k[None, :]
    v += c.to(tl.int64)[None, :] * W + k[:, None]
    for _ in range(0, W, BK):
        s = tl.dot(tl.load(x), tl.load(v), s)
        x += BK
        v += BK
    return s


@jit
def _keys(keys, at, n):
    """Labels and ids of vectors."""
    return tl.load(keys + at), tl.load(keys + n + at)


@jit
def _range(keys, start, size, n):
    """Lowest and highest label of a block of vectors, which are sorted by label."""
    return tl.load(keys + start), tl.load(keys + tl.minimum(start + size, n) - 1)


@jit(do_not_specialize=["R", "N"])
def _sums(
    x, v, row, column, limits, sums, R, N, W, floor, pull_scale, pull_base, push_scale, push_base,
    KIND: tl.constexpr, MIXED: tl.constexpr, PART: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    # A program owns BM rows, and one of so many shares of the columns. Rows and columns beyond the last repeat it.
    # PART   0: pull, push and their counts      1: nothing, lowest positive
    #        2: highest negative, push mined by limits      3: pull mined by limits
    at = tl.program_id(0) * BM + tl.arange(0, BM)
    r = tl.minimum(at, R - 1)
    row_label, row_id = _keys(row, r, R)
    lowest, highest = _range(row, tl.program_id(0) * BM, BM, R)
    first = tl.full((BM,), float("-inf") if PART == 2 else 0.0, tl.float32)
    second = tl.full((BM,), float("inf") if PART == 1 else 0.0, tl.float32)
    pulled, pushed = tl.zeros((BM,), tl.float32), tl.zeros((BM,), tl.float32)
    if PART >= 2:
        limit = tl.load(limits + r)
        floor = tl.min(limit)
    for start in range(tl.program_id(1) * BN, N, tl.num_programs(1) * BN):
        c = start + tl.arange(0, BN)
        low, high = _range(column, start, BN, N)
        meet = (lowest <= high) & (low <= highest)  # otherwise all pairs are negative
        if meet | ((not MIXED) & (PART % 2 == 0)):
            s = _similarities(x, v, r, tl.minimum(c, N - 1), W, BM, BN, BK)
            label, id = _keys(column, tl.minimum(c, N - 1), N)
            real = (c < N)[None, :]
            if meet & (PART != 2):
                positive = real & (row_label[:, None] == label[None, :]) & (row_id[:, None] != id[None, :])
                if PART == 1:
                    second = tl.minimum(second, tl.min(tl.where(positive, s, float("inf")), 1))
                else:
                    if PART == 3:
                        positive = positive & (s < limit[:, None])
                    pull, push = term_tile(s, pull_scale, pull_base, push_scale, push_base, KIND)
                    first += tl.sum(tl.where(positive, pull, 0.0), 1)
                    pulled += tl.sum(positive.to(tl.float32), 1)
                    if MIXED:
                        push = tl.where(positive, push, 0.0)
                        second += tl.sum(push, 1)
                        pushed += tl.sum((push > 0.0).to(tl.float32), 1)
            if (not MIXED) & (PART % 2 == 0):
                negative = real & (row_label[:, None] != label[None, :])
                if PART == 2:
                    first = tl.maximum(first, tl.max(tl.where(negative, s, float("-inf")), 1))
                    negative = negative & (s > limit[:, None])
                if tl.max(s) > floor:
                    _, push = term_tile(s, pull_scale, pull_base, push_scale, push_base, KIND)
                    push = tl.where(negative, push, 0.0)
                    second += tl.sum(push, 1)
                    pushed += tl.sum((push > 0.0).to(tl.float32), 1)
    sums += tl.program_id(1) * 4 * R
    tl.store(sums + at, first, mask=at < R)
    tl.store(sums + R + at, second, mask=at < R)
    tl.store(sums + 2 * R + at, pulled, mask=at < R)
    tl.store(sums + 3 * R + at, pushed, mask=at < R)


@jit
def _weight(s, limits, grad, at, n, HALF: tl.constexpr, ROWS: tl.constexpr, MINED: tl.constexpr):
    """Gradient of the pull (HALF 0) or push (HALF 1) of vectors along an axis of a tile, 0 for what was not mined."""
    weight = tl.load(grad + HALF * n + at)
    weight = weight[:, None] if ROWS else weight[None, :]
    if MINED:
        limit = tl.load(limits + HALF * n + at)
        limit = limit[:, None] if ROWS else limit[None, :]
        weight = tl.where(s < limit if HALF == 0 else s > limit, weight, 0.0)
    return weight


@jit
def _weights(
    s, limits, grad, o, n, t, m,
    HALF: tl.constexpr, AS_ROW: tl.constexpr, AS_COLUMN: tl.constexpr, MINED: tl.constexpr,
):  # fmt: skip
    """What the slope of a pair is multiplied by: its owner's weight, the other's, or both."""
    weight = tl.zeros_like(s)
    if AS_ROW:
        weight += _weight(s, limits, grad, o, n, HALF, True, MINED)
    if AS_COLUMN:
        weight += _weight(s, limits, grad, t, m, HALF, False, MINED)
    return weight


@jit(do_not_specialize=["n", "m"])
def _gradient(
    owner, other, owner_keys, other_keys, limits, grad, out, n, m, D, W, floor,
    pull_scale, pull_base, push_scale, push_base,
    KIND: tl.constexpr, MIXED: tl.constexpr, MINED: tl.constexpr, AS_ROW: tl.constexpr, AS_COLUMN: tl.constexpr,
    SPLIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    # A program owns BM vectors of one side, BD of their elements, and a share of the other side: out = g other, with
    # g (BM, BN) of each tile. The owners are the rows (dx), the columns (dv), or both where the sides are the same.
    at = tl.program_id(0) * BM + tl.arange(0, BM)
    o = tl.minimum(at, n - 1)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    owner_label, owner_id = _keys(owner_keys, o, n)
    lowest, highest = _range(owner_keys, tl.program_id(0) * BM, BM, n)
    total = tl.zeros((BM, BD), tl.float32)
    for start in range(tl.program_id(2) * BN, m, tl.num_programs(2) * BN):
        t = tl.minimum(start + tl.arange(0, BN), m - 1)
        low, high = _range(other_keys, start, BN, m)
        meet = (lowest <= high) & (low <= highest)
        if meet | (not MIXED):
            s = _similarities(owner, other, o, t, W, BM, BN, BK)
            if MINED:
                floor = tl.full((), float("inf"), tl.float32)
                if AS_ROW:
                    floor = tl.minimum(floor, tl.min(tl.load(limits + n + o)))
                if AS_COLUMN:
                    floor = tl.minimum(floor, tl.min(tl.load(limits + m + t)))
            near = tl.max(s) > floor
            if meet | near:
                g = tl.zeros((BM, BN), tl.float32)
                label = tl.load(other_keys + t)
                if meet:
                    id = tl.load(other_keys + m + t)
                    weight = _weights(s, limits, grad, o, n, t, m, 0, AS_ROW, AS_COLUMN, MINED)
                    positive = (owner_label[:, None] == label[None, :]) & (owner_id[:, None] != id[None, :])
                    weight = tl.where(positive, weight, 0.0)
                    pull, push = slope_tile(s, pull_scale, pull_base, push_scale, push_base, KIND)
                    g = weight * pull
                    if MIXED:
                        weight = _weights(s, limits, grad, o, n, t, m, 1, AS_ROW, AS_COLUMN, MINED)
                        g += tl.where(positive, weight * push, 0.0)
                if not MIXED:
                    if near:
                        weight = _weights(s, limits, grad, o, n, t, m, 1, AS_ROW, AS_COLUMN, MINED)
                        weight = tl.where(owner_label[:, None] != label[None, :], weight, 0.0)
                        _, push = slope_tile(s, pull_scale, pull_base, push_scale, push_base, KIND)
                        g += weight * push
                place = other + t.to(tl.int64)[:, None] * W + d[None, :]
                real = (start + tl.arange(0, BN) < m)[:, None] & (d < D)[None, :]
                vectors = tl.load(place, mask=real, other=0.0)  # (BN, BD)
                rounded = g.to(vectors.dtype)
                total = tl.dot(rounded, vectors, total)
                if SPLIT:  # g and the vectors in two parts each; the product of the low parts is left out
                    total = tl.dot((g - rounded.to(tl.float32)).to(vectors.dtype), vectors, total)
                    total = tl.dot(rounded, tl.load(place + D, mask=real, other=0.0), total)
    out += (tl.program_id(2).to(tl.int64) * n + at.to(tl.int64)[:, None]) * D + d[None, :]
    tl.store(out, total, mask=(at < n)[:, None] & (d < D)[None, :])


# Block sizes without spills by tests/aot.py with Triton 3.8 (3.6: up to 72 bytes); not timed on a GPU.
LAUNCH = dict(num_warps=8, num_stages=3)
WIDTH = 64  # vectors are padded to a multiple of this, the largest BK
SUMS = dict(BM=128, BN=64, BK=32)
GRADIENT = dict(BM=64, BN=64, BK=64, BD=128)
HOPPER_GRADIENT = dict(BM=128, BN=64, BK=32, BD=128)
HOPPER_WIDE_GRADIENT = dict(BM=64, BN=128, BK=32, BD=256)  # of bfloat16 without mining, which needs fewer registers


def _operands(x, left):
    """Vectors in bfloat16, padded to a multiple of WIDTH. float32 ones are hi + lo, side by side: (N, 3 D).

    One product of the left [hi, hi, lo] and the right [hi, lo, hi] gives all but lo lo. Sixteen-bit ones are (N, D).
    """
    x = pad_columns(x, WIDTH)
    if x.dtype == torch.float32:
        hi = x.bfloat16()
        lo = (x - hi).bfloat16()
        x = torch.cat([hi, hi, lo] if left else [hi, lo, hi], dim=1)
    return x.float() if x.device.type == "cpu" else x  # the interpreter is exact in float32 only


def _shares(programs, columns, device):
    """Programs that share the columns of one block of rows, so that every multiprocessor has work."""
    return max(1, min(columns, -(-chip(device)[0] // programs)))


def _floor(rho):
    """Negatives up to this similarity add nothing."""
    return 1 - max(rho.push_base, 0) ** 2 / 2 - 1e-6 if rho.kind == HINGE else -float("inf")


def _triton_sums(x, v, row, column, rho, epsilon, mixed):
    """As _torch_sums."""
    left, right = _operands(x, True), _operands(v, False)
    blocks = triton.cdiv(len(x), SUMS["BM"])
    shares = _shares(blocks, triton.cdiv(len(v), SUMS["BN"]), x.device)

    def launch_sums(part, limits=None):
        out = torch.empty(shares, 4, len(x), dtype=torch.float32, device=x.device)
        launch(
            _sums, (blocks, shares), left, right, row, column, out if limits is None else limits, out,
            len(x), len(v), left.shape[1], _floor(rho), *rho[1:],
            KIND=rho.kind, MIXED=mixed, PART=part, **SUMS, **LAUNCH,
        )  # fmt: skip
        return out

    if epsilon is None:
        return launch_sums(ALL).sum(0), None, None
    above = launch_sums(LOWEST)[:, 1].amin(0) - epsilon
    pushes = launch_sums(PUSH, above)
    below = pushes[:, 0].amax(0) + epsilon
    sums = pushes.sum(0)
    sums[::2] = launch_sums(PULL, below)[:, ::2].sum(0)
    return sums, torch.stack([below, above]), None


def _triton_gradients(x, v, row, column, rho, limits, pairs, mixed, grad, needs):
    """As _torch_gradients."""
    symmetric, v = v is None, x if v is None else v
    grad, split = grad.float().contiguous(), x.dtype == torch.float32
    hopper = HOPPER_GRADIENT if split or limits is not None else HOPPER_WIDE_GRADIENT
    sizes = hopper if chip(x.device)[1] >= 9 else GRADIENT

    def gradient(owner, other, owner_keys, other_keys, as_row, as_column):
        left, right = _operands(owner, True), _operands(other, False)
        D = right.shape[1] // (3 if split else 1)
        blocks = triton.cdiv(len(owner), sizes["BM"]), triton.cdiv(D, sizes["BD"])
        shares = _shares(blocks[0] * blocks[1], triton.cdiv(len(other), sizes["BN"]), x.device)
        out = torch.empty(shares, len(owner), D, dtype=torch.float32, device=x.device)
        launch(
            _gradient, (*blocks, shares), left, right, owner_keys, other_keys,
            grad if limits is None else limits, grad, out,
            len(owner), len(other), D, left.shape[1], _floor(rho), *rho[1:],
            KIND=rho.kind, MIXED=mixed, MINED=limits is not None, AS_ROW=as_row, AS_COLUMN=as_column, SPLIT=split,
            **sizes, **LAUNCH,
        )  # fmt: skip
        return out.sum(0)[:, : x.shape[1]]

    dx = gradient(x, v, row, column, True, symmetric) if needs[0] else None
    return dx, gradient(v, x, column, row, False, True) if needs[1] else None


# ---------------------------------------------------------------------------------------------- both


class _PairSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, v, row, column, rho, epsilon, mixed):
        ctx.triton = use_triton(x, len(x) * column.shape[1])
        ctx.rest, ctx.orders = (rho, mixed), (None, None)
        if ctx.triton:  # sorted by label, positives lie in a band of tiles
            row_order = row[0].argsort(stable=True)
            x, row = x[row_order], row[:, row_order].int()
            if v is None:
                column_order, column = row_order, row
            else:
                column_order = column[0].argsort(stable=True)
                v, column = v[column_order], column[:, column_order].int()
            ctx.orders = row_order, column_order
        form = _triton_sums if ctx.triton else _torch_sums
        sums, limits, ctx.pairs = form(x, x if v is None else v, row, column, rho, epsilon, mixed)
        ctx.save_for_backward(x, v, row, column, limits)
        pull, push, pulled, pushed = _unsorted(sums.T, ctx.orders[0]).unbind(1)
        ctx.mark_non_differentiable(pulled, pushed)
        return pull, push, pulled, pushed

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, pull_grad, push_grad, *_):
        x, v, row, column, limits = ctx.saved_tensors
        (rho, mixed), (row_order, column_order) = ctx.rest, ctx.orders
        grad = torch.stack([pull_grad, push_grad])
        grad = grad if row_order is None else grad[:, row_order]
        gradients = _triton_gradients if ctx.triton else _torch_gradients
        needs = ctx.needs_input_grad[:2]
        dx, dv = gradients(x, v, row, column, rho, limits, ctx.pairs, mixed, grad, needs)
        dx = None if dx is None else _unsorted(dx, row_order).to(x.dtype)
        dv = None if dv is None else _unsorted(dv, column_order).to(v.dtype)
        return dx, dv, None, None, None, None, None


def _unsorted(rows, order):
    """Rows in the caller's order again."""
    return rows if order is None else torch.empty_like(rows).index_copy_(0, order, rows)


def pair_sums(x, v, row, column, rho, epsilon=None, mixed=False):
    """The sums at the top of the file: pull, push, and how many terms of each are not zero, (R,) each.

    x: (R, D) and v: (N, D), rows of length 1; if v is None the columns are the rows. row: (2, R) and column: (2, N),
    int64 labels and ids below 2^24. epsilon: mine pairs with this margin. Differentiable in x and v. Takes bfloat16 and
    float32, with float32 sums; float16 as float32; float64 by the PyTorch form only.
    """
    if x.dtype == torch.float16 or x.dtype == torch.bfloat16 and not use_triton(x, len(x) * column.shape[1]):
        x, v = x.float(), None if v is None else v.float()
    return _PairSums.apply(x, v, row.contiguous(), column.contiguous(), rho, epsilon, mixed)

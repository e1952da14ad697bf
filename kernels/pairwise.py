"""Pairwise losses: sums over the pairs of every anchor, without storing a large matrix of similarities.

x holds the anchors (examples or proxies), v the examples that they are compared with (clean or mixed ones). With the
similarities s = x v^T, row r gets

    pull[r] = sum of rho+(s[r, c]) over its positives c,      push[r] = sum of rho-(s[r, c]) over its negatives c,

and the numbers of terms above zero. A loss is a function of these (R,) sums; see losses.py.

Every vector has a key (group, id). In a clean loss the group is the label. A pair is positive if the groups are equal
and the ids differ. It is negative if the groups differ. In a mixed loss a positive pair enters both sums, and other
pairs enter neither.

`plain_sums` is this definition in PyTorch. The Triton kernels compute the same in tiles of similarities:

    pair_limits_kernel      highest negative and lowest positive of every row, for mining
    pair_sums_kernel        the sums; a tile is reduced as soon as it is multiplied
    pair_gradient_kernel    dx = g v and dv = g^T x; a tile of s is multiplied again and becomes g = d loss / d s

Shapes: R rows, N columns, D embedding size. In the kernels a (n, WIDTH) are the rows and b (m, WIDTH) the columns, see
`operands`. The gradient kernel runs with x as a and with v as a, but only once if they are the same.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from kernels import jit, launch, pad_columns, similarities, sm_count_and_arch, tl, triton, use_triton

EPS = 1e-12  # the least squared distance or length, because sqrt has an infinite gradient at 0
# A piece has at most this many pairs, because autograd keeps about ten arrays of them. On a CPU 2^22 would be 1.7 times
# as fast, but malloc would then hold three times the memory.
PIECE = 2**23


class Rho(NamedTuple):
    """The term of one pair with similarity s: rho+ if the pair is positive, rho- if it is negative. Kinds:

        "hinge"          rho+ = d = sqrt(2 - 2s)                      rho- = relu(push_base - d)
        "exponential"    rho+ = e^{-pull_scale (s - pull_base)}       rho- = e^{push_scale (s - push_base)}
    """

    kind: str
    pull_scale: float = 0.0
    pull_base: float = 0.0
    push_scale: float = 0.0
    push_base: float = 0.0

    def __call__(self, s):
        if self.kind == "hinge":
            d = F.threshold_(2 - 2 * s, EPS, EPS).sqrt_()  # clamped, with gradient 0 at the clamp
            return d, (self.push_base - d).relu_()
        if self.kind != "exponential":
            raise ValueError(f"rho is {self.kind!r}; choose hinge or exponential")
        return torch.exp(-self.pull_scale * (s - self.pull_base)), torch.exp(self.push_scale * (s - self.push_base))


# ------------------------------------------------------------------------------------ the definition


def plain_sums(x, v, x_keys, v_keys, rho, epsilon=None, mixed=False):
    """pull, push and the numbers of their terms above zero, (R,) each, from the whole matrix of similarities."""
    s = similarities(x, v)  # (R, N)
    same_group = x_keys[0][:, None] == v_keys[0]
    positive = same_group & (x_keys[1][:, None] != v_keys[1])
    negative = positive if mixed else ~same_group

    if epsilon is not None and len(v):  # mining compares every pair with the hardest pair of the other kind
        highest_negative = s.detach().masked_fill(~negative, -torch.inf).amax(1, keepdim=True)
        lowest_positive = s.detach().masked_fill(~positive, torch.inf).amin(1, keepdim=True)
        positive = positive & (s < highest_negative + epsilon)
        negative = negative & (s > lowest_positive - epsilon)

    return masked_sums(s, positive, negative, rho)


def masked_sums(s, positive, negative, rho):
    """Sums along the rows of similarities s: of rho+ where positive, of rho- where negative, and how many are > 0."""
    pull, push = rho(s)
    pull, push = pull * positive, push * negative
    return pull.sum(1), push.sum(1), pull.detach().sign().sum(1), push.detach().sign().sum(1)  # terms are >= 0


def in_pieces(sums, width, *rows):
    """[*sums(*rows)]. Above PIECE pairs (`width` a row), the rows are split, and the backward pass computes each piece
    again.
    """
    size = max(1, PIECE // max(width, 1))
    if len(rows[0]) <= size:
        return [*sums(*rows)]
    pieces = zip(*(tensor.split(size) for tensor in rows))
    results = [checkpoint(sums, *piece, use_reentrant=False) for piece in pieces]
    return [torch.cat(parts) for parts in zip(*results)]


def pair_sums(x, v, x_keys, v_keys, rho, epsilon=None, mixed=False):
    """The sums at the top of this file: pull, push and how many terms of each are above zero, (R,) each.

    x: (R, D) and v: (N, D), rows of length 1. x_keys: (2, R) and v_keys: (2, N), integers. epsilon: the mining margin
    of a clean loss, or None. rho: a Rho, or for PyTorch any function of s that returns rho+ and rho-, none below zero.
    Differentiable in x and v. Second derivatives exist in PyTorch only.
    """
    if isinstance(rho, Rho) and use_triton(x, len(x) * len(v)):
        return triton_pair_sums(x, v, x_keys, v_keys, rho, epsilon, mixed)
    if x.dtype in (torch.float16, torch.bfloat16):
        x, v = x.float(), v.float()

    def sums(rows, *keys):
        return plain_sums(rows, v, keys, v_keys, rho, epsilon, mixed)

    return in_pieces(sums, len(v), x, *x_keys)


# -------------------------------------------------------------------------------------- Triton: tiles


@jit
def similarity_tile(a, b, i, j, WIDTH, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """(BM, BN) inner products of rows i of a and rows j of b."""
    k = tl.arange(0, BK)
    a += i.to(tl.int64)[:, None] * WIDTH + k[None, :]
    b += j.to(tl.int64)[None, :] * WIDTH + k[:, None]
    s = tl.zeros((BM, BN), tl.float32)
    for _ in range(0, WIDTH, BK):
        s = tl.dot(tl.load(a), tl.load(b), s)
        a += BK
        b += BK
    return s


@jit
def same_group_tile(a_keys, b_keys, i, j):
    return tl.load(a_keys + i)[:, None] == tl.load(b_keys + j)[None, :]


@jit
def other_id_tile(a_keys, b_keys, i, j, n, m):
    return tl.load(a_keys + n + i)[:, None] != tl.load(b_keys + m + j)[None, :]


@jit
def rho_tile(s, pull_scale, pull_base, push_scale, push_base, KIND: tl.constexpr):
    """rho+(s) and rho-(s), as in Rho."""
    if KIND == "hinge":
        d = tl.sqrt(tl.maximum(2.0 - 2.0 * s, 1e-12))
        return d, tl.maximum(push_base - d, 0.0)
    else:
        tl.static_assert(KIND == "exponential")
        return tl.exp(-pull_scale * (s - pull_base)), tl.exp(push_scale * (s - push_base))


@jit
def slope_tile(s, pull_scale, pull_base, push_scale, push_base, KIND: tl.constexpr):
    """d rho+ / ds and d rho- / ds. The slope is 0 where the distance is clamped."""
    if KIND == "hinge":
        square = 2.0 - 2.0 * s
        slope = tl.where(square > 1e-12, -tl.rsqrt(tl.maximum(square, 1e-12)), 0.0)
        margin = tl.maximum(push_base, 0.0)
        return slope, tl.where(square < margin * margin, -slope, 0.0)  # d < margin
    else:
        pull, push = rho_tile(s, pull_scale, pull_base, push_scale, push_base, KIND)
        return -pull_scale * pull, push_scale * push


# ------------------------------------------------------------------------------------ Triton: kernels
# A program computes BM rows and walks the columns, BN at a time. If there are few rows, several programs split the
# columns, and the host combines their results. Indices beyond the last vector are clamped to it. They are masked before
# they enter a sum.


@jit(do_not_specialize=["n", "m"])
def pair_limits_kernel(
    a, b, a_keys, b_keys, out, n, m, WIDTH, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    # Each program finds the highest negative and the lowest positive similarity of BM rows. out: (programs, 2, n).
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    i = tl.minimum(rows, n - 1)
    highest_negative = tl.full((BM,), float("-inf"), tl.float32)
    lowest_positive = tl.full((BM,), float("inf"), tl.float32)

    for start in range(tl.program_id(1) * BN, m, tl.num_programs(1) * BN):
        j = tl.minimum(start + tl.arange(0, BN), m - 1)  # a repeated column changes no limit
        s = similarity_tile(a, b, i, j, WIDTH, BM, BN, BK)
        same_group = same_group_tile(a_keys, b_keys, i, j)
        positive = same_group & other_id_tile(a_keys, b_keys, i, j, n, m)

        highest_negative = tl.maximum(highest_negative, tl.max(tl.where(same_group, float("-inf"), s), 1))
        lowest_positive = tl.minimum(lowest_positive, tl.min(tl.where(positive, s, float("inf")), 1))

    out += tl.program_id(1) * 2 * n + rows
    tl.store(out, highest_negative, mask=rows < n)
    tl.store(out + n, lowest_positive, mask=rows < n)


@jit(do_not_specialize=["n", "m"])
def pair_sums_kernel(
    a, b, a_keys, b_keys, limits, reach, out, n, m, WIDTH, pull_scale, pull_base, push_scale, push_base,
    KIND: tl.constexpr, MIXED: tl.constexpr, MINED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    # Each program sums the terms of BM rows. out: (programs, 4, n): pull, push, num_pull, num_push.
    # limits, if MINED: (2, n). Row i keeps positives with s < limits[0, i] and negatives with s > limits[1, i].
    # reach: no negative with s <= reach counts.
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    i = tl.minimum(rows, n - 1)
    reach = tl.load(reach)
    pull_sum, push_sum = tl.zeros((BM,), tl.float32), tl.zeros((BM,), tl.float32)
    num_pull, num_push = tl.zeros((BM,), tl.float32), tl.zeros((BM,), tl.float32)

    for start in range(tl.program_id(1) * BN, m, tl.num_programs(1) * BN):
        columns = start + tl.arange(0, BN)
        j = tl.minimum(columns, m - 1)
        s = similarity_tile(a, b, i, j, WIDTH, BM, BN, BK)
        same_group = same_group_tile(a_keys, b_keys, i, j)

        # Skip a tile without equal groups and without s above reach, because nothing in it counts.
        if tl.max(tl.where(same_group, float("inf"), s)) > reach:
            inside = (columns < m)[None, :]
            positive = inside & same_group & other_id_tile(a_keys, b_keys, i, j, n, m)
            negative = positive if MIXED else inside & ~same_group
            if MINED:
                positive &= s < tl.load(limits + i)[:, None]
                negative &= s > tl.load(limits + n + i)[:, None]

            pull, push = rho_tile(s, pull_scale, pull_base, push_scale, push_base, KIND)
            pull, push = tl.where(positive, pull, 0.0), tl.where(negative, push, 0.0)

            pull_sum += tl.sum(pull, 1)
            push_sum += tl.sum(push, 1)
            num_pull += tl.sum((pull > 0.0).to(tl.float32), 1)
            num_push += tl.sum((push > 0.0).to(tl.float32), 1)

    out += tl.program_id(1) * 4 * n + rows
    tl.store(out, pull_sum, mask=rows < n)
    tl.store(out + n, push_sum, mask=rows < n)
    tl.store(out + 2 * n, num_pull, mask=rows < n)
    tl.store(out + 3 * n, num_push, mask=rows < n)


@jit(do_not_specialize=["n", "m"])
def pair_gradient_kernel(
    a, b, a_keys, b_keys, a_anchor, b_anchor, reach, out, n, m, D, WIDTH, pull_scale, pull_base, push_scale, push_base,
    KIND: tl.constexpr, MIXED: tl.constexpr, MINED: tl.constexpr, SPLIT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    # Each program computes BM rows and BD columns of out[i] = sum_j g[i, j] b[j], where g = d loss / d s:
    #     g[i, j] = (pull_grad[i] + pull_grad[j]) rho+'(s[i, j]) if the pair is positive
    #             + (push_grad[i] + push_grad[j]) rho-'(s[i, j]) if the pair is negative
    # There are two gradients, because i can be an anchor that sees j, and j can be an anchor that sees i.
    # a_anchor: (2, n), pull_grad and push_grad of each a; both are 0 if it is no anchor. b_anchor: (2, m) likewise.
    # If MINED, two more rows hold the limits of each anchor, and a pair counts for it only within them.
    # b, if SPLIT: the parts [high, low, high] of the vectors, with D columns each.
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    i = tl.minimum(rows, n - 1)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    reach = tl.load(reach)
    total = tl.zeros((BM, BD), tl.float32)

    for start in range(tl.program_id(2) * BN, m, tl.num_programs(2) * BN):
        columns = start + tl.arange(0, BN)
        j = tl.minimum(columns, m - 1)
        s = similarity_tile(a, b, i, j, WIDTH, BM, BN, BK)
        same_group = same_group_tile(a_keys, b_keys, i, j)

        # Skip a tile without equal groups and without s above reach, because nothing in it counts.
        if tl.max(tl.where(same_group, float("inf"), s)) > reach:
            positive = same_group & other_id_tile(a_keys, b_keys, i, j, n, m)
            negative = positive if MIXED else ~same_group

            pull_grad_i, push_grad_i = tl.load(a_anchor + i)[:, None], tl.load(a_anchor + n + i)[:, None]
            pull_grad_j, push_grad_j = tl.load(b_anchor + j)[None, :], tl.load(b_anchor + m + j)[None, :]
            if MINED:
                pull_grad_i = tl.where(s < tl.load(a_anchor + 2 * n + i)[:, None], pull_grad_i, 0.0)
                pull_grad_j = tl.where(s < tl.load(b_anchor + 2 * m + j)[None, :], pull_grad_j, 0.0)
                push_grad_i = tl.where(s > tl.load(a_anchor + 3 * n + i)[:, None], push_grad_i, 0.0)
                push_grad_j = tl.where(s > tl.load(b_anchor + 3 * m + j)[None, :], push_grad_j, 0.0)

            pull_slope, push_slope = slope_tile(s, pull_scale, pull_base, push_scale, push_base, KIND)
            g = tl.where(positive, (pull_grad_i + pull_grad_j) * pull_slope, 0.0)
            g += tl.where(negative, (push_grad_i + push_grad_j) * push_slope, 0.0)

            vectors = b + j.to(tl.int64)[:, None] * WIDTH + d[None, :]
            inside = (columns < m)[:, None]
            high = tl.load(vectors, mask=inside, other=0.0)  # (BN, BD)
            g_high = g.to(high.dtype)
            total = tl.dot(g_high, high, total)
            if SPLIT:  # g = g_high + g_low and b = high + low; their product drops low times low
                g_low = (g - g_high.to(tl.float32)).to(high.dtype)
                total = tl.dot(g_low, high, total)
                total = tl.dot(g_high, tl.load(vectors + D, mask=inside, other=0.0), total)

    out += (tl.program_id(2).to(tl.int64) * n + rows.to(tl.int64)[:, None]) * D + d[None, :]
    tl.store(out, total, mask=(rows < n)[:, None])


# ------------------------------------------------------------------------------------- Triton: launches

# The largest blocks that do not spill registers. They have not been tuned on a GPU.
LAUNCH = dict(num_warps=8, num_stages=3)
SUMS = dict(BM=128, BN=64, BK=32)
GRADIENT = dict(BM=64, BN=64, BK=64, BD=128)
HOPPER_GRADIENT = dict(BM=128, BN=64, BK=32, BD=128)


def operands(x):
    """x as the left and the right factor of a product in bfloat16, and D padded to a multiple of BD.

    float32 is split into parts high + low. [high, high, low] [high, low, high]^T is x x^T without low times low.
    """
    x = pad_columns(x, 128)
    left = right = x
    if x.dtype == torch.float32:
        high = x.bfloat16()
        low = (x - high).bfloat16()
        left, right = torch.cat([high, high, low], 1), torch.cat([high, low, high], 1)
    if x.device.type == "cpu":  # Triton's interpreter is wrong in bfloat16
        left, right = left.float(), right.float()
    return left, right, x.shape[1]


def column_shares(device, blocks, columns, size):
    """How many programs split the columns, so that every multiprocessor has work."""
    return max(1, min(triton.cdiv(columns, size), triton.cdiv(sm_count_and_arch(device)[0], max(blocks, 1))))


def triton_sums(x, v, x_keys, v_keys, rho, epsilon, mixed):
    """The sums (4, R), the limits (2, R) of mining or None, and reach: no negative with s <= reach counts."""
    (left, _, _), (_, right, _) = operands(x), operands(v)
    R, N, WIDTH = len(x), len(v), left.shape[1]
    blocks = triton.cdiv(R, SUMS["BM"])
    grid = blocks, column_shares(x.device, blocks, N, SUMS["BN"])

    limits, reach = None, torch.full((), -torch.inf, device=x.device)
    if rho.kind == "hinge":
        reach.fill_(1 - max(rho.push_base, 0) ** 2 / 2 - 1e-6)  # d < margin where s > 1 - margin^2 / 2; less rounding
    if epsilon is not None:
        out = torch.empty(grid[1], 2, R, device=x.device)
        launch(pair_limits_kernel, grid, left, right, x_keys, v_keys, out, R, N, WIDTH, **SUMS, **LAUNCH)
        limits = torch.stack([out[:, 0].amax(0) + epsilon, out[:, 1].amin(0) - epsilon])
        reach = torch.maximum(reach, limits[1].min())

    out = torch.empty(grid[1], 4, R, device=x.device)
    arguments = left, right, x_keys, v_keys, out if limits is None else limits, reach, out, R, N, WIDTH
    flags = dict(KIND=rho.kind, MIXED=mixed, MINED=limits is not None)
    launch(pair_sums_kernel, grid, *arguments, *rho[1:], **flags, **SUMS, **LAUNCH)
    nan = 0 * (x.sum() + v.sum())  # 0, or NaN if an embedding is not finite: the kernels' comparisons drop NaN
    return out.sum(0) + nan, limits, reach


def triton_gradient(a, b, a_keys, b_keys, a_anchor, b_anchor, reach, rho, mixed):
    """sum over j of g[i, j] b[j]: the gradient (n, D) of a."""
    (left, _, _), (_, right, D) = operands(a), operands(b)
    n, m, WIDTH = len(a), len(b), left.shape[1]
    sizes = HOPPER_GRADIENT if sm_count_and_arch(a.device)[1] == 9 else GRADIENT
    blocks = triton.cdiv(n, sizes["BM"]), triton.cdiv(D, sizes["BD"])
    grid = *blocks, column_shares(a.device, blocks[0] * blocks[1], m, sizes["BN"])

    out = torch.empty(grid[2], n, D, device=a.device)
    arguments = left, right, a_keys, b_keys, a_anchor, b_anchor, reach, out, n, m, D, WIDTH
    flags = dict(KIND=rho.kind, MIXED=mixed, MINED=len(a_anchor) == 4, SPLIT=a.dtype == torch.float32)
    launch(pair_gradient_kernel, grid, *arguments, *rho[1:], **flags, **sizes, **LAUNCH)
    return out.sum(0)[:, : a.shape[1]].to(a.dtype)


class TritonPairSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, v, x_keys, v_keys, rho, epsilon, mixed):
        sums, limits, reach = triton_sums(x, v, x_keys, v_keys, rho, epsilon, mixed)
        ctx.save_for_backward(x, v, x_keys, v_keys, limits, reach)
        ctx.symmetric, ctx.rho, ctx.mixed = x is v, rho, mixed
        pull, push, num_pull, num_push = sums.unbind()
        ctx.mark_non_differentiable(num_pull, num_push)
        return pull, push, num_pull, num_push

    @staticmethod
    def backward(ctx, pull_grad, push_grad, *_):
        if torch.is_grad_enabled():  # the caller has set create_graph; once_differentiable would let some zeros pass
            raise RuntimeError("the kernels have no second derivatives; set kernels.backend = 'torch'")
        x, v, x_keys, v_keys, limits, reach = ctx.saved_tensors
        anchor = torch.stack([pull_grad, push_grad]).float()
        anchor = anchor if limits is None else torch.cat([anchor, limits])
        rest = reach, ctx.rho, ctx.mixed
        if ctx.symmetric:  # every vector is an anchor, and also a column of the other anchors
            return triton_gradient(x, x, x_keys, x_keys, anchor, anchor, *rest), None, None, None, None, None, None
        column = anchor.new_zeros(len(anchor), len(v))  # columns are no anchors
        dx = triton_gradient(x, v, x_keys, v_keys, anchor, column, *rest) if ctx.needs_input_grad[0] else None
        dv = triton_gradient(v, x, v_keys, x_keys, column, anchor, *rest) if ctx.needs_input_grad[1] else None
        return dx, dv, None, None, None, None, None


def triton_pair_sums(x, v, x_keys, v_keys, rho, epsilon, mixed):
    """pair_sums in Triton. It sorts by group, because positive pairs then fall into few tiles."""
    symmetric = x is v
    if x.dtype == torch.float16:  # its gradients underflow
        x, v = x.float(), v.float()
    groups = torch.cat([x_keys[0], v_keys[0]]).unique(return_inverse=True)[1]  # renumbered to fit 32 bits
    x_groups, v_groups = groups.split([len(x), len(v)])
    rows, columns = x_groups.argsort(stable=True), v_groups.argsort(stable=True)

    x_keys = torch.stack([x_groups, x_keys[1]])[:, rows].int()
    v_keys = torch.stack([v_groups, v_keys[1]])[:, columns].int()
    x = x[rows]
    v = x if symmetric else v[columns]
    sums = TritonPairSums.apply(x, v, x_keys, v_keys, rho, epsilon, mixed)
    return [part[rows.argsort()] for part in sums]

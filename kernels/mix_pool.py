"""Mix pairs of feature maps and pool the result, without storing a mixed map.

For bank pair k = (i, j) and channel c, with s running over the h*w positions,

    pooled[k,c] = mean_s m[s] + max_s m[s],      m[s] = lam*F[i,c,s] + (1-lam)*F[j,c,s].

The mean commutes with mixing. The maximum does not: a running maximum walks the positions, and the first position wins
a tie. Backward needs no maps: lam*g and (1-lam)*g go to the position of the maximum, saved in one byte, and the mean's
share goes to all positions alike.

Bytes, with e bytes a feature: forward reads e*B*C*S and writes (e+1)*M*C; backward reads the latter once for each image
of a pair and writes the former. At M = 9,500, C = 2,048, S = 49 in bfloat16 that is 20 and 58 MB; the mixed maps would
be 1.9 GB. Arithmetic is float32, or float64 for float64 features.

Shapes: B images, C channels, S = h*w positions, M pairs, K pairs of one chunk.
"""

import torch

from kernels import row_chunks, jit, launch, tl, triton, use_triton

CHUNK = 2**17  # values (pairs x channels) at a time on a CPU: five float32 arrays of them stay in a core's L2 cache

# ------------------------------------------------------------------------------------------- PyTorch


def torch_forward(features, i, j, lam, in_order=False):
    """pooled (M, C), and argmax (M, C) as bytes: the first position of the maximum."""
    maps = features.flatten(2).permute(2, 0, 1).contiguous().to(_compute_type(features))  # (S, B, C)
    mean = maps.mean(0)  # (B, C)
    pooled = features.new_empty(len(i), features.shape[1])  # (M, C)
    argmax = torch.empty(pooled.shape, dtype=torch.uint8, device=features.device)
    first, second = lam * maps, (1 - lam) * maps
    for k in row_chunks(*pooled.shape, CHUNK, pooled.device):
        largest, position = _max_of_sum(first, second, i[k], j[k])
        pooled[k] = largest + lam * mean[i[k]] + (1 - lam) * mean[j[k]]
        argmax[k] = position
    return pooled, argmax


def torch_backward(grad, argmax, i, j, lam, shape):
    """The gradient of features (B, C, h, w) from that of pooled (M, C)."""
    B, C, h, w = shape
    mean_grad = grad.new_zeros(B, C, dtype=_compute_type(grad))
    features_grad = grad.new_zeros(h * w, B, C, dtype=_compute_type(grad))
    flat, channel = features_grad.view(-1), torch.arange(C, device=grad.device)
    for k in row_chunks(*grad.shape, CHUNK, grad.device):
        place = argmax[k].long() * (B * C) + channel  # (K, C)
        for image, weight in ((i[k], lam), (j[k], 1 - lam)):
            share = weight * grad[k].to(_compute_type(grad))  # (K, C)
            mean_grad.index_add_(0, image, share)
            flat.scatter_add_(0, (place + image[:, None] * C).view(-1), share.view(-1))
    features_grad += mean_grad / (h * w)
    return features_grad.to(grad.dtype).permute(1, 2, 0).unflatten(2, (h, w))


def _compute_type(x):
    """At least float32: in bfloat16 different maxima would tie, and sums of many small shares would lose them."""
    return torch.promote_types(x.dtype, torch.float32)


def _max_of_sum(first, second, i, j):
    """max_s first[s,i] + second[s,j] and the first s that attains it, both (K, C).

    Positions are floats too: on a CPU a float compare-and-keep is many times faster than a masked write.
    """
    largest = first[0, i] + second[0, j]  # (K, C)
    position = torch.zeros_like(largest)
    mixed, other, higher = torch.empty_like(largest), torch.empty_like(largest), torch.empty_like(largest)
    for s in range(1, len(first)):
        torch.index_select(first[s], 0, i, out=mixed)
        mixed += torch.index_select(second[s], 0, j, out=other)
        torch.gt(mixed, largest, out=higher)  # 1.0 where s takes over, else 0.0
        torch.maximum(largest, mixed, out=largest)
        torch.maximum(position, higher.mul_(s), out=position)  # s grows, so a takeover is a maximum as well
    return largest, position


# -------------------------------------------------------------------------------------------- Triton

# Block sizes by the reports of tests/aot.py and instruction counts (sm_90); not timed on a GPU.
FORWARD = dict(BI=8, BJ=8, BC=64)  # with 4 warps: 32 values a thread, in 128 registers


def _backward_blocks(S):
    BS = triton.next_power_of_2(S)
    return dict(BS=BS, BC=min(128, 8192 // BS))  # with 4 warps: at most 64 values a thread, in 100 to 155 registers


def _warps(C):
    return 4 if C % 16 == 0 else 8  # unaligned rows need one address per channel: 8 warps spread them, 4 would spill


@jit
def _forward(
    maps, order, start, pooled, argmax, lam, rest, B, S, C, BI: tl.constexpr, BJ: tl.constexpr, BC: tl.constexpr
):
    # A program owns all pairs of BI first images with BJ second images, in BC channels. The bank is nearly the full
    # grid of images, so a block reads 1/BI + 1/BJ features a value, where a program per pair would read 2: at the sizes
    # above 0.5 GB from the L2 cache, which holds the maps, instead of 3.8. order[start[i*B+j] : start[i*B+j+1]] are the
    # rows of pair (i, j): usually one, but a list may omit or repeat pairs.
    across = tl.cdiv(B, BJ)
    i = tl.program_id(0) // across * BI + tl.arange(0, BI)
    j = tl.program_id(0) % across * BJ + tl.arange(0, BJ)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    real_pair = (i < B)[:, None] & (j < B)[None, :]
    pair = i[:, None].to(tl.int64) * B + j[None, :]
    begin = tl.load(start + pair, mask=real_pair, other=0)
    count = tl.load(start + pair + 1, mask=real_pair, other=0) - begin
    most = tl.max(count)
    if most == 0:
        return

    of_i = maps + i[:, None].to(tl.int64) * S * C + c[None, :]
    of_j = maps + j[:, None].to(tl.int64) * S * C + c[None, :]
    real_i = (i < B)[:, None] & (c < C)[None, :]
    real_j = (j < B)[:, None] & (c < C)[None, :]
    sum_i = tl.zeros((BI, BC), tl.float32)
    sum_j = tl.zeros((BJ, BC), tl.float32)
    largest = tl.full((BI, BJ, BC), float("-inf"), tl.float32)
    position = tl.zeros((BI, BJ, BC), tl.int32)
    for s in range(S):
        first = lam * tl.load(of_i + s * C, mask=real_i, other=0).to(tl.float32)
        second = rest * tl.load(of_j + s * C, mask=real_j, other=0).to(tl.float32)
        sum_i += first
        sum_j += second
        mixed = first[:, None, :] + second[None, :, :]
        higher = mixed > largest  # strictly, so that the first position wins a tie
        largest = tl.where(higher, mixed, largest)
        position = tl.where(higher, s, position)

    value = largest + (sum_i / S)[:, None, :] + (sum_j / S)[None, :, :]
    for n in range(most):
        valid = n < count
        row = tl.load(order + begin + n, mask=valid, other=0).to(tl.int64)
        place = row[:, :, None] * C + c[None, None, :]
        real = valid[:, :, None] & (c < C)[None, None, :]
        tl.store(pooled + place, value, mask=real)
        tl.store(argmax + place, position, mask=real)


def triton_forward(features, i, j, lam, in_order=False):
    """As torch_forward."""
    B, C, h, w = features.shape
    # Channels last, as the trunk computes them on a GPU. Other layouts are copied: cheaper than strided reads.
    maps = features.flatten(2).permute(0, 2, 1).contiguous()  # (B, S, C)
    pooled = features.new_empty(len(i), C)
    argmax = torch.empty(pooled.shape, dtype=torch.uint8, device=features.device)
    order, start = _grouped(i * B + j, B * B, in_order)
    grid = (triton.cdiv(B, FORWARD["BI"]) * triton.cdiv(B, FORWARD["BJ"]), triton.cdiv(C, FORWARD["BC"]))
    options = dict(num_warps=_warps(C), enable_fp_fusion=False)  # rounds as PyTorch does: the same position wins
    launch(_forward, grid, maps, order, start, pooled, argmax, lam, 1 - lam, B, h * w, C, **FORWARD, **options)
    return pooled, argmax


@jit
def _backward(grad, argmax, order, start, maps_grad, lam, rest, M, S, C, BS: tl.constexpr, BC: tl.constexpr):
    # A program owns the gradient of one image's map in BC channels, at all positions. It walks the image's pairs in a
    # fixed order, order[start[b] : start[b+1]]: k if the image is first in pair k, M + k if second. With w_k = lam or
    # 1-lam,
    #     d loss / d F[b,c,s] = sum_k w_k g[k,c] ([s = argmax[k,c]] + 1/S).
    b = tl.program_id(0)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    s = tl.arange(0, BS)
    at_max = tl.zeros((BS, BC), tl.float32)
    total = tl.zeros((BC,), tl.float32)
    for n in tl.range(tl.load(start + b), tl.load(start + b + 1), num_stages=3):  # loads run ahead
        entry = tl.load(order + n)
        k = tl.where(entry < M, entry, entry - M).to(tl.int64)
        g = tl.where(entry < M, lam, rest) * tl.load(grad + k * C + c, mask=c < C, other=0).to(tl.float32)
        position = tl.load(argmax + k * C + c, mask=c < C, other=0)
        # Select between sums rather than add a selection: one instruction less a value.
        at_max = tl.where(s[:, None] == position[None, :], at_max + g[None, :], at_max)
        total += g
    place = (b.to(tl.int64) * S + s[:, None]) * C + c[None, :]
    tl.store(maps_grad + place, at_max + (total / S)[None, :], mask=(s < S)[:, None] & (c < C)[None, :])


def triton_backward(grad, argmax, i, j, lam, shape):
    """As torch_backward, and the same bits every time."""
    B, C, h, w = shape
    maps_grad = grad.new_empty(B, h * w, C)
    order, start = _grouped(torch.cat([i, j]), B)
    blocks, options = _backward_blocks(h * w), dict(num_warps=_warps(C), enable_fp_fusion=False)
    args = (grad.contiguous(), argmax, order, start, maps_grad, lam, 1 - lam, len(i), h * w, C)
    launch(_backward, (B, triton.cdiv(C, blocks["BC"])), *args, **blocks, **options)
    return maps_grad.permute(0, 2, 1).unflatten(2, (h, w))


def _grouped(key, groups, in_order=False):
    """The order that sorts the keys, and where the run of each key in 0 .. groups-1 starts and the last one ends.

    int32 (there are fewer than 2**30 pairs) leaves registers for a fourth program per multiprocessor.
    """
    key, order = (key, torch.arange(len(key), device=key.device)) if in_order else key.sort(stable=True)
    return order.int(), torch.searchsorted(key, torch.arange(groups + 1, device=key.device), out_int32=True)


# ---------------------------------------------------------------------------------------------- both


class _MixPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features, i, j, lam, in_order):
        ctx.triton = use_triton(features, len(i) * features[0].numel())
        pooled, argmax = (triton_forward if ctx.triton else torch_forward)(features, i, j, lam, in_order)
        ctx.save_for_backward(i, j, argmax)
        ctx.lam, ctx.shape = lam, features.shape
        return pooled

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        i, j, argmax = ctx.saved_tensors
        backward = triton_backward if ctx.triton else torch_backward
        return backward(grad, argmax, i, j, ctx.lam, ctx.shape), None, None, None, None


def mix_pool(features, i, j, lam, in_order=False):
    """Pooled mixes of feature maps: (average + max pool)(lam*features[i] + (1-lam)*features[j]).

    features: (B, C, h, w), at most 256 positions; i, j: int64 (M,); lam: float. Returns (M, C).
    in_order: the pairs are sorted by i, then j, as those of a bank are, which saves a sort.
    Differentiable in features. A tied maximum gives its gradient to the first position, as `max(dim)` does.
    """
    if features.shape[2:].numel() > 256:
        raise ValueError(f"feature maps of {tuple(features.shape[2:])} have more than 256 positions")
    return _MixPool.apply(features, i, j, lam, in_order)

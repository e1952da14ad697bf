"""Mix pairs of feature maps and pool the result, without storing a mixed map.

For bank pair k = (i, j) and channel c, with s running over the h*w positions,

    pooled[k,c] = mean_s m[s] + max_s m[s],      m[s] = lam*F[i,c,s] + (1-lam)*F[j,c,s].

The mean commutes with mixing. The maximum does not, so a running maximum walks the positions and remembers where it was
found. The gradient needs nothing else. With w_k = lam where image b is first in pair k, and 1-lam where it is second,

    d loss / d F[b,c,s] = sum_k w_k g[k,c] ([s = argmax[k,c]] + 1/S),      g[k,c] = d loss / d pooled[k,c].

Arithmetic is float32, or float64 for float64 features. At a tie the first position is the maximum.

Shapes: B images, C channels, S = h*w positions, M pairs, K pairs of one chunk.
"""

import torch

from kernels import jit, launch, row_chunks, tl, triton, use_triton

CHUNK = 2**17  # values (pairs x channels) at a time on a CPU, because five float32 arrays of them stay in a cache

# ------------------------------------------------------------------------------------------- PyTorch


def plain_forward(features, i, j, lam):
    """pooled (M, C), and the positions of the maxima (M, C) as bytes."""
    maps = features.flatten(2).permute(2, 0, 1).contiguous().to(compute_type(features))  # (S, B, C)
    mean = maps.mean(0)  # (B, C)
    first, second = lam * maps, (1 - lam) * maps
    pooled = features.new_empty(len(i), features.shape[1])  # (M, C)
    argmax = torch.empty_like(pooled, dtype=torch.uint8)
    for k in row_chunks(*pooled.shape, CHUNK, pooled.device):
        largest, argmax[k] = max_of_sum(first, second, i[k], j[k])
        pooled[k] = largest + lam * mean[i[k]] + (1 - lam) * mean[j[k]]
    return pooled, argmax


def max_of_sum(first, second, i, j):
    """max_s first[s,i] + second[s,j] and the first s that attains it, both (K, C)."""
    largest = first[0, i] + second[0, j]
    position = torch.zeros_like(largest)  # as floats, because their maximum is much faster than a masked write
    mixed, other, higher = torch.empty_like(largest), torch.empty_like(largest), torch.empty_like(largest)
    for s in range(1, len(first)):
        torch.index_select(first[s], 0, i, out=mixed)
        mixed += torch.index_select(second[s], 0, j, out=other)
        torch.gt(mixed, largest, out=higher)  # 1.0 or 0.0
        torch.maximum(largest, mixed, out=largest)
        torch.maximum(position, higher.mul_(s), out=position)  # s only grows, so the latest s is the maximum
    return largest, position


def plain_backward(grad, argmax, i, j, lam, shape):
    """The gradient of features (B, C, h, w) from grad, that of pooled (M, C)."""
    B, C, h, w = shape
    at_max = grad.new_zeros(h * w, B, C, dtype=compute_type(grad))
    total = grad.new_zeros(B, C, dtype=compute_type(grad))
    channel = torch.arange(C, device=grad.device)
    for k in row_chunks(*grad.shape, CHUNK, grad.device):
        place = argmax[k].long() * (B * C) + channel  # (K, C)
        for image, weight in ((i[k], lam), (j[k], 1 - lam)):
            share = weight * grad[k].to(total.dtype)  # (K, C)
            at_max.view(-1).scatter_add_(0, (place + image[:, None] * C).view(-1), share.view(-1))
            total.index_add_(0, image, share)
    features_grad = at_max.add_(total / (h * w)).to(grad.dtype)  # (S, B, C)
    return features_grad.permute(1, 2, 0).unflatten(2, (h, w))


def compute_type(x):
    """At least float32, because bfloat16 would create ties and lose small addends."""
    return torch.promote_types(x.dtype, torch.float32)


# -------------------------------------------------------------------------------------------- Triton

BLOCK = dict(BI=8, BJ=8, BC=64)  # chosen so that nothing spills; not tuned


def options(C):
    """More warps where rows are not aligned, because these need more registers. A mix rounds as in PyTorch."""
    return dict(num_warps=4 if C % 16 == 0 else 8, enable_fp_fusion=False)


def csr(key, groups):
    """Indices and row pointers: order[start[n] : start[n + 1]] are where key equals n, for n < groups."""
    key, order = key.sort(stable=True)
    # int32 saves registers
    return order.int(), torch.searchsorted(key, torch.arange(groups + 1, device=key.device), out_int32=True)


@jit
def mix_pool_kernel(
    maps, order, start, pooled, argmax, lam_i, lam_j, B, S, C, BI: tl.constexpr, BJ: tl.constexpr, BC: tl.constexpr
):
    # One program computes all pairs of BI first and BJ second images, in BC channels. A bank has nearly every pair of
    # images, so a program loads each map once for several pairs.
    across = tl.cdiv(B, BJ)
    i = tl.program_id(0) // across * BI + tl.arange(0, BI)
    j = tl.program_id(0) % across * BJ + tl.arange(0, BJ)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    in_i, in_j, in_c = i < B, j < B, c < C

    # The rows of (i, j) in the bank are order[begin : begin + count]. A bank may omit or repeat a pair.
    pair = i[:, None].to(tl.int64) * B + j[None, :]
    in_pair = in_i[:, None] & in_j[None, :]
    begin = tl.load(start + pair, mask=in_pair, other=0)
    count = tl.load(start + pair + 1, mask=in_pair, other=0) - begin
    most = tl.max(count)
    if most == 0:
        return

    of_i = maps + i[:, None].to(tl.int64) * S * C + c[None, :]
    of_j = maps + j[:, None].to(tl.int64) * S * C + c[None, :]
    mask_i = in_i[:, None] & in_c[None, :]
    mask_j = in_j[:, None] & in_c[None, :]

    sum_i = tl.zeros((BI, BC), tl.float32)
    sum_j = tl.zeros((BJ, BC), tl.float32)
    largest = tl.full((BI, BJ, BC), float("-inf"), tl.float32)
    position = tl.zeros((BI, BJ, BC), tl.int32)

    for s in range(S):
        first = lam_i * tl.load(of_i + s * C, mask=mask_i).to(tl.float32)
        second = lam_j * tl.load(of_j + s * C, mask=mask_j).to(tl.float32)
        sum_i += first
        sum_j += second

        mixed = first[:, None, :] + second[None, :, :]
        higher = mixed > largest  # strictly, so that the first position wins a tie
        largest = tl.where(higher, mixed, largest)
        position = tl.where(higher, s, position)

    value = largest + (sum_i / S)[:, None, :] + (sum_j / S)[None, :, :]
    for n in range(most):
        k = tl.load(order + begin + n, mask=n < count).to(tl.int64)
        place = k[:, :, None] * C + c[None, None, :]
        mask = (n < count)[:, :, None] & in_c[None, None, :]
        tl.store(pooled + place, value, mask=mask)
        tl.store(argmax + place, position, mask=mask)


def triton_forward(features, i, j, lam):
    """As plain_forward."""
    B, C, h, w = features.shape
    maps = features.flatten(2).permute(0, 2, 1).contiguous()  # (B, S, C), no copy if the features are channels-last
    pooled = features.new_empty(len(i), C)
    argmax = torch.empty_like(pooled, dtype=torch.uint8)
    order, start = csr(i * B + j, B * B)
    grid = (triton.cdiv(B, BLOCK["BI"]) * triton.cdiv(B, BLOCK["BJ"]), triton.cdiv(C, BLOCK["BC"]))
    arguments = (maps, order, start, pooled, argmax, lam, 1 - lam, B, h * w, C)
    launch(mix_pool_kernel, grid, *arguments, **BLOCK, **options(C))
    return pooled, argmax


@jit
def mix_pool_gradient_kernel(
    grad, argmax, order, start, features_grad, lam_i, lam_j, M, S, C, BS: tl.constexpr, BC: tl.constexpr
):
    # One program computes the gradient of one map in BC channels, at all positions. It walks the pairs k of image b:
    #     features_grad[b,c,s] = sum_k w_k g[k,c] [s = argmax[k,c]] + (sum_k w_k g[k,c]) / S
    b = tl.program_id(0)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    s = tl.arange(0, BS)
    in_c = c < C
    at_max = tl.zeros((BS, BC), tl.float32)
    total = tl.zeros((BC,), tl.float32)

    # An entry below M is a pair that has image b first. The others have it second.
    for n in tl.range(tl.load(start + b), tl.load(start + b + 1), num_stages=3):
        entry = tl.load(order + n)
        k = tl.where(entry < M, entry, entry - M).to(tl.int64)
        g = tl.where(entry < M, lam_i, lam_j) * tl.load(grad + k * C + c, mask=in_c).to(tl.float32)
        position = tl.load(argmax + k * C + c, mask=in_c)

        at_max = tl.where(s[:, None] == position[None, :], at_max + g[None, :], at_max)
        total += g

    place = (b.to(tl.int64) * S + s[:, None]) * C + c[None, :]
    tl.store(features_grad + place, at_max + (total / S)[None, :], mask=(s < S)[:, None] & in_c[None, :])


def triton_backward(grad, argmax, i, j, lam, shape):
    """As plain_backward. No sum is atomic, so two runs give the same bits."""
    B, C, h, w = shape
    features_grad = grad.new_empty(B, h * w, C)
    order, start = csr(torch.cat([i, j]), B)
    BS = triton.next_power_of_2(h * w)
    BC = min(128, 8192 // BS)
    arguments = (grad, argmax, order, start, features_grad, lam, 1 - lam, len(i), h * w, C)
    launch(mix_pool_gradient_kernel, (B, triton.cdiv(C, BC)), *arguments, BS=BS, BC=BC, **options(C))
    return features_grad.permute(0, 2, 1).unflatten(2, (h, w))


# ---------------------------------------------------------------------------------------------- both


class MixPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features, i, j, lam):
        ctx.triton = use_triton(features, len(i) * features[0].numel())
        pooled, argmax = (triton_forward if ctx.triton else plain_forward)(features, i, j, lam)
        ctx.save_for_backward(i, j, argmax)
        ctx.lam, ctx.shape = lam, features.shape
        return pooled

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        i, j, argmax = ctx.saved_tensors
        backward = triton_backward if ctx.triton else plain_backward
        return backward(grad.contiguous(), argmax, i, j, ctx.lam, ctx.shape), None, None, None


def mix_pool(features, i, j, lam):
    """Pooled mixes of feature maps: (average + max pool)(lam*features[i] + (1-lam)*features[j]).

    features: (B, C, h, w), at most 256 positions; i, j: int64 (M,); lam: float. Returns (M, C).
    Differentiable once, in features.
    """
    h, w = features.shape[2:]
    if h * w > 256:  # a position is saved in one byte
        raise ValueError(
            f"feature maps of {h} x {w} have more than 256 positions, too many to mix; "
            "use --image-size 512 or less, or another mode than feature"
        )
    return MixPool.apply(features, i, j, lam)

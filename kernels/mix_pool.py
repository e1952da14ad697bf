"""Mix pairs of feature maps and pool the result, without ever holding a mixed map.

For bank pair k = (i, j) and channel c, with s running over the h*w positions,

    pooled[k,c] = mean_s m[s] + max_s m[s],      m[s] = lam*F[i,c,s] + (1-lam)*F[j,c,s].

The mean commutes with mixing, so each image is averaged once. The maximum does not: it is taken by walking the
positions with a running best over a chunk of pairs that stays in cache. Written naively the mixed maps are
M*C*h*w floats; here the most that is held is the result, and one byte a value for where its maximum lies.
The backward pass needs no maps at all: lam*g and (1-lam)*g go to that position, the mean's share to all alike.

Shapes: B images, C channels, S = h*w positions, M pairs, K pairs of one chunk.
"""

import torch

CHUNK = 2**17  # values (pairs x channels) at a time; the five float arrays in use then stay in a core's L2 cache


def mix_pool(features, i, j, lam):
    """Pooled mixes of feature maps: (average + max pool)(lam*features[i] + (1-lam)*features[j]).

    features: (B, C, h, w), at most 256 positions; i, j: int64 (M,); lam: float. Returns (M, C).
    Differentiable in features; a tied maximum gives its gradient to the first position, as `max(dim)` does.
    """
    if features.shape[2:].numel() > 256:
        raise ValueError(f"feature maps of {tuple(features.shape[2:])} have more than 256 positions")
    return _MixPool.apply(features, i, j, lam)


class _MixPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features, i, j, lam):
        maps = features.flatten(2).permute(2, 0, 1).contiguous()  # (S, B, C)
        mean = maps.mean(0)  # (B, C)
        pooled = features.new_empty(len(i), features.shape[1])  # (M, C)
        argmax = torch.empty(pooled.shape, dtype=torch.uint8, device=features.device)
        first, second = lam * maps, (1 - lam) * maps
        for k in _chunks(pooled):
            largest, position = _max_of_sum(first, second, i[k], j[k])
            pooled[k] = largest + lam * mean[i[k]] + (1 - lam) * mean[j[k]]
            argmax[k] = position
        ctx.save_for_backward(i, j, argmax)
        ctx.lam, ctx.shape = lam, features.shape
        return pooled

    @staticmethod
    def backward(ctx, grad):
        i, j, argmax = ctx.saved_tensors
        (B, C, h, w), lam = ctx.shape, ctx.lam
        mean_grad = grad.new_zeros(B, C).index_add_(0, i, grad, alpha=lam).index_add_(0, j, grad, alpha=1 - lam)
        features_grad = (mean_grad / (h * w)).expand(h * w, B, C).contiguous()  # (S, B, C)
        flat, channel = features_grad.view(-1), torch.arange(C, device=grad.device)
        for k in _chunks(grad):
            place = argmax[k].long() * (B * C) + channel  # (K, C)
            flat.scatter_add_(0, (place + i[k, None] * C).view(-1), (lam * grad[k]).view(-1))
            flat.scatter_add_(0, (place + j[k, None] * C).view(-1), ((1 - lam) * grad[k]).view(-1))
        return features_grad.permute(1, 2, 0).unflatten(2, (h, w)), None, None, None


def _chunks(rows):
    step = max(1, CHUNK // rows.shape[1])
    return [slice(start, start + step) for start in range(0, len(rows), step)]


def _max_of_sum(first, second, i, j):
    """max_s first[s,i] + second[s,j] and the first s that attains it, both (K, C).

    All in floating point, positions too: a float compare-and-keep runs many times faster on a CPU than a masked write.
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

"""The k nearest gallery items of each query, exactly, without storing their similarities.

A similarity and an index make one int64 *key*: the bits of the float, flipped to sort as an integer, above the inverted
index. The k largest keys then are the k nearest items, the nearest first, ties to the lowest index, and no two are equal.

Both forms stream: a tile of keys at a time updates the k best so far. The Triton form has programs that own some
queries and a share of the gallery each and hold their best in registers, unsorted. While a key of the tile exceeds the
k-th best of its query, the largest such key takes its place; that is rare once the first tiles are through, about
k log(G/k) times a query. PyTorch sorts the best of the shares, where that is a matter of Q x k.

Similarities are float32 products ('ieee'); items nearer to each other than their rounding come in either order.
Shapes: Q queries, G gallery items, D embedding size.
"""

import torch

from kernels import TILE, jit, padded, product, similarities, slices, tl, use_triton

LARGEST = 128  # k in the Triton form
LOWEST = -(2**63)
INDEX = 2**32 - 1


def _tiled(query, gallery, k, exclude_self):
    """The k largest keys, (Q, k), descending."""
    result = torch.empty(len(query), k, dtype=torch.int64, device=query.device)
    for rows in slices(0, len(query), TILE):
        best = result.new_empty(len(result[rows]), 0)
        for cols in slices(0, len(gallery), max(k, TILE)):
            sim = product(query[rows].float(), gallery[cols].float()) + 0.0  # no negative zero, which would sort lower
            bits = sim.view(torch.int32)
            index = torch.arange(cols.start, cols.stop, device=sim.device)
            key = (torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long() << 32) + (INDEX - index)
            if exclude_self:
                key.masked_fill_(index == torch.arange(rows.start, rows.stop, device=sim.device)[:, None], LOWEST)
            best = torch.cat([best, key], dim=1)
            best = best.topk(min(k, best.shape[1]), dim=1).values
        result[rows] = best
    return result


@jit
def _stream(
    query, gallery, keys, Q, G, D, k, SHARE,
    EXCLUDE_SELF: tl.constexpr, K: tl.constexpr, BQ: tl.constexpr, BG: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    # A program owns BQ queries and SHARE gallery items, a multiple of BG; it writes the k largest keys of each query.
    part = tl.program_id(1)
    q = tl.program_id(0) * BQ + tl.arange(0, BQ)
    place = tl.arange(0, K)
    best = tl.where(place < k, -(2**63) + place.to(tl.int64), 2**63 - 1)  # all different and below any key; never replaced beyond k
    best = tl.zeros([BQ, 1], tl.int64) + best[None, :]
    kth = tl.min(best, 1)
    for start in range(part * SHARE, tl.minimum(part * SHARE + SHARE, G), BG):
        g = start + tl.arange(0, BG)
        sim = similarities(query, gallery, q, g, Q, G, D, BQ, BG, BK, "ieee")
        bits = tl.where(sim == 0, 0.0, sim).to(tl.int32, bitcast=True)  # no negative zero, which would sort lower
        key = (tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64) << 32) + (0xFFFFFFFF - g.to(tl.int64))[None, :]
        shown = (g < G)[None, :]
        if EXCLUDE_SELF:
            shown &= q[:, None] != g[None, :]
        key = tl.where(shown, key, -(2**63))
        largest = tl.max(key, 1)
        while tl.max((largest > kth).to(tl.int32), 0) > 0:
            replaced = (best == kth[:, None]) & (largest > kth)[:, None]
            best = tl.where(replaced, largest[:, None], best)
            key = tl.where(key == largest[:, None], -(2**63), key)
            kth = tl.min(best, 1)
            largest = tl.max(key, 1)
    row = keys + (part * Q + q).to(tl.int64)[:, None] * k + place[None, :]
    tl.store(row, best, mask=(q < Q)[:, None] & (place < k)[None, :])


META = dict(BQ=32, BG=64, BK=16)
LAUNCH = dict(num_warps=8, num_stages=2)  # of those tried, the one that spills nothing on sm80, sm90 and sm100
PROGRAMS = 512  # or as many as there are tiles: enough to fill a GPU when the queries are few


def _streamed(query, gallery, k, exclude_self):
    """As _tiled, for k of at most LARGEST."""
    Q, G = len(query), len(gallery)
    query, gallery = (padded(z.float(), META["BK"]) for z in (query, gallery))
    rows, tiles = -(-Q // META["BQ"]), -(-G // META["BG"])
    share = -(-tiles // -(-PROGRAMS // rows))  # tiles of a program
    parts = -(-tiles // share)
    keys = torch.empty(parts, Q, k, dtype=torch.int64, device=query.device)
    _stream[rows, parts](
        query, gallery, keys, Q, G, query.shape[1], k, share * META["BG"],
        EXCLUDE_SELF=exclude_self, K=max(16, 1 << (k - 1).bit_length()), **META, **LAUNCH,
    )  # fmt: skip
    return keys.transpose(0, 1).flatten(1).topk(k, dim=1).values


def top_k(query, gallery=None, k=1, exclude_self=False):
    """The k nearest items of the gallery by inner product: float32 similarities and int64 indices, (Q, k) each.

    query: (Q, D); gallery: (G, D), the queries themselves by default. The nearest come first, ties in the order of
    their indices. With exclude_self query i is gallery item i, and does not find itself. On a GPU k up to 128 streams
    through a kernel; above, and on a CPU, tiles of the product and torch.topk do, a tile of memory at a time.
    Raises ValueError for a k that is not between 1 and the number of items to find.
    """
    gallery = query if gallery is None else gallery
    items = len(gallery) - int(exclude_self)
    if not 1 <= k <= items:
        raise ValueError(f"top_k: k = {k}, but there are {items} items to find")
    streams = len(query) and k <= LARGEST and use_triton(query)
    key = (_streamed if streams else _tiled)(query, gallery, k, exclude_self)
    bits = (key >> 32).int()
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).view(torch.float32), INDEX - (key & INDEX)


def ahead_of_time():
    """What tests/aot.py compiles."""
    types = dict(query="*fp32", gallery="*fp32", keys="*i64") | dict.fromkeys(("Q", "G", "D", "k", "SHARE"), "i32")
    return [
        dict(kernel=_stream, types=types, constants=dict(EXCLUDE_SELF=self, K=K, **META), plain=("Q", "G", "k"), **LAUNCH)
        for K, self in ((16, True), (32, False), (64, True), (128, True))
    ]

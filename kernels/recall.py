"""Rank of the nearest item of each query's class, by counting: no sort, no stored similarities.

    best(q) = highest s(q, g) over items g of q's class, not q itself
    rank(q) = #{ g of another class : s(q, g) >= best(q) - TIE }

A query is a hit at k if rank < k, so one count gives recall at every k. Ties count against the model: TIE is just above
the rounding error of a float32 product of unit vectors, so a collapsed or duplicated embedding scores 0, and the result
does not depend on the order of the gallery.

Queries and items are sorted by label, so that only tiles near the diagonal hold pairs of one class. If the queries are
the gallery, the similarities are symmetric: a tile above the diagonal counts for its rows and for its columns, which
halves the multiplications. Work: N^2 D multiply-adds, or half. Memory: one tile.

Shapes: Q queries, G gallery items, D embedding size.
"""

import collections
from typing import NamedTuple

import numpy as np
import torch

from kernels import TILE, full_precision, jit, launch, pad_columns, product, row_slices, tl, use_triton

TIE = 1e-6
BATCH = 2**22  # similarities held at a time while looking for the best positives


# --------------------------------------------------------------------------------- best positives


def best_positives(query, query_labels, gallery, gallery_labels, own):
    """Highest similarity (Q,) of each query to an item of its class, -inf if there is none. Labels are sorted.

    own: (Q,) the gallery index of each query, which it may not find, or -1. Classes of like size share one batched
    product: numbers of queries and of items are filled up to powers of two by repeating the last.
    """
    best, device = torch.full_like(own, -torch.inf, dtype=query.dtype), own.device
    labels = torch.cat([query_labels, gallery_labels]).cpu().numpy()  # the one synchronisation
    query_labels, gallery_labels = np.split(labels, [len(query)])
    classes, first_query, a = np.unique(query_labels, return_index=True, return_counts=True)
    first_item, end = (np.searchsorted(gallery_labels, classes, side) for side in ("left", "right"))
    log2 = np.ceil(np.log2([a, np.maximum(end - first_item, 0.5)])).astype(int)  # rounded up; -1: no items
    ends = np.stack([first_query, first_query + a - 1, first_item, end - 1])
    by_size = np.lexsort(log2)
    groups = collections.Counter(zip(*log2[:, by_size].tolist()))  # {(i, j): classes}, in the order of by_size
    ends = torch.from_numpy(ends[:, by_size, None]).to(device, non_blocking=True)
    offsets = torch.arange(2 ** log2.max(initial=0), device=device)
    for (i, j), group in zip(groups, ends.split([*groups.values()], dim=1)):
        for part in group.split(max(1, BATCH // 2 ** (i + j)), dim=1) if j >= 0 else ():
            first_query, last_query, first_item, last_item = part  # (classes, 1)
            columns = (first_item + offsets[: 2**j]).minimum(last_item)  # (classes, 2^j)
            for rows in row_slices(0, 2**i, max(1, BATCH // 2**j)):
                at = (first_query + offsets[rows]).minimum(last_query)
                with full_precision(device):
                    sim = torch.bmm(query[at], gallery[columns].mT)  # (classes, rows, 2^j)
                best[at] = sim.masked_fill_(columns[:, None] == own[at][..., None], -torch.inf).amax(2)
    return best


# ------------------------------------------------------------------------------------------ PyTorch


def _torch_count(query, query_labels, gallery, gallery_labels, bound, symmetric):
    """(Q,) items of another class with similarity >= bound (Q,). symmetric: the queries are the gallery."""
    count = torch.zeros(len(query), dtype=torch.int64, device=query.device)
    for cols in row_slices(0, len(gallery), TILE):
        items, item_labels = gallery[cols], gallery_labels[cols]
        for rows in row_slices(0, cols.stop if symmetric else len(query), TILE):
            labels = query_labels[rows]
            sim = product(query[rows], items)  # (rows, cols)
            if labels[0] <= item_labels[-1] and item_labels[0] <= labels[-1]:
                sim.masked_fill_(labels[:, None] == item_labels, -torch.inf)
            above = torch.empty_like(sim)  # 0.0 and 1.0: a CPU compares and adds floats faster than booleans
            count[rows] += torch.ge(sim, bound[rows, None], out=above).sum(1).long()
            if symmetric and rows.start < cols.start:
                count[cols] += torch.ge(sim, bound[cols], out=above).sum(0).long()
    return count


# ------------------------------------------------------------------------------------------- Triton


@jit(do_not_specialize=["Q", "G"])
def _count(
    query, gallery, query_labels, gallery_labels, bound, count, Q, G, D, query_stride, gallery_stride,
    SYMMETRIC: tl.constexpr, B: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    # A program owns a B x B tile of similarities, which stays in registers. Integer atomics: any order, the same sum.
    # query (D, query_stride) and gallery (D, gallery_stride) are transposed, with zeros up to whole tiles: rows of
    # neighbouring items lie side by side in shared memory, where those of one item would meet in the same banks.
    across = tl.cdiv(G, B)
    i, j = tl.program_id(0) // across, tl.program_id(0) % across
    if SYMMETRIC:
        if i > j:
            return
    r, c, k = i * B + tl.arange(0, B), j * B + tl.arange(0, B), tl.arange(0, BK)
    sim = tl.zeros((B, B), tl.float32)
    query += k.to(tl.int64)[:, None] * query_stride + r[None, :]
    gallery += k.to(tl.int64)[:, None] * gallery_stride + c[None, :]
    for _ in range(0, D, BK):
        sim = tl.dot(tl.trans(tl.load(query)), tl.load(gallery), sim, input_precision="ieee")
        query += BK * query_stride
        gallery += BK * gallery_stride
    label, item_label = tl.load(query_labels + r, mask=r < Q, other=0), tl.load(gallery_labels + c, mask=c < G, other=0)
    other_class = (label[:, None] != item_label[None, :]) & (r < Q)[:, None] & (c < G)[None, :]
    limit = tl.load(bound + r, mask=r < Q, other=float("inf"))
    above = tl.sum((other_class & (sim >= limit[:, None])).to(tl.int32), 1)
    tl.atomic_add(count + r, above, mask=above > 0)
    if SYMMETRIC:
        if i < j:
            limit = tl.load(bound + c, mask=c < G, other=float("inf"))
            above = tl.sum((other_class & (sim >= limit[None, :])).to(tl.int32), 0)
            tl.atomic_add(count + c, above, mask=above > 0)


META = dict(B=64, BK=32)  # the largest tile without spills on sm80, sm90 and sm100, by tests/aot.py; not timed on a GPU
LAUNCH = dict(num_warps=4, num_stages=3)


def _triton_count(query, query_labels, gallery, gallery_labels, bound, symmetric):
    """As _torch_count, in one launch."""
    Q, G = len(query), len(gallery)
    query = pad_columns(pad_columns(query, META["BK"]).T, META["B"])
    gallery = query if symmetric else pad_columns(pad_columns(gallery, META["BK"]).T, META["B"])
    count = torch.zeros(Q, dtype=torch.int32, device=query.device)
    grid = (query.shape[1] // META["B"] * (gallery.shape[1] // META["B"]),)
    arguments = (query, gallery, query_labels, gallery_labels, bound, count, Q, G, len(query))
    launch(_count, grid, *arguments, query.shape[1], gallery.shape[1], SYMMETRIC=symmetric, **META, **LAUNCH)
    return count.long()


# --------------------------------------------------------------------------------------------- both


class ByLabel(NamedTuple):
    """Queries and gallery sorted by label."""

    query: torch.Tensor  # (Q, D)
    query_labels: torch.Tensor  # (Q,)
    gallery: torch.Tensor  # (G, D); the same object as query if they are the same rows
    gallery_labels: torch.Tensor  # (G,)
    own: torch.Tensor  # (Q,) place of the query in the gallery, which it may not find; -1: none
    order: torch.Tensor  # (Q,) place of each sorted query in the shard


def by_label(query, query_labels, gallery=None, gallery_labels=None, shard=slice(None)):
    """Arguments as in `ranks`."""
    itself = gallery is None
    if itself:
        gallery, gallery_labels = query, query_labels
    gallery_labels, item_order = gallery_labels.sort(stable=True)
    shard_labels, order = query_labels[shard].sort(stable=True)
    own = torch.full_like(order, -1)
    if itself:
        place = torch.empty_like(item_order).scatter_(0, item_order, torch.arange(len(query), device=order.device))
        own = place[shard][order]
    gallery = gallery[item_order]
    query = gallery if itself and len(order) == len(query) else query[shard][order]
    return ByLabel(query, shard_labels, gallery, gallery_labels, own, order)


def ranks(query, query_labels, gallery=None, gallery_labels=None, shard=slice(None)):
    """rank (Q,) int64 of the nearest item of each query's class; -1 if the gallery has no (other) item of its class.

    query: (Q, D) and gallery: (G, D), float32 rows of length 1; labels: int64. Without a gallery the queries search
    each other, and none finds itself. shard: rank only this slice of the queries.
    """
    s = by_label(query, query_labels, gallery, gallery_labels, shard)
    best = best_positives(s.query, s.query_labels, s.gallery, s.gallery_labels, s.own)
    form = _triton_count if use_triton(s.query, len(s.query) * len(s.gallery)) else _torch_count
    count = form(s.query, s.query_labels, s.gallery, s.gallery_labels, best - TIE, symmetric=s.query is s.gallery)
    return torch.empty_like(count).scatter_(0, s.order, count.masked_fill(best == -torch.inf, -1))

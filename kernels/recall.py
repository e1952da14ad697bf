"""Rank of the nearest item of each query's class, by counting: no sort, no stored similarities.

    best(q) = highest s(q, g) over items g of q's class, not q itself
    rank(q) = #{ g of another class : s(q, g) >= best(q) - TIE }

A query is a hit at k if rank < k, so one count gives recall at every k. Ties count against the model: TIE is just above
the rounding error of a float32 product of unit vectors, so a collapsed or duplicated embedding scores 0, and the result
does not depend on the order of the gallery.

Queries and items are sorted by label, so that only tiles near the diagonal hold pairs of one class. If the queries are
the gallery, the similarities are symmetric: a tile above the diagonal counts for its rows and for its columns, which
halves the multiplications. Work: N^2 D multiply-adds, or half. Memory: one tile.

A gallery too large for one device would need one all-reduce(max) of `best` and one all-reduce(sum) of the counts.

Shapes: Q queries, G gallery items, D embedding size.
"""

from typing import NamedTuple

import torch

from kernels import TILE, jit, padded, product, slices, similarities, tl, use_triton

TIE = 1e-6
BATCH = 2**22  # similarities held at a time while looking for the best positives


# --------------------------------------------------------------------------------- best positives


def best_positives(query, query_labels, gallery, gallery_labels, own):
    """Highest similarity (Q,) of each query to an item of its class, -inf if there is none. Labels are sorted.

    own: (Q,) the gallery index of each query, which it may not find, or -1. Classes with the same number a of queries
    and b of items share one batched product.
    """
    best = query.new_full((len(query),), -torch.inf)
    classes, a = query_labels.unique_consecutive(return_counts=True)
    first_query, first_item = a.cumsum(0) - a, torch.searchsorted(gallery_labels, classes)
    b = torch.searchsorted(gallery_labels, classes, right=True) - first_item
    for queries, items in sorted(set(zip(a.tolist(), b.tolist()))):
        if not items:
            continue
        same_size = ((a == queries) & (b == items)).nonzero()  # (classes, 1)
        for part in same_size.split(max(1, BATCH // (queries * items))):
            columns = first_item[part] + torch.arange(items, device=a.device)  # (classes, b)
            for rows in slices(0, queries, max(1, BATCH // items)):
                at = first_query[part] + torch.arange(rows.start, rows.stop, device=a.device)  # (classes, rows)
                sim = torch.bmm(query[at], gallery[columns].mT)  # (classes, rows, b)
                best[at] = sim.masked_fill_(columns[:, None] == own[at][..., None], -torch.inf).amax(2)
    return best


# ------------------------------------------------------------------------------------------ PyTorch


def _torch_count(query, query_labels, gallery, gallery_labels, bound, symmetric):
    """(Q,) items of another class with similarity >= bound (Q,). symmetric: the queries are the gallery."""
    count = torch.zeros(len(query), dtype=torch.int64, device=query.device)
    for cols in slices(0, len(gallery), TILE):
        items, item_labels = gallery[cols], gallery_labels[cols]
        for rows in slices(0, cols.stop if symmetric else len(query), TILE):
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


@jit
def _count(
    query, gallery, query_labels, gallery_labels, bound, count, Q, G, D,
    SYMMETRIC: tl.constexpr, B: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    # A program owns a B x B tile of similarities, which stays in registers. Integer atomics: any order, the same sum.
    across = tl.cdiv(G, B)
    i, j = tl.program_id(0) // across, tl.program_id(0) % across
    if SYMMETRIC:
        if i > j:
            return
    r, c = i * B + tl.arange(0, B), j * B + tl.arange(0, B)
    sim = similarities(query, gallery, r, c, Q, G, D, B, B, BK, "ieee")
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
    query, gallery = padded(query, META["BK"]), padded(gallery, META["BK"])
    count = torch.zeros(Q, dtype=torch.int32, device=query.device)
    grid = (-(-Q // META["B"]) * -(-G // META["B"]),)
    arguments = (query, gallery, query_labels, gallery_labels, bound, count, Q, G, query.shape[1])
    _count[grid](*arguments, SYMMETRIC=symmetric, **META, **LAUNCH)
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
    form = _triton_count if use_triton(s.query) else _torch_count
    count = form(s.query, s.query_labels, s.gallery, s.gallery_labels, best - TIE, symmetric=s.query is s.gallery)
    return torch.empty_like(count).scatter_(0, s.order, count.masked_fill(best == -torch.inf, -1))

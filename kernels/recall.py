"""Recall at every k, by counting. Similarities are neither sorted nor stored.

    best(q) = highest s(q, g) over items g of q's class, except q itself
    rank(q) = #{ g of another class : s(q, g) >= best(q) - TIE }

A query is a hit at k if 0 <= rank < k, so one count is enough for every k. At a tie wrong items come first. If all
embeddings are equal, every wrong item precedes the right ones. TIE is just above the rounding error of a float32
product of unit vectors.

Queries and gallery are sorted by label, so the items of a class are neighbours. If all queries search each other, only
tiles on or above the diagonal are computed.

Shapes: Q queries, G gallery items, D embedding size.
"""

from typing import NamedTuple

import torch

from kernels import TILE, jit, launch, pad_columns, product, row_chunks, row_slices, tl, use_triton

TIE = 1e-6
CHUNK = 2**20  # at most this many similarities at a time in best_positives, on a CPU


class ByLabel(NamedTuple):
    """Queries and gallery, each sorted by label."""

    query: torch.Tensor  # (Q, D)
    query_labels: torch.Tensor  # (Q,)
    gallery: torch.Tensor  # (G, D), the same object as query if all queries search each other
    gallery_labels: torch.Tensor  # (G,)
    own: torch.Tensor  # (Q,) index of the query itself in the gallery, or -1 if it is not there
    order: torch.Tensor  # (Q,) index of each sorted query in the shard


def by_label(query, query_labels, gallery=None, gallery_labels=None, shard=slice(None)):
    """Sort by label. Arguments as in `ranks`."""
    itself = gallery is None
    if itself:
        gallery, gallery_labels = query, query_labels
    gallery_labels, item_order = gallery_labels.sort(stable=True)
    shard_labels, order = query_labels[shard].sort(stable=True)
    own = torch.full_like(order, -1)
    if itself:
        index = torch.empty_like(item_order).scatter_(0, item_order, torch.arange(len(query), device=order.device))
        own = index[shard][order]
    gallery = gallery[item_order]
    query = gallery if itself and len(order) == len(query) else query[shard][order]
    return ByLabel(query, shard_labels, gallery, gallery_labels, own, order)


def best_positives(s):
    """Highest similarity (Q,) of each query to an item of its class, except itself; -inf if there is none."""
    best = torch.full_like(s.own, -torch.inf, dtype=s.query.dtype)
    ends = [torch.searchsorted(s.gallery_labels, s.query_labels, right=right) for right in (False, True)]
    first, last = torch.stack(ends).cpu().numpy()  # one synchronisation
    for rows in row_chunks(len(s.query), len(s.gallery), CHUNK, s.query.device):
        band = slice(first[rows.start], last[rows.stop - 1])  # all items of the classes of these queries
        if band.start < band.stop:
            sim = product(s.query[rows], s.gallery[band])
            positive = s.query_labels[rows, None] == s.gallery_labels[band]
            positive &= s.own[rows, None] != torch.arange(band.start, band.stop, device=sim.device)
            best[rows] = sim.masked_fill_(~positive, -torch.inf).amax(1)
    return best


# ------------------------------------------------------------------------------------------ PyTorch


def plain_count(s, bound):
    """How many items of other classes have a similarity of at least bound (Q,) to each query."""
    symmetric = s.query is s.gallery
    count = torch.zeros(len(s.query), dtype=torch.int64, device=s.query.device)
    for cols in row_slices(len(s.gallery), TILE):
        item_labels = s.gallery_labels[cols]
        for rows in row_slices(cols.stop if symmetric else len(s.query), TILE):
            labels = s.query_labels[rows]
            sim = product(s.query[rows], s.gallery[cols])
            if labels[0] <= item_labels[-1] and item_labels[0] <= labels[-1]:
                sim.masked_fill_(labels[:, None] == item_labels, -torch.inf)
            above = torch.empty_like(sim)  # as floats, because a CPU compares and adds them faster than booleans
            count[rows] += torch.ge(sim, bound[rows, None], out=above).sum(1).long()
            if symmetric and rows.start < cols.start:
                count[cols] += torch.ge(sim, bound[cols], out=above).sum(0).long()
    return count


# ------------------------------------------------------------------------------------------- Triton

BLOCK = dict(B=64, BK=32)  # chosen so that nothing spills; not tuned


@jit(do_not_specialize=["Q", "G"])
def recall_count_kernel(
    query, gallery, query_labels, gallery_labels, bound, count, Q, G, D, query_stride, gallery_stride,
    SYMMETRIC: tl.constexpr, B: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    # One program counts in a B x B tile of similarities.
    across = tl.cdiv(G, B)
    i, j = tl.program_id(0) // across, tl.program_id(0) % across
    if SYMMETRIC:
        if i > j:
            return

    rows = i * B + tl.arange(0, B)
    cols = j * B + tl.arange(0, B)

    # Both operands are (D, stride), transposed to avoid bank conflicts. Zeros fill the last tiles, so none is masked.
    k = tl.arange(0, BK).to(tl.int64)[:, None]
    query += k * query_stride + rows[None, :]
    gallery += k * gallery_stride + cols[None, :]
    sim = tl.zeros((B, B), tl.float32)
    for _ in range(0, D, BK):
        sim = tl.dot(tl.trans(tl.load(query)), tl.load(gallery), sim, input_precision="ieee")
        query += BK * query_stride
        gallery += BK * gallery_stride

    in_rows, in_cols = rows < Q, cols < G
    labels = tl.load(query_labels + rows, mask=in_rows)
    item_labels = tl.load(gallery_labels + cols, mask=in_cols)
    other_class = (labels[:, None] != item_labels[None, :]) & in_rows[:, None] & in_cols[None, :]

    limit = tl.load(bound + rows, mask=in_rows)
    above = tl.sum((other_class & (sim >= limit[:, None])).to(tl.int32), 1)
    tl.atomic_add(count + rows, above, mask=above > 0)  # integers, so their order does not matter

    # Above the diagonal the columns are queries too.
    if SYMMETRIC:
        if i < j:
            limit = tl.load(bound + cols, mask=in_cols)
            above = tl.sum((other_class & (sim >= limit[None, :])).to(tl.int32), 0)
            tl.atomic_add(count + cols, above, mask=above > 0)


def triton_count(s, bound):
    """As plain_count."""
    symmetric = s.query is s.gallery
    query = pad_columns(pad_columns(s.query, BLOCK["BK"]).T, BLOCK["B"])  # (D, Q) up to whole tiles
    gallery = query if symmetric else pad_columns(pad_columns(s.gallery, BLOCK["BK"]).T, BLOCK["B"])
    count = torch.zeros(len(s.query), dtype=torch.int32, device=query.device)
    grid = (query.shape[1] // BLOCK["B"] * (gallery.shape[1] // BLOCK["B"]),)
    arguments = (query, gallery, s.query_labels, s.gallery_labels, bound, count, len(s.query), len(s.gallery))
    sizes = (len(query), query.shape[1], gallery.shape[1])
    launch(recall_count_kernel, grid, *arguments, *sizes, SYMMETRIC=symmetric, **BLOCK, num_warps=4, num_stages=3)
    return count.long()


# --------------------------------------------------------------------------------------------- both


def ranks(query, query_labels, gallery=None, gallery_labels=None, shard=slice(None)):
    """rank (Q,) int64 of the nearest item of each query's class; -1 if the gallery has no (other) item of its class.

    query: (Q, D) and gallery: (G, D), float32 rows of length 1; labels: int64. Without a gallery the queries search
    each other, and none finds itself. shard: rank only this slice of the queries.
    """
    s = by_label(query, query_labels, gallery, gallery_labels, shard)
    best = best_positives(s)
    count_above = triton_count if use_triton(s.query, len(s.query) * len(s.gallery)) else plain_count
    count = count_above(s, best - TIE)
    return torch.empty_like(count).scatter_(0, s.order, count.masked_fill(best == -torch.inf, -1))

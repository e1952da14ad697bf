"""The k nearest gallery items of each query: exact, a chunk of queries at a time.

There is no Triton form, because the matrix product takes nearly all of the time.

Selection has two stages. The gallery is cut into groups of g neighbouring items. The k nearest items lie in the k
groups with the highest maxima, because every group with a higher maximum holds a nearer item. So the first stage takes
the k best groups, and the second the k best of their k*g items. g near sqrt(G / k) keeps both stages small. If it is
below 4, one stage is faster.

Shapes: Q queries, G gallery items, D embedding size.
"""

import math

import torch

from kernels import product, row_chunks

HELD = 2**22  # similarities at a time on a CPU


def top_k(query, gallery=None, k=1, exclude_self=False):
    """The k nearest gallery items by inner product: similarities (Q, k) float32 and indices (Q, k), nearest first.

    query: (Q, D); gallery: (G, D), by default the queries. exclude_self: query n is item n and does not find itself.
    The order of equal similarities is not specified. ValueError unless 1 <= k <= the number of items to find.
    """
    gallery = query if gallery is None else gallery
    items = len(gallery) - int(exclude_self)
    if not 1 <= k <= items:
        raise ValueError(f"top_k: k is {k}, but there are {items} items to find")
    query, gallery = query.float(), gallery.float()
    values, indices = query.new_empty(len(query), k), torch.empty(len(query), k, dtype=torch.int64, device=query.device)
    for rows in row_chunks(len(query), len(gallery), HELD, query.device):
        sim = product(query[rows], gallery)
        if exclude_self:
            sim.diagonal(rows.start).fill_(-torch.inf)
        values[rows], indices[rows] = select(sim, k)
    return values, indices


def select(sim, k):
    """The k largest of each row of sim (Q, G), largest first: values and column indices (Q, k)."""
    G = sim.shape[1]
    size = min(64, 2 ** int(math.log2(G / k) / 2))
    if size < 4:
        return sim.topk(k, dim=1)
    end = G // size * size
    groups = sim[:, :end].unflatten(1, (-1, size))  # (Q, G / size, size)
    best = groups.amax(2).topk(k, dim=1, sorted=False).indices[..., None]  # (Q, k, 1)
    # The candidates are the items of the best groups, and the items from `end` on, which are in no group.
    values = torch.cat([groups.gather(1, best.expand(-1, -1, size)).flatten(1), sim[:, end:]], dim=1)
    columns = torch.arange(G, device=sim.device)
    columns = torch.cat([(best * size + columns[:size]).flatten(1), columns[end:].expand(len(sim), -1)], dim=1)
    values, at = values.topk(k, dim=1)
    return values, columns.gather(1, at)

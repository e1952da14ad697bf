"""Retrieval quality of embeddings: exact recall@k by counting, and a picture of what was retrieved.

A query is a hit at k if fewer than k items of other classes are at least as similar to it as the best item of its own:

    best(q) = max { s(q, g) : same class }        rank(q) = #{ g : other class, s(q, g) >= best(q) }
    recall@k = share of queries with rank < k

No gallery is sorted, every k comes from one pass, and beyond a copy of the embeddings in the order of their labels only
a tile of similarities is held. Ties count against the model, so a collapsed embedding scores 0 and the order of the gallery is irrelevant. Where the queries are
the gallery an item does not find itself, and each tile of the symmetric matrix serves its rows and its columns.

Exactness: a float32 tile decides all pairs farther from best(q) than its rounding error can reach; the few others are
computed again in float64, where only differences within float64 rounding are ties.

Similarity is the inner product of the embeddings as given: the cosine if their rows have length 1.
Shapes: Q queries, G gallery items, D embedding size.
"""

import math

import numpy as np
import torch
from PIL import Image, ImageDraw

TILE = 1024  # rows and columns of similarities at a time; 4 MiB
BAND = 256  # queries at a time against the gallery items of their classes


def embed_all(model, loader, device):
    """Embeddings (N, D) and labels (N,) of a loader's images, in its order, on the CPU."""
    model.eval()
    embeddings, labels = [], []
    with torch.no_grad():
        for images, y in loader:
            images = images.to(device, memory_format=torch.channels_last)
            embeddings.append(model(images).float().cpu())
            labels.append(y)
    return torch.cat(embeddings), torch.cat(labels)


# -------------------------------------------------------------------------------------------- recall


def recall_at_k(query, query_labels, gallery=None, gallery_labels=None, ks=(1,)):
    """{k: share of queries whose k nearest gallery items hold one of their class}, between 0 and 1.

    query: (Q, D), query_labels: (Q,), gallery: (G, D), gallery_labels: (G,), tensors or arrays, float and integer.
    Without a gallery the queries are searched among themselves. Queries without another item of their class are left
    out (`ranks` gives them -1). Raises ValueError for unusable input, or if no query is left.
    """
    return recall_from_ranks(ranks(query, query_labels, gallery, gallery_labels), ks)


def recall_from_ranks(rank, ks):
    rank = rank[rank >= 0]
    if not len(rank):
        raise ValueError("no query has another item of its class to find")
    return {k: (rank < k).double().mean().item() for k in ks}


def ranks(query, query_labels, gallery=None, gallery_labels=None):
    """How many items of other classes come before the first of its own, ties included, for each query.

    Arguments as in recall_at_k. Returns int64 (Q,), -1 where the gallery has no (other) item of the query's class.
    """
    itself = gallery is None
    query, query_labels, order = _sorted_by_label("query", query, query_labels)
    if itself:
        gallery, gallery_labels = query, query_labels
    else:
        gallery, gallery_labels, _ = _sorted_by_label("gallery", gallery, gallery_labels)
    if query.shape[1] != gallery.shape[1]:
        raise ValueError(f"queries have {query.shape[1]} columns, the gallery {gallery.shape[1]}")
    best = _best_positive(query, query_labels, gallery, gallery_labels, itself)  # (Q,) float64

    count = _Counter(best, query, gallery)
    single_query, single_gallery = query.float(), gallery.float()
    tile = single_query.new_empty(min(TILE, len(query)) * min(TILE, len(gallery)))
    for rows in _slices(len(query), TILE):
        for cols in _slices(len(gallery), TILE):
            if itself and cols.start < rows.start:
                continue
            y, gallery_y = query_labels[rows], gallery_labels[cols]
            sim = tile[: len(y) * len(gallery_y)].view(len(y), len(gallery_y))  # one buffer for all tiles
            torch.mm(single_query[rows], single_gallery[cols].T, out=sim)
            if y[0] <= gallery_y[-1] and gallery_y[0] <= y[-1]:
                sim.masked_fill_(y[:, None] == gallery_y, -torch.inf)
            count(sim, rows, cols, dim=1)
            if itself and cols != rows:
                count(sim, cols, rows, dim=0)
    rank = count.rank.masked_fill(best == -torch.inf, -1)
    return torch.empty_like(rank).scatter_(0, order, rank)


def _best_positive(query, query_labels, gallery, gallery_labels, itself):
    """Highest float64 similarity of each query to an item of its class, -inf if there is none; both sorted by label."""
    first = torch.searchsorted(gallery_labels, query_labels)
    last = torch.searchsorted(gallery_labels, query_labels, right=True)
    best = torch.empty(len(query), dtype=torch.float64, device=query.device)
    for rows in _slices(len(query), BAND):
        cols = slice(int(first[rows][0]), int(last[rows][-1]))  # the gallery items of these queries' classes
        sim = query[rows].double() @ gallery[cols].double().T
        sim.masked_fill_(query_labels[rows, None] != gallery_labels[cols], -torch.inf)
        if itself:
            sim.diagonal(rows.start - cols.start).fill_(-torch.inf)
        best[rows] = sim.amax(1) if sim.shape[1] else -torch.inf
    return best


class _Counter:
    """Adds up, for each query, the similarities of a tile that reach its best positive."""

    def __init__(self, best, query, gallery):
        self.query, self.gallery = query, gallery
        self.rank = torch.zeros(len(query), dtype=torch.int64, device=query.device)
        self.mask = torch.empty(0, device=query.device)
        unit_error = (query.shape[1] + 8) * query.norm(dim=1).double() * gallery.norm(dim=1).max()  # (Q,)
        slack = unit_error * 2.0**-24  # no float32 inner product, summed in any order, errs by more
        self.surely, self.maybe = (best + slack).float(), (best - slack).float()
        self.reach = best - 2 * unit_error * 2.0**-53  # both sides of a float64 comparison err

    def __call__(self, sim, queries, items, dim):
        """sim: similarities of a slice of the queries to a slice of the gallery, the items running along `dim`."""
        mask = self.mask.resize_(sim.shape)  # 0.0 and 1.0: floats compare and add up several times faster than booleans
        surely = torch.gt(sim, self.surely[queries].unsqueeze(dim), out=mask).sum(dim).long()
        maybe = torch.ge(sim, self.maybe[queries].unsqueeze(dim), out=mask).sum(dim).long()
        self.rank[queries] += surely
        unsure = (maybe > surely).nonzero().squeeze(1)
        if len(unsure):
            self.decide(sim.index_select(1 - dim, unsure), unsure + queries.start, items, dim)

    def decide(self, sim, query, items, dim):
        """Count the pairs between surely and maybe by their float64 similarity; query: indices of the rows of sim."""
        sim = sim if dim else sim.T
        undecided = torch.ge(sim, self.maybe[query, None], out=torch.empty_like(sim))
        undecided *= torch.le(sim, self.surely[query, None], out=torch.empty_like(sim))
        row, col = undecided.nonzero(as_tuple=True)
        if len(row) > sim.shape[1]:  # many, as in a collapsed embedding: a product is cheaper than a list
            exact = (self.query[query].double() @ self.gallery[items].double().T)[row, col]
        else:
            exact = (self.query[query[row]].double() * self.gallery[items.start + col].double()).sum(1)
        self.rank.index_add_(0, query[row], (exact >= self.reach[query[row]]).long())


def _slices(length, size):
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _sorted_by_label(name, embeddings, labels):
    """Checked embeddings and labels in the order of the labels, and that order.

    Sorted, the items of a class are neighbours: they lie in a narrow band, and most tiles hold no pair of one class.
    """
    embeddings, labels = torch.as_tensor(embeddings), torch.as_tensor(labels)
    if embeddings.ndim != 2 or not len(embeddings) or labels.shape != embeddings.shape[:1]:
        raise ValueError(
            f"{name}: expected embeddings (N, D) and N labels, got {tuple(embeddings.shape)} and {tuple(labels.shape)}"
        )
    embeddings = embeddings.detach().to(torch.float64 if embeddings.dtype == torch.float64 else torch.float32)
    largest = torch.linalg.vector_norm(embeddings, torch.inf).item()
    if not math.isfinite(largest):
        raise ValueError(f"{name}: {int((~embeddings.isfinite()).any(1).sum())} embeddings hold NaN or infinity")
    labels, order = labels.to(embeddings.device).long().sort(stable=True)
    embeddings = embeddings[order]
    embeddings *= 2.0 ** -math.frexp(largest)[1]  # changes no rank, and keeps products within float32
    return embeddings, labels, order


# --------------------------------------------------------------------------------------------- sheet

SHEET_ROWS, SHEET_NEIGHBOURS = 5, 10  # rows of each kind, neighbours in a row
SHEET_CELL, TITLE = 80, 20  # pixels


def retrieval_sheet(file, rank, query, query_paths, query_labels, gallery=None, gallery_paths=None, gallery_labels=None):
    """Write a picture: rows of a query and its nearest neighbours, right ones framed green, wrong ones red.

    The upper rows are the queries with the worst `rank` (from `ranks`), the lower ones are drawn at random. Without a
    gallery the neighbours come from the queries. Paths are image files, in the order of the embeddings.
    """
    itself = gallery is None
    if itself:
        gallery, gallery_paths, gallery_labels = query, query_paths, query_labels
    candidates = torch.as_tensor(rank).argsort(descending=True, stable=True)
    candidates = candidates[: int((torch.as_tensor(rank) >= 0).sum())]  # lone queries come last
    worst, rest = candidates[:SHEET_ROWS], candidates[SHEET_ROWS:]
    drawn = np.random.default_rng(0).permutation(len(rest))[:SHEET_ROWS]
    chosen = torch.cat([worst, rest[torch.from_numpy(drawn)]])

    sim = query[chosen] @ gallery.T
    if itself:
        sim[torch.arange(len(chosen)), chosen] = -torch.inf
    nearest = sim.topk(min(SHEET_NEIGHBOURS, len(gallery) - itself), dim=1).indices

    cell, gap = SHEET_CELL, SHEET_CELL // 2
    sheet = Image.new("RGB", (gap + (1 + nearest.shape[1]) * cell, len(chosen) * cell + 2 * TITLE), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (q, items) in enumerate(zip(chosen.tolist(), nearest.tolist())):
        top = row * cell + (TITLE if row < len(worst) else 2 * TITLE)
        _paste(sheet, query_paths[q], (0, top), "black")
        for column, g in enumerate(items):
            right = query_labels[q] == gallery_labels[g]
            _paste(sheet, gallery_paths[g], ((1 + column) * cell + gap, top), "limegreen" if right else "red")
    draw.text((4, 4), "worst queries, and their nearest neighbours", fill="black")
    if len(drawn):
        draw.text((4, TITLE + len(worst) * cell + 4), "random queries", fill="black")
    sheet.save(file, format="PNG")


def _paste(sheet, path, corner, frame):
    with Image.open(path) as image:
        picture = image.convert("RGB").resize((SHEET_CELL - 10, SHEET_CELL - 10))
    x, y = corner
    ImageDraw.Draw(sheet).rectangle((x + 2, y + 2, x + SHEET_CELL - 3, y + SHEET_CELL - 3), fill=frame)
    sheet.paste(picture, (x + 5, y + 5))

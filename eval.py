"""Retrieval quality of embeddings, exact at any size, and a picture of it.

    recall@k      share of queries with an item of their class among their k nearest
    R-precision   precision among the R nearest, R = number of right items in the gallery
    MAP@R         mean over queries of 1/R * sum_{r <= R} [item r is of the class] * precision at r
                  (both: Musgrave et al., A Metric Learning Reality Check, arXiv 2003.08505)
    alignment     mean squared distance of two items of a class       (Wang & Isola, ICML 2020, arXiv 2005.10242)
    uniformity    log of the mean of exp(-2 d^2) over all pairs       (Wang & Isola)
    utilization   mean squared distance of a test embedding to its nearest training embedding (the Metrix paper)

Embeddings are tensors, arrays or lists of any float type. The first three metrics normalise them, the others take them
as they are. Labels are integers. Without a gallery, queries are ranked against each other, excluding themselves. At a
tie wrong items come first. Queries with no item of their class to find are left out.

Shapes: Q queries, G gallery items, D embedding size.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

from kernels import TILE, product, row_chunks, row_slices
from kernels.recall import TIE, by_label, ranks
from kernels.top_k import HELD, select


def embed_all(model, loader):
    """Embeddings (N, D) and labels (N,) of a loader's images, in its order. The loader's images are on the device."""
    model.eval()
    with torch.no_grad():
        batches = [(model(images).float(), y) for images, y in loader]
    return tuple(torch.cat(parts) for parts in zip(*batches))


# ------------------------------------------------------------------------------------------- ranking


def recall_at_k(query, query_labels, gallery=None, gallery_labels=None, ks=(1,)):
    """{k: share of queries whose k nearest gallery items hold one of their class}, between 0 and 1.

    query: (Q, D), query_labels: (Q,), gallery: (G, D), gallery_labels: (G,).
    ValueError for unusable input, or if no query has an item to find.
    """
    return summary(per_query(query, query_labels, gallery, gallery_labels), ks)["recall"]


def map_at_r(query, query_labels, gallery=None, gallery_labels=None):
    """MAP@R, between 0 and 1. Arguments and errors as in recall_at_k."""
    return summary(per_query(query, query_labels, gallery, gallery_labels, full=True))["map_at_r"]


def r_precision(query, query_labels, gallery=None, gallery_labels=None):
    """R-precision, between 0 and 1. Arguments and errors as in recall_at_k."""
    return summary(per_query(query, query_labels, gallery, gallery_labels, full=True))["r_precision"]


class Ranking(NamedTuple):
    """One value per query (Q,)."""

    rank: torch.Tensor  # int64: number of wrong items above the first right one, or -1 if no right one exists
    average_precision: torch.Tensor | None = None  # float64: its part of MAP@R, NaN without right items
    r_precision: torch.Tensor | None = None  # float64


def per_query(query, query_labels, gallery=None, gallery_labels=None, full=False, shard=slice(None)):
    """The Ranking of the queries in a shard (a slice). full=False computes only the rank, which is faster."""
    query, query_labels = _checked("query", query, query_labels)
    if gallery is not None:
        gallery, gallery_labels = _checked("gallery", gallery, gallery_labels)
        if query.shape[1] != gallery.shape[1]:
            raise ValueError(f"queries have {query.shape[1]} columns, the gallery {gallery.shape[1]}")
    arguments = (query, query_labels, gallery, gallery_labels, shard)
    return _full_ranking(*arguments) if full else Ranking(ranks(*arguments))


def _checked(name, z, y):
    """Embeddings as float32 rows of length 1, labels as int64."""
    z, y = torch.as_tensor(z).detach(), torch.as_tensor(y)
    if z.ndim != 2 or not z.numel() or y.shape != z.shape[:1] or y.is_floating_point():
        got = f"{tuple(z.shape)} and {tuple(y.shape)} {y.dtype}"
        raise ValueError(f"{name}: expected embeddings (N, D) and integer labels (N,), got {got}")
    z = F.normalize(z.double() if z.dtype == torch.float64 else z.float(), dim=1).float()
    if not z.isfinite().all():
        raise ValueError(f"{name}: some embeddings hold NaN or infinity")
    return z, y.to(z.device, torch.int64)


def _full_ranking(query, query_labels, gallery, gallery_labels, shard):
    """Full ranking, a block of similarity rows at a time."""
    s = by_label(query, query_labels, gallery, gallery_labels, shard)
    first = torch.searchsorted(s.gallery_labels, s.query_labels)
    last = torch.searchsorted(s.gallery_labels, s.query_labels, right=True)
    size = last - first - (s.own >= 0).long()  # (Q,) R; a query does not count itself
    rank = torch.full_like(size, -1)
    precision = torch.full((2, len(size)), torch.nan, dtype=torch.float64, device=size.device)

    for rows in row_chunks(len(size), len(s.gallery), HELD, size.device):
        R, labels, place = size[rows, None], s.query_labels[rows, None], s.order[rows]
        if not R.any():
            continue
        sim = product(s.query[rows], s.gallery)
        if gallery is None:
            sim.scatter_(1, s.own[rows, None], -torch.inf)

        # The gallery is sorted by label: this slice contains every match of these rows.
        band = slice(int(first[rows][0]), int(last[rows][-1]))
        match = labels == s.gallery_labels[band]
        sim[:, band] -= TIE * match  # at a tie wrong items come first
        best = sim[:, band].masked_fill(~match, -torch.inf).amax(1, keepdim=True)
        r = torch.arange(1, int(R.max()) + 1, device=size.device)
        nearest = s.gallery_labels[select(sim, len(r))[1]]  # (rows, largest R)

        sim[:, band].masked_fill_(match, -torch.inf)
        wrong = sim.ge_(best).sum(1).long()  # as floats, because a CPU adds these fastest
        rank[place] = wrong.masked_fill(R[:, 0] == 0, -1)
        hit = ((nearest == labels) & (r <= R)).double()
        precision[:, place] = torch.stack([(hit * hit.cumsum(1) / r).sum(1), hit.sum(1)]) / R.T
    return Ranking(rank, *precision)


def summary(ranking, ks=()):
    """{"queries" (with a match), "queries_without_match", "recall": {k: share}}. If full: "map_at_r", "r_precision"."""
    if not all(isinstance(k, (int, np.integer)) and k > 0 for k in ks):
        raise ValueError(f"ks must be positive integers, got {ks}")
    found = ranking.rank >= 0
    rank = ranking.rank.where(found, torch.iinfo(torch.int64).max)
    counts = [found.sum(), *((rank < k).sum() for k in ks)]
    queries, *hits = torch.stack(counts).tolist()  # one synchronisation
    if not queries:
        raise ValueError("no query has another item of its class to find")
    result = dict(queries=queries, queries_without_match=len(found) - queries)
    result["recall"] = {k: hit / queries for k, hit in zip(ks, hits)}
    if ranking.average_precision is not None:
        result["map_at_r"] = ranking.average_precision[found].mean().item()
        result["r_precision"] = ranking.r_precision[found].mean().item()
    return result


def table(result):
    """The metrics of a dict as two lines: names, and values (shares in %)."""
    shown = {f"R@{k}": f"{100 * share:.2f}" for k, share in result["recall"].items()}
    for title, name in (("MAP@R", "map_at_r"), ("R-prec.", "r_precision")):
        if name in result:
            shown[title] = f"{100 * result[name]:.2f}"
    shown |= {name: f"{result[name]:.4f}" for name in ("alignment", "uniformity", "utilization") if name in result}
    width = [max(8, len(title) + 2) for title in shown]
    return ["".join(f"{text:>{w}}" for text, w in zip(line, width)) for line in (shown, shown.values())]


# ------------------------------------------------------------------------------------------ geometry


def alignment(z, y):
    """Mean squared distance of two embeddings of a class; lower is tighter. z: (N, D), y: (N,)."""
    z = torch.as_tensor(z).detach().double()
    _, label, size = torch.as_tensor(y).to(z.device).unique(return_inverse=True, return_counts=True)  # (N,), (C,)
    pairs = (size * (size - 1)).sum()
    if not pairs:
        raise ValueError("alignment: no class has two embeddings")
    squares = torch.zeros(len(size), dtype=z.dtype, device=z.device).index_add_(0, label, z.square().sum(1))
    total = torch.zeros(len(size), z.shape[1], dtype=z.dtype, device=z.device).index_add_(0, label, z)
    # In a class of n, the sum of |z_i - z_j|^2 over ordered pairs is 2 (n sum |z_i|^2 - |sum z_i|^2).
    return (2 * (size * squares - total.square().sum(1)).sum() / pairs).clamp_min(0).item()


def uniformity(z):
    """log of the mean of exp(-2 d^2) over all pairs; lower is more even. z: (N, D), N at least 2."""
    z = torch.as_tensor(z).detach().float()
    if len(z) < 2:
        raise ValueError("uniformity: expected at least two embeddings")
    total = torch.zeros((), dtype=torch.float64, device=z.device)
    for cols in row_slices(len(z), TILE):
        for rows in row_slices(cols.stop, TILE):
            kernel = _square_distances(z[rows], z[cols]).mul_(-2).exp_()
            total += (kernel.triu_(1) if rows == cols else kernel).sum(dtype=torch.float64)
    return torch.log(total / (len(z) * (len(z) - 1) / 2)).item()


def utilization(test, train):
    """Mean squared distance of a test embedding to its nearest training embedding. test: (N, D), train: (M, D)."""
    test, train = torch.as_tensor(test).detach().float(), torch.as_tensor(train).detach().float()
    if not len(test) or not len(train) or test.shape[1] != train.shape[1]:
        raise ValueError(f"utilization: {tuple(test.shape)} test and {tuple(train.shape)} training embeddings")
    total = 0.0
    for rows in row_chunks(len(test), len(train), HELD, test.device):
        nearest = _square_distances(test[rows], train).argmin(1)
        total += (test[rows].double() - train[nearest].double()).square().sum().item()
    return total / len(test)


def _square_distances(a, b):
    distance = product(a, b).mul_(-2).add_(a.square().sum(1)[:, None]).add_(b.square().sum(1))
    return distance.clamp_min_(0)


# ------------------------------------------------------------------------------------------- picture

ROWS, NEIGHBOURS = 5, 10  # rows of each kind, neighbours per row
THUMBNAIL, TITLE = 80, 20  # pixels


def retrieval_sheet(
    file, rank, query, query_paths, query_labels,
    gallery=None, gallery_paths=None, gallery_labels=None, open_image=Image.open,
):  # fmt: skip
    """Write a PNG: rows of a query and its nearest neighbours, right ones framed green, wrong ones red.

    Random queries come first, then those with the worst rank, as in Ranking. Embeddings are tensors of unit rows. Paths
    are image files in their order. Without a gallery, queries are ranked against each other.
    """
    itself = gallery is None
    if itself:
        gallery, gallery_paths, gallery_labels = query, query_paths, query_labels
    rank = torch.as_tensor(rank).cpu()
    candidates = rank.argsort(descending=True, stable=True)[: int((rank >= 0).sum())]
    worst, rest = candidates[:ROWS], candidates[ROWS:].numpy()
    drawn = np.random.default_rng(0).permutation(rest)[:ROWS].tolist()
    sections = {"random queries and their nearest neighbours": drawn, "the worst queries": worst.tolist()}
    shown, gap = min(NEIGHBOURS, len(gallery) - int(itself)), THUMBNAIL // 2
    height = sum(TITLE + THUMBNAIL * len(queries) for queries in sections.values() if queries)
    sheet = Image.new("RGB", (gap + (1 + shown) * THUMBNAIL, height), "white")
    top = 0
    for title, queries in sections.items():
        if queries:
            ImageDraw.Draw(sheet).text((4, top + 4), title, fill="black")
            top += TITLE
        for q in queries:
            _paste(sheet, open_image(query_paths[q]), (0, top), "black")
            sim = product(query[q : q + 1], gallery)  # (1, G)
            if itself:
                sim[0, q] = -torch.inf
            for column, g in enumerate(select(sim, shown)[1][0].tolist(), 1):
                frame = "limegreen" if query_labels[q] == gallery_labels[g] else "red"
                _paste(sheet, open_image(gallery_paths[g]), (gap + column * THUMBNAIL, top), frame)
            top += THUMBNAIL
    sheet.save(file, format="PNG")


def _paste(sheet, image, corner, frame):
    x, y = corner
    ImageDraw.Draw(sheet).rectangle((x + 2, y + 2, x + THUMBNAIL - 3, y + THUMBNAIL - 3), fill=frame)
    sheet.paste(image.convert("RGB").resize((THUMBNAIL - 10, THUMBNAIL - 10)), (x + 5, y + 5))

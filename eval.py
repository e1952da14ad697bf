"""Retrieval quality of embeddings, exact at any size, and a picture of it.

    recall@k      share of queries with an item of their class among their k nearest
    R-precision   mean share of the query's class among its R nearest; R is the number of items of that class
    MAP@R         mean over queries of 1/R * sum_{r <= R} [item r is of the class] * precision at r
                  (both: Musgrave et al., A Metric Learning Reality Check, arXiv 2003.08505)
    alignment     mean squared distance of two items of a class       (Wang & Isola, ICML 2020, arXiv 2005.10242)
    uniformity    log of the mean of exp(-2 d^2) over all pairs       (Wang & Isola)
    utilization   mean squared distance of a test embedding to its nearest training embedding (the Metrix paper)

Embeddings are tensors or arrays of any float type; the first three metrics normalise them. Labels are integers. Without
a gallery the queries search each other, and none finds itself. Ties count against the model: a collapsed embedding
scores 0. Queries with no (other) item of their class in the gallery are left out.

    python eval.py RUN_DIR ..       a table of finished runs: means over seeds, and what each mode gains

Shapes: Q queries, G gallery items, D embedding size.
"""

import json
import math
import sys
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

from kernels import TILE, row_chunks, product, row_slices
from kernels.recall import TIE, by_label, ranks
from kernels.top_k import HELD, select, top_k


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
    return summary(per_query(query, query_labels, gallery, gallery_labels, everything=True))["map_at_r"]


def r_precision(query, query_labels, gallery=None, gallery_labels=None):
    """R-precision, between 0 and 1. Arguments and errors as in recall_at_k."""
    return summary(per_query(query, query_labels, gallery, gallery_labels, everything=True))["r_precision"]


class Ranking(NamedTuple):
    """One value per query (Q,)."""

    rank: torch.Tensor  # int64: items of other classes before the first of its own; -1 if it has none to find
    average_precision: torch.Tensor | None = None  # float64: the query's part of MAP@R
    r_precision: torch.Tensor | None = None  # float64


def per_query(query, query_labels, gallery=None, gallery_labels=None, everything=False, shard=slice(None)):
    """The Ranking of the queries in a shard (a slice, by default all). Without `everything`, only ranks."""
    query, query_labels = _checked("query", query, query_labels)
    if gallery is not None:
        gallery, gallery_labels = _checked("gallery", gallery, gallery_labels)
        if query.shape[1] != gallery.shape[1]:
            raise ValueError(f"queries have {query.shape[1]} columns, the gallery {gallery.shape[1]}")
    arguments = (query, query_labels, gallery, gallery_labels, shard)
    return _rank_from_rows(*arguments) if everything else Ranking(ranks(*arguments))


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


def _rank_from_rows(query, query_labels, gallery, gallery_labels, shard):
    """The whole Ranking from rows of similarities: a count as in kernels/recall.py, and the R nearest items."""
    s = by_label(query, query_labels, gallery, gallery_labels, shard)
    first, last = (torch.searchsorted(s.gallery_labels, s.query_labels, right=right) for right in (False, True))
    size = last - first - (s.own >= 0).long()  # (Q,), R of each query
    rank = torch.full_like(size, -1)
    precision = torch.full((2, len(size)), torch.nan, dtype=torch.float64, device=size.device)
    for rows in row_chunks(len(size), len(s.gallery), HELD, size.device):
        R, labels, at = size[rows, None], s.query_labels[rows], s.order[rows]
        if not R.any():
            continue  # lone queries
        sim = product(s.query[rows], s.gallery)
        if gallery is None:
            sim.scatter_(1, s.own[rows, None], -torch.inf)
        band = slice(int(first[rows][0]), int(last[rows][-1]))  # holds all items of these classes
        same = labels[:, None] == s.gallery_labels[band]
        sim[:, band] -= TIE * same  # at a tie other classes come first
        best = sim[:, band].masked_fill(~same, -torch.inf).amax(1, keepdim=True)
        above = torch.ge(sim, best, out=torch.empty_like(sim)).sum(1) - (same & (sim[:, band] >= best)).sum(1)
        rank[at] = above.long().masked_fill(R[:, 0] == 0, -1)
        r = torch.arange(1, int(R.max()) + 1, device=size.device)
        nearest = s.gallery_labels[select(sim, len(r))[1]]  # (rows, largest R)
        hit = ((nearest == labels[:, None]) & (r <= R)).double()
        precision[:, at] = torch.stack([(hit * hit.cumsum(1) / r).sum(1), hit.sum(1)]) / R.T
    return Ranking(rank, *precision)


def summary(ranking, ks=()):
    """{"queries", "queries_without_match", "recall": {k: share}, and with everything "map_at_r", "r_precision"}."""
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
    shown |= {name: f"{result[name]:.4f}" for name in GEOMETRY if name in result}
    width = [max(8, len(title) + 2) for title in shown]
    return ["".join(f"{cell:>{w}}" for cell, w in zip(cells, width)) for cells in (shown, shown.values())]


# ------------------------------------------------------------------------------------------ geometry

GEOMETRY = ("alignment", "uniformity", "utilization")


def alignment(z, y):
    """Mean squared distance of two embeddings of a class; lower is tighter. z: (N, D), y: (N,)."""
    z = torch.as_tensor(z).detach().double()
    size, label = torch.as_tensor(y).unique(return_inverse=True, return_counts=True)[:0:-1]  # (C,), (N,)
    pairs = (size * (size - 1)).sum()
    if not pairs:
        raise ValueError("alignment: no class has two embeddings")
    squares = torch.zeros(len(size), dtype=z.dtype, device=z.device).index_add_(0, label, z.square().sum(1))
    total = torch.zeros(len(size), z.shape[1], dtype=z.dtype, device=z.device).index_add_(0, label, z)
    return (2 * (size * squares - total.square().sum(1)).sum() / pairs).clamp_min(0).item()  # from sums per class


def uniformity(z):
    """log of the mean of exp(-2 d^2) over all pairs; lower is more even. z: (N, D), N at least 2."""
    z = torch.as_tensor(z).detach().float()
    if len(z) < 2:
        raise ValueError("uniformity: expected at least two embeddings")
    total = torch.zeros((), dtype=torch.float64, device=z.device)
    for cols in row_slices(0, len(z), TILE):
        for rows in row_slices(0, cols.stop, TILE):
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

SHEET_ROWS, SHEET_NEIGHBOURS = 5, 10  # rows of each kind, neighbours per row
CELL, TITLE = 80, 20  # pixels


def retrieval_sheet(
    file, rank, query, query_paths, query_labels,
    gallery=None, gallery_paths=None, gallery_labels=None, open_image=Image.open,
):  # fmt: skip
    """Write a PNG: rows of a query and its nearest neighbours, right ones framed green, wrong ones red.

    Random queries come first, then those with the worst `rank` (of a Ranking). Paths are image files in the order of
    the embeddings. Without a gallery the queries search each other.
    """
    itself = gallery is None
    if itself:
        gallery, gallery_paths, gallery_labels = query, query_paths, query_labels
    rank = torch.as_tensor(rank).cpu()
    candidates = rank.argsort(descending=True, stable=True)[: int((rank >= 0).sum())]
    worst, rest = candidates[:SHEET_ROWS], candidates[SHEET_ROWS:].numpy()
    drawn = np.random.default_rng(0).permutation(rest)[:SHEET_ROWS].tolist()
    sections = {"random queries and their nearest neighbours": drawn, "the worst queries": worst.tolist()}

    shown, gap = min(SHEET_NEIGHBOURS, len(gallery) - itself), CELL // 2
    height = sum(TITLE + CELL * len(queries) for queries in sections.values() if queries)
    sheet = Image.new("RGB", (gap + (1 + shown) * CELL, height), "white")
    top = 0
    for title, queries in sections.items():
        if queries:
            ImageDraw.Draw(sheet).text((4, top + 4), title, fill="black")
            top += TITLE
        for q in queries:
            nearest = top_k(query[q : q + 1], gallery, shown + itself)[1][0].tolist()
            nearest = [g for g in nearest if not (itself and g == q)][:shown]
            _paste(sheet, open_image(query_paths[q]), (0, top), "black")
            for column, g in enumerate(nearest, 1):
                right = query_labels[q] == gallery_labels[g]
                place = (column * CELL + gap, top)
                _paste(sheet, open_image(gallery_paths[g]), place, "limegreen" if right else "red")
            top += CELL
    sheet.save(file, format="PNG")


def _paste(sheet, image, corner, frame):
    x, y = corner
    ImageDraw.Draw(sheet).rectangle((x + 2, y + 2, x + CELL - 3, y + CELL - 3), fill=frame)
    sheet.paste(image.convert("RGB").resize((CELL - 10, CELL - 10)), (x + 5, y + 5))


# --------------------------------------------------------------------------------------- many runs

MODES = ("baseline", "input", "feature", "embed")
PUBLISHED = {  # the paper's Recall@1 with ResNet-50 and D = 512, in the order of MODES
    ("cub", "contrastive"): (64.7, 66.3, 67.4, 66.4),
    ("cub", "multisimilarity"): (67.8, 69.0, 71.4, 70.2),
    ("cub", "proxyanchor"): (69.5, 70.5, 71.0, 70.4),
    ("cars", "contrastive"): (81.6, 82.9, 85.1, 83.9),
    ("cars", "multisimilarity"): (87.8, 89.0, 89.6, 88.8),
    ("cars", "proxyanchor"): (87.6, 88.2, 89.1, 88.9),
    ("sop", "contrastive"): (74.9, 75.8, 77.5, 76.7),
    ("sop", "multisimilarity"): (76.9, 77.9, 81.0, 78.5),
    ("sop", "proxyanchor"): (79.1, 79.8, 81.3, 80.6),
    ("inshop", "contrastive"): (86.4, 87.7, 89.1, 88.4),
    ("inshop", "multisimilarity"): (90.1, 91.8, 92.2, 91.9),
    ("inshop", "proxyanchor"): (90.0, 90.9, 91.9, 91.6),
}


def read_run(directory):
    """(config, last line of the log) of a finished run."""
    try:
        with open(f"{directory}/config.json") as config, open(f"{directory}/log.jsonl") as log:
            config, last = json.load(config), json.loads(log.read().splitlines()[-1])
        if last["epoch"] == config["epochs"]:
            return config, last | dict(recall_at_1=last["recall"]["1"])
    except (OSError, ValueError, LookupError):
        pass
    raise ValueError(f"{directory}: not a finished run; give the same command again that started it")


def compare(runs):
    """Print a table of [(config, last log line)]: mean +- standard error over seeds, and gains paired by seed."""
    cells = {}  # (dataset, loss): {mode: {seed: last line}}
    for config, last in runs:
        modes = cells.setdefault((config["dataset"], config["loss"]), {})
        modes.setdefault(config["mode"], {})[config["seed"]] = last
    epochs = sorted({(config["epochs"], config["mode"]) for config, _ in runs})
    print("epochs: " + ", ".join(f"{mode} {number}" for number, mode in epochs))
    result = []
    for (dataset, loss), modes in sorted(cells.items()):
        print(f"\n{dataset} {loss}".ljust(24) + "".join(f"{mode:>18}" for mode in MODES))
        for name, scale, digits in (("recall_at_1", 100, 2), ("map_at_r", 100, 2), *((g, 1, 3) for g in GEOMETRY)):
            values = {mode: {seed: scale * line[name] for seed, line in modes.get(mode, {}).items()} for mode in MODES}
            base = values["baseline"]
            rows = {name: [list(by_seed.values()) for by_seed in values.values()]}
            if scale == 100:
                gains = [[by_seed[s] - base[s] for s in by_seed if s in base] for by_seed in values.values()]
                rows["  gain, by seed"] = [[], *gains[1:]]
            for title, row in rows.items():
                print(title.ljust(23) + "".join(f"{_mean_and_error(x, digits):>18}" for x in row))
                result.append(dict(dataset=dataset, loss=loss, row=title.strip(), values=dict(zip(MODES, row))))
            if name == "recall_at_1" and (dataset, loss) in PUBLISHED:
                print("  published".ljust(23) + "".join(f"{share:18}" for share in PUBLISHED[dataset, loss]))
    print("\n" + json.dumps(dict(epochs=epochs, rows=result)))


def _mean_and_error(values, digits):
    if not values:
        return ""
    mean = f"{np.mean(values):.{digits}f}"
    return f"{mean} +- {np.std(values, ddof=1) / math.sqrt(len(values)):.{digits}f}" if len(values) > 1 else mean


def main(directories=None):
    try:
        compare([read_run(directory) for directory in (sys.argv[1:] if directories is None else directories)])
    except ValueError as error:
        print(f"eval: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()

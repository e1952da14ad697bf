"""Retrieval quality of embeddings, exact at any size: recall@k, MAP@R, R-precision, and how the embeddings lie.

    python eval.py --embeddings FILE.npz [--ks 1,10,100]

reads the arrays `embeddings` (N, D) and `labels` (N,); if there, `gallery_embeddings` and `gallery_labels` to search in,
and `train_embeddings` for utilization. Prints a table and a line of JSON.

    recall@k      share of queries with an item of their class among their k nearest
    R-precision   mean share of the query's class among its R nearest, R being the number of items of that class
    MAP@R         mean over queries of 1/R * sum_{r <= R} [item r is of the class] * precision at r
                  (the last two: Musgrave et al., A Metric Learning Reality Check, arXiv 2003.08505)
    alignment     mean squared distance of two items of a class       (Wang & Isola, ICML 2020, arXiv 2005.10242)
    uniformity    log of the mean of exp(-2 d^2) over all pairs       (the same)
    utilization   mean squared distance of a test embedding to the nearest training embedding (the Metrix paper)

The first three count (kernels/recall.py): no gallery is sorted and every k comes from one pass. Where the queries are
the gallery an item does not find itself. Ties count against the model, so a collapsed embedding scores 0 and the
order of the gallery is irrelevant. Queries with no (other) item of their class in the gallery are left out.

Embeddings are tensors or arrays of any float type, or np.memmap, which is read a tile at a time and may be larger than
memory; labels are any integers. Similarity is the inner product of the embeddings as given: the cosine if their rows
have length 1. With `group`, a torch.distributed process group, every process passes its own part of the queries and
of the gallery, of any length, and gets the numbers of the whole, the same to the last bit.
Shapes: Q queries, G gallery items, D embedding size.
"""

import argparse
import json
import math
import sys
import warnings
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw

from kernels import product, recall
from kernels.top_k import top_k

PAIRS = 2**22  # positives held at a time: queries with more are ranked in blocks


def embed_all(model, loader, device):
    """Embeddings (N, D) and labels (N,) of a loader's images, in its order, on the device."""
    model.eval()
    embeddings, labels = [], []
    with torch.no_grad():
        for images, y in loader:
            images = images.to(device, memory_format=torch.channels_last)
            embeddings.append(model(images).float())
            labels.append(y.to(device))
    return torch.cat(embeddings), torch.cat(labels)


# ------------------------------------------------------------------------------------------- ranking


def recall_at_k(query, query_labels, gallery=None, gallery_labels=None, ks=(1,), group=None):
    """{k: share of queries whose k nearest gallery items hold one of their class}, between 0 and 1.

    query: (Q, D), query_labels: (Q,), gallery: (G, D), gallery_labels: (G,). Without a gallery the queries are searched
    among themselves. Raises ValueError for unusable input, or if no query has an item to find. A k beyond the gallery
    finds whatever there is.
    """
    return summary(ranking(query, query_labels, gallery, gallery_labels, nearest_only=True, group=group), ks, group)["recall"]


def map_at_r(query, query_labels, gallery=None, gallery_labels=None, group=None):
    """MAP@R, between 0 and 1. Arguments and errors as in recall_at_k."""
    return summary(ranking(query, query_labels, gallery, gallery_labels, group=group), (), group)["map_at_r"]


def r_precision(query, query_labels, gallery=None, gallery_labels=None, group=None):
    """R-precision, between 0 and 1. Arguments and errors as in recall_at_k."""
    return summary(ranking(query, query_labels, gallery, gallery_labels, group=group), (), group)["r_precision"]


def evaluate(query, query_labels, gallery=None, gallery_labels=None, ks=(1,), group=None):
    """All three metrics from one pass, see `summary`. Arguments and errors as in recall_at_k."""
    return summary(ranking(query, query_labels, gallery, gallery_labels, group=group), ks, group)


class Ranking(NamedTuple):
    """A value a query (Q,), in their order; -1 and NaN for queries that have no (other) item of their class to find."""

    rank: torch.Tensor  # int64: items of other classes that come before the first of its own, ties included
    average_precision: torch.Tensor | None = None  # float64: the query's part of MAP@R; None with nearest_only
    r_precision: torch.Tensor | None = None  # float64; likewise


def summary(ranking, ks, group=None):
    """The metrics of a Ranking: {"queries", "lone_queries", "recall": {k: share}, "map_at_r", "r_precision"}."""
    if not all(isinstance(k, (int, np.integer)) and k > 0 for k in ks):
        raise ValueError(f"ks must be positive integers, got {ks}")
    found = ranking.rank >= 0
    columns = [values[found].tolist() for values in ranking if values is not None]
    lone = int((~found).sum())
    parts = _World(group).gather((columns, lone))
    rank, *means = [sum(column, []) for column in zip(*(columns for columns, _ in parts))]
    lone = sum(lone for _, lone in parts)
    if not rank:
        raise ValueError("no query has another item of its class to find")
    result = dict(queries=len(rank), lone_queries=lone, recall={k: sum(r < k for r in rank) / len(rank) for k in ks})
    # fsum rounds once, so neither the order of the queries nor their processes show in the last digit.
    return result | {name: math.fsum(values) / len(rank) for name, values in zip(("map_at_r", "r_precision"), means)}


def table(result):
    """The metrics of a dict as two lines for people: names, and values (shares in %)."""
    shown = {f"R@{k}": f"{100 * share:.2f}" for k, share in result["recall"].items()}
    shown |= {title: f"{100 * result[name]:.2f}" for name, title in (("map_at_r", "MAP@R"), ("r_precision", "R-prec.")) if name in result}
    shown |= {name: f"{result[name]:.4f}" for name in ("alignment", "uniformity", "utilization") if name in result}
    width = [max(8, len(title) + 2) for title in shown]
    return ["".join(f"{cell:>{w}}" for cell, w in zip(cells, width)) for cells in (shown, shown.values())]


def ranking(query, query_labels, gallery=None, gallery_labels=None, nearest_only=False, group=None):
    """Rank the gallery for every query: one pass over all similarities. Arguments and errors as in recall_at_k.

    nearest_only computes just the `rank` of a Ranking, which recall needs.
    """
    world = _World(group)
    query, gallery = world.all_agree(lambda: _checked(query, query_labels, gallery, gallery_labels, alone=group is None))
    itself = gallery is query
    for items in [query] if itself else [query, gallery]:
        items.rescale(world.reduce(items.largest, "MAX"))
    longest = world.reduce(gallery.norm.max() if len(gallery) else gallery.norm.new_zeros(()), "MAX")

    result = [query.norm.new_full((len(query),), torch.nan) for _ in range(1 if nearest_only else 3)]
    for source in range(world.size):  # the process whose queries all processes now rank, each in its own gallery
        mine = source == world.rank
        labels, norm = world.share((query.labels, query.norm) if mine else None, source, query.norm.device)
        size = recall.class_sizes(labels, gallery.labels) - int(itself and mine)  # (Q,), R of each query
        size = world.reduce(size, "SUM")
        for block in _blocks(size.clamp_max(1) if nearest_only else size):
            part = query.part(block) if mine else None
            if group is not None:
                (part,) = world.share((part[:],) if mine else None, source, query.norm.device)
            inputs = (part, labels[block], gallery, gallery.labels)
            own = block.start if itself and mine else None
            found, start = world.merge(*recall.positives(*inputs, own, nearest_only), nearest_only)
            if not len(found):
                continue
            unit_error = (query.width + 8) * norm[block] * longest  # times the unit roundoff: of an inner product
            slack, reach = unit_error * 2.0**-24 + 1e-30, 2 * unit_error * 2.0**-53  # 1e-30 is above any underflow
            tally = recall.Tally(part, gallery, found, start, slack, reach, nearest_only)
            recall.count(*inputs, tally, own)
            nearest, between = world.reduce(tally.nearest, "SUM"), world.reduce(tally.between, "SUM")
            alive = world.reduce(tally.alive, "MIN")
            if mine:
                values = [nearest] if nearest_only else [nearest, *_precisions(start, between, alive)]
                for whole, of_block in zip(result, values):
                    whole[block] = of_block.double().masked_fill(size[block] == 0, torch.nan)
    rank, *precisions = [torch.empty_like(values).scatter_(0, query.order, values) for values in result]
    return Ranking(rank.nan_to_num(-1).long(), *precisions)


def _precisions(start, between, alive):
    """The parts of MAP@R and R-precision, (Q,) each, from what a recall.Tally has counted."""
    size = start.diff()
    query = torch.repeat_interleave(size)  # (N,)
    n = torch.arange(len(between), device=between.device) - start[query] + 1
    total = torch.cat([between.new_zeros(1), between.cumsum(0)])
    rank = n + total[1:] - total[start[query]]
    relevant = ((n <= alive[query]) & (rank <= size[query])).double()
    sums = [torch.zeros_like(size, dtype=torch.float64).index_add_(0, query, x) for x in (relevant * n / rank, relevant)]
    return sums[0] / size, sums[1] / size


def _blocks(pairs):
    """Slices of consecutive queries with about PAIRS positives together. pairs: (Q,), positives of each query."""
    block = (pairs.cumsum(0) - pairs) // PAIRS
    ends = torch.cat([block.diff().nonzero().squeeze(1) + 1, block.new_tensor([len(block)])]).tolist()
    return [slice(start, end) for start, end in zip([0, *ends], ends) if start < end]


# ------------------------------------------------------------------------- how the embeddings lie


def geometry(z, y, train=None):
    """{"alignment", "uniformity"} of embeddings z (N, D) with labels y (N,); with training embeddings "utilization"."""
    values = dict(alignment=alignment(z, y), uniformity=uniformity(z))
    return values if train is None else values | dict(utilization=utilization(z, train))


def alignment(z, y):
    """Mean squared distance of two embeddings of a class; lower is tighter. z: (N, D), y: (N,). From sums per class."""
    items = _Items("embeddings", z, y)
    label, size = items.labels.unique_consecutive(return_inverse=True, return_counts=True)[1:]  # (N,), (C,)
    pairs = (size * (size - 1)).sum()
    if not pairs:
        raise ValueError("alignment: no class has two embeddings")
    total = torch.zeros(len(size), items.width, dtype=torch.float64, device=label.device)  # (C, D)
    squares = torch.zeros(len(size), dtype=torch.float64, device=label.device)
    for rows in recall.slices(0, len(items), recall.TILE):
        part = items[rows].double()
        total.index_add_(0, label[rows], part)
        squares.index_add_(0, label[rows], part.square().sum(1))
    return (2 * (size * squares - total.square().sum(1)).sum() / pairs).clamp_min(0).item()


def uniformity(z):
    """log of the mean of exp(-2 d^2) over all pairs; lower is more even. z: (N, D), N at least 2."""
    items = _Items("embeddings", z, np.zeros(len(z), int))
    if len(items) < 2:
        raise ValueError("uniformity: expected at least two embeddings")
    total = torch.zeros((), dtype=torch.float64, device=items.labels.device)
    for rows in recall.slices(0, len(items), recall.TILE):
        for cols in recall.slices(0, rows.stop, recall.TILE):
            closeness = _square_distances(items[rows], items[cols]).mul_(-2).exp_()
            total += (closeness.tril_(-1) if cols == rows else closeness).sum(dtype=torch.float64)
    return torch.log(total / (len(items) * (len(items) - 1) / 2)).item()


def utilization(test, train):
    """Mean squared distance of a test embedding to its nearest training embedding. (N, D), (M, D)."""
    test, train = (_Items(name, z, np.zeros(len(z), int)) for name, z in (("test", test), ("train", train)))
    if test.width != train.width or not len(test) or not len(train):
        raise ValueError(f"utilization: {len(test)} x {test.width} test, {len(train)} x {train.width} training embeddings")
    total = 0.0
    for rows in recall.slices(0, len(test), recall.TILE):
        z = test[rows]
        nearest = [_square_distances(z, train[cols]).min(1) for cols in recall.slices(0, len(train), recall.TILE)]
        tile = torch.stack([distance for distance, _ in nearest]).argmin(0)  # (rows,)
        at = torch.stack([index for _, index in nearest]).gather(0, tile[None])[0] + tile * recall.TILE
        total += (z.double() - train[at].double()).square().sum().item()
    return total / len(test)


def _square_distances(a, b):
    distance = product(a, b).mul_(-2).add_(a.square().sum(1)[:, None]).add_(b.square().sum(1))
    return distance.clamp_min_(0)


# ----------------------------------------------------------------------------------- what is evaluated


class _Items:
    """Embeddings and labels in the order of the labels; indexing gives rows, brought to a common scale.

    Sorted, the items of a class are neighbours: most tiles of similarities hold no pair of one class. A memory map is
    not copied: its rows are read where they lie, whenever they are asked for.
    """

    def __init__(self, name, embeddings, labels):
        streamed = isinstance(embeddings, np.memmap)
        embeddings, labels = _tensor(name, embeddings), _tensor(f"{name} labels", labels)
        if embeddings.ndim != 2 or not embeddings.shape[1] or labels.shape != embeddings.shape[:1] or labels.is_floating_point():
            raise ValueError(
                f"{name}: expected embeddings (N, D) and N integer labels, "
                f"got {tuple(embeddings.shape)} and {tuple(labels.shape)} {labels.dtype}"
            )
        self.width = embeddings.shape[1]
        self.type = torch.float64 if embeddings.dtype == torch.float64 else torch.float32
        highest = [torch.linalg.vector_norm(part.to(self.type), torch.inf, dim=1) for part in embeddings.split(recall.TILE)]
        highest = torch.cat(highest) if highest else embeddings.new_zeros(0)  # (N,), magnitude of an element
        if broken := int((~highest.isfinite()).sum()):
            raise ValueError(f"{name}: {broken} embeddings hold NaN or infinity")
        self.scale = 1.0
        self.largest = highest.max() if len(highest) else highest.new_zeros(())
        self.labels, self.order = labels.to(embeddings.device, torch.int64).sort(stable=True)
        self.source, self.place = (embeddings, self.order) if streamed else (embeddings[self.order].to(self.type), None)

    def rescale(self, largest):
        """Bring elements below 1 by a power of two, which changes no rank and keeps products within float32."""
        self.scale = 2.0 ** -math.frexp(largest)[1]
        if self.place is None:
            self.source *= self.scale
        norms = [torch.linalg.vector_norm(self[rows], dim=1, dtype=torch.float64) for rows in recall.slices(0, len(self), recall.TILE)]
        self.norm = torch.cat(norms) if norms else self.largest.new_zeros(0, dtype=torch.float64)  # (N,)

    def part(self, rows):
        """The items of a slice, for indexing only."""
        part = object.__new__(_Items)
        part.type, part.scale = self.type, self.scale
        part.source, part.place = (self.source[rows], None) if self.place is None else (self.source, self.place[rows])
        return part

    def __getitem__(self, at):
        return self.source[at] if self.place is None else self.source[self.place[at]].to(self.type) * self.scale

    def __len__(self):
        return len(self.labels)


def _tensor(name, x):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable")  # nothing is written
        try:
            return torch.as_tensor(x).detach()
        except TypeError as error:  # of text, say
            raise ValueError(f"{name}: expected numbers; {error}") from error


def _checked(query, query_labels, gallery, gallery_labels, alone):
    query = _Items("query", query, query_labels)
    gallery = query if gallery is None else _Items("gallery", gallery, gallery_labels)
    for name, items in (("query", query), ("gallery", gallery)):
        if alone and not len(items):
            raise ValueError(f"{name}: expected embeddings (N, D) and N labels, got none")
    if query.width != gallery.width:
        raise ValueError(f"queries have {query.width} columns, the gallery {gallery.width}")
    return query, gallery


class _World:
    """This process alone, or a group of processes that each hold a part of the data."""

    def __init__(self, group):
        self.group = group
        self.size, self.rank = (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))

    def gather(self, x):
        """Any value of every process, a list."""
        values = [x] * self.size
        if self.group is not None:
            dist.all_gather_object(values, x, self.group)
        return values

    def all_agree(self, check):
        """The result of check(), or ValueError in every process if any of them raises it, so that none waits."""
        result = error = None
        try:
            result = check()
        except ValueError as failed:
            error = str(failed)
        for other in self.gather(error):
            if other:
                raise ValueError(error or f"in another process: {other}")
        return result

    def reduce(self, x, operation):
        if self.group is not None:
            dist.all_reduce(x, getattr(dist.ReduceOp, operation), self.group)
        return x

    def share(self, tensors, source, device):
        """The tensors of the process `source`, in every process, there on this device."""
        if self.group is None:
            return tensors
        shared = [tensors and [x.cpu() for x in tensors]]
        dist.broadcast_object_list(shared, dist.get_global_rank(self.group, source), self.group)
        return [x.to(device) for x in shared[0]]

    def merge(self, found, start, nearest_only):
        """The positives of all processes, the nearest first. Arguments and result as of recall.positives."""
        if self.group is None:
            return found, start
        size = start.diff()
        each = torch.arange(int(self.reduce(size.max(), "MAX")), device=size.device)
        padded = found.new_full((len(size), len(each)), -torch.inf)
        padded[each < size[:, None]] = found
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded, self.group)
        merged = torch.cat(parts, dim=1).sort(dim=1, descending=True).values
        size = self.reduce(size, "SUM")
        size = size.clamp_max(1) if nearest_only else size
        kept = torch.arange(merged.shape[1], device=size.device) < size[:, None]
        return merged[kept], recall.starts(size)


# --------------------------------------------------------------------------------------------- sheet

SHEET_ROWS, SHEET_NEIGHBOURS = 5, 10  # rows of each kind, neighbours in a row
SHEET_CELL, TITLE = 80, 20  # pixels


def retrieval_sheet(file, rank, query, query_paths, query_labels, gallery=None, gallery_paths=None, gallery_labels=None, open_image=Image.open):
    """Write a picture: rows of a query and its nearest neighbours, right ones framed green, wrong ones red.

    The upper rows are the queries with the worst `rank` (of a `Ranking`), the lower ones are drawn at random. Without a
    gallery the neighbours come from the queries. Paths are image files, in the order of the embeddings; open_image makes a
    Pillow image of each.
    """
    itself = gallery is None
    if itself:
        gallery, gallery_paths, gallery_labels = query, query_paths, query_labels
    candidates = torch.as_tensor(rank).argsort(descending=True, stable=True)
    candidates = candidates[: int((torch.as_tensor(rank) >= 0).sum())]  # lone queries come last
    worst, rest = candidates[:SHEET_ROWS], candidates[SHEET_ROWS:]
    drawn = np.random.default_rng(0).permutation(len(rest))[:SHEET_ROWS]
    chosen = torch.cat([worst, rest[torch.from_numpy(drawn)]])

    shown = min(SHEET_NEIGHBOURS, len(gallery) - itself)
    _, nearest = top_k(query[chosen], gallery, shown + itself)
    nearest = [[g for g in items if not (itself and g == q)][:shown] for q, items in zip(chosen.tolist(), nearest.tolist())]

    cell, gap = SHEET_CELL, SHEET_CELL // 2
    sheet = Image.new("RGB", (gap + (1 + shown) * cell, len(chosen) * cell + 2 * TITLE), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (q, items) in enumerate(zip(chosen.tolist(), nearest)):
        top = row * cell + (TITLE if row < len(worst) else 2 * TITLE)
        _paste(sheet, open_image(query_paths[q]), (0, top), "black")
        for column, g in enumerate(items):
            right = query_labels[q] == gallery_labels[g]
            _paste(sheet, open_image(gallery_paths[g]), ((1 + column) * cell + gap, top), "limegreen" if right else "red")
    draw.text((4, 4), "worst queries, and their nearest neighbours", fill="black")
    if len(drawn):
        draw.text((4, TITLE + len(worst) * cell + 4), "random queries", fill="black")
    sheet.save(file, format="PNG")


def _paste(sheet, image, corner, frame):
    picture = image.convert("RGB").resize((SHEET_CELL - 10, SHEET_CELL - 10))
    x, y = corner
    ImageDraw.Draw(sheet).rectangle((x + 2, y + 2, x + SHEET_CELL - 3, y + SHEET_CELL - 3), fill=frame)
    sheet.paste(picture, (x + 5, y + 5))


# ---------------------------------------------------------------------------------------- from a file


def main(arguments=None):
    parser = argparse.ArgumentParser("eval.py", description="Evaluate embeddings made anywhere.")
    parser.add_argument("--embeddings", required=True, metavar="FILE.npz", help="see the top of eval.py for its arrays")
    parser.add_argument("--ks", default="1,2,4,8", help="of recall@k (1,2,4,8)")
    parser.error = fail
    arguments = parser.parse_args(arguments)
    try:
        ks = [int(k) for k in arguments.ks.split(",")]
    except ValueError:
        fail(f"--ks {arguments.ks}: expected numbers such as 1,10,100")
    try:
        print_results(arguments.embeddings, ks)
    except (OSError, ValueError) as error:
        fail(f"{arguments.embeddings}: {error}")


def print_results(path, ks):
    try:
        file = np.load(path, allow_pickle=False)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise ValueError("one array; expected a .npz file with the arrays embeddings and labels")
        with file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError):
        raise
    except Exception as error:  # of zip and its compressors, which raise many kinds for a damaged file
        raise ValueError(f"damaged ({error})") from error
    separate = "gallery_embeddings" in arrays
    wanted = ["embeddings", "labels", *(["gallery_embeddings", "gallery_labels"] if separate else [])]
    if missing := [name for name in wanted if name not in arrays]:
        raise ValueError(f"no array {' or '.join(missing)} in it, but {', '.join(arrays) or 'none at all'}")
    z, y, *gallery = (arrays[name] for name in wanted)
    result = evaluate(z, y, *gallery, ks=ks)
    if separate:
        z, y = np.concatenate([z, gallery[0]]), np.concatenate([y, gallery[1]])
    result |= geometry(z, y, arrays.get("train_embeddings"))
    print(f"{result['queries']} queries, and {result['lone_queries']} with nothing to find, left out")
    print(*table(result), "", json.dumps(result), sep="\n")


def fail(message):
    print(f"eval: {' '.join(message.splitlines())}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()

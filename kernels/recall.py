"""Rank the items of each query's class among all others by counting, without sorting or storing the similarities.

With R items of the query's class in the gallery, the n-th most similar of them, at similarity s_n, has the rank

    r_n = n + c_n,      c_n = #{ g of another class : s(q, g) >= s_n },

ties counting against it. c_1 gives recall at every k. MAP@R and R-precision need r_n only where r_n <= R: an item of
another class matters only above the *floor*, the similarity of the last positive that can still reach the first R
ranks. What is counted so far raises the floor from tile to tile, until little more than those R reach it.

Exactness: the positives are computed in float64. A float32 similarity decides all pairs farther from them than the
rounding error of any float32 inner product; the few others are computed again in float64, where only differences
within float64 rounding are ties.

Work: one product of all pairs; half of it where the queries are gallery items, as a tile of the symmetric matrix
serves its rows and its columns. Memory: a tile, and the positives of the queries at hand.

Shapes: Q queries, G gallery items, D embedding size, N all positives of all queries. Queries and items come in the
order of their labels. `query` and `gallery` are tensors, or anything that gives rows as a tensor when indexed (a file).
"""

import math

import torch

TILE = 1024  # rows and columns of similarities at a time; 4 MiB
AREA, LARGEST_AREA = 2**14, 2**22  # float64 similarities at a time in search of positives: several classes, one class
CHUNK = 32  # similarities compared with the floor together


def slices(start, stop, size):
    return [slice(at, min(at + size, stop)) for at in range(start, stop, size)]


# ------------------------------------------------------------------------------------------ positives


def class_sizes(query_labels, gallery_labels):
    """How many gallery items have the label of each query, (Q,)."""
    right = torch.searchsorted(gallery_labels, query_labels, right=True)
    return right - torch.searchsorted(gallery_labels, query_labels)


def starts(size):
    """Where runs of these lengths begin when they follow each other, and where the last one ends. size: (Q,)."""
    return torch.cat([size.new_zeros(1), size.cumsum(0)])


def positives(query, query_labels, gallery, gallery_labels, own=None, nearest_only=False):
    """Float64 similarities of each query to the items of its class, all or the nearest, the nearest first.

    own: where the queries are gallery items, the place of the first of them; no query then finds itself.
    Returns the similarities of all queries in one row (N,), and where those of each query begin (Q + 1,).
    """
    device = query_labels.device
    first, size = torch.searchsorted(gallery_labels, query_labels), class_sizes(query_labels, gallery_labels)  # (Q,)
    kept = size - int(own is not None)
    start = starts(kept.clamp_max(1) if nearest_only else kept)
    found = torch.empty(int(start[-1]), dtype=torch.float64, device=device)
    for rows in _bands(first, size):
        low, high = int(first[rows][0]), int((first + size)[rows][-1])
        if low == high:
            continue
        sim = torch.cat([query[rows].double() @ gallery[cols].double().T for cols in slices(low, high, 4 * TILE)], dim=1)
        place = torch.arange(int(size[rows].max()), device=device)
        column = (first[rows] - low)[:, None] + place  # (rows, largest size): a class is a run of columns
        absent = place >= size[rows, None]
        if own is not None:
            absent |= column == (torch.arange(rows.start, rows.stop, device=device) + own - low)[:, None]
        sim = sim.gather(1, column.clamp_max(high - low - 1)).masked_fill_(absent, -torch.inf)
        sim = sim.amax(1, keepdim=True) if nearest_only else sim.sort(dim=1, descending=True).values
        wanted = place[: sim.shape[1]] < start.diff()[rows, None]
        found[start[rows.start] : start[rows.stop]] = sim[wanted]
    return found, start


def _bands(first, size):
    """Slices of the queries that have their classes close together in the gallery."""
    first, last, begin = first.tolist(), (first + size).tolist(), 0
    for q in range(1, len(first) + 1):
        if q < len(first):
            area = (q + 1 - begin) * (last[q] - first[begin])
            if area <= (AREA if first[q] != first[begin] else LARGEST_AREA):
                continue
        yield slice(begin, q)
        begin = q


# ----------------------------------------------------------------------------------------------- count


def count(query, query_labels, gallery, gallery_labels, tally, own=None):
    """Show the tally every similarity of a query to an item of another class. Arguments as in `positives`."""
    tiles, end = slices(0, len(gallery_labels), TILE), 0
    if own is not None:  # the tiles of the queries themselves lie in a grid of their own, which is symmetric
        end = own + len(query_labels)
        tiles = slices(0, own, TILE) + slices(own, end, TILE) + slices(end, len(gallery_labels), TILE)
    for cols in tiles:
        items, items_y = gallery[cols].float(), gallery_labels[cols]
        symmetric = own is not None and own <= cols.start < end
        for rows in slices(0, len(query_labels), TILE):
            y = query_labels[rows]
            if symmetric and own + rows.start > cols.start or y[0] == y[-1] == items_y[0] == items_y[-1]:
                continue
            sim = product(query[rows].float(), items)  # (rows, cols)
            if y[0] <= items_y[-1] and items_y[0] <= y[-1]:
                sim.masked_fill_(y[:, None] == items_y, -torch.inf)
            tally(sim, rows, cols, dim=1)
            if symmetric and own + rows.start < cols.start:
                tally(sim, _moved(cols, -own), _moved(rows, own), dim=0)


def _moved(at, by):
    return slice(at.start + by, at.stop + by)


def product(rows, cols):
    """rows @ cols.T, float32 in full precision whatever the caller has set; oneDNN halves the time on AMD processors."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        if rows.device.type == "cpu" and rows.dtype == torch.float32 and torch.backends.mkldnn.is_available():
            return torch.ops.mkldnn._linear_pointwise(rows, cols, None, "none", [], "")
        return rows @ cols.T
    finally:
        torch.set_float32_matmul_precision(before)


class Tally:
    """Adds up, for each query, the items of other classes that are at least as similar as its positives.

    nearest (Q,): those that reach the nearest positive, c_1.
    between (N,): those that reach a positive and not the one before it; c_n is their running sum. Complete for the
        first `alive` (Q,) positives of a query; the others are known to lie beyond its R nearest items.
    """

    def __init__(self, query, gallery, found, start, slack, reach, nearest_only=False):
        """found (N,), start (Q + 1,): from `positives`. slack, reach (Q,): the most by which a similarity of the
        query errs in float32, and by which a difference of two errs in float64."""
        self.query, self.gallery = query, gallery
        self.found, self.start, self.size = found, start[:-1], start.diff()
        self.slack, self.reach, self.nearest_only = slack, reach, nearest_only
        best = self.of_positive(slice(None), torch.ones_like(self.size))
        self.surely, self.maybe, self.equal = (best + slack).float(), (best - slack).float(), best - reach
        self.nearest = torch.zeros_like(self.size)
        self.mask = torch.empty(0, device=found.device)

        self.between = torch.zeros(0 if nearest_only else len(found), dtype=torch.int64, device=found.device)
        self.alive = self.size.clone()
        self.news = {}  # by tile row: items counted since the floors of its queries were raised

    def of_positive(self, queries, n):
        """Similarity of the n-th positive of each query, infinite where it has none. queries: slice; n: (q,), from 1."""
        at = (self.start[queries] + n - 1).clamp(0, len(self.found) - 1)
        return self.found[at].masked_fill_((n < 1) | (n > self.size[queries]), torch.inf)

    def __call__(self, sim, queries, items, dim):
        """sim: similarities of a slice of the queries to a slice of the gallery, the items running along `dim`."""
        surely, maybe = self.above(sim, self.surely[queries], dim), self.above(sim, self.maybe[queries], dim)
        self.nearest[queries] += surely
        unsure = (maybe > surely).nonzero().squeeze(1)
        if len(unsure):
            near = sim.index_select(1 - dim, unsure)
            near, query = near if dim else near.T, unsure + queries.start
            q, item = ((near > self.maybe[query, None]) & (near <= self.surely[query, None])).nonzero(as_tuple=True)
            q = query[q]
            self.nearest.index_add_(0, q, (self.exact(q, item + items.start, items) >= self.equal[q]).long())
        if not self.nearest_only:
            self.sort_in(sim, queries, items, dim)

    def above(self, sim, threshold, dim):
        """How many similarities of each query exceed its threshold, (q,)."""
        mask = self.mask.resize_(sim.shape)  # 0.0 and 1.0: floats compare and add up several times faster than booleans
        return torch.gt(sim, threshold.to(sim.dtype).unsqueeze(dim), out=mask).sum(dim).long()

    def exact(self, query, item, items):
        """Float64 similarities of K pairs, the items of all in the slice `items`."""
        if len(query) > 2 * TILE:  # many, as in a collapsed embedding: a product is cheaper than a list
            rows, row = query.unique(return_inverse=True)
            return (self.query[rows].double() @ self.gallery[items].double().T)[row, item - items.start]
        return (self.query[query].double() * self.gallery[item].double()).sum(1)

    def sort_in(self, sim, queries, items, dim):
        """Add a tile to `between`, and raise the floors by what it shows."""
        if queries.start not in self.news:  # all positives of a new query are alive: see at once which can remain so
            self.news[queries.start] = 0
            slack = self.slack[queries]
            self.raise_floor(queries, lambda n: self.above(sim, self.of_positive(queries, n) + slack, dim))
        floor = (self.of_positive(queries, self.alive[queries]) - self.slack[queries]).float()
        query, item, value = _reaching(sim, floor, dim)
        if not len(query):
            return
        query, value = query + queries.start, value.double()
        place = self.place(query, value)  # (K,)
        start, alive, slack = self.start[query], self.alive[query], self.slack[query]
        last = len(self.found) - 1
        unsure = (place > 0) & (self.found[(start + place - 1).clamp_min(0)] - value <= slack)
        unsure |= (place < alive) & (value - self.found[(start + place).clamp_max(last)] <= slack)
        unsure = unsure.nonzero().squeeze(1)
        if len(unsure):
            q = query[unsure]
            place[unsure] = self.place(q, self.exact(q, item[unsure] + items.start, items) + self.reach[q])
        counted = place < alive
        self.between.index_add_(0, (start + place)[counted], counted[counted].long())

        self.news[queries.start] += len(value)
        if self.news[queries.start] < len(self.size[queries]):
            return  # too few to pay for raising the floors
        self.news[queries.start] = 0
        first, stop = int(self.start[queries][0]), int((self.start + self.size)[queries][-1])
        total = torch.zeros(stop - first + 1, dtype=torch.int64, device=sim.device)
        torch.cumsum(self.between[first:stop], 0, out=total[1:])
        at = self.start[queries] - first
        self.raise_floor(queries, lambda n: total[at + n] - total[at])

    def place(self, query, value):
        """How many of a query's living positives exceed the value, by bisection. query, value: (K,)."""
        low, high, start = torch.zeros_like(query), self.alive[query], self.start[query]
        for _ in range(int(high.max()).bit_length()):
            middle = (low + high) >> 1
            exceeds = (middle < high) & (self.found[(start + middle).clamp_max(len(self.found) - 1)] > value)
            low, high = torch.where(exceeds, middle + 1, low), torch.where(exceeds, high, middle)
        return low

    def raise_floor(self, queries, counted):
        """Bisect for the last positive n that can be among the R nearest: n + counted(n) <= R. counted: (q,) -> (q,)."""
        low, high, size = torch.zeros_like(self.size[queries]), self.alive[queries], self.size[queries]
        for _ in range(int(high.max()).bit_length()):
            n = (low + high + 1) >> 1
            possible = n + counted(n) <= size
            low, high = torch.where(possible, n, low), torch.where(possible, high, n - 1)
        self.alive[queries] = low


def _reaching(sim, floor, dim):
    """The pairs of a tile that reach their query's floor: query, item (K,) places in the tile, and similarity (K,)."""
    size, chunk = sim.shape[dim], math.gcd(sim.shape[dim], CHUNK)
    chunks = sim.unflatten(dim, (size // chunk, chunk))
    reached = (chunks.amax(dim + 1) >= floor.unsqueeze(dim)).nonzero(as_tuple=True)
    query, at = reached if dim else reached[::-1]
    values = chunks[query, at] if dim else chunks[at, :, query]  # (chunks reached, chunk)
    row, column = (values >= floor[query, None]).nonzero(as_tuple=True)
    return query[row], at[row] * chunk + column, values[row, column]

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

The Triton form takes blocks of many tiles, whose similarities stay in registers: it counts the pairs that are surely
above and lists the few that are undecided or reach a floor, which PyTorch then treats as it does those of a tile. A
list that is too short, as for a collapsed embedding, cuts its block in four, until it holds every pair. Its products
are true float32 ('ieee'). A bfloat16 sweep of tensor cores would be faster, but it errs by 4e-3 and not by 3e-5 (at
D=512), where an untrained embedding has hundreds of neighbours a query to compute again, and how tensor cores round
their sums is written nowhere, so that an error bound, on which exactness rests, could only be guessed. Memory: the
rows of a block, its lists, 1/8 of its similarities for a first look at the floors; a collapsed block's in float64.

Shapes: Q queries, G gallery items, D embedding size, N all positives of all queries. Queries and items come in the
order of their labels. `query` and `gallery` are tensors, or anything that gives rows as a tensor when indexed (a file).
"""

import math
from typing import NamedTuple

import torch

from kernels import TILE, jit, padded, product, similarities, slices, tl, use_triton

BLOCK, CAP = 8192, 2**22  # the Triton form: rows and columns at a time, pairs it can list; the lists take 64 MiB
AREA, LARGEST_AREA = 2**14, 2**22  # float64 similarities at a time in search of positives: several classes, one class
CHUNK = 32  # similarities compared with the floor together


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


# ----------------------------------------------------------------------------------------------- tally


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
        self.news = {}  # by first query of a slice: items counted since the floors of its queries were raised

    def of_positive(self, queries, n):
        """Similarity of the n-th positive of each query, infinite where it has none. queries: slice; n: (q,), from 1."""
        at = (self.start[queries] + n - 1).clamp(0, len(self.found) - 1)
        return self.found[at].masked_fill_((n < 1) | (n > self.size[queries]), torch.inf)

    def __call__(self, sim, queries, items, dim):
        """sim: similarities of a slice of the queries to a slice of the gallery, the items running along `dim`."""
        maybe = self.above(sim, self.maybe[queries], dim)
        query = maybe.nonzero().squeeze(1)  # as a rule few: of a trained embedding, and far from its diagonal
        if 4 * len(query) < len(maybe):
            near, maybe = sim.index_select(1 - dim, query), maybe[query]
        else:
            near, query = sim, torch.arange(len(maybe), device=sim.device)
        query += queries.start
        surely = self.above(near, self.surely[query], dim)
        self.nearest[query] += surely
        unsure = (maybe > surely).nonzero().squeeze(1)
        if len(unsure):
            near, query = near.index_select(1 - dim, unsure), query[unsure]
            near = near if dim else near.T
            q, item = ((near > self.maybe[query, None]) & (near <= self.surely[query, None])).nonzero(as_tuple=True)
            self.decide(query[q], item + items.start, items)
        if not self.nearest_only:
            self.first_look(sim, queries, dim)
            query, item, value = _reaching(sim, self.floor(queries), dim)
            self.sort_in(query + queries.start, item + items.start, value, queries, items)

    def listed(self, query, item, value, queries, items):
        """The same from a list (K,) of the pairs that are undecided or reach a floor, those surely above being counted."""
        unsure = (value > self.maybe[query]) & (value <= self.surely[query])
        self.decide(query[unsure], item[unsure], items)
        if not self.nearest_only:
            self.sort_in(query, item, value, queries, items)

    def decide(self, query, item, items):
        """Count those of K pairs that reach the nearest positive, too close for float32 to tell."""
        self.nearest.index_add_(0, query, (self.exact(query, item, items) >= self.equal[query]).long())

    def above(self, sim, threshold, dim):
        """How many similarities of each query exceed its threshold, (q,)."""
        mask = self.mask.resize_(sim.shape)  # 0.0 and 1.0: floats compare and add up several times faster than booleans
        return torch.gt(sim, threshold.to(sim.dtype).unsqueeze(dim), out=mask).sum(dim).long()

    def exact(self, query, item, items):
        """Float64 similarities of K pairs, the items of all in the slice `items`."""
        if len(query) > 2 * (items.stop - items.start):  # as in a collapsed embedding: a product is cheaper than a list
            rows, row = query.unique(return_inverse=True)
            return (self.query[rows].double() @ self.gallery[items].double().T)[row, item - items.start]
        return (self.query[query].double() * self.gallery[item].double()).sum(1)

    def floor(self, queries):
        """Float32 similarities below these change nothing but, perhaps, `nearest`. (q,)"""
        if self.nearest_only:
            return torch.full_like(self.maybe[queries], torch.inf)
        return (self.of_positive(queries, self.alive[queries]) - self.slack[queries]).float()

    def first_look(self, sim, queries, dim):
        """All positives of a new query are alive: see at once, from some similarities, which can remain so."""
        if queries.start not in self.news:
            self.news[queries.start] = 0
            slack = self.slack[queries]
            self.raise_floor(queries, lambda n: self.above(sim, self.of_positive(queries, n) + slack, dim))

    def sort_in(self, query, item, value, queries, items):
        """Add K pairs, all that reach the floors of these queries in a tile, to `between`, and raise the floors by them."""
        if not len(query):
            return
        value = value.double()
        place = self.place(query, value)  # (K,)
        start, alive, slack = self.start[query], self.alive[query], self.slack[query]
        last = len(self.found) - 1
        unsure = (place > 0) & (self.found[(start + place - 1).clamp_min(0)] - value <= slack)
        unsure |= (place < alive) & (value - self.found[(start + place).clamp_max(last)] <= slack)
        unsure = unsure.nonzero().squeeze(1)
        if len(unsure):
            q = query[unsure]
            place[unsure] = self.place(q, self.exact(q, item[unsure], items) + self.reach[q])
        counted = place < alive
        self.between.index_add_(0, (start + place)[counted], counted[counted].long())

        self.news[queries.start] += len(value)
        if self.news[queries.start] < len(self.size[queries]):
            return  # too few to pay for raising the floors
        self.news[queries.start] = 0
        first, stop = int(self.start[queries][0]), int((self.start + self.size)[queries][-1])
        total = self.between.new_zeros(stop - first + 1)
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


# --------------------------------------------------------------------------------------- tiles, in PyTorch


class Run(NamedTuple):
    """Queries or gallery items that follow each other: which of all they are, embeddings (n, D), labels (n,)."""

    at: slice
    z: torch.Tensor
    y: torch.Tensor

    def halves(self):
        parts = slices(0, len(self.y), -(-len(self.y) // 2))
        return [Run(_moved(part, self.at.start), self.z[part], self.y[part]) for part in parts]


def _idle(at, y, cols, own):
    """Whether queries, their slice and labels, have nothing to see in Run cols: both of one class, or seen mirrored."""
    return own is not None and own + at.start > cols.at.start or y[0] == y[-1] == cols.y[0] == cols.y[-1]


def _tile(tally, rows, cols, own):
    """Show the tally a tile of queries and items, Runs both. own: as in `count`, or None outside its symmetric part."""
    sim = product(rows.z, cols.z)  # (rows, cols)
    if rows.y[0] <= cols.y[-1] and cols.y[0] <= rows.y[-1]:
        sim.masked_fill_(rows.y[:, None] == cols.y, -torch.inf)
    tally(sim, rows.at, cols.at, dim=1)
    if own is not None and own + rows.at.start < cols.at.start:
        tally(sim, _moved(cols.at, -own), _moved(rows.at, own), dim=0)


def _moved(at, by):
    return slice(at.start + by, at.stop + by)


# -------------------------------------------------------------------------------------- blocks, in Triton


@jit
def _sweep(
    rows, cols, row_labels, col_labels, row_limits, col_limits, row_above, col_above, listed, pairs, values, R, C, D, CAP,
    BOTH: tl.constexpr, DIAGONAL: tl.constexpr, B: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    # A program owns a B x B tile of an R x C block of similarities, which lives in its registers only. It serves the
    # rows as queries; with BOTH the columns too. A DIAGONAL block is its own mirror image: half of its tiles suffice.
    i, j = tl.program_id(0), tl.program_id(1)
    if DIAGONAL:
        if i > j:
            return
    r, c = i * B + tl.arange(0, B), j * B + tl.arange(0, B)
    sim = similarities(rows, cols, r, c, R, C, D, B, B, BK, "ieee")
    y = tl.load(row_labels + r, mask=r < R, other=0)
    items_y = tl.load(col_labels + c, mask=c < C, other=0)
    shown = (y[:, None] != items_y[None, :]) & (r < R)[:, None] & (c < C)[None, :]
    sim = tl.where(shown, sim, float("-inf"))
    pair = r[:, None] * C + c[None, :]
    _serve(sim, pair, r, R, row_limits, row_above, listed, pairs, values, CAP, 1)
    if BOTH:
        if i < j or not DIAGONAL:
            _serve(sim, pair, c, C, col_limits, col_above, listed + 1, pairs + CAP, values + CAP, CAP, 0)


@jit
def _serve(sim, pair, q, Q, limits, above, listed, pairs, values, CAP, DIM: tl.constexpr):
    # For queries q (B,), whose items run along DIM: counts those surely above, lists the undecided ones and those that
    # reach the floor. The order of a list varies from run to run, the sums that are made of it do not.
    surely = tl.expand_dims(tl.load(limits + q, mask=q < Q, other=float("inf")), DIM)
    maybe = tl.expand_dims(tl.load(limits + Q + q, mask=q < Q, other=float("inf")), DIM)
    floor = tl.expand_dims(tl.load(limits + 2 * Q + q, mask=q < Q, other=float("inf")), DIM)
    count = tl.sum((sim > surely).to(tl.int32), DIM)
    tl.atomic_add(above + q, count, mask=count > 0)
    wanted = ((sim > maybe) & (sim <= surely)) | (sim >= floor)
    if tl.max(tl.max(wanted.to(tl.int32), 1), 0) > 0:
        slot = tl.atomic_add(listed + tl.zeros_like(pair), 1, mask=wanted)
        held = wanted & (slot < CAP)
        tl.store(pairs + slot, pair, mask=held)
        tl.store(values + slot, sim, mask=held)


META = dict(B=64, BK=16)  # the largest tile that spills nothing on sm80, sm90 and sm100
LAUNCH = dict(num_warps=4, num_stages=3)


def _block(tally, rows, cols, own):
    """As _tile, for a block of any size."""
    R, C = len(rows.y), len(cols.y)
    a, b = (padded(run.z, META["BK"]) for run in (rows, cols))
    sides = [(rows.at, cols.at)]
    limits = [_limits(tally, rows.at, rows, cols)]
    if own is not None:
        sides.append((_moved(cols.at, -own), _moved(rows.at, own)))
        limits.append(_limits(tally, sides[1][0], cols, rows))
    above = [torch.zeros_like(limit[0], dtype=torch.int32) for limit in limits]
    cap = min(CAP, R * C)
    listed = torch.zeros(2, dtype=torch.int32, device=a.device)
    pairs = torch.empty(2, cap, dtype=torch.int32, device=a.device)  # row * C + column
    values = torch.empty(2, cap, device=a.device)
    grid = (-(-R // META["B"]), -(-C // META["B"]))
    diagonal = own is not None and own + rows.at.start == cols.at.start
    _sweep[grid](
        a, b, rows.y.contiguous(), cols.y.contiguous(), limits[0], limits[-1], above[0], above[-1], listed, pairs, values, R, C, a.shape[1], cap,
        BOTH=own is not None, DIAGONAL=diagonal, **META, **LAUNCH,
    )  # fmt: skip
    listed = listed.tolist()
    if max(listed) > cap:
        for part in cols.halves():
            for other in rows.halves():
                if not _idle(other.at, other.y, part, own):
                    _block(tally, other, part, own)
        return
    for side, (queries, items) in enumerate(sides):
        pair, value = pairs[side, : listed[side]].long(), values[side, : listed[side]]
        query, item = (pair // C, pair % C) if side == 0 else (pair % C, pair // C)
        tally.nearest[queries] += above[side]
        tally.listed(query + queries.start, item + items.start, value, queries, items)


def _limits(tally, queries, run, others):
    """What decides about the similarities of a run of queries: surely above, perhaps above, floor, (3, q)."""
    if not tally.nearest_only:
        sample = slice(None, None, -(-len(others.y) // TILE))
        sim = product(run.z, others.z[sample])
        tally.first_look(sim.masked_fill_(run.y[:, None] == others.y[sample], -torch.inf), queries, dim=1)
    return torch.stack([tally.surely[queries], tally.maybe[queries], tally.floor(queries)])


# ----------------------------------------------------------------------------------------------- count


def count(query, query_labels, gallery, gallery_labels, tally, own=None):
    """Show the tally every similarity of a query to an item of another class. Arguments as in `positives`."""
    show, size = (_block, BLOCK) if use_triton(query_labels) else (_tile, TILE)
    tiles, end = slices(0, len(gallery_labels), size), 0
    if own is not None:  # the tiles of the queries themselves lie in a grid of their own, which is symmetric
        end = own + len(query_labels)
        tiles = slices(0, own, size) + slices(own, end, size) + slices(end, len(gallery_labels), size)
    for at in tiles:
        cols = Run(at, gallery[at].float(), gallery_labels[at])
        shared = own if own is not None and own <= at.start < end else None
        for rows in slices(0, len(query_labels), size):
            if not _idle(rows, query_labels[rows], cols, shared):
                show(tally, Run(rows, query[rows].float(), query_labels[rows]), cols, shared)


def ahead_of_time():
    """What tests/aot.py compiles."""
    types = dict.fromkeys(("rows", "cols", "row_limits", "col_limits", "values"), "*fp32")
    types |= dict.fromkeys(("row_labels", "col_labels"), "*i64")
    types |= dict.fromkeys(("row_above", "col_above", "listed", "pairs"), "*i32")
    types |= dict.fromkeys(("R", "C", "D", "CAP"), "i32")
    forms = ((False, False), (True, False), (True, True))
    return [
        dict(kernel=_sweep, types=types, constants=dict(BOTH=both, DIAGONAL=diagonal, **META), plain=("R", "C", "CAP"), **LAUNCH)
        for both, diagonal in forms
    ]

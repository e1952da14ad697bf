"""Metrics against a float64 sort, the geometry against loops over pairs, and the picture."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import eval
from kernels import recall, top_k

KS = (1, 2, 3, 5, 10, 1000)


def sorted_metrics(query, query_labels, gallery=None, gallery_labels=None):
    """Sort each query's gallery in float64. A same-class item is 1e-6 less similar, so that ties count against it."""
    itself = gallery is None
    gallery, gallery_labels = (query, query_labels) if itself else (gallery, gallery_labels)
    sims = F.normalize(query.double(), dim=1) @ F.normalize(gallery.double(), dim=1).T
    right = query_labels[:, None] == gallery_labels
    sims -= 1e-6 * right
    if itself:
        sims.fill_diagonal_(-10)
        right.fill_diagonal_(False)
    right = right.gather(1, sims.argsort(dim=1, descending=True))[right.any(1)].double()
    R, r = right.sum(1, keepdim=True), torch.arange(1, len(gallery) + 1)
    precision = right.cumsum(1) / r
    return dict(
        queries=len(right),
        queries_without_match=len(query) - len(right),
        recall={k: right[:, :k].amax(1).mean().item() for k in KS},
        map_at_r=pytest.approx((precision * right * (r <= R) / R).sum(1).mean().item()),
        r_precision=pytest.approx((right * (r <= R) / R).sum(1).mean().item()),
    )


def full_summary(*arguments):
    return eval.summary(eval.per_query(*arguments, full=True), KS)


def cases():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 12, (90,), generator=generator)
    labels[:5] = torch.tensor([-7, 1000, 2**40, 50, 51])  # queries without a match; any integer is a label
    random = torch.randn(90, 16, generator=generator)
    yield "random", random, labels
    yield "float64", 1e100 * random.double(), labels  # too long for float32
    yield "long", 1e15 * random, labels
    yield "grid", torch.randint(-1, 2, (90, 4), generator=generator).float() + 0.1, labels  # many exact ties
    yield "duplicated", random[torch.randint(0, 30, (90,), generator=generator)], labels
    yield "two classes", random, labels.clamp(0, 1)
    yield "one class", random, torch.zeros(90, dtype=torch.long)
    yield "collapsed", random[:1].expand(90, 16), labels


@pytest.fixture(params=list(cases()), ids=lambda case: case[0])
def case(request):
    return request.param[1:]


@pytest.fixture(params=[7, 1024])
def tile(request, monkeypatch):
    monkeypatch.setattr(recall, "TILE", request.param)
    monkeypatch.setattr(recall, "CHUNK", 90 * request.param)
    monkeypatch.setattr(eval, "HELD", 90 * request.param)


# ------------------------------------------------------------------------------------------- ranking


@pytest.mark.parametrize("split", [None, 40])
def test_every_metric_equals_a_sort(split, case, tile):
    z, y = case
    arguments = (z[:split], y[:split], z[split:], y[split:]) if split else (z, y)
    expected = sorted_metrics(*arguments)
    assert full_summary(*arguments) == expected
    assert eval.recall_at_k(*arguments, ks=KS) == expected["recall"]
    assert eval.map_at_r(*arguments) == expected["map_at_r"]
    assert eval.r_precision(*arguments) == expected["r_precision"]


@pytest.mark.parametrize("per_class", [2, 5, 300])
def test_thousands_of_embeddings_equal_a_sort(per_class):
    generator = torch.Generator().manual_seed(per_class)
    y = torch.randint(0, 1500 // per_class, (1500,), generator=generator)
    z = torch.randn(1500, 24, generator=generator) + 0.5 * torch.randn(1500, 24, generator=generator)[y]
    assert full_summary(z, y) == sorted_metrics(z, y)


@pytest.mark.parametrize("size", [64, 100, 512])
def test_a_collapsed_embedding_scores_zero(size):
    z = torch.randn(1, size, generator=torch.Generator().manual_seed(size)).expand(1500, size)
    value = full_summary(z, torch.arange(1500) // 5)
    assert value["recall"][1000] == value["map_at_r"] == value["r_precision"] == 0


@pytest.mark.parametrize("shards", [2, 3, 100])
def test_shards_of_the_queries_make_up_the_whole(shards, case):
    z, y = case
    slices = [slice(len(y) * n // shards, len(y) * (n + 1) // shards) for n in range(shards)]
    for arguments in ((z, y), (z, y, z[20:], y[20:])):
        parts = [eval.per_query(*arguments, full=True, shard=shard) for shard in slices]
        for values, *pieces in zip(eval.per_query(*arguments, full=True), *parts):
            torch.testing.assert_close(torch.cat(pieces), values, equal_nan=True)


def test_a_table_shows_shares_in_percent():
    result = dict(recall={1: 0.5, 10: 1.0}, map_at_r=0.25, r_precision=0.125, uniformity=-1.5)
    titles, values = eval.table(result)
    assert titles == "     R@1    R@10   MAP@R  R-prec.  uniformity"
    assert values == "   50.00  100.00   25.00    12.50     -1.5000"


def test_arrays_lists_and_any_float_type_are_accepted(case):
    z, y = F.normalize(case[0].double(), dim=1), case[1]
    expected = full_summary(z, y)
    assert full_summary(z.numpy(), y.numpy()) == full_summary(z.tolist(), y.tolist()) == expected
    half = z.bfloat16()
    assert full_summary(half, y) == full_summary(half.float(), y)
    geometry = lambda z, y: [eval.alignment(z, y), eval.uniformity(z), eval.utilization(z[60:], z[:60])]
    assert geometry(z.tolist(), y.tolist()) == pytest.approx(geometry(z, y), 1e-6)


def test_unusable_embeddings_are_named():
    z, y = torch.randn(4, 3), torch.tensor([0, 0, 1, 1])
    for arguments, message in [
        ((z, y[:3]), "query: expected embeddings"),
        ((z, y.float()), "integer labels"),
        ((z[:0], y[:0]), "query: expected embeddings"),
        ((z * torch.nan, y), "NaN or infinity"),
        ((z, y, z[:, :2], y), "queries have 3 columns, the gallery 2"),
        ((z, y, z, y[:2]), "gallery: expected embeddings"),
        ((z, torch.arange(4)), "no query has another item"),
    ]:
        with pytest.raises(ValueError, match=message):
            eval.recall_at_k(*arguments)
    with pytest.raises(ValueError, match="positive integers"):
        eval.recall_at_k(z, y, ks=(0,))


# ------------------------------------------------------------------------------------------- nearest


@pytest.mark.parametrize("G, k", [(1000, 1), (1003, 7), (77, 77), (500, 30), (64, 4), (65, 16)])
def test_the_nearest_are_those_of_a_sort(G, k, monkeypatch):
    monkeypatch.setattr(top_k, "HELD", 5 * G)
    generator = torch.Generator().manual_seed(G)
    query, gallery = torch.randn(11, 8, generator=generator), torch.randn(G, 8, generator=generator)
    expected = (query @ gallery.T).sort(dim=1, descending=True)
    values, indices = top_k.top_k(query, gallery, k)
    assert torch.equal(indices, expected.indices[:, :k])
    torch.testing.assert_close(values, expected.values[:, :k])


def test_an_item_does_not_find_itself():
    z = F.normalize(torch.randn(300, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    assert (top_k.top_k(z, k=3)[1][:, 0] == torch.arange(300)).all()
    assert torch.equal(top_k.top_k(z, k=3, exclude_self=True)[1], top_k.top_k(z, k=4)[1][:, 1:])
    for k in (0, 300):
        with pytest.raises(ValueError, match=f"k is {k}, but there are 299"):
            top_k.top_k(z, k=k, exclude_self=True)


# ------------------------------------------------------------------------------------------ geometry


def test_alignment_uniformity_and_utilization_equal_loops_over_pairs(case, monkeypatch):
    monkeypatch.setattr(eval, "TILE", 32)
    monkeypatch.setattr(eval, "HELD", 1000)
    z, y = F.normalize(case[0].double(), dim=1), case[1]
    squares = {(a, b): (z[a] - z[b]).square().sum().item() for a in range(90) for b in range(a)}
    in_class = [square for (a, b), square in squares.items() if y[a] == y[b]]
    nearest = [min((z[a] - z[b]).square().sum().item() for b in range(60)) for a in range(60, 90)]
    assert eval.alignment(z, y) == pytest.approx(np.mean(in_class), abs=1e-12)
    uniformity = np.log(np.mean([np.exp(-2 * square) for square in squares.values()]))
    assert eval.uniformity(z) == pytest.approx(uniformity, abs=1e-5)
    assert eval.utilization(z[60:], z[:60]) == pytest.approx(np.mean(nearest), abs=1e-5)


def test_too_few_embeddings_have_no_geometry():
    z = torch.randn(3, 2)
    assert eval.uniformity(z[:2]) == pytest.approx(-2 * (z[0] - z[1]).square().sum().item(), rel=1e-4)
    for call, message in [
        (lambda: eval.alignment(z, torch.arange(3)), "no class has two"),
        (lambda: eval.uniformity(z[:1]), "at least two"),
        (lambda: eval.utilization(z[:0], z), r"\(0, 2\) test"),
        (lambda: eval.utilization(z, z[:0]), r"\(0, 2\) training"),
        (lambda: eval.utilization(z, torch.randn(3, 4)), r"\(3, 4\) training"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


# ------------------------------------------------------------------------------------------- picture


def draw(folder, rank, *sides):
    """The pixels of the picture. Each side is embeddings and labels, of images in the colour (10, 120, n)."""
    arguments = []
    for number, (z, y) in enumerate(sides):
        paths = [str(folder / f"{number}-{n}.png") for n in range(len(z))]
        for n, path in enumerate(paths):
            Image.new("RGB", (30, 30), (10, 120 + number, n)).save(path)
        arguments += [z, paths, y]
    eval.retrieval_sheet(folder / "picture.png", rank, *arguments)
    return np.asarray(Image.open(folder / "picture.png"))


def test_the_picture_frames_right_neighbours_green_and_wrong_ones_red(tmp_path):
    """Eight queries of two classes: each has three right and four wrong neighbours."""
    z, y = torch.randn(8, 3), torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    pixels = draw(tmp_path, eval.per_query(z, y).rank, (z, y))
    inner, outer = eval.THUMBNAIL - 10, eval.THUMBNAIL - 4
    frame = outer**2 - inner**2
    assert (pixels == (50, 205, 50)).all(-1).sum() == 8 * 3 * frame
    assert (pixels == (255, 0, 0)).all(-1).sum() == 8 * 4 * frame
    assert (pixels[..., 1] == 120).sum() == 8 * 8 * inner**2
    black = (pixels == 0).all(-1)  # the frames of queries
    assert np.flatnonzero(black[:, 2])[0] == eval.TITLE + 2 and np.flatnonzero(black[eval.TITLE + 2])[0] == 2


def test_the_picture_shows_random_queries_and_then_the_worst_with_their_nearest_items(tmp_path):
    z, y = F.normalize(torch.randn(14, 3), dim=1), torch.arange(14) // 2
    rank = torch.arange(14).index_fill(0, torch.tensor([12]), -1)  # query 12 has nothing to find
    for gallery in ([], [(F.normalize(torch.randn(20, 3), dim=1), torch.arange(20) // 2)]):
        pixels = draw(tmp_path, rank, (z, y), *gallery)
        middle = [eval.TITLE * (1 + row // 5) + eval.THUMBNAIL * row + eval.THUMBNAIL // 2 for row in range(10)]
        queries = pixels[middle, eval.THUMBNAIL // 2, 2].tolist()
        assert queries[5:] == [13, 11, 10, 9, 8] and set(queries[:5]) < set(range(8))
        sim = z[queries] @ (gallery[0][0] if gallery else z).T
        sim[range(10), queries] -= 0 if gallery else 10  # a query is not its own neighbour
        columns = range(2 * eval.THUMBNAIL, pixels.shape[1], eval.THUMBNAIL)
        assert pixels[middle][:, columns, 2].tolist() == sim.topk(10).indices.tolist()
        assert (pixels[middle][:, columns, 1] == 120 + len(gallery)).all()

"""Metrics against a float64 sort, the geometry against loops, the sheet, and the table of many runs."""

import json

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
    hits, average_precision, r_precision = {k: [] for k in KS}, [], []
    for q, label in enumerate(query_labels.tolist()):
        items = [g for g in range(len(gallery)) if not (itself and g == q)]
        right = {g: gallery_labels[g].item() == label for g in items}
        items.sort(key=lambda g: sims[q, g].item() - 1e-6 * right[g], reverse=True)
        found, R = [right[g] for g in items], sum(right.values())
        if not R:
            continue
        for k in KS:
            hits[k].append(any(found[:k]))
        r_precision.append(sum(found[:R]) / R)
        average_precision.append(sum(found[r] * sum(found[: r + 1]) / (r + 1) for r in range(R)) / R)
    mean = lambda values: sum(values) / len(values)
    result = dict(queries=len(r_precision), queries_without_match=len(query) - len(r_precision))
    result |= dict(recall={k: mean(hits[k]) for k in KS})
    return result | dict(map_at_r=mean(average_precision), r_precision=mean(r_precision))


def everything(*arguments, shard=slice(None)):
    return eval.summary(eval.per_query(*arguments, everything=True, shard=shard), KS)


def assert_same(one, other):
    assert one == {name: value if isinstance(value, dict) else pytest.approx(value) for name, value in other.items()}


def cases():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 12, (90,), generator=generator)
    labels[:5] = torch.tensor([-7, 1000, 2**40, 50, 51])  # lone queries; any integer is a label
    random = torch.randn(90, 16, generator=generator)
    yield "random", random, labels
    yield "float64", random.double(), labels
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
    monkeypatch.setattr(recall, "BATCH", request.param)
    monkeypatch.setattr(eval, "HELD", 90 * request.param)


# ------------------------------------------------------------------------------------------- ranking


def test_every_metric_equals_a_sort(case, tile):
    z, y = case
    expected = sorted_metrics(z, y)
    assert_same(everything(z, y), expected)
    assert eval.recall_at_k(z, y, ks=KS) == expected["recall"]
    assert eval.map_at_r(z, y) == pytest.approx(expected["map_at_r"])
    assert eval.r_precision(z, y) == pytest.approx(expected["r_precision"])


def test_every_metric_equals_a_sort_with_a_separate_gallery(case, tile):
    z, y = case
    arguments = z[:40], y[:40], z[40:], y[40:]
    expected = sorted_metrics(*arguments)
    assert_same(everything(*arguments), expected)
    assert eval.recall_at_k(*arguments, ks=KS) == expected["recall"]


@pytest.mark.parametrize("per_class", [2, 5, 300])
def test_thousands_of_embeddings_equal_a_sort(per_class):
    generator = torch.Generator().manual_seed(per_class)
    y = torch.randint(0, 1500 // per_class, (1500,), generator=generator)
    z = torch.randn(1500, 24, generator=generator) + 0.5 * torch.randn(1500, 24, generator=generator)[y]
    sim = F.normalize(z.double(), dim=1) @ F.normalize(z.double(), dim=1).T - 10 * torch.eye(1500)
    sim -= 1e-6 * (y == y[:, None])
    found = y[sim.argsort(dim=1, descending=True)[:, :-1]] == y[:, None]
    found = found[(y == y[:, None]).sum(1) > 1].double()
    R, r = found.sum(1), torch.arange(1, 1500)
    top = found * (r <= R[:, None])
    value = everything(z, y)
    assert value["recall"] == {k: found[:, :k].amax(1).mean().item() for k in KS}
    assert value["r_precision"] == pytest.approx((top.sum(1) / R).mean().item())
    assert value["map_at_r"] == pytest.approx(((top * found.cumsum(1) / r).sum(1) / R).mean().item(), rel=1e-5)


@pytest.mark.parametrize("size", [64, 100, 512])
def test_a_collapsed_embedding_scores_zero(size):
    z = torch.randn(1, size, generator=torch.Generator().manual_seed(size)).expand(1500, size)
    value = everything(z, torch.arange(1500) // 5)
    assert value["recall"][1000] == value["map_at_r"] == value["r_precision"] == 0


def test_the_order_of_the_gallery_does_not_matter(case):
    z, y = case
    order = torch.randperm(len(z), generator=torch.Generator().manual_seed(3))
    assert_same(everything(z[:40], y[:40], z, y), everything(z[:40], y[:40], z[order], y[order]))
    rankings = eval.per_query(z, y, everything=True), eval.per_query(z[order], y[order], everything=True)
    for values, shuffled in zip(*rankings):
        torch.testing.assert_close(values[order], shuffled, equal_nan=True)


@pytest.mark.parametrize("shards", [2, 3, 100])
def test_shards_of_the_queries_make_up_the_whole(shards, case):
    z, y = case
    bounds = [len(y) * n // shards for n in range(shards + 1)]
    for arguments in ((z, y), (z, y, z[20:], y[20:])):
        for kind in (False, True):
            whole = eval.per_query(*arguments, everything=kind)
            parts = [eval.per_query(*arguments, everything=kind, shard=slice(*at)) for at in zip(bounds, bounds[1:])]
            for values, *pieces in zip(whole, *parts):
                if values is not None:
                    torch.testing.assert_close(torch.cat(pieces), values, equal_nan=True)


def test_lone_queries_are_left_out():
    z, y = torch.eye(4), torch.tensor([0, 1, 2, 0])
    ranking = eval.per_query(z, y, everything=True)
    assert ranking.rank.tolist() == [2, -1, -1, 2]
    assert ranking.r_precision.isnan().tolist() == [False, True, True, False]
    value = eval.summary(ranking, ks=(2, 3))
    assert value == dict(queries=2, queries_without_match=2, recall={2: 0.0, 3: 1.0}, map_at_r=0.0, r_precision=0.0)


def test_arrays_and_any_float_type_are_accepted(case):
    z, y = case[0].double(), case[1]
    assert eval.recall_at_k(z.numpy(), y.numpy(), ks=KS) == eval.recall_at_k(z, y, ks=KS)
    half = F.normalize(z, dim=1).bfloat16()
    assert eval.recall_at_k(half, y, ks=KS) == eval.recall_at_k(half.float(), y, ks=KS)


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
    for call, message in [
        (lambda: eval.alignment(z, torch.arange(3)), "no class has two"),
        (lambda: eval.uniformity(z[:1]), "at least two"),
        (lambda: eval.utilization(z, z[:0]), r"\(0, 2\) training"),
        (lambda: eval.utilization(z, torch.randn(3, 4)), r"\(3, 4\) training"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


# ------------------------------------------------------------------------------------------- picture


def test_the_sheet_frames_right_neighbours_green_and_wrong_ones_red(tmp_path):
    """Eight plain images of two classes: every query has three right and four wrong neighbours."""
    paths = [str(tmp_path / f"{n}.png") for n in range(8)]
    for path in paths:
        Image.new("RGB", (30, 30), (10, 120, 200)).save(path)
    z, y = torch.randn(8, 3), torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    eval.retrieval_sheet(tmp_path / "sheet.png", eval.per_query(z, y).rank, z, paths, y)
    pixels = np.asarray(Image.open(tmp_path / "sheet.png"))
    inner, outer = eval.CELL - 10, eval.CELL - 4
    frame = outer**2 - inner**2
    assert (pixels == (50, 205, 50)).all(-1).sum() == 8 * 3 * frame
    assert (pixels == (255, 0, 0)).all(-1).sum() == 8 * 4 * frame
    assert (pixels == (10, 120, 200)).all(-1).sum() == 8 * 8 * inner**2


def test_the_worst_queries_come_last_on_the_sheet(tmp_path):
    paths = [str(tmp_path / f"{n}.png") for n in range(12)]
    for n, path in enumerate(paths):
        Image.new("RGB", (30, 30), (n, 0, 0)).save(path)
    z, y = torch.randn(12, 3), torch.arange(12) // 2
    eval.retrieval_sheet(tmp_path / "sheet.png", torch.arange(12), z, paths, y)
    pixels = np.asarray(Image.open(tmp_path / "sheet.png"))
    tops = [eval.TITLE + eval.CELL * n for n in range(5)] + [2 * eval.TITLE + eval.CELL * n for n in range(5, 10)]
    queries = [int(pixels[top + eval.CELL // 2, eval.CELL // 2, 0]) for top in tops]
    assert queries[5:] == [11, 10, 9, 8, 7] and set(queries[:5]) < set(range(7))


# ----------------------------------------------------------------------------------------- many runs


def write_run(directory, loss, mode, seed, share, epochs=60, logged=None):
    directory.mkdir()
    config = dict(dataset="cub", loss=loss, mode=mode, seed=seed, epochs=epochs)
    (directory / "config.json").write_text(json.dumps(config))
    last = dict(epoch=logged or epochs, recall={"1": share}, map_at_r=share / 2)
    last |= dict(alignment=0.1 * seed, uniformity=-1.0, utilization=0.3)
    (directory / "log.jsonl").write_text(json.dumps(dict(epoch=1)) + "\n" + json.dumps(last) + "\n")
    return str(directory)


def test_runs_are_compared_by_seed(tmp_path, capsys):
    runs = []
    for seed, gain in enumerate((0.01, 0.02, 0.06)):
        base = 0.5 + 0.1 * seed
        runs.append(write_run(tmp_path / f"b{seed}", "contrastive", "baseline", seed, base))
        runs.append(write_run(tmp_path / f"f{seed}", "contrastive", "feature", seed, base + gain, epochs=100))
    runs.append(write_run(tmp_path / "f3", "contrastive", "feature", 3, 0.9, epochs=100))  # without a baseline: no gain
    eval.main(runs)
    out = capsys.readouterr().out
    assert out.startswith("epochs: baseline 60, feature 100\n")
    assert "60.00 +- 5.77" in out  # 50, 60, 70
    assert "3.00 +- 1.53" in out  # gains of 1, 2, 6
    assert "64.7" in out and "67.4" in out  # published
    rows = {row["row"]: row["values"] for row in json.loads(out.splitlines()[-1])["rows"]}
    assert rows["gain, by seed"]["feature"] == pytest.approx([0.5, 1, 3])  # the last such row: MAP@R
    assert rows["recall_at_1"]["input"] == [] and len(rows["recall_at_1"]["feature"]) == 4


def test_an_unfinished_run_is_named(tmp_path, capsys):
    for name in (write_run(tmp_path / "half", "contrastive", "baseline", 0, 0.5, logged=30), str(tmp_path / "none")):
        with pytest.raises(SystemExit) as end:
            eval.main([name])
        error = capsys.readouterr().err
        assert end.value.code == 2 and error.startswith(f"eval: {name}: not a finished run") and error.count("\n") == 1

"""Metrics by counting against a float64 sort, with ties where they hurt; in memory, on disk and over processes."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import eval

ROOT = pathlib.Path(eval.__file__).parent
KS = (1, 2, 3, 5, 10, 1000)


def sorted_metrics(query, query_labels, gallery, gallery_labels, itself):
    """Sort each query's gallery by similarity, other classes first among equals; None for a query without a partner."""
    hits, average_precision, r_precision, lone = {k: [] for k in KS}, [], [], 0
    for q, (vector, label) in enumerate(zip(query.double(), query_labels.tolist())):
        items = [g for g in range(len(gallery)) if not (itself and g == q)]
        R = sum(gallery_labels[g].item() == label for g in items)
        if not R:
            lone += 1
            continue
        sims = (gallery.double() * vector).sum(1).tolist()  # not a product, which may tell equal rows apart
        items.sort(key=lambda g: (-sims[g], gallery_labels[g] == label))
        found = [gallery_labels[g].item() == label for g in items]
        for k in KS:
            hits[k].append(any(found[:k]))
        r_precision.append(sum(found[:R]) / R)
        average_precision.append(sum(found[r] * sum(found[: r + 1]) / (r + 1) for r in range(R)) / R)
    queries = len(r_precision)
    return dict(
        queries=queries,
        lone_queries=lone,
        recall={k: sum(hits[k]) / queries for k in KS},
        map_at_r=pytest.approx(sum(average_precision) / queries, rel=1e-12),
        r_precision=pytest.approx(sum(r_precision) / queries, rel=1e-12),
    )


def cases():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 12, (90,), generator=generator)
    labels[:5] = torch.tensor([-7, 1000, 2**40, 50, 51])  # lone queries, and any integer is a label
    random = torch.randn(90, 16, generator=generator)
    yield "random", random, labels
    yield "float64", random.double(), labels
    yield "huge", 1e30 * random, labels
    yield "minute", 1e-30 * random.double(), labels
    yield "unit", torch.nn.functional.normalize(random, dim=1), labels
    yield "grid", torch.randint(-1, 2, (90, 4), generator=generator).float(), labels  # many exact ties
    yield "duplicated", random[torch.randint(0, 30, (90,), generator=generator)], labels
    yield "few classes", random, labels.clamp(0, 1)
    yield "one class", random, torch.zeros(90, dtype=torch.long)
    yield "collapsed", torch.nn.functional.normalize(random[:1].expand(90, 16), dim=1), labels


@pytest.fixture(params=list(cases()), ids=lambda case: case[0])
def case(request):
    return request.param[1:]


@pytest.fixture(params=[7, 32, 1024])
def tile(request, monkeypatch):
    monkeypatch.setattr(eval.recall, "TILE", request.param)
    monkeypatch.setattr(eval.recall, "AREA", request.param)


def test_every_metric_equals_a_sort(case, tile):
    z, y = case
    assert eval.evaluate(z, y, ks=KS) == sorted_metrics(z, y, z, y, itself=True)


def test_every_metric_equals_a_sort_with_a_separate_gallery(case, tile):
    z, y = case
    query, gallery = slice(0, 40), slice(40, 90)
    value = eval.evaluate(z[query], y[query], z[gallery], y[gallery], ks=KS)
    assert value == sorted_metrics(z[query], y[query], z[gallery], y[gallery], itself=False)


def test_single_metrics_are_those_of_the_whole(case):
    z, y = case
    whole = eval.evaluate(z, y, ks=KS)
    assert eval.recall_at_k(z, y, ks=KS) == whole["recall"]
    assert eval.map_at_r(z, y) == whole["map_at_r"] and eval.r_precision(z, y) == whole["r_precision"]


def test_queries_with_many_positives_are_ranked_in_blocks(case, monkeypatch):
    z, y = case
    whole = eval.evaluate(z, y, ks=KS)
    for pairs in (1, 20, 200):
        monkeypatch.setattr(eval, "PAIRS", pairs)
        monkeypatch.setattr(eval.recall, "TILE", 16)
        assert eval.evaluate(z, y, ks=KS) == whole


@pytest.mark.parametrize("spread", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("per_class", [2, 5, 40, 300])
def test_thousands_of_embeddings_equal_a_sort(per_class, spread):
    """Enough tiles for the floors to rise, classes from small to larger than a tile's share."""
    generator = torch.Generator().manual_seed(per_class)
    y = torch.randint(0, 1500 // per_class, (1500,), generator=generator)
    z = torch.randn(1500, 24, generator=generator) + spread / 24**0.5 * torch.randn(1500, 24, generator=generator)[y]
    z = torch.nn.functional.normalize(z.double(), dim=1)
    sim = z @ z.T
    order = (sim - 10 * torch.eye(1500)).argsort(dim=1, descending=True)[:, :-1]
    found = (y[order] == y[:, None])[(y == y[:, None]).sum(1) > 1].double()  # no ties in random float64 data
    R = found.sum(1)
    top = found * (torch.arange(1, 1500) <= R[:, None])
    precision = found.cumsum(1) / torch.arange(1, 1500)
    eval.recall.TILE, before = 128, eval.recall.TILE
    value = eval.evaluate(z, y, ks=(1, 10))
    eval.recall.TILE = before
    assert value["recall"] == {k: found[:, :k].amax(1).mean().item() for k in (1, 10)}
    assert value["r_precision"] == pytest.approx((top.sum(1) / R).mean().item(), rel=1e-12)
    assert value["map_at_r"] == pytest.approx(((top * precision).sum(1) / R).mean().item(), rel=1e-12)


def test_near_ties_that_float32_cannot_tell_apart_are_decided_exactly():
    """Similarities 1e-8 apart: a float32 product rounds them into each other."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(1, 512, generator=generator, dtype=torch.float64)
    z = torch.nn.functional.normalize(z + 1e-4 * torch.randn(300, 512, generator=generator, dtype=torch.float64), dim=1)
    for z in (z, z.float()):
        y = torch.arange(300) % 60
        assert eval.evaluate(z, y, ks=KS) == sorted_metrics(z, y, z, y, itself=True)


def test_a_collapsed_embedding_scores_zero():
    """Equal vectors are ties in whatever order their products are summed, and ties count against the model."""
    for size in (64, 100, 512):
        z = torch.nn.functional.normalize(torch.randn(1, size).expand(1500, size), dim=1)
        value = eval.evaluate(z, torch.arange(1500) // 5, ks=(1, 1000))
        assert value == dict(queries=1500, lone_queries=0, recall={1: 0.0, 1000: 0.0}, map_at_r=0.0, r_precision=0.0)


def test_the_order_of_the_gallery_does_not_matter(case):
    z, y = case
    order = torch.randperm(len(z), generator=torch.Generator().manual_seed(3))
    assert eval.evaluate(z[:40], y[:40], z, y, KS) == eval.evaluate(z[:40], y[:40], z[order], y[order], KS)
    for values, shuffled in zip(eval.ranking(z, y), eval.ranking(z[order], y[order])):
        torch.testing.assert_close(values[order], shuffled, rtol=0, atol=0, equal_nan=True)


def test_lone_queries_are_left_out():
    z, y = torch.eye(4), torch.tensor([0, 1, 2, 0])
    assert eval.ranking(z, y).rank.tolist() == [2, -1, -1, 2]
    value = eval.evaluate(z, y, ks=(2, 3))
    assert value == dict(queries=2, lone_queries=2, recall={2: 0.0, 3: 1.0}, map_at_r=0.0, r_precision=0.0)
    assert eval.ranking(z, y).r_precision.isnan().tolist() == [False, True, True, False]


def test_a_k_beyond_the_gallery_finds_whatever_there_is():
    z, y = torch.randn(6, 4), torch.tensor([0, 0, 1, 1, 2, 3])
    assert eval.recall_at_k(z, y, ks=(6, 10**9)) == {6: 1.0, 10**9: 1.0}
    assert eval.recall_at_k(z[:3], y[:3], z[3:], y[3:], ks=(3, 100)) == {3: 1.0, 100: 1.0}


def test_arrays_and_tensors_of_any_kind_will_do():
    z, y = torch.randn(30, 5), torch.arange(30) // 3
    expected = eval.recall_at_k(z, y, ks=KS)
    assert eval.recall_at_k(z.numpy(), y.numpy().astype(np.uint16), ks=KS) == expected
    assert eval.recall_at_k(z.clone().requires_grad_(), y.to(torch.uint8), ks=KS) == expected


def test_unusable_embeddings_are_named():
    z, y = torch.randn(6, 4), torch.tensor([0, 0, 1, 1, 2, 2])
    bad = z.clone()
    bad[2, 1] = torch.nan
    for arguments, message in [
        ((z, y[:5]), "query: expected embeddings"),
        ((z, y.float()), "integer labels"),
        ((z[0], y), "query: expected embeddings"),
        ((z[:, :0], y), "query: expected embeddings"),
        ((z / 0, y), "6 embeddings hold NaN or infinity"),
        ((z[:0], y[:0]), "query: expected embeddings"),
        ((z, y, z[:0], y[:0]), "gallery: expected embeddings"),
        ((z, y, z[:, :3], y), "queries have 4 columns, the gallery 3"),
        ((bad, y), "1 embeddings hold NaN"),
        ((z, torch.arange(6)), "no query has another item"),
    ]:
        with pytest.raises(ValueError, match=message):
            eval.recall_at_k(*arguments)
    for ks in ((0,), (1.5,), ("1",)):
        with pytest.raises(ValueError, match="ks must be positive integers"):
            eval.recall_at_k(z, y, ks=ks)


# -------------------------------------------------------------------------- beyond one tensor in memory


def rank_a_part(process, processes, store, z, y, results):
    """What each process does: its uneven part of the queries, its part of the gallery; the last has hardly anything."""
    torch.set_num_threads(1)
    eval.recall.TILE, eval.recall.AREA = 16, 64
    torch.distributed.init_process_group("gloo", f"file://{store}", rank=process, world_size=processes)
    group = torch.distributed.group.WORLD
    ends = [0, 50, 89, 90][: processes] + [90]
    mine, gallery = slice(ends[process], ends[process + 1]), slice(ends[-2 - process], ends[-1 - process])
    outcome = [eval.evaluate(z[mine], y[mine], ks=KS, group=group)]
    outcome.append(eval.recall_at_k(z[mine], y[mine], ks=KS, group=group))
    outcome.append(eval.evaluate(z[mine], y[mine], z[gallery], y[gallery], ks=KS, group=group))
    eval.PAIRS = 50
    outcome.append(eval.evaluate(z[mine], y[mine], ks=KS, group=group))
    try:
        eval.recall_at_k(z[mine] * (torch.nan if process == 0 else 1), y[mine], group=group)
    except ValueError as error:
        outcome.append(str(error))
    torch.distributed.destroy_process_group()
    torch.save(outcome, f"{results}/{process}.pt")


@pytest.mark.parametrize("processes", [2, 3])
def test_sharded_over_processes_gives_the_identical_numbers(processes, tmp_path):
    by_name = dict((name, (z, y)) for name, z, y in cases())
    for name in ("unit", "grid"):
        z, y = by_name[name]
        whole, separate = eval.evaluate(z, y, ks=KS), eval.evaluate(z, y, z, y, ks=KS)
        arguments = (processes, tmp_path / f"store-{name}", z, y, tmp_path)
        torch.multiprocessing.spawn(rank_a_part, arguments, nprocs=processes)
        for process in range(processes):
            *values, error = torch.load(tmp_path / f"{process}.pt")
            assert values == [whole, whole["recall"], separate, whole]
            assert "hold NaN" in error and error.startswith("query" if process == 0 else "in another process")


def as_memmap(path, array):
    file = np.memmap(path, array.dtype, "w+", shape=array.shape)
    file[:] = array
    file.flush()
    return np.memmap(path, array.dtype, "r", shape=array.shape)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_memory_map_is_evaluated_like_what_it_holds(dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(eval.recall, "TILE", 16)
    z, y = torch.randn(90, 8).numpy().astype(dtype), np.random.default_rng(0).integers(-5, 5, 90)
    file = as_memmap(tmp_path / "z", z)
    assert eval.evaluate(file, y, ks=KS) == eval.evaluate(z, y, ks=KS)
    assert eval.evaluate(z[:20], y[:20], file, y, ks=KS) == eval.evaluate(z[:20], y[:20], z, y, ks=KS)
    assert eval.geometry(file, y, file[:30]) == eval.geometry(z, y, z[:30])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tensor", "memmap"])
def test_memory_grows_with_a_tile_not_with_the_square(kind, tmp_path):
    """Stanford Online Products' test set: 60,502 embeddings of 512, 124 MB; their similarities would be 14.6 GB."""
    code = f"""
import resource, sys
sys.path.insert(0, {str(ROOT)!r})
import numpy as np, torch, eval
y = np.arange(60502) // 5
z = np.memmap({str(tmp_path / 'z')!r}, np.float32, "w+", shape=(60502, 512))
for rows in range(0, len(z), 4096):
    z[rows : rows + 4096] = torch.nn.functional.normalize(torch.randn(len(z[rows : rows + 4096]), 512), dim=1)
if {kind!r} == "tensor":
    z = torch.from_numpy(z[:].copy())
eval.evaluate(z[:2000], y[:2000])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
eval.evaluate(z, y, ks=(1, 10, 100, 1000))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert float(done.stdout) < 600, done.stderr


# ------------------------------------------------------------------------------- how embeddings lie


def test_alignment_uniformity_and_utilization_equal_loops_over_pairs(case, monkeypatch):
    monkeypatch.setattr(eval.recall, "TILE", 32)
    z, y = torch.nn.functional.normalize(case[0].double(), dim=1), case[1]
    pairs = [(a, b) for a in range(90) for b in range(a)]
    squares = {(a, b): (z[a] - z[b]).square().sum().item() for a, b in pairs}
    of_a_class = [squares[a, b] for a, b in pairs if y[a] == y[b]]
    nearest = [min((z[a] - z[b]).square().sum().item() for b in range(60)) for a in range(60, 90)]
    for z, tolerance in ((z, 1e-12), (z.float(), 1e-5)):
        expected = dict(
            alignment=sum(of_a_class) / len(of_a_class),
            uniformity=np.log(np.mean([np.exp(-2 * square) for square in squares.values()])),
            utilization=sum(nearest) / 30,
        )
        value = eval.geometry(z, y) | dict(utilization=eval.utilization(z[60:], z[:60]))
        assert value == pytest.approx(expected, rel=tolerance, abs=tolerance)


def test_what_has_no_pair_has_no_geometry():
    z = torch.randn(3, 2)
    for call, message in [
        (lambda: eval.alignment(z, torch.arange(3)), "no class has two"),
        (lambda: eval.uniformity(z[:1]), "at least two"),
        (lambda: eval.utilization(z, z[:0]), "0 x 2 training"),
        (lambda: eval.utilization(z, torch.randn(3, 4)), "3 x 4 training"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


# -------------------------------------------------------------------------------------- from a file


def evaluate_file(path, *more):
    command = [sys.executable, str(ROOT / "eval.py"), "--embeddings", str(path), *more]
    return subprocess.run(command, capture_output=True, text=True)


def test_anybodys_embeddings_are_evaluated_from_a_file(tmp_path):
    z, y = np.random.default_rng(0).normal(size=(60, 8)), np.arange(60) % 7
    np.savez(tmp_path / "own.npz", embeddings=z, labels=y, train_embeddings=z[:9])
    done = evaluate_file(tmp_path / "own.npz", "--ks", "1,10")
    printed = json.loads(done.stdout.splitlines()[-1])
    expected = eval.evaluate(z, y, ks=(1, 10)) | eval.geometry(z, y, z[:9])
    assert done.returncode == 0 and printed == json.loads(json.dumps(expected))
    assert f"{100 * expected['map_at_r']:.2f}" in done.stdout and "60 queries" in done.stdout
    np.savez(tmp_path / "gallery.npz", embeddings=z[:20], labels=y[:20], gallery_embeddings=z[20:], gallery_labels=y[20:])
    printed = json.loads(evaluate_file(tmp_path / "gallery.npz").stdout.splitlines()[-1])
    assert printed["map_at_r"] == eval.map_at_r(z[:20], y[:20], z[20:], y[20:])


def test_a_file_that_cannot_be_evaluated_is_told_in_one_line(tmp_path, capsys):
    z, y = np.ones((4, 3)), np.arange(4)
    np.savez(tmp_path / "no_labels.npz", embeddings=z)
    np.savez(tmp_path / "short.npz", embeddings=z, labels=y[:3])
    np.savez(tmp_path / "lone.npz", embeddings=z, labels=y)
    np.savez(tmp_path / "words.npz", embeddings=z, labels=np.array(list("abcd")))
    np.savez(tmp_path / "objects.npz", embeddings=z, labels=np.array([None] * 4))
    np.save(tmp_path / "one.npy", z)
    (tmp_path / "text.npz").write_text("embeddings")
    (tmp_path / "broken.npz").write_bytes((tmp_path / "lone.npz").read_bytes()[:300])
    for name, message in [
        ("missing.npz", "No such file"),
        ("no_labels.npz", "no array labels in it, but embeddings"),
        ("short.npz", "expected embeddings (N, D) and N integer labels"),
        ("lone.npz", "no query has another item"),
        ("words.npz", "labels"),
        ("objects.npz", ""),
        ("one.npy", "one array"),
        ("text.npz", ""),
        ("broken.npz", ""),
    ]:
        with pytest.raises(SystemExit) as ended:
            eval.main(["--embeddings", str(tmp_path / name)])
        out, told = capsys.readouterr()
        assert (ended.value.code, out) == (2, ""), name
        assert told.startswith(f"eval: {tmp_path / name}: ") and told.count("\n") == 1 and message in told
    done = evaluate_file(tmp_path / "lone.npz", "--ks", "one")
    assert (done.returncode, done.stderr) == (2, "eval: --ks one: expected numbers such as 1,10,100\n")


# --------------------------------------------------------------------------------------------- sheet


def test_the_sheet_frames_right_neighbours_green_and_wrong_ones_red(tmp_path):
    """Eight plain images of two classes: every query has three right and four wrong neighbours."""
    paths = [str(tmp_path / f"{n}.png") for n in range(8)]
    for path in paths:
        Image.new("RGB", (30, 30), (10, 120, 200)).save(path)
    z, y = torch.randn(8, 3), torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    eval.retrieval_sheet(tmp_path / "sheet.png", eval.ranking(z, y).rank, z, paths, y)
    pixels = np.asarray(Image.open(tmp_path / "sheet.png"))
    inner, outer = eval.SHEET_CELL - 10, eval.SHEET_CELL - 4
    frame = outer**2 - inner**2
    assert (pixels == (50, 205, 50)).all(-1).sum() == 8 * 3 * frame
    assert (pixels == (255, 0, 0)).all(-1).sum() == 8 * 4 * frame
    assert (pixels == (10, 120, 200)).all(-1).sum() == 8 * 8 * inner**2

"""Recall by counting against a float64 sort, with ties where they hurt."""

import numpy as np
import pytest
import torch
from PIL import Image

import eval

KS = (1, 2, 3, 5, 10, 1000)


def sorted_recall(query, query_labels, gallery, gallery_labels, ks, itself):
    """Sort each query's gallery by similarity, other classes first among equals; None for a query without a partner."""
    hits = {k: [] for k in ks}
    for q, (vector, label) in enumerate(zip(query.double(), query_labels.tolist())):
        items = [g for g in range(len(gallery)) if not (itself and g == q)]
        if all(gallery_labels[g] != label for g in items):
            continue
        sims = (gallery.double() @ vector).tolist()
        items.sort(key=lambda g: (-sims[g], gallery_labels[g] == label))
        found = [gallery_labels[g].item() == label for g in items]
        for k in ks:
            hits[k].append(any(found[:k]))
    return {k: sum(hits[k]) / len(hits[k]) for k in ks}


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
    monkeypatch.setattr(eval, "TILE", request.param)
    monkeypatch.setattr(eval, "BAND", request.param)


def test_recall_equals_a_sort(case, tile):
    z, y = case
    assert eval.recall_at_k(z, y, ks=KS) == sorted_recall(z, y, z, y, KS, itself=True)


def test_recall_equals_a_sort_with_a_separate_gallery(case, tile):
    z, y = case
    query, gallery = slice(0, 40), slice(40, 90)
    value = eval.recall_at_k(z[query], y[query], z[gallery], y[gallery], ks=KS)
    assert value == sorted_recall(z[query], y[query], z[gallery], y[gallery], KS, itself=False)


def test_near_ties_that_float32_cannot_tell_apart_are_decided_exactly():
    """Similarities 1e-8 apart: a float32 product rounds them into each other."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(1, 512, generator=generator, dtype=torch.float64)
    z = torch.nn.functional.normalize(z + 1e-4 * torch.randn(300, 512, generator=generator, dtype=torch.float64), dim=1)
    for z in (z, z.float()):
        y = torch.arange(300) % 60
        assert eval.recall_at_k(z, y, ks=KS) == sorted_recall(z, y, z, y, KS, itself=True)


def test_a_collapsed_embedding_scores_zero():
    """Equal vectors are ties in whatever order their products are summed, and ties count against the model."""
    for size in (64, 100, 512):
        z = torch.nn.functional.normalize(torch.randn(1, size).expand(1500, size), dim=1)
        assert eval.recall_at_k(z, torch.arange(1500) // 5, ks=(1, 1000)) == {1: 0.0, 1000: 0.0}


def test_the_order_of_the_gallery_does_not_matter(case):
    z, y = case
    order = torch.randperm(len(z), generator=torch.Generator().manual_seed(3))
    assert eval.recall_at_k(z[:40], y[:40], z, y, KS) == eval.recall_at_k(z[:40], y[:40], z[order], y[order], KS)
    assert torch.equal(eval.ranks(z, y)[order], eval.ranks(z[order], y[order]))


def test_lone_queries_are_left_out():
    z, y = torch.eye(4), torch.tensor([0, 1, 2, 0])
    assert eval.ranks(z, y).tolist() == [2, -1, -1, 2]
    assert eval.recall_at_k(z, y, ks=(2, 3)) == {2: 0.0, 3: 1.0}


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
        ((z[:0], y[:0]), "query: expected embeddings"),
        ((z, y, z[:0], y[:0]), "gallery: expected embeddings"),
        ((z, y, z[:, :3], y), "queries have 4 columns, the gallery 3"),
        ((bad, y), "1 embeddings hold NaN"),
        ((z, torch.arange(6)), "no query has another item"),
    ]:
        with pytest.raises(ValueError, match=message):
            eval.recall_at_k(*arguments)


def test_the_sheet_frames_right_neighbours_green_and_wrong_ones_red(tmp_path):
    """Eight plain images of two classes: every query has three right and four wrong neighbours."""
    paths = [str(tmp_path / f"{n}.png") for n in range(8)]
    for path in paths:
        Image.new("RGB", (30, 30), (10, 120, 200)).save(path)
    z, y = torch.randn(8, 3), torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    eval.retrieval_sheet(tmp_path / "sheet.png", eval.ranks(z, y), z, paths, y)
    pixels = np.asarray(Image.open(tmp_path / "sheet.png"))
    inner, outer = eval.SHEET_CELL - 10, eval.SHEET_CELL - 4
    frame = outer**2 - inner**2
    assert (pixels == (50, 205, 50)).all(-1).sum() == 8 * 3 * frame
    assert (pixels == (255, 0, 0)).all(-1).sum() == 8 * 4 * frame
    assert (pixels == (10, 120, 200)).all(-1).sum() == 8 * 8 * inner**2

"""Recall's Triton form against its plain form, and both against a loop."""

import pytest
import torch
import torch.nn.functional as F
from conftest import Launches, Reads

import eval
import kernels
from kernels import recall

SHAPES = {  # labels of queries, and of a separate gallery
    "odd": (torch.arange(37) % 9, None),
    "smaller than a tile": (torch.tensor([3, 3, 1]), None),
    "beyond a tile": (torch.randint(0, 30, (150,), generator=torch.Generator().manual_seed(0)), None),
    "one class": (torch.zeros(70, dtype=torch.int64), None),
    "gallery": (torch.arange(37) % 9, torch.arange(80) % 11),
    "gallery without some classes": (torch.arange(70) % 9, torch.arange(20) % 5),
}


def embeddings(n, seed):
    z = F.normalize(torch.randn(n, 100, generator=torch.Generator().manual_seed(seed)), dim=1)
    z[n // 2] = z[0]  # a duplicate
    return z


def inputs(shape, device):
    y, gallery_labels = SHAPES[shape]
    arguments = [embeddings(len(y), 0), y]
    if gallery_labels is not None:
        arguments += [embeddings(len(gallery_labels), 1), gallery_labels]
    return [x.to(device) for x in arguments]


def loop(query, query_labels, gallery=None, gallery_labels=None):
    itself = gallery is None
    gallery, gallery_labels = (query, query_labels) if itself else (gallery, gallery_labels)
    sims, result = query.double() @ gallery.double().T, []
    for q in range(len(query)):
        same = [g for g in range(len(gallery)) if gallery_labels[g] == query_labels[q] and not (itself and g == q)]
        best = max((sims[q, g] for g in same), default=None)
        others = [g for g in range(len(gallery)) if gallery_labels[g] != query_labels[q]]
        result.append(-1 if best is None else sum(int(sims[q, g] >= best - 1e-6) for g in others))
    return torch.tensor(result)


@pytest.mark.parametrize("choice, unused", [("torch", "_triton_count"), ("triton", "_torch_count")])
@pytest.mark.parametrize("shape", SHAPES)
def test_ranks_equal_a_loop_in_both_forms(shape, choice, unused, triton_device, monkeypatch):
    monkeypatch.setattr(kernels, "backend", choice)
    monkeypatch.setattr(recall, unused, None)  # calling it is an error: the switch switches
    monkeypatch.setattr(recall, "TILE", 32)
    monkeypatch.setattr(recall, "BATCH", 50)
    arguments = inputs(shape, triton_device)
    expected = loop(*(x.cpu() for x in arguments))
    assert torch.equal(recall.ranks(*arguments).cpu(), expected)
    for shard in (slice(0, 1), slice(3, 20), slice(20, None)):
        assert torch.equal(recall.ranks(*arguments, shard=shard).cpu(), expected[shard])


def test_two_runs_give_equal_counts(triton_device):
    arguments = inputs("beyond a tile", triton_device)
    assert torch.equal(recall.ranks(*arguments), recall.ranks(*arguments))


def test_launches_do_not_grow_with_the_number_of_classes(monkeypatch):
    """Classes of 2 to 12 images, as in SOP, and its four ks."""
    monkeypatch.setattr(recall, "_torch_count", lambda *a, symmetric: torch.zeros_like(a[1]))  # in Triton one launch
    counts = []
    for classes in (200, 1000):
        sizes = torch.randint(2, 13, (classes,), generator=torch.Generator().manual_seed(0))
        y = torch.arange(classes).repeat_interleave(sizes)
        with Launches() as launches, Reads() as reads:
            eval.recall_at_k(embeddings(len(y), 0), y, ks=(1, 10, 100, 1000))
        counts.append((launches.count, reads.count))
    assert counts[0] == counts[1]
    assert counts[0][0] <= 100 and counts[0][1] <= 3, counts

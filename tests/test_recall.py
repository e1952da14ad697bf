"""Recall in PyTorch and in Triton against a loop over pairs in float64."""

import pytest
import torch
import torch.nn.functional as F
from conftest import Launches, Reads

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


@pytest.mark.parametrize("backend, unused", [("torch", "triton_count"), ("triton", "plain_count")])
@pytest.mark.parametrize("shape", SHAPES)
def test_ranks_equal_a_loop_in_both_backends(shape, backend, unused, triton_device, monkeypatch):
    monkeypatch.setattr(kernels, "backend", backend)
    monkeypatch.setattr(recall, unused, None)  # so that calling it is an error
    monkeypatch.setattr(recall, "TILE", 32)
    monkeypatch.setattr(recall, "CHUNK", 1000)
    y, gallery_labels = SHAPES[shape]
    arguments = [embeddings(len(y), 0), y]
    if gallery_labels is not None:
        arguments += [embeddings(len(gallery_labels), 1), gallery_labels]
    expected = loop(*arguments)

    arguments = [x.to(triton_device) for x in arguments]
    assert torch.equal(recall.ranks(*arguments).cpu(), expected)
    for shard in (slice(0, 1), slice(3, 20), slice(20, None)):
        assert torch.equal(recall.ranks(*arguments, shard=shard).cpu(), expected[shard])


def test_launches_do_not_grow_with_the_number_of_classes(monkeypatch):
    monkeypatch.setattr(recall, "plain_count", lambda s, bound: torch.zeros_like(s.order))  # one launch in Triton
    monkeypatch.setattr(recall, "CHUNK", 2**18)
    z, counts = embeddings(1000, 0), set()
    for size in (2, 5, 50):
        y = torch.arange(1000) // size
        with Launches() as launches, Reads() as reads:
            recall.ranks(z, y)
        counts.add((launches.count, reads.count))
    assert len(counts) == 1
    launches, reads = counts.pop()
    assert launches <= 60 and reads == 1

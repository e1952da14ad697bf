"""Counting and nearest neighbours by kernels, against float64 loops and against the PyTorch forms."""

import eval
import kernels
import numpy as np
import pytest
import torch
from kernels import recall
from kernels.top_k import top_k
from test_eval import KS, as_memmap, cases


@pytest.fixture(autouse=True)
def garbage():
    """What torch.empty gives is full of NaN and the largest integers, so whatever is not written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=[(8192, 2**22), (70, 400)], ids=["one block", "short lists"])
def block(request, monkeypatch):
    monkeypatch.setattr(recall, "TILE", 16)
    monkeypatch.setattr(recall, "BLOCK", request.param[0])
    monkeypatch.setattr(recall, "CAP", request.param[1])


def shapes():
    """(name, embeddings, labels in ascending order)."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 9, (137,), generator=generator).sort().values
    random = torch.randn(137, 100, generator=generator)
    grid = torch.randint(-1, 2, (137, 3), generator=generator).float()
    yield "random", random, labels
    yield "grid", grid, labels
    yield "duplicated", random[torch.randint(0, 40, (137,), generator=generator)], labels
    yield "collapsed", random[:1].expand(137, 100), labels
    yield "one class", grid, torch.zeros_like(labels)
    yield "a class and singletons", grid, torch.arange(137).clamp_min(20)
    yield "pairs", random, torch.arange(137) // 2
    yield "fewer than a tile", grid[:37], labels[:37]


def check_counts(query, query_labels, gallery, gallery_labels, own, nearest_only):
    """Count by the kernel, then by a loop over queries in float64."""
    inputs = (query, query_labels, gallery, gallery_labels)
    found, start = recall.positives(*inputs, own, nearest_only)
    error = (query.shape[1] + 8) * query.double().norm(dim=1) * gallery.double().norm(dim=1).max()
    reach = 2 * error * 2.0**-53
    tally = recall.Tally(query, gallery, found, start, error * 2.0**-24 + 1e-30, reach, nearest_only)
    recall.count(*inputs, tally, own)
    for q in range(len(query)):
        positives = found[start[q] : start[q + 1]]
        if not len(positives):
            assert tally.nearest[q] == 0
            continue
        others = gallery[gallery_labels != query_labels[q]].double() @ query[q].double()
        above = (others >= positives[:, None] - reach[q]).sum(1)  # c_1, c_2, ..
        assert tally.nearest[q] == above[0]
        if not nearest_only:
            between, alive = tally.between[start[q] : start[q + 1]], int(tally.alive[q])
            assert torch.equal(between.cumsum(0)[:alive], above[:alive])
            assert not (torch.arange(1, len(above) + 1, device=above.device) + above <= len(above))[alive:].any()


@pytest.mark.parametrize("nearest_only", [True, False])
@pytest.mark.parametrize("shape", list(shapes()), ids=lambda shape: shape[0])
def test_counts_equal_a_loop_in_float64(shape, nearest_only, block, triton_device):
    z, y = (x.to(triton_device) for x in shape[1:])
    check_counts(z, y, z, y, 0, nearest_only)


@pytest.mark.filterwarnings("ignore:.*non-contiguous")
@pytest.mark.parametrize("shape", list(shapes()), ids=lambda shape: shape[0])
def test_queries_may_be_part_of_the_gallery_or_none_of_it(shape, block, triton_device):
    z, y = (x.to(triton_device) for x in shape[1:])
    part = slice(5, 35)
    check_counts(z[part], y[part], z, y, 5, False)
    check_counts(z[::4], y[::4], z[1::2], y[1::2], None, False)


def test_embeddings_may_lie_in_memory_in_any_order(triton_device):
    _, z, y = next(shapes())
    z, y = z[:, :96].T.contiguous().T.to(triton_device), y.to(triton_device)  # 96: nothing is padded, which would copy
    check_counts(z, y, z, y, 0, False)
    assert torch.equal(top_k(z, k=3)[1], (z @ z.T).topk(3).indices)


def test_a_short_list_cuts_its_block_until_it_holds_every_pair(triton_device, monkeypatch):
    sizes, uncut = [], recall._block
    monkeypatch.setattr(recall, "CAP", 200)
    monkeypatch.setattr(recall, "_block", lambda tally, rows, cols, own: (sizes.append(len(rows.y)), uncut(tally, rows, cols, own)))
    z, y = torch.ones(90, 4, device=triton_device), torch.arange(90, device=triton_device) // 3
    assert eval.recall_at_k(z, y, ks=(1, 87)) == {1: 0.0, 87: 0.0}
    assert sizes[0] == 90 and min(sizes) ** 2 <= 200


@pytest.mark.parametrize("case", list(cases()), ids=lambda case: case[0])
def test_every_metric_is_that_of_the_pytorch_form(case, block, triton_device, monkeypatch):
    z, y = (x.to(triton_device) for x in case[1:])
    arguments = [(z, y, None, None), (z[:40], y[:40], z[40:], y[40:])]
    rankings = [eval.ranking(*some, nearest_only=only) for some in arguments for only in (True, False)]
    metrics = [eval.evaluate(*some, KS) for some in arguments]
    monkeypatch.setattr(kernels, "choice", "torch")
    assert metrics == [eval.evaluate(*some, KS) for some in arguments]
    expected = [eval.ranking(*some, nearest_only=only) for some in arguments for only in (True, False)]
    torch.testing.assert_close(rankings, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("per_class", [5, 200])
def test_floors_rise_from_block_to_block(per_class, triton_device, monkeypatch):
    monkeypatch.setattr(recall, "TILE", 64)
    monkeypatch.setattr(recall, "BLOCK", 256)
    generator = torch.Generator().manual_seed(per_class)
    y = torch.randint(0, 1000 // per_class, (1000,), generator=generator).to(triton_device)
    z = torch.nn.functional.normalize(torch.randn(1000, 24, generator=generator), dim=1).to(triton_device)
    value = eval.evaluate(z, y, ks=KS)
    monkeypatch.setattr(kernels, "choice", "torch")
    assert value == eval.evaluate(z, y, ks=KS)


def test_a_memory_map_is_counted_by_blocks(tmp_path, triton_device, monkeypatch):
    if triton_device != "cpu":
        pytest.skip("memory maps are read on the CPU")
    monkeypatch.setattr(recall, "BLOCK", 30)
    z, y = torch.randn(90, 7).numpy(), np.random.default_rng(0).integers(0, 9, 90)
    file = as_memmap(tmp_path / "z", z)
    value = eval.evaluate(file, y, ks=KS)
    monkeypatch.setattr(kernels, "choice", "torch")
    assert value == eval.evaluate(z, y, ks=KS)


def evaluate_a_part(process, store, z, y, results):
    torch.set_num_threads(1)
    kernels.choice, recall.BLOCK = "triton", 30
    torch.distributed.init_process_group("gloo", f"file://{store}", rank=process, world_size=2)
    mine = slice(0, 50) if process == 0 else slice(50, 90)
    torch.save(eval.evaluate(z[mine], y[mine], ks=KS, group=torch.distributed.group.WORLD), f"{results}/{process}.pt")
    torch.distributed.destroy_process_group()


def test_processes_count_together(tmp_path, triton_device, monkeypatch):
    if triton_device != "cpu":
        pytest.skip("the processes would share one GPU")
    z, y = torch.randn(90, 7), torch.randint(0, 9, (90,))
    torch.multiprocessing.spawn(evaluate_a_part, (tmp_path / "store", z, y, tmp_path), nprocs=2)
    monkeypatch.setattr(kernels, "choice", "torch")
    for process in range(2):
        assert torch.load(tmp_path / f"{process}.pt") == eval.evaluate(z, y, ks=KS)


# --------------------------------------------------------------------------------- nearest neighbours


@pytest.fixture(params=["torch", "triton"])
def form(request, triton_device, monkeypatch):
    monkeypatch.setattr(kernels, "choice", request.param)
    monkeypatch.setattr("kernels.top_k.TILE", 16)
    return triton_device


@pytest.mark.parametrize("exclude_self", [False, True])
@pytest.mark.parametrize("k", [1, 5, 32, 100, 136, 137])
def test_the_nearest_come_first_and_ties_by_index(k, exclude_self, form):
    for _, z, _ in list(shapes())[:4]:
        if z.shape[1] > 3:
            z = (4 * z[:, :31]).round()  # integers: products are exact, equal ones are ties
        query = z[:37]
        if k > len(z) - exclude_self:
            with pytest.raises(ValueError, match="top_k: k = 137, but there are 136 items to find"):
                top_k(query.to(form), z.to(form), k, exclude_self)
            continue
        sim = query.double() @ z.double().T
        if exclude_self:
            sim[torch.arange(37), torch.arange(37)] = -torch.inf
        expected = sim.sort(dim=1, descending=True, stable=True)
        value, index = top_k(query.to(form), z.to(form), k, exclude_self)
        assert value.dtype == torch.float32 and torch.equal(value.cpu().double(), expected.values[:, :k])
        assert index.dtype == torch.int64 and torch.equal(index.cpu(), expected.indices[:, :k])


def test_the_queries_are_the_gallery_by_default(form):
    z = torch.randn(20, 5, generator=torch.Generator().manual_seed(0)).to(form)
    value, index = top_k(z, k=20)
    torch.testing.assert_close(value, (z @ z.T).sort(dim=1, descending=True).values)
    assert torch.equal(index.sort(dim=1).values, torch.arange(20, device=form).expand(20, 20))


def test_zeros_of_either_sign_tie(form):
    gallery = torch.tensor([[-1e-30], [1e-30], [0.0], [-0.0]], device=form)
    assert top_k(torch.tensor([[1e-30]], device=form), gallery, 4)[1].tolist() == [[0, 1, 2, 3]]


def test_no_queries_find_nothing(form):
    z = torch.randn(6, 3).to(form)
    assert [x.shape for x in top_k(z[:0], z, 4)] == [(0, 4), (0, 4)]


def test_an_impossible_k_is_told_in_one_line(form):
    z = torch.randn(6, 3).to(form)
    for k in (0, 7):
        with pytest.raises(ValueError, match=f"^top_k: k = {k}, but there are 6 items to find$"):
            top_k(z, k=k)

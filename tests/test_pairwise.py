"""Sums over pairs: pieces of rows against whole matrices, and Triton against PyTorch."""

import pytest
import torch
import torch.nn.functional as F

import kernels
import losses
from kernels import pairwise

BATCHES = {
    "odd": torch.randint(0, 9, (37,), generator=torch.Generator().manual_seed(0)),
    "singletons": torch.arange(21),
    "some singletons": torch.tensor([0, 0, 0, 0, 1, 1, 2, 3, 7]),
    "one class": torch.zeros(11, dtype=torch.int64),
    "two": torch.tensor([3, 3]),
    "more than a tile": torch.randint(0, 30, (150,), generator=torch.Generator().manual_seed(1)),
    "labels beyond 32 bits": torch.tensor([2**40, -5, 2**40 + 2**32, -5, 2**40, 2**33, 2**33]),
}
RHOS = {
    "hinge": pairwise.Rho("hinge", push_base=1.3),
    "no margin": pairwise.Rho("hinge", push_base=-0.1),
    "exponential": losses.MultiSimilarity(2, 10, 0.1, 0.2).rho,
    "steep": losses.ProxyAnchor(1, 1).rho,
}
CASES = ("clean", "mined", "against others", "mixed")


def embeddings(y, size=24, spread=0.6):
    generator = torch.Generator().manual_seed(len(y))
    label = y.unique(return_inverse=True)[1]
    centres = torch.randn(len(y) + 1, size, generator=generator)
    return F.normalize(centres[label] + spread * torch.randn(len(y), size, generator=generator), dim=1)


def arguments(case, y, size=24, device="cpu", dtype=torch.float32):
    """x, v, x_keys, v_keys, and epsilon, mixed."""
    x, x_keys = embeddings(y, size), torch.stack([y, torch.arange(len(y))])
    v, v_keys = x, x_keys
    if case in ("against others", "mixed"):
        i = torch.randint(0, len(y), (145,), generator=torch.Generator().manual_seed(2))
        v, v_keys = embeddings(y[i], size), torch.stack([y[i], i])
    x, v = (x.to(device, dtype),) * 2 if v is x else (x.to(device, dtype), v.to(device, dtype))
    return (x, v, x_keys.to(device), v_keys.to(device)), (0.2 if case == "mined" else None, case == "mixed")


def with_gradients(x, v, x_keys, v_keys, rho, *rest):
    """The four sums, and the gradients of x and v for a gradient of the sums that differs in every row."""
    inputs = [x.detach().clone().requires_grad_()]
    inputs += [inputs[0]] if v is x else [v.detach().clone().requires_grad_()]
    sums = pairwise.pair_sums(*inputs, x_keys, v_keys, rho, *rest)
    upstream = torch.linspace(0.5, 2, len(x), dtype=sums[0].dtype, device=x.device)
    (sums[0] @ upstream + sums[1] @ upstream.flip(0)).backward()
    return [*(part.detach() for part in sums), *(z.grad for z in inputs)]


def assert_close(results, expected, tolerance, gradient_tolerance=None):
    """Within the tolerance, relative to the largest element or 1."""
    assert len(results) == len(expected) == 6
    for n, (one, other) in enumerate(zip(results, expected)):
        bound = (tolerance if n < 4 else gradient_tolerance or tolerance) * max(1, other.abs().max().item())
        torch.testing.assert_close(one.double(), other.double(), rtol=0, atol=bound)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("batch", BATCHES)
def test_pieces_equal_the_whole(batch, case, monkeypatch):
    tensors, rest = arguments(case, BATCHES[batch], dtype=torch.float64)
    expected = with_gradients(*tensors, RHOS["hinge"], *rest)
    monkeypatch.setattr(pairwise, "PIECE", 300)
    assert_close(with_gradients(*tensors, RHOS["hinge"], *rest), expected, 1e-12)


@pytest.mark.parametrize("pairs, pieces", [(99, 5), (100, 4), (120, 4), (139, 4), (140, 3), (400, 1), (5, 20)])
def test_a_piece_holds_at_most_so_many_pairs(pairs, pieces, monkeypatch):
    monkeypatch.setattr(pairwise, "PIECE", pairs)
    sizes = []
    pairwise.in_pieces(lambda rows: sizes.append(len(rows)) or (rows,), 20, torch.zeros(20))
    assert len(sizes) == pieces and sum(sizes) == 20 and max(sizes) * 20 <= max(pairs, 20)


@pytest.mark.parametrize("rho", RHOS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("batch", BATCHES)
def test_triton_equals_pytorch(batch, case, rho, triton_device, monkeypatch):
    tensors, rest = arguments(case, BATCHES[batch], 100, triton_device)
    if batch == "more than a tile" and rho in ("no margin", "exponential"):
        pytest.skip("the other two take this many seconds already")
    fused = with_gradients(*tensors, RHOS[rho], *rest)
    monkeypatch.setattr(kernels, "backend", "torch")
    expected = with_gradients(*tensors, RHOS[rho], *rest)
    tolerance = {"steep": 1e-4, "exponential": 3e-5}.get(rho, 1e-5)  # exponents magnify the error of split products
    assert_close(fused, expected, tolerance, max(tolerance, 3e-5) if triton_device == "cuda" else None)


@pytest.mark.parametrize("case", CASES)
def test_every_element_is_written(case, triton_device, monkeypatch):
    """Memory that is allocated but not set holds NaN here."""
    tensors, rest = arguments(case, BATCHES["odd"], device=triton_device)
    for name in ("empty", "empty_like"):
        allocate = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, allocate=allocate, **k: poison(allocate(*a, **k)))
    assert all(result.isfinite().all() for result in with_gradients(*tensors, RHOS["hinge"], *rest))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("case", CASES)
def test_nan_is_not_lost(case, backend, triton_device, monkeypatch):
    monkeypatch.setattr(kernels, "backend", backend)
    (x, v, *keys), rest = arguments(case, BATCHES["odd"], device=triton_device)
    v[3, 2] = torch.nan
    sums = pairwise.pair_sums(x, v, *keys, RHOS["hinge"], *rest)
    assert (sums[0].sum() + sums[1].sum()).isnan()


def poison(tensor):
    return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the interpreter runs programs one after another")
@pytest.mark.parametrize("case", CASES)
def test_two_runs_give_equal_bits(case, triton_device):
    tensors, rest = arguments(case, BATCHES["more than a tile"], 100, triton_device)
    runs = [with_gradients(*tensors, RHOS["hinge"], *rest) for _ in range(2)]
    assert all(map(torch.equal, *runs))


@pytest.mark.parametrize("needed", ["x", "v"])
def test_one_gradient_may_be_left_out(needed, triton_device):
    (x, v, *keys), rest = arguments("mixed", BATCHES["odd"], device=triton_device)
    both = with_gradients(x, v, *keys, RHOS["hinge"], *rest)[4:]
    x, v = x.requires_grad_(needed == "x"), v.requires_grad_(needed == "v")
    sums = pairwise.pair_sums(x, v, *keys, RHOS["hinge"], *rest)
    upstream = torch.linspace(0.5, 2, len(x), device=triton_device)
    (sums[0] @ upstream + sums[1] @ upstream.flip(0)).backward()
    torch.testing.assert_close(x.grad if needed == "x" else v.grad, both[needed == "v"])
    assert (v.grad if needed == "x" else x.grad) is None


def test_second_derivatives_are_right_in_pytorch(monkeypatch):
    (x, v, *keys), rest = arguments("mixed", BATCHES["some singletons"], 3, dtype=torch.float64)
    x, v = x.requires_grad_(), v[:4].requires_grad_()
    keys[1] = keys[1][:, :4]
    for pairwise_piece in (2**23, 8):
        monkeypatch.setattr(pairwise, "PIECE", pairwise_piece)
        for rho in (RHOS["hinge"], RHOS["exponential"]):
            assert torch.autograd.gradgradcheck(lambda x, v: pairwise.pair_sums(x, v, *keys, rho, *rest)[:2], (x, v))


def test_second_derivatives_are_refused_by_triton(triton_device):
    tensors, rest = arguments("clean", BATCHES["two"], device=triton_device)
    x = tensors[0].requires_grad_()
    pull = pairwise.pair_sums(x, x, *tensors[2:], RHOS["hinge"], *rest)[0]
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(pull.sum(), x, create_graph=True)


@pytest.mark.parametrize("choice", ["torch", "triton"])
def test_the_backend_can_be_chosen(choice, triton_device, monkeypatch):
    other = {"torch": "triton_pair_sums", "triton": "plain_sums"}[choice]
    monkeypatch.setattr(pairwise, other, None)  # calling it is an error
    monkeypatch.setattr(kernels, "backend", choice)
    tensors, rest = arguments("clean", BATCHES["two"], device=triton_device)
    with_gradients(*tensors, RHOS["hinge"], *rest)


def test_float64_never_runs_in_triton(triton_device, monkeypatch):
    monkeypatch.setattr(pairwise, "triton_pair_sums", None)
    tensors, rest = arguments("clean", BATCHES["two"], device=triton_device, dtype=torch.float64)
    assert with_gradients(*tensors, RHOS["hinge"], *rest)[0].dtype == torch.float64


def test_a_backend_that_cannot_run_says_why(monkeypatch):
    monkeypatch.setattr(kernels, "backend", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        losses.Contrastive()(torch.randn(4, 3), torch.tensor([0, 0, 1, 1]))
    monkeypatch.setattr(kernels, "triton", None)
    with pytest.raises(ValueError, match="Triton is not installed"):
        losses.Contrastive()(torch.randn(4, 3), torch.tensor([0, 0, 1, 1]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_vectors_are_summed_in_float32(dtype):
    (x, _, *keys), rest = arguments("clean", BATCHES["odd"])
    x = x.to(dtype)
    exact = pairwise.pair_sums(x.float(), x.float(), *keys, RHOS["hinge"], *rest)
    x = x.requires_grad_()
    sums = pairwise.pair_sums(x, x, *keys, RHOS["hinge"], *rest)
    for one, other in zip(sums, exact):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other)
    sums[0].sum().backward()
    assert x.grad.dtype == dtype and x.grad.isfinite().all()

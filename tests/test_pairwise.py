"""Sums over pairs and triplets: plain and Triton forms against matrices under autograd.

Tolerances relative to the largest element: 1e-10 in float64; 1e-5 in float32 (the interpreter multiplies in float32).
"""

import pytest
import torch
import torch.nn.functional as F

import kernels
import losses
from kernels import mixed, pairwise

BATCHES = {
    "odd": torch.randint(0, 9, (37,), generator=torch.Generator().manual_seed(0)),
    "singletons": torch.arange(21),
    "some singletons": torch.tensor([0, 0, 0, 0, 1, 1, 2, 3, 7]),
    "one class": torch.zeros(11, dtype=torch.int64),
    "two": torch.tensor([3, 3]),
    "beyond a tile": torch.randint(0, 30, (66,), generator=torch.Generator().manual_seed(1)),
}
RHOS = {
    "hinge": kernels.Rho(kernels.HINGE, push_base=1.3),
    "no margin": kernels.Rho(kernels.HINGE, push_base=-0.1),
    "exponential": losses.MultiSimilarity(2, 10, 0.1, 0.2).rho,
    "steep": losses.ProxyAnchor(1, 1).rho,
}
FORMS = ("clean", "mined", "against others", "mixed")


def embeddings(y, size=24, spread=0.6):
    generator = torch.Generator().manual_seed(len(y))
    centres = torch.randn(int(y.max()) + 1, size, generator=generator)
    return F.normalize(centres[y] + spread * torch.randn(len(y), size, generator=generator), dim=1)


def case(form, y, size=24):
    """x, v, row, column, epsilon, mixed"""
    z, keys = embeddings(y, size), torch.stack([y, torch.arange(len(y))])
    if form in ("clean", "mined"):
        return z, None, keys, keys, 0.2 if form == "mined" else None, False
    i = torch.randint(0, len(y), (45,), generator=torch.Generator().manual_seed(2))
    return z, embeddings(y[i], size), keys, torch.stack([y[i], i]), None, form == "mixed"


def dense_terms(s, rho):
    if rho.kind == kernels.HINGE:
        d = (2 - 2 * s).clamp_min(1e-12).sqrt()
        return d, (rho.push_base - d).relu()
    return (-rho.pull_scale * (s - rho.pull_base)).exp(), (rho.push_scale * (s - rho.push_base)).exp()


def dense_sums(x, v, row, column, rho, epsilon=None, mixed=False):
    s = x @ (x if v is None else v).T
    same = row[0, :, None] == column[0]
    positive = same & (row[1, :, None] != column[1])
    negative = positive if mixed else ~same
    if epsilon is not None:
        lowest = s.detach().masked_fill(~positive, torch.inf).amin(1, keepdim=True)
        highest = s.detach().masked_fill(~negative, -torch.inf).amax(1, keepdim=True)
        positive, negative = positive & (s < highest + epsilon), negative & (s > lowest - epsilon)
    pull, push = dense_terms(s, rho)
    pull, push = pull.where(positive, 0), push.where(negative, 0)
    return pull.sum(1), push.sum(1), (pull > 0).sum(1), (push > 0).sum(1)


def with_gradients(function, x, v, *rest):
    inputs = [z.detach().clone().requires_grad_() for z in (x, v) if z is not None]
    sums = function(*inputs, *[None] * (2 - len(inputs)), *rest)
    upstream = torch.linspace(0.5, 2, len(x), dtype=x.dtype, device=x.device)
    (sums[0] @ upstream + sums[1] @ upstream.flip(0)).backward()  # different for every row and for pull and push
    return [*(part.detach() for part in sums), *(z.grad for z in inputs)]


def assert_close(results, expected, tolerance):
    assert len(results) == len(expected)
    for one, other in zip(results, expected):
        bound = tolerance * max(1, other.abs().max().item())
        torch.testing.assert_close(one.double(), other.double(), rtol=0, atol=bound)


@pytest.mark.parametrize("rho", RHOS.values(), ids=RHOS.keys())
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("batch", BATCHES)
def test_the_plain_form_equals_matrices(batch, form, rho, monkeypatch):
    monkeypatch.setattr(pairwise, "CHUNK", 300)
    x, v, row, column, epsilon, mixed = case(form, BATCHES[batch])
    x, v = x.double(), None if v is None else v.double()
    expected = with_gradients(dense_sums, x, v, row, column, rho, epsilon, mixed)
    assert_close(with_gradients(pairwise.pair_sums, x, v, row, column, rho, epsilon, mixed), expected, 1e-10)


@pytest.mark.parametrize("rho", ["hinge", "steep"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("batch", BATCHES)
def test_triton_equals_the_plain_form(batch, form, rho, triton_device, monkeypatch):
    x, v, row, column, epsilon, mixed = case(form, BATCHES[batch], size=100)
    x, v, row, column = (z if z is None else z.to(triton_device) for z in (x, v, row, column))
    rest = row, column, RHOS[rho], epsilon, mixed
    fused = with_gradients(pairwise.pair_sums, x, v, *rest)
    monkeypatch.setattr(kernels, "backend", "torch")
    tolerance = 1e-4 if rho == "steep" else 1e-5  # exponents magnify bf16x3's error
    assert_close(fused, with_gradients(pairwise.pair_sums, x, v, *rest), tolerance)


def triplets(y, device, lam=0.3, dtype=torch.float32):
    z = embeddings(y).to(device, dtype)
    keys = losses.bank_keys(y, torch.arange(len(y)), "positive-negative")
    a, p = losses.in_bank(*keys).nonzero(as_tuple=True)
    return z @ z.T, (z @ z.T).flip(0), y.to(device), a.to(device), p.to(device), lam


def dense_embed_sums(W, S, y, a, p, lam, rho):
    length = (lam**2 + (1 - lam) ** 2 + 2 * lam * (1 - lam) * S[p]).clamp_min(1e-12).sqrt()
    pull, push = dense_terms((lam * W[a, p][:, None] + (1 - lam) * W[a]) / length, rho)
    other = y[p, None] != y
    parts = pull.where(other, 0), push.where(other, 0), other, (push.where(other, 0) > 0)
    return [W.new_zeros(len(W)).index_add(0, a, part.sum(1).to(W.dtype)) for part in parts]


ODD = [("odd", "hinge"), ("odd", "exponential"), ("singletons", "hinge"), ("two", "hinge")]


@pytest.mark.parametrize("batch, rho", ODD)
def test_embed_sums_equal_matrices_in_both_forms(batch, rho, triton_device, monkeypatch):
    monkeypatch.setattr(mixed, "CHUNK", 500)
    *arguments, lam = triplets(BATCHES[batch], triton_device, dtype=torch.float64)
    expected = with_gradients(dense_embed_sums, *arguments, lam, RHOS[rho])
    assert_close(with_gradients(mixed.embed_sums, *arguments, lam, RHOS[rho]), expected, 1e-10)
    *arguments, lam = triplets(BATCHES[batch], triton_device)
    assert_close(with_gradients(mixed.embed_sums, *arguments, lam, RHOS[rho]), expected, 1e-5)


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_a_mix_of_opposite_embeddings_has_finite_gradients(lam, triton_device, monkeypatch):
    """At lam = 0.5 their mix has length 0, which is clamped."""
    y = torch.tensor([0, 0, 1, 1, 2], device=triton_device)
    z = embeddings(y.cpu()).to(triton_device)
    z[3] = -z[0]
    for metric in (losses.Contrastive(1.45), losses.MultiSimilarity(), losses.ProxyAnchor(3, 24).to(triton_device)):
        for kernels.backend in ("torch", "triton"):
            x = z.clone().requires_grad_()
            metric.mixed_embed(x, y, lam, "positive-negative").backward()
            assert x.grad.isfinite().all()


def run_everything(device):
    results = []
    for form in FORMS:
        x, v, row, column, epsilon, mix = case(form, BATCHES["odd"])
        x, v, row, column = (z if z is None else z.to(device) for z in (x, v, row, column))
        results += with_gradients(pairwise.pair_sums, x, v, row, column, RHOS["hinge"], epsilon, mix)
    *arguments, lam = triplets(BATCHES["odd"], device)
    return results + with_gradients(mixed.embed_sums, *arguments, lam, RHOS["hinge"])


def test_every_element_is_written(triton_device, monkeypatch):
    """Memory that is allocated but not set holds NaN here."""
    for name in ("empty", "empty_like"):
        allocate = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, allocate=allocate, **k: poison(allocate(*a, **k)))
    assert all(result.isfinite().all() for result in run_everything(triton_device))


def poison(tensor):
    return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor


def test_two_runs_give_equal_bits(triton_device):
    assert all(map(torch.equal, run_everything(triton_device), run_everything(triton_device)))


@pytest.mark.parametrize("choice", ["torch", "triton"])
def test_the_switch_chooses_the_form(choice, triton_device, monkeypatch):
    other = {"torch": "_triton", "triton": "_torch"}[choice]
    for file in (pairwise, mixed):
        for name in ("sums", "gradients"):
            monkeypatch.setattr(file, f"{other}_{name}", None)  # calling it is an error
    monkeypatch.setattr(kernels, "backend", choice)
    run_everything(triton_device)


def test_a_choice_that_cannot_run_says_why(monkeypatch):
    monkeypatch.setattr(kernels, "backend", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        losses.Contrastive()(torch.randn(4, 3), torch.tensor([0, 0, 1, 1]))
    monkeypatch.setattr(kernels, "triton", None)
    with pytest.raises(ValueError, match="Triton is not installed"):
        losses.Contrastive()(torch.randn(4, 3), torch.tensor([0, 0, 1, 1]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_vectors_are_summed_in_float32(dtype):
    x, _, row, column, _, _ = case("clean", BATCHES["odd"])
    exact = pairwise.pair_sums(x.to(dtype).float(), None, row, column, RHOS["hinge"])
    x = x.to(dtype).requires_grad_()
    sums = pairwise.pair_sums(x, None, row, column, RHOS["hinge"])
    for one, other in zip(sums, exact):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other)
    sums[0].sum().backward()
    assert x.grad.dtype == dtype and x.grad.isfinite().all()

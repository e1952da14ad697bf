"""The sums that kernels make for the losses, against the losses on whole matrices: values and gradients.

Tolerances: float64 1e-10; float32 1e-5 relative to the largest element (the interpreter multiplies in plain float32).
"""

import pytest
import torch

import kernels
import losses
from kernels import mixed, pairwise

D = 24
BATCHES = {
    "balanced": torch.arange(40) // 5,
    "odd": torch.randint(0, 9, (37,), generator=torch.Generator().manual_seed(0)),
    "singletons": torch.arange(21),
    "some singletons": torch.tensor([0, 0, 0, 0, 1, 1, 2, 3, 7]),
    "one class": torch.zeros(11, dtype=torch.int64),
    "two": torch.tensor([3, 3]),
    "beyond a tile": torch.randint(0, 30, (70,), generator=torch.Generator().manual_seed(1)),
}
LOSSES = {
    "contrastive": lambda: losses.Contrastive(),
    "wide contrastive": lambda: losses.Contrastive(neg_margin=1.45),
    "no margin": lambda: losses.Contrastive(neg_margin=-0.1),
    "multisimilarity": lambda: losses.MultiSimilarity(),
    "gentle multisimilarity": lambda: losses.MultiSimilarity(2, 10, 0.1, 0.2),
    "proxyanchor": lambda: losses.ProxyAnchor(31, D),
}


def embeddings(y, size=D, spread=0.6):
    """Clustered by class, so that hinges fire and miners mine."""
    generator = torch.Generator().manual_seed(len(y))
    return torch.randn(int(y.max()) + 1, size, generator=generator)[y] + spread * torch.randn(len(y), size, generator=generator)


def forms(metric, z, y):
    """The clean loss, the mixed ones against a bank, and those of embed mode, each as a function of its inputs."""
    yield "clean", lambda z, v: metric(z, y)
    for pairing in metric.pairings:
        i = losses.full_bank(y, pairing)[0]
        i = i[:: 1 + len(i) // 60]  # sixty examples of any bank will do
        if len(i):
            yield f"bank {pairing}", lambda z, v, i=i, pairing=pairing: metric.mixed(z, y, v[: len(i)], i, 0.3, pairing)
        yield f"embed {pairing}", lambda z, v, pairing=pairing: metric.mixed_embed(z, y, 0.3, pairing)


def value_and_gradients(function, metric, *inputs):
    inputs = [x.clone().requires_grad_() for x in inputs]
    value = function(*inputs)
    (1.7 * value).backward()  # not a unit gradient from above
    return [value.detach()] + [x.grad for x in [*inputs, *metric.parameters()] if x.grad is not None]


def assert_equal_forms(metric, z, y, tolerance, **switched):
    """Every form in plain PyTorch against itself with attributes of modules switched, {"module.name": value}."""
    assert metric.rho.is_served()
    v = torch.randn(60, z.shape[1], generator=torch.Generator().manual_seed(2)).to(z)
    for name, function in forms(metric, z, y):
        results = []
        for switches in ({"kernels.choice": "torch"}, switched):
            with pytest.MonkeyPatch.context() as patch:
                for attribute, value in switches.items():
                    patch.setattr(attribute, value)
                results.append(value_and_gradients(function, metric, z, v))
            metric.zero_grad()
        assert len(results[0]) == len(results[1]) >= 2, name
        for plain, fused in zip(*results):
            bound = tolerance * max(1, plain.abs().max().item())
            torch.testing.assert_close(fused, plain, rtol=0, atol=bound, msg=lambda told: f"{name}: {told}")


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("batch", BATCHES)
def test_sums_by_rows_equal_the_whole_matrix(loss, batch, monkeypatch):
    """The PyTorch form, which serves large batches on a CPU."""
    monkeypatch.setattr(pairwise, "CHUNK", 300)
    monkeypatch.setattr(mixed, "CHUNK", 500)
    y = BATCHES[batch]
    z = embeddings(y).double()
    z[-1] = z[0]  # a distance of 0
    assert_equal_forms(LOSSES[loss]().double(), z, y, 1e-10, **{"losses.MANY": 0, "losses.MANY_TRIPLETS": 0})


@pytest.mark.parametrize("loss", ["wide contrastive", "multisimilarity", "gentle multisimilarity", "proxyanchor"])
@pytest.mark.parametrize("batch", [name for name in BATCHES if name != "balanced"])
def test_triton_equals_the_whole_matrix(loss, batch, triton_device):
    y = BATCHES[batch].to(triton_device)
    metric = LOSSES[loss]().to(triton_device)
    assert_equal_forms(metric, embeddings(y.cpu()).to(triton_device), y, 1e-5, **{"kernels.choice": "triton"})


@pytest.mark.parametrize("size", [5, 100, 1024])
def test_any_number_of_dimensions_will_do(size, triton_device):
    y = BATCHES["some singletons"].to(triton_device)
    for metric in (losses.Contrastive(1.45), losses.MultiSimilarity(), losses.ProxyAnchor(8, size)):
        z = embeddings(y.cpu(), size).to(triton_device)
        assert_equal_forms(metric.to(triton_device), z, y, 1e-5, **{"kernels.choice": "triton"})


def test_equal_embeddings_have_finite_gradients(triton_device):
    """Where a distance is nearly 0, float32 knows little of it: only that nothing may blow up is asked here."""
    y = torch.tensor([0, 0, 0, 1, 1], device=triton_device)
    for metric in (losses.Contrastive(), losses.MultiSimilarity(), losses.ProxyAnchor(3, D)):
        z = torch.ones(5, D, device=triton_device)
        for name, function in forms(metric.to(triton_device), z, y):
            for result in value_and_gradients(function, metric, z, torch.ones(60, D, device=triton_device)):
                assert result.isfinite().all(), name


def _poisoned(tensor):
    return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor


def test_every_element_is_written(triton_device, monkeypatch):
    """What is allocated unset holds NaN here."""
    for name in ("empty", "empty_like"):
        made = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, made=made, **k: _poisoned(made(*a, **k)))
    y = BATCHES["odd"].to(triton_device)
    for metric in (losses.Contrastive(), losses.MultiSimilarity(), losses.ProxyAnchor(31, D)):
        z = embeddings(y.cpu()).to(triton_device)
        for name, function in forms(metric.to(triton_device), z, y):
            for result in value_and_gradients(function, metric, z, torch.ones(60, D, device=triton_device)):
                assert result.isfinite().all(), name


def test_two_runs_give_equal_bits(triton_device):
    y = BATCHES["odd"].to(triton_device)
    z, v = embeddings(y.cpu()).to(triton_device), torch.randn(60, D, device=triton_device)
    for metric in (losses.Contrastive(), losses.MultiSimilarity(), losses.ProxyAnchor(31, D)):
        for name, function in forms(metric.to(triton_device), z, y):
            first = value_and_gradients(function, metric, z, v)
            first = [result.clone() for result in first]
            metric.zero_grad()
            again = value_and_gradients(function, metric, z, v)
            metric.zero_grad()
            assert all(torch.equal(one, other) for one, other in zip(first, again)), name


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_the_ends_of_lam(lam, triton_device):
    """At 0.5, opposite embeddings mix to nothing: the length is clamped, and nothing is divided by 0."""
    y = torch.tensor([0, 0, 1, 1, 2], device=triton_device)
    z = embeddings(y.cpu()).to(triton_device)
    z[3] = -z[0]
    for metric in (losses.Contrastive(1.45), losses.MultiSimilarity(), losses.ProxyAnchor(3, D)):
        metric = metric.to(triton_device)
        for pairing in metric.pairings:
            results = []
            for choice in ("torch", "triton"):
                kernels.choice = choice
                results.append(value_and_gradients(lambda z: metric.mixed_embed(z, y, lam, pairing), metric, z))
                results[-1] = [result.clone() for result in results[-1]]
                metric.zero_grad()
            for one, other in zip(*results):
                assert one.isfinite().all() and other.isfinite().all()
                if lam != 0.5:
                    torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5 * max(1, one.abs().max().item()))


def test_what_a_kernel_cannot_serve_is_left_to_the_plain_form(triton_device):
    """Exponents that overflow unshifted, and float64."""
    y = BATCHES["some singletons"]
    z = embeddings(y)
    steep = losses.MultiSimilarity(500, 500, 0.5, 0.1)
    assert not steep.rho.is_served() and steep(z.to(triton_device), y.to(triton_device)).isfinite()
    metric = losses.Contrastive()
    assert not metric.fused(z.double().to(triton_device), 81, 100) and metric.fused(z.to(triton_device), 81, 100)


def test_a_choice_that_cannot_run_is_told(monkeypatch):
    monkeypatch.setattr(kernels, "choice", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        losses.Contrastive()(torch.randn(4, 3), torch.tensor([0, 0, 1, 1]))
    monkeypatch.setattr(kernels, "triton", None)
    with pytest.raises(RuntimeError, match="Triton is not installed"):
        losses.Contrastive()(torch.randn(4, 3), torch.tensor([0, 0, 1, 1]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_vectors_are_summed_in_float32(dtype):
    """By the PyTorch form; the interpreter cannot multiply bfloat16."""
    y = BATCHES["odd"]
    z = torch.nn.functional.normalize(embeddings(y), dim=1)
    rows, columns = pairwise.Rows(y, torch.arange(37)), pairwise.Columns(y, torch.arange(37))
    rho = kernels.Rho(kernels.HINGE, push_base=1.2)
    exact = pairwise.pair_sums(z.to(dtype).float(), None, rows, columns, rho)
    x = z.to(dtype).requires_grad_()
    sums = pairwise.pair_sums(x, None, rows, columns, rho)
    for one, other in zip(sums, exact):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other)
    sums[0].sum().backward()
    assert x.grad.dtype == dtype and x.grad.isfinite().all()

"""The fused mix and pool: PyTorch's version against the mixed maps it never writes, Triton's against PyTorch's."""

import itertools

import pytest
import torch

import kernels
from kernels import mix_pool as module
from kernels.mix_pool import mix_pool


def naive(features, i, j, lam):
    maps = (lam * features[i] + (1 - lam) * features[j]).flatten(2)
    return maps.mean(2) + maps.max(2).values


def value_and_gradient(pool, features, i, j, lam, upstream):
    features = features.detach().requires_grad_()
    value = pool(features, i, j, lam)
    return value.detach(), torch.autograd.grad(value, features, upstream)[0]


def sparse_relu(*shape):
    """Maps after a ReLU, most maxima of which are tied at 0."""
    return (torch.randn(shape) - 1.5).relu()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("shape", [(5, 3, 1, 1), (6, 20, 3, 3), (4, 7, 2, 5), (3, 4, 16, 16)])
@pytest.mark.parametrize("pairs", [0, 1, 37])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_mix_pool_equals_mixed_maps(shape, pairs, layout, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 40)
    features = torch.randn(shape, dtype=torch.float64).contiguous(memory_format=layout)
    case = features, *torch.randint(shape[0], (2, pairs)), 0.3, torch.randn(pairs, shape[1], dtype=torch.float64)
    ours, expected = value_and_gradient(mix_pool, *case), value_and_gradient(naive, *case)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_only_what_comes_out(dtype):
    features, upstream = torch.randn(6, 20, 7, 7).to(dtype), torch.randn(500, 20).to(dtype)
    i, j = torch.randint(6, (2, 500))
    ours = value_and_gradient(mix_pool, features, i, j, 0.3, upstream)
    exact = value_and_gradient(mix_pool, features.float(), i, j, 0.3, upstream.float())
    for half, single in zip(ours, exact):
        assert half.dtype == dtype and torch.equal(half, single.to(dtype))


def test_a_large_map_is_refused():
    with pytest.raises(ValueError, match="1 x 257 .* --image-size 512"):
        mix_pool(torch.zeros(2, 3, 1, 257), torch.tensor([0]), torch.tensor([1]), 0.5)


def test_second_derivatives_are_refused():
    features = torch.randn(3, 4, 2, 2, requires_grad=True)
    value = mix_pool(features, torch.tensor([0]), torch.tensor([1]), 0.3).square().sum()
    (gradient,) = torch.autograd.grad(value, features, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("backend", kernels.BACKENDS[1:])
def test_ties_give_their_gradient_to_the_first_position(backend, triton_device, monkeypatch):
    monkeypatch.setattr(kernels, "backend", backend)
    features = sparse_relu(6, 8, 4, 4).to(triton_device)
    i, j = torch.randint(6, (2, 30), device=triton_device)
    upstream = torch.randn(8, 30, device=triton_device).T  # not contiguous
    case = features, i, j, 0.5, upstream
    torch.testing.assert_close(value_and_gradient(mix_pool, *case), value_and_gradient(naive, *case))


def test_double_precision_is_not_rounded(triton_device):
    features = torch.randn(4, 5, 3, 3, dtype=torch.float64, device=triton_device)
    i, j = torch.randint(4, (2, 9), device=triton_device)
    torch.testing.assert_close(mix_pool(features, i, j, 0.3), naive(features, i, j, 0.3), rtol=1e-12, atol=1e-12)


# -------------------------------------------------------------------------------------------- Triton


@pytest.fixture
def backends_agree(triton_device, monkeypatch):
    """Compare Triton's value and gradient with PyTorch's. Triton's outputs start as NaN or 255."""

    def check(features, i, j):
        upstream = torch.randn(len(i), features.shape[1]).to(features.dtype)
        case = [x.to(triton_device) for x in (features, i, j)] + [0.3, upstream.to(triton_device)]
        torch.use_deterministic_algorithms(True)  # this fills new tensors
        ours = value_and_gradient(mix_pool, *case)
        monkeypatch.setattr(kernels, "backend", "torch")
        tolerance = dict(rtol=2e-6, atol=2e-6) if features.dtype == torch.float32 else {}
        torch.testing.assert_close(ours, value_and_gradient(mix_pool, *case), **tolerance)

    yield check
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("shape", [(37, 5, 2, 2), (3, 100, 7, 7), (9, 1, 3, 5), (5, 16, 1, 1), (4, 5, 16, 16)])
@pytest.mark.parametrize("maps", [torch.randn, sparse_relu])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_backends_agree_on_odd_shapes(shape, maps, layout, backends_agree):
    backends_agree(maps(*shape).contiguous(memory_format=layout), *torch.randint(shape[0], (2, 2 * shape[0])))


repeats_out_of_order = [(3, 1), (0, 8), (3, 1), (3, 1), (1, 3), (8, 0), (0, 8)]


@pytest.mark.parametrize("pairs", [list(itertools.product(range(9), range(9))), repeats_out_of_order, [(8, 8)], []])
def test_backends_agree_on_any_bank(pairs, backends_agree):
    backends_agree(torch.randn(9, 6, 2, 3), *torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).T)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_backends_agree_in_half_precision(dtype, backends_agree, triton_device):
    if dtype == torch.bfloat16 and triton_device == "cpu":
        pytest.skip("Triton's interpreter does not round to bfloat16")
    backends_agree(torch.randn(9, 20, 3, 3).to(dtype), *torch.randint(9, (2, 40)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: the interpreter runs programs one after another")
def test_two_runs_give_the_same_bits(triton_device):
    features, upstream = torch.randn(100, 2048, 7, 7, device="cuda"), torch.randn(9000, 2048, device="cuda")
    i, j = torch.randint(100, (2, 9000), device="cuda")
    once, again = (value_and_gradient(mix_pool, features, i, j, 0.3, upstream) for _ in range(2))
    assert all(map(torch.equal, once, again))

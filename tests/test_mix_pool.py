"""The fused mix and pool: PyTorch's form against the mixed maps it never writes, Triton's against PyTorch's."""

import types

import kernels
import losses
import metrix
import model as models
import pytest
import torch
from kernels import mix_pool as module
from kernels.mix_pool import mix_pool

Y = torch.tensor([2, 0, 1, 0, 2, 0, 3, 1, 1, 2, 0])  # labels of a batch; class 3 has no positive pair


def naive(features, i, j, lam):
    maps = (lam * features[i] + (1 - lam) * features[j]).flatten(2)
    return maps.mean(2) + maps.max(2).values


def value_and_gradient(pool, features, i, j, lam, upstream):
    features = features.detach().requires_grad_()
    value = pool(features, i, j, lam)
    return value.detach(), torch.autograd.grad(value, features, upstream)[0]


@pytest.mark.parametrize("shape", [(5, 3, 1, 1), (6, 20, 3, 3), (4, 7, 2, 5), (3, 4, 16, 16)])
@pytest.mark.parametrize("pairs", [0, 1, 37])
@pytest.mark.parametrize("channels_last", [False, True])
def test_mix_pool_equals_mixed_maps(shape, pairs, channels_last, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 40)
    torch.manual_seed(0)
    features = torch.randn(shape, dtype=torch.float64)
    if channels_last:
        features = features.contiguous(memory_format=torch.channels_last)
    case = features, *torch.randint(shape[0], (2, pairs)), 0.3, torch.randn(pairs, shape[1], dtype=torch.float64)
    for ours, expected in zip(value_and_gradient(mix_pool, *case), value_and_gradient(naive, *case)):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_only_what_comes_out(kind):
    torch.manual_seed(0)
    features, upstream = torch.randn(6, 20, 7, 7).to(kind), torch.randn(500, 20).to(kind)
    i, j = torch.randint(6, (2, 500))
    ours = value_and_gradient(mix_pool, features, i, j, 0.3, upstream)
    exact = value_and_gradient(mix_pool, features.float(), i, j, 0.3, upstream.float())
    for half, single in zip(ours, exact):
        assert half.dtype == kind
        assert (half == single.to(kind)).all()


def test_too_large_a_map_is_refused():
    with pytest.raises(ValueError, match="256 positions"):
        mix_pool(torch.zeros(2, 3, 17, 16), torch.tensor([0]), torch.tensor([1]), 0.5)


def sparse_relu(*shape):
    """Maps after a ReLU, most maxima of which are tied at 0."""
    return (torch.randn(shape) - 1.5).relu()


@pytest.mark.parametrize("form", ["torch", "triton"])
def test_ties_give_their_gradient_to_the_first_position(form, triton_device, monkeypatch):
    monkeypatch.setattr(kernels, "backend", form)
    torch.manual_seed(0)
    features = sparse_relu(6, 8, 4, 4).to(triton_device)
    i, j = torch.randint(6, (2, 30), device=triton_device)
    upstream = torch.randn(30, 8, device=triton_device)
    (_, ours), (_, expected) = (value_and_gradient(f, features, i, j, 0.5, upstream) for f in (mix_pool, naive))
    torch.testing.assert_close(ours, expected)


# -------------------------------------------------------------------------------------------- Triton


@pytest.fixture
def forms_agree(triton_device, monkeypatch):
    """Compare Triton's form with PyTorch's: value and gradient, the former written over NaN."""

    def check(features, i, j, lam=0.3):
        features, i, j = features.to(triton_device), i.to(triton_device), j.to(triton_device)
        upstream = torch.randn(len(i), features.shape[1], device=triton_device).to(features.dtype)
        results = {}
        for form in kernels.BACKENDS[1:]:
            monkeypatch.setattr(kernels, "backend", form)
            torch.use_deterministic_algorithms(form == "triton")  # which also fills what is allocated, with NaN or 255
            results[form] = value_and_gradient(mix_pool, features, i, j, lam, upstream)
        for ours, expected in zip(results["triton"], results["torch"]):
            exact = features.dtype == torch.float32
            torch.testing.assert_close(ours, expected, **(dict(rtol=2e-6, atol=2e-6) if exact else {}))
        return results["triton"]

    yield check
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("shape", [(37, 5, 2, 2), (3, 100, 7, 7), (9, 1, 3, 5), (5, 16, 1, 1), (4, 5, 16, 16)])
@pytest.mark.parametrize("maps", [torch.randn, sparse_relu])
@pytest.mark.parametrize("channels_last", [False, True])
def test_forms_agree_on_odd_shapes(shape, maps, channels_last, forms_agree):
    torch.manual_seed(0)
    features = maps(*shape)
    if channels_last:
        features = features.contiguous(memory_format=torch.channels_last)
    forms_agree(features, *torch.randint(shape[0], (2, 2 * shape[0])))


@pytest.mark.parametrize("pairing", ["positive-negative", "anchor-negative"])
def test_forms_agree_on_the_banks_of_losses(pairing, forms_agree):
    torch.manual_seed(0)
    forms_agree(torch.randn(len(Y), 20, 3, 3), *losses.full_bank(Y, pairing))


@pytest.mark.parametrize(
    "pairs",
    [
        [(i, j) for i in range(9) for j in range(9)],
        [(3, 1), (0, 8), (3, 1), (3, 1), (1, 3), (8, 0), (0, 8)],
        [(8, 8)],
        [],
    ],
    ids=["every pair", "repeats out of order", "an image with itself", "none"],
)
def test_forms_agree_on_any_list(pairs, forms_agree):
    torch.manual_seed(0)
    i, j = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).T
    _, gradient = forms_agree(torch.randn(9, 6, 2, 3), i, j)
    unused = sorted(set(range(9)) - {image for pair in pairs for image in pair})
    assert (gradient[unused] == 0).all()


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_forms_agree_for_any_weight(lam, forms_agree):
    torch.manual_seed(0)
    forms_agree(sparse_relu(6, 8, 3, 3), *torch.randint(6, (2, 20)), lam)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_forms_agree_in_half_precision(kind, forms_agree, triton_device):
    if kind == torch.bfloat16 and triton_device == "cpu":
        pytest.skip("Triton's interpreter does not round to bfloat16")
    torch.manual_seed(0)
    value, gradient = forms_agree(torch.randn(9, 20, 3, 3).to(kind), *torch.randint(9, (2, 40)))
    assert value.dtype == gradient.dtype == kind


def test_double_precision_is_not_rounded(triton_device):
    torch.manual_seed(0)
    features = torch.randn(4, 5, 3, 3, dtype=torch.float64, device=triton_device)
    i, j = torch.randint(4, (2, 9), device=triton_device)
    torch.testing.assert_close(mix_pool(features, i, j, 0.3), naive(features, i, j, 0.3), rtol=1e-12, atol=1e-12)


def test_two_runs_give_the_same_bits(triton_device):
    torch.manual_seed(0)
    features = torch.randn(12, 32, 3, 3, device=triton_device)
    i, j = torch.randint(12, (2, 200), device=triton_device)
    upstream = torch.randn(200, 32, device=triton_device)
    once, again = (value_and_gradient(mix_pool, features, i, j, 0.3, upstream) for _ in range(2))
    assert all(map(torch.equal, once, again))


def test_an_upstream_gradient_may_be_a_view(triton_device):
    features = torch.randn(4, 3, 2, 2, device=triton_device)
    i, j = torch.randint(4, (2, 9), device=triton_device)
    upstream = torch.randn(3, 9, device=triton_device).T
    (_, ours), (_, expected) = (value_and_gradient(f, features, i, j, 0.3, upstream) for f in (mix_pool, naive))
    torch.testing.assert_close(ours, expected)


def test_a_feature_step_is_the_same_in_both_forms(triton_device, monkeypatch):
    torch.manual_seed(0)
    model = models.ResNet(blocks=(1, 1), width=8, embedding_size=8, bn="train").to(triton_device)
    images = torch.randn(len(Y), 3, 24, 24, device=triton_device).contiguous(memory_format=torch.channels_last)
    config, results = types.SimpleNamespace(mode="feature", mix_weight=0.4), []
    for form in kernels.BACKENDS[1:]:
        monkeypatch.setattr(kernels, "backend", form)
        loss = metrix.step(model, losses.Contrastive(), images, Y.to(triton_device), config, 0.3, "positive-negative")
        results.append([x.flatten() for x in (loss, *torch.autograd.grad(loss, [*model.parameters()]))])
    for plain, fused in zip(*results):
        assert (fused - plain).norm() < 1e-4 * plain.norm()  # the pair loss multiplies in bf16x3

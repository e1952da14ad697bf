"""The fused mix and pool against the mixed maps it never writes."""

import pytest
import torch

from kernels import mix_pool as module
from kernels.mix_pool import mix_pool


def naive(features, i, j, lam):
    maps = (lam * features[i] + (1 - lam) * features[j]).flatten(2)
    return maps.mean(2) + maps.max(2).values


@pytest.mark.parametrize("shape", [(5, 3, 1, 1), (6, 20, 3, 3), (4, 7, 2, 5), (3, 4, 16, 16)])
@pytest.mark.parametrize("pairs", [0, 1, 37])
@pytest.mark.parametrize("channels_last", [False, True])
def test_mix_pool_equals_mixed_maps(shape, pairs, channels_last, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 40)
    torch.manual_seed(0)
    features = torch.randn(shape, dtype=torch.float64)
    if channels_last:
        features = features.contiguous(memory_format=torch.channels_last)
    features.requires_grad_()
    i, j = torch.randint(shape[0], (2, pairs))
    value, expected = mix_pool(features, i, j, 0.3), naive(features, i, j, 0.3)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(expected)
    gradients = [torch.autograd.grad(out, features, upstream)[0] for out in (value, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


def test_ties_give_their_gradient_to_the_first_position():
    """After a ReLU most maxima of a sparse map are tied at 0."""
    torch.manual_seed(0)
    features = (torch.randn(6, 8, 4, 4) - 1.5).relu().requires_grad_()
    i, j = torch.randint(6, (2, 30))
    upstream = torch.randn(30, 8)
    gradients = [torch.autograd.grad(f(features, i, j, 0.5), features, upstream)[0] for f in (mix_pool, naive)]
    torch.testing.assert_close(*gradients)


def test_too_large_a_map_is_refused():
    with pytest.raises(ValueError, match="256 positions"):
        mix_pool(torch.zeros(2, 3, 17, 16), torch.tensor([0]), torch.tensor([1]), 0.5)

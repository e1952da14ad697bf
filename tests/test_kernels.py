"""What the kernels share: the precision of products, and the switch between PyTorch and Triton."""

import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import eval
import kernels
import losses
from kernels import mix_pool

CUDA, CPU = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
SETTINGS = {
    "none": lambda: None,
    "matmul precision high": lambda: torch.set_float32_matmul_precision("high"),
    "matmul precision medium": lambda: torch.set_float32_matmul_precision("medium"),
    "allow_tf32": lambda: setattr(CUDA, "allow_tf32", True),
    "fp32_precision of CUDA": lambda: setattr(CUDA, "fp32_precision", "tf32"),
    "fp32_precision of the CPU": lambda: setattr(CPU, "fp32_precision", "bf16"),
    "fp32_precision of everything": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
}


def settings():
    """What the caller has set. PyTorch raises RuntimeError for one setting where another one contradicts it."""
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:
        precision = "contradiction"
    return precision, torch.backends.fp32_precision, CUDA.fp32_precision, CPU.fp32_precision


@pytest.fixture(params=SETTINGS.values(), ids=SETTINGS.keys())
def setting(request):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        request.param()
        yield settings()
        torch.backends.fp32_precision = CUDA.fp32_precision = CPU.fp32_precision = "none"
        torch.set_float32_matmul_precision("highest")
        CUDA.fp32_precision = CPU.fp32_precision = "none"


class Products(TorchDispatchMode):
    """Counts products, and checks that PyTorch would compute each with all digits of float32."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.__name__.split(".")[0] in ("mm", "bmm", "addmm", "matmul", "_linear_pointwise"):
            self.count += 1
            assert not torch._C._get_cublas_allow_tf32() and CPU.fp32_precision == "ieee"
            assert all(x.dtype == torch.float32 for x in args[:2])
        return function(*args, **(kwargs or {}))


def test_losses_and_metrics_multiply_in_full_precision(setting):
    y = torch.arange(24) // 3
    z = torch.randn(24, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with Products() as products, torch.autocast("cpu", torch.bfloat16):
        for metric in (losses.Contrastive(), losses.MultiSimilarity(), losses.ProxyAnchor(8, 8)):
            i, _ = losses.hardest_bank(z, y, "positive-negative")
            loss = metric(z, y) + metric.mixed(z, y, z[i], i, 0.3, "positive-negative")
            (loss + metric.mixed_embed(z, y, 0.3, "positive-negative")).backward()
        trained = products.count
        eval.recall_at_k(z, y)
        eval.map_at_r(z, y)
        eval.uniformity(z)
    assert trained >= 20 and products.count >= trained + 4
    assert settings() == setting


def test_the_settings_of_the_caller_come_back_after_an_error(setting):
    with pytest.raises(ZeroDivisionError), kernels.full_precision(torch.device("cpu")):
        1 / 0
    assert settings() == setting


@pytest.mark.parametrize("pairing, images", [("positive-negative", 67), ("anchor-negative", 100)])
def test_mixed_maps_of_a_shuffled_batch_reach_the_kernel_under_both_pairings(pairing, images, monkeypatch):
    """CUB and Cars: of 100 images, 67 have another image of their class. Mixed are 2,048 maps of 49 values."""
    counted = []
    monkeypatch.setattr(mix_pool, "use_triton", lambda tensor, terms: counted.append(terms) or False)
    monkeypatch.setattr(mix_pool, "plain_forward", lambda features, i, *_: (features.new_empty(len(i), 1),) * 2)
    y = torch.cat([torch.arange(67) // 2, 100 + torch.arange(33)])  # a class of three, the other ones of two and one
    y[66] = 0
    i, j = losses.full_bank(y, pairing)
    assert len(i.unique()) == images
    mix_pool.mix_pool(torch.empty(100, 2048, 7, 7, device="meta"), i, j, 0.4)
    assert counted[0] >= kernels.TRITON_FROM

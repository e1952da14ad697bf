import os
import pathlib
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is defined: Triton's interpreter, on the CPU
torch.backends.cudnn.allow_tf32 = False  # convolutions on a GPU are compared with those of a CPU


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: minutes long; run by ./run.sh test --slow")


class Launches(TorchDispatchMode):
    """Counts operations, views left out: on a GPU each is about one launch."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += not function.is_view
        return function(*args, **(kwargs or {}))


class Reads(TorchFunctionMode):
    """Counts calls in which the host would wait for a GPU."""

    count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        waits = ("__bool__", "cpu", "item", "nonzero", "tolist", "unique", "unique_consecutive")
        self.count += function.__name__ in waits
        return function(*args, **(kwargs or {}))


@pytest.fixture
def triton_device(monkeypatch):
    """Where Triton's forms are tested: a GPU if there is one, else the interpreter; they are switched on."""
    import kernels

    if kernels.triton is None:
        pytest.skip("Triton is not installed")
    new_numpy = np.lib.NumpyVersion(np.__version__) >= "2.4.0"
    if not torch.cuda.is_available() and kernels.triton.__version__ < "3.7" and new_numpy:
        pytest.skip("the interpreter of Triton 3.6 cannot run loops with NumPy 2.4 or newer")
    monkeypatch.setattr(kernels, "backend", "triton")
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def write_tree():
    """write_tree(root, {class directory: number of images}): small images of one colour a class, with noise."""

    def write(root, classes, size=40):
        rng = np.random.default_rng(0)
        for name, count in classes.items():
            (root / name).mkdir(parents=True, exist_ok=True)
            colour = rng.integers(40, 216, 3)
            for n in range(count):
                pixels = (colour + rng.normal(0, 30, (size, size, 3))).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / name / f"{n}.png")
        return root

    return write

import pathlib
import sys

import numpy as np
import pytest
from PIL import Image

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: minutes long; run by ./run.sh test --slow")


@pytest.fixture
def write_tree():
    """write_tree(root, {class directory: number of images}): small images of one colour a class, with noise."""

    def write(root, classes, size=40):
        rng = np.random.default_rng(0)
        for name, count in classes.items():
            (root / name).mkdir(parents=True)
            colour = rng.integers(40, 216, 3)
            for n in range(count):
                pixels = (colour + rng.normal(0, 30, (size, size, 3))).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / name / f"{n}.png")
        return root

    return write

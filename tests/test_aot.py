"""What the kernels launch at large sizes, and what an A100, an H100 and a B200 would need for it."""

import json
import math
import os
import subprocess
import sys

import aot
import pytest
from conftest import ROOT

import kernels

pytestmark = pytest.mark.skipif(kernels.triton is None or sys.platform != "linux", reason="Triton is not installed")


def rows(*arguments, path=""):
    """What tests/aot.py prints, in a new process, because this one interprets kernels. path: to another Triton."""
    command = [sys.executable, ROOT / "tests" / "aot.py", *arguments]
    settings = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": path}
    done = subprocess.run(command, env=settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_launches_fill_the_chip_and_do_not_recompile_for_every_batch():
    launches = rows("--launches")
    assert {launch["file"] for launch in launches} == {"pairwise", "mix_pool", "recall"}
    for launch in launches:
        assert not {"n", "m", "Q", "G"} & set(launch["divisible"]), launch
        if launch["file"] != "mix_pool" or "C" in launch["divisible"]:  # other maps are narrow here
            assert math.prod(launch["grid"]) >= 132, launch
        assert launch["grid"][0] < 2**31 and all(n < 2**16 for n in launch["grid"][1:]), launch


OLDER = os.environ.get("OLDER_TRITON", "")  # made by pip install --no-deps --target OLDER_TRITON triton==3.6.0


@pytest.mark.slow
@pytest.mark.parametrize("path", ["", OLDER or pytest.param("", marks=pytest.mark.skip(reason="no OLDER_TRITON"))])
def test_kernels_fit_the_chips_without_spills(path):
    compiled = rows(path=path)
    assert {row["chip"] for row in compiled} == set(aot.SHARED)
    for row in compiled:
        size = row["constants"]
        allowed = 72 if path else 32 if size.get("MINED") else 0  # the mined gradient spills outside of its products
        assert row["spilled"] <= allowed, row
        assert row["registers"] <= 255 and row["shared"] <= aot.SHARED[row["chip"]], row
        assert bool(row["tensor_cores"]) == (row["file"] == "pairwise"), row
        if row["chip"] == 90 and row["file"] == "pairwise":
            widths = [int(product.split("x")[1]) for product in row["tensor_cores"]]  # HGMMA.64x128x16
            assert min(widths) >= 64, row
        if row["file"] == "pairwise" and row["chip"] < 100:  # nothing is multiplied twice; sm100 hides its shapes
            parts = 3 if size.get("SPLIT") else 1
            assert row["multiplications"] == size["BM"] * size["BN"] * (size["BK"] + parts * size.get("BD", 0)), row
        if row["file"] == "recall" and not path:
            assert row["multiplications"] == size["B"] ** 2 * size["BK"], row

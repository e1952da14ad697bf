"""What the kernels launch at large sizes, and what that needs of an A100, an H100 and a B200, without any of them."""

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


def rows(*arguments):
    """Rows of tests/aot.py, in a process of its own: this one may be set to interpret."""
    launch = [sys.executable, ROOT / "tests" / "aot.py", *arguments]
    done = subprocess.run(launch, env=os.environ | {"TRITON_INTERPRET": "0"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_launches_fill_the_chip_and_do_not_recompile_for_every_batch():
    launches = rows("--launches")
    assert {launch["file"] for launch in launches} == {"pairwise", "mixed", "mix_pool", "recall"}
    for launch in launches:
        assert not {"R", "N", "n", "m", "A", "Q", "G"} & set(launch["divisible"]), launch
        if launch["file"] != "mix_pool" or "C" in launch["divisible"]:  # other maps are narrow here
            assert math.prod(launch["grid"]) >= 132, launch
        assert launch["grid"][0] < 2**31 and all(n < 2**16 for n in launch["grid"][1:]), launch


@pytest.mark.slow
def test_kernels_fit_the_chips_without_spills():
    compiled = rows()
    assert {row["chip"] for row in compiled} == set(aot.SHARED)
    for row in compiled:
        assert row["spilled"] == 0 and row["registers"] <= 255 and row["shared"] <= aot.SHARED[row["chip"]], row
        assert bool(row["tensor_cores"]) == (row["file"] == "pairwise"), row
        if row["chip"] == 90 and row["file"] == "pairwise":
            widths = [int(product.split("x")[1]) for product in row["tensor_cores"]]  # HGMMA.64x128x16
            assert min(widths) >= (32 if "_gradient" in row["case"] and "MINED=True" in row["case"] else 64), row
        if row["file"] == "recall":
            assert row["hottest_loop"]["FFMA"] > 0.85 * row["hottest_loop"]["all"], row

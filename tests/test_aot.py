"""What the kernels launch at large sizes, and what that needs of an A100, an H100 and a B200, without any of them."""

import json
import math
import os
import re
import subprocess
import sys

import aot
import pytest
from conftest import ROOT

import kernels

pytestmark = pytest.mark.skipif(kernels.triton is None or sys.platform != "linux", reason="Triton is not installed")


def rows(*arguments, path=""):
    """Rows of tests/aot.py, in a process of its own: this one may be set to interpret. path: of another Triton."""
    launch = [sys.executable, ROOT / "tests" / "aot.py", *arguments]
    settings = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": path}
    done = subprocess.run(launch, env=settings, capture_output=True, text=True)
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


OLDER = os.environ.get("OLDER_TRITON", "")  # made by pip install --no-deps --target OLDER_TRITON triton==3.6.0


@pytest.mark.slow
@pytest.mark.parametrize("path", ["", pytest.param(OLDER, marks=pytest.mark.skipif(not OLDER, reason="no OLDER_TRITON"))])
def test_kernels_fit_the_chips_without_spills(path):
    compiled = rows(path=path)
    assert {row["chip"] for row in compiled} == set(aot.SHARED)
    for row in compiled:
        assert row["spilled"] <= (72 if path else 0), row
        assert row["registers"] <= 255 and row["shared"] <= aot.SHARED[row["chip"]], row
        assert bool(row["tensor_cores"]) == (row["file"] == "pairwise"), row
        size = {name: int(n) for name, n in re.findall(r"(\w+)=(\d+)", row["case"])}
        if row["file"] == "pairwise" and row["chip"] < 100:  # nothing is multiplied twice; on sm100 shapes are not shown
            parts = 3 if "SPLIT=True" in row["case"] else 1
            expected = size["BM"] * size["BN"] * (size["BK"] + parts * size.get("BD", 0))
            assert row["multiplications"] == expected, row
        if row["chip"] == 90 and row["file"] == "pairwise":
            widths = [int(product.split("x")[1]) for product in row["tensor_cores"]]  # HGMMA.64x128x16
            assert min(widths) >= 64, row
        if row["file"] == "recall" and not path:
            assert row["hottest_loop"]["FFMA"] * 32 * row["warps"] == size["B"] ** 2 * size["BK"], row
            assert row["hottest_loop"]["FFMA"] > 0.85 * row["hottest_loop"]["all"], row
            assert row["bank_conflicts"] <= 2, row


def test_bank_conflicts_are_counted():
    """Lanes load four words each, 16 bytes apart or 128."""
    for shift, expected in ((4, 1), (7, 8)):
        ptx = f"\tmov.u32 %r1, %tid.x;\n\tshl.b32 %r2, %r1, {shift};\n\tld.shared.v4.b32 {{%r3, ..}}, [%r2+64];\n"
        assert aot.bank_conflicts(ptx) == expected

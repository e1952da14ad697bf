"""What every kernel needs of an A100, an H100 and a B200, compiled without any of them."""

import json
import os
import subprocess
import sys

import aot
import pytest
from conftest import ROOT

import kernels

pytestmark = pytest.mark.skipif(kernels.triton is None or sys.platform != "linux", reason="Triton is not installed")


@pytest.fixture(scope="module")
def compiled():
    """Rows of tests/aot.py, in a process of its own: this one may be set to interpret."""
    script, environment = ROOT / "tests" / "aot.py", os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("file", ["pairwise", "mixed", "mix_pool", "recall"])
def test_kernels_fit_the_chips_without_spills(compiled, file):
    rows = [row for row in compiled if row["file"] == file]
    assert {row["chip"] for row in rows} == set(aot.SHARED)
    for row in rows:
        assert row["spilled"] == 0 and row["registers"] <= 255 and row["shared"] <= aot.SHARED[row["chip"]], row
        assert row["tensor_cores"] == (file == "pairwise"), row

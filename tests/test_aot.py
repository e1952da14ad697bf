"""What every kernel takes of an A100, an H100 and a B200, compiled here without any of them."""

import json
import os
import pathlib
import subprocess
import sys

import aot
import kernels
import pytest

pytestmark = pytest.mark.skipif(kernels.triton is None or sys.platform != "linux", reason="Triton is not installed")


@pytest.fixture(scope="module")
def compiled():
    """Rows of tests/aot.py, which needs a process of its own: this one may be set to interpret."""
    script = pathlib.Path(__file__).parent / "aot.py"
    done = subprocess.run([sys.executable, script], env=os.environ | {"TRITON_INTERPRET": "0"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("file", aot.FILES)
def test_kernels_fit_the_chips(compiled, file):
    rows = [row for row in compiled if row["file"] == file]
    assert {row["chip"] for row in rows} == set(aot.SHARED)
    for row in rows:
        assert row["spilled"] == 0, row
        assert row["registers"] <= 255 and row["shared"] <= aot.SHARED[row["chip"]], row
        assert row["tensor_cores"] or not row["dot"], row

"""The benchmark: what is compared, timed, left out and written."""

import json
import os
import subprocess
import sys

import bench
import pytest
import torch
from conftest import ROOT

import kernels


def run(arguments, capsys):
    """What is printed, and the results of every row."""
    bench.main([*arguments.split(), "--device", "cpu"])
    out = capsys.readouterr().out
    return out, [row["results"] for row in json.loads(out.splitlines()[-1])["rows"]]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(bench, "SECONDS", 0)
    monkeypatch.setattr(bench, "ceilings", lambda device: {"GB/s": 1.0, "TFLOP/s": 1.0})
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


@pytest.mark.parametrize("kernel, size", [("mix_pool", 7), ("step", 20), ("recall", 60), ("pairwise", 9), ("mixed", 9)])
def test_every_implementation_gives_the_right_result_and_is_timed(kernel, size, capsys):
    for results in run(f"{kernel} --sizes {size}", capsys)[1]:
        for name, cell in results.items():
            assert cell.get("ms", 0) > 0 or "No module named" in cell["failed"], (name, cell)


def fail(x):
    raise RuntimeError("much happened\nout of memory\n\nSet TORCH_LOGS for more\n")


@pytest.fixture
def cases(monkeypatch, tmp_path):
    """A case for every size but 0. It takes 250 ms. Its title is the number of rows in the file before it."""
    file = tmp_path / "out.json"

    def build(device, size, loss):
        title = f"row {len(json.loads(file.read_text())['rows']) if file.exists() else 0}"
        values = dict(ours=[0, 1.0], close=[0, 1.0009], wrong=[0, 1.002], nan=[0, torch.nan])
        functions = {name: lambda x, value=value: [torch.tensor(value)] for name, value in values.items()}
        functions |= dict(fewer=lambda x: [], failing=fail, not_compared=lambda x: None)
        return title, functions, [[1 // size]] * 3, None, 1e-3, 5e8

    monkeypatch.setattr(bench, "CASES", dict(mixed=(build, [""], [1, 2], [], "GB/s")))
    monkeypatch.setattr(bench, "seconds", lambda run, device: run() and 0.25 or 0.25)
    monkeypatch.setattr(bench, "peak_mib", lambda run, device: run())
    return f"mixed --json {file}"


def test_what_is_wrong_or_fails_says_so_and_the_others_go_on(cases, capsys):
    out, (one, none, two) = run(f"{cases} --sizes 1,0,2", capsys)
    good, failed = dict(mib=None, ms=250, repetitions=1), {name: cell.pop("failed", None) for name, cell in one.items()}
    assert one["ours"] == one["close"] == one["not_compared"] == good
    assert failed["wrong"] == "ArithmeticError: wrong by 0.002" and failed["nan"] == "ArithmeticError: wrong by nan"
    assert failed["fewer"].startswith("ValueError: zip()") and failed["failing"] == "RuntimeError: out of memory"
    assert none["ours"]["failed"].startswith("ZeroDivisionError") and two["failing"]["failed"] == failed["failing"]
    for cell in ("row 0", "row 2", "---:", "250 ms (1 x), ? MiB", "2 GB/s, 200%"):
        assert f"| {cell} " in out


def test_the_deadline_leaves_the_rest_out(cases, monkeypatch, capsys):
    monkeypatch.setattr(bench, "START", 0)
    _, (results,) = run(f"{cases} --sizes 1 --deadline 0.1", capsys)
    assert {cell["failed"] for cell in results.values()} == {"left out at the deadline"}


@pytest.mark.parametrize("words", ["pair", "pairwise --sizes ten", "pairwise --json /nowhere/out.json"])
def test_unknown_words_are_refused_in_one_line(words, capsys):
    with pytest.raises(SystemExit) as end:
        bench.main(words.split())
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith("bench: error: ") and words.split()[-1] in error
    assert error.count("\n") == 1


def test_it_runs_by_path_in_a_directory_with_a_kernels_py(tmp_path):
    (tmp_path / "kernels.py").write_text("raise SystemExit('not these')")
    command, environment = [sys.executable, ROOT / "tests/bench.py", "--help"], os.environ | dict(PYTHONPATH=".")
    assert subprocess.check_output(command, cwd=tmp_path, env=environment).startswith(b"Time Metrix")


def test_a_patch_lasts_as_long_as_the_call():
    assert bench.patched(lambda: kernels.backend, kernels, "backend", "triton")() == "triton"
    assert kernels.backend == "auto"

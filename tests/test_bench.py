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


def result_of(arguments, capsys):
    bench.main([*arguments.split(), "--device", "cpu"])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(bench, "SECONDS", 0)
    monkeypatch.setattr(bench, "ceilings", lambda device: {"GB/s": 1.0, "TFLOP/s": 1.0})
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


@pytest.mark.parametrize("kernel, size", [("mix_pool", 7), ("step", 20), ("recall", 60), ("pairwise", 20), ("mixed", 9)])
def test_every_implementation_gives_the_right_result_and_is_timed(kernel, size, capsys):
    for row in result_of(f"{kernel} --sizes {size}", capsys)["rows"]:
        for name, cell in row["results"].items():
            assert cell.get("ms", 0) > 0 or "is not installed" in cell["failed"], (row["case"], name, cell)


def fail(x):
    raise RuntimeError("much happened\nout of memory\n\nSet TORCH_LOGS for more\n")


@pytest.fixture
def cases(monkeypatch):
    """A case for every size but 0. It takes 250 ms."""

    def build(device, size, loss):
        values = dict(ours=[0, 1.0], close=[0, 1.0009], wrong=[0, 1.002], nan=[0, torch.nan])
        functions = {name: lambda x, value=value: [torch.tensor(value)] for name, value in values.items()}
        functions |= dict(fewer=lambda x: [], failing=fail, not_compared=lambda x: None)
        return dict(title=f"case {8 // size}", inputs=[[size]] * 3, functions=functions, tolerance=1e-3, work=5e8)

    monkeypatch.setattr(bench, "CASES", dict(mixed=(build, [""], [1, 2], [], "GB/s")))
    monkeypatch.setattr(bench, "seconds", lambda run, device: run() and 0.25 or 0.25)
    monkeypatch.setattr(bench, "peak_mib", lambda run, device: run())


def test_what_is_wrong_or_fails_says_so_and_the_others_go_on(cases, capsys):
    bench.main(["mixed", "--sizes", "1,0,2", "--device", "cpu"])
    out = capsys.readouterr().out
    one, none, two = (row["results"] for row in json.loads(out.splitlines()[-1])["rows"])
    good, failed = dict(mib=None, ms=250, repetitions=1), {name: cell.pop("failed", None) for name, cell in one.items()}
    assert one["ours"] == one["close"] == one["not_compared"] == good
    assert failed["wrong"] == "ArithmeticError: wrong by 0.002" and failed["nan"] == "ArithmeticError: wrong by nan"
    assert failed["fewer"].startswith("ValueError: zip()") and failed["failing"] == "RuntimeError: out of memory"
    assert none["ours"]["failed"].startswith("ZeroDivisionError") and two["failing"]["failed"] == failed["failing"]
    assert "| case 8 " in out and "| 250 ms (1 x), ? MiB " in out and "| 2 GB/s, 200% " in out and "| ---: " in out


def test_the_deadline_leaves_the_rest_out(cases, monkeypatch, capsys):
    monkeypatch.setattr(bench, "START", 0)
    row = result_of("mixed --sizes 1 --deadline 0.1", capsys)["rows"][0]
    assert {cell["failed"] for cell in row["results"].values()} == {"left out at the deadline"}


def test_each_row_is_written_when_it_is_there(cases, monkeypatch, tmp_path):
    def stop(*_):
        monkeypatch.setattr(bench, "measure", None)
        assert len(json.loads((tmp_path / "out.json").read_text())["rows"]) == 1
        raise KeyboardInterrupt

    monkeypatch.setitem(bench.CASES, "step", (stop, [""], [1], [], None))
    with pytest.raises(KeyboardInterrupt):
        bench.main(["--sizes", "1", "--json", str(tmp_path / "out.json"), "--device", "cpu"])


def test_with_backend_sets_the_backend_during_the_call_only():
    assert bench.with_backend(lambda: kernels.backend, "triton")() == "triton" and kernels.backend == "auto"


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

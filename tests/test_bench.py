"""The benchmark: a table and JSON that agree, and nothing wrong, missing or too large taken for a time."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from kernels import bench, speedrun


def test_a_run_prints_what_it_writes(tmp_path):
    command = [sys.executable, "-m", "kernels.bench", "recall", "--sizes", "200,300", "--device", "cpu", "--json", "out.json"]
    environment = os.environ | dict(PYTHONPATH=str(ROOT))
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    *table, last = done.stdout.splitlines()
    result = json.loads(last)
    assert result == json.loads((tmp_path / "out.json").read_text())
    assert {"hardware", "versions", "date", "device"} <= set(result["machine"]) and result["ceilings"]["fp32 TFLOP/s"] > 0
    assert [row["size"] for row in result["rows"]] == [200, 300]
    for row, line in zip(result["rows"], table[3:]):
        assert line.startswith(row["case"])
        for form in row["forms"].values():
            assert ("told" in form and form["told"] == "absent") or form["ms"] > 0
            assert bench.cell(form, form) in line


def case(**forms):
    return dict(kernel="pairwise", case="some", size=10, forms=forms, tolerance=1e-3, work=1e9, unit="GB/s")


def test_what_is_wrong_absent_or_too_large_is_not_timed():
    def absent(k):
        bench.package("no_such_package")

    def too_large(k):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes")

    def broken(k):
        raise RuntimeError("something else")

    right, close, wrong = ([torch.tensor([1.0, x])] for x in (2.0, 2.0001, 2.1))
    row = bench.measured(case(ours=lambda k: right, a=lambda k: close, b=lambda k: wrong, c=absent, d=too_large), "cpu")
    assert row["forms"]["ours"]["ms"] >= 0 and "ms" in row["forms"]["a"] and row["unit"] == "GB/s"
    assert [row["forms"][name] for name in "bcd"] == [dict(told=word) for word in ("wrong", "absent", "out of memory")]
    with pytest.raises(RuntimeError, match="something else"):
        bench.measured(case(ours=broken), "cpu")
    row = bench.measured(case(ours=lambda k: [torch.tensor(torch.nan)], a=lambda k: right), "cpu")
    assert row["forms"]["a"] == dict(told="wrong")


def test_the_forms_of_every_case_agree():
    """On small sizes, without the forms that compile."""
    for what in ("pairwise", "mixed", "recall"):
        for some in bench.CASES[what]("cpu", [30]):
            results = {}
            for name, form in some["forms"].items():
                if name not in ("torch.compile", "library"):
                    results[name] = form(0)
            expected = results.pop("ours")
            for name, result in results.items():
                assert not bench.differs(result, expected, some["tolerance"]), (some["case"], name)


@pytest.mark.skipif(sys.platform != "linux", reason="read from /proc")
def test_peak_memory_is_what_a_form_takes_at_most():
    mib = bench.peak_memory(lambda k: torch.zeros(25 * 2**20).sum(), "cpu")
    assert mib is None or 90 < mib < 130  # where the system lets the peak be reset


def test_the_readme_is_filled_from_result_files(tmp_path, monkeypatch):
    row = dict(kernel="recall", case="some", size=10, forms={"ours": dict(ms=2.0, mib=1.0), "library": dict(told="absent")}, rate=3.0, unit="TFLOP/s")
    machine = dict(hardware="a machine", device="cpu", date="2026-01-01", versions=dict(torch="2"))
    (tmp_path / "a.json").write_text(json.dumps(dict(machine=machine, ceilings={"fp32 TFLOP/s": 6.0}, rows=[row])))
    (tmp_path / "README.md").write_text("before\n<!-- results of ./run.sh bench: begin -->\nold\n<!-- end -->\nafter\n")
    monkeypatch.setattr(bench, "RESULTS", tmp_path)
    monkeypatch.setattr(bench, "README", tmp_path / "README.md")
    bench.main(["readme"])
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("before\n") and text.endswith("-->\nafter\n") and "old" not in text
    assert "| some | 2 | absent | 1 / - | 3 TFLOP/s | 50 % |" in text and "a machine" in text
    bench.main(["readme"])
    assert (tmp_path / "README.md").read_text() == text


@pytest.mark.slow
def test_a_speed_run_is_told_whole_and_in_parts(tmp_path, monkeypatch, capsys):
    speedrun.main(["--device", "cpu", "--epochs", "2", "--json", str(tmp_path / "mini.json")])
    told = capsys.readouterr().out
    result = json.loads(told.splitlines()[-1])
    assert result == json.loads((tmp_path / "mini.json").read_text())
    assert 0 < result["decoding_seconds"] < result["seconds"] and len(result["images_per_second"]) == 2
    parts = [*result["parts"].values()]
    assert len(parts) == 8 and 0 < parts[-1] < parts[0]  # the floor lies below the trunk
    assert all(f"{seconds:.3g} s" in told for seconds in parts)
    (tmp_path / "README.md").write_text("<!-- results of ./run.sh bench: begin -->\n<!-- end -->\n")
    monkeypatch.setattr(bench, "RESULTS", tmp_path)
    monkeypatch.setattr(bench, "README", tmp_path / "README.md")
    bench.main(["readme"])
    assert "| decoding once |" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("arguments", [["nothing"], ["recall", "--sizes", "few"], ["recall", "--sizes", "3"], ["--device", "tpu"]])
def test_bad_arguments_are_told_in_one_line(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        bench.main(arguments)
    told = capsys.readouterr().err
    assert ended.value.code == 2 and told.startswith("bench: ") and told.count("\n") == 1

"""The benchmark end to end at tiny sizes: what is timed, what is not, and what is written."""

import json

import pytest
import torch

from kernels import bench


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(bench, "SECONDS", 0)
    monkeypatch.setattr(bench, "ceilings", lambda device: {"GB/s": 1.0, "TFLOP/s": 1.0})
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


@pytest.mark.parametrize("what", ["pairwise", "mixed", "recall", "step"])
def test_all_forms_of_a_kernel_are_timed_and_written(what, tmp_path, capsys):
    bench.main([what, "--sizes", "20", "--json", str(tmp_path / "out.json"), "--device", "cpu"])
    result = json.loads((tmp_path / "out.json").read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    assert len(result["rows"]) == (1 if what == "recall" else 3)
    for row in result["rows"]:
        for name, form in row["forms"].items():
            assert form.get("ms", 0) > 0 or "is not installed" in form["failed"], (row["case"], name, form)


def form(value=1.0):
    return lambda k: [torch.tensor([value])]


def failing(k):
    raise MemoryError


def cases(device, sizes):
    forms = {"ours": form(), "another": form(1.0001), "off": form(2.0), "hungry": failing}
    for size in sizes:
        yield dict(case=f"case {size}", size=size, forms=forms, tolerance=1e-3, work=1e9, unit="GB/s")


def test_a_form_that_is_wrong_or_fails_says_so_and_the_run_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "CASES", dict(pairwise=cases))
    bench.main(["pairwise", "--sizes", "1,2", "--json", str(tmp_path / "out.json"), "--device", "cpu"])
    for row in json.loads((tmp_path / "out.json").read_text())["rows"]:
        assert row["forms"]["off"] == dict(failed="wrong") and row["forms"]["hungry"] == dict(failed="out of memory")
        assert row["forms"]["another"]["ms"] >= 0 and row["rate"] > 0
    assert "out of memory" in capsys.readouterr().out


def test_rows_are_written_one_by_one(tmp_path, monkeypatch):
    def stopped(device, sizes):
        yield from cases(device, [1])
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "CASES", dict(pairwise=stopped))
    with pytest.raises(KeyboardInterrupt):
        bench.main(["pairwise", "--json", str(tmp_path / "out.json"), "--device", "cpu"])
    assert len(json.loads((tmp_path / "out.json").read_text())["rows"]) == 1


def test_the_deadline_leaves_cases_out_and_names_them(monkeypatch, capsys):
    monkeypatch.setattr(bench, "CASES", dict(pairwise=cases))
    bench.main(["pairwise", "--sizes", "1,2", "--deadline", "0", "--device", "cpu"])
    out = capsys.readouterr().out
    assert "left out at the deadline: pairwise: case 1; pairwise: case 2" in out
    assert json.loads(out.splitlines()[-1])["rows"] == []


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("pair", "invalid choice: 'pair'"),
        ("pairwise --sizes ten", "--sizes ten: expected numbers"),
        ("pairwise --json /nowhere/out.json", "/nowhere/out.json: no such directory"),
    ],
)
def test_bad_input_gets_one_line_and_exit_code_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        bench.main(arguments.split())
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith("bench: ") and error.count("\n") == 1 and message in error

"""Runs that are killed, stopped or broken: nothing is lost, and one line says what to do."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
import torch

import metrix

ROOT = pathlib.Path(metrix.__file__).parent
SMALL = "--net tiny --weights none --image-size 32 --embedding-size 16 --batch-size 6 --images-per-class 2 --num-workers 0 --epochs 3"


@pytest.fixture
def tree(tmp_path, write_tree):
    return write_tree(tmp_path / "images", {f"class{c}": 5 for c in range(10)})


def command(tree, out, cell="contrastive feature", more=""):
    return f"folder {cell} --data-root {tree} --out {out} {SMALL} {more}".split()


def child(prelude, arguments):
    """A process that runs `prelude`, then metrix with the arguments."""
    code = f"import os, signal, sys, torch\nsys.path.insert(0, {str(ROOT)!r})\nimport data, metrix\n{prelude}\nmetrix.main(sys.argv[1:])"
    return subprocess.Popen([sys.executable, "-c", code, *arguments], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def everything(out):
    """What a run has come to, its timings aside: the log in its two forms, and all tensors of all checkpoints."""
    states = [torch.load(out / name, weights_only=True) for name in ("last.pt", "best.pt")]
    logs = [list(map(json.loads, (out / "log.jsonl").read_text().splitlines())), *(state.pop("log") for state in states)]
    for line in (line for log in logs for line in log):
        del line["seconds"], line["images_per_second"]
    for state in states:
        del state["config"]["out"]
    return logs, states


def equal(a, b):
    """Equal to the last bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, (dict, list, tuple)):
        keys = a.keys() if isinstance(a, dict) else range(len(a))
        return type(a) is type(b) and len(a) == len(b) and all(equal(a[key], b[key]) for key in keys)
    return a == b


# ------------------------------------------------------------------------------------ killed, stopped

COUNTED = """
def dies_at(call, function, before=lambda *_: None):
    calls = []
    def counted(*given, **named):
        calls.append(1)
        if len(calls) == call:
            before(*given)
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*given, **named)
    return counted
def half(state, out):
    out.write(b"PK" + bytes(9999))
    out.flush()
"""
KILLED_AT = {  # in the order of a run's life; an epoch is 4 steps and ends with 3 or 4 files
    "the first step": "metrix.step = dies_at(1, metrix.step)",
    "the first checkpoint's writing": "torch.save = dies_at(1, torch.save, half)",
    "the second checkpoint's writing": "torch.save = dies_at(2, torch.save, half)",
    "the last checkpoint's renaming": "os.replace = dies_at(5, os.replace)",
    "the second epoch's begin": "metrix.train_epoch = dies_at(2, metrix.train_epoch)",
    "a step of the second epoch": "metrix.step = dies_at(3, metrix.step)",
    "the testing": "metrix.measure = dies_at(1, metrix.measure)",
    "the log's renaming": "os.replace = dies_at(2, os.replace)",
}


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_like_an_unbroken_one(tree, tmp_path):
    cell, more = "proxyanchor input", "--num-workers 1 --warmup-epochs 1 --lr-step 1"
    for place, patch in KILLED_AT.items():
        run = child(COUNTED + patch, command(tree, tmp_path / "killed", cell, more))
        assert run.communicate() and run.returncode == -signal.SIGKILL, place
    for out in ("killed", "whole"):
        metrix.main(command(tree, tmp_path / out, cell, more))
    assert equal(everything(tmp_path / "killed"), everything(tmp_path / "whole"))
    assert sorted(os.listdir(tmp_path / "killed")) == sorted(metrix.WRITTEN)


@pytest.mark.parametrize("number", metrix.STOPPING)
def test_a_stopped_run_finishes_its_step_and_says_how_to_go_on(number, tree, tmp_path, monkeypatch, capsys):
    metrix.main(command(tree, tmp_path / "whole"))
    steps, finished = [], []

    def step(*given, step=metrix.step):
        steps.append(1)
        if len(steps) == 6:
            os.kill(os.getpid(), number)
        return step(*given)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(metrix, "step", step)
        patch.setattr(torch.optim.Adam, "step", lambda *_, step=torch.optim.Adam.step: [step(*_), finished.append(1)])
        metrix.main(command(tree, tmp_path / "stopped"))
    assert end.value.code == 128 + number and len(steps) == len(finished) == 6
    told = capsys.readouterr().err
    assert told == "metrix: stopped; the same command goes on after the last full epoch\n"
    assert len((tmp_path / "stopped" / "log.jsonl").read_text().splitlines()) == 1
    metrix.main(command(tree, tmp_path / "stopped"))
    assert equal(everything(tmp_path / "stopped"), everything(tmp_path / "whole"))

"""Runs that are killed, stopped or broken: nothing is lost, and one line says what to do."""

import contextlib
import itertools
import json
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import data
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
    """What a run has come to, what it took aside: the log in its two forms, and all tensors of all checkpoints."""
    states = [torch.load(out / name, weights_only=True) for name in ("last.pt", "best.pt")]
    logs = [list(map(json.loads, (out / "log.jsonl").read_text().splitlines())), *(state.pop("log") for state in states)]
    for line in (line for log in logs for line in log):
        for timing in ("seconds", "images_per_second", "data_wait", "peak_memory_mib"):
            del line[timing]
    for state in states:
        del state["config"]["out"], state["config"]["num_workers"]
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


# --------------------------------------------------------------------------------------------- faults


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The images, a whole run of three epochs, and one stopped after the first."""
    root = tmp_path_factory.mktemp("runs")
    rng = np.random.default_rng(0)
    for label, n in itertools.product(range(10), range(5)):
        (root / f"images/class{label}").mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"images/class{label}/{n}.png")
    metrix.main(command(root / "images", root / "whole"))

    def stop(epoch, *given, train_epoch=metrix.train_epoch):
        if epoch == 1:
            raise KeyboardInterrupt
        return train_epoch(epoch, *given)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(metrix, "train_epoch", stop)
        metrix.main(command(root / "images", root / "begun"))
    return root


@contextlib.contextmanager
def at_step(number, change):
    steps = []

    def step(model, *given, step=metrix.step):
        steps.append(1)
        loss = step(model, *given)
        return change(model, loss) if len(steps) == number else loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrix, "step", step)
        yield


@contextlib.contextmanager
def poisoned_loss(run):
    with at_step(2, lambda model, loss: loss * torch.inf):
        yield "epoch 2, step 2: the loss or a gradient is not finite, on a batch of 6 images ({images}/class"


@contextlib.contextmanager
def poisoned_gradient(run):
    with at_step(4, lambda model, loss: loss + (model.embedding.bias.sum() * 0).sqrt()):
        yield "..); {run}/last.pt is that of epoch 1; try a lower --lr"


@contextlib.contextmanager
def poisoned_image(run):
    file = run.parent / "images/class2/3.png"
    content = file.read_bytes()
    file.write_bytes(content[:100])
    try:
        yield "{images}/class2/3.png: cannot be read as an image"
    finally:
        file.write_bytes(content)


@contextlib.contextmanager
def full_disk(run):
    """What a write beyond the limit raises; Python ignores the signal."""
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4_000_000, usual[1]))
    try:
        yield "{run}/last.pt: cannot be written (File too large); what was there before is intact"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)


@contextlib.contextmanager
def full_file_system(run):
    """A real one, where it may be mounted: 4 MB left for what is written."""
    content = {file.name: file.read_bytes() for file in run.iterdir()}
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", run], capture_output=True).returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        for name, value in content.items():
            (run / name).write_bytes(value)
        left = os.statvfs(run)
        (run / "filling").write_bytes(bytes(left.f_bavail * left.f_frsize - 4_000_000))
        yield "{run}/last.pt: cannot be written (No space left on device)"
    finally:
        content = {file.name: file.read_bytes() for file in run.iterdir() if file.name != "filling"}
        subprocess.run(["umount", run], check=True)
        for name, value in content.items():
            (run / name).write_bytes(value)


@contextlib.contextmanager
def unwritable_directory(run):
    if os.geteuid() == 0:
        pytest.skip("root may write to any directory")
    run.chmod(0o500)
    try:
        yield "cannot be written (Permission denied)"
    finally:
        run.chmod(0o700)


@contextlib.contextmanager
def unwritable_file(run):
    (run / "log.jsonl.unfinished").mkdir()
    try:
        yield "{run}/log.jsonl: cannot be written (Is a directory)"
    finally:
        (run / "log.jsonl.unfinished").rmdir()


@contextlib.contextmanager
def dead_worker(run):
    read, alive = data.open_image, os.getpid()

    def open_image(path):
        if os.getpid() != alive and path.endswith("4.png"):
            os.kill(os.getpid(), signal.SIGKILL)
        return read(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "open_image", open_image)
        yield "a process that loads images died"


@contextlib.contextmanager
def spoilt_checkpoint(run, spoil, message):
    content = (run / "last.pt").read_bytes()
    spoil(run / "last.pt", content)
    try:
        yield message
    finally:
        (run / "last.pt").write_bytes(content)


def with_other(part, value):
    return lambda file, content: torch.save(torch.load(file, weights_only=True) | {part: value}, file)


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("executed",)


UNREADABLE, NOT_OF_A_RUN = "{run}/last.pt: not a readable checkpoint", "{run}/last.pt: not the checkpoint of such a run"
FAULTS = {
    "loss": poisoned_loss,
    "gradient": poisoned_gradient,
    "image": poisoned_image,
    "disk full": full_disk,
    "file system full": full_file_system,
    "directory": unwritable_directory,
    "file": unwritable_file,
    "worker": dead_worker,
    "truncated": lambda run: spoilt_checkpoint(run, lambda file, content: file.write_bytes(content[: len(content) // 2]), UNREADABLE),
    "empty": lambda run: spoilt_checkpoint(run, lambda file, content: file.write_bytes(b""), UNREADABLE),
    "foreign": lambda run: spoilt_checkpoint(run, lambda file, content: torch.save({"model": {"a": torch.ones(1)}}, file), NOT_OF_A_RUN),
    "foreign log": lambda run: spoilt_checkpoint(run, with_other("log", [{"epoch": 1}]), NOT_OF_A_RUN),
    "foreign optimizer": lambda run: spoilt_checkpoint(run, with_other("optimizer", 3), NOT_OF_A_RUN),
    "with code": lambda run: spoilt_checkpoint(run, lambda file, content: torch.save({"model": Malicious()}, file), UNREADABLE),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_a_fault_is_told_in_one_line_and_nothing_is_lost(fault, runs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = runs / "run"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(runs / "begun", run)
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | dict(out=str(run))))
    before = (run / "last.pt").read_bytes()
    again = command(runs / "images", run, more="--num-workers 1" if fault is dead_worker else "")
    with fault(run) as message, pytest.raises(SystemExit) as end:
        metrix.main(again)
    told = capsys.readouterr().err
    assert end.value.code == 2 and told.startswith("metrix: ") and told.count("\n") == 1
    assert message.format(run=run, images=runs / "images") in told, told
    assert (run / "last.pt").read_bytes() == before and set(os.listdir(run)) == set(metrix.WRITTEN)
    assert not (tmp_path / "executed").exists()
    metrix.main(again)
    assert equal(everything(run), everything(runs / "whole"))


def test_an_output_below_a_file_is_told_in_one_line(runs, capsys):
    with pytest.raises(SystemExit) as end:
        metrix.main(command(runs / "images", runs / "images/class0/0.png/run"))
    told = capsys.readouterr().err
    assert end.value.code == 2 and told.count("\n") == 1 and "0.png/run" in told


def test_faults_are_skipped_by_flag_and_counted(runs, tmp_path):
    flags = "--on-nonfinite skip --on-broken-image skip"
    with poisoned_image(runs / "run"), at_step(2, lambda model, loss: loss * torch.nan):
        metrix.main(command(runs / "images", tmp_path / "run", more=flags))
    log = list(map(json.loads, (tmp_path / "run/log.jsonl").read_text().splitlines()))
    assert [line["skipped_steps"] for line in log] == [1, 0, 0]
    assert sum(line["broken_images"] for line in log) > 0
    assert all(tensor.isfinite().all() for tensor in torch.load(tmp_path / "run/last.pt", weights_only=True)["model"].values())


def test_a_gpu_is_asked_once_in_a_while_and_the_right_step_is_named():
    for bad in (0, 3, 5):
        finite = [torch.tensor(n != bad) for n in range(6)]
        with pytest.raises(FloatingPointError) as error:
            metrix.check_finite(finite, 105)
        assert error.value.args == (100 + bad,)
    metrix.check_finite([torch.tensor(True)] * 6, 105)
    metrix.check_finite([], 105)


# ----------------------------------------------------------------------------------------------- soak

SOAK = """
import resource
def memory():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() / 2**20
def step(*given, step=metrix.step, taken=[]):
    taken.append(1)
    if len(taken) in (200, 1000):
        print("after", len(taken), memory(), flush=True)
    return step(*given)
metrix.step = step
"""


@pytest.mark.slow
@pytest.mark.parametrize("mode", metrix.MODES)
def test_a_thousand_steps_need_no_more_memory_than_two_hundred(mode, tmp_path, write_tree):
    """In MB. The tolerance, 10 kB a step, is what an allocator may scatter; a step's batch alone takes 70 kB."""
    tree = write_tree(tmp_path / "images", {f"class{c}": 205 for c in range(6)}, size=16)
    run = child(SOAK, command(tree, tmp_path / "run", f"multisimilarity {mode}", "--epochs 10"))
    told, errors = run.communicate()
    assert run.returncode == 0, errors
    first, last = (float(line.split()[2]) for line in told.splitlines() if line.startswith("after"))
    assert last - first < 8, (first, last)

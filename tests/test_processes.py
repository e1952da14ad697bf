"""Many processes give what one gives: the loss of the whole batch and its gradient, in all cells, and whole runs."""

import itertools
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
import model as models

ROOT = pathlib.Path(metrix.__file__).parent
CELLS = list(itertools.product(metrix.LOSSES, metrix.MODES))
SMALL = "--net tiny --weights none --bn stats --image-size 32 --embedding-size 16 --num-workers 0 --device cpu"
BATCHES = (  # eight images do not divide by three; the others leave little to mix, less than a pair a process at times
    [0, 0, 1, 1, 2, 2, 3, 3],
    [0, 0, 0, 0, 1, 1, 2, 3],
    [5] * 8,
    [0, 1, 2, 3, 4, 5, 6, 7],
    [0, 0, 0, 0, 0, 0, 0, 1],
    [4, 4, 1, 1, 2, 2, 5, 5],
)


def train_cell(loss, mode, dtype):
    """Mean loss of six steps, and the parameters they lead to. On many processes, each is given its share."""
    config = metrix.parse(f"toy {loss} {mode} {SMALL} --batch-size 8 --images-per-class 2 --lr 1e-4".split())
    torch.manual_seed(0)
    net, metric = models.ResNet(**models.NETS["tiny"], embedding_size=16, bn="stats"), metrix.LOSSES[loss](8, 16)
    net, metric = net.to(dtype), metric.to(dtype)
    optimizer = metrix.make_optimizer(net, metric, config)
    images = torch.randn(len(BATCHES), 8, 3, 32, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    batches = [(metrix.share(x), metrix.share(torch.tensor(y))) for x, y in zip(images, BATCHES)]
    mean, *_ = metrix.train_epoch(0, net, metric, optimizer, batches, config)
    return dict(mean=torch.tensor(mean)) | net.state_dict() | metric.state_dict()


def train_cells(process, processes, out):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{out}/store", rank=process, world_size=processes)
    torch.save([train_cell(*cell, dtype) for cell in CELLS for dtype in (torch.float32, torch.float64)], f"{out}/{process}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_many_processes_train_like_one_in_all_cells(processes, tmp_path):
    """In float32 the loss only: Adam divides gradients of the size of rounding by their own size."""
    torch.multiprocessing.spawn(train_cells, (processes, tmp_path), nprocs=processes)
    results = [torch.load(tmp_path / f"{process}.pt", weights_only=True) for process in range(processes)]
    for n, (cell, dtype) in enumerate(itertools.product(CELLS, (torch.float32, torch.float64))):
        alone, first = train_cell(*cell, dtype), results[0][n]
        torch.testing.assert_close(first["mean"], alone["mean"], rtol=1e-5, atol=1e-5)
        for name, value in alone.items():
            assert all(torch.equal(result[n][name], first[name]) for result in results)  # they never drift apart
            if dtype == torch.float64:
                torch.testing.assert_close(first[name], value, rtol=1e-9, atol=1e-9)


def run_sh(processes, *arguments, cwd):
    environment = os.environ | dict(NPROC=str(processes), OMP_NUM_THREADS="1")
    return subprocess.run([str(ROOT / "run.sh"), *map(str, arguments)], capture_output=True, text=True, cwd=cwd, env=environment)


def recalls(log):
    return [{name: line.get(name) for name in ("recall", "map_at_r", "r_precision", "queries", "broken_images")} for line in log]


@pytest.mark.slow
def test_run_sh_starts_many_processes_and_one_can_go_on(tmp_path, write_tree):
    tree = write_tree(tmp_path / "images", {f"class{c}": 5 for c in range(10)})
    for broken in (tree / "class2" / "1.png", tree / "class7" / "3.png"):  # of those to train and to test on
        broken.write_bytes(b"no picture")
    flags = f"folder multisimilarity input --data-root {tree} {SMALL} --batch-size 6 --images-per-class 2 --epochs 2 --lr 1e-5".split()
    skip = ["--on-broken-image", "skip"]
    for processes in (1, 3):
        result = run_sh(processes, *flags, *skip, "--out", f"of{processes}", cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        assert result.stdout.count("epoch   2/2") == 1 and "broken_images" in json.loads(result.stdout.splitlines()[-1])["last"]
    one, three = (torch.load(tmp_path / out / "last.pt", weights_only=True) for out in ("of1", "of3"))
    assert recalls(one["log"]) == recalls(three["log"])
    for name, value in one["model"].items():
        torch.testing.assert_close(three["model"][name], value, rtol=1e-4, atol=1e-5)
    assert sorted(os.listdir(tmp_path / "of3")) == sorted(metrix.WRITTEN)

    result = run_sh(1, *flags, *skip, "--out", "of3", "--resume", cwd=tmp_path)
    assert result.returncode == 0 and "going on with of3 after epoch 2 of 2" in result.stdout
    result = run_sh(2, "eval", "of3", cwd=tmp_path)
    assert result.returncode == 0 and json.loads(result.stdout.splitlines()[-1])["recall"] == one["log"][-1]["recall"]

    for more, message in (([], f"metrix: {tree}/class2/1.png: cannot be read as an image"), (["--bn", "train"], "metrix: --bn train over many")):
        result = run_sh(2, *flags, *more, "--out", "fails", cwd=tmp_path)
        told = [line for line in result.stderr.splitlines() if line.startswith("metrix: ") and "stopped" not in line]
        assert result.returncode != 0 and len(told) == 1 and told[0].startswith(message), result.stderr


@pytest.mark.slow
def test_many_processes_train_from_one_cache(tmp_path, write_tree):
    tree = write_tree(tmp_path / "images", {f"class{c}": 5 for c in range(10)})
    flags = f"folder contrastive feature --data-root {tree} {SMALL} --batch-size 6 --images-per-class 2 --epochs 2 --lr 1e-5 --data-path cache".split()
    told = [run_sh(processes, *flags, "--out", f"of{processes}", cwd=tmp_path) for processes in (2, 1)]
    assert [result.returncode for result in told] == [0, 0], told
    assert [result.stdout.count("decoded 50 images") for result in told] == [1, 0]
    assert os.listdir(tree / ".metrix-cache") == ["folder-320"]
    one, two = (torch.load(tmp_path / out / "last.pt", weights_only=True) for out in ("of1", "of2"))
    assert recalls(one["log"]) == recalls(two["log"])
    for name, value in one["model"].items():
        torch.testing.assert_close(two["model"][name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_all_processes_end_when_one_is_killed_and_the_run_goes_on(tmp_path, write_tree, monkeypatch):
    tree = write_tree(tmp_path / "images", {f"class{c}": 5 for c in range(10)})
    flags = f"{ROOT}/metrix.py folder contrastive embed --data-root {tree} --out run {SMALL} --batch-size 6 --images-per-class 2 --epochs 400"
    launch = [sys.executable, *"-m torch.distributed.run --standalone --nproc-per-node=2".split(), *flags.split()]
    launched = subprocess.Popen(launch, cwd=tmp_path, env=os.environ | dict(OMP_NUM_THREADS="1"), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    while not (tmp_path / "run" / "last.pt").exists():
        assert launched.poll() is None
        time.sleep(0.1)
    children = pathlib.Path(f"/proc/{launched.pid}/task/{launched.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    launched.communicate(timeout=120)
    assert launched.returncode != 0 and not any(pathlib.Path(f"/proc/{child}").exists() for child in children)
    done = models.read_checkpoint(str(tmp_path / "run" / "last.pt"))["epoch"]
    assert 1 <= done < 400

    def begin(epoch, *given):
        raise KeyboardInterrupt(f"at epoch {epoch}")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(metrix, "train_epoch", begin)
    with pytest.raises(KeyboardInterrupt, match=f"at epoch {done}"):
        metrix.run(metrix.parse(flags.split()[1:]))

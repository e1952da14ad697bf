"""Several processes give the results of one: the loss of the global batch and its gradient, and whole runs."""

import json
import os

import pytest
import torch
from test_metrix import CELLS, WRITTEN, run_sh

import metrix
import model as models

SMALL = "--net tiny --weights none --bn stats --image-size 32 --embedding-size 16 --num-workers 0 --device cpu"
BATCHES = (  # the last ones leave little to mix: sometimes less than a pair per process
    [0, 0, 1, 1, 2, 2, 3, 3],
    [0, 0, 0, 0, 1, 1, 2, 3],
    [5] * 8,
    [0, 1, 2, 3, 4, 5, 6, 7],
    [0, 0, 0, 0, 0, 0, 0, 1],
    [4, 4, 1, 1, 2, 2, 5, 5],
)


def train_cell(loss, mode, dtype):
    """Mean loss of six steps, and the parameters after them. Each process is given its shard of the batches."""
    config = metrix.parse(f"toy {loss} {mode} {SMALL} --batch-size 24 --images-per-class 2 --lr 1e-4".split())
    torch.manual_seed(0)
    net, metric = models.ResNet(**models.NETS["tiny"], embedding_size=16, bn="stats"), metrix.LOSSES[loss](8, 16)
    net, metric = net.to(dtype), metric.to(dtype)
    optimizer = metrix.make_optimizer(net, metric, config)
    images = torch.randn(len(BATCHES), 8, 3, 32, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    batches = [(metrix.shard(x), metrix.shard(torch.tensor(y))) for x, y in zip(images, BATCHES)]
    mean = metrix.train_epoch(0, net, metric, optimizer, batches, config)
    return dict(mean=torch.tensor(mean)) | net.state_dict() | metric.state_dict()


def train_cells(rank, world_size, out, cells):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{out}/store", rank=rank, world_size=world_size)
    torch.save([train_cell(*cell, torch.float64) for cell in cells], f"{out}/{rank}.pt")
    torch.distributed.destroy_process_group()


def check_cells(world_size, cells, out):
    torch.multiprocessing.spawn(train_cells, (world_size, out, cells), nprocs=world_size)
    results = [torch.load(out / f"{rank}.pt", weights_only=True) for rank in range(world_size)]
    for n, cell in enumerate(cells):
        for name, value in train_cell(*cell, torch.float64).items():
            assert all(torch.equal(result[n][name], results[0][n][name]) for result in results), "the ranks drift apart"
            torch.testing.assert_close(results[0][n][name], value, rtol=1e-9, atol=1e-9)


def test_two_processes_train_like_one(tmp_path):
    check_cells(2, [("proxyanchor", "input"), ("contrastive", "feature")], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3])  # eight images do not divide by three
def test_several_processes_train_like_one_in_all_cells(world_size, tmp_path):
    check_cells(world_size, CELLS, tmp_path)


@pytest.mark.slow
def test_run_sh_starts_several_processes_and_one_can_resume(tmp_path, write_tree):
    tree = write_tree(tmp_path / "images", {f"class{c}": 5 for c in range(10)})
    batch = "--batch-size 6 --images-per-class 2"
    flags = f"folder multisimilarity input --data-root {tree} {SMALL} {batch} --epochs 2 --lr 1e-5"
    environment = dict(cwd=tmp_path, OMP_NUM_THREADS="1")
    for world_size in (1, 3):
        result = run_sh(*flags.split(), "--out", f"of{world_size}", NPROC=str(world_size), **environment)
        assert result.returncode == 0, result.stderr
        assert result.stdout.count("epoch   2/2") == 1
    one, three = (torch.load(tmp_path / out / "last.pt", weights_only=True) for out in ("of1", "of3"))
    for name in ("recall", "map_at_r", "r_precision", "queries"):
        assert [line.get(name) for line in one["log"]] == [line.get(name) for line in three["log"]]
    for name, value in one["model"].items():
        torch.testing.assert_close(three["model"][name], value, rtol=1e-4, atol=1e-5)
    assert sorted(os.listdir(tmp_path / "of3")) == WRITTEN

    result = run_sh(*flags.split(), "--out", "of3", "--resume", **environment)
    assert result.returncode == 0 and "resumes after epoch 2" in result.stdout
    result = run_sh("eval", "of3", NPROC="2", **environment)
    assert json.loads(result.stdout.splitlines()[-1])["recall"] == one["log"][-1]["recall"], result.stderr

    (tree / "class2" / "1.png").write_bytes(b"no picture")
    for more, message in (([], f"{tree}/class2/1.png: cannot be read"), (["--bn", "train"], "--bn train on several")):
        result = run_sh(*flags.split(), *more, "--out", "fails", NPROC="2", **environment)
        errors = [line for line in result.stderr.splitlines() if line.startswith("metrix: ")]
        assert result.returncode != 0 and len(errors) == 1 and message in errors[0], result.stderr

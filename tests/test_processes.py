"""Several processes give the results of one: the loss of the whole batch and its gradient, and whole runs."""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from test_metrix import COMBINATIONS, WRITTEN
from test_run_sh import run_sh

import metrix
from model import NETS, ResNet

SMALL = "--net tiny --weights none --bn stats --image-size 32 --embedding-size 16 --num-workers 0 --device cpu"
BATCHES = (  # the last ones give fewer mixed pairs than processes
    [0, 0, 1, 1, 2, 2, 3, 3],
    [0, 0, 0, 0, 1, 1, 2, 3],
    [5] * 8,
    [0, 1, 2, 3, 4, 5, 6, 7],
    [0, 0, 0, 0, 0, 0, 0, 1],
    [4, 4, 1, 1, 2, 2, 5, 5],
)


def train(loss, mode):
    """Mean loss of six steps in float64, and the parameters after them. Each process is given its shard of a batch."""
    config = metrix.parse(f"toy {loss} {mode} {SMALL} --batch-size 24 --images-per-class 2 --lr 1e-4".split())
    torch.manual_seed(0)
    net, metric = ResNet(**NETS["tiny"], embedding_size=16, bn="stats").double(), metrix.LOSSES[loss](8, 16).double()
    images = torch.randn(len(BATCHES), 8, 3, 32, 32, generator=torch.Generator().manual_seed(1)).double()
    batches = [(metrix.shard(x), metrix.shard(torch.tensor(y))) for x, y in zip(images, BATCHES)]
    mean = metrix.train_epoch(0, net, metric, metrix.make_optimizer(net, metric, config), batches, config)
    return dict(mean=torch.tensor(mean)) | net.state_dict() | metric.state_dict()


def one_of_several(rank, world_size, out, combinations):
    torch.set_num_threads(1)
    metrix.RANK, metrix.WORLD_SIZE = rank, world_size
    torch.distributed.init_process_group("gloo", f"file://{out}/store", rank=rank, world_size=world_size)
    torch.save([train(*words) for words in combinations], f"{out}/{rank}.pt")

    state = {"epoch": 3, "model": torch.ones(2)} if rank == 0 else None  # only the first machine has the run
    state = metrix.agree(dict(lr=1.0, out=f"run{rank}"), state)
    assert state["epoch"] == 3 and torch.equal(state["model"], torch.ones(2))
    with pytest.raises(ValueError, match="train_images is 5, not 6"):  # on all, so that none waits
        metrix.agree(dict(train_images=6 - rank // (world_size - 1)), None)
    torch.distributed.destroy_process_group()


def compare(world_size, combinations, out):
    torch.multiprocessing.spawn(one_of_several, (world_size, out, combinations), nprocs=world_size)
    results = [torch.load(out / f"{rank}.pt", weights_only=True) for rank in range(world_size)]
    for n, words in enumerate(combinations):
        for name, value in train(*words).items():
            assert all(torch.equal(result[n][name], results[0][n][name]) for result in results), "the ranks drift apart"
            torch.testing.assert_close(results[0][n][name], value, rtol=1e-9, atol=1e-9)


def test_two_processes_train_like_one(tmp_path):
    compare(2, [("proxyanchor", "input"), ("contrastive", "feature")], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3])  # eight images do not divide by three
def test_several_processes_train_like_one_in_all_combinations(world_size, tmp_path):
    compare(world_size, COMBINATIONS, tmp_path)


@pytest.fixture
def flags(tmp_path, write_tree):
    tree = write_tree(tmp_path / "images", {f"class{c}": 5 for c in range(10)})
    return f"folder multisimilarity input --data-root {tree} {SMALL} --batch-size 8 --images-per-class 2 --lr 1e-5"


def test_no_process_may_go_without_images(flags, monkeypatch):
    config = metrix.parse(flags.split())
    monkeypatch.setattr(metrix, "WORLD_SIZE", 8)
    metrix.check(config)
    monkeypatch.setattr(metrix, "WORLD_SIZE", 9)
    with pytest.raises(ValueError, match="--batch-size 8 is too small for 9 processes; use a smaller NPROC"):
        metrix.check(config)
    monkeypatch.setattr(metrix, "WORLD_SIZE", 25)
    assert len(metrix.load_splits(config).test) == 25
    monkeypatch.setattr(metrix, "WORLD_SIZE", 26)
    with pytest.raises(ValueError, match="26 processes for 25 train images; use a smaller NPROC"):
        metrix.load_splits(config)


@pytest.mark.slow
def test_run_sh_starts_several_processes_and_one_can_resume(flags, tmp_path):
    flags, environment = f"{flags} --epochs 2".split(), dict(cwd=tmp_path, OMP_NUM_THREADS="1")
    for world_size in (1, 3):
        result = run_sh(*flags, "--out", f"of{world_size}", NPROC=str(world_size), **environment)
        assert result.returncode == 0 and "Warning" not in result.stderr, result.stderr
        assert result.stdout.count("epoch   2/2") == 1
    one, three = (torch.load(tmp_path / out / "last.pt", weights_only=True) for out in ("of1", "of3"))
    for name in ("recall", "map_at_r", "r_precision", "queries"):
        assert [line.get(name) for line in one["log"]] == [line.get(name) for line in three["log"]]
    for name, value in one["model"].items():
        torch.testing.assert_close(three["model"][name], value, rtol=1e-4, atol=1e-5)
    assert sorted(os.listdir(tmp_path / "of3")) == WRITTEN

    result = run_sh(*flags, "--out", "of3", "--resume", **environment)
    assert result.returncode == 0 and "resumes after epoch 2" in result.stdout
    result = run_sh("eval", "of3", NPROC="2", **environment)
    recall = {int(k): share for k, share in json.loads(result.stdout.splitlines()[-1])["recall"].items()}
    assert recall == one["log"][-1]["recall"], result.stderr
    result = run_sh(*flags, "--bn", "train", "--out", "fails", NPROC="2", **environment)
    assert result.returncode != 0 and result.stderr.count("metrix: --bn train on several") == 1, result.stderr


@pytest.mark.slow
def test_two_machines_of_which_the_first_alone_has_the_run(flags, tmp_path):
    """A machine is a torchrun in a directory of its own."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]

    def on_two_machines(*more):
        """(exit code, stdout, stderr) of each, if these words are added to its command."""
        started = []
        for node, words in enumerate(more):
            (tmp_path / f"machine{node}").mkdir(exist_ok=True)
            where = f"--nnodes 2 --node-rank {node} --master-addr 127.0.0.1 --master-port {port} {ROOT}/metrix.py"
            command = f"{sys.executable} -m torch.distributed.run {where} {flags} {words}".split()
            pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            started.append(subprocess.Popen(command, cwd=tmp_path / f"machine{node}", **pipes))
        outputs = [machine.communicate(timeout=300) for machine in started]
        return [(machine.returncode, *output) for machine, output in zip(started, outputs)]

    for shown in ("epoch   1/1", "resumes after epoch 1"):
        (code, first, error), (other_code, second, _) = on_two_machines(*["--epochs 1 --out run"] * 2)
        assert (code, other_code, second) == (0, 0, "") and shown in first, error
    assert sorted(os.listdir(tmp_path / "machine0" / "run")) == WRITTEN and not os.listdir(tmp_path / "machine1")
    for code, _, error in on_two_machines("--seed 1 --out other", "--seed 2 --out other"):
        assert code != 0 and error.count("metrix: the processes differ (seed is 2, not 1)") == 1, error
    for code, _, error in on_two_machines("--seed 1 --out other", "--sed 1 --out other"):
        assert code != 0 and error.count("metrix: ") == 1, error

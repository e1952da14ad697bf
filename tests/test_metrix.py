"""The step in its twelve cells, the recipes, a run and its files, and bad input."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT

import eval
import kernels
import losses
import metrix
import model as models
from kernels import mixed, pairwise

CELLS = list(itertools.product(metrix.LOSSES, metrix.MODES))
SMALL = "--net tiny --weights none --image-size 32 --embedding-size 16 --num-workers 0 --device cpu"
SMALL_BATCH = "--batch-size 8 --images-per-class 2"
WRITTEN = ["best.pt", "config.json", "last.pt", "log.jsonl", "retrieval.png"]
BATCHES = {
    "balanced": [0, 0, 1, 1, 2, 2, 3, 3],
    "unbalanced, with singletons": [0, 0, 0, 0, 1, 1, 2, 3],
    "no positive pair": [0, 1, 2, 3, 4, 5, 6, 7],
    "one class": [5] * 8,
}
IMAGES = torch.randn(8, 3, 40, 40, generator=torch.Generator().manual_seed(1))


def make(loss, mode, bn="train"):
    config = metrix.parse(f"toy {loss} {mode} {SMALL} {SMALL_BATCH}".split())
    torch.manual_seed(0)
    return config, models.ResNet(**models.NETS["tiny"], embedding_size=16, bn=bn), metrix.LOSSES[loss](8, 16)


# -------------------------------------------------------------------------------------------- method


@pytest.mark.parametrize("loss, mode", CELLS)
@pytest.mark.parametrize("labels", BATCHES.values(), ids=BATCHES.keys())
def test_every_cell_trains_on_every_kind_of_batch(loss, mode, labels):
    config, net, metric = make(loss, mode)
    config.weight_decay = 0.0  # it alone would move every parameter
    optimizer = metrix.make_optimizer(net, metric, config)
    before = {name: p.detach().clone() for module in (net, metric) for name, p in module.named_parameters()}
    for pairing in metric.pairings * 2:
        value = metrix.step(net, metric, IMAGES, torch.tensor(labels), config, 0.4, pairing)
        optimizer.zero_grad()
        value.backward()
        assert value.isfinite()
        assert all(p.grad is None or p.grad.isfinite().all() for p in [*net.parameters(), *metric.parameters()])
        optimizer.step()
    if labels == BATCHES["balanced"]:
        for name, p in [*net.named_parameters(), *metric.named_parameters()]:
            assert not torch.equal(p, before[name]), name


@pytest.mark.parametrize("loss, mode", CELLS)
def test_the_trunk_runs_once_and_in_input_mode_once_more_on_the_mixed_images(loss, mode, monkeypatch):
    config, net, metric = make(loss, mode, bn="stats")
    passes, features = [], net.features
    monkeypatch.setattr(net, "features", lambda images: passes.append(len(images)) or features(images))
    y = torch.tensor(BATCHES["unbalanced, with singletons"])
    for pairing in metric.pairings:
        passes.clear()
        metrix.step(net, metric, IMAGES, y, config, 0.4, pairing)
        with torch.no_grad():
            bank = len(losses.hardest_bank(net.head(features(IMAGES)), y, pairing)[0])
        assert passes == ([8, bank] if mode == "input" else [8])


@pytest.mark.parametrize("loss", metrix.LOSSES)
@pytest.mark.parametrize("mode", ["input", "feature", "embed"])
def test_the_step_equals_its_formula_in_value_and_gradient(loss, mode):
    """Written out: every mixed image, map or embedding of the bank is built."""
    config, net, metric = make(loss, mode, bn="stats")
    net, metric, images = net.double(), metric.double(), IMAGES.double()
    y = torch.tensor(BATCHES["balanced"])
    parameters = [*net.parameters(), *metric.parameters()]
    for pairing in metric.pairings:
        value = metrix.step(net, metric, images, y, config, 0.3, pairing)
        features = net.features(images)
        z = net.head(features)
        i, j = losses.hardest_bank(z, y, pairing) if mode == "input" else losses.full_bank(y, pairing)
        x = {"input": images, "feature": features, "embed": z}[mode]
        v = {"input": net, "feature": net.head, "embed": torch.nn.Identity()}[mode](0.3 * x[i] + 0.7 * x[j])
        expected = metric(z, y) + 0.4 * metric.mixed(z, y, v, i, 0.3, pairing)
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-9)
        for one, other in zip(*(torch.autograd.grad(out, parameters) for out in (value, expected))):
            torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("loss, mode", CELLS)
def test_triton_and_torch_agree_all_along_a_training_run(loss, mode, triton_device, monkeypatch):
    """Loss and gradient at the same parameters. Whole curves would part: ReLU and Adam amplify rounding."""
    config, net, metric = make(loss, mode, bn="stats")
    net, metric, images = net.to(triton_device), metric.to(triton_device), IMAGES[:6, :, :32, :32].to(triton_device)
    y = torch.tensor([0, 0, 1, 1, 2, 2], device=triton_device)
    optimizer, launches = metrix.make_optimizer(net, metric, config), []
    for file in (pairwise, mixed):
        form = file._triton_sums
        monkeypatch.setattr(file, "_triton_sums", lambda *a, form=form: launches.append(1) or form(*a))
    for n in range(3):
        results = []
        for kernels.backend in ("torch", "triton"):
            launches.clear()
            pairing = metric.pairings[n % len(metric.pairings)]
            value = metrix.step(net, metric, images, y, config, 0.3 + 0.1 * n, pairing)
            optimizer.zero_grad()
            value.backward()
            gradient = torch.cat([p.grad.flatten() for p in [*net.parameters(), *metric.parameters()]])
            results.append((value.item(), gradient))
            assert bool(launches) == (kernels.backend == "triton")
        (value, gradient), (fused_value, fused_gradient) = results
        assert fused_value == pytest.approx(value, rel=1e-4)  # the pair loss multiplies in bf16x3
        assert (fused_gradient - gradient).norm() < 1e-3 * gradient.norm()
        optimizer.step()


@pytest.mark.parametrize("mode", metrix.MODES)
def test_mixed_images_do_not_enter_the_running_statistics(mode):
    statistics = []
    for cell in ("baseline", mode):
        config, net, metric = make("multisimilarity", cell, bn="train")
        metrix.step(net.train(), metric, IMAGES, torch.tensor(BATCHES["balanced"]), config, 0.4, "positive-negative")
        statistics.append({name: x for name, x in net.named_buffers()})
    assert all(torch.equal(x, statistics[1][name]) for name, x in statistics[0].items())
    assert not torch.equal(statistics[0]["bn1.running_mean"], torch.zeros(16))


def test_an_epoch_draws_lam_and_pairing_and_keeps_the_schedule(monkeypatch):
    config, net, metric = make("proxyanchor", "feature")
    metric.pairings = losses.PAIRINGS
    config.lr_step, config.lr_gamma, config.lr, config.clip, config.weight_decay = 2, 0.1, 1e-3, 1e-4, 0.0
    optimizer = metrix.make_optimizer(net, metric, config)
    assert [group["base_lr"] for group in optimizer.param_groups] == pytest.approx([1e-3, 3e-2])
    drawn, gradients = [], []

    def step(model, metric, images, y, config, lam, pairing):
        drawn.append((lam, pairing))
        return sum(p.sum() for p in [*model.parameters(), *metric.parameters()])  # every gradient is 1

    optimizer.step = lambda: gradients.append(max(p.grad.abs().max().item() for p in net.parameters()))
    monkeypatch.setattr(metrix, "step", step)
    batches = [(torch.zeros(8, 3, 32, 32), torch.zeros(8, dtype=torch.long))] * 40
    for epoch in range(3):
        metrix.train_epoch(epoch, net, metric, optimizer, batches, config)
        lr = 1e-3 * 0.1 ** (epoch // 2)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([lr, 30 * lr])
    assert max(gradients) == pytest.approx(1e-4)
    lams = torch.tensor([lam for lam, _ in drawn])
    assert len(lams.unique()) == 120 and abs(lams.mean() - 0.5) < 0.07  # Beta(2, 2): mean 1/2, variance 1/20
    assert 0.03 < lams.var() < 0.07
    assert 35 < sum(pairing == "positive-negative" for _, pairing in drawn) < 85


# ------------------------------------------------------------------------------------------- recipes

MS_PA = ("multisimilarity", "proxyanchor")
EXPECTED = {  # (data sets, losses): epochs, lr, lr_step, lr_gamma, warmup_epochs, bn, images_per_class: baseline, mixed
    (("cub", "cars"), ("contrastive",)): ((60, 1e-4, 10, 0.1, 5, "stats", 0), (100, 1e-4, 10, 0.1, 5, "stats", 0)),
    (("cub", "cars"), MS_PA): ((60, 1e-4, 5, 0.5, 5, "stats", 0), (100, 1e-4, 10, 0.5, 5, "stats", 0)),
    (("sop",), ("contrastive",)): ((60, 3e-5, 10, 0.25, 5, "train", 5), (100, 3e-5, 10, 0.25, 5, "stats", 5)),
    (("inshop",), ("contrastive",)): ((60, 3e-5, 5, 0.25, 1, "train", 5), (100, 1e-4, 10, 0.25, 5, "train", 5)),
    (("sop", "inshop"), MS_PA): ((60, 6e-4, 20, 0.25, 1, "train", 5), (100, 6e-4, 20, 0.25, 1, "train", 5)),
}


def test_the_48_recipes_are_those_of_the_authors_commands(capsys):
    cells = 0
    for (datasets, its_losses), rows in EXPECTED.items():
        for dataset, loss, mode in itertools.product(datasets, its_losses, metrix.MODES):
            config = metrix.parse([dataset, loss, mode])
            found = tuple(getattr(config, name) for name in metrix.COLUMNS)
            assert found == rows[mode != "baseline"], (dataset, loss, mode)
            assert (config.batch_size, config.embedding_size, config.weight_decay, config.clip) == (100, 512, 1e-4, 10)
            metrix.describe(config)
            shown = capsys.readouterr().out
            for name in ("epochs", "lr_step", "warmup_epochs", "bn"):
                assert f"{name} {getattr(config, name)}," in shown
            assert "recipe:" not in shown
            cells += 1
    assert cells == 48


def test_flags_override_the_recipe_and_are_shown(capsys):
    config = metrix.parse("cub multisimilarity embed --epochs 60 --lr 0.5".split())
    assert (config.epochs, config.lr, config.lr_step) == (60, 0.5, 10)
    metrix.describe(config)
    shown = capsys.readouterr().out
    assert "epochs 60 (recipe: 100)," in shown and "lr 0.5 (recipe: 0.0001)," in shown and shown.count("recipe:") == 2
    assert metrix.parse("folder contrastive feature --weights none --net tiny".split()).bn == "train"


# ----------------------------------------------------------------------------------------------- run


@pytest.fixture
def tree(tmp_path, write_tree):
    return str(write_tree(tmp_path / "images", {f"class{c}": 5 for c in range(10)}))


def command(tree, out, cell="contrastive feature", more="--epochs 2"):
    return f"folder {cell} --data-root {tree} --out {out} {SMALL} {SMALL_BATCH} {more}".split()


@pytest.mark.parametrize("loss, mode", CELLS)
def test_every_cell_runs_from_the_command_line(loss, mode, tree, tmp_path, capsys):
    out = tmp_path / "run"
    metrix.main(command(tree, out, f"{loss} {mode}", "--epochs 1"))
    assert sorted(os.listdir(out)) == WRITTEN
    config = json.loads((out / "config.json").read_text())
    assert (config["loss"], config["mode"], config["train_images"]) == (loss, mode, 25)
    (line,) = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    assert list(line)[:6] == ["epoch", "loss", "lr", "recall", "seconds", "images_per_second"]
    assert {"map_at_r", "r_precision", "alignment", "uniformity", "utilization"} < set(line)
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["last"] == line and 0 <= line["recall"]["1"] <= line["recall"]["8"] <= 1
    for name in ("last.pt", "best.pt"):
        state = torch.load(out / name, weights_only=True)
        models.ResNet(**models.NETS["tiny"], embedding_size=16).load_state_dict(state["model"])
        assert ("proxies" in state["metric"]) == (loss == "proxyanchor")


def test_a_run_is_evaluated_again_from_its_checkpoints(tree, tmp_path, capsys):
    out = tmp_path / "run"
    metrix.main(command(tree, out))
    first, last = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    assert "map_at_r" not in first
    (out / "retrieval.png").unlink()
    metrix.main(["eval", str(out), "--device", "cpu"])
    result = json.loads((out / "eval.json").read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    shared = result.keys() & last.keys()
    assert {name: result[name] for name in shared} == {name: last[name] for name in shared} and "utilization" in shared
    assert (out / "retrieval.png").exists()
    metrix.main(["eval", str(out), "--checkpoint", "best"])
    best = max((first, last), key=lambda line: line["recall"]["1"])
    assert json.loads((out / "eval.json").read_text())["recall"] == best["recall"]
    eval.main([str(out)])
    assert f"{100 * last['map_at_r']:.2f}" in capsys.readouterr().out


def test_every_epoch_draws_other_batches(tree, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(metrix, "train_epoch", lambda *a: drawn.append([y.tolist() for _, y in a[4]]) or 0.0)
    metrix.main(command(tree, tmp_path / "run"))
    assert len(drawn) == 2 and drawn[0] != drawn[1]


def test_validation_leaves_the_test_classes_unseen(tree, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    batch = "--batch-size 4 --images-per-class 2"
    metrix.main(f"folder --data-root {tree} {SMALL} {batch} --epochs 1 --validation".split())
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["out"] == "runs/folder-contrastive-feature-validation-seed0" and summary["last"]["queries"] == 15


def test_a_run_with_its_own_gallery_ranks_queries_in_it(tmp_path, capsys):
    y = torch.arange(6).repeat_interleave(2)
    query, gallery = torch.eye(6)[y] + 0.1, torch.eye(6)[y.flip(0)] + 0.1
    result, ranking = metrix.measure([(query, y), (gallery, y.flip(0))], "inshop", train=torch.eye(6))
    assert result["recall"]["1"] == 1 and result["queries"] == 12 and len(ranking.rank) == 12


@pytest.mark.parametrize("loss", ["multisimilarity", "proxyanchor"])
def test_a_stopped_run_resumes_and_ends_with_the_same_bits(loss, tree, tmp_path, monkeypatch):
    stopped = command(tree, tmp_path / "stopped", f"{loss} input", "--epochs 3")
    metrix.main(command(tree, tmp_path / "whole", f"{loss} input", "--epochs 3"))
    train_epoch = metrix.train_epoch

    def stop_in_the_third(epoch, *arguments):
        if epoch == 2:
            raise KeyboardInterrupt
        return train_epoch(epoch, *arguments)

    monkeypatch.setattr(metrix, "train_epoch", stop_in_the_third)
    with pytest.raises(SystemExit) as end:
        metrix.main(stopped)
    assert end.value.code == 130
    monkeypatch.setattr(metrix, "train_epoch", train_epoch)
    metrix.main([*stopped, "--resume"])
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


def assert_same_run(one, other):
    states = [torch.load(out / "last.pt", weights_only=True) for out in (one, other)]
    for part in ("model", "metric"):
        assert all(torch.equal(x, states[1][part][name]) for name, x in states[0][part].items())
    moments = [state["optimizer"]["state"] for state in states]
    assert all(torch.equal(x["exp_avg_sq"], moments[1][n]["exp_avg_sq"]) for n, x in moments[0].items())
    logs = [[(line["epoch"], line["loss"], line["lr"], line["recall"]) for line in state["log"]] for state in states]
    assert logs[0] == logs[1] and sorted(os.listdir(one)) == sorted(os.listdir(other)) == WRITTEN


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_like_an_unbroken_one(tree, tmp_path):
    metrix.main(command(tree, tmp_path / "whole", more="--epochs 8"))
    launch = [sys.executable, str(ROOT / "metrix.py"), *command(tree, tmp_path / "killed", more="--epochs 8")]
    kills = 0
    for wait in itertools.cycle((4.0, 5.5, 7.0, 8.5)):
        process = subprocess.Popen(launch, stdout=subprocess.DEVNULL)
        try:
            assert process.wait(timeout=wait + 0.37 * kills) == 0
            break
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
    assert kills >= 1
    for name in os.listdir(tmp_path / "killed"):
        if name.endswith(".tmp"):
            (tmp_path / "killed" / name).unlink()
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


# ----------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("birds", "argument dataset: invalid choice: 'birds'"),
        ("toy triplet", "argument loss: invalid choice: 'triplet'"),
        ("toy contrastive mixup", "argument mode: invalid choice: 'mixup'"),
        ("toy --epochs many", "argument --epochs: invalid int value: 'many'"),
        ("toy --epochs 0", "--epochs must be at least 1"),
        ("toy --bn on", "argument --bn: invalid choice: 'on'"),
        ("toy --epoch 3", "unrecognized arguments: --epoch 3"),
        ("toy --batch-size 5", "--batch-size 5 must be a multiple of --images-per-class 5, at least twice it"),
        ("toy --images-per-class 7", "--batch-size 100 must be a multiple of --images-per-class 7"),
        ("folder --net tiny", "--net tiny has no ImageNet weights; add --weights none"),
        ("toy --device abacus", "--device abacus is not available"),
        ("folder --data-root /nowhere --weights none", "/nowhere: no such directory"),
        ("folder --data-root {empty} --weights none", "{empty}: no images in it"),
        ("folder --data-root {tree} --weights none --batch-size 50", "--batch-size 50 is more than the 25 training im"),
        ("folder --data-root {tree} {small} --weights {tree}/none.pt", "{tree}/none.pt: no such file of weights"),
        ("folder --data-root {tree} {small} --out {tree}/class0/0.png/run", "{tree}/class0/0.png"),
        ("folder --data-root {tree} {small} --out {empty} --resume", "--resume: {empty} holds no run"),
        ("folder --data-root {broken} {small} --out {empty}/run", "{broken}/d/1.png: cannot be read as an image"),
        ("folder --data-root {broken} {small} --out {empty}/run --num-workers 2", "{broken}/d/1.png: cannot be read"),
        ("eval {empty}", "{empty}/config.json: missing or damaged"),
        ("eval {empty} --checkpoint first", "argument --checkpoint: invalid choice: 'first'"),
    ],
)
def test_bad_input_gets_one_line_and_exit_code_2(arguments, message, tree, tmp_path, write_tree, capsys):
    places = dict(empty=tmp_path / "empty", broken=tmp_path / "broken", tree=tree, small=f"{SMALL} --batch-size 10")
    (tmp_path / "empty").mkdir()
    write_tree(tmp_path / "broken", {name: 4 for name in "abcdefgh"})
    (tmp_path / "broken" / "d" / "1.png").write_bytes(b"not a picture")
    with pytest.raises(SystemExit) as end:
        metrix.main(arguments.format(**places).split())
    error = capsys.readouterr().err
    assert end.value.code == 2
    assert error.startswith("metrix: ") and error.count("\n") == 1 and message.format(**places) in error


def test_a_diverging_run_names_its_last_checkpoint(tree, tmp_path, capsys, monkeypatch):
    metrix.main(command(tree, tmp_path / "run", more="--epochs 1"))
    monkeypatch.setattr(metrix, "step", lambda model, *_: model.embedding.weight.sum() * torch.nan)
    settings = json.loads((tmp_path / "run" / "config.json").read_text())
    (tmp_path / "run" / "config.json").write_text(json.dumps(settings | dict(epochs=2)))
    with pytest.raises(SystemExit) as end:
        metrix.main(command(tree, tmp_path / "run", more="--epochs 2"))
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1
    assert f"epoch 2, step 1: the loss is nan; {tmp_path}/run/last.pt holds epoch 1" in error


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda out: (out / "config.json").unlink(), "config.json: missing or damaged"),
        (lambda out: (out / "config.json").write_text("{"), "config.json: missing or damaged"),
        (lambda out: (out / "last.pt").write_bytes(b"PK"), "last.pt: not a readable checkpoint"),
        (lambda out: torch.save({"model": {}}, out / "last.pt"), "last.pt: not a checkpoint of this run"),
    ],
)
def test_a_damaged_run_is_not_resumed(damage, message, tree, tmp_path, capsys):
    metrix.main(command(tree, tmp_path / "run", more="--epochs 1"))
    damage(tmp_path / "run")
    with pytest.raises(SystemExit) as end:
        metrix.main(command(tree, tmp_path / "run", more="--epochs 1"))
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1 and message in error


def test_another_configuration_does_not_overwrite_a_run(tree, tmp_path, capsys):
    metrix.main(command(tree, tmp_path / "run", more="--epochs 1"))
    before = {name: (tmp_path / "run" / name).read_bytes() for name in WRITTEN}
    with pytest.raises(SystemExit) as end:
        metrix.main(command(tree, tmp_path / "run", more="--epochs 1 --lr 0.5"))
    assert end.value.code == 2 and "holds another run (lr is 0.003, not 0.5)" in capsys.readouterr().err
    assert before == {name: (tmp_path / "run" / name).read_bytes() for name in WRITTEN}


# -------------------------------------------------------------------------------------------- run.sh


def run_sh(*arguments, cwd=None, **environment):
    environment = os.environ | {"PYTHON": sys.executable} | environment  # never a Python without our packages
    command = [ROOT / "run.sh", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment)


TWICE = [f"{loss}-{mode}-seed{seed}" for seed in (0, 1) for loss, mode in CELLS]


@pytest.mark.parametrize(
    "words, variables, starts",
    [
        ("test", {}, "-m pytest -q -m not slow tests"),
        ("test --slow -x", {}, "-m pytest -q -m slow tests -x"),
        ("bench pairwise", {}, "-m kernels.bench pairwise"),
        ("toy contrastive --lr 1", {}, f"{ROOT}/metrix.py toy contrastive --lr 1"),
        ("toy", dict(NPROC="2"), f"-m torch.distributed.run --standalone --nproc-per-node=2 {ROOT}/metrix.py toy"),
        ("all toy --lr 1 --seeds 2", {}, " ".join([f"{ROOT}/eval.py", *(f"runs/toy-{cell}" for cell in TWICE)])),
        (
            "all toy",
            dict(LOSSES="contrastive", MODES="input embed"),
            f"{ROOT}/eval.py runs/toy-contrastive-input-seed0 runs/toy-contrastive-embed-seed0",
        ),
    ],
)
def test_run_sh_starts_what_it_is_asked_for(words, variables, starts, tmp_path):
    (tmp_path / "python").write_text('#!/bin/sh\necho "$@"')
    (tmp_path / "python").chmod(0o755)
    result = run_sh(*words.split(), PYTHON=str(tmp_path / "python"), **variables)
    assert result.returncode == 0 and result.stdout.splitlines()[-1] == starts


@pytest.mark.slow
def test_run_sh_all_runs_every_cell_and_prints_the_table(tree, tmp_path):
    flags = f"--data-root {tree} {SMALL} {SMALL_BATCH} --epochs 1".split()
    result = run_sh("all", "folder", *flags, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert len(os.listdir(tmp_path / "runs")) == 12
    rows = json.loads(result.stdout.splitlines()[-1])["rows"]
    assert all(len(row["values"][mode]) == 1 for row in rows if row["row"] == "recall_at_1" for mode in metrix.MODES)


@pytest.mark.slow
def test_the_toy_baseline_is_neither_hopeless_nor_saturated(tmp_path):
    start = time.perf_counter()
    result = run_sh("toy", "contrastive", "baseline", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    summary = json.loads(result.stdout.splitlines()[-1])
    assert 0.40 < summary["last"]["recall"]["1"] < 0.85 and summary["seconds"] < time.perf_counter() - start
    assert sorted(os.listdir(tmp_path / summary["out"])) == WRITTEN

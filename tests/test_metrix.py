"""The step and its twelve cells, the run and its files, and what bad input is told."""

import contextlib
import itertools
import json
import math
import os
import pathlib
import subprocess
import sys

import pytest
import torch

import data
import eval
import kernels
import losses
import metrix
import model as models

ROOT = pathlib.Path(metrix.__file__).parent
CELLS = list(itertools.product(metrix.LOSSES, metrix.MODES))
SMALL = "--net tiny --weights none --image-size 32 --embedding-size 16 --batch-size 8 --images-per-class 2 --num-workers 0 --device cpu"
BATCHES = {
    "balanced": [0, 0, 1, 1, 2, 2, 3, 3],
    "unbalanced, with singletons": [0, 0, 0, 0, 1, 1, 2, 3],
    "no positive pair": [0, 1, 2, 3, 4, 5, 6, 7],
    "one class": [5] * 8,
}


def make(loss, mode, bn="train"):
    torch.manual_seed(0)
    config = metrix.parse([*f"toy {loss} {mode} {SMALL}".split()])
    net = models.ResNet(**models.NETS["tiny"], embedding_size=16, bn=bn)
    return config, net, metrix.LOSSES[loss](8, 16)


# -------------------------------------------------------------------------------------------- method


@pytest.mark.parametrize("loss, mode", [cell for cell in CELLS if cell[1] != "input"])
@pytest.mark.parametrize("labels", BATCHES.values(), ids=BATCHES.keys())
def test_a_step_asks_its_device_for_nothing(loss, mode, labels, monkeypatch):
    """Tensors on "meta" have no values: whatever would wait for one is an error."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # which "meta" has not
    config, net, metric = make(loss, mode)
    net.to("meta"), metric.to("meta")
    for pairing in metric.pairings:
        value = metrix.step(net, metric, torch.empty(8, 3, 40, 40, device="meta"), torch.tensor(labels), config, 0.4, pairing)
        value.backward()
        metrix.all_finite(value, [*net.parameters(), *metric.parameters()])
    with pytest.raises(RuntimeError):
        value.item()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("loss, mode", [cell for cell in CELLS if cell[1] != "input"])
def test_a_step_does_not_wait_for_a_gpu(loss, mode):
    config, net, metric = make(loss, mode)
    net.to("cuda"), metric.to("cuda")
    images, y = torch.ones(8, 3, 40, 40, device="cuda"), torch.tensor(BATCHES["balanced"])
    for checked in (False, True):  # the first time kernels are compiled
        torch.cuda.set_sync_debug_mode("error" if checked else "default")
        try:
            for pairing in metric.pairings:
                value = metrix.step(net, metric, images, y, config, 0.4, pairing)
                value.backward()
                metrix.all_finite(value, [*net.parameters()])
                torch.nn.utils.clip_grad_value_([*net.parameters()], 10)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("loss, mode", CELLS)
@pytest.mark.parametrize("labels", BATCHES.values(), ids=BATCHES.keys())
def test_every_cell_trains_on_every_kind_of_batch(loss, mode, labels):
    config, net, metric = make(loss, mode)
    y, images = torch.tensor(labels), torch.randn(8, 3, 40, 40)
    config.weight_decay = 0.0  # which alone would move every parameter
    optimizer = metrix.make_optimizer(net, metric, config)
    before = {name: p.detach().clone() for module in (net, metric) for name, p in module.named_parameters()}
    for pairing in metric.pairings * 2:
        value = metrix.step(net, metric, images, y, config, 0.4, pairing)
        optimizer.zero_grad()
        value.backward()
        assert value.isfinite()
        assert all(p.grad is None or p.grad.isfinite().all() for group in optimizer.param_groups for p in group["params"])
        optimizer.step()
    if labels == BATCHES["balanced"]:
        for name, p in [*net.named_parameters(), *metric.named_parameters()]:
            assert not torch.equal(p, before[name]), name


@pytest.mark.parametrize("loss, mode", CELLS)
def test_the_trunk_runs_once_on_the_batch(loss, mode):
    """And in input mode once more on the mixed images of the hardest bank, never on anchors again."""
    config, net, metric = make(loss, mode, bn="stats")
    passed = []
    features = net.features
    net.features = lambda images: passed.append(len(images)) or features(images)
    y, images = torch.tensor(BATCHES["unbalanced, with singletons"]), torch.randn(8, 3, 40, 40)
    for pairing in metric.pairings:
        passed.clear()
        metrix.step(net, metric, images, y, config, 0.4, pairing)
        with torch.no_grad():
            bank = len(losses.hardest_bank(net.head(features(images)), y, pairing)[0])
        assert passed == ([8, bank] if mode == "input" else [8])


def test_the_mixed_loss_is_weighted_and_added():
    for mode in ("input", "feature", "embed"):
        config, net, metric = make("multisimilarity", mode, bn="stats")
        y, images = torch.tensor(BATCHES["balanced"]), torch.randn(8, 3, 40, 40)
        values = []
        for config.mix_weight in (0.0, 0.4, 0.8):
            values.append(metrix.step(net, metric, images, y, config, 0.4, "anchor-negative").item())
        config.mode = "baseline"
        assert values[0] == metrix.step(net, metric, images, y, config, 0.4, "anchor-negative").item()
        assert values[1] > values[0] and values[2] - values[1] == pytest.approx(values[1] - values[0], rel=1e-3)


@pytest.mark.parametrize("loss", metrix.LOSSES)
@pytest.mark.parametrize("mode", ["input", "feature", "embed"])
def test_the_step_equals_its_formula_in_value_and_gradient(loss, mode):
    """Written out: every mixed image, map or embedding of the bank is built, and nothing is fused."""
    config, net, metric = make(loss, mode, bn="stats")
    net, metric = net.double(), metric.double()
    y, images = torch.tensor(BATCHES["balanced"]), torch.randn(8, 3, 40, 40, dtype=torch.float64)
    parameters = [*net.parameters(), *metric.parameters()]
    for pairing in metric.pairings:
        value = metrix.step(net, metric, images, y, config, 0.3, pairing)
        features = net.features(images)
        z = net.head(features)
        i, j = losses.hardest_bank(z, y, pairing) if mode == "input" else losses.full_bank(y, pairing)
        x = {"input": images, "feature": features, "embed": z}[mode]
        x = 0.3 * x[i] + 0.7 * x[j]
        v = {"input": net, "feature": net.head, "embed": torch.nn.Identity()}[mode](x)
        expected = metric(z, y) + 0.4 * metric.mixed(z, y, v, i, 0.3, pairing)
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-9)
        gradients = [torch.autograd.grad(out, parameters) for out in (value, expected)]
        for one, other in zip(*gradients):
            torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)


def test_mixing_with_lam_one_shows_the_first_of_each_pair():
    """Then the mixed example is the first itself, in whichever mode, and the modes agree."""
    y, images = torch.tensor(BATCHES["balanced"]), torch.randn(8, 3, 40, 40)
    values = []
    for mode in ("feature", "embed"):
        config, net, metric = make("contrastive", mode, bn="stats")
        values.append(metrix.step(net.double(), metric, images.double(), y, config, 1.0, "positive-negative"))
    torch.testing.assert_close(values[0], values[1])


@pytest.mark.parametrize("loss, mode", CELLS)
def test_triton_and_torch_give_the_same_training_curve(loss, mode, triton_device, monkeypatch):
    y = torch.tensor([0, 0, 1, 1, 2, 2], device=triton_device)
    curves = []
    for choice in ("torch", "triton"):
        monkeypatch.setattr(kernels, "choice", choice)
        config, net, metric = make(loss, mode, bn="stats")
        net, metric = net.to(triton_device), metric.to(triton_device)
        optimizer = metrix.make_optimizer(net, metric, config)
        images = torch.randn(6, 3, 40, 40, generator=torch.Generator().manual_seed(1)).to(triton_device)
        curve = []
        for n in range(4):
            value = metrix.step(net, metric, images, y, config, 0.3 + 0.1 * n, metric.pairings[n % len(metric.pairings)])
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            curve.append(value.item())
        curves.append(curve)
    assert curves[0][0] != curves[0][-1] and curves[1] == pytest.approx(curves[0], rel=1e-4)


def test_an_epoch_draws_lam_and_pairing_and_keeps_the_schedule(monkeypatch):
    config, net, metric = make("proxyanchor", "feature")
    metric.pairings = losses.PAIRINGS
    config.lr_step, config.lr_gamma, config.lr, config.clip, config.weight_decay = 2, 0.1, 1e-3, 1e-4, 0.0
    optimizer = metrix.make_optimizer(net, metric, config)
    assert [group["base_lr"] for group in optimizer.param_groups] == [1e-3, 0.1]
    drawn, gradients = [], []

    def step(model, metric, images, y, config, lam, pairing):
        drawn.append((lam, pairing))
        return sum(p.sum() for p in [*model.parameters(), *metric.parameters()])  # every gradient is 1

    optimizer.step = lambda: gradients.append(max(p.grad.abs().max().item() for p in net.parameters()))
    monkeypatch.setattr(metrix, "step", step)
    batches = [(torch.zeros(8, 3, 32, 32), torch.zeros(8, dtype=torch.long))] * 40
    for epoch in range(3):
        metrix.train_epoch(epoch, net, metric, optimizer, batches, config)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([1e-3 * 0.1 ** (epoch // 2), 0.1 * 0.1 ** (epoch // 2)])
    assert max(gradients) == pytest.approx(1e-4)
    lams = torch.tensor([lam for lam, _ in drawn])
    assert len(lams.unique()) == 120 and abs(lams.mean() - 0.5) < 0.07  # Beta(2, 2): mean 1/2, variance 1/20
    assert 0.03 < lams.var() < 0.07
    assert 35 < sum(pairing == "positive-negative" for _, pairing in drawn) < 85


def test_the_best_epoch_is_the_first_of_the_highest():
    log = [dict(epoch=n, recall={"1": share}) for n, share in enumerate((0.2, 0.5, 0.4, 0.5), 1)]
    assert metrix.best_of(log)["epoch"] == 2


# ----------------------------------------------------------------------------------------------- run


@pytest.fixture
def tree(tmp_path, write_tree):
    return str(write_tree(tmp_path / "images", {f"class{c}": 5 for c in range(10)}))


def command(tree, out, cell="contrastive feature", more="--epochs 2"):
    return f"folder {cell} --data-root {tree} --out {out} {SMALL} {more}".split()


@pytest.mark.parametrize("loss, mode", CELLS)
def test_every_cell_runs_from_the_command_line(loss, mode, tree, tmp_path, capsys):
    out = tmp_path / "run"
    metrix.main(command(tree, out, f"{loss} {mode}", "--epochs 1"))
    assert sorted(os.listdir(out)) == sorted(metrix.WRITTEN)
    config = json.loads((out / "config.json").read_text())
    assert (config["loss"], config["mode"], config["train_images"]) == (loss, mode, 25)
    (line,) = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    everything = ["queries", "lone_queries", "map_at_r", "r_precision", "alignment", "uniformity", "utilization"]
    of_epoch = ["epoch", "loss", "lr", "recall", "seconds", "images_per_second", "data_wait", "peak_memory_mib"]
    assert list(line) == [*of_epoch, *everything] and 0 <= line["data_wait"] < 1 and 50 < line["peak_memory_mib"] < 10**5
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["last"] == line and 0 <= line["recall"]["1"] <= line["recall"]["8"] <= 1
    for name in ("last.pt", "best.pt"):
        state = torch.load(out / name, weights_only=True)
        models.ResNet(**models.NETS["tiny"], embedding_size=16).load_state_dict(state["model"])
        assert ("proxies" in state["metric"]) == (loss == "proxyanchor")


def test_a_run_trains_and_is_evaluated_from_a_cache_that_is_made_once(tree, tmp_path, capsys):
    told = []
    for arguments in (command(tree, tmp_path / "run", more="--epochs 1 --data-path cache"), ["eval", str(tmp_path / "run")]):
        metrix.main(arguments)
        told.append(capsys.readouterr().out)
    assert "decoded 50 images" in told[0] and "decoded" not in told[1]
    assert os.listdir(os.path.join(tree, ".metrix-cache")) == ["folder-320"]
    trained, evaluated = (json.loads(out.splitlines()[-1]) for out in told)
    assert trained["last"]["recall"] == evaluated["recall"]


def test_a_run_is_evaluated_again_from_its_checkpoints(tree, tmp_path, capsys):
    out = tmp_path / "run"
    metrix.main(command(tree, out))
    first, last = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    assert "map_at_r" not in first
    (out / "retrieval.png").unlink()
    metrix.main(["eval", str(out), "--embeddings"])
    written = json.loads((out / "eval.json").read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == written
    assert {name: written[name] for name in last if name in written} == {name: last[name] for name in last if name in written}
    assert (written["checkpoint"], written["split"], written["epoch"]) == ("last", "test", 2) and "utilization" in written
    assert (out / "retrieval.png").exists()
    eval.main(["--embeddings", str(out / "embeddings.npz")])
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert again == {name: written[name] for name in again}

    metrix.main(["eval", str(out), "--checkpoint", "best", "--split", "train"])
    written = json.loads((out / "eval.json").read_text())
    best = max((first, last), key=lambda line: line["recall"]["1"])
    assert (written["checkpoint"], written["split"], written["epoch"]) == ("best", "train", best["epoch"])
    assert "utilization" not in written  # of the training images in themselves


def test_settings_are_chosen_without_the_test_classes(tree, tmp_path, monkeypatch, capsys):
    splits, halves = data.load("folder", tree), data.load("folder", tree, validation=True)
    assert (halves.train.classes, halves.test.classes) == (["class0", "class1"], ["class2", "class3", "class4"])
    assert sorted(halves.train.paths + halves.test.paths) == sorted(splits.train.paths)
    monkeypatch.chdir(tmp_path)
    metrix.main([word for word in command(tree, "", more="--epochs 1 --validation --batch-size 4") if word != "--out" and word])
    out = "runs/folder-contrastive-feature-validation-seed0"
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["last"]["queries"] == 15
    metrix.main(["eval", out])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["queries"] == 15


def test_seeds_are_told_together(tmp_path, monkeypatch, capsys):
    asked = []

    def run(config):  # feature mode gains 1, 2 and 6 over baseline, whatever the loss
        asked.append((config.seed, config.loss, config.mode))
        share = 0.5 + 0.1 * config.seed + (config.mode == "feature") * (0.01, 0.02, 0.06)[config.seed]
        of_embeddings = dict(map_at_r=share / 2, r_precision=0.2, alignment=0.1 * config.seed, uniformity=-1.0, utilization=0.3)
        return [dict(epoch=1, seconds=1.0, recall={k: share for k in "1248"}, **of_embeddings)]

    monkeypatch.setattr(metrix, "run", run)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    metrix.main("all toy --seeds 3".split())
    assert asked == [(seed, *cell) for seed in range(3) for cell in CELLS]
    told = capsys.readouterr().out
    cell = json.loads(told.splitlines()[-1])["cells"]["proxyanchor"]["feature"]
    assert cell["recall_at_1"]["values"] == pytest.approx([51, 62, 76])
    assert cell["recall_at_1"]["mean"] == pytest.approx([63, math.sqrt((12**2 + 1 + 13**2) / 2 / 3)])
    assert cell["recall_at_1"]["gain"] == pytest.approx([3, math.sqrt((4 + 1 + 9) / 2 / 3)])
    assert cell["map_at_r"]["gain"] == pytest.approx([1.5, math.sqrt((4 + 1 + 9) / 2 / 3) / 2])
    assert cell["alignment"]["mean"] == pytest.approx([0.1, 0.1 / math.sqrt(3)])
    assert "run 36 of 36, about 0:00:01 left" in told and "63.00 +- 7.23" in told and "+3.00 +- 1.53" in told
    try:
        import matplotlib  # noqa: F401

        assert (tmp_path / "runs" / "toy-cells.png").stat().st_size > 1000
    except ImportError:
        assert "no runs/toy-cells.png: drawing it takes matplotlib" in told

    metrix.main("all cub --seed 1 --weights none --net tiny".split())
    told = capsys.readouterr().out
    assert len(asked) == 3 * 12 + 12 and "published*" in told and "64.7" in told
    assert json.loads(told.splitlines()[-1])["cells"]["contrastive"]["input"]["recall_at_1"]["gain"] == [0.0, None]


def test_what_is_no_run_is_not_evaluated(tree, tmp_path, capsys):
    out = tmp_path / "run"
    metrix.main(command(tree, out, more="--epochs 1"))
    capsys.readouterr()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    (out / "best.pt").write_bytes(b"no checkpoint")
    for arguments, message in [
        ([str(tmp_path / "nothing")], "nothing/config.json: missing"),
        ([str(tmp_path / "other")], "no dataset in it"),
        ([str(out), "--split", "query"], "--split"),
        ([str(out), "--checkpoint", "best"], "best.pt: not a readable checkpoint"),
        ([str(out), "--data-root", str(tmp_path / "nowhere")], "nowhere"),
        ([], "run_dir"),
    ]:
        with pytest.raises(SystemExit) as ended:
            metrix.main(["eval", *arguments])
        told = capsys.readouterr().err
        assert ended.value.code == 2 and told.startswith("metrix: ") and told.count("\n") == 1 and message in told, told


@pytest.mark.parametrize("loss, mode", CELLS)
def test_a_stopped_run_goes_on_to_the_same_end(loss, mode, tree, tmp_path, monkeypatch, capsys):
    cell, more = f"{loss} {mode}", "--epochs 3 --warmup-epochs 1"
    metrix.main(command(tree, tmp_path / "whole", cell, more))

    def stop_in_the_third_epoch(epoch, *rest, train_epoch=metrix.train_epoch):
        if epoch == 2:
            raise KeyboardInterrupt
        return train_epoch(epoch, *rest)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(metrix, "train_epoch", stop_in_the_third_epoch)
        metrix.main(command(tree, tmp_path / "parts", cell, more))
    assert stopped.value.code == 130
    metrix.main(command(tree, tmp_path / "parts", cell, more + " --resume"))
    whole, parts = (torch.load(tmp_path / run / "last.pt", weights_only=True) for run in ("whole", "parts"))
    for key in ("model", "metric"):
        for name, value in whole[key].items():
            assert torch.equal(value, parts[key][name]), name
    assert [line["recall"] for line in whole["log"]] == [line["recall"] for line in parts["log"]]
    assert len((tmp_path / "parts" / "log.jsonl").read_text().splitlines()) == 3

    capsys.readouterr()
    metrix.main(command(tree, tmp_path / "parts", cell, more))  # finished: the table again, nothing trained
    assert "R@1" in capsys.readouterr().out


@pytest.mark.parametrize("mode", metrix.MODES)
def test_half_precision_is_that_of_the_trunk_only(mode, tree, tmp_path):
    losses_of = {}
    for precision in ("fp32", "bf16"):
        torch.manual_seed(0)
        config, net, metric = make("contrastive", mode)
        config.precision, types = precision, {}
        net.layer4[-1].register_forward_hook(lambda _, __, features: types.update(features=features.dtype))
        with metrix.in_precision(config):
            value = metrix.step(net, metric, torch.randn(8, 3, 40, 40), torch.tensor(BATCHES["balanced"]), config, 0.4, "positive-negative")
            assert net(torch.randn(1, 3, 40, 40)).dtype == value.dtype == torch.float32
        value.backward()
        assert types["features"] == (torch.bfloat16 if precision == "bf16" else torch.float32)
        losses_of[precision] = value.item()
    assert losses_of["bf16"] != losses_of["fp32"] and losses_of["bf16"] == pytest.approx(losses_of["fp32"], rel=0.03)
    metrix.main(command(tree, tmp_path / "run", f"contrastive {mode}", "--epochs 1 --precision bf16"))


def test_warm_up_leaves_the_trunk_as_it_was(tree, tmp_path):
    metrix.main(command(tree, tmp_path / "run", more="--epochs 1 --warmup-epochs 1"))
    torch.manual_seed(0)
    fresh = models.ResNet(**models.NETS["tiny"], embedding_size=16, bn="train")
    trained = torch.load(tmp_path / "run" / "last.pt", weights_only=True)["model"]
    for name, parameter in fresh.named_parameters():
        assert torch.equal(parameter, trained[name]) != name.startswith("embedding."), name


def test_a_run_continues_from_the_weights_of_another(tree, tmp_path):
    metrix.main(command(tree, tmp_path / "first", more="--epochs 1"))
    metrix.main(command(tree, tmp_path / "second", more=f"--epochs 1 --lr 0 --bn stats --weights {tmp_path}/first/best.pt"))
    first, second = (json.loads((tmp_path / run / "log.jsonl").read_text()) for run in ("first", "second"))
    assert first["recall"] == second["recall"]  # a learning rate of 0 changes nothing


# ----------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("toi", "invalid choice: 'toi' (choose from"),
        ("toy triplet", "invalid choice: 'triplet'"),
        ("toy contrastive mixup", "invalid choice: 'mixup'"),
        ("toy --epochs many", "--epochs: invalid int value: 'many'"),
        ("toy --epochs 0", "--epochs is 0; it must be at least 1 and"),
        ("toy --lr nan", "--lr is nan"),
        ("toy --epochs " + "9" * 400, "--epochs is 99999999999999999999; it must"),
        ("toy --image-size 544", "--image-size is 544; it must be at least 32 and at most 512"),
        ("toy --min-crop 2", "--min-crop is 2.0; it must be at least 0.01 and at most 1"),
        ("toy --bn on", "--bn: invalid choice: 'on'"),
        ("toy --epoch 3", "unrecognized arguments: --epoch 3"),
        ("toy --batch-size 1", "--batch-size is 1; it must be at least 2 and"),
        ("toy --batch-size 5", "--batch-size 5 is less than two classes of 5; it must be at least 10"),
        ("toy --images-per-class 7", "--images-per-class 7 does not divide --batch-size 100; 98 would do"),
        ("folder --net tiny", "--net tiny has no ImageNet weights; add --weights none"),
        ("toy --device abacus", "--device abacus cannot be used"),
        ("folder --data-path cache --cache-size 200", "--cache-size 200 is less than 256, to which images are resized"),
        ("folder --data-path memory", "--data-path: invalid choice: 'memory'"),
        ("all", "the following arguments are required: cub|cars|sop"),
        ("all toy --out here", "--out is for one run"),
        ("all toy --seeds 0", "--seeds 0: give how many seeds"),
        ("all toy --seeds 2 --seed 1", "--seeds 2: give how many seeds"),
        ("folder --validation --data-root {few} --weights none", "{few}: 1 class(es) in the train split, at least 2"),
        ("all birds", "invalid choice: 'birds'"),
        ("folder --data-root /nowhere --weights none", "/nowhere: no such directory"),
        ("folder --data-root {empty} --weights none", "{empty}: no images in it"),
        ("folder --data-root {one} --weights none", "{one}: 1 class(es), at least 4 are needed"),
        ("folder --data-root {tree} --weights none --batch-size 50", "--batch-size 50 is more than the 25 training images"),
        ("folder --data-root {tree} --weights {tree}/none.pt --batch-size 10", "none.pt: no such file of weights"),
        ("folder --data-root {tree} --out {tree}/class0/0.png " + SMALL, "0.png"),
        ("folder --data-root {tree} --out {empty} --resume " + SMALL, "--resume: {empty} holds no run"),
        ("folder --data-root {broken} --out {empty}/run " + SMALL, "{broken}/d/1.png: cannot be read as an image"),
        ("folder --data-root {broken} --out {empty}/run --data-path cache " + SMALL, "{broken}/d/1.png: cannot be read as an image"),
    ],
)
def test_bad_input_is_told_in_one_line(arguments, message, tree, tmp_path, write_tree, capsys):
    places = {name: str(tmp_path / name) for name in ("empty", "one", "few", "broken")} | {"tree": tree}
    write_tree(tmp_path / "few", {name: 3 for name in "abcdef"})
    (tmp_path / "empty").mkdir()
    write_tree(tmp_path / "one", {"a": 3})
    write_tree(tmp_path / "broken", {"a": 4, "b": 4, "c": 4, "d": 2, "e": 4, "f": 4, "g": 4, "h": 4})
    (tmp_path / "broken" / "d" / "1.png").write_bytes(b"not a picture")
    with pytest.raises(SystemExit) as end:
        metrix.main(arguments.format(**places).split())
    told = capsys.readouterr().err
    assert end.value.code == 2
    assert told.startswith("metrix: ") and told.count("\n") == 1 and message.format(**places) in told


def test_a_diverging_run_is_told_in_one_line_and_keeps_its_last_epoch(tree, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        metrix.main(command(tree, tmp_path / "run", more="--epochs 2 --lr 1e9"))
    told = capsys.readouterr().err
    assert end.value.code == 2 and told.count("\n") == 1 and "epoch 1, step 2: the loss or a gradient is not finite" in told


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda out: (out / "config.json").unlink(), "config.json: missing"),
        (lambda out: (out / "config.json").write_text("{"), "config.json: not JSON"),
        (lambda out: (out / "config.json").write_text("[]"), "config.json: not the settings of a run"),
        (lambda out: (out / "last.pt").write_bytes(b"PK"), "last.pt: not a readable checkpoint"),
        (lambda out: torch.save({"model": {}}, out / "last.pt"), "last.pt: not the checkpoint of such a run"),
    ],
)
def test_a_spoilt_run_is_not_gone_on_with(spoil, message, tree, tmp_path, capsys):
    metrix.main(command(tree, tmp_path / "run", more="--epochs 1"))
    spoil(tmp_path / "run")
    with pytest.raises(SystemExit) as end:
        metrix.main(command(tree, tmp_path / "run", more="--epochs 1"))
    told = capsys.readouterr().err
    assert end.value.code == 2 and told.count("\n") == 1 and message in told


def test_another_configuration_does_not_overwrite_a_run(tree, tmp_path, capsys):
    metrix.main(command(tree, tmp_path / "run", more="--epochs 1"))
    before = {name: (tmp_path / "run" / name).read_bytes() for name in metrix.WRITTEN}
    with pytest.raises(SystemExit) as end:
        metrix.main(command(tree, tmp_path / "run", more="--epochs 1 --lr 0.5"))
    assert end.value.code == 2 and "lr 0.003 there, 0.5 now" in capsys.readouterr().err
    assert before == {name: (tmp_path / "run" / name).read_bytes() for name in metrix.WRITTEN}


# -------------------------------------------------------------------------------------------- run.sh


def run_sh(*arguments, cwd=None):
    return subprocess.run([str(ROOT / "run.sh"), *arguments], capture_output=True, text=True, cwd=cwd)


def test_run_sh_knows_the_words_of_metrix():
    for arguments in (["tests"], ["toy", "triplet"], ["toy", "contrastive", "mixup"], ["toy", "contrastive", "feature", "now"], ["all", "birds"]):
        result = run_sh(*arguments)
        assert result.returncode == 2 and result.stderr.count("\n") == 1 and arguments[-1] in result.stderr
    told, fields = run_sh("what").stderr, metrix.Config.__dataclass_fields__
    for name in ("dataset", "loss", "mode"):
        assert f"{name.upper()}: {' '.join(fields[name].metadata['choices'])}," in told


def test_output_that_nobody_reads_is_no_traceback(tree, tmp_path):
    launch = [sys.executable, ROOT / "metrix.py", *command(tree, tmp_path / "run", more="--epochs 3")]
    launched = subprocess.Popen(launch, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    launched.stdout.readline()
    launched.stdout.close()  # as `| head -1` does
    told = launched.stderr.read()
    assert launched.wait() == 1 and "Traceback" not in told, told


@pytest.mark.slow
def test_the_toy_baseline_is_neither_hopeless_nor_saturated(tmp_path):
    result = run_sh("toy", "contrastive", "baseline", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    summary = json.loads(result.stdout.splitlines()[-1])
    assert 0.40 < summary["last"]["recall"]["1"] < 0.85
    assert sorted(os.listdir(tmp_path / summary["out"])) == sorted(metrix.WRITTEN)


def test_without_triton_everything_but_its_forms_is_there():
    code = "import sys; sys.modules['triton'] = None; import metrix, kernels, kernels.crop, kernels.top_k; assert kernels.triton is None"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

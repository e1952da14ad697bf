"""The step in its twelve combinations of loss and mode, the recipes, a run and its files, and bad input."""

import argparse
import dataclasses
import itertools
import json
import os
import zipfile

import pytest
import torch
from test_data import write_cub

import data
import kernels
import losses
import metrix
from model import NETS, ResNet

COMBINATIONS = list(itertools.product(metrix.LOSSES, metrix.MODES))
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
    return config, ResNet(**NETS["tiny"], embedding_size=16, bn=bn), metrix.LOSSES[loss](8, 16)


# ------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize("loss, mode", COMBINATIONS)
@pytest.mark.parametrize("labels", BATCHES.values(), ids=BATCHES.keys())
def test_every_combination_trains_on_every_kind_of_batch(loss, mode, labels):
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


@pytest.mark.parametrize("loss, mode", COMBINATIONS)
def test_the_trunk_runs_once_and_in_input_mode_once_more_on_the_mixed_images(loss, mode):
    config, net, metric = make(loss, mode, bn="stats")
    passes, y = [], torch.tensor(BATCHES["unbalanced, with singletons"])
    net.conv1.register_forward_pre_hook(lambda module, inputs: passes.append(len(inputs[0])))
    net.bn1.train()  # so that conv1 runs as a module
    for pairing in metric.pairings:
        with torch.no_grad():
            bank = len(losses.hardest_bank(net(IMAGES), y, pairing)[0])
        passes.clear()
        metrix.step(net, metric, IMAGES, y, config, 0.4, pairing)
        assert passes == ([8, bank] if mode == "input" else [8])


@pytest.mark.parametrize("loss", metrix.LOSSES)
@pytest.mark.parametrize("mode, hardest", [("input", 1), ("input", 2), ("feature", 1), ("embed", 1)])
def test_the_step_equals_its_formula_in_value_and_gradient(loss, mode, hardest):
    """Written out: every mixed image, map or embedding of the bank is built."""
    config, net, metric = make(loss, mode, bn="stats")
    config.hardest, config.mix_weight = hardest, 0.7
    net, metric, images = net.double(), metric.double(), IMAGES.double()
    y = torch.tensor(BATCHES["balanced"])
    parameters = [*net.parameters(), *metric.parameters()]
    for pairing in metric.pairings:
        value = metrix.step(net, metric, images, y, config, 0.3, pairing)
        features = net.features(images)
        z = net.head(features)
        i, j = losses.hardest_bank(z, y, pairing, hardest) if mode == "input" else losses.full_bank(y, pairing)
        x = {"input": images, "feature": features, "embed": z}[mode]
        v = {"input": net, "feature": net.head, "embed": torch.nn.Identity()}[mode](0.3 * x[i] + 0.7 * x[j])
        expected = metric(z, y) + 0.7 * metric.mixed(z, y, v, i, 0.3, pairing)
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-9)
        for one, other in zip(*(torch.autograd.grad(out, parameters) for out in (value, expected))):
            torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("loss, mode", COMBINATIONS)
def test_triton_and_torch_agree_in_a_step(loss, mode, triton_device, monkeypatch):
    config, net, metric = make(loss, mode, bn="stats")
    net, metric, images = net.to(triton_device), metric.to(triton_device), IMAGES[:6, :, :32, :32].to(triton_device)
    y, launched, launch = torch.tensor([0, 0, 1, 1, 2, 2], device=triton_device), [], kernels.pairwise.launch
    parameters = [*net.parameters(), *metric.parameters()]

    def counted(kernel, *arguments, **options):
        launched.append(kernel)
        launch(kernel, *arguments, **options)

    monkeypatch.setattr(kernels.pairwise, "launch", counted)
    for pairing in metric.pairings:
        results = []
        for backend in ("torch", "triton"):
            monkeypatch.setattr(kernels, "backend", backend)
            launched.clear()
            value = metrix.step(net, metric, images, y, config, 0.3, pairing)
            results.append((value.item(), torch.cat([g.flatten() for g in torch.autograd.grad(value, parameters)])))
            assert bool(launched) == (backend == "triton")
        (value, gradient), (fused_value, fused_gradient) = results
        assert fused_value == pytest.approx(value, rel=1e-4)  # the kernel rounds each factor to two bfloat16 parts
        assert (fused_gradient - gradient).norm() < 1e-3 * gradient.norm()


@pytest.mark.parametrize("mode", metrix.MODES)
def test_mixed_images_do_not_enter_the_running_statistics(mode):
    statistics = []
    for each in ("baseline", mode):
        config, net, metric = make("multisimilarity", each, bn="train")
        metrix.step(net.train(), metric, IMAGES, torch.tensor(BATCHES["balanced"]), config, 0.4, "positive-negative")
        statistics.append({name: x for name, x in net.named_buffers()})
    assert all(torch.equal(x, statistics[1][name]) for name, x in statistics[0].items())
    assert not torch.equal(statistics[0]["bn1.running_mean"], torch.zeros(16))


def test_an_epoch_draws_lam_and_pairing_and_keeps_the_schedule(monkeypatch):
    config, net, metric = make("proxyanchor", "feature")
    metric.pairings = losses.PAIRINGS
    config.lr_step, config.lr_gamma, config.lr, config.clip, config.weight_decay = 2, 0.1, 1e-3, 1e-4, 0.0
    config.warmup_epochs = 1
    optimizer = metrix.make_optimizer(net, metric, config)
    assert [group["base_lr"] for group in optimizer.param_groups] == pytest.approx([1e-3, 3e-2])
    drawn, gradients = [], []

    def step(model, metric, images, y, config, lam, pairing):
        drawn.append((lam, pairing))
        zero = sum(p.sum() - p.detach().sum() for p in [*model.parameters(), *metric.parameters()])
        return zero + len(drawn)  # every gradient is 1

    def record():
        gradients.append([p.grad is not None and p.grad.abs().max().item() for p in (net.conv1.weight, metric.proxies)])

    monkeypatch.setattr(optimizer, "step", record)
    monkeypatch.setattr(metrix, "step", step)
    batches = [(torch.zeros(8, 3, 32, 32), torch.zeros(8, dtype=torch.long))] * 40
    for epoch in range(3):
        mean = metrix.train_epoch(epoch, net, metric, optimizer, batches, config)
        assert mean == pytest.approx(40 * epoch + 20.5)
        lr = 1e-3 * 0.1 ** (epoch // 2)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([lr, 30 * lr])
    assert gradients[0] == [False, pytest.approx(1e-4)] and gradients[-1] == pytest.approx([1e-4, 1e-4])
    assert [gradient[0] for gradient in gradients].count(False) == 40  # warm-up: the trunk has no gradient
    lams = torch.tensor([lam for lam, _ in drawn])
    assert len(lams.unique()) == 120 and abs(lams.mean() - 0.5) < 0.07  # Beta(2, 2): mean 1/2, variance 1/20
    assert 0.03 < lams.var() < 0.07
    assert 35 < sum(pairing == "positive-negative" for _, pairing in drawn) < 85


# ---------------------------------------------------------------------------------- settings, recipes

# The commands in the authors' README since May 2023. Mixed is input, feature and embed.
AUTHORS = """
contrastive cub,cars baseline --num_epochs 60 --lr 1e-4 --lr_decay_gamma 0.1
contrastive cub,cars mixed --num_epochs 60 --lr 1e-4 --lr_decay_gamma 0.1
contrastive sop baseline --num_epochs 60 --lr 3e-5 --lr_decay_gamma 0.25 --bn_freeze 0
contrastive sop mixed --num_epochs 60 --lr 3e-5 --lr_decay_gamma 0.25
contrastive inshop baseline --num_epochs 60 --lr 3e-5 --lr_decay_step 5 --lr_decay_gamma 0.25 --warm 1 --bn_freeze 0
contrastive inshop mixed --num_epochs 60 --lr 1e-4 --lr_decay_gamma 0.25
ms,pa cub,cars baseline --num_epochs 60 --lr 1e-4 --lr_decay_step 5 --lr_decay_gamma 0.5
ms,pa cub mixed --num_epochs 100 --lr 1e-4 --lr_decay_gamma 0.5
ms,pa cars mixed --num_epochs 60 --lr 1e-4 --lr_decay_step 5 --lr_decay_gamma 0.5
ms,pa sop,inshop baseline --num_epochs 60 --lr 6e-4 --lr_decay_step 20 --lr_decay_gamma 0.25 --warm 1 --bn_freeze 0
ms,pa sop,inshop mixed --num_epochs 60 --lr 6e-4 --lr_decay_step 20 --lr_decay_gamma 0.25 --warm 1 --bn_freeze 0
"""
NAMES = dict(contrastive="contrastive", ms="multisimilarity", pa="proxyanchor")


def test_the_48_recipes_are_those_of_the_authors_commands(capsys):
    parser = argparse.ArgumentParser()  # with the defaults of the authors' parser
    for name, default in dict(lr_decay_step=10, warm=5, bn_freeze=1, num_epochs=0, lr=0.0, lr_decay_gamma=0.0).items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    always = dict(batch_size=100, embedding_size=512, image_size=224, weight_decay=1e-4, clip=10, net="resnet50")
    always |= dict(mix_alpha=2, mix_weight=0.4, hardest=1, proxy_lr=100, weights="imagenet", seed=0)
    seen = set()
    for line in AUTHORS.strip().splitlines():
        names, datasets, modes, *flags = line.split()
        theirs = parser.parse_args(flags)
        modes = ["baseline"] if modes == "baseline" else ["input", "feature", "embed"]
        for dataset, name, mode in itertools.product(datasets.split(","), names.split(","), modes):
            ours = metrix.parse([dataset, NAMES[name], mode])
            assert (ours.epochs, ours.lr, ours.lr_step) == (theirs.num_epochs, theirs.lr, theirs.lr_decay_step)
            assert (ours.lr_gamma, ours.warmup_epochs) == (theirs.lr_decay_gamma, theirs.warm), line
            assert ours.bn == ("stats" if theirs.bn_freeze else "train"), line
            assert ours.images_per_class == (5 if dataset in ("sop", "inshop") else 0)
            assert always.items() <= vars(ours).items()
            metrix.describe(ours)
            shown = capsys.readouterr().out
            for setting in ("epochs", "lr", "lr_step", "lr_gamma", "warmup_epochs", "bn", "images_per_class"):
                assert f" {setting} {getattr(ours, setting)}," in shown
            assert "recipe:" not in shown
            seen.add((dataset, name, mode))
    assert len(seen) == 48


def test_all_modes_train_a_folder_like_cars_but_in_balanced_batches():
    for loss, mode in COMBINATIONS:
        folder, cars = metrix.parse(["folder", loss, mode]), metrix.parse(["cars", loss, "baseline"])
        same = dict(dataset="folder", mode=mode, out=folder.out, images_per_class=5)
        assert vars(folder) == vars(cars) | same


def test_flags_override_the_recipe_and_are_shown(capsys):
    config = metrix.parse("cub multisimilarity embed --epochs 60 --lr 0.5".split())
    assert (config.epochs, config.lr, config.lr_step) == (60, 0.5, 10)
    metrix.describe(config)
    shown = capsys.readouterr().out
    assert "epochs 60 (recipe: 100)," in shown and "lr 0.5 (recipe: 0.0001)," in shown and shown.count("recipe:") == 2
    scratch = metrix.parse("--weights none folder multisimilarity --images-per-class 0 --net tiny baseline".split())
    assert (scratch.bn, scratch.lr, scratch.images_per_class) == ("train", 1e-2, 0)
    toy = metrix.parse([])
    assert toy == metrix.parse(["toy", "contrastive", "feature"])
    assert (toy.epochs, toy.lr_step, toy.warmup_epochs, toy.image_size, toy.embedding_size) == (40, 16, 0, 64, 64)


@pytest.mark.parametrize("words", ["--help", "cub --help", "eval --help"])
def test_help_says_what_each_flag_means(words, capsys):
    with pytest.raises(SystemExit) as end:
        metrix.main(words.split())
    shown = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0
    for field in dataclasses.fields(metrix.Config):
        assert field.metadata["options"]["help"] in shown and len(field.metadata["options"]["help"]) > 5
    default = metrix.Config("cub", "contrastive", "baseline")
    default.out = metrix.parse(["cub", "contrastive", "baseline"]).out
    assert default == metrix.parse(["cub", "contrastive", "baseline"])  # as help says


# ----------------------------------------------------------------------------------------------- run


@pytest.fixture
def tree(tmp_path, write_tree):
    return str(write_tree(tmp_path / "images", {f"class{c}": 5 for c in range(10)}))


def command(tree, out, words="contrastive feature", more="--epochs 2"):
    return f"folder {words} --data-root {tree} --out {out} {SMALL} {SMALL_BATCH} {more}".split()


def stops(arguments, capsys, code=2):
    """The one line that a command prints when it stops."""
    with pytest.raises(SystemExit) as end:
        metrix.main(arguments)
    error = capsys.readouterr().err
    assert end.value.code == code and error.startswith("metrix: ") and error.count("\n") == 1, error
    return error


@pytest.mark.parametrize("loss, mode", COMBINATIONS)
def test_every_combination_runs_from_the_command_line(loss, mode, tree, tmp_path, capsys):
    out = tmp_path / "run"
    metrix.main(command(tree, out, f"{loss} {mode}", "--epochs 1"))
    assert sorted(os.listdir(out)) == WRITTEN
    config = json.loads((out / "config.json").read_text())
    assert (config["loss"], config["mode"], config["train_images"]) == (loss, mode, 25)
    (line,) = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    assert list(line)[:6] == ["epoch", "loss", "lr", "recall", "seconds", "images_per_second"]
    assert {"map_at_r", "r_precision", "alignment", "uniformity", "utilization"} < set(line)
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["last"] == line and [*line["recall"]] == ["1", "2", "4", "8"]
    for name in ("last.pt", "best.pt"):
        state = torch.load(out / name, weights_only=True)
        ResNet(**NETS["tiny"], embedding_size=16).load_state_dict(state["model"])
        assert ("proxies" in state["metric"]) == (loss == "proxyanchor")


def test_a_run_is_evaluated_again_from_its_checkpoints(tree, tmp_path, capsys):
    out = tmp_path / "run"
    metrix.main(command(tree, out))
    first, last = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    assert "map_at_r" not in first
    (out / "retrieval.png").unlink()
    os.rename(out, tmp_path / "moved")
    out = tmp_path / "moved"
    assert "eval takes the settings of the run (lr is 0.003, not 1.0)" in stops(["eval", str(out), "--lr", "1"], capsys)
    metrix.main(["eval", str(out), "--device", "cpu"])
    result = json.loads((out / "eval.json").read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    shared = result.keys() & last.keys()
    assert {name: result[name] for name in shared} == {name: last[name] for name in shared} and "utilization" in shared
    assert (out / "retrieval.png").exists()
    with open(f"{tree}/class0/0.png", "ab") as file:
        file.write(b" ")
    metrix.main(["eval", str(out), "--checkpoint", "best"])
    assert "WARNING: these are not the images of the run" in capsys.readouterr().out
    best = max((first, last), key=lambda line: line["recall"]["1"])
    assert json.loads((out / "eval.json").read_text())["recall"] == best["recall"]


def test_every_epoch_draws_other_batches_and_prints_the_time_left(tree, tmp_path, monkeypatch, capsys):
    drawn, clock = [], itertools.count(0, 60)

    def train_epoch(epoch, model, metric, optimizer, batches, config):
        drawn.append([y.tolist() for _, y in batches])
        return 0.0

    monkeypatch.setattr(metrix, "train_epoch", train_epoch)
    monkeypatch.setattr(metrix.time, "perf_counter", lambda: next(clock))  # read five times while an epoch trains
    metrix.main(command(tree, tmp_path / "run"))
    assert len(drawn) == 2 and drawn[0] != drawn[1]
    line = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[0])
    assert line["images_per_second"] == 24 / 300
    first, second = [shown for shown in capsys.readouterr().out.splitlines() if "loss 0.0000" in shown]
    assert f" R@1 {100 * line['recall']['1']:.1f} " in first
    assert first.endswith(f" {line['seconds'] / 60:.0f} min left") and second.endswith(" 0 min left")


def test_batches_reach_the_device_and_progress_is_printed_every_20_seconds(monkeypatch, capsys):
    clock = iter([0, 10, 240, 260, 480])
    monkeypatch.setattr(metrix.time, "perf_counter", lambda: next(clock))
    loader = [(torch.full((360, 3, 2, 2), 255, dtype=torch.uint8), torch.zeros(360))] * 4
    for images, y in metrix.on_device(loader, metrix.Config(device="cpu"), "epoch 1"):
        assert torch.equal(images, data.normalize(loader[0][0])) and y is loader[0][1]
    shown = "epoch 1  2/4  3 images/s  4 min left\nepoch 1  4/4  3 images/s  0 min left\n"
    assert capsys.readouterr().out == shown


def test_validation_leaves_the_test_classes_unseen(tree, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    batch = "--batch-size 4 --images-per-class 2"
    metrix.main(f"folder --data-root {tree} {SMALL} {batch} --epochs 1 --validation".split())
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["out"] == "runs/folder-contrastive-feature-validation-seed0" and summary["last"]["queries"] == 15


def test_an_incomplete_benchmark_is_named(tree, tmp_path, capsys):
    write_cub(tmp_path)
    for words, warns in ((f"cub --data-root {tmp_path}", True), (f"folder --data-root {tree}", False)):
        for more in ([], ["--validation"]):
            metrix.load_splits(metrix.parse([*words.split(), *more]))
            assert ("WARNING: not the full data set" in capsys.readouterr().out) == (warns and not more)


def test_a_run_with_its_own_gallery_ranks_queries_in_it():
    y = torch.arange(6).repeat_interleave(2)
    query, gallery = torch.eye(6)[y] + 0.1, torch.eye(6)[y.flip(0)] + 0.1
    test, train = [(query, y), (gallery, y.flip(0))], (torch.eye(6), torch.arange(6))
    result, ranking = metrix.measure(test, "inshop", train)
    assert result["recall"][1] == 1 and result["queries"] == 12 and len(ranking.rank) == 12
    assert "map_at_r" in result and "map_at_r" not in metrix.measure(test, "inshop")[0]
    cub, cars, sop, inshop = ([*metrix.measure(test, name)[0]["recall"]] for name in ("cub", "cars", "sop", "inshop"))
    assert cub == cars == [1, 2, 4, 8, 16, 32] and sop == [1, 10, 100, 1000] and inshop == [1, 10, 20, 30, 40, 50]


@pytest.mark.parametrize("loss", ["multisimilarity", "proxyanchor"])
def test_a_stopped_run_resumes_and_ends_with_the_same_bits(loss, tree, tmp_path, monkeypatch, capsys):
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
    assert "resumes after epoch 2" in capsys.readouterr().out

    states = [torch.load(tmp_path / out / "last.pt", weights_only=True) for out in ("whole", "stopped")]
    for part in ("model", "metric"):
        assert all(torch.equal(x, states[1][part][name]) for name, x in states[0][part].items())
    moments = [state["optimizer"]["state"] for state in states]
    assert all(torch.equal(x["exp_avg_sq"], moments[1][n]["exp_avg_sq"]) for n, x in moments[0].items())
    logs = [[(line["epoch"], line["loss"], line["lr"], line["recall"]) for line in state["log"]] for state in states]
    assert logs[0] == logs[1] and sorted(os.listdir(tmp_path / "stopped")) == WRITTEN


def test_checkpoints_hold_tensors_of_the_cpu_and_no_checksum(tree, tmp_path, monkeypatch):
    """A marked copy stands for the copy of a GPU's tensor."""
    monkeypatch.setattr(torch.Tensor, "cpu", lambda x: torch.full_like(x, 7))
    metrix.main(command(tree, tmp_path / "run", "proxyanchor baseline", "--epochs 1"))
    for name in ("best.pt", "last.pt"):
        state = torch.load(tmp_path / "run" / name, weights_only=True)
        moments = state["optimizer"]["state"].values() if name == "last.pt" else []
        for tensors in (state["model"], state["metric"], *moments):
            assert all((x == 7).all() for x in tensors.values())
        assert zipfile.ZipFile(tmp_path / "run" / name).testzip()  # the files hold no checksum


# -------------------------------------------------------------------------- bad input, bad machines


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("toy triplet", "argument loss: invalid choice: 'triplet'"),
        ("toy --epoch 3", "unrecognized arguments: --epoch 3"),
        ("toy --lr-step 0", "--lr-step must be at least 1"),
        ("toy --batch-size 5", "--batch-size 5 must be a multiple of --images-per-class 5, at least twice it"),
        ("toy --images-per-class 7", "--batch-size 100 must be a multiple of --images-per-class 7"),
        ("folder --net tiny", "--net tiny has no ImageNet weights; add --weights none"),
        ("toy --device abacus", "--device abacus is not available"),
        ("folder --data-root {tree} {small} --out {empty} --resume", "--resume: {empty} holds no run"),
        ("folder --data-root {broken} {small} --out {empty}/run --num-workers 2", "{broken}/d/1.png: cannot be read"),
        ("eval {empty}", "{empty}/config.json: missing or damaged"),
        ("eval --checkpoint best", "eval needs a run"),
        ("toy --seed -1", "--seed must be at least 0"),
        ("toy --min-crop 2", "--min-crop above 0 and at most 1"),
        ("folder --data-root {tree} {small} --out {tree}/class0/0.png/run", "--out {tree}/class0/0.png/run: no such"),
    ],
)
def test_bad_input_gets_one_line_and_exit_code_2(arguments, message, tree, tmp_path, write_tree, capsys):
    places = dict(empty=tmp_path / "empty", broken=tmp_path / "broken", tree=tree, small=f"{SMALL} --batch-size 10")
    (tmp_path / "empty").mkdir()
    write_tree(tmp_path / "broken", {name: 4 for name in "abcdefgh"})
    (tmp_path / "broken" / "d" / "1.png").write_bytes(b"not a picture")
    assert message.format(**places) in stops(arguments.format(**places).split(), capsys)


WORKER = "Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  ..\n"
MACHINE_ERRORS = {  # the words of PyTorch: the remedy
    "DataLoader worker (pid 42) is killed by signal: Bus error. It is possible that": "--num-workers 0",
    f"{WORKER}RuntimeError: unable to write to file </torch_7_9_0>: No space left": "--num-workers 0",
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has": "--batch-size",
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you": "--batch-size",
    "[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.2]:31": "another process has stopped",
}


@pytest.mark.parametrize("words, remedy", MACHINE_ERRORS.items())
def test_a_machine_that_is_too_small_gets_one_line_with_the_remedy(words, remedy, tree, tmp_path, capsys, monkeypatch):
    def fail(*_):
        raise error

    monkeypatch.setattr(metrix, "train_epoch", fail)
    error = torch.OutOfMemoryError(words) if words.startswith("CUDA") else RuntimeError(words)
    assert remedy in stops(command(tree, tmp_path / "run"), capsys)
    error = RuntimeError("shapes do not match")  # a fault of the program keeps its traceback
    with pytest.raises(RuntimeError, match="shapes do not match"):
        metrix.main(command(tree, tmp_path / "run"))


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("[enforce fail at inline_")])
def test_a_full_disk_leaves_no_half_written_file(error, tree, tmp_path, capsys, monkeypatch):
    def fail(state, file):
        file.write_bytes(b"half")
        raise error

    monkeypatch.setattr(torch, "save", fail)
    message = stops(command(tree, tmp_path / "run", more="--epochs 1"), capsys)
    assert f"{tmp_path}/run/best.pt: cannot be written" in message and "free the disk" in message
    assert sorted(os.listdir(tmp_path / "run")) == ["config.json", "log.jsonl", "retrieval.png"]


def test_of_several_processes_one_prints_what_all_meet(tree, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(metrix, "LOCAL_RANK", 1)
    with pytest.raises(SystemExit) as end:
        metrix.main(["toy", "--epochs", "0"])
    assert end.value.code == 2 and not capsys.readouterr().err

    def fail(*_):
        raise data.UnreadableImage("this process alone")

    monkeypatch.setattr(metrix, "train_epoch", fail)
    assert "this process alone" in stops(command(tree, tmp_path / "run"), capsys)


def test_a_loss_that_is_not_finite_ends_the_run_and_reaches_no_checkpoint(tree, tmp_path, capsys, monkeypatch):
    step, calls = metrix.step, []

    def last_one_is_nan(*arguments):  # of the three steps of the second epoch
        calls.append(1)
        return step(*arguments) * (torch.nan if len(calls) == 6 else 1)

    monkeypatch.setattr(metrix, "step", last_one_is_nan)
    error = stops(command(tree, tmp_path / "run"), capsys)
    assert "epoch 2, step 3: the loss is nan; this epoch is not saved" in error
    for name in ("best.pt", "last.pt"):
        assert torch.load(tmp_path / "run" / name, weights_only=True)["epoch"] == 1
    assert len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda out: (out / "config.json").write_text("{"), "config.json: missing or damaged"),
        (lambda out: torch.save({"model": {}}, out / "last.pt"), "last.pt: not a checkpoint of this run"),
    ],
)
def test_a_damaged_run_is_not_resumed(damage, message, tree, tmp_path, capsys):
    metrix.main(command(tree, tmp_path / "run", more="--epochs 1"))
    damage(tmp_path / "run")
    assert message in stops(command(tree, tmp_path / "run", more="--epochs 1"), capsys)


def test_other_settings_or_images_do_not_overwrite_a_run(tree, tmp_path, capsys):
    metrix.main(command(tree, tmp_path / "run", more="--epochs 1"))
    before = {name: (tmp_path / "run" / name).read_bytes() for name in WRITTEN}
    error = stops(command(tree, tmp_path / "run", more="--epochs 1 --lr 0.5"), capsys)
    assert "holds another run (lr is 0.003, not 0.5)" in error
    os.rename(f"{tree}/class0/0.png", f"{tree}/class0/9.png")
    assert "holds another run (images_checksum is " in stops(command(tree, tmp_path / "run", more="--epochs 1"), capsys)
    assert before == {name: (tmp_path / "run" / name).read_bytes() for name in WRITTEN}

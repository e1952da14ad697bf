"""The hand-written ResNet against torchvision's, and the ways in and out of its weights."""

import argparse
import copy
import os
import pathlib
import pickle
import urllib.request

import numpy as np
import pytest
import torch
import torchvision

import model as models


def lively(net):
    """The net with batch norm that does something, and weights that float16 can hold."""
    for norm in net.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.weight.data.uniform_(0.5, 1.5)
            norm.bias.data.normal_(0, 0.1)
            norm.running_mean.normal_(0, 0.1)
            norm.running_var.uniform_(0.5, 1.5)
            norm.num_batches_tracked.fill_(7)
    return net.half().float()


def tiny(bn="stats", embedding_size=8):
    return lively(models.ResNet(**models.NETS["tiny"], embedding_size=embedding_size, bn=bn))


def without(layer, state):
    return {name: value for name, value in state.items() if not name.startswith(f"{layer}.")}


def under(prefix, state):
    return {prefix + name: value for name, value in state.items()}


def assert_close(a, b):
    assert a.keys() == b.keys()
    for name in a:
        scale = b[name].abs().max()
        assert scale > 0 and (a[name] - b[name]).abs().max() <= 1e-5 * scale, name


def assert_same(a, b):
    assert a.keys() == b.keys() and all(torch.equal(x, b[name]) for name, x in a.items())


@pytest.mark.parametrize("bn", models.BATCH_NORMS)
def test_resnet50_equals_torchvision(bn):
    """Features in training and in evaluation, gradients, and running statistics, which move under "train" only."""
    torch.manual_seed(0)
    theirs, ours = lively(torchvision.models.resnet50()), models.ResNet(**models.NETS["resnet50"], bn=bn)
    theirs.double(), ours.double().load_state_dict(without("fc", theirs.state_dict()), strict=False)
    theirs.train(bn == "train"), ours.train()
    trunk = torch.nn.Sequential(*list(theirs.children())[:-2])
    images = torch.randn(2, 3, 40, 40, dtype=torch.float64)
    features, expected = dict(training=ours.features(images)), dict(training=trunk(images))
    upstream = torch.randn_like(expected["training"])
    features["training"].backward(upstream), expected["training"].backward(upstream)

    frozen = {name for name, p in theirs.named_parameters() if p.ndim == 1 and bn == "frozen"}
    gradients = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    parameters = without("fc", dict(theirs.named_parameters()))
    assert_close(gradients, {name: p.grad for name, p in parameters.items() if name not in frozen})
    assert_close(dict(ours.named_buffers()), dict(theirs.named_buffers()))
    with torch.no_grad():
        features["evaluation"], expected["evaluation"] = ours.eval().features(images), trunk.eval()(images)
    assert_close(features, expected)


def test_frozen_statistics_are_folded_into_the_convolutions(monkeypatch):
    trained, frozen, images = tiny("train"), tiny("stats"), torch.randn(2, 3, 32, 32)
    monkeypatch.delattr(torch.nn.modules.batchnorm._BatchNorm, "forward")  # now batch norm cannot run
    frozen.features(images), trained.eval().features(images)
    with pytest.raises(NotImplementedError):
        trained.train().features(images)


def test_head_is_average_plus_max_pool_then_unit_embedding():
    net, images = tiny(), torch.randn(4, 3, 64, 96)
    maps, z = net.features(images), net(images)  # (4, 512, 2, 3), (4, 8)
    pooled = torch.nn.functional.adaptive_avg_pool2d(maps, 1) + torch.nn.functional.adaptive_max_pool2d(maps, 1)
    torch.testing.assert_close(z, torch.nn.functional.normalize(net.embedding(pooled.flatten(1)), dim=1))
    torch.testing.assert_close(z.norm(dim=1), torch.ones(4))
    with torch.autocast("cpu", torch.bfloat16):
        assert net(images).dtype == torch.float32


@pytest.mark.parametrize("bn", models.BATCH_NORMS)
def test_warm_up_trains_the_embedding_layer_only_and_frozen_stays_frozen(bn):
    net = tiny(bn)
    everything = {name for name, _ in net.named_parameters()}
    head = {"embedding.weight", "embedding.bias"}
    norms = {name for name, p in net.named_parameters() if p.ndim == 1} - head
    for expected in (everything - norms if bn == "frozen" else everything, head) * 2:
        assert {name for name, p in net.named_parameters() if p.requires_grad} == expected
        net.train_trunk(expected == head)
    with pytest.raises(ValueError, match="bn is 'freeze'; choose one of train, stats, frozen"):
        tiny("freeze")


def test_no_stats_update_normalises_by_the_batch_and_ends_also_after_an_error():
    net, images = tiny("train"), torch.randn(4, 3, 32, 32)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(KeyError), models.no_stats_update(net):
        inside = net(images)
        raise KeyError
    assert_same(net.state_dict(), before)
    assert torch.equal(inside, net(images))
    assert net.bn1.num_batches_tracked == 8 and not torch.equal(net.bn1.running_mean, before["bn1.running_mean"])


def test_conversion_for_several_gpus_keeps_frozen_statistics_frozen():
    net, images = tiny(), torch.randn(2, 3, 32, 32)
    expected = net(images)
    net = torch.nn.SyncBatchNorm.convert_sync_batchnorm(net).train()
    assert len(net.norms()) == 17 and not any(norm.training for norm in net.norms())
    assert torch.equal(net(images), expected)


def saved(directory, state, **options):
    torch.save(state, directory / "w.pt", **options)
    return str(directory / "w.pt")


NET = tiny()
WHOLE, TRUNK, ONE = NET.state_dict(), without("embedding", NET.state_dict()), torch.ones(2)
HALF = {name: x.half() for name, x in TRUNK.items() if not name.endswith("num_batches_tracked")}
MOCO = under("module.encoder_q.", TRUNK | {"fc.0.weight": ONE, "fc.2.bias": ONE}) | under("module.encoder_k.", TRUNK)
DINO = under("backbone.", TRUNK) | {"head.mlp.0.weight": ONE}
OBJECTS = dict(best=np.float64(0.5), path=pathlib.Path("x"), classes={1}, opt=argparse.Namespace(lr=1))
ADAM = {"state": {0: {"layer1.0.conv1.weight": ONE}}}
OTHERS = {  # who saved what, the prefix to find (None: nothing is printed), and the number of tensors to leave out
    "torchvision, float16": (HALF | {"fc.weight": ONE, "fc.bias": ONE}, None, 0),
    "another head": ({"model": TRUNK | {"classifier.weight": ONE}}, "model.", 1),
    "a training state": ({"optimizer": ADAM, "state_dict": TRUNK}, "state_dict.", 1),
    "nested twice": ({1: {"model": under("_orig_mod.", TRUNK)}}, "1.model._orig_mod.", 0),
    "MoCo": ({"model": "resnet50", "state_dict": MOCO}, "state_dict.module.encoder_q.", len(TRUNK)),
    "DINO": ({"teacher": DINO, "args": argparse.Namespace(lr=1)}, "teacher.backbone.", 1),
    "objects": ({"net": TRUNK} | OBJECTS, "net.", 0),
    "a module": (torch.nn.DataParallel(NET), "module.", 0),
    "a run of ours": ({"model": WHOLE, "metric": {"proxies": ONE}, "log": [{"epoch": 1}], "optimizer": ADAM}, None, 0),
}


@pytest.mark.parametrize("name", OTHERS)
def test_weights_of_others_load(name, tmp_path, capsys):
    state, prefix, left_out = OTHERS[name]
    net, file = tiny(), saved(tmp_path, state)
    expected = WHOLE if name in ("a run of ours", "a module") else copy.deepcopy(net.state_dict()) | TRUNK
    models.load_weights(net, file)
    assert_same(net.state_dict(), expected)
    line = f"  {file}: loads {prefix}*, leaves out {left_out} tensors"
    assert capsys.readouterr().out.partition(" (")[0].strip("\n") == ("" if prefix is None else line)


def test_weights_from_before_pytorch_1_6_load(tmp_path):
    net, state = tiny(), {"model": WHOLE, "opt": argparse.Namespace(lr=1)}
    models.load_weights(net, saved(tmp_path, state, _use_new_zipfile_serialization=False))
    assert_same(net.state_dict(), WHOLE)


@pytest.mark.parametrize(
    "state, message",
    [
        ([1, 2], r"85 tensors missing \(conv1.weight, bn1.weight, bn1.bias, ..\), 0 unknown, 0 of another shape"),
        ({"model": {"stem.weight": ONE}}, r"85 tensors missing \(conv1.weight, .*, 1 unknown \(model.stem.weight\)"),
        (without("bn1", TRUNK), r"4 tensors missing \(bn1.weight, bn1.bias, bn1.running_mean, ..\), 0 unknown"),
        (TRUNK | {"layer3.6.bn1.weight": ONE, "neck.w": ONE}, r"0 .*, 2 unknown \(layer3.6.bn1.weight, neck.w\)"),
        (tiny(embedding_size=9).state_dict(), r"0 .*, 2 of another shape \(embedding.weight \(9, 512\), not \(8, "),
    ],
)
def test_weights_that_do_not_fit_are_named_on_both_sides(state, message, tmp_path):
    net = tiny()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match=rf"w.pt does not fit this net: {message}[^\n]*; check --net"):
        models.load_weights(net, saved(tmp_path, state))
    assert_same(net.state_dict(), before)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"<!DOCTYPE html>\n<html>", r"it begins with b'<!DOCTYPE html>\\n', so it may be incomplete"),
        (b"PK\3\4, a part of a zip archive", "it begins with b'PK.*', so it may be incomplete"),
        (pickle.dumps({"weight": 1}, 2), "if it is whole and you trust it, convert it: torch.save"),
    ],
)
def test_files_of_other_kinds_are_named(content, message, tmp_path):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match=rf"file: not a readable checkpoint [^\n]*{message}[^\n]*$"):
        models.load_weights(tiny(), str(tmp_path / "file"))
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}: no such weights file"):
        models.load_weights(tiny(), str(tmp_path))


def test_no_code_in_a_file_is_run(tmp_path):
    marker = str(tmp_path / "code_ran")
    call = lambda *call: type("Call", (), dict(__reduce__=lambda self: call))()  # unpickling it makes the call
    state = {"model": TRUNK, "a": call(exec, (f"open({marker!r}, 'w')",)), "b": call(open, (marker, "w"))}
    models.load_weights(tiny(), saved(tmp_path, state))
    with pytest.raises(ValueError, match="w.pt: not a readable checkpoint [^\n]* if it is whole and you trust it"):
        models.load_weights(tiny(), saved(tmp_path, state | {"c": call(os.system, (f"touch {marker}",))}))
    assert not os.path.exists(marker)


def test_imagenet_weights_come_from_the_hub_or_the_error_says_where_to_put_them(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    hub, net, theirs = tmp_path / "hub/checkpoints", models.ResNet(), torchvision.models.resnet50().state_dict()
    for url, reason in ("nowhere:", "<urlopen error"), ("data:,other", "invalid hash value"):
        monkeypatch.setattr(torch.hub, "urlopen", lambda request, url=url: urllib.request.urlopen(url))
        message = rf"no ImageNet weights .{reason}[^\n]*; put https\S*/resnet50-0676ba61.pth into {hub}, or use "
        with pytest.raises(OSError, match=message):
            models.load_weights(net, "imagenet")
    assert not any(hub.iterdir())
    torch.save(theirs, hub / "resnet50-0676ba61.pth")
    models.load_weights(net, "imagenet")
    assert_same(without("embedding", net.state_dict()), without("fc", theirs))

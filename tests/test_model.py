"""The hand-written ResNet against torchvision's, and the ways in and out of its weights."""

import argparse
import copy
import email.message
import io
import os
import pathlib
import pickle
import urllib.response

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


def assert_close(a, b):
    assert a.keys() == b.keys()
    for name in a:
        scale = b[name].abs().max()
        assert scale > 0 and (a[name] - b[name]).abs().max() <= 1e-5 * scale, name


@pytest.mark.parametrize("bn", models.BATCH_NORMS)
def test_resnet50_equals_torchvision(bn):
    """Features in training and in evaluation, gradients, and running statistics, which move under "train" only."""
    torch.manual_seed(0)
    theirs, ours = lively(torchvision.models.resnet50()).double(), models.ResNet(bn=bn).double()
    ours.load_state_dict(without("fc", theirs.state_dict()), strict=False)
    theirs.train(bn == "train"), ours.train()
    their_features = torch.nn.Sequential(*list(theirs.children())[:-2])
    images = torch.randn(2, 3, 40, 40, dtype=torch.float64)
    features, expected = ours.features(images), their_features(images)
    upstream = torch.randn_like(expected)
    features.backward(upstream), expected.backward(upstream)

    norms = {name for name, p in theirs.named_parameters() if p.ndim == 1}
    frozen = norms if bn == "frozen" else set()
    their_parameters = without("fc", dict(theirs.named_parameters()))
    gradients = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    assert_close(gradients, {name: p.grad for name, p in their_parameters.items() if name not in frozen})
    assert_close(dict(ours.named_buffers()), dict(theirs.named_buffers()))
    with torch.no_grad():
        evaluated = ours.eval().features(images), their_features.eval()(images)
    assert_close(dict(training=features, evaluation=evaluated[0]), dict(training=expected, evaluation=evaluated[1]))


def test_frozen_statistics_are_folded_into_the_convolutions(monkeypatch):
    trained, frozen, images = tiny("train"), tiny("stats"), torch.randn(2, 3, 32, 32)
    monkeypatch.delattr(torch.nn.modules.batchnorm._BatchNorm, "forward")  # now batch norm cannot run
    frozen.features(images), trained.eval().features(images)
    with pytest.raises(NotImplementedError):
        trained.train().features(images)


def test_head_is_average_plus_max_pool_then_unit_embedding():
    net, images = tiny(), torch.randn(4, 3, 64, 96)
    features = net.features(images)  # (4, 512, 2, 3)
    pooled = torch.nn.functional.adaptive_avg_pool2d(features, 1) + torch.nn.functional.adaptive_max_pool2d(features, 1)
    z = net(images)
    assert z.shape == (4, 8)
    torch.testing.assert_close(z, torch.nn.functional.normalize(net.embedding(pooled.flatten(1)), dim=1))
    torch.testing.assert_close(z.norm(dim=1), torch.ones(4))
    with torch.autocast("cpu", torch.bfloat16):
        assert net(images).dtype == torch.float32


def test_a_trunk_trained_here_loads_into_torchvision():
    ours = models.ResNet(**models.NETS["resnet50"])
    missing, unexpected = torchvision.models.resnet50().load_state_dict(ours.state_dict(), strict=False)
    assert unexpected == ["embedding.weight", "embedding.bias"] and missing == ["fc.weight", "fc.bias"]


@pytest.mark.parametrize("bn", models.BATCH_NORMS)
def test_warm_up_trains_the_embedding_layer_only_and_frozen_stays_frozen(bn):
    net = tiny(bn)
    norms = {name for name, p in net.named_parameters() if p.ndim == 1 and name != "embedding.bias"}
    fixed = norms if bn == "frozen" else set()
    assert {name for name, p in net.named_parameters() if not p.requires_grad} == fixed
    net.train_trunk(False)
    assert {name for name, p in net.named_parameters() if p.requires_grad} == {"embedding.weight", "embedding.bias"}
    net.train_trunk(True)
    assert {name for name, p in net.named_parameters() if not p.requires_grad} == fixed
    with pytest.raises(ValueError, match="bn is 'freeze'; choose one of train, stats, frozen"):
        tiny("freeze")


def test_no_stats_update_normalises_by_the_batch_and_ends_also_after_an_error():
    net, images = tiny("train"), torch.randn(4, 3, 32, 32)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(KeyError), models.no_stats_update(net):
        inside = net(images)
        raise KeyError
    assert all(torch.equal(x, before[name]) for name, x in net.state_dict().items())
    assert torch.equal(inside, net(images))
    assert net.bn1.num_batches_tracked == 8 and not torch.equal(net.bn1.running_mean, before["bn1.running_mean"])


def test_conversion_for_several_gpus_keeps_frozen_statistics_frozen():
    net, images = tiny(), torch.randn(2, 3, 32, 32)
    expected = net(images)
    net = torch.nn.SyncBatchNorm.convert_sync_batchnorm(net).train()
    assert len(net.norms()) == 17 and not any(norm.training for norm in net.norms())
    assert torch.equal(net(images), expected)


# ------------------------------------------------------------------------------------------- weights


def saved(directory, state, **options):
    torch.save(state, directory / "w.pt", **options)
    return str(directory / "w.pt")


def under(prefix, state):
    return {prefix + name: value for name, value in state.items()}


NET = tiny()
WHOLE, TRUNK, ONE = NET.state_dict(), without("embedding", NET.state_dict()), torch.ones(2)
MOCO = under("module.encoder_q.", TRUNK | {"fc.0.weight": ONE, "fc.2.bias": ONE}) | under("module.encoder_k.", TRUNK)
DINO = under("backbone.", TRUNK) | {"head.mlp.0.weight": ONE}
OLD = {name: x for name, x in TRUNK.items() if not name.endswith("num_batches_tracked")}
OBJECTS = dict(best=np.float64(0.5), path=pathlib.Path("x"), classes={1}, opt=argparse.Namespace(lr=1))
OTHERS = {  # who saved what, the prefix to find (None: nothing is printed), and the number of tensors to leave out
    "torchvision": (OLD | {"fc.weight": ONE, "fc.bias": ONE}, None, 0),
    "float16": ({name: x.half() if x.is_floating_point() else x for name, x in TRUNK.items()}, None, 0),
    "another head": (TRUNK | {"classifier.weight": ONE}, "", 1),
    "DataParallel": (under("module.", TRUNK), "module.", 0),
    "a training state": ({"optimizer": {"m": {"layer1.0.conv1.weight": ONE}}, "state_dict": TRUNK}, "state_dict.", 1),
    "nested twice": ({1: {"model": under("_orig_mod.", TRUNK)}}, "1.model._orig_mod.", 0),
    "a name in model": ({"model": "resnet50", "model_state_dict": TRUNK}, "model_state_dict.", 0),
    "MoCo": ({"arch": "resnet50", "state_dict": MOCO}, "state_dict.module.encoder_q.", len(TRUNK)),
    "DINO": ({"teacher": DINO, "args": argparse.Namespace(lr=1)}, "teacher.backbone.", 1),
    "objects": ({"model": TRUNK} | OBJECTS, "model.", 0),
    "a run of ours": ({"model": WHOLE, "metric": {"proxies": ONE}, "epoch": 1, "log": [{"epoch": 1}]}, "model.", 1),
    "a module": (torch.nn.DataParallel(NET), "module.", 0),
}


@pytest.mark.parametrize("name", OTHERS)
def test_weights_of_others_load(name, tmp_path, capsys):
    state, prefix, left_out = OTHERS[name]
    net, file = tiny(), saved(tmp_path, state)
    embedding = WHOLE if name in ("a run of ours", "a module") else copy.deepcopy(net.state_dict())
    models.load_weights(net, file)
    for name, x in net.state_dict().items():
        assert torch.equal(x, embedding[name] if name.startswith("embedding.") else TRUNK[name]), name
    line = f"  {file}: loads {prefix}*, leaves out {left_out} tensors"
    assert capsys.readouterr().out.partition(" (")[0].strip("\n") == ("" if prefix is None else line)


def test_weights_from_before_pytorch_1_6_load(tmp_path):
    net = tiny()
    state = {"model": WHOLE, "opt": argparse.Namespace(lr=1)}
    models.load_weights(net, saved(tmp_path, state, _use_new_zipfile_serialization=False))
    assert all(torch.equal(x, WHOLE[name]) for name, x in net.state_dict().items())


MISFITS = [
    ({1: 2}, r"85 tensors missing \(conv1.weight, bn1.weight, bn1.bias, ..\), 0 unknown, 0 of another shape"),
    ([1, 2], "85 tensors missing"),
    ({"model": "resnet50"}, "85 tensors missing"),
    ({name: x.numpy() for name, x in TRUNK.items()}, "85 tensors missing"),
    ({"model": {"stem.weight": ONE}}, r"85 tensors missing \(conv1.weight, .*, 1 unknown \(model.stem.weight\)"),
    (without("bn1", TRUNK), r"4 tensors missing \(bn1.weight, bn1.bias, bn1.running_mean, ..\), 0 unknown"),
    (TRUNK | {"layer3.6.bn1.weight": ONE, "neck.weight": ONE}, r"0 .*, 2 unknown \(layer3.6.bn1.weight, neck.weight\)"),
    (tiny(embedding_size=9).state_dict(), r"0 .*, 2 of another shape \(embedding.weight \(9, 512\), not \(8, 512\), "),
]


@pytest.mark.parametrize("state, message", MISFITS)
def test_weights_that_do_not_fit_are_named_on_both_sides(state, message, tmp_path):
    net = tiny()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match=rf"w.pt does not fit this net: {message}[^\n]*; check --net"):
        models.load_weights(net, saved(tmp_path, state))
    assert all(torch.equal(x, before[name]) for name, x in net.state_dict().items())


FOREIGN = [
    (b"", "begins with b'', so its download may have failed"),
    (b"<!DOCTYPE html>\n<html>", r"begins with b'<!DOCTYPE html>\\n', so its download may have failed"),
    (b'\x10\0\0\0\0\0\0\0{"conv1.weight":', "in the format of torch.save; it begins with"),  # safetensors
    (pickle.dumps({"weight": 1}, 2), "if it is whole and you trust it, convert it: torch.save"),
    (b"PK\3\4, the beginning of a zip archive", "begins with b'PK.*', so its download may have failed"),
]


@pytest.mark.parametrize("content, message", FOREIGN)
def test_files_of_other_kinds_are_named(content, message, tmp_path):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match=rf"file: not a readable checkpoint [^\n]*{message}[^\n]*$"):
        models.load_weights(tiny(), str(tmp_path / "file"))
    for nothing in (tmp_path, tmp_path / "missing"):
        with pytest.raises(FileNotFoundError, match=f"{nothing}: no such weights file"):
            models.load_weights(tiny(), str(nothing))


class Sly:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


def test_no_code_in_a_file_is_run(tmp_path):
    marker = str(tmp_path / "code_ran")
    state = {"model": TRUNK, "a": Sly(exec, (f"open({marker!r}, 'w')",)), "b": Sly(open, (marker, "w"))}
    models.load_weights(tiny(), saved(tmp_path, state))
    file = saved(tmp_path, state | {"c": Sly(os.system, (f"touch {marker}",))})
    with pytest.raises(ValueError, match="w.pt: not a readable checkpoint [^\n]* if it is whole and you trust it"):
        models.load_weights(tiny(), file)
    assert not os.path.exists(marker)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The folder of downloads, empty. Nobody answers on the network."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    return tmp_path / "hub/checkpoints"


def test_without_a_network_the_error_says_where_to_put_the_imagenet_weights(hub):
    with pytest.raises(OSError, match=rf"no ImageNet [^\n]*; put https\S*/resnet50-0676ba61.pth into {hub}, or use "):
        models.load_weights(models.ResNet(), "imagenet")
    theirs, ours = torchvision.models.resnet50().state_dict(), models.ResNet()
    torch.save(theirs, hub / "resnet50-0676ba61.pth")
    models.load_weights(ours, "imagenet")
    assert all(torch.equal(x, theirs[name]) for name, x in without("embedding", ours.state_dict()).items())


def test_a_download_with_another_hash_is_refused(hub, monkeypatch):
    def reply(request):
        return urllib.response.addinfourl(io.BytesIO(b"<html>"), email.message.Message(), request.full_url)

    monkeypatch.setattr(torch.hub, "urlopen", reply)
    with pytest.raises(OSError, match="no ImageNet weights .invalid hash value"):
        models.load_weights(models.ResNet(), "imagenet")
    assert not any(hub.iterdir())

"""The hand-written ResNet against torchvision's, and the ways in and out of its weights."""

import copy
import hashlib
import re

import pytest
import torch
import torchvision

import model as models


@pytest.fixture(scope="module")
def reference():
    """torchvision's ResNet-50 in float64 with lively batch norm; its layers up to layer4."""
    torch.manual_seed(0)
    net = torchvision.models.resnet50().double()
    for norm in net.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.weight.data.uniform_(0.5, 1.5)
            norm.bias.data.normal_(0, 0.1)
            norm.running_mean.normal_(0, 0.1)
            norm.running_var.uniform_(0.5, 1.5)
    return net


def trunk(theirs):
    return {name: value for name, value in theirs.state_dict().items() if not name.startswith("fc.")}


def tiny(**settings):
    return models.ResNet(**models.NETS["tiny"], embedding_size=8, **settings)


@pytest.mark.parametrize("bn", models.BATCH_NORMS)
@pytest.mark.parametrize("fold", [True, False])
def test_resnet50_equals_torchvision(reference, bn, fold):
    theirs = copy.deepcopy(reference)
    ours = models.ResNet(bn=bn, fold=fold).double()
    ours.load_state_dict(trunk(theirs), strict=False)
    theirs.train(bn == "train")
    ours.train()
    if bn == "frozen":
        for norm in theirs.modules():
            if isinstance(norm, torch.nn.BatchNorm2d):
                norm.requires_grad_(False)

    images = torch.randn(2, 3, 40, 40, dtype=torch.float64)
    features = ours.features(images)
    expected = torch.nn.Sequential(*list(theirs.children())[:-2])(images)
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)

    upstream = torch.randn_like(expected)
    features.backward(upstream)
    expected.backward(upstream)
    gradients = {name: p.grad for name, p in theirs.named_parameters() if not name.startswith("fc.")}
    for name, parameter in ours.named_parameters():
        if name.startswith("embedding."):
            continue
        if gradients[name] is None:
            assert bn == "frozen" and parameter.grad is None, name
        else:
            scale = gradients[name].abs().max()
            assert scale > 0 and (parameter.grad - gradients[name]).abs().max() <= 1e-5 * scale, name
    for name, buffer in theirs.named_buffers():  # running statistics move under "train" only
        torch.testing.assert_close(ours.get_buffer(name), buffer, rtol=1e-5, atol=1e-5)


def test_evaluation_equals_torchvision(reference, tmp_path):
    theirs = copy.deepcopy(reference).eval()
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    ours = models.ResNet(bn="train").double()
    models.load_weights(ours, str(tmp_path / "weights.pth"))
    images = torch.randn(2, 3, 40, 40, dtype=torch.float64)
    expected = torch.nn.Sequential(*list(theirs.children())[:-2])(images)
    torch.testing.assert_close(ours.eval().features(images), expected, rtol=1e-5, atol=1e-5)


def test_head_is_average_plus_max_pool_then_unit_embedding():
    net = tiny()
    features = torch.randn(4, 512, 2, 3)
    pooled = torch.nn.functional.adaptive_avg_pool2d(features, 1) + torch.nn.functional.adaptive_max_pool2d(features, 1)
    z = net.head(features)
    assert z.shape == (4, 8)
    torch.testing.assert_close(z, torch.nn.functional.normalize(net.embedding(pooled.flatten(1)), dim=1))
    torch.testing.assert_close(z.norm(dim=1), torch.ones(4))


def test_a_trunk_trained_here_loads_into_torchvision():
    state = {k: v for k, v in models.ResNet().state_dict().items() if not k.startswith("embedding.")}
    missing, unexpected = torchvision.models.resnet50().load_state_dict(state, strict=False)
    assert not unexpected and sorted(missing) == ["fc.bias", "fc.weight"]


@pytest.mark.parametrize("bn", models.BATCH_NORMS)
def test_warm_up_trains_the_embedding_layer_only_and_frozen_stays_frozen(bn):
    net = tiny(bn=bn)
    net.train_trunk(False)
    assert {n for n, p in net.named_parameters() if p.requires_grad} == {"embedding.weight", "embedding.bias"}
    net.train_trunk(True)
    fixed = {n for n, p in net.named_parameters() if not p.requires_grad}
    norms = {n for n, p in net.named_parameters() if re.search(r"bn\d\.|downsample\.1\.", n)}
    assert fixed == (norms if bn == "frozen" else set())


def test_weights_come_back_from_a_checkpoint(tmp_path):
    net, other = tiny(), tiny()
    torch.save({"model": net.state_dict(), "epoch": 3}, tmp_path / "best.pt")
    models.load_weights(other, str(tmp_path / "best.pt"))
    for name, value in net.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_weights_without_batch_counters_load_as_torchvision_publishes_them(reference, tmp_path):
    """267 entries in torchvision's file, against 320 in a state dict of today."""
    published = {name: x for name, x in reference.state_dict().items() if not name.endswith("num_batches_tracked")}
    assert len(published) == 267
    torch.save(published, tmp_path / "weights.pth")
    ours = models.ResNet().double()
    models.load_weights(ours, str(tmp_path / "weights.pth"))
    for name, value in published.items():
        assert name.startswith("fc.") or torch.equal(ours.state_dict()[name], value), name


def test_unusable_weights_are_named(tmp_path):
    class Sly:
        def __reduce__(self):
            return print, ("code in a checkpoint ran",)

    torch.save({"conv1.weight": Sly()}, tmp_path / "sly.pt")
    torch.save(tiny().state_dict(), tmp_path / "good.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "good.pt").read_bytes()[:5000])
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"model": {"conv1.weight": None}}, tmp_path / "hollow.pt")
    torch.save({"conv1.weight": torch.zeros(16, 3, 7, 7)}, tmp_path / "part.pt")
    torch.save(models.ResNet(**models.NETS["tiny"], embedding_size=9).state_dict(), tmp_path / "other.pt")
    for name, message in [
        ("none.pt", "no such file of weights"),
        ("sly.pt", "not a readable checkpoint"),
        ("cut.pt", "not a readable checkpoint"),
        ("list.pt", "holds a list"),
        ("hollow.pt", "tensors do not fit this net"),
        ("part.pt", "tensors do not fit this net"),
        ("other.pt", "2 tensors do not fit this net .embedding"),
    ]:
        with pytest.raises((ValueError, OSError), match=message) as error:
            models.load_weights(tiny(), str(tmp_path / name))
        assert name in str(error.value) and "\n" not in str(error.value)


def imagenet_at(url, monkeypatch, tmp_path):
    weights = torchvision.models.ResNet50_Weights.IMAGENET1K_V1
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(weights, "_value_", weights.value.__class__(url, weights.transforms, weights.meta))


def test_imagenet_weights_are_downloaded_once_with_their_hash_checked(tmp_path, monkeypatch):
    """From a file:// address, through every line that a real download takes."""
    theirs = torchvision.models.resnet50()
    source = tmp_path / "resnet50.pth"
    torch.save(theirs.state_dict(), source)
    source = source.rename(tmp_path / f"resnet50-{hashlib.sha256(source.read_bytes()).hexdigest()[:8]}.pth")
    imagenet_at(source.as_uri(), monkeypatch, tmp_path)
    for _ in range(2):
        ours = models.ResNet()
        models.load_weights(ours, "imagenet")
        assert torch.equal(ours.layer4[2].conv3.weight, theirs.layer4[2].conv3.weight)
        source.unlink(missing_ok=True)  # the second time it comes from the hub folder

    wrong = tmp_path / "resnet50-00000000.pth"
    wrong.write_bytes(b"something else")
    imagenet_at(wrong.as_uri(), monkeypatch, tmp_path)
    with pytest.raises(OSError, match="invalid hash value"):
        models.load_weights(models.ResNet(), "imagenet")


def test_without_a_network_the_error_says_where_to_put_the_weights(tmp_path, monkeypatch):
    imagenet_at("http://127.0.0.1:9/resnet50-0676ba61.pth", monkeypatch, tmp_path)  # nobody listens on this port
    with pytest.raises(OSError, match=f"put http.*resnet50-0676ba61.pth into {tmp_path}/hub/checkpoints") as error:
        models.load_weights(models.ResNet(), "imagenet")
    assert "\n" not in str(error.value)

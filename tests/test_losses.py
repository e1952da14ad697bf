"""Every loss against a loop over pairs in float64: value to 1e-9, gradient to 1e-7."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import losses
from kernels import pairwise

D, LAM = 7, 0.3
LABELS = {
    "unbalanced": [0, 0, 0, 1, 1, 2, 3, 3, 3, 3, 4],
    "shuffled": [3, 0, 1, 3, 0, 2, 3, 1, 3, 4, 0],
    "balanced": [0, 0, 1, 1, 2, 2],
    "no positive pair": [4, 2, 0, 1],
    "one class": [1, 1, 1],
    "one example": [2],
}
CELLS = [(name, pairing) for name in ("contrastive", "multisimilarity", "proxyanchor") for pairing in losses.PAIRINGS]


@pytest.fixture(params=LABELS.values(), ids=LABELS.keys())
def y(request):
    return torch.tensor(request.param)


@pytest.fixture
def z(y):
    return embeddings(len(y))


def clusters(y, seed=0):
    """Embeddings around a centre for each class, near enough to each other that the miner drops pairs of both kinds."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(1 + int(y.max()), D, generator=generator, dtype=torch.float64)
    return (centres[y] + 0.6 * torch.randn(len(y), D, generator=generator, dtype=torch.float64)).requires_grad_()


def embeddings(count, seed=0):
    """Not normalised, and close together, so that the hinge is active."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, D, generator=generator, dtype=torch.float64) + 3 * torch.linspace(-1, 1, D).double()
    return rows.requires_grad_()


def make(name, **settings):
    if name == "contrastive":
        return losses.Contrastive(**settings)
    if name == "multisimilarity":
        return losses.MultiSimilarity(**settings)
    torch.manual_seed(1)
    return losses.ProxyAnchor(5, D, **settings).double()


# ------------------------------------------------------------------------------------------ the loops


def sim(a, b):
    return a @ b / (a.norm() * b.norm())


def dist(a, b):
    return (2 - 2 * sim(a, b)).clamp_min(1e-12).sqrt()


def mean_of_positive(terms):
    terms = [term for term in terms if term > 0]
    return sum(terms) / len(terms) if terms else torch.zeros(())


def log1p_sum(terms, weight=1.0):
    return (1 + weight * sum(terms)).log() if terms else torch.zeros(())


def loop_clean(name, metric, z, y):
    count = len(y)
    if name == "contrastive":
        pairs = [(a, b) for a in range(count) for b in range(count) if a != b]
        pull = [dist(z[a], z[b]) for a, b in pairs if y[a] == y[b]]
        push = [(0.5 - dist(z[a], z[b])).relu() for a, b in pairs if y[a] != y[b]]
        return mean_of_positive(pull) + mean_of_positive(push)
    if name == "multisimilarity":
        total = torch.zeros(())
        for a in range(count):
            positive = [sim(z[a], z[b]) for b in range(count) if y[a] == y[b] and a != b]
            negative = [sim(z[a], z[b]) for b in range(count) if y[a] != y[b]]
            if not positive or not negative:
                continue
            kept_positive = [s for s in positive if s - 0.39 < max(negative)]
            kept_negative = [s for s in negative if s + 0.39 > min(positive)]
            total = total + log1p_sum([(-17.97 * (s - 0.77)).exp() for s in kept_positive]) / 17.97
            total = total + log1p_sum([(75.66 * (s - 0.77)).exp() for s in kept_negative]) / 75.66
        return total / count
    pull, push = [], []
    for c, proxy in enumerate(metric.proxies):
        positive = [(-32 * (sim(proxy, z[b]) - 0.1)).exp() for b in range(count) if y[b] == c]
        negative = [(32 * (sim(proxy, z[b]) + 0.1)).exp() for b in range(count) if y[b] != c]
        if positive:
            pull.append(log1p_sum(positive))
        push.append(log1p_sum(negative))
    return sum(pull) / len(pull) + sum(push) / len(push)


def loop_mixed(name, metric, z, y, v, i, lam, pairing):
    if name == "proxyanchor":
        anchors = [(proxy, [k for k in range(len(i)) if y[i[k]] == c]) for c, proxy in enumerate(metric.proxies)]
    elif pairing == "anchor-negative":
        anchors = [(z[a], [k for k in range(len(i)) if i[k] == a]) for a in range(len(y))]
    else:
        anchors = [(z[a], [k for k in range(len(i)) if y[i[k]] == y[a] and i[k] != a]) for a in range(len(y))]
    if name == "contrastive":
        dists = [dist(anchor, v[k]) for anchor, seen in anchors for k in seen]
        pull = mean_of_positive([lam * d for d in dists])
        return pull + mean_of_positive([(1 - lam) * (0.5 - d).relu() for d in dists])
    if name == "multisimilarity":
        total = torch.zeros(())
        for anchor, seen in anchors:
            sims = [sim(anchor, v[k]) for k in seen]
            total = total + log1p_sum([(-17.97 * (s - 0.77)).exp() for s in sims], lam) / 17.97
            total = total + log1p_sum([(75.66 * (s - 0.77)).exp() for s in sims], 1 - lam) / 75.66
        return total / len(y)
    shown = [[sim(anchor, v[k]) for k in seen] for anchor, seen in anchors if seen]
    pull = [log1p_sum([(-32 * (s - 0.1)).exp() for s in sims], lam) for sims in shown]
    push = [log1p_sum([(32 * (s + 0.1)).exp() for s in sims], 1 - lam) for sims in shown]
    return (sum(pull) + sum(push)) / max(len(shown), 1)


def assert_equal(value, expected, *inputs):
    """Values to 1e-9, gradients to the inputs to 1e-7, both relative to at least 1; a missing gradient is zero."""
    assert value.shape == () and value.dtype == torch.float64
    expected = torch.as_tensor(expected, dtype=torch.float64)  # a loop that met nothing gives the number 0
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-9)
    gradients = [gradient(value, inputs), gradient(expected, inputs)]
    for one, other in zip(*gradients):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-7)


def gradient(value, inputs):
    found = [None] * len(inputs)
    if value.requires_grad:
        found = torch.autograd.grad(2.5 * value, inputs, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, inputs)]


# ------------------------------------------------------------------------------------------ the tests


@pytest.mark.parametrize("name", ["contrastive", "multisimilarity", "proxyanchor"])
def test_clean_loss_equals_the_loop(name, z, y):
    metric = make(name)
    for z in (z, clusters(y)):
        assert_equal(metric(z, y), loop_clean(name, metric, z, y), z, *metric.parameters())


@pytest.mark.parametrize("name, pairing", CELLS)
@pytest.mark.parametrize("bank", ["full", "hardest"])
def test_mixed_loss_equals_the_loop(name, pairing, bank, z, y):
    metric = make(name)
    i, j = losses.full_bank(y, pairing) if bank == "full" else losses.hardest_bank(z, y, pairing)
    v = embeddings(len(i), seed=2)  # any embeddings: those of mixed images follow no formula
    value = metric.mixed(z, y, v, i, LAM, pairing)
    assert_equal(value, loop_mixed(name, metric, z, y, v, i, LAM, pairing), z, v, *metric.parameters())


@pytest.mark.parametrize("name, pairing", CELLS)
@pytest.mark.parametrize("lam", [0.0, LAM, 0.5, 1.0])
def test_mixed_embed_equals_mixed_over_the_full_bank(name, pairing, lam, z, y):
    metric = make(name)
    i, j = losses.full_bank(y, metric.pairings[-1] if len(metric.pairings) == 1 else pairing)
    unit = torch.nn.functional.normalize(z, dim=1)
    v = lam * unit[i] + (1 - lam) * unit[j]
    value = metric.mixed_embed(z, y, lam, pairing)
    assert_equal(value, metric.mixed(z, y, v, i, lam, pairing), z, *metric.parameters())
    if lam == LAM:
        assert_equal(value, loop_mixed(name, metric, z, y, v, i, lam, pairing), z, *metric.parameters())


@pytest.mark.parametrize("pairing", losses.PAIRINGS)
def test_full_bank_equals_the_loop(pairing, y):
    count = len(y)
    usable = [pairing == "anchor-negative" or any(y[a] == y[b] for b in range(count) if a != b) for a in range(count)]
    expected = [(a, b) for a in range(count) for b in range(count) if y[a] != y[b] and usable[a]]
    i, j = losses.full_bank(y, pairing)
    assert i.dtype == j.dtype == torch.int64
    assert list(zip(i.tolist(), j.tolist())) == expected


@pytest.mark.parametrize("pairing", losses.PAIRINGS)
@pytest.mark.parametrize("hardest", [1, 2, 100])
def test_hardest_bank_equals_the_loop(pairing, hardest, z, y):
    count, expected = len(y), set()
    for a in range(count):
        negatives = sorted((b for b in range(count) if y[a] != y[b]), key=lambda b: -sim(z[a], z[b]))[:hardest]
        positives = [b for b in range(count) if y[a] == y[b] and a != b]
        expected |= {(x, n) for x in ([a] if pairing == "anchor-negative" else positives) for n in negatives}
    i, j = losses.hardest_bank(z, y, pairing, hardest)
    assert i.dtype == j.dtype == torch.int64
    assert list(zip(i.tolist(), j.tolist())) == sorted(expected)


def test_the_hinge_and_the_miner_keep_some_pairs_and_drop_others():
    """The embeddings above would prove little if every term counted, or none."""
    y = torch.tensor(LABELS["unbalanced"])
    negative, positive = y[:, None] != y, (y[:, None] == y).fill_diagonal_(False)
    d = torch.tensor([[dist(a, b).item() for b in embeddings(11)] for a in embeddings(11)])
    assert 0 < (d[negative] < 0.5).sum() < negative.sum()
    s = torch.tensor([[sim(a, b).item() for b in clusters(y)] for a in clusters(y)])
    hardest = s.masked_fill(~negative, -2).amax(1, keepdim=True)
    assert 0 < (s - 0.39 < hardest)[positive].sum() < positive.sum()
    lowest = s.masked_fill(~positive, 2).amin(1, keepdim=True)
    assert 0 < (s + 0.39 > lowest)[negative & (lowest < 2)].sum() < (negative & (lowest < 2)).sum()


@pytest.mark.parametrize(
    "make",
    [
        lambda: losses.MultiSimilarity(ms_alpha=80),
        lambda: losses.MultiSimilarity(ms_beta=400),
        lambda: losses.ProxyAnchor(5, D, pa_alpha=64),
    ],
)
def test_settings_whose_exponents_would_overflow_are_refused(make):
    with pytest.raises(ValueError, match="exponents would reach .*, above 70"):
        make()


@pytest.mark.parametrize("name", ["contrastive", "multisimilarity", "proxyanchor"])
def test_float32_keeps_the_digits_of_float64(name):
    y, z = torch.tensor(LABELS["unbalanced"]), embeddings(11)
    exact, single = make(name), make(name).float()
    for loss in (lambda m, z: m(z, y), lambda m, z: m.mixed_embed(z, y, LAM, "anchor-negative")):
        torch.testing.assert_close(loss(single, z.float()).double(), loss(exact, z), rtol=1e-5, atol=0)


def test_huge_and_negative_labels_are_only_names():
    y, z = torch.tensor(LABELS["shuffled"]), embeddings(11)
    names = torch.tensor([2**40, -(2**35), 2**40 + 2**32, 2**24, 7])[y]
    for metric in (losses.Contrastive(), losses.MultiSimilarity()):
        assert metric(z, names) == metric(z, y)
        one, other = (metric.mixed_embed(z, labels, LAM, "positive-negative") for labels in (names, y))
        assert one == other



@pytest.mark.parametrize("name", ["contrastive", "multisimilarity", "proxyanchor"])
def test_losses_ignore_autocast_and_low_precision(name):
    y, z = torch.tensor(LABELS["balanced"]), embeddings(6).detach().bfloat16()
    metric = make(name).float()
    expected = metric(z.float(), y) + metric.mixed_embed(z.float(), y, LAM, "anchor-negative")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = metric(z, y) + metric.mixed_embed(z, y, LAM, "anchor-negative")
    assert value.dtype == torch.float32 and value == expected


@pytest.mark.parametrize("kind", [list, np.array, torch.IntTensor, torch.ByteTensor])
def test_labels_may_be_a_list_an_array_or_any_integers(kind):
    y, z = LABELS["balanced"], embeddings(6)
    for name, pairing in CELLS:
        metric, tensor = make(name), torch.tensor(y)
        i, j = losses.full_bank(tensor, pairing)

        def mixed(y, i, metric=metric, v=z[j], pairing=pairing):
            return metric.mixed(z, y, v, i, LAM, pairing)

        for one, other in [
            (metric(z, kind(y)), metric(z, tensor)),
            (metric.mixed_embed(z, kind(y), LAM, pairing), metric.mixed_embed(z, tensor, LAM, pairing)),
            (mixed(kind(y), kind(i.tolist())), mixed(tensor, i)),
            (losses.full_bank(kind(y), pairing)[1], j),
            (losses.hardest_bank(z, kind(y), pairing)[1], losses.hardest_bank(z, tensor, pairing)[1]),
        ]:
            assert torch.equal(one, other)


@pytest.mark.parametrize("name, pairing", CELLS)
def test_triplets_in_pieces_equal_the_whole(name, pairing, monkeypatch):
    results, y = [], torch.tensor(LABELS["unbalanced"])
    for pairs in (pairwise.PIECE, 30):
        monkeypatch.setattr(pairwise, "PIECE", pairs)
        z, metric = embeddings(11), make(name)
        loss = metric.mixed_embed(z, y, LAM, pairing)
        results.append([loss, *torch.autograd.grad(loss, z)])
    for one, other in zip(*results):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["contrastive", "multisimilarity", "proxyanchor"])
@pytest.mark.parametrize("noise", [0, 1e-4])
def test_identical_and_opposite_embeddings_give_bounded_losses_and_gradients(name, noise):
    """Half of one and half of its opposite is mostly rounding error, which must not blow up."""
    torch.manual_seed(0)
    y, direction = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]), torch.randn(64)
    metric = losses.ProxyAnchor(2, 64) if name == "proxyanchor" else make(name)
    for sign in (torch.ones(8), torch.tensor([1, 1, 1, 1, -1, -1, -1, -1]), torch.tensor([1, -1, 1, -1, 1, -1, 1, -1])):
        z = (sign[:, None] * direction + noise * torch.randn(8, 64)).requires_grad_()
        loss = metric(z, y) + sum(metric.mixed_embed(z, y, 0.5, pairing) for pairing in losses.PAIRINGS)
        loss.backward()
        assert 0 <= loss < 200 and z.grad.isfinite().all()


@pytest.mark.parametrize("name", ["contrastive", "multisimilarity", "proxyanchor"])
def test_an_empty_batch_has_a_loss_of_zero(name):
    for y in ([], torch.tensor([], dtype=torch.int64)):
        assert make(name)(torch.empty(0, D).double(), y) == 0
        assert make(name).mixed_embed(torch.empty(0, D).double(), y, LAM, "anchor-negative") == 0


def test_any_function_of_similarities_may_be_a_term(triton_device):
    """The binomial deviance, which no kernel knows, runs in PyTorch."""

    class Deviance(losses.MetricLoss):
        rho = staticmethod(lambda s: (F.softplus(-2 * s), F.softplus(5 * s)))

        def from_sums(self, pull, push, num_pull, num_push, pull_weight=1, push_weight=1):
            return (pull_weight * pull + push_weight * push).sum()

    y, z = torch.tensor(LABELS["unbalanced"]), embeddings(11)
    s = torch.stack([torch.stack([sim(a, b) for b in z]) for a in z])
    positive, negative = (y[:, None] == y).fill_diagonal_(False), y[:, None] != y
    expected = F.softplus(-2 * s)[positive].sum() + F.softplus(5 * s)[negative].sum()
    assert_equal(Deviance()(z, y), expected, z)
    assert Deviance()(z.detach().float(), y).dtype == torch.float32


@pytest.mark.parametrize("name", ["contrastive", "multisimilarity", "proxyanchor"])
def test_second_derivatives_are_right(name):
    y, metric = torch.tensor([0, 0, 1, 1, 2]), make(name)
    z = clusters(y).detach()[:, :3].requires_grad_()
    if name == "proxyanchor":
        metric.proxies = torch.nn.Parameter(metric.proxies.detach()[:, :3])
    i, _ = losses.full_bank(y, "anchor-negative")
    for loss in (
        lambda z: metric(z, y),
        lambda z: metric.mixed(z, y, z[i], i, LAM, "anchor-negative"),
        lambda z: metric.mixed_embed(z, y, LAM, "anchor-negative"),
    ):
        assert torch.autograd.gradgradcheck(loss, z)


def test_wrong_arguments_are_named():
    z, y = embeddings(4), torch.tensor([0, 0, 1, 1])
    for call, message in [
        (lambda: losses.Contrastive()(z, y[:3]), "expected embeddings"),
        (lambda: losses.Contrastive()(z, y.double()), "integer labels"),
        (lambda: losses.full_bank(y, "positive"), "choose one of positive-negative, anchor-negative"),
        (lambda: losses.Contrastive().mixed(z, y, z[:1], y[:2], LAM, "anchor-negative"), "v has 1 rows, but i has 2"),
        (lambda: make("proxyanchor")(z, y + 4), "labels must lie in 0 .. 4, got 4 .. 5"),
        (lambda: make("proxyanchor")(z, y - 1), "labels must lie in 0 .. 4, got -1 .. 0"),
        (lambda: make("proxyanchor")(z, y * 2**40), "got 0 .. 1099511627776"),
        (lambda: make("proxyanchor").mixed_embed(z, y + 4, LAM, "anchor-negative"), "got 4 .. 5"),
        (lambda: make("proxyanchor")(z[:, :3], y), "columns"),
        (lambda: pairwise.Rho("softplus")(z), "'softplus'; choose hinge or exponential"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()

"""Three metric-learning losses, and what Metrix adds to each: the same loss on mixed examples.

    metric(z, y)                              clean: the batch against itself, or against its proxies
    metric.mixed(z, y, v, i, lam, pairing)    anchors against a bank of mixed examples v[k] = mix(x[i[k]], x[j[k]])
    metric.mixed_embed(z, y, lam, pairing)    the same over every mix of two embeddings, without building one

A mixed example is `lam` positive and `1 - lam` negative: it enters both halves of a loss with these weights.
The pairing says which bank entries V(a) an anchor a sees. Proxies as anchors know one pairing only.

    positive-negative   V(a) = { k : y[i_k] == y[a], i_k != a }
    anchor-negative     V(a) = { k : i_k == a }
    proxies             V(c) = { k : y[i_k] == c }

A loss never holds a matrix of pairs. kernels/ reduces each anchor's pairs to four numbers: the sum of rho+ over its
positives, the sum of rho- over its negatives, and how many terms of each are not zero. `from_sums` makes the loss of
them. In a mixed loss every pair in V(a) enters both sums.

Embeddings may have any length and float type. The losses normalise them and compute in float32, also under autocast,
or in float64 for float64 input.
Shapes: B examples, A anchors, M bank entries, D embedding size, P classes (proxies).
Source: Venkataramanan et al., It Takes Two to Tango, ICLR 2022, arXiv 2106.04990.
"""

import functools

import torch
import torch.nn.functional as F
from torch import nn

from kernels import EXPONENTIAL, HINGE, Rho, full_precision, product, similarities
from kernels.mixed import embed_sums
from kernels.pairwise import pair_sums

PAIRINGS = ("positive-negative", "anchor-negative")
MAX_EXPONENT = 70  # e^70 times a million terms still fits float32


# ---------------------------------------------------------------------------------------------- banks


def full_bank(y, pairing):
    """Every ordered pair with different labels whose first example is in some V(a).

    y: (B,) integers. Returns i, j: int64 (M,), sorted by i, then j.
    """
    usable = in_bank(*bank_keys(y, _arange(y), pairing)).any(0)  # (B,)
    return ((y[:, None] != y) & usable[:, None]).nonzero(as_tuple=True)


def hardest_bank(z, y, pairing, hardest=1):
    """For every anchor a and every example x in V(a): (x, the `hardest` negatives of a), each pair once.

    Hardest means highest similarity to a. No gradient flows through the choice.
    z: (B, D), y: (B,). Returns i, j: int64 (M,), sorted by i, then j.
    """
    z = _unit(z.detach())
    sim = product(z, z).masked_fill_(y[:, None] == y, -torch.inf)  # (B, B)
    top, negative = sim.topk(min(hardest, len(y)), dim=1)  # (B, hardest)
    a, x = in_bank(*bank_keys(y, _arange(y), pairing)).nonzero(as_tuple=True)  # (R,)
    pair = (x[:, None] * len(y) + negative[a])[top[a] > -torch.inf].unique()
    return pair // len(y), pair % len(y)


def bank_keys(y, i, pairing):
    """(label, id) of the anchors (2, B) and of the bank entries (2, M). See `in_bank`."""
    if pairing not in PAIRINGS:
        raise ValueError(f"pairing is {pairing!r}; choose one of {', '.join(PAIRINGS)}")
    anchor = _arange(y)
    if pairing == "anchor-negative":
        return torch.stack([anchor, anchor]), torch.stack([i, torch.full_like(i, -1)])
    return torch.stack([y, anchor]), torch.stack([y[i], i])


def in_bank(anchors, entries):
    """(A, M) mask: entry k is in V(a) if their labels are equal and their ids differ."""
    return (anchors[0, :, None] == entries[0]) & (anchors[1, :, None] != entries[1])


def _arange(x):
    return torch.arange(len(x), device=x.device)


# --------------------------------------------------------------------------------- what the losses share


def _unit(z):
    """Rows of length 1, at least float32."""
    return F.normalize(z if z.dtype == torch.float64 else z.float(), dim=1)


def _exponential(pull_scale, pull_base, push_scale, push_base):
    """Rho with exponents bounded by |s| <= 1, so that plain sums of exponentials neither overflow nor lose digits."""
    largest = max(pull_scale * (1 + pull_base), push_scale * (1 - push_base))
    if largest > MAX_EXPONENT:
        raise ValueError(f"exponents would reach {largest:.0f}, above {MAX_EXPONENT}; use smaller scales")
    return Rho(EXPONENTIAL, *map(float, (pull_scale, pull_base, push_scale, push_base)))


def _full_precision(method):
    """Check embeddings and labels, normalise the embeddings, and turn autocast off."""

    @functools.wraps(method)
    def wrapped(self, z, y, *args):
        if z.ndim != 2 or y.shape != z.shape[:1] or y.is_floating_point():
            got = f"{tuple(z.shape)} and {tuple(y.shape)} {y.dtype}"
            raise ValueError(f"expected embeddings (B, D) and integer labels (B,), got {got}")
        y = y.long()
        if len(y) and y.abs().max() >= 2**24:  # the kernels compare labels as float32
            y = y.unique(return_inverse=True)[1]
        with full_precision(z.device):
            return method(self, _unit(z), y, *args)

    return wrapped


class MetricLoss(nn.Module):
    """A loss with the batch itself as anchors. A subclass sets `rho` and writes `from_sums`; see Contrastive.

    precision: "bf16" rounds the embeddings of pairs to bfloat16: faster on a GPU; kernels/pairwise.py has the errors.
    """

    pairings = PAIRINGS  # training draws one of these each step
    epsilon = None  # with a number, clean pairs are mined; see kernels/pairwise.py

    def __init__(self, precision="fp32"):
        super().__init__()
        if precision not in ("fp32", "bf16"):
            raise ValueError(f"precision is {precision!r}; choose fp32 or bf16")
        self.precision = precision

    @_full_precision
    def forward(self, z, y):
        """Clean loss (scalar) of embeddings z (B, D) with labels y (B,)."""
        keys = torch.stack([y, _arange(y)])  # (2, B)
        return self.from_sums(*self.pair_sums(z, None, keys, keys, self.rho, self.epsilon))

    @_full_precision
    def mixed(self, z, y, v, i, lam, pairing):
        """Loss (scalar) of the anchors against a bank: v (M, D) embeds mix(x[i], x[j]), i: (M,), lam in [0, 1]."""
        if len(v) != len(i):
            raise ValueError(f"a bank of {len(v)} embeddings with {len(i)} indices")
        anchors, rows, columns = self.anchors(z, y, i, pairing)
        sums = self.pair_sums(anchors, _unit(v).to(z.dtype), rows, columns, self.rho, mixed=True)
        return self.from_sums(*sums, lam)

    @_full_precision
    def mixed_embed(self, z, y, lam, pairing):
        """Equals `mixed` with the full bank of v = lam*z[i] + (1-lam)*z[j], from Gram matrices alone."""
        anchors, rows, columns = self.anchors(z, y, _arange(y), pairing)
        a, p = in_bank(rows, columns).nonzero(as_tuple=True)  # (R,)
        return self.from_sums(*embed_sums(similarities(anchors, z), similarities(z, z), y, a, p, lam, self.rho), lam)

    def pair_sums(self, x, v, *rest, **options):
        if self.precision == "bf16":
            x, v = x.bfloat16(), None if v is None else v.bfloat16()
        return pair_sums(x, v, *rest, **options)

    def anchors(self, z, y, i, pairing):
        """Anchors (A, D), their keys (2, A) and those of bank entries with first example i (2, M). See `in_bank`."""
        return z, *bank_keys(y, i, pairing)

    def from_sums(self, pull, push, pulled, pushed, lam=None):
        """The loss from the sums of rho+ and rho- and the counts of their terms that are not zero, (A,) each.

        lam is None for the clean loss.
        """
        raise NotImplementedError


# --------------------------------------------------------------------------------------------- losses


class Contrastive(MetricLoss):
    """Pull positives together, push negatives beyond a margin (Hadsell et al. 2006).

    mean_nz d(a,p) + mean_nz relu(neg_margin - d(a,n)): d is the Euclidean distance, mean_nz the mean of the terms > 0.
    """

    def __init__(self, neg_margin=0.5, precision="fp32"):
        super().__init__(precision)
        self.neg_margin = neg_margin
        self.rho = Rho(HINGE, push_base=neg_margin)

    def from_sums(self, pull, push, pulled, pushed, lam=None):
        pull_weight, push_weight = (1, 1) if lam is None else (lam, 1 - lam)
        pull, push = pull.sum() / pulled.sum().clamp_min(1), push.sum() / pushed.sum().clamp_min(1)
        return pull_weight * pull + push_weight * push


class MultiSimilarity(MetricLoss):
    """Soft-weighted pairs, mined against the hardest of the other kind (Wang et al., CVPR 2019, arXiv 1904.06627).

    Mean over anchors of 1/alpha log(1 + sum_p e^{-alpha (s-base)}) + 1/beta log(1 + sum_n e^{beta (s-base)}).
    Clean pairs are mined: positives with s - epsilon < max_n s(a,n), negatives with s + epsilon > min_p s(a,p).
    """

    def __init__(self, ms_alpha=17.97, ms_beta=75.66, ms_base=0.77, ms_epsilon=0.39, precision="fp32"):
        super().__init__(precision)
        self.ms_alpha, self.ms_beta, self.ms_base, self.ms_epsilon = ms_alpha, ms_beta, ms_base, ms_epsilon
        self.rho, self.epsilon = _exponential(ms_alpha, ms_base, ms_beta, ms_base), ms_epsilon

    def from_sums(self, pull, push, pulled, pushed, lam=None):
        pull_weight, push_weight = (1, 1) if lam is None else (lam, 1 - lam)
        rows = torch.log1p(pull_weight * pull) / self.ms_alpha + torch.log1p(push_weight * push) / self.ms_beta
        return rows.sum() / max(len(rows), 1)


class ProxyAnchor(MetricLoss):
    """One learnt proxy per class is the anchor for the whole batch (Kim et al., CVPR 2020, arXiv 2003.13911).

    Mean over proxies with positives of log(1 + sum_p e^{-alpha (s-margin)}), plus mean over all proxies of
    log(1 + sum_n e^{alpha (s+margin)}). Mixed: both means run over the proxies with V(c) not empty.
    Labels are 0 .. num_classes-1. `pairing` has no effect.
    """

    pairings = ("anchor-negative",)  # its banks hold every example: singletons also have a proxy

    def __init__(self, num_classes, embedding_size, pa_alpha=32, pa_margin=0.1, precision="fp32"):
        super().__init__(precision)
        self.rho = _exponential(pa_alpha, pa_margin, pa_alpha, -pa_margin)
        self.pa_alpha, self.pa_margin = pa_alpha, pa_margin
        self.proxies = nn.Parameter(torch.empty(num_classes, embedding_size))  # (P, D)
        nn.init.kaiming_normal_(self.proxies, mode="fan_out")

    @_full_precision
    def forward(self, z, y):
        proxies, rows, columns = self.with_keys(self.proxies, _arange(self.proxies), z, self.check(z, y))
        return self.from_sums(*self.pair_sums(proxies, z, rows, columns, self.rho))

    def anchors(self, z, y, i, pairing):
        """The proxies of the batch's classes: no other proxy sees a mixed example."""
        classes = self.check(z, y).unique()
        return self.with_keys(self.proxies[classes], classes, z, y[i])

    def with_keys(self, proxies, classes, z, y):
        rows, columns = torch.stack([classes, torch.zeros_like(classes)]), torch.stack([y, torch.ones_like(y)])
        return _unit(proxies).to(z.dtype), rows, columns

    def check(self, z, y):
        if z.shape[1] != self.proxies.shape[1]:
            raise ValueError(f"embeddings have {z.shape[1]} columns, the proxies {self.proxies.shape[1]}")
        if len(y) and not 0 <= int(y.min()) <= int(y.max()) < len(self.proxies):
            raise ValueError(f"labels must lie in 0 .. {len(self.proxies) - 1}, got {int(y.min())} .. {int(y.max())}")
        return y

    def from_sums(self, pull, push, pulled, pushed, lam=None):
        with_positives = (pulled > 0).sum().clamp_min(1)
        if lam is None:
            return torch.log1p(pull).sum() / with_positives + torch.log1p(push).mean()
        return (torch.log1p(lam * pull) + torch.log1p((1 - lam) * push)).sum() / with_positives

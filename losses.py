"""Three metric-learning losses, and what Metrix adds to each: the same loss on mixed examples.

Every loss has three forms, all scalars:
    metric(z, y)                              clean: the batch against itself (or its proxies)
    metric.mixed(z, y, v, i, lam, pairing)    anchors against a bank v[k] = mix(x[i[k]], x[j[k]])
    metric.mixed_embed(z, y, lam, pairing)    the same over every possible mix of embeddings, none of them built

A mixed example is `lam` positive and `1 - lam` negative, so it enters both halves of a loss with these weights.
Which entries an anchor sees depends on the pairing, V(a) below; proxies as anchors know one pairing only.
    positive-negative   V(a) = { k : y[i_k] == y[a], i_k != a }
    anchor-negative     V(a) = { k : i_k == a }
    proxies             V(c) = { k : y[i_k] == c }

Shapes: B examples, A anchors, M bank entries, R rows, N columns, D embedding size, P classes (proxies).
Embeddings may be of any length and of any float type; the losses normalise them and compute in float32
(float64 if given that), under autocast too. Plain PyTorch without loops over anchors or pairs, or on GPUs and for large
batches the kernels. Labels and banks may stay on the CPU while embeddings are on a GPU: index lists are then made there,
and no loss waits for the GPU.
Method: Venkataramanan et al., It Takes Two to Tango, ICLR 2022, arXiv 2106.04990.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import nn

import kernels
from kernels import EXPONENTIAL, HINGE, TINY, Rho, pairwise, placed
from kernels import mixed as triplets

PAIRINGS = ("positive-negative", "anchor-negative")
MANY, MANY_TRIPLETS = 2**18, 2**14  # pairs and triplets from which on the kernels serve a CPU too


# ---------------------------------------------------------------------------------------------- banks


def full_bank(y, pairing):
    """Every ordered pair of different labels whose first can serve an anchor.

    y: (B,) integers. Returns i, j: int64 (M,), sorted by i, then j.
    """
    different = y[:, None] != y  # (B, B)
    can_serve = serves(y, _indices(y), pairing).any(0)  # (B,)
    return (different & can_serve[:, None]).nonzero(as_tuple=True)


def hardest_bank(z, y, pairing, hardest=1):
    """For every anchor a and every x that can serve it: (x, the `hardest` negatives of a), each pair once.

    Hardest is the highest similarity to a; no gradient flows through the choice.
    z: (B, D), y: (B,). Returns i, j: int64 (M,), sorted by i, then j; M <= hardest * (number of pairs a, x). As M
    depends on z, this waits for a GPU.
    """
    with torch.autocast(z.device.type, enabled=False):
        z = _unit(z.detach())
        sim = z @ z.T  # (B, B)
    sim = sim.masked_fill(placed(y[:, None] == y, z), -math.inf)
    top, negative = (x.to(y.device) for x in sim.topk(min(hardest, len(y)), dim=1))  # (B, hardest)
    a, x = serves(y, _indices(y), pairing).nonzero(as_tuple=True)  # (R,)
    pair = x[:, None] * len(y) + negative[a]  # (R, hardest), one number a pair
    pair = pair[top[a] > -math.inf].unique()
    return pair // len(y), pair % len(y)


def serves(y, i, pairing):
    """(B, len(i)) mask: may a mixed example whose first part is i[k] be shown to anchor a?"""
    _check_pairing(pairing)
    itself = _indices(y)[:, None] == i
    return itself if pairing == "anchor-negative" else (y[:, None] == y[i]) & ~itself


# ------------------------------------------------------------------------------- what the losses share


def distance(sim):
    """Euclidean distance of unit vectors from their cosine similarity; the gradient at sim = 1 is 0."""
    return (2 - 2 * sim).clamp_min(TINY).sqrt()


def sim_to_mixed(anchor_sim, sim, a, p, lam):
    """Similarity of anchor a[r] to mix(p[r], n), for every n of the batch, by the Gram identity

        s(a, mix(p, n)) = (lam s(a,p) + (1-lam) s(a,n)) / sqrt(lam^2 + (1-lam)^2 + 2 lam (1-lam) s(p,n))

    anchor_sim: (A, B) anchors against the batch; sim: (B, B); a, p: (R,). Returns (R, B).
    """
    length = (lam**2 + (1 - lam) ** 2 + 2 * lam * (1 - lam) * sim).clamp_min(TINY).sqrt()  # (B, B)
    mixed = lam * anchor_sim[a, p][:, None] + (1 - lam) * anchor_sim.index_select(0, a)  # (R, B)
    return mixed / length.index_select(0, p)


def mean_nonzero(terms, mask):
    """Mean over the strictly positive terms under the mask; 0 if there is none."""
    terms = terms * mask
    return terms.sum() / (terms > 0).sum().clamp_min(1)


def log1p_sum_exp(x, weight, mask, anchor, num_anchors):
    """log(1 + weight * sum of e^x), the sum over the masked entries of all rows of an anchor.

    x, mask: (R, N); anchor: (R,) the anchor of each row. Returns (num_anchors,), 0 where the mask is empty.
    The largest exponent is taken out first: nothing overflows or vanishes at any scale, and small sums keep
    their digits.
    """
    x = x + (math.log(weight) if weight > 0 else -math.inf)
    x = x.masked_fill(~mask, -math.inf)
    largest = x.new_zeros(num_anchors)
    if x.shape[1]:
        largest = largest.scatter_reduce(0, anchor, x.detach().amax(1), "amax")  # (A,), at least 0
    total = x.new_zeros(num_anchors).index_add(0, anchor, (x - largest[anchor, None]).exp().sum(1))
    return largest + torch.log1p(total + torch.expm1(-largest))


def _check_pairing(pairing):
    if pairing not in PAIRINGS:
        raise ValueError(f"pairing is {pairing!r}; choose one of {', '.join(PAIRINGS)}")


def _unit(z):
    """Rows at length 1, in float32 at least."""
    return F.normalize(z if z.dtype == torch.float64 else z.float(), dim=1)


def _indices(x):
    return torch.arange(len(x), device=x.device)


def _full_precision(method):
    """Autocast off, embeddings and labels checked, embeddings at length 1."""

    @functools.wraps(method)
    def wrapped(self, z, y, *args, **kwargs):
        if z.ndim != 2 or y.shape != z.shape[:1] or y.is_floating_point():
            raise ValueError(
                f"expected embeddings (B, D) and B integer labels, got {tuple(z.shape)} and {tuple(y.shape)} {y.dtype}"
            )
        with torch.autocast(z.device.type, enabled=False):
            return method(self, _unit(z), y.long(), *args, **kwargs)

    return wrapped


class MetricLoss(nn.Module):
    """What is common: who the anchors are, the clean and the two mixed forms. Each exists twice, and both are equal:

    in plain PyTorch, on matrices of all pairs: `clean(z, y)`, z of length 1, and `reduce(sim, mask, anchor, num_anchors,
        lam)`, the mixed loss given similarities (R, N) of anchors to mixed examples, which of them count (R, N), and the
        anchor each row belongs to (R,);
    as a function `of_sums` of sums over pairs that a kernel makes without holding any such matrix, given `rho`, the
        terms of a pair. It serves GPUs and large batches, and a loss may do without.
    """

    pairings = PAIRINGS  # the trainer draws one of these each step
    rho = None  # no kernel makes its sums

    @_full_precision
    def forward(self, z, y):
        """Clean loss of embeddings z (B, D) with integer labels y (B,)."""
        self.check(z, y)
        y = placed(y, z)
        if self.fused(z, len(z) * len(z), MANY):
            return self.of_sums(*self.clean_sums(z, y))
        return self.clean(z, y)

    @_full_precision
    def mixed(self, z, y, v, i, lam, pairing):
        """Loss of the anchors of a batch against a bank: v (M, D) embeds mix(x[i], x[j]), i: (M,), lam in [0, 1]."""
        _check_pairing(pairing)
        self.check(z, y)
        if len(v) != len(i):
            raise ValueError(f"a bank of {len(v)} embeddings with {len(i)} indices")
        anchors, v = self.anchors(z, y), _unit(v).to(z.dtype)  # (A, D), (M, D)
        if self.fused(z, len(anchors) * len(v), MANY):
            return self.of_sums(*pairwise.pair_sums(anchors, v, *self.shown(y, i, pairing, z), self.rho, mixed=True), lam)
        return self.reduce(anchors @ v.T, placed(self.serves(y, i, pairing), z), _indices(anchors), len(anchors), lam)

    @_full_precision
    def mixed_embed(self, z, y, lam, pairing):
        """Equals `mixed` over the full bank of lam*z[i] + (1-lam)*z[j] (z of length 1), from Gram matrices alone.

        With proxies that is the anchor-negative bank under either name.
        """
        _check_pairing(pairing)
        self.check(z, y)
        anchors = self.anchors(z, y)  # (A, D)
        a, p = self.serves(y, _indices(y), pairing).nonzero(as_tuple=True)  # (R,)
        a, p, y = placed(a, z), placed(p, z), placed(y, z)
        if self.fused(z, len(a) * len(z), MANY_TRIPLETS):
            return self.of_sums(*triplets.embed_sums(anchors @ z.T, z @ z.T, y, a, p, lam, self.rho), lam)
        sim = sim_to_mixed(anchors @ z.T, z @ z.T, a, p, lam)  # (R, B)
        return self.reduce(sim, y[p][:, None] != y, a, len(anchors), lam)

    def fused(self, z, terms, many):
        """Whether kernels make the sums of so many terms."""
        return terms > 0 and self.rho is not None and self.rho.is_served() and (terms > many or z.dtype != torch.float64 and kernels.use_triton(z))

    def clean_sums(self, z, y):
        """What `of_sums` takes, of the batch against itself."""
        here = _indices(y)
        return pairwise.pair_sums(z, None, pairwise.Rows(y, here), pairwise.Columns(y, here), self.rho)

    def anchors(self, z, y):
        return z

    def serves(self, y, i, pairing):
        return serves(y, i, pairing)

    def shown(self, y, i, pairing, z):
        """`serves`, as labels and ids of rows and columns: equal labels and different ids are shown to each other."""
        here, of_column = _indices(z), placed(i, z)
        if pairing == "anchor-negative":
            return pairwise.Rows(here, here), pairwise.Columns(of_column, torch.full_like(of_column, -1))
        return pairwise.Rows(placed(y, z), here), pairwise.Columns(placed(y[i], z), of_column)

    def check(self, z, y):
        """Raise ValueError for what this loss cannot take."""


# --------------------------------------------------------------------------------------------- losses


class Contrastive(MetricLoss):
    """Pull positives together, push negatives beyond a margin (Hadsell et al. 2006).

    mean_nonzero(d(a,p)) + mean_nonzero(relu(neg_margin - d(a,n))), d the Euclidean distance.
    """

    def __init__(self, neg_margin=0.5):
        super().__init__()
        self.neg_margin = neg_margin

    @property
    def rho(self):
        return Rho(HINGE, push_base=self.neg_margin)

    def clean(self, z, y):
        dist = distance(z @ z.T)  # (B, B)
        same = y[:, None] == y
        itself = torch.eye(len(y), dtype=torch.bool, device=y.device)
        return mean_nonzero(dist, same & ~itself) + mean_nonzero(F.relu(self.neg_margin - dist), ~same)

    def reduce(self, sim, mask, anchor, num_anchors, lam):
        dist = distance(sim)
        return mean_nonzero(lam * dist, mask) + mean_nonzero((1 - lam) * F.relu(self.neg_margin - dist), mask)

    def of_sums(self, pull, push, pulled, pushed, lam=None):
        pull_weight, push_weight = (1, 1) if lam is None else (lam, 1 - lam)
        pull, push = pull.sum() / pulled.sum().clamp_min(1), push.sum() / pushed.sum().clamp_min(1)
        return pull_weight * pull + push_weight * push


class MultiSimilarity(MetricLoss):
    """Soft-weighted pairs, mined against the hardest of the other kind (Wang et al., CVPR 2019, arXiv 1904.06627).

    Mean over the batch of 1/alpha log(1 + sum_p e^{-alpha (s-base)}) + 1/beta log(1 + sum_n e^{beta (s-base)}).
    """

    def __init__(self, ms_alpha=17.97, ms_beta=75.66, ms_base=0.77, ms_epsilon=0.39):
        super().__init__()
        self.ms_alpha, self.ms_beta, self.ms_base, self.ms_epsilon = ms_alpha, ms_beta, ms_base, ms_epsilon

    @property
    def rho(self):
        return Rho(EXPONENTIAL, self.ms_alpha, self.ms_base, self.ms_beta, self.ms_base)

    def clean(self, z, y):
        sim = z @ z.T  # (B, B)
        positive, negative = self.mine(sim.detach(), y)
        return self.row_loss(sim, positive, negative, _indices(y), len(y), 1, 1)

    def reduce(self, sim, mask, anchor, num_anchors, lam):
        return self.row_loss(sim, mask, mask, anchor, num_anchors, lam, 1 - lam)

    def mine(self, sim, y):
        """Positives less similar than the most similar negative, and the reverse, each with room ms_epsilon."""
        same = y[:, None] == y
        positive, negative = same.clone().fill_diagonal_(False), ~same
        hardest_negative = sim.masked_fill(~negative, -math.inf).amax(1, keepdim=True)
        hardest_positive = sim.masked_fill(~positive, math.inf).amin(1, keepdim=True)
        return positive & (sim - self.ms_epsilon < hardest_negative), negative & (sim + self.ms_epsilon > hardest_positive)

    def row_loss(self, sim, positive, negative, anchor, num_anchors, positive_weight, negative_weight):
        sim = sim - self.ms_base
        pull = log1p_sum_exp(-self.ms_alpha * sim, positive_weight, positive, anchor, num_anchors) / self.ms_alpha
        push = log1p_sum_exp(self.ms_beta * sim, negative_weight, negative, anchor, num_anchors) / self.ms_beta
        return (pull + push).sum() / max(num_anchors, 1)

    def clean_sums(self, z, y):
        rows = columns = pairwise.Columns(y, _indices(y))
        positive, negative = pairwise.extremes(z.detach(), z.detach(), pairwise.Rows(*rows), columns)
        mined = pairwise.Rows(*rows, below=negative + self.ms_epsilon, above=positive - self.ms_epsilon)
        return pairwise.pair_sums(z, None, mined, columns, self.rho)

    def of_sums(self, pull, push, pulled, pushed, lam=None):
        pull_weight, push_weight = (1, 1) if lam is None else (lam, 1 - lam)
        rows = torch.log1p(pull_weight * pull) / self.ms_alpha + torch.log1p(push_weight * push) / self.ms_beta
        return rows.sum() / max(len(rows), 1)


class ProxyAnchor(MetricLoss):
    """One learnt proxy a class is the anchor of the whole batch (Kim et al., CVPR 2020, arXiv 2003.13911).

    Mean over proxies with positives of log(1 + sum_p e^{-alpha (s-margin)}), plus mean over all proxies of
    log(1 + sum_n e^{alpha (s+margin)}). Labels are 0 .. num_classes-1. `pairing` is accepted and has no effect.
    """

    pairings = ("anchor-negative",)  # its banks: every example serves its class's proxy, singletons too

    def __init__(self, num_classes, embedding_size, pa_alpha=32, pa_margin=0.1):
        super().__init__()
        self.pa_alpha, self.pa_margin = pa_alpha, pa_margin
        self.proxies = nn.Parameter(torch.empty(num_classes, embedding_size))  # (P, D)
        nn.init.kaiming_normal_(self.proxies, mode="fan_out")

    @property
    def rho(self):
        return Rho(EXPONENTIAL, self.pa_alpha, self.pa_margin, self.pa_alpha, -self.pa_margin)

    def clean(self, z, y):
        proxies = _unit(self.proxies).to(z.dtype)
        classes = _indices(proxies)
        same = classes[:, None] == y  # (P, B)
        pull, push = self.row_losses(proxies @ z.T, same, ~same, classes, len(proxies), 1, 1)
        return pull.sum() / same.any(1).sum().clamp_min(1) + push.mean()

    def reduce(self, sim, mask, anchor, num_anchors, lam):
        pull, push = self.row_losses(sim, mask, mask, anchor, num_anchors, lam, 1 - lam)
        shown = sim.new_zeros(num_anchors).index_add(0, anchor, mask.any(1).to(sim.dtype)) > 0
        return (pull + push).sum() / shown.sum().clamp_min(1)

    def row_losses(self, sim, positive, negative, anchor, num_anchors, positive_weight, negative_weight):
        pull = -self.pa_alpha * (sim - self.pa_margin)
        push = self.pa_alpha * (sim + self.pa_margin)
        return (
            log1p_sum_exp(pull, positive_weight, positive, anchor, num_anchors),
            log1p_sum_exp(push, negative_weight, negative, anchor, num_anchors),
        )

    def clean_sums(self, z, y):
        proxies = _unit(self.proxies).to(z.dtype)
        return pairwise.pair_sums(proxies, z, *self.by_class(_indices(proxies), y), self.rho)

    def of_sums(self, pull, push, pulled, pushed, lam=None):
        shown = (pulled > 0).sum().clamp_min(1)
        if lam is None:
            return torch.log1p(pull).sum() / shown + torch.log1p(push).mean()
        return (torch.log1p(lam * pull) + torch.log1p((1 - lam) * push)).sum() / shown

    def anchors(self, z, y):
        """The proxies of the batch's classes: no other proxy sees a mixed example."""
        return _unit(self.proxies[placed(y.unique(), z)]).to(z.dtype)

    def serves(self, y, i, pairing):
        return y.unique()[:, None] == y[i]

    def shown(self, y, i, pairing, z):
        return self.by_class(placed(y.unique(), z), placed(y[i], z))

    def by_class(self, rows, columns):
        """Labels of rows and columns, and ids that never meet."""
        return pairwise.Rows(rows, torch.zeros_like(rows)), pairwise.Columns(columns, torch.ones_like(columns))

    def check(self, z, y):
        num_classes, embedding_size = self.proxies.shape
        if z.shape[1] != embedding_size:
            raise ValueError(f"embeddings have {z.shape[1]} columns, the proxies {embedding_size}")
        if len(y) and not 0 <= int(y.min()) <= int(y.max()) < num_classes:
            raise ValueError(f"labels must lie in 0 .. {num_classes - 1}, got {int(y.min())} .. {int(y.max())}")

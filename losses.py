"""Three metric-learning losses. Metrix adds to each the same loss on mixed examples.

An anchor a has positives p, the examples of its class, and negatives n, all others. With the cosine similarity s:

    clean(a) = sigma+(       sum_p rho+(s(a, p)) ) + sigma-(           sum_n rho-(s(a, n)) )
    mixed(a) = sigma+( lam * sum_v rho+(s(a, v)) ) + sigma-( (1-lam) * sum_v rho-(s(a, v)) ),      v in V(a)

                        rho+(s)            rho-(s)            sigma+(x)            sigma-(x)
    contrastive         d                  relu(margin - d)   x                    x
    multi-similarity    e^{-alpha (s-b)}   e^{beta (s-b)}     log(1 + x) / alpha   log(1 + x) / beta
    proxy anchor        e^{-alpha (s-m)}   e^{alpha (s+m)}    log(1 + x)           log(1 + x)

A mixed example is v = lam x + (1-lam) n. Here n is a negative of a, and x is a positive of a, or a itself. v counts as
a positive with weight lam, and as a negative with weight 1 - lam. In the code, pull is the sum of rho+ and push is the
sum of rho-. A loss sets `rho` and writes `from_sums`, which applies sigma and takes a mean.

    metric(z, y)                              the clean loss of a batch
    metric.mixed(z, y, v, i, lam, pairing)    the mixed loss; v[k] is the embedding of a mix of examples i[k] and j[k]
    metric.mixed_embed(z, y, lam, pairing)    the mixed loss over all mixes of embeddings, none of them stored

The pairs (i[k], j[k]) that are mixed in a batch are its bank. V(a) are the mixed examples k that anchor a sees, that
is, is compared with. They depend on the pairing.

    positive-negative   V(a) = { k : y[i[k]] == y[a], i[k] != a }
    anchor-negative     V(a) = { k : i[k] == a }
    a proxy c           V(c) = { k : y[i[k]] == c }, whatever the pairing

Shapes: B examples, A anchors, M mixed examples, D embedding size, P classes (proxies), R pairs (a, i) where a sees i.
Source: Venkataramanan et al., It Takes Two to Tango, ICLR 2022, arXiv 2106.04990.
"""

import torch
from torch import nn

from kernels import product, similarities
from kernels.pairwise import EPS, Rho, in_pieces, masked_sums, pair_sums

PAIRINGS = ("positive-negative", "anchor-negative")
MAX_EXPONENT = 70  # a million terms of e^70 fit in float32


class MetricLoss(nn.Module):
    """A loss. A subclass sets `rho` and writes `from_sums`. Its anchors are the examples of the batch, unless it
    replaces `forward` and `anchors`.

    Embeddings z (B, D) need not be normalised, and may have any float type. Labels y (B,) are integers in a tensor, an
    array or a list. A loss is computed in float32, also under autocast. It is computed in float64 if z is float64.
    """

    pairings = PAIRINGS  # training draws one of these in each step
    epsilon = None  # mining margin of the clean loss; None keeps every pair

    def forward(self, z, y):
        """The clean loss, a scalar."""
        z, y = prepare(z, y)
        keys = torch.stack([y, indices(y)])  # (2, B) (group, id) of every example, see `visible`
        return self.from_sums(*pair_sums(z, z, keys, keys, self.rho, self.epsilon))

    def mixed(self, z, y, v, i, lam, pairing):
        """The mixed loss, a scalar. v: (M, D) embeddings of mixed examples. i: (M,) index of the first part of each."""
        z, y = prepare(z, y)
        i = torch.as_tensor(i, device=z.device).long()
        if len(v) != len(i):
            raise ValueError(f"v has {len(v)} rows, but i has {len(i)}")
        anchors, anchor_keys, keys = self.anchors(z, y, i, pairing)
        sums = pair_sums(anchors, unit(v).to(z.dtype), anchor_keys, keys, self.rho, mixed=True)
        return self.from_sums(*sums, lam, 1 - lam)

    def mixed_embed(self, z, y, lam, pairing):
        """Equals `mixed` over full_bank (for proxies the one of anchor-negative), where v mixes the normalised
        embeddings. It needs only their similarities:

        s(a, v) = (lam s(a, i) + (1-lam) s(a, j)) / |v|,      |v|^2 = lam^2 + (1-lam)^2 + 2 lam (1-lam) s(i, j)
        """
        z, y = prepare(z, y)
        anchors, anchor_keys, keys = self.anchors(z, y, indices(y), pairing)
        s = similarities(z, z)  # (B, B)
        to_anchors = s if anchors is z else similarities(anchors, z)  # (A, B)
        length = (lam**2 + (1 - lam) ** 2 + 2 * lam * (1 - lam) * s).clamp_min(EPS).sqrt()  # (B, B)

        def sums_over_j(a, i):
            to_mixed = (lam * to_anchors[a, i, None] + (1 - lam) * to_anchors[a]) / length[i]  # (R, B)
            to_mixed = to_mixed.clamp(-1, 1)  # because a mix of opposite embeddings is mostly rounding error
            other_class = y[i, None] != y
            return masked_sums(to_mixed, other_class, other_class, self.rho)

        pair_a, pair_i = visible(anchor_keys, keys).nonzero(as_tuple=True)  # (R,) pairs of an anchor and a first part
        sums = torch.stack(in_pieces(sums_over_j, len(y), pair_a, pair_i))  # (4, R)
        sums = s.new_zeros(4, len(anchors)).index_add(1, pair_a, sums)  # (4, A)
        return self.from_sums(*sums, lam, 1 - lam)

    def anchors(self, z, y, i, pairing):
        """Returns the anchors (A, D), their keys (2, A), and the keys (2, M) of the mixed examples."""
        return z, *membership_keys(y, i, pairing)

    def from_sums(self, pull, push, num_pull, num_push, pull_weight=1, push_weight=1):
        """The loss. pull, push: (A,) every anchor's sums of rho+ and rho-. num_pull, num_push: (A,) how many of their
        terms are above zero. The weights are 1 in a clean loss, and lam and 1 - lam in a mixed one.
        """
        raise NotImplementedError


# --------------------------------------------------------------------------------------------- losses


class Contrastive(MetricLoss):
    """Pulls positives together and pushes negatives beyond a margin (Hadsell et al. 2006).

    mean_nz d(a, p) + mean_nz relu(neg_margin - d(a, n)), with the Euclidean distance d. mean_nz is the mean of the
    terms above zero. It runs over all pairs of the batch, not over anchors.
    """

    def __init__(self, neg_margin=0.5):
        super().__init__()
        self.neg_margin = neg_margin
        self.rho = Rho("hinge", push_base=float(neg_margin))

    def from_sums(self, pull, push, num_pull, num_push, pull_weight=1, push_weight=1):
        pull_mean = pull.sum() / num_pull.sum().clamp_min(1)
        push_mean = push.sum() / num_push.sum().clamp_min(1)
        return pull_weight * pull_mean + push_weight * push_mean


class MultiSimilarity(MetricLoss):
    """Gives hard pairs more weight (Wang et al., CVPR 2019, arXiv 1904.06627). The mean over anchors of

    1/alpha log(1 + sum_p e^{-alpha (s-base)}) + 1/beta log(1 + sum_n e^{beta (s-base)}).

    The clean loss drops easy pairs. It keeps positives with s - epsilon < max_n s(a, n), and negatives with
    s + epsilon > min_p s(a, p).
    """

    def __init__(self, ms_alpha=17.97, ms_beta=75.66, ms_base=0.77, ms_epsilon=0.39):
        super().__init__()
        self.ms_alpha, self.ms_beta, self.ms_base, self.ms_epsilon = ms_alpha, ms_beta, ms_base, ms_epsilon
        self.rho = exponential_rho(ms_alpha, ms_base, ms_beta, ms_base)
        self.epsilon = ms_epsilon

    def from_sums(self, pull, push, num_pull, num_push, pull_weight=1, push_weight=1):
        pull, push = torch.log1p(pull_weight * pull), torch.log1p(push_weight * push)
        return (pull / self.ms_alpha + push / self.ms_beta).sum() / max(len(pull), 1)


class ProxyAnchor(MetricLoss):
    """Compares the batch with one learnt proxy for each class (Kim et al., CVPR 2020, arXiv 2003.13911).

    mean_c log(1 + sum_p e^{-alpha (s-margin)}), over the proxies c that have positives,
    + mean_c log(1 + sum_n e^{alpha (s+margin)}), over all proxies c.

    In a mixed loss both means are over the proxies that see a mixed example. Labels are 0 .. num_classes-1. The
    optimizer needs the proxies too: [*model.parameters(), *metric.parameters()].
    """

    pairings = ("anchor-negative",)  # because positive-negative leaves out images that are alone in their class

    def __init__(self, num_classes, embedding_size, pa_alpha=32, pa_margin=0.1):
        super().__init__()
        self.pa_alpha, self.pa_margin = pa_alpha, pa_margin
        self.rho = exponential_rho(pa_alpha, pa_margin, pa_alpha, -pa_margin)
        self.proxies = nn.Parameter(torch.empty(num_classes, embedding_size))  # (P, D)
        nn.init.kaiming_normal_(self.proxies, mode="fan_out")

    def forward(self, z, y):
        z, y = prepare(z, y)
        self.check(z, y)
        proxies = unit(self.proxies).to(z.dtype)
        anchor_keys, keys = proxy_keys(indices(proxies), y)
        return self.from_sums(*pair_sums(proxies, z, anchor_keys, keys, self.rho))

    def from_sums(self, pull, push, num_pull, num_push, pull_weight=1, push_weight=1):
        pull, push = torch.log1p(pull_weight * pull), torch.log1p(push_weight * push)
        return pull.sum() / (num_pull > 0).sum().clamp_min(1) + push.sum() / max(len(push), 1)

    def anchors(self, z, y, i, pairing):
        self.check(z, y)
        classes = y[i].unique()
        return unit(self.proxies[classes]).to(z.dtype), *proxy_keys(classes, y[i])

    def check(self, z, y):
        if z.shape[1] != self.proxies.shape[1]:
            raise ValueError(f"embeddings have {z.shape[1]} columns, the proxies {self.proxies.shape[1]}")
        lowest, highest = torch.stack(y.aminmax()).tolist() if len(y) else (0, 0)  # one read from a GPU
        if lowest < 0 or highest >= len(self.proxies):
            raise ValueError(f"labels must lie in 0 .. {len(self.proxies) - 1}, got {lowest} .. {highest}")


def proxy_keys(classes, y):
    """Keys of proxies and of examples. Proxies have id 0 and examples id 1, so an equal label makes a positive pair."""
    return torch.stack([classes, torch.zeros_like(classes)]), torch.stack([y, torch.ones_like(y)])


def exponential_rho(pull_scale, pull_base, push_scale, push_base):
    """A Rho of exponentials. |s| <= 1 bounds the exponents, so plain sums do not overflow. ValueError if they could."""
    largest = max(pull_scale * (1 + pull_base), push_scale * (1 - push_base))
    if largest > MAX_EXPONENT:
        raise ValueError(f"exponents would reach {largest:.0f}, above {MAX_EXPONENT}; use smaller scales")
    return Rho("exponential", *map(float, (pull_scale, pull_base, push_scale, push_base)))


# ------------------------------------------------------------------------------ which pairs are mixed


def full_bank(y, pairing):
    """All pairs (i, j) with different labels, if some anchor sees i. y: (B,) integers.

    With positive-negative, no anchor sees an image that is alone in its class. Returns i, j: int64 (M,), sorted.
    """
    y = torch.as_tensor(y)
    seen = visible(*membership_keys(y, indices(y), pairing)).any(0)  # (B,)
    return ((y[:, None] != y) & seen[:, None]).nonzero(as_tuple=True)


def hardest_bank(z, y, pairing, hardest=1):
    """For every anchor a, pairs each i that a sees with the negatives j most similar to a, as many as `hardest` says.

    z: (B, D), y: (B,). Returns i, j: int64 (M,), sorted, without duplicates. The choice has no gradient.
    """
    z, y = prepare(z.detach(), y)
    different = y[:, None] != y  # (B, B)
    s = product(z, z).masked_fill(~different, -torch.inf)
    nearest = s.topk(min(hardest, len(y)), dim=1).indices  # (B, hardest)
    hard = torch.zeros_like(different).scatter(1, nearest, True) & different  # (a, j): j is a hard negative of a
    seen = visible(*membership_keys(y, indices(y), pairing))  # (a, i): a sees i
    return (product(seen.float().T, hard.float().T) > 0).nonzero(as_tuple=True)  # (i, j) for which some a has both


def membership_keys(y, i, pairing):
    """Keys (group, id) of the anchors (2, B) and of the mixed examples (2, M). See `visible`."""
    if pairing not in PAIRINGS:
        raise ValueError(f"pairing is {pairing!r}; choose one of {', '.join(PAIRINGS)}")
    anchor = indices(y)
    if pairing == "anchor-negative":
        no_id = torch.full_like(i, -1)
        return torch.stack([anchor, anchor]), torch.stack([i, no_id])
    return torch.stack([y, anchor]), torch.stack([y[i], i])


def visible(anchor_keys, keys):
    """(A, M) whether k is in V(a). One rule holds for every pairing: the groups are equal and the ids differ."""
    return (anchor_keys[0, :, None] == keys[0]) & (anchor_keys[1, :, None] != keys[1])


# ------------------------------------------------------------------------------------------ embeddings


def prepare(z, y):
    """Checks the inputs. Returns embeddings of length 1, at least float32, and labels as int64 on their device."""
    y = torch.as_tensor(y, device=z.device)
    if z.ndim != 2 or y.shape != z.shape[:1] or (len(y) and y.is_floating_point()):
        got = f"{tuple(z.shape)} and {tuple(y.shape)} {y.dtype}"
        raise ValueError(f"expected embeddings (B, D) and integer labels (B,), got {got}")
    return unit(z), y.long()


def unit(z):
    """Rows of length 1, at least float32."""
    z = z if z.dtype == torch.float64 else z.float()
    return z * z.square().sum(1, keepdim=True).clamp_min(EPS**2).rsqrt()  # F.normalize, with a faster gradient


def indices(x):
    return torch.arange(len(x), device=x.device)

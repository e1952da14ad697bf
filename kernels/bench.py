"""Time the kernels against the alternatives on this machine: a table for people, a JSON line for programs.

    ./run.sh bench [pairwise|mixed|mix_pool|recall|step|all] [--sizes 100,2048] [--json FILE] [--deadline SECONDS]

Every form of a case runs once and is compared with ours before anything is timed. Then all forms take turns on rotating
inputs, and the median counts, forward and backward together. "ours" is what the program itself picks: Triton on a GPU,
PyTorch on a CPU. A form that fails is a cell that says so. Rates count the arithmetic or the bytes that the problem
needs at least; the ceilings are a large product and a large copy in the same run. Memory is the peak beyond the inputs.
"""

import argparse
import ctypes
import datetime
import importlib
import itertools
import json
import os
import platform
import statistics
import sys
import time

import torch
import torch.nn.functional as F

import eval
import kernels
import losses
import metrix
import model as models
from kernels import mix_pool, top_k

D, INPUTS = 512, 3  # embedding size; sets of inputs that take turns
SECONDS = 12  # per case, about; at most 30 repetitions of each form
SIZES = {
    "cpu": dict(pairwise=(100, 2048, 8192), mixed=(100, 300), mix_pool=(40,), recall=(5924, 20000), step=(100,)),
    "cuda": dict(pairwise=(100, 4096, 16384, 65536), mixed=(100, 300, 1000), mix_pool=(100,), recall=(5924, 60502)),
}
SIZES["cuda"] |= dict(step=(100,))

# ------------------------------------------------------------------------------------------ measuring


def seconds(form, k, device):
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        form(k)
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000
    start = time.perf_counter()
    form(k)
    return time.perf_counter() - start


def peak_mib(form, device):
    """MiB that one call needs beyond what is allocated; None where the system does not say."""
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        form(0)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # return what earlier calls have freed
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # reset the peak
    except OSError:
        return None
    before = process_mib("VmRSS")
    form(0)
    return process_mib("VmHWM") - before


def process_mib(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith(field))


def differs(result, expected, tolerance):
    """Whether any tensor differs by more than the tolerance times the largest expected element."""
    pairs = ((one.double(), other.double()) for one, other in zip(result, expected))
    return any(not (one - other).abs().max() <= tolerance * other.abs().max().clamp_min(1e-12) for one, other in pairs)


def measure(case, device):
    """{"kernel", "case", "size", "forms": {name: {"ms", "mib"} or {"failed"}}, "rate", "unit"}."""
    row = {name: case[name] for name in ("kernel", "case", "size")} | dict(forms={})
    expected, valid, slowest = None, {}, 1e-3
    for name, form in case["forms"].items():
        try:
            result = form(0)
            if expected is not None and differs(result, expected, case["tolerance"]):
                row["forms"][name] = dict(failed="wrong")
                continue
            expected = result if expected is None else expected
            start = time.perf_counter()
            row["forms"][name] = dict(mib=peak_mib(form, device))
            slowest = max(slowest, time.perf_counter() - start)
            valid[name] = form
        except ImportError as error:
            row["forms"][name] = dict(failed=f"{error.name} is not installed")
        except Exception as error:  # out of memory, a compiler that is missing: the other forms go on
            memory = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)
            row["forms"][name] = dict(failed="out of memory" if memory else type(error).__name__)
    times = {name: [] for name in valid}
    for turn in range(max(3, min(30, int(SECONDS / slowest)))):
        for name, form in valid.items():
            times[name].append(seconds(form, turn % INPUTS, device))
    for name in valid:
        row["forms"][name]["ms"] = 1000 * statistics.median(times[name])
    if "ours" in valid and case["unit"]:
        scale = 1e9 if case["unit"] == "TFLOP/s" else 1e6
        row["rate"], row["unit"] = case["work"] / row["forms"]["ours"]["ms"] / scale, case["unit"]
    return row


def ceilings(device):
    """GB/s of a large copy, and TFLOP/s of large products."""
    big, side = torch.randn(2**26 if device == "cuda" else 2**24, device=device), 8192 if device == "cuda" else 2048
    target, (a, b) = torch.empty_like(big), torch.randn(2, side, side, device=device)
    flop = 2 * side**3 / 1e12
    forms = {"GB/s": (lambda k: target.copy_(big), 8 * len(big) / 1e9)}
    forms["TFLOP/s"] = (lambda k: kernels.product(a, b), flop)
    if device == "cuda":
        half, other = a.bfloat16(), b.bfloat16()
        forms["bf16 TFLOP/s"] = (lambda k: half @ other, flop)
    for form, _ in forms.values():
        form(0)
    medians = {name: statistics.median(seconds(form, 0, device) for _ in range(7)) for name, (form, _) in forms.items()}
    return {name: forms[name][1] / median for name, median in medians.items()}


# ---------------------------------------------------------------------------------------------- cases


def clustered(B, per_class, device, k):
    """Unit embeddings in classes of `per_class`, neither collapsed nor separate, and their labels."""
    generator = torch.Generator().manual_seed(k)
    y = torch.arange(B) // per_class
    z = torch.randn(B // per_class + 1, D, generator=generator)[y] + 1.5 * torch.randn(B, D, generator=generator)
    return F.normalize(z, dim=1).to(device), y.to(device)


def gradient_of(function, z):
    z = z.detach().requires_grad_()
    value = function(z)
    return [value.detach(), *torch.autograd.grad(value, z)]


def in_torch(function):
    """The function with the kernels' plain form."""

    def run(k):
        before, kernels.backend = kernels.backend, "torch"
        try:
            return function(k)
        finally:
            kernels.backend = before

    return run


def on_matrices(name, metric, z, y):
    """A clean loss on whole matrices under autograd: what one writes first."""
    z, same = F.normalize(z, dim=1), y[:, None] == y
    if name == "proxyanchor":
        s = F.normalize(metric.proxies, dim=1) @ z.T
        same = torch.arange(len(s), device=y.device)[:, None] == y
        pull = ((-metric.pa_alpha * (s - metric.pa_margin)).exp() * same).sum(1).log1p()
        push = ((metric.pa_alpha * (s + metric.pa_margin)).exp() * ~same).sum(1).log1p()
        return pull.sum() / same.any(1).sum() + push.mean()
    s, positive = z @ z.T, same & ~torch.eye(len(y), dtype=torch.bool, device=y.device)
    if name == "contrastive":
        d = (2 - 2 * s).clamp_min(1e-12).sqrt()
        hinge = (metric.neg_margin - d).relu() * ~same
        return (d * positive).sum() / positive.sum().clamp_min(1) + hinge.sum() / (hinge > 0).sum().clamp_min(1)
    kept_positive = positive & (s - metric.ms_epsilon < s.masked_fill(same, -9).amax(1, keepdim=True))
    kept_negative = ~same & (s + metric.ms_epsilon > s.masked_fill(~positive, 9).amin(1, keepdim=True))
    pull = ((-metric.ms_alpha * (s - metric.ms_base)).exp() * kept_positive).sum(1).log1p() / metric.ms_alpha
    push = ((metric.ms_beta * (s - metric.ms_base)).exp() * kept_negative).sum(1).log1p() / metric.ms_beta
    return (pull + push).mean()


def pml_loss(name, metric, z, y):
    """pytorch-metric-learning's loss and miner with the same definition."""
    library = importlib.import_module("pytorch_metric_learning.losses")
    if name == "contrastive":
        return library.ContrastiveLoss(pos_margin=0, neg_margin=metric.neg_margin)(z, y)
    if name == "multisimilarity":
        miner = importlib.import_module("pytorch_metric_learning.miners").MultiSimilarityMiner(metric.ms_epsilon)
        return library.MultiSimilarityLoss(metric.ms_alpha, metric.ms_beta, metric.ms_base)(z, y, miner(z, y))
    loss = library.ProxyAnchorLoss(*metric.proxies.shape, margin=metric.pa_margin, alpha=metric.pa_alpha)
    loss.proxies = metric.proxies
    return loss(z, y)


def pairwise_cases(device, sizes):
    compiled = torch.compile(on_matrices, dynamic=False)
    for name, B in itertools.product(metrix.LOSSES, sizes):
        inputs = [clustered(B, 4, device, k) for k in range(INPUTS)]
        torch.manual_seed(0)
        metric = metrix.LOSSES[name](B // 4 + 1, D).to(device)

        def timed(loss, inputs=inputs):
            return lambda k: gradient_of(lambda z: loss(z, inputs[k][1]), inputs[k][0])

        forms = {"ours": timed(metric)}
        if device == "cuda":
            forms["plain"] = in_torch(timed(metric))
        forms["whole matrix"] = timed(lambda z, y, n=name, m=metric: on_matrices(n, m, z, y))
        if B <= 4096:
            forms["torch.compile"] = timed(lambda z, y, n=name, m=metric: compiled(n, m, z, y))
        forms["pytorch-metric-learning"] = timed(lambda z, y, n=name, m=metric: pml_loss(n, m, z, y))
        columns = B // 4 + 1 if name == "proxyanchor" else B
        work = 6 * columns * B * D  # the product, and in the backward pass the product again and that with its gradient
        yield dict(case=f"{name}, B={B:,}", size=B, forms=forms, tolerance=1e-3, work=work, unit="TFLOP/s")


def mixed_cases(device, sizes):
    for name, B in itertools.product(metrix.LOSSES, sizes):
        inputs = [clustered(B, 5, device, k) for k in range(INPUTS)]
        torch.manual_seed(0)
        metric = metrix.LOSSES[name](B // 5 + 1, D).to(device)
        pairing = metric.pairings[0]

        def ours(k, metric=metric, inputs=inputs, pairing=pairing):
            return gradient_of(lambda z: metric.mixed_embed(z, inputs[k][1], 0.4, pairing), inputs[k][0])

        def built(k, metric=metric, inputs=inputs, pairing=pairing):
            z, y = inputs[k]
            i, j = losses.full_bank(y, pairing)

            def loss(z):
                z = F.normalize(z, dim=1)
                return metric.mixed(z, y, 0.4 * z[i] + 0.6 * z[j], i, 0.4, pairing)

            return gradient_of(loss, z)

        forms = {"ours": ours, "plain": in_torch(ours)} if device == "cuda" else {"ours": ours}
        forms["bank built"] = built
        yield dict(case=f"{name}, B={B:,}", size=B, forms=forms, tolerance=1e-3, work=6 * B * B * D, unit="TFLOP/s")


def mix_pool_cases(device, sizes):
    for B in sizes:
        C, side = 2048, 7
        i, j = losses.full_bank(torch.arange(B, device=device) // 5, "positive-negative")
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        maps = [torch.randn(B, C, side, side, device=device).relu_().to(dtype) for _ in range(INPUTS)]
        maps = [m.contiguous(memory_format=torch.channels_last) for m in maps]

        def naive(features, i=i, j=j):
            mixed = (0.4 * features[i] + 0.6 * features[j]).flatten(2)
            return mixed.mean(2) + mixed.max(2).values

        def summed(function, maps=maps):
            return lambda k: gradient_of(lambda features: function(features).sum(), maps[k])

        ours = summed(lambda features, i=i, j=j: mix_pool.mix_pool(features, i, j, 0.4))
        forms = {"ours": ours, "plain": in_torch(ours)} if device == "cuda" else {"ours": ours}
        forms |= {"whole maps": summed(naive), "torch.compile": summed(torch.compile(naive, dynamic=False))}
        size = maps[0].element_size()
        work = 2 * size * maps[0].numel() + len(i) * C * (2 * size + 3)  # maps in and out; pooled, its gradient, bytes
        title, tolerance = f"{B} maps of {C} x {side} x {side}, {len(i):,} pairs", 3e-2 if device == "cuda" else 1e-3
        yield dict(case=title, size=B, forms=forms, tolerance=tolerance, work=work, unit="GB/s")


def recall_cases(device, sizes):
    ks = (1, 10, 100, 1000)
    for N in sizes:
        inputs = [clustered(N, 5, device, k) for k in range(INPUTS)]
        most = min(1001, N)

        def hits(nearest, y):
            """Recall from each query's nearest items, of which it is one."""
            others = nearest != torch.arange(len(y), device=y.device)[:, None]
            right = (y[nearest] == y[:, None]) & others
            place = others.cumsum(1) - 1
            return [torch.tensor([(right & (place < k)).any(1).double().mean().item() for k in ks])]

        def by_faiss(k, inputs=inputs, most=most):
            faiss = importlib.import_module("faiss")
            index = faiss.IndexFlatIP(D)
            if device == "cuda":
                index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index)
            z = inputs[k][0].cpu().numpy()
            index.add(z)
            return hits(torch.from_numpy(index.search(z, most)[1]).to(device), inputs[k][1])

        def by_topk(k, inputs=inputs, most=most):
            z, y = inputs[k]
            return hits(torch.cat([(part @ z.T).topk(most, dim=1).indices for part in z.split(1024)]), y)

        forms = {
            "ours": lambda k, inputs=inputs: [torch.tensor([*eval.recall_at_k(*inputs[k], ks=ks).values()])],
            "ours, k = 10 nearest": lambda k, inputs=inputs: top_k.top_k(inputs[k][0], k=10, exclude_self=True)[:0],
            "ours, MAP@R": lambda k, inputs=inputs: [eval.map_at_r(*inputs[k])][:0],
            "chunked topk": by_topk,
            "faiss, exact": by_faiss,
        }
        yield dict(case=f"recall@1..1000, N={N:,}", size=N, forms=forms, tolerance=2e-3, work=N * N * D, unit="TFLOP/s")


def step_cases(device, sizes):
    """Whole training steps: ResNet-50 at 224 px on a GPU, tiny at 64 px on a CPU."""
    net, pixels = ("resnet50", 224) if device == "cuda" else ("tiny", 64)
    for B, loss in itertools.product(sizes, metrix.LOSSES):
        forms = {}
        for mode in metrix.MODES:
            settings = metrix.recipe("toy", loss, mode) | dict(net=net, device=device)
            config = metrix.Config(dataset="toy", loss=loss, mode=mode, **settings)
            torch.manual_seed(0)
            model = models.ResNet(**models.NETS[net], embedding_size=D).to(device, memory_format=torch.channels_last)
            metric = metrix.LOSSES[loss](B // 5 + 1, D).to(device)
            optimizer, y = metrix.make_optimizer(model, metric, config), torch.arange(B, device=device) // 5
            images = torch.randn(B, 3, pixels, pixels, device=device).contiguous(memory_format=torch.channels_last)

            def run(k, config=config, model=model, metric=metric, optimizer=optimizer, images=images, y=y):
                value = metrix.step(model, metric, images, y, config, 0.4, metric.pairings[k % len(metric.pairings)])
                optimizer.zero_grad(set_to_none=True)
                value.backward()
                optimizer.step()
                return []

            forms[mode] = run
        title = f"{loss}, {net}, {pixels} px, B={B}"
        yield dict(case=title, size=B, forms=forms, tolerance=0, work=0, unit="")


CASES = dict(mix_pool=mix_pool_cases, mixed=mixed_cases, pairwise=pairwise_cases, recall=recall_cases, step=step_cases)

# --------------------------------------------------------------------------------------------- output


def machine(device):
    versions = dict(python=platform.python_version(), torch=torch.__version__)
    for name in ("triton", "faiss", "pytorch_metric_learning"):
        try:
            versions[name] = importlib.import_module(name).__version__
        except ImportError:
            versions[name] = "absent"
    hardware = torch.cuda.get_device_name() if device == "cuda" else f"{cpu_name()}, {torch.get_num_threads()} threads"
    return dict(hardware=hardware, device=device, date=datetime.date.today().isoformat(), versions=versions)


def cpu_name():
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def show(row, ceiling):
    """A case's title and rate, and a line per form: ms, how many times as long as ours, MiB."""
    rate = ""
    if "rate" in row:
        rate = f"   {row['rate']:.3g} {row['unit']}, {100 * row['rate'] / ceiling[row['unit']]:.0f} % of the ceiling"
    print(f"\n{row['kernel']}: {row['case']}{rate}")
    base = next(iter(row["forms"].values())).get("ms")
    for name, form in row["forms"].items():
        if "failed" in form:
            print(f"  {name:26}{form['failed']:>12}")
        else:
            ratio = f"{form['ms'] / base:.2f} x" if base else ""
            mib = "" if form["mib"] is None else f"{form['mib']:,.0f} MiB"
            print(f"  {name:26}{form['ms']:9.3g} ms{ratio:>10}{mib:>13}")


def parse(arguments):
    parser = argparse.ArgumentParser("./run.sh bench")
    parser.add_argument("what", nargs="?", default="all", choices=(*CASES, "all"))
    parser.add_argument("--sizes", help="batch sizes, or numbers of embeddings for recall: 100,2048")
    parser.add_argument("--json", help="file for the results; written after every case")
    parser.add_argument("--deadline", type=float, default=float("inf"), help="seconds after which no case is started")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.error = fail
    given = parser.parse_args(arguments)
    try:
        given.sizes = given.sizes and [int(size) for size in given.sizes.split(",")]
    except ValueError:
        fail(f"--sizes {given.sizes}: expected numbers such as 100,2048")
    if given.json and not os.path.isdir(os.path.dirname(given.json) or "."):
        fail(f"{given.json}: no such directory")
    if given.device == "cuda" and not torch.cuda.is_available():
        fail("--device cuda: there is no GPU")
    return given


def fail(message):
    print(f"bench: {message}", file=sys.stderr)
    sys.exit(2)


def main(arguments=None):
    start, given = time.perf_counter(), parse(arguments)
    torch.set_num_threads(torch.get_num_threads())
    result = dict(machine=machine(given.device), ceilings=ceilings(given.device), rows=[], left_out=[])
    reached = ", ".join(f"{value:.3g} {name}" for name, value in result["ceilings"].items())
    print(f"{result['machine']['hardware']}; ceilings: {reached}")
    for what in CASES if given.what == "all" else [given.what]:
        for case in CASES[what](given.device, given.sizes or SIZES[given.device][what]):
            if time.perf_counter() - start > given.deadline:
                result["left_out"].append(f"{what}: {case['case']}")
                continue
            result["rows"].append(measure(dict(kernel=what) | case, given.device))
            show(result["rows"][-1], result["ceilings"])
            if given.json:
                metrix.write(given.json, json.dumps(result, indent=1))
    if result["left_out"]:
        print("\nleft out at the deadline: " + "; ".join(result["left_out"]))
    result["seconds"] = round(time.perf_counter() - start)
    if given.json:
        metrix.write(given.json, json.dumps(result, indent=1))
    print("\n" + json.dumps(result))


if __name__ == "__main__":
    main()

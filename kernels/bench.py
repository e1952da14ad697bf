"""Time the kernels against what else one could use, on this machine: a table for people, a line of JSON for programs.

    ./run.sh bench [pairwise|mixed|mix_pool|recall|step|all] [--sizes 100,2048] [--json FILE] [--plot FILE] [--device cpu]
    ./run.sh bench speedrun        see kernels/speedrun.py
    ./run.sh bench readme          puts the tables of kernels/results/*.json into README.md

Every form of a case is run once and compared with the first before anything is timed; one that differs is shown as
wrong and not timed, one whose package is missing as absent, one that runs out of memory as such. Then all forms take
turns, on inputs that rotate, and the median counts, forward and backward together. "ours" is what the program itself
picks: Triton on a GPU, PyTorch on a CPU. Rates count the arithmetic or the bytes that the problem needs at least, and
stand beside what a large product or copy reaches in the same run.

Memory is what a form takes beyond its inputs at its peak: of the allocator on a GPU, of the process on Linux.
"""

import argparse
import ctypes
import datetime
import importlib
import itertools
import json
import os
import pathlib
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
from kernels import mix_pool

D = 512
INPUTS = 3  # sets of inputs that take turns
SECONDS = 12  # for the slowest form of a case, about; up to 30 repetitions of each
RESULTS = pathlib.Path(__file__).parent / "results"
README = pathlib.Path(__file__).parent.parent / "README.md"


# ------------------------------------------------------------------------------------------ measuring


class Absent(Exception):
    """A package is not installed."""


def package(name):
    try:
        return importlib.import_module(name)
    except ImportError:
        raise Absent from None


def synchronize(device):
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(form, k, device, brief=False):
    if brief:
        form(k)  # so that nobody pays for the memory that the form before gave back
    synchronize(device)
    start = time.perf_counter()
    form(k)
    synchronize(device)
    return time.perf_counter() - start


def process_memory(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


def peak_memory(form, device):
    """MiB that one call takes beyond what is there, or None where this system does not tell."""
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        form(0)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # gives back what earlier calls have freed
        before = process_memory("VmRSS")
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # sets the peak to the present
    except OSError:
        return None
    form(0)
    return (process_memory("VmHWM") - before) / 2**20


def limit_memory():
    """Let an allocation that this machine cannot serve fail, instead of having the system kill the process."""
    try:
        import resource

        with open("/proc/meminfo") as file:
            available = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
        resource.setrlimit(resource.RLIMIT_AS, (process_memory("VmSize") + int(0.9 * available), resource.RLIM_INFINITY))
    except (ImportError, OSError, ValueError):
        pass  # not Linux: the system does as it does


def out_of_memory(error):
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def differs(result, expected, tolerance):
    """Whether tensors differ by more than the tolerance, relative to the largest element of what is expected."""
    for one, other in zip(result, expected):
        scale = max(other.abs().max().item(), 1e-12)
        if not (one.to(other) - other).abs().max().item() <= tolerance * scale:
            return True
    return False


def measured(case, device):
    """A row: {"kernel", "case", "forms": {name: {"ms", "mib"} or {"told"}}, ..}."""
    row = {name: case[name] for name in ("kernel", "case", "size")} | dict(forms={})
    expected, valid, first = None, {}, {}
    for name, form in case["forms"].items():
        try:
            result = form(0)
            if expected is not None and differs(result, expected, case["tolerance"]):
                row["forms"][name] = dict(told="wrong")
                continue
            expected = result if expected is None else expected
            start = time.perf_counter()
            row["forms"][name] = dict(mib=peak_memory(form, device))
            valid[name], first[name] = form, time.perf_counter() - start
        except Absent:
            row["forms"][name] = dict(told="absent")
        except Exception as error:
            if not out_of_memory(error):
                raise
            row["forms"][name] = dict(told="out of memory")
    times = {name: [] for name in valid}
    longest = max(first.values(), default=0)
    for turn in range(max(1, min(30, int(SECONDS / max(longest, 1e-3))))):
        for name, form in valid.items():
            times[name].append(seconds(form, turn % INPUTS, device, brief=first[name] < 0.1))
    for name in valid:
        row["forms"][name]["ms"] = 1000 * statistics.median(times[name])
    if "ms" in row["forms"].get("ours", {}):
        rate = case["work"] / row["forms"]["ours"]["ms"] * 1000
        row["rate"], row["unit"] = rate / (1e12 if case["unit"] == "TFLOP/s" else 1e9), case["unit"]
    return row


def ceilings(device):
    """GB/s of a copy and TFLOP/s of a product, for each precision this device has."""
    big = torch.randn(2**26 if device == "cuda" else 2**24, device=device)
    target = torch.empty_like(big)
    side = 8192 if device == "cuda" else 2048
    a, b = torch.randn(2, side, side, device=device)
    forms = {"copy GB/s": (lambda k: target.copy_(big), 8 * len(big) / 1e9), "fp32 TFLOP/s": (lambda k: kernels.product(a, b), 2 * side**3 / 1e12)}
    if device == "cuda":
        half, other = a.bfloat16(), b.bfloat16()
        forms["bf16 TFLOP/s"] = (lambda k: half @ other, 2 * side**3 / 1e12)
        forms["tf32 TFLOP/s"] = (lambda k: with_tf32(lambda: a @ b), 2 * side**3 / 1e12)
    reached = {}
    for name, (form, work) in forms.items():
        seconds(form, 0, device)
        reached[name] = work / statistics.median(seconds(form, 0, device) for _ in range(7))
    return reached


def with_tf32(function):
    torch.set_float32_matmul_precision("high")
    try:
        return function()
    finally:
        torch.set_float32_matmul_precision("highest")


# ---------------------------------------------------------------------------------------------- cases


def clustered(B, per_class, device, k):
    """Embeddings of length 1 in classes of `per_class`, neither collapsed nor separate, and labels."""
    generator = torch.Generator().manual_seed(k)
    y = torch.arange(B) // per_class
    z = torch.randn(B // per_class + 1, D, generator=generator)[y] + 1.5 * torch.randn(B, D, generator=generator)
    return F.normalize(z, dim=1).to(device), y.to(device)


def gradient_of(function, z):
    """[value, gradient] of a loss at z."""
    z = z.detach().requires_grad_()
    value = function(z)
    return [value.detach(), *torch.autograd.grad(value, z)]


def switched(choice, many, function):
    """The function with the kernels' choice, and on a CPU with kernels from `many` terms on, if it is given."""

    def run(k):
        before = kernels.choice, losses.MANY, losses.MANY_TRIPLETS
        kernels.choice = choice
        if many is not None:
            losses.MANY = losses.MANY_TRIPLETS = many
        try:
            return function(k)
        finally:
            kernels.choice, losses.MANY, losses.MANY_TRIPLETS = before

    return run


def pairwise_cases(device, sizes):
    for name, B in itertools.product(("contrastive", "multisimilarity", "proxyanchor"), sizes or SIZES[device]["pairwise"]):
        inputs = [clustered(B, 4, device, k) for k in range(INPUTS)]
        torch.manual_seed(0)
        metric = metrix.LOSSES[name](B // 4 + 1, D).to(device)
        columns = B // 4 + 1 if name == "proxyanchor" else B

        def run(k, metric=metric, inputs=inputs):
            z, y = inputs[k]
            return gradient_of(lambda z: metric(z, y), z)

        plain = torch.compile(metric.clean, dynamic=False)

        def compiled(k, plain=plain, inputs=inputs):
            z, y = inputs[k]
            return gradient_of(lambda z: plain(F.normalize(z, dim=1), y), z)

        def library(k, name=name, metric=metric, inputs=inputs):
            loss, miner = pml(name, metric)
            z, y = inputs[k]
            return gradient_of(lambda z: loss(z, y, miner(z, y)) if miner else loss(z, y), z)

        whole = switched("torch", 2**62, run)
        forms = {"ours": switched("auto", None, run), "whole matrix": whole}
        forms |= {"torch.compile": switched("torch", 2**62, compiled), "by rows": switched("torch", 0, run), "library": library}
        work = 6 * columns * B * D  # the product, and backward again and once with the gradient of it
        title = f"{name}, B={B:,}"
        yield dict(kernel="pairwise", case=title, size=B, forms=forms, tolerance=1e-3, work=work, unit="TFLOP/s")


def pml(name, metric):
    """pytorch-metric-learning's loss and miner of the same definition."""
    library, miners = package("pytorch_metric_learning.losses"), package("pytorch_metric_learning.miners")
    if name == "contrastive":
        return library.ContrastiveLoss(pos_margin=0, neg_margin=metric.neg_margin), None
    if name == "multisimilarity":
        loss = library.MultiSimilarityLoss(metric.ms_alpha, metric.ms_beta, metric.ms_base)
        return loss, miners.MultiSimilarityMiner(metric.ms_epsilon)
    loss = library.ProxyAnchorLoss(*metric.proxies.shape, margin=metric.pa_margin, alpha=metric.pa_alpha)
    loss.proxies.data.copy_(metric.proxies.data)
    return loss.to(metric.proxies.device), None


def mixed_cases(device, sizes):
    for name, B in itertools.product(("contrastive", "multisimilarity", "proxyanchor"), sizes or SIZES[device]["mixed"]):
        inputs = [clustered(B, 5, device, k) for k in range(INPUTS)]
        torch.manual_seed(0)
        metric = metrix.LOSSES[name](B // 5 + 1, D).to(device)
        pairing = "anchor-negative" if name == "proxyanchor" else "positive-negative"

        def run(k, metric=metric, inputs=inputs, pairing=pairing):
            z, y = inputs[k]
            return gradient_of(lambda z: metric.mixed_embed(z, y, 0.4, pairing), z)

        def built(k, metric=metric, inputs=inputs, pairing=pairing):
            z, y = inputs[k]
            i, j = losses.full_bank(y, pairing)

            def loss(z):
                z = F.normalize(z, dim=1)
                return metric.mixed(z, y, 0.4 * z[i] + 0.6 * z[j], i, 0.4, pairing)

            return gradient_of(loss, z)

        forms = {"ours": switched("auto", None, run), "whole matrix": switched("torch", 2**62, run)}
        forms |= {"by rows": switched("torch", 0, run), "bank built": switched("torch", 2**62, built)}
        yield dict(kernel="mixed", case=f"{name}, B={B:,}", size=B, forms=forms, tolerance=1e-3, work=6 * B * B * D, unit="TFLOP/s")


def mix_pool_cases(device, sizes):
    for B in sizes or SIZES[device]["mix_pool"]:
        C, side = 2048, 7
        y = torch.arange(B, device=device) // 5
        i, j = losses.full_bank(y, "positive-negative")
        kind = torch.bfloat16 if device == "cuda" else torch.float32
        maps = [torch.randn(B, C, side, side, device=device).relu_().to(kind, memory_format=torch.channels_last) for _ in range(INPUTS)]

        def naive(features, i=i, j=j):  # max, not amax, which shares the gradient among the many zeros that tie
            mixed = (0.4 * features[i] + 0.6 * features[j]).flatten(2)
            return mixed.mean(2) + mixed.max(2).values

        def summed(function, maps=maps):
            return lambda k: gradient_of(lambda features: function(features).sum(), maps[k])

        ours = summed(lambda features, i=i, j=j: mix_pool.mix_pool(features, i, j, 0.4))
        forms = {"ours": switched("auto", None, ours), "whole maps": summed(naive)}
        forms |= {"torch.compile": summed(torch.compile(naive, dynamic=False)), "in chunks": switched("torch", None, ours)}
        size = maps[0].element_size()
        work = 2 * size * maps[0].numel() + len(i) * C * (2 * size + 3)  # maps in and out; pooled, its gradient, bytes
        yield dict(kernel="mix_pool", case=f"{B} maps of {C} x {side} x {side}, {len(i):,} pairs", size=B, forms=forms, tolerance=3e-2 if device == "cuda" else 1e-3, work=work, unit="GB/s")


def recall_cases(device, sizes):
    ks = (1, 10, 100, 1000)
    for N in sizes or SIZES[device]["recall"]:
        inputs = [clustered(N, 5, device, k) for k in range(INPUTS)]
        most = min(1001, N)

        def ours(k, inputs=inputs):
            return [torch.tensor([*eval.recall_at_k(*inputs[k], ks=ks).values()])]

        def from_lists(neighbours, y, ks=ks):
            """From the nearest of each query, itself among them."""
            others = neighbours != torch.arange(len(y), device=y.device)[:, None]
            hits = (y[neighbours] == y[:, None]) & others
            position = others.cumsum(1) - 1  # of each neighbour among the others
            return [torch.tensor([(hits & (position < k)).any(1).double().mean().item() for k in ks])]

        def faiss_search(k, inputs=inputs, most=most):
            faiss = package("faiss")
            z, y = inputs[k]
            index = faiss.IndexFlatIP(D)
            if device == "cuda":
                index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index)
            z = z.cpu().numpy()
            index.add(z)
            return from_lists(torch.from_numpy(index.search(z, most)[1]).to(y.device), y)

        def by_top_k(k, inputs=inputs, most=most, step=1024):
            z, y = inputs[k]
            lists = [(part @ z.T).topk(most, dim=1).indices for part in z.split(step)]
            return from_lists(torch.cat(lists), y)

        def whole(k, by_top_k=by_top_k, N=N):
            return by_top_k(k, step=N)

        def everything(k, inputs=inputs):
            value = eval.evaluate(*inputs[k], ks=ks)
            return [torch.tensor([*value["recall"].values()])]

        forms = {"ours": ours, "ours, with MAP@R": everything, "whole matrix": whole, "by rows": by_top_k, "library": faiss_search}
        yield dict(kernel="recall", case=f"recall@1..1000, N={N:,}", size=N, forms=forms, tolerance=2e-3, work=N * N * D, unit="TFLOP/s")


def step_cases(device, sizes):
    """Whole training steps of the twelve cells on balanced batches: ResNet-50 at 224 px on a GPU, tiny at 64 px else."""
    net, pixels = ("resnet50", 224) if device == "cuda" else ("tiny", 64)
    for B, loss in itertools.product(sizes or SIZES[device]["step"], metrix.LOSSES):
        forms = {}
        for mode in metrix.MODES:
            config = metrix.recipe_of("toy", loss, mode) | dict(net=net, image_size=pixels, batch_size=B, device=device)
            config = metrix.Config(**config)
            torch.manual_seed(0)
            model = models.ResNet(**models.NETS[net], embedding_size=D, bn="stats").to(device, memory_format=torch.channels_last)
            metric = metrix.LOSSES[loss](B // 5, D).to(device)
            optimizer = metrix.make_optimizer(model, metric, config)
            y = torch.arange(B) // 5
            images = torch.randn(B, 3, pixels, pixels, device=device).to(memory_format=torch.channels_last)

            def run(k, config=config, model=model, metric=metric, optimizer=optimizer, images=images, y=y):
                pairing = metric.pairings[k % len(metric.pairings)]
                loss = metrix.step(model, metric, images, y, config, 0.4, pairing)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                return []

            forms[mode] = run
        yield dict(kernel="step", case=f"{loss}, {net}, {pixels} px, B={B}", size=B, forms=forms, tolerance=0, work=0, unit="")


CASES = dict(pairwise=pairwise_cases, mixed=mixed_cases, mix_pool=mix_pool_cases, recall=recall_cases, step=step_cases)
SIZES = {
    "cpu": dict(pairwise=(100, 2048, 8192), mixed=(100, 300), mix_pool=(100,), recall=(5924, 20000), step=(100,)),
    "cuda": dict(
        pairwise=(100, 1024, 4096, 16384, 65536),
        mixed=(100, 500, 4000),
        mix_pool=(100, 200),
        recall=(5924, 60502, 1_000_000),
        step=(100,),
    ),
}
LIBRARY = dict(pairwise="pytorch-metric-learning", recall="faiss, exact, k=1001")


# --------------------------------------------------------------------------------------------- output


def machine(device):
    """What these figures were measured on."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("triton", "faiss", "pytorch_metric_learning"):
        try:
            versions[name] = package(name).__version__
        except Absent:
            versions[name] = "absent"
    if device == "cuda":
        hardware = torch.cuda.get_device_name()
    else:
        name = platform.processor()
        if os.path.exists("/proc/cpuinfo"):
            with open("/proc/cpuinfo") as file:
                name = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), name)
        hardware = f"{name}, {torch.get_num_threads()} threads"
    return dict(hardware=hardware, device=device, date=datetime.date.today().isoformat(), versions=versions)


def cell(form, base):
    """A form's time, and how many times the base's it is."""
    if "ms" not in form:
        return form.get("told", "")
    text = f"{form['ms']:.3g}" if form["ms"] < 1000 else f"{form['ms']:,.0f}"
    return text if form is base or "ms" not in base else f"{text} ({form['ms'] / base['ms']:.3g}x)"


def lines(rows, ceiling):
    """The tables, as lists of cells, by kernel: a header, then a line a case."""
    for kernel, group in itertools.groupby(rows, key=lambda row: row["kernel"]):
        group = list(group)
        names = [*group[0]["forms"]]
        titles = [LIBRARY.get(kernel, name) if name == "library" else name for name in names]
        header = [kernel, *(f"{title}, ms" for title in titles), "MiB, in this order"]
        header += ["images/s, in this order"] if kernel == "step" else ["rate", "of ceiling"]
        table = [header]
        for row in group:
            forms = [row["forms"].get(name, {}) for name in names]
            cells = [row["case"], *(cell(form, forms[0]) for form in forms)]
            cells.append(" / ".join(f"{form['mib']:,.0f}" if form.get("mib") is not None else "-" for form in forms))
            if kernel == "step":
                cells.append(" / ".join(f"{1000 * row['size'] / form['ms']:.0f}" for form in forms))
            elif "rate" in row:
                most = ceiling.get("copy GB/s" if row["unit"] == "GB/s" else "fp32 TFLOP/s")
                cells += [f"{row['rate']:.3g} {row['unit']}", f"{100 * row['rate'] / most:.0f} %"]
            else:
                cells += ["", ""]
            table.append(cells)
        yield table


def show(table):
    widths = [max(len(line[n]) for line in table) for n in range(len(table[0]))]
    for line in table:
        print("  ".join(text.ljust(w) if n == 0 else text.rjust(w) for n, (text, w) in enumerate(zip(line, widths))))
    print(flush=True)


def plot(path, rows):
    """Milliseconds of every form by size, a panel a case."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        fail("--plot needs matplotlib, which is not installed")
    series = {}
    for row in rows:
        for name, form in row["forms"].items():
            if "ms" in form:
                series.setdefault(f"{row['kernel']}: {row['case'].split(',')[0]}", {}).setdefault(name, []).append((row["size"], form["ms"]))
    figure, panels = plt.subplots(1, len(series), figsize=(4 * len(series), 4), squeeze=False)
    for panel, (title, forms) in zip(panels[0], series.items()):
        for name, points in forms.items():
            panel.plot(*zip(*sorted(points)), marker="o", label=name)
        panel.set(title=title, xscale="log", yscale="log", xlabel="size", ylabel="ms")
        panel.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path)


def readme():
    """Replace what stands between the two marks in README.md by the tables of every file of results."""
    from kernels import speedrun  # which imports this file

    begin, end = "<!-- results of ./run.sh bench: begin -->", "<!-- end -->"
    text = README.read_text()
    if begin not in text or end not in text:
        fail(f"{README}: no place marked {begin} .. {end}")
    parts = []
    for path in sorted(RESULTS.glob("*.json")):
        result = json.loads(path.read_text())
        about = result["machine"]
        versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
        reached = ", ".join(f"{name.split()[0]} {value:.3g} {name.split()[1]}" for name, value in result["ceilings"].items())
        parts.append(f"**{about['hardware']}**, {about['date']} ({versions}). Ceilings in the same run: {reached}.")
        tables = [speedrun.lines(result)] if "parts" in result else lines(result["rows"], result["ceilings"])
        for header, *table in tables:
            ruler = ["---"] + ["---:"] * (len(header) - 1)
            parts.append("\n".join("| " + " | ".join(line) + " |" for line in (header, ruler, *table)))
    before, after = text.split(begin)[0], text.split(end)[1]
    README.write_text(before + begin + "\n" + "\n\n".join(parts) + "\n" + end + after)


def fail(message):
    print(f"bench: {message}", file=sys.stderr)
    sys.exit(2)


def parse(arguments):
    parser = argparse.ArgumentParser("bench", description="Time the kernels against what else one could use.")
    parser.add_argument("what", nargs="?", default="all", choices=(*CASES, "all", "readme"))
    parser.add_argument("--sizes", help="batch sizes, or numbers of embeddings for recall: 100,2048")
    parser.add_argument("--json", help="file to write the results to")
    parser.add_argument("--plot", help="picture to draw of times by size; needs matplotlib")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.error = fail
    given = parser.parse_args(arguments)
    check_written(given.json, given.plot)
    return given


def check_written(*files):
    """Fail before the work if there is no directory for what it is to write."""
    for file in filter(None, files):
        if not os.path.isdir(os.path.dirname(file) or "."):
            fail(f"{file}: there is no such directory; make it, or name another")


def main(arguments=None):
    given = parse(arguments)
    if given.what == "readme":
        return readme()
    try:
        sizes = [int(size) for size in given.sizes.split(",")] if given.sizes else None
        assert sizes is None or min(sizes) >= 10
    except (ValueError, AssertionError):
        fail(f"--sizes {given.sizes}: expected numbers from 10 on, such as 100,2048")
    if given.device == "cuda" and not torch.cuda.is_available():
        fail("--device cuda: there is no GPU here")
    torch.set_num_threads(torch.get_num_threads())
    if given.device == "cpu":
        limit_memory()
    result = dict(machine=machine(given.device), ceilings=ceilings(given.device), rows=[])
    print(f"{result['machine']['hardware']}; " + ", ".join(f"{name} {value:.3g}" for name, value in result["ceilings"].items()) + "\n")
    started = time.perf_counter()
    for what in CASES if given.what == "all" else [given.what]:
        rows = [measured(case, given.device) for case in CASES[what](given.device, sizes)]
        result["rows"] += rows
        for table in lines(rows, result["ceilings"]):
            show(table)
    result["seconds"] = round(time.perf_counter() - started)
    if given.json:
        with metrix.replacing(given.json) as name, open(name, "w") as file:
            print(json.dumps(result, indent=1), file=file)
    if given.plot:
        plot(given.plot, result["rows"])
    print(json.dumps(result))


if __name__ == "__main__":
    main()

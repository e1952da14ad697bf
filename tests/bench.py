"""Time Metrix against the alternatives on this machine: Markdown tables for people, a last line of JSON for programs.

    ./run.sh bench [mix_pool|step|recall|pairwise|mixed|all] [--sizes 100,2048] [--json FILE] [--deadline SECONDS]

"ours" is what the program picks, "torch" and "triton" are its two backends. Before an implementation is timed, its
result is compared with that of "torch", or else of "ours". Losses and pooling run forward and backward. A cell shows
the median time, its ratio to the first column, and the peak memory beyond the inputs, or why the implementation
failed. A rate is an estimate of the work divided by the time of ours. Its ceiling is that of a large product or copy.
"""

import argparse
import importlib.metadata
import itertools
import json
import math
import platform
import re
import statistics
import sys
import time
from ctypes import CDLL
from pathlib import Path
from unittest import mock

START = time.perf_counter()
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the project's root instead of this directory

import torch
import torch.nn.functional as F

import eval
import kernels
import losses
import metrix
from kernels import pairwise
from kernels.mix_pool import mix_pool
from kernels.top_k import top_k

D, LAM = 512, 0.4  # embedding size, weight of a mix
INPUTS = 3  # inputs that take turns, so that no cache holds a large one
SECONDS, REPETITIONS = 2, 30  # an implementation is timed until it reaches either
BF16 = 0.1  # allowed relative error in bfloat16, whose rounding moves maxima and hinges

# ------------------------------------------------------------------------------------------ measuring


def measure(functions, inputs, parameters, tolerance, given):
    """{implementation: {"ms", "mib", "repetitions"} or {"failed": why}}."""
    results = {name: dict(failed="left out at the deadline") for name in functions}
    times, expected = {name: [] for name in functions}, None
    reference_first = sorted(functions, key=lambda name: name != "torch")
    for turn, name in itertools.product(range(REPETITIONS), reference_first):
        late = time.perf_counter() - START > given.deadline
        if late or sum(times[name]) > SECONDS or (turn > 0 and "failed" in results[name]):
            continue
        run = lambda: call(functions[name], inputs[turn % INPUTS], parameters)
        clock = lambda: times[name].append(seconds(run, given.device))
        try:
            if turn == 0:
                tensors = run()  # the first call also compiles
                expected = expected or tensors
                check(tensors, expected, BF16 if "bf16" in name else tolerance)
                results[name] = dict(mib=peak_mib(clock, given.device))
            else:
                clock()
            results[name] |= dict(ms=1000 * statistics.median(times[name]), repetitions=len(times[name]))
        except Exception as error:  # the other implementations go on
            results[name] = failure(error)
        except KeyboardInterrupt:  # nothing else starts, but the table and the JSON are finished
            results[name], given.deadline = dict(failed="interrupted"), 0
    return results


def call(function, inputs, parameters):
    """The function's result. With parameters, also its gradients in the first input and in them."""
    if parameters is None:
        return function(*inputs)
    value = function(inputs[0].requires_grad_(), *inputs[1:])
    return [value.detach(), *torch.autograd.grad(value, [inputs[0], *parameters])]


def check(tensors, expected, tolerance):
    """ArithmeticError if the norm of a difference is too large."""
    for one, other in zip(tensors, expected, strict=True) if tensors is not None else ():
        error = ((one - other).double().norm() / other.double().norm().clamp_min(1e-12)).item()
        if not error <= tolerance:
            raise ArithmeticError(f"wrong by {error:.1g}")


def failure(error):
    # A line that names a variable like TORCH_LOGS is advice.
    lines = [line for line in str(error).splitlines() if line.strip() and "TORCH" not in line]
    return dict(failed=": ".join([type(error).__name__, *lines[-1:]]))


def seconds(run, device):
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - start


def peak_mib(run, device):
    """MiB that a call needs beyond what is allocated before it. None where the system does not say."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    mib = lambda field: int(re.search(rf"{field}:\s*(\d+)", Path("/proc/self/status").read_text())[1]) / 1024
    try:
        CDLL("libc.so.6").malloc_trim(0)  # give back what earlier calls have freed
        Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    except OSError:
        return run()
    before = mib("VmRSS")
    run()
    return mib("VmHWM") - before


def ceilings(device):
    """GB/s of a large copy, TFLOP/s of a large product."""
    length, side = (2**26, 8192) if device == "cuda" else (2**24, 2048)
    (source, target), (a, b) = torch.randn(2, length, device=device), torch.randn(2, side, side, device=device)
    half, work = a.bfloat16(), 2e-12 * side**3
    runs = {"GB/s": (lambda: target.copy_(source), 8e-9 * length), "TFLOP/s": (lambda: kernels.product(a, b), work)}
    if device == "cuda":
        runs["bf16 TFLOP/s"] = lambda: half @ half, work
    return {unit: work / min(seconds(run, device) for _ in range(7)) for unit, (run, work) in runs.items()}


# ---------------------------------------------------------------------------------------------- cases


def random_clusters(B, per_class, device):
    """Inputs (z, y): unit embeddings (B, D) and labels (B,). Classes overlap, and hinges are active."""
    y = torch.arange(B, device=device) // per_class
    centres = 8 + torch.randn(INPUTS, B // per_class + 1, D, device=device)
    return [(F.normalize(c[y] + 3 * torch.randn(B, D, device=device), dim=1), y) for c in centres]


def patched(function, module, name, value):
    """The function with another value of module.name during its calls."""
    return mock.patch.object(module, name, value)(lambda *inputs: function(*inputs))


def ours(function, device, title="{}"):
    """{implementation: function}: as the program picks, and on a GPU also with both backends."""
    functions = {title.format("ours"): function}
    for backend in ("torch", "triton") if device == "cuda" else ():
        functions[title.format(backend)] = patched(function, kernels, "backend", backend)
    return functions


def mix_pool_case(device, B, _):
    C, side, dtype, tolerance = 2048, 7, *((torch.bfloat16, BF16) if device == "cuda" else (torch.float32, 1e-3))
    i, j = losses.full_bank(torch.arange(B, device=device) // 5, "positive-negative")
    maps = [torch.randn(B, C, side, side, device=device).relu_().to(dtype) for _ in range(INPUTS)]
    inputs = [[features.contiguous(memory_format=torch.channels_last)] for features in maps]

    def whole_maps(features):
        mixed = (LAM * features[i] + (1 - LAM) * features[j]).flatten(2)
        return (mixed.mean(2) + mixed.max(2).values).sum()

    functions = ours(lambda features: mix_pool(features, i, j, LAM).sum(), device)
    functions |= {"whole maps": whole_maps, "torch.compile": torch.compile(whole_maps, dynamic=False)}
    title, size = f"{B} maps of {C} x {side} x {side}, {len(i):,} pairs", dtype.itemsize
    work = 2 * size * maps[0].numel() + 2 * (size + 1) * len(i) * C  # bytes of maps, pooled maps and argmax
    return title, functions, inputs, [], tolerance, work


def step_case(device, B, loss):
    """Training steps. The modes compute different losses, so no results are compared."""
    net, pixels, precision = ("resnet50", 224, "bf16") if device == "cuda" else ("tiny", 64, "fp32")
    images = torch.randn(INPUTS, B, 3, pixels, pixels, device=device)
    inputs = [(x.contiguous(memory_format=torch.channels_last), torch.arange(B, device=device) // 5) for x in images]

    def training_step(mode):
        settings = dict(net=net, precision=precision, embedding_size=D, device=device)
        config = metrix.Config("toy", loss, mode, **metrix.recipe("toy", loss, mode) | settings)
        model, metric = metrix.make_model(config, "none"), metrix.LOSSES[loss](B // 5 + 1, D).to(device)
        optimizer, pairings = metrix.make_optimizer(model, metric, config), itertools.cycle(metric.pairings)

        def step(images, y):
            with metrix.autocast(config):
                value = metrix.step(model, metric, images, y, config, LAM, next(pairings))
            optimizer.zero_grad()
            value.backward()
            optimizer.step()

        return step

    title = f"{loss}, {net} at {pixels} px in {precision}, B={B:,}"
    return title, {mode: training_step(mode) for mode in metrix.MODES}, inputs, None, 0, 0


def recall_case(device, N, _):
    ks, most = (1, 10, 100, 1000), min(1001, N)

    def recall(nearest, y):  # nearest: (N, most), the query itself included
        others = nearest != torch.arange(N, device=device)[:, None]
        right, place = others & (y[nearest] == y[:, None]), others.cumsum(1)
        return [torch.stack([(right & (place <= k)).any(1).double().mean() for k in ks])]

    def by_topk(z, y):
        return recall(torch.cat([(rows @ z.T).topk(most, dim=1).indices for rows in z.split(1024)]), y)

    def by_faiss(z, y):
        import faiss

        index, z = faiss.IndexFlatIP(D), z.cpu().numpy()
        if device == "cuda":
            index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index)
        index.add(z)
        return recall(torch.from_numpy(index.search(z, most)[1]).to(device), y)

    functions = ours(lambda *zy: [torch.tensor([*eval.recall_at_k(*zy, ks=ks).values()], device=device)], device)
    # The results of these two are not comparable with recall, so they are only timed.
    functions["ours, 10 nearest"] = lambda z, y: [top_k(z, k=10, exclude_self=True)] and None
    functions["ours, MAP@R"] = lambda z, y: [eval.map_at_r(z, y)] and None
    functions |= {"chunked topk": by_topk, "faiss, exact": by_faiss}
    return f"recall@1..1000, N={N:,}", functions, random_clusters(N, 5, device), None, 2e-3, N * N * D


def pairwise_case(device, B, loss):
    metric = metrix.LOSSES[loss](B // 4 + 1, D).to(device)
    parameters = [*metric.parameters()]

    def by_library(z, y):
        from pytorch_metric_learning import losses, miners

        if loss == "contrastive":
            return losses.ContrastiveLoss(pos_margin=0, neg_margin=metric.neg_margin)(z, y)
        if loss == "multisimilarity":
            mined = miners.MultiSimilarityMiner(metric.ms_epsilon)(z, y)
            return losses.MultiSimilarityLoss(metric.ms_alpha, metric.ms_beta, metric.ms_base)(z, y, mined)
        theirs = losses.ProxyAnchorLoss(*metric.proxies.shape, margin=metric.pa_margin, alpha=metric.pa_alpha)
        theirs.proxies = metric.proxies
        return theirs(z, y)

    functions = ours(metric, device)
    if device == "cuda":
        in_bf16 = lambda x, v, *rest: pairwise.pair_sums(x.bfloat16(), v.bfloat16(), *rest)
        functions["triton, bf16"] = patched(functions["triton"], losses, "pair_sums", in_bf16)
    if B * B <= pairwise.PIECE:  # above, plain PyTorch works in pieces
        compiled, unguarded = torch.compile(metric, dynamic=False), lambda a, b: a @ b.T  # `relaxed` does not compile
        functions["torch.compile"] = patched(compiled, pairwise, "similarities", unguarded)
    functions["pytorch-metric-learning"] = by_library
    work = 2 * D * B * (3 * len(metric.proxies) if parameters else 2 * B)  # similarities, gradients of z, of proxies
    return f"{loss}, B={B:,}", functions, random_clusters(B, 4, device), parameters, 1e-3, work


def mixed_case(device, B, loss):
    """All mixes of two embeddings: from their similarities (embed mode), and built first (as in feature mode)."""
    metric = metrix.LOSSES[loss](B // 5 + 1, D).to(device)
    pairing = metric.pairings[0]

    def bank_built(z, y):
        (i, j), z = losses.full_bank(y, pairing), F.normalize(z, dim=1)
        return metric.mixed(z, y, LAM * z[i] + (1 - LAM) * z[j], i, LAM, pairing)

    functions = {"ours": lambda z, y: metric.mixed_embed(z, y, LAM, pairing)}
    functions |= ours(bank_built, device, "bank built, {}")
    return f"{loss}, B={B:,}", functions, random_clusters(B, 5, device), [*metric.parameters()], 1e-3, 0


CASES = {  # kernel: how a case is built, its losses, sizes on a CPU and on a GPU, unit of the rate
    "mix_pool": (mix_pool_case, [""], [40], [100], "GB/s"),
    "step": (step_case, metrix.LOSSES, [100], [100], None),
    "recall": (recall_case, [""], [5924, 20000], [5924, 60502], "TFLOP/s"),
    "pairwise": (pairwise_case, metrix.LOSSES, [100, 2048, 8192], [100, 2048, 4096, 8192, 16384, 65536], "TFLOP/s"),
    "mixed": (mixed_case, metrix.LOSSES, [100, 300], [100, 300, 1000], None),
}

# --------------------------------------------------------------------------------------------- output


def machine(device):
    info = Path("/proc/cpuinfo")  # Linux only
    cpu = info.exists() and re.search(r"model name\s*: (.*)", info.read_text())
    cpu = f"{cpu[1] if cpu else platform.processor()}, {torch.get_num_threads()} threads"
    packages = ("torch", "triton", "faiss-cpu", "faiss-gpu", "pytorch-metric-learning")
    versions = {each.name: each.version for each in importlib.metadata.distributions() if each.name in packages}
    hardware = torch.cuda.get_device_name() if device == "cuda" else cpu
    return dict(hardware=hardware, date=time.strftime("%Y-%m-%d"), python=platform.python_version()) | versions


def digits(x):
    return "?" if x is None or math.isnan(x) else f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def show(row, ceiling, header):
    """Print a row of a Markdown table, after a header if its columns are new. Returns the header."""
    first, unit = next(iter(row["results"].values())).get("ms", math.nan), row["unit"]
    cells = {row["kernel"]: row["case"]}
    for name, result in row["results"].items():
        cells[name] = result.get("failed", "").replace("|", "/")
        if "ms" in result:
            cells[name] = f"{digits(result['ms'])} ms ({digits(result['ms'] / first)} x), {digits(result['mib'])} MiB"
    if unit:
        rate = row["work"] / first / {"GB/s": 1e6, "TFLOP/s": 1e9}[unit]
        cells["rate, share of the ceiling"] = f"{digits(rate)} {unit}, {digits(100 * rate / ceiling[unit])}%"
    columns = "| {:44} |" + " {:30} |" * (len(cells) - 1)
    if [*cells] != header:
        print("\n" + columns.format(*cells))
        print(columns.format("---", *["---:"] * len(cells)))
    print(columns.format(*cells.values()), flush=True)
    return [*cells]


def numbers(text):
    return [int(number) for number in text.split(",")]


def parse(arguments):
    devices = ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",)
    style = dict(usage=argparse.SUPPRESS, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser = argparse.ArgumentParser("bench", description=__doc__, allow_abbrev=False, **style)
    parser.add_argument("what", nargs="?", default="all", choices=(*CASES, "all"))
    parser.add_argument("--sizes", type=numbers, help="batch sizes, or numbers of embeddings for recall: 100,2048")
    parser.add_argument("--json", type=Path, help="file for the results, written after every row")
    parser.add_argument("--deadline", type=float, default=math.inf, help="seconds after which nothing is started")
    parser.add_argument("--device", default=devices[0], choices=devices)
    given = parser.parse_args(arguments)
    if given.json and not given.json.parent.is_dir():
        parser.error(f"--json {given.json}: its directory does not exist")
    return given


def main(arguments=None):
    given = parse(arguments)
    result = dict(machine=machine(given.device), ceilings=ceilings(given.device), rows=[])
    print(", ".join(f"{name} {value}" for name, value in result["machine"].items()))
    print("ceilings: " + ", ".join(f"{digits(rate)} {unit}" for unit, rate in result["ceilings"].items()))
    header = None
    for kernel in CASES if given.what == "all" else [given.what]:
        build, of_losses, *sizes, unit = CASES[kernel]
        for size, loss in itertools.product(given.sizes or sizes[given.device == "cuda"], of_losses):
            torch.manual_seed(0)
            torch.compiler.reset()  # a function is compiled for at most eight sizes
            row = dict(kernel=kernel, case=f"{loss} {size}", size=size, unit=unit, work=0)
            try:
                row["case"], *case, row["work"] = build(given.device, size, loss)
                row["results"] = measure(*case, given)
            except Exception as error:  # inputs that do not fit
                row["results"] = dict(ours=failure(error))
            header = show(row, result["ceilings"], header)
            result["rows"].append(row)
            if given.json:
                given.json.write_text(json.dumps(result, indent=1))
    print("\n" + json.dumps(result | dict(seconds=round(time.perf_counter() - START))))


if __name__ == "__main__":
    main()
